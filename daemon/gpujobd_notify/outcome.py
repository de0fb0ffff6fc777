"""What became of one try."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

ERROR_CHARS_MAX: Final = 500  # a name may have a thousand addresses, all of them ill


class Verdict(enum.Enum):
    DELIVERED = "delivered"
    LATER = "later"  # on schedule
    NEVER = "never"  # this message, to this target
    GONE = "gone"  # nothing, to this target, any more


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    verdict: Verdict
    error: str = ""  # for people, one line of ERROR_CHARS_MAX at most
    ill: bool = False  # the far end is not well: its breaker counts it
    asked_s: float | None = None  # the far end wants to be left alone for so long


DELIVERED = Outcome(verdict=Verdict.DELIVERED)


def later(error: str, *, ill: bool, asked_s: float | None = None) -> Outcome:
    return Outcome(verdict=Verdict.LATER, error=error[:ERROR_CHARS_MAX], ill=ill, asked_s=asked_s)


def never(error: str) -> Outcome:
    return Outcome(verdict=Verdict.NEVER, error=error[:ERROR_CHARS_MAX])
