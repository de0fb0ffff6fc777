"""The service under blows: whatever ends the daemon, callers wait, jobs go on, and systemd never gives it up."""

from __future__ import annotations

import json
import subprocess

import pytest
from booted import SOCKET, UNIT, Host
from harness import HANG_S, until

pytestmark = [pytest.mark.slow, pytest.mark.root]

STATE = "/var/lib/gpujobd"
SIDE = "/var/cache/gpujobd"  # workers may write there
PINGS = 1000
RESTARTS = 10
PATIENCE = 3  # failed starts in a row that are watched

# Each ping is a process with all of jobctl in it, forked from one that has imported it: that is most of its 0.1 s.
PINGER = """
import io, os, sys, time
from jobctl.__main__ import main
failed = count = 0
slowest = 0.0
while count < int(sys.argv[1]) or not os.path.exists(sys.argv[2]):
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.stdout = io.StringIO()
        sys.argv = ["jobctl", "ping"]
        sys.exit(main())
    _, status = os.waitpid(child, 0)
    failed += status != 0
    count += 1
    slowest = max(slowest, time.monotonic() - began)
print(count, failed, f"{slowest:.3f}")
"""


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"item {n}"} for n in range(count)]


def running(host: Host, count: int = 200, **params: float) -> str:
    """A job that has come some way."""
    host.handler("slow", "trouble:Slow", params={"item_s": 0.02, **params})
    job = host.submit("slow", texts(count))
    until(lambda: host.job(job)["items"]["done"], "the first checkpoint")
    return job


def is_complete(host: Host, job: str, count: int = 200) -> None:
    """Every item is in the output, once and in order, and none failed."""
    host.jobctl("wait", job)
    lines = [json.loads(line) for line in host.jobctl("output", job).stdout.splitlines()]
    assert [(line["line"], line["output"]["text"]) for line in lines] == [
        (n + 1, f"item {n}") for n in range(count)
    ]


def until_another_runs(host: Host, pid: int) -> None:
    until(lambda: host.main_pid() not in (0, pid) and host.state() == "active", "another daemon")


def test_callers_wait_through_ten_restarts_and_none_fails(host: Host) -> None:
    over = "/run/restarts-are-over"
    pinger = host.start("python3", "-c", PINGER, str(PINGS), over, user="alice")
    for _ in range(RESTARTS):
        pid = host.main_pid()
        host.systemctl("restart", UNIT)
        assert host.main_pid() != pid
    host.write(over, "")
    said, _ = pinger.communicate(timeout=HANG_S)
    count, failed, slowest = said.split()
    assert int(count) >= PINGS
    assert failed == "0"
    print(f"{count} pings over {RESTARTS} restarts, the slowest took {slowest} s")


def test_killed_daemon_resumes_the_job_and_no_item_is_lost_or_twice(host: Host) -> None:
    job = running(host)
    for _ in range(2):
        pid = host.main_pid()
        host.kill("KILL", pid)
        until_another_runs(host, pid)
    is_complete(host, job)


def test_daemon_that_hangs_is_restarted_by_the_watchdog_and_the_job_goes_on(host: Host) -> None:
    host.write(f"run/systemd/system/{UNIT}.d/watchdog.conf", "[Service]\nWatchdogSec=4s\n")
    host.systemctl("daemon-reload")
    host.systemctl("restart", UNIT)
    job = running(host)
    pid = host.main_pid()
    host.kill("STOP", pid)
    until_another_runs(host, pid)
    assert "Watchdog timeout" in host.messages()
    is_complete(host, job)
    host.run("rm", "-r", f"/run/systemd/system/{UNIT}.d")
    host.systemctl("daemon-reload")
    host.systemctl("restart", UNIT)


def test_what_a_worker_left_behind_dies_with_the_service(host: Host) -> None:
    host.handler("stray", "trouble:Stray", params={"side": f"{SIDE}/stray", "item_s": 0.02})
    job = host.submit("stray", texts(2000))
    until(lambda: host.job(job)["items"]["done"], "the first checkpoint")
    stray = (host.root / SIDE.lstrip("/") / "stray").read_text()
    assert int(stray) in host.pids()
    host.systemctl("stop", SOCKET)
    assert host.run("test", "-d", f"/proc/{stray}", check=False).returncode == 1
    assert host.pids() == []
    host.systemctl("start", UNIT)
    host.jobctl("cancel", job)


