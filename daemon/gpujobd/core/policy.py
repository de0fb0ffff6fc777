"""Who runs next, for how long, and why somebody waits. Pure choices over the state; nothing here writes.

A claim is the head of one line: a tenant's next job for one handler at one priority. Claims are ordered by

    1. level         high, normal, low; a tenant that got nothing at a priority for `aging_s` claims one level up
    2. virtual time  device time over share, per level; least first
    3. waiting       who was not served for longest; then the earlier submission

Rule 1: a device that is free gets a job if any can run: no rule keeps it idle.
Rule 2: a turn lasts `slice_s`, less with many tenants or a smaller share, and goes on over several jobs of its tenant.
It ends for the next claim only, if that has no more virtual time than the tenant that runs: with nobody there it goes
on. While a handler loads no turn ends: what is begun would have to be done again.
Rule 3: a claim that needs another handler waits until the device has been used for load time / `swap_overhead_max`
since it last loaded one, so that loading takes at most that part of the time. Meanwhile only claims on loaded
handlers go before it, the tenant's own among them: each load waits for its own price and for no other. Only the
absence of such work and a higher level beat this. To who got nothing for `wait_max_s` it is cheaper: loading may then
take half of the time.
Rule 4: a higher level is asked for at once, whatever the turn. More yields than there are claims are never asked for.
Rule 5: a tenant on `running_devices_max` devices claims nothing but a device of its own that runs a lower level.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace
from itertools import chain, groupby
from operator import attrgetter
from typing import Final

import msgspec

from gpujobd.core import book, residency
from gpujobd.core.leases import devices_left, devices_of, rests
from gpujobd.core.model import (
    S_NS,
    Device,
    DeviceState,
    Job,
    JobState,
    Lease,
    Line,
    Priority,
    Reason,
    Rules,
    State,
    YieldWhy,
)

SLICE_MIN_NS: Final = 5 * S_NS
ROUND_NS: Final = 120 * S_NS  # many tenants share two minutes: a newcomer's turn comes about then
NO_SPACE: Final = "no space left where inputs and outputs are kept"
STARTED: Final = "an administrator starts the queue"
HOLDS: Final[dict[Reason, str]] = {
    Reason.HELD_BY_OWNER: "until somebody resumes it",
    Reason.HELD_BY_ADMIN: "until an administrator resumes it",
    Reason.OUTPUT_DAMAGED: "until somebody resumes it; its outputs are not what its checkpoint says",
    Reason.DAEMON_STOPPING: "until gpujobd starts again, or somebody resumes it",
}
LINE_KEY: Final = attrgetter("line_key")
OVERDUE_PART: Final = (
    0.5  # of a device, that loading may take when all are overdue: as much is worked as is loaded
)
ITEM_GUESS_NS: Final = S_NS  # price of an item nothing is known about; orders jobs, never shown


class Claim(msgspec.Struct, frozen=True, gc=False):
    """The next job of one line, and how many could run with it."""

    level: Priority
    vtime_ns: int
    waits_since_ns: int
    overdue: bool  # for longer than `wait_max_s`
    job: Job
    jobs: int

    def key(self) -> tuple[int, int, int, int]:
        return (-self.level, self.vtime_ns, self.waits_since_ns, self.job.line_key)


class Survey(msgspec.Struct, frozen=True):
    """One look at everybody who waits: all claims, best first, and what keeps others from claiming."""

    claims: list[Claim]
    blocked: dict[str, str]  # handler -> why
    held: list[Claim]  # of tenants that run on as many devices as they may


def survey(state: State, rules: Rules, now_ns: int) -> Survey:
    """Cost: the number of lines, whatever the number of jobs."""
    look = _Look(state, rules, now_ns)
    claims: list[Claim] = []
    held: list[Claim] = []
    for name, lines in state.book.lines.items():
        (claims if devices_left(state, rules, name) > 0 else held).extend(look.claims_of(name, lines))
    claims.sort(key=Claim.key)
    held.sort(key=Claim.key)
    return Survey(claims, look.blocked, held)


def blocked_handlers(state: State, rules: Rules, now_ns: int) -> dict[str, str]:
    """Handlers in backoff after a failed load, without a device that takes them, or not configured any more."""
    blocked = {name: detail for name, (_, detail) in shut_out(state, rules, now_ns).items()}
    for name, learned in state.learned.items():
        if name not in rules.handlers:
            blocked[name] = f"handler {name} is not configured"
        elif rests(learned.retry_at_ns, now_ns):
            wait_s = (learned.retry_at_ns - now_ns) / S_NS
            blocked[name] = f"handler {name} failed to load, next try in {wait_s:.0f} s: {learned.failure}"
    return blocked


def shut_out(state: State, rules: Rules, now_ns: int) -> dict[str, tuple[Reason, str]]:
    """Handlers that no usable device takes, for its driver or for the memory that others hold there; and why."""
    if all(residency.takes_all(device) for device in state.devices.values()):
        return {}
    devices = [device for device in state.devices.values() if usable(device, now_ns)]
    return {
        name: _shut_reason(devices)
        for name in rules.handlers
        if devices and not any(residency.takes(state, rules, device, name) for device in devices)
    }


def _shut_reason(devices: list[Device]) -> tuple[Reason, str]:
    """For everybody's eyes: what an unhealthy device is told to have may be a worker's words, which quote an item."""
    crowded = [device for device in devices if device.state is not DeviceState.DRIVER_MISMATCH]
    if not crowded:
        return Reason.DEVICE_UNHEALTHY, f"{devices[0].name}: {devices[0].reason_detail or devices[0].reason}"
    first = crowded[0]
    told = first.reason_detail if first.state is DeviceState.BUSY_ELSEWHERE else ""
    return Reason.DEVICE_BUSY_ELSEWHERE, f"{first.name}: {told or residency.left(first)}"


class _Look:
    """What is the same for all claims of one survey."""

    def __init__(self, state: State, rules: Rules, now_ns: int) -> None:
        self.state = state
        self.rules = rules
        self.now_ns = now_ns
        self.blocked = blocked_handlers(state, rules, now_ns)
        self.runs: set[tuple[str, Priority]] = set()  # tenants, and the priorities of their jobs that run
        self.promised_ns: dict[tuple[str, Priority], int] = {}  # to what runs: until now, and a turn from now
        for device in state.devices.values():
            if (lease := device.lease) is not None:
                self.runs.add((lease.tenant, state.jobs[lease.job_id].priority))
                key = (lease.tenant, lease.level)
                more_ns = uncharged_ns(lease, now_ns) + turn_ns(state, rules, lease.tenant)
                self.promised_ns[key] = self.promised_ns.get(key, 0) + more_ns

    def claims_of(self, name: str, lines: dict[tuple[Priority, str], Line]) -> Iterator[Claim]:
        """A claim a line. Those of one priority have waited together: the tenant is the one to be served."""
        open_lines = [(key[0], line) for key, line in lines.items() if key[1] not in self.blocked]
        open_lines.sort(key=_first_first)
        since_ns: dict[Priority, int] = {}
        for base, line in open_lines:
            if base not in since_ns:
                since_ns[base] = self._waits_since_ns(name, base, line[0])
            yield self._claim(name, base, since_ns[base], line)

    def _waits_since_ns(self, name: str, base: Priority, first: Job) -> int:
        """A time that lies further ahead than anybody must wait was noted by a clock that somebody has put back since:
        then the tenant has waited long enough, until it is served.
        """
        if (name, base) in self.runs:
            return self.now_ns
        known = (first.queued_ns, self.state.tenants[name].served_at_ns[base])
        if max(known) <= self.now_ns + self.rules.aging_ns:
            return max(known)
        return max((self.now_ns - self.rules.aging_ns, *(ns for ns in known if ns <= self.now_ns)))

    def _claim(self, name: str, base: Priority, since_ns: int, line: Line) -> Claim:
        """A tenant that runs elsewhere claims behind what it was promised there: devices go round, too."""
        level = lifted(self.rules, base, self.now_ns - since_ns)
        vtime_ns = self.state.tenants[name].vtimes_ns[level]
        if level is not base:  # a newcomer there, and by its long wait the first of equals
            vtime_ns = max(vtime_ns, book.start_ns(self.state, level))
        promised_ns = self.promised_ns.get((name, level), 0)
        if promised_ns:
            vtime_ns += round(promised_ns / self.rules.share(name))
        overdue = self.now_ns - since_ns >= self.rules.wait_max_ns
        return Claim(level, vtime_ns, since_ns, overdue, line[0], len(line))


def _first_first(line: tuple[Priority, Line]) -> int:
    return line[1][0].line_key


def lifted(rules: Rules, base: Priority, waited_ns: int) -> Priority:
    """The level of who has got nothing at this priority for so long."""
    if waited_ns < rules.aging_ns or base is Priority.HIGH:
        return base
    return Priority(min(Priority.HIGH, base + waited_ns // rules.aging_ns))


# --- leases ---------------------------------------------------------------------------------------------------------


def may_start(state: State) -> bool:
    """Whether the house starts anything at all."""
    switches = state.switches
    return not (state.stopping or state.disk_full or switches.stopped or switches.draining)


def usable(device: Device, now_ns: int) -> bool:
    """Healthy, or due for another try. Whom it takes is another question (residency.py)."""
    return device.state is not DeviceState.UNHEALTHY or not rests(device.retry_at_ns, now_ns)


def free_devices(state: State, now_ns: int) -> list[Device]:
    return [d for d in state.devices.values() if d.lease is None and usable(d, now_ns)]


def slice_ns(state: State, rules: Rules) -> int:
    """The turn of whoever has the largest share of those who are there."""
    return slice_of(max(1, len(state.book.present)), rules)


def slice_of(tenants: int, rules: Rules) -> int:
    """Of so many that compete."""
    return min(rules.slice_ns, max(SLICE_MIN_NS, ROUND_NS // tenants))


def turn_ns(state: State, rules: Rules, tenant: str) -> int:
    """A smaller share makes shorter turns, not rarer ones: what is due to two tenants is even sooner."""
    longest_ns = slice_ns(state, rules)
    part = rules.share(tenant) / largest_share(state, rules)
    return longest_ns if part >= 1 else max(min(SLICE_MIN_NS, longest_ns), round(part * longest_ns))


def largest_share(state: State, rules: Rules) -> float:
    """Cost: the number of tenants that are configured, whatever the number of those who are there."""
    present = state.book.present
    shares = [rule.share for name, rule in rules.tenants.items() if name in present]
    return max(shares if len(shares) == len(present) else [1.0, *shares], default=1.0)


def next_start(
    state: State, rules: Rules, claims: list[Claim], now_ns: int
) -> tuple[Device, Claim, bool] | None:
    """A free device, the claim it goes to, and whether a new turn begins with that."""
    free = free_devices(state, now_ns)
    if not free:
        return None
    for _, level in groupby(claims, key=attrgetter("level")):
        found = _start_at(state, rules, free, list(level))
        if found is not None:
            return found
    return None


def _start_at(
    state: State, rules: Rules, free: list[Device], claims: list[Claim]
) -> tuple[Device, Claim, bool] | None:
    """Of the claims of one level: a turn that goes on, then the first that may load, then the first of all."""
    takers = [_takers(state, rules, free, claim) for claim in claims]
    for device in free:
        own = _goes_on(
            state, rules, device, [c for c, ds in zip(claims, takers, strict=True) if device in ds]
        )
        if own is not None:
            return device, own, False
    saving: set[str] = (
        set()
    )  # devices that are on their way to earn a load: only loaded handlers go before it
    for claim, devices in zip(claims, takers, strict=True):
        for device in devices:
            if _may_load(state, rules, device, claim, saving):
                return device, claim, True
    return next(((ds[0], claim, True) for claim, ds in zip(claims, takers, strict=True) if ds), None)


def _takers(state: State, rules: Rules, free: list[Device], claim: Claim) -> list[Device]:
    """Devices that take this claim, the one first where it costs least."""
    takers = [device for device in free if residency.takes(state, rules, device, claim.job.handler)]
    return sorted(takers, key=lambda device: _effort(state, rules, device, claim))


def _goes_on(state: State, rules: Rules, device: Device, claims: list[Claim]) -> Claim | None:
    """What is next in a turn that is not over."""
    turn = device.turn
    if turn is None or turn.used_ns >= turn_ns(state, rules, turn.tenant):
        return None
    own = (claim for claim in claims if claim.job.tenant == turn.tenant)
    return next((claim for claim in own if swap_due(state, rules, device, claim)), None)


def _effort(state: State, rules: Rules, device: Device, claim: Claim) -> tuple[bool, bool, int]:
    """What it costs to serve this claim there: nothing, a load, or a load in the place of something loaded."""
    return (
        claim.job.handler not in device.loaded,
        bool(device.loaded),
        swap_wait_ns(state, rules, device, claim),
    )


def _may_load(
    state: State, rules: Rules, device: Device, claim: Claim, saving: set[str], uncharged_ns: int = 0
) -> bool:
    """Whether this claim may have the device, with regard to the better claims that wait for their price there."""
    if claim.job.handler in device.loaded:
        return True
    if device.name in saving:
        return False
    if swap_due(state, rules, device, claim, uncharged_ns):
        return True
    saving.add(device.name)
    return False


def swap_due(state: State, rules: Rules, device: Device, claim: Claim, uncharged_ns: int = 0) -> bool:
    """Whether loading this claim's handler, if it must be loaded, keeps within its part of the time."""
    return not device.loaded or swap_wait_ns(state, rules, device, claim, uncharged_ns) <= 0


