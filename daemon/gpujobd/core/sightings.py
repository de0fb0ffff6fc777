"""What follows from a look at a device from outside: which state it is in, and whom it takes.

    ok               --> busy_elsewhere    others leave too little for some handler        DeviceCrowded
    busy_elsewhere   --> ok                they leave enough for every one                 DeviceCleared
    any              --> driver_mismatch   the driver was changed under us                 DriverMismatched
    driver_mismatch  --> ok                it answers again                                DeviceRecovered
    any              --> unhealthy         the driver has lost it, or forbids it           DeviceFellIll
    unhealthy        --> ok                a canary passed, or a batch (leases.py)         DeviceRecovered

Rule 1: a look is told again and again; only what changes the state, or whom the device takes, is an event.
Rule 2: none of it is a job's fault: what runs goes on, what waits says why.
Rule 3: where nothing is known (no NVML), nothing is held against a device; but what its work told of it stays.
"""

from __future__ import annotations

from typing import Final

from gpujobd.core import events, house, residency
from gpujobd.core.inputs import DeviceSeen, MemoryWanted
from gpujobd.core.leases import DETAIL_CHARS_MAX, fell_ill, rests
from gpujobd.core.model import S_NS, Device, DeviceState, Rules, State, YieldWhy

MISMATCH: Final = "DriverMismatch"
RENEW_NS: Final = (
    60 * S_NS
)  # before its next try a device that is still lost is put off: no job tries what is not there
TOLD_PART: Final = 8  # a change by this part of a device is told, even if it shuts out nobody else

Events = list[events.AnyEvent]


def device_seen(state: State, rules: Rules, given: DeviceSeen, now_ns: int) -> Events:
    device = state.devices.get(given.device)
    if device is None:
        return []
    detail = given.detail[:DETAIL_CHARS_MAX]
    if given.trouble == MISMATCH:
        if device.state is DeviceState.DRIVER_MISMATCH:
            return []
        return [events.DriverMismatched(at_ns=now_ns, device=device.name, detail=detail)]
    if given.trouble:
        return _ill(device, given.trouble, detail, now_ns)
    well: Events = []
    if device.state is DeviceState.DRIVER_MISMATCH:
        well.append(events.DeviceRecovered(at_ns=now_ns, device=device.name))
    return well + crowding(state, rules, device, given, now_ns)


def _ill(device: Device, reason: str, detail: str, now_ns: int) -> Events:
    known = device.state is DeviceState.UNHEALTHY and device.reason == reason
    if known and rests(device.retry_at_ns, now_ns + RENEW_NS) and rests(device.retry_at_ns, now_ns):
        return []
    return [fell_ill(device, reason, detail, now_ns)]


def crowding(state: State, rules: Rules, device: Device, given: DeviceSeen, now_ns: int) -> Events:
    """Whether others have taken so much, or left so much, that it makes a difference to somebody."""
    before = residency.shut_out(state, rules, device, device.room_bytes)
    after = residency.shut_out(state, rules, device, given.room_bytes)
    if not after:
        return [events.DeviceCleared(at_ns=now_ns, device=device.name)] if device.room_bytes >= 0 else []
    told = abs(given.room_bytes - device.room_bytes) * TOLD_PART >= given.total_bytes
    if after == before and not (told and device.room_bytes >= 0):
        return []
    detail = given.detail[:DETAIL_CHARS_MAX]
    return [
        events.DeviceCrowded(at_ns=now_ns, device=device.name, room_bytes=given.room_bytes, detail=detail)
    ]


def memory_wanted(state: State, given: MemoryWanted, now_ns: int) -> Events:
    device = state.devices.get(given.device)
    lease = device.lease if device else None
    if device is None or lease is None or lease.attempt != given.attempt:
        return []
    return house.ask_back(device, YieldWhy.ELSEWHERE, now_ns, detail=given.detail[:DETAIL_CHARS_MAX])
