"""What the daemon knows: jobs, tenants, devices, handlers, and the one table of legal moves.

           +--------------------- Yielded, LeaseLost ---------------------+
           v                                                              |
       +--------+  Leased                                            +---------+
    -->| queued |---------------------------------------------------->| running |
       +--------+                                                    +---------+
         |  ^  |                                                       |  |  |
   Paused|  |  +----------------------+            Paused              |  |  +--> completed
         v  | Resumed                 |   +----------------------------+  |
       +--------+                     v   v                               |
       | paused |-----------> cancelled, expired, failed <----------------+
       +--------+

Rule 1: a field is persistent (a snapshot carries it) or bookkeeping (rebuilt, never written); the two never mix.
Rule 2: only `Job.enter` moves a job, and only along `NEXT`.
Rule 3: `Rules` is what the administrator configured. decide() reads it; apply() must not, or a replay under
another configuration would give another state.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

S_NS: Final = 1_000_000_000
MINUTE_NS: Final = 60 * S_NS
CODES_MAX: Final = 10
CODE_CHARS_MAX: Final = 64
ACCURACY_JOBS: Final = 100
ERROR_MAX: Final = 10.0
DEFERRED_MAX: Final = 1_000  # items of one job that wait for another try
TELLING_NS: Final = (
    S_NS  # device time after which a job tells what its items cost: before, starting is most of it
)


class JobState(enum.StrEnum):
    """The seven states; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    __hash__ = str.__hash__  # Enum's own is Python code, and states are looked up in tables all the time


S = JobState
NEXT: Final[dict[JobState, frozenset[JobState]]] = {
    S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLED, S.EXPIRED, S.FAILED}),
    S.RUNNING: frozenset({S.QUEUED, S.PAUSED, S.COMPLETED, S.FAILED, S.CANCELLED, S.EXPIRED}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED, S.EXPIRED}),
    S.COMPLETED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
    S.EXPIRED: frozenset(),
}
assert set(NEXT) == set(JobState)  # a new state must say where it leads
FINAL: Final = frozenset(state for state, onward in NEXT.items() if not onward)


class Priority(enum.IntEnum):
    """Levels, the most urgent last, so that `max` picks it."""

    LOW = 0
    NORMAL = 1
    HIGH = 2

    __hash__ = int.__hash__  # as for JobState


class Reason(enum.StrEnum):
    """Why a job waits, or why it failed, in one word: wire format, add but never rename."""

    PRIORITY = "Priority"
    FAIR_SHARE = "FairShare"
    RESOURCES = "Resources"
    SWAP = "Swap"
    BEGIN_TIME = "BeginTime"
    HELD_BY_OWNER = "HeldByOwner"
    HELD_BY_ADMIN = "HeldByAdmin"
    QUEUE_STOPPED = "QueueStopped"
    DRAINING = "Draining"
    DAEMON_STOPPING = "DaemonStopping"
    BACKOFF = "Backoff"
    HANDLER_FAILING = "HandlerFailing"
    DISK_FULL = "DiskFull"
    DEVICE_UNHEALTHY = "DeviceUnhealthy"
    DEVICE_BUSY_ELSEWHERE = "DeviceBusyElsewhere"
    CRASH_LOOP = "CrashLoop"
    OUTPUT_DAMAGED = "OutputDamaged"
    RUNNING_DEVICES_MAX = "RunningDevicesMax"
    # Of failed jobs only; a job can fail with HandlerFailing, too.
    FAILURES_MAX = "FailuresMax"
    INPUT_LOST = "InputLost"


class YieldWhy(enum.StrEnum):
    """Why a lease is asked back; what becomes of the job when the worker has yielded follows from it."""

    TURN_OVER = "turn_over"  # back to queued
    PRIORITY = "priority"  # back to queued
    PAUSE = "pause"  # paused: HeldByOwner or HeldByAdmin
    CANCEL = "cancel"  # cancelled
    DEADLINE = "deadline"  # expired
    STOPPING = "stopping"  # paused: DaemonStopping
    ELSEWHERE = "elsewhere"  # back to queued: a process outside needs the memory


