"""Times as people say them: durations with a unit, moments, and how far away they are.

Rule 1: a bare number is no duration: some programs mean minutes by it and others seconds.
Rule 2: people read local time, machines RFC 3339 in UTC.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

import click

UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
DURATION_MAX_S: Final = 10 * 366 * 86400.0


def now() -> dt.datetime:
    return dt.datetime.now(tz=dt.UTC)


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """`30s`, `5m`, `2h`, `1d`, `1h30m`; in seconds."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        seconds = duration_s(value)
        if seconds is None:
            self.fail(f"{value!r} is no duration: a number and a unit, such as 30s, 5m, 2h, 1d", param, ctx)
        return seconds


class Moment(click.ParamType):  # type: ignore[type-arg]
    """A duration from now, or RFC 3339 with an offset."""

    name = "time"

    def convert(
        self, value: str | dt.datetime, param: click.Parameter | None, ctx: click.Context | None
    ) -> dt.datetime:
        if isinstance(value, dt.datetime):
            return value
        if (seconds := duration_s(value)) is not None:
            return now() + dt.timedelta(seconds=seconds)
        try:
            moment = dt.datetime.fromisoformat(value)
        except ValueError:
            self.fail(
                f"{value!r} is no time: a duration from now (2h), or 2026-01-31T17:00:00+01:00", param, ctx
            )
        if moment.tzinfo is None:
            self.fail(f"{value!r} names no zone: end it with Z, or with an offset such as +01:00", param, ctx)
        return moment.astimezone(dt.UTC)


def duration_s(text: str) -> float | None:
    """Seconds; None where the text is no duration, or one of more than ten years."""
    seconds, end = 0.0, 0
    while found := DURATION.match(text, end):
        seconds += float(found[1]) * UNIT_S[found[2]]
        end = found.end()
    return seconds if text and end == len(text) and seconds <= DURATION_MAX_S else None


def spoken(seconds: float) -> str:
    """`46 s`, `3 min`, `2 h 05 min`, `3 d 4 h`: two figures at most, never more exact than is known."""
    if seconds < 10 and seconds != round(seconds):
        return f"{seconds:.1f} s"
    if round(seconds) < 120:
        return f"{seconds:.0f} s"
    if (minutes := round(seconds / 60)) < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def relative(moment: dt.datetime, at: dt.datetime) -> str:
    """`in 3 min`, `4 h 10 min ago`, `now`."""
    ahead_s = (moment - at).total_seconds()
    if abs(ahead_s) < 1:
        return "now"
    text = spoken(round(abs(ahead_s)))
    return f"in {text}" if ahead_s > 0 else f"{text} ago"


def local(moment: dt.datetime, at: dt.datetime) -> str:
    """Local time; the date only where it is another day."""
    here = moment.astimezone()
    form = "%H:%M:%S" if here.date() == at.astimezone().date() else "%Y-%m-%d %H:%M:%S"
    return here.strftime(form)


def told(moment: dt.datetime, at: dt.datetime) -> str:
    """`17:05:12 (in 3 min)`."""
    return f"{local(moment, at)} ({relative(moment, at)})"
