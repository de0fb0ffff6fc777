"""What workers report, and what follows from it.

Rule 1: nobody outside is trusted, the worker included. A report that quotes another device or attempt than the lease
changes nothing; one that cannot be true ends the lease like a death (`lied`).
Rule 2: a lease that ends while something was asked of it (pause, cancel, deadline, stop) ends in that, however it ends.
Rule 3: what kills workers is blamed on an item only if it was alone in hand twice, and a canary passed since. What
kills workers of different jobs is the device's illness. Neither is ever a whole job's fault.
Rule 4: time is charged as the supervisor measured it, since the grant; a report adds what is new.

    line in hand alone when the worker died     1st death: redo alone      2nd: canary_due, the next lease has a canary
    the canary passed (CanaryOk)                canary_due -> condemned: the worker fails these lines, untried
    the canary failed, or the worker died in it the device is ill; nothing is blamed on the line
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from gpujobd.core import book, events
from gpujobd.core.inputs import (
    CanaryOk,
    CheckpointReached,
    Finished,
    GaveBack,
    Loaded,
    LoadFailed,
    Lost,
    Report,
    Unkillable,
    Unloaded,
    Work,
)
from gpujobd.core.model import (
    CODE_CHARS_MAX,
    CODES_MAX,
    DEFERRED_MAX,
    S_NS,
    Checkpoint,
    Device,
    DeviceState,
    Job,
    Lease,
    Reason,
    Rules,
    Span,
    State,
    Timings,
    YieldWhy,
)
from gpujobd.core.residency import gib, takes

DEATHS_MAX: Final = 2  # of workers, with the same line alone in hand
FAILED_JOBS_MAX: Final = 3  # jobs whose leases were lost on one device in a row
LOAD_FAILURES_MAX: Final = 5  # of one job, in a row
UNCLEAN_STOPS_MAX: Final = 3  # of the daemon, at the same checkpoint of a job
BACKOFF_MAX_NS: Final = 300 * S_NS
ILL_FIRST_NS: Final = 30 * S_NS
ILL_MAX_NS: Final = 600 * S_NS
REST_MAX_NS: Final = 2 * ILL_MAX_NS  # the longest of all: a job's after its canary failed
DETAIL_CHARS_MAX: Final = 1_000  # of what a worker says; the log has all of it
BYTES_MAX: Final = 1 << 50
CRC_MAX: Final = (1 << 32) - 1
TRIES_MAX: Final = 1_000
STAGE_S_MAX: Final = 1e9

Events = list[events.AnyEvent]
Kind = TypeVar("Kind", bound=events.Progress)


def backoff_ns(failures: int, first_ns: int, longest_ns: int) -> int:
    """Wait after so many failures in a row: doubling, capped, no jitter, for there is no herd to spread."""
    assert failures >= 1, failures
    return min(first_ns << min(failures - 1, 30), longest_ns)


def rests(until_ns: int, now_ns: int) -> bool:
    """Whether a backoff until then is on.

    One that lies further ahead than any is long was set by a clock that somebody has put back since. It is over: to
    try too early costs a try, to believe it would cost a day.
    """
    return now_ns < until_ns <= now_ns + REST_MAX_NS


def lease_of(state: State, given: Report) -> Lease | None:
    """The lease this report is about; None if it is about one that is over."""
    device = state.devices.get(given.device)
    lease = device.lease if device else None
    return lease if lease is not None and lease.attempt == given.attempt else None


def devices_left(state: State, rules: Rules, tenant: str) -> int:
    """How many more devices this tenant may run on."""
    rule = rules.tenants.get(tenant)
    if rule is None or rule.running_devices_max is None:
        return max(1, len(state.devices))
    return rule.running_devices_max - devices_of(state, tenant)


def devices_of(state: State, tenant: str) -> int:
    return sum(
        device.lease is not None and device.lease.tenant == tenant for device in state.devices.values()
    )


def _charged(state: State, rules: Rules, lease: Lease, given: Report) -> tuple[int, int]:
    """Device time and virtual time that this report adds.

    Who runs all that it could run is never left behind by more than waiting can explain: with fewer jobs than devices it
    would save up a credit without ever having waited, and lock the others out with it one day. Who waits for a further
    device is owed every second.
    """
    used_ns = max(0, given.used_ns - lease.used_ns)
    if not used_ns:
        return 0, 0
    vtime_ns = round(used_ns / rules.share(lease.tenant))
    if _waits(state, rules, lease):
        return used_ns, vtime_ns
    lag_max_ns = rules.wait_max_ns / rules.least_share
    behind_ns = book.start_ns(state, lease.level) - state.tenants[lease.tenant].vtimes_ns[lease.level]
    return used_ns, max(vtime_ns, round(behind_ns - lag_max_ns))


def _waits(state: State, rules: Rules, lease: Lease) -> bool:
    """Whether this tenant has a job in line at the same level that some device would take."""
    if devices_left(state, rules, lease.tenant) <= 0:
        return False
    return any(
        level is lease.level
        and not state.learned[handler].load_failures
        and any(takes(state, rules, device, handler) for device in state.devices.values())
        for level, handler in state.book.lines.get(lease.tenant, {})
    )


# --- handlers -------------------------------------------------------------------------------------------------------


def loaded(state: State, given: Loaded, now_ns: int) -> Events:
    if given.device not in state.devices:
        return []
    return [
        events.HandlerLoaded(
            at_ns=now_ns,
            device=given.device,
            handler=given.handler,
            load_ns=max(1, given.load_ns),
            vram_bytes=min(max(0, given.vram_bytes), BYTES_MAX),
        )
    ]


def unloaded(state: State, given: Unloaded, now_ns: int) -> Events:
    device = state.devices.get(given.device)
    if device is None or given.handler not in device.loaded:
        return []
    return [events.WorkerGone(at_ns=now_ns, device=given.device, handler=given.handler)]


def load_failed(state: State, rules: Rules, given: LoadFailed, now_ns: int) -> Events:
    """The handler waits, whichever job it was; the fifth failure of one job in a row is the job's end.

    It waits as long as the attempt took, at least: what fails slowly must not have the device most of the time.
    """
    lease = lease_of(state, given)
    if lease is None:
        return []
    job = state.jobs[lease.job_id]
    learned = state.learned.get(lease.handler)
    failures = (learned.load_failures if learned else 0) + 1
    wait_ns = max(backoff_ns(failures, 2 * S_NS, BACKOFF_MAX_NS), min(given.used_ns, REST_MAX_NS))
    used_ns, vtime_ns = _charged(state, rules, lease, given)
    error = given.error[:DETAIL_CHARS_MAX]
    failed = events.HandlerLoadFailed(
        at_ns=now_ns,
        device=given.device,
        job_id=job.job_id,
        attempt=lease.attempt,
        error=error,
        retry_at_ns=now_ns + wait_ns,
        used_ns=used_ns,
        vtime_ns=vtime_ns,
    )
    if job.load_failures + 1 >= LOAD_FAILURES_MAX:
        return [failed, _failed(job, Reason.HANDLER_FAILING, error, now_ns)]
    return [failed, *_asked(job, lease, now_ns)]


# --- progress -------------------------------------------------------------------------------------------------------


def checkpoint_reached(state: State, rules: Rules, given: CheckpointReached, now_ns: int) -> Events:
    lease = lease_of(state, given)
    if lease is None:
        return []
    job = state.jobs[lease.job_id]
    if not _possible(job, given.checkpoint):
        return _lied(state, rules, lease, given, now_ns)
    reached = _progress(events.Checkpointed, state, rules, lease, given, now_ns)
    return [reached, *_recovered(state, job, given, now_ns)]


def gave_back(state: State, rules: Rules, given: GaveBack, now_ns: int) -> Events:
    lease = lease_of(state, given)
    if lease is None:
        return []
    job = state.jobs[lease.job_id]
    if not _possible(job, given.checkpoint):
        return _lied(state, rules, lease, given, now_ns)
    if _all_tried(job, given.checkpoint):  # it was asked too late: there is nothing left to give back
        return finished(state, rules, given, now_ns)
    recovered = _recovered(state, job, given, now_ns)
    back = _progress(events.Yielded, state, rules, lease, given, now_ns)
    if _too_many_failed(job, given.checkpoint):
        return [*recovered, back, _failures_max(job, given.checkpoint, now_ns)]
    if given.cramped_bytes >= 0:
        return [*recovered, *_cramped(lease, back, given, now_ns), *_asked(job, lease, now_ns)]
    return [*recovered, back, *_asked(job, lease, now_ns)]


def _cramped(lease: Lease, back: events.Yielded, given: GaveBack, now_ns: int) -> Events:
    """It ran out of memory beside processes that are not ours. That is nobody's failure: it waits for more room."""
    room_bytes = min(given.cramped_bytes, BYTES_MAX)
    detail = f"{lease.handler} does not fit into the {gib(room_bytes)} that other processes leave"
    crowded = events.DeviceCrowded(at_ns=now_ns, device=lease.device, room_bytes=room_bytes, detail=detail)
    return [msgspec.structs.replace(back, cramped_bytes=room_bytes), crowded]


