"""What happens to a store, foretold: record n of a story is the same in whichever process asks.

    Story(seed)     the state after n records, and record n + 1; nothing of it is ever read from a disk
    Store(...)      journal, spool and outputs, on which a story is lived, with the daemon's own modules and in the
                    daemon's order: files, then their folders, then the record, then the answer

A process that is killed need not have said what it did: whoever looks afterwards knows what must stand in record n, in
the input of job 3 and in its outputs at checkpoint 17, byte by byte.

The oracle: every acknowledged record is there; of the rest only the frame in flight, whole or not at all; every record,
snapshot, input and output is what the story says; nothing that a fault can leave is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import threading
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from gpujobd.disk import Disk
from gpujobd.frames import BLOCK
from gpujobd.journal import Journal
from gpujobd.spool import Spool
from gpujobd_worker import files
from gpujobd_worker.failures import Failure
from gpujobd_worker.files import JobFiles, LeaseLost
from gpujobd_worker.writer import Batch, Writer

SEGMENT_BYTES = 8 * BLOCK
OPEN_JOBS = 4
HISTORY_BYTES = 3 * SEGMENT_BYTES

DISK_REFUSED = ("died", "disk_full")  # how a lease may end here: nothing is damaged, no input lost

Step = tuple[str, int, int]  # what, of which job, how much


@dataclasses.dataclass
class Told:
    """One job, as far as the records say."""

    items: int
    streamed: bool
    seq: int  # of the record that submitted it
    spooled: bool = False
    upto: int = 0


class Story:
    """The state after `seq` records."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seq = 0
        self.jobs: dict[int, Told] = {}
        self.last_job = 0

    def copy(self) -> Story:
        twin = Story(self.seed)
        twin.seq, twin.last_job = self.seq, self.last_job
        twin.jobs = {job_id: dataclasses.replace(job) for job_id, job in self.jobs.items()}
        return twin

    def advance(self, seq: int) -> list[bytes]:
        """Live up to record `seq`; those records."""
        return [self.live(self.next_step()) for _ in range(seq - self.seq)]

    def next_step(self) -> Step:
        luck = random.Random(f"{self.seed} {self.seq}")
        ready = [n for n, job in self.jobs.items() if job.upto < job.items]
        over = [n for n, job in self.jobs.items() if job.upto == job.items]
        waiting = [n for n, job in self.jobs.items() if not job.streamed and not job.spooled]
        if len(self.jobs) < 2 or (len(self.jobs) < OPEN_JOBS and luck.random() < 0.25):
            return ("submitted", self.last_job + 1, luck.randint(1, 12))
        if over and luck.random() < 0.4:
            return ("removed", luck.choice(over), 0)
        if waiting and luck.random() < 0.3:
            return ("spooled", luck.choice(waiting), 0)
        if ready:
            job_id = luck.choice(ready)
            job = self.jobs[job_id]
            return ("checkpointed", job_id, min(job.items, job.upto + luck.randint(1, 6)))
        return ("removed", over[0], 0)

    def record(self, step: Step) -> bytes:
        """What the journal gets."""
        what, job_id, amount = step
        more: Any = None
        if what == "submitted" and not streamed(self.seed, job_id):
            more = self.input(job_id, amount)
        if what == "checkpointed":
            more = self.checkpoint(job_id, amount)
        return msgspec.msgpack.encode([self.seq + 1, what, job_id, amount, more])

    def live(self, step: Step) -> bytes:
        record = self.record(step)
        self.seq += 1
        match step:
            case "submitted", job_id, items:
                self.jobs[job_id] = Told(items, streamed(self.seed, job_id), self.seq)
                self.last_job = job_id
            case "checkpointed", job_id, upto:
                self.jobs[job_id].upto = upto
            case "spooled", job_id, _:
                self.jobs[job_id].spooled = True
            case "removed", job_id, _:
                del self.jobs[job_id]
        return record

    def chunks(self) -> list[bytes]:
        """The state, as a snapshot has it."""
        jobs = [[n, *dataclasses.astuple(job)] for n, job in sorted(self.jobs.items())]
        return [
            msgspec.msgpack.encode([self.seed, self.seq, self.last_job]),
            *map(msgspec.msgpack.encode, jobs),
        ]

    # --- bytes, from a number alone --------------------------------------------------------------------------------

    def input(self, job_id: int, items: int) -> bytes:
        return b"".join(b"%s\n" % self.line(job_id, number) for number in range(1, items + 1))

    def line(self, job_id: int, number: int) -> bytes:
        return item(self.seed, job_id, number).line

    def outputs(self, job_id: int, upto: int) -> tuple[bytes, bytes, int]:
        """Both output files after `upto` items, and how many of them are done."""
        items = [item(self.seed, job_id, number) for number in range(1, upto + 1)]
        done = [one.record for one in items if isinstance(one.outcome, dict)]
        return b"".join(done), b"".join(one.record for one in items if one.record not in done), len(done)

    def checkpoint(self, job_id: int, upto: int) -> dict[str, Any]:
        results, errors, done = self.outputs(job_id, upto)
        return {
            "upto": upto,
            "deferred": [],
            "results_bytes": len(results),
            "results_crc": zlib.crc32(results),
            "errors_bytes": len(errors),
            "errors_crc": zlib.crc32(errors),
            "done": done,
            "failed": upto - done,
            "failure_codes": {"rejected": upto - done} if upto > done else {},
        }


