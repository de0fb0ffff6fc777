"""What one uid may use of the daemon at a time, all its connections together.

Rule 1: a limit that many connections could multiply is counted by uid, here.
Rule 2: what frees itself soon is waited for (long reads, streams of input); what may last for ever is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import trio

CONNECTIONS_MAX: Final = 128
STREAMS_MAX: Final = 256  # events, watch, wait, log: each costs something at every commit
READS_MAX: Final = 2  # lists and the like at work: a pass of the loop must stay short, whoever asks how often
UPLOADS_MAX: Final = 16  # each holds a descriptor and room in the queue
LABOURS_MAX: Final = 1  # retries read a whole input, dry runs make a whole forecast


class Guest:
    """One uid that has connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.streams = 0
        self.reads = trio.CapacityLimiter(READS_MAX)
        self.uploads = trio.Semaphore(UPLOADS_MAX)
        self.labours = trio.CapacityLimiter(LABOURS_MAX)


class Guests:
    """Every uid that has connections now."""

    def __init__(self) -> None:
        self._guests: dict[int, Guest] = {}

    def __len__(self) -> int:
        """Connections in all."""
        return sum(guest.connections for guest in self._guests.values())

    @contextlib.contextmanager
    def visiting(self, uid: int) -> Iterator[Guest]:
        """One more connection of this uid."""
        guest = self._guests.setdefault(uid, Guest())
        guest.connections += 1
        try:
            yield guest
        finally:
            guest.connections -= 1
            if not guest.connections:
                del self._guests[uid]
