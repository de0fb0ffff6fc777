"""Rows 15 and 20: clients that take all places, that say or read nothing, and that pass what nobody asked for."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import shutil
import signal
import socket
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from gpujobd import protocol
from gpujobd.protocol import frame
from harness import HANG_S, Host, as_user, fake, hosted, until
from test_connection import HELLO, KINDS, connect, example
from test_fuzz import MEMORY_GROWTH_MAX, fd_count, memory_bytes

pytestmark = pytest.mark.slow

PINGS_FOR_S = 3.0
BYSTANDER = 31_999


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users can reach."""
    made = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextlib.contextmanager
def crowd(host: Host, uid: int, size: int, act: Callable[[list[socket.socket]], None]) -> Iterator[None]:
    """A child of another uid with so many connections, that acts until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            socks = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(size)]
            for sock in socks:
                sock.setblocking(False)  # where the line of callers is full, that is all
                with contextlib.suppress(OSError):
                    sock.connect(str(host.socket))
            os.write(writer, b".")
            while True:
                act(socks)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert pipe.read(1) == b"."
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def stay_silent(_: list[socket.socket]) -> None:
    time.sleep(HANG_S)


def say_a_byte_a_second(socks: list[socket.socket]) -> None:
    for at in range(len(HELLO)):
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(HELLO[at : at + 1])
        time.sleep(1)


def ask_and_never_read(socks: list[socket.socket]) -> None:
    words = HELLO + frame(protocol.Events(id=1, since=1, follow=True))
    words += b"".join(frame(kind(id=n)) for n, kind in enumerate([protocol.List, protocol.Status] * 20, 2))
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.send(words)
    time.sleep(0.1)


def come_again(socks: list[socket.socket]) -> None:
    """Whoever was turned away is at the door at once."""
    for sock in socks:
        with contextlib.suppress(OSError):
            if sock.recv(1 << 16) == b"":
                raise ConnectionError
    time.sleep(0.05)


def ping_for_a_while(host: Host) -> list[float]:
    """Seconds that each ping of this user took, connecting included."""
    took = []
    until_at = time.monotonic() + PINGS_FOR_S
    while time.monotonic() < until_at:
        at = time.monotonic()
        with host.client() as client:
            if isinstance(client.welcome, protocol.Welcome):
                assert isinstance(client.ask(protocol.Ping), protocol.Pong)
                took.append(time.monotonic() - at)
        time.sleep(0.005)
    return sorted(took)


def report(what: str, took: list[float], record_property) -> None:
    p99 = took[len(took) * 99 // 100]
    record_property(f"ping p99 beside {what}, ms", round(p99 * 1000, 1))
    print(
        f"{what}: {len(took)} pings, p50 {took[len(took) // 2]:.4f} s, p99 {p99:.4f} s, worst {took[-1]:.4f} s"
    )


@contextlib.contextmanager
def gives_all_back(host: Host) -> Iterator[None]:
    """Afterwards descriptors and memory are where they were, and the daemon works."""
    with host.client() as client:
        client.wait(client.submit("count", [{"text": "before"}]).job)
    fds, memory = fd_count(host), memory_bytes(host)
    yield
    until(lambda: fd_count(host) <= fds + 2, f"{fds} descriptors again")
    assert memory_bytes(host) - memory < MEMORY_GROWTH_MAX
    with host.client() as client:
        job = client.submit("count", [{"text": "after"}] * 10).job
        assert client.wait(job)[0].items.done == 10
    assert host.process.poll() is None
    assert "Traceback" not in host.log(), host.log()


# --- row 15 -----------------------------------------------------------------------------------------------------------


def test_five_hundred_callers_do_not_use_up_sixty_four_descriptors(
    folder, needs, count, record_property
) -> None:
    needs(15, "root", "prlimit")
    host = Host(folder / "host", "", {"count": fake("toys:Count")})
    host.program = ["prlimit", "--nofile=64:64", *host.program]
    with host, gives_all_back(host):
        with crowd(host, 31_001, 500, stay_silent):
            took = ping_for_a_while(host)  # root's places are kept for it
            report("500 callers for 64 descriptors", took, record_property)
            with host.client() as client:
                job = client.submit(
                    "count", [{"text": "x" * 500}] * 300
                ).job  # streamed: the spool opens files, too
                assert client.wait(job)[0].items.done == 300
                assert len(client.output(job)) == 300

            def get_in() -> int:
                return len(ping_for_a_while(host))

            assert as_user(BYSTANDER, get_in) > 0  # silent ones lose their places after two seconds
        count(15)


def test_silent_slow_and_deaf_clients_keep_nobody_waiting(folder, needs, count, record_property) -> None:
    needs(15, "root")
    with hosted(folder / "host", count=fake("toys:Count")) as host, gives_all_back(host):
        with host.client() as client:
            for n in range(200):
                client.submit("count", [{"text": str(n)}], name="x" * 80)
        with contextlib.ExitStack() as stack:
            for uid, size, act in (
                (31_001, 100, stay_silent),
                (31_002, 100, stay_silent),
                (31_003, 50, say_a_byte_a_second),
                (31_004, 20, ask_and_never_read),
            ):
                stack.enter_context(crowd(host, uid, size, act))
            took = as_user(BYSTANDER, lambda: ping_for_a_while(host))
        report("200 silent, 50 slow and 20 deaf ones", took, record_property)
        assert took[-1] < HANG_S
        count(15)


def test_a_full_line_of_callers_is_worked_off(folder, needs, count, record_property) -> None:
    needs(15, "root")
    with hosted(folder / "host", count=fake("toys:Count")) as host, gives_all_back(host):
        host.process.send_signal(signal.SIGSTOP)
        try:
            with crowd(host, 31_001, 3000, come_again):
                assert line_is_full(host)
                host.process.send_signal(signal.SIGCONT)
                took = as_user(BYSTANDER, lambda: ping_for_a_while(host))
        finally:
            host.process.send_signal(signal.SIGCONT)
        report("a full line of callers", took, record_property)
        count(15)


def line_is_full(host: Host) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(host.socket))
        except BlockingIOError:
            return True
        return False


def test_one_users_connections_leave_the_others_theirs(folder, needs, count, record_property) -> None:
    needs(15, "root")
    with hosted(folder / "host", count=fake("toys:Count")) as host, gives_all_back(host):
        with crowd(host, 31_001, 600, come_again):
            took = as_user(BYSTANDER, lambda: ping_for_a_while(host))
            report("600 connections of one user", took, record_property)
            assert took
        count(15)


# --- row 20: what is passed along -------------------------------------------------------------------------------------

PASSED_AT_ONCE = 253  # SCM_MAX_FD: the kernel passes no more in one message


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[Host]:
    with hosted(tmp_path_factory.mktemp("passed") / "host", count=fake("toys:Count")) as host:
        yield host
        assert host.process.poll() is None, host.log()
        assert "Traceback" not in host.log(), host.log()


def things(folder: Path) -> Iterator[tuple[str, int]]:
    """Descriptors of every kind that could hang, mislead or be held on to."""
    os.mkfifo(folder / "fifo")
    (folder / "sparse").touch()
    os.truncate(folder / "sparse", 1 << 40)
    yield "fifo", os.open(folder / "fifo", os.O_RDWR | os.O_NONBLOCK)
    yield "folder", os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield "path", os.open(folder / "sparse", os.O_PATH)
    yield "memfd", os.memfd_create("x", os.MFD_CLOEXEC)
    yield "sparse file", os.open(folder / "sparse", os.O_RDWR)
    yield "null", os.open("/dev/null", os.O_RDONLY)


def pass_along(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """The daemon may refuse (EPERM) or drop them; both are fine."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    with contextlib.suppress(OSError):
        sock.sendmsg([data], rights)


