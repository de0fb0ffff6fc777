"""Group commit under trio: what is added while a frame is in flight goes into the next one.

Rule 1: everything here is called from the trio thread; only the journal works in threads, one call at a time.
Rule 2: on_commit is called after fdatasync returned, never for a frame that failed.
Rule 3: a last frame stays unproven for 50 ms at most: then a watermark follows it (recovery.py, rule 3).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from gpujobd import frames
from gpujobd.journal import Journal, JournalDead
from gpujobd.thread import OwnThread

WATERMARK_AFTER_S: Final = 0.04  # leaves ten milliseconds for its sync
SPARES_RETRY_S: Final = 1.0

T = TypeVar("T")


class Writer:
    """See the module's rules."""

    def __init__(self, journal: Journal, on_commit: Callable[[int], None]) -> None:
        """`on_commit(last_seq)` is called in the loop after each frame; the journal must be open."""
        self.committed = journal.last_seq
        self.sync_started_at: float | None = None  # trio.current_time() of the sync in flight
        self._journal = journal
        self._on_commit = on_commit
        self._added = journal.last_seq
        self._pending: deque[tuple[list[bytes], int]] = deque()  # records, and the most bytes they take
        self._wake = trio.Event()
        self._moved = trio.Event()
        self._spares_wanted = trio.Event()
        self._thread = OwnThread("journal")
        self._spares_thread = trio.CapacityLimiter(1)

    @property
    def alive(self) -> bool:
        """Whether there is a thread to write; before and after run() nothing is missed."""
        return self._thread.alive

    def add(self, records: list[bytes]) -> int:
        """Queue them for the next frame; the number of the last. They count once `committed` reaches it.

        Records of one call share a frame, unless they exceed payload_bytes_max together.

        Raises:
            JournalDead: nothing is accepted any more.
            ValueError: one record alone does not fit in a frame; nothing was queued.
        """
        if self._journal.dead is not None:
            raise JournalDead(self._journal.dead)
        self._pending.extend(self._parts(records))
        self._added += len(records)
        self._wake.set()
        return self._added

    def _parts(self, records: list[bytes]) -> list[tuple[list[bytes], int]]:
        """Cut at payload_bytes_max; nearly always there is one part."""
        size_max = self._journal.payload_bytes_max
        size = frames.payload_bound(records)
        if size <= size_max:
            return [(records, size)] if records else []
        if len(records) == 1:
            raise ValueError(f"a record of {len(records[0])} bytes: a frame holds {size_max}")
        half = len(records) // 2
        return self._parts(records[:half]) + self._parts(records[half:])

    async def run(self) -> None:
        """Commit until cancelled.

        Raises:
            JournalDead: a write failed; on_commit is not called for it.
        """
        if self._journal.spares_missing:
            self._spares_wanted.set()
        with self._thread.running():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._prepare_spares)
                died = await self._commit_until_dead()
                nursery.cancel_scope.cancel()
        raise died

    async def drain(self) -> None:
        """Wait until everything added so far is committed.

        Raises:
            JournalDead: it never will be.
        """
        wanted = self._added
        while self.committed < wanted:
            if self._journal.dead is not None:
                raise JournalDead(self._journal.dead)
            await self._moved.wait()

    async def _commit_until_dead(self) -> JournalDead:
        try:
            while True:
                if self._pending:
                    await self._commit(self._take())
                else:
                    await self._idle()
        except JournalDead as died:
            self._announce()
            return died

    async def _commit(self, records: list[bytes]) -> None:
        self.committed = await self._in_thread(lambda: self._journal.append(records))
        self._announce()
        self._on_commit(self.committed)

    async def _idle(self) -> None:
        """Wait for work; prove the last frame if none comes soon."""
        self._wake = trio.Event()
        with trio.move_on_after(WATERMARK_AFTER_S if self._journal.unproven else math.inf) as waited:
            await self._wake.wait()
        if self._journal.dead is not None:
            raise JournalDead(self._journal.dead)
        if waited.cancelled_caught:
            await self._in_thread(self._journal.watermark)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        self.sync_started_at = trio.current_time()
        try:
            return await self._thread.do(call)
        finally:
            self.sync_started_at = None
            if self._journal.spares_missing:
                self._spares_wanted.set()

    async def _prepare_spares(self) -> None:
        """Make the next segment long before it is needed, so that a roll stalls no commit."""
        while True:
            await self._spares_wanted.wait()
            self._spares_wanted = trio.Event()
            try:
                done = await trio.to_thread.run_sync(self._journal.prepare, limiter=self._spares_thread)
            except JournalDead:
                self._wake.set()
                return
            if not done:
                await trio.sleep(SPARES_RETRY_S)
                self._spares_wanted.set()

    def _take(self) -> list[bytes]:
        """As many whole additions as fit in one frame."""
        records, size = self._pending.popleft()
        if self._pending and size + self._pending[0][1] <= self._journal.payload_bytes_max:
            records = list(records)
            while self._pending and size + self._pending[0][1] <= self._journal.payload_bytes_max:
                more, more_size = self._pending.popleft()
                records += more
                size += more_size
        return records

    def _announce(self) -> None:
        """Wake who waits in drain()."""
        self._moved.set()
        self._moved = trio.Event()
