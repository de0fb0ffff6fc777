"""What every verb has: --json, --socket, and the way to the daemon.

Rule 1: data goes to stdout; all else goes to stderr, and what is no error goes there only if a person is watching.
Rule 2: a verb returns its Exit, or None for 0; a Failure ends it with a line on stderr.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import click
import msgspec
from gpujobd import protocol as p

from jobctl.connection import Daemon
from jobctl.exits import Exit

LISTS_VERSION: Final = 1  # the "v" of every object that holds more than one thing


class Session:
    """One call of jobctl: its options, and the daemon behind them."""

    def __init__(self) -> None:
        self.json = False
        self.socket: str | None = None
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        if self._daemon is None:
            # Not click's envvar: it would beat a --socket that stands before the verb.
            self._daemon = Daemon(self.socket or os.environ.get("JOBCTL_SOCKET"))
        return self._daemon

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.hang_up()

    def jobs(self, words: tuple[str, ...]) -> list[int]:
        """The job ids that the words name, each once, in their order.

        Raises: click.UsageError; Refusal where `@` finds no job.
        """
        from jobctl.ids import parse  # noqa: PLC0415  # `ping` and its like name no jobs

        return parse(words, self._mine)

    def _mine(self, back: int) -> list[int]:
        """The caller's newest jobs, at least `back` + 1 of them where there are so many."""
        if not back:
            return [self.daemon.ask(p.Last(id=self.daemon.next_id()), p.OneJob).job.id]
        request = p.List(id=self.daemon.next_id(), mine=True, newest=True, limit=back + 1)
        return [job.id for job in self.daemon.ask(request, p.Jobs).jobs]


def session() -> Session:
    """The session of the command that runs."""
    return click.get_current_context().ensure_object(Session)


def _keep_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).json = True


def _keep_socket(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value:
        context.ensure_object(Session).socket = value


def _show_help(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(context.get_help(), color=context.color)
        context.exit()


class Helped(click.Command):
    """A command whose help option costs nothing: click's own looks for a translation first, and that takes 4 ms."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:  # noqa: ARG002  # click's signature
        return HELP


HELP: Final = click.Option(
    ["-h", "--help"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_help,
    help="Show this message.",
)


def common_options() -> list[click.Parameter]:
    """Options that may stand before the verb and after it."""
    return [
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_keep_json,
            help="Write JSON; times are RFC 3339 UTC, an absent key is not known.",
        ),
        click.Option(
            ["--socket"],
            metavar="PATH",
            expose_value=False,
            callback=_keep_socket,
            help="Socket of the daemon. [default: $JOBCTL_SOCKET, the user's own daemon, the system's]",
        ),
    ]


class Verb(Helped):
    """A command with the options that all have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += common_options()
        self.help = keep_lines(self.help or "")


def keep_lines(text: str) -> str:
    """Mark the paragraphs that hold indented lines, so that click leaves their lines as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join("\b\n" + each if "\n  " in each else each for each in paragraphs)


Wrapped = Callable[[Callable[..., Exit | None]], Verb]


def verb(name: str) -> Wrapped:
    """Decorate a function as the verb of this name; its docstring is the help."""
    return click.command(name, cls=Verb)


def message_option(function: Callable[..., Exit | None]) -> Callable[..., Exit | None]:
    return click.option(
        "-m", "--message", default="", metavar="REASON", help="Why; kept, and shown to others."
    )(function)


def notify_options(function: Callable[..., Exit | None]) -> Callable[..., Exit | None]:
    """Whom to tell, and when; the same wherever a job is made."""
    whom = click.option(
        "--notify",
        "notify",
        multiple=True,
        metavar="TARGET",
        help="Tell a NAME of the notifier's, https://..., or mailto:ADDRESS; `none`: nobody. May be repeated.",
    )
    when = click.option(
        "--notify-on",
        "notify_on",
        multiple=True,
        metavar="LIST",
        help="Of start, finish, fail, pause, stall, progress=N%, with commas. [default: finish]",
    )
    return whom(when(function))


def occasions(lists: tuple[str, ...]) -> list[str]:
    """`start,fail` and `progress=25%` as one list, each word once."""
    words = (word.strip() for given in lists for word in given.split(","))
    return list(dict.fromkeys(word for word in words if word))


def ids_argument(function: Callable[..., Exit | None]) -> Callable[..., Exit | None]:
    return click.argument("ids", nargs=-1, required=True, metavar="ID...")(function)


# --- writing ----------------------------------------------------------------------------------------------------


def write(text: str) -> None:
    """Data: to stdout, at once."""
    click.echo(text, nl=False)


def write_json(value: object) -> None:
    """One JSON value: on one line, or, before a person, on several."""
    encoded = msgspec.json.encode(value)
    if sys.stdout.isatty():
        encoded = msgspec.json.format(encoded, indent=2)
    click.echo(encoded)


def write_line(value: object) -> None:
    """One JSON value of a stream: always on one line."""
    click.echo(msgspec.json.encode(value))


def write_list(key: str, values: list[Any], **more: object) -> None:
    write_json({"v": LISTS_VERSION, key: values, **more})


def tell(text: str) -> None:
    """Say something kind to a person; scripts are not bothered."""
    if sys.stderr.isatty():
        _to_stderr(text)


def complain(text: str) -> None:
    """One line about something that went wrong, when the command goes on."""
    _to_stderr(f"jobctl: {text}")


def _to_stderr(text: str) -> None:
    """One line; a reason or a name in it may be a stranger's words."""
    from jobctl.table import clean  # noqa: PLC0415  # a verb that has nothing to say needs none of it

    click.echo(clean(text), err=True)
