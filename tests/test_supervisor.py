"""The supervisor over real processes that speak the real pipe; only what they compute is a fake."""

from __future__ import annotations

import contextlib
import ctypes
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
from gpujobd.worker_process import MAIN

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


async def until(true: Callable[[], object]) -> None:
    """Wait for what no report tells."""
    with trio.fail_after(HANG_S):
        while not true():  # noqa: ASYNC110  # files and counters have no event
            await trio.sleep(0.01)


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
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.supervisor.run)
            yield bench
            nursery.cancel_scope.cancel()
    finally:
        be_no_subreaper()
    assert not [p for p in psutil.Process().children(recursive=True) if p.pid not in before]


def be_no_subreaper() -> None:
    """A supervisor without cgroups made this very process one: orphans of later tests would stay here as zombies."""
    assert ctypes.CDLL(None).prctl(cgroup.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


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
        hardware = b.supervisor.hardware("cpu")
        assert hardware is not None
        assert (hardware.name, hardware.memory_bytes, hardware.memory_total_bytes) == ("a fake", 0, 0)
        assert (hardware.sight, hardware.unseen) == (None, "")


def leases_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_second_lease_goes_to_the_same_warm_worker_and_pays_no_load(tmp_path: Path) -> None:
    record = tmp_path / "leases"
    async with running(bench(tmp_path, leases=str(record))) as b:
        b.lease(1)
        await b.until(inputs.Finished)
        b.lease(2)
        await b.until(inputs.Finished, 2)
        first, second = leases_of(record)
        assert first["pid"] == second["pid"]
        assert (second["job"], second["attempt"]) == (2, 5)
        assert len([r for r in b.reports if isinstance(r, inputs.Loaded)]) == 1
        last = await b.until(inputs.CheckpointReached, 5)
        assert last.timings.load_s == 0.0


async def test_lease_message_carries_all_a_worker_needs(tmp_path: Path) -> None:
    record = tmp_path / "leases"
    async with running(bench(tmp_path, leases=str(record))) as b:
        b.lease(
            items=50,
            params={"normalize": True},
            failures_max=3,
            checkpoint=Checkpoint(upto=20, done=19, failed=1, results_bytes=7),
            suspects=(Span(21, 30),),
        )
        await b.until(inputs.Finished)
        (lease,) = leases_of(record)
        del lease["pid"]
        assert lease == {
            "job": 1,
            "attempt": 5,
            "dir": str(b.job_folder(1)),
            "items": 50,
            "batch_max": 10,
            "job_params": {"normalize": True},
            "failures_max": 3,
            "checkpoint": {
                "upto": 20,
                "deferred": [],
                "results_bytes": 7,
                "results_crc": 0,
                "errors_bytes": 0,
                "errors_crc": 0,
                "done": 19,
                "failed": 1,
                "failure_codes": {},
            },
            "suspects": [[21, 30]],
            "condemned": [],
            "canary": 0,
            "gives_way": False,
        }


async def test_condemned_lines_come_with_a_canary_that_is_above_suspicion(tmp_path: Path) -> None:
    record = tmp_path / "leases"
    async with running(bench(tmp_path, leases=str(record))) as b:
        lease = b.lease(items=50, canary_due=(20,), condemned=(7,), checkpoint=Checkpoint(upto=20, done=20))
        lease.canary = True
        passed = await b.until(inputs.CanaryOk)
        assert passed.attempt == 5
        await b.until(inputs.Finished)
        (sent,) = leases_of(record)
        assert (sent["condemned"], sent["canary"]) == ([7, 20], 19)


async def test_lines_that_wait_for_a_canary_are_not_condemned_without_one(tmp_path: Path) -> None:
    record = tmp_path / "leases"
    async with running(bench(tmp_path, leases=str(record))) as b:
        b.lease(items=50, canary_due=(20,), condemned=(7,))
        await b.until(inputs.Finished)
        (sent,) = leases_of(record)
        assert (sent["condemned"], sent["canary"]) == ([7], 0)


# --- asking back ------------------------------------------------------------------------------------------------------


async def test_yield_in_the_state_brings_the_lease_back_and_keeps_the_worker(tmp_path: Path) -> None:
    async with running(bench(tmp_path, batch_s=0.05)) as b:
        lease = b.lease(items=100_000)
        await b.until(inputs.CheckpointReached)
        lease.yield_why = YieldWhy.TURN_OVER
        b.supervisor.poke()
        back = await b.until(inputs.GaveBack)
        assert back.checkpoint.upto >= 10
        assert b.state.devices["cpu"].lease is None
        b.lease(2, items=20)
        await b.until(inputs.Finished)
        assert b.kinds().count("Loaded") == 1


async def test_yield_before_the_worker_has_the_job_gives_it_back_untouched(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="load_hangs")) as b:
        checkpoint = Checkpoint(upto=20, done=20)
        lease = b.lease(checkpoint=checkpoint)
        lease.yield_why = YieldWhy.CANCEL
        back = await b.until(inputs.GaveBack)
        assert back.checkpoint == checkpoint


