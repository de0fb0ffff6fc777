"""Events in, state changed.

Rule 1: apply() never refuses. What cannot be is an assertion: the daemon stops, and replay restores it.
Rule 2: it reads the state and the event, nothing else: no clock, no configuration. The same events give the same
state, today and next year.
Rule 3: containers inside a record are replaced, never changed in place: two states and a snapshot share them.
Rule 4: the bookkeeping is changed along (core/book.py), so that it always equals what `rebuild` would make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec.structs import replace

from gpujobd.core import book, events, residency
from gpujobd.core.model import (
    ELSEWHERE_WHY,
    NO_DEATHS,
    NO_PARAMS,
    TELLING_NS,
    Device,
    DeviceState,
    Job,
    JobState,
    Learned,
    Lease,
    Notifier,
    Removal,
    Reservation,
    State,
    Switches,
    Tenant,
    Timings,
    Turn,
    YieldWhy,
)

NO_TIMINGS: Final = Timings()
S = JobState


def apply(state: State, event: events.AnyEvent, seq: int) -> None:
    """Make one fact part of the state. `seq` is its number in the journal."""
    assert seq > state.seq, (seq, state.seq)
    state.seq = seq
    _APPLY[type(event)](state, event)
    job = state.jobs.get(getattr(event, "job_id", 0))
    if job is not None:
        job.changed_seq = seq


# --- the daemon -------------------------------------------------------------------------------------------------


def _daemon_started(state: State, event: events.DaemonStarted) -> None:
    state.stopping = False
    for reservation_id in list(state.reservations):
        _release(state, reservation_id)
    for device in state.devices.values():
        device.loaded = ()
    _leave(state, event.at_ns)


def _daemon_stopping(state: State, _: events.DaemonStopping) -> None:
    state.stopping = True


def _devices_found(state: State, event: events.DevicesFound) -> None:
    for device in state.devices.values():
        assert device.name in event.devices or device.lease is None, device.name
    state.devices = {name: state.devices.get(name) or Device(name=name) for name in event.devices}


def _queue_switched(state: State, event: events.QueueSwitched) -> None:
    state.switches = Switches(
        stopped=event.stopped, disabled=event.disabled, draining=event.draining, message=event.message
    )


def _disk_filled(state: State, event: events.DiskFilled) -> None:
    state.disk_full = True
    state.disk_detail = event.detail


def _disk_freed(state: State, _: events.DiskFreed) -> None:
    state.disk_full = False
    state.disk_detail = ""


def _notifier_attached(state: State, event: events.NotifierAttached) -> None:
    state.notifier = Notifier(
        names=event.names,
        admin_names=event.admin_names,
        url_hosts=event.url_hosts,
        mail_domains=event.mail_domains,
    )


def _notifier_left(state: State, event: events.NotifierLeft) -> None:
    _leave(state, event.at_ns)


def _leave(state: State, at_ns: int) -> None:
    """The connection of the notifier that was here is gone."""
    if state.notifier is not None and not state.notifier.left_ns:
        state.notifier = replace(state.notifier, left_ns=at_ns)


# --- submissions --------------------------------------------------------------------------------------------------


def _reserved(state: State, event: events.Reserved) -> None:
    assert event.reservation_id == state.next_reservation_id, event
    state.next_reservation_id += 1
    state.reservations[event.reservation_id] = Reservation(
        reservation_id=event.reservation_id,
        owner=event.owner,
        tenant=event.tenant,
        items=event.items,
        input_bytes=event.input_bytes,
        submit_id=event.submit_id,
    )
    book.count_reserved(state.book, event.owner, event.tenant, 1, event.items, event.input_bytes)
    state.arrivals.add(event.owner, event.at_ns)


def _reservation_released(state: State, event: events.ReservationReleased) -> None:
    _release(state, event.reservation_id)


def _release(state: State, reservation_id: int) -> None:
    held = state.reservations.pop(reservation_id)
    book.count_reserved(state.book, held.owner, held.tenant, -1, held.items, held.input_bytes)


def _submitted(state: State, event: events.Submitted) -> None:
    assert event.job_id >= state.next_job_id, event
    state.next_job_id = event.job_id + 1
    if event.reservation_id:
        _release(state, event.reservation_id)
    else:  # else it arrived with the reservation
        state.arrivals.add(event.owner, event.at_ns)
    tenant = state.tenants.get(event.tenant)
    if tenant is None:
        tenant = state.tenants[event.tenant] = Tenant(name=event.tenant)
    learned = state.learned.get(event.handler)
    if learned is None:
        learned = state.learned[event.handler] = Learned(name=event.handler)
    job = job_of(event, inline_seq=state.seq if event.input else 0)
    job.tenant, job.handler = tenant.name, learned.name  # one string for all jobs of a name
    state.jobs[job.job_id] = job
    book.admit(state, job)


def job_of(event: events.Submitted, *, inline_seq: int = 0) -> Job:
    """The job as it was submitted: queued, or asleep until its begin time."""
    return Job(
        job_id=event.job_id,
        submit_id=event.submit_id,
        owner=event.owner,
        tenant=event.tenant,
        handler=event.handler,
        items=event.items,
        input_bytes=event.input_bytes,
        input_sha256=event.input_sha256,
        submitted_ns=event.at_ns,
        name=event.name,
        params=event.params or NO_PARAMS,
        begin_ns=event.begin_ns,
        deadline_ns=event.deadline_ns,
        failures_max=event.failures_max,
        retry_of=event.retry_of,
        inline_seq=inline_seq,
        reservation_id=event.reservation_id,
        notify=event.notify,
        notify_on=event.notify_on,
        priority=event.priority,
        level=event.priority,
        line_key=event.job_id,
        asleep=event.begin_ns > event.at_ns,
        deaths=NO_DEATHS,
        queued_ns=event.at_ns,
    )


def _inputs_spooled(state: State, event: events.InputsSpooled) -> None:
    for job_id in event.job_ids:
        state.jobs[job_id].inline_seq = 0
        del state.book.inline[job_id]


def _woken(state: State, event: events.Woken) -> None:
    for job_id in event.job_ids:
        job = state.jobs[job_id]
        job.changed_seq = state.seq
        book.wake(state, job, event.at_ns)


def _foretold(state: State, event: events.Foretold) -> None:
    for expected in event.jobs:
        job = state.jobs[expected.job_id]
        job.expected = expected
        job.changed_seq = state.seq


def _priority_changed(state: State, event: events.PriorityChanged) -> None:
    job = state.jobs[event.job_id]
    job.expected = None
    lease = _lease_of(state, job)
    book.reorder(state, job, event.priority, job.line_key)
    if lease is not None:
        lease.level = job.level


def _moved_first(state: State, event: events.MovedFirst) -> None:
    job = state.jobs[event.job_id]
    job.expected = None
    book.reorder(state, job, job.priority, _next_head_key(state))


def _next_head_key(state: State) -> int:
    state.head_key -= 1
    return state.head_key


def _paused(state: State, event: events.Paused) -> None:
    job = state.jobs[event.job_id]
    job.expected = None
    book.move(state, job, S.PAUSED, event.at_ns)
    job.reason = event.reason
    job.reason_detail = event.detail


def _resumed(state: State, event: events.Resumed) -> None:
    job = state.jobs[event.job_id]
    job.reason = None
    job.reason_detail = ""
    job.unclean_stops = job.load_failures = job.losses = job.retry_at_ns = 0
    if event.at_head:
        job.line_key = _next_head_key(state)
    book.move(state, job, S.QUEUED, event.at_ns)


def _cancelled(state: State, event: events.Cancelled) -> None:
    job = state.jobs[event.job_id]
    book.move(state, job, S.CANCELLED, event.at_ns)
    job.reason = None
    job.reason_detail = event.message


def _expired(state: State, event: events.Expired) -> None:
    job = state.jobs[event.job_id]
    book.move(state, job, S.EXPIRED, event.at_ns)
    job.reason = None
    job.reason_detail = ""


def _failed(state: State, event: events.Failed) -> None:
    job = state.jobs[event.job_id]
    book.move(state, job, S.FAILED, event.at_ns)
    job.reason = event.reason
    job.reason_detail = event.detail


def _removed(state: State, event: events.Removed) -> None:
    job = state.jobs.pop(event.job_id)
    book.forget(state, job)
    state.removed[job.job_id] = Removal(
        job_id=job.job_id,
        owner=job.owner,
        submit_id=job.submit_id,
        input_sha256=job.input_sha256,
        removed_ns=event.at_ns,
    )


def _submit_ids_forgotten(state: State, event: events.SubmitIdsForgotten) -> None:
    for job_id in event.job_ids:
        removal = state.removed.pop(job_id)
        mine = state.book.submit_ids[removal.owner]
        del mine[removal.submit_id]
        if not mine:
            del state.book.submit_ids[removal.owner]


# --- leases -------------------------------------------------------------------------------------------------------


def _leased(state: State, event: events.Leased) -> None:
    device = state.devices[event.device]
    job = state.jobs[event.job_id]
    assert device.lease is None, event
    assert event.attempt == job.attempt + 1, event
    job.attempt = event.attempt
    job.level = event.level
    job.device = device.name
    job.started_ns = job.started_ns or event.at_ns
    book.move(state, job, S.RUNNING, event.at_ns)
    device.lease = Lease(
        device=device.name,
        job_id=job.job_id,
        attempt=job.attempt,
        handler=job.handler,
        tenant=job.tenant,
        granted_ns=event.at_ns,
        level=event.level,
        loaded=job.handler in device.loaded,
        canary=event.canary,
    )
    if event.turn_ns:
        device.turn = Turn(tenant=job.tenant, length_ns=event.turn_ns)
    _touch(device, job.handler)


def _touch(device: Device, handler: str) -> None:
    """Most recently used last."""
    if handler in device.loaded:
        device.loaded = (*(h for h in device.loaded if h != handler), handler)


def _handler_loaded(state: State, event: events.HandlerLoaded) -> None:
    device = state.devices[event.device]
    device.loaded = (*(h for h in device.loaded if h != event.handler), event.handler)
    device.since_load_ns = 0
    learned = _learned(state, event.handler)
    learned.load_ns, learned.load_spread_ns = _learn(learned.load_ns, learned.load_spread_ns, event.load_ns)
    learned.vram_bytes = max(learned.vram_bytes, event.vram_bytes)
    learned.load_bytes = event.vram_bytes or learned.load_bytes
    learned.load_failures = learned.retry_at_ns = 0
    learned.failure = ""
    lease = device.lease
    if lease is not None and lease.handler == event.handler:
        lease.loaded = True
        lease.loading_ns = event.load_ns
        state.jobs[lease.job_id].load_failures = 0


def _learned(state: State, handler: str) -> Learned:
    learned = state.learned.get(handler)
    if learned is None:
        learned = state.learned[handler] = Learned(name=handler)
    return learned


def _learn(mean: int, spread: int, sample: int) -> tuple[int, int]:
    """Moving mean and mean distance from it: a quarter of the way with each sample.

    The first sample is taken whole, and believed to a quarter.
    """
    if not mean:
        return sample, sample // 4
    return (3 * mean + sample) // 4, (3 * spread + abs(sample - mean)) // 4


def _worker_gone(state: State, event: events.WorkerGone) -> None:
    device = state.devices[event.device]
    device.loaded = tuple(h for h in device.loaded if h != event.handler)
    lease = device.lease
    if lease is not None and lease.handler == event.handler:
        lease.loaded = False


def _handler_load_failed(state: State, event: events.HandlerLoadFailed) -> None:
    job = state.jobs[event.job_id]
    _charge(state, job, event.used_ns, event.vtime_ns)
    job.load_failures += 1
    learned = _learned(state, job.handler)
    learned.load_failures += 1
    learned.retry_at_ns = event.retry_at_ns
    learned.failure = event.error
    _end_lease(state, job, event.at_ns)


def _yield_requested(state: State, event: events.YieldRequested) -> None:
    lease = _lease(state, event.job_id, event.attempt)
    lease.yield_why = event.why
    lease.yield_detail = event.detail
    lease.yield_by = event.by


def _checkpointed(state: State, event: events.Checkpointed) -> None:
    _progress(state, event)


def _yielded(state: State, event: events.Yielded) -> None:
    job = _progress(state, event)
    if event.cramped_bytes >= 0:
        device = state.devices[job.device]
        device.cramped = device.cramped | {job.handler: event.cramped_bytes}
    _end_lease(state, job, event.at_ns)


def _completed(state: State, event: events.Completed) -> None:
    job = _progress(state, event)
    assert job.left == 0, event
    _price_job(state, job)
    _end_lease(state, job, event.at_ns, S.COMPLETED)
    if job.expected is not None:
        tenant = state.tenants[job.tenant]
        tenant.accuracy = tenant.accuracy.judged(job.expected, job.finished_ns)
        state.accuracy = state.accuracy.judged(job.expected, job.finished_ns)


def _progress(state: State, event: events.Progress) -> Job:
    job = state.jobs[event.job_id]
    lease = _lease(state, event.job_id, event.attempt)
    _charge(state, job, event.used_ns, event.vtime_ns)
    if event.timings != NO_TIMINGS:
        job.timings = job.timings + event.timings
    new, old = event.checkpoint, job.checkpoint
    tried = new.done + new.failed - old.done - old.failed
    assert tried >= 0, event
    job.checkpoint = new
    more = new.results_bytes + new.errors_bytes - old.results_bytes - old.errors_bytes
    book.count(state.book, job.owner, job.tenant, items=-tried, stored=more)
    job.worked_ns += _price(state, lease, event.used_ns, tried)
    if event.vram_bytes:
        learned = state.learned[job.handler]
        learned.vram_bytes = max(learned.vram_bytes, event.vram_bytes)
    if tried or new.upto > old.upto:
        lease.got_on = True
        _got_on(job)
    if new.done > old.done:  # a failed item proves nothing about the device
        state.devices[lease.device].failed_jobs = ()
    return job


def _price(state: State, lease: Lease, used_ns: int, tried: int) -> int:
    """Learn what an item of this handler costs, loading apart; the time that was not loading."""
    loading = min(lease.loading_ns, used_ns)
    lease.loading_ns -= loading
    worked_ns = used_ns - loading
    lease.unpriced_ns += worked_ns
    if not tried or not lease.unpriced_ns:
        return worked_ns
    learned = state.learned[lease.handler]
    sample = max(1, lease.unpriced_ns // tried)
    lease.unpriced_ns = 0
    learned.item_ns, learned.item_spread_ns = _learn(learned.item_ns, learned.item_spread_ns, sample)
    return worked_ns


def _price_job(state: State, job: Job) -> None:
    """Learn what an item costs from one job to the next: what differs between jobs, checkpoints of one do not show."""
    if job.worked_ns < TELLING_NS:
        return
    learned = state.learned[job.handler]
    sample = max(1, job.worked_ns // job.items)
    learned.job_item_ns, learned.job_spread_ns = _learn(learned.job_item_ns, learned.job_spread_ns, sample)


def _got_on(job: Job) -> None:
    """What was held against the job is forgiven; what was held against lines that are behind is over."""
    job.losses = job.unclean_stops = 0
    if not (job.suspects or job.deaths or job.condemned):
        return
    upto = job.checkpoint.upto
    again = {item.line for item in job.checkpoint.deferred}
    job.suspects = tuple(
        span
        for span in job.suspects
        if span.last > upto or any(span.first <= line <= span.last for line in again)
    )
    job.deaths = {
        line: deaths for line, deaths in job.deaths.items() if line > upto or line in again
    } or NO_DEATHS
    job.condemned = tuple(line for line in job.condemned if line > upto or line in again)


def _lease_lost(state: State, event: events.LeaseLost) -> None:
    job = state.jobs[event.job_id]
    lease = _lease(state, event.job_id, event.attempt)
    device = state.devices[lease.device]
    _charge(state, job, event.used_ns, event.vtime_ns)
    job.interruptions += 1
    job.retry_at_ns = event.retry_at_ns
    if event.cause == "daemon":
        job.unclean_stops += lease.loaded
    elif event.cause in WORKER_LOST:
        job.losses += 1
        if job.job_id not in device.failed_jobs:
            device.failed_jobs = (*device.failed_jobs, job.job_id)
        job.suspects = event.suspects or job.suspects
    if event.blamed:
        job.deaths = {**job.deaths, event.blamed: job.deaths.get(event.blamed, 0) + 1}
    if event.canary_due:
        job.canary_due = tuple(sorted({*job.canary_due, *event.canary_due}))
    if event.condemned:
        _condemn(job, event.condemned)
    _end_lease(state, job, event.at_ns)


WORKER_LOST: Final = frozenset({"died", "silent", "stalled", "poisoned", "lied"})


def _canary_passed(state: State, event: events.CanaryPassed) -> None:
    job = state.jobs[event.job_id]
    lease = _lease(state, event.job_id, event.attempt)
    lease.canary = False
    _condemn(job, event.lines)


def _condemn(job: Job, lines: tuple[int, ...]) -> None:
    job.canary_due = tuple(line for line in job.canary_due if line not in lines)
    job.condemned = tuple(sorted({*job.condemned, *lines}))


def _device_fell_ill(state: State, event: events.DeviceFellIll) -> None:
    device = state.devices[event.device]
    _enter(device, DeviceState.UNHEALTHY, event.reason, event.detail, event.at_ns)
    device.retry_at_ns = event.retry_at_ns
    device.failed_jobs = ()
    device.relapses += 1


def _device_recovered(state: State, event: events.DeviceRecovered) -> None:
    device = state.devices[event.device]
    _enter_well(device, event.at_ns)
    device.retry_at_ns = device.relapses = 0
    if device.lease is not None:
        device.lease.canary = False


def _device_crowded(state: State, event: events.DeviceCrowded) -> None:
    """A device that has another trouble keeps that one's name: it stands in the way of more."""
    device = state.devices[event.device]
    device.room_bytes = event.room_bytes
    if device.state in (DeviceState.OK, DeviceState.BUSY_ELSEWHERE):
        _enter(device, DeviceState.BUSY_ELSEWHERE, ELSEWHERE_WHY, event.detail, event.at_ns)


