"""The verb notifications and the options --notify, --notify-on: what is asked of whom, what is shown, how it ends."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from fake_daemon import FakeDaemon, HangUp, a_job
from gpujobd import protocol as p
from jobctl.__main__ import run
from jobctl.command import occasions
from jobctl.times import now


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBCTL_SOCKET", str(tmp_path / "d"))
    monkeypatch.setenv("COLUMNS", "160")
    with FakeDaemon(tmp_path / "d") as fake:
        yield fake


@pytest.fixture
def notifier(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBCTL_NOTIFY_SOCKET", str(tmp_path / "n"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("JOBCTL_SOCKET", str(tmp_path / "no-daemon"))
    with FakeDaemon(tmp_path / "n", p.decode_notifier_request) as fake:
        fake.welcome = p.Welcome(p.VERSION, "gpujobd-notify 0.0.fake", "boot", 0)
        fake.answer(p.NotificationMute, p.Done(id=0))
        fake.answer(p.NotificationRetry, p.Done(id=0))
        yield fake


def view(number=1, **fields):
    known = {
        "job": 42,
        "kind": "finish",
        "target": "mailto:alice@example.org",
        "endpoint": "mailto",
        "state": "pending",
        "tries": 0,
        "due_at": now(),
        "created_at": now(),
    }
    return p.NotificationView(id=number, **(known | fields))


def endpoint(name, **fields):
    known = {"kind": "mail", "state": "closed", "in_flight": 0, "queued": 0}
    return p.EndpointView(name=name, **(known | fields))


def shown_list():
    """Made when it is asked for: its times are relative to now."""
    return p.NotificationList(
        id=0,
        notifications=[
            view(1, state="delivered", tries=1, delivered_at=now() - dt.timedelta(minutes=3), last_error="old news"),
            view(2, kind="progress=50%", tries=2, next_try_at=now() + dt.timedelta(minutes=5, seconds=20),
                 last_error="timed out\x1b[2J after DATA"),
            view(3, job=43, state="failed", tries=12, target="https://hooks.example.org/x", last_error="410 Gone"),
        ],
        endpoints=[
            endpoint("mailto", state="open", until_at=now() + dt.timedelta(minutes=1, seconds=5), queued=7,
                     last_error="timed out"),
            endpoint("https://hooks.example.org", kind="webhook", disabled="410 Gone"),
        ],
    )  # fmt: skip


def test_the_list_shows_what_was_told_what_waits_and_how_the_endpoints_are(notifier, capfd):
    notifier.answer(p.Notifications, shown_list())
    assert run(["notifications"]) == 0
    shown = capfd.readouterr().out
    first, second, third = shown.splitlines()[1:4]
    assert "3 min ago" in first
    assert "old news" not in first
    assert "progress=50%" in second
    assert "again in 5 min" in second
    assert "timed out\\x1b[2J after DATA" in second
    assert "\x1b" not in shown
    assert "410 Gone" in third
    assert "open, again in " in shown
    assert "disabled" in shown
    (asked,) = notifier.asked(p.Notifications)
    assert (asked.job, asked.states, asked.all, asked.after) == (0, [], False, 0)


def test_the_list_in_json_has_the_protocols_words(notifier, capfd):
    notifier.answer(p.Notifications, shown_list())
    assert run(["--json", "notifications", "42", "43", "--state", "failed", "--state", "muted", "--all"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["v"] == 1
    assert [one["id"] for one in shown["notifications"]] == [1, 2, 3, 1, 2, 3]
    assert [one["name"] for one in shown["endpoints"]] == ["https://hooks.example.org", "mailto"]
    asked = notifier.asked(p.Notifications)
    assert [(one.job, one.states, one.all) for one in asked] == [
        (42, ["failed", "muted"], True),
        (43, ["failed", "muted"], True),
    ]


def test_pages_are_asked_for_until_the_last(notifier, capfd):
    def page(call):
        after = call.request.after
        yield p.NotificationList(
            id=call.request.id, notifications=[view(after + 1)], endpoints=[], next=(after + 1) % 3
        )

    notifier.on(p.Notifications, page)
    assert run(["notifications", "--json"]) == 0
    assert [one["id"] for one in json.loads(capfd.readouterr().out)["notifications"]] == [1, 2, 3]


def test_the_last_job_is_asked_of_the_daemon_and_its_notifications_of_the_notifier(
    daemon, notifier, monkeypatch, capfd
):
    monkeypatch.setenv("JOBCTL_SOCKET", str(daemon.path))
    daemon.answer(p.Last, p.OneJob(id=0, job=a_job(id=77)))
    notifier.answer(p.Notifications, p.NotificationList(id=0, notifications=[], endpoints=[]))
    assert run(["notifications", "@"]) == 0
    assert [one.job for one in notifier.asked(p.Notifications)] == [77]
    assert capfd.readouterr().out == ""


def test_without_a_notifier_the_exit_is_3_and_says_where_it_was_looked_for(tmp_path, capfd):
    for words in (["notifications"], ["notifications", "retry", "1"], ["notifications", "defaults"]):
        assert run([*words, "--notify-socket", str(tmp_path / "none")]) == 3
        said = capfd.readouterr().err
        assert said.startswith(f"jobctl: no notifier answers: tried {tmp_path / 'none'} (No such file")


def test_an_older_or_another_program_at_the_socket_is_told_apart(notifier, capfd):
    notifier.welcome = p.Welcome(9, "x", "boot", 0)
    assert run(["notifications"]) == 3
    assert "the notifier speaks version 9" in capfd.readouterr().err
    notifier.welcome = p.Error(id=0, code=p.ErrorCode.TOO_MANY_CONNECTIONS, message="128 of 128")
    assert run(["notifications"]) == 3


def test_a_notifier_that_is_started_anew_is_asked_again(notifier, capfd):
    def once(call):
        if call.connection == 1:
            yield HangUp()
        yield p.Defaults(id=call.request.id, notify=["ops"], notify_on=[])

    notifier.on(p.NotifyDefaults, once)
    assert run(["notifications", "defaults"]) == 0
    assert capfd.readouterr().out == "ops on finish\n"
    assert notifier.connections == 2


# --- changes ----------------------------------------------------------------------------------------------------


def test_each_notification_is_retried_on_its_own_and_the_worst_code_counts(notifier, capfd):
    def answer(call):
        number = call.request.notification
        if number == 5:
            code = p.ErrorCode.NO_SUCH_NOTIFICATION
            yield p.Error(id=call.request.id, code=code, message="there is no notification 5")
        else:
            yield p.Done(id=call.request.id)

    notifier.on(p.NotificationRetry, answer)
    assert run(["notifications", "retry", "4", "5", "6", "--json"]) == 2
    shown = capfd.readouterr()
    assert json.loads(shown.out)["done"] == [4, 6]
    assert "notification 5: no_such_notification" in shown.err
    assert run(["notifications", "retry", "4"]) == 0
    assert run(["notifications", "retry"]) == 2
    assert run(["notifications", "retry", "x"]) == 2


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["mute", "--job", "42"], [(42, "", True)]),
        (["mute", "--endpoint", "ops"], [(0, "ops", True)]),
        (["unmute", "--job", "3-4", "--endpoint", "ops"], [(3, "ops", False), (4, "ops", False)]),
    ],
)
def test_jobs_and_endpoints_are_muted(notifier, words, asked):
    assert run(["notifications", *words]) == 0
    found = [(one.job, one.endpoint, one.muted) for one in notifier.asked(p.NotificationMute)]
    assert found == asked


def test_muting_is_refused_where_it_is_not_ones_own(notifier, capfd):
    notifier.answer(p.NotificationMute, p.Error(id=0, code=p.ErrorCode.FORBIDDEN, message="no"))
    assert run(["notifications", "mute", "--endpoint", "ops"]) == 4
    assert "forbidden: no" in capfd.readouterr().err


def test_defaults_are_shown_set_and_cleared(notifier, capfd):
    kept = p.Defaults(id=0, notify=["ops", "mailto:a@b.c"], notify_on=["fail"])
    notifier.answer(p.NotifyDefaults, kept)
    assert run(["notifications", "defaults"]) == 0
    assert capfd.readouterr().out == "ops, mailto:a@b.c on fail\n"
    assert run(["notifications", "defaults", "--notify", "ops", "--notify-on", "fail, stall,fail"]) == 0
    assert run(["notifications", "defaults", "--clear", "--json"]) == 0
    found = [(one.set, one.notify, one.notify_on) for one in notifier.asked(p.NotifyDefaults)]
    assert found == [(False, [], []), (True, ["ops"], ["fail", "stall"]), (True, [], [])]


@pytest.mark.parametrize(
    "words",
    [
        ["mute"],
        ["unmute", "42"],
        ["defaults", "x"],
        ["defaults", "--clear", "--notify", "ops"],
        ["defaults", "--notify-on", "fail"],
        ["--job", "42"],
        ["42", "--notify", "ops"],
        ["mute", "--all", "--job", "1"],
        ["retry", "1", "--clear"],
        ["--state", "lost"],
    ],
)
def test_words_that_have_no_meaning_together_are_a_usage_error_and_nothing_is_asked(notifier, words):
    assert run(["notifications", *words]) == 2
    assert notifier.requests == []


# --- asking for it ------------------------------------------------------------------------------------------------


def test_a_submission_says_whom_to_tell_and_when(daemon, tmp_path):
    daemon.answer(p.Submit, p.Accepted(id=0, job=7))
    (tmp_path / "in").write_text("{}\n")
    words = ["submit", "embed", str(tmp_path / "in"), "--notify", "ops", "--notify", "mailto:a@example.org"]
    assert run([*words, "--notify-on", "start,progress=25%", "--notify-on", "fail"]) == 0
    (asked,) = daemon.asked(p.Submit)
    assert asked.notify == ["ops", "mailto:a@example.org"]
    assert asked.notify_on == ["start", "progress=25%", "fail"]


@pytest.mark.parametrize("code", [p.ErrorCode.NO_NOTIFIER, p.ErrorCode.BAD_NOTIFY])
def test_a_refusal_for_whom_to_tell_exits_6(daemon, tmp_path, code, capfd):
    daemon.answer(
        p.Submit, p.Error(id=0, code=code, message="the notifier has no endpoint opps; there are: ops")
    )
    (tmp_path / "in").write_text("{}\n")
    assert run(["submit", "embed", str(tmp_path / "in"), "--notify", "opps"]) == 6
    assert f"{code}: the notifier has no endpoint opps" in capfd.readouterr().err


def test_a_retry_says_nothing_of_it_unless_asked_to(daemon):
    daemon.answer(p.Retry, p.Accepted(id=0, job=8))
    assert run(["retry", "7"]) == 0
    assert run(["retry", "7", "--notify", "none", "--notify-on", "fail"]) == 0
    assert [(one.notify, one.notify_on) for one in daemon.asked(p.Retry)] == [([], []), (["none"], ["fail"])]


def test_show_tells_whom_it_tells_and_what_the_failures_were(daemon, capfd):
    job = a_job(done=80, failed=20, total=100, failure_codes={"rejected": 3, "bad_json": 17}, notify=["ops"],
                notify_on=["fail", "stall"])  # fmt: skip
    daemon.answer(p.Show, p.OneJob(id=0, job=job))
    assert run(["show", "42"]) == 0
    lines = dict(line.split(":", 1) for line in capfd.readouterr().out.splitlines())
    assert lines["failed with"].strip() == "bad_json 17, rejected 3"
    assert lines["tells"].strip() == "ops on fail, stall"


def test_occasions_are_words_with_commas_each_once():
    assert occasions(("start, fail", "fail", ",progress=5%,")) == ["start", "fail", "progress=5%"]
    assert occasions(()) == []