async def test_lease_that_left_the_state_is_fenced(tmp_path: Path) -> None:
    async with running(bench(tmp_path, batch_s=0.02)) as b:
        b.lease(items=100_000)
        await b.until(inputs.CheckpointReached)
        b.state.devices["cpu"].lease = None
        b.supervisor.poke()
        await b.until(inputs.Unloaded)
        assert not [r for r in b.reports if isinstance(r, LAST)]
        b.lease(2, items=20)
        finished = await b.until(inputs.Finished)
        assert finished.attempt == 5
        assert b.kinds().count("Loaded") == 2


# --- loads that fail --------------------------------------------------------------------------------------------------


async def test_failed_load_is_reported_with_its_last_line_and_logged_whole(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="load_fails")) as b:
        b.lease()
        failed = await b.until(inputs.LoadFailed)
        assert (failed.attempt, failed.error) == (5, "ImportError: no torch here")
        assert "about to fail" in b.log(1)
        assert "Traceback: the whole of it" in b.log(1)


async def test_death_while_loading_is_a_failed_load(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="load_dies")) as b:
        b.lease()
        failed = await b.until(inputs.LoadFailed)
        assert failed.error == "killed by SIGSEGV"
        assert "Segmentation fault" in b.log(1)  # faulthandler's stacks


async def test_load_that_takes_too_long_is_dumped_and_failed(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="load_hangs", timeouts={"load_timeout_s": 0.3})) as b:
        b.lease()
        failed = await b.until(inputs.LoadFailed)
        assert failed.error == "loading took longer than 0.3 s"
        assert "on_load" in b.log(1)


async def test_interpreter_that_cannot_be_run_is_a_failed_load(tmp_path: Path) -> None:
    b = Bench(tmp_path, {"fake": Handler(entry="fake:Fake", python="/nonexistent/python")})
    async with running(b):
        b.lease()
        failed = await b.until(inputs.LoadFailed)
        assert failed.error.startswith("/nonexistent/python cannot be started")


async def test_handler_that_is_not_configured_any_more_is_a_failed_load(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        b.lease(handler="gone")
        failed = await b.until(inputs.LoadFailed)
        assert failed.error == "handler gone is not configured any more"


# --- deaths -------------------------------------------------------------------------------------------------------------


async def test_segfault_loses_the_lease_and_names_the_suspects(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="segfault")) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert b.kinds() == ["Loaded", "CheckpointReached", "Lost", "Unloaded"]
        assert (lost.cause, lost.detail) == ("died", "killed by SIGSEGV")
        assert lost.suspects == (Span(21, 30), Span(11, 20))
        assert "segfault" in b.log(1)  # the function's name, from faulthandler's stacks


async def test_suspects_of_another_attempt_accuse_nobody(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="stale_suspects")) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail, lost.suspects) == ("died", "exit status 3", ())


async def test_exit_without_a_result_loses_the_lease(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="exit_without_result")) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == ("died", "exit status 0")


async def test_warm_worker_that_dies_is_unloaded_and_replaced(tmp_path: Path) -> None:
    record = tmp_path / "leases"
    async with running(bench(tmp_path, leases=str(record))) as b:
        b.lease(1)
        await b.until(inputs.Finished)
        psutil.Process(leases_of(record)[0]["pid"]).kill()
        await b.until(inputs.Unloaded)
        b.lease(2)
        await b.until(inputs.Finished, 2)
        assert b.kinds().count("Loaded") == 2


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        ("garbage", "protocol violation: not a message"),
        ("endless_line", "protocol violation: a line of over 1048576 bytes"),
        ("heartbeat_flood", "protocol violation: more than 1000 messages in a second"),
        ("foreign_attempt", "protocol violation: a message of attempt 6, the lease is 5"),
        ("backwards", "protocol violation: checkpoint goes backwards: upto from 20 to 10"),
        ("finishes_early", "protocol violation: finished with 40 of 50 items left"),
    ],
)
async def test_worker_that_breaks_the_protocol_is_killed(tmp_path: Path, behave: str, says: str) -> None:
    async with running(bench(tmp_path, behave=behave)) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert lost.cause == "died"
        assert lost.detail.startswith(says)


