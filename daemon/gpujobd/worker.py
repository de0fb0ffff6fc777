"""One worker's life, from the start of the process until nothing of it is left.

                  the worker says          the supervisor wants      time passes               the process ends
    ------------  -----------------------  ------------------------  ------------------------  ------------------
    STARTING      -                        -                         -                         (never began) GONE
    LOADING       loaded: IDLE             dismiss: CLEARING         load timeout: DUMPING     CLEARING
                  load_failed: LEAVING
    IDLE          -                        take a lease: LEASED      silent: DUMPING           CLEARING
                                           dismiss: LEAVING
    LEASED        yielded, finished,       yield: say so             silent, stalled: DUMPING  CLEARING
                  lost (device well):      fence: CLEARING
                  IDLE
                  lost (device or process
                  unwell): LEAVING
    LEAVING       -                        -                         SIGTERM: TERMINATING      CLEARING
    DUMPING       checkpoint: report it    -                         SIGTERM: TERMINATING      CLEARING
    TERMINATING   checkpoint: report it    -                         CLEARING                  CLEARING
    CLEARING      -                        -                         SIGKILL again; after      all gone, lock
                                                                     30 s: Unkillable, once    free: GONE
    (any)         violation: CLEARING      kill: CLEARING

Rule 1: everything but run() is quick and never blocks: look(), heard() and the wishes of the supervisor move the
state, run() does what takes time.
Rule 2: a lease's last report is sent when its device is free and its job's files are closed, not before.
Rule 3: the first cause of an end stands: a worker that dies of our SIGTERM was stalled, not killed by SIGTERM.
"""

from __future__ import annotations

import enum
import logging
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psutil
import trio

from gpujobd import worker_messages as messages
from gpujobd.catalog import kind
from gpujobd.cgroup import Kin
from gpujobd.config import Config, Handler, interpreter, threads
from gpujobd.core import inputs
from gpujobd.core.model import Span, Timings
from gpujobd.grant import Grant, lock_is_free, read_suspects
from gpujobd.pace import Pace, Progress
from gpujobd.worker_process import WorkerProcess, why_it_died

HEARTBEAT_S: Final = 1.0
LEAVE_S: Final = 5.0  # what close() of a handler may take
DUMP_S: Final = 2.0  # faulthandler writes at once, if at all
TERMINATE_S: Final = 5.0
UNKILLABLE_S: Final = 30.0
CLEAR_AGAIN_S_MAX: Final = 1.0
TAIL_BYTES: Final = 8192  # of what was printed without a lease: shown when a load fails
VRAM_UNIT: Final = 1 << 30

logger = logging.getLogger("gpujobd.supervisor")


class Phase(enum.Enum):
    STARTING = enum.auto()
    LOADING = enum.auto()
    IDLE = enum.auto()
    LEASED = enum.auto()
    LEAVING = enum.auto()
    DUMPING = enum.auto()
    TERMINATING = enum.auto()
    CLEARING = enum.auto()
    GONE = enum.auto()


P = Phase
NEXT: Final[dict[Phase, frozenset[Phase]]] = {
    P.STARTING: frozenset({P.LOADING, P.GONE}),
    P.LOADING: frozenset({P.IDLE, P.LEAVING, P.DUMPING, P.CLEARING}),
    P.IDLE: frozenset({P.LEASED, P.LEAVING, P.DUMPING, P.CLEARING}),
    P.LEASED: frozenset({P.IDLE, P.LEAVING, P.DUMPING, P.CLEARING}),
    P.LEAVING: frozenset({P.TERMINATING, P.CLEARING}),
    P.DUMPING: frozenset({P.TERMINATING, P.CLEARING}),
    P.TERMINATING: frozenset({P.CLEARING}),
    P.CLEARING: frozenset({P.GONE}),
    P.GONE: frozenset(),
}
assert set(NEXT) == set(Phase)  # a new phase must say where it leads
WorkReport = type[inputs.CheckpointReached | inputs.GaveBack | inputs.Finished]
ENDING: Final = frozenset({P.LEAVING, P.DUMPING, P.TERMINATING, P.CLEARING, P.GONE})


