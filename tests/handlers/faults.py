"""Handlers that go wrong in every way a handler can."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time

from gpujobd_worker import Rejected, Transient


class OutOfMemoryError(RuntimeError):
    """Named and based as torch's own, for workers without torch."""


class AcceleratorError(RuntimeError):
    """Named and based as torch's own (since 2.8)."""


def _wrapped():
    """An exception of a library, raised from torch's."""
    wrapper = ValueError("generation failed")
    wrapper.__cause__ = OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return wrapper


SHORT_OF_MEMORY = {
    "tidy": lambda: OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
    ),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cudnn": lambda: RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in ..."
    ),
    "accelerator": lambda: AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 123 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
    "wrapped": _wrapped,
}
POISON = {
    "assert": lambda: AcceleratorError(
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be ..."
    ),
    "old assert": lambda: RuntimeError("CUDA error: device-side assert triggered"),
    "illegal": lambda: RuntimeError("CUDA error: an illegal memory access was encountered"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
}


class Faulty:
    """An item's `do` says what happens to the call it is in; outputs repeat the text.

    `fits`: calls of more items raise `short` (a key of SHORT_OF_MEMORY); 0: everything fits.
    `side`: a file that gets one line a call, "count: text text ...".
    """

    def __init__(self, *, device, fits=0, short="tidy", side=""):
        self.fits = fits
        self.short = short
        self.side = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if side else None
        self.tries = {}

    def __call__(self, batch):
        if self.side is not None:
            os.write(self.side, f"{len(batch)}: {' '.join(item['text'] for item in batch)}\n".encode())
        if self.fits and len(batch) > self.fits:
            raise SHORT_OF_MEMORY[self.short]()  # noqa: RSE102 - a factory
        if len(batch) > 1 and any(item.get("do") == "spoil" for item in batch):
            for item in batch:
                item["text"] = "spoiled"
            raise ValueError("after it had changed its items")
        for item in batch:
            self.suffer(item, alone=len(batch) == 1)
        return [self.output(item) for item in batch]

    def suffer(self, item, *, alone):
        do, _, what = item.get("do", "").partition(":")
        if do == "hang":
            while True:
                time.sleep(3600)
        elif do == "segfault":
            ctypes.string_at(0)
        elif do == "exit":
            os._exit(3)
        elif do == "sys.exit":
            sys.exit(3)
        elif do == "reject":
            raise Rejected("against a rule")
        elif do == "transient":
            self.tries[item["text"]] = self.tries.get(item["text"], 0) + alone
            if not alone or self.tries[item["text"]] < int(what):
                raise Transient("not now")
        elif do == "raise":
            raise KeyError(item["text"])
        elif do == "raise text":
            raise ValueError(what)
        elif do == "short":
            raise SHORT_OF_MEMORY[what]()  # noqa: RSE102 - a factory
        elif do == "poison":
            raise POISON[what]()  # noqa: RSE102 - a factory

    def output(self, item):
        do = item.get("do", "")
        if do == "nan":
            return {"value": math.nan}
        if do == "bytes":
            return {"value": b"no JSON"}
        if do == "circle":
            circle = {}
            circle["self"] = circle
            return circle
        if do == "list":
            return ["not", "a", "dict"]
        if do == "surrogate":
            return {"text": "half a pair: \ud800"}
        if do == "exception":
            return KeyError("in its place")
        if do == "rejected":
            return Rejected("in its place")
        return {"text": item["text"]}


class Short(Faulty):
    """Loses the last output of calls with an item that says so; returns None for others."""

    def __call__(self, batch):
        outputs = super().__call__(batch)
        if any(item.get("do") == "lose" for item in batch):
            return outputs[:-1]
        if any(item.get("do") == "none" for item in batch):
            return None
        return outputs


class Checked(Faulty):
    def check(self, item):
        if item.get("check") == "value":
            raise ValueError("too short")
        if item.get("check") == "key":
            raise KeyError("prompt")


class Loud(Faulty):
    """Floods stdout and stderr."""

    def __call__(self, batch):
        for _ in range(200):
            print("x" * 997)
            print("y" * 997, file=sys.stderr)
        return super().__call__(batch)


class SlowToLoad(Faulty):
    def __init__(self, *, device, load_s):
        super().__init__(device=device)
        time.sleep(load_s)


class Unloadable:
    def __init__(self, *, device):
        raise FileNotFoundError("/srv/models/none")


class Quitter:
    def __init__(self, *, device):
        sys.exit("no licence")


class NotCallable:
    def __init__(self, *, device):
        pass


class WithThread(Faulty):
    """Its own thread dies of an exception: that is its own affair."""

    def __init__(self, *, device):
        super().__init__(device=device)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()


class Closing(Faulty):
    def close(self):
        print("closed")
