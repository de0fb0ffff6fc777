"""One connection in virtual time, and a real daemon under clients that break every rule."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import random
import resource
import socket
import struct
import time

import msgspec
import pytest
import trio
import trio.testing
from gpujobd import connection as limits
from gpujobd import protocol
from gpujobd.connection import Connection, Connections
from gpujobd.core.inputs import Who
from gpujobd.guests import Guest
from gpujobd.peer import Peer
from gpujobd.protocol import Frames, frame
from harness import HANG_S, Client, fake, hosted

WELCOME = protocol.Welcome(1, "tests", "boot", 0)
HELLO = frame(protocol.Hello([1]))


class Talk:
    """A connection and its peer's end of the line, in virtual time."""

    def __init__(self, dispatch) -> None:
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.setblocking(False)
        self.sock = trio.socket.from_stdlib_socket(ours)
        self.theirs = trio.socket.from_stdlib_socket(self.peer)
        self.everybody = Connections()
        self.connection = Connection(
            self.sock, Peer(1, 1, (1,)), Who(uid=1), Guest(), dispatch, self.everybody
        )
        self.frames = Frames()

    async def say(self, data: bytes) -> None:
        while data:
            data = data[await self.theirs.send(data) :]

    async def hear(self) -> list:
        """Everything until the daemon hangs up."""
        heard = []
        while True:
            try:
                data = await self.theirs.recv(1 << 16)
            except ConnectionError:
                return heard
            if not data:
                return heard
            heard += map(protocol.decode_reply, self.frames.feed(data))


def pong(c, request):
    c.finish(protocol.Pong(id=request.id, program="t", seq=1))


def talk(script, dispatch=pong):
    """Run a script against a connection; the virtual seconds it took until the end."""

    async def main():
        line = Talk(dispatch)
        began = trio.current_time()
        async with trio.open_nursery() as beside:
            beside.start_soon(line.everybody.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(script, line)
                await line.connection.run(lambda _: WELCOME)
                took = trio.current_time() - began
                line.sock.close()
            beside.cancel_scope.cancel()
        line.theirs.close()
        return took

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.02))


# --- in virtual time ------------------------------------------------------------------------------------------------


def test_a_caller_that_says_nothing_is_told_so_and_let_go():
    heard = []

    async def script(line):
        heard.extend(await line.hear())

    assert limits.FIRST_FRAME_S <= talk(script) < 5
    assert [reply.code for reply in heard] == ["timed_out"]


def test_half_a_frame_is_waited_for_ten_seconds():
    async def script(line):
        await line.say(HELLO + frame(protocol.Ping(id=1))[:-1])
        await line.hear()

    assert limits.FRAME_S <= talk(script) < limits.FRAME_S + 3


def test_a_frame_of_one_byte_a_second_is_cut_off_after_ten():
    async def script(line):
        await line.say(HELLO)
        for byte in frame(protocol.Hello([1], "x" * 100)):
            await trio.sleep(1)
            try:
                await line.say(bytes([byte]))
            except OSError:
                break

    assert limits.FRAME_S <= talk(script) < limits.FRAME_S + 4


def test_an_idle_connection_ends_but_not_while_a_request_is_open():
    async def idle(line):
        await line.say(HELLO)
        await line.hear()

    assert limits.IDLE_S <= talk(idle) < limits.IDLE_S + 3

    async def waiting(line):
        await line.say(HELLO + frame(protocol.Ping(id=1)))
        await trio.sleep(3 * limits.IDLE_S)
        line.theirs.close()

    assert talk(waiting, lambda *_: None) >= 3 * limits.IDLE_S


def test_requests_of_a_client_that_never_reads_are_not_answered_without_bound():
    answered = 0

    def large(c, request):
        nonlocal answered
        answered += 1
        c.finish(protocol.Pong(id=request.id, program="x" * 10_000, seq=1))

    async def script(line):
        await line.say(HELLO)
        try:
            for n in range(100_000):
                await line.say(frame(protocol.Ping(id=n)))
        except OSError:
            pass

    assert talk(script, large) < 2 * limits.WRITE_S
    assert answered * 10_000 < 2 * limits.OUT_BYTES_MAX


