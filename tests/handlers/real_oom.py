"""torch running out of real memory: the CPU's allocator under RLIMIT_AS."""

from __future__ import annotations

import resource
import time

import torch

MIB = 1 << 20


class Hungry:
    """Takes `item_mib` for every item of a call. May use `more_mib` on top of what the process has when it is loaded."""

    def __init__(self, *, device, item_mib, more_mib):
        self.numbers = item_mib * MIB // 4
        torch.ones(4).sum()
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more_mib * MIB,) * 2)

    def __call__(self, batch):
        time.sleep(0.02)  # a call costs the same whatever its size, so larger ones are faster on any machine
        numbers = torch.empty(len(batch), self.numbers)
        numbers[:, :1000] = 1.0
        return [{"sum": float(row[:1000].sum())} for row in numbers]