def swap_wait_ns(state: State, rules: Rules, device: Device, claim: Claim, uncharged_ns: int = 0) -> int:
    """Device time still to be used before loading this claim's handler has earned its price; 0 or less: go on."""
    if claim.job.handler in device.loaded:
        return 0
    used_ns = device.since_load_ns + uncharged_ns
    wait_ns = round(_load_ns(state, claim.job.handler) / rules.swap_overhead_max) - used_ns
    if claim.overdue:  # as long as either load took, something is worked
        loads = [_load_ns(state, handler) for handler in (claim.job.handler, *device.loaded[-1:])]
        wait_ns = min(wait_ns, round(max(loads) / OVERDUE_PART) - used_ns)
    return wait_ns


def _load_ns(state: State, handler: str) -> int:
    learned = state.learned.get(handler)
    return learned.load_ns if learned else 0


# --- yields ---------------------------------------------------------------------------------------------------------


def uncharged_ns(lease: Lease, now_ns: int) -> int:
    """Time since the grant that no report has accounted for yet. By the wall clock: a step of it costs one yield."""
    return max(0, now_ns - lease.granted_ns - lease.used_ns)


def turn_over(state: State, rules: Rules, device: Device, now_ns: int) -> bool:
    lease, turn = device.lease, device.turn
    assert lease is not None, device.name
    assert turn is not None, device.name
    used_ns = turn.used_ns + uncharged_ns(lease, now_ns)
    return lease.loaded and used_ns >= turn_ns(state, rules, lease.tenant)


