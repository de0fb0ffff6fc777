"""Whom a job may tell: what the notifier said that it reaches, and what the door makes of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from core_house import ALICE, BOB, ROOT, WATCHER, House, persistent, submission
from gpujobd.core import events, inputs, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.model import S_NS
from gpujobd.core.refused import Refused
from gpujobd.core.telling import GONE_NS
from gpujobd.protocol import (
    ATTEND_WORD_CHARS_MAX,
    ATTEND_WORDS_MAX,
    NOTIFY_TARGETS_MAX,
    ErrorCode,
    covers,
    progress_step,
)
from hypothesis import given
from hypothesis import strategies as st

REACH: dict[str, Any] = {
    "names": ("ops", "lab-channel"),
    "admin_names": ("pager",),
    "url_hosts": ("hooks.example.org", "*.corp.example"),
    "mail_domains": ("example.org",),
}


def attended(**changes: Any) -> House:
    house = House()
    house.give(inputs.Attend(who=WATCHER, **(REACH | changes)))
    return house


def refused(house: House, notify: tuple[str, ...], notify_on: tuple[str, ...] = (), who: Any = ALICE) -> str:
    """The code and the message of the door's no."""
    seq = house.state.seq
    with pytest.raises(Refused) as caught:
        house.submit(who, notify=notify, notify_on=notify_on)
    assert house.state.seq == seq
    return f"{caught.value.code}: {caught.value.message}"


# --- is it here? --------------------------------------------------------------------------------------------------


def test_before_any_notifier_came_nobody_can_be_told_and_none_is_no_wish() -> None:
    house = House()
    assert refused(house, ("ops",)).startswith("no_notifier: no notifier has ever been here")
    job = house.job(house.submit(notify=("none",)))
    assert job.notify == ("none",)
    assert house.job(house.submit(notify_on=("fail",))).notify_on == ("fail",)  # for the owner's defaults


def test_a_notifier_that_left_counts_as_here_for_ten_minutes_and_again_once_it_is_back() -> None:
    house = attended()
    house.give(inputs.Leave())
    house.wait(GONE_NS / S_NS)
    assert house.submit(notify=("ops",))
    house.wait(61)
    assert refused(house, ("ops",)) == (
        "no_notifier: the notifier has been gone for 11 minutes: gpujobd-notify does not run"
    )
    house.give(inputs.Attend(who=WATCHER, **REACH))
    assert house.submit(notify=("ops",))
    house.wait(10 * GONE_NS / S_NS)  # it is here, however long it says nothing
    assert house.submit(notify=("ops",))


def test_a_clock_that_was_put_back_a_year_does_not_keep_a_notifier_here_for_a_year() -> None:
    house = attended()
    house.give(inputs.Leave())
    house.wait(-5)
    assert house.submit(notify=("ops",))
    house.wait(-365 * 86_400)
    assert refused(house, ("ops",)).startswith("no_notifier")


def test_a_start_of_the_daemon_is_the_leaving_of_who_was_here() -> None:
    house = attended()
    house.wait(3600)
    house.give(inputs.Start(boot_id="b", version="1", devices=("cpu",)))
    house.wait(GONE_NS / S_NS)
    assert house.submit(notify=("ops",))
    house.give(
        inputs.Start(boot_id="c", version="1", devices=("cpu",))
    )  # the leaving is that of the first start
    house.wait(60)
    assert refused(house, ("ops",)).startswith("no_notifier")


def test_what_is_said_again_is_no_event_and_leaving_is_told_once() -> None:
    house = attended()
    assert house.give(inputs.Attend(who=WATCHER, **REACH)) == []
    assert house.give(inputs.Attend(who=ROOT, **REACH)) == []
    (changed,) = house.give(inputs.Attend(who=WATCHER, names=("ops",)))
    assert changed == events.NotifierAttached(at_ns=house.now_ns, by=WATCHER.uid, names=("ops",))
    assert len(house.give(inputs.Leave())) == 1
    assert house.give(inputs.Leave()) == []
    (back,) = house.give(inputs.Attend(who=WATCHER, names=("ops",)))
    assert isinstance(back, events.NotifierAttached)


def test_attending_takes_an_observer_and_words_that_fit_a_line() -> None:
    house = House()

    def no(who: Any = WATCHER, **words: Any) -> ErrorCode:
        with pytest.raises(Refused) as caught:
            house.give(inputs.Attend(who=who, **words))
        return caught.value.code

    assert no(ALICE) is ErrorCode.FORBIDDEN
    assert no(names=("x",) * (ATTEND_WORDS_MAX + 1)) is ErrorCode.BAD_REQUEST
    for word in ("", "a b", "a\n", "x" * (ATTEND_WORD_CHARS_MAX + 1), "bücher.example"):
        assert no(url_hosts=(word,)) is ErrorCode.BAD_REQUEST
    assert house.state.notifier is None


