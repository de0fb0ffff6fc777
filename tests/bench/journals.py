"""A journal as a busy host leaves it after kill -9, made through the real Journal, with snapshots where the daemon's
own policy would have put them: the last one as old as it may be.

    one job, 20 events:  Reserved, Submitted, Leased, 16 x Checkpointed, Completed

Events go 64 to a frame, as group commit does when clients are many.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from gpujobd.config import Limits
from gpujobd.core import events, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.model import S_NS, Checkpoint, Priority, State, Timings
from gpujobd.janitor import SNAPSHOT_BYTES, SNAPSHOT_EVENTS
from gpujobd.journal import Journal

TENANTS = 20
REPORTS = 17  # the last one is Completed
ITEMS = 100 * REPORTS
LINE_BYTES = 120
RESULT_BYTES = 300
UID = 1000
FRAME_EVENTS = 64
STEP_NS = S_NS // 20  # between two events: the journal covers the last hours
HANDLER = "nothing"


def of_a_busy_host(folder: Path, count: int) -> str:
    """Fill `folder` with `count` events; what was made, in words."""
    folder.mkdir(parents=True)
    journal = Journal(folder)
    assert not list(journal.open().records), "the journal is not new"
    state, gathered, snapshot_seq = State(), [], 0
    for seq, event in enumerate(_history(count), 1):
        apply(state, event, seq)
        gathered.append(events.encode(event))
        if len(gathered) == FRAME_EVENTS or seq == count:
            journal.append(gathered)
            gathered = []
            # The daemon was killed just before the last one would have been written.
            if count - seq > SNAPSHOT_EVENTS // 2 and _snapshot_is_due(journal, seq, snapshot_seq):
                journal.write_snapshot(seq, snapshot.chunks(state))
                journal.drop_segments(seq, Limits().events_bytes_max)
                snapshot_seq = seq
    journal.close()
    size = sum(file.stat().st_size for file in folder.glob("seg-*"))
    return f"{len(state.jobs):,} jobs, {size / 1e6:.0f} MB, {count - snapshot_seq:,} events after the last snapshot"


def _snapshot_is_due(journal: Journal, seq: int, snapshot_seq: int) -> bool:
    """As the daemon's janitor has it."""
    return seq - snapshot_seq >= SNAPSHOT_EVENTS or journal.bytes_since(snapshot_seq) >= SNAPSHOT_BYTES


def _history(count: int) -> Iterator[events.AnyEvent]:
    """`count` events, the last one now."""
    clock = itertools.count(time.time_ns() - count * STEP_NS, STEP_NS)
    yield from itertools.islice(_endless(clock), count)


def _endless(clock: Iterator[int]) -> Iterator[events.AnyEvent]:
    yield events.DaemonStarted(at_ns=next(clock), boot_id=uuid.uuid4().hex, version="0.1.0")
    yield events.DevicesFound(at_ns=next(clock), devices=("cpu",))
    for job_id in itertools.count(1):
        yield from _life(job_id, f"tenant{job_id % TENANTS}", clock)


def _life(job_id: int, tenant: str, clock: Iterator[int]) -> Iterator[events.AnyEvent]:
    submit_id, size = uuid.uuid4().hex, ITEMS * LINE_BYTES
    yield events.Reserved(
        at_ns=next(clock),
        reservation_id=job_id,
        owner=UID,
        tenant=tenant,
        items=ITEMS,
        input_bytes=size,
        submit_id=submit_id,
    )
    yield events.Submitted(
        at_ns=next(clock),
        job_id=job_id,
        submit_id=submit_id,
        owner=UID,
        tenant=tenant,
        handler=HANDLER,
        items=ITEMS,
        input_bytes=size,
        input_sha256=hashlib.sha256(submit_id.encode()).digest(),
        name=f"night {job_id}",
        reservation_id=job_id,
    )
    yield events.Leased(
        at_ns=next(clock), device="cpu", job_id=job_id, attempt=1, level=Priority.NORMAL, turn_ns=30 * S_NS
    )
    if job_id == 1:
        yield events.HandlerLoaded(at_ns=next(clock), device="cpu", handler=HANDLER, load_ns=2 * S_NS)
    for number in range(1, REPORTS + 1):
        kind = events.Checkpointed if number < REPORTS else events.Completed
        yield kind(
            at_ns=next(clock),
            job_id=job_id,
            attempt=1,
            checkpoint=_checkpoint(number * ITEMS // REPORTS),
            used_ns=S_NS,
            vtime_ns=S_NS,
            timings=Timings(read_s=0.01, compute_s=0.97, write_s=0.01, sync_s=0.002),
        )


def _checkpoint(items: int) -> Checkpoint:
    return Checkpoint(
        upto=items, results_bytes=items * RESULT_BYTES, results_crc=zlib.crc32(b"%d" % items), done=items
    )
