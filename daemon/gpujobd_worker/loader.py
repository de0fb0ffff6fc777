"""From "module:Class" to a loaded handler.

Rule 1: folders of the administrator go to the front of sys.path, in their order, as with PYTHONPATH.
Rule 2: whatever the handler's module or its __init__ raises, sys.exit() included, is a failure to load and is told.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from typing import Any, NamedTuple

from gpujobd_worker import device
from gpujobd_worker.failures import OOM, classify, describe

TRACE_CHARS_MAX = 16_000


class Loaded(NamedTuple):
    handler: Any
    gauge: device.Gauge
    load_s: float


class LoadError(Exception):
    """The handler does not load; `error` is one line, `trace` is for the log."""

    def __init__(self, error: str, trace: str, *, out_of_memory: bool = False) -> None:
        super().__init__(error)
        self.error = error
        self.trace = trace
        self.out_of_memory = out_of_memory


def load(*, entry: str, path: list[str], device_name: str, params: dict[str, Any], threads: int) -> Loaded:
    """Import and make the handler.

    Raises:
        LoadError: it could not be.
    """
    sys.path[:0] = path
    if threads > 0:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when the libraries are imported
    gauge = device.Gauge(device_name)
    began = time.monotonic()
    try:
        made = _class(entry, threads)(device=device_name, **params)
    except BaseException as error:  # noqa: BLE001 - the handler's code: anything may come
        trace = traceback.format_exc()[-TRACE_CHARS_MAX:]
        raise LoadError(describe(error), trace, out_of_memory=classify(error).kind == OOM) from None
    if not callable(made):
        raise LoadError(f"{entry} cannot be called: it has no __call__", "")
    return Loaded(made, gauge, time.monotonic() - began)


def _class(entry: str, threads: int) -> Any:
    module_name, colon, class_name = entry.partition(":")
    if not (module_name and colon and class_name):
        raise ValueError(f"entry is {entry!r}, not module:Class")
    module = importlib.import_module(module_name)
    device.set_threads(threads)
    return getattr(module, class_name)
