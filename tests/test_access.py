"""Who somebody is comes from the kernel; what that means comes from a user database that may be slow."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading

import msgspec
import pytest
import trio
import trio.testing
from gpujobd import access
from gpujobd.access import LOOK_UP_S, LOOK_UPS_MAX, NAMES_KEPT_S, Directory
from gpujobd.config import Config, File
from gpujobd.peer import SO_PEERGROUPS, Peer, peer
from harness import as_user

NAMES = {0: "root", 1001: "alice", 1002: "bob"}
GROUPS = {1001: "alice", 50: "research", 60: "gpujobd-admin"}


@pytest.fixture
def house(monkeypatch):
    monkeypatch.setattr(access, "_user_name", lambda uid: NAMES.get(uid, str(uid)))
    monkeypatch.setattr(access, "_group_name", lambda gid: GROUPS.get(gid, str(gid)))
    monkeypatch.setattr(os, "geteuid", lambda: 990)


def config(**sections):
    return Config(file=msgspec.convert(sections, File))


def who(configuration, uid, *gids):
    async def main():
        return await Directory(configuration).who(Peer(1, uid, gids))

    return trio.run(main)


def test_an_ordinary_user_is_nobody_in_particular_and_submits_as_himself(house):
    found = who(config(), 1001, 1001)
    assert (found.name, found.admin, found.observer, found.high) == ("alice", False, False, False)
    assert found.tenants == {"alice"}


@pytest.mark.parametrize(("uid", "gids"), [(0, ()), (990, ()), (1001, (60,))])
def test_root_the_daemons_user_and_the_admin_group_are_administrators(house, uid, gids):
    found = who(config(), uid, *gids)
    assert found.admin
    assert found.observer
    assert found.high


def test_members_are_users_and_groups_of_the_kernels_list(house):
    cfg = config(tenants={"production": {"members": ["bob", "@research"]}, "other": {"members": ["carol"]}})
    assert who(cfg, 1001, 1001).tenants == {"alice"}
    assert who(cfg, 1001, 1001, 50).tenants == {"alice", "production"}
    assert who(cfg, 1002, 1002).tenants == {"bob", "production"}


def test_a_user_named_like_a_group_is_not_that_group(house):
    cfg = config(access={"observers": ["@alice"], "high_priority": ["research"]})
    assert not who(cfg, 1001, 50).observer
    assert not who(cfg, 1001, 50).high
    assert who(cfg, 1002, 1001).observer


def test_a_uid_without_a_name_goes_by_its_number(house):
    found = who(config(), 4242)
    assert (found.name, found.tenants) == ("4242", {"4242"})


def test_a_new_configuration_counts_at_once(house):
    async def main():
        directory = Directory(config())
        caller = Peer(1, 1001, (1001,))
        assert not (await directory.who(caller)).observer
        directory.reload(config(access={"observers": ["alice"]}))
        assert (await directory.who(caller)).observer

    trio.run(main)


def test_a_name_is_looked_up_once_a_minute(house, monkeypatch):
    asked = []
    monkeypatch.setattr(access, "_user_name", lambda uid: (asked.append(uid), "alice")[1])

    async def main():
        directory = Directory(config())
        for _ in range(3):
            await directory.who(Peer(1, 1001, ()))
        assert asked == [1001]
        await trio.sleep(NAMES_KEPT_S + 1)
        await directory.who(Peer(1, 1001, ()))
        assert asked == [1001, 1001]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))


def test_a_user_database_that_hangs_lets_in_those_who_are_known_and_nobody_else(house, monkeypatch):
    gate = threading.Event()

    def hang(uid):
        gate.wait(20)
        return "late"

    async def main():
        directory = Directory(config())
        known, unknown = Peer(1, 1001, ()), Peer(1, 1002, ())
        assert (await directory.who(known)).name == "alice"
        monkeypatch.setattr(access, "_user_name", hang)
        await trio.sleep(NAMES_KEPT_S + 1)
        began = trio.current_time()
        assert (await directory.who(known)).name == "alice"
        assert await directory.who(unknown) is None
        assert trio.current_time() - began <= 2 * LOOK_UP_S + 2
        async with trio.open_nursery() as nursery:
            for uid in range(3 * LOOK_UPS_MAX):
                nursery.start_soon(directory.who, Peer(1, 5000 + uid, ()))
        with trio.fail_after(1000):  # threads are left for others
            await trio.to_thread.run_sync(lambda: None)
        gate.set()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))


def test_names_that_only_the_journal_knows_are_learned(house):
    async def main():
        directory = Directory(config())
        assert directory.name(1002) == "1002"
        await directory.learn({1002, 7})
        assert (directory.name(1002), directory.name(7)) == ("bob", "7")

    trio.run(main)


def test_the_kernel_says_who_connected():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = peer(ours)
    assert (found.pid, found.uid, found.gids[0]) == (os.getpid(), os.getuid(), os.getgid())
    assert set(os.getgroups()) <= set(found.gids)


@pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")
def test_identity_is_that_of_the_caller_at_connect(tmp_path):
    path = tmp_path / "s"
    tmp_path.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(path))
        listener.listen()
        for folder in (*tmp_path.parents, tmp_path):
            if str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        path.chmod(0o666)

        def call():
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(path))
            return True

        assert as_user(30_001, call)
        accepted, _ = listener.accept()
        with accepted:
            assert peer(accepted).uid == 30_001


def test_more_groups_than_fit_leave_the_first():
    class Crowded:
        def getsockopt(self, level, option, size):
            if option == SO_PEERGROUPS:
                raise OSError(errno.ERANGE, "too many")
            return struct.pack("3i", 1, 2, 3)

    assert peer(Crowded()) == Peer(1, 2, (3,))
