"""One client: frames in, frames out, and what it may cost.

Rule 1: a client that is slow, silent, broken or hostile costs the others nothing: every wait here has a deadline,
every queue a bound, and one connection's trouble ends one connection.
Rule 2: `except Exception` stands here and nowhere else: a bug in answering one request must not stop the daemon.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from gpujobd import protocol
from gpujobd.access import Peer
from gpujobd.core.inputs import Who
from gpujobd.protocol import AnyReply, AnyRequest, ErrorCode, Frames

log = logging.getLogger("gpujobd.server")

FIRST_FRAME_S: Final = 2.0
FRAME_S: Final = 10.0  # from a frame's first byte to its last
IDLE_S: Final = 600.0  # only without an open request
WRITE_S: Final = 10.0  # without a byte taken
PING_S: Final = 60.0  # a stream that has nothing to say is probed this often
READ_BYTES: Final = 64 << 10
OUT_BYTES_MAX: Final = 4 << 20  # streams wait beyond it; replies are bounded by IN_FLIGHT_MAX

Dispatch = Callable[["Connection", AnyRequest], Awaitable[None] | None]


class Gone(Exception):
    """The peer is no longer worth talking to; the message says why."""


class Connection:
    """State of one connection. `dispatch` answers requests, at once or in a task of `nursery`."""

    def __init__(self, sock: trio.socket.SocketType, peer: Peer, who: Who, dispatch: Dispatch) -> None:
        self.peer = peer
        self.who = who
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
        self._out_bytes += len(frame)
        self._more.set()

    def finish(self, reply: AnyReply, fd: int = -1) -> None:
        """Queue the final reply of a request."""
        self._open.discard(getattr(reply, "id", 0))
        self.send(reply, fd)

    def fail(self, request_id: int, code: str, message: str, **figures: int) -> None:
        self.finish(protocol.Error(id=request_id, code=code, message=message, **figures))

    async def room(self) -> None:
        """For streams: wait until the peer has taken most of what it was sent."""
        while self._out_bytes > OUT_BYTES_MAX // 2:
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
            log.info("connection of uid %d ended: %s", self.peer.uid, _causes(group))
        except* Exception:
            log.exception("a request of uid %d failed", self.peer.uid)
        finally:
            self._close()

    async def _read(self, welcome: Callable[[protocol.Hello], protocol.Welcome | protocol.Error]) -> None:
        frames, greeted, begun_at = Frames(), False, trio.current_time()
        while True:
            deadline = self._deadline(greeted, frames.partial, begun_at)
            data = b""
            with trio.move_on_at(deadline) as waited:
                data = await self._sock.recv(READ_BYTES)
            if waited.cancelled_caught:
                if greeted and not frames.partial and self.busy and trio.current_time() < self.owes_by:
                    continue  # it waits for us, not we for it
                raise Gone("it said nothing in time" if greeted else "no first frame in time")
            if not data:
                return
            if not frames.partial:
                begun_at = trio.current_time()
            try:
                for body in frames.feed(data):
                    begun_at = trio.current_time()
                    request = protocol.decode_request(body)
                    if greeted:
                        await self._serve(request)
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

    async def _last_word(self, message: str) -> None:
        """Say why before hanging up; a peer that does not listen is not waited for."""
        self.send(protocol.Error(id=0, code=ErrorCode.BAD_REQUEST, message=message))
        with trio.move_on_after(1.0):
            while self._out_bytes:
                self._drained = trio.Event()
                await self._drained.wait()

    async def _write(self) -> None:
        while True:
            if not self._out:
                self._more = trio.Event()
                await self._more.wait()
            frame, fd = self._take()
            with trio.move_on_after(WRITE_S) as waited:
                sent = await self._send_some(frame, fd)
            while not waited.cancelled_caught and sent < len(frame):
                with trio.move_on_after(WRITE_S) as waited:
                    sent += await self._sock.send(memoryview(frame)[sent:])
            if waited.cancelled_caught:
                raise Gone(f"it took nothing for {WRITE_S:.0f} s")
            self._out_bytes -= len(frame)
            self._drained.set()

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

    async def _send_some(self, frame: bytes, fd: int) -> int:
        if fd < 0:
            return await self._sock.send(frame)
        try:
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


def _causes(group: BaseExceptionGroup[BaseException]) -> str:
    """The messages of a group's leaves."""
    leaves = [
        _causes(error) if isinstance(error, BaseExceptionGroup) else str(error) or type(error).__name__
        for error in group.exceptions
    ]
    return "; ".join(leaves)
