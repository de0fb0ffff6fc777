"""Row 4: a disk that gives back something else. Refused, or nothing was lost; never another record, never a shorter one.

Small spaces are exhausted: every bit of a journal and of a snapshot. Larger ones are drawn.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from gpujobd import recovery, snapfile
from gpujobd.disk import Disk
from gpujobd.frames import BLOCK, SECTOR
from gpujobd.journal import Journal, JournalError
from gpujobd_worker.files import RESULTS, LeaseLost, Output
from sim_disk import SimDisk
from story import Story

pytestmark = pytest.mark.slow

SEGMENT_BYTES = 32 << 10
SNAPSHOT_BYTES = 4096
DIRECTORY = "/j"
PARTS = 8  # of an exhausted space, so that several processes share it


class Held(Disk):
    """Files as bytes; only what recovery reads with."""

    def __init__(self, files: dict[str, bytearray]) -> None:
        self.files = files
        self._opened: list[bytearray] = []

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        self._opened.append(self.files[path.rpartition("/")[2]])
        return len(self._opened) - 1

    def close(self, fd: int) -> None:
        if fd + 1 == len(self._opened):
            self._opened.pop()

    def size(self, fd: int) -> int:
        return len(self._opened[fd])

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return bytes(self._opened[fd][offset : offset + size])

    def listdir(self, directory: str) -> list[str]:
        return list(self.files)


def a_journal(
    seed: int, segments: int = 1, segment_bytes: int = SEGMENT_BYTES
) -> tuple[Held, list[tuple[int, bytes]]]:
    """Files full of frames, the last one proven by a watermark; and what is in them."""
    disk, story = SimDisk(seed), Story(seed)
    journal = Journal(DIRECTORY, disk, segment_bytes)
    journal.open()
    luck, records = random.Random(seed), []
    while len(journal._segments) < segments or journal._segments[-1].end + 3 * BLOCK <= segment_bytes:
        records += story.advance(story.seq + luck.choice((1, 2, 5)))
        journal.append(records[journal.last_seq :])
    journal.watermark()
    journal.close()
    files = {name.rpartition("/")[2]: inode.cache for name, inode in disk.names.items() if "/seg-" in name}
    return Held(files), list(enumerate(records, 1))


def survives(held: Held, records: list[tuple[int, bytes]]) -> bool:
    """False: refused. Anything but refusal or the whole truth is a failure."""
    try:
        found = recovery.examine(held, DIRECTORY)
    except JournalError:
        return False
    assert list(recovery.records_after(held, DIRECTORY, found.segments, 0)) == records
    return True


def test_a_journal_that_nobody_touched_is_whole() -> None:
    assert survives(*a_journal(1, 3))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_flipped_bit_of_a_journal_is_refused_or_harmless(part: int, cases, count, sampled) -> None:
    seed = next(cases(1)) // PARTS * PARTS  # all parts are of one journal
    held, records = a_journal(seed)
    (name,) = held.files
    file, refused = held.files[name], 0
    bits = range(part, len(file) * 8, PARTS)
    for bit in sampled(bits, seed):
        file[bit // 8] ^= 1 << bit % 8
        refused += not survives(held, records)
        file[bit // 8] ^= 1 << bit % 8
        count(4)
    assert refused


@pytest.mark.parametrize("part", range(2))
def test_every_flipped_bit_of_a_snapshot_is_noticed(part: int, cases, count, sampled) -> None:
    seed = next(cases(1))
    disk, story = SimDisk(seed), Story(seed)
    story.advance(30)
    path = f"{DIRECTORY}/{recovery.snapshot_name(30)}"
    fill = SNAPSHOT_BYTES - 200 - sum(map(len, story.chunks()))
    snapfile.write(disk, path, b"s" * 16, 30, [*story.chunks(), b"x" * fill])
    file = bytearray(disk.names[path].cache)
    held = Held({path.rpartition("/")[2]: file})
    assert recovery.read_snapshots(held, DIRECTORY).valid == [30]
    for bit in sampled(range(part, len(file) * 8, 2), seed):
        file[bit // 8] ^= 1 << bit % 8
        # Another store's name is all that a snapshot alone cannot tell: the segments can.
        found = recovery.read_snapshots(held, DIRECTORY)
        assert not found.valid, f"bit {bit} of the snapshot went unnoticed"
        file[bit // 8] ^= 1 << bit % 8
        count(4)


def test_every_zeroed_sector_of_a_proven_journal_is_refused_or_harmless(cases, count) -> None:
    for seed in cases(4):
        held, records = a_journal(seed, 2)
        for file in held.files.values():
            for at in range(0, len(file), SECTOR):
                whole = file[at : at + SECTOR]
                file[at : at + SECTOR] = bytes(SECTOR)
                survives(held, records)
                file[at : at + SECTOR] = whole
                count(4)


def test_blocks_that_moved_are_refused_or_harmless(cases, count) -> None:
    """Two change places, one stands twice, one is of a moment before, or of another store."""
    for seed in cases(2_000):
        luck = random.Random(seed)
        held, records = a_journal(seed, 3, 6 * BLOCK)
        other, _ = a_journal(seed + 1, 3, 6 * BLOCK)
        blocks = [(file, at) for file in held.files.values() for at in range(0, len(file), BLOCK)]
        (file, at), (from_file, from_at) = luck.sample(blocks, 2)
        match luck.choice(("swapped", "doubled", "stale", "foreign")):
            case "swapped":
                kept = file[at : at + BLOCK]
                file[at : at + BLOCK] = from_file[from_at : from_at + BLOCK]
                from_file[from_at : from_at + BLOCK] = kept
            case "doubled":
                file[at : at + BLOCK] = from_file[from_at : from_at + BLOCK]
            case "stale" if at:
                file[at : at + BLOCK] = bytes(
                    BLOCK
                )  # as the spare segment was; block 0 was never anything else
            case _:
                file[at : at + BLOCK] = luck.choice(list(other.files.values()))[at : at + BLOCK]
        survives(held, records)
        count(4)


@pytest.mark.parametrize("block", range(2))
def test_a_flipped_bit_of_an_output_stops_the_job_or_is_cut_off(
    block: int, tmp_path: Path, cases, count
) -> None:
    results, _, _ = Story(block).outputs(1, 40)
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fd = os.open(RESULTS, os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
    os.pwrite(fd, results, 0)
    checkpoint = Story(block).checkpoint(1, 30)
    size, crc = checkpoint["results_bytes"], checkpoint["results_crc"]
    assert 0 < size < len(results)
    for seed in cases(10_000):
        bit = random.Random(seed).randrange(len(results) * 8)
        at = bit // 8
        os.pwrite(fd, bytes([results[at] ^ 1 << bit % 8]), at)
        if at < size:
            with pytest.raises(LeaseLost, match="have changed"):
                Output(folder, RESULTS, size, crc)
        else:
            output = Output(folder, RESULTS, size, crc)
            output.cut()
            output.close()
            assert os.pread(fd, len(results), 0) == results[:size]
            os.pwrite(fd, results[size:], size)
        os.pwrite(fd, results[at : at + 1], at)
        count(4)
    os.close(fd)
    os.close(folder)
