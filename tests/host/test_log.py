"""systemd's journal: the story of a job by its fields, what nobody can forge there, and a journald that does not read."""

from __future__ import annotations

import json

import pytest
from booted import Host
from gpujobd import catalog, protocol
from harness import Client, until

pytestmark = pytest.mark.slow

JOURNALD = "systemd-journald.service"
TIMES = ["QUEUED_S", "LOAD_S", "READ_S", "COMPUTE_S", "WRITE_S", "SYNC_S", "TOTAL_S", "ITEMS_PER_S"]
# What a user may send to journald's socket himself.
FORGE = """
import socket, sys
fields = [line.encode() for line in sys.argv[1:]]
to = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
to.sendto(b"\\n".join(fields) + b"\\n", "/run/systemd/journal/socket")
"""


def finished(host: Host) -> str:
    job = host.submit("checksum", [{"text": "a"}, {"text": "b"}, {"no": "text"}])
    assert host.jobctl("wait", job, check=False).returncode == 1  # an item failed
    return job


def words(entries):
    return [entry.get("EVENT") for entry in entries]


def test_story_of_a_job_is_found_by_its_number(host):
    job = finished(host)
    story = host.journal("gpujobd", JOB_ID=job)
    assert words(story) == ["leased", "completed"]
    for entry in story:
        assert entry["MESSAGE_ID"] == catalog.MESSAGE_IDS[entry["EVENT"]]
        assert (entry["TENANT"], entry["HANDLER"], entry["DEVICE"]) == ("alice", "checksum", "cpu")
        assert entry["ATTEMPT"] == "1"
        assert entry["PRIORITY"] == "6"
        assert entry["_SYSTEMD_UNIT"] == "gpujobd.service"
        assert entry["MESSAGE"].startswith(f"job {job} ")
    last = story[-1]
    assert all(float(last[name]) >= 0 for name in TIMES)
    assert (last["ITEMS"], last["FAILURES"]) == ("3", "1")


def test_explanations_of_the_catalog_stand_below_the_entries(host):
    job = finished(host)
    told = host.run("journalctl", "--quiet", "--catalog", "--unit=gpujobd", f"JOB_ID={job}").stdout
    assert f"Subject: Job {job} is completed\n" in told
    assert "Documentation: man:jobctl(1)" in told
    known = host.run("journalctl", "--list-catalog").stdout
    assert [number for number in catalog.MESSAGE_IDS.values() if number not in known] == []


def test_who_pauses_and_why_is_told_with_the_uid(host):
    job = host.jobctl("submit", "checksum", "-", "--begin", "1d", text="{}\n").stdout.strip()
    host.jobctl("pause", job, "-m", "looks wrong", user="ada")
    (paused,) = host.journal("gpujobd", JOB_ID=job, EVENT="paused")
    assert paused["BY_UID"] == host.run("id", "-u", "ada").stdout.strip()
    assert paused["REASON"] == "HeldByAdmin"
    assert paused["MESSAGE"].endswith("by ada: looks wrong")


def test_no_text_of_a_user_becomes_a_field_or_a_line(host):
    job = host.jobctl("submit", "checksum", "-", "--begin", "1d", text="{}\n").stdout.strip()
    forged = "fine\nJOB_ID=4242\nPRIORITY=0\nMESSAGE=the disk burns\n"
    host.jobctl("pause", job, "-m", forged)
    host.jobctl("submit", "checksum", "-", "--name", forged, text="{}\n", check=False)
    assert host.journal("", JOB_ID=4242) == []
    assert host.journal("", MESSAGE="the disk burns") == []
    (paused,) = host.journal("gpujobd", JOB_ID=job, EVENT="paused")
    assert paused["PRIORITY"] == "6"


def test_entry_that_a_user_sends_to_journald_is_not_in_the_story_of_a_job(host):
    job = finished(host)
    fields = [f"JOB_ID={job}", "EVENT=completed", "UNIT=gpujobd.service", "MESSAGE=not true"]
    fields += [
        "_SYSTEMD_UNIT=gpujobd.service",
        "OBJECT_SYSTEMD_UNIT=gpujobd.service",
        "SYSLOG_IDENTIFIER=gpujobd",
    ]
    host.run("python3", "-c", FORGE, *fields, user="bob")
    assert len(host.journal("", MESSAGE="not true")) == 1  # it came through
    assert words(host.journal("gpujobd", JOB_ID=job)) == ["leased", "completed"]


def test_restarted_journald_gets_what_follows(host):
    host.systemctl("restart", JOURNALD)
    assert words(host.journal("gpujobd", JOB_ID=finished(host))) == ["leased", "completed"]


ENTRIES = 20_000


def change_priority(client: Client, job: int, times: int) -> None:
    """An entry each; some hundreds of bytes, so that 20,000 are more than the daemon keeps for journald."""
    message = "x" * 200
    for number in range(times):
        if number >= protocol.IN_FLIGHT_MAX:
            assert isinstance(client.receive(), protocol.Done)
        level = ("low", "normal")[number % 2]
        client.send(protocol.SetPriority(id=number + 1, job=job, priority=level, message=message))
    for _ in range(min(times, protocol.IN_FLIGHT_MAX)):
        assert isinstance(client.receive(), protocol.Done)


def test_stopped_journald_holds_nobody_up_and_is_told_later_what_is_missing(host):
    job = int(host.jobctl("submit", "checksum", "-", "--begin", "1d", text="{}\n").stdout)
    journald = int(host.systemctl("show", "-P", "MainPID", JOURNALD).stdout)
    host.kill("STOP", journald)
    try:
        with Client(host.root / "run/gpujobd/control.sock") as client:
            change_priority(client, job, ENTRIES)
        host.jobctl("ping")
        during = finished(host)
    finally:
        host.kill("CONT", journald)
    # What comes before journald has taken the count is missing as well, and counted.
    until(lambda: host.journal("gpujobd", EVENT="entries_dropped"), "the journal to say what is missing")
    assert words(host.journal("gpujobd", JOB_ID=finished(host))) == ["leased", "completed"]

    changed = host.journal("gpujobd", JOB_ID=job, EVENT="priority_changed")
    dropped = host.journal("gpujobd", EVENT="entries_dropped")
    missing = sum(int(entry["DROPPED"]) for entry in dropped)
    assert missing > 0
    assert dropped[0]["PRIORITY"] == "4"
    of_during = host.journal("gpujobd", JOB_ID=during)
    assert len(changed) + len(of_during) + missing == ENTRIES + 2, json.dumps(dropped)
    assert host.show()["NRestarts"] == "0"
