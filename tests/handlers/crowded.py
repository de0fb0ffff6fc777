"""A handler on a GPU that others use, too: torch's part is played, as far as the worker asks it.

`others` names a file with the GiB that others hold. What is left of 80 is room for items, whose size in GiB they say.
"""

from __future__ import annotations

import sys
import types

GIB = 1 << 30
TOTAL = 80 * GIB
MODEL = 10 * GIB


class OutOfMemoryError(RuntimeError):
    pass


class Crowded:
    def __init__(self, *, device, others):
        self.others = others
        properties = types.SimpleNamespace(total_memory=TOTAL, uuid="0000-aa")
        cuda = types.SimpleNamespace(
            is_initialized=lambda: True,
            mem_get_info=lambda _: (TOTAL - MODEL - self.held(), TOTAL),
            memory_reserved=lambda _: MODEL,
            max_memory_reserved=lambda _: MODEL,
            get_device_properties=lambda _: properties,
            get_device_name=lambda _: "a GPU",
            empty_cache=lambda: None,
        )
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
        if self.held() > TOTAL - MODEL:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 GiB")

    def held(self):
        with open(self.others, encoding="ascii") as file:
            return int(file.read()) * GIB

    def __call__(self, batch):
        if sum(item.get("gib", 0) for item in batch) * GIB > TOTAL - MODEL - self.held():
            raise OutOfMemoryError("CUDA out of memory")
        return [{} for _ in batch]
