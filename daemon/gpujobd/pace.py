"""How a worker gets on: when it last spoke, when it last moved, how fast it is.

    silent    no message at all
    stalled   heartbeats, but no call of the handler returned

Time during which the daemon itself did not look is nobody's silence: forgive() takes it out.
"""

from __future__ import annotations

import collections
from typing import Final

import msgspec

from gpujobd import worker_messages as messages

RATE_S: Final = 30.0  # the items/s shown are those of this time


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a running job is, between checkpoints."""

    line: int  # being computed
    batch: int  # items a call
    items_per_s: float  # over the last half minute; 0: not known yet


class Pace:
    """Times are those of trio's clock."""

    def __init__(self, now: float) -> None:
        self._spoke_at = self._moved_at = now
        self._beat = messages.Heartbeat(attempt=0)
        self._counts: collections.deque[tuple[float, int]] = collections.deque()

    def begin(self, attempt: int, line: int, counted: int, now: float) -> None:
        """A lease begins at this line, with so many items counted before it."""
        self._beat = messages.Heartbeat(attempt=attempt, line=line)
        self._counts.clear()
        self.count(counted, now)

    def spoke(self, now: float) -> None:
        self._spoke_at = now

    def beat(self, heartbeat: messages.Heartbeat, now: float) -> None:
        """One of the lease before may cross the new lease on the pipe: it tells nothing about this one."""
        if heartbeat.attempt == self._beat.attempt:
            if heartbeat.progress > self._beat.progress:
                self._moved_at = now
            self._beat = heartbeat

    def moved(self, now: float) -> None:
        self._moved_at = now

    def count(self, counted: int, now: float) -> None:
        """So many items are done or failed."""
        self._moved_at = now
        self._counts.append((now, counted))
        while self._counts[0][0] < now - RATE_S:
            self._counts.popleft()

    def forgive(self, lag_s: float) -> None:
        self._spoke_at += lag_s
        self._moved_at += lag_s

    def silent_s(self, now: float) -> float:
        return now - self._spoke_at

    def stalled_s(self, now: float) -> float:
        return now - self._moved_at

    def progress(self) -> Progress:
        items_per_s = 0.0
        if self._counts and (span_s := self._counts[-1][0] - self._counts[0][0]) > 0:
            items_per_s = (self._counts[-1][1] - self._counts[0][1]) / span_s
        return Progress(line=self._beat.line, batch=self._beat.batch, items_per_s=items_per_s)
