"""submit: the input is checked, declared and streamed, and a lost answer makes no second job."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import json
import os
import subprocess
import sys

import pytest
from fake_daemon import FakeDaemon, HangUp, a_job
from gpujobd import protocol as p
from jobctl.__main__ import run
from jobctl.times import now

SMALL = b'{"custom_id": "a", "text": "x"}\n{"custom_id": "b", "text": "yy"}\n'
LARGE = b"".join(b'{"text": "%06d %s"}\n' % (n, b"x" * 80) for n in range(12_000))


class Intake:
    """The daemon's side of submissions: keeps what came, and breaks off where a test says so."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.inputs = {}
        self.jobs = {}  # submit_id -> job
        self.lose_answers = 0
        self.dead_syncs = 0
        self.break_after_chunks = 0
        self.fail_after_chunks = 0
        self._bytes = b""
        self._header = None
        self._chunks = 0
        daemon.on(p.Submit, self.submit)
        daemon.on(p.Chunk, self.chunk)

    def submit(self, call):
        header = call.request
        if header.submit_id in self.jobs:
            return [p.Accepted(id=header.id, job=self.jobs[header.submit_id])]
        self._header, self._bytes, self._chunks = header, b"", 0
        if header.dry_run:
            forecast = p.Forecast(start_at=now() + dt.timedelta(minutes=5, seconds=5))
            return [p.Accepted(id=header.id, job=0, position=4, forecast=forecast)]
        if header.input is None:
            return [p.GoOn(id=header.id)]
        self._bytes = header.input
        return self._keep()

    def chunk(self, call):
        self._chunks += 1
        if self._chunks == self.break_after_chunks:
            self.break_after_chunks = 0
            return [HangUp()]
        if self._chunks == self.fail_after_chunks:
            return [
                p.Error(id=call.request.id, code=p.ErrorCode.DISK_LOW, message="the disk is full"),
                HangUp(),
            ]
        self._bytes += call.request.data
        return [] if call.request.data else self._keep()

    def _keep(self):
        header = self._header
        assert (len(self._bytes), self._bytes.count(b"\n")) == (header.input_bytes, header.items)
        assert hashlib.sha256(self._bytes).digest() == header.input_sha256
        assert max(map(len, self._bytes.split(b"\n"))) == header.item_bytes
        job = self.jobs[header.submit_id] = 100 + len(self.jobs)
        self.inputs[job] = self._bytes
        if self.lose_answers:
            self.lose_answers -= 1
            return [HangUp()]
        if self.dead_syncs:
            self.dead_syncs -= 1
            return [p.Error(id=header.id, code=p.ErrorCode.NOT_ACCEPTED, message="who knows")]
        return [p.Accepted(id=header.id, job=job)]


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBCTL_SOCKET", str(tmp_path / "s"))
    with FakeDaemon(tmp_path / "s") as fake:
        yield fake


@pytest.fixture
def intake(daemon):
    return Intake(daemon)


@pytest.fixture
def file(tmp_path):
    def write(content: bytes) -> str:
        path = tmp_path / "input.jsonl"
        path.write_bytes(content)
        return str(path)

    return write


def test_a_small_input_rides_in_the_header_and_the_bare_id_is_printed(daemon, intake, file, capfd):
    assert run(["submit", "embed", file(SMALL), "--name", "n", "--tenant", "t", "--failures-max", "0"]) == 0
    assert capfd.readouterr() == ("100\n", "")
    (header,) = daemon.asked(p.Submit)
    assert header.input == SMALL
    assert (header.handler, header.name, header.tenant, header.failures_max) == ("embed", "n", "t", 0)
    assert len(header.submit_id) == 32


def test_a_large_input_is_streamed_in_pieces(daemon, intake, file, capfd):
    assert run(["submit", "embed", file(LARGE)]) == 0
    assert intake.inputs == {100: LARGE}
    assert max(len(chunk.data) for chunk in daemon.asked(p.Chunk)) <= p.CHUNK_BYTES_MAX
    assert daemon.asked(p.Submit)[0].input is None


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_an_answer_that_is_lost_makes_no_second_job(daemon, intake, file, capfd, content):
    intake.lose_answers = 1
    assert run(["submit", "embed", file(content)]) == 0
    assert capfd.readouterr().out == "100\n"
    first, second = daemon.asked(p.Submit)
    assert first.submit_id == second.submit_id
    assert len(intake.inputs) == 1