class Item(NamedTuple):
    line: bytes  # of the input
    outcome: Any  # what the handler makes of it
    record: bytes  # what must stand in the output, newline included


@functools.lru_cache(1 << 13)
def item(seed: int, job_id: int, number: int) -> Item:
    luck = random.Random(f"{seed} {job_id} {number}")
    line = json.dumps({"text": "x" * luck.choice((0, 30, 300, 700)), "n": luck.random()})
    if luck.random() < 0.1:
        failure = Failure("rejected", f"no {luck.random()}")
        record = json.dumps({"line": number, "error": failure._asdict()})
        return Item(line.encode(), failure, f"{record}\n".encode())
    output = {"vector": [luck.random() for _ in range(luck.choice((1, 5, 50)))]}
    record = json.dumps({"line": number, "output": output})
    return Item(line.encode(), output, f"{record}\n".encode())


def streamed(seed: int, job_id: int) -> bool:
    """Whether the input comes in pieces, into the spool; otherwise it rides in the record."""
    return bool(zlib.crc32(b"%d %d" % (seed, job_id)) & 1)


class Store:
    """One process's life on the store. `lives` is the same from one process to the next: chance, not fact."""

    def __init__(self, root: Any, disk: Disk, seed: int, *, luck: random.Random, known: Story) -> None:
        """`known`: what was acknowledged. It may be behind where the last process died before it could say."""
        self.story = known
        self.luck = luck
        self.up = False  # started, and not stopped since
        self.flying = 0  # records that may be on disk and are not acknowledged
        self._root, self._disk, self._seed = root, disk, seed
        self._leases: dict[int, JobFiles] = {}

    # --- a start, and what must be there -----------------------------------------------------------------------------

    def start(self, flying_max: int = 0) -> None:
        """Recover as the daemon does, and look at everything. The story goes on where the journal ends."""
        root, self.flying = self._root, flying_max
        self.journal = Journal(f"{root}/journal", self._disk, SEGMENT_BYTES)
        recovered = self.journal.open()
        known, last = self.story.seq, self.journal.last_seq
        assert known <= last <= known + flying_max, (
            f"{known} acknowledged, {last} there, {flying_max} in flight"
        )
        self._check_records(recovered)
        self.spool = Spool(root / "spool")
        held = {n for n, job in self.story.jobs.items() if job.streamed}
        self.spool.sweep(self.story.jobs.keys(), held)
        for job_id in list(self.story.jobs):
            self._check_job(job_id)
        self.up = True

    def _check_records(self, recovered: Any) -> None:
        """Every record above the snapshot is the story's, and the snapshot is what the story was."""
        after, chunks = recovered.snapshot or (0, None)
        assert after <= self.story.seq, (after, self.story.seq)
        found = list(recovered.records)
        assert [seq for seq, _ in found] == list(range(after + 1, self.journal.last_seq + 1))
        told = Story(self._seed)
        told.advance(after)
        assert chunks is None or chunks == told.chunks(), f"snapshot {after} is another one"
        for seq, record in found:
            assert told.advance(seq) == [record], f"record {seq} is another one"
        self.story, self.flying = told, 0

    def _check_job(self, job_id: int) -> None:
        """Its input is all there, and its outputs hold what the checkpoint says: each item once."""
        job, story = self.story.jobs[job_id], self.story
        self._make_ready(job_id)
        assert self._read(job_id, files.INPUT) == story.input(job_id, job.items), f"input of job {job_id}"
        lease = self._lease(job_id)
        assert lease.results.size == story.checkpoint(job_id, job.upto)["results_bytes"]
        results, errors, _ = story.outputs(job_id, job.upto)
        assert self._read(job_id, files.RESULTS) == results, f"results of job {job_id}"
        assert self._read(job_id, files.ERRORS) == errors, f"errors of job {job_id}"

    def _make_ready(self, job_id: int) -> None:
        """As Janitor.prepare: from the journal as long as that is where the input counts."""
        job = self.story.jobs[job_id]
        if job.streamed or job.spooled:
            self.spool.prepare(job_id, job_id)
        else:
            self.spool.place(job_id, lambda: self._inline(job.seq))

    def _inline(self, seq: int) -> bytes:
        held: bytes = msgspec.msgpack.decode(self.journal.read(seq))[4]
        return held

    def _read(self, job_id: int, name: str) -> bytes:
        folder = self.spool._open_job(job_id)
        try:
            fd = files.open_to_read(name, folder)
        except LeaseLost as lost:
            raise ended(job_id, lost) from lost
        finally:
            files.os.close(folder)
        try:
            return files.os.pread(fd, 1 << 24, 0)
        finally:
            files.os.close(fd)

    # --- life ----------------------------------------------------------------------------------------------------------

    def live(self, frames: int) -> None:
        for _ in range(frames):
            self.commit(self.luck.choice((1, 1, 2, 4)))
            self.house()

    def commit(self, records: int) -> None:
        """Group commit: the files of each record first, then one frame, then the answers, then what follows."""
        plan, steps, frame = self.story.copy(), [], []
        for _ in range(records):
            step = plan.next_step()
            if any(step[1] == other[1] for other in steps):
                break  # one frame holds one fact of a job, as in the daemon, where each waits for the one before
            self._before(step)
            steps.append(step)
            frame.append(plan.live(step))
        self.flying = len(frame)
        self.begun(plan.seq)
        assert self.journal.append(frame) == plan.seq
        self.story, self.flying = plan, 0
        self.acknowledged(plan.seq)
        for step in steps:
            self._after(step)

    def begun(self, seq: int) -> None:
        """The frame up to here may be on disk from now on."""

    def acknowledged(self, seq: int) -> None:
        """Whoever waits is told."""

    def _before(self, step: Step) -> None:
        match step:
            case "submitted", job_id, items if streamed(self._seed, job_id):
                self._receive(job_id, self.story.input(job_id, items))
            case "checkpointed", job_id, upto:
                self._work(job_id, upto)
            case "spooled", job_id, _:
                self._make_ready(job_id)
                self.spool.settle(job_id)

    def _receive(self, job_id: int, held: bytes) -> None:
        incoming = self.spool.incoming(job_id)
        for at in range(0, len(held), 1000):
            incoming.write(held[at : at + 1000])
        incoming.settle()

    def _work(self, job_id: int, upto: int) -> None:
        """A worker's lease up to the next checkpoint, by the worker's own writer."""
        done = self.story.jobs[job_id].upto
        before = self.story.checkpoint(job_id, done)
        pen = Writer(
            self._lease(job_id),
            before,
            every_s=0.0,
            report=lambda checkpoint: None,
            enough=lambda failed: False,
            stop=threading.Event(),
        )
        for number in range(done + 1, upto + 1):
            outcomes = [item(self._seed, job_id, number).outcome]
            pen.put(Batch(number, [number], [None], outcomes, None, 100))
        pen.finish()
        if pen.lost is not None:
            raise ended(job_id, pen.lost)
        assert pen.checkpoint == self.story.checkpoint(job_id, upto)

    def _lease(self, job_id: int) -> JobFiles:
        """Open its files at the checkpoint, or go on with the lease that is open."""
        if job_id not in self._leases:
            self._make_ready(job_id)
            checkpoint = self.story.checkpoint(job_id, self.story.jobs[job_id].upto)
            path = str(self.spool.path(job_id))
            try:
                self._leases[job_id] = JobFiles(path, 1, checkpoint, lambda: False)
            except LeaseLost as lost:
                raise ended(job_id, lost) from lost
        return self._leases[job_id]

    def _after(self, step: Step) -> None:
        match step:
            case "submitted", job_id, _:
                self._make_ready(job_id)
            case "removed", job_id, _:
                self._end_lease(job_id)
                self.spool.remove(job_id)

    def _end_lease(self, job_id: int) -> None:
        if job_id in self._leases:
            self._leases.pop(job_id).close()

    def drop_leases(self) -> None:
        """Every worker is gone, as after a failed operation; what it had written beyond its checkpoint is in the files."""
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            with contextlib.suppress(OSError):
                lease.close()

    def house(self) -> None:
        """What is done beside the commits."""
        match self.luck.choices(
            ("", "watermark", "snapshot", "drop", "yield", "reopen"), (50, 10, 12, 12, 12, 4)
        )[0]:
            case "watermark":
                self.journal.watermark()
            case "snapshot":
                self.snapshot()
            case "drop":
                self.drop(HISTORY_BYTES)
            case "yield" if self._leases:
                self._end_lease(self.luck.choice(sorted(self._leases)))
            case "reopen":
                self.stop()
                self.start()

    def snapshot(self) -> None:
        with contextlib.suppress(OSError):  # the old ones stand
            self.journal.write_snapshot(self.story.seq, self.story.chunks())

    def drop(self, history_bytes: int) -> None:
        """Old segments, but none that an input still counts in."""
        held = [j.seq for j in self.story.jobs.values() if not j.streamed and not j.spooled]
        self.journal.drop_segments(min(held, default=1 << 62), history_bytes)

    def stop(self) -> None:
        if self.luck.random() < 0.5:
            self.journal.seal()
        self.close()

    def close(self) -> None:
        """Let go of everything, write nothing."""
        self.up = False
        for job_id in list(self._leases):
            self._end_lease(job_id)
        self.journal.close()
        for folder in (self.spool._root, self.spool._incoming, self.spool._jobs):
            files.os.close(folder)


class LeaseEnded(Exception):
    """The disk refused the outputs; the checkpoint before stands."""


def ended(job_id: int, lost: LeaseLost) -> LeaseEnded:
    """Nothing that a fault leaves may be damage: that would fail the job, or stop it until somebody comes."""
    assert lost.cause in DISK_REFUSED, f"job {job_id}: {lost.cause}: {lost}"
    return LeaseEnded(lost)


def real_root(folder: Path | str) -> Path:
    """A state directory, as the daemon makes it."""
    root = Path(folder)
    root.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)
    return root