def worth_a_look(state: State, rules: Rules, now_ns: int) -> bool:
    """Whether a survey could lead to a lease or a yield: says no to most ticks, at the cost of the devices."""
    ready = state.book.ready
    if not any(ready) or not may_start(state):
        return False
    for device in state.devices.values():
        lease = device.lease
        if lease is None:
            if usable(device, now_ns):
                return True
        elif lease.yield_why is None and (
            any(ready[lease.level + 1 :])
            or (len(state.book.present) > 1 and turn_over(state, rules, device, now_ns))
        ):
            return True
    return False


def due_yield(state: State, rules: Rules, seen: Survey, now_ns: int) -> tuple[Device, Claim, YieldWhy] | None:
    """The next lease to ask back, for whom, and why. Claims that a yielding device will serve are passed over."""
    leased = [device for device in state.devices.values() if device.lease]
    running = [device for device in leased if device.lease and device.lease.yield_why is None]
    covered = len(leased) - len(running)  # a device that is free by now takes none of these claims
    saving: set[str] = set()
    left: dict[str, int] = {}  # devices that the tenants of these claims may still have
    for claim in seen.claims:
        tenant = claim.job.tenant
        jobs = min(claim.jobs, left.setdefault(tenant, devices_left(state, rules, tenant)))
        left[tenant] -= jobs
        covered -= jobs
        if covered >= 0 or not jobs:
            continue
        for device in sorted(running, key=lambda device: _strength(state, rules, device, claim, now_ns)):
            why = _beats(state, rules, claim, device, now_ns)
            if why is YieldWhy.PRIORITY or (
                why and _may_load(state, rules, device, claim, saving, _uncharged_ns(device, now_ns))
            ):
                return device, claim, why
    return _own_yield(seen.held, leased)


