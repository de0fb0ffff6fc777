"""What is known of the GPUs from outside: who holds how much, how hot, how busy; and when to look again.

    nvml.py: a look  -->  sight of each device  -->  DeviceSeen to the core      which state, whom it takes
                                                -->  Memory, Resident            who stays (core/residency.py)
                                                -->  jobctl device

Rule 1: a device is found by its UUID, which its worker told or the first look; until then by the number that CUDA and
NVML share: workers count in the order of the bus (CUDA_DEVICE_ORDER), among those that CUDA_VISIBLE_DEVICES names.
Rule 2: a process is ours if it is a worker or descends from one. What is held and is not ours is foreign, be it
held by a process, by one that is not seen (another container), or by none at all (a ghost).
Rule 3: others count with the most that they held within CALM_S: one that takes and gives in turns moves no model.
Rule 4: looks cost CPU time, so they come only while something depends on them; with nothing loaded, nothing waiting and
nothing wrong there are none, until somebody asks. A host without GPUs never sees one.
Rule 5: a failed look makes nothing worse: the last good one counts for STALE_S, then nothing is known.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec
import psutil
import trio

from gpujobd.catalog import kind
from gpujobd.config import Config
from gpujobd.core import inputs
from gpujobd.core.model import Device, DeviceState, State
from gpujobd.core.residency import CONTEXT_BYTES, NOTICE_BYTES, Memory, gib
from gpujobd.core.sightings import MISMATCH
from gpujobd.nvml import Gpu, Look, Nvml, Process
from gpujobd.worker import Worker

ACTIVE_S: Final = 5.0  # between looks while something runs or waits
WARM_S: Final = 10.0  # while models are loaded: others may want their memory
WATCH_S: Final = 60.0  # while there is nothing but a device that is not well
ASKED_S: Final = 1.0  # somebody asks for a look: no sooner than this after the last one
FRESH_S: Final = 10.0  # nothing is loaded on an older look
FAILED_S_MAX: Final = 600.0
CALM_S: Final = 15.0
STALE_S: Final = 60.0
SHOWN_MAX: Final = 3  # processes in a sentence
NAMED_MAX: Final = 20  # of a GPU, whose command is looked up
TROUBLES: Final = {"lost": "DeviceLost", "reset_required": "ResetRequired"}
UNSEEN: Final = {"no_module", "no_library", "no_driver"}  # not there, which is no fault

People = dict[int, tuple[str, int]]

logger = logging.getLogger("gpujobd.supervisor")


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """A device at one look."""

    gpu: Gpu
    driver: str = ""
    seen_ns: int = 0
    held: dict[str, int] = {}  # handler -> what its worker holds, as the driver counts
    others: tuple[Process, ...] = ()
    people: People = {}  # pid -> command and uid of others, where this process may know
    foreign_bytes: int = 0
    room_bytes: int = -1  # as in core/model.py, Device

    def memory(self) -> Memory:
        return Memory(
            total_bytes=self.gpu.total_bytes,
            free_bytes=self.gpu.free_bytes,
            foreign_bytes=self.foreign_bytes,
        )


def sight(
    gpu: Gpu,
    mine: Mapping[int, str],
    estimated_bytes: int,
    most_bytes: int = 0,
    *,
    foreign_pids: bool = False,
) -> Sight:
    """Tell ours from others'. `mine`: pid -> handler; `estimated_bytes`: what our workers there should hold.

    Where none of ours is listed although they hold something, pids are told as another namespace counts them, or not
    at all (`foreign_pids`: that is known from before): then the estimate is ours, and nobody else is named.
    `most_bytes`: that others held lately.
    """
    held: dict[str, int] = {}
    listed = [process for process in gpu.processes if process.pid in mine]
    for process in listed:
        held[mine[process.pid]] = held.get(mine[process.pid], 0) + (process.bytes or 0)
    blind = foreign_pids or (bool(estimated_bytes) and not any(held.values()))
    ours = estimated_bytes if blind else sum(held.values())
    foreign = max(0, min(gpu.used_bytes, gpu.total_bytes) - ours)
    others = () if blind and not listed else tuple(p for p in gpu.processes if p.pid not in mine)
    most = max(foreign, most_bytes)
    room = max(0, gpu.total_bytes - most) if gpu.total_bytes and most > NOTICE_BYTES else -1
    if gpu.compute_mode == "exclusive" and others:
        room = 0
    return Sight(gpu=gpu, held=held, others=others, foreign_bytes=foreign, room_bytes=room)


def visible(environ: Mapping[str, str]) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lets workers see, in their order; None: everything."""
    told = environ.get("CUDA_VISIBLE_DEVICES")
    return None if told is None else [word.strip() for word in told.split(",") if word.strip()]


