"""What is due: events and states in, things to be told out."""

from __future__ import annotations

import datetime as dt
import re

import pytest
from fake_daemon import a_job
from gpujobd_notify import due
from gpujobd_notify.due import Ear, Record
from hypothesis import given
from hypothesis import strategies as st

AT = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)
NOBODY = ()


def event(tag, seconds=1, **fields):
    return {"event": tag, "at": AT + dt.timedelta(seconds=seconds), "job": 7} | fields


def record(*on, **fields) -> Record:
    known = {"job": 7, "uid": 1000, "handler": "embed", "items": 100, "submitted_at": AT, "notify": ("ops",)}
    return Record(**known | {"notify_on": on} | fields)


def live(begin, events, ears=NOBODY):
    """All that these events make due, each event twice: that changes nothing."""
    told = []
    for seq, one in enumerate(events, 10):
        begin, found = due.observe(begin, one, seq, ears)
        told += found
    return begin, told


def kinds(told):
    return [one.story.kind for one in told]


def checkpoint(done, failed=0):
    return event("checkpointed", checkpoint={"done": done, "failed": failed}, used_ns=10**9)


def ended(done, failed=0, tag="completed"):
    return event(tag, 60, checkpoint={"done": done, "failed": failed}, used_ns=10**9)


def test_a_submission_says_whom_to_tell_and_its_owners_defaults_where_it_does_not():
    said = event("submitted", owner=1000, handler="embed", items=3, notify=["ops"], notify_on=["fail"])
    assert due.submitted(said, (("mailto:a@b.org",), ())).notify == ("ops",)
    silent = event("submitted", owner=1000, handler="embed", items=3)
    assert due.submitted(silent, (("mailto:a@b.org",), ("start",))).notify_on == ("start",)
    assert due.submitted(said | {"notify": ["none"]}, (("ops",), ())).notify == ()


def test_the_first_lease_alone_is_a_start():
    _, told = live(record("start"), [event("leased", attempt=1, device="cpu"), event("leased", attempt=2)])
    assert kinds(told) == ["start"]
    assert told[0].story.device == "cpu"


@pytest.mark.parametrize(
    ("on", "end", "kind"),
    [
        ((), ended(100), "finish"),
        (("finish",), event("cancelled"), "finish"),
        (("fail",), ended(100), None),
        (("fail",), event("cancelled"), None),
        (("fail",), ended(98, 2), "fail"),
        (("fail",), event("failed", reason="FailuresMax"), "fail"),
        (("fail",), event("expired"), "fail"),
        (("finish", "fail"), event("expired"), "fail"),
        (("finish", "fail"), ended(100), "finish"),
        (("start", "stall"), ended(100), None),
    ],
)
def test_an_end_is_told_once_and_as_a_failure_where_it_is_one(on, end, kind):
    _, told = live(record(*on), [end, end])
    assert kinds(told) == ([kind] if kind else [])


def test_steps_that_were_passed_together_are_told_as_the_last_of_them_and_never_twice():
    counts = [checkpoint(n) for n in (10, 24, 25, 26, 80, 80, 99)]
    _, told = live(record("progress=25%"), [*counts, ended(100)])
    assert kinds(told) == ["progress=25%", "progress=75%"]


def test_a_pause_is_told_again_after_it_was_over_and_the_daemons_own_stop_is_none():
    pause, resume = event("paused", reason="HeldByOwner"), event("resumed")
    _, told = live(
        record("pause"), [pause, pause, resume, event("paused", reason="DaemonStopping"), resume, pause]
    )
    assert kinds(told) == ["pause", "pause"]
    assert len({one.id(0) for one in told}) == 2
    assert not any(one.urgent for one in told)


def test_a_crash_loop_is_an_alert_also_to_those_who_asked_for_stalls():
    _, told = live(
        record("stall"), [event("paused", reason="CrashLoop"), event("paused", reason="HeldByAdmin")]
    )
    assert [(one.story.kind, one.urgent) for one in told] == [("pause", True)]


@pytest.mark.parametrize(("cause", "count"), [("stalled", 1), ("silent", 1), ("died", 0), ("daemon", 0)])
def test_a_lease_that_was_lost_to_silence_is_a_stall(cause, count):
    _, told = live(record("stall"), [event("lease_lost", cause=cause, detail="no call returned")])
    assert [one.urgent for one in told] == [True] * count


def test_the_story_has_the_figures_of_all_checkpoints():
    _, told = live(record(), [event("leased", attempt=1, device="cpu"), checkpoint(40), ended(90, 10)])
    story = told[0].story
    assert (story.done, story.failed, story.items, story.device_s) == (90, 10, 100, 2.0)


