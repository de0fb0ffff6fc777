"""Handlers that note when they are called, keep a device, or keep a processor busy."""

from __future__ import annotations

import hashlib
import os
import time


class Note:
    """One line a call in `side`: CLOCK_MONOTONIC in nanoseconds."""

    def __init__(self, *, device, side):
        self.side = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, batch):
        os.write(self.side, b"%d\n" % time.monotonic_ns())
        return [{} for _ in batch]


class Slow:
    """Keeps a device leased and the processor free."""

    def __init__(self, *, device, call_s=0.02):
        self.call_s = call_s

    def __call__(self, batch):
        time.sleep(self.call_s)
        return [{} for _ in batch]


class Busy:
    """The same work at every call, on the processor."""

    def __init__(self, *, device):
        self.block = bytes(16_000_000)

    def __call__(self, batch):
        hashlib.sha256(self.block).digest()
        return [{} for _ in batch]
