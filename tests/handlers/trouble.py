"""Handlers that fail, in the ways that scenes need. An item says by itself what is wrong with it."""

from __future__ import annotations

import ctypes
import os
import signal
import time

from gpujobd_worker import Rejected, Transient


class Moody:
    """{"text": ...} is answered; {"mood": M} does what M says."""

    def __init__(self, *, device, side=""):
        self.side = side

    def __call__(self, batch):
        return [self._one(item) for item in batch]

    def _one(self, item):
        mood = item.get("mood")
        if mood == "reject":
            raise Rejected("against a rule")
        if mood == "transient":
            raise Transient("the neighbour is busy")
        if mood == "error":
            raise ValueError(f"cannot read {item['n']}")
        if mood == "object":
            return {"value": object()}
        if mood == "segfault":
            ctypes.string_at(0)
        if mood == "exit":
            os._exit(3)
        if mood == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mood in ("hang-once", "die-once", "freeze-once") and self._first_time(mood):
            if mood == "die-once":
                os._exit(0)
            if mood == "freeze-once":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)
        return {"text": item.get("text", mood)}

    def _first_time(self, mood):
        try:
            os.close(os.open(f"{self.side}.{mood}", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        return True


class Slow:
    """Takes `item_s` an item, however they are batched."""

    def __init__(self, *, device, item_s=0.01, load_s=0.0):
        self.item_s = item_s
        time.sleep(load_s)

    def __call__(self, batch):
        time.sleep(self.item_s * len(batch))
        return [{"text": item.get("text", "")} for item in batch]


class Stray(Slow):
    """Leaves a process behind that is in no session and has no parent of ours; it writes its pid to `side`."""

    def __init__(self, *, device, side, item_s=0.01):
        super().__init__(device=device, item_s=item_s)
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                with open(side, "w", encoding="ascii") as file:
                    file.write(str(os.getpid()))
                time.sleep(3600)
            os._exit(0)
        os.waitpid(child, 0)