def _own_yield(held: list[Claim], leased: list[Device]) -> tuple[Device, Claim, YieldWhy] | None:
    """A tenant that may have no further device has its urgent jobs on those it has."""
    asked: dict[str, int] = {}
    for device in leased:
        if device.lease and device.lease.yield_why is not None:
            asked[device.lease.tenant] = asked.get(device.lease.tenant, 0) + 1
    for claim in held:
        tenant = claim.job.tenant
        asked[tenant] = asked.get(tenant, 0) - claim.jobs
        if asked[tenant] >= 0:
            continue
        for device in leased:
            lease = device.lease
            if lease and lease.yield_why is None and lease.tenant == tenant and lease.level < claim.level:
                return device, claim, YieldWhy.PRIORITY
    return None


def _uncharged_ns(device: Device, now_ns: int) -> int:
    return uncharged_ns(device.lease, now_ns) if device.lease else 0


def _strength(state: State, rules: Rules, device: Device, claim: Claim, now_ns: int) -> tuple[int, bool, int]:
    """Weakest first: the lowest level, then, for a higher one, where nothing must be loaded, then the most time."""
    lease = device.lease
    assert lease is not None, device.name
    must_load = claim.level > lease.level and claim.job.handler not in device.loaded
    return (lease.level, must_load, -running_vtime_ns(state, rules, lease, now_ns))