def finished(state: State, rules: Rules, given: Finished | GaveBack, now_ns: int) -> Events:
    lease = lease_of(state, given)
    if lease is None:
        return []
    job = state.jobs[lease.job_id]
    point = given.checkpoint
    if not _possible(job, point) or not _all_tried(job, point):
        return _lied(state, rules, lease, given, now_ns)
    recovered = _recovered(state, job, given, now_ns)
    if _too_many_failed(job, point):
        back = _progress(events.Yielded, state, rules, lease, given, now_ns)
        return [*recovered, back, _failures_max(job, point, now_ns)]
    return [*recovered, _progress(events.Completed, state, rules, lease, given, now_ns)]


def _all_tried(job: Job, point: Checkpoint) -> bool:
    return point.done + point.failed == job.items and not point.deferred


def _possible(job: Job, new: Checkpoint) -> bool:
    """Whether this checkpoint can follow the one before. Only forwards, and every line is counted once."""
    old = job.checkpoint
    tried = new.done + new.failed
    return _bounded(new) and (
        old.upto <= new.upto <= job.items
        and new.done >= old.done
        and new.failed >= old.failed
        and new.results_bytes >= old.results_bytes
        and new.errors_bytes >= old.errors_bytes
        and tried + len(new.deferred) == new.upto
        and _counted(new, old)
    )