@pytest.mark.parametrize("words", [HELLO, HELLO[:3], HELLO + frame(protocol.Ping(id=1)), b"\xff" * 40])
def test_descriptors_passed_to_the_daemon_do_not_stay_there(host, tmp_path, count, words: bytes) -> None:
    with gives_all_back(host), host.client() as witness:
        passed = list(things(tmp_path))
        for _, fd in passed:
            for times in (1, PASSED_AT_ONCE):
                with connect(host) as sock:
                    pass_along(sock, words, [fd] * times)
                    assert isinstance(witness.ask(protocol.Ping), protocol.Pong)
                    count(20)
        with connect(host) as sock:  # and the very socket they go through
            pass_along(sock, words, [sock.fileno()] * PASSED_AT_ONCE)
            assert isinstance(witness.ask(protocol.Ping), protocol.Pong)
            count(20)
        for _, fd in passed:
            os.close(fd)


WORDS = [
    "../../../etc/passwd",
    "/etc/shadow",
    "a\0b",
    "..",
    ".",
    "",
    "x/../../y",
    "a" * 5000,
    "\x1b[2J\n",
    "lock",
]


STREAMED = protocol.EventSeen | protocol.JobChanged | protocol.LogPiece | protocol.Gap | protocol.Alive


def strings(kind: type) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Every field that takes words, and how to put one in."""
    for field in msgspec.structs.fields(kind):
        if field.type is str:
            yield field.name, lambda word: word
        elif typing.get_origin(field.type) is list and str in typing.get_args(field.type):
            yield field.name, lambda word: [word]
        elif typing.get_origin(field.type) is dict:
            yield field.name, lambda word: {word: word}


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k is not protocol.Hello], ids=lambda kind: kind.__name__
)
def test_names_in_requests_name_no_file(host, tmp_path, count, kind: type) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    with host.client() as client:
        for name, put in strings(kind):
            for word in [*WORDS, str(tmp_path / "link"), str(target)]:
                client.last_id += 1
                client.send(example(kind, **{"id": client.last_id, name: put(word)}))
                while isinstance(reply := client.receive(), STREAMED):
                    pass
                assert reply.id == client.last_id
                assert getattr(reply, "code", "") != "internal", reply
                count(20)
        client.ask(protocol.Queue, action="enable")
        client.ask(protocol.Queue, action="start")
    assert target.read_text() == "precious"
    state = host.folder / "state"
    assert {path.name for path in state.iterdir()} == {"journal", "spool"}
    names = [path.name for part in ("incoming", "jobs") for path in (state / "spool" / part).iterdir()]
    assert all(name.removesuffix(".lines").isdecimal() for name in names), names
