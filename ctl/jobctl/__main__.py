"""jobctl: submit jobs to gpujobd, follow them, and read back what they made.

Rule 1: a verb's module is imported when the verb is used: the table below is all that `jobctl` knows of the others.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import click

from jobctl.command import Helped, Session, common_options, keep_lines
from jobctl.exits import Exit, Failure


class Entry(NamedTuple):
    section: str
    module: str
    function: str
    help: str


SUBMIT, LOOK, CHANGE, HOST = "Submit and read back", "Look", "Change jobs", "The host"

VERBS: Final = {
    "submit": Entry(SUBMIT, "submit", "submit", "Submit a file of items as one job; print its id."),
    "wait": Entry(SUBMIT, "follow", "wait", "Wait until jobs are final."),
    "watch": Entry(SUBMIT, "follow", "watch", "Follow one job with a progress bar."),
    "output": Entry(SUBMIT, "results", "output", "Write a job's results."),
    "errors": Entry(SUBMIT, "results", "errors", "Write a job's failed items, or a summary."),
    "status": Entry(LOOK, "look", "status", "What runs, what waits and why; the same as jobctl alone."),
    "list": Entry(LOOK, "look", "list_jobs", "List jobs (ls)."),
    "show": Entry(LOOK, "look", "show", "Show all that is known of a job."),
    "log": Entry(LOOK, "streams", "log", "What a job's worker wrote."),
    "events": Entry(LOOK, "streams", "events", "What happened, numbered for ever."),
    "notifications": Entry(
        LOOK, "notifications", "notifications", "Whom was told what; retry, mute, defaults."
    ),
    "cancel": Entry(CHANGE, "change", "cancel", "Cancel jobs for good."),
    "pause": Entry(CHANGE, "change", "pause", "Hold jobs until they are resumed."),
    "resume": Entry(CHANGE, "change", "resume", "Let paused jobs go on."),
    "retry": Entry(CHANGE, "change", "retry", "Make a new job of what a final one left undone."),
    "priority": Entry(CHANGE, "change", "priority", "Set the level of jobs: high, normal or low."),
    "first": Entry(CHANGE, "change", "first", "Move jobs to the head of their tenant's own line."),
    "rm": Entry(CHANGE, "change", "rm", "Remove final jobs and their files."),
    "queue": Entry(HOST, "host", "queue", "Stop, start, disable, enable or drain the queue."),
    "handlers": Entry(HOST, "host", "handlers", "What jobs can be submitted to."),
    "tenants": Entry(HOST, "host", "tenants", "Shares, and who got how much."),
    "device": Entry(HOST, "host", "device", "The devices and how they are."),
    "ping": Entry(HOST, "host", "ping", "Ask the daemon whether it answers."),
    "completion": Entry(HOST, "shell", "completion", "Print the completion file for a shell."),
}
ALIASES: Final = {"ls": "list"}


class Verbs(Helped, click.Group):
    """The verbs, each imported when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = keep_lines(self.help or "")

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature, as below
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        entry = VERBS.get(ALIASES.get(cmd_name, cmd_name))
        if entry is None:
            return None
        found: click.Command = getattr(importlib.import_module(f"jobctl.{entry.module}"), entry.function)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """From the table: --help imports nothing."""
        for section in (SUBMIT, LOOK, CHANGE, HOST):
            with formatter.section(section):
                formatter.write_dl(
                    [(name, entry.help) for name, entry in VERBS.items() if entry.section == section]
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        formatter.write_paragraph()
        formatter.write("Jobs are named by id (42), range (5-9), list (3,5-9), or @ for your last one.\n\n")
        formatter.write(
            "Exit codes: 0 ok, 1 a job or some of its items failed, 2 usage or no such job,\n"
            "3 daemon unreachable, 4 not permitted, 5 timed out waiting, 6 refused at the door.\n\n"
            "All of it, with the reasons for which jobs wait: man jobctl.\n"
        )


def _version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from gpujobd import __version__  # noqa: PLC0415  # for this alone

    click.echo(f"jobctl {__version__}")
    context.exit()


@click.group(
    "jobctl",
    cls=Verbs,
    invoke_without_command=True,
    params=[
        *common_options(),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_version,
            help="Print the version.",
        ),
    ],
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Submit jobs to gpujobd, which owns this host's GPU; follow them, and read back what they made.

    Examples:
      jobctl                                  what runs, what waits and why
      jobctl submit embed texts.jsonl --wait  submit and wait
      jobctl output @ > vectors.jsonl         results of my last job
    """
    context.call_on_close(context.ensure_object(Session).close)
    if context.invoked_subcommand is None:
        from jobctl.look import show_status  # noqa: PLC0415  # the other verbs do not need it

        show_status(context.ensure_object(Session))


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    try:
        outcome: Any = cli.main(list(arguments), "jobctl", standalone_mode=False)
    except click.ClickException as failure:
        failure.show()
        return failure.exit if isinstance(failure, Failure) else failure.exit_code
    except click.Abort:
        return Exit.INTERRUPTED
    except OSError as error:  # of stdout, mostly: a full disk; the socket's never come this far
        where = f"{error.filename}: " if error.filename else "cannot write: "
        sys.stderr.write(f"jobctl: {where}{error.strerror or error}\n")
        return Exit.FAILED
    return outcome if isinstance(outcome, int) else Exit.OK


def _end(code: int) -> NoReturn:
    """Leave without taking the interpreter apart: that is a tenth of a short command, and the kernel does it too."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not code:  # else it was told already: what could not be written is still in the buffer
            sys.stderr.write(f"jobctl: cannot write: {error.strerror}\n")
            code = Exit.FAILED
    sys.stderr.flush()
    os._exit(code)


def _fill_closed() -> None:
    """Open a standard stream that the caller closed: else the next file or socket is it.

    What is written to such an output is an error, as with other filters; remarks on stderr are nobody's loss.
    """
    for fd, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_RDONLY),
        (2, "stderr", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, flags)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", encoding="utf-8"))


def main() -> NoReturn:
    _fill_closed()
    # A reader that has read enough ends us quietly, as it does with every other filter; sockets say MSG_NOSIGNAL.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name that the locale cannot show must not end a table
    _end(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
