"""The figures of the README: one table, ratios measured in one run, the machine named.

    bench.py [NAME...] [--repetitions N] [--markdown]

Nothing is written into the repository; everything made is in a temporary folder (TMPDIR says where), and gone after.
Medians of the repetitions. A row that misses its target is marked with "!". The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# The harness, far ends on bad days, and the demonstration's real texts.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "faults"), str(ROOT / "demo")]

import door  # noqa: E402
import house  # noqa: E402
import looks  # noqa: E402
import machine  # noqa: E402
import rows  # noqa: E402
import telling  # noqa: E402
import work  # noqa: E402

MEASUREMENTS: dict[str, Callable[[rows.Setting], Iterator[rows.Row]]] = {
    "embed": work.embed,
    "nothing": work.nothing,
    "submissions": door.submissions,
    "show": door.show,
    "first-batch": work.first_batch,
    "notifications": telling.notifications,
    "forecast": looks.forecast,
    "ping": house.ping,
    "start-up": house.start_up,
    "queued": house.queued,
    "idle": house.idle,
}


def main() -> int:
    asked = _arguments()
    with tempfile.TemporaryDirectory(prefix="gpujobd-bench-") as name:
        about = machine.describe(Path(name))
        print(about, file=sys.stderr if asked.markdown else sys.stdout, flush=True)
        found, began = [], machine.cpu_times()
        for measurement in asked.names or MEASUREMENTS:
            folder = Path(name) / measurement
            folder.mkdir()
            for row in MEASUREMENTS[measurement](rows.Setting(folder, asked.repetitions)):
                found.append(row)
                if not asked.markdown:
                    print(rows.as_text(row), flush=True)
        stolen = f"the host took {machine.stolen_percent(began):.0f} % of the CPU time meanwhile"
        if asked.markdown:
            print(rows.as_markdown(found, f"{about}; {stolen}"))
        else:
            print(stolen)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="the README's table")
    asked = parser.parse_args()
    unknown = set(asked.names) - MEASUREMENTS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(MEASUREMENTS)}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
