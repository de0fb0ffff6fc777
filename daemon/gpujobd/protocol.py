"""The words between gpujobd and its clients. PROTOCOL.md tells the same for people.

    frame   := length u32 LE | body          length counts the body: 1 to FRAME_BYTES_MAX
    body    := msgpack map with the key "verb" (client to daemon) or "reply" (daemon to client)

Rule 1: the first frame each way is Hello / Welcome. Then requests, each with an `id` of the client's choice; they
may be pipelined; every reply quotes the id. One request has one final reply; Events, Watch and Log send any number
of `EventSeen`, `JobChanged` and `LogPiece` before it.
Rule 2: `ErrorCode` values and tags are wire format: add, never rename.
Rule 3: an absent key means "not known".
Rule 4: this module imports the standard library and msgspec, nothing of the daemon: the client lives on it alone, and
so does the notifier, whose own socket speaks the same frames with verbs of its own (`AnyNotifierRequest`).
"""

from __future__ import annotations

import datetime as dt
import enum
import os
import re
import struct
from collections.abc import Iterator
from functools import cache
from typing import Final, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

VERSION: Final = 1
FRAME_BYTES_MAX: Final = 1 << 20
INLINE_BYTES_MAX: Final = 64 << 10  # an input up to this size rides in the Submit frame
CHUNK_BYTES_MAX: Final = 512 << 10
PAGE_JOBS_MAX: Final = 500  # jobs in one Jobs reply
IN_FLIGHT_MAX: Final = 64  # requests of one connection without their final reply
NOTIFY_TARGETS_MAX: Final = 8  # of one job
NOTIFY_TARGET_CHARS_MAX: Final = 500
ATTEND_WORDS_MAX: Final = 256  # in each list of an Attend
ATTEND_WORD_CHARS_MAX: Final = 253  # a host's name in full
PAGE_NOTIFICATIONS_MAX: Final = 500  # in one NotificationList

HEAD: Final = struct.Struct("<I")
_T = TypeVar("_T")

SYSTEM_SOCKET: Final = "/run/gpujobd/control.sock"
SYSTEM_NOTIFY_SOCKET: Final = "/run/gpujobd-notify/control.sock"


def own_socket(program: str = "gpujobd") -> str:
    """Where a daemon (or a notifier) that runs as an ordinary user listens, and its user's client looks.

    In the user's run-time folder where there is one, else beside the state. Relative paths in the environment are
    ignored, as the XDG base directory specification asks.
    """
    for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.getuid()}"):
        if os.path.isabs(folder) and os.path.isdir(folder):
            return os.path.join(folder, program, "control.sock")
    folder = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.local/state")
    return os.path.join(folder, program, "control.sock")


def socket_paths() -> list[str]:
    """Where a client looks for a daemon, in this order: the user's own, then the system's."""
    return [own_socket(), SYSTEM_SOCKET]


def notify_socket_paths() -> list[str]:
    """The same for the notifier."""
    return [own_socket("gpujobd-notify"), SYSTEM_NOTIFY_SOCKET]


class ErrorCode(enum.StrEnum):
    """Every way to say no."""

    # Refused at the door: exit code 6.
    QUEUE_FULL = "queue_full"
    TOO_MANY_ITEMS = "too_many_items"
    BACKLOG_FULL = "backlog_full"
    INPUT_TOO_LARGE = "input_too_large"
    ITEM_TOO_LARGE = "item_too_large"
    SPOOL_FULL = "spool_full"
    QUOTA = "quota"
    UNKNOWN_HANDLER = "unknown_handler"
    BAD_PARAMS = "bad_params"
    BAD_INPUT = "bad_input"
    CONFLICT = "conflict"
    DISK_LOW = "disk_low"
    DRAINING = "draining"
    DISABLED = "disabled"
    NO_NOTIFIER = "no_notifier"  # nobody is there to send what `notify` asks for
    BAD_NOTIFY = "bad_notify"  # a target that may not be used, or a word that is no occasion
    # Exit code 4.
    FORBIDDEN = "forbidden"
    # Exit code 2.
    NO_SUCH_JOB = "no_such_job"
    BAD_REQUEST = "bad_request"
    BAD_STATE = "bad_state"  # the job is not in a state in which that can be done
    NO_SUCH_NOTIFICATION = "no_such_notification"
    # Exit code 3: the daemon cannot serve now.
    TOO_MANY_CONNECTIONS = "too_many_connections"
    TOO_MANY_REQUESTS = "too_many_requests"
    TIMED_OUT = "timed_out"
    NOT_ACCEPTED = "not_accepted"  # the journal is dead: what was kept, the next start knows
    INTERNAL = "internal"


