"""A handler that says all it is told: in its log, its errors, its death."""

from __future__ import annotations

import os
import time


class Loud:
    def __init__(self, *, device, item_s=0.0):
        self.item_s = item_s

    def __call__(self, batch, *, note=""):
        print(note, batch, flush=True)
        if any(item.get("die") for item in batch):
            os._exit(9)
        if wait_s := sum(item.get("wait_s", self.item_s) for item in batch):
            time.sleep(wait_s)
        return [self._one(item, note) for item in batch]

    @staticmethod
    def _one(item, note):
        if item.get("fail"):
            return ValueError(f"{note} {item}")
        return {"said": item, "note": note}