def running_vtime_ns(state: State, rules: Rules, lease: Lease, now_ns: int) -> int:
    """Virtual time of the tenant that runs, with what is not charged yet."""
    vtime_ns = state.tenants[lease.tenant].vtimes_ns[lease.level]
    return vtime_ns + round(uncharged_ns(lease, now_ns) / rules.share(lease.tenant))


def _beats(state: State, rules: Rules, claim: Claim, device: Device, now_ns: int) -> YieldWhy | None:
    """Whether this claim comes before what the device runs, the price of a load apart."""
    lease = device.lease
    assert lease is not None, device.name
    if not residency.takes(state, rules, device, claim.job.handler):
        return None
    if claim.level > lease.level:
        return YieldWhy.PRIORITY
    if claim.level < lease.level or claim.job.tenant == lease.tenant:
        return None
    if not turn_over(state, rules, device, now_ns):
        return None
    if claim.vtime_ns > running_vtime_ns(state, rules, lease, now_ns):
        return None
    return YieldWhy.TURN_OVER


# --- reasons --------------------------------------------------------------------------------------------------------


def waiting_reason(
    state: State, rules: Rules, job: Job, now_ns: int, seen: Survey | None = None
) -> tuple[Reason, str]:
    """Why a queued or paused job does not run. For many jobs at once, pass one `survey` to all of them."""
    assert job.state in (JobState.QUEUED, JobState.PAUSED), (job.job_id, job.state)
    if job.state is JobState.PAUSED:
        return held_reason(job)
    return (
        _house_reason(state)
        or _sleep_reason(job, now_ns)
        or _resource_reason(state, rules, job, now_ns)
        or _limit_reason(state, rules, job)
        or _rank_reason(state, rules, job, now_ns, seen or survey(state, rules, now_ns))
    )


def held_reason(job: Job) -> tuple[Reason, str]:
    """Of a paused job: in the words of whoever paused it, else what ends the pause."""
    assert job.reason is not None, job.job_id
    return job.reason, job.reason_detail or HOLDS.get(job.reason, "")


def _house_reason(state: State) -> tuple[Reason, str] | None:
    switches = state.switches
    if state.stopping:
        return Reason.DAEMON_STOPPING, "gpujobd is stopping, the job waits for its next start"
    if switches.draining:
        return Reason.DRAINING, switches.message or f"until {STARTED}"
    if switches.stopped:
        return Reason.QUEUE_STOPPED, switches.message or f"until {STARTED}"
    if state.disk_full:
        return Reason.DISK_FULL, state.disk_detail or NO_SPACE
    return None


