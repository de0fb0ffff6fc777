"""Days in the life of a daemon, from seeds: its own code, virtual time, and everything that can go wrong."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import pytest
import trio
from gpujobd import worker_process
from simulation.clock import repeatable
from simulation.pulse import FINE, SLOW, Pulse
from simulation.world import World

HOUR = 1 / 24


def live(seed: int, days: float, pulse: Pulse = SLOW) -> World:
    """One world to its end. GPUJOBD_SEED picks another one."""
    seed = int(os.environ.get("GPUJOBD_SEED", seed))
    world = World(seed, pulse)
    try:
        world.live(days)
    except BaseException:
        pace = " PACE=fine" if pulse is FINE else ""
        print("\n".join(world.tail))
        print(f"\nreplay with: make simulation SEED={seed} DAYS={days:g}{pace}")
        raise
    return world


def order_of_ten(seed: int) -> list[int]:
    """In which order trio runs ten tasks that could all run at once."""
    order: list[int] = []

    async def note(number: int) -> None:
        await trio.lowlevel.checkpoint()
        order.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(note, number)

    with repeatable(seed):
        trio.run(main)
    return order


def test_trio_runs_what_is_ready_in_an_order_of_the_seed() -> None:
    assert order_of_ten(1) == order_of_ten(1)
    assert len({tuple(order_of_ten(seed)) for seed in range(5)}) > 1


def test_two_minutes_at_the_real_pace_keep_every_promise() -> None:
    before = signal.getsignal(signal.SIGTERM)
    world = live(1, HOUR / 30, FINE)
    assert world.oracle.finished
    assert signal.getsignal(signal.SIGTERM) is before, (
        "every process that a later test starts would inherit it"
    )


def test_four_hours_of_faults_keep_every_promise() -> None:
    world = live(2, 4 * HOUR)
    assert world.oracle.facts


def test_the_same_seed_lives_the_same_world() -> None:
    one, again, other = (live(seed, HOUR) for seed in (3, 3, 4))
    assert one.trace.hexdigest() == again.trace.hexdigest()
    assert one.oracle.facts == again.oracle.facts
    if "GPUJOBD_SEED" not in os.environ:
        assert one.trace.hexdigest() != other.trace.hexdigest()


def kill_while_a_worker_is_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = worker_process._kill

    def killed(kin: Any) -> list[int]:
        if not world.endings:
            world._kill("kill")
        return end(kin)

    monkeypatch.setattr(worker_process, "_kill", killed)
    world.live(HOUR / 30)
    assert world.endings["kill"]
    monkeypatch.undo()


def test_a_daemon_killed_while_it_ends_a_worker_lets_go_of_what_it_held(monkeypatch) -> None:
    """As the kernel sees to it when a process dies. pytest turns a socket that nobody closed into a failure."""
    kill_while_a_worker_is_ended(World(5, FINE), monkeypatch)
    for _ in range(3):  # what is told of one collection may hold on to what the next one finds
        gc.collect()


@pytest.mark.slow
def test_five_days_of_faults_keep_every_promise() -> None:
    world = live(1001, 5)
    counted = {**world.faults.count, **world.endings}
    if "GPUJOBD_SEED" not in os.environ:
        missing = {"clock step", "kill", "power cut", "SIGTERM", "sync stuck", "storm"} - counted.keys()
        assert not missing, "these faults never happened: five days that prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2001, 2002])
def test_half_an_hour_at_the_real_pace_keeps_every_promise(seed: int) -> None:
    live(seed, HOUR / 2, FINE)


@pytest.mark.slow
def test_the_same_seed_lives_the_same_days() -> None:
    one, again = live(3001, 2), live(3001, 2)
    assert one.trace.hexdigest() == again.trace.hexdigest()
