"""wait, watch, log -f and events -f: pushed, and carried over a restart of the daemon."""

from __future__ import annotations

import datetime as dt
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from fake_daemon import FakeDaemon, HangUp, a_job
from gpujobd import protocol as p
from jobctl import follow
from jobctl.__main__ import run
from jobctl.connection import Daemon

HANG_S = 60


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBCTL_SOCKET", str(tmp_path / "s"))
    with FakeDaemon(tmp_path / "s") as fake:
        yield fake


def done(**fields):
    return a_job(state="completed", done=10, **fields)


# --- wait -------------------------------------------------------------------------------------------------------


def test_wait_asks_once_for_all_and_ends_well(daemon, capfd):
    daemon.answer(p.Wait, p.Jobs(id=0, jobs=[done(id=3), done(id=4)], seq=1))
    assert run(["wait", "3-4"]) == 0
    assert capfd.readouterr() == ("", "")
    assert daemon.asked(p.Wait)[0].jobs == [3, 4]


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_a_job_that_did_not_complete_is_exit_1_and_told(daemon, capfd, state):
    daemon.answer(
        p.Wait, p.Jobs(id=0, jobs=[done(id=3), a_job(id=4, state=state, reason="HandlerFailing")], seq=1)
    )
    assert run(["wait", "3", "4"]) == 1
    assert capfd.readouterr().err == f"jobctl: job 4 {state}: HandlerFailing; 0 of 10 done (0 %)\n"


def test_waiting_too_long_is_exit_5(daemon, capfd):
    assert run(["wait", "3", "--timeout", "0.2s"]) == 5
    assert capfd.readouterr().err.startswith("jobctl: timed_out: ")
    assert run(["wait", "3", "--timeout", "30"]) == 2


def test_waiting_for_no_job_is_exit_2(daemon, capfd):
    daemon.answer(p.Wait, p.Error(id=0, code=p.ErrorCode.NO_SUCH_JOB, message="there is no job 9"))
    assert run(["wait", "9"]) == 2


