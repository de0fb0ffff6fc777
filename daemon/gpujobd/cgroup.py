"""All processes of one worker, held together so that they can be killed together and counted to zero.

    Group            the worker's own cgroup v2, where the daemon may make one: cgroup.kill reaches everything,
                     a daemonised grandchild and a frozen process too (0.6 ms, measured)
    Family           where it may not: what descends from the worker or was orphaned by it. The daemon is the
                     subreaper, so an orphan becomes its child and is found there.

Rule 1: a process that left session, group and parent is found all the same; killpg alone does not find it.
Rule 2: a pid is signalled only together with its start time: the number alone may be somebody else's by now.
Rule 3: everything here blocks and is called in threads.

Source: kernel cgroup-v2.rst, "cgroup.kill", "Delegation Containment"; prctl(2), PR_SET_CHILD_SUBREAPER.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import psutil

PREFIX: Final = "gpujobd-worker"
DAEMON_SUBGROUP: Final = "daemon"
"""The daemon's own group; it moves there, or DelegateSubgroup= of the unit says so. The groups of workers are made
beside it: a group that holds processes itself may not hand controllers down ("no internal processes"), and without the
memory controller an OOM kill has no witness."""

MARK: Final = "GPUJOBD_WORKER"  # in the environment of every worker, and so of what it starts
PR_SET_CHILD_SUBREAPER: Final = 36

_serials = itertools.count(1)
_families: dict[int, str] = {}  # pid -> mark of every worker that has no cgroup and is not buried yet


class Kin(Protocol):
    """What a worker's processes are asked and told, however they are held together."""

    mark: str

    def add(self, pid: int) -> None: ...
    def kill(self) -> None: ...
    def pids(self) -> list[int]: ...
    def out_of_memory(self) -> bool: ...
    def bury(self) -> None: ...


def new_mark() -> str:
    return f"{os.getpid()}-{next(_serials)}"


# --- cgroup v2 ----------------------------------------------------------------------------------------------------


def delegated() -> Path | None:
    """The cgroup v2 folder in which groups for workers may be made; None: there is none.

    A folder counts when systemd says it was delegated, when it is the root that this process sees (a container, a
    namespace of its own), or when it was given to this ordinary user. Root could write anywhere: that is no leave.
    """
    if (own := _own_folder()) is None:
        return None
    base = own.parent if own.name == DAEMON_SUBGROUP else own
    if not (_is_root(base) or _marked_delegated(base) or os.geteuid() != 0):
        return None
    return base if _usable(base) else None


def _own_folder() -> Path | None:
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    own = re.search(r"^0::(/.*)$", groups, re.MULTILINE)
    for fields in (mount.split(" ") for mount in mounts):
        if own and fields[fields.index("-") + 1] == "cgroup2":
            inside = os.path.relpath(own[1], fields[3])
            return None if inside.startswith("..") else Path(fields[4], inside)
    return None


def _is_root(folder: Path) -> bool:
    """A group has cgroup.events, unless it is the root of the hierarchy; a namespace's root is a mount point."""
    return not (folder / "cgroup.events").exists() or folder.is_mount()


def _marked_delegated(folder: Path) -> bool:
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _usable(base: Path) -> bool:
    """Try: make a group, see that it can be killed and entered, remove it."""
    probe = base / f"{PREFIX}-probe-{new_mark()}"
    try:
        probe.mkdir()
    except OSError:
        return False
    try:
        return (probe / "cgroup.kill").exists() and os.access(base / "cgroup.procs", os.W_OK)
    finally:
        probe.rmdir()


def step_aside(base: Path) -> None:
    """Leave `base` to the groups of workers, where it is ours alone: marked so by systemd, or our namespace's root."""
    if _own_folder() == base and _procs(base) == [os.getpid()]:
        (base / DAEMON_SUBGROUP).mkdir(exist_ok=True)
        _write(base / DAEMON_SUBGROUP / "cgroup.procs", str(os.getpid()))


def sweep(base: Path) -> None:
    """Kill what workers of dead daemons left behind, and give the memory controller to the new ones."""
    for left in base.glob(f"{PREFIX}-*"):
        daemon = left.name.removeprefix(f"{PREFIX}-").split("-")[0]
        if daemon.isdigit() and not psutil.pid_exists(int(daemon)):
            with contextlib.suppress(OSError):  # what is not gone at once is the next daemon's to sweep
                _write(left / "cgroup.kill", "1")
            _remove(left)
    with contextlib.suppress(OSError):
        _write(base / "cgroup.subtree_control", "+memory")


