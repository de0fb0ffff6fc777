"""Input in, events out.

Rule 1: decide() reads the state and the rules, and writes nothing.
Rule 2: every "no" in gpujobd is said behind this function, before anything reaches the journal, as `Refused`.
Rule 3: the same answer whatever the hour but `now_ns`: no clock, no luck.
Rule 4: no events: nothing to do, or nothing to add (a repeated submission, a stale report, a wish already granted).

    admission.py  the door: submissions      leases.py  reports of workers
    telling.py    the notifier: is it here, whom may it be asked to tell
    sightings.py  looks at devices from outside
    house.py      start, stop, time, order   here       what people want of jobs that are in
"""

from __future__ import annotations

from gpujobd.core import admission, events, house, leases, rights, sightings, telling
from gpujobd.core.admission import MESSAGE_CHARS_MAX, find_submitted
from gpujobd.core.inputs import (
    AnyInput,
    Attend,
    CanaryOk,
    Cancel,
    CheckpointReached,
    DeviceSeen,
    DiskSpace,
    Finished,
    Foretell,
    GaveBack,
    Leave,
    Loaded,
    LoadFailed,
    Lost,
    MemoryWanted,
    MoveFirst,
    Pause,
    Release,
    Remove,
    Reserve,
    Resume,
    Retain,
    SetPriority,
    Spooled,
    Start,
    Stop,
    Submit,
    SwitchQueue,
    Tick,
    Unkillable,
    Unloaded,
    Who,
)
from gpujobd.core.model import FINAL, Device, Job, JobState, Reason, Rules, State, YieldWhy
from gpujobd.core.refused import Refused
from gpujobd.protocol import ErrorCode

__all__ = ["Refused", "decide", "find_submitted"]


Events = list[events.AnyEvent]


def decide(state: State, rules: Rules, given: AnyInput, now_ns: int) -> Events:
    """What follows from this input, as facts to be journaled.

    Raises:
        Refused: a wish that is declined; nothing follows from it.
    """
    match given:
        case Tick():
            return house.tick(state, rules, now_ns)
        case CheckpointReached():
            return leases.checkpoint_reached(state, rules, given, now_ns)
        case Submit():
            return admission.submit(state, rules, given, now_ns)
        case Reserve():
            return admission.reserve(state, rules, given, now_ns)
        case Release():
            return admission.release(state, given, now_ns)
        case Cancel():
            return _cancel(state, given, now_ns)
        case Pause():
            return _pause(state, given, now_ns)
        case Resume():
            return _resume(state, given, now_ns)
        case SetPriority():
            return _set_priority(state, given, now_ns)
        case MoveFirst():
            return _move_first(state, given, now_ns)
        case Remove():
            return _remove(state, given, now_ns)
        case SwitchQueue():
            return _switch_queue(state, given, now_ns)
        case Attend():
            return telling.attend(state, given, now_ns)
        case Leave():
            return telling.leave(state, now_ns)
        case Start():
            return house.start(state, rules, given, now_ns)
        case Stop():
            return house.stop(state, now_ns)
        case Spooled():
            return house.spooled(state, given, now_ns)
        case Foretell():
            return house.foretell(state, given, now_ns)
        case DiskSpace():
            return house.disk_space(state, given, now_ns)
        case Retain():
            return house.retain(state, rules, now_ns)
        case Loaded():
            return leases.loaded(state, given, now_ns)
        case LoadFailed():
            return leases.load_failed(state, rules, given, now_ns)
        case Unloaded():
            return leases.unloaded(state, given, now_ns)
        case GaveBack():
            return leases.gave_back(state, rules, given, now_ns)
        case Finished():
            return leases.finished(state, rules, given, now_ns)
        case Lost():
            return leases.lost(state, rules, given, now_ns)
        case CanaryOk():
            return leases.canary_ok(state, given, now_ns)
        case Unkillable():
            return leases.unkillable(state, given, now_ns)
        case DeviceSeen():
            return sightings.device_seen(state, rules, given, now_ns)
        case MemoryWanted():
            return sightings.memory_wanted(state, given, now_ns)


# --- what people want of jobs that are in --------------------------------------------------------------------------


def _cancel(state: State, given: Cancel, now_ns: int) -> Events:
    job = _job(state, "cancel", given.who, given.job_id)
    message = _message(given.message)
    if job.state in FINAL:
        raise _bad_state(job, "cannot be cancelled")
    device = _device_of(state, job)
    if device is not None:
        return house.ask_back(device, YieldWhy.CANCEL, now_ns, detail=message, by=given.who.uid)
    return [events.Cancelled(at_ns=now_ns, job_id=job.job_id, by=given.who.uid, message=message)]


