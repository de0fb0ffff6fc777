"""Live one world by name: python -m simulation SEED DAYS  (`make simulation SEED=7 DAYS=30`)."""

from __future__ import annotations

import sys
import time
from typing import Final

from simulation.pulse import FINE, HARSH, SLOW
from simulation.world import World

PACES: Final = {"fine": FINE, "slow": SLOW, "harsh": HARSH}


def main() -> None:
    seed, days = int(sys.argv[1]), float(sys.argv[2])
    world = World(seed, PACES[sys.argv[3]] if len(sys.argv) > 3 else SLOW)
    began = time.process_time()
    try:
        world.live(days)
    except BaseException:
        print("\n".join(world.tail))
        raise
    spent_s = time.process_time() - began
    print(
        f"{days:g} days in {spent_s:.1f} s of CPU; {len(world.oracle.facts)} facts, trace {world.trace.hexdigest()}"
    )
    oracle = world.oracle
    print(f"jobs ended {oracle.finished}, items checked {oracle.items}, records read {oracle.records_read}")
    print(f"widest gap {oracle.widest_gap_s:.0f} s, longest wait {oracle.longest_wait_s:.0f} s")
    print("endings", dict(world.endings))
    print("faults", dict(sorted(world.faults.count.items())))


main()
