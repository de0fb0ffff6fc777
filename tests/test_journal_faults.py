"""What a journal is for: power cuts, failing devices, crashes while recovering, kill -9.

The oracle is the same for all: every acknowledged record is recovered, unchanged and in order; of the rest, only
the one frame in flight may appear, and only whole; and nothing that a cut or a failed write can leave is refused.

    GPUJOBD_SEED=123 pytest tests/test_journal_faults.py -k cut     runs seed 123 alone
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from gpujobd import recovery
from gpujobd.frames import BLOCK
from gpujobd.journal import Journal, JournalDead, JournalError, Recovered
from sim_disk import Fault, PowerCut, SimDisk

SEGMENT_BYTES = 6 * BLOCK
STEPS = 40


class Life:
    """One store over several lives of its process and its machine."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.disk = SimDisk(seed)
        self.acked: list[bytes] = []
        self.flying: list[bytes] = []
        self.keep_from = 1
        self.sealed = {False}  # what the next start may say

    def open(self) -> None:
        self.journal = Journal("/j", self.disk, SEGMENT_BYTES)
        self.check(self.journal.open())

    def check(self, recovered: Recovered) -> None:
        seq, chunks = recovered.snapshot or (0, [])
        have = [record for chunk in chunks for record in msgspec.msgpack.decode(chunk)]
        assert len(have) == seq
        for at, record in recovered.records:
            have.append(record)
            assert at == len(have)
        assert have[: len(self.acked)] == self.acked
        assert have[len(self.acked) :] in ([], self.flying)
        assert self.journal.last_seq == len(have)
        assert self.journal.first_seq <= max(self.keep_from, 1)
        assert recovered.sealed in self.sealed
        self.acked, self.flying, self.sealed = have, [], {recovered.sealed}
        if recovered.torn:
            self.sealed = {False, True}  # a frame was cut off, perhaps right after a seal

    def live(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        match self.rng.choices(
            ("append", "watermark", "snapshot", "drop", "read", "reopen"), (60, 10, 8, 8, 10, 4)
        )[0]:
            case "append":
                self.append()
            case "watermark":
                self.journal.watermark()
            case "snapshot":
                self.snapshot()
            case "drop":
                self.keep_from = self.rng.randint(self.keep_from, len(self.acked) + 1)
                self.journal.drop_segments(self.keep_from, SEGMENT_BYTES)
            case "read":
                with contextlib.suppress(OSError):  # the device may refuse; it may not lie
                    self.read()
            case "reopen":
                self.reopen()

    def append(self) -> None:
        sizes = self.rng.choice(((0, 1), (10, 300), (10, 3000), (600, 1500)))
        records = [self.record(self.rng.randint(*sizes)) for _ in range(self.rng.choice((1, 1, 2, 5)))]
        self.flying = records
        self.sealed.add(False)
        assert self.journal.append(records) == len(self.acked) + len(records)
        self.acked += records
        self.flying, self.sealed = [], {False}

    def record(self, size: int) -> bytes:
        return self.rng.randbytes(size) if self.rng.random() < 0.9 else bytes(size)

    def snapshot(self) -> None:
        chunks = [msgspec.msgpack.encode(list(chunk)) for chunk in _batched(self.acked, 7)]
        with contextlib.suppress(OSError):  # the old ones stand
            self.journal.write_snapshot(len(self.acked), chunks)

    def read(self) -> None:
        seq = self.rng.randint(1, len(self.acked) + 1)
        if self.journal.first_seq <= seq <= len(self.acked):
            assert self.journal.read(seq) == self.acked[seq - 1]
        else:
            with pytest.raises(KeyError):
                self.journal.read(seq)

    def reopen(self) -> None:
        if self.rng.random() < 0.5:
            self.sealed.add(True)
            self.journal.seal()
            self.sealed = {True}
        self.journal.close()
        self.open()

    def go_on(self) -> None:
        """After whatever happened: a life without faults, a cut at its end, and a last look."""
        self.open()
        self.live(5)
        self.disk.cut_power()
        self.open()


def _batched(records: list[bytes], size: int) -> list[list[bytes]]:
    return [records[at : at + size] for at in range(0, len(records), size)]


def survive_cuts(seed: int) -> int:
    """Three cuts at random operations, each perhaps during the recovery from the one before."""
    life = Life(seed)
    cuts = 0
    for _ in range(3):
        reach = life.rng.choice((12, 60, 250))
        life.disk.fault = Fault(life.disk.ops + life.rng.randint(1, reach), "cut")
        try:
            life.open()
            life.live(STEPS)
        except PowerCut:
            cuts += 1
        life.disk.cut_power()
    life.go_on()
    return cuts


def survive_error(seed: int, fault: Fault) -> bool:
    """The device fails, the process ends, the machine lives; it starts again, accepts more, and the power goes.

    Returns whether the fault was reached.
    """
    life = Life(seed)
    life.disk.fault = fault
    try:
        life.open()
        life.live(STEPS // 2)
    except JournalDead:
        with pytest.raises(JournalDead):
            life.journal.append([b"never"])
    except OSError:
        pass  # reading what open() found
    reached = life.disk.ops >= fault.at
    life.disk.restart_process()
    life.go_on()
    return reached


def seeds(count: int) -> list[int]:
    """GPUJOBD_SEED alone, or as many."""
    return [int(os.environ["GPUJOBD_SEED"])] if "GPUJOBD_SEED" in os.environ else list(range(count))


def run_cuts(chosen: list[int]) -> None:
    cuts = 0
    for seed in chosen:
        try:
            cuts += survive_cuts(seed)
        except BaseException:
            print(f"replay: GPUJOBD_SEED={seed} pytest tests/test_journal_faults.py -k power_cuts")
            raise
    assert cuts >= len(chosen) or len(chosen) == 1  # the faults were reached


def test_power_cuts_at_random_operations_lose_nothing_acknowledged() -> None:
    run_cuts(seeds(300))


KINDS = [(kind, sticky) for kind in (errno.EIO, errno.ENOSPC, "short") for sticky in (False, True)]


def sweep_errors(seed: int, kind: str | int, sticky: bool) -> None:
    for at in itertools.count(1):
        try:
            if not survive_error(seed, Fault(at, kind, sticky)):
                break
        except BaseException:
            print(f"replay: survive_error({seed}, Fault({at}, {kind!r}, {sticky}))")
            raise
    assert at > 60


@pytest.mark.parametrize(("kind", "sticky"), KINDS)
def test_an_error_at_any_operation_is_final_and_loses_nothing(kind: str | int, sticky: bool) -> None:
    sweep_errors(1, kind, sticky)


def torn_life(seed: int) -> Life:
    """A life whose last append met a power cut."""
    life = Life(seed)
    life.open()
    life.live(15)
    life.disk.fault = Fault(life.disk.ops + 1 + seed % 2, "cut")  # the write, or the sync
    with pytest.raises(PowerCut):
        life.append()
    life.disk.cut_power()
    return life


@pytest.mark.parametrize("seed", range(12))
def test_a_cut_at_any_operation_of_the_recovery_from_a_cut_loses_nothing(seed: int) -> None:
    for at in itertools.count(1):
        life = torn_life(seed)
        life.disk.fault = Fault(life.disk.ops + at, "cut")
        with contextlib.suppress(PowerCut):
            life.open()
            break
        life.disk.cut_power()
        life.go_on()
    assert at > 15


def test_a_frame_whose_sync_failed_is_written_again_before_anything_follows_it() -> None:
    """The page cache of a machine whose sync failed shows a frame that the device never got."""
    for seed in range(100):
        life = Life(seed)
        life.open()
        life.append()
        life.disk.fault = Fault(life.disk.ops + 2, errno.EIO)  # the sync of the next frame
        with pytest.raises(JournalDead):
            life.append()
        life.disk.restart_process()
        life.open()
        assert len(life.acked) == life.journal.last_seq
        life.append()
        life.disk.cut_power()
        life.open()


# --- the tests themselves: each broken variant must be caught ------------------------------------------------


def _no_sync(disk: SimDisk, fd: int) -> None:
    pass


def _no_fsync_dir(disk: SimDisk, directory: str) -> None:
    pass


def _no_repair(*args: object) -> None:
    pass


def _sync_again(disk: SimDisk, fd: int) -> None:
    try:
        real_sync(disk, fd)
    except OSError:
        real_sync(disk, fd)


real_sync = SimDisk.fdatasync
BROKEN = {
    "a sync that is not done": (SimDisk, "fdatasync", _no_sync),
    "a directory that is not synced": (SimDisk, "fsync_dir", _no_fsync_dir),
    "a failed sync that is tried again": (SimDisk, "fdatasync", _sync_again),
    "a tail that is not written again": (recovery, "repair", _no_repair),
    "any damage taken for a torn tail": (recovery, "is_cut_short", lambda *_: True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_journal_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[name])
    with pytest.raises((AssertionError, JournalError)):
        look_for_faults()


def look_for_faults() -> None:
    for seed in range(300):
        survive_cuts(seed)
        for at in range(40, 140, 10):
            survive_error(seed, Fault(at // 2 + seed % 10, errno.EIO))
        rot_last_frame(seed)


def rot_last_frame(seed: int) -> None:
    """One bit of the newest frame flips: refused, or harmless."""
    life = Life(seed)
    life.open()
    life.live(10)
    life.append()
    segment = life.journal._segments[-1]
    held = life.disk.names[f"/j/{segment.name}"].cache
    held[life.rng.randrange(segment.last_frame, segment.end)] ^= 1 << life.rng.randrange(8)
    life.disk.restart_process()
    with contextlib.suppress(JournalError):
        life.open()


def test_a_bit_that_flips_in_the_newest_frame_is_never_a_silent_loss() -> None:
    for seed in range(300):
        rot_last_frame(seed)


# --- the real disk -----------------------------------------------------------------------------------------------


def kill_processes(directory: Path, kills: int) -> None:
    script = Path(__file__).with_name("kill_journal.py")
    seed = os.environ.get("GPUJOBD_SEED", "1")
    run = subprocess.run(
        [sys.executable, str(script), str(directory), seed, str(kills)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{kills} kills" in run.stdout


def test_kill_9_at_random_times_loses_nothing_acknowledged(tmp_path: Path) -> None:
    kill_processes(tmp_path, 40)
