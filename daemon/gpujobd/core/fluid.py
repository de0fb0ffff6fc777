"""Far ahead, job by job: everybody who competes has a share of the devices at every moment.

    a level    what the levels above leave of the devices
    a tenant   by its share, among those with the least virtual time; no more devices than it has jobs
    a job      its tenant's jobs in their order, so many at a time as its devices

Nothing changes between two of these: a job ends, a job wakes, a device joins, a tenant's virtual time is reached by
those behind it. The clock moves from one to the next.

Rule: between two steps at most VISITS jobs are moved on, about a millisecond; a move costs as much as MOVE of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, inf
from typing import TYPE_CHECKING, Final, NamedTuple

from gpujobd.core.ahead import Doubt, Line, Rest, Server
from gpujobd.core.model import Priority

if TYPE_CHECKING:
    from gpujobd.core.forecast import Ahead

VISITS: Final = 1_000
MOVE: Final = 8
EVEN_NS: Final = 1e6  # virtual times as close as this are equal
DONE_NS: Final = 1e3  # rounding: less than this is nothing
SPARE: Final = 1e-6  # of a device


class Served(NamedTuple):
    line: Line
    rest: Rest
    rate: float  # devices


class Fluid:
    """Who has which share, from one change to the next."""

    def __init__(self, ahead: Ahead, joins: list[tuple[float, Server]]) -> None:
        self._ahead = ahead
        self._joins = joins[::-1]  # the soonest last
        self._at_ns = joins[0][0]
        self._room = 0  # handlers that the devices hold
        self._loaded: set[str] = set()
        self._devices = 0
        self._doubt = Doubt()
        for _, server in joins:  # who comes after has what all devices did before it, on the average
            self._doubt.add(server.doubt, 1 / len(joins))
        self._lines: dict[Priority, list[Line]] = {}
        self._known = 0  # how many lines these were
        self._enter_ns = inf  # until others are caught up with
        self._stays = False  # whether only jobs change, in the shares that their tenants have
        self._visits = 0

    def run(self) -> Iterator[None]:
        served: list[Served] = []
        while True:
            if not (served and self._stays):
                self._join()
                self._ahead.wake(self._at_ns, self._floor_ns)
                served = self._shares()
            pace = self._pace(served)
            within_ns = self._within_ns(served, pace)
            if within_ns == inf:
                return
            served = self._move(served, pace, within_ns)
            if self._visits >= VISITS:
                self._visits = 0
                self._ahead.look_at_tenants()
                yield

    def _join(self) -> None:
        while self._joins and self._joins[-1][0] <= self._at_ns:
            _, server = self._joins.pop()
            self._devices += 1
            self._room += server.room
            self._loaded.update(server.loaded)

    def _floor_ns(self, level: Priority) -> float:
        lines = (line for line in self._ahead.lines.values() if line.level is level)
        present = (line.vtime_ns for line in lines if line.count or line.served)
        return min(present, default=self._ahead.state.vclocks_ns[level])

    # --- shares ---

    def _shares(self) -> list[Served]:
        served: list[Served] = []
        self._enter_ns = inf
        free: float = self._devices
        for level in reversed(Priority):
            lines = self._present(level)
            while lines and free > SPARE:
                least_ns = lines[0].vtime_ns + EVEN_NS
                even = [line for line in lines if line.vtime_ns <= least_ns]
                lines = lines[len(even) :]
                free = self._split(even, free, served, lines[0].vtime_ns if lines else inf)
        return served

    def _present(self, level: Priority) -> list[Line]:
        """Who competes at this level, the least virtual time first."""
        if self._known != len(self._ahead.lines):
            self._known = len(self._ahead.lines)
            self._lines = {}
            for line in self._ahead.lines.values():
                self._lines.setdefault(line.level, []).append(line)
        known = self._lines.get(level, [])
        present = [line for line in known if line.count or line.served]
        self._visits += len(known)
        if len(present) < len(known) // 2 and not self._ahead.asleep:
            self._lines[level] = present
        present.sort(key=_vtime_ns)
        return present

    def _most(self, line: Line) -> float:
        """Devices that its jobs can have at once."""
        return min(line.count + len(line.served), self._ahead.limits.get(line.tenant, inf))

    def _split(self, lines: list[Line], free: float, served: list[Served], next_ns: float) -> float:
        """Fill by share, no tenant beyond its jobs; what is left of the devices."""
        while lines:
            part = free / sum(line.share for line in lines)
            full = [line for line in lines if line.share * part >= self._most(line)]
            if not full:
                for line in lines:
                    self._serve(line, line.share * part, served, next_ns)
                return 0.0
            for line in full:
                devices = self._most(line)
                self._serve(line, devices, served, next_ns)
                free -= devices
            lines = [line for line in lines if line not in full]
        return free

    def _serve(self, line: Line, devices: float, served: list[Served], next_ns: float) -> None:
        """So many devices go to this tenant's next jobs."""
        if devices <= SPARE:
            return
        jobs = max(1, ceil(devices - SPARE))
        while len(line.served) < jobs and line.count:
            self._begin(line)
        jobs = min(jobs, len(line.served))
        served += [Served(line, rest, devices / jobs) for rest in line.served[:jobs]]
        if next_ns < inf:
            self._enter_ns = min(self._enter_ns, (next_ns - line.vtime_ns) * line.share / devices)

    def _begin(self, line: Line) -> None:
        ahead = self._ahead
        rest = line.take(ahead.learned)
        line.served.append(rest)
        ahead.note_start(rest, self._at_ns)
        handler = rest.job.handler
        if handler not in self._loaded and len(self._loaded) < self._room:
            rest.left_ns += ahead.load_ns(handler)
            self._loaded.add(handler)

    # --- time ---

    def _within_ns(self, served: list[Served], pace: float) -> float:
        """How long all this stays as it is."""
        others_ns = max(self._enter_ns, EVEN_NS)
        if self._joins:
            others_ns = min(others_ns, self._joins[-1][0] - self._at_ns)
        if self._ahead.asleep:
            others_ns = min(others_ns, self._ahead.asleep[0][0] - self._at_ns)
        within_ns = min([rest.left_ns / rate for _, rest, rate in served], default=inf) / pace
        self._stays = within_ns < others_ns
        return max(0.0, min(within_ns, others_ns))

    def _pace(self, served: list[Served]) -> float:
        """The part of the time that is left for work where handlers take turns on the devices."""
        handlers = {each.rest.job.handler for each in served}
        if len(handlers) <= self._room or not handlers:
            return 1.0
        ahead = self._ahead
        load_ns = sum(ahead.load_ns(name) for name in handlers) / len(handlers)
        turn_ns = max(ahead.slice_ns, load_ns / ahead.rules.swap_overhead_max)
        return turn_ns / (turn_ns + load_ns)

    def _move(self, served: list[Served], pace: float, within_ns: float) -> list[Served]:
        """Who is served after that, if their shares stay: the next job of a tenant takes the place of one that ends."""
        self._at_ns += within_ns
        self._enter_ns -= within_ns
        self._visits += MOVE + len(served)
        ended: list[int] = []
        for at, (line, rest, rate) in enumerate(served):
            work_ns = within_ns * rate * pace
            rest.left_ns -= work_ns
            line.vtime_ns += within_ns * rate / line.share
            self._doubt.note_work(rest, work_ns, self._devices)
            if rest.left_ns <= DONE_NS:
                ended.append(at)
        for at in ended:
            line, rest, rate = served[at]
            line.served.remove(rest)
            self._ahead.note_end(rest, self._at_ns, self._doubt)
            if self._stays and line.count and rate < 1:
                self._begin(line)
                served[at] = Served(line, line.served[-1], rate)
            else:
                self._stays = False
        return served


def _vtime_ns(line: Line) -> float:
    return line.vtime_ns
