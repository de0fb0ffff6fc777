"""When will it start, when will it be done: the policy run ahead over measured rates.

The run-ahead moves every device from one choice to the next: the tenant with the least virtual time of the highest
level gets a turn, its jobs are worked off in it, the clock moves on. It differs from the policy itself in this:

    turns       no shorter than all work / STEPS_MAX, so that a long queue costs no more than a short one
    handlers    a device is taken to hold as many as it holds now
    left out    aging, wait_max_s, submissions still to come

Rule 1: only what was measured is promised. A handler's first job has a start and no end, and nobody has a time that
depends on such an end.
Rule 2: the finish that nine in ten keep: every second of work ahead is late by 1.6 times the mean distance of its
handler's item prices from their mean (1.28 standard deviations, at 1.25 mean distances each), all of them together;
and by a tenth at least.
Rule 3: steps are short (STEP choices, about a millisecond): the caller keeps the loop turning in between. The lines
are copied at the first step; what changes later is seen by the next forecast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from copy import copy
from heapq import heapify, heappop, heappush, merge
from itertools import chain
from typing import Final

import msgspec

from gpujobd.core import book, policy
from gpujobd.core.model import Device, DeviceState, Job, JobState, Priority, Rules, State

STEPS_MAX: Final = 10_000
STEP: Final = 100
LEVELS: Final = (Priority.HIGH, Priority.NORMAL, Priority.LOW)
LATE_90: Final = 1.6
LATE_90_MIN: Final = 0.1

Steps = Generator[None, None, "dict[int, Outlook]"]


class Outlook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is expected of one job. Times are wall-clock; 0: not known."""

    position: int  # among the queued: 1 is next; 0: it runs
    start_ns: int = 0
    finish_ns: int = 0
    finish_90_ns: int = 0


def forecast(state: State, rules: Rules, now_ns: int, extra: Job | None = None) -> Steps:
    """Yields between short steps; returns the outlook of every queued and running job. `extra`: as if queued."""
    ahead = _Ahead(state, rules, now_ns, extra)
    yield
    yield from ahead.measure()
    yield from ahead.run()
    return ahead.outlooks


class _Rest:
    """What is left of one job."""

    __slots__ = ("job", "known", "left_ns", "position", "start_ns")

    def __init__(self, job: Job, item_ns: int) -> None:
        self.job = job
        self.known = item_ns > 0
        self.left_ns = job.left * (item_ns or policy.ITEM_GUESS_NS)
        self.position = 0
        self.start_ns = 0


class _Line:
    """What one tenant still wants at one level."""

    __slots__ = ("level", "offered", "returned", "share", "tenant", "vtime_ns", "waiting")

    def __init__(self, tenant: str, level: Priority, share: float, vtime_ns: float) -> None:
        self.tenant = tenant
        self.level = level
        self.share = share
        self.vtime_ns = vtime_ns
        self.offered: tuple[float, str] | None = None  # virtual time and handler of its newest entry
        self.waiting: deque[Job] = deque()
        self.returned: list[_Rest] = []  # jobs that were begun, the next one last

    def __bool__(self) -> bool:
        return bool(self.returned or self.waiting)

    @property
    def next_job(self) -> Job:
        return self.returned[-1].job if self.returned else self.waiting[0]


_Entry = tuple[float, int, int, _Line]


class _Server:
    """One device, running ahead."""

    __slots__ = ("budget_ns", "late_ns", "line", "loaded", "rest", "room", "since_load_ns", "work_ns")

    def __init__(self, device: Device) -> None:
        self.loaded = list(device.loaded)
        self.room = max(1, len(self.loaded))
        self.since_load_ns = device.since_load_ns
        self.line: _Line | None = None  # whose turn it is
        self.budget_ns = 0  # of the turn
        self.rest: _Rest | None = None  # what it runs
        self.work_ns = 0  # how much of that this step does
        self.late_ns = 0.0  # of rule 2, summed up


