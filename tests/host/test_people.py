"""Two users and an administrator of one host, each by jobctl: who may do what to whose job."""

from __future__ import annotations

import re

import pytest
from booted import SOCKET, Host

pytestmark = pytest.mark.slow

NO_SUCH_JOB, FORBIDDEN = 2, 4
# Of a job: the words, and what follows its number. What they do to a job of alice's is none of bob's business.
OF_A_JOB = {
    "show": (),
    "wait": (),
    "watch": (),
    "output": (),
    "errors": (),
    "log": (),
    "cancel": (),
    "pause": (),
    "resume": (),
    "retry": (),
    "priority": ("low",),
    "first": (),
    "rm": (),
}
OF_THE_HOST = {
    "submit",
    "status",
    "list",
    "events",
    "queue",
    "handlers",
    "tenants",
    "device",
    "ping",
    "completion",
    "notifications",
}


@pytest.fixture(scope="module")
def done(host: Host) -> str:
    job = host.submit("checksum", [{"text": "secret"}])
    host.jobctl("wait", job)
    return job


@pytest.fixture
def queued(host: Host) -> str:
    words = ["submit", "checksum", "-", "--begin", "1d", "--name", "plan"]
    return host.jobctl(*words, text='{"text": "later"}\n').stdout.strip()


def test_every_command_of_jobctl_is_tried_here(host):
    told = set(re.findall(r"^  ([a-z]+)  +[A-Z]", host.jobctl("--help").stdout, re.MULTILINE))
    assert told == OF_THE_HOST | OF_A_JOB.keys()


def lasting(job: dict[str, object]) -> dict[str, object]:
    """What does not change as time passes; the first forecast comes a moment after the submission."""
    passing = ("forecast", "foretold", "position", "reason_detail")
    return {key: value for key, value in job.items() if key not in passing}


@pytest.mark.parametrize("which", ["done", "queued"])
def test_job_of_another_user_does_not_exist(host, request, which):
    job = request.getfixturevalue(which)
    before = lasting(host.job(job))
    for verb, more in OF_A_JOB.items():
        refused = host.jobctl(verb, job, *more, user="bob", check=False)
        assert refused.returncode == NO_SUCH_JOB, verb
        assert refused.stdout == "", verb
        assert f"no_such_job: no job {job}" in refused.stderr, verb
    assert lasting(host.job(job)) == before


def test_lists_and_events_tell_another_user_nothing(host, done, queued):
    assert "plan" not in host.jobctl("list", "--all", "--json", user="bob").stdout
    assert '"plan"' in host.jobctl("list", "--all", "--json").stdout
    assert host.jobctl("events", "--job", done, user="bob", check=False).returncode == NO_SUCH_JOB
    seen = host.jobctl("events", "--since", "0", "--json", user="bob", check=False).stdout
    assert f'"job":{done},' not in seen.replace(" ", "")


def test_what_is_the_administrators_is_forbidden_to_both(host, queued):
    for user in ("alice", "bob"):
        assert host.jobctl("queue", "stop", user=user, check=False).returncode == FORBIDDEN
    raised = host.jobctl("priority", queued, "high", check=False)
    assert raised.returncode == FORBIDDEN
    as_alice = ["submit", "checksum", "-", "--tenant", "alice"]
    assert host.jobctl(*as_alice, user="bob", text="{}\n", check=False).returncode == FORBIDDEN


def test_administrator_may_everything(host, done, queued):
    assert "secret" not in host.jobctl("output", done, user="ada").stdout  # its checksum
    for verb in ("show", "wait", "output", "errors", "log"):
        assert host.jobctl(verb, done, user="ada").returncode == 0
    host.jobctl("priority", queued, "high", user="ada")
    host.jobctl("first", queued, user="ada")
    host.jobctl("pause", queued, "-m", "not today", user="ada")
    assert host.job(queued)["reason"] == "HeldByAdmin"
    assert host.jobctl("resume", queued, check=False).returncode == FORBIDDEN
    host.jobctl("resume", queued, user="ada")
    host.jobctl("cancel", queued, user="ada")
    host.jobctl("rm", queued, user="ada")
    host.jobctl("queue", "stop", "-m", "maintenance", user="ada")
    assert "maintenance" in host.jobctl("status").stdout
    host.jobctl("queue", "start", user="ada")


def test_files_and_socket_are_nobodys_to_touch(host, done):
    for path in ("/var/lib/gpujobd", "/var/cache/gpujobd", f"/var/lib/gpujobd/spool/jobs/{done}"):
        assert host.run("ls", path, user="bob", check=False).returncode != 0
    touched = host.run(
        "sh", "-c", ">/run/gpujobd/mine || rm /run/gpujobd/control.sock", user="bob", check=False
    )
    assert touched.returncode != 0
    assert host.state(SOCKET) == "active"
    # Not the daemon's own user either: who takes it over cannot put a socket of his own in this place.
    as_daemon = host.run(
        "setpriv", "--reuid=gpujobd", "--clear-groups", "rm", "/run/gpujobd/control.sock", check=False
    )
    assert as_daemon.returncode != 0
