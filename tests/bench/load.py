"""Load for the control socket, cheap enough to share two cores with what it loads.

Frames are built beforehand, by patching id and submit_id in one encoded frame; replies are counted by their length
prefix and checked by their first bytes, never decoded.

    closed   each connection keeps `in_flight` submissions open: what the daemon can do
    open     submissions at times fixed beforehand, whatever the daemon does: what it is asked to do
    show     the same for `show`; each latency counts from the time it was due, so that waiting is not left out
    crowd    the same, by 64 connections in turn, none of which waits for another

Run as a process of its own, `load.py open|show|crowd SOCKET RATE SECONDS [JOBS]` prints its findings as JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import select
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpujobd import protocol

LINE = b'{"custom_id": "a1", "text": "one item of a job like any other"}\n'
ACCEPTED = b"\xa5reply\xa8accepted"  # after the byte that says how many keys the map has
ONE_JOB = b"\xa5reply\xa3job"
ID_MARK = 0x7E7E7E7E
SUBMIT_ID_MARK = "\x7d" * 24
IDS_FROM = 1 << 24  # so that every id takes four bytes
GIVE_UP_S = 60.0
OPEN_CONNECTIONS = 16
CROWD = 64


def submissions(handler: str, count: int) -> list[bytes]:
    """Frames of `count` different one-item jobs."""
    whole = protocol.frame(
        protocol.Submit(
            id=ID_MARK,
            submit_id=SUBMIT_ID_MARK,
            handler=handler,
            items=1,
            input_bytes=len(LINE),
            input_sha256=hashlib.sha256(LINE).digest(),
            item_bytes=len(LINE) - 1,
            input=LINE,
        )
    )
    run = uuid.uuid4().hex[:16].encode()
    frame = bytearray(whole)
    id_at = whole.index(ID_MARK.to_bytes(4, "big"))
    submit_id_at = whole.index(SUBMIT_ID_MARK.encode())
    frames = []
    for number in range(count):
        frame[id_at : id_at + 4] = (IDS_FROM + number).to_bytes(4, "big")
        frame[submit_id_at : submit_id_at + 24] = run + b"%08x" % number
        frames.append(bytes(frame))
    return frames


@dataclass
class Peer:
    """One connection, greeted; `take` counts what came back."""

    sock: socket.socket
    rest: bytes = b""

    def send(self, frames: list[bytes]) -> None:
        piece = b"".join(frames)
        sent = self.sock.send(piece)
        assert sent == len(piece), "the socket is full: fewer requests must be in flight"

    def take(self, expected: bytes) -> int:
        """Read what is there; how many whole replies came. All of them must begin as expected."""
        try:
            piece = self.sock.recv(1 << 18)
        except BlockingIOError:
            return 0
        assert piece, "the daemon hung up"
        buffer, at, count = self.rest + piece, 0, 0
        while len(buffer) - at >= protocol.HEAD.size:
            (length,) = protocol.HEAD.unpack_from(buffer, at)
            if len(buffer) - at < protocol.HEAD.size + length:
                break
            assert buffer.startswith(expected, at + 5), buffer[at : at + 300]
            at += protocol.HEAD.size + length
            count += 1
        self.rest = buffer[at:]
        return count


def connect(path: str) -> Peer:
    """Connect and greet; non-blocking from then on."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(GIVE_UP_S)
    sock.connect(path)
    sock.sendall(protocol.frame(protocol.Hello([protocol.VERSION], "bench")))
    (length,) = protocol.HEAD.unpack(sock.recv(protocol.HEAD.size, socket.MSG_WAITALL))
    sock.recv(length, socket.MSG_WAITALL)
    sock.setblocking(False)
    return Peer(sock)


def closed(path: Path, frames: list[bytes], connections: int, in_flight: int) -> float:
    """Seconds until all of `frames` were accepted, each connection keeping `in_flight` of them open."""
    peers = [connect(str(path)) for _ in range(connections)]
    poll = select.epoll()
    by_fd = {peer.sock.fileno(): peer for peer in peers}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    to_send = iter(frames)
    open_requests = 0
    gc.disable()
    began = time.perf_counter()
    for peer in peers:
        open_requests += _send_next(peer, to_send, in_flight)
    while open_requests:
        ready = poll.poll(GIVE_UP_S)
        assert ready, f"nothing was answered for {GIVE_UP_S:.0f} s"
        for fd, _ in ready:
            done = by_fd[fd].take(ACCEPTED)
            open_requests += _send_next(by_fd[fd], to_send, done) - done
    took = time.perf_counter() - began
    gc.enable()
    poll.close()
    for peer in peers:
        peer.sock.close()
    return took


