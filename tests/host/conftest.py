"""Hosts for the tests of this folder; booted.py says what can be done with one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import PREVIOUS, Host, build_packages, installed, why_not


@pytest.fixture(scope="session", autouse=True)
def _can_boot() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """gpujobd, gpujobd-notify and jobctl of this tree."""
    return build_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same packages with a lower version, to upgrade from."""
    return build_packages(tmp_path_factory.mktemp("previous"), "--version", PREVIOUS)


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, packages: list[Path]) -> Iterator[Host]:
    """One for all tests of a file that leave it as they found it, but for jobs."""
    with installed(_name(request.module.__name__), packages) as booted:
        yield booted


@pytest.fixture
def fresh_host(request: pytest.FixtureRequest, packages: list[Path]) -> Iterator[Host]:
    """One for this test alone, which may do to it what it likes."""
    with installed(_name(request.node.name), packages) as booted:
        yield booted


def _name(text: str) -> str:
    """A host name: at most 63 letters, with room for the pid."""
    return re.sub(r"[^a-z0-9]+", "-", text.rpartition(".")[2].removeprefix("test_"))[:40].strip("-")
