"""A disk in memory that forgets what was not synced.

    inode    := cache (what reads see) | disk (what survives a power cut) | the sectors by which they differ
    names    := cache | disk | the changes between them, in order

Rule 1: a sector (512 bytes) is on the disk whole or not at all; of the unsynced ones a power cut keeps any subset.
Rule 2: of the unsynced changes of names a power cut keeps any subset, each whole; a file whose size was never
synced is empty, or full-sized with any subset of its sectors; a file cut short and not synced has either length.
fsync_dir makes the changes of that directory's names durable, and no other's. Whoever is in a folder goes with it.
Rule 3: after a failed sync the pages count as clean: the next sync succeeds and writes nothing, reads see the new
bytes, the disk holds the old ones, or some of the new (measured on ext4, xfs and btrfs).
Rule 4: a short or failed write ends at a sector: the kernel copies whole pages.
Rule 5: on a file system that dies ("dying") nothing reaches the disk any more. A sync of a file with a sector that was
never synced before needs metadata and returns as if all were well (measured on ext4 and xfs); any other says EIO.

Every operation has a number; a `Fault` says what happens at which.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random

from gpujobd.disk import Disk
from gpujobd.frames import SECTOR


class PowerCut(BaseException):
    """The power is gone; so is the process."""


@dataclasses.dataclass
class Fault:
    """What happens at operation `at`: "cut", "short", "dying", or an errno; sticky: at every later one too.

    A cut at a write or a sync leaves that operation half-done.
    """

    at: int
    kind: str | int
    sticky: bool = False


class Inode:
    def __init__(self) -> None:
        self.cache = bytearray()
        self.disk = bytearray()
        self.dirty: set[int] = set()
        self.shortest: int | None = None  # it was cut to this length since the last sync
        self.stored: set[int] = (
            set()
        )  # sectors that a sync has brought to the disk: they have their place there

    def write(self, piece: bytes, offset: int) -> None:
        if len(self.cache) < offset + len(piece):
            self.cache.extend(bytes(offset + len(piece) - len(self.cache)))
        self.cache[offset : offset + len(piece)] = piece
        self.dirty.update(range(offset // SECTOR, -(-(offset + len(piece)) // SECTOR)))

    @property
    def needs_metadata(self) -> bool:
        """Whether a sync has more to write than the sectors themselves."""
        return not self.dirty <= self.stored or len(self.cache) != len(self.disk)

    def truncate(self, size: int) -> None:
        if size < len(self.cache):
            self.shortest = min(size, len(self.cache) if self.shortest is None else self.shortest)
            del self.cache[size:]
        self.cache.extend(bytes(size - len(self.cache)))

    def keep(self, sectors: set[int]) -> None:
        """These reach the disk."""
        if len(self.disk) < len(self.cache):
            self.disk.extend(bytes(len(self.cache) - len(self.disk)))
        for sector in sectors:
            at = sector * SECTOR
            piece = self.cache[at : at + SECTOR]
            self.disk[at : at + len(piece)] = piece

    def sync(self) -> None:
        self._shorten()
        self.keep(self.dirty)
        self.stored |= self.dirty
        self.dirty.clear()

    def _shorten(self) -> None:
        if self.shortest is not None:
            del self.disk[self.shortest :]
            self.shortest = None

    def fail_sync(self, rng: random.Random) -> None:
        self.keep(_some(self.dirty, rng))
        self.dirty.clear()

    def cut(self, rng: random.Random) -> None:
        self.settle(rng)
        self.cache = bytearray(self.disk)

    def settle(self, rng: random.Random) -> None:
        """What of the unsynced is on the disk when nothing more reaches it."""
        if self.shortest is not None and rng.random() < 0.5:
            self._shorten()
        if self.dirty and (len(self.cache) == len(self.disk) or rng.random() < 0.5):
            self.keep(_some(self.dirty, rng))
        self.dirty.clear()
        self.shortest = None


class SimDisk(Disk):
    """Same methods as the real one. Names are whole paths; a folder needs a name of its own only if it may be lost."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.ops = 0
        self.log: list[str] = []
        self.fault: Fault | None = None
        self.names: dict[str, Inode] = {}
        self.disk_names: dict[str, Inode] = {}
        self.changes: list[dict[str, Inode | None]] = []
        self.opened: dict[int, Inode] = {}
        self.locks: set[int] = set()
        self.folders: set[str] = set()  # made by make_folder
        self.off = False
        self.dying = False
        self.space: int | None = None  # bytes that all files together may take
        self._fds = 10

    # --- the world around it -----------------------------------------------------------------------------------

    def restart_process(self) -> None:
        """The process is gone, the machine lives: the cache stays."""
        self.opened.clear()
        self.locks.clear()
        self.fault = None

    def cut_power(self) -> None:
        """The machine is gone: what was not synced survives as it likes."""
        self.restart_process()
        self.off = False
        if not self.dying:
            self._settle()
        self.dying = False
        self.changes.clear()
        self.names = dict(self.disk_names)
        for inode in {id(inode): inode for inode in self.names.values()}.values():
            inode.cache = bytearray(inode.disk)
            inode.dirty.clear()
            inode.shortest = None

    def _settle(self) -> None:
        """Any of the unsynced reaches the disk, and nothing later."""
        kept = self.rng.choice(("all", "none", "some", "prefix"))
        size = self.rng.randint(0, len(self.changes))
        for number, change in enumerate(self.changes):
            if {"all": True, "none": False, "prefix": number < size}.get(kept, self.rng.random() < 0.5):
                _change(self.disk_names, change)
        for path in [path for path in self.disk_names if not self._has_folders(path)]:
            del self.disk_names[path]
        for inode in {id(inode): inode for inode in (self.names | self.disk_names).values()}.values():
            inode.settle(self.rng)

    def _has_folders(self, path: str) -> bool:
        """Whether every folder above it is there that was made by make_folder."""
        while path := path.rpartition("/")[0]:
            if path in self.folders and path not in self.disk_names:
                return False
        return True

    def _step(self, what: str) -> str | int | None:
        """Count the operation; what goes wrong with it."""
        if self.off:
            raise PowerCut
        self.ops += 1
        self.log.append(what)
        fault = self.fault
        if fault is None or not (self.ops == fault.at or (fault.sticky and self.ops > fault.at)):
            return None
        if fault.kind == "cut":
            self.off = True
        if fault.kind == "dying":
            self._settle()
            self.dying = True
            self.fault = None
            return None
        return fault.kind

    def _plain(self, what: str) -> None:
        """An operation that is done or not done."""
        fault = self._step(what)
        if fault == "cut":
            raise PowerCut
        if fault is not None:
            number = fault if isinstance(fault, int) else errno.EIO
            raise OSError(number, os.strerror(number))

    # --- the seam ------------------------------------------------------------------------------------------------

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        self._plain(f"open {path}")
        if path not in self.names:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self._rename({path: Inode()})
        self._fds += 1
        self.opened[self._fds] = self.names[path]
        return self._fds

    def close(self, fd: int) -> None:
        self.opened.pop(fd, None)
        self.locks.discard(fd)

    def size(self, fd: int) -> int:
        return len(self.opened[fd].cache)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        self._plain("pread")
        return bytes(self.opened[fd].cache[offset : offset + size])

    def pwrite(self, fd: int, piece: bytes, offset: int) -> int:
        fault = self._step(f"pwrite {len(piece)}")
        growth = offset + len(piece) - len(self.opened[fd].cache)
        if fault is None and self.space is not None and growth > 0 and self._used() + growth > self.space:
            fault = errno.ENOSPC
        if fault is None:
            self.opened[fd].write(piece, offset)
            return len(piece)
        written = self.rng.randrange(-(-len(piece) // SECTOR)) * SECTOR
        if written:
            self.opened[fd].write(piece[:written], offset)
        if fault == "cut":
            raise PowerCut
        if fault == "short":
            return written
        assert isinstance(fault, int)
        raise OSError(fault, os.strerror(fault))

    def fdatasync(self, fd: int) -> None:
        fault = self._step("fdatasync")
        inode = self.opened[fd]
        if self.dying and fault is None:
            if not inode.needs_metadata:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return
        if fault is None:
            inode.sync()
            return
        if fault == "cut":
            inode.keep(_some(inode.dirty, self.rng))
            raise PowerCut
        inode.fail_sync(self.rng)
        number = fault if isinstance(fault, int) else errno.EIO
        raise OSError(number, os.strerror(number))

    def fsync(self, fd: int) -> None:
        self.fdatasync(fd)

    def forget(self, fd: int) -> None:
        pass

    def listdir(self, directory: str) -> list[str]:
        return [name.rpartition("/")[2] for name in self.names if name.rpartition("/")[0] == directory]

    def mkdir(self, directory: str) -> None:
        pass

    def rename(self, old: str, new: str) -> None:
        self._plain(f"rename {new}")
        self._rename({old: None, new: self.names[old]})

    def unlink(self, path: str) -> None:
        self._plain(f"unlink {path}")
        self._rename({path: None})

    def make_folder(self, path: str) -> None:
        """A folder whose name may be lost, unlike the one the journal is given."""
        self._plain(f"mkdir {path}")
        if path in self.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self.folders.add(path)
        self._rename({path: Inode()})

    def fsync_dir(self, directory: str) -> None:
        self._plain("fsync_dir")
        if self.dying:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        kept: list[dict[str, Inode | None]] = []
        names: set[str] = (
            set()
        )  # of the changes that are synced: an earlier one of the same name goes with them
        for change in reversed(self.changes):
            if any(name.rpartition("/")[0] == directory for name in change) or names & change.keys():
                names |= change.keys()
                kept.append(change)
        for change in reversed(kept):
            _change(self.disk_names, change)
        self.changes = [change for change in self.changes if not any(change is other for other in kept)]

    def lock(self, path: str, *, wait_s: float) -> int:
        if self.locks:
            raise BlockingIOError(errno.EAGAIN, "locked")
        fd = self.open(path, write=True, create=True)
        self.locks.add(fd)
        return fd

    def is_locked(self, path: str) -> bool:
        return bool(self.locks)

    def _used(self) -> int:
        return sum(len(inode.cache) for inode in self.names.values())

    def _rename(self, change: dict[str, Inode | None]) -> None:
        _change(self.names, change)
        self.changes.append(change)


def _change(names: dict[str, Inode], change: dict[str, Inode | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _some(sectors: set[int], rng: random.Random) -> set[int]:
    """All, none, or any subset, often enough each."""
    share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    return {sector for sector in sorted(sectors) if rng.random() < share}
