"""What the daemon's log tells of the events: the story of each job, and what an operator has to know.

Rule 1: told after the commit: what the log says is on disk.
Rule 2: `journalctl JOB_ID=42` is the whole story of job 42. It begins with its first lease, which says who submitted it
and when, or with its end where it never ran. Submissions and checkpoints come by the thousand a second and are for
`serve --verbose`; the daemon's own journal has them in any case (`jobctl events`).
Rule 3: a finished job is one entry with all its stage timings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from gpujobd.catalog import kind
from gpujobd.core.events import (
    AnyEvent,
    CanaryPassed,
    Cancelled,
    Checkpointed,
    Completed,
    DeviceCleared,
    DeviceCrowded,
    DeviceFellIll,
    DeviceRecovered,
    DiskFilled,
    DiskFreed,
    DriverMismatched,
    Expired,
    Failed,
    Foretold,
    HandlerLoaded,
    HandlerLoadFailed,
    InputsSpooled,
    Leased,
    LeaseLost,
    MovedFirst,
    Paused,
    PriorityChanged,
    QueueSwitched,
    Removed,
    ReservationReleased,
    Reserved,
    Resumed,
    SubmitIdsForgotten,
    Submitted,
    Woken,
    WorkerGone,
    Yielded,
    YieldRequested,
)
from gpujobd.core.model import S_NS, Job, Reason, State

log = logging.getLogger("gpujobd.jobs")

FREQUENT: Final = frozenset(
    {
        Submitted,
        Checkpointed,
        Reserved,
        ReservationReleased,
        InputsSpooled,
        Woken,
        Foretold,
        SubmitIdsForgotten,
        WorkerGone,
    }
)
"""By the thousand, or of no use to anybody who does not read the code."""
KINDS: Final[dict[str, str]] = {Reason.CRASH_LOOP: "crash_loop", Reason.OUTPUT_DAMAGED: "output_damaged"}
"""Pauses that somebody must look into: kinds of their own, to be alerted on."""

ENDS: Final = (Completed, Failed, Cancelled, Expired)

Namer = Callable[[int], str]


class Told(NamedTuple):
    """What an entry says of a job, after "job 12 "."""

    what: str
    level: int = logging.INFO
    reason: str | None = None


def facts(state: State, committed: list[tuple[int, AnyEvent]], name: Namer) -> None:
    """Log what an operator wants to read of these events; called after they were applied. `name` of a uid."""
    everything = log.isEnabledFor(logging.DEBUG)
    for _, event in committed:
        if everything or type(event) not in FREQUENT:
            job = state.jobs.get(getattr(event, "job_id", 0))
            if job is None:
                _of_the_house(event, name)
            elif told := _of_a_job(job, event, name):
                _say(job, event, told)


def _of_the_house(event: AnyEvent, name: Namer) -> None:
    match event:
        case QueueSwitched():
            _say_switched(event, name)
        case HandlerLoaded():
            load_s = event.load_ns / S_NS
            fields = {"handler": event.handler, "device": event.device, "load_s": round(load_s, 3)}
            message = "%s loaded on %s in %.2f s"
            log.info(message, event.handler, event.device, load_s, extra=kind("handler_loaded", **fields))
        case DeviceFellIll():
            fields = {"device": event.device, "reason": event.reason}
            message = "device %s is unhealthy: %s: %s"
            extra = kind("device_fell_ill", **fields)
            log.error(message, event.device, event.reason, event.detail, extra=extra)
        case DeviceRecovered():
            extra = kind("device_recovered", device=event.device)
            log.info("device %s is ok again", event.device, extra=extra)
        case DeviceCrowded():
            extra = kind("device_crowded", device=event.device)
            log.warning("device %s is busy elsewhere: %s", event.device, event.detail, extra=extra)
        case DeviceCleared():
            extra = kind("device_cleared", device=event.device)
            log.info("device %s has room for every handler again", event.device, extra=extra)
        case DriverMismatched():
            extra = kind("driver_mismatched", device=event.device)
            log.error("device %s: the driver was replaced: %s", event.device, event.detail, extra=extra)
        case DiskFilled():
            log.error("the disk is full, work waits: %s", event.detail, extra=kind("disk_filled"))
        case DiskFreed():
            log.info("there is disk space again, work goes on", extra=kind("disk_freed"))
        case Removed():
            extra = kind("removed", job_id=event.job_id, by_uid=_uid(event.by))
            level = logging.DEBUG if event.by < 0 else logging.INFO  # retention removes them by the thousand
            log.log(level, "job %d removed%s", event.job_id, _by(event.by, event.message, name), extra=extra)


def _say_switched(event: QueueSwitched, name: Namer) -> None:
    switches = (("stopped", event.stopped), ("disabled", event.disabled), ("draining", event.draining))
    words = ", ".join(word for word, on in switches if on) or "open"
    extra = kind("queue_switched", by_uid=_uid(event.by), reason=words)
    log.warning("the queue is %s%s", words, _by(event.by, event.message, name), extra=extra)


def _of_a_job(job: Job, event: AnyEvent, name: Namer) -> Told | None:
    match event:
        case Submitted():
            return Told(
                f"submitted by {name(job.owner)}: {job.items:,} items for {job.handler}", logging.DEBUG
            )
        case Leased():
            return Told(f"runs on {event.device}, attempt {event.attempt}{_since(job, event, name)}")
        case YieldRequested():
            detail = f" {event.detail}" if event.detail and event.by < 0 else ""
            said = event.detail if event.by >= 0 else ""
            return Told(
                f"is asked back: {event.why}{detail}{_by(event.by, said, name)}", reason=event.why.value
            )
        case Yielded():
            return Told(f"gave {job.device} back: {_figures(job)}")
        case Checkpointed():
            return Told(f"is at {_figures(job)}", logging.DEBUG)
        case LeaseLost():
            detail = f": {event.detail}" if event.detail else ""
            return Told(f"lost its lease: {event.cause}{detail}", logging.WARNING, event.cause)
        case HandlerLoadFailed():
            return Told(f"lost its lease: {job.handler} did not load: {event.error}", logging.WARNING, "load")
        case CanaryPassed():
            lines = ", ".join(map(str, event.lines))
            return Told(
                f"killed its workers with lines {lines}, which fail: another line passed", logging.WARNING
            )
        case Paused():
            level = logging.ERROR if event.reason in KINDS else logging.INFO
            return Told(
                f"paused: {event.reason}{_by(event.by, event.detail, name)}", level, event.reason.value
            )
        case Resumed():
            return Told(f"resumed{_by(event.by, event.message, name)}")
        case PriorityChanged():
            level_name = event.priority.name.lower()
            return Told(f"has priority {level_name}{_by(event.by, event.message, name)}")
        case MovedFirst():
            return Told(f"stands first in its line{_by(event.by, event.message, name)}")
        case Completed():
            return Told("completed")
        case Failed():
            return Told(f"failed: {event.reason}: {event.detail}", logging.WARNING, event.reason.value)
        case Cancelled():
            return Told(f"cancelled{_by(event.by, event.message, name)}")
        case Expired():
            return Told("expired: its deadline has passed")
        case _:
            return None


def _since(job: Job, event: Leased, name: Namer) -> str:
    """The first lease says what the submission was, a later one how far the job is."""
    if event.attempt > 1:
        return f": {_figures(job)} so far" if job.checkpoint.upto else ""
    waited_s = (event.at_ns - job.submitted_ns) / S_NS
    title = f" as {job.name}" if job.name else ""
    return (
        f": {job.items:,} items for {job.handler}, submitted by {name(job.owner)}{title} {waited_s:.1f} s ago"
    )


def _say(job: Job, event: AnyEvent, told: Told) -> None:
    what, fields = told.what, {}
    if isinstance(event, ENDS):
        what = f"{what}: {_figures(job)} in {job.used_ns / S_NS:.1f} s"
        fields = _stages(job)
    extra = kind(
        KINDS.get(told.reason or "", str(event.__struct_config__.tag)),
        job_id=job.job_id,
        tenant=job.tenant,
        handler=job.handler,
        device=job.device or None,
        attempt=job.attempt or None,
        reason=told.reason,
        by_uid=_uid(getattr(event, "by", -1)),
        **fields,
    )
    log.log(told.level, "job %d %s", job.job_id, what, extra=extra, stacklevel=2)


def _stages(job: Job) -> dict[str, object]:
    """Where the time of a job went."""
    t, used_s = job.timings, job.used_ns / S_NS
    tried = job.checkpoint.done + job.checkpoint.failed
    return {
        "queued_s": round((job.started_ns - job.submitted_ns) / S_NS, 3) if job.started_ns else None,
        "load_s": round(t.load_s, 3),
        "read_s": round(t.read_s, 3),
        "compute_s": round(t.compute_s, 3),
        "write_s": round(t.write_s, 3),
        "sync_s": round(t.sync_s, 3),
        "total_s": round((job.finished_ns - job.submitted_ns) / S_NS, 3),
        "items": job.items,
        "failed": job.checkpoint.failed,
        "items_per_s": round(tried / used_s, 1) if used_s > 0 else None,
        "forecast_error": None if job.forecast_error is None else round(job.forecast_error, 3),
    }


def _figures(job: Job) -> str:
    point = job.checkpoint
    return f"{point.done:,} done, {point.failed:,} failed of {job.items:,}"


def _by(uid: int, message: str, name: Namer) -> str:
    """` by alice: message`; uid -1 is the daemon itself."""
    return (f" by {name(uid)}" if uid >= 0 else "") + (f": {message}" if message else "")


def _uid(by: int) -> int | None:
    return by if by >= 0 else None
