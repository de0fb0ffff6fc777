"""Live days by name: python -m fairness SEED [DAYS]  (`make simulation-fairness SEED=7 DAYS=1000`)."""

from __future__ import annotations

import sys
import time
from collections import defaultdict

from fairness.days import Day


def main() -> None:
    first, days = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    worst: dict[str, float] = defaultdict(float)
    began = time.process_time()
    for seed in range(first, first + days):
        day = Day(seed)
        try:
            day.live()
        except BaseException:
            print(
                f"\nhour {day.hall.clock_s / 3600:.2f} of day {seed}; again: make simulation-fairness SEED={seed} DAYS=1"
            )
            raise
        for what, part in day.promises.seen.items():
            worst[what] = max(worst[what], part)
    print(f"{days} days in {time.process_time() - began:.0f} s of CPU; the worst, as a part of its bound:")
    for what, part in sorted(worst.items()):
        print(f"  {what:16} {part:.2f}")


if __name__ == "__main__":
    main()
