"""Handlers that do next to nothing."""

from __future__ import annotations

import hashlib
import os
import time


class Nothing:
    """Costs as little as a handler can, or `call_s` a call."""

    def __init__(self, *, device, call_s=0.0):
        self.call_s = call_s

    def __call__(self, batch):
        if self.call_s:
            time.sleep(self.call_s)
        return [{} for _ in batch]


class Echo:
    """Gives back what it got, plus the job's own parameters."""

    def __init__(self, *, device, **params):
        self.params = params

    def __call__(self, batch, **job_params):
        return [{"item": item, "params": self.params, "job_params": job_params} for item in batch]


class Count:
    """Deterministic output; writes every text it computes to a side file, one line each, and may be slow.

    With a `gate` it is slow until there is a file of that name. Mutates its items, as a careless handler may.
    """

    def __init__(self, *, device, side="", call_s=0.0, gate=""):
        self.side = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if side else None
        self.call_s = call_s
        self.gate = gate

    def __call__(self, batch):
        if not (self.gate and os.path.exists(self.gate)):
            time.sleep(self.call_s)
        if self.side is not None:
            os.write(self.side, "".join(item["text"] + "\n" for item in batch).encode())
        return [{"sha256": hashlib.sha256(item.pop("text").encode()).hexdigest()} for item in batch]
