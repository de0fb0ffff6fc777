"""What the worker knows of its device. torch is asked only where the handler has brought it in.

Everything here works without torch, without a GPU and after one has failed: facts that cannot be had are 0 or "".
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

CONTEXT_BYTES = 512 << 20  # of this process, which no allocator counts; the driver does
CPU_MODEL_KEYS = ("model name", "Model", "Hardware")  # of /proc/cpuinfo: x86, POWER and some ARM


def torch() -> Any | None:
    """The torch module if somebody imported it; never imports it."""
    module = sys.modules.get("torch")
    return module if hasattr(module, "cuda") else None


def set_threads(threads: int) -> None:
    """Limit the CPU threads of what the handler computes with. Call it between its import and its making."""
    module = torch()
    if module is not None and threads > 0:
        module.set_num_threads(threads)


class Gauge:
    """Memory that the handler has taken on its device since this was made."""

    def __init__(self, name: str) -> None:
        self.name = name  # "cuda:0", "cpu"
        self._before = _memory_bytes("VmRSS")

    @property
    def on_cuda(self) -> bool:
        module = torch()
        return self.name.startswith("cuda") and module is not None and bool(module.cuda.is_initialized())

    def peak_bytes(self) -> int:
        """The largest so far: what torch's allocator reserved on a GPU, resident memory on a CPU."""
        if self.on_cuda:
            return int(torch().cuda.max_memory_reserved(self.name))  # type: ignore[union-attr]
        return max(0, _memory_bytes("VmHWM") - self._before)

    def total_bytes(self) -> int:
        """All there is: of the GPU, or of the host."""
        if self.on_cuda:
            return int(torch().cuda.get_device_properties(self.name).total_memory)  # type: ignore[union-attr]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def others_bytes(self) -> int:
        """Of a GPU: about what other processes hold; 0 where nobody can tell."""
        if not self.on_cuda:
            return 0
        cuda = torch().cuda  # type: ignore[union-attr]
        free, total = cuda.mem_get_info(self.name)
        return max(0, int(total) - int(free) - int(cuda.memory_reserved(self.name)) - CONTEXT_BYTES)

    def uuid(self) -> str:
        """Of a GPU, where torch tells it (since 2.5)."""
        if not self.on_cuda:
            return ""
        return str(getattr(torch().cuda.get_device_properties(self.name), "uuid", ""))  # type: ignore[union-attr]

    def hardware(self) -> str:
        """The GPU's or the CPU's model name."""
        if self.on_cuda:
            return str(torch().cuda.get_device_name(self.name))  # type: ignore[union-attr]
        return _cpu_model()

    def free(self) -> None:
        """Give back what nothing refers to any more. Call it outside of any except block."""
        gc.collect()
        if self.on_cuda:
            torch().cuda.empty_cache()  # type: ignore[union-attr]


def _memory_bytes(key: str) -> int:
    """VmRSS, resident now, or VmHWM, its peak. Not ru_maxrss: a process inherits that from the one that started it."""
    found = _look_up("/proc/self/status", (key,))
    return int(found.split()[0]) * 1024 if found else 0  # "5000 kB", always: proc_pid_status(5)


def _cpu_model() -> str:
    return _look_up("/proc/cpuinfo", CPU_MODEL_KEYS) or os.uname().machine


def _look_up(path: str, keys: tuple[str, ...]) -> str:
    """The first value of one of the keys in a file of "key: value" lines."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in keys:
                    return value.strip()
    except OSError:
        pass
    return ""
