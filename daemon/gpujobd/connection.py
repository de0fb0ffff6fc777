"""One client: frames in, frames out, and what it may cost.

Rule 1: a client that is slow, silent, broken or hostile costs the others nothing: every wait here has a deadline,
every queue a bound, and one connection's trouble ends one connection.
Rule 2: what a peer has not taken yet is bounded: beyond OUT_BYTES_MAX nothing more is read from it or done for it.
Rule 3: `except Exception` stands here and nowhere else: a bug in answering one request must not stop the daemon.
Rule 4: what every request pays is one wake-up, a read and a write. So no read has a timer of its own, and one
task writes for all of them, as far as their peers take it at once (`Connections`).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import math
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from gpujobd import protocol
from gpujobd.catalog import kind
from gpujobd.core.inputs import Who
from gpujobd.guests import Guest
from gpujobd.peer import Peer
from gpujobd.protocol import AnyReply, AnyRequest, ErrorCode, Frames

log = logging.getLogger("gpujobd.server")

FIRST_FRAME_S: Final = 2.0
FRAME_S: Final = 10.0  # from a frame's first byte to its last
IDLE_S: Final = 600.0  # only without an open request
WRITE_S: Final = 10.0  # for the peer to take PIECE_BYTES
PING_S: Final = 60.0  # a stream that has nothing to say is probed this often
READ_BYTES: Final = 64 << 10
PIECE_BYTES: Final = 64 << 10
OUT_BYTES_MAX: Final = 1 << 20
DESCRIPTOR_BYTES: Final = 128 << 10  # what a descriptor that waits to be sent counts for
TAKEN_LOOK_S: Final = 0.001  # the first time; then twice as long each
REQUESTS_A_PASS: Final = 32  # then others get the loop: about half a millisecond
OUR_BUG: Final = "a bug of the daemon, told in its log; what was asked last may have been done, or not"
MESSAGE_CHARS_MAX: Final = 1000  # of an error: it may quote what the peer sent

Dispatch = Callable[["Connection", AnyRequest], Awaitable[None] | None]


class Gone(Exception):
    """The peer is no longer worth talking to; the message says why."""


class Connections:
    """All of them: what is done for each, in one go."""

    def __init__(self) -> None:
        self._all: set[Connection] = set()
        self._full: list[Connection] = []
        self.hushed = False
        self._more = trio.Event()
        self._look_at = math.inf
        self._sooner = trio.Event()

    @contextlib.contextmanager
    def with_this(self, connection: Connection) -> Iterator[None]:
        self._all.add(connection)
        try:
            yield
        finally:
            self._all.remove(connection)

    def hush(self) -> None:
        """Read nothing more of anybody. What was asked is still answered."""
        self.hushed = True
        for connection in self._all:
            connection.reading.cancel()

    @property
    def taken(self) -> bool:
        """Whether the peers have taken all that was said to them."""
        return not any(connection.owed for connection in self._all)

    def post(self, connection: Connection) -> None:
        """Something is queued there."""
        self._full.append(connection)
        self._more.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_overdue)
            while True:
                await self._more.wait()
                self._more = trio.Event()
                full, self._full = self._full, []
                for connection in full:
                    connection.flush()

    def watch(self, by: float) -> None:
        """One of them must have said something by then: look at it in time."""
        if by < self._look_at:
            self._look_at = by
            self._sooner.set()

    async def _end_overdue(self) -> None:
        """Hang up on peers that keep us waiting."""
        while True:
            self._look_at = min((connection.due for connection in self._all), default=math.inf)
            self._sooner = trio.Event()
            with trio.move_on_at(self._look_at):
                await self._sooner.wait()
            for connection in list(self._all):
                if connection.due <= trio.current_time():
                    connection.time_out()


class Connection:
    """State of one connection. `dispatch` answers requests, at once or in a task of `nursery`."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        peer: Peer,
        who: Who,
        guest: Guest,
        dispatch: Dispatch,
        everybody: Connections,
    ) -> None:
        self.peer = peer
        self.who = who
        self.guest = guest
        self.nursery: trio.Nursery | None = None
        self.leaving = False  # the nursery takes no more tasks; on_close is called soon
        self.on_close: list[Callable[[], None]] = []
        self.reading = trio.CancelScope()
        self._sock = sock
        self._dispatch = dispatch
        self._everybody = everybody
        self._owes_by = math.inf
        self._frames = Frames()
        self._greeted = False
        self._begun_at = trio.current_time()  # of the frame that is coming in
        self._reads_since = math.inf  # since when the peer is waited for; inf: it is not
        self._gone = ""  # why it was given up
        self._open: set[int] = set()  # ids of requests without their final reply
        self._out: deque[tuple[bytes, int]] = deque()  # frame, descriptor or -1
        self._out_bytes = 0
        self._posted = False  # what is queued will be flushed
        self._slow = False  # the peer did not take all at once: _write has what is queued
        self._stuck = trio.Event()
        self._drained = trio.Event()
        self._closed = False

    # --- replies ------------------------------------------------------------------------------------------------

    def send(self, reply: AnyReply, fd: int = -1) -> None:
        """Queue one frame; `fd` goes with it and is closed here."""
        if self._closed:
            _close(fd)
            return
        frame = protocol.frame(reply)
        self._out.append((frame, fd))
        self._out_bytes += len(frame) + (DESCRIPTOR_BYTES if fd >= 0 else 0)
        if not self._posted and not self._slow:
            self._posted = True
            self._everybody.post(self)

    def finish(self, reply: AnyReply, fd: int = -1) -> None:
        """Queue the final reply of a request."""
        self._open.discard(getattr(reply, "id", 0))
        self.send(reply, fd)

    def fail(self, request_id: int, code: str, message: str, **figures: int) -> None:
        self.finish(_error(request_id, code, message, **figures))

    @property
    def has_room(self) -> bool:
        return self._out_bytes <= OUT_BYTES_MAX // 2

    async def room(self) -> None:
        """Wait until the peer has taken most of what it was sent. BEFORE anything large is made for it."""
        while not self.has_room:
            await self._next_drained()

    async def _next_drained(self) -> None:
        if self._drained.is_set():  # only then: others may wait for the one that stands
            self._drained = trio.Event()
        await self._drained.wait()

    @property
    def owed(self) -> bool:
        return self._out_bytes > 0

    @property
    def busy(self) -> bool:
        return bool(self._open)

    # --- the life of a connection -------------------------------------------------------------------------------

    async def run(self, welcome: Callable[[protocol.Hello], protocol.Welcome | protocol.Error]) -> None:
        """Serve until the peer hangs up or misbehaves."""
        try:
            with self._everybody.with_this(self):
                if self._everybody.hushed:
                    self.reading.cancel()
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    nursery.start_soon(self._write)
                    try:
                        with self.reading:
                            await self._read(welcome)
                        if self._everybody.hushed:
                            await trio.sleep_forever()  # until the daemon ends; answers go out meanwhile
                    finally:
                        self.leaving = True
                        nursery.cancel_scope.cancel()
        except* (Gone, protocol.FrameError, OSError, trio.ClosedResourceError) as group:
            why = self._gone or _causes(group)
            log.debug("connection of uid %d ended: %s", self.peer.uid, why[:MESSAGE_CHARS_MAX])
        except* Exception:
            extra = kind("request_failed", by_uid=self.peer.uid)
            log.exception("a request of uid %d failed", self.peer.uid, extra=extra)
            self.send(_error(0, ErrorCode.INTERNAL, OUR_BUG))
            self.flush()
        finally:
            self._close()

    async def _read(self, welcome: Callable[[protocol.Hello], protocol.Welcome | protocol.Error]) -> None:
        served = 0
        while data := await self._receive():
            if not self._frames.partial:
                self._begun_at = trio.current_time()
            try:
                for body in self._frames.feed(data):
                    self._begun_at = trio.current_time()
                    request = protocol.decode_request(body)
                    if self._greeted:
                        await self.room()
                        await self._serve(request)
                        served += 1
                        if served % REQUESTS_A_PASS == 0:
                            await trio.lowlevel.checkpoint()
                    else:
                        self._greet(request, welcome)
                        self._greeted = True
            except protocol.FrameError as error:
                await self._last_word(str(error))
                raise

    async def _receive(self) -> bytes:
        """What the peer sent; nothing at its end, and no longer than it is due."""
        self._reads_since = trio.current_time()
        self._everybody.watch(self.due)
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = os.read(self._sock.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            self._reads_since = math.inf
            return data

    @property
    def due(self) -> float:
        """When the peer has kept us waiting for too long."""
        if self._reads_since == math.inf:
            return math.inf
        if not self._greeted:
            return self._begun_at + FIRST_FRAME_S
        return (
            self._begun_at + FRAME_S
            if self._frames.partial
            else min(self._reads_since + IDLE_S, self._owes_by)
        )

    @property
    def owes_by(self) -> float:
        """When the peer must have sent the next piece of an input."""
        return self._owes_by

    @owes_by.setter
    def owes_by(self, by: float) -> None:
        self._owes_by = by
        self._everybody.watch(self.due)

    def time_out(self) -> None:
        """Give the peer up; but with a request open, it waits for us, not we for it."""
        now = trio.current_time()
        if self._greeted and not self._frames.partial and self.busy and now < self._owes_by:
            self._reads_since = now
        else:
            self._give_up("it said nothing in time" if self._greeted else "no first frame in time")

    def _give_up(self, why: str) -> None:
        """Say why, if the peer takes it at once, and hang up: whoever reads or writes finds the socket closed."""
        self.send(_error(0, ErrorCode.TIMED_OUT, why))
        self.flush()
        self._gone = why
        self._reads_since = math.inf
        self._sock.close()

    def _greet(
        self, request: AnyRequest, welcome: Callable[[protocol.Hello], protocol.Welcome | protocol.Error]
    ) -> None:
        if not isinstance(request, protocol.Hello):
            raise protocol.FrameError("the first frame is hello")
        reply = welcome(request)
        self.send(reply)
        if isinstance(reply, protocol.Error):
            raise protocol.FrameError(reply.message)

    async def _serve(self, request: AnyRequest) -> None:
        if isinstance(request, protocol.Hello):
            raise protocol.FrameError("hello is said once")
        if not isinstance(request, protocol.Chunk):
            if request.id in self._open:
                raise protocol.FrameError(f"request id {request.id} is open already")
            if len(self._open) >= protocol.IN_FLIGHT_MAX:
                limit = protocol.IN_FLIGHT_MAX
                self.send(
                    protocol.Error(
                        id=request.id,
                        code=ErrorCode.TOO_MANY_REQUESTS,
                        message=f"{limit} of {limit} requests of this connection are open",
                        limit=limit,
                        current=limit,
                    )
                )
                return
            self._open.add(request.id)
        pending = self._dispatch(self, request)
        if pending is not None:
            await pending

    async def _last_word(self, message: str) -> None:
        """Say why before hanging up; a peer that does not listen is not waited for."""
        self.send(_error(0, ErrorCode.BAD_REQUEST, message))
        with trio.move_on_after(1.0):
            while self._out_bytes:
                await self._next_drained()

    def flush(self) -> None:
        """Write what is queued, as far as the peer takes it at once; the rest, and descriptors, are for `_write`."""
        self._posted = False
        while self._out and not self._slow and not self._closed:
            frame, fd = self._take()
            sent = 0 if fd >= 0 else self._send_now(frame)
            self._out_bytes -= sent
            self._drained.set()
            if sent < len(frame):
                self._out.appendleft((frame[sent:], fd))
                self._slow = True
                self._stuck.set()

    def _send_now(self, frame: bytes) -> int:
        """Bytes the peer took; none where it is gone, too: _write finds that out again, and says it."""
        try:
            return os.write(self._sock.fileno(), frame)
        except OSError:
            return 0

    async def _write(self) -> None:
        while True:
            await self._stuck.wait()
            self._stuck = trio.Event()
            while self._out:
                frame, fd = self._take()
                weight = len(frame) + (DESCRIPTOR_BYTES if fd >= 0 else 0)
                await self._send_all(frame, fd)
                self._out_bytes -= weight
                self._drained.set()
            self._slow = False

    async def _send_all(self, frame: bytes, fd: int) -> None:
        """Raises: Gone where the peer takes less than PIECE_BYTES in WRITE_S: one byte now and then is not enough."""
        left = memoryview(frame)
        while left:
            piece, left = left[:PIECE_BYTES], left[PIECE_BYTES:]
            with trio.move_on_after(WRITE_S) as waited:
                while piece:
                    piece = piece[await self._send_some(piece, fd) :]
                    fd = -1
            if waited.cancelled_caught:
                raise Gone(f"it took too little in {WRITE_S:.0f} s")

    def _take(self) -> tuple[bytes, int]:
        """The next frame with a descriptor alone, or as many plain ones as fit one send."""
        frame, fd = self._out.popleft()
        if fd >= 0 or not self._out:
            return frame, fd
        many, size = [frame], len(frame)
        while self._out and self._out[0][1] < 0 and size < READ_BYTES:
            many.append(self._out.popleft()[0])
            size += len(many[-1])
        return b"".join(many), -1

    async def _send_some(self, frame: memoryview, fd: int) -> int:
        if fd < 0:
            return await self._sock.send(frame)
        try:
            # One at a time: descriptors on their way count against the daemon's user, all peers together.
            look_s = TAKEN_LOOK_S
            while _untaken(self._sock):  # the kernel tells nobody when the peer has received
                await trio.sleep(look_s)
                look_s = min(2 * look_s, 1.0)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            return await self._sock.sendmsg([frame], rights)
        finally:
            _close(fd)

    def _close(self) -> None:
        self._closed = True
        for _, fd in self._out:
            _close(fd)
        self._out.clear()
        for hook in self.on_close:
            hook()
        self._sock.close()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _untaken(sock: trio.socket.SocketType) -> int:
    """Bytes that were sent and that the peer has not received (SIOCOUTQ, unix(7))."""
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return count[0]


def _error(request_id: int, code: str, message: str, **figures: int) -> protocol.Error:
    if len(message) > MESSAGE_CHARS_MAX:
        message = f"{message[:MESSAGE_CHARS_MAX]}..."
    return protocol.Error(id=request_id, code=code, message=message, **figures)


def _causes(group: BaseExceptionGroup[BaseException]) -> str:
    """The messages of a group's leaves."""
    leaves = [
        _causes(error) if isinstance(error, BaseExceptionGroup) else str(error) or type(error).__name__
        for error in group.exceptions
    ]
    return "; ".join(leaves)
