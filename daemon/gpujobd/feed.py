"""The event stream: every fact, numbered for ever, for those who may see it.

Rule 1: the stream is the journal, read. A client holds no history and is owed none: it has a cursor, and what is
older than what is kept it is told as a gap.
Rule 2: the newest events are kept in memory, so that following costs no read.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final

import trio
from msgspec.structs import replace

from gpujobd.core.events import AnyEvent, Submitted, decode
from gpujobd.journal import Journal

RECENT_MAX: Final = 8192
READ_MAX: Final = 64  # at a time: shown to one follower, about a millisecond


class Feed:
    """Committed events by number."""

    def __init__(self, journal: Journal, seq: int) -> None:
        self._journal = journal
        self._recent: deque[tuple[int, AnyEvent]] = deque(maxlen=RECENT_MAX)
        self._grown = trio.Event()
        self.seq = seq  # of the newest event

    def follow(self, facts: list[tuple[int, AnyEvent]]) -> None:
        if facts:
            self._recent.extend((seq, _lean(event)) for seq, event in facts)
            self.seq = facts[-1][0]
            self._grown.set()
            self._grown = trio.Event()

    @property
    def first_seq(self) -> int:
        """The oldest event that is kept."""
        return min(self._journal.first_seq, self.seq + 1)

    async def after(self, cursor: int) -> list[tuple[int, AnyEvent]]:
        """Events with a later number than `cursor`, oldest first, some at a time; empty where there are none."""
        if cursor >= self.seq:
            return []
        if self._recent and self._recent[0][0] <= cursor + 1:
            start = cursor + 1 - self._recent[0][0]
            return list(islice(self._recent, start, start + READ_MAX))
        return await trio.to_thread.run_sync(self._read, cursor + 1, self.seq)

    def _read(self, first: int, last: int) -> list[tuple[int, AnyEvent]]:
        records = self._journal.read_from(first, READ_MAX)
        return [(seq, _lean(decode(record))) for seq, record in records if seq <= last]

    def grown(self, cursor: int) -> trio.Event:
        """An event that is set once there is something after `cursor`."""
        if cursor < self.seq:
            already = trio.Event()
            already.set()
            return already
        return self._grown


def _lean(event: AnyEvent) -> AnyEvent:
    """Without the bytes of an input: they serve nobody here, and 8,192 of them would be half a gigabyte."""
    return replace(event, input=b"") if isinstance(event, Submitted) and event.input else event