def _pause(state: State, given: Pause, now_ns: int) -> Events:
    job = _job(state, "pause", given.who, given.job_id)
    message = _message(given.message)
    if job.state in FINAL or job.state is JobState.PAUSED:
        raise _bad_state(job, "cannot be paused")
    device = _device_of(state, job)
    if device is None:
        return [leases.paused(job, given.who.uid, message, now_ns)]
    lease = device.lease
    if lease is not None and lease.yield_why is YieldWhy.CANCEL:
        raise Refused(ErrorCode.BAD_STATE, f"job {job.job_id} is being cancelled")
    return house.ask_back(device, YieldWhy.PAUSE, now_ns, detail=message, by=given.who.uid)


def _resume(state: State, given: Resume, now_ns: int) -> Events:
    """Also takes back a pause that the worker has not answered yet: it still yields, and the job waits in line."""
    job = _job(state, "resume", given.who, given.job_id)
    device = _device_of(state, job)
    lease = device.lease if device else None
    if lease is not None and lease.yield_why is YieldWhy.PAUSE:
        _check_hold(given.who, lease.yield_by != job.owner)
        return [
            events.YieldRequested(
                at_ns=now_ns,
                device=lease.device,
                job_id=job.job_id,
                attempt=lease.attempt,
                why=YieldWhy.STOPPING if state.stopping else YieldWhy.TURN_OVER,
                detail="resumed",
                by=given.who.uid,
            )
        ]
    if job.state is not JobState.PAUSED:
        raise _bad_state(job, "is not paused")
    _check_hold(given.who, job.reason is Reason.HELD_BY_ADMIN)
    message = _message(given.message)
    return [events.Resumed(at_ns=now_ns, job_id=job.job_id, by=given.who.uid, message=message)]


def _check_hold(who: Who, held_by_admin: bool) -> None:
    if held_by_admin and not who.admin:
        raise Refused(
            ErrorCode.FORBIDDEN, "an administrator holds this job: only an administrator resumes it"
        )


def _set_priority(state: State, given: SetPriority, now_ns: int) -> Events:
    job = _job(state, "priority", given.who, given.job_id)
    if job.state in FINAL:
        raise _bad_state(job, "has no priority any more")
    if job.priority is given.priority:
        return []
    admission.check_priority(given.who, given.priority)
    message = _message(given.message)
    return [
        events.PriorityChanged(
            at_ns=now_ns, job_id=job.job_id, priority=given.priority, by=given.who.uid, message=message
        )
    ]


def _move_first(state: State, given: MoveFirst, now_ns: int) -> Events:
    job = _job(state, "first", given.who, given.job_id)
    if job.state not in (JobState.QUEUED, JobState.PAUSED):
        raise _bad_state(job, "does not stand in a line")
    message = _message(given.message)
    return [events.MovedFirst(at_ns=now_ns, job_id=job.job_id, by=given.who.uid, message=message)]


def _remove(state: State, given: Remove, now_ns: int) -> Events:
    job = _job(state, "rm", given.who, given.job_id)
    if job.state not in FINAL:
        raise _bad_state(job, "cannot be removed before it is over")
    message = _message(given.message)
    return [events.Removed(at_ns=now_ns, job_id=job.job_id, by=given.who.uid, message=message)]


def _switch_queue(state: State, given: SwitchQueue, now_ns: int) -> Events:
    _message(given.message)
    if not rights.allowed("queue", given.who, None):
        raise Refused(ErrorCode.FORBIDDEN, f"queue {given.verb} takes an administrator")
    return house.switch_queue(state, given, now_ns)


def _job(state: State, verb: str, who: Who, job_id: int) -> Job:
    """The job, if `who` may do this to it.

    Raises:
        Refused: no_such_job, in the same words for a number never given and for somebody else's job; forbidden
            only to those who may see it.
    """
    job = state.jobs.get(job_id)
    if job is None or not rights.allowed("show", who, job):
        raise Refused(ErrorCode.NO_SUCH_JOB, f"no job {job_id}")
    if not rights.allowed(verb, who, job):
        raise Refused(ErrorCode.FORBIDDEN, f"job {job_id} belongs to somebody else of tenant {job.tenant}")
    return job


def _device_of(state: State, job: Job) -> Device | None:
    return state.devices[job.device] if job.state is JobState.RUNNING else None


def _bad_state(job: Job, cannot: str) -> Refused:
    return Refused(ErrorCode.BAD_STATE, f"job {job.job_id} is {job.state} and {cannot}")


def _message(text: str) -> str:
    if len(text) > MESSAGE_CHARS_MAX:
        raise Refused(
            ErrorCode.BAD_REQUEST,
            f"a message has at most {MESSAGE_CHARS_MAX} characters",
            limit=MESSAGE_CHARS_MAX,
            current=len(text),
        )
    return text
