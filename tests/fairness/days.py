"""Random days: who shares how many devices, with what, and what they submit. Everything follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from fairness.hall import Arrival, Hall, Kind, rules
from fairness.promises import Promises
from gpujobd.core.model import S_NS, Priority, TenantRule

DAY_S = 86_400.0
STEADY = ("sun", "moon", "star")
SHARES = (0.5, 1.0, 1.0, 1.0, 2.0, 4.0)
FOREVER_S = 1e7
LEVELS = (
    [Priority.NORMAL],
    [Priority.NORMAL],
    [Priority.LOW],
    [Priority.HIGH],
    [Priority.LOW, Priority.NORMAL, Priority.HIGH],
)


class Day:
    def __init__(self, seed: int) -> None:
        luck = self.luck = random.Random(seed)
        self.kinds = self._kinds()
        self.devices = luck.choice((1, 1, 1, 1, 2, 3))
        self.room = luck.choice((1, 1, 2))
        self.steady = STEADY[: luck.choice((2, 3))]
        self.visitors = [f"visitor{number}" for number in range(luck.choice((0, 1, 2, 4, 12)))]
        self.hall = Hall(
            self._rules(), self.kinds, devices=self.devices, room=self.room, seed=luck.randrange(1 << 30)
        )
        self.promises = Promises(self.hall, self.steady)
        for arrival in self._arrivals():
            self.hall.arrive(arrival)

    def live(self, days: float = 1.0) -> None:
        self.hall.run(days * DAY_S)

    def _kinds(self) -> dict[str, Kind]:
        luck = self.luck
        spread = luck.choice((0.0, 0.2))
        kinds = {
            f"model{number}": Kind(
                load_s=10 ** luck.uniform(-1, 2.78),  # 0.1 s to 10 min
                batch_s=luck.choice((5.0, 20.0, 30.0)),
                spread=spread,
            )
            for number in range(luck.choice((1, 2, 3)))
        }
        if luck.random() < 0.2:
            kinds["broken"] = Kind(load_s=0.0, fails_s=10 ** luck.uniform(0, 2.5))
        return kinds

    def _rules(self) -> Any:
        luck = self.luck
        limits = {
            name: luck.choice((None, None, 1, 2))
            for name in self.visitors
            if self.devices > 1 or luck.random() < 0.2
        }
        return rules(
            self.kinds,
            slice_ns=round(luck.choice((10, 30, 30, 60)) * S_NS),
            aging_ns=round(luck.choice((1, 3, 6)) * 3600 * S_NS),
            swap_overhead_max=luck.choice((0.02, 0.05, 0.05, 0.2)),
            wait_max_ns=round(luck.choice((600, 1800, 1800, 3600)) * S_NS),
            tenants={
                name: TenantRule(share=luck.choice(SHARES), running_devices_max=limits.get(name))
                for name in self.visitors
            },
        )

    def _arrivals(self) -> Iterator[Arrival]:
        handlers = [name for name, kind in self.kinds.items() if not kind.fails_s]
        for name in self.steady:
            handler = self.luck.choice(handlers)
            for _ in range(self.devices + 1):
                yield Arrival(0.0, name, handler, FOREVER_S)
        for name in self.visitors:
            yield from self._visits(name)

    def _visits(self, name: str) -> Iterator[Arrival]:
        """Bursts, of one tenant's habits: how often, how many, how long, how urgent."""
        luck = self.luck
        every_s = luck.choice((1200.0, 3600.0, 4 * 3600.0))
        jobs = luck.choice((1, 1, 3, 20))
        work_s = luck.choice((20.0, 60.0, 600.0))
        priorities = luck.choice(LEVELS)
        handlers = list(self.kinds) if luck.random() < 0.5 else [luck.choice(list(self.kinds))]
        at_s = luck.expovariate(1 / every_s)
        while at_s < DAY_S:
            for _ in range(jobs):
                yield Arrival(
                    at_s,
                    name,
                    luck.choice(handlers),
                    work_s * luck.uniform(0.5, 1.5),
                    luck.choice(priorities),
                )
            at_s += luck.expovariate(1 / every_s)