def _counted(new: Checkpoint, old: Checkpoint) -> bool:
    """Whether the codes can be those of the failures. Of what failed under an older version, none is known."""
    codes = new.failure_codes
    return (
        len(codes) <= CODES_MAX + 1
        and all(code.isascii() and code.isidentifier() and len(code) <= CODE_CHARS_MAX for code in codes)
        and all(count > 0 for count in codes.values())
        and all(codes.get(code, 0) >= count for code, count in old.failure_codes.items())
        and sum(codes.values()) <= new.failed
    )


def _bounded(new: Checkpoint) -> bool:
    """Every number fits its place in the journal."""
    return (
        new.results_bytes <= BYTES_MAX
        and new.errors_bytes <= BYTES_MAX
        and 0 <= new.results_crc <= CRC_MAX
        and 0 <= new.errors_crc <= CRC_MAX
        and len(new.deferred) <= DEFERRED_MAX
        and all(0 < item.line <= new.upto and 0 < item.tries <= TRIES_MAX for item in new.deferred)
        and len({item.line for item in new.deferred}) == len(new.deferred)
    )


def _plausible(timings: Timings) -> Timings:
    """Seconds as a worker states them: shown to people, never decided upon."""
    stages = (timings.load_s, timings.read_s, timings.compute_s, timings.write_s, timings.sync_s)
    return timings if all(0.0 <= stage_s <= STAGE_S_MAX for stage_s in stages) else Timings()


