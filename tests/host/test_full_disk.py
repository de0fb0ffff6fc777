"""A state directory on a small file system of its own that somebody fills, and empties again, under a running job."""

from __future__ import annotations

import pytest
from booted import CONFIG, SOCKET, UNIT, Host
from harness import until
from midway import Midway

pytestmark = pytest.mark.slow

STATE = "/var/lib/gpujobd"
SIZE = "120M"  # three segments of 16 MiB, a snapshot, and room under which submissions are refused
FREE_MIN = "[limits]\ndisk_free_bytes_min = 30_000_000\n"
TOLD = {"disk_low", "disk_filled", "disk_freed", "disk_enough"}


@pytest.fixture
def small(host: Host) -> Host:
    host.write(CONFIG, FREE_MIN)
    host.systemctl("stop", SOCKET, UNIT)
    host.run("mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700,uid=gpujobd,gid=gpujobd", "tmpfs", STATE)
    host.systemctl("start", SOCKET, UNIT)
    return host


def submits(host: Host) -> tuple[int, str]:
    done = host.jobctl("submit", "count", "-", "--dry-run", text='{"text": "a"}\n', check=False)
    return done.returncode, done.stderr


def told_of_the_disk(host: Host) -> set[str]:
    return {entry["EVENT"] for entry in host.journal("gpujobd") if entry.get("EVENT", "").startswith("disk_")}


def test_job_waits_while_the_disk_is_full_and_fails_no_item(small):
    job = Midway(small)
    assert submits(small)[0] == 0

    small.run("sh", "-c", f"cat /dev/zero > {STATE}/filler; test -s {STATE}/filler", check=False)
    until(lambda: submits(small)[0] != 0, "submissions to be refused")
    assert submits(small)[0] == 6
    assert "disk_low" in submits(small)[1]
    until(lambda: small.job(job.job_id).get("reason") == "DiskFull", "the job to wait")
    shown = small.job(job.job_id)
    assert shown["state"] == "queued"
    assert shown["items"]["failed"] == 0
    until(lambda: "disk full" in small.show()["StatusText"], "systemd to hear of it")
    assert "DiskFull" in small.jobctl().stdout
    until(lambda: "disk_low" in told_of_the_disk(small), "the daemon's own look at the disk")

    small.run("rm", f"{STATE}/filler")
    job.go_on()
    job.assert_whole()
    assert small.jobctl("errors", job.job_id).stdout == ""
    until(lambda: submits(small)[0] == 0, "submissions to be accepted")
    assert small.show()["NRestarts"] == "0"
    until(lambda: told_of_the_disk(small) == TOLD, "the journal to tell it all")
    (filled,) = small.journal("gpujobd", EVENT="disk_filled")
    assert filled["PRIORITY"] == "3"
