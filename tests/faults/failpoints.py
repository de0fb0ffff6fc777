"""Where a process is made to die: names in the code, and in which part of a run they are reached.

`place:when` as in mortal.py. `calls`: it dies at one of so many first calls. tests/test_failpoints.py looks every name
up in the code, and test_deaths.py fails for a place that no run gets to.
"""

from __future__ import annotations

from typing import Final, NamedTuple

START: Final = "start"  # before the daemon answers
WORK: Final = "work"  # while clients submit, read and cancel, and workers compute
STOP: Final = "stop"  # after SIGTERM


class Failpoint(NamedTuple):
    at: str
    phase: str
    calls: int


def _of(package: str, phase: str, places: dict[str, int]) -> list[Failpoint]:
    return [
        Failpoint(f"{package}.{place}:{when}", phase, calls)
        for words, calls in places.items()
        for place, _, whens in [words.partition(":")]
        for when in whens.split("/")
    ]


FAILPOINTS: Final = [
    *_of(
        "gpujobd",
        START,
        {
            "recovery.examine:after": 1,
            "recovery.repair:before/after": 1,
            "daemon.replay:after": 1,
            "spool.Spool.sweep:before/after": 1,
            "daemon._bind:after": 1,
        },
    ),
    *_of(
        "gpujobd",
        WORK,
        {
            "turns.decide:after": 50,
            "turns.Turns.turn:after": 50,
            "turns.Turns.committed:before/after": 50,
            "writer.Writer._commit:before": 50,
            "journal.Journal.append:before/after": 50,
            "journal.Journal.watermark:after": 3,
            "journal.Journal._roll:before/after": 1,
            "journal.Journal._drop_oldest:before/after": 1,
            "journal.Journal._forget_snapshots:before/after": 1,
            "disk.Disk.pwrite:before/after": 50,
            "disk.Disk.fdatasync:before/after": 50,
            "disk.Disk.fsync_dir:before/after": 3,
            "disk.Disk.rename:before/after": 3,
            "disk.Disk.unlink:before/after": 2,
            "spares.Spares._make_file:before/after": 1,
            "snapfile.write:before/after": 1,
            "spool.Incoming.write:after": 2,
            "spool.Incoming.settle:before/after": 2,
            "spool.Spool.prepare:before/after": 2,
            "spool.Spool._adopt:before/after": 1,
            "spool.Spool.place:after": 3,
            "spool.Spool.settle:after": 3,
            "spool.Spool.select:after": 1,
            "spool.Spool.remove:before/after": 1,
            "spool.Spool.discard_incoming:before": 1,
            "submissions.Submissions._finish:before": 2,
            "submissions.Submissions._accepted:before/after": 20,
            "connection.Connection.flush:before/after": 20,
            "supervisor.Supervisor._begin:after": 3,
            "worker_process.WorkerProcess.start:before/after": 1,
            "worker.Worker.take:before/after": 3,
            "worker.Worker._on_work:before/after": 5,
        },
    ),
    *_of(
        "gpujobd",
        STOP,
        {
            "daemon.Daemon._stop:before": 1,
            "daemon.Daemon._settle:before/after": 1,
            "journal.Journal.seal:before/after": 1,
        },
    ),
    *_of(
        "gpujobd_worker",
        WORK,
        {
            "files.JobFiles._open:after": 2,
            "files.Output.cut:before": 2,
            "files.Output.append:before/after": 5,
            "files.Output.sync:before/after": 5,
            "writer.Writer._sync:after": 3,
            "job.Lease._report:before/after": 3,
            "job.Lease._tell:before/after": 2,
        },
    ),
]