def _sleep_reason(job: Job, now_ns: int) -> tuple[Reason, str] | None:
    if not job.asleep:
        return None
    wait_s = max(0, job.wake_ns - now_ns) / S_NS
    if job.begin_ns >= job.retry_at_ns:
        return Reason.BEGIN_TIME, f"begins in {wait_s:.0f} s"
    why = (
        f"lost {job.losses} workers in a row"
        if job.losses
        else "its canary failed, others try the device first"
    )
    return Reason.BACKOFF, f"{why}, next try in {wait_s:.0f} s"


def _resource_reason(state: State, rules: Rules, job: Job, now_ns: int) -> tuple[Reason, str] | None:
    shut = shut_out(state, rules, now_ns).get(job.handler)
    if shut is not None:
        return shut
    why = blocked_handlers(state, rules, now_ns).get(job.handler)
    if why is not None:
        return Reason.HANDLER_FAILING, why
    devices = list(state.devices.values())
    if any(device.lease or usable(device, now_ns) for device in devices):
        return None
    ill = next((device for device in devices if device.state is DeviceState.UNHEALTHY), None)
    if ill is None:
        return Reason.DEVICE_UNHEALTHY, "there is no device"
    wait_s = max(0, ill.retry_at_ns - now_ns) / S_NS
    return Reason.DEVICE_UNHEALTHY, f"{ill.name}: {ill.reason}, next try in {wait_s:.0f} s"


def _limit_reason(state: State, rules: Rules, job: Job) -> tuple[Reason, str] | None:
    if devices_left(state, rules, job.tenant) > 0:
        return None
    most = rules.tenants[job.tenant].running_devices_max
    return Reason.RUNNING_DEVICES_MAX, (
        f"{job.tenant} runs on {devices_of(state, job.tenant)} devices, allowed are {most}"
    )


def _rank_reason(state: State, rules: Rules, job: Job, now_ns: int, seen: Survey) -> tuple[Reason, str]:
    """Its handler works and a device could take it: somebody is ahead."""
    own = next(claim for claim in seen.claims if _stands_in(job, claim))
    best = seen.claims[0]
    if best.level > own.level:
        jobs = sum(claim.jobs for claim in seen.claims if claim.level > own.level)
        return Reason.PRIORITY, f"{_jobs(best.job, job, jobs)} at level {best.level.name.lower()}"
    first = next(c for c in seen.claims if c.job.tenant == job.tenant and c.level is own.level)
    if first.job is not job:
        return Reason.PRIORITY, _jobs(first.job, job, _ahead_in_line(state, job, seen))
    if best is not own:
        owed_s = (own.vtime_ns - best.vtime_ns) * rules.share(best.job.tenant) / S_NS
        return Reason.FAIR_SHARE, _owed(best.job.tenant, owed_s)
    return _device_reason(state, rules, own, now_ns)


def _ahead_in_line(state: State, job: Job, seen: Survey) -> int:
    """How many of its tenant's own jobs come before it, of those that could run."""
    lines = state.book.lines[job.tenant]
    return sum(
        bisect_left(line, job.line_key, key=LINE_KEY)
        for (level, handler), line in lines.items()
        if level is job.priority and handler not in seen.blocked
    )


def _jobs(first: Job, job: Job, jobs: int) -> str:
    """`job 12 is ahead`, `job 12 and 3 more are ahead`."""
    return (
        f"{named(first, job)} and {jobs - 1:,} more are ahead"
        if jobs > 1
        else f"{named(first, job)} is ahead"
    )


def _stands_in(job: Job, claim: Claim) -> bool:
    """Whether this is the claim of the job's line."""
    mine = (job.tenant, job.priority, job.handler)
    return mine == (claim.job.tenant, claim.job.priority, claim.job.handler)


def named(other: Job, job: Job) -> str:
    """How the other job is called to those who see `job`: by its number only if all of them see it as well.

    The owner of a job need not be a member of its tenant, so the same tenant is not enough.
    """
    mine = (other.owner, other.tenant) == (job.owner, job.tenant)
    return f"job {other.job_id}" if mine else f"a job of {other.tenant}"


def _owed(tenant: str, owed_s: float) -> str:
    return f"{tenant} is owed {owed_s:.0f} s" if owed_s >= 1 else f"{tenant} is next at an equal share"


