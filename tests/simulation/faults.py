"""What goes wrong in a simulated world, and how often: all of it drawn from the seed.

Rule 1: there is weather. In storms workers and disks fail by the hour; in between it is calm enough that promises
about fairness and waiting can be held to.
Rule 2: the process is killed between two steps of anything (an operation of the journal's disk, a call in a thread),
not only between two pieces of work; recovery is no exception.
Rule 3: every fault is counted under its name: what never happened was never tested.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio
from simulation.pulse import Pulse

HOUR_S: Final = 3600.0
DAY_S: Final = 24 * HOUR_S

EVERY_S: Final = {
    "kill": 10 * HOUR_S,
    "power cut": 20 * HOUR_S,
    "SIGTERM": 20 * HOUR_S,
    "SIGTERM twice": 90 * HOUR_S,
    "SIGHUP": 40 * HOUR_S,
    "clock step": 8 * HOUR_S,
    "process stopped": 24 * HOUR_S,
    "disk full": 70 * HOUR_S,
    "sync stuck": 16 * HOUR_S,
    "device ill": 30 * HOUR_S,
    "strangers": 12 * HOUR_S,
    "driver replaced": 60 * HOUR_S,
    "storm": 9 * HOUR_S,
}
TROUBLES: Final = {
    "dies": 6,
    "stalls": 2,
    "hangs": 2,
    "says nonsense": 1,
    "says old things": 2,
    "lies": 1,
    "floods": 2,
    "leaves bytes behind": 2,
}


class Faults:
    """Everything the world may be told to suffer. `kill(how)` ends the process: it raises."""

    def __init__(
        self, luck: random.Random, kill: Callable[[str], None], note: Callable[[str], None], pulse: Pulse
    ) -> None:
        self.count: Counter[str] = Counter()
        self.pulse, self.eagerness = pulse, pulse.eagerness
        self.storm = False
        self.errors_of_this_life = 0
        self._luck, self._kill, self._note = luck, kill, note
        self._ill_until_s: dict[str, float] = {}
        self._strangers: dict[str, tuple[float, int]] = {}  # device: until when they hold how much
        self._replaced_until_s = 0.0
        self._stuck_s = 0.0
        self._in_ops = self._in_steps = -1
        self._how = ""

    def begin_life(self) -> None:
        self.errors_of_this_life = 0
        self._stuck_s = 0.0

    def happen(self, what: str) -> None:
        self.count[what] += 1
        self._note(f"FAULT {what}")

    # --- disks --------------------------------------------------------------------------------------------------------

    def end_soon(self, how: str) -> None:
        """Kill the process, or cut the power, at some operation to come."""
        self._how = how
        if self._luck.random() < 0.5:
            self._in_ops = self._luck.randrange(1, 300)
        else:
            self._in_steps = self._luck.randrange(1, 300)

    def at_disk(self, what: str) -> str | int | None:
        if self._in_ops >= 0:
            self._in_ops -= 1
            if self._in_ops < 0:
                if self._how == "kill" or not what.startswith(("pwrite", "fdatasync")):
                    self._kill(self._how)
                self.happen("power cut in a write")
                return "cut"
        if self.storm and what.startswith(("pwrite", "fdatasync")) and self._luck.random() < 1e-4:
            self.errors_of_this_life += 1
            self.happen("journal EIO")
            return errno.EIO
        return None

    def at_spool(self, what: str) -> int | None:
        if self.storm and self._luck.random() < 2e-4 * self.eagerness**0.5:
            self.errors_of_this_life += 1
            self.happen(f"spool {what} EIO")
            return errno.EIO
        return None

    # --- threads --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        if self._in_steps >= 0:
            self._in_steps -= 1
            if self._in_steps < 0:
                self._kill(self._how)

    def thread_s(self) -> float:
        return self._luck.choice((0.0, 0.0, 0.0, 0.0, 0.0002, 0.003, 0.02 if not self.storm else 0.8))

    def sync_s(self) -> float:
        if self._stuck_s:
            stuck_s, self._stuck_s = self._stuck_s, 0.0
            self.happen("sync stuck")
            return stuck_s
        return self._luck.choice((0.0002, 0.0002, 0.001, 0.004 if not self.storm else 2.0))

    def coin(self) -> bool:
        return self._luck.random() < 0.5

    # --- workers --------------------------------------------------------------------------------------------------------

    def trouble(self) -> str:
        if self._luck.random() >= self.pulse.trouble * (0.02 if self.storm else 0.0005):
            return ""
        (trouble,) = self._luck.choices(list(TROUBLES), list(TROUBLES.values()))
        self.happen(f"worker {trouble}")
        return trouble

    def load_trouble(self, handler: str) -> str:
        if self._luck.random() >= self.pulse.trouble * (0.08 if self.storm else 0.002):
            return ""
        trouble = self._luck.choice(("fails", "fails", "dies", "hangs")) if handler else "no interpreter"
        if handler or self._luck.random() < 0.1:
            self.happen(f"load {trouble}")
            return trouble
        return ""

    def device_is_ill(self, device: str, world_s: float) -> bool:
        return world_s < self._ill_until_s.get(device, 0.0)

    # --- the driver, and who else uses the devices -----------------------------------------------------------------------

    def come(self, device: str, world_s: float) -> None:
        """Processes that nobody told the daemon of: some hold little, some all but everything."""
        held = self._luck.choice((1 << 28, 4 << 30, 9 << 30, 16 << 30, 23 << 30))
        self._strangers[device] = world_s + self._luck.uniform(60, 7200), held
        self.happen("strangers")

    def foreign_bytes(self, device: str, world_s: float) -> int:
        until_s, held = self._strangers.get(device, (0.0, 0))
        return held if world_s < until_s else 0

    def replace_driver(self, world_s: float) -> None:
        self._replaced_until_s = world_s + self._luck.uniform(60, 1800)
        self.happen("driver replaced")

    def driver_trouble(self, world_s: float) -> str:
        if world_s < self._replaced_until_s:
            return "mismatch"
        if self._luck.random() < (0.1 if self.storm else 0.001):
            trouble = self._luck.choice(("hangs", "failed", "nonsense"))
            self.happen(f"a look: {trouble}")
            return trouble
        return ""

    # --- the plan -------------------------------------------------------------------------------------------------------

    async def run(self, strike: Callable[[str], None]) -> None:
        """One fault after the other, for ever. `strike` does what is not done here."""
        names = list(EVERY_S)
        rates = [self.eagerness / EVERY_S[name] for name in names]
        while True:
            await trio.sleep(self._luck.expovariate(sum(rates)))
            (what,) = self._luck.choices(names, rates)
            match what:
                case "storm":
                    self.storm = True
                    self.happen("storm")
                    await trio.sleep(self._luck.uniform(0.3, 3) * HOUR_S / self.eagerness)
                    self.storm = False
                case "sync stuck":
                    self._stuck_s = self.pulse.stuck_s * self._luck.choice((0.75, 1.25, 1.45, 5.0))
                case _:
                    strike(what)

    def fall_ill(self, device: str, world_s: float) -> None:
        self._ill_until_s[device] = world_s + self._luck.uniform(60, 1800)
        self.happen("device ill")
