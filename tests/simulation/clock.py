"""The time of a simulated world, and the luck that decides what happens in it.

    virtual   trio's clock of the life that is being lived, jumped as soon as nobody can run
    world     seconds since the world began: all lives of the daemon and the pauses between them
    wall      what time.time_ns() says: world time, and every step that somebody set the clock by

Rule 1: nothing in a simulation asks the real clock or the real /dev/urandom; the seed decides all of it.
Rule 2: trio runs what can run at the same instant in an order that it draws. The hook with which this is made
repeatable has a private name in trio; `repeatable` says so loudly where it is missing.
"""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Iterator
from typing import Any, Final

import pytest
import trio
import trio.testing
from gpujobd.core.model import S_NS

EPOCH_NS: Final = 1_750_000_000 * S_NS


class Clock:
    """World and wall time. `begin_life` and `end_life` frame a trio run."""

    def __init__(self) -> None:
        self._before_s = 0.0
        self._trio: trio.testing.MockClock | None = None
        self._step_ns = 0

    def begin_life(self) -> trio.testing.MockClock:
        self._trio = trio.testing.MockClock(autojump_threshold=0)
        return self._trio

    def end_life(self, world_s: float) -> None:
        """It ended at this time of the world: what trio's clock did in clearing up does not count."""
        self._before_s, self._trio = world_s, None

    def pass_between_lives(self, seconds: float) -> None:
        assert self._trio is None
        self._before_s += seconds

    def freeze(self, seconds: float) -> None:
        """The process was stopped for so long: every timer of these seconds is late."""
        assert self._trio is not None
        self._trio.jump(seconds)

    def step(self, seconds: float) -> None:
        """Somebody set the wall clock, or the machine was suspended."""
        self._step_ns += round(seconds * S_NS)

    @property
    def world_s(self) -> float:
        return self._before_s + (self._trio.current_time() if self._trio else 0.0)

    # --- what the daemon gets instead of the module `time` ----------------------------------------------------------

    def time_ns(self) -> int:
        return EPOCH_NS + round(self.world_s * S_NS) + self._step_ns

    def time(self) -> float:
        return self.time_ns() / S_NS

    def monotonic(self) -> float:
        return self.world_s

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return round(self.world_s * S_NS)

    @staticmethod
    def sleep(seconds: float) -> None:
        raise AssertionError(f"the loop was to sleep for {seconds} s")


class Uuids:
    """What the daemon gets instead of the module `uuid`."""

    UUID = uuid.UUID

    def __init__(self, luck: random.Random) -> None:
        self._luck = luck

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=self._luck.getrandbits(128), version=4)


def can_repeat() -> bool:
    """Whether this trio has the hook."""
    run: Any = trio._core._run
    return hasattr(run, "_ALLOW_DETERMINISTIC_SCHEDULING") and isinstance(
        getattr(run, "_r", None), random.Random
    )


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """trio draws the order of what can run at once from the seed."""
    if not can_repeat():
        pytest.skip(f"trio {trio.__version__} has no hook for repeatable scheduling: no simulation")
    run: Any = trio._core._run
    before, drawn = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r.getstate()
    run._ALLOW_DETERMINISTIC_SCHEDULING = True
    run._r.seed(seed)
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING = before
        run._r.setstate(drawn)
