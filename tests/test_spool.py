"""The files of jobs: what is announced is what is kept, and no link leads out."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import pytest
from gpujobd import spool as module
from gpujobd.spool import Choice, InputMismatch, Spool, Tally, measure


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "state" / "spool")


def stream(spool, reservation_id, data, piece=7):
    incoming = spool.incoming(reservation_id)
    for at in range(0, len(data), piece):
        incoming.write(data[at : at + piece])
    incoming.settle()
    return incoming.tally


def put(spool, job_id, name, data):
    (spool.path(job_id) / name).write_bytes(data)


# --- what a header announces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"{}\n",
        b"{}",
        b"{}\n{}\n",
        b"{}\n{}",
        b'{"a": 1}\n\n{}\n',
        b"\n",
        b"\n\n\n",
        b"x" * 1000 + b"\n{}",
        b"a\nbb\nccc",
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 3, 1000])
def test_a_tally_in_pieces_agrees_with_a_measure_of_the_whole(data, piece):
    tally = Tally()
    for at in range(0, len(data), piece):
        tally.add(data[at : at + piece])
    assert (tally.items, tally.longest, tally.sha256) == measure(data)
    tally.check(items=tally.items, longest=tally.longest, size=len(data), sha256=tally.sha256)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"items": 3}, "3 lines, 2 came"),
        ({"size": 6}, "6 bytes, 5 came"),
        ({"longest": 1}, "at most 1 bytes, one has 2"),
        ({"sha256": b"x" * 32}, "SHA-256"),
    ],
)
def test_a_mismatch_says_what_differs(wrong, words):
    tally = Tally()
    tally.add(b"{}\n{}")
    right = {"items": 2, "longest": 2, "size": 5, "sha256": hashlib.sha256(b"{}\n{}").digest()}
    with pytest.raises(InputMismatch, match=words):
        tally.check(**right | wrong)


# --- a job's folder ---------------------------------------------------------------------------------------------------


def test_a_stream_becomes_the_input_of_its_job(spool):
    stream(spool, 5, b"{}\n" * 100)
    spool.prepare(1, 5)
    folder = spool.path(1)
    assert (folder / "input.jsonl").read_bytes() == b"{}\n" * 100
    assert os.listdir(spool.root / "incoming") == []
    assert os.stat(folder).st_mode & 0o777 == 0o700


def test_preparing_again_changes_nothing(spool):
    stream(spool, 5, b"{}\n")
    spool.prepare(1, 5)
    put(spool, 1, "results.jsonl", b"result")
    for again in (spool, Spool(spool.root)):
        again.prepare(1, 5)
        assert (spool.path(1) / "input.jsonl").read_bytes() == b"{}\n"
        assert (spool.path(1) / "results.jsonl").read_bytes() == b"result"


def test_an_input_from_the_journal_is_written_once_a_run_and_anew_in_the_next(spool):
    spool.place(1, lambda: b"torn")
    spool.place(1, lambda: b"not asked for")
    assert (spool.path(1) / "input.jsonl").read_bytes() == b"torn"
    later = Spool(spool.root)  # after a power cut, say: nothing had synced it
    later.place(1, lambda: b"{}\n")
    later.settle(1)
    assert (spool.path(1) / "input.jsonl").read_bytes() == b"{}\n"


def test_an_input_from_the_journal_is_synced_before_the_journal_lets_go_of_it(spool, syncs):
    spool.place(1, lambda: b"{}\n")
    assert syncs == []
    spool.settle(1)
    assert syncs == [str(spool.path(1) / "input.jsonl"), str(spool.path(1)), str(spool.root / "jobs")]


def test_an_input_whose_sync_failed_is_not_synced_again_but_written_anew(spool, monkeypatch):
    """The kernel may count the lost pages as clean: the second sync says that all is well."""
    spool.place(1, lambda: b"{}\n")
    lost = (spool.path(1) / "input.jsonl").stat().st_ino
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="device"):
            spool.settle(1)
    with pytest.raises(OSError, match="written anew"):
        spool.settle(1)
    spool.place(1, lambda: b"{}\n")
    spool.settle(1)
    assert (spool.path(1) / "input.jsonl").stat().st_ino != lost


def refuse(fd):
    raise OSError(errno.EIO, "the device refused")


def test_the_name_of_a_jobs_folder_is_synced_before_an_input_moves_in(spool, monkeypatch):
    stream(spool, 5, b"{}\n")
    jobs, done = os.stat(spool.root / "jobs").st_ino, []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), real_sync(fd)))
    monkeypatch.setattr(
        os, "rename", lambda *names, **folders: (done.append("moved"), real_rename(*names, **folders))
    )
    spool.prepare(1, 5)
    assert jobs in done[: done.index("moved")]


def test_an_input_that_is_nowhere_is_said_so(spool):
    with pytest.raises(FileNotFoundError):
        spool.prepare(1, 77)


def test_a_crash_between_the_two_names_of_a_retry_is_made_good(spool, monkeypatch):
    spool.place(1, lambda: b'{"n":1}\n{"n":2}\n')
    spool.select(Choice(job_id=1, failed_only=False, results_bytes=0, errors_bytes=0), 8)
    real = os.rename

    def crash(src, dst, **folders):
        if src == "8":
            raise KeyboardInterrupt
        real(src, dst, **folders)

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        spool.prepare(2, 8)
    monkeypatch.undo()
    assert sorted(os.listdir(spool.path(2))) == ["lines"]
    again = Spool(spool.root)
    assert again.sweep({1, 2}, {8}) == 0
    again.prepare(2, 8)
    assert (spool.path(2) / "lines").read_bytes() == b"1\n2\n"
    assert (spool.path(2) / "input.jsonl").read_bytes() == b'{"n":1}\n{"n":2}\n'


@pytest.fixture
def syncs(spool, monkeypatch):
    """The names of what is synced, in order."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1]
    )
    return synced