class Worker:
    """One (device, handler). `grant` is the lease it works on, set from take() to the end of the lease."""

    def __init__(
        self,
        device: str,
        name: str,
        config: Config,
        *,
        main: Path,
        base: Path | None,
        report: Callable[[inputs.AnyInput], None],
        poke: Callable[[], None],
    ) -> None:
        self.device = device
        self.name = name
        self.config = config
        self.handler: Handler = config.handlers[name]
        self.phase = Phase.STARTING
        self.grant: Grant | None = None
        self.stale = False  # it gets no further lease: its handler's configuration has changed, or its memory is wanted
        self.loaded: messages.Loaded | None = None
        self.load_error = ""
        self.load_ran_out = False  # of memory
        self.foreign_then_bytes = -1  # the least that others held since it was started; -1: nobody has looked
        self.vram_bytes = round(self.handler.vram_gib * VRAM_UNIT)
        self.idle_since = trio.current_time()
        self._main, self._base, self._report, self._poke = main, base, report, poke
        self._process: WorkerProcess | None = None
        self._condemned = trio.Event()
        self._cause = self._detail = ""  # of its end, the first that was found
        self._blames_items = True  # whether what was in hand at its end may have caused it
        self._due = math.inf  # when the present phase has lasted too long
        self._pace = Pace(trio.current_time())
        self._tail = bytearray()
        self._leases = 0

    # --- what takes time ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Live and die. However this ends, cancellation included, no process is left that can be killed."""
        try:
            self._process = await self._start()
        except OSError as error:
            self.load_error = f"{interpreter(self.handler)} cannot be started: {error}"
            self._enter(Phase.GONE)
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._talk, self._process)
                self._load()
                await self._condemned.wait()
                await self._clear(self._process)
                nursery.cancel_scope.cancel()
            await self._conclude()
        finally:
            with trio.CancelScope(shield=True):
                await self._process.end()
        self._enter(Phase.GONE)

    async def _start(self) -> WorkerProcess:
        return await WorkerProcess.start(
            interpreter(self.handler),
            main=self._main,
            base=self._base,
            device=self.device,
            threads=threads(self.config, self.handler),
        )

    async def _talk(self, process: WorkerProcess) -> None:
        await process.talk(self)
        self._log(f"worker {process.pid} ended: status {process.status}", "worker_ended")
        assert process.status is not None
        self.kill("died", why_it_died(process.status, out_of_memory=process.kin.out_of_memory()))

    async def _clear(self, process: WorkerProcess) -> None:
        """Wait until the device and the job's files are free, killing what is left meanwhile."""
        began, pause, said = trio.current_time(), 0.01, False
        while left := await self._what_is_left(process):
            if trio.current_time() >= began + UNKILLABLE_S and not said:
                said = True
                self._log(f"worker cannot be ended: {left}", "worker_unkillable", level=logging.ERROR)
                self._report(inputs.Unkillable(device=self.device, detail=left))
            with trio.move_on_after(pause):
                await process.died.wait()
            await trio.sleep(pause)
            pause = min(2 * pause, CLEAR_AGAIN_S_MAX)

    async def _what_is_left(self, process: WorkerProcess) -> str:
        """Why it is not over yet; empty: it is."""
        if not await process.kill() or not process.died.is_set():
            return f"process {process.pid} or one it started lives on after SIGKILL"
        folder = self.grant.folder if self.grant else None
        if (
            self.grant
            and folder
            and not await trio.to_thread.run_sync(lock_is_free, folder, abandon_on_cancel=True)
        ):
            return f"the lock of job {self.grant.job.job_id} is held after its worker's death"
        return ""

    async def _conclude(self) -> None:
        """Say what there is to say about an end; of the lease first, as long as it counts as loaded."""
        if self.grant and not self.grant.over:
            await self._report_lost(self.grant)
        if self.loaded:
            self._report(inputs.Unloaded(device=self.device, handler=self.name))
        elif not self.load_error and self._cause not in ("dismissed", "fenced", "stopped"):
            self.load_error = self._detail

    async def _report_lost(self, grant: Grant) -> None:
        suspects: tuple[Span, ...] = ()
        if self._blames_items:
            assert grant.folder is not None
            suspects = await trio.to_thread.run_sync(
                read_suspects, grant.folder, grant.attempt, grant.job.items, abandon_on_cancel=True
            )
        self._log(f"lease lost: {self._cause}: {self._detail}", "lease_lost", level=logging.DEBUG)
        await self._close_log(grant)
        self.grant = None
        self._report(
            inputs.Lost(
                device=self.device,
                attempt=grant.attempt,
                used_ns=grant.used_ns(),
                cause=self._cause,
                detail=self._detail,
                suspects=suspects,
            )
        )

    async def _close_log(self, grant: Grant) -> None:
        grant.end()
        if grant.log:
            with trio.move_on_after(5.0):  # a log on a dead disk must not hold the job up
                await grant.log.closed.wait()

    async def explain_load(self, grant: Grant) -> None:
        """Put what was printed while loading into the log of the job that waited for it."""
        with trio.move_on_after(10.0):
            await grant.log_opened.wait()
        if grant.log:
            grant.log.remark(f"{self.name} did not load on {self.device}: {self.load_error}")
            grant.log.admit(bytes(self._tail))
        await self._close_log(grant)

    @property
    def kin(self) -> Kin | None:
        """All of its processes; None: it has none yet."""
        return self._process.kin if self._process else None

    @property
    def pid(self) -> int:
        """0: there is no process yet."""
        return self._process.pid if self._process else 0

    def see_others(self, foreign_bytes: int) -> None:
        """So much of its device is held by processes that are not ours."""
        then = self.foreign_then_bytes
        self.foreign_then_bytes = foreign_bytes if then < 0 else min(then, foreign_bytes)

    # --- what the supervisor wants ----------------------------------------------------------------------------------

    def take(self, grant: Grant) -> None:
        """Begin a lease: its files are there and free.

        Raises:
            ValueError: it does not fit a message; nothing has begun.
        """
        assert self._process is not None
        self.printed(self._process.output_so_far())  # that was not printed for this job
        self._process.send(grant.message(self.handler, gives_way=self.foreign_then_bytes >= 0))
        self.grant, grant.sent = grant, True
        if self.loaded and grant.since <= self.idle_since and not self._leases:
            grant.load_s = self.loaded.load_s
        self._leases += 1
        reached = grant.checkpoint
        counted = reached.done + reached.failed
        self._pace.begin(grant.attempt, reached.upto + 1, counted, trio.current_time())
        self._enter(Phase.LEASED)

    def ask_yield(self) -> None:
        assert self._process is not None
        if self.grant and not self.grant.yield_asked and self.phase is Phase.LEASED:
            self.grant.yield_asked = True
            self._process.send(messages.Yield(attempt=self.grant.attempt))

    def dismiss(self, limit_s: float | None = None) -> None:
        """Let it go: it holds no lease. One that is still loading would not listen: it is killed."""
        if self.phase is Phase.LOADING:
            self._condemn("dismissed", "not needed any more")
        elif self.phase is Phase.IDLE:
            assert self._process is not None
            self._cause = "dismissed"
            self._process.send(messages.Exit())
            self._enter(Phase.LEAVING, LEAVE_S if limit_s is None else limit_s)

    def kill(self, cause: str, detail: str) -> None:
        """End it at once."""
        if self.phase not in (Phase.STARTING, Phase.CLEARING, Phase.GONE):
            self._condemn(cause, detail)

    def look(self, now: float) -> None:
        """See whether it is alive and moves."""
        timeouts = self.config.file.worker
        stall_timeout_s = self.handler.stall_timeout_s or timeouts.stall_timeout_s
        if now >= self._due:
            self._overdue()
        elif self.phase not in (Phase.IDLE, Phase.LEASED):
            return
        elif self._pace.silent_s(now) >= timeouts.silent_timeout_s:
            self._dump(
                "silent", f"no message for {timeouts.silent_timeout_s:g} s; it is {self._process_state()}"
            )
        elif self.phase is Phase.LEASED and self._pace.stalled_s(now) >= stall_timeout_s:
            self._dump("stalled", f"no call of the handler returned for {stall_timeout_s:g} s")

    def forgive(self, lag_s: float) -> None:
        """The daemon itself did not look for so long: that is not the worker's silence."""
        self._pace.forgive(lag_s)
        self._due += lag_s

    def progress(self) -> Progress:
        return self._pace.progress()

    # --- what the worker says -----------------------------------------------------------------------------------------

    def heard(self, message: messages.AnyFromWorker) -> None:
        self._pace.spoke(trio.current_time())
        match message:
            case messages.Hello():
                pass
            case messages.Loaded():
                self._on_loaded(message)
            case messages.LoadFailed():
                self._on_load_failed(message)
            case messages.Heartbeat():
                self._pace.beat(message, trio.current_time())
            case _:
                self._on_lease_message(message)

    def violated(self, how: str) -> None:
        self.kill("died", f"protocol violation: {how}")

    def printed(self, output: bytes) -> None:
        if self.grant and self.grant.log:
            (self.grant.log.admit if self.phase in ENDING else self.grant.log.feed)(output)
        elif output:
            logger.debug("%s", output.decode(errors="replace").rstrip(), extra=self._extra("worker_printed"))
            self._tail += output
            del self._tail[:-TAIL_BYTES]

    def _on_loaded(self, message: messages.Loaded) -> None:
        if self.phase in ENDING:
            return
        if self.phase is not Phase.LOADING:
            raise messages.Violation("loaded twice")
        self.loaded = message
        self.vram_bytes = message.vram_bytes or self.vram_bytes
        self.idle_since = trio.current_time()
        self._enter(Phase.IDLE)
        load_ns = round(message.load_s * 1e9)
        self._log(f"{self.name} loaded in {message.load_s:.1f} s", "handler_loaded", level=logging.DEBUG)
        self._report(
            inputs.Loaded(
                device=self.device, handler=self.name, load_ns=load_ns, vram_bytes=message.vram_bytes
            )
        )
        self._poke()

    def _on_load_failed(self, message: messages.LoadFailed) -> None:
        if self.phase is Phase.LOADING:
            self.load_error = message.error
            self.load_ran_out = message.out_of_memory
            self._tail += message.trace.encode(errors="replace")
            self._cause, self._detail = "load", message.error
            self._enter(Phase.LEAVING, LEAVE_S)

    def _on_lease_message(
        self,
        message: messages.Checkpointed
        | messages.Yielded
        | messages.Finished
        | messages.CanaryPassed
        | messages.Lost,
    ) -> None:
        if self.phase in ENDING and not (self.grant and message.attempt == self.grant.attempt):
            return
        if self.grant is None or message.attempt != self.grant.attempt:
            held = self.grant.attempt if self.grant else "no lease"
            raise messages.Violation(f"a message of attempt {message.attempt}, the lease is {held}")
        match message:
            case messages.CanaryPassed():
                self._on_canary(self.grant)
            case messages.Lost():
                self._on_lost(self.grant, message)
            case _:
                self._on_work(self.grant, message)

    def _on_canary(self, grant: Grant) -> None:
        self._pace.moved(trio.current_time())
        grant.canary = 0
        self._report(inputs.CanaryOk(device=self.device, attempt=grant.attempt, used_ns=grant.used_ns()))

    def _on_work(
        self, grant: Grant, message: messages.Checkpointed | messages.Yielded | messages.Finished
    ) -> None:
        messages.check_checkpoint(message.checkpoint, grant.checkpoint, grant.job.items)
        kind: WorkReport = inputs.CheckpointReached
        if self.phase is Phase.LEASED and isinstance(message, messages.Yielded):
            kind = inputs.GaveBack
        elif self.phase is Phase.LEASED and isinstance(message, messages.Finished):
            messages.check_finished(message.checkpoint, grant.job.items)
            kind = inputs.Finished
        if grant.over:
            return
        if kind is not inputs.CheckpointReached:
            self._end_lease()
        self._report_work(grant, kind, message, self._cramped_bytes(message))

    def _cramped_bytes(self, message: messages.Checkpointed | messages.Yielded | messages.Finished) -> int:
        """The room it had, where it gave way to others; -1: it did not."""
        others = message.others_bytes if isinstance(message, messages.Yielded) else 0
        total = self.loaded.device_bytes if self.loaded else 0
        return max(0, total - others) if others and total else -1

    def _on_lost(self, grant: Grant, message: messages.Lost) -> None:
        if self.phase is not Phase.LEASED:
            return
        if message.checkpoint is not None:
            messages.check_checkpoint(message.checkpoint, grant.checkpoint, grant.job.items)
            self._report_work(grant, inputs.CheckpointReached, message)
        if message.cause in messages.LAST_WORDS:
            self._cause, self._detail = message.cause, message.detail
            self._blames_items = message.cause == "poisoned"  # else it knows better: a file, a busy lock
            self._enter(Phase.LEAVING, LEAVE_S)
            return
        self._end_lease()
        self._report(
            inputs.Lost(
                device=self.device,
                attempt=grant.attempt,
                used_ns=grant.used_ns(),
                cause=message.cause,
                detail=message.detail,
            )
        )

    def _report_work(
        self,
        grant: Grant,
        kind: WorkReport,
        message: messages.Checkpointed | messages.Yielded | messages.Finished | messages.Lost,
        cramped_bytes: int = -1,
    ) -> None:
        assert message.checkpoint is not None
        self.vram_bytes = max(self.vram_bytes, message.vram_bytes)
        grant.checkpoint = message.checkpoint
        self._pace.count(grant.checkpoint.done + grant.checkpoint.failed, trio.current_time())
        timings = message.timings.timings() + Timings(load_s=grant.load_s)
        grant.load_s = 0.0
        report = kind(
            device=self.device,
            attempt=grant.attempt,
            used_ns=grant.used_ns(),
            checkpoint=message.checkpoint,
            timings=timings,
            vram_bytes=message.vram_bytes,
        )
        if isinstance(report, inputs.GaveBack):
            report = msgspec.structs.replace(report, cramped_bytes=cramped_bytes)
        self._report(report)

    def _end_lease(self) -> None:
        assert self._process is not None
        assert self.grant is not None
        self.printed(self._process.output_so_far())
        self.grant.end()
        self.grant = None
        self.idle_since = trio.current_time()
        self._tail.clear()
        self._enter(Phase.IDLE)
        self._poke()

    # --- the phases -----------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase, limit_s: float = math.inf) -> None:
        assert phase in NEXT[self.phase], (self.device, self.name, self.phase, phase)
        self.phase = phase
        self._due = trio.current_time() + limit_s

    def _load(self) -> None:
        assert self._process is not None
        self._enter(Phase.LOADING, self.config.file.worker.load_timeout_s)
        self._log(f"worker {self._process.pid} loads {self.name} on {self.device}", "worker_started")
        try:
            self._process.send(self._order(self.config))
        except ValueError as error:
            self._condemn("load", f"params: {error}")

    def _order(self, config: Config) -> messages.Load:
        timeouts = config.file.worker
        return messages.Load(
            handler=self.name,
            entry=self.handler.entry,
            path=self.handler.path,
            device=self.device,
            params=self.handler.params,
            threads=threads(config, self.handler),
            heartbeat_s=min(HEARTBEAT_S, timeouts.silent_timeout_s / 4),
            checkpoint_s=timeouts.checkpoint_s,
        )

    def reload(self, config: Config) -> None:
        """A new configuration: if it would be told something else at its start now, its next lease is another's."""
        same = config.handlers.get(self.name) == self.handler and self._order(config) == self._order(
            self.config
        )
        self.stale = self.stale or not same
        if not self.stale:
            self.config = config

    def _overdue(self) -> None:
        if self.phase is Phase.LOADING:
            self._dump("load", f"loading took longer than {self.config.file.worker.load_timeout_s:g} s")
        elif self.phase is Phase.TERMINATING:
            self._condemn(self._cause, self._detail)
        else:
            assert self._process is not None
            self._process.signal(signal.SIGTERM)
            self._enter(Phase.TERMINATING, TERMINATE_S)

    def _dump(self, cause: str, detail: str) -> None:
        """Ask for the stacks of all threads, by message and by signal: one of the two may still get through."""
        assert self._process is not None
        self._cause, self._detail = cause, detail
        self._log(f"worker is {cause}: {detail}", f"worker_{cause}", level=logging.WARNING)
        self._enter(Phase.DUMPING, DUMP_S)
        if self.grant and self.grant.log:
            self.grant.log.remark(
                f"worker {self._process.pid}: {detail}; its stacks, if it still writes them:"
            )
        self._process.send(messages.Dump())
        self._process.signal(signal.SIGUSR2)

    def _condemn(self, cause: str, detail: str) -> None:
        if not self._cause:
            self._cause, self._detail = cause, detail
        self._enter(Phase.CLEARING)
        self._condemned.set()

    def _process_state(self) -> str:
        assert self._process is not None
        try:
            return psutil.Process(self._process.pid).status()
        except psutil.Error:
            return "dead"

    def _log(self, text: str, event: str, *, level: int = logging.INFO) -> None:
        logger.log(level, "%s", text, extra=self._extra(event), stacklevel=2)

    def _extra(self, event: str) -> dict[str, object]:
        job = self.grant.job if self.grant else None
        return kind(
            event,
            device=self.device,
            handler=self.name,
            worker_pid=self._process.pid if self._process else None,
            job_id=job.job_id if job else None,
            tenant=job.tenant if job else None,
            attempt=self.grant.attempt if self.grant else None,
        )
