"""The journal: what was accepted, in order, on disk.

    journal/   LOCK                     held while open
               seg-0000000000000001     frames (frames.py), zero-filled to its full size before its first use
               seg-00000000000004d2     named by its first sequence number; only the last one is written
               next, ballast            two spare segments, zero-filled: the first is for the roll, the second for
                                        the day the disk is full
               snap-0000000000000400    the state after event 0x400 (snapfile.py); the newest two are kept
               seg-*.torn-*             what recovery cut off, for people
               *.tmp                    half-made; removed at the next start

Rule 1: acknowledged means that fdatasync returned. `append` returns after that and not before.
Rule 2: one frame is in flight at a time, so a frame proves every frame before it (recovery.py).
Rule 3: a failed write or sync is final. The kernel may report it once and keep the unwritten bytes in its cache
as if they were safe: the journal is dead, the process ends, and the next start writes the tail again.
Rule 4: a segment is written full of zeros and synced before its first use (spares.py).
Rule 5: a name counts after fsync_dir only.
Rule 6: a segment is dropped only when nothing needs it: neither of two snapshots, nor an input not yet spooled.

Threads: append, watermark, seal and close belong to one thread at a time; prepare, write_snapshot and
drop_segments may run beside them, each in one thread at a time; read and read_from anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn

from gpujobd import frames, recovery, snapfile
from gpujobd.disk import Disk, put
from gpujobd.recovery import JournalError, Segment
from gpujobd.spares import Spares

__all__ = ["Journal", "JournalBusyError", "JournalDead", "JournalError", "Recovered"]

SEGMENT_BYTES: Final = 16 << 20
SNAPSHOTS_KEPT: Final = 2
LOCK_WAIT_S: Final = 2.0
READ_BYTES_MAX: Final = 8 << 20


class JournalDead(Exception):
    """A write or a sync failed. What was in flight is not accepted, and nothing will be."""


class JournalBusyError(JournalError):
    """Another process has this journal open."""


@dataclasses.dataclass
class Recovered:
    """What `open` found."""

    snapshot: tuple[int, list[bytes]] | None  # the newest valid one: (seq, chunks)
    records: Iterator[tuple[int, bytes]]  # all after the snapshot, in order: (seq, record)
    sealed: bool  # the last run ended with a seal
    store_id: str  # uuid
    torn: bool = False  # an unacknowledged frame was cut off
    damaged_snapshots: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # name: why; an older one serves
    lost: list[tuple[int, int]] = dataclasses.field(
        default_factory=list
    )  # numbers dropped by fsck, first to last


class Journal:
    """Synchronous. See the module's rules."""

    def __init__(
        self, directory: Path | str, disk: Disk | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        assert segment_bytes % frames.BLOCK == 0
        assert segment_bytes >= 2 * frames.BLOCK
        self.directory = str(directory)
        self.segment_bytes = segment_bytes
        self.payload_bytes_max = (
            min(frames.FRAME_BYTES_MAX, segment_bytes - frames.BLOCK) - frames.HEADER_BYTES
        )
        self.last_seq = 0
        self.sealed = False
        self.unproven = False  # the last frame holds records and nothing follows it
        self.dead: str | None = None
        self._disk = disk or Disk()
        self._store = b""
        self._segments: list[Segment] = []  # replaced, never changed: readers hold on to it
        self._segments_lock = threading.Lock()
        self._header_crc = 0
        self._lock_fd = -1
        self._fd = -1
        self._fd_bytes = 0
        self._spares = Spares(self._disk, self.directory, segment_bytes)
        self._snapshots = recovery.Snapshots()
        self._read_last: tuple[str, int, int, list[bytes]] = ("", 0, 0, [])

    # --- opening and closing --------------------------------------------------------------------------------

    def open(self) -> Recovered:
        """Lock, read, judge, make the tail durable again, clean up, make the spare segments.

        Raises:
            JournalError: refused; nothing was changed.
            JournalBusyError: another process has it open.
            JournalDead: the device refused to read or write.
        """
        try:
            self._disk.mkdir(self.directory)
            self._lock_fd = self._disk.lock(self._path("LOCK"), wait_s=LOCK_WAIT_S)
            return self._recover()
        except BlockingIOError as error:
            raise JournalBusyError(f"{self.directory}: another process has this journal open") from error
        except JournalError:
            self.close()
            raise
        except OSError as error:
            self.close()
            self._die("opening", error)

    def _recover(self) -> Recovered:
        found = recovery.examine(self._disk, self.directory)
        self._remove_unfinished()
        self._snapshots = found.snapshots
        self._segments, self._store = found.segments, found.store
        self.last_seq, self._header_crc = found.next_seq - 1, found.header_crc
        if found.segments:
            recovery.repair(self._disk, self.directory, found, time.time_ns())
            self._disk.fsync_dir(self.directory)
            self._resume(found)
        else:
            self._store = uuid.uuid4().bytes
            self._roll()
        self.prepare()
        chunks, self._snapshots.newest = self._snapshots.newest, []
        after = self._snapshots.valid[-1] if self._snapshots.valid else 0
        return Recovered(
            snapshot=(after, chunks) if self._snapshots.valid else None,
            records=recovery.records_after(self._disk, self.directory, self._segments, after),
            sealed=found.sealed,
            store_id=str(uuid.UUID(bytes=self._store)),
            torn=found.torn,
            damaged_snapshots=dict(found.snapshots.damaged),
            lost=found.lost,
        )

    def _resume(self, found: recovery.Found) -> None:
        """Go on writing the last segment."""
        segment = found.segments[-1]
        self._fd = self._disk.open(self._path(segment.name), write=True)
        self._fd_bytes = segment.header.segment_bytes
        self.unproven = bool(segment.seqs) and segment.blocks[-1] * frames.BLOCK == segment.last_frame

    def _remove_unfinished(self) -> None:
        for name in self._disk.listdir(self.directory):
            if name.endswith(".tmp"):
                self._disk.unlink(self._path(name))

    def seal(self) -> None:
        """Write the last frame of a clean stop; nothing is appended after it.

        Raises:
            JournalDead: it is not sealed.
        """
        self._write(frames.SEAL, 0)
        self.sealed = True

    def close(self) -> None:
        """Give up the files and the lock. It writes nothing."""
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    self._disk.close(fd)
        self._fd = self._lock_fd = -1

    # --- writing ----------------------------------------------------------------------------------------------

    def append(self, records: Sequence[bytes]) -> int:
        """Make one frame of them, durable on return; the number of the last.

        Raises:
            JournalDead: they are not accepted, and nothing will be.
            ValueError: they do not fit in one frame (payload_bytes_max).
        """
        assert records
        payload = frames.payload_of(records)
        if len(payload) > self.payload_bytes_max:
            raise ValueError(
                f"a frame holds {self.payload_bytes_max} bytes, these records take {len(payload)}"
            )
        framed = self._write(payload, len(records))
        if frames.has_hole(framed, 0, len(payload)):
            # Somebody's zeros fill a sector: if it rotted, the frame would look torn (recovery rule 5). Prove it now.
            self._write(frames.WATERMARK, 0)
        return self.last_seq

    def watermark(self) -> None:
        """Prove the last frame by one of no records after it, if nothing proves it yet.

        Raises:
            JournalDead: a write failed.
        """
        if self.unproven:
            self._write(frames.WATERMARK, 0)

    def _write(self, payload: bytes, nrec: int) -> bytes:
        """Write one frame and sync it; the frame. Whatever interrupts this leaves the journal dead."""
        if self.dead is not None:
            raise JournalDead(self.dead)
        assert not self.sealed
        assert self._fd >= 0
        first_seq = self.last_seq + 1
        framed = frames.frame(
            payload,
            nrec,
            first_seq=first_seq,
            store=frames.store_id(self._store),
            prev_header_crc=self._header_crc,
        )
        try:
            if self._segments[-1].end + len(framed) > self._fd_bytes:
                self._roll()
            segment = self._segments[-1]
            put(self._disk, self._fd, framed, segment.end)
            self._disk.fdatasync(self._fd)
        except OSError as error:
            self._die(f"writing record {first_seq}", error)
        except BaseException:
            self.dead = f"{self.directory}: writing record {first_seq} was interrupted"
            raise
        segment.add(first_seq, nrec, segment.end, len(framed))
        self._header_crc = frames.header_crc(framed)
        self.unproven = nrec > 0
        self.last_seq += nrec
        return framed

    def _die(self, doing: str, error: OSError) -> NoReturn:
        self.dead = f"{self.directory}: {doing}: {error.strerror or error}"
        raise JournalDead(self.dead) from error

    def _roll(self) -> None:
        """Begin the next segment: its block 0 is synced BEFORE it has a name, its name BEFORE it has a frame."""
        header = frames.SegmentHeader(
            self._store, self.last_seq + 1, 0, self._header_crc, time.time_ns(), self.segment_bytes
        )
        segment = Segment(recovery.segment_name(header.first_seq), header)
        with self._spares.taken() as path:
            fd = self._disk.open(path, write=True)
            put(self._disk, fd, frames.segment_block(header), 0)
            self._disk.fdatasync(fd)
            self._spares.name(self._path(segment.name))
        self._disk.fsync_dir(self.directory)
        if self._fd >= 0:
            self._disk.close(self._fd)
        self._fd, self._fd_bytes = fd, self.segment_bytes
        with self._segments_lock:
            self._segments = [*self._segments, segment]

    # --- spare segments -----------------------------------------------------------------------------------------

    @property
    def spares_missing(self) -> bool:
        """Whether `prepare` has something to do; when it stays so, the disk is full."""
        return self._spares.missing

    def prepare(self) -> bool:
        """Make the spare segments that are missing; False: there is no space for all of them.

        Raises:
            JournalDead: the device refused, and not for lack of space.
        """
        try:
            return self._spares.make()
        except OSError as error:
            self._die("making a spare segment", error)

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def first_seq(self) -> int:
        """The oldest record kept; last_seq + 1: there is none."""
        return self._segments[0].first_seq

    def read(self, seq: int) -> bytes:
        """One committed record.

        Raises:
            KeyError: it is not kept, or not there yet.
            JournalError: it rotted since the start.
            OSError: the device refused to read.
        """
        first, records = self._frame_of(seq)
        if not first <= seq < first + len(records):
            raise KeyError(seq)
        return records[seq - first]

    def read_from(
        self, seq: int, records_max: int, bytes_max: int = READ_BYTES_MAX
    ) -> list[tuple[int, bytes]]:
        """Committed records from the first kept number >= seq on, at least one if there is one.

        Raises: as read, save KeyError.
        """
        found: list[tuple[int, bytes]] = []
        seq, size = max(seq, self.first_seq), 0
        while seq <= self.last_seq and len(found) < records_max and size < bytes_max:
            try:
                first, records = self._frame_of(seq)
            except KeyError:
                seq, records = self._next_kept(seq), []
                continue
            for record in records[max(seq - first, 0) :]:
                if found and (len(found) == records_max or size + len(record) > bytes_max):
                    return found
                found.append((seq, record))
                size += len(record)
                seq += 1
        return found

    def _next_kept(self, seq: int) -> int:
        """The first number of the first segment after the one that should hold `seq`."""
        return next((s.first_seq for s in self._segments if s.first_seq > seq), self.last_seq + 1)

    def _frame_of(self, seq: int) -> tuple[int, list[bytes]]:
        """Raises KeyError unless the frame holds `seq`."""
        segments = self._segments
        index = bisect_right(segments, seq, key=lambda segment: segment.first_seq) - 1
        offset = segments[index].locate(seq) if index >= 0 else 0
        if not offset or seq > self.last_seq:
            raise KeyError(seq)
        name = segments[index].name
        held_name, held_offset, first, records = self._read_last
        if (held_name, held_offset) != (name, offset):
            first, records = self._read_frame(name, offset)
            self._read_last = (name, offset, first, records)
        if seq >= first + len(records):
            raise KeyError(seq)
        return first, records

    def _read_frame(self, name: str, offset: int) -> tuple[int, list[bytes]]:
        try:
            fd = self._disk.open(self._path(name))
        except FileNotFoundError as error:  # dropped since
            raise KeyError(name) from error
        try:
            held = self._disk.pread(fd, frames.BLOCK, offset)
            header = frames.parse(held, 0)
            if header and header.size > frames.BLOCK:
                held += self._disk.pread(fd, header.size - frames.BLOCK, offset + frames.BLOCK)
        finally:
            self._disk.close(fd)
        return recovery.read_frame(held, 0, f"{self._path(name)} at {offset}")

    # --- snapshots and dropping ---------------------------------------------------------------------------------

    def write_snapshot(self, seq: int, chunks: Iterable[bytes]) -> None:
        """Keep the state after record `seq`; on return it is durable and was read back.

        Raises:
            OSError: there is no new snapshot; the old ones stand (a full disk, say). Try again later.
            snapfile.SnapshotDamagedError: the device gave back something else; as above.
            JournalDead: the directory could not be synced.
        """
        assert seq <= self.last_seq, (seq, self.last_seq)
        path = self._path(recovery.snapshot_name(seq))
        try:
            snapfile.write(self._disk, path + ".tmp", self._store, seq, chunks)
            self._disk.rename(path + ".tmp", path)  # on a full xfs this may be what finds no space
        except (OSError, snapfile.SnapshotDamagedError):
            with contextlib.suppress(OSError):
                self._disk.unlink(path + ".tmp")
            raise
        try:
            self._disk.fsync_dir(self.directory)
            self._forget_snapshots(seq)
        except OSError as error:
            self._die(f"naming snapshot {seq}", error)

    def _forget_snapshots(self, seq: int) -> None:
        """Keep the newest two valid ones."""
        kept = self._snapshots
        valid = sorted({*kept.valid, seq})
        kept.valid = valid[-SNAPSHOTS_KEPT:]
        kept.damaged.pop(recovery.snapshot_name(seq), None)
        for name in [*map(recovery.snapshot_name, valid[:-SNAPSHOTS_KEPT]), *kept.damaged]:
            self._disk.unlink(self._path(name))
        kept.damaged.clear()
        self._disk.fsync_dir(self.directory)

    def bytes_since(self, seq: int) -> int:
        """Bytes of the segments that began after record `seq`: what a start would read beyond a snapshot there."""
        return sum(segment.header.segment_bytes for segment in self._segments if segment.first_seq > seq)

    def floor(self, history_bytes_max: int) -> int:
        """The first record of the oldest segment that a history of that size keeps."""
        kept = max(1, history_bytes_max // self.segment_bytes)
        return self._segments[-kept:][0].first_seq

    def drop_segments(self, keep_from_seq: int, history_bytes_max: int) -> int:
        """Drop the oldest segments while all of them take more than `history_bytes_max`; how many went.

        A segment stays if it holds a record >= keep_from_seq, or one that the older of two snapshots needs; so
        nothing goes before there are two.

        Raises:
            JournalDead: the directory could not be synced.
        """
        if len(self._snapshots.valid) < SNAPSHOTS_KEPT:
            return 0
        needed_from = min(keep_from_seq, self._snapshots.valid[-SNAPSHOTS_KEPT] + 1)
        dropped = 0
        while (
            len(self._segments) > 1
            and self._segments[1].header.begins <= needed_from
            and sum(segment.header.segment_bytes for segment in self._segments) > history_bytes_max
        ):
            self._drop_oldest()
            dropped += 1
        return dropped

    def _drop_oldest(self) -> None:
        """One name at a time, each synced: segments that are left must always be one run."""
        with self._segments_lock:
            oldest, self._segments = self._segments[0], self._segments[1:]
        try:
            self._disk.unlink(self._path(oldest.name))
            self._disk.fsync_dir(self.directory)
        except OSError as error:
            self._die(f"dropping {oldest.name}", error)

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name}"
