"""A Python in which gpujobd, its notifier, or a worker dies at a named place: `mortal.py PLAN -m gpujobd serve ...`.

    PLAN        a file with one JSON object, all of it optional:
    constants   {"gpujobd.janitor.LOOK_S": 0.1}     set before anything runs, so that what is rare is not
    segment_bytes   of the journal, for the same reason
    at          "gpujobd.journal.Journal.append:after"     module, attribute, before or after the call
    call        3     die at the third call
    fuse        a file: calls count while it is there, and whoever removes it dies; so one plan makes one death, and
                the test says from when on, however many processes share it
    how         "kill": this process; "power": a worker takes the daemon with it, and what was not synced is gone;
                "hang": it does not die, it stops there for ever

Rule 1: no code of the product knows of this: functions are wrapped by their names, and a name that is not there is an
error at once.
Rule 2: it dies LINGER_S after it got there, for what runs beside it may say too much meanwhile: an answer that is
given before its record is on disk is out by then, and the test that heard it finds the record missing.
Rule 3: a killed process leaves its writes in the page cache, and a daemon that forgot every sync would pass all tests.
So "power" undoes the writes to the journal, and to a worker's outputs, that no sync has followed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

LINGER_S = 0.03
HANG_S = 3600.0


def locate(place):
    """The module or class that has the function, and the function's name there. Raises: LookupError."""
    words = place.split(".")
    for cut in range(len(words) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(words[:cut]))
        except ModuleNotFoundError:
            continue
        for word in words[cut:-1]:
            owner = vars(owner).get(word)
            if owner is None:
                break
        else:
            if words[-1] in vars(owner):
                return owner, words[-1]
        break
    raise LookupError(f"there is no {place} any more: what dies there needs its new name")


def wrap(place, around):
    """Replace the function by `around(function)`, static or not."""
    owner, name = locate(place)
    found = vars(owner)[name]
    kind = type(found) if isinstance(found, staticmethod | classmethod) else None
    made = around(found.__func__ if kind else found)
    setattr(owner, name, kind(made) if kind else made)


class Death:
    """The end of this process, at one place."""

    def __init__(self, plan, memory) -> None:
        self.plan = plan
        self.memory = memory
        self.left = plan.get("call", 1)
        self.parent = os.getppid()
        self.counting = threading.Lock()

    def reached(self) -> None:
        if not os.path.exists(self.plan["fuse"]):
            return
        with self.counting:
            self.left -= 1
            if self.left:
                return
        try:
            os.unlink(self.plan["fuse"])
        except FileNotFoundError:
            return
        if self.plan.get("how") == "hang":
            time.sleep(HANG_S)
        time.sleep(LINGER_S)
        if self.plan.get("how") == "power":
            self.memory.forget()
            if not is_daemon() and os.getppid() == self.parent:  # the daemon; else it is gone already
                os.kill(self.parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function, when):
        before, after = (self.reached if when == word else _nothing for word in ("before", "after"))
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def mortal(*args, **kwargs):
                before()
                result = await function(*args, **kwargs)
                after()
                return result

        else:

            @functools.wraps(function)
            def mortal(*args, **kwargs):
                before()
                result = function(*args, **kwargs)
                after()
                return result

        return mortal


def _nothing() -> None:
    pass


