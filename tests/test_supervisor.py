"""The supervisor over real processes that speak the real pipe; only what they compute is a fake."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import trio

from gpujobd import cgroup, supervisor, worker
from gpujobd.config import Config, File, Handler
from gpujobd.config import Worker as Timeouts
from gpujobd.core import inputs
from gpujobd.core.model import Checkpoint, Device, Job, Lease, Span, State, YieldWhy
from gpujobd.supervisor import Supervisor

FAKE = Path(__file__).with_name("fake_worker.py")
HANG_S = 10  # no test comes near it, unless something hangs
LAST = (inputs.GaveBack, inputs.Finished, inputs.Lost, inputs.LoadFailed)

R = TypeVar("R", bound=inputs.AnyInput)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)
    monkeypatch.setattr(supervisor, "GOODBYE_S", 0.5)
    for name, seconds in {"DUMP_S": 0.5, "TERMINATE_S": 0.3, "LEAVE_S": 0.3, "UNKILLABLE_S": 0.3}.items():
        monkeypatch.setattr(worker, name, seconds)
    monkeypatch.setattr(supervisor, "UNKILLABLE_S", 0.3)


class Bench:
    """A daemon that believes every report: the last word on a lease ends it in the state."""

    def __init__(self, folder: Path, handlers: dict[str, Handler], **timeouts: Any) -> None:
        self.folder = folder
        settings = {
            "silent_timeout_s": 20.0,
            "stall_timeout_s": 20.0,
            "checkpoint_s": 0.1,
            "threads": 3,
        } | timeouts
        self.config = Config(file=File(worker=Timeouts(**settings)), handlers=handlers)
        self.state = State(devices={"cpu": Device(name="cpu")})
        self.reports: list[inputs.AnyInput] = []
        self.logged: list[int] = []
        self.reported = trio.Event()
        self.supervisor = Supervisor(
            self.config,
            state=lambda: self.state,
            report=self.report,
            prepare=self.prepare,
            on_log=self.logged.append,
            main=FAKE,
        )

    def report(self, report: inputs.AnyInput) -> None:
        self.reports.append(report)
        if isinstance(report, LAST):
            device = self.state.devices[report.device]
            if device.lease and device.lease.attempt == report.attempt:
                device.lease = None
        self.reported.set()
        self.reported = trio.Event()

    async def prepare(self, job: Job) -> Path:
        folder = self.job_folder(job.job_id)
        folder.mkdir(exist_ok=True)
        return folder

    def job_folder(self, job_id: int) -> Path:
        return self.folder / str(job_id)

    def log(self, job_id: int) -> str:
        return (self.job_folder(job_id) / "log").read_text()

    def lease(
        self, job_id: int = 1, handler: str = "fake", device: str = "cpu", items: int = 50, **job: Any
    ) -> Lease:
        known = self.state.jobs.get(job_id)
        attempt = known.attempt + 1 if known else 5
        self.state.jobs[job_id] = Job(
            job_id=job_id,
            submit_id=f"s{job_id}",
            owner=1,
            tenant="t",
            handler=handler,
            items=items,
            input_bytes=1,
            input_sha256=b"",
            submitted_ns=0,
            attempt=attempt,
            **job,
        )
        lease = Lease(
            device=device, job_id=job_id, attempt=attempt, handler=handler, tenant="t", granted_ns=0
        )
        self.state.devices[device].lease = lease
        self.supervisor.poke()
        return lease

    async def until(self, kind: type[R], count: int = 1, where: Callable[[R], bool] = lambda _: True) -> R:
        """The count-th report of a kind."""
        with trio.move_on_after(HANG_S):
            while True:
                found = [r for r in self.reports if isinstance(r, kind) and where(r)]
                if len(found) >= count:
                    return found[count - 1]
                await self.reported.wait()
        logs = [path.read_text()[-2000:] for path in self.folder.glob("*/log")]
        raise AssertionError(f"no {kind.__name__}, but {self.reports}; logs: {logs}")

    def kinds(self) -> list[str]:
        """Names of the reports in order, checkpoints once."""
        names = [type(report).__name__ for report in self.reports]
        return [n for i, n in enumerate(names) if n != "CheckpointReached" or names[i - 1] != n]


def fake(**params: Any) -> Handler:
    stall_timeout_s = params.pop("stall_timeout_s", None)
    vram_gib = params.pop("vram_gib", 0.0)
    return Handler(
        entry="fake:Fake",
        python=sys.executable,
        batch_max=10,
        stall_timeout_s=stall_timeout_s,
        vram_gib=vram_gib,
        params=params,
    )


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.supervisor.run)
        yield bench
        with trio.fail_after(HANG_S):
            nursery.cancel_scope.cancel()
    assert not [p for p in psutil.Process().children(recursive=True) if p.pid not in before]


def bench(folder: Path, *, timeouts: dict[str, Any] | None = None, **params: Any) -> Bench:
    return Bench(folder, {"fake": fake(**params)}, **(timeouts or {}))


async def test_leased_job_is_loaded_worked_and_finished(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        b.lease()
        finished = await b.until(inputs.Finished)
        assert b.kinds() == ["Loaded", "CheckpointReached", "Finished"]
        assert b.reports[0] == inputs.Loaded(device="cpu", handler="fake", load_ns=500_000_000)
        assert (finished.device, finished.attempt, finished.checkpoint.done) == ("cpu", 5, 50)
        first = await b.until(inputs.CheckpointReached)
        assert first.timings.load_s == 0.5  # the lease waited for the load
        assert finished.timings.load_s == 0.0
        assert 0 < first.used_ns <= finished.used_ns
        assert b.supervisor.hardware("cpu") == supervisor.Hardware(
            name="a fake", memory_bytes=0, memory_total_bytes=0
        )
