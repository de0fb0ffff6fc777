"""Fork a process that lives a story on the real disk, kill it, look; again and again.

    python kill_store.py time DIRECTORY SEED KILLS            SIGKILL at a random time
    python kill_store.py call DIRECTORY SEED KILLS            SIGKILL by strace at the k-th of one kind of system call
    python kill_store.py cut-ext4 DIRECTORY SEED KILLS        stopped, then its file system loses what was not committed
    python kill_store.py die-xfs DIRECTORY SEED KILLS         the file system dies under it while it works
    python kill_store.py tear-ext4 DIRECTORY SEED KILLS       stopped, then its disk keeps any sectors since the last flush
    python kill_store.py fail-btrfs DIRECTORY SEED KILLS      the disk refuses writes for a while, the next process starts on
                                                              what the page cache shows, and then the power goes

A program of its own, because a test process with threads must not fork. The child says over a pipe up to which record a
frame goes before it writes it, and that it was acknowledged after that: what was acknowledged must be there, and nothing
that was never begun.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from filesystems import FileSystem, LoseFS, losefs
from gpujobd.disk import Disk
from gpujobd.journal import JournalDead
from sim_os import joined
from story import SEGMENT_BYTES, LeaseEnded, Store, Story, real_root

LIVES = 25  # on one store
DISK_DIED = 3
SPEAKS_S = 30.0
CALLS = (
    "pwrite64",
    "write",
    "fdatasync",
    "fsync",
    "rename,renameat",
    "openat",
    "unlink,unlinkat",
    "ftruncate",
)


class Telling(Store):
    """A store that says what it does."""

    def __init__(self, folder: str, seed: int, luck: random.Random, known: Story, pipe: int) -> None:
        super().__init__(real_root(folder), Disk(), seed, luck=luck, known=known)
        self._pipe = pipe

    def begun(self, seq: int) -> None:
        os.write(self._pipe, b"begun %d\n" % seq)

    def acknowledged(self, seq: int) -> None:
        os.write(self._pipe, b"acknowledged %d\n" % seq)


class Victim:
    """One store over many processes, as its parent knows it."""

    def __init__(self, folder: str, seed: int, frames: int = 14) -> None:
        self.folder, self.seed, self.frames = folder, seed, frames
        self.known, self.begun = Story(seed), 0

    def fork(self, luck: random.Random, *, stopped: bool) -> tuple[int, int]:
        """A child that lives until it is killed, or for some frames; its pid and what it says."""
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(heard)
                if stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                store = Telling(self.folder, self.seed, luck, self.known, told)
                store.start(self.begun - self.known.seq)
                store.live(self.frames)
                store.snapshot()
                store.drop(SEGMENT_BYTES)
                status = 0
            except (OSError, JournalDead, LeaseEnded):
                status = DISK_DIED
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        os.close(told)
        return child, heard

    def look(self, heard: int) -> None:
        """What the child said, and then what stands."""
        self.hear(heard)
        self.check()

    def hear(self, heard: int) -> None:
        with os.fdopen(heard) as stream:
            said = [line.split() for line in stream.read().split("\n")[:-1]]
        for word, seq in said:
            self.begun = max(self.begun, int(seq))
            if word == "acknowledged":
                self.known.advance(int(seq))

    def check(self) -> None:
        """Start on what stands, and look at all of it."""
        null = os.open(os.devnull, os.O_WRONLY)
        store = Telling(self.folder, self.seed, random.Random(0), self.known, null)
        store.start(self.begun - self.known.seq)
        self.known, self.begun = store.story, store.story.seq
        store.close()
        os.close(null)


def kill_in_time(victim: Victim, luck: random.Random) -> bool:
    child, heard = victim.fork(luck, stopped=False)
    time.sleep(luck.uniform(0.001, luck.choice((0.03, 0.15))))  # often in recovery, often long after it
    os.kill(child, signal.SIGKILL)
    return ended(victim, child, heard)


def kill_at_call(victim: Victim, luck: random.Random) -> bool:
    """Whether there was a k-th call."""
    child, heard = victim.fork(luck, stopped=True)
    os.waitpid(child, os.WUNTRACED)
    calls, k = luck.choice(CALLS), luck.randint(1, 40)
    inject = f"inject={calls}:signal=SIGKILL:when={k}"
    command = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e", inject, "-p", str(child)]
    with subprocess.Popen(command) as strace:
        while not traced(child):
            assert strace.poll() is None, "strace could not attach"
            time.sleep(0.001)
        os.kill(child, signal.SIGCONT)
        return ended(victim, child, heard)


def traced(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        return any(line.split() != ["TracerPid:", "0"] for line in status if line.startswith("TracerPid:"))


def cut(victim: Victim, luck: random.Random, file_system: FileSystem, *, working: bool) -> bool:
    """The power goes: of the machine, if the child was stopped before; of the disk alone, if it is working."""
    child, heard = victim.fork(luck, stopped=False)
    time.sleep(luck.uniform(0.001, luck.choice((0.03, 0.15))))
    if not working:
        os.kill(child, signal.SIGSTOP)
    file_system.shut_down()
    if working:
        time.sleep(0.02)  # it meets the dead disk, and may believe it
    end(child)
    file_system.remount()
    victim.look(heard)
    return True


def tear(victim: Victim, luck: random.Random, file_system: FileSystem, disk: LoseFS) -> bool:
    """The power goes for a disk that has a cache of its own."""
    child, heard = victim.fork(luck, stopped=False)
    time.sleep(luck.uniform(0.001, 0.3))
    os.kill(child, signal.SIGSTOP)
    lose_power(file_system, disk, luck, child)
    victim.look(heard)
    return True


def fail(victim: Victim, luck: random.Random, file_system: FileSystem, disk: LoseFS) -> bool:
    """What a failed sync has left in the page cache must not be built on."""
    child, heard = victim.fork(luck, stopped=False)
    select.select([heard], [], [], SPEAKS_S)  # it has recovered and begins
    time.sleep(luck.uniform(0.05, 0.3))
    disk.control(do="fail", call="write", errno=errno.EIO, sticky=luck.random() < 0.5)
    time.sleep(0.1)
    end(child)
    disk.control(do="heal")
    victim.hear(heard)
    child, heard = victim.fork(luck, stopped=False)
    time.sleep(luck.uniform(0.05, 0.3))
    os.kill(child, signal.SIGSTOP)
    lose_power(file_system, disk, luck, child)
    victim.look(heard)
    return True


def end(child: int) -> None:
    """Kill it, unless the disk has ended it already; it must not have seen anything that is wrong."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, DISK_DIED), f"the child failed: {status}"


