"""The order of durability: records, then the syncs, then the report."""

from __future__ import annotations

import os
import threading

import pytest
from gpujobd_worker.failures import Failure
from gpujobd_worker.files import JobFiles
from gpujobd_worker.writer import Batch, Writer
from worker_driver import FRESH, Job


def batch(first: int, outcomes: list) -> Batch:
    last = first + len(outcomes) - 1
    return Batch(last, range(first, last + 1), [None] * len(outcomes), outcomes, None, 100)


@pytest.fixture
def files(tmp_path):
    opened = JobFiles(str(Job(tmp_path / "job", []).folder), 1, FRESH, lambda: False)
    yield opened
    opened.close()


@pytest.fixture
def synced(monkeypatch):
    """inode -> bytes that were in the file when it was last synced."""
    sizes: dict[int, int] = {}
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        real(fd)
        sizes[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return sizes


def sizes_of(files: JobFiles, synced: dict[int, int]) -> tuple[int, int]:
    names = ("results.jsonl", "errors.jsonl")
    return tuple(synced.get(os.stat(name, dir_fd=files.folder).st_ino, 0) for name in names)


def test_names_that_lead_to_the_outputs_are_synced_before_the_first_checkpoint(files, monkeypatch):
    named = set()
    monkeypatch.setattr(os, "fsync", lambda fd: named.add(os.fstat(fd).st_ino))
    folder = os.fstat(files.folder).st_ino
    parent = os.stat("..", dir_fd=files.folder).st_ino
    reported = []

    def report(checkpoint: dict) -> None:
        assert named == {folder, parent}
        reported.append(checkpoint)

    writer = Writer(
        files, dict(FRESH), every_s=0.0, report=report, enough=lambda _: False, stop=threading.Event()
    )
    writer.put(batch(1, [{"a": 1}]))
    writer.finish()
    assert reported


def test_every_reported_checkpoint_was_synced_before(files, synced):
    reported = []

    def report(checkpoint: dict) -> None:
        assert sizes_of(files, synced) == (checkpoint["results_bytes"], checkpoint["errors_bytes"])
        reported.append(checkpoint)

    writer = Writer(
        files, dict(FRESH), every_s=0.0, report=report, enough=lambda _: False, stop=threading.Event()
    )
    for first in range(1, 40, 4):
        writer.put(batch(first, [{"a": 1}, Failure("rejected", "no"), {"b": 2}, {"c": 3}]))
    writer.finish()
    assert writer.lost is None
    assert reported
    assert writer.checkpoint["upto"] == 40
    assert (writer.checkpoint["done"], writer.checkpoint["failed"]) == (30, 10)
    assert sizes_of(files, synced) == (writer.checkpoint["results_bytes"], writer.checkpoint["errors_bytes"])


def test_sync_that_fails_reports_nothing_more_and_ends_the_lease(files, monkeypatch):
    def fdatasync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    reported: list[dict] = []
    stop = threading.Event()
    writer = Writer(
        files, dict(FRESH), every_s=0.0, report=reported.append, enough=lambda _: False, stop=stop
    )
    writer.put(batch(1, [{"a": 1}]))
    assert stop.wait(30)
    writer.put(batch(2, [{"a": 1}]))  # must not block: nobody takes it any more
    writer.finish()
    assert writer.lost.cause == "died"
    assert writer.checkpoint == FRESH
    assert reported == []


def test_enough_failures_ask_for_a_stop(files):
    stop = threading.Event()
    writer = Writer(
        files, dict(FRESH), every_s=60, report=lambda _: None, enough=lambda failed: failed > 1, stop=stop
    )
    writer.put(batch(1, [Failure("rejected", "no"), Failure("rejected", "no")]))
    assert stop.wait(30)
    writer.finish()
    assert writer.checkpoint["failed"] == 2
