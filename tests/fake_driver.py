"""A driver that tells what a test wants: a folder with fake_pynvml.py in it, for the import path of a handler."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from gpujobd.config import Handler

FAKE = Path(__file__).with_name("fake_pynvml.py")
GIB = 1 << 30


class Driver:
    """A folder with a pynvml in it, and what that tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(FAKE, folder / "pynvml.py")
        self.tells(gpus=[a_gpu()])

    def tells(self, init: str = "ok", **script: Any) -> None:
        """In one step: a look may read at any moment."""
        fresh = self.folder / "script.new"
        fresh.write_text(json.dumps({"init": init, "gpus": [], **script}))
        fresh.rename(self.folder / "script.json")

    def looks(self) -> int:
        path = self.folder / "looks"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def handler(self, **keys: Any) -> Handler:
        return Handler(entry="fake:Fake", python=sys.executable, path=(str(self.folder),), **keys)


def a_gpu(uuid: str = "GPU-a", total: int = 80 * GIB, used: int = 0, **more: Any) -> dict[str, Any]:
    return {"uuid": uuid, "total": total, "used": used, **more}