def test_each_target_is_told_once_whatever_else_names_it():
    ears = (Ear(name="ops", on=("finish",)), Ear(name="house", on=("finish", "start")))
    _, told = live(
        record(notify=("ops", "ops", "mailto:a@b.org")), [event("leased", attempt=1), ended(100)], ears
    )
    assert [(one.target, one.uid, one.story.kind) for one in told] == [
        ("house", due.HOUSE, "start"),
        ("ops", 1000, "finish"),
        ("mailto:a@b.org", 1000, "finish"),
        ("house", due.HOUSE, "finish"),
    ]


def test_ids_are_of_the_fact_and_the_target_and_of_the_past_they_belong_to():
    _, (first,) = live(record(), [ended(100)])
    _, (again,) = due.observe(record(), ended(100), 99, NOBODY)
    assert first.id(0) == again.id(0) != first.id(1)
    assert re.fullmatch("msg_[a-z2-7]{32}", first.id(0))


def test_devices_are_for_those_who_listen_for_them():
    ears = (Ear(name="ops", on=("finish",)), Ear(name="house", on=("device",)))
    ill = {"event": "device_fell_ill", "at": AT, "device": "cuda:0", "reason": "CanaryFailed", "detail": "no"}
    (told,) = due.of_a_device(ill, 3, ears)
    assert (told.target, told.urgent, told.story.job) == ("house", True, 0)


# --- gaps ---------------------------------------------------------------------------------------------------------


def shown(state, **fields):
    times = {"submitted_at": AT, "id": 7, "items": 100} | fields
    total = times.pop("items")
    return a_job(state=state, total=total, **times)


def test_a_gap_in_which_a_job_began_and_ended_is_told_as_both():
    job = shown(
        "completed", done=90, failed=10, started_at=AT, finished_at=AT, failure_codes={"rejected": 10}
    )
    after, told = due.caught_up(record("start", "finish"), job, 500, AT, NOBODY)
    assert kinds(told) == ["start", "finish"]
    assert told[1].story.failure_codes == {"rejected": 10}
    assert due.caught_up(after, job, 501, AT, NOBODY) == (after, [])


def test_after_a_gap_the_events_that_follow_tell_nothing_that_the_list_has_told():
    job = shown("paused", reason="HeldByOwner", started_at=AT, done=50)
    after, told = due.caught_up(record("start", "pause", "progress=25%"), job, 500, AT, NOBODY)
    assert kinds(told) == ["start", "pause"]
    again = [event("leased", attempt=1), checkpoint(10), event("paused", reason="HeldByOwner")]
    assert kinds(live(after, again)[1]) == ["pause"], "its lease in between ended the pause before"


def test_what_was_before_the_notifier_is_not_told():
    job = shown("running", started_at=AT, done=60, device="cpu")
    after = due.already(due.known(job, 1000, (("ops",), ("start", "progress=50%", "finish"))), job)
    assert live(after, [event("leased", attempt=2), checkpoint(70)])[1] == []
    assert kinds(live(after, [ended(100)])[1]) == ["finish"]


def test_a_job_that_is_gone_is_told_to_be_gone():
    after, told = due.vanished(record(), AT, NOBODY)
    assert [(one.story.kind, one.story.state) for one in told] == [("finish", "gone")]
    assert due.vanished(after, AT, NOBODY)[1] == []


TAGS = st.sampled_from(["leased", "checkpointed", "yielded", "paused", "resumed", "lease_lost"])


@given(
    st.lists(st.tuples(TAGS, st.integers(0, 100)), max_size=12),
    st.sets(st.sampled_from(["start", "finish", "fail", "pause", "stall", "progress=10%"])),
    st.data(),
)
def test_a_list_at_any_moment_and_the_events_from_any_earlier_one_tell_all_there_is_and_the_end_once(
    story, on, data
):
    """The reference is who missed nothing; what is told of start, progress and end must be among that, and whole."""
    done, events = 0, []
    for tag, percent in story:
        done = max(done, min(99, percent))
        more = {"checkpoint": {"done": done}} if tag in ("checkpointed", "yielded") else {}
        events.append(event(tag, reason="HeldByOwner", cause="died", attempt=1, **more))
    events.append(ended(100))
    reference = live(record(*on), events)[1]
    missed_to = data.draw(st.integers(0, len(events)))
    listed_at = data.draw(st.integers(missed_to, len(events)))
    before, told = live(record(*on), events[: data.draw(st.integers(0, missed_to))])
    state = live(record(*on), events[:listed_at])[0]
    job = shown(
        "completed" if state.over else "paused" if state.paused else "running",
        done=state.done,
        finished_at=AT,
        **({"started_at": state.started_at} if state.started_at else {}),
    )
    after, derived = due.caught_up(before, job, 1000, AT, NOBODY)
    told += derived
    told += live(after, events[missed_to:])[1]
    for key in ("start", "over"):
        assert [one.key for one in told].count(key) == [one.key for one in reference].count(key), key
