"""jobctl against the real daemon: what both sides must mean by the same words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
from gpujobd import protocol
from harness import fake, hosted, until
from jobctl.__main__ import run

HANG_S = 60


def lines(count):
    return "".join(json.dumps({"text": f"text {n:06}"}) + "\n" for n in range(count))


def start(host, *words, **pipes):
    environment = {**os.environ, "JOBCTL_SOCKET": str(host.socket)}
    return subprocess.Popen([sys.executable, "-m", "jobctl", *words], env=environment, text=True, **pipes)


def connections(host):
    """How many clients the daemon has taken."""
    ends = psutil.Process(host.process.pid).net_connections(kind="unix")
    return sum(end.laddr == str(host.socket) for end in ends) - 1  # its listener has the same address


def test_submit_wait_and_read_back(tmp_path, monkeypatch, capfd):
    with hosted(tmp_path / "host", echo=fake("toys:Count")) as host:
        for count in (3, 10_000):  # with the header, and streamed
            done = host.jobctl("submit", "echo", "-", "--wait", text=lines(count))
            assert (done.returncode, done.stderr) == (0, "")
            shown = json.loads(host.jobctl("show", "@", "--json").stdout)
            assert shown["id"] == int(done.stdout)
            assert shown["items"] == {"total": count, "done": count, "failed": 0}
            assert len(host.jobctl("output", "@").stdout.splitlines()) == count
        monkeypatch.setenv("JOBCTL_SOCKET", str(host.socket))
        for words in (
            [],
            ["list", "--all"],
            ["handlers"],
            ["tenants"],
            ["device"],
            ["events"],
            ["ping"],
            ["log", "1"],
        ):
            assert run(words) == 0
            capfd.readouterr()
            assert run([*words, "--json"]) == 0
            assert all(json.loads(line) for line in capfd.readouterr().out.splitlines())


def test_failed_items_are_summed_up_and_retried(tmp_path):
    with hosted(tmp_path / "host", moody=fake("trouble:Moody")) as host:
        text = "".join(
            json.dumps({"mood": "error", "n": n} if n % 2 else {"text": "x"}) + "\n" for n in range(10)
        )
        assert host.jobctl("submit", "moody", "-", "--wait", text=text).returncode == 1
        groups = json.loads(host.jobctl("errors", "@", "--summary", "--json").stdout)["groups"]
        assert [group["count"] for group in groups] == [5]
        again = host.jobctl("retry", "@", "--failed-items")
        assert host.jobctl("wait", again.stdout.strip()).returncode == 1
        errors = [json.loads(line)["line"] for line in host.jobctl("errors", "@").stdout.splitlines()]
        assert errors == [2, 4, 6, 8, 10]  # lines of the first input


def test_waiting_and_following_carry_over_a_restart(tmp_path):
    handler = fake("trouble:Slow", params={"item_s": 0.01})
    with hosted(tmp_path / "host", slow=handler) as host:
        host.jobctl("queue", "stop")
        job = host.jobctl("submit", "slow", "-", text=lines(200)).stdout.strip()
        with (
            start(host, "wait", job) as wait,
            start(host, "watch", job, "--json", stdout=subprocess.PIPE) as watch,
            start(host, "events", "-f", "--since", "1", "--json", stdout=subprocess.PIPE) as events,
        ):
            until(
                lambda: connections(host) == 3, "all to be connected"
            )  # who comes too late is told so, rightly
            host.jobctl("queue", "start")
            with host.client() as client:
                until(lambda: client.job(int(job)).items.done > 0, "progress")
            host.stop(signal.SIGKILL)
            host.start()
            assert wait.wait(HANG_S) == 0
            assert json.loads(watch.stdout.read().splitlines()[-1])["state"] == "completed"
            seen = []
            for line in events.stdout:
                seen.append(json.loads(line))
                if seen[-1]["event"] == "completed":
                    break
            events.kill()  # not SIGTERM: a daemon that ended in this process, in a simulation, leaves it ignored
        assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
        assert sum(event["event"] == "daemon_started" for event in seen) == 2


def test_refusals_exit_as_they_are_documented(tmp_path):
    limits = "[limits]\nqueued_jobs_max = 1\nitems_per_job_max = 5\n"
    with hosted(tmp_path / "host", limits, slow=fake("trouble:Slow", params={"item_s": 5.0})) as host:
        assert host.jobctl("show", "99").returncode == 2
        assert host.jobctl("submit", "nope", "-", text=lines(1)).returncode == 6
        done = host.jobctl("submit", "slow", "-", text=lines(6))
        assert (done.returncode, done.stderr.split(":")[1]) == (6, " too_many_items (6/5)")
        assert host.jobctl("submit", "slow", "-", text=lines(5)).returncode == 0
        for more in ([], ["--dry-run"]):
            full = host.jobctl("submit", "slow", "-", *more, text=lines(1))
            assert (full.returncode, full.stdout) == (6, "")
            assert full.stderr.startswith("jobctl: queue_full (1/1): ")
        assert host.jobctl("wait", "1", "--timeout", "0.1s").returncode == 5
        assert host.jobctl("queue", "disable", "-m", "maintenance").returncode == 0
        refused = host.jobctl("submit", "slow", "-", text=lines(1))
        assert refused.returncode == 6
        assert "maintenance" in host.jobctl().stdout
        with host.client() as client:
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)