def test_wait_survives_a_restart(daemon, capfd):
    def wait(call):
        yield p.Alive(id=call.request.id)
        yield HangUp() if call.connection < 3 else p.Jobs(id=call.request.id, jobs=[done()], seq=1)

    daemon.on(p.Wait, wait)
    assert run(["wait", "42", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["jobs"][0]["state"] == "completed"
    assert daemon.connections == 3


def test_wait_survives_a_daemon_that_is_away_for_a_while(daemon, tmp_path):
    daemon.on(p.Wait, lambda call: [])
    environment = {**os.environ, "JOBCTL_SOCKET": str(daemon.path)}
    with subprocess.Popen([sys.executable, "-m", "jobctl", "wait", "42"], env=environment) as process:
        until(lambda: daemon.asked(p.Wait))
        daemon.stop()
        time.sleep(0.4)
        daemon.answer(p.Wait, p.Jobs(id=0, jobs=[done()], seq=1))
        daemon.start()
        assert process.wait(HANG_S) == 0


def test_a_timeout_holds_while_the_daemon_is_away(daemon, capfd):
    daemon.on(p.Wait, lambda call: [HangUp()])
    daemon.welcome = p.Welcome(p.VERSION, "x", "boot", 0)
    assert run(["wait", "42", "--timeout", "0.5s"]) == 5


# --- watch ------------------------------------------------------------------------------------------------------


def changes(call):
    for state, count in (("queued", 0), ("running", 5), ("running", 5), ("completed", 10)):
        yield p.JobChanged(id=call.request.id, job=a_job(state=state, done=count))
    yield p.Done(id=call.request.id)


def test_watch_without_a_terminal_writes_one_line_a_change(daemon, capfd):
    daemon.on(p.Watch, changes)
    assert run(["watch", "42"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "42, queued, 0 of 10 done (0 %)",
        "42, running, 5 of 10 done (50 %)",
        "42, completed, 10 of 10 done (100 %)",
    ]


def test_watch_in_json_writes_the_job_at_every_change(daemon, capfd):
    daemon.on(p.Watch, changes)
    assert run(["watch", "42", "--json"]) == 0
    assert [json.loads(line)["items"]["done"] for line in capfd.readouterr().out.splitlines()] == [
        0,
        5,
        5,
        10,
    ]


def test_watch_goes_on_after_a_restart(daemon, capfd):
    def watch(call):
        yield p.JobChanged(id=call.request.id, job=a_job(state="running", done=call.connection))
        if call.connection == 1:
            yield HangUp()
        yield p.JobChanged(id=call.request.id, job=done())

    daemon.on(p.Watch, watch)
    assert run(["watch", "42"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 3


def test_a_watched_job_that_is_removed_is_no_such_job(daemon, capfd):
    daemon.on(
        p.Watch,
        lambda call: [p.JobChanged(id=call.request.id, job=a_job()), p.Done(id=call.request.id)],
    )
    assert run(["watch", "42"]) == 2


def test_the_bar_fits_and_is_full_only_at_the_end():
    for width in (20, 40, 60, 80, 200):
        for count in (0, 1, 49_999, 50_000):
            line = follow.bar_line(a_job(state="running", done=count, total=50_000), width)
            assert len(line) <= width
            if "[" in line:
                assert ("-" not in line.split("]")[0]) is (count == 50_000)


def test_on_a_terminal_a_bar_is_drawn_and_ctrl_c_leaves_the_job_alone(daemon):
    def watch(call):
        yield p.JobChanged(id=call.request.id, job=a_job(state="running", done=5))

    daemon.on(p.Watch, watch)
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    # Whoever runs the tests in the background of a script has them ignore SIGINT, and their children with them.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "jobctl", "watch", "42"]
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        try:
            shown = read_until(leader, "50 %")
            assert "\r42 running [#" in shown
            process.send_signal(signal.SIGINT)
            shown += read_until(leader, "goes on")
            assert process.wait(HANG_S) == 130
        finally:
            process.kill()  # `with` would wait for it for ever
    os.close(leader)
    assert daemon.asked(p.Cancel) == []


# --- tenants -w -------------------------------------------------------------------------------------------------


def tenant(**fields):
    known = {"name": "production", "share": 4.0, "served_s": 90.0, "owed_s": -2.0, "running": 1, "paused": 0}
    return p.TenantView(**(known | {"queued": 3, "items_left": 70} | fields))


def tenant_lists(call, *more):
    """Two changes of one tenant, then the end of the subscription, or whatever comes instead."""
    assert call.request.follow
    accuracy = p.Accuracy(jobs=12, error=0.08, late=0.01, by_90=0.917)
    limited = tenant(
        queued=2, jobs_max=200, devices_max=1, bytes_max=1 << 30, bytes=1 << 20, accuracy=accuracy
    )
    for view in (tenant(), limited):
        yield p.TenantList(id=call.request.id, tenants=[view])
    yield from more or [p.Done(id=call.request.id)]


def test_tenants_are_followed_as_one_table_after_the_other_where_nobody_looks(daemon, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    daemon.on(p.Tenants, tenant_lists)
    assert run(["tenants", "-w"]) == 0
    first, second = capfd.readouterr().out.split("\n\n")
    assert first.splitlines()[1].split() == ["production", "4", "90", "s", "-2", "s", "3", "1", "0", "70"]
    assert "200 jobs, 1 device, 1.0 MiB of 1.0 GiB  8 % off, 92 % in time" in second
    assert run(["tenants", "-w", "--json"]) == 0
    lists = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [made["tenants"][0]["queued"] for made in lists] == [3, 2]
    assert lists[1]["tenants"][0]["accuracy"] == {"jobs": 12, "error": 0.08, "late": 0.01, "by_90": 0.917}


def test_on_a_terminal_tenants_are_drawn_in_place_and_ctrl_c_leaves(daemon):
    daemon.on(p.Tenants, lambda call: tenant_lists(call, None))
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    command = ["env", "--default-signal=INT", sys.executable, "-m", "jobctl", "tenants", "--watch"]
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        try:
            shown = read_until(leader, "in time")
            assert shown.count("TENANT") == 2
            assert "\x1b[2ATENANT" in shown  # two lines up: over the first table
            process.send_signal(signal.SIGINT)
            assert process.wait(HANG_S) == 130
        finally:
            process.kill()
    os.close(leader)


# --- log --------------------------------------------------------------------------------------------------------


def test_a_log_is_written_as_it_is(daemon, capfdbinary):
    pieces = [b"caf\xc3", b"\xa9 \xff\n", b"end"]
    daemon.on(
        p.Log,
        lambda call: [
            *(p.LogPiece(id=call.request.id, data=piece) for piece in pieces),
            p.Done(id=call.request.id),
        ],
    )
    assert run(["log", "42"]) == 0
    assert capfdbinary.readouterr().out == b"".join(pieces)
    assert run(["log", "42", "--json"]) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert lines == [{"job": 42, "text": "caf\u00e9 \ufffd"}, {"job": 42, "text": "end"}]


def test_a_log_that_is_followed_over_a_restart_repeats_nothing(daemon, capfd):
    def log(call):
        grown = b"one\ntwo\nthree\n" if call.connection > 1 else b"one\ntw"
        for at in range(0, len(grown), 4):
            yield p.LogPiece(id=call.request.id, data=grown[at : at + 4])
        yield HangUp() if call.connection == 1 else p.Done(id=call.request.id)

    daemon.on(p.Log, log)
    assert run(["log", "42", "-f"]) == 0
    assert capfd.readouterr().out == "one\ntwo\nthree\n"
    assert all(request.follow for request in daemon.asked(p.Log))


# --- events -----------------------------------------------------------------------------------------------------


def event(call, seq, **fields):
    at = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)
    return p.EventSeen(id=call.request.id, seq=seq, event={"event": "leased", "at": at, "job": 42, **fields})


def test_events_are_shown_a_line_each(daemon, capfd):
    daemon.on(
        p.Events, lambda call: [event(call, 7, device="cuda:0", detail="a b\x1b"), p.Done(id=call.request.id)]
    )
    assert run(["events"]) == 0
    line = capfd.readouterr().out
    assert re.fullmatch(
        r" +7  2026-01-3\d \d\d:\d\d:\d\d  leased +  job=42 device=cuda:0 detail='a b\\x1b'\n", line
    )
    assert daemon.asked(p.Events)[0].since == 1
    assert run(["events", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "seq": 7,
        "event": "leased",
        "at": "2026-01-31T12:00:00Z",
        "job": 42,
        "device": "cuda:0",
        "detail": "a b\x1b",
    }


def test_events_that_are_followed_resume_after_the_last_one_seen(daemon, capfd):
    daemon.answer(p.Ping, p.Pong(id=0, program="x", seq=6))

    def events(call):
        if call.connection == 1:
            yield event(call, 7)
            yield HangUp()
        yield event(call, 8)
        yield p.Done(id=call.request.id)

    daemon.on(p.Events, events)
    assert run(["events", "-f", "--json"]) == 0
    assert [json.loads(line)["seq"] for line in capfd.readouterr().out.splitlines()] == [7, 8]
    assert [request.since for request in daemon.asked(p.Events)] == [7, 8]


def test_a_gap_is_told_on_stderr_and_in_the_json_stream(daemon, capfd):
    daemon.on(
        p.Events,
        lambda call: [p.Gap(id=call.request.id, first_seq=50), event(call, 50), p.Done(id=call.request.id)],
    )
    assert run(["events", "--since", "3", "--json"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out.splitlines()[0]) == {"event": "gap", "first_seq": 50}
    assert "events 3 to 49 are not kept any more" in shown.err
    assert run(["events"]) == 0  # all that is kept: nothing is missing
    assert capfd.readouterr().err == ""


def test_events_of_one_job_are_asked_for_by_its_id(daemon):
    daemon.answer(p.Events, p.Done(id=0))
    assert run(["events", "--job", "7"]) == 0
    assert daemon.asked(p.Events)[0].job == 7


# --- how long it tries ------------------------------------------------------------------------------------------


def test_a_daemon_that_stays_away_is_given_up(daemon, capfd, monkeypatch):
    monkeypatch.setattr("jobctl.connection.FOLLOW_RECONNECT_S", 0.3)
    monkeypatch.setattr("jobctl.connection.RECONNECT_S", 0.3)
    daemon.on(p.Wait, lambda call: [HangUp()])
    daemon.on(p.Ping, lambda call: [HangUp()])
    assert run(["wait", "42"]) == 3
    assert run(["ping"]) == 3
    assert capfd.readouterr().err.count("jobctl: ") == 2


def test_a_silent_subscription_is_asked_for_again(daemon, monkeypatch):
    monkeypatch.setattr("jobctl.connection.SILENCE_S", 0.2)
    daemon.on(
        p.Wait,
        lambda call: [] if call.connection == 1 else [p.Jobs(id=call.request.id, jobs=[done()], seq=1)],
    )
    assert run(["wait", "42"]) == 0
    assert daemon.connections == 2


def test_no_answer_is_told_with_the_socket(daemon, capfd, monkeypatch):
    monkeypatch.setattr("jobctl.connection.ANSWER_S", 0.2)
    client = Daemon(str(daemon.path))
    with pytest.raises(Exception, match="no answer for 0 s"):
        client.reply(client.next_id(), within_s=0.2)
    client.hang_up()


def until(true):
    end = time.monotonic() + HANG_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def read_until(fd, text):
    shown, end = "", time.monotonic() + HANG_S
    while text not in shown:
        ready, _, _ = select.select([fd], [], [], max(0, end - time.monotonic()))
        assert ready, shown
        shown += os.read(fd, 4096).decode()
    return shown
