"""Which devices there are: asked of torch itself, in a child process, since the daemon never imports it.

Rule 1: a device counts only if the torch of some handler's interpreter sees it: a GPU no handler can use is none.
Rule 2: importing torch takes seconds, so it is imported only where it is there and was built for a GPU.
Rule 3: a probe that fails, hangs or says nonsense found nothing; it never keeps the daemon from starting.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from typing import Final

import trio

from gpujobd.catalog import kind
from gpujobd.config import Config, interpreter
from gpujobd.worker_process import environment

PROBE_S: Final = 60.0
DEVICES_MAX: Final = 64

PROBE: Final = """
import importlib.util, os, runpy, sys
sys.path[:0] = sys.argv[1:]
found = importlib.util.find_spec("torch")
count = 0
if found is not None and found.submodule_search_locations:
    built = runpy.run_path(os.path.join(list(found.submodule_search_locations)[0], "version.py"))
    if built.get("cuda") or built.get("hip"):
        import torch
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print("\\ngpujobd-devices:%d" % count)
"""

logger = logging.getLogger("gpujobd.supervisor")


async def find_devices(config: Config) -> tuple[str, ...]:
    """The devices of this run: as configured, or, for "auto", what torch sees, else the CPU."""
    if config.file.devices != "auto":
        return tuple(dict.fromkeys(config.file.devices))
    probes = sorted({(interpreter(handler), handler.path) for handler in config.handlers.values()})
    counts: list[int] = []
    async with trio.open_nursery() as nursery:
        for python, path in probes:
            nursery.start_soon(_count, python, path, counts)
    return tuple(f"cuda:{n}" for n in range(max(counts, default=0))) or ("cpu",)


async def _count(python: str, path: tuple[str, ...], counts: list[int]) -> None:
    extra = kind("probe_failed")
    try:
        with trio.fail_after(PROBE_S):
            probe = await trio.run_process(
                [python, "-B", "-c", PROBE, *path],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                cwd="/",
                env=environment(os.environ, device="cuda", threads=1),
                deliver_cancel=_kill,
            )
    except (OSError, trio.TooSlowError) as error:
        logger.warning("%s does not tell its devices: %s", python, error or "too slow", extra=extra)
        return
    said = re.findall(rb"^gpujobd-devices:(\d{1,3})$", probe.stdout, re.MULTILINE)
    if probe.returncode != 0 or not said:
        error_text = probe.stderr[-500:].decode(errors="replace").strip()
        logger.warning("%s does not tell its devices: %s", python, error_text, extra=extra)
        return
    counts.append(min(int(said[-1]), DEVICES_MAX))


async def _kill(process: trio.Process) -> None:
    process.kill()
