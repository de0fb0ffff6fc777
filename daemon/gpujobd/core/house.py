"""What the daemon itself brings about: start, stop, the passing of time, and clearing away what is old.

Rule 1: a tick does one kind of thing at a time, first what is overdue, then leases, then yields. The daemon ticks
until there is nothing more to do, so that every choice sees the effect of the one before.
Rule 2: every answer is bounded (`BATCH_MAX` events or numbers); what is left over is done by the next tick.
Rule 3: the order at start: leases end before devices go, and both before anything is resumed.
"""

from __future__ import annotations

from typing import Final

from gpujobd.core import book, events, policy
from gpujobd.core.inputs import DiskSpace, Foretell, QueueVerb, Spooled, Start, SwitchQueue
from gpujobd.core.leases import REST_MAX_NS, canary_line, daemon_died
from gpujobd.core.model import (
    S_NS,
    Device,
    DeviceState,
    Job,
    JobState,
    Reason,
    Rules,
    State,
    Switches,
    YieldWhy,
)

Events = list[events.AnyEvent]

BATCH_MAX: Final = 1_000
DAY_NS: Final = 86_400 * S_NS
SUBMIT_ID_DAYS: Final = 7

# A stronger wish takes the place of a weaker one that the worker has not answered yet.
STRENGTH: Final[dict[YieldWhy | None, int]] = {
    None: 0,
    YieldWhy.TURN_OVER: 1,
    YieldWhy.PRIORITY: 1,
    YieldWhy.ELSEWHERE: 1,
    YieldWhy.STOPPING: 2,
    YieldWhy.DEADLINE: 3,
    YieldWhy.PAUSE: 4,
    YieldWhy.CANCEL: 5,
}
assert set(STRENGTH) == {None, *YieldWhy}


def ask_back(device: Device, why: YieldWhy, now_ns: int, *, detail: str = "", by: int = -1) -> Events:
    """Ask for the lease on this device, unless something as strong was asked before."""
    lease = device.lease
    assert lease is not None, device.name
    if STRENGTH[why] <= STRENGTH[lease.yield_why]:
        return []
    return [
        events.YieldRequested(
            at_ns=now_ns,
            device=device.name,
            job_id=lease.job_id,
            attempt=lease.attempt,
            why=why,
            detail=detail,
            by=by,
        )
    ]


# --- start and stop -------------------------------------------------------------------------------------------------


def start(state: State, rules: Rules, given: Start, now_ns: int) -> Events:
    ended: Events = []
    for device in state.devices.values():
        if device.lease is not None:
            job = state.jobs[device.lease.job_id]
            ended += daemon_died(job, device.lease, resume=rules.resume_on_start, now_ns=now_ns)
    return [
        events.DaemonStarted(at_ns=now_ns, boot_id=given.boot_id, version=given.version),
        *ended,
        events.DevicesFound(at_ns=now_ns, devices=given.devices),
        *(_resumed(state, now_ns) if rules.resume_on_start else ()),
    ]


def _resumed(state: State, now_ns: int) -> list[events.Resumed]:
    """Each goes to the head of its line, the first in line last."""
    stopped = [job for job in state.jobs.values() if _stopped_with_daemon(job)]
    stopped.sort(key=policy.LINE_KEY, reverse=True)
    return [events.Resumed(at_ns=now_ns, job_id=job.job_id, at_head=True) for job in stopped]


def _stopped_with_daemon(job: Job) -> bool:
    return job.state is JobState.PAUSED and job.reason is Reason.DAEMON_STOPPING


def stop(state: State, now_ns: int) -> Events:
    if state.stopping:
        return []
    asked: Events = []
    for device in state.devices.values():
        if device.lease is not None:
            asked += ask_back(device, YieldWhy.STOPPING, now_ns)
    return [events.DaemonStopping(at_ns=now_ns), *asked]


def switch_queue(state: State, given: SwitchQueue, now_ns: int) -> Events:
    """`stop`: start nothing. `disable`: accept nothing. `drain`: both, until `start`. What runs, runs on."""
    old = state.switches
    stopped, disabled, draining = old.stopped, old.disabled, old.draining
    match given.verb:
        case QueueVerb.STOP:
            stopped = True
        case QueueVerb.START:
            stopped = draining = False
        case QueueVerb.DISABLE:
            disabled = True
        case QueueVerb.ENABLE:
            disabled = False
        case QueueVerb.DRAIN:
            draining = True
    message = given.message if stopped or disabled or draining else ""
    new = Switches(stopped=stopped, disabled=disabled, draining=draining, message=message)
    if new == old:
        return []
    return [
        events.QueueSwitched(
            at_ns=now_ns,
            stopped=stopped,
            disabled=disabled,
            draining=draining,
            by=given.who.uid,
            message=message,
        )
    ]


def spooled(state: State, given: Spooled, now_ns: int) -> Events:
    job_ids = tuple(job_id for job_id in dict.fromkeys(given.job_ids) if job_id in state.book.inline)
    return [events.InputsSpooled(at_ns=now_ns, job_ids=job_ids)] if job_ids else []


