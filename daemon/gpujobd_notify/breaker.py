"""A circuit breaker: a far end that is ill is left alone. Time is an argument.

    closed    --5 failures in a row-->  open       60 s, then twice as long each time, a quarter of an hour at most
    open      --the time is over---->   half_open  one try decides
    half_open --it succeeds-------->    closed
    half_open --it fails----------->    open

Rule 1: only what says that the far end is ill counts: no answer, 5xx, 429. A 404 is about one message.
Rule 2: while it is open nothing is tried, and no try of anything is used up.
"""

from __future__ import annotations

import enum
from typing import Final

FAILURES_MAX: Final = 5
OPEN_S: Final = 60.0
OPEN_MAX_S: Final = 900.0


class Position(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Of one far end."""

    def __init__(self) -> None:
        self._failures = 0
        self._openings = 0
        self._probing = False
        self.until = 0.0  # while it is open

    def position(self, now: float) -> Position:
        if not self._openings:
            return Position.CLOSED
        return Position.OPEN if now < self.until else Position.HALF_OPEN

    def places(self, now: float, free: int) -> int:
        """How many tries may begin, where there is room for `free`."""
        match self.position(now):
            case Position.CLOSED:
                return free
            case Position.OPEN:
                return 0
            case Position.HALF_OPEN:
                return 0 if self._probing else min(1, free)

    def began(self, now: float) -> None:
        if self.position(now) is Position.HALF_OPEN:
            self._probing = True

    def succeeded(self) -> None:
        """The far end answered as one that is well."""
        self._failures = self._openings = 0
        self._probing = False

    def failed(self, now: float) -> None:
        """Tries that began before it opened count once: they say nothing new."""
        self._probing = False  # first: a clock that was put back has opened it under a probe
        if self.position(now) is Position.OPEN:
            return
        self._failures += 1
        if self._openings or self._failures >= FAILURES_MAX:
            self.until = now + min(OPEN_MAX_S, OPEN_S * 2**self._openings)
            self._openings = min(self._openings + 1, 10)

    def broke_off(self) -> None:
        """A try ended without a verdict: the process stops, or the endpoint changed."""
        self._probing = False

    def hurry(self, now: float) -> None:
        """Somebody asks for a try now."""
        self.until = min(self.until, now)