def _device_cleared(state: State, event: events.DeviceCleared) -> None:
    device = state.devices[event.device]
    device.room_bytes = -1
    device.cramped = {}
    if device.state is DeviceState.BUSY_ELSEWHERE:
        _enter_well(device, event.at_ns)


def _driver_mismatched(state: State, event: events.DriverMismatched) -> None:
    device = state.devices[event.device]
    _enter(device, DeviceState.DRIVER_MISMATCH, "DriverMismatch", event.detail, event.at_ns)


def _enter(device: Device, to: DeviceState, reason: str, detail: str, at_ns: int) -> None:
    if device.state is not to:
        device.since_ns = at_ns
    device.state, device.reason, device.reason_detail = to, reason, detail


def _enter_well(device: Device, at_ns: int) -> None:
    """It works; whether others leave room on it is another matter."""
    if device.room_bytes < 0:
        _enter(device, DeviceState.OK, "", "", at_ns)
    else:
        _enter(device, DeviceState.BUSY_ELSEWHERE, ELSEWHERE_WHY, residency.left(device), at_ns)


def _lease_of(state: State, job: Job) -> Lease | None:
    return state.devices[job.device].lease if job.state is S.RUNNING else None


def _lease(state: State, job_id: int, attempt: int) -> Lease:
    lease = state.devices[state.jobs[job_id].device].lease
    assert lease is not None, job_id
    assert (lease.job_id, lease.attempt) == (job_id, attempt), (lease, job_id, attempt)
    return lease


