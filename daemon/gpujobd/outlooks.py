"""The forecast, kept for a second: computed in short steps, only while somebody asks.

Rule 1: no reader waits for a forecast but the status table, which shows nothing else; the others get the latest.
Rule 2: forecasting takes at most a twentieth of the loop's time, however long the queue is.
"""

from __future__ import annotations

import time
from typing import Final

import trio

from gpujobd.core.forecast import Outlook, forecast
from gpujobd.core.model import Job
from gpujobd.turns import Turns

KEPT_S: Final = 1.0
SHARE_MAX: Final = 0.05  # of the loop's time
WAIT_MAX_S: Final = 0.5  # what the status table may wait


class Outlooks:
    """Latest outlook of every job that waits or runs."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._outlooks: dict[int, Outlook] = {}
        self._computed_at = -KEPT_S
        self._cost_s = 0.0
        self._extra = trio.CapacityLimiter(1)
        self._extra_at = 0.0  # when the next extra forecast may begin
        self._wanted = trio.Event()
        self._done = trio.Event()

    def of(self, job_id: int) -> Outlook | None:
        self._wanted.set()
        return self._outlooks.get(job_id)

    def rank(self, job_id: int) -> int:
        """For sorting: position in the line, unknown ones last."""
        outlook = self._outlooks.get(job_id)
        return outlook.position if outlook else 1 << 60

    async def fresh(self) -> None:
        """Wait for a forecast of the state as it is now, if it comes soon."""
        with trio.move_on_after(WAIT_MAX_S):
            while trio.current_time() - self._computed_at > KEPT_S:
                self._wanted.set()
                await self._done.wait()

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            await self._compute()
            await trio.sleep(max(KEPT_S, self._cost_s / SHARE_MAX))

    async def of_extra(self, job: Job) -> Outlook | None:
        """What a job that is not submitted could expect."""
        async with self._extra:
            await trio.sleep_until(self._extra_at)
            outlooks, cost_s = await self._ahead(job)
            self._extra_at = trio.current_time() + cost_s / SHARE_MAX
        return outlooks.get(job.job_id)

    async def _compute(self) -> None:
        started = trio.current_time()
        self._outlooks, self._cost_s = await self._ahead(None)
        self._computed_at = started
        self._done.set()
        self._done = trio.Event()

    async def _ahead(self, extra: Job | None) -> tuple[dict[int, Outlook], float]:
        """The forecast, and what it cost in seconds of the loop's time."""
        cost_s = 0.0
        steps = forecast(self._turns.state, self._turns.rules, time.time_ns(), extra)
        while True:
            step_at = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                return end.value, cost_s
            finally:
                cost_s += time.perf_counter() - step_at
            await trio.lowlevel.checkpoint()
