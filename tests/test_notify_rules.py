"""Schedule, breaker, lanes and targets of the notifier: rules without a clock or a wire."""

from __future__ import annotations

import datetime as dt

import pytest
from gpujobd_notify.breaker import FAILURES_MAX, OPEN_MAX_S, OPEN_S, Breaker, Position
from gpujobd_notify.lanes import SHARED_MAX, SHARED_PER_UID_MAX, Crowd, Lane
from gpujobd_notify.schedule import ASKED_MAX_S, JITTER, WAITS_S, next_wait_s, retry_after_s
from gpujobd_notify.targets import TargetError, allowed, parse
from hypothesis import given
from hypothesis import strategies as st

NOW = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)


# --- schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_published_one_and_ends():
    assert [next_wait_s(tries, 0.5) for tries in range(1, 10)] == pytest.approx(list(WAITS_S))
    assert next_wait_s(10, 0.5) is None


@given(st.integers(1, 9), st.floats(0, 1))
def test_every_wait_is_drawn_within_a_fifth(tries, chance):
    wait_s = next_wait_s(tries, chance)
    assert WAITS_S[tries - 1] * (1 - JITTER) <= wait_s <= WAITS_S[tries - 1] * (1 + JITTER) + 1e-6


def test_a_far_end_that_says_when_is_not_asked_sooner_nor_waited_for_for_ever():
    assert next_wait_s(1, 0.5, asked_s=120) == 120
    assert next_wait_s(2, 0.5, asked_s=1) == 300
    assert next_wait_s(1, 0.5, asked_s=1e12) == ASKED_MAX_S
    assert next_wait_s(10, 0.5, asked_s=5) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 7 ", 7.0),
        ("Sat, 31 Jan 2026 12:01:00 GMT", 60.0),
        ("Saturday, 31-Jan-26 12:01:00 GMT", 60.0),
        ("Sat, 31 Jan 2026 11:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("1e3", None),
        ("٣", None),
        ("", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value, seconds):
    assert retry_after_s(value, NOW) == seconds


@given(st.text())
def test_no_retry_after_breaks_anything(value):
    found = retry_after_s(value, NOW)
    assert found is None or found >= 0


# --- breaker ------------------------------------------------------------------------------------------------------


def broken(now=0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES_MAX):
        breaker.failed(now)
    return breaker


def test_five_failures_in_a_row_open_it_and_a_success_among_them_does_not():
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES_MAX - 1):
            breaker.failed(0)
        breaker.succeeded()
    assert breaker.position(0) is Position.CLOSED
    assert broken().position(0) is Position.OPEN
    assert broken().places(0, 4) == 0


def test_after_its_time_one_try_decides():
    breaker = broken()
    assert breaker.position(OPEN_S) is Position.HALF_OPEN
    assert breaker.places(OPEN_S, 4) == 1
    breaker.began(OPEN_S)
    assert breaker.places(OPEN_S, 4) == 0
    breaker.succeeded()
    assert breaker.position(OPEN_S) is Position.CLOSED
    assert breaker.places(OPEN_S, 4) == 4


def test_it_stays_open_twice_as_long_each_time_up_to_a_quarter_of_an_hour():
    breaker, now, waits = broken(), 0.0, []
    for _ in range(12):
        waits.append(breaker.until - now)
        now = breaker.until
        breaker.began(now)
        breaker.failed(now)
    assert waits[:5] == [60, 120, 240, 480, OPEN_MAX_S]
    assert {*waits[5:]} == {OPEN_MAX_S}


def test_tries_that_end_after_it_opened_do_not_keep_it_open_longer():
    breaker = broken()
    breaker.failed(1.0)
    assert breaker.until == OPEN_S


def test_a_try_that_broke_off_leaves_its_place_to_the_next():
    breaker = broken()
    breaker.began(OPEN_S)
    breaker.broke_off()
    assert breaker.places(OPEN_S, 4) == 1


def test_a_clock_that_is_put_back_under_a_try_leaves_a_place_for_the_next():
    breaker = broken(1_000.0)
    now = breaker.until
    breaker.began(now)
    breaker.failed(now - 500.0)
    assert breaker.position(now - 500.0) is Position.OPEN
    assert breaker.places(now, 4) == 1


