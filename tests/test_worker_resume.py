"""Leases that end early, and the ones that go on from there."""

from __future__ import annotations

import collections
import errno
import fcntl
import json
import os
import pathlib
import random
import resource
import time
import zlib

import pytest
from gpujobd_worker.files import LeaseLost, lost_to, take_lock
from worker_driver import FRESH, Job, WorkerDriver


def texts(count: int) -> list[dict]:
    return [{"custom_id": f"a{i}", "text": f"text-{i}"} for i in range(1, count + 1)]


def start(**params) -> WorkerDriver:
    worker = WorkerDriver()
    worker.load("toys:Count", params=params, heartbeat_s=0.02, checkpoint_s=0.01)
    return worker


@pytest.fixture
def expected(tmp_path):
    """What an undisturbed run writes."""
    job = Job(tmp_path / "undisturbed", [*texts(300), b"broken", *texts(20)])
    with start() as worker:
        assert worker.run(job)["type"] == "finished"
    return job.bytes_of("results"), job.bytes_of("errors")


def same(job: Job, expected: tuple[bytes, bytes]) -> bool:
    return (job.bytes_of("results"), job.bytes_of("errors")) == expected


MOODS = ("error", "reject", "object", "", "", "")


def moody(count: int) -> list:
    """Items that fail in several ways, and lines that are none."""
    lines = [{"mood": MOODS[n % len(MOODS)], "n": n, "text": f"text-{n}"} for n in range(count)]
    return [b"broken" if n % 7 == 0 else line for n, line in enumerate(lines)]


def codes_of(job: Job, bytes_: int) -> dict[str, int]:
    """As the error records up to there have them."""
    records = map(json.loads, job.bytes_of("errors")[:bytes_].splitlines())
    return dict(collections.Counter(record["error"]["code"] for record in records))


@pytest.mark.parametrize("seed", range(2))
def test_failures_are_counted_by_code_and_what_is_cut_back_and_redone_is_counted_once(tmp_path, seed):
    rng = random.Random(seed)
    job = Job(tmp_path / "job", moody(500))
    for _ in range(4):
        with WorkerDriver() as worker:
            worker.load("trouble:Moody", heartbeat_s=0.02, checkpoint_s=0.01)
            worker.lease(job, batch_max=8)
            time.sleep(rng.uniform(0.0, 0.15))
            worker.kill()
            worker.until_gone(job)
        assert job.checkpoint["failure_codes"] == codes_of(job, job.checkpoint["errors_bytes"])
    with WorkerDriver() as worker:
        worker.load("trouble:Moody")
        assert worker.run(job)["type"] == "finished"
    found = job.checkpoint["failure_codes"]
    assert found == codes_of(job, job.checkpoint["errors_bytes"])
    assert sum(found.values()) == job.checkpoint["failed"]
    assert set(found) == {"handler_error", "rejected", "bad_output", "bad_json"}


def test_a_checkpoint_of_an_older_version_is_gone_on_from_and_counts_from_there(tmp_path):
    job = Job(tmp_path / "job", [b"broken", *texts(5), b"broken", b""])
    with start() as worker:
        worker.run(Job(tmp_path / "other", texts(1)))
        del job.checkpoint["failure_codes"]
        assert worker.run(job)["type"] == "finished"
    assert job.checkpoint["failure_codes"] == {"bad_json": 3}


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_the_output_is_the_same_to_the_byte(tmp_path, expected, seed):
    rng = random.Random(seed)
    job = Job(tmp_path / "job", [*texts(300), b"broken", *texts(20)])
    for _ in range(5):
        with start(call_s=0.002) as worker:
            worker.lease(job, batch_max=8)
            time.sleep(rng.uniform(0.0, 0.12))
            worker.kill()
            worker.until_gone(job)
        kept = job.bytes_of("results")[: job.checkpoint["results_bytes"]]
        assert zlib.crc32(kept) == job.checkpoint["results_crc"]
        assert kept.count(b"\n") == job.checkpoint["done"]
    with start() as worker:
        assert worker.run(job)["type"] == "finished"
    assert same(job, expected)
    assert job.checkpoint["done"] == 320
    assert job.checkpoint["failed"] == 1


def test_bytes_beyond_the_checkpoint_are_cut_off(tmp_path, expected):
    job = Job(tmp_path / "job", [*texts(300), b"broken", *texts(20)])
    (job.folder / "results.jsonl").write_bytes(b'{"line": 1, "output": {"torn')
    (job.folder / "errors.jsonl").write_bytes(b"\0" * 4096)
    with start() as worker:
        worker.run(job)
    assert same(job, expected)