def lose_power(file_system: FileSystem, disk: LoseFS, luck: random.Random, child: int) -> None:
    """From now on the disk takes nothing; then it keeps of its cache what it likes."""
    disk.control(do="fail", call="write", errno=errno.EIO, sticky=True)
    end(child)
    file_system.unmount()
    disk.crash("sectors", luck.getrandbits(32))
    file_system.mount()


def ended(victim: Victim, child: int, heard: int) -> bool:
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, f"the child failed: {status}"
    victim.look(heard)
    return killed


def main() -> None:
    how, folder, seed, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.makedirs(folder)
    with joined(), contextlib.ExitStack() as stack:
        kill, frames = {"time": kill_in_time, "call": kill_at_call}.get(how), 14
        if kill is None:
            what, kind = how.split("-")
            on = Path(folder)
            if what in ("tear", "fail"):
                disk = stack.enter_context(losefs(on / "disk"))
                on = disk.root
            file_system = FileSystem(kind, on / "image", Path(folder, "mounted"))
            stack.enter_context(file_system)
            folder, frames = str(file_system.root), 200
            if what in ("tear", "fail"):
                kill = functools.partial(tear if what == "tear" else fail, file_system=file_system, disk=disk)
            else:
                kill = functools.partial(cut, file_system=file_system, working=what == "die")
        records = run(kill, folder, random.Random(seed), seed, wanted, frames)
    print(f"{wanted} kills, {records} records, seed {seed}")


def run(kill: Any, folder: str, luck: random.Random, seed: int, wanted: int, frames: int) -> int:
    """Kill as often as wanted; how many records that has cost nothing of."""
    kills = records = lives = 0
    while kills < wanted:
        assert lives < 4 * wanted + 20, f"only {kills} of {lives} children met their end"
        if lives % LIVES == 0:
            victim = Victim(f"{folder}/{lives}", seed + lives, frames)
        before = victim.known.seq
        kills += kill(victim, luck)
        lives += 1
        records += victim.known.seq - before
    assert records, "the children did not get far enough to acknowledge anything"
    return records


if __name__ == "__main__":
    main()