def _device_reason(state: State, rules: Rules, claim: Claim, now_ns: int) -> tuple[Reason, str]:
    """It is the next of all: what does the device do meanwhile?"""
    fit = [d for d in state.devices.values() if residency.takes(state, rules, d, claim.job.handler)]
    busy = [(device, device.lease) for device in fit if device.lease]
    if not busy or any(device.lease is None and usable(device, now_ns) for device in fit):
        return Reason.RESOURCES, "about to start"
    device, lease = min(busy, key=lambda pair: _strength(state, rules, pair[0], claim, now_ns))
    running = named(state.jobs[lease.job_id], claim.job)
    if lease.level > claim.level:
        return Reason.PRIORITY, f"{device.name} runs {running} at level {lease.level.name.lower()}"
    wait_ns = swap_wait_ns(state, rules, device, claim, uncharged_ns(lease, now_ns))
    if device.loaded and wait_ns > 0 and lease.yield_why is None:
        return (
            Reason.SWAP,
            f"{claim.job.handler} is loaded after {wait_ns / S_NS:.0f} s more of {lease.handler}",
        )
    ahead_s = (
        (claim.vtime_ns - running_vtime_ns(state, rules, lease, now_ns)) * rules.share(lease.tenant) / S_NS
    )
    if ahead_s >= 1 and lease.yield_why is None and lease.tenant != claim.job.tenant:
        return Reason.FAIR_SHARE, _owed(lease.tenant, ahead_s)
    asked = ", which was asked to yield" if lease.yield_why is not None else ""
    return Reason.RESOURCES, f"{device.name} runs {running}{asked}"


# --- the order of all -------------------------------------------------------------------------------------------------


def item_ns(state: State, job: Job) -> int:
    learned = state.learned.get(job.handler)
    return (learned.item_ns if learned else 0) or ITEM_GUESS_NS


def order(state: State, rules: Rules, now_ns: int) -> Iterator[Job]:
    """Every queued job, in the order in which they are expected to start; lazily, so that a page costs a page.

    A job is stamped with its tenant's virtual time when all the jobs before it in the line are done; the least
    stamp is next (start-time fair queueing, Goyal, Vin and Cheng 1996). Jobs that cannot run now come last.
    """
    blocked = blocked_handlers(state, rules, now_ns)
    left_ns = _running_left_ns(state)
    for level in reversed(Priority):
        yield from _order_of_level(state, rules, level, blocked, left_ns)
    for lines in state.book.lines.values():
        for (_, handler), line in lines.items():
            if handler in blocked:
                yield from line
    for _, job_id in state.book.asleep:
        yield state.jobs[job_id]


def _running_left_ns(state: State) -> dict[tuple[str, Priority], int]:
    left: dict[tuple[str, Priority], int] = {}
    for device in state.devices.values():
        if device.lease:
            job = state.jobs[device.lease.job_id]
            key = (job.tenant, device.lease.level)
            left[key] = left.get(key, 0) + job.left * item_ns(state, job)
    return left


def _order_of_level(
    state: State,
    rules: Rules,
    level: Priority,
    blocked: dict[str, str],
    left_ns: dict[tuple[str, Priority], int],
) -> Iterator[Job]:
    waiting: dict[str, list[Job]] = {}
    heap: list[tuple[float, int, str, int]] = []  # virtual time, line_key, tenant, place in its line
    for name, lines in state.book.lines.items():
        mine = [line for (base, handler), line in lines.items() if base is level and handler not in blocked]
        if mine:
            jobs = waiting[name] = mine[0] if len(mine) == 1 else sorted(chain(*mine), key=LINE_KEY)
            vtime_ns = state.tenants[name].vtimes_ns[level] + left_ns.get((name, level), 0) / rules.share(
                name
            )
            heap.append((vtime_ns, jobs[0].line_key, name, 0))
    heapify(heap)
    while heap:
        vtime_ns, _, name, place = heap[0]
        job = waiting[name][place]
        yield job
        if place + 1 == len(waiting[name]):
            heappop(heap)
            continue
        vtime_ns += job.left * item_ns(state, job) / rules.share(name)
        heapreplace(heap, (vtime_ns, waiting[name][place + 1].line_key, name, place + 1))
