"""One job's log: what its worker prints while it holds the lease, and the daemon's own remarks on it.

Rule 1: feed() never blocks and never fails: a worker that floods its log, or a log on a dead disk, holds up nobody.
Rule 2: a log is bounded by `bytes_max` over all leases. What comes after that is counted, and one line says how much
it was. Remarks of the daemon and the stacks of a hung worker are let in all the same: they come last and matter most.
Rule 3: what was printed is bytes, not text; it is written as it came.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from gpujobd.catalog import kind
from gpujobd.spool import LOG, folder_at, open_plain

BUFFER_BYTES_MAX: Final = 4 << 20  # waiting to be written; beyond it, on a disk that slow, output is dropped
ADMITTED_BYTES_MAX: Final = 256 << 10  # a lease, beyond the bound

logger = logging.getLogger("gpujobd.supervisor")


class JobLog:
    """The log during one lease. run() writes; the others only say what."""

    def __init__(self, folder: Path, job_id: int, bytes_max: int, on_log: Callable[[int], None]) -> None:
        self.job_id = job_id
        self.closed = trio.Event()
        self._folder = folder
        self._bytes_max = bytes_max
        self._on_log = on_log
        self._fd = -1
        self._room = 0
        self._admissible = ADMITTED_BYTES_MAX
        self._buffer = bytearray()
        self._dropped = 0
        self._closing = False
        self._wake = trio.Event()

    async def open(self) -> None:
        """Open it before anything is fed. A log that cannot be opened is a pity; the job runs all the same."""
        try:
            self._fd, size = await trio.to_thread.run_sync(_open, self._folder)
            self._room = max(0, self._bytes_max - size)
        except OSError as error:
            self._complain(error)

    def feed(self, output: bytes) -> None:
        """Take output of the worker."""
        taken = output[: max(0, min(self._room, BUFFER_BYTES_MAX - len(self._buffer)))]
        self._room -= len(taken)
        self._dropped += len(output) - len(taken)
        self._buffer += taken
        self._wake.set()

    def remark(self, text: str) -> None:
        """Add a line of the daemon's own."""
        self.admit(f"[gpujobd: {text}]\n".encode(errors="replace"))

    def admit(self, output: bytes) -> None:
        """Take the end of output that matters more than the bound: stacks, the traceback of a failed load."""
        taken = output[max(0, len(output) - self._admissible) :]
        self._admissible -= len(taken)
        self._buffer += taken
        self._wake.set()

    def close(self) -> None:
        """Let run() write what is left and end."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Write until closed. When cancelled, what is there is still written, within a second."""
        try:
            while not self._closing:
                await self._wake.wait()
                self._wake = trio.Event()
                await self._write()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
                self._say_what_was_dropped()
                await self._write()
            if self._fd >= 0:
                os.close(self._fd)
            self.closed.set()

    def _say_what_was_dropped(self) -> None:
        if self._dropped:
            self._buffer += b"\n[log full: %d more bytes dropped]\n" % self._dropped

    async def _write(self) -> None:
        piece = bytes(self._buffer)
        self._buffer.clear()
        if not piece or self._fd < 0:
            return
        try:
            # A descriptor of its own, for when the wait is given up: a dead disk must not keep the daemon from
            # stopping, and the number of the abandoned one must not be somebody else's by the time it writes.
            await trio.to_thread.run_sync(_write, os.dup(self._fd), piece, abandon_on_cancel=True)
        except OSError as error:
            self._complain(error)
            self._dropped += len(piece)
        else:
            self._on_log(self.job_id)

    def _complain(self, error: OSError) -> None:
        extra = kind("job_log_failed", job_id=self.job_id)
        logger.warning("log of job %d: %s", self.job_id, error, extra=extra)


def _open(path: Path) -> tuple[int, int]:
    with folder_at(path) as folder:
        fd = open_plain(LOG, folder, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return fd, os.fstat(fd).st_size


def _write(fd: int, piece: bytes) -> None:
    try:
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)
