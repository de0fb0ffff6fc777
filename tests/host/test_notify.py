"""The notifier as it is installed: mail and webhooks over the host's loopback, and what its unit lets it see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from booted import UNIT, Host
from harness import ROOT, until

pytestmark = [pytest.mark.slow, pytest.mark.root]

NOTIFIER = "gpujobd-notify.service"
EXPOSURE_MAX = 12  # tenths: systemd-analyze takes the threshold so
CONFIG = """
[targets]
url_hosts = ["127.0.0.1"]
allow_networks = ["127.0.0.0/8"]
mail_domains = ["example.org"]
[mail]
host = "127.0.0.1"
port = 2525
security = "none"
timeout_s = 5
[endpoints.ops]
kind = "webhook"
url = "http://127.0.0.1:8025/ops"
allow_networks = ["127.0.0.0/8"]
secrets = ["notify_ops"]
"""
WEBHOOK, MAIL = "http://127.0.0.1:8025/alice", "mailto:alice@example.org"


class FarEnds:
    """far_ends.py, running in the host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._folder = host.root / "srv" / "far"
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / "host" / "far_ends.py", self._folder)
        process = host.start("python3", "/srv/far/far_ends.py", "/srv/far")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    def hang(self, *, now: bool) -> None:
        flag = self._folder / "hang"
        flag.touch() if now else flag.unlink()

    def got(self, what: str) -> list[dict[str, Any]]:
        path = self._folder / f"{what}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def webhooks(self) -> list[tuple[str, int, str]]:
        """Path, job and occasion of each."""
        return [
            (one["path"], one["body"]["data"]["job"], one["body"]["type"]) for one in self.got("webhooks")
        ]


@pytest.fixture(scope="module")
def far(host: Host) -> Iterator[FarEnds]:
    host.write("etc/gpujobd/notify.toml", CONFIG)
    host.write("etc/gpujobd/notify-credentials/ops", "whsec_" + "A" * 32, mode=0o600)
    host.systemctl("restart", NOTIFIER)
    ends = FarEnds(host)
    until(lambda: "follows" in host.show(NOTIFIER)["StatusText"], "the notifier to follow")
    return ends


def submit(host: Host, *words: str, items: int = 3) -> int:
    text = "".join(json.dumps({"text": f"item {n}"}) + "\n" for n in range(items))
    return int(host.jobctl("submit", "checksum", "-", *words, text=text).stdout)


def notifications(host: Host, *words: str, user: str = "alice") -> list[dict[str, Any]]:
    shown = host.jobctl("notifications", *words, "--json", user=user).stdout
    return json.loads(shown)["notifications"]


def all_delivered(host: Host, *jobs: int) -> bool:
    found = notifications(host, *map(str, jobs))
    return {one["job"] for one in found} == set(jobs) and {one["state"] for one in found} == {"delivered"}


def test_a_job_of_an_unprivileged_user_is_told_by_webhook_by_mail_and_by_name(
    host: Host, far: FarEnds
) -> None:
    job = submit(
        host, "--notify", WEBHOOK, "--notify", MAIL, "--notify", "ops", "--notify-on", "start,finish"
    )
    until(lambda: len(notifications(host, str(job))) == 6 and all_delivered(host, job), "all to be told")
    told = set(far.webhooks())
    assert {(path, job, kind) for path in ("/alice", "/ops") for kind in ("job.start", "job.finish")} <= told
    mails = [one["text"] for one in far.got("mail") if f"job {job} " in one["text"]]
    assert len(mails) == 2
    assert f"Subject: job {job} completed, all 3 items done" in mails[-1]
    assert f"jobctl output {job}" in mails[-1]
    assert {one["kind"] for one in notifications(host, str(job))} == {"start", "finish"}
    assert notifications(host, user="bob") == []
    refused = host.jobctl("notifications", "--all", user="bob", check=False)
    assert refused.returncode == 4
    assert len(notifications(host, "--all", user="ada")) >= 6


def test_a_target_that_is_not_allowed_is_refused_at_the_door(host: Host, far: FarEnds) -> None:
    for target, said in (("mailto:a@elsewhere.example", "example.org"), ("nobody-such", "ops")):
        refused = host.jobctl("submit", "checksum", "-", "--notify", target, text="{}\n", check=False)
        assert refused.returncode == 6
        assert "bad_notify" in refused.stderr
        assert said in refused.stderr


