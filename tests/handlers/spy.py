"""A handler that tells what the worker let it see."""

from __future__ import annotations

import getpass
import os
import pathlib
import resource
import socket
import sys
import tempfile


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


def outcome(do, *arguments):
    """What came of a call, as JSON can show it."""
    try:
        found = do(*arguments)
    except OSError as error:
        return type(error).__name__
    return found if isinstance(found, list) else "done"


def write_in(folder):
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")


class Walls:
    """Tries what the service keeps a worker from: to look into `see`, to write in `write`, to speak to anybody."""

    def __init__(self, *, device):
        pass

    def __call__(self, batch):
        print("said aloud")
        return [self.tried(item) for item in batch]

    def tried(self, item):
        return {
            "user": getpass.getuser(),
            "seen": {path: outcome(os.listdir, path) for path in item["see"]},
            "written": {folder: outcome(write_in, folder) for folder in item["write"]},
            "network": outcome(socket.create_connection, ("127.0.0.1", 9)),
            "stdin": os.readlink("/proc/self/fd/0"),
        }
