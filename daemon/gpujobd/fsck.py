"""Look at a journal that was refused, or at any; and make a repaired copy of it.

Rule 1: the journal itself is never written. A report reads; a repair writes another directory.
Rule 2: a repair drops the numbers that a person named and nothing else. If more is unreadable, it refuses and
names that. What nobody was told of, a torn tail, is dropped as a start would drop it.
Rule 3: numbers are kept. Where records were dropped, the copy begins a segment whose block 0 says which numbers
are missing before it (frames.py, rule 3); the chain of headers is made anew from the first frame on, under the
same store. So a copy opens like any journal, replay jumps the gap, and no number is ever used twice.

While a daemon runs, its last frame may be half-written when it is read: the report says that one runs.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpujobd import frames, recovery
from gpujobd.disk import Disk, get, put
from gpujobd.recovery import JournalError


@dataclasses.dataclass
class Problem:
    """Something that does not check. `first` to `last`: the records it holds; last < first: none."""

    file: str
    offset: int
    first: int
    last: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}: offset {self.offset}: {self.what}; unreadable: {recovery.lost_text(self.first, self.last)}"


@dataclasses.dataclass
class SegmentReport:
    name: str
    first_seq: int
    last_seq: int
    frames: int
    records: int
    used_bytes: int
    size_bytes: int


@dataclasses.dataclass
class SnapshotReport:
    name: str
    valid: bool
    why: str = ""


@dataclasses.dataclass
class Report:
    """What stands in a directory; printed, it is for people."""

    directory: str
    running: bool = False  # a daemon has it open
    store: str = ""
    segments: list[SegmentReport] = dataclasses.field(default_factory=list)
    snapshots: list[SnapshotReport] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    lost: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # given up by an earlier repair
    first_seq: int = 0
    last_seq: int = 0
    sealed: bool = False
    torn: bool = False
    refusal: str = ""  # why a start would refuse

    @property
    def ok(self) -> bool:
        """Whether a start would accept it. A damaged snapshot alone does not stop one: see `snapshots`."""
        return not self.refusal

    @property
    def unreadable(self) -> list[tuple[int, int]]:
        """The ranges a repair must give up, each first to last; none if damage lost no record."""
        return [(problem.first, problem.last) for problem in self.problems if problem.last >= problem.first]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"journal {self.directory}, store {self.store or 'unknown'}, records {self.first_seq} to {self.last_seq}"
        if self.running:
            yield "a daemon has it open: the newest frame may be in the middle of being written"
        for segment in self.segments:
            yield (
                f"{segment.name}: {segment.frames} frames, {segment.records} records "
                f"{segment.first_seq} to {segment.last_seq}, {segment.used_bytes} of {segment.size_bytes} bytes used"
            )
        for snapshot in self.snapshots:
            yield f"{snapshot.name}: " + ("valid" if snapshot.valid else f"DAMAGED: {snapshot.why}")
        for first, last in self.lost:
            yield f"given up earlier: {recovery.lost_text(first, last)}"
        for problem in self.problems:
            yield f"DAMAGED: {problem}"
        if self.torn:
            yield "the last write was cut off; nobody was told of it, and a start removes it"
        yield self._verdict()

    def _verdict(self) -> str:
        if self.ok:
            return "clean, and the last stop was clean" if self.sealed else "clean"
        return f"REFUSED: {self.refusal}"


@dataclasses.dataclass
class Copied:
    """What a repair did."""

    target: str
    records: int
    dropped: int  # readable records in the range that was given up
    first_seq: int
    last_seq: int


@dataclasses.dataclass
class _Frame:
    """A frame that checks, wherever it stood."""

    file: str
    offset: int
    header: frames.Header


def report(directory: Path | str, disk: Disk | None = None) -> Report:
    """Read everything there is, whatever its state.

    Raises:
        OSError: there is no such directory, or the device refused to read.
    """
    disk, directory = disk or Disk(), str(directory)
    found = Report(directory, running=disk.is_locked(f"{directory}/LOCK"))
    scan = Scan(disk, directory)
    found.segments, found.problems, found.lost = scan.segments, scan.problems, scan.lost
    found.store, found.torn = str(uuid.UUID(bytes=scan.store)) if scan.store else "", scan.torn
    found.first_seq, found.last_seq = scan.first_seq, scan.next_seq - 1
    found.snapshots = [
        SnapshotReport(recovery.snapshot_name(seq), valid=True) for seq in scan.snapshots.valid
    ]
    found.snapshots += [
        SnapshotReport(name, valid=False, why=why) for name, why in scan.snapshots.damaged.items()
    ]
    _judge(disk, found)
    return found


def _judge(disk: Disk, found: Report) -> None:
    """What a start would say. Where it refuses for a reason the scan did not see, that is a problem too."""
    try:
        examined = recovery.examine(disk, found.directory)
    except JournalError as error:
        found.refusal = str(error)
        if not found.problems:
            found.problems.append(
                Problem(os.path.basename(error.file), error.offset, error.first, error.last, error.what)
            )
    else:
        found.sealed = examined.sealed


def accept_loss(
    directory: Path | str,
    first: int,
    last: int,
    target: Path | str,
    disk: Disk | None = None,
    *,
    also: Sequence[tuple[int, int]] = (),
) -> Copied:
    """Write to `target`, a new directory, all that is readable save the records `first` to `last`, and `also`.

    An empty range (last < first) repairs damage that lost no record.

    Raises:
        JournalError: other records are unreadable too, or the journal has no such records.
        FileExistsError: `target` is there and not empty.
        OSError: as report, or the copy could not be written.
    """
    disk, directory, target = disk or Disk(), str(directory), str(target)
    given_up = [(a, b) for a, b in [(first, last), *also] if b >= a]
    before, scan = report(directory, disk), Scan(disk, directory)
    _check_ranges(before, scan, given_up)
    disk.mkdir(target)
    if disk.listdir(target):
        raise FileExistsError(f"{target}: not empty")
    records, dropped = _copy_all(_Copy(disk, target, scan), scan, given_up)
    after = recovery.examine(disk, target)
    return Copied(target, records, dropped, after.segments[0].first_seq, after.next_seq - 1)


def _copy_all(copy: _Copy, scan: Scan, given_up: list[tuple[int, int]]) -> tuple[int, int]:
    """(records copied, readable records dropped)"""
    records = dropped = 0
    for frame in scan.frames:
        held = list(enumerate(scan.records_of(frame), frame.header.first_seq))
        kept = [(seq, record) for seq, record in held if not any(a <= seq <= b for a, b in given_up)]
        records, dropped = records + len(kept), dropped + len(held) - len(kept)
        copy.add(kept)
    copy.finish(max([scan.next_seq, *(b + 1 for _, b in given_up)]))
    return records, dropped


def _check_ranges(before: Report, scan: Scan, given_up: list[tuple[int, int]]) -> None:
    for first, last in before.unreadable:
        if not any(a <= first and last <= b for a, b in given_up):
            raise JournalError(f"{before.directory}: {recovery.lost_text(first, last)} cannot be read either")
    known = max([scan.next_seq - 1, *(last for _, last in before.unreadable)])
    for first, last in given_up:
        if not scan.begins <= first <= last <= known:
            raise JournalError(
                f"{before.directory} has records {scan.begins} to {known}, not {first} to {last}"
            )
    if not scan.store:
        raise JournalError(f"{before.directory}: no segment and no snapshot says which store this is")


class Scan:
    """Every frame of a directory that checks, whatever stands between them."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk, self.directory = disk, directory
        self.snapshots = recovery.read_snapshots(disk, directory)
        self.frames: list[_Frame] = []
        self.segments: list[SegmentReport] = []
        self.problems: list[Problem] = []
        self.lost: list[tuple[int, int]] = []
        self.size_bytes = 2 * frames.BLOCK
        self.store = b""
        self.begins = self.snapshots.valid[-1] + 1 if self.snapshots.valid else 1
        self.next_seq = self.begins
        self.torn = False
        names = recovery.segment_names(disk, directory)
        headers = [frames.parse_segment(get(disk, f"{directory}/{name}", frames.BLOCK)) for name in names]
        self._find_store(headers)
        begins = [h.begins if h else _named(name) for name, h in zip(names, headers, strict=True)]
        for name, header, ends in zip(names, headers, [*begins[1:], 0], strict=True):
            self._segment(name, header, ends)
        if not self.store and self.frames:  # a frame names four bytes of it, and nothing asks for more
            self.store = self.frames[0].header.store_id.to_bytes(4, "little") + bytes(12)
        self.first_seq = self.segments[0].first_seq if self.segments else self.next_seq
        if self.snapshots.valid and self.snapshots.valid[-1] >= self.next_seq:
            self._problem(
                names[-1] if names else "", 0, self.snapshots.valid[-1], "the snapshot knows of more records"
            )

    def records_of(self, frame: _Frame) -> list[bytes]:
        fd = self._disk.open(f"{self.directory}/{frame.file}")
        try:
            held = self._disk.pread(fd, frame.header.size, frame.offset)
        finally:
            self._disk.close(fd)
        return recovery.read_frame(held, 0, f"{self.directory}/{frame.file} at {frame.offset}")[1]

    def _find_store(self, headers: list[frames.SegmentHeader | None]) -> None:
        """From any block 0 or snapshot that checks."""
        stores = [header.store for header in headers if header] + sorted(self.snapshots.stores)
        self.store = stores[0] if stores else b""

    def _segment(self, name: str, header: frames.SegmentHeader | None, ends: int) -> None:
        """`ends`: where the next segment begins; 0: this is the last."""
        held = get(self._disk, f"{self.directory}/{name}")
        whole_blocks = -(-len(held) // frames.BLOCK) * frames.BLOCK
        self.size_bytes = max(self.size_bytes, whole_blocks, header.segment_bytes if header else 0)
        self._start(name, header, held)
        count = records = 0
        used = frames.BLOCK
        for frame in self._frames(name, held, ends):
            self.frames.append(frame)
            count, records = count + 1, records + frame.header.nrec
            used = frame.offset + frame.header.size
        self.segments.append(
            SegmentReport(name, _named(name), self.next_seq - 1, count, records, used, len(held))
        )

    def _start(self, name: str, header: frames.SegmentHeader | None, held: bytes) -> None:
        """Block 0, and whether the segment joins the one before it."""
        begins = header.begins if header else _named(name)
        if not self.segments and begins <= self.begins:
            self.begins = self.next_seq = begins
        if begins > self.next_seq:
            self._problem(name, 0, begins - 1, "records before this segment are missing")
        if header is None:
            self._problem(name, 0, self.next_seq - 1, "the segment's header does not check")
        elif header.segment_bytes != len(held):
            self._problem(name, len(held), self.next_seq - 1, f"{len(held)} bytes of {header.segment_bytes}")
        if header and header.lost_from:
            self.lost.append((header.lost_from, header.first_seq - 1))
            self.next_seq = max(self.next_seq, header.first_seq)

    def _frames(self, name: str, held: bytes, ends: int) -> Iterator[_Frame]:
        offset = end = frames.BLOCK
        bad = 0  # where damage begins that no frame has ended yet
        while offset < len(held):
            header = self._whole(held, offset)
            if header is None:
                empty = frames.is_zero(held, offset, offset + frames.BLOCK)
                bad = bad or (0 if empty else offset)
                offset += frames.BLOCK
                continue
            if bad or header.first_seq > self.next_seq:
                self._problem(
                    name,
                    bad or offset,
                    header.first_seq - 1,
                    "what stands before the next frame does not check",
                )
                bad = 0
            self.next_seq = header.last_seq + 1
            yield _Frame(name, offset, header)
            offset = end = offset + header.size
        if bad and ends:
            self._problem(name, bad, ends - 1, "what stands before the next segment does not check")
        elif bad:
            self._tail(name, held, end, bad)

    def _whole(self, held: bytes, offset: int) -> frames.Header | None:
        """A frame of this store that checks and does not go back."""
        header = frames.parse(held, offset)
        known = header and (not self.store or header.store_id == frames.store_id(self.store))
        if (
            not header
            or not known
            or header.first_seq < self.next_seq
            or not frames.body_checks(held, offset, header)
        ):
            return None
        return header

    def _tail(self, name: str, held: bytes, end: int, bad: int) -> None:
        """Damage that no frame follows, at `end` or after: torn, or else its header may say how many records it held.

        Beside other damage nothing passes for torn: a person is to know of it.
        """
        header = frames.parse(held, end)
        follows = header is not None and header.first_seq == self.next_seq
        if not self.problems and header is None:
            self.torn = frames.is_zero(held, end, end + frames.SECTOR)
        elif not self.problems and header and follows:
            self.torn = recovery.is_cut_short(held, end, header)
        if not self.torn:
            last = (
                header.last_seq
                if header and follows
                else self.next_seq - 1 + recovery.unreadable_max(held, end)
            )
            self.problems.append(Problem(name, bad, self.next_seq, last, "what stands here does not check"))

    def _problem(self, file: str, offset: int, last: int, what: str) -> None:
        self.problems.append(Problem(file, offset, self.next_seq, last, what))
        self.next_seq = max(self.next_seq, last + 1)


class _Copy:
    """A new journal directory, written from the first frame on."""

    def __init__(self, disk: Disk, target: str, scan: Scan) -> None:
        self._disk, self._target = disk, target
        self._store, self._size_bytes = scan.store, scan.size_bytes
        self._fd, self._offset, self._header_crc = -1, 0, 0
        self._next_seq = scan.begins
        for seq in scan.snapshots.valid:
            name = recovery.snapshot_name(seq)
            self._write_file(name, get(disk, f"{scan.directory}/{name}"))

    def add(self, records: list[tuple[int, bytes]]) -> None:
        """One frame for each run of numbers."""
        run: list[tuple[int, bytes]] = []
        for seq, record in records:
            if run and run[-1][0] + 1 != seq:
                self._frame(run)
                run = []
            run.append((seq, record))
        if run:
            self._frame(run)

    def finish(self, next_seq: int) -> None:
        """Numbers up to `next_seq` were in use; a last watermark proves the last frame."""
        if self._fd < 0 or next_seq > self._next_seq:
            self._begin(next_seq)
        self._put(frames.WATERMARK, 0)
        self._disk.fsync(self._fd)
        self._disk.close(self._fd)
        self._disk.fsync_dir(self._target)

    def _frame(self, run: list[tuple[int, bytes]]) -> None:
        if self._fd < 0 or run[0][0] > self._next_seq:
            self._begin(run[0][0])
        self._put(frames.payload_of([record for _, record in run]), len(run))

    def _put(self, payload: bytes, nrec: int) -> None:
        framed = self._framed(payload, nrec)
        if self._offset + len(framed) > self._size_bytes:
            self._begin(self._next_seq)
        put(self._disk, self._fd, framed, self._offset)
        self._offset += len(framed)
        self._header_crc = frames.header_crc(framed)
        self._next_seq += nrec

    def _framed(self, payload: bytes, nrec: int) -> bytes:
        return frames.frame(
            payload,
            nrec,
            first_seq=self._next_seq,
            store=frames.store_id(self._store),
            prev_header_crc=self._header_crc,
        )

    def _begin(self, first_seq: int) -> None:
        """The next segment; a jump of numbers is told in its block 0."""
        if self._fd >= 0:
            self._disk.fsync(self._fd)
            self._disk.close(self._fd)
        lost_from = self._next_seq if first_seq > self._next_seq else 0
        header = frames.SegmentHeader(
            self._store, first_seq, lost_from, self._header_crc, time.time_ns(), self._size_bytes
        )
        path = f"{self._target}/{recovery.segment_name(first_seq)}"
        self._fd = self._disk.open(path, write=True, create=True)
        put(self._disk, self._fd, frames.segment_block(header).ljust(self._size_bytes, b"\0"), 0)
        self._offset, self._next_seq = frames.BLOCK, first_seq

    def _write_file(self, name: str, held: bytes) -> None:
        fd = self._disk.open(f"{self._target}/{name}", write=True, create=True)
        try:
            put(self._disk, fd, held, 0)
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)


def _named(name: str) -> int:
    """The first number of a segment, as its name has it."""
    return int(name.rpartition("-")[2], 16)
