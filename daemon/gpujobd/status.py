"""What `systemctl status` shows in one line: what runs and how far it is, what waits, what is wrong.

alice on cuda:0: 12,000/50,000, 310/s; 4 waiting; cuda:1 unhealthy: CanaryFailed

Rule: whose, not which. Everybody on the host may ask systemd for this line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from gpujobd.core.model import Device, DeviceState, State
from gpujobd.pace import Progress

DEVICES_MAX: Final = 4  # named; the line has a bound (notify.py), and its end must be seen
NAME_CHARS_MAX: Final = 32

Progresses = Callable[[int], Progress | None]


def status(state: State, progress: Progresses, trouble: str = "") -> str:
    """`progress` is asked by job id; `trouble` is the daemon's own, said last."""
    leased = [device for device in state.devices.values() if device.lease]
    running = [_running(state, device, progress) for device in leased[:DEVICES_MAX]]
    if len(leased) > DEVICES_MAX:
        running.append(f"{len(leased) - DEVICES_MAX} more")
    parts = [
        *(["stopping"] if state.stopping else []),
        ", ".join(running) or "idle",
        f"{state.book.open_jobs - len(leased)} waiting",
        *_wrong(state),
        *([trouble] if trouble else []),
    ]
    return "; ".join(parts)


def _running(state: State, device: Device, progress: Progresses) -> str:
    assert device.lease is not None
    job = state.jobs[device.lease.job_id]
    tried = job.checkpoint.done + job.checkpoint.failed
    found = progress(job.job_id)
    rate = f", {found.items_per_s:,.0f}/s" if found and found.items_per_s >= 1 else ""
    tenant = job.tenant[:NAME_CHARS_MAX]
    return f"{tenant} on {device.name}: {tried:,}/{job.items:,}{rate}"


def _wrong(state: State) -> Iterator[str]:
    switches = state.switches
    words = (("stopped", switches.stopped), ("disabled", switches.disabled), ("draining", switches.draining))
    if on := [word for word, switched in words if switched]:
        yield f"queue {', '.join(on)}"
    if state.disk_full:
        yield "disk full"
    for device in [d for d in state.devices.values() if d.state is not DeviceState.OK][:DEVICES_MAX]:
        yield f"{device.name} {device.state}: {device.reason}"
