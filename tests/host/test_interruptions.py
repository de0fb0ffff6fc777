"""Stops, upgrades, downgrades and reboots in the middle of a job: it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from booted import PREVIOUS, SOCKET, UNIT, Host, installed
from gpujobd.core.events import Event
from gpujobd.journal import Journal
from harness import HANG_S, until
from midway import Midway

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def old_host(previous: list[Path]) -> Iterator[Host]:
    """The host of this file: it is upgraded by its first test."""
    with installed("interruptions", previous) as booted:
        yield booted


def version_of(host: Host) -> str:
    return host.run("dpkg-query", "--show", "--showformat=${Version}", "gpujobd").stdout


def waiting(host: Host, job: Midway):
    """A client of alice's that waits for the job, and has connected."""
    waiter = host.start("jobctl", "wait", job.job_id, user="alice")
    until(lambda: host.run("pgrep", "--full", "bin/jobctl wait", check=False).stdout, "the client to start")
    return waiter


def assert_paused_and_resumed_once(job: Midway) -> None:
    assert job.events().count("leased") == 2
    assert job.events().count("paused") == 1
    assert job.events().count("resumed") == 1
    assert "lease_lost" not in job.events()


@pytest.fixture(scope="module")
def upgraded(old_host: Host, packages: list[Path]) -> Host:
    """Upgraded in the middle of a job, with a client that waits for it."""
    host, job = old_host, Midway(old_host)
    waiter = waiting(host, job)
    old = set(host.pids())
    assert len(old) >= 2  # daemon and worker

    host.install(packages)
    assert version_of(host) != PREVIOUS
    job.until_more()
    assert old.isdisjoint(host.pids())
    assert not any((host.root / f"proc/{pid}").exists() for pid in old)

    job.go_on()
    assert waiter.wait(HANG_S) == 0, waiter.stdout.read() if waiter.stdout else ""
    job.assert_whole()
    job.assert_nothing_computed_twice()
    assert_paused_and_resumed_once(job)
    return host


def test_upgrade_in_the_middle_of_a_job_loses_and_repeats_nothing_and_leaves_no_old_worker(upgraded):
    assert upgraded.show()["NRestarts"] == "0"
    assert upgraded.messages().count("is ready") == 2


def test_downgrade_to_a_version_of_the_same_formats_goes_on_as_well(upgraded, previous, packages):
    job = Midway(upgraded)
    upgraded.install(previous, "--allow-downgrades")
    assert version_of(upgraded) == PREVIOUS
    job.until_more()
    upgraded.install(packages)
    job.go_on()
    job.assert_whole()
    job.assert_nothing_computed_twice()


def listed(host: Host) -> list[dict[str, Any]]:
    return json.loads(host.jobctl("list", "--all", "--json").stdout)["jobs"]


class InventedLater(Event, frozen=True, tag="invented_later"):
    """What a newer version may have written."""


def write_as_a_newer_version(state: Path) -> None:
    journal = Journal(state / "journal")
    journal.open()
    journal.append([msgspec.msgpack.encode(InventedLater(at_ns=1))])
    journal.close()


def test_downgrade_that_meets_a_newer_format_is_refused_and_a_backup_takes_it_back(upgraded):
    host, state = upgraded, upgraded.root / "var/lib/gpujobd"
    jobs = listed(host)
    assert jobs
    host.systemctl("stop", SOCKET, UNIT)
    host.run("cp", "-a", "/var/lib/gpujobd", "/var/lib/backup")
    write_as_a_newer_version(state)
    host.run("chown", "-R", "gpujobd:", "/var/lib/gpujobd")
    sums = "cd /var/lib/gpujobd/journal && sha256sum seg-* snap-*"
    written = host.run("sh", "-c", sums).stdout

    assert host.systemctl("start", SOCKET, UNIT, check=False).returncode != 0
    shown = host.show()
    assert (shown["ActiveState"], shown["ExecMainStatus"]) == ("failed", "78")
    assert "a later one wrote it" in host.journal("gpujobd", EVENT="start_refused")[-1]["MESSAGE"]
    assert host.state("gpujobd-refused.target") == "active"
    assert host.jobctl("list", check=False).returncode == 3
    assert host.run("sh", "-c", sums).stdout == written

    host.run("rm", "-r", "/var/lib/gpujobd")
    host.run("mv", "/var/lib/backup", "/var/lib/gpujobd")
    host.systemctl("start", SOCKET, UNIT)
    assert listed(host) == jobs


def test_stop_and_start_in_the_middle_of_a_job_compute_nothing_twice(upgraded):
    job = Midway(upgraded)
    upgraded.systemctl("stop", SOCKET, UNIT)
    assert upgraded.pids() == []
    computed = job.computed()
    assert upgraded.jobctl("list", check=False).returncode == 3
    assert upgraded.show()["Result"] == "success"

    upgraded.systemctl("start", SOCKET, UNIT)
    job.until_more()
    assert job.computed()[: len(computed)] == computed
    job.go_on()
    job.assert_whole()
    job.assert_nothing_computed_twice()
    assert_paused_and_resumed_once(job)


def test_client_that_waits_is_carried_over_a_restart(upgraded):
    job = Midway(upgraded)
    waiter = waiting(upgraded, job)
    upgraded.systemctl("restart", UNIT)
    job.go_on()
    assert waiter.wait(HANG_S) == 0


def test_reboot_in_the_middle_of_a_job_goes_on_with_it(upgraded):
    job = Midway(upgraded)
    upgraded.stop()
    upgraded.boot(keep=True)
    assert upgraded.systemctl("is-active", UNIT, SOCKET).stdout.split() == ["active", "active"]
    job.until_more()
    job.go_on()
    job.assert_whole()
    job.assert_nothing_computed_twice()
    assert_paused_and_resumed_once(job)
