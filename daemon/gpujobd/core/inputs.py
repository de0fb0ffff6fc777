"""What reaches the core: wishes of people, reports of workers, and the passing of time.

Rule 1: an input may be wrong, stale or hostile; decide() answers with events, with none, or with `Refused`.
Rule 2: people are named by the uid that the kernel reports; what that uid may do is looked up by the shell.
Rule 3: reports of workers quote device and attempt; one that does not match the lease changes nothing.
"""

from __future__ import annotations

import enum

import msgspec

from gpujobd.core.model import Checkpoint, Expected, ParamValue, Priority, Span, Timings


class Who(msgspec.Struct, frozen=True, kw_only=True):
    """The peer of a connection."""

    uid: int
    name: str = ""  # user name; also the name of the user's own tenant
    admin: bool = False
    observer: bool = False
    high: bool = False  # may use priority high without being an administrator
    tenants: frozenset[str] = frozenset()  # tenants this user may submit as, own tenant included


class Input(msgspec.Struct, frozen=True, kw_only=True):
    pass


# --- people ---------------------------------------------------------------------------------------------------


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a submission: all of it but the bytes."""

    submit_id: str
    handler: str
    items: int
    input_bytes: int
    input_sha256: bytes  # 32 bytes
    item_bytes: int  # length of the longest line
    tenant: str = ""  # empty: the user's own
    name: str = ""
    params: dict[str, ParamValue] = {}
    priority: Priority = Priority.NORMAL
    begin_ns: int = 0
    deadline_ns: int = 0
    failures_max: int = -1
    retry_of: int = 0
    message: str = ""  # why it is tried again
    notify: tuple[str, ...] = ()
    notify_on: tuple[str, ...] = ()


class Reserve(Input, frozen=True):
    """May this come in? If yes, hold room for it. Known submit_id with the same content: no events."""

    who: Who
    submission: Submission


class Release(Input, frozen=True):
    """The stream of a reservation broke off, or its bytes were not what the header said."""

    reservation_id: int


class Submit(Input, frozen=True):
    """The input is here, whole: `inline`, or in the spool under its reservation."""

    who: Who
    submission: Submission
    reservation_id: int = 0
    inline: bytes = b""


class Cancel(Input, frozen=True):
    who: Who
    job_id: int
    message: str = ""


class Pause(Input, frozen=True):
    who: Who
    job_id: int
    message: str = ""


class Resume(Input, frozen=True):
    who: Who
    job_id: int
    message: str = ""


class SetPriority(Input, frozen=True):
    who: Who
    job_id: int
    priority: Priority
    message: str = ""


class MoveFirst(Input, frozen=True):
    who: Who
    job_id: int
    message: str = ""


class Remove(Input, frozen=True):
    who: Who
    job_id: int
    message: str = ""


class QueueVerb(enum.StrEnum):
    STOP = "stop"
    START = "start"
    DISABLE = "disable"
    ENABLE = "enable"
    DRAIN = "drain"


class SwitchQueue(Input, frozen=True):
    """`start` also ends a drain."""

    who: Who
    verb: QueueVerb
    message: str = ""


class Attend(Input, frozen=True):
    """A notifier is here."""

    who: Who
    names: tuple[str, ...] = ()
    admin_names: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    mail_domains: tuple[str, ...] = ()


class Leave(Input, frozen=True):
    """The notifier's connection ended, and no other notifier is here."""


# --- the daemon -------------------------------------------------------------------------------------------------


class Start(Input, frozen=True):
    """First input of a run, after replay."""

    boot_id: str
    version: str
    devices: tuple[str, ...]


class Stop(Input, frozen=True):
    """SIGTERM."""


class Spooled(Input, frozen=True):
    job_ids: tuple[int, ...]


class Foretell(Input, frozen=True):
    """What a forecast says of jobs that were submitted since the one before."""

    jobs: tuple[Expected, ...]


class DiskSpace(Input, frozen=True):
    """A look at the spool's file system."""

    full: bool
    detail: str = ""


class Retain(Input, frozen=True):
    """Time to apply retention: final jobs past `final_days`, outputs beyond `outputs_bytes_max`.

    One call does a bounded piece; repeat it until it gives no events.
    """


class Tick(Input, frozen=True):
    """Time has passed, or something changed: whatever is due, is done."""


# --- workers ----------------------------------------------------------------------------------------------------


class Report(Input, frozen=True, kw_only=True):
    device: str
    attempt: int
    used_ns: int  # device time since the grant, as the supervisor measured it


class Loaded(Input, frozen=True):
    """A worker finished loading a handler (with or without a lease waiting for it)."""

    device: str
    handler: str
    load_ns: int
    vram_bytes: int = 0


class LoadFailed(Report, frozen=True):
    error: str


class Unloaded(Input, frozen=True):
    """The worker that held this handler is gone."""

    device: str
    handler: str


class Work(Report, frozen=True, kw_only=True):
    checkpoint: Checkpoint
    timings: Timings = Timings()  # since the last report of this attempt
    vram_bytes: int = 0


class CheckpointReached(Work, frozen=True):
    pass


class GaveBack(Work, frozen=True):
    """The worker yielded; or there was none yet, and the lease is given back as it came."""

    cramped_bytes: int = -1  # why: it does not fit into this room, which others leave it; -1: another reason


class Finished(Work, frozen=True):
    """Every item was tried."""


class Lost(Report, frozen=True):
    """The lease is over and no checkpoint came with it."""

    cause: str  # died, silent, stalled, poisoned, canary, disk_full, output_damaged, failures_max, input_lost
    detail: str = ""
    suspects: tuple[
        Span, ...
    ] = ()  # the call in hand, then the one before it; Span(0, 0) where there was none


class CanaryOk(Report, frozen=True):
    """The canary of this lease passed; the lines it was run for may be failed."""


class Unkillable(Input, frozen=True):
    """The worker's lock is not free, or its cgroup not empty, 30 s after SIGKILL."""

    device: str
    detail: str = ""


class DeviceSeen(Input, frozen=True):
    """A look at a device from outside, by its driver. Told again and again: what has not changed gives no events."""

    device: str
    trouble: str = ""  # DriverMismatch, DeviceLost, ResetRequired, ComputeProhibited; empty: none is known
    detail: str = ""
    total_bytes: int = 0  # 0: nothing is known of its memory
    room_bytes: int = -1  # as in Device


class MemoryWanted(Input, frozen=True):
    """Processes that are not ours have taken more of this device, and next to nothing is left of its memory."""

    device: str
    attempt: int
    detail: str = ""


AnyInput = (
    Reserve
    | Release
    | Submit
    | Cancel
    | Pause
    | Resume
    | SetPriority
    | MoveFirst
    | Remove
    | SwitchQueue
    | Attend
    | Leave
    | Start
    | Stop
    | Spooled
    | Foretell
    | DiskSpace
    | Retain
    | Tick
    | Loaded
    | LoadFailed
    | Unloaded
    | CheckpointReached
    | GaveBack
    | Finished
    | Lost
    | CanaryOk
    | Unkillable
    | DeviceSeen
    | MemoryWanted
)
