"""A real ext4 or xfs in an image file, whose power can be cut."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SHUTDOWN: Final = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
NO_LOG_FLUSH: Final = 2  # what is in memory is gone, as with the power


class LoopFs:
    def __init__(self, folder: Path, kind: str, size: int) -> None:
        self.image = folder / "image"
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        with self.image.open("wb") as image:
            image.truncate(size)
        subprocess.run([f"mkfs.{kind}", "-q", str(self.image)], check=True, stdout=subprocess.DEVNULL)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.mountpoint)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.mountpoint)], check=True)
        while subprocess.run(["losetup", "-j", str(self.image)], check=True, capture_output=True).stdout:
            pass  # the loop device goes a moment after the mount

    def cut(self) -> None:
        fd = os.open(self.mountpoint, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)


@contextlib.contextmanager
def loop_fs(kind: str, size: int) -> Iterator[LoopFs]:
    with tempfile.TemporaryDirectory(prefix="loop-") as name:
        disk = LoopFs(Path(name), kind, size)
        disk.mount()
        try:
            yield disk
        finally:
            if os.path.ismount(disk.mountpoint):
                disk.unmount()
