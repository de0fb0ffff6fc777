"""Four situations from real hosts. Arrivals, models and devices are the same for whoever schedules them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fairness.hall import Arrival, Kind
from gpujobd.core.model import Priority, TenantRule

HOUR_S = 3600.0
Groups = dict[str, str]  # first letters of a tenant's name -> what its group is called


@dataclass(frozen=True)
class Situation:
    name: str
    title: str
    story: str
    hours: float
    kinds: dict[str, Kind]
    groups: Groups
    arrivals: Callable[[random.Random, float], Iterator[Arrival]]
    tenants: dict[str, TenantRule] = field(default_factory=dict)
    verdict: str = ""  # what the table says, where gpujobd is the worse one too
    drawn_hours: float = 1.0  # how much of it is drawn as a ribbon, from the start


def _every(luck: random.Random, mean_s: float, until_s: float) -> Iterator[float]:
    at_s = luck.expovariate(1 / mean_s)
    while at_s < until_s:
        yield at_s
        at_s += luck.expovariate(1 / mean_s)


# --- 41 tenants, one of them bursts -----------------------------------------------------------------------------------


def _burst(luck: random.Random, until_s: float) -> Iterator[Arrival]:
    for _ in range(400):
        yield Arrival(0.0, "burst", "embed", luck.uniform(30, 90))
    for number in range(40):
        for at_s in _every(luck, 2400, until_s):
            yield Arrival(at_s, f"quiet{number}", "embed", luck.uniform(10, 50))


# --- a 48-hour job and its visitors -----------------------------------------------------------------------------------


def _visitors(luck: random.Random, until_s: float) -> Iterator[Arrival]:
    yield Arrival(0.0, "archive", "translate", 48 * HOUR_S)
    for number in range(6):
        for at_s in _every(luck, 2 * HOUR_S, until_s):
            if 8 <= at_s / HOUR_S % 24 < 20:
                yield Arrival(at_s, f"visitor{number}", "embed", luck.uniform(20, 120))


# --- three models that do not fit together ----------------------------------------------------------------------------


def _mixed(luck: random.Random, until_s: float) -> Iterator[Arrival]:
    at_s = 0.0
    for number in range(1_000_000):
        if at_s >= until_s:
            return
        yield Arrival(at_s, f"team{number // 3 % 3}", "ABC"[number % 3], luck.uniform(25, 55))
        at_s += luck.uniform(35, 65)


# --- production and tests ---------------------------------------------------------------------------------------------


def _levels(luck: random.Random, until_s: float) -> Iterator[Arrival]:
    for at_s in _every(luck, 600, until_s):
        yield Arrival(at_s, "production", "rank", luck.uniform(60, 180), Priority.HIGH)
    for number in range(3):
        for at_s in _every(luck, 1800, until_s):
            yield Arrival(at_s, f"test{number}", "train", luck.uniform(120, 600))
    for _ in range(12):
        yield Arrival(0.0, "nightly", "train", HOUR_S, Priority.LOW)


SITUATIONS = (
    Situation(
        "burst",
        "41 tenants, one of them bursts",
        "One tenant submits 400 jobs at once, seven hours of work. Forty others submit a job of half a minute now and then.",
        4,
        {"embed": Kind(load_s=8, batch_s=2, spread=0.1)},
        {"burst": "the burst", "quiet": "40 quiet tenants"},
        _burst,
        verdict="Only FIFO lets the burst's own jobs begin sooner, at the cost of everybody else. Round robin and fair share are as even; a quiet tenant waits a little less here, because who comes back starts beside the least served and not behind all.",
    ),
    Situation(
        "visitors",
        "A 48-hour job and its visitors",
        "One job needs the device for two days. Six people come by during the day with a minute of work for another model, which does not fit beside the first.",
        56,
        {
            "translate": Kind(load_s=30, batch_s=10, spread=0.1),
            "embed": Kind(load_s=10, batch_s=2, spread=0.1),
        },
        {"archive": "the 48-hour job", "visitor": "6 visitors"},
        _visitors,
        verdict="Whole-job policies never swap and so use the device better, by 1.6 %, and let the visitors wait for up to 39 hours. Round robin serves the slowest visitor sooner than gpujobd does (p99), for it swaps at once, at three times the loading: here a visitor waits until his model's load is earned.",
        drawn_hours=24,
    ),
    Situation(
        "models",
        "Three models that do not fit together, arriving ABCABC",
        "Three teams submit jobs of forty seconds, every fifty seconds one, each for another model than the one before. Loading takes 15, 30 and 60 seconds.",
        8,
        {
            "A": Kind(load_s=15, batch_s=2, spread=0.1),
            "B": Kind(load_s=30, batch_s=2, spread=0.1),
            "C": Kind(load_s=60, batch_s=2, spread=0.1),
        },
        {"team": "3 teams"},
        _mixed,
        verdict="Loading takes far more here than swap_overhead_max: so little waits for the loaded model that it runs out of work before the next load is earned, and no device is kept idle for a rule. Forecasts miss by a third, since whoever comes next may have work for the model that is loaded, and goes first.",
        drawn_hours=2,
    ),
    Situation(
        "levels",
        "Production and tests of different priority",
        "Production comes at high, a minute or two of work every ten minutes. Three test tenants come at normal, five minutes of work each half hour. Twelve jobs of an hour take at low whatever is left. Two models, one device.",
        12,
        {"rank": Kind(load_s=12, batch_s=2, spread=0.1), "train": Kind(load_s=20, batch_s=5, spread=0.1)},
        {
            "production": "production (high)",
            "test": "3 test tenants (normal)",
            "nightly": "nightly jobs (low)",
        },
        _levels,
        verdict="Jain's index is lower than round robin's, as it should be where production comes first; the test tenants pay for it with a long p99. Whole-job fair share loads less, and lets production wait for an hour. Nightly jobs begin latest here: they get what is left.",
        tenants={"production": TenantRule(share=4.0)},
        drawn_hours=3,
    ),
)
