"""What the figures were measured on: a ratio without its machine is a rumour."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path

RAW_S = 1.0
BLOCK = bytes(range(256)) * 16  # 4 KiB


def describe(folder: Path) -> str:
    """CPU, cores, kernel, file system, Python, and how busy the machine was already."""
    load = os.getloadavg()[0]
    return (
        f"{_cpu()}, {os.cpu_count()} cores; Linux {platform.release()}; {_file_system(folder)}; "
        f"Python {platform.python_version()}; load average before: {load:.1f}"
    )


def cpu_times() -> tuple[int, int]:
    """Ticks since boot: all of them, and those in which the host of this virtual machine ran something else."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[7]


def stolen_percent(before: tuple[int, int]) -> float:
    """How much of the time since then was taken away; on hardware of one's own, 0."""
    whole, stolen = cpu_times()
    return 100 * (stolen - before[1]) / max(1, whole - before[0])


def _cpu() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    """Type of the file system that holds `folder`, and its device."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    place = str(folder.resolve())
    device, _, kind = max(
        (mount for mount in mounts if place.startswith(mount[1])), key=lambda mount: len(mount[1])
    )
    return f"{kind} on {device}"


def raw_syncs_per_s(folder: Path) -> float:
    """What the disk can do: overwrite 4 KiB of a zero-filled file, fdatasync, again; one after the other."""
    path = folder / "raw"
    size = 16 << 20
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_WRONLY)
    try:
        os.fsync(fd)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < RAW_S:
            os.pwrite(fd, BLOCK, count * len(BLOCK) % size)
            os.fdatasync(fd)
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        os.close(fd)
        path.unlink()


def rss_mb(pid: int) -> float:
    """Resident memory of a process, in MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(f"process {pid} has no memory")


def percentile(samples: list[float], percent: float) -> float:
    """Nearest rank."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * percent / 100))]


def spread(samples: list[float]) -> str:
    """Median, and the least and the most beside it."""
    return f"{statistics.median(samples):,.0f} ({min(samples):,.0f} to {max(samples):,.0f})"