def _charge(state: State, job: Job, used_ns: int, vtime_ns: int) -> None:
    if not used_ns:
        return
    device = state.devices[job.device]
    lease, turn = device.lease, device.turn
    assert lease is not None, job.job_id
    lease.used_ns += used_ns
    device.since_load_ns += used_ns
    if turn is not None:
        turn.used_ns += used_ns
    job.used_ns += used_ns
    tenant = state.tenants[job.tenant]
    tenant.used_ns += used_ns
    book.charge(state, tenant, job.level, vtime_ns)


def _end_lease(state: State, job: Job, at_ns: int, to: JobState = S.QUEUED) -> None:
    """Who had to give way before anything was tried has not been served: it goes on waiting since then."""
    lease = _lease(state, job.job_id, job.attempt)
    if lease.got_on or lease.yield_why is not YieldWhy.PRIORITY:
        tenant = state.tenants[job.tenant]
        tenant.served_at_ns = book.with_level(tenant.served_at_ns, job.priority, at_ns)
        job.waited_ns = 0
    state.devices[job.device].lease = None
    book.move(state, job, to, at_ns)


_APPLY: Final[dict[type, Callable[[State, Any], None]]] = {
    events.DaemonStarted: _daemon_started,
    events.DaemonStopping: _daemon_stopping,
    events.DevicesFound: _devices_found,
    events.QueueSwitched: _queue_switched,
    events.DiskFilled: _disk_filled,
    events.DiskFreed: _disk_freed,
    events.NotifierAttached: _notifier_attached,
    events.NotifierLeft: _notifier_left,
    events.Reserved: _reserved,
    events.ReservationReleased: _reservation_released,
    events.Submitted: _submitted,
    events.InputsSpooled: _inputs_spooled,
    events.Woken: _woken,
    events.Foretold: _foretold,
    events.PriorityChanged: _priority_changed,
    events.MovedFirst: _moved_first,
    events.Paused: _paused,
    events.Resumed: _resumed,
    events.Cancelled: _cancelled,
    events.Expired: _expired,
    events.Failed: _failed,
    events.Removed: _removed,
    events.SubmitIdsForgotten: _submit_ids_forgotten,
    events.Leased: _leased,
    events.HandlerLoaded: _handler_loaded,
    events.WorkerGone: _worker_gone,
    events.HandlerLoadFailed: _handler_load_failed,
    events.YieldRequested: _yield_requested,
    events.Checkpointed: _checkpointed,
    events.Yielded: _yielded,
    events.Completed: _completed,
    events.LeaseLost: _lease_lost,
    events.CanaryPassed: _canary_passed,
    events.DeviceFellIll: _device_fell_ill,
    events.DeviceRecovered: _device_recovered,
    events.DeviceCrowded: _device_crowded,
    events.DeviceCleared: _device_cleared,
    events.DriverMismatched: _driver_mismatched,
}
assert set(_APPLY) == set(events.AnyEvent.__args__)  # a new event must say what it changes
