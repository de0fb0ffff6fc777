"""Simulated worker processes: the real messages over the real pipes, real files, and every fault a worker can have.

    daemon side   WorkerProcess as it is (its pipes, its reader, its bounds) around a process that does not exist
    worker side   `Machine`: the worker's own files.py, terms.py and writer.py, one virtual computation after the other

Rule 1: what an item comes to depends on its text alone, so that whoever reads an output can check it.
Rule 2: a machine asserts what the daemon promised it: nobody else holds its job's files, nobody else computes on its
device.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import zlib
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio
from gpujobd import nvml
from gpujobd.grant import lock_is_free
from gpujobd.nvml import Gpu, Look, Nvml
from gpujobd.worker_process import WorkerProcess
from gpujobd_worker.failures import Deferral, Failure
from gpujobd_worker.files import JobFiles, LeaseLost
from gpujobd_worker.lines import read_numbers
from gpujobd_worker.terms import Terms
from gpujobd_worker.writer import Batch, Outcome, Writer
from simulation.pulse import Pulse

PIDS_FROM: Final = 1 << 30  # beyond any pid of Linux: nothing real is ever signalled
LATER_TRIES: Final = 2
TRANSIENT: Final = "transient"
MODELS: Final = {
    "embed": 1.0,
    "rerank": 4.0,
    "ocr": 2.0,
}  # how much longer it takes to load than the smallest


DEVICE_BYTES: Final = 24 << 30
MODEL_BYTES: Final = 10 << 30
CONTEXT_BYTES: Final = 500 << 20


class Surroundings(Protocol):
    """What a machine needs of its world."""

    luck: random.Random
    nursery: trio.Nursery
    machines: list[Machine]
    pulse: Pulse
    hired: int

    def trouble(self, device: str) -> str: ...
    def device_is_ill(self, device: str) -> bool: ...
    def load_trouble(self, handler: str) -> str: ...
    def foreign_bytes(self, device: str) -> int: ...
    def driver_trouble(self) -> str: ...
    def note(self, text: str) -> None: ...


class Process:
    """What WorkerProcess asks of a trio.Process."""

    def __init__(self, machine: Machine, output: int) -> None:
        self.pid = machine.pid
        self.stdout = trio.lowlevel.FdStream(output)
        self._machine = machine

    @property
    def returncode(self) -> int | None:
        return self._machine.status

    def kill(self) -> None:
        self._machine.end(-signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM and not self._machine.deaf:
            self._machine.end(-signal.SIGTERM)

    async def wait(self) -> int | None:
        await self._machine.dead.wait()
        return self._machine.status


class Relatives:
    """The Kin of a process that has none."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def add(self, pid: int) -> None:
        pass

    def kill(self) -> None:
        self._machine.end(-signal.SIGKILL)

    def pids(self) -> list[int]:
        return [] if self._machine.status is not None else [self._machine.pid]

    def out_of_memory(self) -> bool:
        return self._machine.status == -signal.SIGKILL

    def bury(self) -> None:
        pass


def simulated_process(world: Surroundings) -> type[WorkerProcess]:
    """WorkerProcess whose start() starts a machine."""

    class SimulatedProcess(WorkerProcess):
        @classmethod
        async def start(cls, python: str, **how: Any) -> WorkerProcess:
            await trio.lowlevel.checkpoint()
            if world.load_trouble("") == "no interpreter":
                raise FileNotFoundError(2, "No such file or directory", python)
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            reader, writer = os.pipe()
            machine = Machine(world, how["device"], its, writer, ours)
            world.machines.append(machine)
            world.nursery.start_soon(machine.run)
            process: Any = Process(machine, reader)
            return cls(process, ours, Relatives(machine))

    return SimulatedProcess


def simulated_driver(world: Surroundings) -> type[Nvml]:
    """Nvml whose looks see the machines of this world, and strangers; or hang, or are refused."""

    class SimulatedDriver(Nvml):
        async def look(self) -> Look:
            trouble = world.driver_trouble()
            await trio.sleep(10 if trouble == "hangs" else world.luck.choice((0.1, 0.1, 2.0)))
            if trouble:
                return Look(trouble=trouble, detail="as drawn")
            gpus = (_gpu(world, index) for index in range(2))
            return Look(driver="1.0", gpus=tuple(gpus))

    return SimulatedDriver


def _gpu(world: Surroundings, index: int) -> Gpu:
    device = f"cuda:{index}"
    ours = [m for m in world.machines if m.device == device and m.status is None and m.loaded_bytes]
    foreign = world.foreign_bytes(device)
    processes = [nvml.Process(m.pid, m.loaded_bytes) for m in ours]
    used = min(DEVICE_BYTES, foreign + sum(m.loaded_bytes for m in ours))
    return Gpu(
        index=index,
        uuid=f"GPU-{index}",
        total_bytes=DEVICE_BYTES,
        used_bytes=used,
        free_bytes=DEVICE_BYTES - used,
        processes=(*processes, *([nvml.Process(99, foreign)] if foreign else [])),
    )


