"""Hooks: a program of the administrator's, with the story as JSON on its standard input.

    exit status 0: delivered      any other, or the end of its time: later

Rule 1: it is named in the configuration alone, started without a shell, in a session of its own, with an environment by list.
Rule 2: at the end of its time, and after its end, its whole group is killed: nothing that a hook left stays.
Rule 3: what it writes goes to the log, the first lines of it; it can write for ever and fill nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from gpujobd_notify.message import one_line
from gpujobd_notify.outcome import DELIVERED, Outcome, later

log = logging.getLogger("gpujobd-notify")

OUTPUT_BYTES_MAX: Final = 2000
PATH: Final = "/usr/local/bin:/usr/bin:/bin"


async def run(
    name: str,
    program: Sequence[str],
    environment: Mapping[str, str],
    body: bytes,
    message_id: str,
    timeout_s: float,
) -> Outcome:
    """One try."""
    told = {"PATH": PATH, "LANG": "C.UTF-8", "GPUJOBD_NOTIFICATION_ID": message_id} | dict(environment)
    try:
        process = await trio.lowlevel.open_process(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=told,
            cwd="/",
        )
    except OSError as error:
        return later(f"{program[0]}: {error.strerror}", ill=True)
    said = bytearray()
    try:
        with trio.move_on_after(timeout_s) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_feed, process, body)
                nursery.start_soon(_listen, process, said)
                await process.wait()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await _end(process)
    for line in said.decode("utf-8", "replace").splitlines():
        log.info("hook %s: %s", name, one_line(line, 200))
    if limit.cancelled_caught:
        return later(f"did not end within {timeout_s:g} s", ill=True)
    return judge(process.returncode)


def judge(status: int | None) -> Outcome:
    return DELIVERED if status == 0 else later(f"ended with {status}", ill=True)


async def _feed(process: trio.Process, body: bytes) -> None:
    """It need not read all, or anything."""
    assert process.stdin is not None
    with contextlib.suppress(trio.BrokenResourceError):
        async with process.stdin:
            await process.stdin.send_all(body)


async def _listen(process: trio.Process, said: bytearray) -> None:
    assert process.stdout is not None
    async for piece in process.stdout:
        said += piece[: OUTPUT_BYTES_MAX - len(said)]


async def _end(process: trio.Process) -> None:
    """Its group, which outlives it where it left somebody behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()
