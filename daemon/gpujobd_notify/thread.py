"""The outbox in a thread of its own: whoever asks waits, nobody else does.

Rule 1: one question at a time: SQLite's connection is one, and a commit waits for a disk.
Rule 2: a question that was asked is answered, also when the one who asked is cancelled: a commit is whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import trio

from gpujobd_notify.store import Store

P = ParamSpec("P")
T = TypeVar("T")


class Asked:
    """`await asked(Store.next, ...)`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = trio.CapacityLimiter(1)

    async def __call__(
        self, question: Callable[Concatenate[Store, P], T], /, *args: P.args, **more: P.kwargs
    ) -> T:
        return await trio.to_thread.run_sync(
            lambda: question(self._store, *args, **more), limiter=self._thread
        )
