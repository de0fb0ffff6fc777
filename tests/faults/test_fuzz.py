"""Row 14: frames that are nearly right, and streams that are not right at all, from clients and from workers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from gpujobd import protocol, worker_messages
from gpujobd.protocol import frame
from harness import HANG_S, Host, fake, hosted
from test_connection import HELLO, KINDS, answers, connect, example, mutate, said

pytestmark = pytest.mark.slow

MEMORY_GROWTH_MAX = 32 << 20
FRAMES_A_SEED = 200
CONNECTIONS_AT_ONCE = 16

CHECKPOINT = {
    "upto": 10,
    "deferred": [[3, 1]],
    "results_bytes": 900,
    "results_crc": 1 << 31,
    "errors_bytes": 70,
    "errors_crc": 7,
    "done": 8,
    "failed": 1,
}
TIMES = {"load_s": 0.0, "read_s": 0.1, "compute_s": 1.5, "write_s": 0.25, "sync_s": 0.01}
WORDS = [
    {"type": "hello", "pid": 17, "python": "3.11.7", "worker": "0.1.0"},
    {"type": "loaded", "load_s": 1.5, "vram_bytes": 1 << 30, "device_bytes": 1 << 34, "hardware": "ä GPU"},
    {"type": "load_failed", "error": "ImportError: \ud83d\ude00", "trace": "Traceback\n  ...\n"},
    {"type": "heartbeat", "attempt": 3, "line": 7, "batch": 8, "progress": 9},
    *(
        {"type": kind, "attempt": 3, "checkpoint": CHECKPOINT, "timings": TIMES, "vram_bytes": 5}
        for kind in ("checkpoint", "yielded", "finished")
    ),
    {"type": "canary", "attempt": 3},
    {"type": "lost", "attempt": 3, "cause": "died", "detail": "why", "checkpoint": None, "timings": TIMES},
]
"""A valid message of every kind, as a worker writes it."""


# --- decoders by themselves -------------------------------------------------------------------------------------------


def batches(cases, n: int) -> Iterator[random.Random]:
    """A thousand mutations a seed."""
    return (random.Random(seed) for seed in cases(n // 1000))


def decode_all(
    rng: random.Random, valid: list[bytes], decode: Callable[[bytes], object], error: type
) -> None:
    """Anything but a message or that error ends the test, and would end more than a connection."""
    for _ in range(1000):
        with contextlib.suppress(error):
            decode(mutate(rng, rng.choice(valid)))


@pytest.mark.parametrize("block", range(2))
def test_mutated_requests_decode_or_are_refused(cases, count, block: int) -> None:
    valid = [frame(example(kind))[4:] for kind in KINDS]
    for body in valid:
        protocol.decode_request(body)
    for rng in batches(cases, 500_000):
        decode_all(rng, valid, protocol.decode_request, protocol.FrameError)
        count(14, 1000)


def test_mutated_messages_of_workers_decode_or_are_refused(cases, count) -> None:
    valid = [json.dumps(word).encode() for word in WORDS]
    for message in valid:
        worker_messages.decode(message)
    for rng in batches(cases, 250_000):
        decode_all(rng, valid, worker_messages.decode, worker_messages.Violation)
        count(14, 1000)


@pytest.mark.parametrize("lines", [worker_messages.Lines, protocol.Frames])
def test_streams_of_random_bytes_are_cut_or_refused(cases, count, lines) -> None:
    """Whatever the pieces they come in."""
    for rng in batches(cases, 20_000):
        stream = lines()
        with contextlib.suppress(worker_messages.Violation, protocol.FrameError):
            for _ in range(1000):
                list(stream.feed(rng.randbytes(rng.randrange(200))))
        count(14)


# --- the real socket --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[Host]:
    with hosted(tmp_path_factory.mktemp("fuzz") / "host", count=fake("toys:Count")) as host:
        yield host
        assert host.process.poll() is None, host.log()
        assert "Traceback" not in host.log(), host.log()


@pytest.fixture
def watched(host: Host) -> Iterator[None]:
    """Another client pings all the while; in the end descriptors and memory are where they were."""
    said(host, HELLO + b"\xff" * 4)  # what the first connection of its kind allocates
    before, fds = memory_bytes(host), fd_count(host)
    over, trouble = threading.Event(), []

    def ping() -> None:
        try:
            with host.client() as client:
                while not over.is_set():
                    assert isinstance(client.ask(protocol.Ping), protocol.Pong)
                    time.sleep(0.01)
        except BaseException as error:  # noqa: BLE001 - raised in the test
            trouble.append(error)

    witness = threading.Thread(target=ping)
    witness.start()
    try:
        yield
    finally:
        over.set()
        witness.join(HANG_S)
    assert not trouble, trouble
    deadline = time.monotonic() + HANG_S
    while fd_count(host) > fds + 2:
        assert time.monotonic() < deadline, "descriptors stay open"
        time.sleep(0.05)
    grown = memory_bytes(host) - before
    assert grown < MEMORY_GROWTH_MAX, f"{grown} bytes more than before"


def memory_bytes(host: Host) -> int:
    with open(f"/proc/{host.process.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def fd_count(host: Host) -> int:
    return len(os.listdir(f"/proc/{host.process.pid}/fd"))


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def run_of_frames(rng: random.Random, valid: list[bytes]) -> list[bytes]:
    """Mutated requests, up to and with the first that is none: there the daemon hangs up."""
    run: list[bytes] = []
    while True:
        body = mutate(rng, rng.choice(valid))
        try:
            request = protocol.decode_request(body)
        except protocol.FrameError:
            return [*run, framed(body)]
        if not isinstance(request, protocol.Hello | protocol.Chunk | protocol.Queue):
            run.append(frame(msgspec.structs.replace(request, id=len(run) + 1)))


@pytest.mark.parametrize("block", range(2))
def test_mutated_requests_over_the_socket_get_clean_answers(host, watched, cases, count, block: int) -> None:
    valid = [frame(example(kind))[4:] for kind in KINDS]
    for seed in cases(10_000 // FRAMES_A_SEED):
        rng = random.Random(seed)
        sent = 0
        while sent < FRAMES_A_SEED:
            runs = [run_of_frames(rng, valid) for _ in range(CONNECTIONS_AT_ONCE)]
            with contextlib.ExitStack() as stack:
                socks = [stack.enter_context(connect(host)) for _ in runs]
                for sock, run in zip(socks, runs, strict=True):
                    sock.sendall(HELLO + b"".join(run))
                for sock in socks:
                    replies = answers(sock)  # each of them decodes, and the daemon hangs up
                    assert isinstance(replies[0], protocol.Welcome)
                    refused = [(r.id, r.code) for r in replies if isinstance(r, protocol.Error)]
                    assert (0, "bad_request") in refused
                    assert "internal" not in dict(refused).values()
            sent += sum(map(len, runs))
        count(14, sent)


def test_every_truncation_of_every_request_is_refused(host, watched, count) -> None:
    for kind in KINDS:
        whole = frame(example(kind))
        for cut in range(1, len(whole)):
            with connect(host) as sock:
                sock.sendall(HELLO + whole[:cut])
            count(14)
        for cut in range(1, len(whole) - 4):
            replies = said(host, HELLO + framed(whole[4 : 4 + cut]))
            assert replies[-1].code == "bad_request"
            count(14)


def test_random_bytes_get_an_error_or_the_end(host, watched, cases, count) -> None:
    for seed in cases(100):
        rng = random.Random(seed)
        greeting = HELLO if rng.random() < 0.5 else b""
        with connect(host) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(greeting + rng.randbytes(rng.randrange(4, 1 << rng.randrange(3, 16))))
                sock.shutdown(socket.SHUT_WR)
            replies = answers(sock)
        assert all(isinstance(reply, protocol.Welcome | protocol.Error) for reply in replies)
        count(14)