def test_what_a_dead_worker_left_behind_dies_while_the_daemon_lives(host: Host) -> None:
    host.handler("hostile", "hostile:Hostile", params={"side": SIDE})
    pid = host.main_pid()
    job = host.submit("hostile", [{"text": "1", "do": "orphan"}])
    host.jobctl("wait", job)
    orphan = (host.root / SIDE.lstrip("/") / "orphan1").read_text()
    assert host.run("test", "-d", f"/proc/{orphan}", check=False).returncode == 1
    assert host.main_pid() == pid


def test_daemon_that_fails_and_fails_is_never_given_up_and_comes_back_by_itself(host: Host) -> None:
    job = running(host, 50)
    host.systemctl("stop", SOCKET)
    hold = "echo $$ > /run/holder; exec sleep 3600"
    holder = host.start("flock", f"{STATE}/journal/LOCK", "sh", "-c", hold)
    until((host.root / "run/holder").exists, "the lock")
    host.systemctl("start", SOCKET)
    host.systemctl("start", "--no-block", UNIT)
    caller = host.start("jobctl", "ping", user="alice")
    waits = {}
    while len(waits) < PATIENCE:
        shown = host.show()
        if restarts := int(shown["NRestarts"]):
            waits[restarts] = shown["RestartUSecNext"]
        assert shown["ActiveState"] == "activating"
    assert len(set(waits.values())) == PATIENCE, waits  # each longer than the one before
    assert host.state(SOCKET) == "active"
    assert caller.poll() is None
    host.kill("TERM", int((host.root / "run/holder").read_text()))
    holder.wait(HANG_S)
    host.until_active()
    assert caller.wait(HANG_S) == 0
    is_complete(host, job, 50)


def test_refused_daemon_is_not_tried_again_and_callers_are_told(host: Host) -> None:
    job = running(host, 50)
    before = (host.root / "etc/gpujobd/gpujobd.toml").read_text()
    host.write("etc/gpujobd/gpujobd.toml", "nonsense = 1\n")
    asked = host.systemctl("restart", UNIT, check=False)
    assert asked.returncode != 0
    shown = host.show()
    assert (shown["ActiveState"], shown["ExecMainStatus"]) == ("failed", "78")
    until(lambda: host.state(SOCKET) == "inactive", "the socket to be closed")
    told = host.jobctl("ping", check=False)
    assert told.returncode == 3
    assert "systemctl status gpujobd" in told.stderr
    status = host.systemctl("status", UNIT, check=False).stdout
    assert "gpujobd.toml: line 1: nonsense: unknown key" in status
    assert host.show()["InvocationID"] == shown["InvocationID"]  # the call did not start it again
    host.write("etc/gpujobd/gpujobd.toml", before)
    host.systemctl("start", UNIT)
    assert host.state(SOCKET) == host.state() == "active"
    assert host.state("gpujobd-refused.target") == "inactive"
    is_complete(host, job, 50)


def test_caller_in_the_line_of_a_daemon_that_is_refused_does_not_wait_for_ever(host: Host) -> None:
    before = (host.root / "etc/gpujobd/gpujobd.toml").read_text()
    host.systemctl("stop", UNIT)
    host.write("etc/gpujobd/gpujobd.toml", "nonsense = 1\n")
    told: subprocess.CompletedProcess[str] = host.jobctl("ping", check=False)  # it is what starts the daemon
    assert told.returncode == 3
    assert host.state() == "failed"
    attempts = [entry for entry in host.journal(UNIT) if "nonsense" in str(entry.get("MESSAGE"))]
    assert len({entry["_PID"] for entry in attempts}) <= 2  # this test's, and that of the test before
    host.write("etc/gpujobd/gpujobd.toml", before)
    host.systemctl("start", UNIT)
