"""Looks at the driver by real processes: the NVML in them is a fake, what it does to the process is real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trio
from fake_driver import Driver, a_gpu
from gpujobd import nvml
from gpujobd.config import Config, Handler
from gpujobd.nvml import Gpu, Look, Nvml, Process

GIB = 1 << 30


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "nvml")


def asker(driver: Driver) -> Nvml:
    return Nvml(Config(handlers={"fake": driver.handler()}))


async def test_look_tells_all_that_the_driver_does_and_leaves_out_the_rest(driver: Driver) -> None:
    gpu = a_gpu(used=3 * GIB, busy=93, reasons=0x24, processes=[[7, GIB], [9, None]], graphics=[[7, 2 * GIB]])
    driver.tells(gpus=[gpu])
    look = await asker(driver).look()
    assert look == Look(
        driver="610.43",
        gpus=(
            Gpu(
                index=0,
                uuid="GPU-a",
                name="a fake GPU",
                total_bytes=80 * GIB,
                used_bytes=3 * GIB,
                free_bytes=77 * GIB,
                utilisation=93,
                temperature_c=41,
                power_w=71.5,
                power_limit_w=None,  # not supported
                throttled=("power_cap", "thermal"),
                processes=(Process(7, 2 * GIB), Process(9, None)),
            ),
        ),
    )


async def test_process_is_gone_when_the_look_is_there(driver: Driver) -> None:
    await asker(driver).look()
    (pid,) = (driver.folder / "looks").read_text().split()
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize(
    ("init", "trouble", "says"),
    [
        ("crash", "failed", "status -11"),
        ("babble", "failed", "status 0: no line of ours"),
        ("nonsense", "nonsense", "gpus"),
        ("flood", "hangs", ""),
        ("mismatch", "mismatch", "Driver/library version mismatch"),
        ("no_driver", "no_driver", "Driver Not Loaded"),
        ("no_library", "no_library", "NVML Shared Library Not Found"),
    ],
)
async def test_look_that_fails_is_one_word_and_the_next_may_be_well(
    driver: Driver, init: str, trouble: str, says: str
) -> None:
    driver.tells(init)
    asks = asker(driver)
    look = await asks.look()
    assert (look.trouble, look.gpus) == (trouble, ())
    assert says in look.detail
    driver.tells(gpus=[a_gpu()])
    assert (await asks.look()).trouble == ""


async def test_driver_that_hangs_is_given_up(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIMIT_S", 0.5)
    driver.tells("hang")
    look = await asker(driver).look()
    assert look == Look(trouble="hangs", detail="no answer in 0.5 s")


async def test_process_that_cannot_be_killed_is_left_alone_and_no_other_is_started(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "LIMIT_S", 0.5)
    monkeypatch.setattr(nvml, "KILL_S", 0.05)
    monkeypatch.setattr(trio.Process, "kill", lambda _: None)  # as in an uninterruptible sleep
    driver.tells("hang")
    asks = asker(driver)
    first, second = await asks.look(), await asks.look()
    assert (first.trouble, second.trouble) == ("hangs", "hangs")
    stuck = asks._stuck
    assert stuck is not None
    assert str(stuck.pid) in second.detail
    assert driver.looks() <= 1
    os.kill(stuck.pid, signal.SIGKILL)
    await stuck.wait()
    driver.tells(gpus=[a_gpu()])
    monkeypatch.setattr(nvml, "LIMIT_S", 10.0)
    assert (await asks.look()).trouble == ""


async def test_cancelled_look_leaves_no_process(driver: Driver) -> None:
    driver.tells("hang")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asker(driver).look)
        with trio.fail_after(20):
            while not driver.looks():  # noqa: ASYNC110  # another process writes it
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert not psutil.pid_exists(int((driver.folder / "looks").read_text()))


async def test_interpreters_are_asked_until_one_has_it_and_that_one_first_from_then_on(
    driver: Driver, tmp_path: Path
) -> None:
    bare, broken = tmp_path / "bare", Handler(entry="a:B", python="/nonexistent/python")
    bare.write_text(f'#!/bin/sh\necho >> {tmp_path}/asked\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    without = Handler(entry="a:B", python=str(bare))
    asks = Nvml(Config(handlers={"a": without, "z": driver.handler()}))
    assert [(await asks.look()).trouble for _ in range(3)] == ["", "", ""]
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    nobody = await Nvml(Config(handlers={"z": broken})).look()
    assert nobody.trouble in ("failed", "no_library")


def test_script_hides_no_module_of_others(driver: Driver, tmp_path: Path) -> None:
    """Its folder has a lines.py, a call.py and so on: what NVML's module imports must not be one of these."""
    (driver.folder / "lines.py").write_text("MINE = True\n")
    text = (driver.folder / "pynvml.py").read_text()
    (driver.folder / "pynvml.py").write_text(text.replace("import json\n", "import json\nimport lines\n"))
    done = subprocess.run(
        [sys.executable, "-B", str(nvml.SCRIPT), str(driver.folder)], capture_output=True, check=True
    )
    assert b'"driver": "610.43"' in done.stdout