def test_what_an_earlier_run_made_is_synced_before_it_is_relied_on(spool, syncs):
    stream(spool, 5, b"{}\n")
    spool.prepare(1, 5)
    later = Spool(spool.root)
    syncs.clear()
    later.prepare(1, 5)
    assert syncs == [str(spool.root / "jobs"), str(spool.path(1))]
    later.prepare(1, 5)
    assert len(syncs) == 2


@pytest.mark.parametrize(
    "name", ["input.jsonl", "input.jsonl.part", "results.jsonl", "errors.jsonl", "log", "lines"]
)
def test_a_link_planted_in_a_jobs_folder_is_not_followed(spool, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    folder = spool.path(1)
    folder.mkdir()
    (folder / name).symlink_to(secret)

    def all_ways():
        spool.place(1, lambda: b"{}\n")
        fd = spool.open_output(1, errors=name == "errors.jsonl")
        try:
            yield os.pread(fd, 100, 0)
        finally:
            os.close(fd)
        yield spool.read_log(1, 0, 100)
        yield b"".join(
            line
            for _, line in spool._chosen(Choice(job_id=1, failed_only=False, results_bytes=9, errors_bytes=0))
        )

    seen = b""
    try:
        for part in all_ways():
            seen += part
    except OSError:
        pass
    assert b"secret" not in seen
    assert secret.read_bytes() == b"secret"


def test_a_link_in_place_of_a_jobs_folder_is_not_followed(spool, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "results.jsonl").write_bytes(b"secret")
    spool.path(1).symlink_to(elsewhere)
    with pytest.raises(OSError):
        spool.open_output(1, errors=False)
    with pytest.raises(OSError):
        spool.place(1, lambda: b"{}\n")
    spool.remove(1)
    assert not spool.path(1).is_symlink()
    assert (elsewhere / "results.jsonl").read_bytes() == b"secret"


def test_an_input_is_not_written_through_a_link(spool, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"safe")
    (spool.root / "incoming" / "5").symlink_to(target)
    spool.incoming(5).close()
    assert not (spool.root / "incoming" / "5").is_symlink()
    assert target.read_bytes() == b"safe"


def test_output_and_log_that_are_not_there_yet_are_empty(spool):
    for job_id in (1, 2):
        fd = spool.open_output(job_id, errors=False)
        assert os.read(fd, 10) == b""
        os.close(fd)
        assert spool.read_log(job_id, 0, 10) == b""
        spool.path(2).mkdir(exist_ok=True)


def test_an_output_cannot_be_written_through_its_descriptor(spool):
    spool.place(1, lambda: b"{}\n")
    put(spool, 1, "results.jsonl", b"result")
    fd = spool.open_output(1, errors=False)
    with pytest.raises(OSError):
        os.write(fd, b"x")
    os.close(fd)


# --- clearing away ----------------------------------------------------------------------------------------------------


def test_sweeping_takes_what_nobody_owns_and_nothing_else(spool, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("safe")
    for job_id in (1, 2):
        spool.place(job_id, lambda: b"{}\n")
    for reservation in (5, 6):
        stream(spool, reservation, b"{}\n")
    (spool.root / "incoming" / "5.lines").write_text("1\n")
    (spool.root / "incoming" / "6.lines").write_text("1\n")
    (spool.root / "incoming" / "a folder").mkdir()
    (spool.root / "jobs" / "a file").write_text("x")
    (spool.root / "jobs" / "link").symlink_to(outside)
    (spool.root / "jobs" / "²").mkdir()
    assert spool.sweep({1}, {5}) == 7
    assert sorted(os.listdir(spool.root / "jobs")) == ["1"]
    assert sorted(os.listdir(spool.root / "incoming")) == ["5", "5.lines"]
    assert (outside / "file").read_text() == "safe"


def test_a_name_that_cannot_be_swept_does_not_stop_the_start(spool, monkeypatch, caplog):
    spool.place(1, lambda: b"{}\n")
    monkeypatch.setattr(
        module, "_delete", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted"))
    )
    assert spool.sweep(set(), set()) == 0
    assert "1 belongs to no job and cannot be deleted: not permitted" in caplog.text


def test_removing_twice_is_removing_once(spool):
    spool.place(1, lambda: b"{}\n")
    spool.remove(1)
    spool.remove(1)
    assert not spool.path(1).exists()


# --- retries ----------------------------------------------------------------------------------------------------------


def record(line, **more):
    return json.dumps({"line": line} | more).encode() + b"\n"


def retried(spool, old, new, *, failed_only, results=b"", errors=b""):
    put(
        spool, old, "results.jsonl", results + b'{"line": 1, "provis'
    )  # a worker died in the middle of a record
    put(spool, old, "errors.jsonl", errors)
    choice = Choice(job_id=old, failed_only=failed_only, results_bytes=len(results), errors_bytes=len(errors))
    tally = spool.weigh(choice)
    spool.select(choice, 100 + new)
    spool.prepare(new, 100 + new)
    data = (spool.path(new) / "input.jsonl").read_bytes()
    assert measure(data) == (tally.items, tally.longest, tally.sha256)
    return data.splitlines(), [int(n) for n in (spool.path(new) / "lines").read_bytes().split()]


def test_a_retry_of_a_retry_keeps_the_numbers_of_the_first_job(spool):
    spool.place(1, lambda: b"".join(b'{"n": %d}\n' % n for n in range(1, 11)))
    lines, numbers = retried(
        spool, 1, 2, failed_only=True, results=record(1), errors=record(3) + record(7) + record(9)
    )
    assert (lines, numbers) == ([b'{"n": 3}', b'{"n": 7}', b'{"n": 9}'], [3, 7, 9])
    lines, numbers = retried(spool, 2, 3, failed_only=False, results=record(7), errors=record(9))
    assert (lines, numbers) == ([b'{"n": 3}', b'{"n": 9}'], [3, 9])


def test_records_beyond_the_checkpoint_do_not_count(spool):
    spool.place(1, lambda: b"{}\n{}\n")
    put(spool, 1, "results.jsonl", record(1) + record(2))
    choice = Choice(job_id=1, failed_only=False, results_bytes=len(record(1)), errors_bytes=0)
    assert spool.weigh(choice).items == 1


def test_a_damaged_output_is_said_to_be_one(spool):
    spool.place(1, lambda: b"{}\n")
    put(spool, 1, "results.jsonl", b"\0\0\0\0\n")
    with pytest.raises(InputMismatch, match="job 1 are damaged"):
        spool.weigh(Choice(job_id=1, failed_only=False, results_bytes=5, errors_bytes=0))


def test_a_selection_that_fails_leaves_no_descriptor_open(spool, monkeypatch):
    spool.place(1, lambda: b"{}\n")
    before = len(os.listdir("/proc/self/fd"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_all", full)
    with pytest.raises(OSError):
        spool.select(Choice(job_id=1, failed_only=False, results_bytes=0, errors_bytes=0), 4)
    assert len(os.listdir("/proc/self/fd")) == before
