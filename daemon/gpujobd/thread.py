"""A thread of one's own: it does one call after the other for a task of the loop.

Rule 1: for what is done thousands of times a second. Everything else uses trio.to_thread, which finds a thread, checks
a limit and copies a context for every call: a tenth of a millisecond, as much as the commit itself may take.
Rule 2: a call is not given up half-way: who waits for it cannot be cancelled until it is over.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import outcome  # what trio's own low-level interface speaks; trio depends on it
import trio

T = TypeVar("T")


class OwnThread:
    """See the module's rules."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """False: it was there, and died."""
        return self._thread is None or self._thread.is_alive()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = self._thread = threading.Thread(target=self._work, name=self._name)
        thread.start()
        try:
            yield
        finally:
            self._calls.put(None)
            thread.join()  # at once: no call is left, see rule 2
            self._thread = None

    async def do(self, call: Callable[[], T]) -> T:
        """Run `call` there; returns or raises what it does."""
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()

        def work() -> None:
            token.run_sync_soon(trio.lowlevel.reschedule, task, outcome.capture(call))

        self._calls.put(work)
        result: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return result

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            work()
