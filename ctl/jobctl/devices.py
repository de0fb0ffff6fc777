"""What a device looks like from outside: who holds its memory, how hot and how busy it is."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence

from gpujobd import protocol as p
from msgspec import UNSET

from jobctl.describe import device_page, given
from jobctl.table import Column, clean, size, table
from jobctl.times import relative, told

HOLDERS = (
    Column("PID", right=True),
    Column("MEMORY", right=True),
    Column("WHAT", shrink=True),
    Column("USER", shrink=True),
)


def devices_page(devices: Sequence[p.DeviceView], at: dt.datetime) -> str:
    """The table, then each device that more is known of; what the table shortens is whole there."""
    return "\n".join([device_page(devices), *(text for d in devices if (text := _details(d, at)))])


def _details(device: p.DeviceView, at: dt.datetime) -> str:
    lines = "".join(f"  {fact}\n" for fact in _facts(device, at))
    holders = list(_holders(device))
    rows = table(HOLDERS, holders, indent="  ") if holders else ""
    return f"{device.name}\n{lines}{rows}" if lines or rows else ""


def _facts(device: p.DeviceView, at: dt.datetime) -> Iterator[str]:
    why = ": ".join(clean(part) for part in (given(device.reason), given(device.reason_detail)) if part)
    if device.since is not UNSET or why:
        since = f" since {told(device.since, at)}" if device.since is not UNSET else ""
        yield device.state + since + (f": {why}" if why else "")
    if device.unseen is not UNSET:
        yield clean(device.unseen)
    if device.seen_at is UNSET:
        return
    driver = f", driver {clean(device.driver)}" if device.driver is not UNSET else ""
    yield f"seen {relative(device.seen_at, at)}{driver}"
    figures = ", ".join(_figures(device))
    if figures:
        yield figures
    if device.others_bytes is not UNSET and device.others_bytes:
        yield f"not ours: {size(device.others_bytes)}"


def _figures(device: p.DeviceView) -> Iterator[str]:
    if device.utilisation is not UNSET:
        yield f"{device.utilisation:.0f} % busy"
    if device.temperature_c is not UNSET:
        yield f"{device.temperature_c:.0f} °C"
    if device.power_w is not UNSET:
        limit = f" of {device.power_limit_w:.0f}" if device.power_limit_w is not UNSET else ""
        yield f"{device.power_w:.0f}{limit} W"
    if device.throttled is not UNSET:
        yield f"held back by {clean(', '.join(device.throttled))}"


def _holders(device: p.DeviceView) -> Iterator[tuple[str, str, str, str]]:
    """Ours first."""
    for held in device.held if device.held is not UNSET else []:
        yield str(held.pid), size(held.bytes), f"handler {held.handler}", ""
    for other in device.others if device.others is not UNSET else []:
        memory = size(other.bytes) if other.bytes is not UNSET else "?"
        yield str(other.pid), memory, f"not ours {given(other.command)}".rstrip(), given(other.user)
