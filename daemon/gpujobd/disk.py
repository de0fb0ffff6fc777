"""The disk: every call by which the journal touches files.

Rule 1: the journal calls nothing else, so that a test may stand in a disk that loses, tears and refuses.
Rule 2: names and bytes are made durable apart: fdatasync is for bytes, fsync_dir for names.
Rule 3: nothing is retried and nothing is hidden. A short write is the caller's to notice (see `put`).

Paths are absolute strings, offsets and sizes are bytes, files are plain descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Disk:
    """The real one. Every method may block and may raise OSError."""

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDWR if write else os.O_RDONLY)
        return os.open(path, flags | (os.O_CREAT if create else 0), 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, piece: bytes, offset: int) -> int:
        return os.pwrite(fd, piece, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def forget(self, fd: int) -> None:
        """Drop the file's clean pages, so that the next read comes from the device (a hint)."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def listdir(self, directory: str) -> list[str]:
        return os.listdir(directory)

    def mkdir(self, directory: str) -> None:
        """Make `directory`, private, with its name durable; fine if it stands."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
            self.fsync_dir(os.path.dirname(directory) or ".")

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def fsync_dir(self, directory: str) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str, *, wait_s: float) -> int:
        """Hold `path` exclusively until its descriptor is closed.

        It waits a moment, because a predecessor may still be on its way out and a report looks at the lock.

        Raises:
            BlockingIOError: somebody else holds it.
        """
        fd = self.open(path, write=True, create=True)
        give_up_at = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    os.close(fd)
                    raise
                time.sleep(0.02)
            else:
                return fd

    def is_locked(self, path: str) -> bool:
        """Whether somebody holds `path` now."""
        try:
            fd = self.open(path)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


def make_folders(folder: Path) -> None:
    """Make `folder`, private, and what is missing above it, each name durable.

    Its own also where it stands: who made it need not have synced it.
    """
    missing = [above for above in folder.parents if not above.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for made in (folder, *missing):
        with contextlib.suppress(
            PermissionError
        ):  # a folder above that we may not read was made by somebody else
            Disk().fsync_dir(str(made.parent))


def put(disk: Disk, fd: int, piece: bytes, offset: int) -> None:
    """Write all of `piece`.

    Raises:
        OSError: the write failed, or was short, which on a regular file is the same.
    """
    written = disk.pwrite(fd, piece, offset)
    if written != len(piece):
        raise OSError(errno.EIO, f"short write: {written} of {len(piece)} bytes at offset {offset}")


def get(disk: Disk, path: str, size_max: int = -1) -> bytes:
    """Read a whole file, or its first `size_max` bytes."""
    fd = disk.open(path)
    try:
        size = disk.size(fd) if size_max < 0 else min(disk.size(fd), size_max)
        return disk.pread(fd, size, 0) if size else b""
    finally:
        disk.close(fd)
