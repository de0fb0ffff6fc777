"""What a journal holds after any end: read it, judge its tail, make the tail durable again.

Two steps: `examine` only reads and either says what stands or refuses; `repair` only writes.

The rules, at offset P, where the next frame should begin with sequence number E:

 1. header and body check, its number is E, its chain is the last header's        -> accepted, go on
 2. all zero from P to the segment's end, and no later segment                    -> the clean end
 3. a later frame (every 4,096 bytes, every later segment) has a number >= E      -> refuse: P was acknowledged
 4. an accepted header, or a snapshot, says that E was committed                  -> refuse
 5. the header is right, the body is not: without a zero sector it is complete
    but wrong                                                                     -> refuse; else torn
 6. the header is wrong: a sector is written whole or not at all                  -> refuse; all zero: torn
 7. torn: nobody was told of it; keep a copy beside, zero from P to the end
 8. always: write the last frame again, and zeros from there to the segment's end, and sync, before anything is
    added. What was read may have come from the page cache of a machine whose sync had failed.

Why rule 3 proves it: one frame is in flight at a time, so frame k+1 exists only if frame k was synced. A header
that checks is proof enough; its body may be torn. Why rule 8 needs only the last frame: every frame before it is
proven by its successor, every segment before the last by that one's block 0.

What remains: a disk that loses a whole sector of the very last frame, after the sync and before the next frame or
watermark, makes it look torn.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, NoReturn

from gpujobd import frames, snapfile
from gpujobd.disk import NO_SPACE, Disk, get, put

SEGMENT_NAME: Final = re.compile(r"seg-[0-9a-f]{16}")
SNAPSHOT_NAME: Final = re.compile(r"snap-[0-9a-f]{16}")
TORN_NAME: Final = re.compile(r"seg-[0-9a-f]{16}\.torn-[0-9]+")
TORN_KEPT_MAX: Final = 4
_PIECE_BYTES: Final = 1 << 20


class JournalError(Exception):
    """The journal is not to be opened as it is: something acknowledged may be gone.

    `first` to `last` are the sequence numbers that forcing would lose; last < first: none.
    """

    def __init__(self, what: str, *, file: str = "", offset: int = 0, first: int = 0, last: int = -1) -> None:
        where = f"{file}: offset {offset}: " if file else ""
        lost = f"; forcing would lose {lost_text(first, last)}" if file else ""
        super().__init__(where + what + lost)
        self.what, self.file, self.offset, self.first, self.last = what, file, offset, first, last


@dataclasses.dataclass
class Segment:
    """One segment and where its frames are. The index grows while the segment is written."""

    name: str
    header: frames.SegmentHeader
    end: int = frames.BLOCK  # where the next frame begins
    last_frame: int = 0  # offset of the newest frame, watermarks included; 0: none yet
    seqs: array[int] = dataclasses.field(default_factory=lambda: array("Q"))
    blocks: array[int] = dataclasses.field(default_factory=lambda: array("I"))

    @property
    def first_seq(self) -> int:
        return self.header.first_seq

    def add(self, first_seq: int, nrec: int, offset: int, size: int) -> None:
        """Index a frame. Readers bisect `seqs`, so its block comes first."""
        if nrec:
            self.blocks.append(offset // frames.BLOCK)
            self.seqs.append(first_seq)
        self.last_frame, self.end = offset, offset + size

    def locate(self, seq: int) -> int:
        """Offset of the frame that holds `seq`, if any does; 0: it is before the first."""
        index = bisect_right(self.seqs, seq) - 1
        return self.blocks[index] * frames.BLOCK if index >= 0 else 0


@dataclasses.dataclass
class Snapshots:
    """The snapshot files of a directory."""

    valid: list[int] = dataclasses.field(default_factory=list)  # oldest first
    damaged: dict[str, str] = dataclasses.field(default_factory=dict)  # name: why
    newest: list[bytes] = dataclasses.field(default_factory=list)  # chunks of valid[-1]
    stores: set[bytes] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Found:
    """What stands in a journal's directory."""

    snapshots: Snapshots
    segments: list[Segment] = dataclasses.field(default_factory=list)
    store: bytes = b""  # empty: there is no journal yet
    next_seq: int = 1
    header_crc: int = 0  # of the last frame
    sealed: bool = False
    torn: bool = False
    lost: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # accepted as lost, first to last


def segment_name(first_seq: int) -> str:
    return f"seg-{first_seq:016x}"


def snapshot_name(seq: int) -> str:
    return f"snap-{seq:016x}"


def lost_text(first: int, last: int) -> str:
    if last < first:
        return "no record"
    return f"record {first}" if first == last else f"records {first} to {last} ({last - first + 1})"


def segment_names(disk: Disk, directory: str) -> list[str]:
    """Oldest first."""
    return sorted(name for name in disk.listdir(directory) if SEGMENT_NAME.fullmatch(name))


def examine(disk: Disk, directory: str) -> Found:
    """Read everything, change nothing.

    Raises:
        JournalError: as the rules say.
        OSError: the device refused to read.
    """
    snapshots = read_snapshots(disk, directory)
    walk = _Walk(disk, directory, snapshots)
    walk.run()
    return walk.found