def _send_next(peer: Peer, to_send: Iterator[bytes], count: int) -> int:
    chosen = [frame for _, frame in zip(range(count), to_send, strict=False)]
    if chosen:
        peer.send(chosen)
    return len(chosen)


def open_loop(path: str, rate: float, seconds: float, handler: str) -> dict[str, float]:
    """Submit at times fixed beforehand; how late the sender itself ever was, and how many came through."""
    frames = submissions(handler, round(rate * seconds))
    peers = [connect(path) for _ in range(OPEN_CONNECTIONS)]
    accepted, late_s = 0, 0.0
    began = time.perf_counter()
    for number, frame in enumerate(frames):
        ahead = began + number / rate - time.perf_counter()
        if ahead > 0:
            accepted += sum(peer.take(ACCEPTED) for peer in peers)
            time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        late_s = max(late_s, -ahead)
        peers[number % len(peers)].send([frame])
    took = time.perf_counter() - began
    while accepted < len(frames):
        assert time.perf_counter() - began < seconds + GIVE_UP_S, f"{accepted} of {len(frames)} were accepted"
        accepted += sum(peer.take(ACCEPTED) for peer in peers)
        time.sleep(0.001)
    return {"accepted": accepted, "per_s": len(frames) / took, "late_ms": late_s * 1e3}


def show(path: str, rate: float, seconds: float, jobs: int) -> dict[str, list[float]]:
    """Latencies in ms, each from the time its request was due. Jobs 1 to `jobs` are asked for at random."""
    dice = random.Random(0)
    peer = connect(path)
    peer.sock.settimeout(GIVE_UP_S)
    latencies_ms: list[float] = []
    began = time.perf_counter()
    for number in range(round(rate * seconds)):
        due = began + number / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        peer.sock.sendall(protocol.frame(protocol.Show(id=number, job=dice.randint(1, jobs))))
        while not peer.take(ONE_JOB):
            pass
        latencies_ms.append((time.perf_counter() - due) * 1e3)
    return {"ms": latencies_ms}


def crowd(path: str, rate: float, seconds: float, jobs: int) -> dict[str, list[float]]:
    """Latencies in ms of `show`, each from the time its request was due, asked by CROWD connections in turn."""
    dice, poll = random.Random(0), select.epoll()
    peers = [connect(path) for _ in range(CROWD)]
    owed: dict[int, deque[float]] = {peer.sock.fileno(): deque() for peer in peers}
    by_fd = {peer.sock.fileno(): peer for peer in peers}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    latencies_ms: list[float] = []
    began, count = time.perf_counter(), round(rate * seconds)
    number = 0
    while number < count or any(owed.values()):
        due = began + number / rate if number < count else time.perf_counter() + 1
        for fd, _ in poll.poll(max(0.0, due - time.perf_counter())):
            count_here = by_fd[fd].take(ONE_JOB)
            now = time.perf_counter()
            latencies_ms += [(now - owed[fd].popleft()) * 1e3 for _ in range(count_here)]
        if number < count and time.perf_counter() >= due:
            peer = peers[number % CROWD]
            owed[peer.sock.fileno()].append(due)
            peer.send([protocol.frame(protocol.Show(id=IDS_FROM + number, job=dice.randint(1, jobs)))])
            number += 1
        assert time.perf_counter() < began + seconds + GIVE_UP_S, (
            f"{len(latencies_ms)} of {count} were answered"
        )
    poll.close()
    for peer in peers:
        peer.sock.close()
    return {"ms": latencies_ms}


def main(kind: str, path: str, rate: str, seconds: str, more: str) -> None:
    gc.disable()
    if kind == "open":
        print(json.dumps(open_loop(path, float(rate), float(seconds), more)))
    elif kind == "crowd":
        print(json.dumps(crowd(path, float(rate), float(seconds), int(more))))
    else:
        print(json.dumps(show(path, float(rate), float(seconds), int(more))))


if __name__ == "__main__":
    main(*sys.argv[1:])
