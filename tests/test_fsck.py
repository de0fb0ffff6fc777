"""Looking at damaged journals, and copies without what is unreadable."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gpujobd import fsck, recovery
from gpujobd.frames import BLOCK
from gpujobd.journal import Journal, JournalError
from sim_disk import SimDisk

SEGMENT_BYTES = 8 * BLOCK
COUNTS = [1, 3, 2, 4, 1, 1, 5, 2, 2, 1, 6, 3, 1, 2, 2]
TOTAL = sum(COUNTS)


def record(seq: int) -> bytes:
    return b"record %d" % seq


def a_journal(disk: SimDisk, *, snapshots: tuple[int, ...] = (), seal: bool = True) -> None:
    """36 records in 15 frames in three segments."""
    journal = Journal("/j", disk, SEGMENT_BYTES)
    journal.open()
    seq = 1
    for count in COUNTS:
        journal.append([record(seq + n) for n in range(count)])
        seq += count
        if seq - 1 in snapshots:
            journal.write_snapshot(seq - 1, [b"state"])
    if seal:
        journal.seal()
    journal.close()
    disk.restart_process()


def segment(disk: SimDisk, number: int) -> bytearray:
    return disk.names[f"/j/{recovery.segment_names(disk, '/j')[number]}"].cache


def opened_copy(disk: SimDisk) -> tuple[Journal, dict[int, bytes]]:
    disk.restart_process()
    journal = Journal("/copy", disk, SEGMENT_BYTES)
    recovered = journal.open()
    return journal, dict(recovered.records)


def test_a_whole_journal_is_reported_clean() -> None:
    disk = SimDisk()
    a_journal(disk, snapshots=(4, 10))
    report = fsck.report("/j", disk)
    assert report.ok
    assert (report.first_seq, report.last_seq, report.sealed, report.problems) == (1, TOTAL, True, [])
    assert sum(s.records for s in report.segments) == TOTAL
    assert [s.name for s in report.snapshots] == ["snap-0000000000000004", "snap-000000000000000a"]
    assert str(report).splitlines()[-1] == "clean, and the last stop was clean"


def test_a_report_says_that_a_daemon_runs_and_does_not_disturb_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    journal.open()
    journal.append([b"a"])
    report = fsck.report(tmp_path / "j")
    assert report.running
    assert report.ok
    assert "a daemon has it open" in str(report)
    journal.append([b"b"])
    journal.close()
    assert not fsck.report(tmp_path / "j").running


def test_damage_is_reported_with_file_offset_and_records() -> None:
    disk = SimDisk()
    a_journal(disk)
    segment(disk, 0)[2 * BLOCK + 50] ^= 1
    report = fsck.report("/j", disk)
    assert not report.ok
    assert [(p.file, p.offset, p.first, p.last) for p in report.problems] == [
        ("seg-0000000000000001", 2 * BLOCK, 2, 4)
    ]
    assert report.unreadable == [(2, 4)]
    assert "records 2 to 4 (3)" in report.refusal


def test_a_damaged_snapshot_is_reported_and_is_no_reason_to_refuse() -> None:
    disk = SimDisk()
    a_journal(disk, snapshots=(4, 10))
    disk.names["/j/snap-000000000000000a"].cache[30] ^= 1
    report = fsck.report("/j", disk)
    assert report.ok
    assert "snap-000000000000000a: DAMAGED" in str(report)


def test_a_torn_tail_is_reported_and_is_no_reason_to_refuse() -> None:
    disk = SimDisk()
    a_journal(disk, seal=False)
    held = segment(disk, -1)
    end = recovery.examine(disk, "/j").segments[-1].end
    held[end + 600] = 1
    report = fsck.report("/j", disk)
    assert (report.ok, report.torn, report.last_seq) == (True, True, TOTAL)


def test_a_copy_drops_the_named_records_and_keeps_the_others_with_their_numbers() -> None:
    disk = SimDisk()
    a_journal(disk)
    segment(disk, 0)[2 * BLOCK + 50] ^= 1
    before = {name: bytes(inode.cache) for name, inode in disk.names.items()}
    copied = fsck.accept_loss("/j", 2, 4, "/copy", disk)
    assert (copied.records, copied.dropped, copied.first_seq, copied.last_seq) == (TOTAL - 3, 0, 1, TOTAL)
    assert {name: bytes(disk.names[name].cache) for name in before} == before
    journal, records = opened_copy(disk)
    assert records == {seq: record(seq) for seq in range(1, TOTAL + 1) if not 2 <= seq <= 4}
    assert journal.read_from(2, 2) == [(5, record(5)), (6, record(6))]
    for missing in (2, 4):
        with pytest.raises(KeyError):
            journal.read(missing)
    assert journal.append([b"more"]) == TOTAL + 1
    assert fsck.report("/copy", disk).lost == [(2, 4)]


def test_a_readable_record_is_dropped_when_it_is_named() -> None:
    """A record that stops the daemon though its bytes are right."""
    disk = SimDisk()
    a_journal(disk)
    copied = fsck.accept_loss("/j", 6, 6, "/copy", disk)
    assert (copied.records, copied.dropped) == (TOTAL - 1, 1)
    assert opened_copy(disk)[1] == {seq: record(seq) for seq in range(1, TOTAL + 1) if seq != 6}


def test_more_damage_than_was_named_is_refused_and_nothing_is_written() -> None:
    disk = SimDisk()
    a_journal(disk)
    segment(disk, 0)[2 * BLOCK + 50] ^= 1
    segment(disk, 1)[2 * BLOCK + 50] ^= 1
    report = fsck.report("/j", disk)
    (first, second) = report.unreadable
    with pytest.raises(JournalError, match="cannot be read either"):
        fsck.accept_loss("/j", *first, "/copy", disk)
    assert not disk.listdir("/copy")
    fsck.accept_loss("/j", *first, "/copy", disk, also=[second])
    gone = {*range(first[0], first[1] + 1), *range(second[0], second[1] + 1)}
    assert set(opened_copy(disk)[1]) == set(range(1, TOTAL + 1)) - gone


def test_records_the_journal_never_had_cannot_be_given_up() -> None:
    disk = SimDisk()
    a_journal(disk)
    for first, last in ((0, 3), (TOTAL, TOTAL + 5)):
        with pytest.raises(JournalError, match=f"has records 1 to {TOTAL}"):
            fsck.accept_loss("/j", first, last, "/copy", disk)


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES)
    journal.open()
    journal.append([b"a"])
    journal.close()
    with pytest.raises(FileExistsError):
        fsck.accept_loss(tmp_path / "j", 2, 1, tmp_path / "j")
    fsck.accept_loss(tmp_path / "j", 2, 1, tmp_path / "copy")
    copy = Journal(tmp_path / "copy", segment_bytes=SEGMENT_BYTES)
    assert list(copy.open().records) == [(1, b"a")]
    copy.close()


def test_a_lost_first_segment_is_given_up_by_its_range() -> None:
    disk = SimDisk()
    a_journal(disk)
    del disk.names[f"/j/{recovery.segment_names(disk, '/j')[0]}"]
    report = fsck.report("/j", disk)
    ((first, last),) = report.unreadable
    assert first == 1
    fsck.accept_loss("/j", first, last, "/copy", disk)
    assert set(opened_copy(disk)[1]) == set(range(last + 1, TOTAL + 1))


def test_numbers_of_a_lost_end_are_not_used_again() -> None:
    disk = SimDisk()
    a_journal(disk)
    found = recovery.examine(disk, "/j")
    last_records = found.segments[-1].blocks[-1] * BLOCK
    held = segment(disk, -1)
    held[last_records : last_records + 20] = bytes(20)
    held[found.segments[-1].last_frame] ^= 1  # and the seal, so that nothing proves how many there were
    ((first, last),) = fsck.report("/j", disk).unreadable
    assert first <= TOTAL <= last
    fsck.accept_loss("/j", first, last, "/copy", disk)
    journal, records = opened_copy(disk)
    assert set(records) == set(range(1, first))
    assert journal.append([b"new"]) == last + 1
    disk.restart_process()
    assert opened_copy(disk)[1][last + 1] == b"new"


@pytest.mark.parametrize("snapshots", [(), (10, 19)])
def test_whatever_is_damaged_a_copy_without_what_is_unreadable_opens(snapshots: tuple[int, ...]) -> None:
    """Random bytes at random places; all that was not reported unreadable is in the copy, or in its snapshot."""
    rng = random.Random(7)
    for _ in range(150):
        disk = SimDisk()
        a_journal(disk, snapshots=snapshots)
        for _ in range(rng.choice((1, 1, 2, 3))):
            held = segment(disk, rng.randrange(len(recovery.segment_names(disk, "/j"))))
            at = rng.choice(
                (rng.randrange(len(held)), rng.randrange(0, len(held), BLOCK) + rng.randrange(60))
            )
            size = min(rng.choice((1, 1, 600)), len(held) - at)
            held[at : at + size] = rng.randbytes(1) * size
            if rng.random() < 0.1:
                del held[at:]
        report = fsck.report("/j", disk)
        assert bool(report.problems) == (not report.ok), str(report)
        (first, last), *also = report.unreadable or [(1, 0)]
        fsck.accept_loss("/j", first, last, "/copy", disk, also=also)
        journal, records = opened_copy(disk)
        lost = {seq for a, b in report.unreadable for seq in range(a, b + 1)}
        after = snapshots[-1] if snapshots else 0
        assert set(range(after + 1, TOTAL + 1)) - lost <= set(records), str(report)
        assert all(record(seq) == found for seq, found in records.items())
        assert journal.append([b"more"]) > max([TOTAL, *lost] if report.ok else [0])