class _Ahead:
    def __init__(self, state: State, rules: Rules, now_ns: int, extra: Job | None) -> None:
        self.rules = rules
        self.now_ns = now_ns
        self.learned = {name: copy(learned) for name, learned in state.learned.items()}
        self.outlooks: dict[int, Outlook] = {}
        self.position = 0
        self.trusted = policy.may_start(state)  # false: only positions are known from here on
        self.quantum_ns = 0
        self.lines: dict[tuple[str, Priority], _Line] = {}
        self.heaps: tuple[dict[str, list[_Entry]], ...] = (
            {},
            {},
            {},
        )  # by level: handler wanted next -> lines
        self.offers = 0  # keeps two entries from being compared by their lines
        self.tenants = 1  # that compete; looked at now and then
        self.asleep: list[tuple[int, int, Job]] = []
        self._fill(state, extra)
        self.servers: list[_Server] = []
        self.agenda: list[tuple[int, int]] = []  # (when, which server) must choose
        for device in state.devices.values():
            self._serve(state, device)

    # --- what there is ---

    def _fill(self, state: State, extra: Job | None) -> None:
        """Copy the lines; jobs of handlers in backoff sleep until it is over, others of no use are left out."""
        wake = {name: learned.retry_at_ns for name, learned in self.learned.items()}
        for name, lines in state.book.lines.items():
            by_level: dict[Priority, list[list[Job]]] = {}
            for (level, handler), line in lines.items():
                if handler not in self.rules.handlers:
                    continue
                if wake[handler] > self.now_ns:
                    self.asleep += [(wake[handler], job.job_id, job) for job in line]
                else:
                    by_level.setdefault(level, []).append(line)
            for level, several in by_level.items():
                merged = merge(*several, key=policy.LINE_KEY)
                self._line(state, name, level).waiting.extend(several[0] if len(several) == 1 else merged)
        self.asleep += [(wake_ns, job_id, state.jobs[job_id]) for wake_ns, job_id in state.book.asleep]
        if extra is not None:
            self._add_extra(state, extra)
        heapify(self.asleep)
        for offered in self.lines.values():
            self._offer(offered)

    def _add_extra(self, state: State, job: Job) -> None:
        if job.wake_ns > self.now_ns:
            self.asleep.append((job.wake_ns, job.job_id, job))
        elif job.handler in self.rules.handlers:
            self._line(state, job.tenant, job.priority).waiting.append(job)

    def _line(self, state: State, tenant: str, level: Priority) -> _Line:
        line = self.lines.get((tenant, level))
        if line is None:
            known = state.tenants.get(tenant)
            vtime_ns = known.vtimes_ns[level] if known else 0
            if state.book.present.get(tenant, (0, 0, 0))[level] == 0:
                vtime_ns = max(vtime_ns, book.start_ns(state, level))
            line = self.lines[tenant, level] = _Line(tenant, level, self.rules.share(tenant), vtime_ns)
        return line

    def _offer(self, line: _Line) -> None:
        if line:
            job = line.next_job
            offer = (line.vtime_ns, job.handler)
            if line.offered == offer:
                return  # the entry is there: a second one would only have to be dropped later
            line.offered = offer
            self.offers += 1
            heap = self.heaps[line.level].setdefault(job.handler, [])
            heappush(heap, (line.vtime_ns, job.line_key, self.offers, line))

    def _serve(self, state: State, device: Device) -> None:
        """Let a device take part, from when it can; what it runs now it goes on with for the rest of the turn."""
        if device.state is DeviceState.BUSY_ELSEWHERE:
            return
        server = _Server(device)
        ready_ns = self.now_ns
        lease = device.lease
        if lease is not None:
            job = state.jobs[lease.job_id]
            server.line = self._line(state, lease.tenant, lease.level)
            server.rest = self._rest(job)
            self.outlooks[job.job_id] = Outlook(position=0)
            uncharged_ns = policy.uncharged_ns(lease, self.now_ns)
            if server.rest.known:
                server.rest.left_ns = max(0, server.rest.left_ns - max(0, uncharged_ns - lease.loading_ns))
            server.line.vtime_ns += uncharged_ns / server.line.share
            turn_ns = device.turn.used_ns if device.turn else 0
            server.budget_ns = max(0, policy.slice_ns(state, self.rules) - turn_ns - uncharged_ns)
            if not self.trusted and server.rest.known:  # nothing starts, but this goes on
                self._finished(
                    server.rest, self.now_ns + server.rest.left_ns, LATE_90_MIN * server.rest.left_ns
                )
            if not lease.loaded:
                ready_ns += max(0, self.learned[lease.handler].load_ns - lease.used_ns - uncharged_ns)
                server.loaded.append(lease.handler)
        elif device.state is DeviceState.UNHEALTHY:
            ready_ns = max(ready_ns, device.retry_at_ns)
        heappush(self.agenda, (ready_ns, len(self.servers)))
        self.servers.append(server)

    def _rest(self, job: Job) -> _Rest:
        learned = self.learned.get(job.handler)
        return _Rest(job, learned.item_ns if learned else 0)

    # --- running ahead ---

    def measure(self) -> Iterator[None]:
        """Find the shortest turn that keeps the number of steps bounded."""
        total_ns = 0
        prices = {name: learned.item_ns or policy.ITEM_GUESS_NS for name, learned in self.learned.items()}
        jobs = chain.from_iterable(line.waiting for line in list(self.lines.values()))
        for at, job in enumerate(jobs):
            total_ns += job.left * prices.get(job.handler, policy.ITEM_GUESS_NS)
            if at % (20 * STEP) == 0:
                yield
        self.quantum_ns = total_ns // (STEPS_MAX * max(1, len(self.servers)))

    def run(self) -> Iterator[None]:
        steps = 0
        while self.agenda:
            if steps % STEP == 0:
                self.tenants = max(1, len({line.tenant for line in self.lines.values() if line}))
                yield
            at_ns, which = heappop(self.agenda)
            self._choose(self.servers[which], which, at_ns)
            steps += 1
        yield from self._number_the_rest()

    def _choose(self, server: _Server, which: int, at_ns: int) -> None:
        """One device at one moment: account for what it did, then go on with it or turn to somebody else."""
        self._wake(at_ns)
        self._account(server, at_ns)
        line, rest = server.line, server.rest
        if line is not None and (rest is not None or line):
            rival = self._rival(server, line)
            if not self._must_leave(server, line, rival):
                self._go_on(server, which, at_ns, line, rest or self._take(line), rival)
                return
        if line is not None:
            if rest is not None:
                line.returned.append(rest)
            self._offer(line)
        server.line = server.rest = None
        best = self._best()
        if best is not None and self._swap_wait_ns(server, best) > 0:
            loaded = self._best(handlers=server.loaded)
            best = loaded if loaded is not None and loaded.level is best.level else best
        if best is not None:
            self._begin(server, best)
            self._go_on(server, which, at_ns, best, self._take(best), self._rival(server, best))
        elif self.asleep:
            heappush(self.agenda, (max(at_ns + 1, self.asleep[0][0]), which))

    def _must_leave(self, server: _Server, line: _Line, rival: _Line | None) -> bool:
        if rival is None or rival.level < line.level:
            return False
        if rival.level > line.level:
            return True
        earned = self._swap_wait_ns(server, rival) <= 0
        return server.budget_ns <= 0 and rival.vtime_ns <= line.vtime_ns and earned

    def _rival(self, server: _Server, line: _Line) -> _Line | None:
        """Who could take the device from `line`: the best, or while that one's load is not earned, the best loaded."""
        rival = self._best(besides=line)
        if rival is None or rival.level is not line.level or self._swap_wait_ns(server, rival) <= 0:
            return rival
        loaded = self._best(besides=line, handlers=server.loaded)
        return loaded if loaded is not None and loaded.level is line.level else rival

    def _swap_wait_ns(self, server: _Server, line: _Line) -> int:
        job = line.next_job
        if job.handler in server.loaded or not server.loaded:
            return 0
        return round(self._load_ns(job) / self.rules.swap_overhead_max) - server.since_load_ns

    def _load_ns(self, job: Job) -> int:
        learned = self.learned.get(job.handler)
        return learned.load_ns if learned else 0

    def _best(self, besides: _Line | None = None, handlers: list[str] | None = None) -> _Line | None:
        """The next line of the highest level, of those that want one of these handlers next."""
        for level in LEVELS:
            heaps = self.heaps[level]
            if not heaps:
                continue
            tops = [self._top(level, name, besides) for name in (heaps if handlers is None else handlers)]
            best = min((top for top in tops if top is not None), default=None)
            if best is not None:
                return best[3]
        return None

    def _top(self, level: Priority, handler: str, besides: _Line | None) -> _Entry | None:
        """First entry of a heap. Entries whose line has moved on are dropped here."""
        heap = self.heaps[level].get(handler, [])
        aside: _Entry | None = None
        top: _Entry | None = None
        while heap and top is None:
            vtime_ns, _, _, line = heap[0]
            if not line or vtime_ns != line.vtime_ns or line.next_job.handler != handler:
                heappop(heap)
                if line.offered == (vtime_ns, handler):
                    line.offered = None
            elif line is besides:
                aside = heappop(heap)
            else:
                top = heap[0]
        if aside is not None:
            heappush(heap, aside)
        return top

    def _begin(self, server: _Server, line: _Line) -> None:
        """A new turn."""
        slice_ns = min(self.rules.slice_ns, max(policy.SLICE_MIN_NS, policy.ROUND_NS // self.tenants))
        server.line = line
        server.budget_ns = max(slice_ns, self.quantum_ns)

    def _take(self, line: _Line) -> _Rest:
        rest = line.returned.pop() if line.returned else self._rest(line.waiting.popleft())
        if len(self.servers) > 1:
            self._offer(line)  # to the other devices: this one has it anyway
        return rest

    def _go_on(
        self, server: _Server, which: int, at_ns: int, line: _Line, rest: _Rest, rival: _Line | None
    ) -> None:
        """Let `rest` run as far as nothing can change: its end, the turn's end, the next job that wakes."""
        self._started(rest, at_ns)
        load_ns = self._load(server, rest.job)
        server.budget_ns -= load_ns
        work_ns = rest.left_ns
        if rival is not None and rival.level is line.level:
            lead_ns = round((rival.vtime_ns - line.vtime_ns) * line.share)
            swap_ns = self._swap_wait_ns(server, rival)
            work_ns = min(work_ns, max(server.budget_ns, lead_ns, swap_ns, policy.SLICE_MIN_NS))
        if self.asleep:
            work_ns = min(work_ns, max(self.asleep[0][0] - at_ns - load_ns, policy.SLICE_MIN_NS))
        server.rest, server.work_ns = rest, work_ns
        line.vtime_ns += (load_ns + work_ns) / line.share
        if len(self.servers) > 1:
            self._offer(line)
        server.budget_ns -= work_ns
        server.since_load_ns += load_ns + work_ns
        server.late_ns += (load_ns + work_ns) * self._lateness(rest.job)
        heappush(self.agenda, (at_ns + load_ns + work_ns, which))

    def _started(self, rest: _Rest, at_ns: int) -> None:
        if rest.start_ns or rest.job.state is JobState.RUNNING:
            return
        rest.start_ns = at_ns
        self.position += 1
        rest.position = self.position
        start_ns = at_ns if self.trusted else 0
        self.outlooks[rest.job.job_id] = Outlook(position=self.position, start_ns=start_ns)

    def _load(self, server: _Server, job: Job) -> int:
        if job.handler in server.loaded:
            return 0
        server.loaded = [*server.loaded, job.handler][-server.room :]
        server.since_load_ns = 0
        return self._load_ns(job)

    def _lateness(self, job: Job) -> float:
        learned = self.learned.get(job.handler)
        spread = learned.item_spread_ns / learned.item_ns if learned and learned.item_ns else 0.0
        return max(LATE_90_MIN, LATE_90 * spread)

    def _account(self, server: _Server, at_ns: int) -> None:
        rest = server.rest
        if rest is None:
            return
        rest.left_ns -= server.work_ns
        server.work_ns = 0
        if rest.left_ns > 0:
            return
        server.rest = None
        self.trusted = self.trusted and rest.known
        if self.trusted:
            self._finished(rest, at_ns, server.late_ns)

    def _finished(self, rest: _Rest, at_ns: int, late_ns: float) -> None:
        self.outlooks[rest.job.job_id] = Outlook(
            position=rest.position,
            start_ns=rest.start_ns,
            finish_ns=at_ns,
            finish_90_ns=at_ns + round(late_ns),
        )

    def _wake(self, at_ns: int) -> None:
        while self.asleep and self.asleep[0][0] <= at_ns:
            _, _, job = heappop(self.asleep)
            line = self.lines.get((job.tenant, job.priority))
            tops = [self._top(job.priority, name, None) for name in self.heaps[job.priority]]
            floor_ns = min((top[0] for top in tops if top is not None), default=0.0)
            if line is None:
                line = _Line(job.tenant, job.priority, self.rules.share(job.tenant), floor_ns)
                self.lines[job.tenant, job.priority] = line
            elif not line:
                line.vtime_ns = max(line.vtime_ns, floor_ns)
            line.waiting.append(job)
            self._offer(line)

    def _number_the_rest(self) -> Iterator[None]:
        """Where no device is left to start them, jobs have an order all the same."""
        self.trusted = False
        while (line := self._best()) is not None:
            rest = self._take(line)
            self._started(rest, self.now_ns)
            line.vtime_ns += rest.left_ns / line.share
            self._offer(line)
            if self.position % STEP == 0:
                yield