def read_snapshots(disk: Disk, directory: str) -> Snapshots:
    """Check every snapshot; keep the bytes of the newest that is valid."""
    snapshots = Snapshots()
    for name in sorted(filter(SNAPSHOT_NAME.fullmatch, disk.listdir(directory)), reverse=True):
        try:
            chunks = snapfile.Chunks(disk, f"{directory}/{name}")
            if snapshot_name(chunks.seq) != name:
                chunks.close()
                raise snapfile.SnapshotDamagedError(f"its header says {snapshot_name(chunks.seq)}")  # noqa: TRY301
            if snapshots.valid:
                for _ in chunks:
                    pass
            else:
                snapshots.newest = list(chunks)
        except snapfile.SnapshotDamagedError as error:
            snapshots.damaged[name] = str(error)
        else:
            snapshots.valid.insert(0, chunks.seq)
            snapshots.stores.add(chunks.store)
    return snapshots


def records_after(
    disk: Disk, directory: str, segments: list[Segment], seq: int
) -> Iterator[tuple[int, bytes]]:
    """Every record above `seq` that the segments hold now, in order, with its number."""
    spans = [(f"{directory}/{segment.name}", segment.end, segment.blocks[:]) for segment in segments]
    while len(segments) > 1 and segments[1].first_seq <= seq + 1:
        segments, spans = segments[1:], spans[1:]
    return _records(disk, spans, seq)


def _records(disk: Disk, spans: list[tuple[str, int, array[int]]], seq: int) -> Iterator[tuple[int, bytes]]:
    for path, end, blocks in spans:
        held = get(disk, path, end)
        for block in blocks:
            first, records = read_frame(held, block * frames.BLOCK, path)
            skip = max(seq + 1 - first, 0)
            yield from zip(range(first + skip, first + len(records)), records[skip:])  # noqa: B905 - both may be empty


def read_frame(held: bytes, offset: int, file: str) -> tuple[int, list[bytes]]:
    """First number and records of a frame that was accepted before.

    Raises:
        JournalError: it does not check any more.
    """
    header = frames.parse(held, offset)
    if header is None or not frames.body_checks(held, offset, header):
        raise JournalError(
            "a frame that was whole at the start does not check any more", file=file, offset=offset
        )
    return header.first_seq, frames.records_of(held, offset, header)


def repair(disk: Disk, directory: str, found: Found, now_ns: int) -> None:
    """Rules 7 and 8, on the last segment.

    Raises:
        OSError: nothing may be added to the journal.
    """
    segment = found.segments[-1]
    path = f"{directory}/{segment.name}"
    held = get(disk, path)
    if found.torn:
        _keep_torn(disk, directory, segment.name, held, now_ns)
    start = segment.last_frame or segment.end
    again = held[start : segment.end].ljust(len(held) - start, b"\0")
    fd = disk.open(path, write=True)
    try:
        for at in range(0, len(again), _PIECE_BYTES):
            put(disk, fd, again[at : at + _PIECE_BYTES], start + at)
        disk.fdatasync(fd)
    finally:
        disk.close(fd)


def _keep_torn(disk: Disk, directory: str, name: str, held: bytes, now_ns: int) -> None:
    """A copy for people, not for recovery: a full disk must not stop it."""
    path = f"{directory}/{name}.torn-{now_ns}"
    try:
        fd = disk.open(path, write=True, create=True)
        try:
            put(disk, fd, held[: frames.last_nonzero(held)], 0)
        finally:
            disk.close(fd)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
    copies = sorted(
        (other for other in disk.listdir(directory) if TORN_NAME.fullmatch(other)),
        key=lambda other: int(other.rpartition("-")[2]),
    )
    for other in copies[:-TORN_KEPT_MAX]:
        disk.unlink(f"{directory}/{other}")


