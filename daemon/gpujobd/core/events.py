"""Facts, past tense, journaled, never refused.

Rule 1: an event carries all that apply() needs: shares, prices and times are looked up by decide() and written
down, so that a replay next year, under another configuration, gives the same state.
Rule 2: tags are the on-disk format: written out, never renamed. New fields get defaults; old events stay readable.
Rule 3: `at_ns` is wall-clock time and may step backwards; lengths of time come measured (`used_ns`).
"""

from __future__ import annotations

import msgspec

from gpujobd.core.model import (
    Checkpoint,
    Expected,
    ParamValue,
    Priority,
    Reason,
    Span,
    Timings,
    YieldWhy,
)


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True, gc=False):
    at_ns: int


# --- the daemon -------------------------------------------------------------------------------------------


class DaemonStarted(Event, frozen=True, tag="daemon_started"):
    """First event of every run. Nothing is loaded, nothing is leased, no reservation holds."""

    boot_id: str
    version: str


class DaemonStopping(Event, frozen=True, tag="daemon_stopping"):
    """SIGTERM was received: no new leases."""


class DevicesFound(Event, frozen=True, tag="devices_found"):
    """The devices of this run; devices not named are gone, new ones are ok."""

    devices: tuple[str, ...]


class QueueSwitched(Event, frozen=True, tag="queue_switched"):
    stopped: bool
    disabled: bool
    draining: bool
    by: int
    message: str = ""


class DiskFilled(Event, frozen=True, tag="disk_filled"):
    """A write met a full disk: work waits with reason DiskFull."""

    detail: str = ""


class DiskFreed(Event, frozen=True, tag="disk_freed"):
    pass


class NotifierAttached(Event, frozen=True, tag="notifier_attached"):
    """A notifier is here, and reaches this much; in the place of what was known of it before."""

    by: int
    names: tuple[str, ...] = ()
    admin_names: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    mail_domains: tuple[str, ...] = ()


class NotifierLeft(Event, frozen=True, tag="notifier_left"):
    """Its connection ended: what it said holds for a while yet, it may be starting anew."""


# --- submissions --------------------------------------------------------------------------------------------


class Reserved(Event, frozen=True, tag="reserved"):
    """Room is held while the input is streamed."""

    reservation_id: int
    owner: int
    tenant: str
    items: int
    input_bytes: int
    submit_id: str


class ReservationReleased(Event, frozen=True, tag="reservation_released"):
    reservation_id: int


class Submitted(Event, frozen=True, tag="submitted"):
    job_id: int
    submit_id: str
    owner: int
    tenant: str
    handler: str
    items: int
    input_bytes: int
    input_sha256: bytes
    name: str = ""
    params: dict[str, ParamValue] = {}
    priority: Priority = Priority.NORMAL
    begin_ns: int = 0
    deadline_ns: int = 0
    failures_max: int = -1
    retry_of: int = 0
    message: str = ""  # of a retry
    reservation_id: int = 0  # ends with this event; 0: none was needed
    notify: tuple[str, ...] = ()
    notify_on: tuple[str, ...] = ()
    input: bytes = b""  # rides here when it is small; apply() keeps the sequence number, never the bytes


class InputsSpooled(Event, frozen=True, tag="inputs_spooled"):
    """These inputs are in the spool, synced: the journal need not keep them."""

    job_ids: tuple[int, ...]


class Woken(Event, frozen=True, tag="woken"):
    """The begin time or the backoff of these jobs is over: they stand in line."""

    job_ids: tuple[int, ...]


class Foretold(Event, frozen=True, tag="foretold"):
    """The first forecast of these jobs since their submission: their ends will be held against it."""

    jobs: tuple[Expected, ...]


class PriorityChanged(Event, frozen=True, tag="priority_changed"):
    job_id: int
    priority: Priority
    by: int
    message: str = ""


class MovedFirst(Event, frozen=True, tag="moved_first"):
    """The job stands at the head of its tenant's own line."""

    job_id: int
    by: int
    message: str = ""


class Paused(Event, frozen=True, tag="paused"):
    job_id: int
    reason: Reason
    detail: str = ""
    by: int = -1  # uid; -1: the daemon


class Resumed(Event, frozen=True, tag="resumed"):
    job_id: int
    at_head: bool = False
    by: int = -1
    message: str = ""


class Cancelled(Event, frozen=True, tag="cancelled"):
    job_id: int
    by: int
    message: str = ""


class Expired(Event, frozen=True, tag="expired"):
    job_id: int


class Failed(Event, frozen=True, tag="failed"):
    job_id: int
    reason: Reason  # HandlerFailing, FailuresMax, InputLost
    detail: str = ""


class Removed(Event, frozen=True, tag="removed"):
    """The job and its files are gone, by retention or by `jobctl rm`. Its id is never used again."""

    job_id: int
    by: int = -1
    message: str = ""


class SubmitIdsForgotten(Event, frozen=True, tag="submit_ids_forgotten"):
    """The submit ids of these removed jobs were kept for seven days."""

    job_ids: tuple[int, ...]


