"""The journal's format, its rules, reading, snapshots, dropping: one circumstance a test. Faults have their own file."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from gpujobd import frames, recovery
from gpujobd.frames import BLOCK, SECTOR
from gpujobd.journal import Journal, JournalBusyError, JournalDead, JournalError, Recovered
from sim_disk import SimDisk

SEGMENT_BYTES = 8 * BLOCK
FIRST = "/j/seg-0000000000000001"


def opened(disk: SimDisk, segment_bytes: int = SEGMENT_BYTES) -> tuple[Journal, Recovered]:
    journal = Journal("/j", disk, segment_bytes)
    return journal, journal.open()


def reopened(disk: SimDisk) -> list[bytes]:
    """All records after the snapshot, from a new process."""
    disk.restart_process()
    _, recovered = opened(disk)
    return [record for _, record in recovered.records]


def record(seq: int, size: int = 60) -> bytes:
    return (b"record %d;" % seq * (1 + size // 9))[:size]


def written(frames_of: list[int], *, end: str = "seal", size: int = 60) -> tuple[SimDisk, list[bytes]]:
    """A journal of one frame for each count."""
    disk = SimDisk()
    journal, _ = opened(disk)
    records = [record(seq, size) for seq in range(1, 1 + sum(frames_of))]
    left = list(records)
    for count in frames_of:
        journal.append(left[:count])
        left = left[count:]
    if end == "seal":
        journal.seal()
    if end == "watermark":
        journal.watermark()
    journal.close()
    disk.restart_process()
    return disk, records


def recovered_of(disk: SimDisk) -> tuple[recovery.Found, list[bytes]]:
    """What a start would read, nothing written."""
    found = recovery.examine(disk, "/j")
    after = found.snapshots.valid[-1] if found.snapshots.valid else 0
    return found, [record for _, record in recovery.records_after(disk, "/j", found.segments, after)]


# --- damage --------------------------------------------------------------------------------------------------


def test_every_cut_of_a_frame_sequence_keeps_the_frames_before_it() -> None:
    disk, records = written([1, 3, 20, 2], size=400, end="none")
    held = disk.names[FIRST].cache
    whole = bytes(held)
    segment = recovery.examine(disk, "/j").segments[0]
    ends = [*(block * BLOCK for block in segment.blocks[1:]), segment.end]
    for cut in range(BLOCK, len(whole) + 1, SECTOR):
        held[:] = whole[:cut].ljust(len(whole), b"\0")
        payload_ends = [end for end in ends if not any(whole[cut:end])]
        kept = sum([1, 3, 20, 2][: len(payload_ends)])
        assert recovered_of(disk)[1] == records[:kept]


def test_a_segment_cut_short_at_any_length_is_refused() -> None:
    disk, _ = written([1, 2])
    held = disk.names[FIRST].cache
    whole = bytes(held)
    for length in [*range(0, BLOCK, 509), *range(BLOCK - 2, len(whole), 1021), len(whole) - 1]:
        held[:] = whole[:length]
        with pytest.raises(JournalError):
            recovery.examine(disk, "/j")


def flip(disk: SimDisk, records: list[bytes], bits: Iterable[int]) -> int:
    """Flip one bit of the first segment at a time: refused, or nothing is lost. How many were refused."""
    held = disk.names[FIRST].cache
    refused = 0
    for bit in bits:
        held[bit // 8] ^= 1 << bit % 8
        try:
            assert recovered_of(disk)[1] == records, bit
        except JournalError:
            refused += 1
        held[bit // 8] ^= 1 << bit % 8
    return refused


@pytest.mark.parametrize("end", ["seal", "watermark", "none"])
def test_every_flipped_bit_of_headers_and_payload_is_refused(end: str) -> None:
    """And some of the padding's bits, which the checksums cover too."""
    disk, records = written([1, 2, 1, 5], end=end)
    blocks = range(5 if end == "none" else 6)
    content = [
        block * BLOCK * 8 + bit for block in blocks for bit in range(300 * 8 if end == "seal" else 50 * 8)
    ]
    assert flip(disk, records, content) == len(content)
    padding = range(300 * 8, len(blocks) * BLOCK * 8, 64 if end == "seal" else 160)
    assert flip(disk, records, padding) == len(padding)


