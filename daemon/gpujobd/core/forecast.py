"""When will it start, when will it be done: the policy run ahead over measured rates.

    near   turn by turn, as the policy chooses: the first TURNS_MAX choices, 40 minutes of many tenants or days of few
    far    job by job: all who compete in a level have their shares of the devices at every moment

Who has what share of the time changes with the jobs that end and wake, not with the turns: so what a forecast costs
goes with the number of jobs, however long they are. It differs from the policy in this:

    far         a job starts when its share of a device begins, not with its turn: early by a round at most
    handlers    a device is taken to hold as many as it holds now; far ahead, loading is a part of the time
    in line     a tenant's jobs go in order, whatever is loaded; at its limit of devices, it asks none of its own back
    own order   a tenant's jobs keep it, also where the policy lets those for a loaded handler pass
    left out    aging, wait_max_s, deadlines, submissions still to come

Rule 1: only what was measured is promised. A handler's first job has a start and no end, and nobody has a time that
depends on such an end.
Rule 2: the finish that nine in ten keep. Jobs of one handler differ in the price of an item: the deviation of each
adds up as chances do, by squares, and that of their measured mean is in all of them alike. To 1.28 of these comes the
length of a turn where somebody else competes, and it is a twentieth of the time at least.
Rule 3: steps are short (STEP choices, about a millisecond): the caller keeps the loop turning in between. The lines
are copied at the first step; what changes later is seen by the next forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from copy import copy
from heapq import heapify, heappop, heappush
from typing import Final

import msgspec

from gpujobd.core import book, policy, residency
from gpujobd.core.ahead import Doubt, Line, Rest, Server
from gpujobd.core.fluid import Fluid
from gpujobd.core.model import Device, DeviceState, Job, JobState, Priority, Rules, State

TURNS_MAX: Final = 2_000
STEP: Final = 50
LEVELS: Final = (Priority.HIGH, Priority.NORMAL, Priority.LOW)
LATE_90_MIN: Final = 0.05

Steps = Generator[None, None, "dict[int, Outlook]"]


class Outlook(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is expected of one job. Times are wall-clock; 0: not known."""

    position: int  # among the queued: 1 is next; 0: it runs
    start_ns: int = 0
    finish_ns: int = 0
    finish_90_ns: int = 0


def forecast(state: State, rules: Rules, now_ns: int, extra: Job | None = None) -> Steps:
    """Yields between short steps; returns the outlook of every queued and running job. `extra`: as if queued."""
    ahead = Ahead(state, rules, now_ns, extra)
    yield
    yield from ahead.fill()
    yield from ahead.turn_by_turn()
    yield from ahead.job_by_job()
    yield from ahead.number_the_rest()
    return ahead.outlooks


_Entry = tuple[float, int, int, Line]