def test_a_client_that_takes_a_byte_now_and_then_is_dropped():
    def large(c, request):
        for _ in range(100):
            c.send(protocol.LogPiece(id=request.id, data=b"x" * 9_000))

    async def script(line):
        await line.say(HELLO + frame(protocol.Ping(id=1)))
        try:
            for _ in range(100):
                await trio.sleep(5)
                if not await line.theirs.recv(1):
                    break
        except OSError:
            pass
        line.theirs.close()

    assert talk(script, large) < 60


def test_two_streams_that_wait_for_room_both_go_on():
    done = []

    async def stream(c, number):
        for _ in range(50):
            c.send(protocol.LogPiece(id=number, data=b"x" * 60_000))
            await c.room()
        done.append(number)
        c.finish(protocol.Done(id=number))

    def dispatch(c, request):
        c.nursery.start_soon(stream, c, request.id)

    async def script(line):
        await line.say(HELLO + frame(protocol.Ping(id=1)) + frame(protocol.Ping(id=2)))
        await trio.sleep(1)
        while len(done) < 2:
            await line.theirs.recv(1 << 16)
        line.theirs.close()

    talk(script, dispatch)
    assert sorted(done) == [1, 2]


def test_descriptors_nobody_receives_are_not_piled_up():
    opened = []

    async def hand_out(c, request):
        await c.room()
        opened.append(os.open("/dev/null", os.O_RDONLY))
        c.finish(protocol.File(id=request.id, bytes=0), opened[-1])

    def dispatch(c, request):
        return hand_out(c, request)

    async def script(line):
        await line.say(HELLO)
        try:
            for n in range(20_000):
                await line.say(frame(protocol.Ping(id=n)))
        except OSError:
            pass

    assert talk(script, dispatch) < 2 * limits.WRITE_S
    assert 1 <= len(opened) <= 12
    for fd in set(opened):
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_request_id_that_is_open_is_not_given_twice():
    heard = []

    async def script(line):
        await line.say(HELLO + 2 * frame(protocol.Ping(id=7)))
        heard.extend(await line.hear())

    talk(script, lambda *_: None)
    assert "request id 7 is open already" in heard[-1].message


def test_request_sixty_five_in_flight_is_refused_and_the_others_stand():
    heard = []

    async def script(line):
        await line.say(HELLO + b"".join(frame(protocol.Ping(id=n)) for n in range(1, 67)))
        await trio.sleep(1)
        line.peer.shutdown(socket.SHUT_WR)
        heard.extend(await line.hear())

    talk(script, lambda *_: None)
    refused = heard[1:]
    assert [(r.id, r.code, r.limit) for r in refused] == [
        (65, "too_many_requests", 64),
        (66, "too_many_requests", 64),
    ]


def test_an_error_that_quotes_a_megabyte_is_cut():
    heard = []

    def dispatch(c, request):
        c.fail(request.id, "bad_request", "x" * (2 << 20))

    async def script(line):
        await line.say(HELLO + frame(protocol.Ping(id=1)))
        line.peer.shutdown(socket.SHUT_WR)
        heard.extend(await line.hear())

    talk(script, dispatch)
    # The end of a conversation may come before its last answer is sent; nothing else may.
    assert all(len(reply.message) < 1100 for reply in heard[1:])


def bug_at_once(c, request):
    raise KeyError("a bug of ours")


def bug_in_a_task(c, request):
    async def fail_later():
        await trio.sleep(1)
        raise KeyError("a bug of ours")

    c.nursery.start_soon(fail_later)


@pytest.mark.parametrize("dispatch", [bug_at_once, bug_in_a_task])
def test_a_bug_in_one_request_ends_one_connection_with_an_internal_error(caplog, dispatch):
    heard = []

    async def script(line):
        await line.say(HELLO + frame(protocol.Ping(id=1)))
        heard.extend(await line.hear())

    talk(script, dispatch)
    assert "a request of uid 1 failed" in caplog.text
    assert (heard[-1].id, heard[-1].code) == (0, "internal")


# --- a real daemon ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with hosted(tmp_path_factory.mktemp("connection") / "host", count=fake("toys:Count")) as host:
        yield host
        assert host.process.poll() is None, host.log()
        assert "Traceback" not in host.log(), host.log()


@pytest.fixture
def witness(host):
    """Another client, from before, who must be answered when all is over."""
    with host.client() as client:
        yield client
        assert isinstance(client.ask(protocol.Ping), protocol.Pong)


