"""Replay of a journal with holes: what can be known of the jobs when some of their records are lost.

apply() may not refuse, and asserts what cannot be; after a loss it can be: a checkpoint of a lease that nobody granted,
a second lease on a device. Here every record is made to fit before it is applied, by facts that must have been among
the lost ones, or it is dropped.

Rule 1: what a kept record says is believed. A bridge is the least that makes it possible, and is a real event, applied
by apply() itself: a lease begins, a lease ends without blame, a pause is over.
Rule 2: nothing done is counted twice and nothing is counted that no record tells: where the end of a lease is lost, the
job goes on from its latest checkpoint, and its outputs are cut back to that as at every start.
Rule 3: no number is used again: ids that lost records may have given are skipped.
Rule 4: every bridge and every dropped record is noted, by job, for a person to read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from gpujobd.core import book, events
from gpujobd.core.apply import apply
from gpujobd.core.events import AnyEvent
from gpujobd.core.model import FINAL, Job, JobState, State

NOWHERE: Final = "lost"
"""A device for leases whose beginning is lost, and with it where they were. Gone when the mending is over."""

OfALease = (
    events.HandlerLoadFailed
    | events.Checkpointed
    | events.Yielded
    | events.Completed
    | events.LeaseLost
    | events.CanaryPassed
)


class Mender:
    """`state`: where the replay begins; it is changed along."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.unknown: dict[int, int] = {}  # job whose submission is lost -> its later records, all dropped
        self.notes: dict[int, list[str]] = {}  # job -> what else was lost of it
        self.perhaps = range(0)  # ids that lost records may have given, and that no other record names
        self._skipped = 0  # lost records since a submission was seen: each may have given an id

    def take(self, seq: int, event: AnyEvent) -> None:
        """Apply the record of this number, whatever is missing before it."""
        self._skipped += seq - self.state.seq - 1
        fitted = self._fit(event)
        if fitted is None:
            self.state.seq = seq
        else:
            apply(self.state, fitted, seq)

    def finish(self, last_seq: int, kept: Callable[[int], bool]) -> None:
        """`last_seq`: of the journal; `kept`: whether a record of that number is still there."""
        state = self.state
        self._leave({name for name in state.devices if name != NOWHERE})
        state.devices.pop(NOWHERE, None)
        self._skipped += last_seq - state.seq
        state.seq = last_seq
        self.perhaps = range(state.next_job_id, state.next_job_id + self._skipped)
        state.next_job_id += self._skipped
        state.next_reservation_id += self._skipped
        for job in state.jobs.values():
            if job.inline_seq and not kept(job.inline_seq):
                job.inline_seq = 0
                if job.state not in FINAL:
                    self._note(job.job_id, "its input is lost, unless a lease has brought it into the spool")
        book.rebuild(state)

    # --- making a record fit ------------------------------------------------------------------------------------

    def _fit(self, event: AnyEvent) -> AnyEvent | None:
        """The event as it can be applied; None: it cannot."""
        state = self.state
        match event:
            case events.Submitted():
                return self._submitted(event)
            case events.Reserved():
                state.next_reservation_id = max(state.next_reservation_id, event.reservation_id)
                return event if event.reservation_id == state.next_reservation_id else None
            case events.ReservationReleased():
                return event if event.reservation_id in state.reservations else None
            case events.DevicesFound():
                self._leave(set(event.devices))
            case events.HandlerLoaded() | events.WorkerGone():
                self._find(event.device)
            case events.DeviceFellIll() | events.DeviceRecovered() | events.DriverMismatched():
                self._find(event.device)
            case events.DeviceCrowded() | events.DeviceCleared():
                self._find(event.device)
            case events.InputsSpooled():
                return replace(event, job_ids=tuple(i for i in event.job_ids if i in state.book.inline))
            case events.Woken():
                return replace(event, job_ids=tuple(i for i in event.job_ids if self._sleeps(i)))
            case events.Foretold():
                return replace(event, jobs=tuple(e for e in event.jobs if e.job_id in state.jobs))
            case events.SubmitIdsForgotten():
                return replace(event, job_ids=tuple(i for i in event.job_ids if i in state.removed))
            case (
                events.DaemonStarted()
                | events.DaemonStopping()
                | events.QueueSwitched()
                | events.DiskFilled()
                | events.DiskFreed()
                | events.NotifierAttached()
                | events.NotifierLeft()
            ):
                pass
            case _:
                return self._of_a_job(event)
        return event

    def _submitted(self, event: events.Submitted) -> AnyEvent | None:
        state = self.state
        if event.job_id < state.next_job_id:
            return None
        for job_id in range(state.next_job_id, event.job_id):
            self.unknown.setdefault(job_id, 0)
        self._skipped = 0
        if event.reservation_id and event.reservation_id not in state.reservations:
            state.next_reservation_id = event.reservation_id
            held = events.Reserved(
                at_ns=event.at_ns,
                reservation_id=event.reservation_id,
                owner=event.owner,
                tenant=event.tenant,
                items=event.items,
                input_bytes=event.input_bytes,
                submit_id=event.submit_id,
            )
            self._bridge(held)
        return event

    def _of_a_job(self, event: AnyEvent) -> AnyEvent | None:
        job_id: int = getattr(event, "job_id", 0)
        job = self.state.jobs.get(job_id)
        if job is None:
            if job_id not in self.state.removed:
                self.unknown[job_id] = self.unknown.get(job_id, 0) + 1
            return None
        if job.state in FINAL:
            return event if isinstance(event, events.Removed) else None
        match event:
            case events.PriorityChanged() | events.MovedFirst():
                return event
            case events.YieldRequested():
                return event if self._holds(job, event.attempt) else None
            case events.Leased():
                return self._leased(job, event)
            case events.Resumed():
                return self._resumed(job, event)
            case events.Removed():
                self._queue(job, event.at_ns)
                self._note(job_id, "how it ended is lost; it was removed afterwards")
                self._bridge(events.Cancelled(at_ns=event.at_ns, job_id=job_id, by=-1))
                return event
            case events.Paused() | events.Failed():
                self._queue(job, event.at_ns)
                return event
            case events.Cancelled() | events.Expired():
                self._end(job, event.at_ns)
                return event
            case _:
                assert isinstance(event, OfALease), event
                return self._of_a_lease(job, event)

    def _leased(self, job: Job, event: events.Leased) -> AnyEvent | None:
        if event.attempt <= job.attempt:
            return None
        self._queue(job, event.at_ns)
        self._free(event.device, event.at_ns)
        self._skip_to(job, event.attempt)
        return event

    def _resumed(self, job: Job, event: events.Resumed) -> AnyEvent | None:
        self._end(job, event.at_ns)
        return event if job.state is JobState.PAUSED else None

    def _of_a_lease(self, job: Job, event: OfALease) -> AnyEvent | None:
        if event.attempt < job.attempt:
            return None
        if isinstance(event, events.Progress) and not _follows(job, event):
            return None
        if not self._holds(job, event.attempt):
            self._note(job.job_id, f"the beginning of attempt {event.attempt} is lost, not what came of it")
            self._queue(job, event.at_ns)
            device = event.device if isinstance(event, events.HandlerLoadFailed) else NOWHERE
            self._free(device, event.at_ns)
            self._skip_to(job, event.attempt)
            self._bridge(
                events.Leased(
                    at_ns=event.at_ns,
                    device=device,
                    job_id=job.job_id,
                    attempt=event.attempt,
                    level=job.priority,
                )
            )
        return event

    # --- bridges --------------------------------------------------------------------------------------------------

    def _bridge(self, event: AnyEvent) -> None:
        """A fact that must have been, under the number of the one before."""
        seq = max(self.state.seq, 1)
        self.state.seq = seq - 1
        apply(self.state, event, seq)

    def _queue(self, job: Job, at_ns: int) -> None:
        """Bring it into the state from which all else is possible."""
        self._end(job, at_ns)
        if job.state is JobState.PAUSED:
            self._bridge(events.Resumed(at_ns=at_ns, job_id=job.job_id))

    def _end(self, job: Job, at_ns: int) -> None:
        if job.state is not JobState.RUNNING:
            return
        done = job.checkpoint.upto
        self._note(
            job.job_id, f"the end of attempt {job.attempt} is lost: it counts as given back at line {done}"
        )
        self._bridge(events.LeaseLost(at_ns=at_ns, job_id=job.job_id, attempt=job.attempt, cause="lost"))

    def _free(self, name: str, at_ns: int) -> None:
        self._find(name)
        lease = self.state.devices[name].lease
        if lease is not None:
            self._end(self.state.jobs[lease.job_id], at_ns)

    def _find(self, name: str) -> None:
        """That this device was found is lost, where it is not known."""
        devices = self.state.devices
        if name not in devices:
            self._bridge(events.DevicesFound(at_ns=0, devices=(*devices, name)))

    def _leave(self, names: set[str]) -> None:
        """No lease stays on a device that is none of these."""
        for device in self.state.devices.values():
            if device.name not in names and device.lease is not None:
                self._end(self.state.jobs[device.lease.job_id], device.lease.granted_ns)

    def _skip_to(self, job: Job, attempt: int) -> None:
        job.attempt = attempt - 1

    # --- questions ------------------------------------------------------------------------------------------------

    def _holds(self, job: Job, attempt: int) -> bool:
        return job.state is JobState.RUNNING and job.attempt == attempt

    def _sleeps(self, job_id: int) -> bool:
        job = self.state.jobs.get(job_id)
        return job is not None and job.state is JobState.QUEUED and job.asleep

    def _note(self, job_id: int, text: str) -> None:
        self.notes.setdefault(job_id, []).append(text)


def _follows(job: Job, event: events.Progress) -> bool:
    """Whether apply() could believe it."""
    new, old = event.checkpoint, job.checkpoint
    tried = new.done + new.failed
    if isinstance(event, events.Completed) and tried != job.items:
        return False
    return old.done + old.failed <= tried <= job.items
