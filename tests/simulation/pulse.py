"""How fast the heart of a simulated world beats.

A real daemon looks at its workers and its clock four times a second: a month of that is ten million looks. So there
are two paces. In `FINE` every period and every limit is the real one, for hours; in `SLOW` the periods, and with them
the limits they must stay below, are some forty times as long, so that a month passes in a minute. What the daemon
does at each look is the same.
"""

from __future__ import annotations

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True)
class Pulse:
    tick_s: float = 0.25
    look_s: float = 0.25
    status_s: float = 1.0
    sight_s: float = 5.0  # between looks at the devices from outside
    janitor_s: float = 5.0
    retain_s: float = 60.0
    heartbeat_s: float = 1.0
    stuck_s: float = 20.0  # a sync, or a loop that does not turn, is ill after this
    watchdog_s: float = 30.0
    silent_s: float = 60.0
    stall_s: float = 300.0
    load_timeout_s: float = 600.0
    grace_s: float = 60.0
    checkpoint_s: float = 1.0
    slice_s: float = 30.0
    round_s: float = 120.0  # which many tenants share
    aging_s: float = 3600.0
    wait_max_s: float = 1800.0
    item_s: float = 0.02  # computing one item
    load_s: float = 5.0  # loading the smallest model
    idle_s: float = 5.0  # between two wishes of one person
    eagerness: float = 200.0  # how many times as often as in a slow month something goes wrong
    trouble: float = 1.0  # the same of what goes wrong in a call of a handler
    snapshot_events: int = 300


FINE: Final = Pulse()
SLOW: Final = Pulse(
    tick_s=30.0,
    look_s=30.0,
    status_s=30.0,
    sight_s=120.0,
    janitor_s=300.0,
    retain_s=1200.0,
    heartbeat_s=120.0,
    stuck_s=90.0,
    watchdog_s=135.0,
    silent_s=480.0,
    stall_s=1800.0,
    load_timeout_s=1200.0,
    grace_s=90.0,
    checkpoint_s=300.0,
    slice_s=900.0,
    round_s=3600.0,
    aging_s=14_400.0,
    wait_max_s=7200.0,
    item_s=20.0,
    load_s=20.0,
    idle_s=2400.0,
    eagerness=1.0,
    snapshot_events=1000,
)

HARSH: Final = dataclasses.replace(SLOW, eagerness=8.0, trouble=5.0)
"""The same, with a fault every ten minutes instead of every hour and a half."""
