"""The suites bite: on every broken variant of the program, the tests that are named for it fail; on the whole one they pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from mutants import MUTANTS, Mutant

pytestmark = pytest.mark.slow

HANG_S = 600.0
TESTS_FAILED = (
    1  # pytest: everything else above 0 is no verdict (nothing collected, interrupted, bad arguments)
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is tested and of what tests it."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("daemon", "ctl", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def verdict(tree: Path, tests: tuple[str, ...], scale: float) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(tree / part) for part in ("daemon", "ctl"))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", "slow or not slow", *tests],
        cwd=tree,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GPUJOBD"))}
        | {"PYTHONPATH": paths, "GPUJOBD_FAULTS_SCALE": str(scale)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("tests", "scale"), sorted({(mutant.killed_by, mutant.scale) for mutant in MUTANTS}), ids=str
)
def test_the_whole_program_passes(tree: Path, tests: tuple[str, ...], scale: float) -> None:
    passed = verdict(tree, tests, scale)
    assert passed.returncode == 0, passed.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_broken_variant_is_noticed(tree: Path, mutant: Mutant, count) -> None:
    mutant.infect(tree)
    found = verdict(tree, mutant.killed_by, mutant.scale)
    assert found.returncode == TESTS_FAILED, f"it lives:\n{found.stdout}"
    count(22)
