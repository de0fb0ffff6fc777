"""The units as they are installed: what a user, an administrator and systemd see of a host that is well."""

from __future__ import annotations

import hashlib
import json

import pytest
from booted import SOCKET, UNIT, Host
from harness import until

pytestmark = [pytest.mark.slow, pytest.mark.root]

UNITS = ["gpujobd.service", "gpujobd.socket", "gpujobd-nvidia.service", "gpujobd-refused.target"]
EXPOSURE_MAX = 10  # tenths: systemd-analyze takes the threshold so


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"item {n}"} for n in range(count)]


def test_installed_package_serves_and_will_after_a_reboot(host: Host) -> None:
    assert host.state() == host.state(SOCKET) == "active"
    assert host.systemctl("is-enabled", UNIT, SOCKET).stdout.split() == ["enabled", "enabled"]
    assert host.show()["StatusText"].startswith("idle")
    assert "is ready" in host.messages()


def test_caller_wakes_a_stopped_daemon_up(host: Host) -> None:
    host.systemctl("stop", UNIT)
    assert host.state() == "inactive"
    host.jobctl("ping")
    assert host.state() == "active"


def test_stopping_the_socket_stops_both_for_good(host: Host) -> None:
    host.systemctl("stop", SOCKET)
    assert host.state() == host.state(SOCKET) == "inactive"
    assert host.jobctl("ping", check=False).returncode == 3
    assert not (host.root / "run/gpujobd/control.sock").exists()
    host.systemctl("start", UNIT)
    assert host.state(SOCKET) == "active"
    host.jobctl("ping")


def test_job_of_an_unprivileged_user_is_read_back_byte_for_byte(host: Host) -> None:
    items = texts(300)
    job = host.submit("checksum", items)
    host.jobctl("wait", job)
    expected = "".join(
        json.dumps(
            {
                "line": line,
                "output": {
                    "sha256": hashlib.sha256(item["text"].encode()).hexdigest(),
                    "bytes": len(item["text"]),
                },
            }
        )
        + "\n"
        for line, item in enumerate(items, 1)
    )
    assert host.jobctl("output", job).stdout == expected


def test_two_users_are_two_and_neither_reads_what_is_the_others(host: Host) -> None:
    job = host.submit("checksum", texts(3))
    assert host.jobctl("wait", job).returncode == 0
    assert host.job(job)["owner"] == "alice"
    for verb in ("show", "output", "cancel", "rm"):
        foreign = host.jobctl(verb, job, user="bob", check=False)
        never = host.jobctl(verb, "99999", user="bob", check=False)
        assert foreign.returncode == never.returncode != 0
        assert not foreign.stdout
        assert foreign.stderr.replace(job, "99999") == never.stderr
    assert host.job(host.submit("checksum", texts(1), user="bob"), user="bob")["owner"] == "bob"
    assert host.job(job, user="ada")["owner"] == "alice"  # of the group gpujobd-admin


def test_status_says_what_runs_and_how_far(host: Host) -> None:
    host.handler("slow", "trouble:Slow", params={"item_s": 0.02})
    job = host.submit("slow", texts(2000))
    until(lambda: host.job(job)["items"]["done"], "the first checkpoint")
    until(lambda: "alice on cpu: " in host.show()["StatusText"], "the status")
    assert "/2,000" in host.systemctl("status", UNIT).stdout
    host.jobctl("cancel", job)


def test_worker_has_a_cgroup_beside_the_daemons_which_goes_with_it(host: Host) -> None:
    host.handler("slow", "trouble:Slow", params={"item_s": 0.02})
    job = host.submit("slow", texts(2000))
    until(lambda: host.job(job)["items"]["done"], "the first checkpoint")
    groups = host.worker_groups()
    assert groups
    assert all(group.rpartition("/")[0].endswith(f"/{UNIT}") for group in groups)
    assert f"/{UNIT}/daemon" in host.run("cat", f"/proc/{host.main_pid()}/cgroup").stdout
    host.jobctl("cancel", job)
    host.systemctl("restart", UNIT)
    assert host.worker_groups() == []


def test_hardening_is_as_good_as_is_claimed(host: Host) -> None:
    host.run("systemd-analyze", "security", "--no-pager", f"--threshold={EXPOSURE_MAX}", UNIT)


def test_units_are_understood_to_the_last_word(host: Host) -> None:
    # The base has no man: that the pages exist is tested where they are.
    host.run("systemd-analyze", "verify", "--recursive-errors=no", "--man=no", *UNITS)


def test_daemon_can_do_nothing_but_its_work(host: Host) -> None:
    pid = host.main_pid()
    status = host.run("cat", f"/proc/{pid}/status").stdout
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["CapBnd"] == facts["CapPrm"] == "0000000000000000"
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    groups = {host.run("getent", "group", gid).stdout.split(":")[0] for gid in facts["Groups"].split()}
    assert groups == {"gpujobd", "video", "render"}
    interfaces = host.run("nsenter", "-t", str(pid), "-n", "ls", "/sys/class/net", check=False)
    assert interfaces.returncode == 0
    assert host.run("cat", f"/proc/{pid}/net/dev").stdout.count(":") == 1  # lo


def test_state_is_closed_and_the_socket_open(host: Host) -> None:
    def mode(path: str) -> str:
        return host.run("stat", "-c", "%a %U", path).stdout.strip()

    assert mode("/var/lib/gpujobd") == "700 gpujobd"
    assert mode("/var/cache/gpujobd") == "700 gpujobd"
    assert mode("/run/gpujobd") == "755 root"
    assert mode("/run/gpujobd/control.sock") == "666 root"


def test_host_without_a_gpu_leaves_the_gpus_unit_alone(host: Host) -> None:
    assert host.show("gpujobd-nvidia.service")["ConditionResult"] == "no"
    assert host.state("gpujobd-nvidia.service") == "inactive"
