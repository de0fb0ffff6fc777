"""`systemctl reload` while a job runs: a good configuration is taken over, a bad one is refused and says where."""

from __future__ import annotations

import json

import pytest
from booted import CONFIG, UNIT, Host
from midway import Midway

pytestmark = pytest.mark.slow

GOOD = """\
[limits]
queued_jobs_per_uid_max = 1

[tenants.alice]
share = 3
"""
BAD = GOOD.replace("share = 3", "share = -1")


@pytest.fixture
def running(host):
    """A job in its middle, of the tenant that the configurations are about."""
    host.write(CONFIG, "")
    job = Midway(host)
    before = host.main_pid()
    yield job
    job.go_on()
    job.assert_whole()
    job.assert_nothing_computed_twice()
    assert job.events() == ["submitted", "leased", "completed"]
    assert host.main_pid() == before


def share_of(host: Host, tenant: str) -> float:
    tenants = json.loads(host.jobctl("tenants", "--json").stdout)["tenants"]
    return next(one["share"] for one in tenants if one["name"] == tenant)


def test_good_configuration_counts_at_once_and_the_job_does_not_notice(host, running):
    host.write(CONFIG, GOOD)
    host.handler("echo", "toys:Echo")  # reloads
    assert share_of(host, "alice") == 3
    refused = host.jobctl("submit", "echo", "-", text="{}\n", check=False)
    assert refused.returncode == 6
    assert "quota" in refused.stderr
    assert "echo" in host.jobctl("handlers").stdout
    told = host.journal("gpujobd", EVENT="config_reloaded")[-1]["MESSAGE"]
    assert "queued_jobs_per_uid_max" in told
    assert "tenants.alice" in told
    assert "echo" in told


def test_bad_configuration_is_refused_with_its_place_and_the_old_one_stays(host, running):
    host.write(CONFIG, GOOD)
    host.systemctl("reload", UNIT)
    host.write(CONFIG, BAD)
    host.systemctl("reload", UNIT)

    place = f"/{CONFIG}: line {BAD.splitlines().index('share = -1') + 1}: tenants.alice.share"
    refused = host.journal("gpujobd", EVENT="config_refused")[-1]
    assert place in refused["MESSAGE"]
    assert refused["PRIORITY"] == "3"
    assert f"reload refused: {place}" in host.show()["StatusText"]
    assert place in host.systemctl("status", UNIT).stdout
    assert share_of(host, "alice") == 3
    assert place in host.run("gpujobd", "check", check=False).stderr

    host.write(CONFIG, GOOD)
    host.systemctl("reload", UNIT)
    assert "refused" not in host.show()["StatusText"]


def test_bad_handler_is_refused_and_the_others_go_on(host, running):
    host.write("etc/gpujobd/handlers.d/broken.toml", 'entry = "nowhere"\n')
    host.systemctl("reload", UNIT)
    place = "/etc/gpujobd/handlers.d/broken.toml: line 1: entry"
    assert place in host.journal("gpujobd", EVENT="config_refused")[-1]["MESSAGE"]
    assert "broken" not in host.jobctl("handlers").stdout
    host.run("rm", "/etc/gpujobd/handlers.d/broken.toml")
    host.systemctl("reload", UNIT)
    assert "refused" not in host.show()["StatusText"]
