"""The notifier's own socket: what people ask it. The frames are those of `gpujobd.protocol`.

Rule 1: identity is what the kernel says. Everybody sees and changes what is told of his own jobs; root, the notifier's own
user and the configured groups see all. To anybody else a notification does not exist.
Rule 2: every wait for a client has a deadline, every uid so many connections; requests are answered one after the other.
Rule 3: what costs a look at every endpoint is asked for by one at a time: the outbox is one file.
"""

from __future__ import annotations

import datetime as dt
import errno
import grp
import logging
import os
import pwd
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final

import trio
from gpujobd import __version__
from gpujobd import protocol as p
from gpujobd.peer import Peer, peer, take_no_descriptors
from msgspec import UNSET
from msgspec.structs import replace

from gpujobd_notify.config import Config
from gpujobd_notify.deliver import Deliveries
from gpujobd_notify.follower import Follower
from gpujobd_notify.store import DELIVERED, EVERYBODY, FAILED, MUTED, PENDING, Row, Store
from gpujobd_notify.targets import TargetError
from gpujobd_notify.thread import Asked

log = logging.getLogger("gpujobd-notify")

CONNECTIONS_MAX: Final = 128
CONNECTIONS_PER_UID_MAX: Final = 16
FIRST_FRAME_S: Final = 2.0
FRAME_S: Final = 10.0
IDLE_S: Final = 600.0
WRITE_S: Final = 10.0
ACCEPT_AGAIN_S: Final = 0.5
READ_BYTES: Final = 64 << 10
MUTES_MAX: Final = 1000  # of one uid
NUMBER_MAX: Final = (1 << 63) - 1  # of SQLite
MESSAGE_CHARS_MAX: Final = 500
REPLY_BYTES_MAX: Final = p.FRAME_BYTES_MAX // 2
STATES: Final = frozenset({PENDING, DELIVERED, FAILED, MUTED})

Reply = p.AnyNotifierReply


