"""The daemon as a service: what hangs is noticed, what was asked before the end is answered, what is wrong is said."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from gpujobd import __version__, protocol
from harness import HANG_S, Host, fake, hosted, until
from msgspec import UNSET

SLOW = "trouble:Slow"
COUNT = "toys:Count"


def texts(count):
    return [{"text": f"text {n}"} for n in range(count)]


class Systemd:
    """The socket that sd_notify(3) talks to."""

    def __init__(self, path):
        self.path = str(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self.sock.setblocking(False)
        self.heard = []

    def listen(self):
        """Everything that was said so far, each message as its fields."""
        with contextlib.suppress(BlockingIOError):
            while True:
                lines = self.sock.recv(1 << 16).decode("ascii").split("\n")
                self.heard.append(dict(line.split("=", 1) for line in lines))
        return self.heard

    def said(self, key):
        return [fields[key] for fields in self.listen() if key in fields]

    def forget(self):
        self.listen()
        self.heard = []


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    found = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", found.path)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    yield found
    found.sock.close()


@pytest.fixture
def watched(monkeypatch):
    """systemd wants a sign of life every 0.9 s."""
    monkeypatch.setenv("WATCHDOG_USEC", "900000")


# --- what hangs -------------------------------------------------------------------------------------------------------

HANGS = """
import os, sys, time
from gpujobd import disk, supervisor, turns, watchdog
from gpujobd.__main__ import main

kind, flag = sys.argv.pop(1), sys.argv.pop(1)
watchdog.STUCK_S = 0.6

def hang_for_ever():
    open(flag + ".hangs", "w").close()
    while os.path.exists(flag):
        time.sleep(0.01)

def hanging(do):
    def wrapped(*args, **kwargs):
        if os.path.exists(flag):
            hang_for_ever()
        return do(*args, **kwargs)
    return wrapped

if kind == "loop":
    turns.Turns.turn = hanging(turns.Turns.turn)
elif kind == "slow disk":
    sync = disk.Disk.fdatasync
    disk.Disk.fdatasync = lambda *args: (time.sleep(0.05), sync(*args))
elif kind == "sync":
    disk.Disk.fdatasync = hanging(disk.Disk.fdatasync)
else:
    looked = supervisor.Supervisor._look
    def look(self, now):
        if not os.path.exists(flag):
            looked(self, now)
    supervisor.Supervisor._look = look