def foretell(state: State, given: Foretell, now_ns: int) -> Events:
    """The first forecast counts, and none that comes after the end."""
    jobs, told = state.jobs, []
    for expected in given.jobs[:BATCH_MAX]:
        job = jobs.get(expected.job_id)
        if job is not None and job.expected is None and job.state in (JobState.QUEUED, JobState.RUNNING):
            told.append(expected)
    return [events.Foretold(at_ns=now_ns, jobs=tuple(told))] if told else []


def disk_space(state: State, given: DiskSpace, now_ns: int) -> Events:
    if given.full == state.disk_full:
        return []
    if given.full:
        return [events.DiskFilled(at_ns=now_ns, detail=given.detail)]
    return [events.DiskFreed(at_ns=now_ns)]


# --- time -----------------------------------------------------------------------------------------------------------


def tick(state: State, rules: Rules, now_ns: int) -> Events:
    """What is due now; nothing, if nothing is. Cost: O(1) almost always, else O(tenants + devices)."""
    if due := _overdue(state, now_ns):
        return due
    if not policy.worth_a_look(state, rules, now_ns):
        return []
    seen = policy.survey(state, rules, now_ns)
    start = policy.next_start(state, rules, seen.claims, now_ns)
    return [_leased(state, rules, *start, now_ns)] if start else _yield(state, rules, seen, now_ns)


def _overdue(state: State, now_ns: int) -> Events:
    found: Events = []
    for deadline_ns, job_id in state.book.deadlines[:BATCH_MAX]:
        if deadline_ns > now_ns:
            break
        job = state.jobs[job_id]
        if job.state is JobState.RUNNING:
            found += ask_back(state.devices[job.device], YieldWhy.DEADLINE, now_ns)
        else:
            found.append(events.Expired(at_ns=now_ns, job_id=job_id))
    if found:
        return found
    asleep = state.book.asleep
    if asleep and asleep[0][0] <= now_ns:
        due = tuple(job_id for wake_ns, job_id in asleep[:BATCH_MAX] if wake_ns <= now_ns)
        return [events.Woken(at_ns=now_ns, job_ids=due)]
    return _misled(state, now_ns)


def _misled(state: State, now_ns: int) -> Events:
    """Jobs whose backoff was set by a clock that is put back since (see `rests`): they wake now."""
    due: list[int] = []
    for retry_at_ns, job_id in reversed(state.book.resting):
        if retry_at_ns <= now_ns + REST_MAX_NS or len(due) == BATCH_MAX:
            break
        if state.jobs[job_id].begin_ns <= now_ns:
            due.append(job_id)
    return [events.Woken(at_ns=now_ns, job_ids=tuple(due))] if due else []


def _leased(
    state: State, rules: Rules, device: Device, claim: policy.Claim, new_turn: bool, now_ns: int
) -> events.Leased:
    job = claim.job
    testing = bool(job.canary_due) or device.state is DeviceState.UNHEALTHY
    return events.Leased(
        at_ns=now_ns,
        device=device.name,
        job_id=job.job_id,
        attempt=job.attempt + 1,
        level=claim.level,
        turn_ns=policy.turn_ns(state, rules, job.tenant) if new_turn else 0,
        canary=testing and canary_line(job) > 0,
    )


def _yield(state: State, rules: Rules, seen: policy.Survey, now_ns: int) -> Events:
    due = policy.due_yield(state, rules, seen, now_ns)
    if due is None:
        return []
    device, claim, why = due
    assert device.lease is not None, device.name
    wanted_for = policy.named(claim.job, state.jobs[device.lease.job_id])
    return ask_back(device, why, now_ns, detail=f"for {wanted_for}")


# --- retention ------------------------------------------------------------------------------------------------------


def retain(state: State, rules: Rules, now_ns: int) -> Events:
    """A bounded piece of what is too old or too much, oldest first; nothing when all is kept within its bounds."""
    removed: Events = []
    bytes_left = state.book.final_bytes
    oldest_ns = now_ns - rules.final_days * DAY_NS
    for finished_ns, job_id in state.book.finals[:BATCH_MAX]:
        if finished_ns > oldest_ns and bytes_left <= rules.outputs_bytes_max:
            break
        bytes_left -= book.output_bytes(state.jobs[job_id])
        removed.append(events.Removed(at_ns=now_ns, job_id=job_id))
    return removed or _forgotten(state, now_ns)


def _forgotten(state: State, now_ns: int) -> Events:
    oldest_ns = now_ns - SUBMIT_ID_DAYS * DAY_NS
    due: list[int] = []
    for removal in state.removed.values():
        if removal.removed_ns > oldest_ns or len(due) == BATCH_MAX:
            break
        due.append(removal.job_id)
    return [events.SubmitIdsForgotten(at_ns=now_ns, job_ids=tuple(due))] if due else []
