"""Fork a process that appends, kill it at a random time, look; again and again on the same journal.

    python kill_journal.py DIRECTORY SEED KILLS

A program of its own, because a test process with threads must not fork. The child tells each acknowledged number
over a pipe after append returned, so what was told is what must be there.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from gpujobd.frames import BLOCK
from gpujobd.journal import Journal

SEGMENT_BYTES = 64 * BLOCK


def record(seq: int) -> bytes:
    return b"%d " % seq * (1 + seq % 700)


def append_until_killed(directory: str, told: int) -> None:
    journal = Journal(directory, segment_bytes=SEGMENT_BYTES)
    after, records = look(journal)
    os.write(told, b"%d\n" % (after + records))
    while True:
        first = journal.last_seq + 1
        journal.append([record(seq) for seq in range(first, first + 1 + first % 5)])
        os.write(told, b"%d\n" % journal.last_seq)
        if first % 20 == 0:
            journal.write_snapshot(journal.last_seq, [b"%d" % journal.last_seq])
            journal.drop_segments(journal.last_seq, 4 * SEGMENT_BYTES)


def look(journal: Journal) -> tuple[int, int]:
    """Open, and check every record; (number of the snapshot, records after it)."""
    recovered = journal.open()
    after, chunks = recovered.snapshot or (0, [b"0"])
    assert chunks == [b"%d" % after]
    count = 0
    for seq, found in recovered.records:
        count += 1
        assert seq == after + count
        assert found == record(seq)
    assert journal.last_seq == after + count
    return after, count


def kill_one(directory: str, rng: random.Random) -> int:
    """Returns the last number the child told."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        append_until_killed(directory, told)
    os.close(told)
    time.sleep(rng.uniform(0.001, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(heard, "rb") as stream:
        lines = stream.read().split(b"\n")[:-1]
    return int(lines[-1]) if lines else 0


def main() -> None:
    directory, seed, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    acked = 0
    for _ in range(kills):
        acked = max(acked, kill_one(directory + "/journal", rng))
        journal = Journal(directory + "/journal", segment_bytes=SEGMENT_BYTES)
        look(journal)
        assert journal.last_seq >= acked, (journal.last_seq, acked)
        assert (
            journal.last_seq - acked <= 10
        )  # the frame in flight, and one whose number was not told in time
        acked = journal.last_seq
        journal.close()
    assert acked > kills
    print(f"{kills} kills, {acked} records, seed {seed}")


main()