async def test_heartbeat_of_the_lease_before_is_no_violation(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="late_heartbeat")) as b:
        b.lease()
        await b.until(inputs.Finished)


@pytest.mark.parametrize("cause", ["disk_full", "output_damaged", "failures_max", "input_lost"])
async def test_lease_lost_by_the_jobs_files_keeps_the_worker(tmp_path: Path, cause: str) -> None:
    async with running(bench(tmp_path, behave="lose", cause=cause)) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail, lost.suspects) == (cause, "as told", ())
        assert b.kinds() == ["Loaded", "CheckpointReached", "Lost"]
        b.lease(2)
        await b.until(inputs.Lost, 2)
        assert b.kinds().count("Loaded") == 1
        assert b.supervisor.progress(2) is None


@pytest.mark.parametrize(("cause", "accused"), [("poisoned", (Span(11, 20),)), ("canary", ()), ("died", ())])
async def test_last_words_of_a_worker_are_its_cause_of_loss(
    tmp_path: Path, cause: str, accused: tuple[Span, ...]
) -> None:
    async with running(bench(tmp_path, behave="lose_and_exit", cause=cause)) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail, lost.suspects) == (cause, "as told", accused)
        assert b.kinds() == ["Loaded", "CheckpointReached", "Lost", "Unloaded"]


# --- hangs --------------------------------------------------------------------------------------------------------------


async def test_stopped_worker_is_silent(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="stop", timeouts={"silent_timeout_s": 0.4})) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == ("silent", "no message for 0.4 s; it is stopped")


async def test_heartbeats_without_progress_are_a_stall_and_the_log_shows_where(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="spin", stall_timeout_s=0.4)) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == ("stalled", "no call of the handler returned for 0.4 s")
        assert lost.suspects == (Span(1, 10),)
        assert "spinning_for_ever" in b.log(1)
        assert "[gpujobd: worker" in b.log(1)


async def test_stopped_warm_worker_is_ended_without_a_lease_lost(tmp_path: Path) -> None:
    record = tmp_path / "leases"
    async with running(bench(tmp_path, leases=str(record), timeouts={"silent_timeout_s": 0.5})) as b:
        b.lease(1)
        await b.until(inputs.Finished)
        psutil.Process(leases_of(record)[0]["pid"]).suspend()
        await b.until(inputs.Unloaded)
        assert b.kinds() == ["Loaded", "CheckpointReached", "Finished", "Unloaded"]


async def test_daemon_that_was_held_up_does_not_take_it_for_silence(tmp_path: Path) -> None:
    async with running(bench(tmp_path, batch_s=0.05, timeouts={"silent_timeout_s": 1.0})) as b:
        b.lease(items=300)
        await b.until(inputs.CheckpointReached)
        held_up_by_a_debugger(1.5)
        await b.until(inputs.Finished)
        assert not [r for r in b.reports if isinstance(r, inputs.Lost)]


def held_up_by_a_debugger(seconds: float) -> None:
    import time

    time.sleep(seconds)


# --- what is left behind ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cgroup", "subreaper"])
def holding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "subreaper":
        monkeypatch.setattr(cgroup, "delegated", lambda: None)
    elif cgroup.delegated() is None:
        pytest.skip("no cgroup v2 subtree may be written here")
    return request.param


@pytest.mark.parametrize("marked", [True, False])
async def test_daemonised_grandchild_is_found_and_killed(tmp_path: Path, holding: str, marked: bool) -> None:
    orphan = tmp_path / "orphan"
    async with running(bench(tmp_path, behave="daemonise", orphan=str(orphan), marked=marked)) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert lost.detail == "exit status 7"
        assert not lives(int(orphan.read_text()))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_lock_still_held_makes_the_device_unkillable_until_it_is_free(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="die_when_told")) as b:
        b.lease()
        await b.until(inputs.CheckpointReached)
        lock = b.job_folder(1) / "lock"
        lock.unlink()
        held = os.open(lock, os.O_CREAT | os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)  # as a child of the worker would hold it that cannot be killed
        (b.job_folder(1) / "die").touch()
        unkillable = await b.until(inputs.Unkillable)
        assert unkillable.device == "cpu"
        assert unkillable.detail == "the lock of job 1 is held after its worker's death"
        await trio.sleep(0.5)
        assert b.kinds() == ["Loaded", "CheckpointReached", "Unkillable"]
        os.close(held)
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == ("died", "killed by SIGKILL")


