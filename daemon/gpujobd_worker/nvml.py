"""One look at the GPUs by their driver (NVML), in a process of its own; it prints one line and ends.

    PYTHON -B .../gpujobd_worker/nvml.py [FOLDER ...]         FOLDERs: in front of the import path, as of a handler

    gpujobd-nvml:{"driver": "610.43", "gpus": [{"index": 0, "uuid": "GPU-...", "total_bytes": ..., ...}]}
    gpujobd-nvml:{"trouble": "no_module", "detail": "..."}    no_module, no_library, no_driver, mismatch, failed

Rule 1: whoever asks a driver may hang in it for ever. So it is this process that asks, and nobody waits for its end.
Rule 2: nothing stays open: a process that keeps a handle keeps the GPU from being reset, and the driver from being
replaced. It asks once, shuts NVML down, and ends; if nobody ends it, an alarm does.
Rule 3: each figure is asked for by itself: what a GPU does not tell (GeForce, MIG) is left out, and the rest is told.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from typing import Any, Callable

FOLDER = os.path.dirname(os.path.abspath(__file__))
MARK = "gpujobd-nvml:"
ALARM_S = 60  # the daemon waits for less
PROCESSES_MAX = 200  # of a GPU, the largest
TEXT_CHARS_MAX = 200
# Bits of nvmlClocksEventReasons: those that hold an H200 back, not those that say it is idle or set so.
THROTTLES = {
    0x04: "power_cap",
    0x08: "hw_slowdown",
    0x20: "thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
}
TROUBLES = {
    "NVMLError_LibraryNotFound": "no_library",
    "NVMLError_DriverNotLoaded": "no_driver",
    "NVMLError_LibRmVersionMismatch": "mismatch",
}
LOST = {"NVMLError_GpuIsLost": "lost", "NVMLError_ResetRequired": "reset_required"}


def look(nvml: Any) -> dict[str, Any]:
    """What NVML tells of this host."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {"trouble": TROUBLES.get(type(error).__name__, "failed"), "detail": _words(error)}
    try:
        count = nvml.nvmlDeviceGetCount()
        driver = _text(_asked(nvml, nvml.nvmlSystemGetDriverVersion))
        return {"driver": driver, "gpus": [_gpu(nvml, index) for index in range(count)]}
    except nvml.NVMLError as error:
        return {"trouble": TROUBLES.get(type(error).__name__, "failed"), "detail": _words(error)}
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return {"index": index, **_facts(nvml, handle)}
    except nvml.NVMLError as error:
        return {
            "index": index,
            "trouble": LOST.get(type(error).__name__, "failed"),
            "detail": _words(error),
        }


def _facts(nvml: Any, handle: Any) -> dict[str, Any]:
    """Raises: NVMLError, where the GPU is lost: then it has no facts."""
    memory = _memory(nvml, handle)
    rates = _asked(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _asked(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    limit_mw = _asked(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    return {
        "uuid": _text(_asked(nvml, nvml.nvmlDeviceGetUUID, handle)),
        "name": _text(_asked(nvml, nvml.nvmlDeviceGetName, handle)),
        "total_bytes": int(memory.total) if memory else 0,
        "used_bytes": int(memory.used) if memory else 0,
        "free_bytes": int(memory.free) if memory else 0,
        "utilisation": int(rates.gpu) if rates else None,
        "temperature_c": _asked(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": power_mw / 1000 if power_mw is not None else None,
        "power_limit_w": limit_mw / 1000 if limit_mw is not None else None,
        "throttled": _throttled(nvml, handle),
        "compute_mode": _compute_mode(nvml, handle),
        "processes": _processes(nvml, handle),
    }


def _memory(nvml: Any, handle: Any) -> Any:
    """Version 2 keeps what the driver itself reserves out of `used`; older drivers have version 1 alone."""
    version_2 = getattr(nvml, "nvmlMemory_v2", None)
    memory = _asked(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, version_2) if version_2 else None
    return memory or _asked(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)


def _throttled(nvml: Any, handle: Any) -> list[str]:
    ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)  # its name since driver 535
    bits = _asked(nvml, ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    return [word for bit, word in THROTTLES.items() if bits & bit]


def _compute_mode(nvml: Any, handle: Any) -> str:
    mode = _asked(nvml, nvml.nvmlDeviceGetComputeMode, handle)
    words = {
        nvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive",
    }
    return words.get(mode, "shared")


def _processes(nvml: Any, handle: Any) -> list[list[int | None]]:
    """[pid, bytes] of whoever has a context there, the largest first; None bytes where the driver does not tell."""
    held: dict[int, int | None] = {}
    for name in (
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetGraphicsRunningProcesses",
        "nvmlDeviceGetMPSComputeRunningProcesses",
    ):
        ask = getattr(nvml, name, None)
        for process in (_asked(nvml, ask, handle) if ask else None) or []:
            told = process.usedGpuMemory
            held[process.pid] = (
                max(held.get(process.pid) or 0, told) if told is not None else held.get(process.pid)
            )
    ranked = sorted(held.items(), key=lambda pair: -(pair[1] or 0))
    return [[pid, count] for pid, count in ranked[:PROCESSES_MAX]]


def _asked(nvml: Any, ask: Callable[..., Any], *of: Any) -> Any:
    """The answer; None where there is none. Raises: NVMLError, where the GPU is gone."""
    try:
        return ask(*of)
    except nvml.NVMLError as error:
        if type(error).__name__ in LOST:
            raise
        return None


def _text(told: Any) -> str:
    """Old bindings tell bytes."""
    return (told.decode(errors="replace") if isinstance(told, bytes) else str(told or ""))[:TEXT_CHARS_MAX]


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:TEXT_CHARS_MAX]


def main(folders: list[str]) -> None:
    """Nothing of this folder is importable here: its names would hide those of others."""
    signal.alarm(ALARM_S)
    sys.path[:] = [*folders, *(entry for entry in sys.path if os.path.abspath(entry or ".") != FOLDER)]
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        told = {"trouble": "no_module", "detail": _words(error)}
    else:
        told = look(nvml)
    sys.stdout.write(f"\n{MARK}{json.dumps(told)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
