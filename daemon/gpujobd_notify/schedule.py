"""When something is tried again. Time and chance are arguments.

The schedule is that of Standard Webhooks: at once, then after the waits below, three days in all; then it has failed.

Rule 1: every wait is drawn, within a fifth of it: what failed together does not come back together.
Rule 2: a far end that says when (Retry-After) is not asked sooner, and not later than a day after it said so.
"""

from __future__ import annotations

import datetime as dt
import email.utils
from typing import Final

MINUTE_S: Final = 60.0
HOUR_S: Final = 3600.0
WAITS_S: Final = (
    5.0,
    5 * MINUTE_S,
    30 * MINUTE_S,
    2 * HOUR_S,
    5 * HOUR_S,
    10 * HOUR_S,
    14 * HOUR_S,
    20 * HOUR_S,
    24 * HOUR_S,
)
"""standard-webhooks.md, "Retry schedule"."""
JITTER: Final = 0.2
ASKED_MAX_S: Final = 24 * HOUR_S
GIVE_UP_S: Final = sum(WAITS_S) * (1 + JITTER)
"""Older than this it is given up even if its breaker left it no tries."""


def next_wait_s(tries: int, chance: float, asked_s: float | None = None) -> float | None:
    """Seconds from the end of try number `tries` (from 1) to the next; None: there is none. `chance`: 0 to 1."""
    assert tries >= 1
    assert 0 <= chance <= 1
    if tries > len(WAITS_S):
        return None
    wait_s = WAITS_S[tries - 1] * (1 - JITTER + 2 * JITTER * chance)
    return max(wait_s, min(asked_s, ASKED_MAX_S)) if asked_s is not None else wait_s


def retry_after_s(value: str, now: dt.datetime) -> float | None:
    """What a Retry-After header asks for (RFC 9110, 10.2.3): seconds, or a date; None for what is neither."""
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value[:12])
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    try:
        return max(0.0, (moment - now).total_seconds())
    except OverflowError:
        return None
