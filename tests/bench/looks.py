"""What a forecast costs: in all, and at a stretch."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator

from core_floor import Floor
from core_house import HANDLERS, person
from gpujobd.core.forecast import forecast as run_ahead
from gpujobd.core.model import Rules
from rows import Row, Setting

QUEUED = 1_000
TENANTS = 41
DEVICES = ("cuda:0",)
WIDE_OPEN = Rules(
    queued_jobs_max=10**6,
    jobs_per_uid_max=10**6,
    submissions_per_minute_max=10**6,
    queued_items_max=10**12,
    items_per_uid_max=10**12,
    spool_bytes_max=10**15,
    bytes_per_uid_max=10**15,
    handlers=HANDLERS,
)


def forecast(setting: Setting) -> Iterator[Row]:
    """CPU time, so that what else runs on the machine is not counted; the daemon spreads it over its steps."""
    floor = _queue()
    took_ms, steps_ms = [], []
    for _ in range(3 * setting.repetitions):
        steps_ms.append(_steps_ms(floor))
        took_ms.append(sum(steps_ms[-1]))
    median = statistics.median(took_ms)
    longest = statistics.median(max(steps) for steps in steps_ms)
    handlers = len(HANDLERS)
    yield Row(
        f"forecast of {QUEUED:,} queued jobs, {TENANTS} tenants, {handlers} handlers, CPU time",
        "<= 250 ms",
        f"{median:.0f} ms",
        median <= 250,
        f"{min(took_ms):.0f} to {max(took_ms):.0f} ms, at most a twentieth of the loop's time",
    )
    yield Row(
        "the same, the longest that it holds the loop",
        "<= 5 ms",
        f"{longest:.1f} ms",
        longest <= 5,
        f"CPU time of the longest of {len(steps_ms[0])} steps",
    )


def _queue() -> Floor:
    """Jobs of a second to two hours, behind handlers that were measured and do not fit the device together."""
    floor = Floor(WIDE_OPEN, DEVICES, load_s={"embed": 4.0, "rerank": 8.0, "ocr": 2.0})
    for handler in HANDLERS:
        floor.submit(person(0), items=100, handler=handler)
    floor.run(600)
    luck = random.Random(1)
    for number in range(QUEUED + len(DEVICES)):
        items, handler = luck.choice((10, 1_000, 50_000)), luck.choice(list(HANDLERS))
        floor.submit(person(number % TENANTS), items=items, handler=handler)
    return floor


def _steps_ms(floor: Floor) -> list[float]:
    steps = run_ahead(floor.state, floor.rules, floor.now_ns)
    took: list[float] = []
    going = True
    while going:
        began = time.thread_time()
        going = next(steps, "ended") is None
        took.append((time.thread_time() - began) * 1e3)
    return took