class Declined(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Server:
    """Everybody's door to the outbox."""

    def __init__(
        self, config: Config, asked: Asked, deliveries: Deliveries, follower: Follower, boot_id: str
    ) -> None:
        self._config = config
        self._asked = asked
        self._deliveries = deliveries
        self._follower = follower
        self._boot_id = boot_id
        self._connections: Counter[int] = Counter()
        self._lists = trio.CapacityLimiter(1)

    def reload(self, config: Config) -> None:
        self._config = config

    async def run(self, listener: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno not in (
                        errno.EMFILE,
                        errno.ENFILE,
                        errno.ENOMEM,
                        errno.ENOBUFS,
                        errno.ECONNABORTED,
                    ):
                        raise
                    await trio.sleep(ACCEPT_AGAIN_S)
                else:
                    nursery.start_soon(self._welcome, trio.SocketStream(sock))

    async def _welcome(self, stream: trio.SocketStream) -> None:
        """One client, until it hangs up or misbehaves."""
        async with stream:
            try:
                caller = peer(stream.socket)
                take_no_descriptors(stream.socket)
                if self._is_full(caller.uid):
                    message = "too many connections to the notifier; hang up others"
                    await _send(stream, p.Error(id=0, code=p.ErrorCode.TOO_MANY_CONNECTIONS, message=message))
                    return
                self._connections[caller.uid] += 1
                try:
                    await self._serve(stream, caller)
                finally:
                    self._connections[caller.uid] -= 1
                    self._connections += Counter()  # drops those at zero
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
                log.debug("a client is gone: %s", error)
            except sqlite3.Error:
                raise  # the outbox is broken, not the client
            except Exception:
                log.exception("a bug: a client of uid %d is hung up", caller.uid)

    def _is_full(self, uid: int) -> bool:
        reserve = 0 if uid in (0, os.geteuid()) else CONNECTIONS_PER_UID_MAX
        per_uid = self._connections[uid] >= CONNECTIONS_PER_UID_MAX and uid != 0
        return per_uid or self._connections.total() >= CONNECTIONS_MAX - reserve

    async def _serve(self, stream: trio.SocketStream, caller: Peer) -> None:
        frames, greeted = p.Frames(), False
        admin = await trio.to_thread.run_sync(self._is_admin, caller, abandon_on_cancel=True)
        while True:
            with trio.fail_after(FRAME_S if frames.partial else IDLE_S if greeted else FIRST_FRAME_S):
                piece = await stream.receive_some(READ_BYTES)
            if not piece:
                return
            try:
                for body in frames.feed(piece):
                    request = _decoded(body, greeted=greeted)
                    greeted = True
                    await _send(stream, await self._answer(request, caller.uid, admin=admin))
            except p.FrameError as error:
                await _send(
                    stream,
                    p.Error(id=0, code=p.ErrorCode.BAD_REQUEST, message=str(error)[:MESSAGE_CHARS_MAX]),
                )
                return

    def _is_admin(self, caller: Peer) -> bool:
        if caller.uid in (0, os.geteuid()):
            return True
        wanted = {name.removeprefix("@") for name in self._config.file.access.admins}
        return any(_group_name(gid) in wanted for gid in caller.gids)

    # --- requests -------------------------------------------------------------------------------------------------

    async def _answer(self, request: p.AnyNotifierRequest, uid: int, *, admin: bool) -> Reply:
        try:
            _check_numbers(request)
            match request:
                case p.Hello():
                    return self._greet(request, uid)
                case p.Ping():
                    return p.Pong(id=request.id, program=_program(), seq=self._follower.seq)
                case p.Notifications():
                    async with self._lists:
                        return await self._list(request, uid, admin=admin)
                case p.NotificationRetry():
                    return await self._retry(request, uid, admin=admin)
                case p.NotificationMute():
                    return await self._mute(request, uid, admin=admin)
                case p.NotifyDefaults():
                    return await self._defaults(request, uid, admin=admin)
        except Declined as declined:
            assert not isinstance(request, p.Hello)
            return p.Error(id=request.id, code=declined.code, message=str(declined)[:MESSAGE_CHARS_MAX])

    def _greet(self, hello: p.Hello, uid: int) -> Reply:
        if p.VERSION not in hello.versions:
            raise p.FrameError(f"the notifier speaks version {p.VERSION}")
        return p.Welcome(p.VERSION, _program(), self._boot_id, uid)

    async def _list(self, request: p.Notifications, uid: int, *, admin: bool) -> Reply:
        unknown = {*request.states} - STATES
        if unknown:
            raise Declined(
                p.ErrorCode.BAD_REQUEST, f"states are {', '.join(sorted(STATES))}, not {min(unknown)[:40]!r}"
            )
        if request.all and not admin:
            raise Declined(p.ErrorCode.FORBIDDEN, "all notifications are shown to administrators only")
        limit = max(1, min(request.limit, p.PAGE_NOTIFICATIONS_MAX))
        whose = None if request.all or (admin and request.job) else uid
        states = tuple(dict.fromkeys(request.states))
        rows = await self._asked(Store.list, whose, request.job, states, request.after, limit + 1)
        names = await trio.to_thread.run_sync(_names, {row.uid for row in rows}, abandon_on_cancel=True)
        shown = list(_fitting([_view(row, names[row.uid]) for row in rows[:limit]]))
        more = shown and (len(rows) > limit or len(shown) < len(rows[:limit]))
        return p.NotificationList(
            id=request.id,
            notifications=shown,
            endpoints=await self._endpoints(rows, admin=admin),
            next=shown[-1].id if more else 0,
        )

    async def _endpoints(self, rows: list[Row], *, admin: bool) -> list[p.EndpointView]:
        """All for administrators; else those users may name, and the caller's own far ends.

        The latest error of a far end that others write to as well may quote their targets: of his own, each row tells.
        """
        queued = await self._asked(Store.queued)
        disabled = await self._asked(Store.disabled)
        views = self._deliveries.views(queued, disabled)
        if admin:
            return views[: p.PAGE_NOTIFICATIONS_MAX]
        own = {row.endpoint for row in rows}
        named = {name for name, endpoint in self._config.file.endpoints.items() if endpoint.users}
        seen = [view for view in views if view.name in own | named][: p.PAGE_NOTIFICATIONS_MAX]
        house = self._config.file.endpoints
        return [view if view.name in house else replace(view, last_error=UNSET) for view in seen]

    async def _retry(self, request: p.NotificationRetry, uid: int, *, admin: bool) -> Reply:
        row = await self._asked(Store.get, request.notification)
        if row is None or not (admin or row.uid == uid):
            raise Declined(
                p.ErrorCode.NO_SUCH_NOTIFICATION, f"there is no notification {request.notification}"
            )
        if row.state == DELIVERED:
            raise Declined(p.ErrorCode.BAD_STATE, f"notification {row.number} is delivered")
        if admin:
            await self._asked(Store.enable, row.endpoint, row.target)
        elif "://" in row.target:
            await self._asked(
                Store.enable, row.target
            )  # his own; an endpoint of the house is an administrator's
        await self._asked(Store.retry, row.number, time.time())
        self._deliveries.hurry(row.endpoint)
        return p.Done(id=request.id)

    async def _mute(self, request: p.NotificationMute, uid: int, *, admin: bool) -> Reply:
        if not request.job and not request.endpoint:
            raise Declined(p.ErrorCode.BAD_REQUEST, "which job, or which endpoint?")
        if len(request.endpoint) > p.NOTIFY_TARGET_CHARS_MAX:
            raise Declined(p.ErrorCode.BAD_REQUEST, f"at most {p.NOTIFY_TARGET_CHARS_MAX} characters")
        whose = EVERYBODY if admin else uid
        if request.muted and not admin and await self._asked(Store.mutes, uid) >= MUTES_MAX:
            raise Declined(p.ErrorCode.QUOTA, f"{MUTES_MAX} mutes of {MUTES_MAX}: unmute others first")
        await self._asked(Store.mute, whose, request.job, request.endpoint, time.time(), muted=request.muted)
        return p.Done(id=request.id)

    async def _defaults(self, request: p.NotifyDefaults, uid: int, *, admin: bool) -> Reply:
        if request.set:
            self._check(request, admin=admin)
            await self._asked(Store.set_defaults, uid, request.notify, request.notify_on)
            self._follower.take_defaults(uid, request.notify, request.notify_on)
        notify, on = await self._asked(Store.defaults, uid)
        return p.Defaults(id=request.id, notify=list(notify), notify_on=list(on))

    def _check(self, request: p.NotifyDefaults, *, admin: bool) -> None:
        if len(request.notify) > p.NOTIFY_TARGETS_MAX:
            raise Declined(p.ErrorCode.BAD_NOTIFY, f"at most {p.NOTIFY_TARGETS_MAX} targets")
        for text in request.notify:
            try:
                self._config.check_target(text, admin=admin)
            except TargetError as error:
                raise Declined(p.ErrorCode.BAD_NOTIFY, str(error)) from None
        for word in request.notify_on:
            if not p.is_occasion(word):
                raise Declined(p.ErrorCode.BAD_NOTIFY, f"{word[:40]!r} is no occasion")
        if len(request.notify_on) > len(p.NotifyOn) + p.NOTIFY_TARGETS_MAX:
            raise Declined(p.ErrorCode.BAD_NOTIFY, "too many occasions")


def _check_numbers(request: p.AnyNotifierRequest) -> None:
    """What is looked up in the outbox, which knows 63 bits. Raises: Declined."""
    for name in ("job", "after", "notification"):
        if not 0 <= getattr(request, name, 0) <= NUMBER_MAX:
            raise Declined(p.ErrorCode.BAD_REQUEST, f"{name} is 0 to {NUMBER_MAX}")


def _decoded(body: bytes, *, greeted: bool) -> p.AnyNotifierRequest:
    """Raises: FrameError."""
    request = p.decode_notifier_request(body)
    if isinstance(request, p.Hello) is greeted:
        raise p.FrameError("hello is the first frame, and said once")
    return request


async def _send(stream: trio.SocketStream, reply: Reply) -> None:
    with trio.fail_after(WRITE_S):
        await stream.send_all(p.frame(reply))


def _program() -> str:
    return f"gpujobd-notify {__version__}"


def _view(row: Row, owner: str) -> p.NotificationView:
    return p.NotificationView(
        id=row.number,
        job=row.job,
        kind=row.kind,
        target=row.target,
        endpoint=row.endpoint,
        state=row.state,
        tries=row.tries,
        due_at=_moment(row.due_at),
        created_at=_moment(row.created_at),
        delivered_at=_moment(row.over_at) if row.state == DELIVERED and row.over_at else UNSET,
        next_try_at=_moment(row.next_at) if row.state == PENDING else UNSET,
        last_error=row.error or UNSET,
        owner=owner or UNSET,
    )


def _fitting(views: list[p.NotificationView]) -> Iterator[p.NotificationView]:
    """As many as a frame holds; a target may have 500 characters, an error as many."""
    room = REPLY_BYTES_MAX
    for view in views:
        room -= p.size(view)
        if room < 0:
            return
        yield view


def _moment(at: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(at, dt.UTC)


def _names(uids: set[int]) -> dict[int, str]:
    return {uid: _name(uid) for uid in uids}


def _name(uid: int) -> str:
    if uid < 0:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