# --- whom to tell, and when ---------------------------------------------------------------------------------------

NOBODY: Final = "none"
"""As the only target of a job: nobody is told, whatever its owner's defaults, or the job it is a retry of, say."""


class NotifyOn(enum.StrEnum):
    """The occasions of `notify_on`. Beside them stands `progress=N%`: whenever another N % of the items were tried."""

    START = "start"  # the first lease
    FINISH = "finish"  # a final state, whichever; what an empty `notify_on` means
    FAIL = "fail"  # failed, expired, or completed with failed items; with `finish` it is told once
    PAUSE = "pause"  # for any reason but the daemon's own stop
    STALL = "stall"  # a lease was lost because its worker stalled or was silent


def progress_step(occasion: str) -> int | None:
    """N of `progress=N%`, 1 to 99; None for anything else."""
    found = re.fullmatch("progress=([1-9][0-9]?)%", occasion, re.ASCII)
    return int(found[1]) if found else None


def is_occasion(word: str) -> bool:
    """Whether `notify_on` may have this word."""
    return word in {*NotifyOn} or progress_step(word) is not None


def covers(pattern: str, host: str) -> bool:
    """Whether a pattern of Attend means this host or domain: itself, `*.DOMAIN` all that is below it, `*` any."""
    pattern, host = pattern.lower(), host.lower().rstrip(".")
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and len(host) > len(pattern) - 1
    return pattern in ("*", host)


# --- client to daemon -------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag_field="verb", tag="hello", frozen=True):
    versions: list[int]
    program: str = ""


class Request(msgspec.Struct, tag_field="verb", frozen=True, kw_only=True, omit_defaults=True):
    id: int


class Ping(Request, frozen=True, tag="ping"):
    pass


class Status(Request, frozen=True, tag="status"):
    """The table of bare `jobctl`: switches, devices, what runs, what waits (first page)."""


class Submit(Request, frozen=True, tag="submit"):
    """Header of a submission. With `input`, all of it; without, Chunk frames follow after GoOn.

    Times are msgpack timestamps. `submit_id`: 1 to 64 printable ASCII characters, made by the client. `notify`: each a
    name of an endpoint, `https://...`, `http://...` or `mailto:ADDRESS`; `notify_on`: words of NotifyOn, `progress=N%`.
    """

    submit_id: str
    handler: str
    items: int
    input_bytes: int
    input_sha256: bytes
    item_bytes: int
    tenant: str = ""
    name: str = ""
    params: dict[str, str | int | float | bool] = {}
    priority: str = "normal"
    begin_at: dt.datetime | None = None
    deadline_at: dt.datetime | None = None
    failures_max: int = -1
    dry_run: bool = False
    input: bytes | None = None
    notify: list[str] = []  # at most NOTIFY_TARGETS_MAX
    notify_on: list[str] = []  # empty: finish


class Chunk(Request, frozen=True, tag="chunk"):
    """Next piece of the input of the Submit with this id; an empty piece ends it."""

    data: bytes


class List(Request, frozen=True, tag="list"):
    """Jobs the caller may see, oldest first, a page at a time."""

    states: list[str] = []  # empty: every state
    tenant: str = ""
    handler: str = ""
    mine: bool = False
    after: int = 0  # job id; the `next` of the page before
    newest: bool = False  # newest first; `after` then counts down
    limit: int = PAGE_JOBS_MAX
    changed_since: int = 0  # only jobs changed by an event with a later number


class Show(Request, frozen=True, tag="show"):
    job: int


class Last(Request, frozen=True, tag="last"):
    """The caller's newest job: `@`."""


class Wait(Request, frozen=True, tag="wait"):
    """Answered with Jobs once all of them are final. The client keeps its own timeout and hangs up."""

    jobs: list[int]


class Watch(Request, frozen=True, tag="watch"):
    """A JobChanged now and at every change, until the job is final."""

    job: int


class Output(Request, frozen=True, tag="output"):
    """A read-only descriptor (SCM_RIGHTS) of the results or errors file, and how many of its bytes count."""

    job: int
    errors: bool = False


class Log(Request, frozen=True, tag="log"):
    """The job's log as LogPiece replies; with `follow`, until the job is final."""

    job: int
    follow: bool = False


