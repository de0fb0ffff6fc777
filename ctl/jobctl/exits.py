"""How jobctl ends: one number a cause, the same for every verb.

    0  done                                     4  not permitted
    1  a job, or some of its items, failed      5  timed out waiting
    2  usage, or no such job                    6  refused at the door
    3  the daemon cannot be reached             130  interrupted from the keyboard

Rule 1: "not found" is never 0.
Rule 2: where several jobs were named, each failure is told, and the worst code counts: 3, then 4, 6, 2, 5, 1, 0.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import IO, Any, Final

import click
from gpujobd.protocol import Error, ErrorCode
from msgspec import UNSET


class Exit(enum.IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    FORBIDDEN = 4
    TIMED_OUT = 5
    REFUSED = 6
    INTERRUPTED = 130  # what shells call a process that SIGINT ended


WORST_FIRST: Final = (
    Exit.INTERRUPTED,
    Exit.UNREACHABLE,
    Exit.FORBIDDEN,
    Exit.REFUSED,
    Exit.USAGE,
    Exit.TIMED_OUT,
    Exit.FAILED,
    Exit.OK,
)

EXIT_OF: Final[dict[str, Exit]] = {
    ErrorCode.FORBIDDEN: Exit.FORBIDDEN,
    ErrorCode.NO_SUCH_JOB: Exit.USAGE,
    ErrorCode.NO_SUCH_NOTIFICATION: Exit.USAGE,
    ErrorCode.BAD_REQUEST: Exit.USAGE,
    ErrorCode.BAD_STATE: Exit.USAGE,
    ErrorCode.TOO_MANY_CONNECTIONS: Exit.UNREACHABLE,
    ErrorCode.TOO_MANY_REQUESTS: Exit.UNREACHABLE,
    ErrorCode.TIMED_OUT: Exit.UNREACHABLE,
    ErrorCode.NOT_ACCEPTED: Exit.UNREACHABLE,
    ErrorCode.INTERNAL: Exit.UNREACHABLE,
}
"""Codes that are not here are refusals: a newer daemon may have found new ones."""


def exit_of(code: str) -> Exit:
    return EXIT_OF.get(code, Exit.REFUSED)


def worst(exits: Iterable[Exit]) -> Exit:
    return min(exits, key=WORST_FIRST.index, default=Exit.OK)


class Failure(click.ClickException):
    """The end of a command that did not do what was asked; the message goes to stderr."""

    def __init__(self, exit_code: Exit, message: str) -> None:
        super().__init__(message)
        self.exit = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """One line, whatever the daemon said: a message may quote what a stranger wrote."""
        from jobctl.table import clean  # noqa: PLC0415  # only a failure needs it

        click.echo(f"jobctl: {clean(self.message)}", file=file, err=file is None)


class Refusal(Failure):
    """The daemon said no."""

    def __init__(self, error: Error) -> None:
        super().__init__(exit_of(error.code), _said(error))
        self.error = error


def complain_of(job: int, error: Error, *, alone: bool) -> Exit:
    """Tell what went wrong with one of several jobs, by its id; of a single one the message is enough."""
    return complain("" if alone else f"job {job}: ", error)


def complain(which: str, error: Error) -> Exit:
    """Tell what went wrong with one of several things, and go on."""
    failure = Failure(exit_of(error.code), f"{which}{_said(error)}")
    failure.show()
    return failure.exit


def _said(error: Error) -> str:
    """Such as `queue_full (20/20): the queue holds 20 of 20 jobs`."""
    figures = (
        f" ({error.current}/{error.limit})" if error.limit is not UNSET and error.current is not UNSET else ""
    )
    return f"{error.code}{figures}: {error.message}"
