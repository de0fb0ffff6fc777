"""gpujobd: serve, check, fsck."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from gpujobd import __version__

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpujobd")
def main() -> None:
    """The daemon that owns the GPU of this host. Its client is jobctl.

    All of it: man gpujobd; the configuration: man gpujobd.toml; handlers: man gpujobd-handler.
    """
    if not __debug__:
        sys.exit(
            "gpujobd: python -O removes the assertions that stop a daemon whose state is wrong; start it without"
        )


@main.command()
@click.option("--config", "config_file", type=FILE, help="Configuration; handlers.d is beside it.")
@click.option("--state-dir", type=FOLDER, help="Journal and spool.")
@click.option("--socket", "socket_path", type=FILE, help="Control socket.")
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json", "journal"]),
    default="auto",
    show_default=True,
    help="auto: systemd's journal with all fields where stderr leads there, else text on stderr.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log what is of use to developers too.")
def serve(
    config_file: Path | None, state_dir: Path | None, socket_path: Path | None, log_format: str, verbose: bool
) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C, which pause what runs; a second one does not wait.

    Without options: the system's folders for root, the user's own ($XDG_STATE_HOME/gpujobd,
    $XDG_RUNTIME_DIR/gpujobd/control.sock) for everybody else.
    """
    from gpujobd import daemon, entries  # noqa: PLC0415  # `check` and `--help` need neither trio nor the journal

    entries.set_up(log_format, verbose=verbose)
    options = daemon.Options(config=config_file, state_dir=state_dir, socket=socket_path)
    sys.exit(daemon.serve(options))


@main.command()
@click.option("--config", "config_file", type=FILE, help="Configuration; handlers.d is beside it.")
def check(config_file: Path | None) -> None:
    """Check the configuration and the handlers' files. Exit status 0 if they are good, 78 if not."""
    from gpujobd import config, settings  # noqa: PLC0415

    try:
        found = config.load(config_file)
    except settings.ConfigError as error:
        click.echo(f"gpujobd: {error}", err=True)
        sys.exit(78)
    where = config_file or config.default_config_path()
    click.echo(f"{where if where.exists() else 'no configuration file, defaults'}: good")
    for name, handler in sorted(found.handlers.items()):
        click.echo(f"handler {name}: {handler.entry}, {config.interpreter(handler)}")


@main.command()
@click.option("--state-dir", type=FOLDER, help="Journal and spool.")
@click.option(
    "--accept-loss",
    "losses",
    multiple=True,
    metavar="A..B",
    help="Write a copy without records A to B; may be given several times. `none`: without what holds no record.",
)
@click.option(
    "--output", type=FOLDER, help="Where the copy goes; the default is journal.repaired beside the journal."
)
def fsck(state_dir: Path | None, losses: tuple[str, ...], output: Path | None) -> None:
    """Read the journal and report; exit status 0 if a start would accept it, 1 if not, 78 if it cannot be read.

    The journal itself is never written: --accept-loss makes a repaired copy, to be put in its place by hand. What that
    costs, job by job, is told by the report, and again when the copy is made.
    """
    from gpujobd import config, fsck, salvage  # noqa: PLC0415
    from gpujobd.recovery import JournalError  # noqa: PLC0415

    journal = (state_dir or config.default_state_dir()) / "journal"
    try:
        if not losses:
            found = fsck.report(journal)
            click.echo(str(found))
            if not found.ok:
                click.echo(f"a copy without what is unreadable: {_copying(journal, found.unreadable)}")
                click.echo(f"without what is unreadable:\n{salvage.loss(journal, found.unreadable)}")
            sys.exit(0 if found.ok else 1)
        ranges = [_range(text) for text in losses]
        copied, lost = salvage.repair(journal, ranges, output or journal.with_name("journal.repaired"))
    except JournalError as error:
        click.echo(f"gpujobd: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"gpujobd: {error.filename or journal}: {error.strerror or error}", err=True)
        sys.exit(78)
    click.echo(str(lost))
    click.echo(f"{copied.target}: {copied.records} records, {copied.dropped} readable ones given up")
    click.echo(
        f"to use it: stop gpujobd, keep {journal} under another name, and rename the copy to {journal}"
    )


def _copying(journal: Path, ranges: Sequence[tuple[int, int]]) -> str:
    """The command, as it can be given from anywhere and by anybody: by the service's user, too."""
    losses = [f"{first}..{last}" for first, last in ranges] or ["none"]
    options = " ".join(f"--accept-loss {loss}" for loss in losses)
    return f"gpujobd fsck --state-dir {shlex.quote(str(journal.parent.absolute()))} {options}"


def _range(text: str) -> tuple[int, int]:
    if text == "none":
        return 1, 0
    first, dots, last = text.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal()):
        raise click.BadParameter(f"{text!r} is not a range such as 17..20", param_hint="--accept-loss")
    return int(first), int(last)


if __name__ == "__main__":
    main()
