"""What the journal costs beside the bare calls it is made of.

    python tests/bench/bench_journal.py [DIRECTORY]

Bare and journal take turns, frame by frame, in files of the same kind, so that both meet the same disk: a virtual
disk's speed changes by the second. Say which disk it was; on one without a real flush the figures say nothing about
disks.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from gpujobd import frames
from gpujobd.journal import SEGMENT_BYTES, Journal

RECORD_BYTES = 220
GROUPS = (1, 8, 64)


class AppendSpeed(NamedTuple):
    """Records a second, and milliseconds a commit."""

    records_per_frame: int
    journal_per_s: float
    bare_per_s: float
    journal_p50_ms: float
    journal_p99_ms: float
    bare_p50_ms: float
    bare_p99_ms: float


class RecoverySpeed(NamedTuple):
    records: int
    open_s: float  # the whole of it: checks, the tail written again, spare segments
    iterate_s: float


def appends(directory: Path, records_per_frame: int, seconds: float = 2.0) -> AppendSpeed:
    """Journal.append beside pwrite and fdatasync of as many bytes into a zero-filled file."""
    journal = Journal(directory / f"journal-{records_per_frame}")
    journal.open()
    records = [os.urandom(RECORD_BYTES) for _ in range(records_per_frame)]
    framed = frames.frame(
        frames.payload_of(records), records_per_frame, first_seq=1, store=1, prev_header_crc=0
    )
    bare_fd = _zero_filled(directory / f"bare-{records_per_frame}")
    bare: list[float] = []
    ours: list[float] = []
    until = time.perf_counter() + seconds
    offset = 0
    while time.perf_counter() < until:
        begin = time.perf_counter()
        os.pwrite(bare_fd, framed, offset)
        os.fdatasync(bare_fd)
        between = time.perf_counter()
        journal.append(records)
        ours.append(time.perf_counter() - between)
        bare.append(between - begin)
        offset = (offset + len(framed)) % (SEGMENT_BYTES - len(framed)) // frames.BLOCK * frames.BLOCK
        if journal.spares_missing:
            journal.prepare()  # in the daemon, a thread's business
    os.close(bare_fd)
    journal.close()
    return AppendSpeed(records_per_frame, *_rates(ours, bare, records_per_frame))


def recovery(directory: Path, records: int = 1_000_000, records_per_frame: int = 64) -> RecoverySpeed:
    """Open and iterate a journal of small records; decoding events is not in it."""
    journal = Journal(directory / "recovery")
    journal.open()
    group = [os.urandom(RECORD_BYTES) for _ in range(records_per_frame)]
    for _ in range(records // records_per_frame):
        journal.append(group)
        if journal.spares_missing:
            journal.prepare()
    journal.seal()
    journal.close()
    again = Journal(directory / "recovery")
    begin = time.perf_counter()
    found = again.open().records
    opened = time.perf_counter()
    count = sum(1 for _ in found)
    end = time.perf_counter()
    again.close()
    return RecoverySpeed(count, opened - begin, end - opened)


def _zero_filled(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.pwrite(fd, bytes(SEGMENT_BYTES), 0)
    os.fsync(fd)
    return fd


def _rates(ours: list[float], bare: list[float], records: int) -> list[float]:
    rates = [records * len(times) / sum(times) for times in (ours, bare)]
    spread = [1000 * sorted(times)[len(times) * share // 100] for times in (ours, bare) for share in (50, 99)]
    return rates + spread


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as directory:
        for group in GROUPS:
            print(appends(Path(directory), group))
        print(recovery(Path(directory)))


if __name__ == "__main__":
    main()
