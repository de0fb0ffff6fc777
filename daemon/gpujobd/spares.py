"""Two spare segments, so that rolling stalls nobody and a full disk stops nobody at once.

    next      becomes the next segment
    ballast   becomes `next` on the day the disk is full: a file of zeros needs no new space to be written again;
              or goes, so that the directory finds a block for the name of the next segment

Rule 1: a segment is written full of zeros and synced before its first use; it is never preallocated and never
grows. Otherwise fdatasync depends on metadata, and on a dying file system it was seen to succeed for lost data.
Rule 2: a file that stands at the start is written again before it is used: its zeros may be in the cache only.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from gpujobd.disk import NO_SPACE, Disk, put

_PIECE: Final = bytes(1 << 20)


class Spares:
    """`make` may run in one thread beside `taken` in another: they exclude each other."""

    def __init__(self, disk: Disk, directory: str, segment_bytes: int) -> None:
        self._next_path = f"{directory}/next"
        self._ballast_path = f"{directory}/ballast"
        self._disk, self._directory, self._segment_bytes = disk, directory, segment_bytes
        self._lock = threading.Lock()
        self._next_ready = False
        self._ballast_ready = False

    @property
    def missing(self) -> bool:
        return not (self._next_ready and self._ballast_ready)

    @contextlib.contextmanager
    def taken(self) -> Iterator[str]:
        """A zero-filled, synced file: the caller names it inside (`name`), so that nobody takes it for a spare again.

        Raises:
            OSError: there is none and none can be made.
        """
        with self._lock:
            if not self._next_ready:
                self._make_next()
            self._next_ready = False
            yield self._next_path

    def name(self, path: str) -> None:
        """Inside `taken`: rename the file to this. The directory may need a block for it (a full xfs): the ballast's.

        A rename that found no space has changed nothing, unlike a sync that failed: it may be tried again.

        Raises:
            OSError: it has no new name.
        """
        try:
            self._disk.rename(self._next_path, path)
        except OSError as error:
            if error.errno not in NO_SPACE or not self._stands(self._ballast_path):
                raise
            self._ballast_ready = False
            self._disk.unlink(self._ballast_path)
            self._disk.rename(self._next_path, path)

    def make(self) -> bool:
        """Make what is missing; False: there is no space for all of it.

        Raises:
            OSError: the device refused, and not for lack of space.
        """
        with self._lock:
            try:
                if not self._next_ready:
                    self._make_next()
                if not self._ballast_ready:
                    self._ballast_ready = self._stands(self._ballast_path) or self._make_file(
                        self._ballast_path
                    )
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
            return not self.missing

    def _make_next(self) -> None:
        try:
            if self._stands(self._next_path):
                self._zero(self._next_path)
            else:
                self._make_file(self._next_path)
        except OSError as error:
            if error.errno not in NO_SPACE or not self._stands(self._ballast_path):
                raise
            self._ballast_ready = False
            self._disk.rename(self._ballast_path, self._next_path)
            self._zero(self._next_path)
        self._next_ready = True

    def _stands(self, path: str) -> bool:
        """Whether a file of the right size is there."""
        try:
            fd = self._disk.open(path)
        except FileNotFoundError:
            return False
        try:
            return self._disk.size(fd) == self._segment_bytes
        finally:
            self._disk.close(fd)

    def _make_file(self, path: str) -> bool:
        """Write it under another name first: a file under its own name has its full size."""
        unfinished = path + ".tmp"
        try:
            self._zero(unfinished)
            self._disk.rename(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                self._disk.unlink(unfinished)
            raise
        self._disk.fsync_dir(self._directory)
        return True

    def _zero(self, path: str) -> None:
        fd = self._disk.open(path, write=True, create=True)
        try:
            for at in range(0, self._segment_bytes, len(_PIECE)):
                put(self._disk, fd, _PIECE[: self._segment_bytes - at], at)
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)
