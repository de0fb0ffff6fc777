"""Rows 13 and 19: days of a daemon in simulation, with disk, worker, client and clock faults; see simulation/world.py."""

from __future__ import annotations

import pytest
from simulation.pulse import SLOW
from simulation.world import World

pytestmark = pytest.mark.slow

DAYS = 3
CLOCKS = ("clock step", "process stopped")


@pytest.mark.parametrize("block", range(5))
def test_days_of_faults_keep_every_promise(block: int, cases, count) -> None:
    for seed in cases(2):
        world = World(seed, SLOW)
        try:
            world.live(DAYS)
        except BaseException:
            print("\n".join(world.tail), f"\nor: make simulation SEED={seed} DAYS={DAYS}")
            raise
        count(13, DAYS)
        count(19, sum(world.faults.count[clock] for clock in CLOCKS))