class Machine:
    """One worker process."""

    def __init__(
        self, world: Surroundings, device: str, end: socket.socket, output: int, lifeline: socket.socket
    ) -> None:
        """`lifeline`: the daemon's end, which closes with the daemon, however that ends."""
        world.hired += 1
        self.pid = PIDS_FROM + world.hired
        self.device = device
        self.status: int | None = None
        self.dead = trio.Event()
        self.deaf = False
        self.files: JobFiles | None = None
        self.computing = False
        self.loaded_bytes = 0
        self._world, self._luck = world, world.luck
        self._end = trio.socket.from_stdlib_socket(end)
        self._output, self._lifeline = output, lifeline
        self._scope = trio.CancelScope()
        self._orders, self._inbox = trio.open_memory_channel[dict[str, Any]](100)
        self._yield_of = 0
        self._beating = True
        self._attempt = self._line = self._progress = 0
        self._unkillable_s = 0.0
        self._ending = False

    # --- life and death -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear)
                    await self._serve(nursery)
                    nursery.cancel_scope.cancel()
        finally:
            if self.status is None:
                self.status = 0
            self._end.close()
            os.close(self._output)
            self.let_go()
            self.dead.set()

    def end(self, status: int) -> None:
        """SIGKILL and its like; an unkillable one takes its time."""
        if self.status is not None or self._ending:
            return
        if self._unkillable_s:
            self._ending = True
            self._world.nursery.start_soon(self._end_later, status)
        else:
            self._over(status)

    async def _end_later(self, status: int) -> None:
        await trio.sleep(self._unkillable_s)
        self._over(status)

    def _over(self, status: int) -> None:
        if self.status is None:
            self.status = status
            self.computing = False
            self._scope.cancel()

    def bury_daemon(self) -> None:
        """The daemon's process is gone, and with it what it had open."""
        self._lifeline.close()
        self.let_go()

    def let_go(self) -> None:
        """Its descriptors close, the lock with them."""
        self.computing = False
        if self.files is not None:
            self.files.close()
            self.files = None

    async def _die(self, status: int) -> None:
        self._over(status)
        await trio.sleep_forever()

    # --- messages ----------------------------------------------------------------------------------------------------

    def _send(self, kind: str, **fields: Any) -> None:
        self._put(json.dumps({"type": kind, **fields}).encode() + b"\n")

    def _put(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # the daemon is gone, or does not read
            os.write(self._end.fileno(), line)

    def _print(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            os.set_blocking(self._output, False)
            os.write(self._output, text)

    async def _hear(self) -> None:
        buffer = b""
        with contextlib.suppress(OSError, trio.ClosedResourceError):
            while piece := await self._end.recv(65536):
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))
        self.end(0)  # the lifeline

    def _obey(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "yield":
                self._yield_of = message["attempt"]
            case "dump":
                self._print(b"Thread 0x01 (most recent call first): ...\n")
            case _:
                self._orders.send_nowait(message)

    async def _beat(self, every_s: float) -> None:
        while True:
            if self._beating:
                self._send(
                    "heartbeat", attempt=self._attempt, line=self._line, batch=8, progress=self._progress
                )
            await trio.sleep(every_s)

    # --- work ----------------------------------------------------------------------------------------------------------

    async def _serve(self, nursery: trio.Nursery) -> None:
        self._send("hello", pid=self.pid, python="3", worker="simulated")
        order = await self._inbox.receive()
        assert order["type"] == "load", order
        nursery.start_soon(self._beat, order["heartbeat_s"])
        await self._load(order)
        async for order in self._inbox:
            if order["type"] == "exit":
                if self._luck.random() < 0.1:
                    await trio.sleep(self._luck.choice((1, 7)))
                self._over(0)
                return
            assert order["type"] == "lease", order
            await self._work(order)

    async def _load(self, order: dict[str, Any]) -> None:
        trouble = self._world.load_trouble(order["handler"])
        load_s = self._world.pulse.load_s * MODELS[order["handler"]] * self._luck.uniform(0.8, 1.5)
        await trio.sleep(load_s)
        if trouble == "fails":
            self._print(b"about to fail\n")
            self._send("load_failed", error="OSError: no such model", trace="Traceback ...\n")
            await self._die(1)
        elif trouble == "dies":
            await self._die(-signal.SIGSEGV)
        elif trouble == "hangs":
            await trio.sleep_forever()
        if not self._fits():
            self._send("load_failed", error="OutOfMemoryError: CUDA out of memory", out_of_memory=True)
            await self._die(1)
        self.loaded_bytes = MODEL_BYTES + CONTEXT_BYTES
        self._print(b"loaded\n")
        sizes = {"vram_bytes": MODEL_BYTES, "device_bytes": DEVICE_BYTES}
        self._send("loaded", load_s=load_s, hardware="simulated", **sizes)

    def _fits(self) -> bool:
        here = [m for m in self._world.machines if m.device == self.device and m.status is None]
        held = sum(machine.loaded_bytes for machine in here) + self._world.foreign_bytes(self.device)
        return held + MODEL_BYTES + CONTEXT_BYTES <= DEVICE_BYTES

    async def _work(self, order: dict[str, Any]) -> None:
        terms = Terms(order)
        self._attempt = terms.attempt
        folder = terms.folder
        assert self.files is None
        assert lock_is_free(Path(folder)), f"job {order['job']}: somebody else holds its files"
        try:
            self.files = JobFiles(folder, terms.attempt, terms.checkpoint, lambda: True)
            lease = Lease(terms, self.files, self._world.pulse.checkpoint_s)
            numbers = read_numbers(self.files.folder, terms.items)
        except LeaseLost as lost:
            await self._lost(lost, {})
            return
        lease.numbers = numbers
        await self._compute(order["job"], lease)

    async def _compute(self, job_id: int, lease: Lease) -> None:
        terms = lease.terms
        if terms.canary and not await self._canary(terms):
            return
        while not lease.over and self._yield_of != terms.attempt:
            await self._call(job_id, lease)
            if lease.due(trio.current_time()) and not await self._sync(lease):
                break
        if lease.writer.lost is None:
            await self._sync(lease, last=True)
        lost = lease.writer.lost
        if lost is None and terms.too_many(lease.writer.checkpoint["failed"]):
            lost = LeaseLost("failures_max", "too many items failed")
        self.let_go()
        self._attempt = self._line = 0
        if lost is not None:
            await self._lost(lost, lease.report(), terms.attempt)
            return
        point = lease.writer.checkpoint
        left = terms.items - point["done"] - point["failed"]
        self._send("yielded" if left else "finished", attempt=terms.attempt, **lease.report())

    async def _lost(self, lost: LeaseLost, report: dict[str, Any], attempt: int = 0) -> None:
        attempt = attempt or self._attempt
        self._world.note(f"worker {self.pid - PIDS_FROM} lost its lease: {lost.cause}: {lost.detail[:200]}")
        self.let_go()
        self._attempt = self._line = 0
        self._send("lost", attempt=attempt, cause=lost.cause, detail=lost.detail, **report)
        if lost.cause in ("died", "poisoned", "canary"):
            await self._die(1)

    async def _canary(self, terms: Terms) -> bool:
        await trio.sleep(self._luck.uniform(0.1, 3))
        if self._world.device_is_ill(self.device):
            await self._lost(LeaseLost("canary", f"line {terms.canary}: CUDA error"), {})
            return False
        self._send("canary", attempt=terms.attempt)
        return True

    async def _call(self, job_id: int, lease: Lease) -> None:
        """One call of the handler; what goes wrong in it is drawn, or is in the items."""
        assert self.files is not None
        first, last = lease.next_call(self._luck.choice((1, 8, 8, 8, 20)))
        others = [
            m for m in self._world.machines if m is not self and m.computing and m.device == self.device
        ]
        assert not others, f"two workers compute on {self.device}"
        self._line, self.computing = first, True
        self.files.page.write(first, last)
        await trio.sleep(self._world.pulse.item_s * self._luck.uniform(0.3, 1.5) * (last - first + 1))
        await self._suffer(job_id, lease, first, last)
        self.files.page.clear(first, last)
        self.computing = False
        self._progress += 1
        try:
            lease.take(first, last)
        except OSError as error:
            lease.writer._give_up(error)

    async def _suffer(self, job_id: int, lease: Lease, first: int, last: int) -> None:
        texts = lease.texts[first - 1 : last]
        condemned = lease.terms.condemned
        if any(_kind(text) == "poison" and first + n not in condemned for n, text in enumerate(texts)):
            await self._die(-signal.SIGSEGV)
        if self._world.device_is_ill(self.device) and self._luck.random() < 0.7:
            await self._lost(LeaseLost("poisoned", "CUDA error: unspecified launch failure"), {})
        trouble = self._world.trouble(self.device)
        if trouble:
            self._world.note(f"worker {self.pid - PIDS_FROM} of job {job_id}: {trouble}")
        match trouble:
            case "dies":
                await self._die(self._luck.choice((-signal.SIGSEGV, -signal.SIGKILL, 0, 3)))
            case "stalls" | "hangs":
                self.deaf = self._luck.random() < 0.5
                self._beating = trouble == "stalls"
                self._unkillable_s = self._luck.choice((0, 0, 0, 5, 45))
                await trio.sleep_forever()
            case "says nonsense":
                self._put(self._luck.randbytes(20) + b"\n")
            case "says old things":  # what another attempt had computed, and nobody has kept
                old = _further(lease.writer.checkpoint, min(lease.terms.items - first + 1, 3))
                self._send("checkpoint", attempt=lease.terms.attempt - 1, checkpoint=old)
            case "lies":
                lie = {**lease.writer.checkpoint, "upto": lease.terms.items, "done": lease.terms.items}
                self._send("checkpoint", attempt=lease.terms.attempt, checkpoint=lie | {"failed": 5})
            case "floods":
                self._print(b"x" * 65536)
            case "leaves bytes behind":
                assert self.files is not None
                with contextlib.suppress(OSError):
                    self.files.results.append(b'{"line": 1, "output": {}}\n')
                await self._die(-signal.SIGKILL)

    async def _sync(self, lease: Lease, *, last: bool = False) -> bool:
        await trio.sleep(self._luck.choice((0.001, 0.01, 0.01, 2.0)))
        try:
            lease.writer._sync()
        except OSError as error:
            lease.writer._give_up(error)
            return False
        lease.synced_at = trio.current_time()
        if not last and not lease.over:
            self._send("checkpoint", attempt=lease.terms.attempt, **lease.report())
        return True


class Lease:
    """What a machine holds of a lease: the worker's own writer, driven by hand."""

    def __init__(self, terms: Terms, files: JobFiles, checkpoint_s: float) -> None:
        self.terms = terms
        self.numbers: list[int] = []
        self.deferred: dict[int, int] = dict(terms.checkpoint["deferred"])
        size = os.fstat(files.input).st_size
        self.texts = os.pread(files.input, size, 0).split(b"\n")[: terms.items]
        if len(self.texts) != terms.items:
            raise LeaseLost("input_lost", f"{len(self.texts)} lines of {terms.items}")
        self.synced_at = trio.current_time()
        self._every_s = checkpoint_s
        self.writer = Writer(
            files,
            dict(terms.checkpoint),
            every_s=checkpoint_s,
            report=lambda _: None,
            enough=terms.too_many,
            stop=threading.Event(),
        )

    @property
    def next_line(self) -> int:
        return int(self.writer._next["upto"]) + 1

    @property
    def over(self) -> bool:
        return self.writer._stop.is_set() or (self.next_line > self.terms.items and not self.deferred)

    def due(self, now: float) -> bool:
        return now - self.synced_at >= self._every_s

    def next_call(self, size: int) -> tuple[int, int]:
        if self.next_line > self.terms.items:
            line = next(iter(self.deferred))
            return line, line
        size = min(size, self.terms.items - self.next_line + 1)
        return self.next_line, self.next_line + self.terms.share(self.next_line, size) - 1

    def take(self, first: int, last: int) -> None:
        """Hand the outcomes of a call to the writer."""
        again = self.next_line > self.terms.items
        outcomes = [self._outcome(line) for line in range(first, last + 1)]
        numbers = self.numbers[first - 1 : last] if self.numbers else range(first, last + 1)
        deferred = [list(pair) for pair in self.deferred.items()]
        upto = self.terms.items if again else last
        nobody = [None] * len(outcomes)
        self.writer._write([Batch(upto, numbers, nobody, outcomes, deferred, 1)])

    def _outcome(self, line: int) -> Outcome:
        if line in self.terms.condemned:
            return Failure("worker_lost", "its worker died twice with this item in hand", 2)
        tries = self.deferred.pop(line, 0) + 1
        outcome = outcome_of(self.texts[line - 1], tries)
        if isinstance(outcome, Deferral):
            self.deferred[line] = tries
        return outcome

    def report(self) -> dict[str, Any]:
        return {
            "checkpoint": self.writer.checkpoint,
            "timings": {"compute_s": 1.0},
            "vram_bytes": MODEL_BYTES,
        }


def _further(point: dict[str, Any], lines: int) -> dict[str, Any]:
    """A checkpoint that could follow."""
    done, size = point["done"] + lines, point["results_bytes"] + 40 * lines
    return {**point, "upto": point["upto"] + lines, "done": done, "results_bytes": size, "results_crc": 7}


def item(kind: str, number: int) -> bytes:
    return b'{"kind": "%s", "n": %d}' % (kind.encode(), number)


def _kind(text: bytes) -> str:
    return str(msgspec.json.decode(text)["kind"])


def outcome_of(text: bytes, tries: int) -> Outcome:
    match _kind(text):
        case "bad":
            return Failure("handler_error", "ValueError: bad", tries)
        case "later" if tries < LATER_TRIES:
            return Deferral(tries)
        case _:
            return {"crc": zlib.crc32(text)}