@pytest.mark.slow
def test_every_flipped_bit_of_a_journal_is_refused() -> None:
    disk, records = written([1, 2, 1, 5])
    assert flip(disk, records, range(6 * BLOCK * 8)) == 6 * BLOCK * 8
    assert flip(disk, records, range(6 * BLOCK * 8, 7 * BLOCK * 8)) == SECTOR * 8  # then zeros: a torn tail


def test_every_zeroed_sector_is_refused_or_harmless() -> None:
    disk, records = written([1, 20, 1, 5], end="watermark", size=500)
    held = disk.names[FIRST].cache
    whole = bytes(held)
    refused = 0
    for at in range(0, len(whole), SECTOR):
        held[at : at + SECTOR] = bytes(SECTOR)
        try:
            assert recovered_of(disk)[1] == records
        except JournalError:
            refused += 1
        held[:] = whole
    full = sum(any(whole[at : at + SECTOR]) for at in range(0, len(whole), SECTOR))
    assert refused == full - 1  # the watermark itself may be lost: it holds nothing


def test_every_misplaced_block_is_refused_or_harmless() -> None:
    disk, records = written([1, 14, 1, 5], end="watermark", size=500)
    held = disk.names[FIRST].cache
    whole = bytes(held)
    end = recovery.examine(disk, "/j").segments[0].last_frame  # a watermark, which may be lost
    for source in range(0, len(whole), BLOCK):
        for target in range(0, len(whole), BLOCK):
            held[target : target + BLOCK] = whole[source : source + BLOCK]
            try:
                assert recovered_of(disk)[1] == records
                assert held == whole or target >= end
            except JournalError:
                assert held != whole
            held[:] = whole