class _Walk:
    """One pass over all segments, oldest first."""

    def __init__(self, disk: Disk, directory: str, snapshots: Snapshots) -> None:
        self._disk, self._directory = disk, directory
        self._names = segment_names(disk, directory)
        self._store_id = 0
        self._proven = snapshots.valid[-1] if snapshots.valid else 0
        self.found = Found(snapshots)

    def run(self) -> None:
        found = self.found
        if not self._names and (found.snapshots.valid or found.snapshots.damaged):
            raise JournalError(
                "there are snapshots but no segments", file=self._directory, first=1, last=self._proven
            )
        for index, name in enumerate(self._names):
            held = get(self._disk, f"{self._directory}/{name}")
            self._begin(index, held)
            self._accept(held)
            self._stop(index, held)

    def _begin(self, index: int, held: bytes) -> None:
        """Block 0: it must continue what came before."""
        found = self.found
        header = frames.parse_segment(held)
        if header is None:
            self._refuse(index, held, 0, "the segment's header does not check")
        if segment_name(header.first_seq) != self._names[index] or header.segment_bytes != len(held):
            self._refuse(
                index,
                held,
                0,
                f"the segment's header says {segment_name(header.first_seq)}, {header.segment_bytes} bytes",
            )
        if index == 0:
            self._begin_first(held, header)
        if (
            header.begins != found.next_seq
            or header.store != found.store
            or header.prev_header_crc != found.header_crc
        ):
            self._refuse(
                index,
                held,
                0,
                f"the segment does not continue the one before it, which ends at {found.next_seq - 1}",
            )
        if header.lost_from:
            found.lost.append((header.lost_from, header.first_seq - 1))
        found.next_seq = header.first_seq
        found.segments.append(Segment(self._names[index], header))

    def _begin_first(self, held: bytes, header: frames.SegmentHeader) -> None:
        """The oldest segment kept must reach back to the newest snapshot, or to the beginning."""
        found = self.found
        if header.begins > self._proven + 1:
            found.next_seq = self._proven + 1
            why = "it is the oldest segment, and what came before it is in no valid snapshot"
            self._refuse(
                0, held, 0, "; ".join([why, *(f"{n}: {w}" for n, w in found.snapshots.damaged.items())])
            )
        if found.snapshots.stores - {header.store}:
            self._refuse(0, held, 0, "segment and snapshot are of different stores")
        found.store, found.next_seq, found.header_crc = header.store, header.begins, header.prev_header_crc
        self._store_id = frames.store_id(header.store)

    def _accept(self, held: bytes) -> None:
        """Rule 1, as long as it holds."""
        found, segment = self.found, self.found.segments[-1]
        while (header := frames.parse(held, segment.end)) and self._follows(header):
            offset = segment.end
            if not frames.body_checks(held, offset, header):
                return
            segment.add(header.first_seq, header.nrec, offset, header.size)
            found.sealed = frames.is_seal(held, offset, header)
            found.next_seq, found.header_crc = header.last_seq + 1, header.header_crc
            self._proven = max(self._proven, header.committed_seq)

    def _follows(self, header: frames.Header) -> bool:
        return (
            header.first_seq == self.found.next_seq
            and header.prev_header_crc == self.found.header_crc
            and header.store_id == self._store_id
        )

    def _stop(self, index: int, held: bytes) -> None:
        """Rules 2 to 6, where rule 1 ended."""
        offset, found = self.found.segments[-1].end, self.found
        last = index + 1 == len(self._names)
        clean = frames.is_zero(held, offset, len(held))
        if clean and not last:
            return  # the next block 0 must continue it
        if not clean:
            self._refuse_proven(index, held, offset, later_segments=not last)
        if self._proven >= found.next_seq:
            self._refuse(index, held, offset, f"the journal ends, but {self._proven} was committed")
        if clean:
            return
        header = frames.parse(held, offset)
        if header is None:
            if not frames.is_zero(held, offset, offset + frames.SECTOR):
                self._refuse(index, held, offset, "a frame's header is there and does not check")
        elif not self._follows(header):
            self._refuse(
                index,
                held,
                offset,
                f"a frame of {header.first_seq} stands where {found.next_seq} should begin",
            )
        elif not is_cut_short(held, offset, header):
            self._refuse(index, held, offset, "a frame is complete and its body does not check")
        found.torn, found.sealed = True, False

    def _refuse_proven(self, index: int, held: bytes, offset: int, *, later_segments: bool) -> None:
        """Rule 3."""
        for name, at, header in self._later(index, held, offset):
            self._refuse(
                index,
                held,
                offset,
                f"a frame is damaged, and one of {header.first_seq} follows it ({name}, offset {at})",
            )
        if later_segments:
            self._refuse(index, held, offset, "a frame is damaged, and a segment follows it")

    def _later(self, index: int, held: bytes, offset: int) -> Iterator[tuple[str, int, frames.Header]]:
        """Frames after `offset` whose header checks and whose number is not below the one expected."""
        for position in range(index, len(self._names)):
            name = self._names[position]
            held = held if position == index else get(self._disk, f"{self._directory}/{name}")
            start = offset + frames.BLOCK if position == index else frames.BLOCK
            for at in range(start, len(held), frames.BLOCK):
                header = frames.parse(held, at)
                if (
                    header
                    and header.first_seq >= self.found.next_seq
                    and self._store_id in (0, header.store_id)
                ):
                    yield name, at, header

    def _refuse(self, index: int, held: bytes, offset: int, what: str) -> NoReturn:
        first = self.found.next_seq
        later = next(self._later(index, held, offset), None)
        header = frames.parse(held, offset) if offset else None
        if later:
            last = later[2].first_seq - 1
        elif header and header.first_seq == first:
            last = header.last_seq
        else:
            last = max(self._proven, first - 1 + unreadable_max(held, offset))
        raise JournalError(
            what, file=f"{self._directory}/{self._names[index]}", offset=offset, first=first, last=last
        )


def is_cut_short(held: bytes, offset: int, header: frames.Header) -> bool:
    """Rule 5: what a power cut leaves of a frame has a hole; what rots has none."""
    return frames.has_hole(held, offset, header.payload_len)


def unreadable_max(held: bytes, offset: int) -> int:
    """The most records that can have stood from `offset` on: each took at least two bytes."""
    offset = max(offset, frames.BLOCK)
    return max(frames.last_nonzero(held) - offset, 0) // 2
