"""What is made of looks: ours told from others', devices found again, and when to look; with a fake NVML.

The scenes run the supervisor over real worker processes, and each look is a real process, too.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from fake_driver import Driver, a_gpu
from gpujobd import gpus, nvml, protocol, supervisor, worker
from gpujobd.core import inputs
from gpujobd.core.model import Device, DeviceState, YieldWhy
from gpujobd.gpus import gpu_of, sight, visible
from gpujobd.nvml import Gpu, Look, Nvml, Process
from harness import HANDLERS, Host, as_user
from harness import until as wait_until
from hypothesis import given
from hypothesis import strategies as st
from test_supervisor import Bench, fake, running, until

GIB = 1 << 30
TOTAL = 80 * GIB

# --- telling apart ----------------------------------------------------------------------------------------------------


def of(used: int, *processes: tuple[int, int | None], **more: Any) -> Gpu:
    told = tuple(Process(pid, held) for pid, held in processes)
    return Gpu(index=0, total_bytes=TOTAL, used_bytes=used, free_bytes=TOTAL - used, processes=told, **more)


def test_what_workers_hold_is_ours_and_the_rest_is_others() -> None:
    seen = sight(of(33 * GIB, (7, 10 * GIB), (8, 3 * GIB), (9, 20 * GIB)), {7: "embed", 8: "embed"}, 0)
    assert seen.held == {"embed": 13 * GIB}
    assert seen.others == (Process(9, 20 * GIB),)
    assert (seen.foreign_bytes, seen.room_bytes) == (20 * GIB, 60 * GIB)


def test_memory_that_nobody_is_seen_to_hold_is_not_ours() -> None:
    """A ghost, or a process in a container whose number is not told."""
    seen = sight(of(40 * GIB), {}, 0)
    assert (seen.others, seen.foreign_bytes, seen.room_bytes) == ((), 40 * GIB, 40 * GIB)


def test_where_pids_mean_nothing_the_estimate_is_ours_and_nobody_is_accused() -> None:
    seen = sight(of(12 * GIB, (1, 11 * GIB)), {700: "embed"}, 11 * GIB)
    assert (seen.others, seen.foreign_bytes, seen.room_bytes) == ((), GIB, TOTAL - GIB)


def test_worker_that_still_loads_is_no_stranger_where_pids_are_known_to_mean_nothing() -> None:
    seen = sight(of(6 * GIB, (1, 6 * GIB)), {700: "embed"}, 11 * GIB, foreign_pids=True)
    assert (seen.others, seen.foreign_bytes, seen.room_bytes) == ((), 0, -1)


def test_sizes_that_are_not_told_are_estimated_and_others_still_named() -> None:
    seen = sight(of(12 * GIB, (7, None), (9, None)), {7: "embed"}, 11 * GIB)
    assert (seen.others, seen.foreign_bytes) == ((Process(9, None),), GIB)


def test_little_is_in_nobodys_way() -> None:
    assert sight(of(400 << 20, (5, 300 << 20)), {}, 0).room_bytes == -1


def test_exclusive_device_of_another_process_has_no_room() -> None:
    assert sight(of(GIB, (5, GIB), compute_mode="exclusive"), {}, 0).room_bytes == 0
    assert sight(of(GIB, (5, GIB), compute_mode="exclusive"), {5: "embed"}, 0).room_bytes == -1


@given(
    st.integers(0, TOTAL),
    st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, TOTAL)), max_size=9),
    st.dictionaries(st.integers(1, 9), st.sampled_from("ab")),
    st.integers(0, TOTAL),
    st.integers(0, TOTAL),
)
def test_whatever_a_driver_tells_nothing_is_more_than_there_is(
    used: int,
    processes: list[tuple[int, int | None]],
    mine: dict[int, str],
    estimated: int,
    most: int,
) -> None:
    seen = sight(of(used, *processes), mine, estimated, most)
    assert 0 <= seen.foreign_bytes <= used
    assert -1 <= seen.room_bytes <= TOTAL
    assert not {process.pid for process in seen.others} & mine.keys()


GPUS = tuple(Gpu(index=n, uuid=f"GPU-{word}") for n, word in enumerate(["aa", "bb", "cc"]))


@pytest.mark.parametrize(
    ("device", "told", "uuid", "found"),
    [
        ("cuda:1", None, "", "GPU-bb"),
        ("cuda", None, "", "GPU-aa"),
        ("cuda:0", "2,0", "", "GPU-cc"),
        ("cuda:1", "2, 0", "", "GPU-aa"),
        ("cuda:0", "GPU-bb", "", "GPU-bb"),
        ("cuda:0", "GPU-b,GPU-a", "", "GPU-bb"),
        ("cuda:2", "2,0", "", ""),
        ("cuda:0", "", "", ""),
        ("cuda:0", "MIG-aa", "", ""),
        ("cuda:0", "2", "bb", "GPU-bb"),  # what the worker told, without the prefix, beats all counting
        ("cuda:0", None, "GPU-zz", ""),
        ("cuda:7", None, "", ""),
    ],
)
def test_device_is_found_as_cuda_counts(device: str, told: str | None, uuid: str, found: str) -> None:
    environ = {} if told is None else {"CUDA_VISIBLE_DEVICES": told}
    gpu = gpu_of(GPUS, device, visible(environ), uuid)
    assert (gpu.uuid if gpu else "") == found


# --- scenes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def eagerness(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"ACTIVE_S": 0.2, "WARM_S": 0.2, "WATCH_S": 0.4, "FRESH_S": 0.5}.items():
        monkeypatch.setattr(gpus, name, seconds)
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)
    monkeypatch.setattr(worker, "LEAVE_S", 0.3)
    monkeypatch.setattr(gpus, "CALM_S", 0.0)
    monkeypatch.setattr(gpus, "STALE_S", 0.3)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "nvml")


def house(folder: Path, driver: Driver, device: str = "cuda:0", **params: Any) -> Bench:
    sizes = {"vram_bytes": 10 * GIB, "device_bytes": TOTAL} | params
    handler = fake(**sizes)
    handlers = {name: driver.handler(params=handler.params, vram_gib=30.0, batch_max=10) for name in "ab"}
    b = Bench(folder, handlers)
    b.state.devices = {device: Device(name=device)}
    return b


def ours(b: Bench) -> list[list[int]]:
    """Its workers, as the driver would list them."""
    hardware = b.supervisor.hardware("cuda:0")
    return [[held.pid, 10 * GIB] for held in hardware.workers] if hardware else []


def seen(b: Bench, where: Callable[[inputs.DeviceSeen], bool]) -> Callable[[], bool]:
    return lambda: any(isinstance(r, inputs.DeviceSeen) and where(r) for r in b.reports)


async def served(b: Bench, job: int = 1, handler: str = "a") -> None:
    b.lease(job, handler, device="cuda:0")
    await b.until(inputs.Finished, job)


async def test_idle_worker_gives_its_memory_to_others_that_grow(tmp_path: Path, driver: Driver) -> None:
    async with running(house(tmp_path, driver)) as b:
        await served(b)
        driver.tells(gpus=[a_gpu(used=10 * GIB, processes=ours(b))])
        await until(lambda: b.supervisor._workers["cuda:0", "a"].foreign_then_bytes == 0)
        driver.tells(gpus=[a_gpu(used=77 * GIB, processes=[*ours(b), [9, 67 * GIB]])])
        gone = await b.until(inputs.Unloaded)
        assert gone.handler == "a"


async def test_others_that_have_always_been_there_unload_nobody(tmp_path: Path, driver: Driver) -> None:
    driver.tells(gpus=[a_gpu(used=38 * GIB, processes=[[9, 38 * GIB]])])
    async with running(house(tmp_path, driver)) as b:
        await served(b)
        grown = [[pid, 41 * GIB] for pid, _ in ours(b)]  # its allocator keeps what it once took
        driver.tells(gpus=[a_gpu(used=79 * GIB, processes=[*grown, [9, 38 * GIB]])])
        looks = driver.looks()
        await until(lambda: driver.looks() > looks + 3)
        assert not [r for r in b.reports if isinstance(r, inputs.Unloaded | inputs.MemoryWanted)]


async def test_work_is_asked_to_yield_when_others_take_what_is_left_and_leaves_then(
    tmp_path: Path,
    driver: Driver,
) -> None:
    async with running(house(tmp_path, driver, batch_s=0.02)) as b:
        lease = b.lease(1, "a", device="cuda:0", items=100_000)
        await b.until(inputs.CheckpointReached)
        driver.tells(gpus=[a_gpu(used=10 * GIB, processes=ours(b))])
        await until(lambda: b.supervisor._workers["cuda:0", "a"].foreign_then_bytes == 0)
        driver.tells(gpus=[a_gpu(used=TOTAL, processes=[*ours(b), [9, 70 * GIB]])])
        wanted = await b.until(inputs.MemoryWanted)
        assert (wanted.device, wanted.attempt) == ("cuda:0", lease.attempt)
        lease.yield_why = YieldWhy.ELSEWHERE
        b.supervisor.poke()
        back = await b.until(inputs.GaveBack)
        assert back.checkpoint.upto >= 10
        await b.until(inputs.Unloaded)


async def test_handler_without_a_place_is_not_loaded_and_the_lease_goes_back(
    tmp_path: Path,
    driver: Driver,
) -> None:
    driver.tells(gpus=[a_gpu(used=70 * GIB, processes=[[9, 70 * GIB]])])
    async with running(house(tmp_path, driver)) as b:
        b.lease(1, "a", device="cuda:0")
        await b.until(inputs.GaveBack)
        look = await b.until(inputs.DeviceSeen)
        assert b.reports.index(look) == 0, "the core hears of it first, or it would lease again"
        assert look.room_bytes == 10 * GIB
        assert look.detail == "other processes hold 70.0 GiB of 80.0 GiB: pid 9 70.0 GiB"
        assert "Loaded" not in b.kinds()


async def test_core_that_leases_all_the_same_is_told_again_what_was_seen(
    tmp_path: Path, driver: Driver
) -> None:
    """Else it would do so for ever: it has forgotten the driver for another illness, say."""
    driver.tells("mismatch")
    async with running(house(tmp_path, driver)) as b:
        for job in (1, 2, 3):
            b.lease(job, "a", device="cuda:0")
            back = await b.until(inputs.GaveBack, job)
            before = b.reports[b.reports.index(back) - 1]
            assert isinstance(before, inputs.DeviceSeen)
            assert before.trouble == "DriverMismatch"


async def test_load_that_runs_out_of_memory_beside_others_is_no_failure(
    tmp_path: Path, driver: Driver
) -> None:
    driver.tells(gpus=[a_gpu(used=20 * GIB, processes=[[9, 20 * GIB]])])
    async with running(house(tmp_path, driver, behave="load_runs_out")) as b:
        b.lease(1, "a", device="cuda:0")
        back = await b.until(inputs.GaveBack)
        assert back.cramped_bytes == 60 * GIB
        assert "CUDA out of memory" in b.log(1)


async def test_load_that_runs_out_of_memory_alone_is_its_own_failure(tmp_path: Path, driver: Driver) -> None:
    async with running(house(tmp_path, driver, behave="load_runs_out")) as b:
        b.lease(1, "a", device="cuda:0")
        failed = await b.until(inputs.LoadFailed)
        assert failed.error == "OutOfMemoryError: CUDA out of memory"


async def test_item_that_gives_way_to_others_brings_the_lease_back_with_the_room_there_was(
    tmp_path: Path,
    driver: Driver,
) -> None:
    async with running(house(tmp_path, driver, behave="gives_way")) as b:
        await until(lambda: driver.looks() > 0)
        b.lease(1, "a", device="cuda:0")
        back = await b.until(inputs.GaveBack)
        assert (back.checkpoint.upto, back.cramped_bytes) == (10, 50 * GIB)


@pytest.mark.parametrize("init", ["hang", "crash"])  # test_nvml.py has the others
async def test_driver_that_does_not_answer_keeps_nobody_from_work(
    tmp_path: Path,
    driver: Driver,
    init: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvml, "LIMIT_S", 0.5)
    driver.tells(init)
    async with running(house(tmp_path, driver)) as b:
        await served(b)
        hardware = b.supervisor.hardware("cuda:0")
        assert hardware is not None
        assert hardware.unseen.startswith("no NVML: ")


async def test_driver_that_was_replaced_stops_loads_until_it_answers(tmp_path: Path, driver: Driver) -> None:
    driver.tells("mismatch")
    async with running(house(tmp_path, driver)) as b:
        b.lease(1, "a", device="cuda:0")
        await b.until(inputs.GaveBack)
        assert seen(b, lambda look: look.trouble == "DriverMismatch")()
        b.state.devices["cuda:0"].state = DeviceState.DRIVER_MISMATCH
        driver.tells(gpus=[a_gpu()])
        await b.until(inputs.DeviceSeen, where=lambda look: not look.trouble)
        b.lease(2, "a", device="cuda:0")
        await b.until(inputs.Finished)


@pytest.mark.slow
async def test_gpu_that_is_lost_is_known_by_its_uuid_though_the_others_move_up(
    tmp_path: Path,
    driver: Driver,
) -> None:
    driver.tells(gpus=[a_gpu("GPU-a"), a_gpu("GPU-b")])
    async with running(house(tmp_path, driver, device="cuda:0")) as b:
        b.state.devices["cuda:1"] = Device(name="cuda:1", state=DeviceState.UNHEALTHY)
        await until(seen(b, lambda look: look.device == "cuda:1"))
        b.reports.clear()
        driver.tells(gpus=[a_gpu("GPU-b")])
        lost = await b.until(inputs.DeviceSeen, where=lambda look: bool(look.trouble))
        assert (lost.device, lost.trouble) == ("cuda:0", "DeviceLost")
        assert "GPU-a" in lost.detail
        driver.tells(gpus=[a_gpu("GPU-a", trouble="lost"), a_gpu("GPU-b")])
        lost = await b.until(inputs.DeviceSeen, where=lambda look: "GpuIsLost" in look.detail)
        assert (lost.device, lost.trouble) == ("cuda:0", "DeviceLost")
        b.state.devices["cuda:1"].state = DeviceState.OK


@pytest.mark.slow
async def test_container_that_sees_foreign_pids_accuses_nobody_and_keeps_its_models(
    tmp_path: Path,
    driver: Driver,
) -> None:
    async with running(house(tmp_path, driver)) as b:
        await served(b)
        driver.tells(gpus=[a_gpu(used=11 * GIB, processes=[[1, 11 * GIB]])])
        looks = driver.looks()
        await until(lambda: driver.looks() > looks + 1)
        await until(lambda: b.supervisor._gpus._foreign_pids)
        hardware = b.supervisor.hardware("cuda:0")
        assert hardware is not None
        assert hardware.sight is not None
        assert (hardware.sight.others, hardware.sight.room_bytes) == ((), -1)
        b.lease(2, "b", device="cuda:0")
        await b.until(inputs.Finished, 2)
        assert not [r for r in b.reports if isinstance(r, inputs.Unloaded)]


@pytest.mark.slow
async def test_replaced_driver_is_let_go_by_workers_that_nobody_needs(
    tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "UNUSED_S", 0.2)
    async with running(house(tmp_path, driver)) as b:
        await served(b)
        driver.tells("mismatch")
        await b.until(inputs.DeviceSeen, where=lambda look: bool(look.trouble))
        b.state.devices["cuda:0"].state = DeviceState.DRIVER_MISMATCH
        await b.until(inputs.Unloaded)


@pytest.mark.slow
async def test_exclusive_gpu_holds_one_model_at_a_time(tmp_path: Path, driver: Driver) -> None:
    driver.tells(gpus=[a_gpu(mode=3)])
    async with running(house(tmp_path, driver)) as b:
        await served(b)
        b.lease(2, "b", device="cuda:0")
        await b.until(inputs.Finished, 2)
        assert [r.handler for r in b.reports if isinstance(r, inputs.Unloaded)] == ["a"]


async def test_host_without_gpus_never_sees_a_look(tmp_path: Path, driver: Driver) -> None:
    b = house(tmp_path, driver)
    b.state.devices = {"cpu": Device(name="cpu")}
    async with running(b):
        b.lease(1, "a")
        await b.until(inputs.Finished)
        await b.supervisor.seen_lately()
        assert driver.looks() == 0


async def test_nothing_is_looked_at_while_nothing_depends_on_it_until_somebody_asks(
    tmp_path: Path,
    driver: Driver,
) -> None:
    async with running(house(tmp_path, driver)) as b:
        await until(seen(b, lambda _: True))
        assert math.isinf(b.supervisor._gpus._pause_s())
        driver.tells(gpus=[a_gpu(busy=77)])
        await trio.sleep(gpus.ASKED_S)  # what is younger is news enough
        await b.supervisor.seen_lately()
        hardware = b.supervisor.hardware("cuda:0")
        assert hardware is not None
        assert hardware.sight is not None
        assert hardware.sight.gpu.utilisation == 77


async def test_last_good_look_counts_while_the_driver_stumbles_and_then_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Look] = []
    reports: list[Any] = []
    b = Bench(tmp_path, {})
    b.state.devices = {"cuda:0": Device(name="cuda:0")}

    async def look(_: Nvml) -> Look:
        return looks[-1]

    monkeypatch.setattr(Nvml, "look", look)
    monkeypatch.setattr(gpus, "STALE_S", 60.0)
    known = gpus.Gpus(b.config, state=lambda: b.state, workers=list, report=reports.append, seen=lambda: None)
    crowded = of(70 * GIB, (9, 70 * GIB), uuid="GPU-a")
    for taken in (Look(gpus=(crowded,)), Look(trouble="hangs")):
        await known._take(taken)
    assert len(reports) == 1
    assert known.sight("cuda:0") is not None
    known._good_at -= 61
    await known._take(Look(trouble="hangs", detail="no answer"))
    assert reports[-1] == inputs.DeviceSeen(device="cuda:0")
    assert (known.sight("cuda:0"), known.trouble("cuda:0")) == (None, "no NVML: no answer")


async def test_others_count_with_the_most_they_held_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes and gives in turns moves no model."""
    monkeypatch.setattr(gpus, "CALM_S", 100.0)
    reports: list[Any] = []
    b = Bench(tmp_path, {})
    b.state.devices = {"cuda:0": Device(name="cuda:0")}
    known = gpus.Gpus(b.config, state=lambda: b.state, workers=list, report=reports.append, seen=lambda: None)
    for held in (10, 70, 0, 0):
        await known._take(Look(gpus=(of(held * GIB, uuid="GPU-a"),)))
    assert [look.room_bytes // GIB for look in reports] == [70, 10, 10, 10]


# --- the whole daemon -------------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Where other users may go, too."""
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def host(open_folder: Path) -> Iterator[tuple[Host, Driver]]:
    driver = Driver(open_folder / "nvml")
    handler = f'entry = "toys:Nothing"\npath = ["{HANDLERS}", "{driver.folder}"]\nvram_gib = 30\n'
    driver.tells(gpus=[a_gpu(used=70 * GIB, processes=[[os.getpid(), 70 * GIB]], busy=93)])
    with Host(open_folder / "host", 'devices = ["cuda:0"]\n', {"toy": handler}) as host:
        yield host, driver


def device_of(host: Host) -> protocol.DeviceView:
    with host.client() as client:
        (device,) = client.ask(protocol.Devices).devices
        assert isinstance(device, protocol.DeviceView)
        return device


def test_job_waits_for_those_who_hold_the_device_and_runs_when_they_leave(host: tuple[Host, Driver]) -> None:
    daemon, driver = host
    with daemon.client() as client:
        job = client.submit("toy", [{}] * 3).job
        waits = wait_until(
            lambda: (j := client.job(job)).reason == "DeviceBusyElsewhere" and j, "it to wait for others"
        )
    assert waits.reason_detail == (
        f"cuda:0: other processes hold 70.0 GiB of 80.0 GiB: pid {os.getpid()} 70.0 GiB"
    )
    shown = daemon.jobctl("device").stdout
    for word in (
        "busy_elsewhere since",
        "OtherProcesses: other processes hold 70.0 GiB",
        "93 % busy",
        "41 °C",
        "driver 610.43",
        "not ours: 70.0 GiB",
    ):
        assert word in shown, shown
    driver.tells(gpus=[a_gpu()])
    wait_until(lambda: device_of(daemon).state == "ok", "a look that sees them gone")
    with daemon.client() as client:
        wait_until(lambda: client.job(job).state == "completed", "it to run")
    entries = daemon.log()
    assert "device cuda:0 is busy elsewhere" in entries
    assert "device cuda:0 has room for every handler again" in entries


@pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")
def test_whose_processes_they_are_is_for_administrators(host: tuple[Host, Driver]) -> None:
    daemon, _ = host
    (named,) = device_of(daemon).others
    assert (named.pid, named.user) == (os.getpid(), "root")
    assert named.command == psutil.Process().name()
    (unnamed,) = as_user(30_104, lambda: device_of(daemon).others)
    assert unnamed == protocol.OtherView(pid=os.getpid(), bytes=70 * GIB)


def test_without_nvml_it_is_said_so_and_jobs_run(open_folder: Path) -> None:
    handler = f'entry = "toys:Nothing"\npath = ["{HANDLERS}", "{open_folder}"]\n'
    (open_folder / "pynvml.py").write_text("raise ImportError('none here')\n")
    with Host(open_folder / "host", 'devices = ["cuda:0"]\n', {"toy": handler}) as daemon:
        with daemon.client() as client:
            job = client.submit("toy", [{}]).job
            wait_until(lambda: client.job(job).state == "completed", "it to run")
        assert str(device_of(daemon).unseen).startswith("no NVML: ")
        assert "no NVML: " in daemon.jobctl("device").stdout
