"""The daemon's own log: readable on a terminal, one JSON object a line where asked.

Rule 1: fields have the journal's names (JOB_ID, TENANT, HANDLER, DEVICE, EVENT, ATTEMPT), given as `extra=`.
Rule 2: a finished job is one entry with all its stage timings.
Rule 3: nothing that came from outside begins a line of its own.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import Final

from gpujobd.core.events import (
    AnyEvent,
    Cancelled,
    Completed,
    DeviceFellIll,
    DeviceRecovered,
    DiskFilled,
    DiskFreed,
    Expired,
    Failed,
    HandlerLoaded,
    HandlerLoadFailed,
    Leased,
    LeaseLost,
    Paused,
    Submitted,
)
from gpujobd.core.model import FINAL, S_NS, Job, State

log = logging.getLogger("gpujobd.jobs")

FIELDS: Final = ("job_id", "tenant", "handler", "device", "event", "attempt")
TIMINGS: Final = (
    "queued_s",
    "load_s",
    "read_s",
    "compute_s",
    "write_s",
    "sync_s",
    "total_s",
    "items",
    "failed",
    "items_per_s",
)


class Readable(logging.Formatter):
    """`<local time> LEVEL message`; systemd adds the time itself."""

    def __init__(self, *, times: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s" if times else "%(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """One line, whatever it quotes: people's words must not forge lines, nor drive a terminal."""
        return printable(super().formatMessage(record))


class JsonLines(logging.Formatter):
    """One object a line, fields in the journal's names."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "at": dt.datetime.fromtimestamp(record.created, tz=dt.UTC).isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: getattr(record, name) for name in (*FIELDS, *TIMINGS) if hasattr(record, name)}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return printable(json.dumps(entry, ensure_ascii=False))


def printable(text: str) -> str:
    """The same with everything that is no printable character written out, in a way that JSON reads back."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def set_up(style: str, *, verbose: bool) -> None:
    """Send the daemon's log to stderr. style: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else Readable(times=sys.stderr.isatty()))
    root = logging.getLogger("gpujobd")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)


def facts(state: State, committed: list[tuple[int, AnyEvent]]) -> None:
    """Log what an operator wants to read of these events; called after they were applied."""
    for _, event in committed:
        if not isinstance(event, Submitted):  # these come by the thousand
            _fact(state, event)


def _fact(state: State, event: AnyEvent) -> None:
    match event:
        case Leased():
            job = state.jobs.get(event.job_id)
            if job is not None:
                _say(
                    logging.INFO,
                    f"job {job.job_id} runs on {event.device}, attempt {event.attempt}",
                    job,
                    event,
                )
        case Completed() | Failed() | Cancelled() | Expired():
            job = state.jobs.get(event.job_id)
            if job is not None and job.state in FINAL:
                _ended(job, event)
        case LeaseLost() | HandlerLoadFailed():
            job = state.jobs.get(event.job_id)
            if job is not None:
                what = (
                    event.error
                    if isinstance(event, HandlerLoadFailed)
                    else f"{event.cause} {event.detail}".strip()
                )
                _say(logging.WARNING, f"job {job.job_id} lost its lease: {what}", job, event)
        case Paused():
            job = state.jobs.get(event.job_id)
            if job is not None:
                _say(
                    logging.INFO,
                    f"job {job.job_id} paused: {event.reason} {event.detail}".rstrip(),
                    job,
                    event,
                )
        case HandlerLoaded():
            seconds = event.load_ns / S_NS
            log.info(
                "%s loaded on %s in %.2f s",
                event.handler,
                event.device,
                seconds,
                extra={
                    "handler": event.handler,
                    "device": event.device,
                    "event": "handler_loaded",
                    "load_s": seconds,
                },
            )
        case DeviceFellIll():
            log.error("device %s is unhealthy: %s: %s", event.device, event.reason, event.detail)
        case DeviceRecovered():
            log.info("device %s is ok again", event.device)
        case DiskFilled():
            log.error("the disk is full, work waits: %s", event.detail)
        case DiskFreed():
            log.info("there is disk space again")
        case _:
            pass


def _ended(job: Job, event: AnyEvent) -> None:
    t, checkpoint = job.timings, job.checkpoint
    used_s = job.used_ns / S_NS
    tried = checkpoint.done + checkpoint.failed
    figures: dict[str, object] = {
        "queued_s": round((job.started_ns - job.submitted_ns) / S_NS, 3) if job.started_ns else None,
        "load_s": round(t.load_s, 3),
        "read_s": round(t.read_s, 3),
        "compute_s": round(t.compute_s, 3),
        "write_s": round(t.write_s, 3),
        "sync_s": round(t.sync_s, 3),
        "total_s": round((job.finished_ns - job.submitted_ns) / S_NS, 3),
        "items": job.items,
        "failed": checkpoint.failed,
        "items_per_s": round(tried / used_s, 1) if used_s > 0 else None,
    }
    message = f"job {job.job_id} {job.state}: {checkpoint.done} done, {checkpoint.failed} failed of {job.items} in {used_s:.1f} s"
    _say(logging.INFO, message, job, event, **figures)


def _say(level: int, message: str, job: Job, event: AnyEvent, **figures: object) -> None:
    fields = {
        "job_id": job.job_id,
        "tenant": job.tenant,
        "handler": job.handler,
        "device": job.device,
        "event": type(event).__struct_config__.tag,
        "attempt": job.attempt,
    }
    log.log(level, "%s", message, extra=fields | figures)
