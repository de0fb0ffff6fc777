"""One client: frames in, frames out, and what it may cost.

Rule 1: a client that is slow, silent, broken or hostile costs the others nothing: every wait here has a deadline,
every queue a bound, and one connection's trouble ends one connection.
Rule 2: what a peer has not taken yet is bounded: beyond OUT_BYTES_MAX nothing more is read from it or done for it.
Rule 3: `except Exception` stands here and nowhere else: a bug in answering one request must not stop the daemon.
"""

from __future__ import annotations

import array
import fcntl
import logging
import math
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from gpujobd import protocol
from gpujobd.access import Peer
from gpujobd.core.inputs import Who
from gpujobd.guests import Guest
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
TAKEN_LOOK_S: Final = 0.005
REQUESTS_A_PASS: Final = 32  # then others get the loop: about half a millisecond
MESSAGE_CHARS_MAX: Final = 1000  # of an error: it may quote what the peer sent

Dispatch = Callable[["Connection", AnyRequest], Awaitable[None] | None]


class Gone(Exception):
    """The peer is no longer worth talking to; the message says why."""


class Connection:
    """State of one connection. `dispatch` answers requests, at once or in a task of `nursery`."""

    def __init__(
        self, sock: trio.socket.SocketType, peer: Peer, who: Who, guest: Guest, dispatch: Dispatch
    ) -> None:
        self.peer = peer
        self.who = who
        self.guest = guest
        self.nursery: trio.Nursery | None = None
        self.on_close: list[Callable[[], None]] = []
        self.owes_by = math.inf  # when the peer must have sent the next piece of an input
        self._sock = sock
        self._dispatch = dispatch
        self._open: set[int] = set()  # ids of requests without their final reply
        self._out: deque[tuple[bytes, int]] = deque()  # frame, descriptor or -1
        self._out_bytes = 0
        self._more = trio.Event()
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
        self._more.set()

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
    def busy(self) -> bool:
        return bool(self._open)

    # --- the life of a connection -------------------------------------------------------------------------------

    async def run(self, welcome: Callable[[protocol.Hello], protocol.Welcome | protocol.Error]) -> None:
        """Serve until the peer hangs up or misbehaves."""
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                nursery.start_soon(self._write)
                try:
                    await self._read(welcome)
                finally:
                    nursery.cancel_scope.cancel()
        except* (Gone, protocol.FrameError, OSError, trio.BrokenResourceError) as group:
            log.debug("connection of uid %d ended: %s", self.peer.uid, _causes(group)[:MESSAGE_CHARS_MAX])
        except* Exception:
            log.exception("a request of uid %d failed", self.peer.uid)
        finally:
            self._close()

    async def _read(self, welcome: Callable[[protocol.Hello], protocol.Welcome | protocol.Error]) -> None:
        frames, greeted, begun_at, served = Frames(), False, trio.current_time(), 0
        while True:
            deadline = self._deadline(greeted, frames.partial, begun_at)
            data = b""
            with trio.move_on_at(deadline) as waited:
                data = await self._sock.recv(READ_BYTES)
            if waited.cancelled_caught:
                if greeted and not frames.partial and self.busy and trio.current_time() < self.owes_by:
                    continue  # it waits for us, not we for it
                raise await self._late("it said nothing in time" if greeted else "no first frame in time")
            if not data:
                return
            if not frames.partial:
                begun_at = trio.current_time()
            try:
                for body in frames.feed(data):
                    begun_at = trio.current_time()
                    request = protocol.decode_request(body)
                    if greeted:
                        await self.room()
                        await self._serve(request)
                        served += 1
                        if served % REQUESTS_A_PASS == 0:
                            await trio.lowlevel.checkpoint()
                    else:
                        self._greet(request, welcome)
                        greeted = True
            except protocol.FrameError as error:
                await self._last_word(str(error))
                raise

    def _deadline(self, greeted: bool, partial: bool, begun_at: float) -> float:
        if not greeted:
            return begun_at + FIRST_FRAME_S
        return begun_at + FRAME_S if partial else min(trio.current_time() + IDLE_S, self.owes_by)

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

    async def _late(self, message: str) -> Gone:
        await self._last_word(message, ErrorCode.TIMED_OUT)
        return Gone(message)

    async def _last_word(self, message: str, code: ErrorCode = ErrorCode.BAD_REQUEST) -> None:
        """Say why before hanging up; a peer that does not listen is not waited for."""
        self.send(_error(0, code, message))
        with trio.move_on_after(1.0):
            while self._out_bytes:
                await self._next_drained()

    async def _write(self) -> None:
        while True:
            if not self._out:
                self._more = trio.Event()
                await self._more.wait()
            frame, fd = self._take()
            weight = len(frame) + (DESCRIPTOR_BYTES if fd >= 0 else 0)
            await self._send_all(frame, fd)
            self._out_bytes -= weight
            self._drained.set()

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
            while _untaken(self._sock):  # noqa: ASYNC110  # the kernel tells nobody when the peer has received
                await trio.sleep(TAKEN_LOOK_S)
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
