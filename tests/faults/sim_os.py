"""The simulated disk as the spool and the worker see it: through `os`, `fcntl`, `mmap`, `shutil` and a path.

    with on_sim_disk(disk):      # from here on both packages' files are in `disk`
        Spool(sim_path(disk, "/s/spool"))

Rule 1: every call that reaches a disk is one operation of SimDisk: it can fail, and the power can go in it.
Rule 2: a call that is not modelled raises; it never reaches the real disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
import types
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any
from unittest import mock

from gpujobd import spool
from gpujobd_worker import files, writer
from sim_disk import Inode, SimDisk

FREE = types.SimpleNamespace(f_bavail=1 << 30, f_frsize=4096)


@dataclasses.dataclass
class Opened:
    path: str
    flags: int
    at: int = 0


class SimOs:
    """What of the module `os` these two packages use."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self._opened: dict[int, Opened] = {}
        self.path, self.strerror = os.path, os.strerror

    def __getattr__(self, name: str) -> Any:
        if name.isupper():
            return getattr(os, name)
        raise NotImplementedError(f"the simulated disk has no os.{name}")

    # --- descriptors ----------------------------------------------------------------------------------------------

    def open(self, name: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        disk, path = self._disk, self._path(name, dir_fd)
        folder = path.rpartition("/")[0]
        if folder in disk.folders and folder not in disk.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        fd = disk.open(path, create=bool(flags & os.O_CREAT))
        if flags & os.O_TRUNC:
            disk.opened[fd].truncate(0)
        self._opened[fd] = Opened(path, flags)
        return fd

    def close(self, fd: int) -> None:
        self._disk.close(fd)
        del self._opened[fd]

    def write(self, fd: int, data: bytes | memoryview) -> int:
        opened, inode = self._opened[fd], self._inode(fd)
        at = len(inode.cache) if opened.flags & os.O_APPEND else opened.at
        written = self._disk.pwrite(fd, bytes(data), at)
        if not written:  # what the kernel says where not even one page found its place
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        opened.at = at + written
        return written

    def pread(self, fd: int, size: int, at: int) -> bytes:
        return self._disk.pread(fd, size, at)

    def pwrite(self, fd: int, data: bytes, at: int) -> int:
        return self._disk.pwrite(fd, data, at)

    def ftruncate(self, fd: int, size: int) -> None:
        self._disk._plain("ftruncate")
        self._inode(fd).truncate(size)

    def fstat(self, fd: int) -> os.stat_result:
        return self._stat(self._opened[fd].path, self._inode(fd))

    def set_blocking(self, fd: int, blocking: bool) -> None:
        pass

    def geteuid(self) -> int:
        return 0  # whom _stat says that everything belongs to

    def fdatasync(self, fd: int) -> None:
        self._disk.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        if self._opened[fd].flags & os.O_DIRECTORY:
            self._disk.fsync_dir(self._opened[fd].path)
        else:
            self._disk.fsync(fd)

    def _inode(self, fd: int) -> Inode:
        return self._disk.opened[fd]

    # --- names ----------------------------------------------------------------------------------------------------

    def stat(
        self, name: object, *, dir_fd: int | None = None, follow_symlinks: bool = True
    ) -> os.stat_result:
        path = self._there(name, dir_fd)
        return self._stat(path, self._disk.names[path])

    def listdir(self, folder: int) -> list[str]:
        return self._disk.listdir(self._opened[folder].path)

    def mkdir(self, name: object, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._disk.make_folder(self._path(name, dir_fd))

    def rename(
        self, old: str, new: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        self._disk.rename(self._there(old, src_dir_fd), self._path(new, dst_dir_fd))

    def unlink(self, name: str, *, dir_fd: int | None = None) -> None:
        self._disk.unlink(self._there(name, dir_fd))

    def rmtree(self, name: str, *, dir_fd: int) -> None:
        """shutil's, one name at a time as there."""
        top = self._there(name, dir_fd)
        for path in [path for path in self._disk.names if path.startswith(f"{top}/")]:
            self._disk.unlink(path)
        self._disk.unlink(top)

    def fstatvfs(self, fd: int) -> Any:
        return FREE

    def _path(self, name: object, dir_fd: int | None) -> str:
        return str(name) if dir_fd is None else os.path.normpath(f"{self._opened[dir_fd].path}/{name}")

    def _there(self, name: object, dir_fd: int | None) -> str:
        path = self._path(name, dir_fd)
        if path not in self._disk.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return path

    def _stat(self, path: str, inode: Inode) -> os.stat_result:
        mode = stat.S_IFDIR | 0o700 if path in self._disk.folders else stat.S_IFREG | 0o600
        return os.stat_result((mode, 0, 0, 1, 0, 0, len(inode.cache), 0, 0, 0))


class Mapped(bytearray):
    """The suspects page: nobody relies on it after a power cut."""

    def close(self) -> None:
        pass


class Joined:
    """A thread that runs when it is waited for, so that a day follows from its seed, and a power cut reaches its test."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.join = run


def sim_path(disk: SimDisk, path: str) -> Any:
    """A path whose mkdir makes folders in `disk`; the first of them has stood for ever."""

    top = str([PurePosixPath(path), *PurePosixPath(path).parents][-2])
    if top not in disk.folders:
        disk.folders.add(top)
        disk.names[top] = disk.disk_names[top] = Inode()

    def mkdir(
        self: PurePosixPath, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False
    ) -> None:
        for folder in [*reversed(self.parents[:-2]), self] if parents else [self]:
            if str(folder) not in disk.names:
                disk.make_folder(str(folder))

    return type("SimPath", (PurePosixPath,), {"mkdir": mkdir})(path)


@contextlib.contextmanager
def on_sim_disk(disk: SimDisk) -> Iterator[None]:
    """Spool and worker work in `disk`."""
    sim = SimOs(disk)
    flock = types.SimpleNamespace(
        flock=lambda fd, how: None, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB, LOCK_UN=fcntl.LOCK_UN
    )
    pages = types.SimpleNamespace(mmap=lambda fd, size: Mapped(size))
    with (
        mock.patch.object(spool, "os", sim),
        mock.patch.object(spool, "shutil", sim),
        mock.patch.object(files, "os", sim),
        mock.patch.object(files, "fcntl", flock),
        mock.patch.object(files, "mmap", pages),
        joined(),
    ):
        yield


def joined() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(writer, "start_thread", Joined)
