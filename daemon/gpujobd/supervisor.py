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
Rule 5: who is loaded beside whom, and who gives its memory to others, is decided in core/residency.py; a lease whose
handler has no place now goes back as it came, and nobody's failure is made of it.
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
from gpujobd.catalog import kind
from gpujobd.config import Config
from gpujobd.core import inputs, residency
from gpujobd.core.model import Device, DeviceState, Job, Lease, State
from gpujobd.core.residency import CONTEXT_BYTES, Memory, Resident, gib
from gpujobd.devices import find_devices
from gpujobd.gpus import Gpus, Sight
from gpujobd.grant import Grant, lock_is_free
from gpujobd.job_log import JobLog
from gpujobd.pace import Progress
from gpujobd.worker import UNKILLABLE_S, Phase, Worker
from gpujobd.worker_process import MAIN

__all__ = ["Hardware", "Progress", "Supervisor", "find_devices"]

LOOK_S: Final = 0.25
STOP_S: Final = 8.0  # for all workers together, when the daemon stops
GOODBYE_S: Final = 2.0  # of it, for handlers to close
CPU_WORKERS_MAX: Final = 2  # the host's memory is not the daemon's alone, as a GPU's is
ASKED_S: Final = 2.0  # how long a reader, or a load that ran out of memory, waits for a look at the device
AGAIN_S: Final = 60.0  # between two yields of a device for others
UNUSED_S: Final = 60.0  # idle workers on a driver that was replaced leave after it, so that it can be loaded

