"""Signs of life for systemd: a ping while all is well, what runs, and more time on the way down.

Rule 1: a ping (WATCHDOG=1) says that the loop turned, that the journal's thread is there and no sync has been in flight
for STUCK_S, and that every worker was looked at in that time. A daemon without work is well.
Rule 2: what is stuck is an entry of the log and the STATUS before systemd acts on the missing ping. It acts with
SIGABRT, on which the stacks of all threads go to stderr (faulthandler, in daemon.py).
Rule 3: a ping in a third of systemd's time, a STATUS when it has changed, and neither more often than once in LOOK_S:
systemd wakes up for each.
Rule 4: more time (EXTEND_TIMEOUT_USEC) is asked for in pieces and for a bounded time: a stop that hangs must end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

import trio

from gpujobd.catalog import kind
from gpujobd.notify import Notifier
from gpujobd.supervisor import Supervisor
from gpujobd.turns import Turns
from gpujobd.writer import Writer

log = logging.getLogger("gpujobd")

STUCK_S: Final = 20.0
LOOK_S: Final = 1.0
PIECE_S: Final = 15.0  # more time at a time


class Watchdog:
    """See the module's rules. `status` is what runs, in one line."""

    def __init__(
        self,
        notifier: Notifier,
        turns: Turns,
        writer: Writer,
        supervisor: Supervisor,
        status: Callable[[], str],
    ) -> None:
        self._notifier = notifier
        self._turns, self._writer, self._supervisor = turns, writer, supervisor
        self._status = status
        self._stuck = ""
        self._said = ""
        self._pinged_at = -math.inf

    async def run(self) -> None:
        """Look until cancelled."""
        look_s = min(LOOK_S, self._notifier.watchdog_s / 3 or LOOK_S)
        while True:
            self.look()
            await trio.sleep(look_s)

    def look(self) -> None:
        stuck = self.stuck()
        if stuck and not self._stuck:
            message = "%s: the watchdog is not told that all is well"
            log.critical(message, stuck, extra=kind("watchdog_stuck", reason=stuck))
        elif self._stuck and not stuck:
            log.warning("it goes on: before, %s", self._stuck, extra=kind("watchdog_well"))
        self._stuck = stuck
        self._ping()
        self.say(f"stuck: {stuck}" if stuck else self._status())

    def _ping(self) -> None:
        now = trio.current_time()
        due_at = self._pinged_at + self._notifier.watchdog_s / 3 - LOOK_S / 2
        if self._notifier.watchdog_s and not self._stuck and now >= due_at:
            self._pinged_at = now
            self._notifier.send(WATCHDOG=1)

    def say(self, status: str) -> None:
        if status != self._said:
            self._said = status
            self._notifier.send(STATUS=status)

    def stuck(self) -> str:
        """What has not moved for too long; empty if all is well."""
        now = trio.current_time()
        sync = self._writer.sync_started_at
        if not self._writer.alive:
            return "the journal's thread is dead"
        if sync is not None and now - sync >= STUCK_S:
            return f"the disk has been syncing the journal for more than {STUCK_S:.0f} s"
        if now - self._turns.turned_at >= STUCK_S:
            return f"no turn was made for more than {STUCK_S:.0f} s"
        if now - self._supervisor.looked_at() >= STUCK_S:
            return f"nobody looked at the workers for more than {STUCK_S:.0f} s"
        return ""

    async def ask_for_time(self, longest_s: float, status: Callable[[], str]) -> None:
        """While the daemon stops: more time, until cancelled or for so long."""
        with trio.move_on_after(longest_s):
            while True:
                self._notifier.send(EXTEND_TIMEOUT_USEC=int(PIECE_S * 1e6), STATUS=status())
                await trio.sleep(LOOK_S)