def test_a_submission_of_which_the_daemon_does_not_know_whether_it_was_kept_is_asked_again(
    daemon, intake, file, capfd
):
    intake.dead_syncs = 1
    assert run(["submit", "embed", file(SMALL)]) == 0
    assert capfd.readouterr().out == "100\n"
    first, second = daemon.asked(p.Submit)
    assert first.submit_id == second.submit_id
    assert daemon.connections == 2


def test_a_stream_that_breaks_off_is_sent_again_from_its_start(daemon, intake, file, capfd):
    intake.break_after_chunks = 2
    assert run(["submit", "embed", file(LARGE)]) == 0
    assert intake.inputs == {100: LARGE}
    assert daemon.connections == 2


def test_a_refusal_in_the_middle_of_the_stream_is_told_and_ends_it(daemon, intake, file, capfd):
    intake.fail_after_chunks = 1
    assert run(["submit", "embed", file(LARGE * 4)]) == 6
    assert capfd.readouterr().err == "jobctl: disk_low: the disk is full\n"
    assert len(daemon.asked(p.Chunk)) == 1


def test_a_refusal_at_the_door_is_exit_6_and_no_byte_is_sent(daemon, file, capfd):
    message = "the queue holds 20 of 20 jobs"
    daemon.answer(p.Submit, p.Error(id=0, code=p.ErrorCode.QUEUE_FULL, message=message, limit=20, current=20))
    assert run(["submit", "embed", file(LARGE)]) == 6
    assert capfd.readouterr() == ("", f"jobctl: queue_full (20/20): {message}\n")
    assert daemon.asked(p.Chunk) == []


def test_bad_lines_are_named_before_anything_is_sent(daemon, intake, file, capfd):
    path = file(SMALL + b"oops\n\n[]\n" + SMALL)
    assert run(["submit", "embed", path]) == 6
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(f"jobctl: {path}: line 3: not JSON")
    assert lines[1:] == [
        f"jobctl: {path}: line 4: blank",
        f"jobctl: {path}: line 5: not a JSON object",
        f"jobctl: {path}: line 6: custom_id 'a' is that of line 1",
        f"jobctl: {path}: line 7: custom_id 'b' is that of line 2",
        "jobctl: bad_input: 5 bad lines; nothing was sent",
    ]
    assert daemon.connections == 0


def test_without_the_check_the_bytes_go_as_they_are(daemon, intake, file):
    assert run(["submit", "embed", file(b"oops\n\n"), "--no-check"]) == 0
    assert intake.inputs == {100: b"oops\n\n"}


def test_an_empty_input_is_refused(daemon, file, capfd):
    assert run(["submit", "embed", file(b"")]) == 6
    assert "holds no items" in capfd.readouterr().err


def test_a_missing_file_is_a_usage_error(daemon, tmp_path, capfd):
    assert run(["submit", "embed", str(tmp_path / "none")]) == 2
    assert run(["submit", "embed", str(tmp_path)]) == 2
    assert capfd.readouterr().err.count("jobctl: ") == 2


def test_an_input_that_changes_between_the_readings_is_not_submitted(daemon, intake, file, capfd):
    path = file(LARGE)

    def grow(call):
        with open(path, "ab") as more:
            more.write(b"{}\n")
        return [p.GoOn(id=call.request.id)]

    daemon.on(p.Submit, grow)
    assert run(["submit", "embed", path]) == 6
    assert "changed while it was read; nothing was submitted" in capfd.readouterr().err
    assert all(chunk.data for chunk in daemon.asked(p.Chunk))  # the end was never sent


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_standard_input_is_submitted_as_a_file_is(daemon, intake, content):
    done = subprocess.run(
        [sys.executable, "-m", "jobctl", "submit", "embed", "-"],
        input=content,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"100\n", b"")
    assert intake.inputs == {100: content}