def gpu_of(gpus: Iterable[Gpu], device: str, seen: list[str] | None, uuid: str = "") -> Gpu | None:
    """The GPU that CUDA calls `device`: by its UUID where that is known."""
    if uuid:
        return next((gpu for gpu in gpus if _same(gpu.uuid, uuid)), None)
    number = int(device.partition(":")[2] or 0)
    if seen is None:
        return next((gpu for gpu in gpus if gpu.index == number), None)
    name = seen[number] if number < len(seen) else ""
    if name.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(name)), None)
    return next((gpu for gpu in gpus if name.startswith("GPU-") and gpu.uuid.startswith(name)), None)


def _same(one: str, other: str) -> bool:
    """A worker's torch leaves the prefix out."""
    return bool(one) and one.lower().removeprefix("gpu-") == other.lower().removeprefix("gpu-")


class Gpus:
    """One a supervisor: run() looks when it is due; everything else tells what was seen, or wants to know."""

    def __init__(
        self,
        config: Config,
        *,
        state: Callable[[], State],
        workers: Callable[[], Iterable[Worker]],
        report: Callable[[inputs.AnyInput], None],
        seen: Callable[[], None],
    ) -> None:
        """`seen` is called after every look."""
        self._state, self._workers, self._report, self._seen = state, workers, report, seen
        self._nvml = Nvml(config)
        self._sights: dict[str, Sight] = {}
        self._told: dict[str, inputs.DeviceSeen] = {}
        self._uuids: dict[str, str] = {}
        self._foreign: dict[str, collections.deque[tuple[float, int]]] = {}
        self._looked_at = self._good_at = -math.inf
        self._failures = 0
        self._look = Look()
        self._foreign_pids = False  # as another namespace counts them
        self._wanted = False
        self._due = trio.Event()
        self._done = trio.Event()

    # --- what is known ------------------------------------------------------------------------------------------------

    def sight(self, device: str) -> Sight | None:
        """As the last look saw it; None: nothing is known."""
        return self._sights.get(device)

    def trouble(self, device: str) -> str:
        """Why nothing is known of it: `no NVML: ...`; empty: something is, or it is no GPU."""
        if not _is_gpu(device) or device in self._sights or math.isinf(self._looked_at):
            return ""
        if not self._look.trouble:
            return f"NVML does not list {device}"
        return f"no NVML: {self._look.detail or self._look.trouble}"

    def stands_still(self, device: str) -> bool:
        """Whether no process can begin to use it, whatever the core may think of it yet."""
        told = self._told.get(device)
        return told is not None and bool(told.trouble)

    def tell(self, device: str) -> None:
        """What the last look saw, to the core: again, where the core does not seem to go by it."""
        if device in self._told:
            self._report(self._told[device])

    def fresh(self, device: str) -> bool:
        """Whether a worker can be started by what is known; if not, a look is on its way."""
        if not _is_gpu(device) or self._failures or trio.current_time() <= self._looked_at + FRESH_S:
            return True
        self.want()
        return False

    def want(self) -> None:
        """Somebody wants to know."""
        self._wanted = True
        self.wake(trio.current_time())

    async def asked(self, limit_s: float) -> None:
        """Look for somebody who waits for it, unless the last look is news enough."""
        if any(map(_is_gpu, self._state().devices)) and not self._failures:
            done = self._done
            if trio.current_time() > self._looked_at + ASKED_S:
                self.want()
                with trio.move_on_after(limit_s):
                    await done.wait()

    def reload(self, config: Config) -> None:
        self._nvml.reload(config)
        self._failures = 0

    # --- looking ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look until cancelled."""
        while any(map(_is_gpu, self._state().devices)):
            look = await self._nvml.look()
            await self._take(look)
            self._wanted = False
            self._due = trio.Event()  # after the look: who wanted one meanwhile has it
            self._seen()
            self._done.set()
            self._done = trio.Event()
            await self._due.wait()

    def wake(self, now: float) -> None:
        """Look if it is due; called now and again."""
        if now >= self._looked_at + self._pause_s():
            self._due.set()

    def _pause_s(self) -> float:
        if self._failures:
            return min(ACTIVE_S * (1 << min(self._failures, 10)), FAILED_S_MAX)
        if self._wanted:
            return ASKED_S
        state = self._state()
        if any(device.lease for device in state.devices.values()) or any(state.book.ready):
            return WATCH_S / 2 if self._look.trouble else ACTIVE_S
        if next(iter(self._workers()), None) is not None:
            return WARM_S
        return WATCH_S if any(map(_unwell, state.devices.values())) else math.inf

    async def _take(self, look: Look) -> None:
        now = trio.current_time()
        self._say(look)
        known = look.trouble in ("", "mismatch")
        self._failures = 0 if known else self._failures + 1
        self._look = look
        if known:
            self._good_at = now
        if known or now > self._good_at + STALE_S:
            mine, people = await self._who(look)
            for name in filter(_is_gpu, list(self._state().devices)):
                self._see(name, look, mine, people, now)
        self._looked_at = now

    async def _who(self, look: Look) -> tuple[dict[int, str], People]:
        """Every process of every worker, pid -> handler; and who the others are."""
        kin = [(worker.name, worker.kin) for worker in self._workers()]

        def find() -> tuple[dict[int, str], People]:
            mine = {pid: name for name, relatives in kin if relatives for pid in relatives.pids()}
            named = {process.pid for gpu in look.gpus for process in gpu.processes[:NAMED_MAX]}
            return mine, dict(_people(named - mine.keys()))

        return await trio.to_thread.run_sync(find, abandon_on_cancel=True)

    def _see(self, name: str, look: Look, mine: Mapping[int, str], people: People, now: float) -> None:
        gpu = self._find(name, look)
        self._sights.pop(name, None)
        trouble, detail = self._trouble(name, look, gpu)
        self._told[name] = inputs.DeviceSeen(device=name, trouble=trouble, detail=detail)
        if not trouble and gpu is not None and not gpu.trouble:
            seen = self._sights[name] = self._measure(name, look, gpu, mine, people, now)
            self._told[name] = inputs.DeviceSeen(
                device=name, detail=_crowd(seen), total_bytes=gpu.total_bytes, room_bytes=seen.room_bytes
            )
        self.tell(name)

    def _measure(
        self, name: str, look: Look, gpu: Gpu, mine: Mapping[int, str], people: People, now: float
    ) -> Sight:
        workers = [worker for worker in self._workers() if worker.device == name]
        if any(worker.loaded for worker in workers):
            self._foreign_pids = not any(process.pid in mine for process in gpu.processes)
        estimated = self._estimate(workers)
        plain = sight(gpu, mine, estimated, foreign_pids=self._foreign_pids)
        most = self._most(name, plain.foreign_bytes, now)
        seen = sight(gpu, mine, estimated, most, foreign_pids=self._foreign_pids)
        for worker in workers:
            worker.see_others(seen.foreign_bytes)
        return msgspec.structs.replace(seen, driver=look.driver, people=people, seen_ns=time.time_ns())

    def _estimate(self, workers: Iterable[Worker]) -> int:
        """What they should hold; those that are still loading only where the driver cannot tell ours at all."""
        learned = self._state().learned
        total = 0
        for worker in workers:
            if worker.loaded or self._foreign_pids:
                known = learned.get(worker.name)
                total += max(worker.vram_bytes, known.load_bytes if known else 0) + CONTEXT_BYTES
        return total

    def _find(self, name: str, look: Look) -> Gpu | None:
        for worker in self._workers():
            told = worker.loaded.uuid if worker.device == name and worker.loaded else ""
            if any(_same(gpu.uuid, told) for gpu in look.gpus):
                self._uuids[name] = told
        gpu = gpu_of(look.gpus, name, visible(os.environ), self._uuids.get(name, ""))
        if gpu is None and name in self._uuids:  # one that is lost cannot tell its UUID any more
            lost = gpu_of(look.gpus, name, visible(os.environ))
            return lost if lost and lost.trouble else None
        if gpu is not None and gpu.uuid:
            self._uuids.setdefault(name, gpu.uuid)
        return gpu

    def _trouble(self, name: str, look: Look, gpu: Gpu | None) -> tuple[str, str]:
        """What stands against the device, as the core calls it, in one word and in a sentence."""
        if look.trouble == "mismatch":
            return MISMATCH, look.detail
        if look.trouble:
            return "", ""
        if gpu is None:
            gone = name in self._uuids
            return ("DeviceLost", f"NVML does not list {self._uuids[name]} any more") if gone else ("", "")
        if gpu.compute_mode == "prohibited":
            return "ComputeProhibited", "its compute mode is PROHIBITED (nvidia-smi -c)"
        return TROUBLES.get(gpu.trouble, ""), gpu.detail

    def _most(self, name: str, foreign_bytes: int, now: float) -> int:
        lately = self._foreign.setdefault(name, collections.deque())
        lately.append((now, foreign_bytes))
        while lately[0][0] < now - CALM_S:
            lately.popleft()
        return max(held for _, held in lately)

    def _say(self, look: Look) -> None:
        """Once, when it stops to tell, or tells again."""
        if look.trouble == self._look.trouble and not math.isinf(self._looked_at):
            return
        if look.trouble and look.trouble != "mismatch":
            level = logging.INFO if look.trouble in UNSEEN else logging.WARNING
            message = "no NVML, nothing is known of processes that are not ours: %s"
            logger.log(level, message, look.detail, extra=kind("nvml_lost", reason=look.trouble))
        elif self._look.trouble or look.trouble == "":
            names = ", ".join(gpu.name for gpu in look.gpus) or "no GPU"
            message = "NVML tells of %s, driver %s"
            logger.info(message, names, look.driver or "unknown", extra=kind("nvml_found"))


def _people(pids: Iterable[int]) -> Iterator[tuple[int, tuple[str, int]]]:
    """Command and uid; not of those that /proc hides (ProtectProc=) or another namespace has. Blocks."""
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            yield pid, (process.name(), process.uids().real)


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _unwell(device: Device) -> bool:
    return device.state is not DeviceState.OK


def _crowd(seen: Sight) -> str:
    """`other processes hold 70.1 GiB of 79.6 GiB: pid 4711 70.0 GiB`."""
    if seen.room_bytes < 0:
        return ""
    if seen.gpu.compute_mode == "exclusive":
        return "its compute mode is EXCLUSIVE_PROCESS, and another process has it"
    held = (
        f"other processes hold {gib(seen.gpu.total_bytes - seen.room_bytes)} of {gib(seen.gpu.total_bytes)}"
    )
    told = [p for p in seen.others if p.bytes]
    named = ", ".join(f"pid {p.pid} {gib(p.bytes or 0)}" for p in told[:SHOWN_MAX])
    return f"{held}: {named}" if named else held
