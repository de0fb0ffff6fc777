"""The disk of a simulated world: the journal's in memory, the spool's in a real folder that forgets like one.

    journal   SimDisk (tests/sim_disk.py): sectors and names, each durable or not
    spool     real files, so that worker and daemon meet in them as they do; what was synced is remembered here

Rule 1: the process may be killed, or the power may go, at every operation. Once that happened, nothing that the dead
process still does while it unwinds reaches a file.
Rule 2: of a file in the spool a power cut leaves what was synced, and of the rest any subset of its sectors; of new
names any subset; a rename is done or not done, never half.
Rule 3: after a failed sync the pages count as clean: the next sync succeeds and writes nothing (measured on ext4, xfs
and btrfs). Only writing them again helps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from types import SimpleNamespace
from typing import Any, Final, Protocol

from gpujobd.frames import SECTOR
from sim_disk import PowerCut, SimDisk

PLENTY_BYTES: Final = 100_000_000_000


class Killed(BaseException):
    """The daemon's process is gone."""


class Luck(Protocol):
    """What goes wrong at an operation."""

    def at_disk(self, what: str) -> str | int | None: ...
    def at_spool(self, what: str) -> int | None: ...


class JournalDisk(SimDisk):
    """One journal's. What happens at an operation is drawn, not planned."""

    def __init__(self, luck: Luck, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self._luck = luck

    def _step(self, what: str) -> str | int | None:
        if self.off:
            raise PowerCut
        self.ops += 1
        fault = self._luck.at_disk(what)
        if fault == "cut":
            self.off = True
        return fault


class SpoolDisk:
    """Stands in for the module `os` where files of jobs are touched."""

    def __init__(self, root: str, luck: Luck, rng: random.Random) -> None:
        self.root = root
        self.full = False
        self.dead = False  # the process is: nothing is written any more
        self._luck, self._rng = luck, rng
        self._synced: dict[str, bytes] = {}  # path -> what a power cut cannot take
        self._names: dict[str, set[str]] = {}  # folder -> names that it cannot take
        self._renames: list[tuple[str, str]] = []  # not yet durable, oldest first
        self._stale: set[str] = set()  # a sync failed, and nothing was written since
        self._opened: dict[int, tuple[int, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _alive(self) -> None:
        if self.dead:
            raise Killed

    # --- what is watched ------------------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._alive()
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            self._changed(path, dir_fd)
        found = os.fstat(fd)
        self._opened[fd] = found.st_dev, found.st_ino
        return fd

    def close(self, fd: int) -> None:
        self._opened.pop(fd, None)
        os.close(fd)

    def write(self, fd: int, data: Any) -> int:
        self._alive()
        self._refuse("write")
        if path := self._path(fd):
            self._stale.discard(path)
        return os.write(fd, data)

    def _refuse(self, what: str) -> None:
        number = errno.ENOSPC if self.full else self._luck.at_spool(what)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def fsync(self, fd: int) -> None:
        self._alive()
        path = self._path(fd)
        number = self._luck.at_spool("fsync")
        if number is not None:
            self._stale.add(path)
            raise OSError(number, os.strerror(number))
        if not path or path in self._stale:
            return
        if os.path.isdir(path):
            self._names[path] = set(os.listdir(path))
            self._renames = [pair for pair in self._renames if path not in map(os.path.dirname, pair)]
        else:
            with open(path, "rb") as file:
                self._synced[path] = file.read()

    fdatasync = fsync

    def rename(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        self._alive()
        source = os.path.join(self._path(src_dir_fd), old)
        target = os.path.join(self._path(dst_dir_fd), new)
        os.rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        self._changed(old, src_dir_fd)
        self._changed(new, dst_dir_fd)
        if source in self._synced:
            self._synced[target] = self._synced.pop(source)
        else:
            self._synced.pop(target, None)
        if os.path.dirname(source) != os.path.dirname(target):
            self._renames.append((source, target))

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        self._alive()
        os.unlink(path, dir_fd=dir_fd)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._alive()
        self._refuse("mkdir")
        os.mkdir(path, mode, dir_fd=dir_fd)
        self._changed(path, dir_fd)

    def fstatvfs(self, fd: int) -> Any:
        return SimpleNamespace(f_bavail=0 if self.full else PLENTY_BYTES, f_frsize=1)

    def _changed(self, path: Any, dir_fd: int | None) -> None:
        """The folder of a new name is dirty again, whatever sync of it failed before."""
        self._stale.discard(os.path.dirname(path) if dir_fd is None else self._path(dir_fd))

    def _path(self, fd: int) -> str:
        """Empty for a file that has no name any more."""
        path = os.readlink(f"/proc/self/fd/{fd}")
        return "" if path.endswith(" (deleted)") else path

    # --- the world around it ----------------------------------------------------------------------------------------

    def begin_life(self) -> None:
        self.dead = False

    def end_life(self) -> None:
        """The process is gone: its descriptors close. Files opened by workers are theirs to close."""
        for fd, identity in self._opened.items():
            with contextlib.suppress(OSError):
                found = os.fstat(fd)
                if (found.st_dev, found.st_ino) == identity:
                    os.close(fd)
        self._opened.clear()

    def cut_power(self) -> None:
        undone = self._rng.randint(0, len(self._renames))
        for source, target in reversed(self._renames[len(self._renames) - undone :]):
            if os.path.exists(target):
                os.rename(target, source)
                if target in self._synced:
                    self._synced[source] = self._synced.pop(target)
        kept = {target for _, target in self._renames[: len(self._renames) - undone]}
        self._renames.clear()
        self._forget(self.root, kept)
        self._stale.clear()
        here = {os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names}
        self._synced = {path: held for path, held in self._synced.items() if path in here}
        self._names = {path: names for path, names in self._names.items() if os.path.isdir(path)}

    def _forget(self, folder: str, kept: set[str]) -> None:
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if not os.path.isdir(path):
                if name in self._names.get(folder, ()) or path in kept or self._rng.random() < 0.5:
                    self._tear(path)
                else:
                    os.unlink(path)
            elif (
                folder == self.root
                or name in self._names.get(folder, ())
                or any(os.path.dirname(other) == path for other in kept)
                or self._rng.random() < 0.5
            ):
                self._forget(path, kept)
            else:
                shutil.rmtree(path)
        self._names[folder] = set(os.listdir(folder))

    def _tear(self, path: str) -> None:
        """Leave what was synced, and of the rest what luck leaves."""
        synced = self._synced.get(path, b"")
        with open(path, "rb") as file:
            now = file.read()
        if now == synced:
            return
        share = self._rng.choice((0.0, 0.5, 0.9, 1.0))
        size = self._rng.choice((len(synced), max(len(now), len(synced)), len(now)))
        held = bytearray(synced[:size].ljust(size, b"\0"))
        for at in range(0, size, SECTOR):
            if self._rng.random() < share:
                piece = now[at : at + SECTOR][: size - at]
                held[at : at + len(piece)] = piece
        with open(path, "wb") as file:
            file.write(held)
        self._synced[path] = bytes(held)
