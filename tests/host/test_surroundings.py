"""What a handler finds in the service: each sentence of gpujobd-handler(7), Surroundings, tried by one."""

from __future__ import annotations

import json

import pytest
from booted import SOCKET, UNIT, Host

pytestmark = pytest.mark.slow

OWN = ["/var/lib/gpujobd", "/var/cache/gpujobd", "/tmp", "/var/tmp"]  # the last two are the service's alone
OTHERS = [
    "/",
    "/etc/gpujobd",
    "/home",
    "/opt",
    "/run",
    "/run/gpujobd",
    "/srv/gpujobd/handlers",
    "/usr/local",
    "/var/log",
]


def tried(host: Host, handler: str, item: dict[str, object]) -> tuple[str, dict[str, object]]:
    job = host.submit(handler, [item])
    host.jobctl("wait", job)
    return job, json.loads(host.jobctl("output", job).stdout)["output"]


def test_worker_sees_neither_home_nor_tmp_and_has_no_network(host):
    host.run("touch", "/home/alice/diary", "/tmp/of-the-host", "/var/tmp/of-the-host")
    host.run("chmod", "-R", "a+rwX", "/home/alice")
    host.handler("walls", "spy:Walls")
    job, found = tried(
        host, "walls", {"see": ["/home/alice", "/home", "/root", "/tmp", "/var/tmp"], "write": OWN + OTHERS}
    )
    assert found["user"] == "gpujobd"
    assert found["seen"]["/home/alice"] in ("FileNotFoundError", "PermissionError")
    assert found["seen"]["/home"] in ([], "PermissionError")
    assert found["seen"]["/root"] in ([], "PermissionError")
    assert "of-the-host" not in found["seen"]["/tmp"] + found["seen"]["/var/tmp"]
    assert {folder: found["written"][folder] for folder in OWN} == dict.fromkeys(OWN, "done")
    assert "done" not in {found["written"][folder] for folder in OTHERS}
    assert found["network"] not in (
        "done",
        "ConnectionRefusedError",
    )  # there is no such address family at all
    assert found["stdin"] == "/dev/null"
    assert "said aloud" in host.jobctl("log", job).stdout


def test_worker_runs_as_the_page_says(host):
    host.handler("cell", "spy:Cell")
    _, found = tried(host, "cell", {})
    assert found["cwd"] == "/"
    assert found["umask"] == 0o077
    assert found["env"]["HF_HUB_OFFLINE"] == "1"
    assert found["env"]["XDG_CACHE_HOME"] == "/var/cache/gpujobd"
    assert "NOTIFY_SOCKET" not in found["env"]
    assert found["core"] == [0, 0]


def test_drained_queue_stays_drained_over_a_restart(host):
    host.handler("echo", "toys:Echo")
    host.jobctl("queue", "drain", "-m", "new driver at 18:00", user="root")
    host.systemctl("stop", SOCKET, UNIT)
    host.systemctl("start", SOCKET, UNIT)
    refused = host.jobctl("submit", "echo", "-", text="{}\n", check=False)
    assert refused.returncode == 6
    assert "new driver at 18:00" in refused.stderr
    host.jobctl("queue", "start", user="root")
    host.jobctl("wait", host.submit("echo", [{}]))