class Group:
    """One worker's cgroup."""

    def __init__(self, base: Path, mark: str) -> None:
        self.mark = mark
        self._folder = base / f"{PREFIX}-{mark}"
        self._folder.mkdir()

    def add(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            _write(self._folder / "cgroup.procs", str(pid))

    def kill(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody removed it: it was empty
            _write(self._folder / "cgroup.kill", "1")

    def pids(self) -> list[int]:
        """Live processes of the group and of groups inside it; zombies do not count."""
        try:
            if "populated 1" not in (self._folder / "cgroup.events").read_text():
                return []
        except FileNotFoundError:
            return []
        return [pid for folder in {self._folder, *self._folder.glob("**/")} for pid in _procs(folder)]

    def out_of_memory(self) -> bool:
        with contextlib.suppress(OSError):
            events = (self._folder / "memory.events").read_text()
            return bool(re.search(r"^oom_kill [1-9]", events, re.MULTILINE))
        return False

    def bury(self) -> None:
        _remove(self._folder)


def _procs(folder: Path) -> list[int]:
    with contextlib.suppress(OSError):  # removed under our eyes: it was empty
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    return []


def _remove(folder: Path) -> None:
    """Remove a group and those inside it; one that still holds a process stays, for the next daemon's sweep."""
    for inner in sorted((p for p in folder.glob("**/") if p != folder), reverse=True):
        with contextlib.suppress(OSError):
            inner.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write(path: Path, text: str) -> None:
    # One write(2), no creation: cgroup files take a command a write.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


# --- without cgroups ------------------------------------------------------------------------------------------------


def become_subreaper() -> None:
    """Orphans among our descendants become our children from now on, instead of init's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Family:
    """One worker, what descends from it, and what it orphaned."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._worker = 0
        self._orphans: set[int] = set()  # seen before: a zombie shows no environment any more
        self._oom_kills = _oom_kills()

    def add(self, pid: int) -> None:
        self._worker = pid
        _families[pid] = self.mark

    def kill(self) -> None:
        for member in self._members():
            with contextlib.suppress(
                psutil.Error
            ):  # gone, or another user's by now: then it is reported as left
                member.send_signal(signal.SIGKILL)  # psutil compares the start time first

    def pids(self) -> list[int]:
        return [member.pid for member in self._members()]

    def out_of_memory(self) -> bool:
        """Whether the kernel killed anything for memory since the worker began: all that can be known here."""
        return _oom_kills() > self._oom_kills

    def bury(self) -> None:
        _families.pop(self._worker, None)

    def _members(self) -> list[psutil.Process]:
        """Live members, found anew; dead orphans are reaped on the way."""
        me = psutil.Process()
        children = _children_by_parent(me.pid)
        found: dict[int, psutil.Process] = {}
        waiting = [child for child in children.get(me.pid, []) if self._is_ours(child)]
        while waiting:
            process = waiting.pop()
            found[process.pid] = process
            waiting += [child for child in children.get(process.pid, []) if child.pid not in found]
        living = [process for process in found.values() if _lives(process)]
        self._orphans &= {process.pid for process in living}  # the number of a reaped one is free for others
        return living

    def _is_ours(self, child: psutil.Process) -> bool:
        """Whether a child of the daemon is this worker or an orphan of it.

        An orphan bears the worker's mark or sits in its session. One that shed both is put down to this worker if
        there is no other, and if it has at least left the daemon's own session.
        """
        if child.pid in _families:
            return child.pid == self._worker
        if child.pid not in self._orphans and self._is_orphan(child):
            self._orphans.add(child.pid)
        return child.pid in self._orphans

    def _is_orphan(self, child: psutil.Process) -> bool:
        mark = ""
        with contextlib.suppress(psutil.Error, OSError):
            mark = child.environ().get(MARK, "")
        try:
            session = os.getsid(child.pid)
        except ProcessLookupError:
            return False
        if mark or session in _families:
            return mark == self.mark or session == self._worker
        return len(_families) == 1 and session != os.getsid(0)


def _children_by_parent(root: int) -> dict[int, list[psutil.Process]]:
    """Our descendants by parent; one look at the process table."""
    children: dict[int, list[psutil.Process]] = {}
    for process in _descendants(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            children.setdefault(process.ppid(), []).append(process)
    return children


def _descendants(root: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from psutil.Process(root).children(recursive=True)


def _lives(process: psutil.Process) -> bool:
    """A zombie is dead; one that was orphaned to us is reaped, or it would stay for as long as the daemon runs."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
    except psutil.Error:
        return False
    if process.pid not in _families:
        with contextlib.suppress(ChildProcessError):  # it is the child of another process of the tree
            os.waitpid(process.pid, os.WNOHANG)
    return False


def _oom_kills() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0
