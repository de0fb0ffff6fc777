"""How people name jobs, say times and read tables; and the check of an input."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import json

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobctl import describe, exits, table, times
from jobctl.check import ITEM_BYTES_MAX, measure
from jobctl.exits import Exit, Failure
from jobctl.ids import parse

NOW = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)


def no_jobs(back):
    raise AssertionError(back)


# --- ids --------------------------------------------------------------------------------------------------------


def test_ids_ranges_and_lists_are_named_once_in_their_order():
    assert parse(["3", "5-7,1", "6"], no_jobs) == [3, 5, 6, 7, 1]


def test_at_is_the_newest_job_and_tilde_counts_back():
    asked = []

    def mine(back):
        asked.append(back)
        return [9, 7, 4]

    assert parse(["@", "@~2"], mine) == [9, 4]
    assert asked == [0, 2]


def test_at_beyond_the_first_job_is_no_such_job():
    with pytest.raises(Failure) as failure:
        parse(["@~3"], lambda back: [9])
    assert failure.value.exit is Exit.USAGE


@pytest.mark.parametrize(
    "word", ["", "0", "x", "-3", "3-", "9-5", "1,,2", "@~", "@~x", "@2", "٣", "1-99999999", "9" * 30]
)
def test_a_word_that_names_no_job_is_a_usage_error(word):
    with pytest.raises(click.UsageError):
        parse([word], no_jobs)


# --- times ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("0.5s", 0.5)],
)
def test_durations_need_a_unit(text, seconds):
    assert times.duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "30 s", "s", "-5s", "5x", "1e3s", "5s5", "99999d"])
def test_what_has_no_unit_is_no_duration(text):
    assert times.duration_s(text) is None
    with pytest.raises(click.BadParameter):
        times.Duration().convert(text, None, None)


@pytest.mark.parametrize("text", ["2026-01-31T17:00:00Z", "2026-01-31T18:00:00+01:00"])
def test_a_moment_with_an_offset_is_told_in_utc(text):
    moment = times.Moment().convert(text, None, None)
    assert moment == dt.datetime(2026, 1, 31, 17, 0, tzinfo=dt.UTC)
    assert moment.tzinfo is dt.UTC


def test_a_moment_may_be_a_duration_from_now():
    before = times.now()
    moment = times.Moment().convert("2h", None, None)
    assert before + dt.timedelta(hours=2) <= moment <= times.now() + dt.timedelta(hours=2)


@pytest.mark.parametrize("text", ["2026-01-31T17:00:00", "tomorrow", "30", "2026-13-01T00:00:00Z"])
def test_a_moment_without_a_zone_or_sense_is_refused(text):
    with pytest.raises(click.BadParameter):
        times.Moment().convert(text, None, None)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (2.34, "2.3 s"),
        (46, "46 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86400 * 3 + 3600 * 4, "3 d 4 h"),
    ],
)
def test_lengths_are_said_in_two_figures_at_most(seconds, said):
    assert times.spoken(seconds) == said


def test_moments_are_told_from_where_one_stands():
    assert times.relative(NOW + dt.timedelta(minutes=3), NOW) == "in 3 min"
    assert times.relative(NOW - dt.timedelta(hours=4), NOW) == "4 h 00 min ago"
    assert times.relative(NOW, NOW) == "now"


# --- tables -----------------------------------------------------------------------------------------------------


def test_columns_are_aligned_and_empty_ones_left_out(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    columns = [
        table.Column("ID", right=True),
        table.Column("NAME"),
        table.Column("EMPTY"),
        table.Column("LAST"),
    ]
    shown = table.table(columns, [("7", "a", "", "x"), ("123", "longer", "", "")])
    assert shown == " ID  NAME    LAST\n  7  a       x\n123  longer\n"


@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=5))
def test_whatever_the_texts_a_table_fits_and_holds_nothing_a_terminal_obeys(rows):
    shown = table.table([table.Column("A", shrink=True), table.Column("B", shrink=True)], rows)
    lines = shown.splitlines()
    assert all(table.wide(line) <= 80 for line in lines)
    assert len(shown.split("\n")) == len(rows) + 2
    assert not any(c != "\n" and not c.isprintable() for c in shown)


def test_a_name_with_an_escape_sequence_is_shown_harmless():
    assert table.clean("a\x1b[31mb\nc\x9b") == "a\\x1b[31mb c\\x9b"


def test_wide_letters_take_two_cells(monkeypatch):
    assert table.wide("模型") == 4
    assert table.shorten("模型模型", 5) == "模型…"


# --- exits ------------------------------------------------------------------------------------------------------


def test_of_several_exits_the_worst_counts():
    assert exits.worst([Exit.OK, Exit.FAILED, Exit.USAGE]) is Exit.USAGE
    assert exits.worst([Exit.REFUSED, Exit.FORBIDDEN, Exit.USAGE]) is Exit.FORBIDDEN
    assert exits.worst([]) is Exit.OK
    assert set(exits.WORST_FIRST) == set(Exit)


# --- the check --------------------------------------------------------------------------------------------------


def checked(text: bytes, *, check=True):
    return measure(io.BytesIO(text), check=check)


def test_a_good_input_is_counted_and_hashed_as_it_is():
    text = b'{"custom_id": "a"}\r\n{"custom_id": "b", "text": "\xc3\xa9"}'
    found = checked(text)
    assert (found.items, found.size, found.longest, found.bad) == (2, len(text), 32, [])
    assert found.sha256 == hashlib.sha256(text).digest()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "blank"),
        (b" \t", "blank"),
        (b"[1]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"a": }', "not JSON: "),
        (b'{"a": 1} {}', "not JSON: "),
        (b'{"a": NaN}', "not JSON: "),
        (b'{"a": "\xff"}', "not UTF-8: byte 8"),
        (b'{"custom_id": 7}', "custom_id is not a string"),
        (b'{"custom_id": "first"}', "custom_id 'first' is that of line 1"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (
            b'{"a": "' + b"x" * ITEM_BYTES_MAX + b'"}',
            f"{ITEM_BYTES_MAX + 9} bytes, at most {ITEM_BYTES_MAX} are allowed",
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_a_bad_line_is_named_with_its_number(line, fault):
    found = checked(b'{"custom_id": "first"}\n' + line + b"\n{}\n")
    assert len(found.bad) == 1
    assert found.bad[0].startswith(f"line 2: {fault}")


def test_a_byte_order_mark_is_named():
    assert checked(b"\xef\xbb\xbf{}\n").bad == ["line 1: begins with a byte order mark"]


def test_the_first_ten_bad_lines_are_named():
    assert len(checked(b"x\n" * 50).bad) == 10


def test_lines_at_the_limit_pass_and_longer_ones_do_not():
    fits = b'{"a":"' + b"x" * (ITEM_BYTES_MAX - 8) + b'"}'
    assert len(fits) == ITEM_BYTES_MAX
    assert not checked(fits + b"\n" + fits).bad
    assert checked(b"{}\n" + fits + b" \n{}").bad[0].startswith("line 2: ")


@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b), max_size=20), st.booleans())
def test_without_the_check_any_bytes_are_measured_as_the_daemon_measures(lines, ends):
    text = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    found = checked(text, check=False)
    assert (found.size, found.sha256, found.bad) == (len(text), hashlib.sha256(text).digest(), [])
    split = text.split(b"\n")
    kept = split[:-1] if not split[-1] else split
    assert (found.items, found.longest) == (len(kept), max(map(len, kept), default=0))


# --- how a job ends ---------------------------------------------------------------------------------------------


def test_only_a_completed_job_without_failed_items_ends_well(job):
    assert describe.ended(job(state="completed")) is Exit.OK
    assert describe.ended(job(state="completed", failed=1)) is Exit.FAILED
    for state in ("failed", "cancelled", "expired"):
        assert describe.ended(job(state=state)) is Exit.FAILED


def test_a_percentage_is_100_only_when_every_item_was_tried(job):
    assert describe.percent(job(done=49_999, total=50_000).items) == 99
    assert describe.percent(job(done=49_990, failed=10, total=50_000).items) == 100


@pytest.fixture
def job():
    from fake_daemon import a_job

    return a_job


def test_the_envelope_of_lists_has_a_version(capsys, monkeypatch, job):
    from jobctl.command import write_list

    write_list("jobs", [job(id=7)], seq=9)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["v"], shown["seq"], shown["jobs"][0]["id"]) == (1, 9, 7)
    assert shown["jobs"][0]["submitted_at"].endswith("Z")
    assert "reason" not in shown["jobs"][0]
