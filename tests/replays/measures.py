"""A situation lived under one policy, and what came of it."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean, median

from fairness.hall import Arrival, Hall, rules
from gpujobd.core.events import (
    AnyEvent,
    Completed,
    HandlerLoaded,
    Leased,
    Progress,
    Submitted,
    Yielded,
)
from gpujobd.core.forecast import Outlook, forecast
from gpujobd.core.inputs import AnyInput
from gpujobd.core.model import S_NS, Job, JobState
from replays.rivals import Rival
from replays.situations import HOUR_S, Situation

WINDOW_S = 600.0
FORECASTS = 100  # after so many, only every other job is asked about: each asks the policy to run ahead
EPOCH_S = 1_700_000_000


@dataclass(frozen=True)
class Stretch:
    """For so long a device worked, or loaded, for one tenant."""

    begin_s: float
    end_s: float
    tenant: str
    loads: bool


@dataclass
class Outcome:
    situation: Situation
    policy: str
    waits_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by group
    ends_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of those that ended
    left: int = 0  # jobs that had not begun at the end
    jain: float = 1.0
    computing_s: float = 0.0
    loading_s: float = 0.0
    wanted_s: float = 0.0  # while anybody had work
    forecast_error: float | None = None
    forecasts: int = 0
    ribbon: list[Stretch] = field(default_factory=list)

    @property
    def overhead(self) -> float:
        return self.loading_s / max(1.0, self.computing_s + self.loading_s)

    @property
    def utilisation(self) -> float:
        return self.computing_s / max(1.0, self.wanted_s)


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank; nan of nothing."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, round(percent / 100 * (len(ranked) - 1)))]


def duration(seconds: float) -> str:
    """Short: 40 s, 2.5 min, 3 h."""
    if math.isnan(seconds):
        return "-"
    if seconds < 120 and seconds != 60:
        return f"{seconds:.0f} s"
    value, unit = (seconds / 60, "min") if seconds < HOUR_S else (seconds / HOUR_S, "h")
    return f"{value:.1f} {unit}".replace(".0 ", " ") if value < 10 else f"{value:.0f} {unit}"


def live(situation: Situation, rival: Rival, *, seed: int = 1, hours: float = 0.0) -> Outcome:
    hours = hours or situation.hours
    made = rules(situation.kinds, tenants=situation.tenants)
    with rival.chosen():
        hall = Hall(made, situation.kinds, seed=seed)
        watch = _Watch(hall, situation, forecasts=rival.name == "gpujobd")
        for arrival in situation.arrivals(random.Random(seed), hours * HOUR_S):
            hall.arrive(arrival)
        hall.run(hours * HOUR_S)
    return watch.outcome(rival.name)


class _Watch:
    def __init__(self, hall: Hall, situation: Situation, *, forecasts: bool) -> None:
        self.hall = hall
        self.situation = situation
        self.stretches: list[Stretch] = []
        self.began_s = 0.0  # the stretch that is on
        self.present: dict[str, list[tuple[float, float]]] = defaultdict(list)  # when a tenant had work
        self.open: dict[str, int] = defaultdict(int)
        self.since_s: dict[str, float] = {}
        self.tried: dict[int, int] = {}  # job -> items
        self.every = 1
        self.asked = 0
        self.outlooks: dict[int, Outlook] = {}
        self.forecasts = forecasts
        hall.watchers.append(self.watch)

    def watch(self, _given: AnyInput, events: list[AnyEvent]) -> None:
        for event in events:
            if isinstance(event, Leased):
                self.began_s = self.hall.clock_s
            elif isinstance(event, HandlerLoaded):
                self._stretch(self._tenant(), loads=True)
            elif isinstance(event, Progress):
                job = self.hall.job(event.job_id)
                self._stretch(job.tenant, loads=self._abandoned(event))
                if isinstance(event, Completed):
                    self._leave(job)
            elif isinstance(event, Submitted):
                self._come(event.tenant)
                self._foresee(event.job_id)

    def _tenant(self) -> str:
        return self.hall.lease("cuda:0").tenant

    def _abandoned(self, event: Progress) -> bool:
        """Whether the lease was given back while its handler was loading: nothing was tried in it."""
        before, self.tried[event.job_id] = self.tried.get(event.job_id, 0), event.checkpoint.upto
        return isinstance(event, Yielded) and event.checkpoint.upto == before

    def _stretch(self, tenant: str, *, loads: bool) -> None:
        now_s = self.hall.clock_s
        if self.stretches:
            last = self.stretches[-1]
            if (last.tenant, last.loads, last.end_s) == (tenant, loads, self.began_s):
                self.stretches[-1] = Stretch(last.begin_s, now_s, tenant, loads)
                self.began_s = now_s
                return
        self.stretches.append(Stretch(self.began_s, now_s, tenant, loads))
        self.began_s = now_s

    def _come(self, tenant: str) -> None:
        self.open[tenant] += 1
        self.since_s.setdefault(tenant, self.hall.clock_s)

    def _leave(self, job: Job) -> None:
        self.open[job.tenant] -= 1
        if not self.open[job.tenant]:
            self.present[job.tenant].append((self.since_s.pop(job.tenant), self.hall.clock_s))

    def _foresee(self, job_id: int) -> None:
        """What the daemon would tell who submitted this job: every so many jobs, so that it stays affordable."""
        self.asked += 1
        if not self.forecasts or self.asked % self.every:
            return
        steps = forecast(self.hall.state, self.hall.rules, self.hall.now_ns)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                self.outlooks[job_id] = end.value[job_id]
                break
        if len(self.outlooks) % FORECASTS == 0:
            self.every *= 2

    # --- sums ---

    def outcome(self, policy: str) -> Outcome:
        found = Outcome(self.situation, policy, ribbon=self.stretches)
        for job_id, arrival in self.hall.submitted.items():
            self._of_job(found, self.hall.job(job_id), arrival)
        for stretch in self.stretches:
            length_s = stretch.end_s - stretch.begin_s
            found.loading_s += length_s if stretch.loads else 0.0
            found.computing_s += 0.0 if stretch.loads else length_s
        for tenant, since_s in self.since_s.items():
            self.present[tenant].append((since_s, self.hall.clock_s))
        found.wanted_s = _covered_s([span for spans in self.present.values() for span in spans])
        found.jain = fmean(self._jains() or [1.0])
        errors = list(self._errors())
        found.forecasts = len(errors)
        found.forecast_error = median(errors) if errors else None
        return found

    def _of_job(self, found: Outcome, job: Job, arrival: Arrival) -> None:
        """Who has not begun has waited until now: left out, the worst policy would look best."""
        group = group_of(self.situation, arrival.tenant)
        begun_s = self.hall.computes_s.get(job.job_id)
        found.left += begun_s is None
        found.waits_s[group].append((self.hall.clock_s if begun_s is None else begun_s) - arrival.at_s)
        if job.state is JobState.COMPLETED:
            found.ends_s[group].append(job.finished_ns / S_NS - EPOCH_S - arrival.at_s)

    def _errors(self) -> Iterator[float]:
        """By how much the end was missed, as a part of the time until it came."""
        for job_id, outlook in self.outlooks.items():
            job = self.hall.job(job_id)
            took_ns = job.finished_ns - job.submitted_ns
            if outlook.finish_ns and job.state is JobState.COMPLETED and took_ns > 0:
                yield abs(outlook.finish_ns - job.finished_ns) / took_ns

    def _jains(self) -> list[float]:
        """Jain's index of device time by share, in each window, of those who had work all through it."""
        found: list[float] = []
        used: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for stretch in self.stretches:
            at_s = stretch.begin_s
            while at_s < stretch.end_s:
                window = int(at_s // WINDOW_S)
                until_s = min(stretch.end_s, (window + 1) * WINDOW_S)
                used[window][stretch.tenant] += until_s - at_s
                at_s = until_s
        for window in range(int(self.hall.clock_s // WINDOW_S)):
            begin_s, end_s = window * WINDOW_S, (window + 1) * WINDOW_S
            there = [
                name
                for name, spans in self.present.items()
                if any(since_s <= begin_s and until_s >= end_s for since_s, until_s in spans)
            ]
            if len(there) > 1:
                got = [used[window][name] / self.hall.rules.share(name) for name in there]
                total = sum(got)
                found.append(total**2 / (len(got) * sum(x * x for x in got)) if total else 1.0)
        return found


def group_of(situation: Situation, tenant: str) -> str:
    return next(name for first, name in situation.groups.items() if tenant.startswith(first))


def _covered_s(spans: list[tuple[float, float]]) -> float:
    covered_s, reached_s = 0.0, 0.0
    for begin_s, end_s in sorted(spans):
        covered_s += max(0.0, end_s - max(begin_s, reached_s))
        reached_s = max(reached_s, end_s)
    return covered_s
