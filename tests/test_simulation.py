"""Random worlds, from seeds: whatever people, workers, clocks and power cuts do, the promises hold."""

from __future__ import annotations

import os

import pytest
from simulated_world import World

STEPS = 250


def live(seed: int) -> World:
    """One world from its first boot to its end, looked at all the time."""
    world = World(seed)
    for step in range(STEPS):
        world.step()
        if step % 10 == 0:
            world.check()
        if step % 50 == 0:
            world.check_replay()
            world.check_forecast()
    world.commit()
    world.check()
    world.check_replay()
    return world


def live_all(seeds: range) -> tuple[set[str], set[str]]:
    """What was seen and refused in all these worlds. GPUJOBD_SEED picks one world instead."""
    chosen = os.environ.get("GPUJOBD_SEED")
    seen: set[str] = set()
    refused: set[str] = set()
    for seed in [int(chosen)] if chosen else seeds:
        try:
            world = live(seed)
        except BaseException:
            print(f"\nreplay with: GPUJOBD_SEED={seed} pytest tests/test_simulation.py -k quick")
            raise
        seen |= world.seen
        refused |= world.refused
    return seen, refused


@pytest.mark.parametrize("block", range(6))
def test_whatever_happens_the_promises_hold_quick(block: int) -> None:
    live_all(range(10 * block, 10 * block + 10))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_whatever_happens_the_promises_hold_slow(block: int) -> None:
    live_all(range(1000 + 100 * block, 1100 + 100 * block))
