"""Rows 1 to 3: in a disk that keeps any subset of what was not synced, the power goes and operations fail.

The whole store lives there: journal, snapshots, inputs, outputs, with the daemon's and the worker's own code.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable

import pytest
from gpujobd.journal import JournalDead
from sim_disk import Fault, PowerCut, SimDisk
from sim_os import on_sim_disk, sim_path
from story import SEGMENT_BYTES, LeaseEnded, Store, Story, streamed

pytestmark = pytest.mark.slow

ROOT = "/s"


class Machine:
    """A store on a simulated disk, over several lives of its process and its power."""

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.disk = SimDisk(seed)
        self.seed = seed
        self.known = Story(seed)
        self.flying = 0

    def start(self) -> Store:
        """Boot, recover, check. Also where it fails half-way, what was acknowledged is kept."""
        store = self.store = Store(
            sim_path(self.disk, ROOT), self.disk, self.seed, luck=self.luck, known=self.known
        )
        store.start(self.flying)
        self.known, self.flying = store.story, 0
        return store

    def live(self, frames: int) -> None:
        """Start and live; whatever ends it, the oracle knows what was acknowledged."""
        store = self.start()
        self.watched(lambda: store.live(frames))

    def watched(self, do: Callable[[], None]) -> None:
        try:
            do()
        finally:
            self.known, self.flying = self.store.story, self.store.flying

    def live_on(self, frames: int) -> None:
        """The same where single operations fail: what a daemon survives, it goes on after."""
        store = self.start()
        for _ in range(frames):
            try:
                self.watched(lambda: store.live(1))
            except JournalDead:
                with pytest.raises(JournalDead):
                    store.journal.append([b"never"])
                return
            except (OSError, LeaseEnded):
                if not store.up:
                    return
                store.drop_leases()

    def go_on(self, frames: int = 3) -> None:
        """After whatever happened: a life without faults, a cut at its end, and a last look."""
        self.live(frames)
        self.disk.cut_power()
        self.start()


def survive_cuts(seed: int) -> int:
    """Three cuts at random operations, each perhaps during the recovery from the one before."""
    machine = Machine(seed)
    cuts = 0
    with on_sim_disk(machine.disk):
        for _ in range(3):
            reach = machine.luck.choice((30, 150, 400))
            machine.disk.fault = Fault(machine.disk.ops + machine.luck.randint(1, reach), "cut")
            with contextlib.suppress(PowerCut):
                machine.live(30)
            cuts += machine.disk.off
            machine.disk.cut_power()
        machine.go_on()
    return cuts


@pytest.mark.parametrize("block", range(8))
def test_power_cuts_at_random_operations_lose_nothing_acknowledged(block: int, cases, count) -> None:
    for seed in cases(20_000 // 8 // 3 + 20):
        count(1, survive_cuts(seed))


# --- row 2: nothing sampled -----------------------------------------------------------------------------------------


def reach(machine: Machine, what: str, *, in_pieces: bool | None = None) -> None:
    """Live until the next step is this one."""
    store = machine.start()
    while True:
        step = store.story.next_step()
        if step[0] == what and in_pieces in (None, streamed(machine.seed, step[1])):
            break
        store.commit(1)
    machine.known = store.story


def one(machine: Machine) -> None:
    machine.store.commit(1)


def nothing(machine: Machine) -> None:
    pass


def start(machine: Machine) -> None:
    machine.start()


def lived(machine: Machine) -> None:
    machine.live(6)


def a_frame_before_the_end(machine: Machine) -> None:
    """Until the next frame needs the next segment."""
    store = machine.start()
    while store.journal._segments[-1].end < SEGMENT_BYTES:
        store.journal.watermark()
        store.commit(1)
    machine.known = store.story


def two_snapshots(machine: Machine) -> None:
    machine.live(8)
    machine.store.snapshot()
    machine.watched(lambda: machine.store.live(14))
    machine.store.snapshot()


def compact(machine: Machine) -> None:
    machine.store.snapshot()
    machine.store.drop(SEGMENT_BYTES)


def stop_and_start(machine: Machine) -> None:
    machine.store.journal.seal()
    machine.store.close()
    machine.start()


def torn(machine: Machine) -> None:
    machine.live(5)
    machine.disk.fault = Fault(machine.disk.ops + 2, "cut")
    with contextlib.suppress(PowerCut):
        machine.watched(lambda: machine.store.commit(1))
    machine.disk.cut_power()


def sync_failed(machine: Machine) -> None:
    machine.live(5)
    machine.disk.fault = Fault(machine.disk.ops + 1, errno.EIO, sticky=True)
    with contextlib.suppress(JournalDead, OSError, LeaseEnded):
        machine.watched(lambda: machine.store.commit(1))
    machine.disk.restart_process()


SCENARIOS: dict[str, tuple[Callable[[Machine], None], Callable[[Machine], None]]] = {
    "first start": (nothing, start),
    "streamed submission": (lambda m: reach(m, "submitted", in_pieces=True), one),
    "inline submission": (lambda m: reach(m, "submitted", in_pieces=False), one),
    "checkpoint": (lambda m: reach(m, "checkpointed"), one),
    "input out of the journal": (lambda m: reach(m, "spooled"), one),
    "removal": (lambda m: reach(m, "removed"), one),
    "next segment": (a_frame_before_the_end, one),
    "first snapshot": (lived, lambda m: m.store.snapshot()),
    "compaction": (two_snapshots, compact),
    "clean stop and start": (lived, stop_and_start),
    "start after a torn frame": (torn, start),
    "start after a failed sync": (sync_failed, start),
}
DAMAGES = 13


def survive_cut_at(scenario: str, story: int, at: int, damage: int) -> bool:
    """Whether there was an operation number `at`."""
    before, act = SCENARIOS[scenario]
    machine = Machine(story)
    with on_sim_disk(machine.disk):
        before(machine)
        machine.disk.rng.seed(damage)
        machine.disk.fault = Fault(machine.disk.ops + at, "cut")
        with contextlib.suppress(PowerCut):
            machine.watched(lambda: act(machine))
        reached = machine.disk.off
        machine.disk.cut_power()
        machine.go_on(1)
    return reached


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_cut_at_every_operation_of_a_scenario_loses_nothing(scenario: str, cases, count) -> None:
    for seed in cases(DAMAGES):
        at = 1
        while survive_cut_at(scenario, seed // DAMAGES, at, seed):
            count(2)
            at += 1


# --- row 3 ------------------------------------------------------------------------------------------------------------


KINDS = [(kind, sticky) for kind in (errno.EIO, errno.ENOSPC, "short") for sticky in (False, True)]


def survive_error(seed: int, fault: Fault) -> bool:
    """An operation fails, once or for good; the process goes on or starts again, and then the power goes.

    Returns whether the fault was reached.
    """
    machine = Machine(seed)
    machine.disk.fault = fault
    with on_sim_disk(machine.disk):
        with contextlib.suppress(JournalDead, OSError, LeaseEnded):
            machine.live_on(12)
        reached = machine.disk.ops >= fault.at
        machine.disk.restart_process()
        machine.go_on()
    return reached


@pytest.mark.parametrize(("kind", "sticky"), KINDS)
def test_an_error_at_any_operation_loses_nothing_acknowledged(
    kind: str | int, sticky: bool, cases, count
) -> None:
    for seed in cases(2):
        at = 1
        while survive_error(seed, Fault(at, kind, sticky)):
            count(3)
            at += 1


def survive_dying(seed: int) -> None:
    """The file system dies under the store, which must not believe what a sync then says."""
    machine = Machine(seed)
    machine.disk.fault = Fault(machine.luck.randint(20, 400), "dying")
    with on_sim_disk(machine.disk):
        with contextlib.suppress(JournalDead, OSError, LeaseEnded):
            machine.live_on(30)
        machine.disk.cut_power()
        machine.go_on()


@pytest.mark.parametrize("block", range(2))
def test_a_file_system_that_dies_takes_nothing_acknowledged_with_it(block: int, cases, count) -> None:
    for seed in cases(150):
        survive_dying(seed)
        count(3)
