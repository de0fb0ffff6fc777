"""What DESIGN.md, section 8, promises of who runs when, held against every step of a hall.

Nothing is asked of the policy: who waits, since when, and what could have been done instead is seen from the events and
the lines. The bounds are the ones of the design, made of these:

    L   the longest load      S   the longest slice    P   what a load must have earned:
    B   the longest batch     D   devices                  min(L / swap_overhead_max, wait_max_s)
    n   tenants, by priority

    turn = S + B + L, and where handlers do not fit together P + 2L + B more
    wait < max(wait_max_s, aging_s for each level above) + n * turn * largest share / least share
    lead < D * turn, and with several devices wait_max_s / least share more
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from fairness.hall import Hall
from gpujobd.core.events import (
    AnyEvent,
    HandlerLoaded,
    HandlerLoadFailed,
    Leased,
    LeaseLost,
    Progress,
)
from gpujobd.core.inputs import AnyInput, Submit, Tick
from gpujobd.core.model import S_NS, Job, JobState, Priority

OVERDUE_PART: Final = 0.5
LOOK_S: Final = 60.0
SLACK_S: Final = 2.0  # a tick may come so late, and moments are rounded


class Promises:
    def __init__(self, hall: Hall, steady: tuple[str, ...] = ()) -> None:
        """`steady`: tenants of the same share that always have more jobs at `normal` than there are devices."""
        self.hall = hall
        self.steady = steady
        self.waits_since: dict[tuple[str, Priority], float] = {}
        self.seconds: dict[tuple[str, Priority], float] = defaultdict(float)
        self.since_load_s: dict[str, float] = defaultdict(float)
        self.there_since: dict[str, float] = {}  # tenants that have work
        self.tried: dict[int, int] = {}  # job -> items tried
        self.lead_at_start: dict[tuple[str, str], float] = {}
        self.lines: set[tuple[str, Priority]] = set()  # who ever submitted at which priority
        self.urgent: dict[int, float] = {}  # job -> when it must compute
        self.unearned_s = 0.0
        self.look_s = 0.0  # when what costs more is looked at again
        self.seen: dict[str, float] = defaultdict(float)  # the worst of each promise, as a part of its bound
        kinds = [kind for kind in hall.kinds.values() if not kind.fails_s]
        self.load_s = max(max(kind.load_s * (1 + kind.spread), kind.fails_s) for kind in hall.kinds.values())
        self.batch_s = max(kind.batch_s * (1 + kind.spread) for kind in kinds)
        hall.watchers.append(self.watch)

    # --- the bounds ---

    @property
    def turn_s(self) -> float:
        """What one tenant may get before the next: S, and where loads have a price P, 2L and B more for that; B and L."""
        rules = self.hall.rules
        turn_s = rules.slice_ns / S_NS + self.batch_s + self.load_s + SLACK_S
        if len(self.hall.kinds) > self.hall.room:
            price_s = min(self.load_s / rules.swap_overhead_max, rules.wait_max_ns / S_NS)
            turn_s += price_s + 2 * self.load_s + self.batch_s
        return turn_s

    def wait_max_s(self, priority: Priority) -> float:
        """Until a tenant with work at this priority has a device and gets on."""
        rules = self.hall.rules
        above = {level for _, level in self.lines if level > priority}
        shares = [rules.share(tenant) for tenant, _ in self.lines]
        patience_s = max(rules.wait_max_ns, len(above) * rules.aging_ns) / S_NS
        return patience_s + len(self.lines) * self.turn_s * max(shares) / min(shares)

    @property
    def lead_max_s(self) -> float:
        """By which one of two equal tenants may be ahead; infinite where visitors may make loads be done again."""
        rules, devices = self.hall.rules, len(self.hall.state.devices)
        if len(self.hall.kinds) > self.hall.room and {name for name, _ in self.lines} != set(self.steady):
            return float("inf")
        credit_s = rules.wait_max_ns / S_NS / rules.least_share if devices > 1 else 0.0
        return devices * self.turn_s + credit_s

    # --- what happens ---

    def watch(self, given: AnyInput, events: list[AnyEvent]) -> None:
        for event in events:
            self._note(event)
        if isinstance(given, Submit):
            job = self.hall.job(self.hall.state.next_job_id - 1)
            self.lines.add((job.tenant, job.priority))
            self._urgent(job)
        if isinstance(given, Tick) and not events:
            self._settled()

    def _note(self, event: AnyEvent) -> None:
        if isinstance(event, Leased):
            self._leased(event)
        elif isinstance(event, HandlerLoaded):
            self.since_load_s[event.device] = 0.0
            self._computes(event.device)
        elif isinstance(event, Progress | LeaseLost | HandlerLoadFailed):
            job = self.hall.job(event.job_id)
            used_s = event.used_ns / S_NS
            self.seconds[job.tenant, job.level] += used_s
            self.since_load_s[job.device] += used_s
            if self._got_on(event):
                self.waits_since.pop((job.tenant, job.priority), None)

    def _got_on(self, event: Progress | LeaseLost | HandlerLoadFailed) -> bool:
        """Whether something was tried, if only to load."""
        if not isinstance(event, Progress):
            return True
        before, self.tried[event.job_id] = self.tried.get(event.job_id, 0), event.checkpoint.upto
        return event.checkpoint.upto > before

    def _settled(self) -> None:
        self._note_who_is_there()
        self._check_conserved()
        if self.hall.clock_s >= self.look_s:
            self.look_s = self.hall.clock_s + LOOK_S
            self._check_limits()
            self._check_waits()
            self._check_leads()
        for job_id, due_s in self.urgent.items():
            assert self.hall.clock_s <= due_s, f"urgent job {job_id} does not compute yet"

    # --- work is conserved, limits hold ---

    def _runnable(self, tenant: str) -> list[tuple[Priority, str]]:
        hall = self.hall
        rule = hall.rules.tenants.get(tenant)
        if rule and rule.running_devices_max is not None:
            leases = [device.lease for device in hall.state.devices.values() if device.lease]
            if sum(lease.tenant == tenant for lease in leases) >= rule.running_devices_max:
                return []
        return [
            (base, handler)
            for base, handler in hall.state.book.lines.get(tenant, {})
            if hall.state.learned[handler].retry_at_ns <= hall.now_ns
        ]

    def _check_conserved(self) -> None:
        if all(device.lease for device in self.hall.state.devices.values()):
            return
        for tenant in self.hall.state.book.lines:
            assert not self._runnable(tenant), f"a device is idle, and {tenant} has work"

    def _check_limits(self) -> None:
        on: dict[str, int] = defaultdict(int)
        for device in self.hall.state.devices.values():
            if device.lease:
                on[device.lease.tenant] += 1
        for name, rule in self.hall.rules.tenants.items():
            if rule.running_devices_max is not None:
                assert on[name] <= rule.running_devices_max, f"{name} runs on {on[name]} devices"

    # --- nobody starves ---

    def _check_waits(self) -> None:
        now_s = self.hall.clock_s
        waiting = {
            (tenant, base) for tenant in self.hall.state.book.lines for base, _ in self._runnable(tenant)
        }
        for key in self.waits_since.keys() - waiting:
            if not self._runs(*key):
                del self.waits_since[key]
        for key in waiting:
            waited_s = now_s - self.waits_since.setdefault(key, now_s)
            if waited_s > LOOK_S:
                self._hold(f"wait at {key[1].name.lower()}", waited_s, self.wait_max_s(key[1]), key[0])

    def _runs(self, tenant: str, base: Priority) -> bool:
        leases = [device.lease for device in self.hall.state.devices.values() if device.lease]
        return any(
            lease.tenant == tenant and self.hall.job(lease.job_id).priority is base for lease in leases
        )

    def _hold(self, what: str, value: float, bound: float, whose: str) -> None:
        self.seen[what] = max(self.seen[what], value / bound)
        assert value <= bound, f"{what} of {whose}: {value:.1f} s, the bound is {bound:.1f} s"

    # --- equals get the same ---

    def _check_leads(self) -> None:
        normal = Priority.NORMAL
        for other in {name for name, level in self.seconds if level is normal}:
            for mine in self.steady:
                if other == mine or self.hall.rules.share(other) != self.hall.rules.share(mine):
                    continue
                lead_s = self.seconds[other, normal] - self.seconds[mine, normal]
                if not self._present(other):
                    self.lead_at_start.pop((other, mine), None)
                    continue
                if other in self.steady:
                    self._hold("lead", lead_s, self.lead_max_s, f"{other} before {mine}")
                    continue
                # A newcomer starts beside the last: those who were ahead of it let it catch up first.
                gained_s = lead_s - self.lead_at_start.setdefault((other, mine), lead_s)
                self._hold("gain", gained_s, 2 * self.lead_max_s, f"{other} before {mine}")

    def _present(self, tenant: str) -> bool:
        lines = self.hall.state.book.lines.get(tenant, {})
        leases = [device.lease for device in self.hall.state.devices.values() if device.lease]
        return any(base is Priority.NORMAL for base, _ in lines) or any(
            lease.tenant == tenant and lease.level is Priority.NORMAL for lease in leases
        )

    # --- loads are earned ---

    def _note_who_is_there(self) -> None:
        leases = [device.lease for device in self.hall.state.devices.values() if device.lease]
        there = {*self.hall.state.book.lines, *(lease.tenant for lease in leases)}
        now_s = self.hall.clock_s
        self.there_since = {name: self.there_since.get(name, now_s) for name in there}

    def _leased(self, event: Leased) -> None:
        hall, job = self.hall, self.hall.job(event.job_id)
        device = hall.state.devices[event.device]
        if job.handler in device.loaded:
            self._computes(event.device)
            return
        learned = hall.state.learned[job.handler]
        if not device.loaded or not learned.load_ns or self._is_earned(job, event.device):
            return
        for tenant in hall.state.book.lines:
            for base, handler in self._runnable(tenant):
                assert base < event.level or handler not in device.loaded, (
                    f"{job.handler} is loaded for {job.tenant}, unearned, while {tenant} has work for {handler}"
                )

    def _is_earned(self, job: Job, device: str) -> bool:
        load_s = self.hall.state.learned[job.handler].load_ns / S_NS
        used_s = self.since_load_s[device] + SLACK_S
        part = self.hall.rules.swap_overhead_max
        since_s = self.there_since.get(job.tenant, self.hall.clock_s)
        if self.hall.clock_s - since_s + LOOK_S >= self.hall.rules.wait_max_ns / S_NS:
            part = max(part, OVERDUE_PART)
        return used_s >= load_s / part

    # --- what is urgent starts at once ---

    def _urgent(self, job: Job) -> None:
        """A job that comes alone at `high`, with a device that runs something else, must compute within a batch and a load."""
        if job.priority is not Priority.HIGH:
            return
        self.urgent.clear()  # it is not alone any more
        if job.state is not JobState.QUEUED:
            return
        if self.hall.state.book.ready[Priority.HIGH] > 1 or not self._runnable(job.tenant):
            return
        if any(self._high(device.lease) for device in self.hall.state.devices.values()):
            return
        kind = self.hall.kinds[job.handler]
        if kind.fails_s:
            return
        load_s = kind.load_s * (1 + kind.spread)
        self.urgent[job.job_id] = self.hall.clock_s + self.batch_s + load_s + SLACK_S

    def _high(self, lease: object) -> bool:
        return lease is not None and (
            getattr(lease, "level") is Priority.HIGH  # noqa: B009
            or self.hall.job(getattr(lease, "job_id")).priority is Priority.HIGH  # noqa: B009
        )

    def _computes(self, device: str) -> None:
        lease = self.hall.state.devices[device].lease
        if lease is not None:
            self.urgent.pop(lease.job_id, None)
