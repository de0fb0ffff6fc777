"""A handler that tells what the worker let it see."""

from __future__ import annotations

import os
import sys


class Spy:
    def __init__(self, *, device):
        pass

    def __call__(self, batch):
        return [{"path": sys.path, "modules": sorted(sys.modules), "env": dict(os.environ)} for _ in batch]