def test_the_most_a_notifier_can_say_fits_a_frame() -> None:
    words = tuple(f"{n:0{ATTEND_WORD_CHARS_MAX}}" for n in range(ATTEND_WORDS_MAX))
    house = House()
    (event,) = house.give(
        inputs.Attend(who=ROOT, names=words, admin_names=words, url_hosts=words, mail_domains=words)
    )
    assert len(events.encode(event)) < 512 << 10
    assert len(refused(house, ("nobody-such",))) < 12 * 300


# --- may it be asked? ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "ops",
        "lab-channel",
        "https://hooks.example.org/T0/B1?x=y&z=[1]",
        "HTTPS://Hooks.Example.Org:8443/",
        "http://hooks.example.org",
        "https://hooks.example.org.",
        "https://a.b.corp.example/x",
        "mailto:alice@example.org",
        "MAILTO:alice+jobs@EXAMPLE.org",
    ],
)
def test_what_the_notifier_reaches_is_accepted_and_kept_as_it_was_given(target: str) -> None:
    house = attended()
    job = house.job(house.submit(notify=(target,), notify_on=("start", "progress=25%")))
    assert (job.notify, job.notify_on) == ((target,), ("start", "progress=25%"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("opps", "the notifier has no endpoint opps; there are: lab-channel, ops"),
        ("pager", "only administrators may name pager"),
        ("https://evil.example/", "webhooks go to *.corp.example, hooks.example.org, not to evil.example"),
        ("https://corp.example/", "not to corp.example"),
        ("https://xcorp.example/", "not to xcorp.example"),
        ("https://hooks.example.org.evil.example/", "not to hooks.example.org.evil.example"),
        ("https://hooks.example.org@evil.example/", "without a name or a password"),
        ("https://evil.example\\@hooks.example.org/", "without a name or a password"),
        ("https://hooks.example.org\\.evil.example/", "is no https://HOST/"),
        ("https://hooks.example.org/#x", "is no https://HOST/"),
        ("https://a..corp.example/", "is no https://HOST/"),
        ("https://-a.corp.example/", "is no https://HOST/"),
        ("mailto:a..b@example.org", "is not one address"),
        ("mailto:.a@example.org", "is not one address"),
        ("mailto:a@example.org.", "is not one address"),
        (f"mailto:{'a' * 65}@example.org", "is not one address"),
        ("https:hooks.example.org", "is no https://HOST/"),
        ("https:///x", "is no https://HOST/"),
        ("https://[::1/", "is no https://HOST/"),
        ("https://hooks.example.org:99999/", "is no https://HOST/"),
        ("mailto:alice@example.com", "mail goes to example.org, not to example.com"),
        ("mailto:alice@x.example.org", "not to x.example.org"),
        ("mailto:alice", "is not one address"),
        ("mailto:a@example.org,b@example.org", "is not one address"),
        ("mailto:a@example.org?bcc=b@evil.example", "is not one address"),
        ("mailto:a%0aBcc:b@example.org", "is not one address"),
        ("mailto:<a@example.org>", "is not one address"),
        ("ftp://hooks.example.org/", "neither an endpoint's name, nor http:, https: or mailto:"),
        ("file:/etc/passwd", "neither"),
        ("", "printable"),
        ("a b", "printable"),
        ("https://hooks.example.org/\n", "printable"),
        ("https://h\u043eoks.example.org/", "printable"),
        ("x" * 501, "501 characters, allowed are 500"),
    ],
)
def test_what_it_does_not_reach_is_refused_and_the_refusal_says_what_is_allowed(
    target: str, said: str
) -> None:
    message = refused(attended(), ("ops", target))
    assert message.startswith("bad_notify: ")
    assert said in message


def reached(text: str) -> bool:
    """Whether the notifier itself takes it for a target."""
    from gpujobd_notify.targets import TargetError, parse

    try:
        parse(text)
    except TargetError:
        return False
    return True


@given(
    st.one_of(
        st.text(alphabet="aZ09.-_@:/?#[]%+ \\", max_size=20).map(lambda rest: f"https://{rest}"),
        st.text(alphabet="aZ09.-_@:/?#[]%+ \\,;<>", max_size=20).map(lambda rest: f"mailto:{rest}"),
        st.text(max_size=30),
    )
)
def test_what_the_door_lets_in_the_notifier_can_read(text: str) -> None:
    """Whatever else: a submission that was accepted must not turn out to tell nobody."""
    house = attended(url_hosts=("*",), mail_domains=("*",), names=())
    try:
        house.submit(notify=(text,))
    except Refused:
        return
    assert text == "none" or reached(text) or "[" in text  # of numbers in brackets the notifier knows more


