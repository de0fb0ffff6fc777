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


class JobState(enum.StrEnum):
    """The seven states; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


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


class Reason(enum.StrEnum):
    """Why a job waits, in one word: wire format, add but never rename."""

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


class YieldWhy(enum.StrEnum):
    """Why a lease is asked back; what becomes of the job when the worker has yielded follows from it."""

    TURN_OVER = "turn_over"  # back to queued
    PRIORITY = "priority"  # back to queued
    QUEUE_STOPPED = "queue_stopped"  # back to queued
    PAUSE = "pause"  # paused: HeldByOwner or HeldByAdmin
    CANCEL = "cancel"  # cancelled
    DEADLINE = "deadline"  # expired
    STOPPING = "stopping"  # paused: DaemonStopping


class Deferred(msgspec.Struct, frozen=True, array_like=True):
    """An item that asked to be tried again at the end of the job (`Transient`)."""

    line: int
    tries: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The point a job resumes from. Both output files were synced up to these lengths before it was reported.

    Invariant: done + failed + len(deferred) == upto, until the deferred are being tried (upto == items).
    """

    upto: int = 0  # lines 1..upto (of this job's own input) need no first try any more
    deferred: tuple[Deferred, ...] = ()  # at most DEFERRED_MAX
    results_bytes: int = 0
    results_crc: int = 0  # zlib.crc32 of the first results_bytes
    errors_bytes: int = 0
    errors_crc: int = 0
    done: int = 0  # result records
    failed: int = 0  # error records


class Timings(msgspec.Struct, frozen=True, kw_only=True):
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


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Lines first..last, both included: the items one call of the handler got."""

    first: int
    last: int


ParamValue = str | int | float | bool


class Job(msgspec.Struct, kw_only=True):
    """One submission by one tenant."""

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

    # Persistent: where it is now.
    state: JobState = JobState.QUEUED
    priority: Priority = Priority.NORMAL
    line_key: int = 0  # order in the tenant's own line, smallest first; set at submission, `first` lowers it
    reason: Reason | None = None  # of a pause or a failure; reasons for waiting are computed, not stored
    reason_detail: str = ""
    checkpoint: Checkpoint = Checkpoint()
    attempt: int = 0  # number of the latest lease
    interruptions: int = 0  # leases that ended without yield or finish
    unclean_stops: int = 0  # daemon stops in a row with a batch in hand at this same checkpoint
    load_failures: int = 0  # in a row
    retry_at_ns: int = 0  # backoff: no lease before
    suspects: tuple[Span, ...] = ()  # to be redone one by one
    deaths: dict[int, int] = {}  # line -> workers that died with this line alone in hand
    canary_due: tuple[int, ...] = ()  # lines to be failed with `worker_lost` once a canary has passed
    used_ns: int = 0  # device time charged to it so far
    timings: Timings = Timings()
    device: str = ""  # of the latest lease
    queued_ns: int = 0  # since when it waits; aging counts from here
    started_ns: int = 0  # of the first lease
    finished_ns: int = 0
    forecast_ns: int = 0  # the finish that was forecast when it was submitted; 0: none

    def enter(self, state: JobState) -> None:
        assert state in NEXT[self.state], (self.job_id, self.state, state)
        self.state = state

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
    used_ns: int = 0  # charged so far
    loaded: bool = False  # the worker holds the handler and has the job
    yield_why: YieldWhy | None = None
    yield_detail: str = ""


class Turn(msgspec.Struct, kw_only=True):
    """The slices a tenant gets in a row on one device."""

    tenant: str
    length_ns: int
    used_ns: int = 0


class DeviceState(enum.StrEnum):
    OK = "ok"
    UNHEALTHY = "unhealthy"
    BUSY_ELSEWHERE = "busy_elsewhere"


class Device(msgspec.Struct, kw_only=True):
    """A GPU, or the CPU where there is none."""

    name: str  # "cuda:0", "cpu"
    state: DeviceState = DeviceState.OK
    reason: str = ""  # one word: WorkerUnkillable, CanaryFailed, RepeatedFailures
    reason_detail: str = ""
    failures: int = 0  # leases lost in a row, of different jobs
    failed_jobs: tuple[int, ...] = ()  # which they were
    retry_at_ns: int = 0  # when an unhealthy device gets its next canary
    loaded: tuple[str, ...] = ()  # handlers held by warm workers, least recently used first
    lease: Lease | None = None
    turn: Turn | None = None


class Tenant(msgspec.Struct, kw_only=True):
    """Who is charged."""

    name: str
    vtime_ns: int = 0  # virtual time: device time over share, with no credit for idle time
    used_ns: int = 0  # device time ever charged


class Learned(msgspec.Struct, kw_only=True):
    """What running a handler has taught: prices for the policy, rates for the forecast."""

    name: str
    load_ns: int = 0  # moving mean of load times; 0: never loaded
    vram_bytes: int = 0  # largest peak seen
    item_ns: int = 0  # moving mean of device time per item
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


class Switches(msgspec.Struct, kw_only=True):
    """What `jobctl queue` set; survives a restart. An empty message with a true switch is allowed."""

    stopped: bool = False  # start nothing, accept submissions
    disabled: bool = False  # accept no submissions
    draining: bool = False  # start nothing, let leases end
    message: str = ""


class TenantRule(msgspec.Struct, frozen=True, kw_only=True):
    """[tenants.NAME] of the configuration."""

    share: float = 1.0
    queued_jobs_max: int | None = None


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
    jobs_per_uid_max: int = 1000  # queued, running and paused jobs of one uid
    final_days: int = 30
    outputs_bytes_max: int = 25_000_000_000
    slice_ns: int = 30 * S_NS
    aging_ns: int = 21_600 * S_NS
    swap_overhead_max: float = 0.05
    wait_max_ns: int = 1800 * S_NS
    resume_on_start: bool = True
    tenants: dict[str, TenantRule] = {}
    handlers: dict[str, HandlerRule] = {}

    def share(self, tenant: str) -> float:
        rule = self.tenants.get(tenant)
        return rule.share if rule else 1.0


class State(msgspec.Struct, kw_only=True):
    """Everything, at one position of the journal."""

    # Persistent.
    seq: int = 0  # of the last event applied
    next_job_id: int = 1
    next_reservation_id: int = 1
    jobs: dict[int, Job] = {}
    tenants: dict[str, Tenant] = {}
    devices: dict[str, Device] = {}
    learned: dict[str, Learned] = {}
    reservations: dict[int, Reservation] = {}
    submit_ids: dict[str, dict[int, int]] = {}  # submit_id -> {owner uid -> job_id}
    switches: Switches = Switches()
    disk_full: bool = False  # leases yielded with DiskFull; cleared when there is space again
    stopping: bool = False  # the daemon is on its way down: start nothing
    store_id: str = ""

    # Bookkeeping: see core/policy.py for the lines of waiting jobs.