def _progress(kind: type[Kind], state: State, rules: Rules, lease: Lease, given: Work, now_ns: int) -> Kind:
    used_ns, vtime_ns = _charged(state, rules, lease, given)
    return kind(
        at_ns=now_ns,
        job_id=lease.job_id,
        attempt=lease.attempt,
        checkpoint=given.checkpoint,
        used_ns=used_ns,
        vtime_ns=vtime_ns,
        timings=_plausible(given.timings),
        vram_bytes=min(max(0, given.vram_bytes), BYTES_MAX),
    )


def _recovered(state: State, job: Job, given: Work, now_ns: int) -> Events:
    """An ill device that gets through a batch is well again."""
    device = state.devices[given.device]
    new, old = given.checkpoint, job.checkpoint
    if device.state is not DeviceState.UNHEALTHY or new.done == old.done:
        return []
    return [events.DeviceRecovered(at_ns=now_ns, device=device.name)]


def _too_many_failed(job: Job, point: Checkpoint) -> bool:
    return 0 <= job.failures_max < point.failed


def _failures_max(job: Job, point: Checkpoint, now_ns: int) -> events.Failed:
    detail = f"{point.failed} items failed, allowed are {job.failures_max}"
    return _failed(job, Reason.FAILURES_MAX, detail, now_ns)


def _failed(job: Job, reason: Reason, detail: str, now_ns: int) -> events.Failed:
    return events.Failed(at_ns=now_ns, job_id=job.job_id, reason=reason, detail=detail)


# --- losses ---------------------------------------------------------------------------------------------------------


def lost(state: State, rules: Rules, given: Lost, now_ns: int) -> Events:
    lease = lease_of(state, given)
    if lease is None:
        return []
    job = state.jobs[lease.job_id]
    cause = given.cause
    match cause:
        case "disk_full":
            filled = events.DiskFilled(at_ns=now_ns, detail=given.detail[:DETAIL_CHARS_MAX])
            return [_ended(state, rules, lease, given, now_ns), filled, *_asked(job, lease, now_ns)]
        case "output_damaged":
            return [_ended(state, rules, lease, given, now_ns), *_damaged(job, lease, given, now_ns)]
        case "failures_max":
            detail = given.detail[:DETAIL_CHARS_MAX]
            ended = _ended(state, rules, lease, given, now_ns)
            return [ended, _failed(job, Reason.FAILURES_MAX, detail, now_ns)]
        case "input_lost":
            ended = _ended(state, rules, lease, given, now_ns)
            return [ended, _failed(job, Reason.INPUT_LOST, given.detail[:DETAIL_CHARS_MAX], now_ns)]
    # A worker that dies before it reported its canary died of it, whatever it says.
    if lease.canary and lease.loaded:
        return _canary_failed(state, rules, lease, given, now_ns)
    return _died(state, rules, lease, given, now_ns)


def _lied(state: State, rules: Rules, lease: Lease, given: Work, now_ns: int) -> Events:
    detail = f"attempt {given.attempt} reported a checkpoint that cannot be: {given.checkpoint}"
    report = Lost(
        device=given.device, attempt=given.attempt, used_ns=given.used_ns, cause="lied", detail=detail
    )
    return _died(state, rules, lease, report, now_ns)


def _died(state: State, rules: Rules, lease: Lease, given: Lost, now_ns: int) -> Events:
    job, device = state.jobs[lease.job_id], state.devices[given.device]
    blamed = _alone_in_hand(job, given)
    cause = (
        "died" if given.cause == "canary" else given.cause
    )  # there was none: it passed, or was not asked for
    guilty = blamed and job.deaths.get(blamed, 0) + 1 >= DEATHS_MAX
    testable = guilty and canary_line(job, blamed)
    ended = _ended(
        state,
        rules,
        lease,
        given,
        now_ns,
        cause=cause,
        suspects=_clipped(job, given.suspects),
        blamed=blamed,
        canary_due=(blamed,) if guilty and testable else (),
        # A job without another line has nothing to test a device with; then it must not be an ill one that kills it.
        condemned=(blamed, *job.canary_due)
        if guilty and not testable and device.state is not DeviceState.UNHEALTHY
        else (),
        # The first loss is redone at once: what is in hand is found out soonest.
        retry_at_ns=now_ns + backoff_ns(job.losses, S_NS, BACKOFF_MAX_NS) if job.losses else 0,
    )
    return [ended, *_repeated(device, job, given, now_ns), *_asked(job, lease, now_ns)]