class Events(Request, frozen=True, tag="events"):
    """Events the caller may see, from `since` on (0: from now); with `follow`, for ever.

    A Gap comes first where `since` is older than what is kept.
    """

    since: int = 0
    follow: bool = False
    job: int = 0  # 0: of all jobs


class Cancel(Request, frozen=True, tag="cancel"):
    job: int
    message: str = ""


class Pause(Request, frozen=True, tag="pause"):
    job: int
    message: str = ""


class Resume(Request, frozen=True, tag="resume"):
    job: int
    message: str = ""


class Retry(Request, frozen=True, tag="retry"):
    """A new job from a final one: all items not done, or only those that failed."""

    job: int
    submit_id: str
    failed_items: bool = False
    message: str = ""
    notify: list[str] = []  # empty: as for the final one; as for Submit else
    notify_on: list[str] = []  # the same


class SetPriority(Request, frozen=True, tag="priority"):
    job: int
    priority: str
    message: str = ""


class First(Request, frozen=True, tag="first"):
    job: int
    message: str = ""


class Remove(Request, frozen=True, tag="rm"):
    job: int
    message: str = ""


class Queue(Request, frozen=True, tag="queue"):
    action: str  # stop, start, disable, enable, drain
    message: str = ""


class Handlers(Request, frozen=True, tag="handlers"):
    pass


class Tenants(Request, frozen=True, tag="tenants"):
    """With `follow`, a TenantList now and after changes, at most one a second, for ever."""

    follow: bool = False


class Devices(Request, frozen=True, tag="devices"):
    pass


class Attend(Request, frozen=True, tag="attend"):
    """The notifier is here, and tells what it can reach: at once, and whenever that changes.

    It counts as here until this connection ends. Each list has at most ATTEND_WORDS_MAX words of at most
    ATTEND_WORD_CHARS_MAX characters. A pattern is a host or domain, `*.DOMAIN` for all below it, or `*` for any.
    """

    names: list[str] = []  # endpoints that users may name
    admin_names: list[str] = []  # endpoints that only administrators may name
    url_hosts: list[str] = []  # patterns; empty: no webhooks by URL
    mail_domains: list[str] = []  # patterns; empty: no mailto:


AnyRequest = (
    Hello
    | Ping
    | Status
    | Submit
    | Chunk
    | List
    | Show
    | Last
    | Wait
    | Watch
    | Output
    | Log
    | Events
    | Cancel
    | Pause
    | Resume
    | Retry
    | SetPriority
    | First
    | Remove
    | Queue
    | Handlers
    | Tenants
    | Devices
    | Attend
)


# --- what replies carry -----------------------------------------------------------------------------------------


class Items(msgspec.Struct, frozen=True, kw_only=True):
    total: int
    done: int
    failed: int


