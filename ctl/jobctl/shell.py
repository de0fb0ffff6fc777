"""The verb completion: prints the completion file of a shell.

The files are plain and know the words by heart: pressing Tab starts no interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from jobctl.command import verb, write

FILES: Final = {"bash": "jobctl.bash", "zsh": "_jobctl", "fish": "jobctl.fish"}
FOLDER: Final = Path(__file__).with_name("completion")


@verb("completion")
@click.argument("shell", type=click.Choice(list(FILES)))
def completion(shell: str) -> None:
    """Print the completion file for a shell. The Debian package has installed them all.

    Examples:
      eval "$(jobctl completion bash)"
      jobctl completion zsh > ~/.zfunc/_jobctl
      jobctl completion fish > ~/.config/fish/completions/jobctl.fish
    """
    write((FOLDER / FILES[shell]).read_text(encoding="utf-8"))