def test_who_is_in_a_hurry_gets_one_try_at_once():
    breaker = broken()
    breaker.hurry(5.0)
    assert breaker.places(5.0, 4) == 1


# --- lanes --------------------------------------------------------------------------------------------------------


def test_news_leave_a_place_that_alerts_take():
    lane = Lane(2)
    lane.enter(urgent=False)
    lane.enter(urgent=False)
    assert lane.free(urgent=False) == 0
    assert lane.free(urgent=True) == 1


def test_an_alert_in_its_own_place_takes_none_from_news():
    lane = Lane(2)
    lane.enter(urgent=True)
    assert lane.free(urgent=False) == 2
    lane.enter(urgent=True)
    assert lane.free(urgent=False) == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60), st.integers(1, 5))
def test_there_is_never_more_in_flight_than_there_are_places_and_one(moves, places):
    lane, inside = Lane(places), []
    for enters, urgent in moves:
        if enters and lane.free(urgent=urgent):
            lane.enter(urgent=urgent)
            inside.append(urgent)
        elif not enters and inside:
            lane.leave(urgent=inside.pop(0))
        assert lane.in_flight == len(inside) <= places + 1
        assert inside.count(False) <= places


def test_who_names_many_hosts_waits_for_himself():
    crowd = Crowd()
    while crowd.free(1, urgent=False):
        crowd.enter(1, urgent=False)
    assert crowd.free(2, urgent=False) == SHARED_PER_UID_MAX
    assert crowd.free(1, urgent=True) == 1
    for _ in range(SHARED_PER_UID_MAX):
        crowd.leave(1, urgent=False)
    assert crowd.free(1, urgent=False) == SHARED_PER_UID_MAX


def test_all_users_together_have_their_places_too():
    crowd = Crowd()
    for uid in range(SHARED_MAX):
        crowd.enter(uid, urgent=False)
    assert crowd.free(99, urgent=False) == 0
    assert crowd.free(99, urgent=True) == 1


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoint", "host"),
    [
        ("ops", "ops", ""),
        ("https://Hooks.Example.org/a?b=c", "https://hooks.example.org:443", "hooks.example.org"),
        ("http://example.org:8080/", "http://example.org:8080", "example.org"),
        ("https://[2001:DB8::1]/x", "https://[2001:db8::1]:443", "2001:db8::1"),
        ("mailto:alice@Example.org", "mailto:", "example.org"),
    ],
)
def test_a_target_goes_through_the_endpoint_of_its_far_end(text, endpoint, host):
    target = parse(text)
    assert (target.endpoint, target.host) == (endpoint, host)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two words",
        "ops\n",
        "ftp://example.org/",
        "https://",
        "https://user:secret@example.org/",
        "https://example.org/#part",
        "https://exa\\mple.org/",
        "https://example.org:0x50/",
        "https://example.org:99999/",
        "https://-.org/",
        "mailto:",
        "mailto:alice",
        "mailto:alice@",
        "mailto:alice@example.org,bob@example.org",
        "mailto:alice@example.org?subject=x",
        'mailto:"a b"@example.org',
        "mailto:alice@example.org\r\nBcc: eve@example.org",
        "mailto:<alice@example.org>",
        "file:///etc/passwd",
        "https://bücher.example/",
        "x" * 501,
    ],
)
def test_what_could_mean_two_things_is_no_target(text):
    with pytest.raises(TargetError):
        parse(text)


@given(st.text(max_size=80) | st.from_regex(r"(https?://|mailto:).{0,40}", fullmatch=True))
def test_whatever_is_accepted_can_stand_in_a_header(text):
    try:
        target = parse(text)
    except TargetError:
        return
    assert all(c.isprintable() and c != " " for c in target.endpoint + target.host + target.address)


@pytest.mark.parametrize(
    ("host", "pattern", "yes"),
    [
        ("example.org", "example.org", True),
        ("example.org", "Example.org", True),
        ("a.example.org", "example.org", False),
        ("a.example.org", "*.example.org", True),
        ("a.b.example.org", "*.example.org", True),
        ("example.org", "*.example.org", False),
        ("evilexample.org", "*.example.org", False),
        ("example.org.evil.net", "*.example.org", False),
        ("anything", "*", True),
    ],
)
def test_patterns_of_hosts(host, pattern, yes):
    assert allowed(host, [pattern]) is yes