def connect(host):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(
        str(host.socket)
    )  # before the timeout is set: with one, a full queue is an error, not a wait
    sock.settimeout(HANG_S)
    return sock


def answers(sock):
    """What the daemon says until it hangs up."""
    frames, replies = Frames(), []
    while True:
        try:
            data = sock.recv(1 << 16)
        except ConnectionError:
            return replies
        if not data:
            return replies
        replies += map(protocol.decode_reply, frames.feed(data))


def said(host, data):
    with connect(host) as sock:
        sock.sendall(data)
        return answers(sock)


@pytest.mark.parametrize("length", [0, protocol.FRAME_BYTES_MAX + 1, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_named(host, witness, length):
    (error,) = said(host, struct.pack("<I", length))
    assert error.code == "bad_request"
    assert str(length) in error.message


def test_the_first_frame_is_hello_and_hello_is_said_once(host, witness):
    (error,) = said(host, frame(protocol.Ping(id=1)))
    assert error.message == "the first frame is hello"
    assert said(host, HELLO + HELLO)[-1].message == "hello is said once"


@pytest.mark.parametrize("versions", [[], [0], [2, 3], list(range(2, 200_000))])
def test_an_unknown_version_is_told_ours(host, witness, versions):
    replies = said(host, frame(protocol.Hello(versions)))
    assert "this daemon speaks 1" in replies[0].message
    assert len(replies[0].message) < 200


def test_garbage_gets_an_error_and_no_more(host, witness):
    rng = random.Random(1)
    for _ in range(100):
        body = rng.randbytes(rng.randrange(1, 300))
        replies = said(host, HELLO + struct.pack("<I", len(body)) + body)
        assert [type(reply) for reply in replies] == [protocol.Welcome, protocol.Error]


def test_a_deeply_nested_request_is_refused(host, witness):
    body = b"\x91" * 500_000 + b"\x00"
    replies = said(host, HELLO + struct.pack("<I", len(body)) + body)
    assert replies[-1].code == "bad_request"


def test_pipelined_requests_are_each_answered_under_their_id(host, witness):
    kinds = [protocol.Ping, protocol.List, protocol.Status, protocol.Devices, protocol.Tenants, protocol.Last]
    with connect(host) as sock:
        sock.sendall(HELLO + b"".join(frame(kind(id=n)) for n, kind in enumerate(kinds * 5, 1)))
        frames, ids = Frames(), []
        while len(ids) < 30:
            ids += [getattr(r, "id", 0) for r in map(protocol.decode_reply, frames.feed(sock.recv(1 << 16)))]
            ids = [i for i in ids if i]
    assert sorted(ids) == list(range(1, 31))


EXAMPLES = {
    "submit_id": "s",
    "handler": "count",
    "items": 1,
    "input_bytes": 3,
    "input_sha256": b"x" * 32,
    "item_bytes": 2,
    "input": b"{}\n",
    "params": {"k": 1},
    "data": b"",
    "jobs": [1],
    "job": 1,
    "priority": "low",
    "action": "enable",
    "versions": [1],
    "id": 5,
}


def example(kind, **fields):
    known = {f.name for f in msgspec.structs.fields(kind)}
    return kind(**{k: v for k, v in EXAMPLES.items() if k in known} | fields)


KINDS = protocol.AnyRequest.__args__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_truncation_of_a_request_is_survived(host, witness, kind):
    whole = frame(example(kind))
    for cut in range(1, len(whole)):
        with connect(host) as sock:
            sock.sendall(HELLO + whole[:cut])
    body = whole[4:]
    for cut in range(1, len(body)):
        replies = said(host, HELLO + struct.pack("<I", cut) + body[:cut])
        assert replies[-1].code == "bad_request"


def mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        match rng.randrange(4):
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data[rng.randrange(len(data))] = rng.choice(
                    [0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xD9, 0xDD, 0xDF, 0xFF]
                )
            case 2:
                at = rng.randrange(len(data))
                del data[at : at + rng.randrange(1, 5)]
            case _:
                at = rng.randrange(len(data))
                data[at:at] = rng.randbytes(rng.randrange(1, 5))
        if not data:
            return b"\x00"
    return bytes(data)


def fuzz(host, count, seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    bodies = [frame(example(kind))[4:] for kind in KINDS if kind is not protocol.Queue]
    for _ in range(count // 10):
        with connect(host) as sock:
            parts = [mutate(rng, rng.choice(bodies)) for _ in range(10)]
            sock.sendall(HELLO + b"".join(struct.pack("<I", len(part)) + part for part in parts))
    with host.client() as client:
        assert isinstance(client.ask(protocol.Ping), protocol.Pong)


def test_two_thousand_mutated_frames_are_survived(host, witness):
    fuzz(host, 2_000, seed=int(os.environ.get("GPUJOBD_SEED", "0")) or 1)


def memory_bytes(host):
    with open(f"/proc/{host.process.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_lists_that_nobody_reads_take_bounded_memory(host, witness):
    with host.client() as client:
        client.ask(protocol.Queue, action="stop")
        for n in range(150):
            client.submit("count", [{"text": "a"}], name="x" * 100, submit_id=f"list-{n}")
    before = memory_bytes(host)
    socks = []
    for _ in range(10):
        sock = connect(host)
        socks.append(sock)
        sock.sendall(HELLO)
        sock.setblocking(False)
    deadline = time.monotonic() + 1
    asked = 0
    while time.monotonic() < deadline:
        for sock in socks:
            asked += 1
            try:
                sock.send(frame(protocol.List(id=asked)))
            except OSError:
                continue
        assert isinstance(witness.ask(protocol.Ping), protocol.Pong)
    assert memory_bytes(host) - before < 64 << 20
    for sock in socks:
        sock.close()
    with host.client() as client:
        for job in client.ask(protocol.List).jobs:
            client.ask(protocol.Cancel, job=job.id)
        client.ask(protocol.Queue, action="start")


def test_rooms_are_given_back_by_those_who_hang_up_at_any_moment(host, witness):
    data = b'{"text": "a"}\n' * 2000
    header = {
        "handler": "count",
        "items": 2000,
        "input_bytes": len(data),
        "input_sha256": hashlib.sha256(data).digest(),
        "item_bytes": 13,
    }
    submit = [frame(protocol.Submit(id=1, submit_id=f"up-{n}", **header)) for n in range(120)]
    rest = (
        frame(protocol.Chunk(id=1, data=data))
        + frame(protocol.Chunk(id=1, data=b""))
        + frame(protocol.Ping(id=2))
    )
    for n, header_frame in enumerate(submit):
        with connect(host) as sock:
            sock.sendall(HELLO + header_frame)
            if n % 3:
                sock.recv(1 << 16)
                time.sleep(0.002 * (n % 5))
            if n % 3 == 2:
                sock.sendall(rest[: random.Random(n).randrange(1, len(rest))])
    with host.client() as client:
        client.send(protocol.Events(id=900, since=1))
        kinds = {"reserved": set(), "reservation_released": set(), "submitted": set()}
        time.sleep(1)
        client.send(protocol.Events(id=901, since=1))
        while not (isinstance(reply := client.receive(), protocol.Done) and reply.id == 901):
            if isinstance(reply, protocol.EventSeen) and reply.id == 901:
                kinds.setdefault(reply.event["event"], set()).add(reply.seq)
        assert len(kinds["reserved"]) >= 60  # the others were gone before anybody read their header
        streamed = len(kinds["reserved"]) - len(kinds["reservation_released"])
        done = client.ask(protocol.List, limit=500).jobs
        assert streamed == len([job for job in done if job.items.total == 2000])
    incoming = host.folder / "state" / "spool" / "incoming"
    deadline = time.monotonic() + HANG_S
    while list(incoming.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fds = os.listdir(f"/proc/{host.process.pid}/fd")
    assert len(fds) < 60, fds


def test_a_time_no_clock_of_ours_can_hold_is_refused(host, witness):
    for year in (2201, 2600, 9999):
        moment = dt.datetime(year, 12, 31, 23, 59, 59, 999_999, tzinfo=dt.UTC)
        with host.client() as client:
            assert client.submit("count", [{"text": "a"}], begin_at=moment).code == "bad_input"
            assert client.submit("count", [{"text": "a"}], deadline_at=moment).code == "bad_input"


def test_a_hundred_and_twenty_eight_connections_of_root_are_no_limit(host, witness):
    clients = []
    try:
        for _ in range(200):
            clients.append(Client(host.socket))
            assert isinstance(clients[-1].welcome, protocol.Welcome)
    finally:
        for client in clients:
            client.sock.close()