def test_yield_and_resume_computes_every_item_once(tmp_path, expected):
    side = tmp_path / "side"
    job = Job(tmp_path / "job", [*texts(300), b"broken", *texts(20)])
    endings = collections.Counter()
    with start(side=str(side), call_s=0.005) as worker:
        while endings["finished"] == 0:
            worker.lease(job, batch_max=8)
            time.sleep(0.03)
            worker.send("yield", attempt=job.attempt)
            last = worker.finish(job)
            endings[last["type"]] += 1
            computed = side.read_text().split()
            assert len(computed) == last["checkpoint"]["done"]  # nothing computed was thrown away
    assert endings["yielded"] >= 2
    assert same(job, expected)
    assert collections.Counter(computed) == collections.Counter(
        item["text"] for item in texts(300) + texts(20)
    )


def test_yield_on_the_heels_of_its_lease_gives_it_back(tmp_path):
    job = Job(tmp_path / "job", texts(10))
    with start(call_s=5) as worker:
        worker.lease(job)
        worker.send("yield", attempt=job.attempt)
        last = worker.finish(job)
    assert last["type"] == "yielded"
    assert last["checkpoint"]["upto"] <= 1  # the call in hand when it came, if any


def test_yield_of_another_attempt_is_not_obeyed(tmp_path):
    job = Job(tmp_path / "job", texts(40))
    with start(call_s=0.005) as worker:
        worker.lease(job)
        worker.send("yield", attempt=job.attempt + 1)
        worker.send("yield", attempt=job.attempt - 1)
        assert worker.finish(job)["type"] == "finished"


