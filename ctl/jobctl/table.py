"""Plain tables: aligned, as wide as the screen at most, calm where nobody looks.

Rule 1: text from elsewhere is never sent to a terminal as it came: a job's name may hold escape sequences.
Rule 2: colour only says again what a word says already, and only on a terminal without NO_COLOR.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

import click

WIDTH_PLAIN: Final = 80  # where there is no terminal
HEIGHT_PLAIN: Final = 24
GAP: Final = "  "
SHORTEST: Final = 6  # a column that is shortened keeps this much

COLOURS: Final = {
    "running": "green",
    "ok": "green",
    "paused": "yellow",
    "failed": "red",
    "expired": "red",
    "unhealthy": "red",
    "driver_mismatch": "red",
    "busy_elsewhere": "yellow",
}


class Column:
    """`shrink`: it may be shortened where the screen is too narrow, the longest first."""

    def __init__(self, head: str, *, right: bool = False, shrink: bool = False) -> None:
        self.head = head
        self.right = right
        self.shrink = shrink


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Lines, each with its newline. Columns without a single text are left out."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    columns = [columns[i] for i in kept]
    cells = [[clean(row[i]) for i in kept] for row in rows]
    widths = [max(len(column.head), *(wide(row[i]) for row in cells)) for i, column in enumerate(columns)]
    _fit(columns, widths, screen_width() - len(indent))
    lines = [[column.head for column in columns], *cells]
    return "".join(
        indent + _line(columns, widths, line, heading=number == 0) + "\n" for number, line in enumerate(lines)
    )


def _fit(columns: Sequence[Column], widths: list[int], room: int) -> None:
    """Shorten the longest column that may be shortened, until the line fits or nothing more can be given."""
    while sum(widths) + len(GAP) * (len(widths) - 1) > room:
        able = [i for i, c in enumerate(columns) if c.shrink and widths[i] > SHORTEST]
        if not able:
            return
        widths[max(able, key=lambda i: widths[i])] -= 1


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str], *, heading: bool) -> str:
    parts = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        text = shorten(cell, width)
        blank = " " * (width - wide(text))
        shown = text if heading else paint(text)
        parts.append(blank + shown if column.right else shown + blank)
    return GAP.join(parts).rstrip()


def clean(text: str) -> str:
    """Text from elsewhere on one line, with nothing in it that a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def wide(text: str) -> int:
    """Cells on the screen: Chinese and its like take two, combining marks none."""
    if text.isascii():
        return len(text)
    import unicodedata  # noqa: PLC0415  # rarely needed, and a megabyte

    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def shorten(text: str, width: int) -> str:
    if wide(text) <= width:
        return text
    while text and wide(text) > width - 1:
        text = text[:-1]
    return text + "…"


def paint(text: str) -> str:
    colour = COLOURS.get(text)
    return click.style(text, fg=colour) if colour and coloured() else text


def coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def screen_width() -> int:
    """Columns of the terminal; 80 where there is none. $COLUMNS has the last word."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told):
        return int(told)
    if not sys.stdout.isatty():
        return WIDTH_PLAIN
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH_PLAIN
    except OSError:
        return WIDTH_PLAIN


def screen_height() -> int:
    """Lines of the terminal that stdout is."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).lines or HEIGHT_PLAIN
    except OSError:
        return HEIGHT_PLAIN


def counted(number: int) -> str:
    """`50,000`."""
    return f"{number:,}"


def size(count: int) -> str:
    """`512 B`, `1.2 MiB`."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