class Forecast(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    start_at: dt.datetime | UnsetType = UNSET
    finish_at: dt.datetime | UnsetType = UNSET  # 50 %
    finish_by_90: dt.datetime | UnsetType = UNSET


class Foretold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first forecast after the submission; of a completed job, what came of it."""

    made_at: dt.datetime
    finish_at: dt.datetime
    finish_by_90: dt.datetime
    start_at: dt.datetime | UnsetType = UNSET
    error: float | UnsetType = UNSET
    kept_90: bool | UnsetType = UNSET


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the forecasts of completed jobs: moving means."""

    jobs: int
    error: float
    late: float
    by_90: float


class JobTimings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    queued_s: float | UnsetType = UNSET
    load_s: float | UnsetType = UNSET
    compute_s: float | UnsetType = UNSET
    io_s: float | UnsetType = UNSET  # read + write + sync
    items_per_s: float | UnsetType = UNSET


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job as people see it; the same in `--json`. Times are RFC 3339 UTC."""

    id: int
    tenant: str
    owner: str  # user name, or the uid in digits where it has none
    handler: str
    priority: str
    state: str
    items: Items
    submitted_at: dt.datetime
    name: str | UnsetType = UNSET
    params: dict[str, str | int | float | bool] | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    reason_detail: str | UnsetType = UNSET
    yielding: str | UnsetType = UNSET  # why a running job is being asked to give its lease back
    position: int | UnsetType = UNSET  # 1: next to start
    forecast: Forecast | UnsetType = UNSET
    foretold: Foretold | UnsetType = UNSET
    begin_at: dt.datetime | UnsetType = UNSET
    deadline_at: dt.datetime | UnsetType = UNSET
    started_at: dt.datetime | UnsetType = UNSET
    finished_at: dt.datetime | UnsetType = UNSET
    attempt: int | UnsetType = UNSET
    interruptions: int | UnsetType = UNSET
    device: str | UnsetType = UNSET
    retry_of: int | UnsetType = UNSET
    failures_max: int | UnsetType = UNSET
    gpu_s: float | UnsetType = UNSET  # device time charged so far
    timings: JobTimings | UnsetType = UNSET
    failure_codes: dict[str, int] | UnsetType = UNSET  # failed items by error code; beyond ten, as `other`
    notify: list[str] | UnsetType = UNSET  # only its owner, administrators and observers are shown this,
    notify_on: list[str] | UnsetType = UNSET  # and this


class HeldView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    handler: str
    pid: int
    bytes: int


class OtherView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pid: int
    bytes: int | UnsetType = UNSET
    command: str | UnsetType = UNSET  # for administrators
    user: str | UnsetType = UNSET  # for administrators


class DeviceView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    state: str
    loaded: list[str]
    reason: str | UnsetType = UNSET
    reason_detail: str | UnsetType = UNSET  # for administrators
    job: int | UnsetType = UNSET  # only where the caller may see it
    tenant: str | UnsetType = UNSET
    memory_bytes: int | UnsetType = UNSET
    memory_total_bytes: int | UnsetType = UNSET
    hardware: str | UnsetType = UNSET  # "NVIDIA H200", or the CPU's model name
    since: dt.datetime | UnsetType = UNSET  # in this state
    held: list[HeldView] | UnsetType = UNSET
    others: list[OtherView] | UnsetType = UNSET  # the largest; the rest is in others_bytes
    others_bytes: int | UnsetType = UNSET
    memory_used_bytes: int | UnsetType = UNSET  # by everybody
    utilisation: float | UnsetType = UNSET
    temperature_c: float | UnsetType = UNSET
    power_w: float | UnsetType = UNSET
    power_limit_w: float | UnsetType = UNSET
    throttled: list[str] | UnsetType = UNSET
    uuid: str | UnsetType = UNSET
    driver: str | UnsetType = UNSET
    seen_at: dt.datetime | UnsetType = UNSET
    unseen: str | UnsetType = UNSET  # why nothing of it is known from outside


class HandlerView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    entry: str
    params: dict[str, dict[str, object]]  # what a job may choose: type, default, choices, min, max
    loaded_on: list[str]
    load_s: float | UnsetType = UNSET
    items_per_s: float | UnsetType = UNSET
    failure: str | UnsetType = UNSET  # why it does not load
    retry_at: dt.datetime | UnsetType = UNSET


class TenantView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    share: float
    served_s: float
    owed_s: float  # device time it is behind (or, negative, ahead of) an equal split by shares
    queued: int
    running: int
    paused: int
    items_left: int
    jobs_max: int | UnsetType = UNSET  # queued, running and paused
    items_max: int | UnsetType = UNSET  # items left
    devices_max: int | UnsetType = UNSET  # on which it runs at a time
    bytes_max: int | UnsetType = UNSET
    bytes: int | UnsetType = UNSET  # inputs and outputs: for those who may submit as this tenant
    accuracy: Accuracy | UnsetType = UNSET  # of forecasts


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the caller's uid takes up, and its quotas; administrators have none."""

    jobs: int
    items: int
    bytes: int
    submissions: int  # of the last minute
    jobs_max: int | UnsetType = UNSET
    items_max: int | UnsetType = UNSET
    bytes_max: int | UnsetType = UNSET
    submissions_max: int | UnsetType = UNSET


class Switches(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    stopped: bool = False
    disabled: bool = False
    draining: bool = False
    message: str = ""
    stopping: bool = False  # the daemon is on its way down
    disk_full: bool = False


# --- daemon to client -------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag_field="reply", tag="welcome", frozen=True):
    version: int
    program: str  # "gpujobd 0.1.0"
    boot_id: str
    uid: int


class Reply(msgspec.Struct, tag_field="reply", frozen=True, kw_only=True, omit_defaults=True):
    id: int


class Error(Reply, frozen=True, tag="error"):
    """`limit` and `current` where a limit was met; the message names both as well."""

    code: str
    message: str
    limit: int | UnsetType = UNSET
    current: int | UnsetType = UNSET
    retry_after_s: int | UnsetType = UNSET  # of a rate: by then the same request is within the limit


class Done(Reply, frozen=True, tag="done"):
    """Final reply of everything that has nothing else to say."""


class Pong(Reply, frozen=True, tag="pong"):
    program: str
    seq: int


class GoOn(Reply, frozen=True, tag="go_on"):
    """Room is held: send the Chunk frames."""


class Accepted(Reply, frozen=True, tag="accepted"):
    """The job is on disk. With `dry_run`, job is 0 and nothing was kept."""

    job: int
    forecast: Forecast | UnsetType = UNSET
    position: int | UnsetType = UNSET


class OneJob(Reply, frozen=True, tag="job"):
    job: Job


class Jobs(Reply, frozen=True, tag="jobs"):
    jobs: list[Job]
    seq: int  # the state is that after this event
    next: int = 0  # `after` of the next page; 0: this is the last


class StatusTable(Reply, frozen=True, tag="status"):
    switches: Switches
    devices: list[DeviceView]
    running: list[Job]
    waiting: list[Job]  # at most a page, in the order they are expected to start
    paused: int
    queued_in_all: int  # other people's included, so that a position can be understood


class File(Reply, frozen=True, tag="file"):
    """Comes with one descriptor. Bytes after `bytes` are provisional: do not read them."""

    bytes: int


class LogPiece(Reply, frozen=True, tag="log_piece"):
    data: bytes


class JobChanged(Reply, frozen=True, tag="job_changed"):
    job: Job


class EventSeen(Reply, frozen=True, tag="event"):
    seq: int
    event: dict[str, object]  # {"event": "submitted", "at": ..., "job": 7, ...}


class Alive(Reply, frozen=True, tag="alive"):
    """Sent every 60 s on a stream that has nothing else to say."""


class Gap(Reply, frozen=True, tag="gap"):
    """Events before `first_seq` are not kept any more; `List.changed_since` brings a client up to date."""

    first_seq: int


class HandlerList(Reply, frozen=True, tag="handlers"):
    handlers: list[HandlerView]


class TenantList(Reply, frozen=True, tag="tenants"):
    tenants: list[TenantView]
    you: Usage | UnsetType = UNSET
    accuracy: Accuracy | UnsetType = UNSET  # of the forecasts for all tenants


class DeviceList(Reply, frozen=True, tag="devices"):
    devices: list[DeviceView]


AnyReply = (
    Welcome
    | Error
    | Done
    | Pong
    | GoOn
    | Accepted
    | OneJob
    | Jobs
    | StatusTable
    | File
    | LogPiece
    | JobChanged
    | EventSeen
    | Alive
    | Gap
    | HandlerList
    | TenantList
    | DeviceList
)


# --- client to notifier, over its own socket --------------------------------------------------------------------


class Notifications(Request, frozen=True, tag="notifications"):
    """What was sent, is to be sent or cannot be, oldest first, a page at a time; and the state of every endpoint.

    Of the caller's own jobs; of everybody's for root and the administrators that the notifier is configured with.
    """

    job: int = 0  # 0: of all jobs
    states: list[str] = []  # of NotificationState; empty: every state
    all: bool = False  # everybody's, where the caller may see them; else his own alone
    after: int = 0  # id; the `next` of the page before
    limit: int = PAGE_NOTIFICATIONS_MAX


class NotificationRetry(Request, frozen=True, tag="notification_retry"):
    """Send it, now: one that failed, or one that waits for its next try."""

    notification: int


class NotificationMute(Request, frozen=True, tag="notification_mute"):
    """Keep quiet about a job, to an endpoint, or about a job to an endpoint: at least one of them is named."""

    job: int = 0
    endpoint: str = (
        ""  # muting one for all jobs of everybody takes an administrator; for one's own jobs it does not
    )
    muted: bool = True


class NotifyDefaults(Request, frozen=True, tag="notify_defaults"):
    """Read (or, with `set`, replace) what holds for the caller's jobs that are submitted without `notify`."""

    set: bool = False
    notify: list[str] = []  # empty: nobody is told
    notify_on: list[str] = []


AnyNotifierRequest = Hello | Ping | Notifications | NotificationRetry | NotificationMute | NotifyDefaults


# --- notifier to client -----------------------------------------------------------------------------------------


class NotificationState(enum.StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"  # given up, or its endpoint is disabled
    MUTED = "muted"


class NotificationView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing to be told to one target."""

    id: int
    job: int
    kind: str  # of NotifyOn, or `progress=50%`: half of its items were tried
    target: str  # as it was given
    endpoint: str  # through which it goes
    state: str
    tries: int
    due_at: dt.datetime  # when what it tells happened
    created_at: dt.datetime  # when the notifier learned of it
    delivered_at: dt.datetime | UnsetType = UNSET
    next_try_at: dt.datetime | UnsetType = UNSET
    last_error: str | UnsetType = UNSET
    owner: str | UnsetType = UNSET  # of the job; user name, or the uid in digits


class EndpointView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One endpoint, and its circuit breaker."""

    name: str
    kind: str  # webhook, mail, hook
    state: str  # closed: it is tried; open: not before until_at; half_open: one try decides
    in_flight: int
    queued: int
    until_at: dt.datetime | UnsetType = UNSET
    last_error: str | UnsetType = UNSET
    disabled: str | UnsetType = UNSET  # why it is not used any more


class NotificationList(Reply, frozen=True, tag="notifications"):
    notifications: list[NotificationView]
    endpoints: list[EndpointView]
    next: int = 0  # `after` of the next page; 0: this is the last


class Defaults(Reply, frozen=True, tag="defaults"):
    notify: list[str]
    notify_on: list[str]


AnyNotifierReply = Welcome | Error | Done | Pong | NotificationList | Defaults


# --- frames -----------------------------------------------------------------------------------------------------


class FrameError(Exception):
    """The peer broke the protocol; the message says how."""


_encoder = msgspec.msgpack.Encoder()


# Made when first needed: a client needs one of the four, and each takes most of a millisecond of its start.
@cache
def _requests() -> msgspec.msgpack.Decoder[AnyRequest]:
    return msgspec.msgpack.Decoder(AnyRequest)


@cache
def _replies() -> msgspec.msgpack.Decoder[AnyReply]:
    return msgspec.msgpack.Decoder(AnyReply)


@cache
def _notifier_requests() -> msgspec.msgpack.Decoder[AnyNotifierRequest]:
    return msgspec.msgpack.Decoder(AnyNotifierRequest)


@cache
def _notifier_replies() -> msgspec.msgpack.Decoder[AnyNotifierReply]:
    return msgspec.msgpack.Decoder(AnyNotifierReply)


def frame(message: AnyRequest | AnyReply | AnyNotifierRequest | AnyNotifierReply) -> bytes:
    """Encode one message as one frame."""
    body = _encoder.encode(message)
    assert 0 < len(body) <= FRAME_BYTES_MAX, len(body)  # pairs with Frames
    return HEAD.pack(len(body)) + body


def size(record: Job | TenantView | NotificationView) -> int:
    """Bytes that it takes in a frame."""
    return len(_encoder.encode(record))


class Frames:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield every body that is complete now.

        Raises:
            FrameError: a length outside 1 to FRAME_BYTES_MAX; the stream cannot be followed any further.
        """
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= HEAD.size:
                (length,) = HEAD.unpack_from(self._buffer, at)
                if not 0 < length <= FRAME_BYTES_MAX:
                    raise FrameError(f"frame of {length} bytes, allowed are 1 to {FRAME_BYTES_MAX}")
                if len(self._buffer) - at < HEAD.size + length:
                    break
                yield bytes(self._buffer[at + HEAD.size : at + HEAD.size + length])
                at += HEAD.size + length
        finally:
            del self._buffer[:at]


def decode_request(body: bytes) -> AnyRequest:
    """Raises: FrameError for anything that is no request; nothing else escapes, whatever the bytes."""
    return _decoded(_requests(), body, "a request")


def decode_reply(body: bytes) -> AnyReply:
    """Raises: FrameError for anything that is no reply."""
    return _decoded(_replies(), body, "a reply")


def decode_notifier_request(body: bytes) -> AnyNotifierRequest:
    """Raises: FrameError for anything that is no request to the notifier."""
    return _decoded(_notifier_requests(), body, "a request to the notifier")


def decode_notifier_reply(body: bytes) -> AnyNotifierReply:
    """Raises: FrameError for anything that is no reply of the notifier."""
    return _decoded(_notifier_replies(), body, "a reply of the notifier")


def _decoded(decoder: msgspec.msgpack.Decoder[_T], body: bytes, what: str) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise FrameError(f"not {what}: {error}") from None
