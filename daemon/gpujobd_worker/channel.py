"""A bounded line between two threads of a worker: puts wait while it is full, and closing it wakes both ends.

queue.Queue has no close() before Python 3.13, and no way to take all that waits at once, which is what lets the
writer turn many small batches into one write.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Channel(Generic[T]):
    def __init__(self, bound: int, weigh: Callable[[T], int] = lambda _: 1) -> None:
        """A put waits while the things in line weigh `bound` or more."""
        self._bound = bound
        self._weigh = weigh
        self._weight = 0
        self._waiting: collections.deque[T] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, thing: T) -> bool:
        """Wait for room and hand over. False: the channel was closed and `thing` was dropped."""
        with self._changed:
            while self._weight >= self._bound and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._waiting.append(thing)
            self._weight += self._weigh(thing)
            self._changed.notify_all()
            return True

    def get(self) -> T | None:
        """The next one; None: closed and empty."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return None
            self._changed.notify_all()
            thing = self._waiting.popleft()
            self._weight -= self._weigh(thing)
            return thing

    def get_all(self, timeout_s: float | None) -> list[T] | None:
        """All that waits, in order; empty: nothing came in time; None: closed and empty."""
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait(timeout_s)
            if not self._waiting:
                return None if self._closed else []
            things = list(self._waiting)
            self._waiting.clear()
            self._weight = 0
            self._changed.notify_all()
            return things

    def close(self) -> None:
        """No more puts. What waits can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
