"""Row 12: sequences of calls that hypothesis makes up, and makes short where one fails."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from gpujobd.journal import JournalDead
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sim_disk import Fault, PowerCut, SimDisk
from sim_os import on_sim_disk, sim_path
from simulated_world import World
from story import HISTORY_BYTES, LeaseEnded, Store, Story

pytestmark = pytest.mark.slow

KINDS = ("cut", "dying", "short", errno.EIO, errno.ENOSPC)


class StoreSequences(RuleBasedStateMachine):
    """The whole store; an operation that fails ends the process, a cut the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimDisk(0)
        self.known, self.flying = Story(0), 0
        self.patched = contextlib.ExitStack()
        self.patched.enter_context(on_sim_disk(self.disk))
        self.boot()

    def boot(self) -> None:
        luck = random.Random(0)
        self.store = Store(sim_path(self.disk, "/s"), self.disk, 0, luck=luck, known=self.known)
        with self.ending():
            self.store.start(self.flying)
            self.known, self.flying = self.store.story, 0

    @contextlib.contextmanager
    def ending(self) -> Any:
        """Whatever a fault does to the process, the oracle keeps what was acknowledged."""
        try:
            yield
        except (OSError, JournalDead, LeaseEnded):
            self.again(self.disk.cut_power if self.disk.dying else self.disk.restart_process)
        except PowerCut:
            self.again(self.disk.cut_power)

    def again(self, end: Callable[[], None]) -> None:
        self.keep()
        end()
        self.boot()

    def keep(self) -> None:
        if self.store.up:
            self.known, self.flying = self.store.story, self.store.flying

    @rule(records=st.integers(1, 5))
    def commit(self, records: int) -> None:
        with self.ending():
            self.store.commit(records)

    @rule()
    def watermark(self) -> None:
        with self.ending():
            self.store.journal.watermark()

    @rule()
    def snapshot(self) -> None:
        with self.ending():
            self.store.snapshot()

    @rule(history=st.sampled_from((1, HISTORY_BYTES)))
    def drop(self, history: int) -> None:
        with self.ending():
            self.store.drop(history)

    @rule(seal=st.booleans())
    def stop(self, seal: bool) -> None:
        with self.ending():
            if seal:
                self.store.journal.seal()
            self.store.close()
            self.known, self.flying = self.store.story, 0
            self.boot()

    @precondition(lambda self: not self.disk.dying)
    @rule()
    def kill(self) -> None:
        self.again(self.disk.restart_process)

    @rule(seed=st.integers(0, 1 << 16))
    def cut(self, seed: int) -> None:
        self.disk.rng.seed(seed)
        self.again(self.disk.cut_power)

    @precondition(lambda self: self.disk.fault is None and not self.disk.dying)
    @rule(
        after=st.integers(1, 60),
        kind=st.sampled_from(KINDS),
        sticky=st.booleans(),
        seed=st.integers(0, 1 << 16),
    )
    def fault(self, after: int, kind: str | int, sticky: bool, seed: int) -> None:
        self.disk.rng.seed(seed)
        self.disk.fault = Fault(self.disk.ops + after, kind, sticky and kind != "dying")

    def teardown(self) -> None:
        try:
            self.again(self.disk.cut_power)
        finally:
            self.patched.close()


class CoreSequences(RuleBasedStateMachine):
    """The world around the core, its luck in the hands of hypothesis."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0)

    @rule(
        luck=st.integers(0, 1 << 32),
        what=st.sampled_from(
            ("time_passes", "somebody_wants", "workers_work", "house_keeping", "stop_or_crash", "commit")
        ),
    )
    def step(self, luck: int, what: str) -> None:
        self.world.luck.seed(luck)
        getattr(self.world, what)()

    @invariant()
    def promises_hold(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.commit()
        self.world.check()
        self.world.check_replay()


def run(machine: Any, seed: int, examples: int) -> None:
    rules = settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=rules)


@pytest.mark.parametrize("block", range(4))
def test_any_sequence_on_the_store_keeps_what_was_acknowledged(block: int, cases, count) -> None:
    for seed in cases(10):
        run(StoreSequences, seed, 50)
        count(12, 50)


@pytest.mark.parametrize("block", range(2))
def test_any_sequence_in_the_core_keeps_its_promises(block: int, cases, count) -> None:
    for seed in cases(5):
        run(CoreSequences, seed, 50)
        count(12, 50)