async def test_job_whose_lock_an_earlier_worker_holds_waits_for_it(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        b.job_folder(1).mkdir()
        fd = os.open(b.job_folder(1) / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        b.lease()
        unkillable = await b.until(inputs.Unkillable)
        assert unkillable.detail == "the lock of job 1 is held by a process of an earlier lease"
        assert "CheckpointReached" not in b.kinds()
        os.close(fd)
        await b.until(inputs.Finished)


async def test_stopping_ends_idle_and_busy_workers_and_leaves_nothing(tmp_path: Path, holding: str) -> None:
    handlers = {"idle": fake(), "busy": fake(behave="spin"), "deaf": fake(behave="deaf")}
    b = Bench(tmp_path, handlers)
    b.state.devices["cuda:0"] = Device(name="cuda:0")
    b.state.devices["cuda:1"] = Device(name="cuda:1")
    async with running(b):  # which looks for what is left
        b.lease(1, "idle")
        b.lease(2, "deaf", device="cuda:0")
        await b.until(inputs.Finished, 2)
        b.lease(3, "busy", device="cuda:1")
        await until(lambda: b.supervisor.progress(3))
    base = cgroup.delegated()
    assert not base or not list(base.glob(f"{cgroup.PREFIX}-{os.getpid()}-*"))


async def test_hurry_kills_what_runs_and_says_so(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="spin")) as b:
        b.lease()
        await until(lambda: b.supervisor.progress(1))
        b.supervisor.hurry()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == ("died", "the daemon was told to stop at once")


# --- output -------------------------------------------------------------------------------------------------------------


async def test_what_is_printed_during_the_lease_is_the_jobs_log_and_nothing_else(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        b.lease(1)
        await b.until(inputs.Finished)
        b.lease(2)
        await b.until(inputs.Finished, 2)
        await until(lambda: sorted(set(b.logged)) == [1, 2])
        assert b.log(1) == "job 1 begins\n"
        assert b.log(2) == "job 2 begins\n"
        assert (b.job_folder(1) / "log").stat().st_mode & 0o777 == 0o600


async def test_flood_of_output_is_capped_counted_and_finishes(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="flood", timeouts={"log_bytes_max": 100_000})) as b:
        b.lease()
        await b.until(inputs.Finished)
        await until(lambda: "log full" in b.log(1))
        said = 64 * 65536 + len("job 1 begins\n")
        assert b.log(1).endswith(f"\n[log full: {said - 100_000} more bytes dropped]\n")
        assert len(b.log(1)) < 100_100


async def test_endless_flood_ends_as_silence_and_keeps_its_stacks(tmp_path: Path) -> None:
    timeouts = {"log_bytes_max": 1000, "silent_timeout_s": 0.4}
    async with running(bench(tmp_path, behave="endless_flood", timeouts=timeouts)) as b:
        b.lease()
        lost = await b.until(inputs.Lost)
        assert lost.cause == "silent"
        assert (b.job_folder(1) / "log").stat().st_size < 400_000


async def test_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        b.job_folder(1).mkdir()
        (tmp_path / "precious").write_text("untouched")
        (b.job_folder(1) / "log").symlink_to(tmp_path / "precious")
        b.lease()
        await b.until(inputs.Finished)
    assert (tmp_path / "precious").read_text() == "untouched"


# --- warm workers -------------------------------------------------------------------------------------------------------


def three_handlers(folder: Path, **params: Any) -> Bench:
    return Bench(folder, {name: fake(**params) for name in ("a", "b", "c")})


async def test_third_handler_on_a_cpu_evicts_the_one_least_recently_used(tmp_path: Path) -> None:
    async with running(three_handlers(tmp_path)) as b:
        for job, handler in enumerate(["a", "b", "a", "c"], 1):
            b.lease(job, handler)
            await b.until(inputs.Finished, job)
        gone = [r.handler for r in b.reports if isinstance(r, inputs.Unloaded)]
        assert gone == ["b"]


async def test_evicted_worker_that_will_not_leave_is_killed(tmp_path: Path) -> None:
    async with running(three_handlers(tmp_path, behave="deaf")) as b:
        for job, handler in enumerate(["a", "b", "c"], 1):
            b.lease(job, handler)
            await b.until(inputs.Finished, job)
        assert [r.handler for r in b.reports if isinstance(r, inputs.Unloaded)] == ["a"]


async def test_workers_stay_as_long_as_their_memory_fits_the_device(tmp_path: Path) -> None:
    gib = 1 << 30
    b = three_handlers(tmp_path, vram_gib=3.0, vram_bytes=3 * gib, device_bytes=12 * gib)
    b.state.devices = {"cuda:0": Device(name="cuda:0")}
    async with running(b):
        for job, handler in enumerate(["a", "b", "c"], 1):
            b.lease(job, handler, device="cuda:0")
            await b.until(inputs.Finished, job)
        assert not [r for r in b.reports if isinstance(r, inputs.Unloaded)]
        hardware = b.supervisor.hardware("cuda:0")
        assert hardware is not None
        assert (hardware.memory_bytes, hardware.memory_total_bytes) == (9 * gib, 12 * gib)
        assert [(held.handler, held.bytes) for held in hardware.workers] == [(n, 3 * gib) for n in "abc"]


async def test_worker_that_does_not_fit_beside_the_others_takes_their_place(tmp_path: Path) -> None:
    gib = 1 << 30
    b = three_handlers(tmp_path, vram_gib=5.0, vram_bytes=5 * gib, device_bytes=12 * gib)
    b.state.devices = {"cuda:0": Device(name="cuda:0")}
    async with running(b):
        for job, handler in enumerate(["a", "b", "c"], 1):
            b.lease(job, handler, device="cuda:0")
            await b.until(inputs.Finished, job)
        assert [r.handler for r in b.reports if isinstance(r, inputs.Unloaded)] == ["a"]


async def test_reload_lets_idle_workers_of_changed_handlers_go_and_keeps_the_others(tmp_path: Path) -> None:
    async with running(Bench(tmp_path, {"a": fake(), "b": fake()})) as b:
        b.lease(1, "a")
        await b.until(inputs.Finished)
        b.lease(2, "b")
        await b.until(inputs.Finished, 2)
        changed = Config(file=b.config.file, handlers={"a": fake(), "b": fake(batch_s=0.02)})
        b.supervisor.reload(changed)
        gone = await b.until(inputs.Unloaded)
        assert gone.handler == "b"
        b.lease(3, "a")
        await b.until(inputs.Finished, 3)
        assert b.kinds().count("Loaded") == 2


async def test_reload_lets_a_busy_worker_finish_its_lease_first(tmp_path: Path) -> None:
    async with running(bench(tmp_path, batch_s=0.05)) as b:
        b.lease(items=100)
        await b.until(inputs.CheckpointReached)
        b.supervisor.reload(Config(file=b.config.file, handlers={}))
        await b.until(inputs.Finished)
        await b.until(inputs.Unloaded)


async def test_progress_follows_heartbeats_and_checkpoints(tmp_path: Path) -> None:
    async with running(bench(tmp_path, batch_s=0.02, timeouts={"silent_timeout_s": 0.4})) as b:
        b.lease(items=100_000)
        await b.until(inputs.CheckpointReached, 20)
        await until(lambda: (p := b.supervisor.progress(1)) and p.line >= 100)
        p = b.supervisor.progress(1)
        assert p is not None
        assert p.batch == 10
        assert 50 < p.items_per_s < 550  # at most 10 items each 0.02 s
        assert b.supervisor.progress(2) is None


async def test_disk_that_is_full_before_the_lease_begins_loses_it(tmp_path: Path) -> None:
    import errno

    async def prepare(job: Job) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    b = bench(tmp_path)
    b.supervisor._prepare_files = prepare
    async with running(b):
        b.lease()
        lost = await b.until(inputs.Lost)
        assert lost.cause == "disk_full"


async def test_job_too_large_for_a_message_is_lost_and_the_worker_stays(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        b.lease(1, params={"prompt": '"' * 600_000})
        lost = await b.until(inputs.Lost)
        assert lost.cause == "input_lost"
        b.lease(2)
        await b.until(inputs.Finished)
        assert b.kinds().count("Loaded") == 1


async def test_params_of_a_handler_that_fit_no_message_are_a_failed_load(tmp_path: Path) -> None:
    async with running(bench(tmp_path, prompt="x" * (2 << 20))) as b:
        b.lease()
        failed = await b.until(inputs.LoadFailed)
        assert failed.error.startswith("params: ")


async def test_lock_that_became_a_link_holds_up_nobody(tmp_path: Path) -> None:
    async with running(bench(tmp_path, behave="die_when_told")) as b:
        b.lease()
        await b.until(inputs.CheckpointReached)
        (b.job_folder(1) / "lock").unlink()
        (b.job_folder(1) / "lock").symlink_to("lock")
        (b.job_folder(1) / "die").touch()
        await b.until(inputs.Lost)


async def test_every_look_is_noted_for_the_watchdog(tmp_path: Path) -> None:
    async with running(bench(tmp_path)) as b:
        before = trio.current_time()
        await until(lambda: b.supervisor.looked_at() > before)


# --- the real worker ----------------------------------------------------------------------------------------------------


def real(folder: Path, *does: str, entry: str = "faults:Faulty", **handler: Any) -> Bench:
    """Items of which each does what it says, and for all others gives back its text."""
    handlers = {"fake": Handler(entry=entry, path=(str(FAKE.parent / "handlers"),), batch_max=4, **handler)}
    b = Bench(folder, handlers, silent_timeout_s=2.0, checkpoint_s=0.05)
    b.supervisor._main = MAIN
    b.job_folder(1).mkdir()
    items = [json.dumps({"text": str(n), "do": do}) + "\n" for n, do in enumerate(does)]
    (b.job_folder(1) / "input.jsonl").write_text("".join(items))
    return b


def outputs(b: Bench) -> list[str]:
    results = (b.job_folder(1) / "results.jsonl").read_text().splitlines()
    return [json.loads(result)["output"]["text"] for result in results]


async def test_real_worker_finishes_a_job(tmp_path: Path) -> None:
    async with running(real(tmp_path, *[""] * 50)) as b:
        b.lease(items=50)
        finished = await b.until(inputs.Finished)
        assert outputs(b) == [str(n) for n in range(50)]
        assert finished.checkpoint.results_bytes == (b.job_folder(1) / "results.jsonl").stat().st_size


async def test_real_worker_gives_back_and_goes_on_where_it_was(tmp_path: Path) -> None:
    async with running(real(tmp_path, *[""] * 60, entry="trouble:Slow")) as b:
        lease = b.lease(items=60)
        await b.until(inputs.CheckpointReached)
        lease.yield_why = YieldWhy.TURN_OVER
        b.supervisor.poke()
        back = await b.until(inputs.GaveBack)
        assert 0 < back.checkpoint.upto < 60
        b.lease(items=60, checkpoint=back.checkpoint)
        await b.until(inputs.Finished)
        assert outputs(b) == [str(n) for n in range(60)]
        assert b.kinds().count("Loaded") == 1


@pytest.mark.parametrize(
    ("do", "cause", "detail"),
    [
        ("segfault", "died", "killed by SIGSEGV"),
        ("exit", "died", "exit status 3"),
        ("hang", "stalled", "no call of the handler returned for 0.5 s"),
    ],
)
async def test_real_worker_names_the_item_in_hand(tmp_path: Path, do: str, cause: str, detail: str) -> None:
    async with running(real(tmp_path, *[""] * 13, do, *[""] * 6, stall_timeout_s=0.5)) as b:
        b.lease(items=20, suspects=(Span(1, 20),))  # one by one
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == (cause, detail)
        assert lost.suspects == (Span(14, 14), Span(13, 13))
        assert "in suffer" in b.log(1) or do == "exit"  # the stacks


@pytest.mark.slow
async def test_real_worker_that_is_stopped_is_silent(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    async with running(real(tmp_path, *[""] * 5000, entry="trouble:Slow")) as b:
        b.lease(items=5000)
        await b.until(inputs.CheckpointReached)
        (pid,) = {child.pid for child in psutil.Process().children()} - before
        psutil.Process(pid).suspend()
        lost = await b.until(inputs.Lost)
        assert (lost.cause, lost.detail) == ("silent", "no message for 2 s; it is stopped")
