"""The files of one leased job: the lock, both outputs, the suspects page.

    DIR/lock           flock LOCK_EX while the outputs are open: whoever holds it may write them, nobody else
    DIR/results.jsonl  DIR/errors.jsonl    append-only; everything after the checkpointed length is cut off at the start
    DIR/suspects       40 bytes, mapped into memory, little-endian:
                       u64 attempt | u64 current first | u64 current last | u64 previous first | u64 previous last
                       (0, 0: none). Lines of this job's own input. The page outlives the process, so that the daemon
                       sees what was in hand when a worker died.

Rule 1: all are opened relative to the job's folder, never through a symbolic link.
Rule 2: outputs shorter than the checkpoint, or with another CRC, are damaged: nothing is cut, written or redone.
Rule 3: order of durability: both outputs fdatasynced, and the names that lead to them synced once, DIR's own too (the
daemon does not wait for the folder of a small job); then the checkpoint is reported, then it counts.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import time
import zlib
from typing import Callable

INPUT = "input.jsonl"
RESULTS = "results.jsonl"
ERRORS = "errors.jsonl"
LOCK = "lock"
SUSPECTS = "suspects"
LOCK_WAIT_S = 30.0  # a predecessor being killed needs a moment to let go
LOCK_POLL_S = 0.05
READ_BYTES = 1 << 20

PAGE = struct.Struct("<QQQQQ")
PAGE_BYTES = 64

GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR})
OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


class LeaseLost(Exception):
    """The lease cannot go on; `cause` is the word of the message."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class GivenUp(Exception):
    """The lease was asked back before it had begun."""


def lost_to(error: OSError, doing: str) -> LeaseLost:
    """How the lease ends when the disk refuses: EFBIG is a file size limit, RLIMIT_FSIZE."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return LeaseLost("disk_full" if full else "died", f"{doing}: {error}")


def input_lost_to(error: OSError, name: str) -> LeaseLost:
    """The same for the input: only what is not there fails the job; what a disk refuses today it may give tomorrow."""
    if error.errno in GONE:
        return LeaseLost("input_lost", f"{name}: {error.strerror}")
    return lost_to(error, f"reading {name}")


def open_to_read(name: str, folder: int | None = None, flags: int = 0) -> int:
    """A folder, or a plain file; of a FIFO nobody is waited for.

    Raises: LeaseLost.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | flags | OPEN_FLAGS, dir_fd=folder)
    except OSError as error:
        raise input_lost_to(error, name) from None
    if not flags & os.O_DIRECTORY and not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise LeaseLost("input_lost", f"{name} is no plain file")
    return fd


def take_lock(folder: int, give_up: Callable[[], bool], wait_s: float = LOCK_WAIT_S) -> int:
    """The descriptor that holds the lock; closing it lets go.

    Raises:
        LeaseLost: somebody else held it for `wait_s`.
        GivenUp: give_up() said so while it was waited for.
    """
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o600, dir_fd=folder)
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until and not give_up():
                time.sleep(LOCK_POLL_S)
                continue
            os.close(lock)
            if give_up():
                raise GivenUp from None
            raise LeaseLost("died", f"lock_busy: another process held the lock for {wait_s:.0f} s") from None
        return lock


def _unlock(lock: int) -> None:
    """By hand first: a child that the handler has forked holds a copy of the descriptor."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


class Output:
    """One output file: what is in it, and how much of that is durable."""

    def __init__(self, folder: int, name: str, size: int, crc: int) -> None:
        """Open it as the checkpoint left it.

        Raises:
            LeaseLost: it is damaged.
            OSError: the disk does not answer as it should.
        """
        self.name = name
        self.size = self._kept_size = size
        self.crc = self._kept_crc = crc
        create = 0 if size else os.O_CREAT
        try:
            self._fd = os.open(name, os.O_RDWR | os.O_APPEND | create | OPEN_FLAGS, 0o600, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR):
                raise LeaseLost("output_damaged", f"{name}: {error.strerror}") from None
            raise
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise LeaseLost("output_damaged", f"{self.name} is not a regular file")
        if found.st_nlink > 1:  # whose it is as well, nobody knows: it must not be cut
            raise LeaseLost("output_damaged", f"{self.name} has a second name")
        if found.st_size < self.size:
            raise LeaseLost(
                "output_damaged", f"{self.name} has {found.st_size} bytes, its checkpoint {self.size}"
            )
        if _crc_of(self._fd, self.size) != self.crc:
            raise LeaseLost("output_damaged", f"the first {self.size} bytes of {self.name} have changed")

    def cut(self) -> None:
        """Drop all that is not checkpointed."""
        os.ftruncate(self._fd, self._kept_size)
        self.size, self.crc = self._kept_size, self._kept_crc

    def append(self, data: bytes) -> None:
        """Raises: OSError; the file may then hold a part of `data` and wants cut()."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def sync(self) -> None:
        """Make it durable. An output nothing was appended to costs nothing."""
        if self.size != self._kept_size:
            os.fdatasync(self._fd)

    def keep(self) -> None:
        """What is in it now is checkpointed."""
        self._kept_size, self._kept_crc = self.size, self.crc

    def close(self) -> None:
        os.close(self._fd)


