"""Threads of a simulated world: there are none. What a thread would do is done in the loop, after a virtual while.

Rule 1: a call is done at the beginning or at the end of its while, by lot; who gives the wait up does not undo it.
Rule 2: the process may be killed before every call and after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import trio


class Delays(Protocol):
    def thread_s(self) -> float: ...
    def sync_s(self) -> float: ...
    def coin(self) -> bool: ...
    def step(self) -> None:
        """Raises: Killed where the process ends here."""


class Threads:
    """Stands in for trio.to_thread.run_sync."""

    def __init__(self, delays: Delays) -> None:
        self._delays = delays
        self._default = trio.CapacityLimiter(40)

    async def run_sync(
        self,
        call: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> Any:
        borrower = object()
        limiter = limiter or self._default
        await limiter.acquire_on_behalf_of(borrower)
        try:
            self._delays.step()
            while_s = self._delays.thread_s()
            if not while_s:
                return call(*args)
            if self._delays.coin():
                done = call(*args)
                await self._wait(while_s, abandon_on_cancel)
                return done
            await self._wait(while_s, abandon_on_cancel)
            return call(*args)
        finally:
            limiter.release_on_behalf_of(borrower)

    async def _wait(self, while_s: float, abandon_on_cancel: bool) -> None:
        with trio.CancelScope(shield=not abandon_on_cancel):
            await trio.sleep(while_s)
        self._delays.step()


class JournalThread:
    """Stands in for OwnThread: a sync takes as long as the simulated disk likes."""

    alive = True
    delays: Delays
    since_s: float | None = None  # world time at which the call in hand began
    now_s: Callable[[], float]

    def __init__(self, name: str) -> None:
        pass

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    async def do(self, call: Callable[[], Any]) -> Any:
        cls = type(self)
        cls.delays.step()
        cls.since_s = cls.now_s()
        try:
            with trio.CancelScope(shield=True):
                await trio.sleep(cls.delays.sync_s())
            cls.delays.step()
            return call()
        finally:
            cls.since_s = None
