"""gpujobd-notify: serve, check."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from gpujobd import __version__

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpujobd-notify")
def main() -> None:
    """Tells people and programs what becomes of the jobs of gpujobd: by mail, by webhook, by a hook.

    All of it: man gpujobd-notify; the configuration: man gpujobd-notify.toml.
    """
    if not __debug__:
        sys.exit("gpujobd-notify: python -O removes its assertions; start it without")


@main.command()
@click.option("--config", "config_file", type=FILE, help="Configuration.")
@click.option("--state-dir", type=FOLDER, help="Cursor and outbox.")
@click.option("--socket", "socket_path", type=FILE, help="Where it answers jobctl.")
@click.option("--daemon-socket", type=FILE, help="Where gpujobd answers.")
@click.option("-v", "--verbose", is_flag=True, help="Log what is of use to developers too.")
def serve(
    config_file: Path | None,
    state_dir: Path | None,
    socket_path: Path | None,
    daemon_socket: Path | None,
    verbose: bool,
) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C. SIGHUP reads the configuration again."""
    from gpujobd_notify import notifier  # noqa: PLC0415  # `check` and `--help` need no network

    notifier.set_up_log(verbose=verbose)
    options = notifier.Options(
        config=config_file, state_dir=state_dir, socket=socket_path, daemon_socket=daemon_socket
    )
    sys.exit(notifier.serve(options))


@main.command()
@click.option("--config", "config_file", type=FILE, help="Configuration.")
def check(config_file: Path | None) -> None:
    """Check the configuration, secrets included. Exit status 0 if it is good, 78 if not."""
    from gpujobd.settings import ConfigError  # noqa: PLC0415

    from gpujobd_notify import config  # noqa: PLC0415

    try:
        found = config.load(config_file)
    except ConfigError as error:
        click.echo(f"gpujobd-notify: {error}", err=True)
        sys.exit(78)
    where = config_file or config.default_config_path()
    click.echo(f"{where if where.exists() else 'no configuration file, defaults'}: good")
    for name, endpoint in sorted(found.file.endpoints.items()):
        whose = "users" if endpoint.users else "administrators"
        hears = ", hears of every job" if endpoint.every_job else ""
        click.echo(f"endpoint {name}: {endpoint.__struct_config__.tag}, for {whose}{hears}")


if __name__ == "__main__":
    main()
