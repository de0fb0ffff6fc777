"""README.Debian, done literally: each block of its commands is run as it stands there."""

from __future__ import annotations

import json
import re

import pytest
from booted import Host
from harness import HANG_S, ROOT
from midway import Midway

pytestmark = pytest.mark.slow

README = (ROOT / "packaging/debian/gpujobd.README.Debian").read_text(encoding="utf-8")
TRY = "jobctl --socket /srv/try/socket"
ANSWERS = f"timeout {HANG_S:.0f} sh -c 'until {TRY} ping; do sleep 0.1; done' >/dev/null 2>&1\n"


def block(holding: str) -> str:
    """Root's command lines of the block that holds these words."""
    for paragraph in README.split("\n\n"):
        if holding in paragraph:
            lines = re.sub(r"\\\n +", "", f"{paragraph}\n")
            return "".join(re.findall(r"^ +# (.*\n)", lines, re.MULTILINE))
    raise AssertionError(f"README.Debian has no block with {holding!r}")


def run(host: Host, script: str) -> str:
    done = host.run("bash", "-e", "-c", script)
    return done.stdout


def listed(host: Host) -> dict[str, str]:
    jobs = json.loads(host.jobctl("list", "--all", "--json").stdout)["jobs"]
    return {str(job["id"]): job["state"] for job in jobs}


def test_first_job_of_section_1(fresh_host):
    lines = re.findall(r"^ +\$ ((?!man).*\n)", README.split("2. Where things are\n---")[0], re.MULTILINE)
    assert len(lines) == 4
    done = fresh_host.run("sh", "-e", "-c", "cd\n" + "".join(lines), user="alice")
    assert '{"line": 1, "output": {"sha256": ' in done.stdout


def test_backup_trial_and_restore_of_section_3(host):
    old = host.submit("checksum", [{"text": "old"}])
    host.jobctl("wait", old)
    output = host.jobctl("output", old).stdout
    job = Midway(host)
    run(host, block("tar -C /var/lib -czf"))

    job.until_more()  # it went on after the backup
    late = host.submit("count", [{"text": "late"}])
    job.go_on()
    host.jobctl("wait", late)

    host.jobctl("queue", "stop", user="root")
    trial = block("install -d -m 700 -o gpujobd /srv/try")
    tried = run(host, trial.replace(TRY, ANSWERS + TRY))
    assert f"\n{late} " not in re.sub(r"\n +", "\n", tried)
    assert re.search(rf"^ *{job.job_id} ", tried, re.MULTILINE)

    run(host, block("mv /var/lib/gpujobd /var/lib/gpujobd.old"))
    assert listed(host).keys() == {old, job.job_id}
    assert host.jobctl("output", old).stdout == output
    host.jobctl("wait", job.job_id)
    job.assert_whole()
    assert host.submit("count", [{"text": "again"}]) == late  # its number is given again


def test_first_look_of_section_8(host):
    looked = run(host, block("journalctl -u gpujobd -b -p warning -x"))
    assert "Active: active (running)" in looked
    assert "DEVICE" in looked


def test_file_of_section_6_brings_checksum_back(host):
    host.handler("echo", "toys:Echo")
    assert "checksum" not in host.jobctl("handlers").stdout
    (entry,) = re.findall(r'entry = "gpujobd_worker.handlers.checksum:Checksum"', README)
    host.write("etc/gpujobd/handlers.d/checksum.toml", f"{entry}\n")
    run(host, "gpujobd check && systemctl reload gpujobd")
    host.jobctl("wait", host.submit("checksum", [{"text": "a"}]))
