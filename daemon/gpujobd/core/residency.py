"""Whose memory it is: which handlers a device takes beside others, and which worker leaves when there is too little.

    total    = foreign + ours + free            of a device, as its driver counts
    room     = total - foreign                  what others leave; the most they held lately counts (gpus.py)
    resident   a worker on it: the larger of its measured peak and what the driver says it holds

Rule 1: to be let in, a handler must fit with what it cannot do without: the memory its latest load took, or, never
loaded, what was declared. Its peak is no need: with less room it computes in smaller batches.
Rule 2: to stay beside other workers of ours, its peak must fit: growing, it would take from the one that computes.
Rule 3: where nothing is known of a handler, it is tried; where it ran out of memory, it is not tried in that room again.
Rule 4: memory is given back to others only where THEY have taken more since the worker was loaded. What a worker takes
by itself, beside a desktop that has always been there, is no reason: it would be loaded and unloaded for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from gpujobd.core.model import Device, DeviceState, Rules, State

MIB: Final = 1 << 20
CONTEXT_BYTES: Final = 512 * MIB  # a worker's CUDA context and libraries, which no allocator counts
NOTICE_BYTES: Final = 512 * MIB  # others that hold less stand in nobody's way: a desktop, the driver itself
MARGIN_BYTES: Final = 256 * MIB  # more than there was, for a handler that ran out of memory to be tried again
GROWTH_BYTES: Final = (
    128 * MIB
)  # by which others must have grown to be given memory; a CUDA context takes more
SPARE_PART: Final = 0.1  # of a device: what idle workers leave free once others have grown,
SPARE_BYTES_MIN: Final = 1024 * MIB  # and at least so much: they need it soon
SHORT_PART: Final = 0.01  # under which memory is really short: work itself makes room
SHORT_BYTES_MIN: Final = 256 * MIB


def gib(count: int) -> str:
    """Bytes for people: `70.1 GiB`."""
    return f"{count / (1 << 30):.1f} GiB"


def left(device: Device) -> str:
    return f"other processes leave {gib(device.room_bytes)}"


# --- who is let in ----------------------------------------------------------------------------------------------------


def needs_bytes(state: State, rules: Rules, handler: str) -> int:
    """Without which it does not run; 0: nobody knows."""
    learned = state.learned.get(handler)
    if learned is not None and learned.load_bytes:
        return learned.load_bytes
    rule = rules.handlers.get(handler)
    return rule.vram_bytes if rule else 0


def wants_bytes(state: State, rules: Rules, handler: str) -> int:
    """What it grows to; 0: nobody knows. The first measured figure replaces the declared one, be it smaller."""
    learned = state.learned.get(handler)
    if learned is not None and learned.load_ns:
        return learned.vram_bytes
    rule = rules.handlers.get(handler)
    return rule.vram_bytes if rule else 0


def has_place(state: State, rules: Rules, device: Device, handler: str, room_bytes: int) -> bool:
    """Whether the handler can run in this room; -1: there is enough for all."""
    if room_bytes < 0:
        return True
    cramped = device.cramped.get(handler, -1)
    if cramped >= 0 and room_bytes < cramped + MARGIN_BYTES:
        return False
    return needs_bytes(state, rules, handler) + CONTEXT_BYTES <= room_bytes


def takes(state: State, rules: Rules, device: Device, handler: str) -> bool:
    """Whether a lease for this handler can be worked off there, as far as driver and memory go."""
    if device.state is DeviceState.DRIVER_MISMATCH:
        return handler in device.loaded
    return device.room_bytes < 0 or has_place(state, rules, device, handler, device.room_bytes)


def takes_all(device: Device) -> bool:
    """The usual case, told in the time of a glance."""
    return device.room_bytes < 0 and device.state is not DeviceState.DRIVER_MISMATCH


def takes_any(state: State, rules: Rules, device: Device) -> bool:
    """Whether some configured handler can be worked off there."""
    return takes_all(device) or any(takes(state, rules, device, name) for name in rules.handlers)


def shut_out(state: State, rules: Rules, device: Device, room_bytes: int) -> frozenset[str]:
    """The configured handlers that have no place in such a room."""
    return frozenset(name for name in rules.handlers if not has_place(state, rules, device, name, room_bytes))


# --- who stays --------------------------------------------------------------------------------------------------------


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """A device's memory at one look."""

    total_bytes: int
    free_bytes: int
    foreign_bytes: int  # held by processes that are not ours


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that has a device's memory, or is about to take it."""

    name: str
    bytes: int  # with its context
    idle_since: float = -1.0  # when it last worked; -1: it works, and cannot leave
    foreign_then_bytes: int = 0  # the least that others held since it was loaded


def fits(total_bytes: int, foreign_bytes: int, residents: Iterable[Resident], wanted_bytes: int) -> bool:
    """Whether a worker of this size fits beside these."""
    held = sum(resident.bytes for resident in residents)
    return held + wanted_bytes + CONTEXT_BYTES + foreign_bytes <= total_bytes


def least_recent(residents: Iterable[Resident]) -> Resident | None:
    """The one to go first; None: all of them work."""
    idle = [resident for resident in residents if resident.idle_since >= 0]
    return min(idle, key=lambda resident: resident.idle_since) if idle else None


def leaving(residents: Sequence[Resident], memory: Memory) -> list[str]:
    """Idle workers that give their memory to others, the least recently used first, and no more than it takes."""
    lacking = spare_bytes(memory.total_bytes) - memory.free_bytes
    going: list[str] = []
    idle = [r for r in residents if r.idle_since >= 0 and _outgrown(r, memory)]
    for resident in sorted(idle, key=lambda resident: resident.idle_since):
        if lacking <= 0:
            break
        going.append(resident.name)
        lacking -= resident.bytes
    return going


def yielding(residents: Sequence[Resident], memory: Memory) -> str:
    """The worker that is to stop at a batch boundary, for others need its memory; empty: none, or idle ones go first."""
    if memory.free_bytes >= short_bytes(memory.total_bytes) or leaving(residents, memory):
        return ""
    at_work = (r.name for r in residents if r.idle_since < 0 and _outgrown(r, memory))
    return next(at_work, "")


def _outgrown(resident: Resident, memory: Memory) -> bool:
    return memory.foreign_bytes >= resident.foreign_then_bytes + GROWTH_BYTES


def spare_bytes(total_bytes: int) -> int:
    """A quarter of a small card at most: it would never keep anything loaded."""
    return min(max(round(total_bytes * SPARE_PART), SPARE_BYTES_MIN), total_bytes // 4)


def short_bytes(total_bytes: int) -> int:
    return min(max(round(total_bytes * SHORT_PART), SHORT_BYTES_MIN), total_bytes // 16)
