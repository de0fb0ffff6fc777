"""One lease in the supervisor's hands, and the files of its job that the daemon itself looks at.

    <job>/lock      held by the worker (flock, exclusive) while its output files are open
    <job>/suspects  64 bytes: "<QQQQQ" = attempt, current first, current last, previous first, previous last; 0, 0: none

Rule 1: a grant ends once: whoever says the last word on it sets `over`, and nothing is reported after that.
Rule 2: what a worker left in a file is no better than what it says: other attempts and impossible lines are dropped.
Rule 3: module functions block and are called in threads.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

import msgspec
import trio

from gpujobd import worker_messages as messages
from gpujobd.config import Handler
from gpujobd.core.leases import canary_line
from gpujobd.core.model import Job, Lease, Span
from gpujobd.job_log import JobLog
from gpujobd.spool import folder_at, open_plain

SUSPECTS: Final = struct.Struct("<QQQQQ")
NO_LOCK: Final = frozenset({errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR})
"""There is no file, or what bears its name is none, and nobody holds a lock on it."""
NONE: Final = Span(0, 0)  # keeps the place of the call in hand, so that the one before it is not taken for it


class Grant:
    """What became of one lease since it was first seen."""

    def __init__(self, lease: Lease, job: Job, now: float) -> None:
        self.device = lease.device
        self.handler = lease.handler
        self.attempt = lease.attempt
        self.job = copy.copy(job)
        self.checkpoint = job.checkpoint  # the latest that was reported
        self.since = now
        self.folder: Path | None = None  # set once the job's files are there and nobody holds them
        self.log: JobLog | None = None
        self.log_opened = trio.Event()  # or there will be none
        self.canary = (
            canary_line(job) if lease.canary else 0
        )  # line to recompute first; 0: none, or it passed
        self.load_s = 0.0  # loading that this lease waited for, until it was reported
        self.sent = False
        self.yield_asked = False
        self.over = False

    @property
    def key(self) -> tuple[int, int]:
        return self.job.job_id, self.attempt

    def used_ns(self) -> int:
        return max(0, round((trio.current_time() - self.since) * 1e9))

    def end(self) -> None:
        """Nothing is reported on this lease from here on, and its log gets no more."""
        self.over = True
        if self.log:
            self.log.close()

    def message(self, handler: Handler, *, gives_way: bool = False) -> messages.Lease:
        assert self.folder is not None
        job = self.job
        defaults = {name: p.default for name, p in handler.job_params.items() if p.default is not None}
        return messages.Lease(
            job=job.job_id,
            attempt=self.attempt,
            dir=str(self.folder),
            items=job.items,
            batch_max=handler.batch_max,
            job_params=defaults | job.params,
            failures_max=job.failures_max,
            checkpoint=msgspec.structs.asdict(job.checkpoint),
            suspects=job.suspects,
            # Those that wait for the canary as well: a worker whose canary fails never gets to them.
            condemned=tuple(sorted({*job.condemned, *(job.canary_due if self.canary else ())})),
            canary=self.canary,
            gives_way=gives_way,
        )


def lock_is_free(folder: Path) -> bool:
    """Whether no process has the job's output files open. Asked only while no worker is meant to have."""
    try:
        with folder_at(folder) as job:
            fd = os.open("lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=job)
    except OSError as error:
        return (
            error.errno in NO_LOCK
        )  # else nothing is known: a descriptor too many, a disk that does not answer
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        # By hand: a copy of the descriptor in a child that is just being forked would hold it on.
        fcntl.flock(fd, fcntl.LOCK_UN)
        return True
    finally:
        os.close(fd)


def read_suspects(folder: Path, attempt: int, items: int) -> tuple[Span, ...]:
    """The call that was in hand, lines 0 to 0 if there was none, then the one before it."""
    try:
        with folder_at(folder) as job:
            fd = open_plain("suspects", job)
    except OSError:
        return ()
    try:
        page = os.read(fd, SUSPECTS.size)
    except OSError:
        return ()
    finally:
        os.close(fd)
    if len(page) != SUSPECTS.size:
        return ()
    written_by, *lines = SUSPECTS.unpack(page)
    current, previous = (
        span if 1 <= span.first <= span.last <= items else NONE
        for span in (Span(*lines[:2]), Span(*lines[2:]))
    )
    if written_by != attempt or current is previous is NONE:
        return ()
    return (current,) if previous is NONE else (current, previous)
