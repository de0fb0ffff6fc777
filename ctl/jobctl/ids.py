"""How people name jobs: `3`, `5-9`, `3,5-9`, `@` (my last job), `@~1` (the one before it)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import click

from jobctl.exits import Exit, Failure

IDS_MAX: Final = 10_000  # one command names at most so many: `1-99999999` is a slip of the finger
BACK_MAX: Final = 499  # how far `@~N` looks back: one page


def parse(words: Iterable[str], mine: Callable[[int], list[int]]) -> list[int]:
    """Return the ids, each once, in their order. `mine(n)` gives the caller's newest jobs, n + 1 of them at least.

    Raises: click.UsageError for a word that names no job.
    """
    ids: dict[int, None] = {}
    for word in words:
        for part in word.split(","):
            for job in _part(part, mine):
                ids[job] = None
                if len(ids) > IDS_MAX:
                    raise click.UsageError(f"more than {IDS_MAX} jobs are named")
    return list(ids)


def _part(part: str, mine: Callable[[int], list[int]]) -> Iterator[int]:
    if part.startswith("@"):
        yield _recent(part, mine)
        return
    first, dash, last = part.partition("-")
    if not _is_id(first) or (dash and not _is_id(last)):
        raise click.UsageError(f"{part!r} is no job: use an id, a range such as 5-9, or @ for your last job")
    low, high = int(first), int(last or first)
    if low > high:
        raise click.UsageError(f"the range {part} runs backwards")
    yield from range(low, high + 1)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < len(text) < 19 and int(text) > 0


def _recent(part: str, mine: Callable[[int], list[int]]) -> int:
    back = 0
    if part != "@":
        digits = part.removeprefix("@~")
        if (
            digits == part
            or not digits.isascii()
            or not digits.isdigit()
            or len(digits) > 3
            or int(digits) > BACK_MAX
        ):
            raise click.UsageError(f"{part!r} is no job: use @, or @~1 to @~{BACK_MAX}")
        back = int(digits)
    newest = mine(back)
    if len(newest) <= back:
        raise Failure(Exit.USAGE, f"no_such_job: {part}: you have {len(newest)} jobs")
    return newest[back]