def test_killed_in_the_middle_and_with_the_daemon_stopped_nothing_is_lost(host: Host, far: FarEnds) -> None:
    far.hang(now=True)
    jobs = [submit(host, "--notify", WEBHOOK, "--notify", MAIL) for _ in range(5)]
    for job in jobs:
        host.jobctl("wait", str(job))
    in_flight = "0 in flight"
    until(lambda: in_flight not in host.show(NOTIFIER)["StatusText"], "something to be in flight")
    host.run("systemctl", "kill", "--signal=KILL", NOTIFIER)
    until(lambda: int(host.show(NOTIFIER)["NRestarts"]) > 0, "it to be started again")
    host.until_active(NOTIFIER)
    host.systemctl("stop", UNIT)
    far.hang(now=False)
    until(lambda: all_delivered(host, *jobs), "all to be told, without the daemon")
    assert host.state() == "inactive", "the notifier has woken up a daemon that was stopped"
    for job in jobs:
        ids = {one["id"] for one in far.got("webhooks") if one["body"]["data"]["job"] == job}
        assert len(ids) == 1, "tried several times, under one id"
        assert any(f"job {job} " in one["text"] for one in far.got("mail"))
    host.systemctl("start", UNIT)
    after = submit(host, "--notify", WEBHOOK)
    until(lambda: all_delivered(host, after), "it to be told by a notifier that found the daemon again")


def test_without_the_daemon_it_runs_and_says_so(host: Host, far: FarEnds) -> None:
    host.systemctl("stop", "gpujobd.socket")
    host.systemctl("restart", NOTIFIER)
    until(lambda: "waits for gpujobd" in host.show(NOTIFIER)["StatusText"], "it to look for the daemon")
    assert host.state(NOTIFIER) == "active"
    assert host.jobctl("notifications").returncode == 0
    host.systemctl("start", UNIT)
    until(lambda: "follows" in host.show(NOTIFIER)["StatusText"], "it to find the daemon")


def test_a_notifier_that_is_not_there_is_said_with_exit_3(host: Host, far: FarEnds) -> None:
    host.systemctl("stop", NOTIFIER)
    refused = host.jobctl("notifications", check=False)
    assert refused.returncode == 3
    assert "no notifier answers" in refused.stderr
    assert "systemctl status gpujobd-notify" in refused.stderr
    host.systemctl("start", NOTIFIER)


# --- the unit -----------------------------------------------------------------------------------------------------


def test_hardening_of_the_notifier_is_as_good_as_is_claimed(host: Host) -> None:
    host.run("systemd-analyze", "security", "--no-pager", f"--threshold={EXPOSURE_MAX}", NOTIFIER)
    host.run("systemd-analyze", "verify", "--recursive-errors=no", "--man=no", NOTIFIER)


def test_the_notifier_sees_no_spool_no_home_and_no_device(host: Host, far: FarEnds) -> None:
    submit(host)
    pid = host.show(NOTIFIER)["MainPID"]
    inside = f"/proc/{pid}/root"
    assert host.run("ls", "-A", f"{inside}/var/lib/gpujobd").stdout == ""
    assert host.run("ls", "-A", f"{inside}/home").stdout == ""
    devices = set(host.run("ls", f"{inside}/dev").stdout.split())
    assert not {name for name in devices if name.startswith(("nvidia", "dri", "kfd"))}
    status = host.run("cat", f"/proc/{pid}/status").stdout
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["CapBnd"] == facts["CapPrm"] == "0000000000000000"
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    assert host.run("ps", "-o", "nice=", "-p", pid).stdout.strip() == "10", "it stands back behind the daemon"
    groups = {host.run("getent", "group", gid).stdout.split(":")[0] for gid in facts["Groups"].split()}
    assert groups <= {"gpujobd-notify"}


def test_secrets_and_the_outbox_are_closed_and_the_socket_is_open(host: Host, far: FarEnds) -> None:
    def mode(path: str) -> str:
        return host.run("stat", "-c", "%a %U", path).stdout.strip()

    assert mode("/etc/gpujobd/notify-credentials") == "700 root"
    assert mode("/var/lib/gpujobd-notify") == "700 gpujobd-notify"
    assert mode("/run/gpujobd-notify") == "755 gpujobd-notify"
    assert mode("/run/gpujobd-notify/control.sock") == "666 gpujobd-notify"
    assert host.run("cat", "/etc/gpujobd/notify-credentials/ops", user="alice", check=False).returncode != 0


def test_the_notifier_is_upgraded_with_the_daemon_and_tells_what_was_due(
    fresh_host: Host, packages: list[Path]
) -> None:
    host = fresh_host
    host.write("etc/gpujobd/notify.toml", CONFIG.replace('secrets = ["notify_ops"]', ""))
    host.systemctl("restart", NOTIFIER)
    far = FarEnds(host)
    far.hang(now=True)
    until(lambda: "follows" in host.show(NOTIFIER)["StatusText"], "the notifier to follow")
    job = submit(host, "--notify", WEBHOOK)
    host.jobctl("wait", str(job))
    before = host.show(NOTIFIER)["MainPID"]
    host.install(packages, "--reinstall")
    assert host.show(NOTIFIER)["MainPID"] not in ("0", before)
    far.hang(now=False)
    until(lambda: all_delivered(host, job), "it to be told by the new one")
    assert "127.0.0.1" in (host.root / "etc/gpujobd/notify.toml").read_text()
