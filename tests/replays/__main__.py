"""Real situations under the core and under other ways to choose: `make bench-fairness`.

    python -m replays [NAME...] [--seed N] [--out FOLDER] [--markdown]

Prints a table for each; FOLDER gets a picture of each and index.html, which holds them all. Everything follows from the
seed, whatever the machine. Without matplotlib there are tables and no pictures.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from replays import page
from replays.measures import Outcome, live
from replays.rivals import RIVALS
from replays.situations import SITUATIONS, Situation


def main() -> int:
    asked = _arguments()
    situations = [s for s in SITUATIONS if not asked.names or s.name in asked.names]
    replayed = []
    for situation in situations:
        outcomes = [live(situation, rival, seed=asked.seed) for rival in RIVALS]
        print(
            page.as_markdown(outcomes) if asked.markdown else page.as_text(outcomes), end="\n\n", flush=True
        )
        replayed.append(outcomes)
    if asked.out is not None:
        _draw(asked.out, situations, replayed, asked.seed)
    return 0


def _draw(out: Path, situations: list[Situation], replayed: list[list[Outcome]], seed: int) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install -e '.[bench]')", file=sys.stderr)
        return
    from replays import plots

    out.mkdir(parents=True, exist_ok=True)
    pictures = [out / f"{situation.name}.png" for situation in situations]
    for outcomes, picture in zip(replayed, pictures, strict=True):
        plots.draw(outcomes, picture)
    index = out / "index.html"
    index.write_text(page.as_html(replayed, pictures, f"make bench-fairness SEED={seed}"), encoding="utf-8")
    print(index, file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(s.name for s in SITUATIONS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", action="store_true", help="the tables of the README")
    asked = parser.parse_args()
    unknown = set(asked.names) - {s.name for s in SITUATIONS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