class Ahead:
    def __init__(self, state: State, rules: Rules, now_ns: int, extra: Job | None) -> None:
        self.state = state
        self.rules = rules
        self.now_ns = now_ns
        self.learned = {name: copy(learned) for name, learned in state.learned.items()}
        self.outlooks: dict[int, Outlook] = {}
        self.position = 0
        self.trusted = policy.may_start(state)  # false: only positions are known from here on
        self.extra = extra
        self.lines: dict[tuple[str, Priority], Line] = {}
        self.heaps: tuple[dict[str, list[_Entry]], ...] = (
            {},
            {},
            {},
        )  # by level: handler wanted next -> lines
        self.limits = {
            name: rule.running_devices_max
            for name, rule in rules.tenants.items()
            if rule.running_devices_max is not None
        }
        self.offers = 0  # keeps two entries from being compared by their lines
        self.slice_ns = policy.slice_ns(state, rules)  # looked at now and then
        self.startable = rules.handlers.keys() - policy.shut_out(state, rules, now_ns).keys()
        self.copies = [
            (name, level, handler, list(line))
            for name, lines in state.book.lines.items()
            for (level, handler), line in lines.items()
            if handler in self.startable
        ]
        self.stamps = list(state.book.asleep)
        self.asleep: list[tuple[float, int, Job]] = []
        self.servers: list[Server] = []
        self.agenda: list[tuple[float, int]] = []  # (when, which server) must choose
        for device in state.devices.values():
            self._serve(state, device)

    # --- what there is ---

    def fill(self) -> Iterator[None]:
        """Stand the jobs in line; those of handlers in backoff sleep until it is over, others of no use are left out."""
        wake = {name: learned.retry_at_ns for name, learned in self.learned.items()}
        standing: dict[tuple[str, Priority], list[list[Job]]] = {}
        for at, (name, level, handler, jobs) in enumerate(self.copies):
            if wake[handler] > self.now_ns:
                for queued in jobs:
                    self._put_to_bed(queued, wake[handler])
            else:
                standing.setdefault((name, level), []).append(jobs)
            if at % STEP == 0:
                yield
        for at, stamp in enumerate(self.stamps):
            job = self.state.jobs.get(stamp[1])
            if job is not None and job.handler in self.startable:
                self._put_to_bed(job, stamp[0])
            if at % (20 * STEP) == 0:
                yield
        self._add_extra(standing, wake)
        heapify(self.asleep)
        for at, ((name, level), several) in enumerate(standing.items()):
            line = self._line(name, level)
            line.stand(several)
            self._offer(line)
            if at % STEP == 0:
                yield

    def _add_extra(self, standing: dict[tuple[str, Priority], list[list[Job]]], wake: dict[str, int]) -> None:
        job = self.extra
        if job is None or job.handler not in self.startable:
            return
        wake_ns = max(job.wake_ns, wake.get(job.handler, 0))
        if wake_ns > self.now_ns:
            self._put_to_bed(job, wake_ns)
        else:
            standing.setdefault((job.tenant, job.priority), []).append([job])

    def _put_to_bed(self, job: Job, wake_ns: int) -> None:
        """Before heapify(). The time is a float: that of the forecast is one, and must reach it."""
        self.asleep.append((float(wake_ns), job.job_id, job))

    def _line(self, tenant: str, level: Priority) -> Line:
        line = self.lines.get((tenant, level))
        if line is None:
            known = self.state.tenants.get(tenant)
            vtime_ns: float = known.vtimes_ns[level] if known else 0
            if self.state.book.present.get(tenant, (0, 0, 0))[level] == 0:
                vtime_ns = max(vtime_ns, book.start_ns(self.state, level))
            line = self.lines[tenant, level] = Line(tenant, level, self.rules.share(tenant), vtime_ns)
        return line

    def _offer(self, line: Line) -> None:
        if line.count:
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
        if not residency.takes_any(state, self.rules, device):
            return
        server = Server(device)
        ready_ns = self.now_ns
        lease = device.lease
        if lease is not None:
            job = state.jobs[lease.job_id]
            server.line = self._line(lease.tenant, lease.level)
            server.rest = Rest(job, self.learned.get(job.handler))
            self.outlooks[job.job_id] = Outlook(position=0)
            uncharged_ns = policy.uncharged_ns(lease, self.now_ns)
            if server.rest.known:
                server.rest.left_ns = max(0, server.rest.left_ns - max(0, uncharged_ns - lease.loading_ns))
            server.line.vtime_ns += uncharged_ns / server.line.share
            turn_ns = device.turn.used_ns if device.turn else 0
            server.budget_ns = max(0, self.slice_ns - turn_ns - uncharged_ns)
            if not self.trusted and server.rest.known:  # nothing starts, but this goes on
                server.doubt.note_work(server.rest, server.rest.left_ns)
                self._note_end(server.rest, self.now_ns + server.rest.left_ns, server.doubt)
            if not lease.loaded:
                ready_ns += max(0, self.load_ns(job.handler) - lease.used_ns - uncharged_ns)
                server.doubt.note_load(self.learned[lease.handler])
                server.loaded.append(lease.handler)
        elif device.state is DeviceState.UNHEALTHY:
            ready_ns = max(ready_ns, device.retry_at_ns)
        heappush(self.agenda, (ready_ns, len(self.servers)))
        self.servers.append(server)

    # --- near: turn by turn ---

    def turn_by_turn(self) -> Iterator[None]:
        """Until nothing is left, or TURNS_MAX choices were made and job_by_job() takes over."""
        for turn in range(TURNS_MAX):
            if turn % STEP == 0:
                self.look_at_tenants()
                yield
            if not self.agenda:
                return
            at_ns, which = heappop(self.agenda)
            self._choose(self.servers[which], which, at_ns)

    def look_at_tenants(self) -> None:
        tenants = {line.tenant for line in self.lines.values() if line.count}
        tenants |= {server.line.tenant for server in self.servers if server.line is not None}
        self.slice_ns = policy.slice_of(max(1, len(tenants)), self.rules)

    def _choose(self, server: Server, which: int, at_ns: float) -> None:
        """One device at one moment: account for what it did, then go on with it or turn to somebody else."""
        self.wake(at_ns, self._floor_ns)
        self._account(server, at_ns)
        line, rest = server.line, server.rest
        if line is not None and (rest is not None or (line.count and self._swap_wait_ns(server, line) <= 0)):
            rival = self._rival(server, line)
            if not self._must_leave(server, line, rival):
                self._go_on(server, which, at_ns, line, rest or self._take(line), rival)
                return
        if line is not None:
            if rest is not None:
                line.give_back(rest)
            self._offer(line)
        server.line = server.rest = None
        best = self._best()
        if best is not None and self._swap_wait_ns(server, best) > 0:
            loaded = self._best(handlers=server.loaded)
            best = loaded if loaded is not None and loaded.level is best.level else best
        if best is not None:
            server.line = best
            server.budget_ns = self.slice_ns
            self._go_on(server, which, at_ns, best, self._take(best), self._rival(server, best))
        elif self.asleep:
            heappush(self.agenda, (max(at_ns + 1, self.asleep[0][0]), which))

    def _must_leave(self, server: Server, line: Line, rival: Line | None) -> bool:
        if rival is None or rival.level < line.level:
            return False
        if rival.level > line.level:
            return True
        earned = self._swap_wait_ns(server, rival) <= 0
        return server.budget_ns <= 0 and rival.vtime_ns <= line.vtime_ns and earned

    def _rival(self, server: Server, line: Line) -> Line | None:
        """Who could take the device from `line`: the best, or while that one's load is not earned, the best loaded."""
        rival = self._best(besides=line)
        if rival is None or rival.level is not line.level or self._swap_wait_ns(server, rival) <= 0:
            return rival
        loaded = self._best(besides=line, handlers=server.loaded)
        return loaded if loaded is not None and loaded.level is line.level else rival

    def _swap_wait_ns(self, server: Server, line: Line) -> float:
        job = line.next_job
        if job.handler in server.loaded or not server.loaded:
            return 0
        return self.load_ns(job.handler) / self.rules.swap_overhead_max - server.since_load_ns

    def load_ns(self, handler: str) -> int:
        learned = self.learned.get(handler)
        return learned.load_ns if learned else 0

    def _best(self, besides: Line | None = None, handlers: list[str] | None = None) -> Line | None:
        """The next line of the highest level, of those that want one of these handlers next."""
        for level in LEVELS:
            heaps = self.heaps[level]
            if not heaps:
                continue
            best: _Entry | None = None
            for name in heaps if handlers is None else handlers:
                top = self._top(level, name, besides)
                if top is not None and (best is None or top < best):
                    best = top
            if best is not None:
                return best[3]
        return None

    def _top(self, level: Priority, handler: str, besides: Line | None) -> _Entry | None:
        """First entry of a heap. Entries whose line has moved on are dropped here."""
        heap = self.heaps[level].get(handler)
        if not heap:
            return None
        aside: list[_Entry] = []
        top: _Entry | None = None
        while heap and top is None:
            vtime_ns, _, _, line = heap[0]
            if not line.count or vtime_ns != line.vtime_ns or line.next_job.handler != handler:
                heappop(heap)
                if line.offered == (vtime_ns, handler):
                    line.offered = None
            elif line is besides or self._has_all(line.tenant):
                aside.append(heappop(heap))
            else:
                top = heap[0]
        for entry in aside:
            heappush(heap, entry)
        return top

    def _has_all(self, tenant: str) -> bool:
        """Whether it runs on as many devices as it may."""
        most = self.limits.get(tenant)
        if most is None:
            return False
        return sum(s.line is not None and s.line.tenant == tenant for s in self.servers) >= most

    def _floor_ns(self, level: Priority) -> float:
        lines = [line for line in self.lines.values() if line.level is level and line.count]
        lines += [s.line for s in self.servers if s.line is not None and s.line.level is level]
        return min((line.vtime_ns for line in lines), default=self.state.vclocks_ns[level])

    def _take(self, line: Line) -> Rest:
        rest = line.take(self.learned)
        if len(self.servers) > 1:
            self._offer(line)  # to the other devices: this one has it anyway
        return rest

    def _go_on(
        self, server: Server, which: int, at_ns: float, line: Line, rest: Rest, rival: Line | None
    ) -> None:
        """Let `rest` run as far as nothing can change: its end, the turn's end, the next job that wakes."""
        self.note_start(rest, at_ns)
        load_ns = self._load(server, rest.job)
        server.budget_ns -= load_ns
        work_ns = rest.left_ns
        if rival is not None and rival.level is line.level:
            lead_ns = (rival.vtime_ns - line.vtime_ns) * line.share
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
        server.doubt.note_work(rest, work_ns)
        heappush(self.agenda, (at_ns + load_ns + work_ns, which))

    def _load(self, server: Server, job: Job) -> int:
        if job.handler in server.loaded:
            return 0
        server.loaded = [*server.loaded, job.handler][-server.room :]
        server.since_load_ns = 0
        learned = self.learned.get(job.handler)
        if learned is None:
            return 0
        server.doubt.note_load(learned)
        return learned.load_ns

    def _account(self, server: Server, at_ns: float) -> None:
        rest = server.rest
        if rest is None:
            return
        rest.left_ns -= server.work_ns
        server.work_ns = 0
        if rest.left_ns <= 0:
            server.rest = None
            self.note_end(rest, at_ns, server.doubt)

    # --- far: job by job ---

    def job_by_job(self) -> Iterator[None]:
        """What turn_by_turn() left over."""
        if not self.agenda:
            return
        for at_ns, which in self.agenda:
            server = self.servers[which]
            self._account(server, at_ns)
            if server.line is not None and server.rest is not None:
                server.line.give_back(server.rest)
            server.line = server.rest = None
        joins = [(float(at_ns), self.servers[which]) for at_ns, which in sorted(self.agenda)]
        self.agenda = []
        yield from Fluid(self, joins).run()

    def number_the_rest(self) -> Iterator[None]:
        """Where no device is left to start them, jobs have an order all the same."""
        self.trusted = False
        self.limits = {}
        while (line := self._best()) is not None:
            rest = self._take(line)
            self.note_start(rest, self.now_ns)
            line.vtime_ns += rest.left_ns / line.share
            self._offer(line)
            if self.position % STEP == 0:
                yield

    # --- what is found ---

    def wake(self, at_ns: float, floor_ns: Callable[[Priority], float]) -> None:
        """Stand in line who sleeps no longer; a tenant that comes with it starts at the least virtual time."""
        while self.asleep and self.asleep[0][0] <= at_ns:
            _, _, job = heappop(self.asleep)
            line = self.lines.get((job.tenant, job.priority))
            if line is None:
                share, vtime_ns = self.rules.share(job.tenant), floor_ns(job.priority)
                line = self.lines[job.tenant, job.priority] = Line(job.tenant, job.priority, share, vtime_ns)
            elif not (line.count or line.served):
                line.vtime_ns = max(line.vtime_ns, floor_ns(job.priority))
            line.join(job)
            self._offer(line)

    def note_start(self, rest: Rest, at_ns: float) -> None:
        if rest.start_ns or rest.job.state is JobState.RUNNING:
            return
        rest.start_ns = round(at_ns)
        self.position += 1
        rest.position = self.position
        start_ns = rest.start_ns if self.trusted else 0
        self.outlooks[rest.job.job_id] = Outlook(position=self.position, start_ns=start_ns)

    def note_end(self, rest: Rest, at_ns: float, doubt: Doubt) -> None:
        """If nothing unknown comes before it."""
        self.trusted = self.trusted and rest.known
        if self.trusted:
            self._note_end(rest, at_ns, doubt)

    def _note_end(self, rest: Rest, at_ns: float, doubt: Doubt) -> None:
        late_ns = doubt.late_90_ns()
        if len(self.lines) > 1:
            late_ns += self.slice_ns
        late_ns = max(late_ns, LATE_90_MIN * (at_ns - self.now_ns))
        self.outlooks[rest.job.job_id] = Outlook(
            position=rest.position,
            start_ns=rest.start_ns,
            finish_ns=round(at_ns),
            finish_90_ns=round(at_ns + late_ns),
        )