def _alone_in_hand(job: Job, given: Lost) -> int:
    """The line whose call it was, if that call had only one; 0: none, or several."""
    if not given.suspects:
        return 0
    current = given.suspects[0]
    return current.first if current.first == current.last and 0 < current.first <= job.items else 0


def _clipped(job: Job, suspects: tuple[Span, ...]) -> tuple[Span, ...]:
    """Only lines the job has and that are not behind its checkpoint."""
    upto = job.checkpoint.upto if job.checkpoint.upto < job.items else 0  # deferred items lie behind it
    clipped = (Span(max(span.first, upto + 1), min(span.last, job.items)) for span in suspects[:2])
    return tuple(span for span in clipped if 0 < span.first <= span.last)


def _repeated(device: Device, job: Job, given: Lost, now_ns: int) -> Events:
    """An ill device that loses another lease stays ill; a healthy one falls ill with the third job in a row."""
    failed = {*device.failed_jobs, job.job_id}
    if device.state is DeviceState.UNHEALTHY:
        return [fell_ill(device, device.reason, f"{given.cause} on trial: {given.detail}", now_ns)]
    if len(failed) < FAILED_JOBS_MAX:
        return []
    jobs = ", ".join(str(job_id) for job_id in sorted(failed))
    return [fell_ill(device, "RepeatedFailures", f"leases of jobs {jobs} were lost in a row", now_ns)]


def _canary_failed(state: State, rules: Rules, lease: Lease, given: Lost, now_ns: int) -> Events:
    """Something known to work did not: the device is ill. The job waits longer than the device.

    So another job is the next to try the device: if that works, it was this job's canary after all, which now
    counts as a death of its line, and another line will be the canary.
    """
    job, device = state.jobs[lease.job_id], state.devices[given.device]
    ill = fell_ill(device, "CanaryFailed", given.detail, now_ns)
    ended = _ended(
        state,
        rules,
        lease,
        given,
        now_ns,
        cause="canary",
        blamed=_alone_in_hand(job, given),
        retry_at_ns=2 * ill.retry_at_ns - now_ns,
    )
    return [ended, ill, *_asked(job, lease, now_ns)]


def fell_ill(device: Device, reason: str, detail: str, now_ns: int) -> events.DeviceFellIll:
    wait_ns = backoff_ns(device.relapses + 1, ILL_FIRST_NS, ILL_MAX_NS)
    return events.DeviceFellIll(
        at_ns=now_ns,
        device=device.name,
        reason=reason,
        detail=detail[:DETAIL_CHARS_MAX],
        retry_at_ns=now_ns + wait_ns,
    )


def _ended(
    state: State,
    rules: Rules,
    lease: Lease,
    given: Lost,
    now_ns: int,
    *,
    cause: str = "",
    suspects: tuple[Span, ...] = (),
    blamed: int = 0,
    canary_due: tuple[int, ...] = (),
    condemned: tuple[int, ...] = (),
    retry_at_ns: int = 0,
) -> events.LeaseLost:
    used_ns, vtime_ns = _charged(state, rules, lease, given)
    return events.LeaseLost(
        at_ns=now_ns,
        job_id=lease.job_id,
        attempt=lease.attempt,
        cause=cause or given.cause,
        detail=given.detail[:DETAIL_CHARS_MAX],
        suspects=suspects,
        blamed=blamed,
        canary_due=canary_due,
        condemned=condemned,
        retry_at_ns=retry_at_ns,
        used_ns=used_ns,
        vtime_ns=vtime_ns,
    )


def _damaged(job: Job, lease: Lease, given: Lost, now_ns: int) -> Events:
    """A damaged output is never silently redone: somebody must look, unless the job was on its way out."""
    if lease.yield_why in (YieldWhy.CANCEL, YieldWhy.DEADLINE):
        return _asked(job, lease, now_ns)
    detail = given.detail[:DETAIL_CHARS_MAX]
    return [events.Paused(at_ns=now_ns, job_id=job.job_id, reason=Reason.OUTPUT_DAMAGED, detail=detail)]


