"""Real file systems to hurt: ext4, xfs and btrfs on loop devices, and losefs.

Rule 1: what is mounted here is seen by this process and its children alone. A namespace that another process makes
of ours meanwhile, for a container or a service, would hold on to it: unmounted here, it would live on there.
Rule 2: when these processes are gone, however they went, so are their mounts and loop devices.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHUT_DOWN = 0x8004587D  # FS_IOC_GOINGDOWN
WITHOUT_LOG_FLUSH = 2  # what was not committed is lost, as in a power cut
SIZES_MIB = {"ext4": 64, "xfs": 320, "btrfs": 160}  # nearly the smallest that mkfs makes
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS; os.unshare is there from Python 3.12 on
WAIT_S = 30.0


def tool(*words: object) -> str:
    """Run one of the system's tools; what it says."""
    env = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, f"{' '.join(map(str, words))}: {run.stderr or run.stdout}"
    return run.stdout.strip()


@functools.cache
def keep_mounts_to_ourselves() -> None:
    """From now on; it is this thread that moves, with all that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    tool("mount", "--make-rprivate", "/")


class FileSystem:
    """One kernel file system in a file."""

    def __init__(self, kind: str, image: Path, mount_point: Path, size_mib: int = 0) -> None:
        self.kind, self.image, self.root = kind, image, mount_point
        self.mounted = False
        if not image.exists():
            with image.open("wb") as file:
                file.truncate((size_mib or SIZES_MIB[kind]) << 20)
            tool(*MAKE[kind], image)
            for path in (image, image.parent):  # it may lie on losefs, where not even its name is safe
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
        mount_point.mkdir(exist_ok=True)

    def __enter__(self) -> FileSystem:
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()

    def mount(self) -> None:
        keep_mounts_to_ourselves()
        tool("mount", "-t", self.kind, "-o", "loop", self.image, self.root)  # the device goes with the mount
        self.mounted = True

    def unmount(self) -> None:
        """Also where it is dead, and again where it is done."""
        if self.mounted:
            unmount(self.root)
            self.mounted = False
            wait_until(lambda: not tool("losetup", "--associated", self.image), f"{self.image} to be let go")

    def remount(self) -> None:
        self.unmount()
        self.mount()

    def shut_down(self) -> None:
        """From now on nothing reaches the device."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUT_DOWN, array.array("I", [WITHOUT_LOG_FLUSH]))
        finally:
            os.close(fd)


def unmount(root: Path) -> None:
    """Somebody who was killed may still be letting go."""
    give_up_at = time.monotonic() + WAIT_S
    while True:
        try:
            tool("umount", root)
        except AssertionError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.02)
        else:
            return


def wait_until(true: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.01)


class LoseFS:
    """losefs, mounted."""

    def __init__(self, mount_point: Path) -> None:
        self.root = mount_point

    def control(self, **what: object) -> None:
        os.setxattr(self.root, "user.losefs", json.dumps(what).encode())

    def crash(self, keep: str, seed: int) -> None:
        self.control(do="crash", keep=keep, seed=seed)


@contextlib.contextmanager
def losefs(mount_point: Path) -> Iterator[LoseFS]:
    keep_mounts_to_ourselves()
    mount_point.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, HERE / "losefs.py", mount_point]) as server:
        wait_until(lambda: server.poll() is not None or os.path.ismount(mount_point), "losefs to come up")
        assert server.poll() is None, "losefs did not come up"
        try:
            yield LoseFS(mount_point)
        finally:
            try:
                unmount(mount_point)
                server.wait(WAIT_S)
            finally:
                server.kill()
