"""A row of the table: what was measured, what it should be, what it was."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

WIDTH = 46


@dataclass(frozen=True)
class Row:
    what: str
    target: str
    measured: str
    met: bool
    beside: str = ""  # what belongs to the figure: spread, the raw disk of the same moment, the load


@dataclass(frozen=True)
class Setting:
    """Where a measurement may write, and how often it is repeated."""

    folder: Path
    repetitions: int


def as_text(row: Row) -> str:
    mark = " " if row.met else "!"
    lines = textwrap.wrap(row.what, WIDTH) or [""]
    text = f"{mark} {lines[0]:{WIDTH}}  {row.target:>18}  {row.measured:>18}   {row.beside}"
    return "\n".join([text, *(f"  {line}" for line in lines[1:])])


def as_markdown(rows: list[Row], machine: str) -> str:
    lines = ["| what | target | measured | beside |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.target} | {_bold(row)} | {row.beside} |" for row in rows]
    return "\n".join([*lines, "", machine])


def _bold(row: Row) -> str:
    return row.measured if row.met else f"**{row.measured}** (missed)"
