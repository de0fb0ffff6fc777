"""How much may be in flight, to whom. Counts only.

    each endpoint        `in_flight_max` at a time, and one place more that is for alerts
    far ends that users  `SHARED_MAX` at a time in all, whatever hosts they named, `SHARED_PER_UID_MAX` for one of them,
    named by URL         and a place more of each for alerts

Rule 1: an alert (a stall, a crash loop, an ill device) never waits behind news: a place that only alerts may take.
Rule 2: who names many dead hosts waits for them himself: the shared places are counted by uid.
Rule 3: an endpoint of the administrator's shares its places with nobody.
"""

from __future__ import annotations

from typing import Final

SHARED_MAX: Final = 32
SHARED_PER_UID_MAX: Final = 6


class Lane:
    """Places of one endpoint, or of one crowd of them."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.news = 0
        self.alerts = 0

    @property
    def in_flight(self) -> int:
        return self.news + self.alerts

    def free(self, *, urgent: bool) -> int:
        """Places that one more may take. An alert takes any; news leave the last one free."""
        taken = self.in_flight - (0 if urgent else min(self.alerts, 1))
        return max(0, self.places + (1 if urgent else 0) - taken)

    def enter(self, *, urgent: bool) -> None:
        assert self.free(urgent=urgent) > 0
        if urgent:
            self.alerts += 1
        else:
            self.news += 1

    def leave(self, *, urgent: bool) -> None:
        if urgent:
            self.alerts -= 1
        else:
            self.news -= 1
        assert self.news >= 0
        assert self.alerts >= 0


class Crowd:
    """The shared places of far ends that users named."""

    def __init__(self) -> None:
        self._all = Lane(SHARED_MAX)
        self._by_uid: dict[int, Lane] = {}

    def _of(self, uid: int) -> Lane:
        return self._by_uid.get(uid) or Lane(SHARED_PER_UID_MAX)

    def free(self, uid: int, *, urgent: bool) -> int:
        return min(self._all.free(urgent=urgent), self._of(uid).free(urgent=urgent))

    def full(self, *, urgent: bool) -> list[int]:
        """Who has all the places that he may have."""
        return [uid for uid, lane in self._by_uid.items() if not lane.free(urgent=urgent)]

    def enter(self, uid: int, *, urgent: bool) -> None:
        lane = self._by_uid.setdefault(uid, Lane(SHARED_PER_UID_MAX))
        lane.enter(urgent=urgent)
        self._all.enter(urgent=urgent)

    def leave(self, uid: int, *, urgent: bool) -> None:
        lane = self._by_uid[uid]
        lane.leave(urgent=urgent)
        self._all.leave(urgent=urgent)
        if not lane.in_flight:
            del self._by_uid[uid]