logger = logging.getLogger("gpujobd.supervisor")


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is loaded on a device."""

    handler: str
    pid: int
    bytes: int  # as the driver counts, else its peak as its allocator does


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """What workers said about a device, and what was seen of it from outside."""

    name: str  # "NVIDIA H200"
    memory_bytes: int  # held by its workers at their peaks
    memory_total_bytes: int  # 0: not known
    workers: tuple[Held, ...] = ()
    sight: Sight | None = None
    unseen: str = ""  # why there is no sight of a GPU


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
        self._config, self._rules = config, config.rules()
        self._state, self._prepare_files, self._on_log = state, prepare, on_log
        self._daemon_report = report
        self._main = main
        self._base: Path | None = None
        self._workers: dict[tuple[str, str], Worker] = {}
        self._grants: dict[str, Grant] = {}
        self._known: dict[str, tuple[str, int]] = {}  # device: name and memory of the hardware
        self._yielded_at: dict[str, float] = {}  # device: when work made room for others
        self._gpus = Gpus(
            config,
            state=state,
            workers=self._workers.values,
            report=self._report,
            seen=self._on_sight,
        )
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
        self._config, self._rules = config, config.rules()
        self._gpus.reload(config)
        for worker in self._workers.values():
            worker.reload(config)
        self.poke()

    def progress(self, job_id: int) -> Progress | None:
        for worker in self._workers.values():
            if worker.grant and worker.grant.job.job_id == job_id:
                return worker.progress()
        return None

    def hardware(self, device: str) -> Hardware | None:
        """None: no worker has been loaded on it yet, and nobody else tells of it."""
        sight, unseen = self._gpus.sight(device), self._gpus.trouble(device)
        if device not in self._known and sight is None and not unseen:
            return None
        name, total = self._known.get(device, ("", 0))
        loaded = [worker for worker in self._on(device) if worker.loaded]
        counted = sight.held if sight else {}
        return Hardware(
            name=name or (sight.gpu.name if sight else ""),
            memory_bytes=sum(worker.vram_bytes for worker in loaded),
            memory_total_bytes=total or (sight.gpu.total_bytes if sight else 0),
            workers=tuple(
                Held(handler=w.name, pid=w.pid, bytes=counted.get(w.name) or w.vram_bytes) for w in loaded
            ),
            sight=sight,
            unseen=unseen,
        )

    async def seen_lately(self) -> None:
        """Wait, not for long, until what hardware() tells is news."""
        await self._gpus.asked(ASKED_S)

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
                nursery.start_soon(
                    self._gpus.run
                )  # now: a process of ours earlier would be in the workers' way
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
        self._gpus.wake(now)
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
            self._give_back(grant)

    def _give_back(self, grant: Grant, cramped_bytes: int = -1) -> None:
        """As it came: no worker has had it."""
        grant.end()
        self._report(
            inputs.GaveBack(
                device=grant.device,
                attempt=grant.attempt,
                used_ns=grant.used_ns(),
                checkpoint=grant.checkpoint,
                cramped_bytes=cramped_bytes,
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
            if not self._gpus.fresh(grant.device):
                return
            if not self._has_place(state, grant):
                self._gpus.tell(
                    grant.device
                )  # BEFORE the lease goes back, or it would be granted again for ever
                self._give_back(grant)
            elif self._has_room(state, grant.device, grant.handler):
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
        if sight := self._gpus.sight(device):
            worker.see_others(sight.foreign_bytes)
        self._workers[device, name] = worker
        self._nursery.start_soon(self._employ, worker)

    async def _employ(self, worker: Worker) -> None:
        await worker.run()
        grant = self._grants.get(worker.device)
        waited = grant and grant.handler == worker.name and not grant.sent and not grant.over
        if grant and waited and worker.load_error:
            await self._conclude_load(worker, grant)
        del self._workers[worker.device, worker.name]
        self.poke()

    async def _conclude_load(self, worker: Worker, grant: Grant) -> None:
        """A load that ran out of memory beside others is nobody's failure: it waits for them."""
        await worker.explain_load(grant)
        room_bytes = -1
        if worker.load_ran_out:
            await self._gpus.asked(ASKED_S)
            sight = self._gpus.sight(grant.device)
            room_bytes = sight.room_bytes if sight else -1
        if room_bytes >= 0:
            self._give_back(grant, room_bytes)
        else:
            self._fail_load(grant, worker.load_error)

    # --- memory ---------------------------------------------------------------------------------------------------------

    def _has_place(self, state: State, grant: Grant) -> bool:
        """Whether driver and other processes let it be loaded, by what was seen just now: the core hears of it, too."""
        if self._gpus.stands_still(grant.device):
            return False
        sight = self._gpus.sight(grant.device)
        room_bytes = sight.room_bytes if sight else -1
        return residency.has_place(state, self._rules, state.devices[grant.device], grant.handler, room_bytes)

    def _has_room(self, state: State, device: str, name: str) -> bool:
        """Whether one more worker fits on the device. Where it does not, the least recently used idle one goes."""
        others = list(self._on(device))
        if self._fits(state, device, name, others):
            return True
        if first := residency.least_recent(self._resident(worker) for worker in others):
            self._workers[device, first.name].dismiss()
        return False

    def _fits(self, state: State, device: str, name: str, others: list[Worker]) -> bool:
        if not others:
            return True
        sight = self._gpus.sight(device)
        _, total = self._known.get(device, ("", 0))
        if device == "cpu" or not total:
            return len(others) < CPU_WORKERS_MAX
        if sight is not None and sight.gpu.compute_mode == "exclusive":
            return False
        wanted = residency.wants_bytes(state, self._rules, name)
        learned = state.learned.get(name)
        if not wanted and not (learned and learned.load_ns):
            return False  # nobody knows what it needs: it gets all there is
        residents = [self._resident(worker) for worker in others]
        return residency.fits(total, sight.foreign_bytes if sight else 0, residents, wanted)

    def _resident(self, worker: Worker) -> Resident:
        """One that loads for a lease that is over has never worked: it may go, as an idle one."""
        sight = self._gpus.sight(worker.device)
        idle = worker.phase in (Phase.IDLE, Phase.LOADING)
        return Resident(
            name=worker.name,
            bytes=max(worker.vram_bytes + CONTEXT_BYTES, sight.held.get(worker.name, 0) if sight else 0),
            idle_since=worker.idle_since if idle else -1.0,
            foreign_then_bytes=max(0, worker.foreign_then_bytes),
        )

    def _on_sight(self) -> None:
        """After a look: give memory to processes that are not ours, where they have come to need it."""
        for device in self._state().devices.values():
            sight = self._gpus.sight(device.name)
            if sight is not None and self._stop_by is None:
                self._return_memory(device, sight)
            if device.state is DeviceState.DRIVER_MISMATCH:
                self._let_driver_go(device.name)
        self.poke()

    def _return_memory(self, device: Device, sight: Sight) -> None:
        memory = sight.memory()
        workers = [w for w in self._on(device.name) if w.phase in (Phase.IDLE, Phase.LEASED)]
        residents = [self._resident(worker) for worker in workers]
        for name in residency.leaving(residents, memory):
            self._workers[device.name, name].dismiss()
            self._say_returned(device.name, name, "leaves", memory)
        again_at = self._yielded_at.get(device.name, -AGAIN_S) + AGAIN_S
        name = residency.yielding(residents, memory)
        if name and trio.current_time() >= again_at:
            self._make_room(self._workers[device.name, name], memory)

    def _make_room(self, worker: Worker, memory: Memory) -> None:
        """Have it stop at a batch boundary; then it leaves, for what it holds is what is wanted."""
        if worker.grant is None or worker.grant.yield_asked:
            return
        self._yielded_at[worker.device] = trio.current_time()
        worker.stale = True
        detail = f"other processes have taken {gib(memory.foreign_bytes)}, {gib(memory.free_bytes)} are left"
        self._report(inputs.MemoryWanted(device=worker.device, attempt=worker.grant.attempt, detail=detail))
        self._say_returned(worker.device, worker.name, "stops at a batch boundary", memory)

    def _say_returned(self, device: str, name: str, does: str, memory: Memory) -> None:
        message = "%s %s and gives its memory back: other processes hold %s of %s, %s are free"
        sizes = (gib(memory.foreign_bytes), gib(memory.total_bytes), gib(memory.free_bytes))
        extra = kind("memory_returned", device=device, handler=name)
        logger.info(message, name, does, *sizes, extra=extra)

    def _let_driver_go(self, device: str) -> None:
        """A module of the kernel that is in use cannot be replaced."""
        for worker in self._on(device):
            if worker.phase is Phase.IDLE and trio.current_time() >= worker.idle_since + UNUSED_S:
                worker.dismiss()