class Memory:
    """What was written and not synced, with what stood there before: (descriptor of our own, offset, bytes)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.unsynced = {}
        self.sizes = {}

    def wrote(self, fd, offset, size) -> None:
        """BEFORE the write."""
        stat = os.fstat(fd)
        if stat.st_ino not in self.unsynced:
            self.unsynced[stat.st_ino] = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), []
            self.sizes[stat.st_ino] = stat.st_size
        mine, pieces = self.unsynced[stat.st_ino]
        pieces.append((offset, os.pread(mine, size, offset)))

    def synced(self, fd) -> None:
        """AFTER the sync."""
        inode = os.fstat(fd).st_ino
        if inode in self.unsynced:
            os.close(self.unsynced.pop(inode)[0])

    def forget(self) -> None:
        """For ever: nothing more is written by this process."""
        self.lock.acquire()
        for inode, (mine, pieces) in self.unsynced.items():
            for offset, before in reversed(pieces):
                os.pwrite(mine, before, offset)
            os.ftruncate(mine, min(self.sizes[inode], os.fstat(mine).st_size))

    def watch_journal(self) -> None:
        wrap("gpujobd.disk.Disk.pwrite", self._writing)
        for sync in ("fdatasync", "fsync"):
            wrap(f"gpujobd.disk.Disk.{sync}", self._syncing)

    def _writing(self, pwrite):
        def writing(disk, fd, piece, offset):
            with self.lock:
                self.wrote(fd, offset, len(piece))
                return pwrite(disk, fd, piece, offset)

        return writing

    def _syncing(self, sync):
        def syncing(disk, fd):
            sync(disk, fd)
            with self.lock:
                self.synced(fd)

        return syncing

    def watch_outputs(self) -> None:
        """Appends: what was not synced is after what was. The system call is watched, not the method around it: a
        method that forgot to make it is what this is for."""
        os.fdatasync = self._syncing_output(os.fdatasync)
        wrap("gpujobd_worker.files.Output.append", self._appending)

    def _appending(self, append):
        def appending(output, data):
            with self.lock:
                self.wrote(output._fd, output.size, 0)
                append(output, data)

        return appending

    def _syncing_output(self, fdatasync):
        def syncing(fd):
            fdatasync(fd)
            with self.lock:
                self.synced(fd)

        return syncing


def is_daemon() -> bool:
    return "gpujobd" in sys.modules


def prepare(plan) -> None:
    """Make this process mortal. Its modules are imported by now, and nothing has run."""
    for place, value in plan.get("constants", {}).items():
        if place.startswith("gpujobd_worker.") != is_daemon():
            owner, name = locate(place)
            setattr(owner, name, value)
    if "at" in plan and plan["at"].startswith("gpujobd_worker.") != is_daemon():
        memory = Memory()
        if plan.get("how") == "power":
            memory.watch_journal() if is_daemon() else memory.watch_outputs()
        death = Death(plan, memory)
        place, _, when = plan["at"].partition(":")
        wrap(place, lambda function: death.around(function, when))


def run_daemon(plan, arguments) -> None:
    from gpujobd import daemon  # noqa: F401 - so that there is something to wrap
    from gpujobd.__main__ import main

    sys.argv = ["gpujobd", *arguments]
    if size := plan.get("segment_bytes"):
        wrap("gpujobd.journal.Journal.__init__", lambda made: lambda *a: made(*a, segment_bytes=size))
    prepare(plan)
    main()


def run_notifier(plan, arguments) -> None:
    from gpujobd_notify import notifier  # noqa: F401 - so that there is something to wrap
    from gpujobd_notify.__main__ import main

    sys.argv = ["gpujobd-notify", *arguments]
    prepare(plan)
    main()


def run_worker(plan, path, arguments) -> None:
    """As `python PATH` would: see gpujobd_worker/__main__.py."""
    spec = importlib.util.spec_from_file_location("worker_main", path)
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    start.register_package()
    from gpujobd_worker.process import main

    prepare(plan)
    main(arguments)


def interpreter(plan: Path, path: Path) -> Path:
    """Write an executable that stands for a Python in a handler's file: workers under it are mortal by `plan`."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{plan}" "$@"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    sys.path[:] = sys.path[1:]  # this folder: no Python would have it there
    plan_path, *words = sys.argv[1:]
    words = [word for word in words if word not in ("-u", "-B")]
    read = json.loads(Path(plan_path).read_text())
    if words[:2] == ["-m", "gpujobd"]:
        run_daemon(read, words[2:])
    elif words[:2] == ["-m", "gpujobd_notify"]:
        run_notifier(read, words[2:])
    else:
        run_worker(read, words[0], words[1:])