main(sys.argv[1:])
"""


@contextlib.contextmanager
def hanging(tmp_path, kind, config=""):
    """A daemon in which something hangs while the file is there."""
    host = Host(tmp_path / "host", config, {"count": fake(COUNT)})
    flag = tmp_path / "hang"
    host.program = [sys.executable, "-c", HANGS, kind, flag]
    host.launch()
    try:
        yield host, flag
    finally:
        flag.unlink(missing_ok=True)
        host.__exit__()


def pings_stop(systemd):
    """Twice as long as systemd would wait: nothing."""
    systemd.forget()
    time.sleep(1.8)
    return systemd.said("WATCHDOG") == []


def test_a_loop_that_hangs_stops_the_pings_and_its_abort_shows_where(tmp_path, systemd, watched):
    with hanging(tmp_path, "loop") as (host, flag):
        until(lambda: len(systemd.said("WATCHDOG")) > 2, "pings")
        flag.touch()
        until(flag.with_name("hang.hangs").exists, "the hang")
        assert pings_stop(systemd)
        host.process.send_signal(signal.SIGABRT)  # as systemd does
        assert host.process.wait(HANG_S) == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in host.log()
        assert "in hang_for_ever" in host.log()


def test_a_sync_that_hangs_stops_the_pings_until_it_is_over(tmp_path, systemd, watched):
    with hanging(tmp_path, "sync") as (host, flag):
        until(lambda: len(systemd.said("WATCHDOG")) > 2, "pings")
        with host.client() as client:
            flag.touch()
            client.send(protocol.Queue(id=100, action="stop"))
            until(lambda: any("stuck: the disk" in line for line in systemd.said("STATUS")), "the status")
            assert pings_stop(systemd)
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)  # nothing else is felt
            assert "the disk has been syncing the journal" in host.log()
            flag.unlink()
            until(lambda: systemd.said("WATCHDOG"), "pings again")
            assert "it goes on" in host.log()
            assert isinstance(client.receive(), protocol.Done)
        assert host.stop() == 0


def test_workers_that_nobody_looks_at_stop_the_pings(tmp_path, systemd, watched):
    with hanging(tmp_path, "supervisor") as (host, flag):
        until(lambda: len(systemd.said("WATCHDOG")) > 2, "pings")
        flag.touch()
        until(lambda: any("nobody looked at the workers" in line for line in systemd.said("STATUS")), "it")
        assert pings_stop(systemd)
        flag.unlink()
        until(lambda: systemd.said("WATCHDOG"), "pings again")
        assert host.stop() == 0


# --- stop -------------------------------------------------------------------------------------------------------------


def test_every_wish_that_was_kept_was_answered_before_the_end(tmp_path):
    with hanging(tmp_path, "slow disk") as (host, _):
        until(lambda: "is ready" in host.log(), "the daemon")
        answered = []

        def ask(client, name):
            """Wish without waiting for answers until the daemon hangs up."""
            with contextlib.suppress(OSError):
                for number in itertools.count(1):
                    client.send(protocol.Queue(id=number, action="stop", message=f"{name}-{number}"))
                    time.sleep(0.003)  # some arrive while others are being written

        def listen(client, name):
            with contextlib.suppress(OSError):
                while True:
                    reply = client.receive()
                    if isinstance(reply, protocol.Done):
                        answered.append(f"{name}-{reply.id}")

        with contextlib.ExitStack() as stack:
            clients = [(stack.enter_context(host.client()), name) for name in "abcd"]
            threads = [threading.Thread(target=do, args=c) for c in clients for do in (ask, listen)]
            for thread in threads:
                thread.start()
            until(lambda: len(answered) > 200, "some answers")
            assert host.stop() == 0
            for thread in threads:
                thread.join(HANG_S)
        host.program = [sys.executable, "-m", "gpujobd"]
        host.start()
        told = host.jobctl("events", "--json").stdout.splitlines()
        kept = [event["message"] for event in map(json.loads, told) if event["event"] == "queue_switched"]
        assert sorted(kept) == sorted(answered)


def in_hand(host, job):
    """Whether the handler has items of the job: its page of suspects names lines."""
    page = host.results(job).with_name("suspects")
    return page.exists() and any(page.read_bytes()[8:24])


def test_systemd_hears_how_far_a_stop_is_and_that_more_time_is_needed(tmp_path, systemd):
    slow = fake(SLOW, batch_max=1, params={"item_s": 3.0})
    with hosted(tmp_path / "host", slow=slow) as host:
        with host.client() as client:
            job = client.submit("slow", texts(500)).job
            until(lambda: in_hand(host, job), "a call of the handler")
        systemd.forget()
        assert host.stop() == 0
        assert systemd.said("STOPPING") == ["1"]
        status = systemd.said("STATUS")
        assert any(re.match(r"stopping; \S+ on cpu: \d+/500", line) for line in status)
        assert status[-1] == "stopping: writing the last snapshot"
        assert len(systemd.said("EXTEND_TIMEOUT_USEC")) >= 2
        assert [fields for fields in systemd.heard if "EXTEND_TIMEOUT_USEC" in fields][-1][
            "STATUS"
        ] == status[-1]
        assert "stopped: 1 jobs wait for the next start" in host.log()


def test_a_sighup_on_the_way_down_changes_nothing(tmp_path, systemd):
    slow = fake(SLOW, batch_max=1, params={"item_s": 3.0})
    with hosted(tmp_path / "host", slow=slow) as host:
        with host.client() as client:
            client.submit("slow", texts(500))
            until(lambda: in_hand(host, 1), "a call of the handler")
        host.process.send_signal(signal.SIGTERM)
        until(lambda: systemd.said("STOPPING"), "the stop")
        host.process.send_signal(signal.SIGHUP)
        assert host.process.wait(HANG_S) == 0
        assert systemd.said("RELOADING") == []
        assert len(systemd.said("READY")) == 1


# --- reload -----------------------------------------------------------------------------------------------------------


def test_a_reload_is_announced_in_the_time_that_systemd_counts_in(tmp_path, systemd):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        until(lambda: systemd.said("READY"), "READY")
        systemd.forget()
        before = time.monotonic_ns() // 1000
        host.process.send_signal(signal.SIGHUP)
        until(lambda: systemd.said("READY"), "READY again")
        (announced,) = (fields for fields in systemd.heard if "RELOADING" in fields)
        assert before <= int(announced["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        states = [key for fields in systemd.heard for key in fields if key in ("RELOADING", "READY")]
        assert states == ["RELOADING", "READY"]
        assert "configuration reloaded: 1 handlers; nothing has changed" in host.log()
        assert host.stop() == 0


def test_a_refused_reload_is_in_the_status_until_a_good_one(tmp_path, systemd):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        for broken, said in (
            ("[limits]\nitems_per_job_max = 0\n", "gpujobd.toml: line 3: limits.items_per_job_max"),
            ("limits = [", "gpujobd.toml: Invalid value (at end of document)"),
        ):
            host.configure(broken, {})
            host.process.send_signal(signal.SIGHUP)
            until(lambda said=said: any(said in line for line in systemd.said("STATUS")), "the refusal")
            assert said in host.log()
        host.configure(
            "[tenants.alice]\nshare = 2.0\n[limits]\nitems_per_job_max = 7\n", {"other": fake(SLOW)}
        )
        systemd.forget()
        host.process.send_signal(signal.SIGHUP)
        until(lambda: systemd.said("READY"), "the reload")
        assert systemd.said("STATUS")[-1] == "idle; 0 waiting"
        assert "limits.items_per_job_max: 50000 -> 7; tenants.alice.members: none -> []" in host.log()
        assert "tenants.alice.share: none -> 2.0; handler other added" in host.log()
        host.configure('devices = "auto"\n', {"other": fake(SLOW, batch_max=2)})
        (host.folder / "handlers.d" / "count.toml").unlink()
        host.process.send_signal(signal.SIGHUP)
        until(lambda: "(with the next start)" in host.log(), "the devices")
        assert 'devices: ["cpu"] -> "auto" (with the next start)' in host.log()
        assert "handler count removed; handler other changed: batch_max" in host.log()
        assert host.stop() == 0


@pytest.mark.parametrize("change", ["handler", "worker"])
def test_a_worker_of_a_changed_handler_keeps_its_lease_and_is_replaced_then(tmp_path, change):
    slow = fake(SLOW, batch_max=4, params={"item_s": 0.02})
    with hosted(tmp_path / "host", slow=slow) as host, host.client() as client:
        job = client.submit("slow", texts(200)).job
        until(lambda: client.job(job).items.done > 0, "a checkpoint")
        if change == "handler":
            host.configure("", {"slow": fake(SLOW, batch_max=4, params={"item_s": 0.001})})
        else:
            host.configure("[worker]\ncheckpoint_s = 0.5\n", {})
        host.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration reloaded" in host.log(), "the reload")
        (final,) = client.wait(job)
        assert (final.state, final.attempt, final.interruptions) == ("completed", 1, UNSET)
        (after,) = client.wait(client.submit("slow", texts(4)).job)
        assert after.state == "completed"
        workers = re.findall(r"worker (\d+) loads slow", host.log())
        assert len(workers) == len(set(workers)) == 2
        assert "lost its lease" not in host.log()


# --- starts that are refused ------------------------------------------------------------------------------------------


def refused(host, *, status, env=None):
    """Start it to its end, return the one line that it says."""
    words = ["serve", "--config", host.folder / "gpujobd.toml", "--state-dir", host.folder / "state"]
    command = [sys.executable, "-m", "gpujobd", *words, "--socket", host.socket, "--log-format", "json"]
    done = subprocess.run(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, check=False, timeout=HANG_S, env=env
    )
    assert done.returncode == status
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["event"], line["level"]) == ("start_refused", "critical")
    return line["message"]


def test_a_start_that_is_refused_says_why_to_systemd_in_one_line(tmp_path, systemd):
    host = Host(tmp_path / "host", "[limits]\nqueued = 1\n")
    message = refused(host, status=78)
    assert message == f"{host.folder}/gpujobd.toml: line 3: limits.queued: unknown key"
    assert systemd.listen() == [{"STATUS": f"refused: {message}", "ERRNO": str(errno.EINVAL)}]


def test_a_journal_that_is_refused_says_so_to_systemd(tmp_path, systemd):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        with host.client() as client:
            client.wait(client.submit("count", texts(3)).job)
        host.stop(signal.SIGKILL)
    (segment,) = (host.folder / "state" / "journal").glob("seg-*")
    rotten = bytearray(segment.read_bytes())
    rotten[4096 + 100] ^= 1
    segment.write_bytes(rotten)
    systemd.forget()
    message = refused(host, status=78)
    assert segment.name in message
    assert "gpujobd fsck" in message
    assert systemd.said("ERRNO") == [str(errno.EUCLEAN)]
    assert systemd.said("STATUS")[-1].startswith("refused: ")


def test_a_second_daemon_says_so_to_systemd(tmp_path, systemd):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        systemd.forget()
        message = refused(host, status=1)
        assert "another process has this journal open" in message
        assert systemd.said("ERRNO") == [str(errno.EBUSY)]


def test_the_log_tells_of_a_life_from_ready_to_stopped(tmp_path):
    with contextlib.ExitStack() as stack:
        host = Host(tmp_path / "host", "", {"count": fake(COUNT)})
        stack.callback(host.__exit__)
        host.start("--log-format", "json")
        with host.client() as client:
            job = client.submit("count", texts(3)).job
            client.wait(job)
            client.ask(protocol.Queue, action="stop", message="new driver")
        assert host.stop() == 0
        lines = [json.loads(line) for line in host.log().splitlines()]
    assert all(line["message_id"] for line in lines)
    words = [line["event"] for line in lines]
    assert (words[0], words[-1]) == ("ready", "stopped")
    assert lines[0]["version"] == __version__
    assert lines[0]["replay_s"] >= 0
    assert {"handler_loaded", "queue_switched", "stopping"} < set(words)
    story = [line for line in lines if line.get("job_id") == job]
    assert [line["event"] for line in story] == ["leased", "completed"]
    assert story[-1]["items_per_s"] > 0
