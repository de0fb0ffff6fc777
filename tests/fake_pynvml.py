"""A pynvml that tells what a file says: copied as pynvml.py into a folder, it reads script.json there at every call.

    {"init": "ok", "driver": "610.43", "gpus": [{"uuid": "GPU-a", "total": ..., "used": ..., "processes": [[pid, bytes]]}]}
    init: ok, hang, crash, babble, nonsense, flood, mismatch, no_library, no_driver; of a GPU, "trouble": lost

Each process that imports it leaves a line in `looks`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).parent
NVML_TEMPERATURE_GPU = 0
NVML_COMPUTEMODE_PROHIBITED = 2
NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3
nvmlMemory_v2 = 2  # its name there


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_LibRmVersionMismatch(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


with open(FOLDER / "looks", "a") as looks:
    looks.write(f"{os.getpid()}\n")


def script() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "script.json").read_text())
    return found


def nvmlInit() -> None:
    match script()["init"]:
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "babble":
            sys.stdout.write("no line of ours\n")
            sys.stdout.flush()
            os._exit(0)
        case "nonsense":
            sys.stdout.write('gpujobd-nvml:{"gpus": [{"index": -1, "total_bytes": "many"}]}\n')
            sys.stdout.flush()
            os._exit(0)
        case "flood":
            while True:
                sys.stdout.write("x" * 65536)
        case "mismatch":
            raise NVMLError_LibRmVersionMismatch("Driver/library version mismatch")
        case "no_library":
            raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
        case "no_driver":
            raise NVMLError_DriverNotLoaded("Driver Not Loaded")


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetDriverVersion() -> str:
    return str(script().get("driver", "610.43"))


def nvmlDeviceGetCount() -> int:
    return len(script()["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:
    gpu: dict[str, Any] = script()["gpus"][index]
    if gpu.get("trouble") == "lost":
        raise NVMLError_GpuIsLost("GPU is lost")
    return gpu


def nvmlDeviceGetUUID(gpu: dict[str, Any]) -> str:
    return str(gpu["uuid"])


def nvmlDeviceGetName(gpu: dict[str, Any]) -> bytes:
    return str(gpu.get("name", "a fake GPU")).encode()  # as old bindings do


def nvmlDeviceGetMemoryInfo(gpu: dict[str, Any], version: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(total=gpu["total"], used=gpu["used"], free=gpu["total"] - gpu["used"])


def nvmlDeviceGetUtilizationRates(gpu: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(gpu=gpu.get("busy", 0))


def nvmlDeviceGetPowerUsage(gpu: dict[str, Any]) -> int:
    return int(gpu.get("power_mw", 71_500))


def nvmlDeviceGetEnforcedPowerLimit(_: dict[str, Any]) -> int:
    raise NVMLError_NotSupported("Not Supported")


def nvmlDeviceGetTemperature(gpu: dict[str, Any], _: int) -> int:
    return int(gpu.get("temperature", 41))


def nvmlDeviceGetCurrentClocksEventReasons(gpu: dict[str, Any]) -> int:
    return int(gpu.get("reasons", 1))


def nvmlDeviceGetComputeMode(gpu: dict[str, Any]) -> int:
    return int(gpu.get("mode", 0))


def nvmlDeviceGetComputeRunningProcesses(gpu: dict[str, Any]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in gpu.get("processes", [])]


def nvmlDeviceGetGraphicsRunningProcesses(gpu: dict[str, Any]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in gpu.get("graphics", [])]


def nvmlDeviceGetMPSComputeRunningProcesses(_: dict[str, Any]) -> list[SimpleNamespace]:
    raise NVMLError_NotSupported("Not Supported")
