"""What running it costs: a client's start, the daemon's start-up over a long journal, memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import door
import journals
import load
import machine
from gpujobd import protocol
from harness import Host
from rows import Row, Setting

PINGS = 20
QUEUED = 100_000
EVENTS = 1_000_000
SETTLE_S = 2.0


def ping(setting: Setting) -> Iterator[Row]:
    """Turn about: the client, and an interpreter that imports what a client cannot do without."""
    jobctl = str(Path(sys.executable).parent / "jobctl")
    ours, bare = [], []
    with Host(setting.folder / "ping") as host:
        client = [jobctl, "--socket", str(host.socket), "ping"]
        for _ in range(PINGS):
            bare.append(_seconds([sys.executable, "-c", "import click, msgspec, socket"]))
            ours.append(_seconds(client))
    ratio = statistics.median(ours) / statistics.median(bare)
    yield Row(
        "jobctl ping, whole process, against `python -c 'import click, msgspec, socket'`",
        "<= 1.25 x",
        f"{ratio:.2f} x",
        ratio <= 1.25,
        f"{statistics.median(ours) * 1e3:.0f} ms against {statistics.median(bare) * 1e3:.0f} ms",
    )


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


# --- start-up ---------------------------------------------------------------------------------------------------


def start_up(setting: Setting) -> Iterator[Row]:
    host = door.open_host(setting.folder / "events")
    made = journals.of_a_busy_host(setting.folder / "events" / "state" / "journal", EVENTS)
    yield _start_up_row(f"start-up after kill -9, journal of {EVENTS:,} events", 3.0, host, setting, made)


def queued(setting: Setting) -> Iterator[Row]:
    host = door.open_host(setting.folder / "queued")
    with host:
        door.stop_queue(host)
        load.closed(host.socket, load.submissions("nothing", QUEUED), 16, 16)
        yield _memory_row(f"memory of the daemon, {QUEUED:,} jobs queued", 250, host)
    yield _start_up_row(f"start-up after kill -9, {QUEUED:,} jobs queued", 2.0, host, setting, "")


def _start_up_row(what: str, most_s: float, host: Host, setting: Setting, beside: str) -> Row:
    """Until the first Pong, interpreter and all. Leaving a host is a SIGKILL: nothing is tidied between two starts."""
    took = []
    for _ in range(setting.repetitions):
        began = time.perf_counter()
        with host, host.client() as client:
            pong = client.ask(protocol.Ping)
            took.append(time.perf_counter() - began)
            assert isinstance(pong, protocol.Pong), pong
    median = statistics.median(took)
    spread = f"{min(took):.2f} to {max(took):.2f} s"
    return Row(
        what, f"<= {most_s:.0f} s", f"{median:.2f} s", median <= most_s, f"{spread}; {beside}".rstrip("; ")
    )


# --- memory -----------------------------------------------------------------------------------------------------


def idle(setting: Setting) -> Iterator[Row]:
    with Host(setting.folder / "idle") as host:
        yield _memory_row("memory of the daemon, idle", 60, host)


def _memory_row(what: str, most_mb: float, host: Host) -> Row:
    assert host.process is not None
    time.sleep(SETTLE_S)
    used_mb = machine.rss_mb(host.process.pid)
    return Row(what, f"<= {most_mb:.0f} MB", f"{used_mb:.0f} MB", used_mb <= most_mb, "resident (VmRSS)")
