"""What a worker of a real daemon is given: looked at from inside."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from harness import fake, hosted

SECRETS = {
    "SMTP_PASSWORD": "hunter2",
    "WEBHOOK_SECRET": "whsec_1",
    "CREDENTIALS_DIRECTORY": "/run/credentials",
    "SSH_AUTH_SOCK": "/run/agent",
    "AWS_SECRET_ACCESS_KEY": "aws",
    "HF_TOKEN": "hf",
    # Where the daemon itself may come from: it is added to.
    "PYTHONPATH": os.pathsep.join(filter(None, ["/opt/elsewhere", os.environ.get("PYTHONPATH")])),
    "LD_PRELOAD": "",
}


def test_a_worker_gets_what_is_listed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with hosted(tmp_path / "host", cell=fake("spy:Cell")) as host, host.client() as client:
        idle = [host.client() for _ in range(5)]  # descriptors of others, open while the worker starts
        job = client.submit("cell", [{}]).job
        client.wait(job)
        (record,) = client.output(job)
        for other in idle:
            other.sock.close()
    cell = record["output"]
    assert not set(cell["env"]) & set(SECRETS)
    assert not {name for name in cell["env"] if name.startswith(("NOTIFY_", "LISTEN_", "SYSTEMD_", "DBUS_"))}
    assert cell["cwd"] == "/"
    assert cell["umask"] == 0o077
    assert cell["leads_its_session"]
    assert cell["core"] == [0, 0]
    assert cell["oom"] == 500
    assert not any("spy" in word or str(job) == word for word in cell["argv"])  # `ps` tells nobody what runs


def test_a_worker_holds_its_pipes_its_jobs_files_and_no_descriptor_of_the_daemon(tmp_path: Path) -> None:
    with hosted(tmp_path / "host", cell=fake("spy:Cell")) as host, host.client() as client:
        connections = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for sock in connections:
            sock.connect(str(host.socket))
        job = client.submit("cell", [{}]).job
        client.wait(job)
        (record,) = client.output(job)
        for sock in connections:
            sock.close()
        folder = str(host.results(job).parent)
    held = record["output"]["fds"]
    assert held["0"] == "/dev/null"
    assert held["1"] == held["2"]
    assert held["1"].startswith("pipe:")
    others = {fd: where for fd, where in held.items() if fd not in "012"}
    sockets = [where for where in others.values() if where.startswith("socket:")]
    assert len(sockets) == 1, held  # its message pipe, the lifeline
    files = [
        where
        for where in others.values()
        if not where.startswith(("socket:", "/proc/", "pipe:", "anon_inode:"))
    ]
    assert all(where.startswith(folder) or where == "/dev/null" for where in files), held
    assert not any("journal" in where or "control.sock" in where for where in files)
