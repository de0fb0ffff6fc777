"""What becomes of the jobs when records of the journal are given up: told before, and written into the copy.

fsck.py knows records as bytes. Here they are events: the copy that it makes gets a snapshot of the state that the kept
records add up to (core/mend.py), at its very end. A start loads that and replays nothing, so no record in the copy has
to make sense without those that are lost; they stay for `jobctl events`, and for the inputs that ride in them.

Rule 1: the same walk tells what would be lost and makes the copy: nobody agrees to one thing and gets another.
Rule 2: older snapshots are not in the copy: from them, replay would run into the holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from gpujobd import fsck, recovery, snapfile
from gpujobd.core import snapshot
from gpujobd.core.events import decode
from gpujobd.core.mend import Mender
from gpujobd.core.model import FINAL, State
from gpujobd.disk import Disk
from gpujobd.recovery import JournalError

Ranges = Sequence[tuple[int, int]]


@dataclasses.dataclass
class Loss:
    """What giving up these records costs. Printed, it is what a person has to agree to."""

    ranges: Ranges
    unknown: dict[int, int]  # job whose submission is lost -> later records of it, dropped
    perhaps: range  # the same, if these ids were ever given
    notes: dict[int, list[str]]
    jobs: int  # that are known
    open_jobs: int

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for first, last in self.ranges:
            yield f"given up: {recovery.lost_text(first, last)}"
        for job_id, dropped in sorted(self.unknown.items()):
            also = f", and {dropped} later records of it are dropped" if dropped else ""
            yield (
                f"job {job_id}: LOST: its submission is not known any more{also}; "
                f"the next start deletes spool/jobs/{job_id}: copy it away first"
            )
        if self.perhaps:
            first, last = self.perhaps[0], self.perhaps[-1]
            which = f"job {first}" if first == last else f"jobs {first} to {last}"
            yield f"{which}: LOST, if ever given: a lost record may be its submission, and no other names it"
        for job_id, notes in sorted(self.notes.items()):
            for note in notes:
                yield f"job {job_id}: {note}"
        yield f"kept: {self.jobs} jobs, {self.open_jobs} of them not final"


def loss(directory: Path | str, ranges: Ranges, disk: Disk | None = None) -> Loss:
    """Read only.

    Raises:
        JournalError: a record that is kept cannot be read as an event.
        OSError: as fsck.report.
    """
    scan = fsck.Scan(disk or Disk(), str(directory))
    return _mended(scan, ranges)[1]


def repair(
    directory: Path | str, ranges: Ranges, target: Path | str, disk: Disk | None = None
) -> tuple[fsck.Copied, Loss]:
    """A copy in which a daemon starts. Raises: as loss and fsck.accept_loss."""
    disk, target = disk or Disk(), str(target)
    state, lost = _mended(
        fsck.Scan(disk, str(directory)), ranges
    )  # first: what cannot be mended is not copied
    first, *also = ranges
    copied = fsck.accept_loss(directory, *first, target, disk, also=also)
    state.seq = copied.last_seq
    for name in [name for name in disk.listdir(target) if recovery.SNAPSHOT_NAME.fullmatch(name)]:
        disk.unlink(f"{target}/{name}")
    if state.seq:
        _write(disk, target, fsck.Scan(disk, target).store, state)
    return copied, lost


def _write(disk: Disk, target: str, store: bytes, state: State) -> None:
    path = f"{target}/{recovery.snapshot_name(state.seq)}"
    snapfile.write(disk, f"{path}.tmp", store, state.seq, snapshot.chunks(state))
    disk.rename(f"{path}.tmp", path)
    disk.fsync_dir(target)


def _mended(scan: fsck.Scan, ranges: Ranges) -> tuple[State, Loss]:
    try:
        state = snapshot.load(scan.snapshots.newest) if scan.snapshots.valid else State()
        known = state.seq
        mender, last = Mender(state), max([known, scan.next_seq - 1, *(b for _, b in ranges)])
        seqs: set[int] = set()
        for seq, record in _kept(scan, ranges):
            seqs.add(seq)
            if seq > known:
                mender.take(seq, decode(record))
    except (msgspec.MsgspecError, ValueError, snapshot.SnapshotError) as error:
        raise JournalError(f"{scan.directory}: what is kept cannot be understood: {error}") from None
    mender.finish(last, seqs.__contains__)
    return state, Loss(
        ranges=[(a, b) for a, b in ranges if b >= a],
        unknown=mender.unknown,
        perhaps=mender.perhaps,
        notes=mender.notes,
        jobs=len(state.jobs),
        open_jobs=sum(job.state not in FINAL for job in state.jobs.values()),
    )


def _kept(scan: fsck.Scan, ranges: Ranges) -> Iterable[tuple[int, bytes]]:
    for frame in scan.frames:
        for seq, record in enumerate(scan.records_of(frame), frame.header.first_seq):
            if not any(first <= seq <= last for first, last in ranges):
                yield seq, record
