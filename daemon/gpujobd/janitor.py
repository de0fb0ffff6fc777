"""What is done beside the turns: snapshots, old inputs out of the journal, retention, files nobody owns, the disk.

Rule 1: all of it may be late, none of it may be wrong: a file goes only after the event that says so is on disk.
Rule 2: whatever blocks runs in a thread.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final

import msgspec
import trio
from msgspec.structs import replace

from gpujobd.catalog import kind
from gpujobd.config import Config
from gpujobd.core import inputs, snapshot
from gpujobd.core.events import AnyEvent, Removed, ReservationReleased, Submitted, decode
from gpujobd.core.model import Job
from gpujobd.journal import Journal
from gpujobd.snapfile import SnapshotDamagedError
from gpujobd.spool import Spool
from gpujobd.turns import Turns

log = logging.getLogger("gpujobd.janitor")

LOOK_S: Final = 5.0
RETAIN_S: Final = 60.0
SNAPSHOT_EVENTS: Final = 100_000  # replayed at start-up at most: about a second
SNAPSHOT_BYTES: Final = 64 << 20
SPILL_BATCH: Final = 64
LEASE_ROOM_BYTES: Final = 16 << 20  # under this much free space running work stops too


class Placed(msgspec.Struct, frozen=True):
    """The input of this job lies in the spool and is not synced; the journal still holds it."""

    job_id: int


Chore = Placed | Submitted | Removed | ReservationReleased
"""What left something to do with files."""


class Janitor:
    """Keeps journal, spool and disk in bounds."""

    def __init__(self, turns: Turns, journal: Journal, spool: Spool, config: Config) -> None:
        self._turns = turns
        self._journal = journal
        self._spool = spool
        self._config = config
        self._snapshot_seq = turns.state.seq
        self._chores: deque[Chore] = deque()
        self._more = trio.Event()
        self._adopting = trio.CapacityLimiter(1)

    def reload(self, config: Config) -> None:
        self._config = config

    def follow(self, facts: list[tuple[int, AnyEvent]]) -> None:
        """Note which files have lost, or changed, their owner."""
        for _, event in facts:
            match event:
                case Removed() | ReservationReleased():
                    self._chores.append(event)
                case Submitted() if event.reservation_id:
                    self._chores.append(event)
        if self._chores:
            self._more.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._do_chores)
            nursery.start_soon(self._retain)
            nursery.start_soon(self._look)

    async def prepare(self, job: Job) -> None:
        """Make the job's directory with its input in it.

        Raises:
            FileNotFoundError, OSError: it cannot be made.
        """
        inline_seq, reservation_id = job.inline_seq, job.reservation_id

        def make() -> None:
            if inline_seq:
                self._spool.place(job.job_id, lambda: inline_input(self._journal, inline_seq))
            else:
                self._spool.prepare(job.job_id, reservation_id)

        await trio.to_thread.run_sync(make, limiter=self._adopting)
        if job.job_id not in self._turns.state.jobs:  # removed meanwhile, and its files made anew
            await trio.to_thread.run_sync(self._spool.remove, job.job_id)
        elif inline_seq:
            self._chores.append(Placed(job_id=job.job_id))
            self._more.set()

    async def _do_chores(self) -> None:
        while True:
            if not self._chores:
                self._more = trio.Event()
                await self._more.wait()
            chore = self._chores.popleft()
            try:
                await self._do(chore)
            except OSError as error:
                log.warning("files after %s: %s", type(chore).__name__, error, extra=kind("files_failed"))

    async def _do(self, chore: Chore) -> None:
        match chore:
            case Submitted():
                job = self._turns.state.jobs.get(chore.job_id)
                if job is not None:
                    await self.prepare(job)
                else:  # removed already
                    await trio.to_thread.run_sync(self._spool.discard_incoming, chore.reservation_id)
            case Placed():
                if chore.job_id in self._turns.state.book.inline:
                    await trio.to_thread.run_sync(self._spool.settle, chore.job_id)
                    self._turns.put(inputs.Spooled(job_ids=(chore.job_id,)))
            case Removed():
                await trio.to_thread.run_sync(self._spool.remove, chore.job_id)
            case ReservationReleased():
                await trio.to_thread.run_sync(self._spool.discard_incoming, chore.reservation_id)

    async def _retain(self) -> None:
        while True:
            self._turns.put(inputs.Retain())
            await trio.sleep(RETAIN_S)

    async def _look(self) -> None:
        while True:
            await self._look_at_disk()
            if self._snapshot_is_due():
                await self.snapshot()
            await trio.sleep(LOOK_S)

    async def _look_at_disk(self) -> None:
        free = await trio.to_thread.run_sync(self._spool.free_bytes)
        low = free < self._config.file.limits.disk_free_bytes_min
        if low != self._turns.rules.disk_low:
            self._turns.rules = replace(self._turns.rules, disk_low=low)
            extra = kind("disk_low" if low else "disk_enough")
            log.warning(
                "disk space is %s: %d bytes free", "low" if low else "enough again", free, extra=extra
            )
        self._turns.put(inputs.DiskSpace(full=free < LEASE_ROOM_BYTES, detail=f"{free} bytes free"))

    def _snapshot_is_due(self) -> bool:
        since = self._turns.state.seq - self._snapshot_seq
        return since >= SNAPSHOT_EVENTS or (
            since > 0 and self._journal.bytes_since(self._snapshot_seq) >= SNAPSHOT_BYTES
        )

    async def snapshot(self) -> None:
        """Write the state, then drop what nobody needs any more."""
        seq = self._turns.state.seq
        chunks = snapshot.chunks(self._turns.state)
        try:
            await trio.to_thread.run_sync(self._journal.write_snapshot, seq, chunks)
        except (OSError, SnapshotDamagedError) as error:  # nothing is lost by it: the journal keeps growing
            log.warning("no snapshot was written: %s", error, extra=kind("snapshot_failed"))
            return
        self._snapshot_seq = seq
        try:
            await self._spill()
        except OSError as error:
            message = "inputs stay in the journal, which keeps growing: %s"
            log.warning(message, error, extra=kind("spill_failed"))
        await self._drop()

    async def _spill(self) -> None:
        """Bring inputs of waiting jobs into the spool where their segments stand beyond the history that is kept."""
        floor = self._journal.floor(self._config.file.limits.events_bytes_max)
        for job in [j for j in self._turns.state.jobs.values() if 0 < j.inline_seq < floor]:
            await self.prepare(job)

    async def _drop(self) -> None:
        held = min((j.inline_seq for j in self._turns.state.jobs.values() if j.inline_seq), default=1 << 62)
        history = self._config.file.limits.events_bytes_max
        dropped = await trio.to_thread.run_sync(self._journal.drop_segments, held, history)
        if dropped:
            log.info("dropped %d old journal segments", dropped, extra=kind("segments_dropped"))


def inline_input(journal: Journal, seq: int) -> bytes:
    """The input that rode in the journal. Raises: KeyError where it is not kept, which is a bug."""
    event = decode(journal.read(seq))
    assert isinstance(event, Submitted), (seq, event)
    return event.input
