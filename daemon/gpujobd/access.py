"""Who is at the other end of a connection, and what that person may do.

Rule 1: identity is what the kernel says (SO_PEERCRED, SO_PEERGROUPS), never what a client says.
Rule 2: names are looked up in a thread and cached: a directory server that hangs must not be felt on the loop, nor
by those who were known before. Nobody is let in under a guessed name: jobs would be charged to it for ever.
Rule 3: nobody acts on rights that were looked up more than a minute ago, or under another configuration, however long
the connection lasts. What the kernel said at connect(), uid and groups, stays, as it does for any process.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterable
from typing import Final

import trio

from gpujobd.config import Config
from gpujobd.core.inputs import Who
from gpujobd.peer import Peer

NAMES_KEPT_S: Final = 60.0
LOOK_UP_S: Final = 5.0
KNOWN_MAX: Final = 10_000
LOOK_UPS_MAX: Final = 8  # threads of their own: those that hang must not be missed elsewhere


class Directory:
    """Names and rights of uids, cached for a minute."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._names: dict[int, str] = {}
        self._known: dict[tuple[int, tuple[int, ...]], tuple[float, Who]] = {}
        self._threads = trio.CapacityLimiter(LOOK_UPS_MAX)

    def reload(self, config: Config) -> None:
        self._config = config
        self._known.clear()

    def known(self, peer: Peer) -> Who | None:
        """What was looked up in the last minute. Asked for every request: costs a look into a table."""
        known = self._known.get((peer.uid, peer.gids))
        return known[1] if known is not None and trio.current_time() - known[0] <= NAMES_KEPT_S else None

    async def who(self, peer: Peer) -> Who | None:
        """None: the host's user database does not answer, and nothing is known from before."""
        if (fresh := self.known(peer)) is not None:
            return fresh
        key = (peer.uid, peer.gids)
        known, config = self._known.get(key), self._config
        found = None
        with trio.move_on_after(LOOK_UP_S):
            found = await trio.to_thread.run_sync(
                _look_up, config, peer, abandon_on_cancel=True, limiter=self._threads
            )
        if config is not self._config:  # read again meanwhile: what was found is of the old one
            return await self.who(peer)
        found = found or (known[1] if known else None)
        if found is not None:
            self._names[peer.uid] = found.name
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[key] = (trio.current_time(), found)
        return found

    def name(self, uid: int) -> str:
        """The user's name if it is known by now, else the uid in digits. Never blocks."""
        return self._names.get(uid, str(uid))

    async def learn(self, uids: Iterable[int]) -> None:
        """Look up the names of uids that only the journal knows."""
        missing = set(uids) - self._names.keys()
        if missing:
            self._names.update(
                await trio.to_thread.run_sync(
                    _names_of, missing, abandon_on_cancel=True, limiter=self._threads
                )
            )


def _names_of(uids: Iterable[int]) -> dict[int, str]:
    return {uid: _user_name(uid) for uid in uids}


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _look_up(config: Config, peer: Peer) -> Who:
    name = _user_name(peer.uid)
    groups = {_group_name(gid) for gid in peer.gids}
    access = config.file.access
    admin = peer.uid in (0, os.geteuid()) or any(group.removeprefix("@") in groups for group in access.admins)
    tenants = {t for t, section in config.file.tenants.items() if _named(section.members, name, groups)}
    return Who(
        uid=peer.uid,
        name=name,
        admin=admin,
        observer=admin or _named(access.observers, name, groups),
        high=admin or _named(access.high_priority, name, groups),
        tenants=frozenset({name} | tenants),
    )


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _named(members: Iterable[str], name: str, groups: set[str]) -> bool:
    """Whether a list of users and "@groups" names this user."""
    return any(m.removeprefix("@") in groups if m.startswith("@") else m == name for m in members)
