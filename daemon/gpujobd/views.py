"""How the state looks to people: core records in, protocol records out. Reads only; never waits."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from gpujobd import protocol
from gpujobd.config import Config
from gpujobd.core import model
from gpujobd.core.admission import submitted_lately
from gpujobd.core.events import AnyEvent, DeviceFellIll, LeaseLost, Submitted
from gpujobd.core.forecast import Outlook
from gpujobd.core.inputs import Who
from gpujobd.core.model import S_NS, JobState, State
from gpujobd.gpus import Sight
from gpujobd.nvml import Process
from gpujobd.supervisor import Hardware

Names = Callable[[int], str]
TENANTS_BYTES: Final = 512 << 10  # of one list
OTHERS_MAX: Final = 20  # processes of a device: 64 devices of them still fit a frame
NO_LIMITS: Final = model.TenantRule()
WITHHELD: Final = frozenset({"input", "input_sha256", "submit_ids", "submit_id", "reservation_id"})
"""Fields of events that serve the daemon alone."""
EXPECTED: Final = frozenset({JobState.QUEUED, JobState.RUNNING})
"""The states of which a forecast speaks: a cached one may be older than the end of the job."""


def moment(ns: int) -> dt.datetime | UnsetType:
    """UTC; 0 is "not known"."""
    return dt.datetime.fromtimestamp(ns / S_NS, tz=dt.UTC) if ns else UNSET


def _at(ns: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ns / S_NS, tz=dt.UTC)


def job(
    state: State,
    j: model.Job,
    waits: tuple[model.Reason, str] | None,
    names: Names,
    outlook: Outlook | None,
    *,
    told: bool = False,
) -> protocol.Job:
    """One job, as its people see it. `waits`: why a queued one does; `told`: with whom it tells of its end."""
    reason, detail = waits or (j.reason, j.reason_detail)
    lease = state.devices[j.device].lease if j.state is JobState.RUNNING else None
    yielding = lease.yield_why if lease is not None else None
    return protocol.Job(
        id=j.job_id,
        tenant=j.tenant,
        owner=names(j.owner),
        handler=j.handler,
        priority=j.priority.name.lower(),
        state=j.state,
        items=protocol.Items(total=j.items, done=j.checkpoint.done, failed=j.checkpoint.failed),
        submitted_at=_at(j.submitted_ns),
        name=j.name or UNSET,
        params=j.params or UNSET,
        reason=reason.value if reason else UNSET,
        reason_detail=detail or UNSET,
        yielding=yielding.value if yielding else UNSET,
        position=outlook.position if outlook and j.state is JobState.QUEUED and outlook.position else UNSET,
        forecast=forecast(outlook) if j.state in EXPECTED else UNSET,
        foretold=_foretold(j),
        begin_at=moment(j.begin_ns),
        deadline_at=moment(j.deadline_ns),
        started_at=moment(j.started_ns),
        finished_at=moment(j.finished_ns),
        attempt=j.attempt or UNSET,
        interruptions=j.interruptions or UNSET,
        device=j.device or UNSET,
        retry_of=j.retry_of or UNSET,
        failures_max=j.failures_max if j.failures_max >= 0 else UNSET,
        gpu_s=round(j.used_ns / S_NS, 3) if j.used_ns else UNSET,
        timings=_timings(j),
        failure_codes=j.checkpoint.failure_codes or UNSET,
        notify=list(j.notify) if told and j.notify else UNSET,
        notify_on=list(j.notify_on) if told and j.notify_on else UNSET,
    )


def forecast(outlook: Outlook | None) -> protocol.Forecast | UnsetType:
    if outlook is None or not (outlook.start_ns or outlook.finish_ns):
        return UNSET
    return protocol.Forecast(
        start_at=moment(outlook.start_ns),
        finish_at=moment(outlook.finish_ns),
        finish_by_90=moment(outlook.finish_90_ns),
    )


def _foretold(j: model.Job) -> protocol.Foretold | UnsetType:
    expected, error = j.expected, j.forecast_error
    if expected is None:
        return UNSET
    return protocol.Foretold(
        made_at=_at(expected.made_ns),
        start_at=moment(expected.start_ns),
        finish_at=_at(expected.finish_ns),
        finish_by_90=_at(expected.finish_90_ns),
        error=UNSET if error is None else round(error, 3),
        kept_90=UNSET if error is None else j.finished_ns <= expected.finish_90_ns,
    )


def accuracy(seen: model.Accuracy) -> protocol.Accuracy | UnsetType:
    if not seen.jobs:
        return UNSET
    return protocol.Accuracy(
        jobs=seen.jobs, error=round(seen.error, 3), late=round(seen.late, 3), by_90=round(seen.by_90, 3)
    )


def _timings(j: model.Job) -> protocol.JobTimings | UnsetType:
    if not j.started_ns:
        return UNSET
    t, tried = j.timings, j.checkpoint.done + j.checkpoint.failed
    spent_s = (j.used_ns / S_NS) - t.load_s
    waited_ns = j.started_ns - j.submitted_ns
    return protocol.JobTimings(
        queued_s=round(max(0, waited_ns) / S_NS, 3),
        load_s=round(t.load_s, 3),
        compute_s=round(t.compute_s, 3),
        io_s=round(t.read_s + t.write_s + t.sync_s, 3),
        items_per_s=round(tried / spent_s, 1) if spent_s > 0 and tried else UNSET,
    )


def device(
    d: model.Device,
    sees: Callable[[model.Job], bool],
    state: State,
    hardware: Hardware | None,
    names: Names | None,
    *,
    brief: bool = False,
) -> protocol.DeviceView:
    """One device. Whose turn it is, everybody may know; which job it runs, those who may see the job.

    What made it ill is told in the words of workers, which may quote an item: for administrators, who alone have
    `names`. `brief`: without processes one by one.
    """
    running = state.jobs.get(d.lease.job_id) if d.lease else None
    told = names is not None or d.state is not model.DeviceState.UNHEALTHY
    view = protocol.DeviceView(
        name=d.name,
        state=d.state,
        loaded=list(d.loaded),
        reason=d.reason or UNSET,
        reason_detail=(d.reason_detail or UNSET) if told else UNSET,
        job=running.job_id if running and sees(running) else UNSET,
        tenant=running.tenant if running else UNSET,
        hardware=(hardware.name or UNSET) if hardware else UNSET,
        memory_bytes=hardware.memory_bytes if hardware and hardware.memory_bytes else UNSET,
        memory_total_bytes=hardware.memory_total_bytes if hardware and hardware.memory_total_bytes else UNSET,
        since=moment(d.since_ns),
    )
    return _outside(view, hardware, names, brief=brief) if hardware else view


def _outside(
    view: protocol.DeviceView, hardware: Hardware, names: Names | None, *, brief: bool
) -> protocol.DeviceView:
    """What is seen of it besides what the daemon does there."""
    sight = hardware.sight
    held = [protocol.HeldView(handler=w.handler, pid=w.pid, bytes=w.bytes) for w in hardware.workers]
    view = msgspec.structs.replace(
        view, held=UNSET if brief or not held else held, unseen=hardware.unseen or UNSET
    )
    if sight is None:
        return view
    gpu = sight.gpu
    others = [_other(sight, process, names) for process in sight.others[:OTHERS_MAX]]
    return msgspec.structs.replace(
        view,
        others=UNSET if brief or not others else others,
        others_bytes=sight.foreign_bytes,
        memory_used_bytes=gpu.used_bytes,
        utilisation=_given(gpu.utilisation),
        temperature_c=_given(gpu.temperature_c),
        power_w=_given(gpu.power_w),
        power_limit_w=_given(gpu.power_limit_w),
        throttled=list(gpu.throttled) or UNSET,
        uuid=gpu.uuid or UNSET,
        driver=sight.driver or UNSET,
        seen_at=moment(sight.seen_ns),
    )


def _given(figure: float | None) -> float | UnsetType:
    return UNSET if figure is None else figure


def _other(sight: Sight, process: Process, names: Names | None) -> protocol.OtherView:
    """A process that is not ours: its number and size, as nvidia-smi shows everybody; what it is, to administrators."""
    size = UNSET if process.bytes is None else process.bytes
    known = sight.people.get(process.pid)
    if names is None or known is None:
        return protocol.OtherView(pid=process.pid, bytes=size)
    command, uid = known
    return protocol.OtherView(pid=process.pid, bytes=size, command=command or UNSET, user=names(uid))


def handlers(state: State, config: Config) -> list[protocol.HandlerView]:
    return [_handler(state, name, handler) for name, handler in sorted(config.handlers.items())]


def _handler(state: State, name: str, handler: object) -> protocol.HandlerView:
    learned = state.learned.get(name)
    params = {key: _param(rule) for key, rule in getattr(handler, "job_params", {}).items()}
    return protocol.HandlerView(
        name=name,
        entry=getattr(handler, "entry", ""),
        params=params,
        loaded_on=[d.name for d in state.devices.values() if name in d.loaded],
        load_s=round(learned.load_ns / S_NS, 3) if learned and learned.load_ns else UNSET,
        items_per_s=round(S_NS / learned.item_ns, 1) if learned and learned.item_ns else UNSET,
        failure=learned.failure or UNSET if learned and learned.load_failures else UNSET,
        retry_at=moment(learned.retry_at_ns) if learned and learned.load_failures else UNSET,
    )


def _param(rule: object) -> dict[str, object]:
    return {key: value for key, value in msgspec.to_builtins(rule).items() if value not in (None, [], ())}


def tenants(state: State, config: Config, who: Who) -> list[protocol.TenantView]:
    """Shares, limits and service of all: who waits for others may know how much they got.

    `owed_s` compares what each got with an equal split, by shares, of what all got.
    """
    rules = config.rules()
    counts = _counts(state)
    served = (name for name, record in state.tenants.items() if record.used_ns)
    names = sorted({*counts, *config.file.tenants, *served})
    behind = _owed(state, rules, [n for n in names if n in counts and counts[n][0] + counts[n][1]])
    views = []
    for name in names:
        record = state.tenants.get(name)
        queued, running, paused, left = counts.get(name, (0, 0, 0, 0))
        share = rules.share(name)
        limits = rules.tenants.get(name, NO_LIMITS)
        views.append(
            protocol.TenantView(
                name=name,
                share=share,
                served_s=round(record.used_ns / S_NS, 3) if record else 0.0,
                owed_s=round(behind.get(name, 0.0), 3),
                queued=queued,
                running=running,
                paused=paused,
                items_left=left,
                jobs_max=_limit(limits.queued_jobs_max),
                items_max=_limit(limits.queued_items_max),
                devices_max=_limit(limits.running_devices_max),
                bytes_max=_limit(limits.spool_bytes_max),
                bytes=state.book.of_tenant.get(name, model.NO_USE).bytes if _own(who, name) else UNSET,
                accuracy=accuracy(record.accuracy) if record else UNSET,
            )
        )
    return _fitting(views)


def _limit(most: int | None) -> int | UnsetType:
    return UNSET if most is None else most


def _own(who: Who, tenant: str) -> bool:
    return who.admin or tenant in who.tenants or tenant == (who.name or str(who.uid))


def _fitting(tenants: list[protocol.TenantView]) -> list[protocol.TenantView]:
    """As many as fit a frame: those with jobs first, then those that got most."""
    room = TENANTS_BYTES
    first = sorted(tenants, key=lambda t: (not (t.queued or t.running or t.paused), -t.served_s))
    kept = {t.name for t in first if (room := room - protocol.size(t)) >= 0}
    return [t for t in tenants if t.name in kept]


def usage(state: State, rules: model.Rules, who: Who, now_ns: int) -> protocol.Usage:
    """What the caller takes up, and may; an administrator has no quota of his own."""
    use = state.book.of_uid.get(who.uid, model.NO_USE)
    held = not who.admin
    return protocol.Usage(
        jobs=use.jobs,
        jobs_max=rules.jobs_per_uid_max if held else UNSET,
        items=use.items,
        items_max=rules.items_per_uid_max if held else UNSET,
        bytes=use.bytes,
        bytes_max=rules.bytes_per_uid_max if held else UNSET,
        submissions=submitted_lately(state, who.uid, now_ns),
        submissions_max=rules.submissions_per_minute_max if held else UNSET,
    )


def _owed(state: State, rules: model.Rules, active: list[str]) -> dict[str, float]:
    """Seconds by which each tenant that competes is behind the mean virtual time, in its own device time."""
    level = model.Priority.NORMAL
    times = {name: state.tenants[name].vtimes_ns[level] for name in active if name in state.tenants}
    mean = sum(times.values()) / len(times) if times else 0.0
    return {name: (mean - vtime) * rules.share(name) / S_NS for name, vtime in times.items()}


def _counts(state: State) -> dict[str, tuple[int, int, int, int]]:
    """By tenant: queued, running, paused, items left. From what is counted along: of 100,000 jobs none is looked at."""
    running: dict[str, int] = {}
    for device in state.devices.values():
        if device.lease is not None:
            running[device.lease.tenant] = running.get(device.lease.tenant, 0) + 1
    reserved: dict[str, list[int]] = {}
    for held in state.reservations.values():
        reserved.setdefault(held.tenant, []).append(held.items)
    counts = {}
    for name, use in state.book.of_tenant.items():
        coming = reserved.get(name, ())
        jobs, runs = use.jobs - len(coming), running.get(name, 0)
        if jobs:
            counts[name] = (jobs - runs - use.paused, runs, use.paused, use.items - sum(coming))
    return counts


def switches(state: State) -> protocol.Switches:
    s = state.switches
    return protocol.Switches(
        stopped=s.stopped,
        disabled=s.disabled,
        draining=s.draining,
        message=s.message,
        stopping=state.stopping,
        disk_full=state.disk_full,
    )


def event(fact: AnyEvent, *, told: bool = False, frank: bool = True) -> dict[str, object]:
    """An event as clients get it: `at` for time, `job` for the id, nothing that serves the daemon alone.

    `told`: with whom the job tells of its end; `frank`: with the words of workers, which may quote an item.
    """
    seen: dict[str, object] = {}
    shown = _shown(fact, told=told) if isinstance(fact, Submitted) else fact
    if not frank and in_words_of_workers(fact):
        shown = msgspec.structs.replace(fact, detail="")
    for key, value in msgspec.to_builtins(shown).items():
        if key == "at_ns":
            seen["at"] = _at(value)
        elif key == "job_id":
            seen["job"] = value
        elif key == "priority":
            seen[key] = model.Priority(value).name.lower()
        elif key not in WITHHELD:
            seen[key] = value
    return seen


def in_words_of_workers(fact: AnyEvent) -> bool:
    match fact:
        case LeaseLost():
            return fact.cause in ("died", "poisoned", "canary")
        case _:
            return isinstance(fact, DeviceFellIll)


def _shown(fact: Submitted, *, told: bool) -> Submitted:
    if told:
        return msgspec.structs.replace(fact, input=b"", input_sha256=b"")
    return msgspec.structs.replace(fact, input=b"", input_sha256=b"", notify=(), notify_on=())