# --- leases ---------------------------------------------------------------------------------------------------


class Leased(Event, frozen=True, tag="leased"):
    device: str
    job_id: int
    attempt: int
    level: Priority  # at which it competes: aging may have lifted it
    turn_ns: int = 0  # a new turn of this length begins; 0: the tenant's turn goes on
    canary: bool = False  # the device is on trial, or lines wait for a canary


class HandlerLoaded(Event, frozen=True, tag="handler_loaded"):
    """A worker on this device holds this handler, loaded."""

    device: str
    handler: str
    load_ns: int
    vram_bytes: int = 0


class WorkerGone(Event, frozen=True, tag="worker_gone"):
    """The worker that held this handler is gone: evicted, dead, or stopped."""

    device: str
    handler: str


class HandlerLoadFailed(Event, frozen=True, tag="handler_load_failed"):
    """The lease is over; the handler's jobs wait until `retry_at_ns`."""

    device: str
    job_id: int
    attempt: int
    error: str
    retry_at_ns: int
    used_ns: int
    vtime_ns: int


class YieldRequested(Event, frozen=True, tag="yield_requested"):
    device: str
    job_id: int
    attempt: int
    why: YieldWhy
    detail: str = ""
    by: int = -1


class Progress(Event, frozen=True, kw_only=True):
    """What every report of work done carries. `used_ns` and `vtime_ns` are what this report adds."""

    job_id: int
    attempt: int
    checkpoint: Checkpoint
    used_ns: int
    vtime_ns: int
    timings: Timings = Timings()  # what this report adds
    vram_bytes: int = 0  # peak so far


class Checkpointed(Progress, frozen=True, tag="checkpointed"):
    """Outputs are durable up to here; work goes on."""


class Yielded(Progress, frozen=True, tag="yielded"):
    """The worker gave the lease back at a batch boundary; counts against nobody."""

    cramped_bytes: int = (
        -1
    )  # it did not fit into the room that others leave on the device; -1: that was not why


class Completed(Progress, frozen=True, tag="completed"):
    """Every item was tried."""


class LeaseLost(Event, frozen=True, tag="lease_lost"):
    """The lease ended without yield or finish: the worker died, hung, was poisoned, or the daemon died."""

    job_id: int
    attempt: int
    cause: str  # died, silent, stalled, poisoned, lied, daemon, canary, disk_full, output_damaged,
    # failures_max, input_lost; lied: it reported what cannot be
    detail: str = ""
    suspects: tuple[Span, ...] = ()  # in hand when it happened: to be redone one by one
    blamed: int = 0  # a line that was alone in hand; 0: none
    canary_due: tuple[int, ...] = ()  # lines to be failed after a canary
    condemned: tuple[int, ...] = ()  # lines to be failed without one: the job has no other line to try
    retry_at_ns: int = 0
    used_ns: int = 0
    vtime_ns: int = 0


class CanaryPassed(Event, frozen=True, tag="canary_passed"):
    """A fresh worker computed a known item: what died is the items' fault. They fail with `worker_lost`."""

    job_id: int
    attempt: int
    lines: tuple[int, ...]


class DeviceFellIll(Event, frozen=True, tag="device_fell_ill"):
    device: str
    reason: (
        str  # WorkerUnkillable, CanaryFailed, RepeatedFailures; DeviceLost, ResetRequired, ComputeProhibited
    )
    detail: str
    retry_at_ns: int


class DeviceRecovered(Event, frozen=True, tag="device_recovered"):
    device: str


class DeviceCrowded(Event, frozen=True, tag="device_crowded"):
    """Processes that are not ours leave so little of its memory that some handler does not fit."""

    device: str
    room_bytes: int
    detail: str = ""


class DeviceCleared(Event, frozen=True, tag="device_cleared"):
    """They leave room for every handler again."""

    device: str


class DriverMismatched(Event, frozen=True, tag="driver_mismatched"):
    """The driver in the kernel is not the one of the libraries: it was upgraded, and the host was not rebooted."""

    device: str
    detail: str = ""


AnyEvent = (
    DaemonStarted
    | DaemonStopping
    | DevicesFound
    | QueueSwitched
    | DiskFilled
    | DiskFreed
    | NotifierAttached
    | NotifierLeft
    | Reserved
    | ReservationReleased
    | Submitted
    | InputsSpooled
    | Woken
    | Foretold
    | PriorityChanged
    | MovedFirst
    | Paused
    | Resumed
    | Cancelled
    | Expired
    | Failed
    | Removed
    | SubmitIdsForgotten
    | Leased
    | HandlerLoaded
    | WorkerGone
    | HandlerLoadFailed
    | YieldRequested
    | Checkpointed
    | Yielded
    | Completed
    | LeaseLost
    | CanaryPassed
    | DeviceFellIll
    | DeviceRecovered
    | DeviceCrowded
    | DeviceCleared
    | DriverMismatched
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    """One journal record."""
    return _encoder.encode(event)


def decode(record: bytes) -> AnyEvent:
    """Raises: msgspec.DecodeError, or ValueError for a record that is no event."""
    return _decoder.decode(record)