def _crc_of(fd: int, size: int) -> int:
    """The CRC of the first `size` bytes; of fewer where the file ends before."""
    crc = at = 0
    while at < size:
        piece = os.pread(fd, min(READ_BYTES, size - at), at)
        if not piece:
            break
        crc = zlib.crc32(piece, crc)
        at += len(piece)
    return crc


class Page:
    """The suspects page: which lines are in the handler's hands."""

    def __init__(self, folder: int, attempt: int) -> None:
        fd = os.open(SUSPECTS, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o600, dir_fd=folder)
        try:
            if os.fstat(fd).st_size < PAGE_BYTES:
                os.pwrite(fd, bytes(PAGE_BYTES), 0)  # not a hole: on a full disk that would be a SIGBUS later
            self._map = mmap.mmap(fd, PAGE_BYTES)
        finally:
            os.close(fd)
        self._attempt = attempt
        self._previous = (0, 0)
        self.write(0, 0)

    def write(self, first: int, last: int) -> None:
        PAGE.pack_into(self._map, 0, self._attempt, first, last, *self._previous)

    def clear(self, first: int, last: int) -> None:
        """The call's outputs are in hand. It is the previous one from now on: CUDA errors come late."""
        self._previous = (first, last)
        self.write(0, 0)

    def close(self) -> None:
        self._map.close()


class JobFiles:
    """All of them, open, for as long as the lease lasts."""

    def __init__(
        self, path: str, attempt: int, checkpoint: dict[str, int], give_up: Callable[[], bool]
    ) -> None:
        """Raises: LeaseLost, GivenUp."""
        self._closers: list[Callable[[], None]] = []
        try:
            self._open(path, attempt, checkpoint, give_up)
        except (LeaseLost, GivenUp):
            self.close()
            raise
        except OSError as error:
            self.close()
            raise lost_to(error, "opening the job's files") from None

    def _open(self, path: str, attempt: int, checkpoint: dict[str, int], give_up: Callable[[], bool]) -> None:
        self.folder = open_to_read(path, flags=os.O_DIRECTORY)
        self._closers.append(lambda: os.close(self.folder))
        self.input = open_to_read(INPUT, self.folder)
        self._closers.append(lambda: os.close(self.input))
        lock = take_lock(self.folder, give_up)
        self._closers.append(lambda: _unlock(lock))
        self.page = Page(self.folder, attempt)
        self._closers.append(self.page.close)
        self.results = Output(self.folder, RESULTS, checkpoint["results_bytes"], checkpoint["results_crc"])
        self._closers.append(self.results.close)
        self.errors = Output(self.folder, ERRORS, checkpoint["errors_bytes"], checkpoint["errors_crc"])
        self._closers.append(self.errors.close)
        self.results.cut()  # only now that both are known to be whole
        self.errors.cut()
        self._named = False

    def sync(self) -> None:
        """Make durable what is in both outputs, and the first time their names."""
        for output in (self.results, self.errors):
            output.sync()
        if not self._named:
            self._sync_names()
            self._named = True

    def _sync_names(self) -> None:
        os.fsync(self.folder)
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | OPEN_FLAGS, dir_fd=self.folder)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def close(self) -> None:
        """Last opened, first closed: the lock is let go after the outputs."""
        while self._closers:
            self._closers.pop()()
