"""The driver asked from afar: a process for each look (gpujobd_worker/nvml.py), a limit for it, and a check of its words.

Rule 1: the daemon never asks a driver itself and never waits for one: a look that takes longer than LIMIT_S is killed.
One that cannot be killed hangs in the driver: it is left alone, and no other is started before it has ended.
Rule 2: NVML comes with some interpreter: the daemon's own, or a handler's. The first that has it is asked from then on.
Rule 3: a look that fails, hangs or says nonsense is an answer, too: `trouble` in one word, and nothing known of any GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final

import msgspec
import trio
from msgspec import Meta

from gpujobd.config import Config, interpreter
from gpujobd.worker_process import MAIN, environment

LIMIT_S: Final = 10.0  # a driver that wakes a sleeping GPU takes two; nvidia-smi of eight GPUs, four
KILL_S: Final = 1.0
BYTES_MAX: Final = 1 << 20  # 64 GPUs with 200 processes each are a fifth of it
TAIL_BYTES: Final = 300
SCRIPT: Final = MAIN.with_name("nvml.py")
SAID: Final = re.compile(rb"^gpujobd-nvml:(\{.*\})$", re.MULTILINE)

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Figure = Annotated[float, Meta(ge=-1e6, le=1e6)]
Text = Annotated[str, Meta(max_length=200)]


class Process(msgspec.Struct, frozen=True, array_like=True):
    """Somebody who has a context on a GPU."""

    pid: Count
    bytes: Count | None = None  # None: the driver does not tell


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    index: Annotated[int, Meta(ge=0, le=1023)]  # as nvidia-smi counts
    uuid: Text = ""
    name: Text = ""
    trouble: Annotated[str, Meta(pattern="^(|lost|reset_required|failed)$")] = ""
    detail: Text = ""
    total_bytes: Count = 0
    used_bytes: Count = 0
    free_bytes: Count = 0
    utilisation: Figure | None = None  # per cent of the time
    temperature_c: Figure | None = None
    power_w: Figure | None = None
    power_limit_w: Figure | None = None
    throttled: Annotated[tuple[Text, ...], Meta(max_length=16)] = ()
    compute_mode: Text = "shared"  # exclusive, prohibited
    processes: Annotated[tuple[Process, ...], Meta(max_length=1000)] = ()


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What one process said, or what became of it."""

    driver: Text = ""
    gpus: Annotated[tuple[Gpu, ...], Meta(max_length=64)] = ()
    trouble: Annotated[str, Meta(pattern="^[a-z_]{0,20}$")] = ""  # as in the script; and hangs, nonsense
    detail: Text = ""


class Nvml:
    """Asks; one look at a time."""

    def __init__(self, config: Config, script: Path = SCRIPT) -> None:
        self._script = script
        self._stuck: trio.Process | None = None
        self.reload(config)

    def reload(self, config: Config) -> None:
        handlers = ((interpreter(handler), handler.path) for handler in config.handlers.values())
        self._interpreters = list(dict.fromkeys([(sys.executable, ()), *handlers]))

    async def look(self) -> Look:
        """Ask one interpreter after the other until one has NVML; that one comes first the next time."""
        if self._stuck is not None and self._stuck.poll() is None:
            return Look(trouble="hangs", detail=f"process {self._stuck.pid} hangs in the driver")
        self._stuck = None
        nobody = Look(trouble="no_module", detail="no interpreter has the module pynvml (nvidia-ml-py)")
        for asked in list(self._interpreters):
            look = await self._ask(*asked)
            if look.trouble not in ("no_module", "no_library"):
                self._interpreters.remove(asked)
                self._interpreters.insert(0, asked)
                return look
            nobody = look if look.trouble == "no_library" else nobody
        return nobody

    async def _ask(self, python: str, path: tuple[str, ...]) -> Look:
        output = bytearray()
        try:
            process = await trio.lowlevel.open_process(
                [python, "-B", str(self._script), *path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment(os.environ, device="cuda", threads=1),
            )
        except OSError as error:
            return Look(trouble="failed", detail=f"{python} cannot be started: {error.strerror}"[:200])
        try:
            with trio.move_on_after(LIMIT_S):
                await _read(process, output)
                await process.wait()
        finally:
            await self._end(process)
        return _heard(bytes(output), process)

    async def _end(self, process: trio.Process) -> None:
        """Whatever happens, the daemon goes on: KILL_S for one that can be killed, none for one that cannot."""
        if process.returncode is None:
            process.kill()
            with trio.move_on_after(KILL_S, shield=True):
                await process.wait()
        if process.returncode is None:
            self._stuck = process
        assert process.stdout is not None
        await trio.aclose_forcefully(process.stdout)


async def _read(process: trio.Process, output: bytearray) -> None:
    assert process.stdout is not None
    while piece := await process.stdout.receive_some(1 << 16):
        output += piece
        if len(output) > BYTES_MAX:
            process.kill()
            return


def _heard(output: bytes, process: trio.Process) -> Look:
    said = SAID.findall(output)
    if process.returncode != 0 or not said:
        return _unheard(output, process)
    try:
        return msgspec.json.decode(said[-1], type=Look)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return Look(trouble="nonsense", detail=f"it said nonsense: {error}"[:200])


def _unheard(output: bytes, process: trio.Process) -> Look:
    if process.returncode is None:
        return Look(trouble="hangs", detail=f"process {process.pid} hangs in the driver")
    if process.returncode == -9:
        return Look(trouble="hangs", detail=f"no answer in {LIMIT_S:g} s")
    tail = " ".join(output[-TAIL_BYTES:].decode(errors="replace").split())
    return Look(trouble="failed", detail=f"the look ended with status {process.returncode}: {tail}"[:200])