def test_files_are_closed_and_the_lock_free_when_the_yield_is_told(tmp_path):
    job = Job(tmp_path / "job", texts(200))
    with start(call_s=0.005) as worker:
        worker.lease(job)
        worker.expect("checkpoint")
        with open(job.folder / "lock", "rb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        worker.send("yield", attempt=job.attempt)
        worker.finish(job)
        with open(job.folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        open_files = [os.readlink(link) for link in pathlib.Path(f"/proc/{worker.process.pid}/fd").iterdir()]
    assert not [name for name in open_files if name.startswith(str(job.folder))]


def test_busy_lock_is_waited_for(tmp_path):
    job = Job(tmp_path / "job", texts(10))
    with start() as worker:
        with open(job.folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            worker.lease(job)
            for _ in range(10):
                worker.expect("heartbeat")
            assert not (job.folder / "results.jsonl").exists()
        assert worker.finish(job)["type"] == "finished"


def test_lease_asked_back_while_the_lock_is_busy_is_given_back_untouched(tmp_path):
    job = Job(tmp_path / "job", texts(10))
    with start() as worker:
        with open(job.folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            worker.lease(job)
            worker.send("yield", attempt=job.attempt)
            assert worker.finish(job)["type"] == "yielded"
        assert job.checkpoint == FRESH
        assert not (job.folder / "results.jsonl").exists()
        assert worker.run(job)["type"] == "finished"


def test_lock_that_stays_busy_loses_the_lease(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    lock = take_lock(folder, lambda: False)
    with pytest.raises(LeaseLost, match="lock_busy") as caught:
        take_lock(folder, lambda: False, wait_s=0.1)
    assert caught.value.cause == "died"
    os.close(lock)
    os.close(take_lock(folder, lambda: False, wait_s=0.1))
    os.close(folder)


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EFBIG, "disk_full"),
        (errno.EIO, "died"),
    ],
)
def test_refusal_of_the_disk_decides_how_the_lease_ends(number, cause):
    assert lost_to(OSError(number, os.strerror(number)), "writing").cause == cause


def run_half(tmp_path: pathlib.Path) -> Job:
    job = Job(tmp_path / "job", [b"broken", *texts(500)])
    with start(call_s=0.002) as worker:
        worker.lease(job, batch_max=4)
        worker.expect("checkpoint")
        worker.send("yield", attempt=job.attempt)
        assert worker.finish(job)["type"] == "yielded"
    assert job.checkpoint["done"] > 0
    return job


def shorten(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: pathlib.Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("name", ["results.jsonl", "errors.jsonl"])
@pytest.mark.parametrize("damage", [shorten, flip, link, pathlib.Path.unlink])
def test_damaged_output_is_reported_and_left_as_it_is(tmp_path, damage, name):
    job = run_half(tmp_path)
    damage(job.folder / name)
    before = {path.name: path.read_bytes() for path in job.folder.iterdir() if path.suffix == ".jsonl"}
    with start() as worker:
        last = worker.run(job)
        assert (last["type"], last["cause"]) == ("lost", "output_damaged")
        assert name in last["detail"]
        after = {path.name: path.read_bytes() for path in job.folder.iterdir() if path.suffix == ".jsonl"}
        assert before == after
        other = Job(tmp_path / "other", texts(3))  # the worker stays warm
        assert worker.run(other)["type"] == "finished"


def test_output_that_links_elsewhere_is_not_followed(tmp_path):
    job = Job(tmp_path / "job", texts(3))
    target = tmp_path / "precious"
    target.write_text("precious")
    (job.folder / "results.jsonl").symlink_to(target)
    with start() as worker:
        assert worker.run(job)["cause"] == "output_damaged"
    assert target.read_text() == "precious"


def test_input_that_is_gone_loses_the_lease(tmp_path):
    job = Job(tmp_path / "job", texts(3))
    (job.folder / "input.jsonl").unlink()
    with start() as worker:
        assert worker.run(job)["cause"] == "input_lost"
        job.folder = tmp_path / "nowhere"
        assert worker.run(job)["cause"] == "input_lost"


def test_input_with_too_few_lines_loses_the_lease_and_keeps_what_was_done(tmp_path):
    job = Job(tmp_path / "job", texts(30))
    job.items = 31
    with start() as worker:
        last = worker.run(job)
    assert last["cause"] == "input_lost"
    assert "30 lines instead of 31" in last["detail"]
    assert 0 < last["checkpoint"]["done"] == len(job.results()) <= 30


@pytest.mark.parametrize("numbers", ["1\n2\n", "one\ntwo\nthree\n"])
def test_original_numbers_that_do_not_fit_lose_the_lease(tmp_path, numbers):
    job = Job(tmp_path / "job", texts(3))
    (job.folder / "lines").write_text(numbers)
    with start() as worker:
        assert worker.run(job)["cause"] == "input_lost"


def test_full_disk_keeps_the_last_checkpoint_and_fails_no_item(tmp_path, expected):
    """RLIMIT_FSIZE stands for the disk: writes beyond it fail with EFBIG."""
    job = Job(tmp_path / "job", [*texts(300), b"broken", *texts(20)])
    bytes_max = len(expected[0]) // 2
    with start(call_s=0.002) as worker:
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (bytes_max, bytes_max))
        last = worker.run(job, batch_max=4)
        assert (last["type"], last["cause"]) == ("lost", "disk_full")
        assert 0 < last["checkpoint"]["done"] < 320
        assert len(job.bytes_of("results")) == job.checkpoint["results_bytes"]
    with start() as worker:
        assert worker.run(job)["type"] == "finished"
    assert same(job, expected)


def test_more_failures_than_allowed_end_the_lease_with_a_checkpoint(tmp_path):
    job = Job(tmp_path / "job", [*texts(5), b"", b"", b"", *texts(500)])
    with start(call_s=0.002) as worker:
        last = worker.run(job, failures_max=2, batch_max=4)
        assert (last["type"], last["cause"]) == ("lost", "failures_max")
        assert last["checkpoint"]["failed"] == 3
        assert len(job.errors()) == 3
        assert last["checkpoint"]["done"] >= 5
        allowed = Job(tmp_path / "allowed", [*texts(5), b"", b"", b""])
        assert worker.run(allowed, failures_max=3)["type"] == "finished"


def test_too_many_failures_in_the_last_batch_do_not_finish(tmp_path):
    job = Job(tmp_path / "job", [*texts(5), b""])
    with start() as worker:
        assert worker.run(job, failures_max=0)["cause"] == "failures_max"


def test_finished_job_leased_again_finishes_at_once(tmp_path):
    job = Job(tmp_path / "job", texts(10))
    with start() as worker:
        worker.run(job)
        before = job.bytes_of("results")
        assert worker.run(job)["type"] == "finished"
    assert job.bytes_of("results") == before


def test_checkpoints_of_a_lease_only_move_forward_and_match_the_files(tmp_path):
    job = Job(tmp_path / "job", [*texts(300), b"broken"])
    with start(call_s=0.002) as worker:
        worker.run(job, batch_max=8)
        checkpoints = [message["checkpoint"] for message in worker.seen if "checkpoint" in message]
        timings = [message["timings"] for message in worker.seen if "timings" in message]
    assert len(checkpoints) >= 3
    for before, after in zip([FRESH, *checkpoints], checkpoints, strict=False):
        assert before["upto"] <= after["upto"]
        assert after["done"] + after["failed"] == after["upto"]
        for name in ("results", "errors"):
            content = job.bytes_of(name)[: after[f"{name}_bytes"]]
            assert zlib.crc32(content) == after[f"{name}_crc"]
    assert sum(timing["compute_s"] for timing in timings) >= 0.002 * 300 / 8
    assert all(spent >= 0 for timing in timings for spent in timing.values())