def test_damage_in_an_older_segment_is_refused_or_harmless() -> None:
    disk, records = written([2] * 20)
    assert len(recovery.segment_names(disk, "/j")) == 3
    refused = 0
    for name in recovery.segment_names(disk, "/j"):
        held = disk.names[f"/j/{name}"].cache
        for bit in range(0, len(held) * 8, 397):
            held[bit // 8] ^= 1 << bit % 8
            try:
                assert recovered_of(disk)[1] == records
            except JournalError:
                refused += 1
            held[bit // 8] ^= 1 << bit % 8
    assert refused > 2 * SEGMENT_BYTES * 8 // 397  # of the newest one, the empty end is harmless


def test_a_refusal_names_file_offset_and_what_would_be_lost() -> None:
    disk, _ = written([1, 3, 2])
    disk.names[FIRST].cache[2 * BLOCK + 100] ^= 1
    before = {name: bytes(inode.cache) for name, inode in disk.names.items()}
    with pytest.raises(JournalError) as refused:
        opened(disk)
    assert (refused.value.file, refused.value.offset) == (FIRST, 2 * BLOCK)
    assert (refused.value.first, refused.value.last) == (2, 4)
    assert "records 2 to 4 (3)" in str(refused.value)
    assert {name: bytes(inode.cache) for name, inode in disk.names.items()} == before


def test_a_missing_segment_is_refused() -> None:
    disk, _ = written([2] * 20)
    for name in recovery.segment_names(disk, "/j")[:-1]:
        inode = disk.names.pop(f"/j/{name}")
        with pytest.raises(JournalError):
            recovery.examine(disk, "/j")
        disk.names[f"/j/{name}"] = inode


def test_a_torn_tail_is_cut_off_and_a_copy_of_it_kept() -> None:
    disk, records = written([1, 2], end="none")
    held = disk.names[FIRST].cache
    torn = frames.frame(
        frames.payload_of([b"x" * 3000]),
        1,
        first_seq=4,
        store=_store_id(disk),
        prev_header_crc=_last_crc(disk),
    )
    at = recovery.examine(disk, "/j").segments[0].end
    held[at : at + 1024] = torn[:1024]
    _, recovered = opened(disk)
    assert recovered.torn
    assert [found for _, found in recovered.records] == records
    assert not any(held[at:])
    copies = [name for name in disk.listdir("/j") if recovery.TORN_NAME.fullmatch(name)]
    assert [bytes(disk.names[f"/j/{name}"].cache)[at : at + 1024] for name in copies] == [torn[:1024]]


def _store_id(disk: SimDisk) -> int:
    return frames.store_id(recovery.examine(disk, "/j").store)


def _last_crc(disk: SimDisk) -> int:
    return recovery.examine(disk, "/j").header_crc


def test_a_record_that_looks_like_a_frame_is_a_record() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    journal.append([b"a"])
    fake = frames.frame(frames.payload_of([b"no"]), 1, first_seq=9, store=7, prev_header_crc=0)
    journal.append([bytes(BLOCK - frames.HEADER_BYTES - 9) + fake + fake])
    assert len(reopened(disk)) == 2


# --- opening ---------------------------------------------------------------------------------------------------


def test_a_new_journal_is_empty_and_begins_at_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    recovered = journal.open()
    assert (recovered.snapshot, list(recovered.records), recovered.sealed) == (None, [], False)
    assert (journal.first_seq, journal.last_seq) == (1, 0)
    assert journal.append([b"a", b"b"]) == 2
    names = {path.name: path.stat().st_size for path in (tmp_path / "journal").iterdir()}
    assert names == {"LOCK": 0, "seg-0000000000000001": 16 << 20, "next": 16 << 20, "ballast": 16 << 20}
    journal.close()


def test_a_second_opening_of_the_same_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpujobd.journal.LOCK_WAIT_S", 0.05)
    journal = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    journal.open()
    with pytest.raises(JournalBusyError):
        Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES).open()
    journal.close()
    journal.open()
    journal.close()


def test_a_seal_is_seen_until_something_follows_it() -> None:
    disk, _ = written([1, 2])
    for _ in range(2):
        journal, recovered = opened(disk)
        assert recovered.sealed
        disk.restart_process()
    journal, _ = opened(disk)
    journal.append([b"more"])
    disk.restart_process()
    assert not opened(disk)[1].sealed


def test_segments_of_another_size_go_on_with_the_new_size() -> None:
    disk, records = written([2] * 10)
    journal, recovered = opened(disk, 4 * BLOCK)
    assert [found for _, found in recovered.records] == records
    for seq in range(21, 30):
        journal.append([record(seq)])
    assert reopened(disk) == [record(seq) for seq in [*range(1, 21), *range(21, 30)]]


def test_unfinished_files_are_removed_at_the_start() -> None:
    disk, _ = written([1])
    fd = disk.open("/j/snap-0000000000000001.tmp", write=True, create=True)
    disk.close(fd)
    opened(disk)
    assert not [name for name in disk.listdir("/j") if name.endswith(".tmp")]


def test_the_largest_frame_fits_and_a_larger_one_is_a_mistake_that_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.open()
    largest = b"x" * (journal.payload_bytes_max - 10)
    assert journal.append([largest]) == 1
    with pytest.raises(ValueError, match="a frame holds"):
        journal.append([largest, b"0123456789"])
    assert journal.append([largest, b"1"]) == 3
    assert journal.read(1) == largest
    journal.close()
    journal = Journal(tmp_path / "j")
    assert [len(found) for _, found in journal.open().records] == [len(largest), len(largest), 1]
    journal.close()


# --- a full disk -------------------------------------------------------------------------------------------------


def test_on_a_full_disk_the_ballast_becomes_the_next_segment() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    disk.space = disk._used()
    for seq in range(1, 15):
        journal.append([record(seq)])
        assert journal.prepare() == (seq < 8)
    assert "ballast" not in disk.listdir("/j")
    assert journal.spares_missing
    disk.space = None
    assert journal.prepare()
    assert not journal.spares_missing
    assert reopened(disk) == [record(seq) for seq in range(1, 15)]


def test_a_full_disk_without_spares_ends_the_journal_and_loses_nothing() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    disk.space = disk._used()
    acked = 0
    with pytest.raises(JournalDead):  # noqa: PT012 - it is the roll that fails
        while True:
            acked = journal.append([record(acked + 1)])
            journal.prepare()
    assert acked == 21  # three segments: the first, next, and the ballast
    assert reopened_full(disk) == [record(seq) for seq in range(1, acked + 1)]


def test_the_ballast_goes_where_the_directory_has_no_space_for_the_name_of_a_segment() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    with pytest.MonkeyPatch.context() as full:
        full.setattr(disk, "rename", functools.partial(rename_beside_no_ballast, disk))
        for seq in range(1, 15):  # until the second segment is full
            journal.append([record(seq)])
        assert not {"ballast", "next"} & {*disk.listdir("/j")}
        assert journal.spares_missing
    assert journal.prepare()
    disk.cut_power()
    assert reopened(disk) == [record(seq) for seq in range(1, 15)]


def test_a_segment_that_gets_no_name_ends_the_journal_and_loses_nothing() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    acked = 0
    with pytest.MonkeyPatch.context() as full:
        full.setattr(disk, "rename", refuse_to_rename)
        with pytest.raises(JournalDead, match="No space"):  # noqa: PT012 - it is the roll that fails
            while True:
                acked = journal.append([record(acked + 1)])
    assert acked == 7
    disk.cut_power()
    assert reopened(disk) == [record(seq) for seq in range(1, acked + 1)]


def rename_beside_no_ballast(disk: SimDisk, old: str, new: str) -> None:
    if "ballast" in disk.listdir("/j"):
        refuse_to_rename(old, new)
    SimDisk.rename(disk, old, new)


def reopened_full(disk: SimDisk) -> list[bytes]:
    """A start on a full disk: the tail is written again in place."""
    disk.restart_process()
    return [found for _, found in opened(disk)[1].records]


def test_making_spares_never_touches_a_segment_that_is_being_taken(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", segment_bytes=2 * BLOCK)  # every frame rolls
    journal.open()
    done = threading.Event()

    def prepare() -> None:
        while not done.is_set():
            journal.prepare()

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        for seq in range(1, 61):
            journal.append([record(seq)])
    finally:
        done.set()
        thread.join()
    journal.close()
    journal = Journal(tmp_path / "j", segment_bytes=2 * BLOCK)
    assert [found for _, found in journal.open().records] == [record(seq) for seq in range(1, 61)]
    journal.close()


# --- reading ---------------------------------------------------------------------------------------------------


def test_every_record_can_be_read_by_its_number() -> None:
    disk, records = written([1, 5, 2, 30, 1, 1, 1, 9, 3], size=300)
    journal, _ = opened(disk)
    assert [journal.read(seq) for seq in range(1, len(records) + 1)] == records
    for missing in (0, len(records) + 1):
        with pytest.raises(KeyError):
            journal.read(missing)


def test_reading_on_from_any_number_gives_at_most_what_was_asked() -> None:
    disk, records = written([1, 5, 2, 30, 1, 1, 1, 9, 3], size=300)
    journal, _ = opened(disk)
    pairs = list(enumerate(records, 1))
    for seq in range(1, len(records) + 2):
        assert journal.read_from(seq, 1000) == pairs[seq - 1 :]
        assert journal.read_from(seq, 7) == pairs[seq - 1 : seq + 6]
    assert journal.read_from(0, 3) == pairs[:3]
    assert journal.read_from(2, 1000, bytes_max=700) == pairs[1:3]
    assert journal.read_from(2, 1000, bytes_max=1) == pairs[1:2]


def test_reading_works_while_another_thread_writes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    journal.open()
    done = threading.Event()

    def write() -> None:
        for seq in range(1, 301, 3):
            journal.append([record(seq), record(seq + 1), record(seq + 2)])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while seen < 300:
        last = done.is_set()
        found = journal.read_from(seen + 1, 50)
        assert found == [(seq, record(seq)) for seq in range(seen + 1, seen + 1 + len(found))]
        assert found or not last
        seen += len(found)
    writer.join()
    journal.close()


def test_a_record_that_rots_after_the_start_is_not_handed_out() -> None:
    disk, _ = written([1, 2])
    journal, _ = opened(disk)
    disk.names[FIRST].cache[BLOCK + 60] ^= 1
    with pytest.raises(JournalError):
        journal.read(1)
    assert journal.read(2) == record(2)


# --- snapshots and dropping --------------------------------------------------------------------------------------


def with_snapshots(disk: SimDisk) -> Journal:
    """60 records, snapshots after 20, 30 and 40."""
    journal, _ = opened(disk)
    for seq in range(1, 61):
        journal.append([record(seq)])
        if seq in (20, 30, 40):
            journal.write_snapshot(seq, [b"state", b"", b"%d" % seq])
    return journal


def test_the_newest_snapshot_is_found_and_the_records_after_it() -> None:
    disk = SimDisk()
    with_snapshots(disk)
    disk.restart_process()
    _, recovered = opened(disk)
    assert recovered.snapshot == (40, [b"state", b"", b"40"])
    assert list(recovered.records) == [(seq, record(seq)) for seq in range(41, 61)]
    assert recovery.read_snapshots(disk, "/j").valid == [30, 40]


def test_every_flipped_bit_of_the_newest_snapshot_falls_back_to_the_older_one() -> None:
    disk = SimDisk()
    with_snapshots(disk)
    held = disk.names["/j/snap-0000000000000028"].cache
    for bit in range(len(held) * 8):
        held[bit // 8] ^= 1 << bit % 8
        snapshots = recovery.read_snapshots(disk, "/j")
        assert (snapshots.valid, snapshots.newest) == ([30], [b"state", b"", b"30"])
        held[bit // 8] ^= 1 << bit % 8
    for length in range(len(held)):
        whole = bytes(held)
        held[:] = whole[:length]
        assert recovery.read_snapshots(disk, "/j").valid == [30]
        held[:] = whole


def test_a_damaged_snapshot_is_named_and_the_records_since_the_older_one_come() -> None:
    disk = SimDisk()
    with_snapshots(disk)
    disk.restart_process()
    disk.names["/j/snap-0000000000000028"].cache[50] ^= 1
    journal, recovered = opened(disk)
    assert recovered.snapshot == (30, [b"state", b"", b"30"])
    assert [seq for seq, _ in recovered.records] == list(range(31, 61))
    assert list(recovered.damaged_snapshots) == ["snap-0000000000000028"]
    journal.write_snapshot(60, [b"new"])
    assert recovery.read_snapshots(disk, "/j").valid == [30, 60]
    assert not recovery.read_snapshots(disk, "/j").damaged


def test_without_any_valid_snapshot_a_whole_log_is_replayed_and_a_dropped_one_refused() -> None:
    for drop in (False, True):
        disk = SimDisk()
        journal = with_snapshots(disk)
        if drop:
            assert journal.drop_segments(61, 0) > 0
        disk.restart_process()
        for name in ("snap-0000000000000028", "snap-000000000000001e"):
            disk.names[f"/j/{name}"].cache[50] ^= 1
        if drop:
            with pytest.raises(JournalError, match="in no valid snapshot"):
                opened(disk)
        else:
            _, recovered = opened(disk)
            assert recovered.snapshot is None
            assert len(list(recovered.records)) == 60


def test_a_journal_that_ends_before_its_snapshot_is_refused() -> None:
    disk = SimDisk()
    journal = with_snapshots(disk)
    journal.write_snapshot(60, [b"x"])
    disk.restart_process()
    last = recovery.examine(disk, "/j").segments[-1]
    held = disk.names[f"/j/{last.name}"].cache
    held[BLOCK:] = bytes(len(held) - BLOCK)
    with pytest.raises(JournalError, match="60 was committed"):
        opened(disk)


def test_a_snapshot_that_cannot_be_written_leaves_the_old_ones_and_the_journal_alive() -> None:
    disk = SimDisk()
    journal = with_snapshots(disk)
    disk.space = disk._used()
    with pytest.raises(OSError, match="No space"):
        journal.write_snapshot(60, [b"x" * 100])
    journal.append([b"more"])
    assert not [name for name in disk.listdir("/j") if name.endswith(".tmp")]
    assert recovery.read_snapshots(disk, "/j").valid == [30, 40]


def test_segments_are_dropped_only_when_nothing_needs_them() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    for seq in range(1, 71):  # seven frames a segment
        journal.append([record(seq)])
    assert journal.drop_segments(71, 0) == 0  # no snapshot
    journal.write_snapshot(60, [b"x"])
    assert journal.drop_segments(71, 0) == 0  # one: the whole log stands in for the other
    journal.write_snapshot(65, [b"x"])
    assert journal.drop_segments(71, 10 * SEGMENT_BYTES) == 0  # history that may stay
    assert journal.drop_segments(71, 9 * SEGMENT_BYTES) == 1
    assert journal.first_seq == 8
    assert journal.drop_segments(15, 0) == 1  # 15 is not spooled
    assert journal.first_seq == 15
    assert journal.drop_segments(71, 0) == 6  # 61 is needed by the older snapshot
    assert journal.first_seq == 57
    with pytest.raises(KeyError):
        journal.read(56)
    assert journal.read_from(1, 1) == [(57, record(57))]
    disk.restart_process()
    journal, recovered = opened(disk)
    assert recovered.snapshot == (65, [b"x"])
    assert [seq for seq, _ in recovered.records] == [66, 67, 68, 69, 70]
    assert journal.first_seq == 57


# --- after death ------------------------------------------------------------------------------------------------


def test_a_dead_journal_accepts_nothing_and_says_why() -> None:
    disk = SimDisk()
    journal, _ = opened(disk)
    journal.append([b"a"])

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    disk.fdatasync = fail  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(JournalDead, match="writing record 2: Input/output error"):
            journal.append([b"b"])
    with pytest.raises(JournalDead):
        journal.watermark()
    with pytest.raises(JournalDead):
        journal.seal()
    assert journal.last_seq == 1


# --- speed, as a bound on hanging --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_million_records_are_recovered_without_a_copy_of_the_log_in_memory(tmp_path: Path) -> None:
    """In a process of its own, under a limit of its own: recovery takes a segment at a time."""
    script = f"""
import resource
from gpujobd.journal import Journal
journal = Journal({str(tmp_path / "j")!r})
journal.open()
group = [b"%060d" % n for n in range(10000)]
for _ in range(100):
    journal.append(group)
journal.seal()
journal.close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
journal = Journal({str(tmp_path / "j")!r})
count = sum(1 for _ in journal.open().records)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count, after - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    count, grown_kib = map(int, run.stdout.split())
    assert count == 1_000_000
    assert grown_kib < 64 << 10


def test_a_snapshot_that_cannot_be_named_leaves_the_journal_alive() -> None:
    """A full xfs refuses the rename of a file that is there already."""
    disk = SimDisk()
    journal = Journal("/j", disk, SEGMENT_BYTES)
    journal.open()
    journal.append([b"one"])
    with pytest.MonkeyPatch.context() as full:
        full.setattr(disk, "rename", refuse_to_rename)
        with pytest.raises(OSError, match="No space"):
            journal.write_snapshot(1, [b"state"])
    assert journal.dead is None
    assert not [name for name in disk.listdir("/j") if name.startswith("snap-")]
    journal.append([b"two"])
    journal.write_snapshot(2, [b"state"])


def refuse_to_rename(old: str, new: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), new)
