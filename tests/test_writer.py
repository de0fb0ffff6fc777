"""Group commit: many producers, one frame in flight, and what they are told when the disk fails."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from gpujobd.disk import Disk
from gpujobd.frames import BLOCK
from gpujobd.journal import Journal, JournalDead
from gpujobd.writer import Writer
from sim_disk import SimDisk

SEGMENT_BYTES = 16 * BLOCK


@asynccontextmanager
async def running(
    journal: Journal, on_commit: Callable[[int], None] = lambda _: None
) -> AsyncIterator[Writer]:
    writer = Writer(journal, on_commit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        with trio.fail_after(30):
            yield writer
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    """What a thread brings about, within a generous limit."""
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110 - it happens in a thread that knows of no events
            await trio.sleep(0.001)


class GatedDisk(SimDisk):
    """Its syncs wait for a gate, as on a slow device."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = trio.Event()
        self.loop = trio.lowlevel.current_trio_token()
        self.gated = False
        self.broken = False

    def fdatasync(self, fd: int) -> None:
        if self.gated:
            trio.from_thread.run_sync(self.entered.set, trio_token=self.loop)
            assert self.gate.wait(30)
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        super().fdatasync(fd)


def opened(disk: Disk) -> Journal:
    journal = Journal("/j", disk, SEGMENT_BYTES)
    journal.open()
    return journal


async def test_records_of_several_producers_are_committed_in_the_order_of_their_numbers(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    journal.open()
    commits: list[int] = []
    given: dict[int, bytes] = {}
    async with running(journal, commits.append) as writer:

        async def produce(name: int) -> None:
            for turn in range(40):
                records = [b"%d.%d.%d" % (name, turn, n) for n in range(1 + turn % 3)]
                last = writer.add(records)
                given.update(enumerate(records, last - len(records) + 1))
                if turn % 5 == 0:
                    await writer.drain()
                    assert writer.committed >= last
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for name in range(8):
                nursery.start_soon(produce, name)
        await writer.drain()
        assert writer.committed == len(given) == journal.last_seq
    assert commits == sorted(set(commits))
    assert commits[-1] == len(given)
    journal.seal()
    journal.close()
    recovered = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    assert dict(recovered.open().records) == given
    recovered.close()


async def test_what_is_added_while_a_frame_is_in_flight_shares_the_next_one() -> None:
    disk = GatedDisk()
    journal = opened(disk)
    commits: list[int] = []
    async with running(journal, commits.append) as writer:
        disk.gated = True
        assert writer.add([b"first"]) == 1
        await disk.entered.wait()
        assert writer.sync_started_at is not None
        for n in range(100):
            assert writer.add([b"%d" % n]) == n + 2
        assert (writer.committed, journal.last_seq, commits) == (0, 0, [])
        disk.gated = False
        disk.gate.set()
        await writer.drain()
        assert commits == [1, 101]
        assert writer.sync_started_at is None


async def test_a_failed_sync_ends_run_and_is_never_reported_as_a_commit() -> None:
    disk = GatedDisk()
    journal = opened(disk)
    commits: list[int] = []
    writer = Writer(journal, commits.append)
    failures: list[JournalDead] = []

    async def drain() -> None:
        with pytest.raises(JournalDead):
            await writer.drain()
        failures.append(JournalDead())

    async with trio.open_nursery() as nursery:
        writer.add([b"good"])
        disk.gated = True

        async def run() -> None:
            with pytest.raises(JournalDead, match="Input/output error"):
                await writer.run()

        nursery.start_soon(run)
        await disk.entered.wait()
        writer.add([b"in vain"])
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        disk.broken, disk.gated = True, False
        disk.gate.set()
    assert commits == []
    assert len(failures) == 1
    with pytest.raises(JournalDead):
        writer.add([b"never"])
    with pytest.raises(JournalDead):
        await writer.run()


async def test_the_last_frame_is_proven_soon_after_the_writer_falls_idle() -> None:
    journal = opened(SimDisk())
    async with running(journal) as writer:
        writer.add([b"a"])
        await writer.drain()
        await until(lambda: not journal.unproven)
        writes = journal._segments[-1].end
        await trio.sleep(0.1)
        assert journal._segments[-1].end == writes  # one watermark, not one every 50 ms
        writer.add([b"b"])
        await writer.drain()
        assert journal.unproven


async def test_a_frame_left_unproven_by_the_last_run_is_proven_by_this_one() -> None:
    disk = SimDisk()
    opened(disk).append([b"a"])
    disk.restart_process()
    journal = opened(disk)
    assert journal.unproven
    async with running(journal):
        await until(lambda: not journal.unproven)


async def test_additions_share_frames_up_to_the_largest_one_and_a_larger_one_is_cut() -> None:
    disk = SimDisk()
    journal = opened(disk)
    room = journal.payload_bytes_max
    record = b"x" * (room // 3)
    commits: list[int] = []
    writer = Writer(journal, commits.append)
    for _ in range(5):
        writer.add([record])
    assert writer.add([record] * 7) == 12
    with pytest.raises(ValueError, match="a frame holds"):
        writer.add([b"x" * room])
    assert writer.add([b"y"]) == 13
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await writer.drain()
        nursery.cancel_scope.cancel()
    assert commits[:2] == [2, 4]
    assert journal.last_seq == 13
    assert [journal.read(seq) for seq in range(1, 14)] == [record] * 12 + [b"y"]


async def test_a_cancelled_writer_still_reports_the_frame_that_was_in_flight() -> None:
    disk = GatedDisk()
    journal = opened(disk)
    commits: list[int] = []
    async with trio.open_nursery() as nursery:
        writer = Writer(journal, commits.append)
        writer.add([b"a"])
        disk.gated = True
        nursery.start_soon(writer.run)
        await disk.entered.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            disk.gate.set()
            await until(lambda: journal.last_seq > 0)
    assert commits == [1]


async def test_segments_are_made_ahead_so_that_a_roll_finds_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    journal.open()
    async with running(journal) as writer:
        for _ in range(60):
            writer.add([b"x" * 5000])
            await writer.drain()
        await until(lambda: not journal.spares_missing)
        assert len(journal._segments) > 7
    journal.close()


async def test_a_disk_that_was_full_gets_its_spares_when_there_is_space_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpujobd.writer.SPARES_RETRY_S", 0.01)
    disk = SimDisk()
    journal = opened(disk)
    disk.space = disk._used()
    async with running(journal) as writer:
        for _ in range(20):
            writer.add([b"x"])
            await writer.drain()
        await trio.sleep(0.05)
        assert journal.spares_missing
        disk.space = math.inf  # type: ignore[assignment]
        await until(lambda: not journal.spares_missing)


async def test_a_directory_that_cannot_be_synced_ends_an_idle_writer() -> None:
    disk = SimDisk()
    journal = opened(disk)
    writer = Writer(journal, lambda _: None)
    for _ in range(20):
        writer.add([b"x" * 4000])

    def fail(directory: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    disk.fsync_dir = fail  # type: ignore[method-assign]
    with trio.fail_after(10), pytest.raises(JournalDead):
        await writer.run()
