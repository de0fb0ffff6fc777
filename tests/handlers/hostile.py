"""A handler that turns against its own worker, and through it against the daemon. An item says how, in `do`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import time

from gpujobd_worker.call import Pulse
from gpujobd_worker.pipe import Pipe

MIB = 1 << 20


def the(kind):
    """The one object of that class in this process."""
    (found,) = (thing for thing in gc.get_objects() if type(thing) is kind)
    return found


class Hostile:
    """`side`: a folder for what is done only once, whatever worker comes after this one."""

    def __init__(self, *, device, side):
        self.side = side

    def __call__(self, batch):
        for item in batch:
            do = item.get("do", "")
            if do and (do in ("poison", "memory") or self.first_time(do + item["text"])):
                getattr(self, do)(item)
        return [{"text": item["text"]} for item in batch]

    def first_time(self, what):
        try:
            os.close(os.open(os.path.join(self.side, what), os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        return True

    # --- ends ---------------------------------------------------------------------------------------------------

    def poison(self, _):
        os._exit(3)

    def segfault(self, _):
        ctypes.string_at(0)

    def vanish(self, _):
        os._exit(0)

    def freeze(self, _):
        os.kill(os.getpid(), signal.SIGSTOP)

    def spin(self, _):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass

    def memory(self, _):
        """As much as the limit of a container would end."""
        before = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MIB, before[1]))
        try:
            bytearray(1024 * MIB)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def orphan(self, item):
        """Leave a grandchild in a session of its own that holds everything that was open."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open(os.path.join(self.side, "orphan" + item["text"]), "w", encoding="ascii") as file:
                    file.write(str(os.getpid()))
                time.sleep(3600)
            os._exit(0)
        os.wait()
        while not os.path.getsize(os.path.join(self.side, "orphan" + item["text"])):
            time.sleep(0.01)
        os._exit(7)

    # --- words --------------------------------------------------------------------------------------------------

    def say(self, data):
        the(Pipe)._end.sendall(data)

    def tell(self, kind, *, late=0, **fields):
        attempt = the(Pulse).attempt - late
        self.say(json.dumps({"type": kind, "attempt": attempt, **fields}).encode() + b"\n")

    def wait_for_the_end(self):
        time.sleep(3600)

    def all_done(self, item, **changes):
        """The checkpoint of a job in which every item was computed, though none was."""
        nothing = {"deferred": [], "results_crc": 0, "errors_bytes": 0, "errors_crc": 0, "failed": 0}
        return {**nothing, "upto": item["of"], "done": item["of"], "results_bytes": 0, **changes}

    def flood(self, _):
        for _ in range(32):
            os.write(1, b"x" * (MIB - 1) + b"\n")

    def garbage(self, item):
        self.say(os.urandom(item["of"] * 10) + b"\n\x00{nonsense\n")
        self.wait_for_the_end()

    def oversize(self, _):
        with contextlib.suppress(OSError):
            self.say(b'{"type": "hello", "python": "' + b"x" * 2 * MIB)
        self.wait_for_the_end()

    def half(self, _):
        self.say(b'{"type": "finished", "att')
        os._exit(0)

    def twice(self, _):
        self.say(b'{"type": "loaded", "load_s": 1.0}\n' * 2)
        self.wait_for_the_end()

    def late(self, _):
        """What a worker of an earlier lease may still have had in its pipe: it means nothing, and harms nothing."""
        self.tell("heartbeat", late=1, line=999_999, batch=1, progress=1)

    def stale(self, item):
        """The same, of what would count."""
        self.tell("finished", late=1, checkpoint=self.all_done(item))
        self.wait_for_the_end()

    def early(self, item):
        """Of a lease that is not there yet."""
        self.tell("finished", late=-1, checkpoint=self.all_done(item))
        self.wait_for_the_end()

    def lie(self, item):
        self.tell("finished", checkpoint=self.all_done(item, upto=item["of"] + 1))
        self.wait_for_the_end()

    def backwards(self, item):
        self.tell("checkpoint", checkpoint=self.all_done(item, upto=-1, done=-1))
        self.wait_for_the_end()