def _asked(job: Job, lease: Lease, now_ns: int) -> Events:
    """What becomes of the job now that its lease is over, by what was asked of it meanwhile."""
    by, message = lease.yield_by, lease.yield_detail
    match lease.yield_why:
        case YieldWhy.CANCEL:
            return [events.Cancelled(at_ns=now_ns, job_id=job.job_id, by=by, message=message)]
        case YieldWhy.DEADLINE:
            return [events.Expired(at_ns=now_ns, job_id=job.job_id)]
        case YieldWhy.PAUSE:
            return [paused(job, by, message, now_ns)]
        case YieldWhy.STOPPING:
            return [events.Paused(at_ns=now_ns, job_id=job.job_id, reason=Reason.DAEMON_STOPPING)]
        case YieldWhy.TURN_OVER | YieldWhy.PRIORITY | YieldWhy.ELSEWHERE | None:
            return []


def paused(job: Job, by: int, message: str, now_ns: int) -> events.Paused:
    """A person's hold: an administrator's on somebody else's job is lifted by an administrator only."""
    reason = Reason.HELD_BY_OWNER if by == job.owner else Reason.HELD_BY_ADMIN
    return events.Paused(at_ns=now_ns, job_id=job.job_id, reason=reason, detail=message, by=by)


def daemon_died(job: Job, lease: Lease, *, resume: bool, now_ns: int) -> Events:
    """A lease found in the state at start: the daemon did not stop cleanly. Its time since then is not charged."""
    ended = events.LeaseLost(at_ns=now_ns, job_id=job.job_id, attempt=lease.attempt, cause="daemon")
    if lease.yield_why is YieldWhy.STOPPING and resume:
        return [ended]
    asked = _asked(job, lease, now_ns)
    if not asked and lease.loaded and job.unclean_stops + 1 >= UNCLEAN_STOPS_MAX:
        detail = f"running at {UNCLEAN_STOPS_MAX} unclean stops in a row, each time after line {job.checkpoint.upto}"
        return [
            ended,
            events.Paused(at_ns=now_ns, job_id=job.job_id, reason=Reason.CRASH_LOOP, detail=detail),
        ]
    return [ended, *asked]


# --- canaries -------------------------------------------------------------------------------------------------------


def canary_line(job: Job, besides: int = 0) -> int:
    """A line to test a device with: one known to work, else the one under least suspicion; 0: the job has no other.

    Of the lines behind the checkpoint the last is taken that is not deferred: the worker checks that it has a result.
    """
    bad = {besides, *job.canary_due, *job.condemned}
    deferred = {item.line for item in job.checkpoint.deferred}
    for line in range(job.checkpoint.upto, 0, -1):
        if line not in bad and line not in deferred and line not in job.deaths:
            return line
    best, least = 0, 0
    for line in range(1, job.items + 1):
        if line not in bad:
            deaths = job.deaths.get(line, 0)
            if not best or deaths < least:
                best, least = line, deaths
            if not deaths:
                break
    return best


def canary_ok(state: State, given: CanaryOk, now_ns: int) -> Events:
    lease = lease_of(state, given)
    if lease is None or not lease.canary:
        return []
    job, device = state.jobs[lease.job_id], state.devices[given.device]
    passed: Events = []
    if job.canary_due:
        passed.append(
            events.CanaryPassed(at_ns=now_ns, job_id=job.job_id, attempt=lease.attempt, lines=job.canary_due)
        )
    if device.state is DeviceState.UNHEALTHY:
        passed.append(events.DeviceRecovered(at_ns=now_ns, device=device.name))
    return passed


def unkillable(state: State, given: Unkillable, now_ns: int) -> Events:
    """No lease goes to this device until the next try; a lease on it stays, for its job is not free either."""
    device = state.devices.get(given.device)
    if device is None or (device.state is DeviceState.UNHEALTHY and rests(device.retry_at_ns, now_ns)):
        return []
    return [fell_ill(device, "WorkerUnkillable", given.detail, now_ns)]
