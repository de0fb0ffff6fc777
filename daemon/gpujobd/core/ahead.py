"""What a forecast runs with: jobs, lines and devices as they are expected to be.

Rule: nothing here is the state's own. Lines are copied when the forecast begins, and jobs are read, never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush, merge
from math import sqrt
from typing import Final

from gpujobd.core import policy
from gpujobd.core.model import TELLING_NS, Device, Job, Learned, Priority

Z_90: Final = 1.28  # standard deviations that nine in ten stay below
DEVIATION: Final = 1.25  # standard deviations in a mean distance
MEAN_OFF: Final = 0.38  # sqrt(1/7): what a moving mean that goes a quarter of the way keeps of the deviation


class Rest:
    """What is left of one job."""

    __slots__ = ("job", "known", "left_ns", "position", "spread", "start_ns", "work_ns")

    def __init__(self, job: Job, learned: Learned | None) -> None:
        price_ns, self.spread = _price(job, learned)
        self.job = job
        self.known = price_ns > 0
        self.left_ns: float = job.left * (price_ns or policy.ITEM_GUESS_NS)
        self.work_ns = 0.0  # done of it so far, in this forecast
        self.position = 0
        self.start_ns = 0


def _price(job: Job, learned: Learned | None) -> tuple[float, float]:
    """Device time of one of its items, and the deviation from that as a part of it; 0: not known.

    A job that has been at work for a second tells best itself, then the jobs before it, then single checkpoints.
    """
    if learned is None or not learned.item_ns:
        return 0, 0.0
    within = DEVIATION * learned.item_spread_ns / learned.item_ns
    tried, worked_ns = job.items - job.left, job.worked_ns
    if tried and worked_ns >= TELLING_NS:
        return worked_ns / tried, MEAN_OFF * within
    if learned.job_item_ns:
        return learned.job_item_ns, DEVIATION * learned.job_spread_ns / learned.job_item_ns
    return learned.item_ns, within


class Line:
    """What one tenant still wants at one level."""

    __slots__ = (
        "_source",
        "begun",
        "count",
        "head",
        "level",
        "offered",
        "served",
        "share",
        "tenant",
        "vtime_ns",
        "woken",
    )

    def __init__(self, tenant: str, level: Priority, share: float, vtime_ns: float) -> None:
        self.tenant = tenant
        self.level = level
        self.share = share
        self.vtime_ns = vtime_ns
        self.offered: tuple[float, str] | None = None  # virtual time and handler of its newest entry
        self.count = 0  # jobs that wait in it
        self.served: list[Rest] = []  # jobs that have a share of the devices now, far ahead
        self.begun: list[Rest] = []  # jobs that were begun and wait, the next one last
        self.head: Job | None = None  # of those that were in line when the forecast began
        self.woken: list[tuple[int, int, Job]] = []  # a heap by line_key
        self._source: Iterator[Job] = iter(())

    def stand(self, several: list[list[Job]]) -> None:
        """These jobs are in line. Merged as they are taken: a step must not cost what the line is long."""
        self.count += sum(map(len, several))
        self._source = iter(several[0]) if len(several) == 1 else merge(*several, key=policy.LINE_KEY)
        self.head = next(self._source, None)

    def join(self, job: Job) -> None:
        self.count += 1
        heappush(self.woken, (job.line_key, job.job_id, job))

    def give_back(self, rest: Rest) -> None:
        self.count += 1
        self.begun.append(rest)

    @property
    def next_job(self) -> Job:
        if self.begun:
            return self.begun[-1].job
        if self.woken and (self.head is None or self.woken[0][0] < self.head.line_key):
            return self.woken[0][2]
        assert self.head is not None
        return self.head

    def take(self, learned: dict[str, Learned]) -> Rest:
        self.count -= 1
        if self.begun:
            return self.begun.pop()
        job = self.next_job
        if job is self.head:
            self.head = next(self._source, None)
        else:
            heappop(self.woken)
        return Rest(job, learned.get(job.handler))


class Doubt:
    """Of rule 2: how late all may be that comes after the work noted here."""

    __slots__ = ("_alike_ns", "_squares")

    def __init__(self) -> None:
        self._alike_ns = 0.0  # deviations of measured means: in all jobs alike
        self._squares = 0.0  # of the deviations of single jobs and loads

    def note_work(self, rest: Rest, work_ns: float, devices: int = 1) -> None:
        """So much more work on this job, by one of so many devices that share the rest of it."""
        before_ns = rest.work_ns
        rest.work_ns += work_ns
        self._alike_ns += MEAN_OFF * rest.spread * work_ns / devices
        self._squares += (rest.spread / devices) ** 2 * (rest.work_ns**2 - before_ns**2)

    def note_load(self, learned: Learned, devices: int = 1) -> None:
        self._squares += (DEVIATION * learned.load_spread_ns / devices) ** 2

    def add(self, other: Doubt, part: float) -> None:
        self._alike_ns += other._alike_ns * part
        self._squares += other._squares * part**2

    def late_90_ns(self) -> float:
        return Z_90 * sqrt(self._alike_ns**2 + self._squares)


class Server:
    """One device, running ahead."""

    __slots__ = ("budget_ns", "doubt", "line", "loaded", "rest", "room", "since_load_ns", "work_ns")

    def __init__(self, device: Device) -> None:
        self.loaded = list(device.loaded)
        self.room = max(1, len(self.loaded))
        self.since_load_ns: float = device.since_load_ns
        self.line: Line | None = None  # whose turn it is
        self.budget_ns: float = 0  # of the turn
        self.rest: Rest | None = None  # what it runs
        self.work_ns: float = 0  # how much of that this step does
        self.doubt = Doubt()
