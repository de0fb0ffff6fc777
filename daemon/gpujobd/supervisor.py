"""Makes the workers match the state, and tells the daemon what became of it.

                    state: devices[*].lease
                              | seen
                              v
        grant: job's files made, lock free, log open      worker: started, loaded, kept warm
                              |                                      |
                              +------------------+-------------------+
                                                 v
                                 take -> work -> its last report -> over

Rule 1: level-triggered. Each look compares what is leased with what is worked on, and does what is missing. Nothing
depends on having seen a change; what happened in between does not matter.
Rule 2: at most one worker a (device, handler), and one on a device computes: a lease waits until every other worker of
the device is idle, or gone for certain.
Rule 3: a grant whose lease is not in the state any more is fenced: its worker is killed, and nothing it said counts.
Rule 4: the loop never waits for a worker, a file or a process: tasks do, one a worker and one a grant.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import trio

from gpujobd import cgroup
from gpujobd.config import Config
from gpujobd.core import inputs
from gpujobd.core.model import Device, Job, Lease, State
from gpujobd.devices import find_devices
from gpujobd.grant import Grant, lock_is_free
from gpujobd.job_log import JobLog
from gpujobd.pace import Progress
from gpujobd.worker import UNKILLABLE_S, VRAM_UNIT, Phase, Worker
from gpujobd.worker_process import MAIN

__all__ = ["Hardware", "Progress", "Supervisor", "find_devices"]

LOOK_S: Final = 0.25
STOP_S: Final = 8.0  # for all workers together, when the daemon stops
GOODBYE_S: Final = 2.0  # of it, for handlers to close
CPU_WORKERS_MAX: Final = 2  # the host's memory is not the daemon's alone, as a GPU's is
CONTEXT_BYTES: Final = VRAM_UNIT // 2  # a worker's CUDA context and libraries, which no allocator counts

logger = logging.getLogger("gpujobd.supervisor")


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """What workers said about a device."""

    name: str  # "NVIDIA H200"
    memory_bytes: int  # held by its workers at their peaks
    memory_total_bytes: int  # 0: not known


class Supervisor:
    """One a daemon. run() does the work; everything else may be called from the same thread at any time."""

    def __init__(
        self,
        config: Config,
        *,
        state: Callable[[], State],
        report: Callable[[inputs.AnyInput], None],
        prepare: Callable[[Job], Awaitable[Path]],
        on_log: Callable[[int], None],
        main: Path = MAIN,
    ) -> None:
        """`prepare` makes a job's folder and input; what it raises besides OSError ends the daemon."""
        self._config = config
        self._state, self._prepare_files, self._on_log = state, prepare, on_log
        self._daemon_report = report
        self._main = main
        self._base: Path | None = None
        self._workers: dict[tuple[str, str], Worker] = {}
        self._grants: dict[str, Grant] = {}
        self._known: dict[str, tuple[str, int]] = {}  # device: name and memory of the hardware
        self._looked_at: float | None = None
        self._stop_by: float | None = None
        self._hurried = False
        self._poked = trio.Event()

    # --- for the daemon ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled; then end every worker, within STOP_S."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve)
            try:
                await trio.sleep_forever()
            finally:
                self._stop_by = trio.current_time() + STOP_S
                self.poke()

    def poke(self) -> None:
        """The state has changed."""
        self._poked.set()

    def reload(self, config: Config) -> None:
        """Take over a new configuration: workers of changed handlers go as soon as they hold no lease."""
        self._config = config
        for worker in self._workers.values():
            worker.reload(config)
        self.poke()

    def progress(self, job_id: int) -> Progress | None:
        for worker in self._workers.values():
            if worker.grant and worker.grant.job.job_id == job_id:
                return worker.progress()
        return None

    def hardware(self, device: str) -> Hardware | None:
        """None: no worker has been loaded on it yet."""
        if device not in self._known:
            return None
        name, total = self._known[device]
        held = sum(worker.vram_bytes for worker in self._on(device) if worker.loaded)
        return Hardware(name=name, memory_bytes=held, memory_total_bytes=total)

    def looked_at(self) -> float:
        """When every worker was last looked at; before run(), now."""
        return trio.current_time() if self._looked_at is None else self._looked_at

    def hurry(self) -> None:
        """Kill every worker now."""
        self._hurried = True
        for worker in self._workers.values():
            worker.kill("died", "the daemon was told to stop at once")
        self.poke()

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        with trio.CancelScope(shield=True):  # run() tells it when to stop, so that workers can be ended first
            await self._hold_workers()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                while not self._stopped():
                    self._look(trio.current_time())
                    with trio.move_on_after(LOOK_S):
                        await self._poked.wait()
                    self._poked = trio.Event()
                nursery.cancel_scope.cancel()

    async def _hold_workers(self) -> None:
        """Find out how the processes of a worker can be held together here."""
        self._base = await trio.to_thread.run_sync(cgroup.delegated)
        if self._base:
            await trio.to_thread.run_sync(cgroup.step_aside, self._base)
            await trio.to_thread.run_sync(cgroup.sweep, self._base)
        else:
            cgroup.become_subreaper()

    def _stopped(self) -> bool:
        return self._stop_by is not None and (not self._workers or trio.current_time() >= self._stop_by)

    def _look(self, now: float) -> None:
        lag_s = now - self.looked_at() - 2 * LOOK_S
        for worker in self._workers.values():
            if lag_s > 0:  # this process was stopped or busy: what they sent is still unread
                worker.forgive(lag_s)
            worker.look(now)
            if worker.loaded and worker.loaded.hardware:
                self._known[worker.device] = worker.loaded.hardware, worker.loaded.device_bytes
        if self._stop_by is None:
            self._reconcile(now)
        else:
            self._let_all_go()
        self._looked_at = now

    def _let_all_go(self) -> None:
        for worker in self._workers.values():
            if worker.phase is Phase.IDLE and not self._hurried:
                worker.dismiss(GOODBYE_S)
            elif worker.phase not in (Phase.IDLE, Phase.LEAVING):
                worker.kill("stopped", "the daemon stops")

    def _report(self, report: inputs.AnyInput) -> None:
        if self._stop_by is None:  # nobody listens any more
            self._daemon_report(report)

    # --- leases -------------------------------------------------------------------------------------------------------

    def _reconcile(self, now: float) -> None:
        state = self._state()
        for device in state.devices.values():
            grant = self._grant_of(state, device, now)
            if grant is None or grant.over:
                continue
            assert device.lease is not None
            if device.lease.yield_why is not None:
                self._ask_back(grant)
            elif not grant.sent:
                self._further(state, grant)
        for worker in self._workers.values():
            if worker.stale:
                worker.dismiss()

    def _grant_of(self, state: State, device: Device, now: float) -> Grant | None:
        """The grant that belongs to the device's lease; one of another lease is fenced."""
        lease, grant = device.lease, self._grants.get(device.name)
        if grant and (lease is None or (lease.job_id, lease.attempt) != grant.key):
            self._withdraw(grant)
            grant = None
        if lease and grant is None:
            grant = self._begin(lease, state.jobs[lease.job_id], now)
        return grant

    def _begin(self, lease: Lease, job: Job, now: float) -> Grant:
        grant = self._grants[lease.device] = Grant(lease, job, now)
        self._nursery.start_soon(self._prepare, grant)
        return grant

    def _withdraw(self, grant: Grant) -> None:
        del self._grants[grant.device]
        if grant.over:
            return
        grant.end()
        worker = self._workers.get((grant.device, grant.handler))
        if worker and worker.grant is grant:
            worker.kill("fenced", f"attempt {grant.attempt} of job {grant.job.job_id} is not leased any more")

    def _ask_back(self, grant: Grant) -> None:
        worker = self._workers.get((grant.device, grant.handler))
        if worker and worker.grant is grant:
            worker.ask_yield()
        elif not grant.sent:
            grant.end()
            self._report(
                inputs.GaveBack(
                    device=grant.device,
                    attempt=grant.attempt,
                    used_ns=grant.used_ns(),
                    checkpoint=grant.checkpoint,
                )
            )

    def _further(self, state: State, grant: Grant) -> None:
        """Bring a lease that no worker has yet one step on."""
        if grant.handler not in self._config.handlers:
            self._fail_load(grant, f"handler {grant.handler} is not configured any more")
            return
        if any(other.phase not in (Phase.IDLE, Phase.LOADING) for other in self._on(grant.device)):
            return
        worker = self._workers.get((grant.device, grant.handler))
        if worker is None:
            if self._has_room(state, grant.device, grant.handler):
                self._hire(grant.device, grant.handler)
        elif worker.phase is Phase.IDLE and not worker.stale and grant.folder:
            try:
                worker.take(grant)
            except ValueError as error:  # parameters of a MiB: no worker could be told of them, ever
                self._lose(grant, "input_lost", f"the job cannot be told to a worker: {error}")

    def _fail_load(self, grant: Grant, error: str) -> None:
        grant.end()
        self._report(
            inputs.LoadFailed(
                device=grant.device, attempt=grant.attempt, used_ns=grant.used_ns(), error=error
            )
        )

    # --- a lease's files ------------------------------------------------------------------------------------------------

    async def _prepare(self, grant: Grant) -> None:
        """Make the job's files, open its log, and wait until nobody else has them open."""
        try:
            folder = await self._prepare_files(grant.job)
            await self._open_log(grant, folder)
            await self._wait_for_lock(grant, folder)
        except OSError as error:
            self._lose_files(grant, error)
        else:
            grant.folder = folder
            self.poke()
        finally:
            grant.log_opened.set()

    async def _open_log(self, grant: Grant, folder: Path) -> None:
        log = JobLog(folder, grant.job.job_id, self._config.file.worker.log_bytes_max, self._on_log)
        await log.open()
        self._nursery.start_soon(log.run)
        grant.log = log
        grant.log_opened.set()
        if grant.over:
            log.close()

    async def _wait_for_lock(self, grant: Grant, folder: Path) -> None:
        """A worker of an earlier daemon may still live: it holds the lock on what it writes."""
        began, said = trio.current_time(), False
        while not grant.over and not await trio.to_thread.run_sync(
            lock_is_free, folder, abandon_on_cancel=True
        ):
            if trio.current_time() >= began + UNKILLABLE_S and not said:
                said = True
                detail = f"the lock of job {grant.job.job_id} is held by a process of an earlier lease"
                self._report(inputs.Unkillable(device=grant.device, detail=detail))
            await trio.sleep(LOOK_S)

    def _lose_files(self, grant: Grant, error: OSError) -> None:
        causes = {errno.ENOSPC: "disk_full", errno.EDQUOT: "disk_full", errno.ENOENT: "input_lost"}
        if not grant.over:
            cause = causes.get(error.errno or 0, "died")
            self._lose(grant, cause, f"the job's files cannot be made ready: {error}")

    def _lose(self, grant: Grant, cause: str, detail: str) -> None:
        grant.end()
        self._report(
            inputs.Lost(
                device=grant.device,
                attempt=grant.attempt,
                used_ns=grant.used_ns(),
                cause=cause,
                detail=detail,
            )
        )

    # --- workers --------------------------------------------------------------------------------------------------------

    def _on(self, device: str) -> Iterator[Worker]:
        return (worker for (name, _), worker in self._workers.items() if name == device)

    def _hire(self, device: str, name: str) -> None:
        worker = Worker(
            device,
            name,
            self._config,
            main=self._main,
            base=self._base,
            report=self._report,
            poke=self.poke,
        )
        self._workers[device, name] = worker
        self._nursery.start_soon(self._employ, worker)

    async def _employ(self, worker: Worker) -> None:
        await worker.run()
        grant = self._grants.get(worker.device)
        waited = grant and grant.handler == worker.name and not grant.sent and not grant.over
        if grant and waited and worker.load_error:
            await worker.explain_load(grant)
            self._fail_load(grant, worker.load_error)
        del self._workers[worker.device, worker.name]
        self.poke()

    def _has_room(self, state: State, device: str, name: str) -> bool:
        """Whether one more worker fits on the device. Where it does not, the least recently used idle one goes."""
        others = list(self._on(device))
        if self._fits(state, device, name, others):
            return True
        evictable = [worker for worker in others if worker.phase in (Phase.IDLE, Phase.LOADING)]
        if evictable:
            min(evictable, key=lambda worker: worker.idle_since).dismiss()
        return False

    def _fits(self, state: State, device: str, name: str, others: list[Worker]) -> bool:
        if not others:
            return True
        _, total = self._known.get(device, ("", 0))
        if device == "cpu" or not total:
            return len(others) < CPU_WORKERS_MAX
        learned = state.learned.get(name)
        declared = round(self._config.handlers[name].vram_gib * VRAM_UNIT)
        measured = learned is not None and learned.load_ns > 0
        if not (measured or declared):
            return False  # nobody knows what it needs: it gets all there is
        needed = learned.vram_bytes if learned and measured else declared
        held = sum(worker.vram_bytes for worker in others)
        return held + needed + CONTEXT_BYTES * (len(others) + 1) <= total
