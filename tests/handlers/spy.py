"""A handler that tells what the worker let it see."""

from __future__ import annotations

import os
import pathlib
import resource
import sys


class Spy:
    def __init__(self, *, device):
        pass

    def __call__(self, batch):
        return [{"path": sys.path, "modules": sorted(sys.modules), "env": dict(os.environ)} for _ in batch]


class Cell:
    """Tells how the worker it lives in is held."""

    def __init__(self, *, device):
        pass

    def __call__(self, batch):
        umask = os.umask(0o077)
        os.umask(umask)
        held = {
            fd: os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if fd.isdigit() and os.path.lexists(f"/proc/self/fd/{fd}")
        }
        facts = {
            "env": dict(os.environ),
            "fds": held,
            "cwd": os.getcwd(),
            "umask": umask,
            "leads_its_session": os.getsid(0) == os.getpid(),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "oom": int(pathlib.Path("/proc/self/oom_score_adj").read_text()),
            "argv": pathlib.Path("/proc/self/cmdline").read_text().split("\0"),
        }
        return [facts for _ in batch]