def test_a_hook_is_the_administrators_and_nobody_else_is_shown_it() -> None:
    house = attended()
    assert house.submit(ROOT, notify=("pager",))
    assert "pager" not in refused(house, ("x",))
    assert "pager" in refused(house, ("x",), who=ROOT)


def test_with_nothing_allowed_the_refusal_says_none() -> None:
    house = attended(url_hosts=(), mail_domains=(), names=())
    assert refused(house, ("https://x.example/",)).endswith("webhooks go to none, not to x.example")
    assert refused(house, ("ops",)).endswith("there are: none")


def test_there_is_a_bound_on_targets_and_none_stands_alone() -> None:
    house = attended()
    assert house.submit(notify=("ops",) * NOTIFY_TARGETS_MAX)
    assert refused(house, ("ops",) * (NOTIFY_TARGETS_MAX + 1)).startswith("bad_notify: 9 targets")
    assert refused(house, ("none", "ops")) == "bad_notify: none tells nobody, and stands alone"


@pytest.mark.parametrize(
    "word", ["end", "FINISH", "", "progress=0%", "progress=100%", "progress=5", "progress=\u0665%"]
)
def test_a_word_that_is_no_occasion_is_refused(word: str) -> None:
    assert "is no occasion to tell; there are: start, finish, fail" in refused(attended(), ("ops",), (word,))
    assert refused(attended(), (), ("start",) * 17).endswith("17 occasions, allowed are 16")


def test_steps_of_progress_are_whole_percents() -> None:
    assert [progress_step(f"progress={n}%") for n in (1, 25, 99)] == [1, 25, 99]
    assert progress_step("progress=025%") is None


def test_patterns_mean_a_host_all_below_a_domain_or_any() -> None:
    assert covers("*", "anything")
    assert covers("A.example", "a.EXAMPLE.")
    assert covers("*.example", "a.b.example")
    assert not covers("*.example", "example")
    assert not covers("*.example", ".example")
    assert not covers("a.example", "b.a.example")
    assert covers("127.0.0.1", "127.0.0.1")


# --- what becomes of it ---------------------------------------------------------------------------------------------


def test_a_repeat_of_a_submission_with_other_targets_is_a_conflict() -> None:
    house = attended()
    first = submission(notify=("ops",))
    house.give(inputs.Submit(who=ALICE, submission=first))
    assert house.give(inputs.Submit(who=ALICE, submission=first)) == []
    house.give(inputs.Leave())
    house.wait(3600)
    assert house.give(inputs.Submit(who=ALICE, submission=first)) == []  # what is in is in, notifier or not
    with pytest.raises(Refused) as caught:
        house.give(inputs.Submit(who=ALICE, submission=msgspec.structs.replace(first, notify=())))
    assert caught.value.code is ErrorCode.CONFLICT


def test_what_was_reserved_is_not_refused_for_a_notifier_that_left_meanwhile() -> None:
    house = attended()
    wanted = submission(notify=("ops",))
    (reserved,) = house.give(inputs.Reserve(who=BOB, submission=wanted))
    house.give(inputs.Leave())
    house.wait(3600)
    house.give(
        inputs.Submit(who=BOB, submission=wanted, reservation_id=reserved.reservation_id)  # type: ignore[union-attr]
    )
    assert house.job(house.state.next_job_id - 1).notify == ("ops",)


def test_snapshot_and_replay_keep_the_notifier_and_the_targets() -> None:
    house = attended()
    house.submit(notify=("ops",), notify_on=("fail",))
    house.give(inputs.Leave())
    assert persistent(snapshot.load(snapshot.chunks(house.state))) == persistent(house.state)
    again = House().state
    again.seq, again.devices = 0, {}
    for seq, event in enumerate(house.history, 1):
        apply(again, events.decode(events.encode(event)), seq)
    assert persistent(again) == persistent(house.state)


def test_a_journal_from_before_there_were_notifications_has_none() -> None:
    old = {
        "event": "submitted",
        "at_ns": 1,
        "job_id": 1,
        "submit_id": "s",
        "owner": 1,
        "tenant": "t",
        "handler": "h",
    }
    old |= {"items": 1, "input_bytes": 2, "input_sha256": bytes(32)}
    event = events.decode(msgspec.msgpack.encode(old))
    assert isinstance(event, events.Submitted)
    assert (event.notify, event.notify_on) == ((), ())
