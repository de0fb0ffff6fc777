"""The forecast, kept for a second: computed in short steps, while somebody asks and after a submission.

Rule 1: no reader waits for a forecast but the status table, which shows nothing else; the others get the latest.
Rule 2: forecasting takes at most a twentieth of the loop's time, however long the queue is, and a quarter while it goes
on: others are not only let in between two steps, they have time to be answered.
Rule 3: the first forecast of a job is journaled (`Foretold`), so that its end can be held against it. Submissions are
gathered for a moment first: the start of a worker comes before the question how long it will take.
"""

from __future__ import annotations

import time
from typing import Final

import trio

from gpujobd.core import policy
from gpujobd.core.events import AnyEvent, Submitted
from gpujobd.core.forecast import Outlook, forecast
from gpujobd.core.inputs import Foretell
from gpujobd.core.model import Expected, Job
from gpujobd.turns import Turns

KEPT_S: Final = 1.0
GATHER_S: Final = 0.1
SHARE_MAX: Final = 0.05  # of the loop's time
SHARE_MEANWHILE: Final = 0.25
WAIT_MAX_S: Final = 0.5  # what the status table may wait
FORETOLD_MAX: Final = 1_000  # jobs of one event


class Outlooks:
    """Latest outlook of every job that waits or runs."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._outlooks: dict[int, Outlook] = {}
        self._computed_at = -KEPT_S
        self._cost_s = 0.0
        self._new: list[int] = []  # jobs that were submitted since the latest forecast began
        self._extra = trio.CapacityLimiter(1)
        self._extra_at = 0.0  # when the next extra forecast may begin
        self._wanted = trio.Event()
        self._done = trio.Event()

    def follow(self, facts: list[tuple[int, AnyEvent]]) -> None:
        """Take note of what was submitted. What cannot start now has no forecast that could be kept."""
        new = [event.job_id for _, event in facts if isinstance(event, Submitted)]
        if new and policy.may_start(self._turns.state):
            self._new += new
            self._wanted.set()

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
            if self._new:
                await trio.sleep(GATHER_S)
            self._wanted = trio.Event()
            await self._compute()
            await self._rest()

    async def _rest(self) -> None:
        """What was just computed is kept for a second, but who is new does not wait that long."""
        await trio.sleep(self._cost_s / SHARE_MAX)
        kept_until = self._computed_at + KEPT_S
        while not self._new and trio.current_time() < kept_until:
            with trio.move_on_at(kept_until):
                await self._wanted.wait()
                if not self._new:  # a reader: what he has been given is fresh enough
                    self._wanted = trio.Event()

    async def of_extra(self, job: Job) -> Outlook | None:
        """What a job that is not submitted could expect."""
        async with self._extra:
            await trio.sleep_until(self._extra_at)
            outlooks, cost_s = await self._ahead(job)
            self._extra_at = trio.current_time() + cost_s / SHARE_MAX
        return outlooks.get(job.job_id)

    async def _compute(self) -> None:
        new, self._new = self._new, []
        started, made_ns = trio.current_time(), time.time_ns()
        self._outlooks, self._cost_s = await self._ahead(None)
        self._computed_at = started
        self._done.set()
        self._done = trio.Event()
        self._foretell(new, made_ns)

    def _foretell(self, new: list[int], made_ns: int) -> None:
        known = ((job_id, self._outlooks.get(job_id)) for job_id in new)
        expected = [
            Expected(job_id, made_ns, outlook.start_ns, outlook.finish_ns, outlook.finish_90_ns)
            for job_id, outlook in known
            if outlook is not None and outlook.finish_ns
        ]
        for at in range(0, len(expected), FORETOLD_MAX):
            self._turns.put(Foretell(jobs=tuple(expected[at : at + FORETOLD_MAX])))

    async def _ahead(self, extra: Job | None) -> tuple[dict[int, Outlook], float]:
        """The forecast, and what it cost in seconds of the loop's time."""
        cost_s = 0.0
        steps = forecast(self._turns.state, self._turns.rules, time.time_ns(), extra)
        while True:
            step_at = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                return end.value, cost_s + time.perf_counter() - step_at
            step_s = time.perf_counter() - step_at
            cost_s += step_s
            await trio.sleep(step_s * (1 / SHARE_MEANWHILE - 1))
