"""What a job, a device or a queue looks like in words."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Final

from gpujobd import protocol as p
from msgspec import UNSET, UnsetType

from jobctl.exits import Exit
from jobctl.table import Column, clean, counted, size, table
from jobctl.times import local, relative, spoken, told

FINAL: Final = frozenset({"completed", "failed", "cancelled", "expired"})
OPEN: Final = ("running", "queued", "paused")

LIST_COLUMNS: Final = (
    Column("ID", right=True),
    Column("STATE"),
    Column("PRI"),
    Column("TENANT", shrink=True),
    Column("HANDLER", shrink=True),
    Column("NAME", shrink=True),
    Column("DONE/TOTAL", right=True),
    Column("FAILED", right=True),
    Column("WAITING FOR / ETA", shrink=True),
)


def job_table(jobs: Sequence[p.Job], at: dt.datetime) -> str:
    """ID STATE PRI TENANT HANDLER NAME DONE/TOTAL FAILED, and what it waits for."""
    rows = [
        (
            str(job.id),
            job.state,
            job.priority,
            job.tenant,
            job.handler,
            job.name or "" if job.name is not UNSET else "",
            f"{counted(job.items.done)}/{counted(job.items.total)}",
            counted(job.items.failed) if job.items.failed else "",
            outlook(job, at),
        )
        for job in jobs
    ]
    return table(LIST_COLUMNS, rows)


def outlook(job: p.Job, at: dt.datetime) -> str:
    """Why it waits and until when; for one that runs, when it will be done; for a final one, since when."""
    match job.state:
        case "queued":
            return ", ".join(part for part in (why(job), _when("starts", start_at(job), at)) if part)
        case "running":
            asked = f"yields ({job.yielding})" if job.yielding is not UNSET else ""
            return asked or _when("done", finish_at(job), at)
        case "paused":
            return why(job)
    since = relative(job.finished_at, at) if job.finished_at is not UNSET else ""
    return ", ".join(part for part in (given(job.reason), since) if part)


def why(job: p.Job) -> str:
    """`FairShare: production is owed 212 s`."""
    return ": ".join(part for part in (given(job.reason), given(job.reason_detail)) if part)


def _when(what: str, moment: dt.datetime | UnsetType, at: dt.datetime) -> str:
    if moment is UNSET:
        return ""
    return f"{what} {relative(moment, at)}" if moment > at else f"{what} soon"


def given(text: str | UnsetType) -> str:
    return "" if text is UNSET else text


def start_at(job: p.Job | p.Accepted) -> dt.datetime | UnsetType:
    return job.forecast.start_at if job.forecast is not UNSET else UNSET


def finish_at(job: p.Job | p.Accepted) -> dt.datetime | UnsetType:
    return job.forecast.finish_at if job.forecast is not UNSET else UNSET


# --- one job ----------------------------------------------------------------------------------------------------


def job_lines(job: p.Job, at: dt.datetime) -> str:
    """`key: value`, a line each; what is not known is left out."""
    facts = [(f"{key}:", clean(value)) for key, value in _facts(job, at) if value]
    width = max(len(key) for key, _ in facts)
    return "".join(f"{key:<{width}} {value}\n" for key, value in facts)


def _facts(job: p.Job, at: dt.datetime) -> Iterator[tuple[str, str]]:
    yield "id", str(job.id)
    yield "name", given(job.name)
    yield "state", job.state + (f" (yields: {job.yielding})" if job.yielding is not UNSET else "")
    yield "reason", given(job.reason)
    yield "detail", given(job.reason_detail)
    yield "tenant", job.tenant + (f" (submitted by {job.owner})" if job.owner != job.tenant else "")
    yield "handler", job.handler
    yield "params", _params(job)
    yield "priority", job.priority
    yield "items", progress(job)
    yield "failed with", failed_with(job)
    yield "failures max", "" if job.failures_max is UNSET else counted(job.failures_max)
    yield "position", "" if job.position is UNSET else counted(job.position)
    yield from _moments(job, at)
    yield "first forecast", _foretold(job, at)
    yield "device", given(job.device)
    yield "attempt", _attempt(job)
    yield "retry of", "" if job.retry_of is UNSET else str(job.retry_of)
    yield "GPU time", "" if job.gpu_s is UNSET else spoken(job.gpu_s)
    yield "timings", _timings(job)
    yield "tells", _tells(job)


def _moments(job: p.Job, at: dt.datetime) -> Iterator[tuple[str, str]]:
    forecast = job.forecast if job.forecast is not UNSET and job.state not in FINAL else p.Forecast()
    for key, moment in (
        ("submitted", job.submitted_at),
        ("not before", job.begin_at),
        ("deadline", job.deadline_at),
        ("started", job.started_at),
        ("finished", job.finished_at),
        ("starts", forecast.start_at if job.started_at is UNSET else UNSET),
        ("done", forecast.finish_at),
        ("at the latest", forecast.finish_by_90),
    ):
        yield key, "" if moment is UNSET else told(moment, at)


def _foretold(job: p.Job, at: dt.datetime) -> str:
    """`done 17:05:12, at the latest 17:06:02; it took 8 % longer`."""
    if job.foretold is UNSET:
        return ""
    told_then = job.foretold
    text = f"done {local(told_then.finish_at, at)}, at the latest {local(told_then.finish_by_90, at)}"
    return text if told_then.error is UNSET else f"{text}; it took {longer(told_then.error)}"


def longer(error: float) -> str:
    """`8 % longer`, `3 % less`, `as long`: than was forecast."""
    percent = round(abs(error) * 100)
    if not percent:
        return "as long"
    return f"{counted(percent)} % {'longer' if error > 0 else 'less'}"


def progress(job: p.Job) -> str:
    """`21,595 of 50,000 done (43 %)`; `21,592 done, 3 failed of 50,000 (43 %)`."""
    items = job.items
    total = counted(items.total)
    if items.failed:
        text = f"{counted(items.done)} done, {counted(items.failed)} failed of {total}"
    else:
        text = f"{counted(items.done)} of {total} done"
    return text + (f" ({percent(items)} %)" if items.total else "")


def failed_with(job: p.Job) -> str:
    """`bad_json 12, rejected 3`: what is most first."""
    codes = {} if job.failure_codes is UNSET else job.failure_codes
    most_first = sorted(codes.items(), key=lambda code: (-code[1], code[0]))
    return ", ".join(f"{code} {counted(count)}" for code, count in most_first)


def _tells(job: p.Job) -> str:
    """`ops, mailto:alice@example.org on start, finish`."""
    whom = [] if job.notify is UNSET else job.notify
    when = [] if job.notify_on is UNSET else job.notify_on
    return " ".join(part for part in (", ".join(whom), f"on {', '.join(when)}" if when else "") if part)


def percent(items: p.Items) -> int:
    """Of the items that were tried; 100 only when all were."""
    return (items.done + items.failed) * 100 // items.total if items.total else 100


def _params(job: p.Job) -> str:
    params = job.params if job.params is not UNSET else {}
    return " ".join(
        f"{key}={str(value).lower() if value in (True, False) else value}" for key, value in params.items()
    )


def _attempt(job: p.Job) -> str:
    if job.attempt is UNSET:
        return ""
    broken = "" if job.interruptions is UNSET else f" ({counted(job.interruptions)} interrupted)"
    return counted(job.attempt) + broken


def _timings(job: p.Job) -> str:
    if job.timings is UNSET:
        return ""
    t = job.timings
    stages = (("queued", t.queued_s), ("load", t.load_s), ("compute", t.compute_s), ("io", t.io_s))
    parts = [f"{stage} {spoken(spent)}" for stage, spent in stages if spent is not UNSET]
    if t.items_per_s is not UNSET:
        parts.append(rate(t.items_per_s))
    return ", ".join(parts)


def rate(items_per_s: float) -> str:
    return f"{items_per_s:,.0f} items/s" if items_per_s >= 10 else f"{items_per_s:.2g} items/s"


def items_per_s(job: p.Job) -> str:
    if job.timings is UNSET or job.timings.items_per_s is UNSET:
        return ""
    return rate(job.timings.items_per_s)


# --- how a job ended --------------------------------------------------------------------------------------------


def ended(job: p.Job) -> Exit:
    """0 only for a completed job without a failed item."""
    return Exit.OK if job.state == "completed" and not job.items.failed else Exit.FAILED


def ending(job: p.Job) -> str:
    """`job 42 completed: 50,000 items, 3 failed`; `job 42 failed: HandlerFailing: no such model`."""
    because = f"{why(job)}; " if why(job) else ""
    return f"job {job.id} {job.state}: {because}{progress(job)}"


# --- the status table -------------------------------------------------------------------------------------------


def status_page(status: p.StatusTable, at: dt.datetime) -> str:
    parts = [
        _switches(status.switches),
        device_page(status.devices),
        _running(status, at),
        _waiting(status, at),
    ]
    if status.paused:
        parts.append(f"{counted(status.paused)} paused: `jobctl list --state paused`\n")
    return "\n".join(part for part in parts if part)


def switch_words(switches: p.Switches) -> list[str]:
    """What keeps the queue from its work, in words."""
    flags = (
        (switches.stopping, "the daemon is stopping"),
        (switches.draining, "draining: nothing new is started"),
        (switches.stopped, "stopped: nothing is started"),
        (switches.disabled, "disabled: no submissions"),
        (switches.disk_full, "the disk is full: work waits for space"),
    )
    return [word for on, word in flags if on]


def _switches(switches: p.Switches) -> str:
    words = switch_words(switches)
    if not words:
        return ""
    return f"queue: {'; '.join(words)}{' -- ' + clean(switches.message) if switches.message else ''}\n"


def device_page(devices: Sequence[p.DeviceView]) -> str:
    columns = (
        Column("DEVICE"),
        Column("STATE"),
        Column("JOB", right=True),
        Column("TENANT", shrink=True),
        Column("LOADED", shrink=True),
        Column("MEMORY", right=True),
        Column("BUSY", right=True),
        Column("TEMP", right=True),
        Column("HARDWARE", shrink=True),
        Column("REASON", shrink=True),
    )
    return table(columns, [_device_row(device) for device in devices]) if devices else "no devices\n"


def _device_row(device: p.DeviceView) -> tuple[str, ...]:
    why = ": ".join(part for part in (given(device.reason), given(device.reason_detail)) if part)
    used = device.memory_used_bytes if device.memory_used_bytes is not UNSET else device.memory_bytes
    memory = size(used) if used is not UNSET else ""
    if memory and device.memory_total_bytes is not UNSET:
        memory += f" of {size(device.memory_total_bytes)}"
    return (
        device.name,
        device.state,
        str(device.job) if device.job is not UNSET else "",
        given(device.tenant),
        " ".join(device.loaded),
        memory,
        f"{device.utilisation:.0f} %" if device.utilisation is not UNSET else "",
        f"{device.temperature_c:.0f} °C" if device.temperature_c is not UNSET else "",
        given(device.hardware),
        why,
    )


def _running(status: p.StatusTable, at: dt.datetime) -> str:
    if not status.running:
        return "nothing is running\n"
    columns = (
        Column("RUNNING", right=True),
        Column("TENANT", shrink=True),
        Column("HANDLER", shrink=True),
        Column("NAME", shrink=True),
        Column("DONE/TOTAL", right=True),
        Column("%", right=True),
        Column("FAILED", right=True),
        Column("RATE", right=True),
        Column("ETA", shrink=True),
    )
    rows = [
        (
            str(job.id),
            job.tenant,
            job.handler,
            given(job.name),
            f"{counted(job.items.done)}/{counted(job.items.total)}",
            str(percent(job.items)),
            counted(job.items.failed) if job.items.failed else "",
            items_per_s(job),
            outlook(job, at),
        )
        for job in status.running
    ]
    return table(columns, rows)


def _waiting(status: p.StatusTable, at: dt.datetime) -> str:
    others = status.queued_in_all - len(status.waiting)
    if not status.waiting:
        return (
            f"nothing of yours is waiting, {counted(others)} of others\n"
            if others > 0
            else "nothing is waiting\n"
        )
    columns = (
        Column("WAITING", right=True),
        Column("PRI"),
        Column("TENANT", shrink=True),
        Column("HANDLER", shrink=True),
        Column("NAME", shrink=True),
        Column("ITEMS", right=True),
        Column("POS", right=True),
        Column("WHY", shrink=True),
        Column("START", shrink=True),
    )
    rows = [
        (
            str(job.id),
            job.priority,
            job.tenant,
            job.handler,
            given(job.name),
            counted(job.items.total - job.items.done - job.items.failed),
            str(job.position) if job.position is not UNSET else "",
            why(job),
            _when("", start_at(job), at).strip(),
        )
        for job in status.waiting[:SHOWN_MAX]
    ]
    more = status.queued_in_all - len(rows)
    return table(columns, rows) + (f"and {counted(more)} more in line\n" if more > 0 else "")


SHOWN_MAX: Final = 20  # waiting jobs on the status page: it answers "how is it going", `list` has them all