def test_a_named_pipe_is_read_once(daemon, intake, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([sys.executable, "-m", "jobctl", "submit", "embed", str(fifo)]) as process:
        fifo.write_bytes(LARGE)
        assert process.wait(30) == 0
    assert intake.inputs == {100: LARGE}


def test_parameters_become_what_the_handler_declares(daemon, intake, file, capfd):
    params = {
        "flag": {"type": "bool"},
        "count": {"type": "int"},
        "rate": {"type": "float"},
        "word": {"type": "str"},
    }
    view = p.HandlerView(name="embed", entry="x:Y", params=params, loaded_on=[])
    daemon.answer(p.Handlers, p.HandlerList(id=0, handlers=[view]))
    words = ["flag=FALSE", "count=7", "rate=2", "word=1=1", "unknown=3"]
    path = file(SMALL)
    assert run(["submit", "embed", path, *(part for word in words for part in ("--param", word))]) == 0
    sent = daemon.asked(p.Submit)[0].params
    assert sent == {"flag": False, "count": 7, "rate": 2.0, "word": "1=1", "unknown": "3"}
    assert isinstance(sent["rate"], float)
    for word in ("count=x", "flag=maybe", "rate="):
        assert run(["submit", "embed", path, "--param", word]) == 6
        assert "bad_params" in capfd.readouterr().err
    assert run(["submit", "embed", path, "--param", "flag"]) == 2


def test_times_go_out_in_utc(daemon, intake, file):
    assert (
        run(["submit", "embed", file(SMALL), "--begin", "2026-01-31T17:00:00+01:00", "--deadline", "1d"]) == 0
    )
    (header,) = daemon.asked(p.Submit)
    assert header.begin_at == dt.datetime(2026, 1, 31, 16, 0, tzinfo=dt.UTC)
    assert abs(header.deadline_at - now() - dt.timedelta(days=1)) < dt.timedelta(minutes=5)
    assert run(["submit", "embed", "x", "--begin", "30"]) == 2


def test_a_dry_run_sends_no_byte_and_tells_when_it_would_start(daemon, intake, file, capfd):
    path = file(SMALL)
    assert run(["submit", "embed", path, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "would be accepted: 2 items, 65 B" in shown
    assert "position: 4" in shown
    assert "(in 5 min)" in shown
    (header,) = daemon.asked(p.Submit)
    assert header.dry_run
    assert header.input is None
    assert run(["submit", "embed", path, "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["position"] == 4


def test_a_script_may_choose_its_submit_id(daemon, intake, file, capfd):
    path = file(SMALL)
    for _ in range(2):
        assert run(["submit", "embed", path, "--submit-id", "nightly-7"]) == 0
    assert capfd.readouterr().out == "100\n100\n"
    assert run(["submit", "embed", path, "--submit-id", "x" * 65]) == 2
    assert run(["submit", "embed", path, "--submit-id", "ü"]) == 2


@pytest.mark.parametrize(("failed", "exit_code"), [(0, 0), (1, 1)])
def test_submit_and_wait_ends_as_the_job_does(daemon, intake, file, capfd, failed, exit_code):
    final = a_job(id=100, state="completed", done=10 - failed, failed=failed)
    daemon.answer(p.Wait, p.Jobs(id=0, jobs=[final], seq=1))
    assert run(["submit", "embed", file(SMALL), "--wait"]) == exit_code
    shown = capfd.readouterr()
    assert shown.out == "100\n"
    assert ("1 failed" in shown.err) is bool(failed)


def test_an_input_is_never_held_whole(monkeypatch):
    from jobctl import check

    class Counting(io.BytesIO):
        largest = 0

        def readline(self, size=-1):
            assert size > 0
            piece = super().readline(size)
            Counting.largest = max(Counting.largest, len(piece))
            return piece

        def read(self, size=-1):
            raise AssertionError("read whole")

    found = check.measure(Counting(b"x" * 5_000_000), check=False)
    assert (found.items, found.longest) == (1, 5_000_000)
    assert Counting.largest <= check.ITEM_BYTES_MAX + 1