class Deferred(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An item that asked to be tried again at the end of the job (`Transient`)."""

    line: int
    tries: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The point a job resumes from. Both output files were synced up to these lengths before it was reported.

    Invariant: done + failed + len(deferred) == upto. Once upto is the last line, the deferred are tried one by one.
    """

    upto: int = 0  # lines 1..upto (of this job's own input) need no first try any more
    deferred: tuple[Deferred, ...] = ()  # at most DEFERRED_MAX
    results_bytes: int = 0
    results_crc: int = 0  # zlib.crc32 of the first results_bytes
    errors_bytes: int = 0
    errors_crc: int = 0
    done: int = 0  # result records
    failed: int = 0  # error records
    failure_codes: dict[str, int] = {}  # of the error records, by code; at most CODES_MAX codes and `other`


class Timings(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Seconds spent in each stage of a job, summed over its leases. Stages overlap: they are pipelined."""

    load_s: float = 0.0
    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    sync_s: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            load_s=self.load_s + other.load_s,
            read_s=self.read_s + other.read_s,
            compute_s=self.compute_s + other.compute_s,
            write_s=self.write_s + other.write_s,
            sync_s=self.sync_s + other.sync_s,
        )


class Expected(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The first forecast of a job's end, made soon after its submission: the end is held against it. Wall-clock."""

    job_id: int
    made_ns: int
    start_ns: int
    finish_ns: int
    finish_90_ns: int  # nine in ten should be done by then

    def error(self, finished_ns: int) -> float:
        """How much later it ended, as a part of the time that was forecast; negative: earlier.

        What takes less than a second is held against a second: else the daemon's own pace would be judged.
        """
        return (finished_ns - self.finish_ns) / max(S_NS, self.finish_ns - self.made_ns)


class Accuracy(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How the forecasts of completed jobs turned out: means, moving ones once there are ACCURACY_JOBS."""

    jobs: int = 0
    error: float = 0.0  # distance of the end from the forecast, as a part of the time that was forecast
    late: float = 0.0  # the same with its sign: who is always late is told too little
    by_90: float = 0.0  # the part of the jobs that were done by finish_90_ns

    def judged(self, expected: Expected, finished_ns: int) -> Accuracy:
        """With one more job. A single one counts as ERROR_MAX at most: a weekend's drain must not be all that is seen."""
        error = max(-ERROR_MAX, min(expected.error(finished_ns), ERROR_MAX))
        weight = 1 / min(self.jobs + 1, ACCURACY_JOBS)
        kept = float(finished_ns <= expected.finish_90_ns)
        return Accuracy(
            jobs=self.jobs + 1,
            error=self.error + (abs(error) - self.error) * weight,
            late=self.late + (error - self.late) * weight,
            by_90=self.by_90 + (kept - self.by_90) * weight,
        )


NO_ACCURACY: Final = Accuracy()


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Lines first..last, both included: the items one call of the handler got."""

    first: int
    last: int


class Notifier(msgspec.Struct, frozen=True, kw_only=True):
    """What a notifier said that it can reach, and since when it is gone."""

    names: tuple[str, ...] = ()  # endpoints that users may name
    admin_names: tuple[str, ...] = ()  # endpoints that only administrators may name
    url_hosts: tuple[str, ...] = ()  # patterns: a host, `*.DOMAIN`, `*`
    mail_domains: tuple[str, ...] = ()  # the same
    left_ns: int = 0  # 0: it is here


ParamValue = str | int | float | bool

# Shared by every job that has none: containers in a record are replaced, never changed in place.
NO_PARAMS: Final[dict[str, ParamValue]] = {}
NO_DEATHS: Final[dict[int, int]] = {}


class Job(msgspec.Struct, kw_only=True, gc=False, omit_defaults=True):
    """One submission by one tenant.

    gc=False: it refers to nothing that could refer back, and the collector need not walk 100,000 of them.
    """

    # Persistent: what was submitted.
    job_id: int
    submit_id: str
    owner: int  # uid
    tenant: str
    handler: str
    items: int
    input_bytes: int
    input_sha256: bytes
    submitted_ns: int
    name: str = ""
    params: dict[str, ParamValue] = {}
    begin_ns: int = 0  # not before; 0: at once
    deadline_ns: int = 0  # 0: none
    failures_max: int = -1  # -1: any number of items may fail
    retry_of: int = 0  # 0: not a retry
    inline_seq: int = 0  # journal record that holds the input; 0: the spool does
    reservation_id: int = 0  # Submitted.reservation_id: its input came in as the spool's incoming/<this>
    notify: tuple[str, ...] = ()  # whom the notifier tells; the daemon itself tells nobody
    notify_on: tuple[str, ...] = ()  # when

    # Persistent: where it is now.
    state: JobState = JobState.QUEUED
    priority: Priority = Priority.NORMAL
    level: Priority = Priority.NORMAL  # of the latest lease: aging may have lifted it above `priority`
    line_key: int = 0  # order in the tenant's own line, smallest first; set at submission, `first` lowers it
    asleep: bool = False  # queued, and waits for `wake_ns` before it stands in line
    reason: Reason | None = None  # of a pause or a failure; reasons for waiting are computed, not stored
    reason_detail: str = ""
    checkpoint: Checkpoint = Checkpoint()
    attempt: int = 0  # number of the latest lease
    interruptions: int = 0  # leases that ended without yield or finish
    losses: int = 0  # leases lost in a row without progress: the backoff grows with it
    unclean_stops: int = 0  # daemon stops in a row with a batch in hand at this same checkpoint
    load_failures: int = 0  # in a row
    retry_at_ns: int = 0  # backoff: no lease before
    suspects: tuple[Span, ...] = ()  # to be redone one by one
    deaths: dict[int, int] = {}  # line -> workers that died with this line alone in hand
    canary_due: tuple[int, ...] = ()  # lines to be failed with `worker_lost` once a canary has passed
    condemned: tuple[int, ...] = ()  # the canary passed: the worker fails these lines and never tries them
    used_ns: int = 0  # device time charged to it so far
    worked_ns: int = 0  # what of that went into items, not into loading
    timings: Timings = Timings()
    device: str = ""  # of the latest lease
    queued_ns: int = 0  # since when it waits, moved back by the waits since it last got on
    waited_ns: int = 0  # those waits, when they are over
    started_ns: int = 0  # of the first lease
    finished_ns: int = 0
    expected: Expected | None = (
        None  # forgotten when a person moves or holds the job: it was of another course
    )
    changed_seq: int = 0  # of the last event that named this job; apply() sets it

    def enter(self, state: JobState) -> None:
        assert state in NEXT[self.state], (self.job_id, self.state, state)
        self.state = state

    @property
    def forecast_error(self) -> float | None:
        """Of a completed job, where its end was foretold."""
        if self.expected is None or self.state is not JobState.COMPLETED:
            return None
        return self.expected.error(self.finished_ns)

    @property
    def wake_ns(self) -> int:
        """The earliest start; 0: at once."""
        return max(self.begin_ns, self.retry_at_ns)

    @property
    def left(self) -> int:
        """Items that still need a try."""
        return self.items - self.checkpoint.done - self.checkpoint.failed


class Lease(msgspec.Struct, kw_only=True):
    """Permission for a worker to run one job on one device. `attempt` fences: every message quotes it."""

    device: str
    job_id: int
    attempt: int
    handler: str
    tenant: str
    granted_ns: int
    level: Priority = Priority.NORMAL  # at which it competes and is charged
    used_ns: int = 0  # charged so far
    loading_ns: int = 0  # of the time still to be charged, what went into loading: not the items' price
    unpriced_ns: int = 0  # time charged since an item was last counted: belongs to the next ones
    loaded: bool = False  # the worker holds the handler and has the job
    got_on: bool = False  # an item was tried
    canary: bool = False  # the worker recomputes a known line before anything else
    yield_why: YieldWhy | None = None
    yield_detail: str = ""
    yield_by: int = -1  # uid; -1: the daemon


class Turn(msgspec.Struct, kw_only=True):
    """The slices a tenant gets in a row on one device."""

    tenant: str
    length_ns: int
    used_ns: int = 0


class DeviceState(enum.StrEnum):
    OK = "ok"
    UNHEALTHY = "unhealthy"  # it fails work: one job at a time tries it, with a canary
    BUSY_ELSEWHERE = "busy_elsewhere"  # others leave too little memory for some handler; the rest go on
    DRIVER_MISMATCH = "driver_mismatch"  # no process can begin to use it: only handlers that are loaded go on


ELSEWHERE_WHY: Final = "OtherProcesses"  # the reason of BUSY_ELSEWHERE


class Device(msgspec.Struct, kw_only=True):
    """A GPU, or the CPU where there is none."""

    name: str  # "cuda:0", "cpu"
    state: DeviceState = DeviceState.OK
    reason: str = ""  # one word; PROTOCOL.md, DeviceView, has them all
    reason_detail: str = ""
    since_ns: int = 0  # when it came into this state; 0: it has always been in it
    room_bytes: int = -1  # what processes that are not ours leave of its memory; -1: enough for every handler
    cramped: dict[str, int] = {}  # handler -> room in which it ran out of memory, until that is over
    failed_jobs: tuple[int, ...] = ()  # different jobs whose leases were lost here, in a row
    relapses: int = 0  # times it fell ill without a checkpoint between: the wait for the next try doubles
    retry_at_ns: int = 0  # when an unhealthy device gets its next canary
    loaded: tuple[str, ...] = ()  # handlers held by warm workers, least recently used first
    since_load_ns: int = 0  # device time charged since a handler was last loaded
    lease: Lease | None = None
    turn: Turn | None = None


class Tenant(msgspec.Struct, kw_only=True):
    """Who is charged."""

    name: str
    vtimes_ns: tuple[int, int, int] = (0, 0, 0)  # by level: device time over share, no credit for idle time
    used_ns: int = 0  # device time ever charged
    served_at_ns: tuple[int, int, int] = (0, 0, 0)  # by priority: when it last had a device
    accuracy: Accuracy = NO_ACCURACY


class Learned(msgspec.Struct, kw_only=True):
    """What running a handler has taught: prices for the policy, rates for the forecast."""

    name: str
    load_ns: int = 0  # moving mean of load times; 0: never loaded
    vram_bytes: int = 0  # largest peak seen
    load_bytes: int = 0  # what the latest load took: it cannot do with less
    load_spread_ns: int = 0  # moving mean of their distance from the mean
    item_ns: int = 0  # moving mean of device time per item; 0: none measured
    item_spread_ns: int = 0  # moving mean of the distance from it
    job_item_ns: int = 0  # the same, a sample for each completed job: what to expect of the next one
    job_spread_ns: int = 0
    load_failures: int = 0  # in a row, over all its jobs
    retry_at_ns: int = 0
    failure: str = ""  # the latest load error


class Reservation(msgspec.Struct, kw_only=True):
    """Room held for a submission whose input is still being streamed."""

    reservation_id: int
    owner: int
    tenant: str
    items: int
    input_bytes: int
    submit_id: str


class Removal(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is remembered of a removed job, so that a late repeat of its submission finds it."""

    job_id: int
    owner: int
    submit_id: str
    input_sha256: bytes
    removed_ns: int


class Arrivals(msgspec.Struct, kw_only=True):
    """Submissions of each uid in the minute that runs and in the one before: bounded by who submits, not by how much.

    Persistent, so that a restart forgives nobody; counted by the clock of the events, so that a replay counts the same.
    """

    minute: int = 0  # since 1970
    now: dict[int, int] = {}  # uid -> submissions
    before: dict[int, int] = {}

    def add(self, uid: int, at_ns: int) -> None:
        """A clock that stepped, either way, begins anew: better a minute's submissions too many than an hour's wait."""
        minute = at_ns // MINUTE_NS
        if minute != self.minute:
            self.before = self.now if minute == self.minute + 1 else {}
            self.now, self.minute = {}, minute
        self.now[uid] = self.now.get(uid, 0) + 1

    def counted(self, uid: int, at_ns: int) -> tuple[int, int]:
        """In the minute of `at_ns` so far, and in the one before."""
        ago = at_ns // MINUTE_NS - self.minute
        if ago == 0:
            return self.now.get(uid, 0), self.before.get(uid, 0)
        return 0, self.now.get(uid, 0) if ago == 1 else 0


class Switches(msgspec.Struct, frozen=True, kw_only=True):
    """What `jobctl queue` set; survives a restart. An empty message with a true switch is allowed."""

    stopped: bool = False  # start nothing, accept submissions
    disabled: bool = False  # accept no submissions
    draining: bool = False  # start nothing, let leases end, accept no submissions
    message: str = ""


class TenantRule(msgspec.Struct, frozen=True, kw_only=True):
    """[tenants.NAME] of the configuration."""

    share: float = 1.0
    queued_jobs_max: int | None = None  # queued + running + paused
    queued_items_max: int | None = None  # of these jobs, that still need a try
    spool_bytes_max: int | None = None  # inputs and outputs of all its jobs
    running_devices_max: int | None = None  # devices it runs on at once


class ParamRule(msgspec.Struct, frozen=True, kw_only=True):
    """[job_params.NAME] of a handler's file: what a job may choose."""

    type: str  # "str", "int", "float", "bool"
    default: ParamValue | None = None
    choices: tuple[ParamValue, ...] = ()
    min: float | None = None
    max: float | None = None


class HandlerRule(msgspec.Struct, frozen=True, kw_only=True):
    """What the core needs to know of handlers.d/NAME.toml."""

    job_params: dict[str, ParamRule] = {}
    vram_bytes: int = 0  # first guess


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the administrator configured, as decide() reads it. Units and bounds are in the names."""

    queued_jobs_max: int = 1000
    items_per_job_max: int = 50_000
    queued_items_max: int = 1_000_000
    input_bytes_max: int = 200_000_000
    item_bytes_max: int = 1_048_576
    spool_bytes_max: int = 50_000_000_000
    jobs_per_uid_max: int = 500  # queued, running and paused jobs of one uid
    items_per_uid_max: int = 500_000  # of these jobs, that still need a try
    bytes_per_uid_max: int = 25_000_000_000  # inputs and outputs of all jobs of one uid
    submissions_per_minute_max: int = 6_000  # of one uid
    final_days: int = 30
    outputs_bytes_max: int = 25_000_000_000
    slice_ns: int = 30 * S_NS
    aging_ns: int = 21_600 * S_NS
    swap_overhead_max: float = 0.05
    wait_max_ns: int = 1800 * S_NS
    resume_on_start: bool = True
    disk_low: bool = False  # the shell sees less free space than configured: submissions are refused
    tenants: dict[str, TenantRule] = {}
    handlers: dict[str, HandlerRule] = {}

    def share(self, tenant: str) -> float:
        rule = self.tenants.get(tenant)
        return rule.share if rule else 1.0

    @property
    def least_share(self) -> float:
        """No tenant has less; 1 is that of everybody who is not configured."""
        return min([1.0, *(rule.share for rule in self.tenants.values())])


Line = list[Job]  # ready jobs of one tenant, level and handler, by line_key
Stamps = list[tuple[int, int]]  # (when, job_id), soonest first


class Use(msgspec.Struct, gc=False):
    """What one uid, or one tenant, takes up: what quotas are held against."""

    jobs: int = 0  # queued, running, paused, and reserved
    paused: int = 0  # of these
    items: int = 0  # of those, that still need a try
    bytes: int = 0  # inputs and outputs of every job, and what is reserved


NO_USE: Final = Use()  # never changed


class Book(msgspec.Struct, kw_only=True):
    """Indexes over the jobs, all bookkeeping: core/book.py keeps them, and can make them anew."""

    open_jobs: int = 0  # queued, running, paused, and reserved
    open_items: int = 0  # items of those that still need a try
    stored_bytes: int = 0  # inputs and outputs of every job, and what is reserved
    final_bytes: int = 0  # outputs of final jobs
    of_uid: dict[int, Use] = {}  # the same by owner, and by tenant; who takes up nothing is not there
    of_tenant: dict[str, Use] = {}
    lines: dict[str, dict[tuple[Priority, str], Line]] = {}  # tenant -> (level, handler) -> ready jobs
    ready: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0])  # ready jobs by level
    present: dict[str, list[int]] = {}  # tenant -> by level: jobs ready or running
    active: tuple[list[tuple[int, str]], ...] = msgspec.field(default_factory=lambda: ([], [], []))
    """By level: (virtual time, tenant) of every tenant present there, least first."""
    asleep: Stamps = []  # queued jobs that wait for a time
    resting: Stamps = []  # of these, the ones that wait for another try
    deadlines: Stamps = []  # of open jobs
    finals: Stamps = []  # when jobs became final
    inline: dict[int, int] = {}  # job_id -> number of the journal record that holds its input
    submit_ids: dict[int, dict[str, int]] = {}  # owner uid -> submit_id -> job_id, removed jobs included


class State(msgspec.Struct, kw_only=True):
    """Everything, at one position of the journal."""

    # Persistent.
    seq: int = 0  # of the last event applied
    next_job_id: int = 1
    next_reservation_id: int = 1
    head_key: int = 0  # line_key of the latest job that was put at a head; the next one gets one less
    vclocks_ns: tuple[int, int, int] = (0, 0, 0)  # by level: virtual time at which a newcomer starts
    jobs: dict[int, Job] = {}
    tenants: dict[str, Tenant] = {}
    devices: dict[str, Device] = {}
    learned: dict[str, Learned] = {}
    reservations: dict[int, Reservation] = {}
    removed: dict[int, Removal] = {}  # oldest first
    switches: Switches = Switches()
    disk_full: bool = False  # a write met a full disk; cleared when there is space again
    disk_detail: str = ""
    stopping: bool = False  # the daemon is on its way down: start nothing
    store_id: str = ""
    notifier: Notifier | None = None  # the latest that was here; None: none ever was
    arrivals: Arrivals = msgspec.field(default_factory=Arrivals)
    accuracy: Accuracy = NO_ACCURACY  # of all tenants together

    # Bookkeeping.
    book: Book = msgspec.field(default_factory=Book)
