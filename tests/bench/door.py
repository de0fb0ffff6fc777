"""How many may come in, and what `show` takes meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load
import machine
from gpujobd import protocol
from harness import Host, fake
from rows import Row, Setting

BENCH = Path(__file__).resolve().parent
WIDE_OPEN = """
[limits]
queued_jobs_max = 10000000
queued_jobs_per_uid_max = 10000000
queued_items_max = 100000000
queued_items_per_uid_max = 100000000
submissions_per_uid_minute_max = 100000000
"""
SYNC_MS = 0.2  # the stretch goal is stated for such a disk

SHOWN_QUEUED = 10_000
SUBMITTED_PER_S = 2_000
SHOWN_PER_S = 200
SHOWN_S = 8


def open_host(folder: Path) -> Host:
    """A daemon that refuses nobody; one handler that does nothing, one that keeps the device."""
    slow = f'entry = "noting:Slow"\npath = ["{BENCH}"]\nbatch_max = 16\n'
    return Host(folder, WIDE_OPEN, {"nothing": fake("toys:Nothing"), "slow": slow})


def stop_queue(host: Host) -> None:
    with host.client() as client:
        done = client.ask(protocol.Queue, action="stop")
        assert isinstance(done, protocol.Done), done


def submissions(setting: Setting) -> Iterator[Row]:
    for connections, in_flight, count, least in (
        (1, 1, 3_000, 1_000),
        (8, 1, 10_000, 4_000),
        (64, 1, 20_000, 8_000),
        (64, 16, 50_000, 25_000),
    ):
        yield _submissions(setting, connections, in_flight, count, least)


def _submissions(setting: Setting, connections: int, in_flight: int, count: int, least: int) -> Row:
    raw, rates = [], []
    with open_host(setting.folder / f"door{connections}x{in_flight}") as host:
        stop_queue(host)
        load.closed(host.socket, load.submissions("nothing", 500), connections, in_flight)
        for _ in range(setting.repetitions):
            raw.append(machine.raw_syncs_per_s(setting.folder))
            frames = load.submissions("nothing", count)
            rates.append(count / load.closed(host.socket, frames, connections, in_flight))
    rate = statistics.median(rates)
    each = "one at a time" if in_flight == 1 else f"{in_flight} in flight each"
    return Row(
        f"durable one-item submissions acknowledged, {connections} connections, {each}",
        f">= {least:,}/s",
        f"{rate:,.0f}/s",
        rate >= least,
        f"{min(rates):,.0f} to {max(rates):,.0f}; {statistics.median(raw):,.0f} raw fdatasync/s just before:"
        f" {rate / statistics.median(raw):.2f} x",
    )


def show(setting: Setting) -> Iterator[Row]:
    p50, p99, worst = [], [], []
    with open_host(setting.folder / "show") as host:
        with host.client() as client:
            busy = client.submit("slow", [{"n": n} for n in range(50_000)])
            assert isinstance(busy, protocol.Accepted), busy
        load.closed(host.socket, load.submissions("nothing", SHOWN_QUEUED), 16, 4)
        for _ in range(setting.repetitions):
            found = _show_under_load(host)
            p50.append(machine.percentile(found, 50))
            p99.append(machine.percentile(found, 99))
            worst.append(max(found))
        with host.client() as client:
            assert client.job(busy.job).state == "running"
    median = statistics.median(p99)
    yield Row(
        f"show, p99, {SHOWN_QUEUED:,} jobs queued, one running, {SUBMITTED_PER_S:,} submissions a second arriving",
        "<= 10 ms",
        f"{median:.1f} ms",
        median <= 10,
        f"p50 {statistics.median(p50):.2f} ms, worst {max(worst):.1f} ms,"
        f" p99 {min(p99):.1f} to {max(p99):.1f}; {SHOWN_PER_S} a second, open loop",
    )


def _show_under_load(host: Host) -> list[float]:
    """Latencies in ms, asked for by a process of its own while another submits."""
    submitting = loader("open", host, SUBMITTED_PER_S, SHOWN_S + 1, "nothing")
    asking = loader("show", host, SHOWN_PER_S, SHOWN_S, str(SHOWN_QUEUED))
    found: list[float] = finding(asking)["ms"]
    sent = finding(submitting)
    assert sent["per_s"] >= SUBMITTED_PER_S * 0.95, f"the load itself was too slow: {sent}"
    return found


def loader(kind: str, host: Host, rate: int, seconds: int, more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, BENCH / "load.py", kind, host.socket, str(rate), str(seconds), more],
        stdout=subprocess.PIPE,
        text=True,
    )


def finding(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate()
    assert process.returncode == 0, process.args
    return json.loads(out)
