"""One entry, three ways out, and nothing that came from outside forges any of it."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
import trio
from gpujobd import daemon, entries
from gpujobd.catalog import FIELDS, MESSAGE_IDS, kind
from test_journald import Receiver
from trio.testing import MockClock

FIGURES = {"job_id": 42, "tenant": "alice", "compute_s": 1.5, "failed": 0, "queued_s": None}


@pytest.fixture
def journal(tmp_path):
    receiver = Receiver(tmp_path / "socket")
    yield receiver
    receiver.close()


@pytest.fixture
def both(journal):
    """A logger that writes JSON lines and to a journal; and what came out."""
    lines = io.StringIO()
    as_json = logging.StreamHandler(lines)
    as_json.setFormatter(entries.JsonLines())
    as_entry = entries.ToJournal(journal.path)
    logger = logging.Logger("gpujobd.test")  # noqa: LOG001  # of this test alone
    logger.handlers = [as_json, as_entry]

    def said():
        (entry,) = journal.entries()
        assert len({name for name, _ in entry}) == len(entry)
        return json.loads(lines.getvalue()), dict(entry)

    yield logger, said
    as_entry.close()


def test_json_line_and_journal_entry_tell_the_same(both):
    logger, said = both
    logger.warning("job %d is there", 42, extra=kind("completed", **FIGURES))
    line, entry = said()
    for name, value in FIGURES.items():
        if value is not None:
            assert line[name] == value
            assert entry[FIELDS[name]] == str(value)
    assert "QUEUED_S" not in entry
    assert line["message"] == entry["MESSAGE"] == "job 42 is there"
    assert line["message_id"] == entry["MESSAGE_ID"] == MESSAGE_IDS["completed"]
    assert line["event"] == entry["EVENT"] == "completed"
    assert (line["level"], entry["PRIORITY"]) == ("warning", "4")
    assert line["at"] == entry["SYSLOG_TIMESTAMP"]
    assert entry["SYSLOG_IDENTIFIER"] == "gpujobd"
    assert entry["CODE_FILE"] == __file__
    assert entry["CODE_FUNC"] == "test_json_line_and_journal_entry_tell_the_same"


@pytest.mark.parametrize("outside", ["a\nJOB_ID=1", "a\r\x1b[2Jb", "a\0b", "\u2028", "\udcff", "\x9b31m"])
def test_words_from_outside_stay_in_their_field_and_on_their_line(both, outside):
    logger, said = both
    logger.info("it is %s", outside, extra=kind("completed", tenant=outside))
    line, entry = said()
    assert "JOB_ID" not in entry
    assert "\n" not in entry["MESSAGE"]
    assert entry["MESSAGE"].isprintable()
    assert line["tenant"] == outside
    assert entry["TENANT"] == outside.encode("utf-8", "backslashreplace").decode()


def test_a_trace_is_part_of_its_entry(both):
    logger, said = both
    try:
        int("two\nlines \x1b[2J")
    except ValueError:
        logger.exception("it failed", extra=kind("crashed"))
    line, entry = said()
    assert entry["MESSAGE"].startswith("it failed\nTraceback (most recent call last):\n")
    assert "\x1b" not in entry["MESSAGE"]
    assert "ValueError: invalid literal" in line["trace"]


def test_a_message_that_does_not_fit_its_arguments_ends_nothing(both, capsys):
    logger, _ = both
    logger.handlers = logger.handlers[1:]
    logger.info("%d", "no number", extra=kind("completed"))
    assert "Logging error" in capsys.readouterr().err


def test_every_level_has_a_priority_of_its_own():
    assert sorted(entries.PRIORITIES.values()) == [2, 3, 4, 6, 7]


@pytest.fixture
def kept(journal, monkeypatch):
    """The daemon's log, and at what times it was looked through for something left."""
    handler, looks = entries.ToJournal(journal.path), []

    def flushed():
        looks.append(trio.current_time())
        return real()

    real = handler.flushed
    monkeypatch.setattr(handler, "flushed", flushed)
    log = logging.getLogger("gpujobd")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    yield log, looks
    handler.close()


def fill(log, journal):
    """Write until the journal takes no more; how many entries that took."""
    handler = log.handlers[0]
    for number in range(10_000):
        log.info("entry %d", number)
        if handler._journald._waiting:
            return number + 1
    raise AssertionError("the journal takes everything")


@pytest.mark.parametrize("thread", [False, True])
def test_an_idle_log_wakes_nobody_and_a_full_journal_gets_the_rest_when_it_reads(kept, journal, thread):
    log, looks = kept

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon._flush_log)
            await trio.sleep(3600)
            log.info("it is taken at once")
            await trio.sleep(3600)
            assert len(looks) == 1  # at the start

            count = await trio.to_thread.run_sync(fill, log, journal) if thread else fill(log, journal)
            await trio.sleep(1)
            assert len(looks) > 10
            messages = [dict(entry)["MESSAGE"] for entry in journal.entries()]
            await trio.sleep(1)
            messages += [dict(entry)["MESSAGE"] for entry in journal.entries()]
            assert messages == ["it is taken at once", *[f"entry {n}" for n in range(count)]]

            asked = len(looks)
            await trio.sleep(3600)
            assert len(looks) == asked
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    log.info("nobody is there to be woken")
    fill(log, journal)


PROGRAM = """
import sys, threading
from gpujobd import entries
entries.set_up("json", verbose=False)
def fail(): raise AssertionError("cannot be")
if sys.argv[1] == "thread":
    thread = threading.Thread(target=fail, name="journal")
    thread.start()
    thread.join()
else:
    try:
        fail()
    except AssertionError as error:
        raise ExceptionGroup("several", [ExceptionGroup("more", [error])])
"""


@pytest.mark.parametrize(
    ("where", "status", "word", "message"),
    [
        ("main", 1, "crashed", "a bug ends the daemon: AssertionError: cannot be"),
        ("thread", 0, "thread_crashed", "a bug ended the thread journal: AssertionError: cannot be"),
    ],
)
def test_a_bug_that_ends_something_is_one_entry_with_its_trace(where, status, word, message):
    command = [sys.executable, "-c", PROGRAM, where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["event"], line["message"], line["level"]) == (word, message, "critical")
    assert "in fail" in line["trace"]
