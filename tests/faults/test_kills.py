"""Rows 5, 6 and 8 to 10: the process of the store, the kernel file system under it, or the disk under that, ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent


def kill(how: str, folder: Path, seed: int, kills: int) -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "kill_store.py"), how, str(folder), str(seed), str(kills)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{kills} kills" in run.stdout


@pytest.mark.parametrize("block", range(2))
def test_kill_9_at_a_random_time_loses_nothing_acknowledged(block: int, tmp_path: Path, cases, count) -> None:
    for seed in cases(750 // 25):
        kill("time", tmp_path / str(seed), seed, 25)
        count(5, 25)


@pytest.mark.parametrize("block", range(2))
def test_kill_9_at_a_system_call_loses_nothing_acknowledged(
    block: int, tmp_path: Path, cases, count, needs
) -> None:
    needs(6, "strace")
    for seed in cases(150 // 10):
        kill("call", tmp_path / str(seed), seed, 10)
        count(6, 10)


@pytest.mark.parametrize(
    ("how", "times"), [("cut-ext4", 200), ("cut-xfs", 100), ("die-ext4", 100), ("die-xfs", 50)]
)
def test_a_kernel_file_system_that_ends_takes_nothing_acknowledged_with_it(
    how: str, times: int, tmp_path: Path, cases, count, needs
) -> None:
    needs(8, "root", "loop", f"mkfs.{how[4:]}")
    for seed in cases(times // 25):
        kill(how, tmp_path / str(seed), seed, 25)
        count(8, 25)


def test_a_power_cut_below_the_file_system_loses_nothing_acknowledged(
    tmp_path: Path, cases, count, needs
) -> None:
    needs(9, "root", "loop", "fuse", "mkfs.ext4")
    for seed in cases(4):
        kill("tear-ext4", tmp_path / str(seed), seed, 10)
        count(9, 10)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_writes_that_fail_below_the_file_system_lose_nothing_acknowledged(
    kind: str, tmp_path: Path, cases, count, needs
) -> None:
    needs(10, "root", "loop", "fuse", f"mkfs.{kind}")
    for seed in cases(2):
        kill(f"fail-{kind}", tmp_path / str(seed), seed, 2)
        count(10, 2)
