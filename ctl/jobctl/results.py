"""Verbs that hand out what a job made: output, errors. The daemon opens the file and passes the descriptor on.

Rule 1: exactly the bytes that are checkpointed are read: what the worker wrote after them is provisional.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click
import msgspec
from gpujobd import protocol as p

from jobctl.command import Session, session, verb, write, write_json
from jobctl.exits import Exit, Failure

COPY_BYTES: Final = 1 << 20
GROUPS_MAX: Final = 1000  # kinds of failure in a summary; the rest is counted together
MESSAGE_SHOWN_MAX: Final = 200


class ErrorOf(msgspec.Struct):
    code: str = "unknown"
    message: str = ""


class FailedItem(msgspec.Struct):
    """The part of an error record that a summary reads."""

    error: ErrorOf
    line: int = 0


class Group(msgspec.Struct, omit_defaults=True):
    """Failures of one kind. `message` is without what differs from item to item; `example` is one of them whole."""

    code: str
    message: str
    count: int
    line: int
    example: str


@verb("output")
@click.argument("job", metavar="ID")
@click.option(
    "-o", "--output", "target", type=click.Path(dir_okay=False), metavar="FILE", help="Write it there."
)
def output(job: str, target: str | None) -> None:
    """Write a job's results so far: JSONL, one record an item. They may be read while it runs.

    Examples:
      jobctl output 42 > results.jsonl
      jobctl output @ | jq -c .output
    """
    here = session()
    with opened(here, job, errors=False) as (source, size):
        _deliver(source, size, target)


@verb("errors")
@click.argument("job", metavar="ID")
@click.option(
    "-o", "--output", "target", type=click.Path(dir_okay=False), metavar="FILE", help="Write it there."
)
@click.option("--summary", is_flag=True, help="Group by code and message, the most frequent first.")
def errors(job: str, target: str | None, summary: bool) -> None:
    """Write a job's failed items: JSONL, one record an item, each with its line, code and message.

    Examples:
      jobctl errors 42 --summary
      jobctl errors 42 | jq -r .custom_id
    """
    here = session()
    with opened(here, job, errors=True) as (source, size):
        if not summary:
            _deliver(source, size, target)
            return
        groups = summarise(lines_of(source, size))
    if here.json:
        write_json({"v": 1, "groups": groups})
    elif groups:
        write(_summary_table(groups))


@contextmanager
def opened(here: Session, word: str, *, errors: bool) -> Iterator[tuple[int, int]]:
    """The descriptor of a job's file, and how many of its bytes count."""
    ids = here.jobs((word,))
    if len(ids) != 1:
        raise click.UsageError("name one job")
    reply = here.daemon.ask(p.Output(id=here.daemon.next_id(), job=ids[0], errors=errors), p.File)
    source = here.daemon.connection().descriptor()
    try:
        yield source, reply.bytes
    finally:
        os.close(source)


def _deliver(source: int, size: int, target: str | None) -> None:
    if target is None or target == "-":
        sys.stdout.flush()
        copy(source, sys.stdout.fileno(), size)
        return
    try:
        sink = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Failure(Exit.USAGE, f"{target}: {error.strerror}") from None
    try:
        copy(source, sink, size)
    finally:
        os.close(sink)


def copy(source: int, sink: int, size: int) -> None:
    """Copy the first `size` bytes, in the kernel where it can.

    Raises: Failure where the file is shorter, or the sink is full; BrokenPipeError.
    """
    at, in_kernel = 0, True
    try:
        while at < size:
            count = min(size - at, 1 << 30)
            moved = 0
            if in_kernel:
                try:
                    moved = os.sendfile(sink, source, at, count)
                except OSError as error:
                    if isinstance(error, BrokenPipeError) or at:
                        raise
                    in_kernel = (
                        False  # EINVAL: a sink opened to append, and others that the kernel does not take
                    )
                    continue
            else:
                moved = _copy_some(source, sink, at, min(count, COPY_BYTES))
            if not moved:
                raise Failure(Exit.FAILED, f"the file ends after {at} of {size} bytes")
            at += moved
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(Exit.FAILED, f"stopped after {at} of {size} bytes: {error.strerror}") from None


def _copy_some(source: int, sink: int, at: int, count: int) -> int:
    piece = memoryview(os.pread(source, count, at))
    written = 0
    while written < len(piece):
        written += os.write(sink, piece[written:])
    return written


# --- the summary ------------------------------------------------------------------------------------------------


def lines_of(source: int, size: int) -> Iterator[bytes]:
    """The complete lines in the first `size` bytes."""
    assert stat.S_ISREG(os.fstat(source).st_mode)  # pread below
    at, rest = 0, b""
    while at < size and (piece := os.pread(source, min(COPY_BYTES, size - at), at)):
        at += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def summarise(lines: Iterator[bytes]) -> list[Group]:
    """Group error records by code and by message without its numbers and quotations, the most frequent first."""
    decode = msgspec.json.Decoder(FailedItem).decode
    groups: dict[tuple[str, str], Group] = {}
    for line in lines:
        try:
            item = decode(line)
        except msgspec.MsgspecError:
            item = FailedItem(ErrorOf("unreadable", "a record that is no error record"))
        key = (item.error.code, normal(item.error.message))
        if key not in groups and len(groups) >= GROUPS_MAX:
            key = ("other", f"more than {GROUPS_MAX} kinds of failure")
        group = groups.get(key)
        if group is None:
            groups[key] = Group(*key, count=1, line=item.line, example=item.error.message)
        else:
            group.count += 1
    return sorted(groups.values(), key=lambda group: (-group.count, group.code, group.message))


QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"")
NUMBER: Final = re.compile(r"\b0x[0-9a-fA-F]+\b|\b[0-9a-fA-F]{8,}\b|\d+(?:\.\d+)?")


def normal(message: str) -> str:
    """The message without what differs from item to item: numbers and quotations; its first line only."""
    first = message.strip().partition("\n")[0][: 4 * MESSAGE_SHOWN_MAX]
    return NUMBER.sub("N", QUOTED.sub("'…'", first))[:MESSAGE_SHOWN_MAX]


def _summary_table(groups: list[Group]) -> str:
    from jobctl.table import Column, counted, table  # noqa: PLC0415  # not for copying a file

    columns = (
        Column("COUNT", right=True),
        Column("CODE"),
        Column("MESSAGE", shrink=True),
        Column("FOR EXAMPLE LINE", right=True),
    )
    return table(
        columns, [(counted(g.count), g.code, g.message, str(g.line) if g.line else "") for g in groups]
    )
