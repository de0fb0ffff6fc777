"""A worker that speaks the messages and computes nothing: what goes wrong with it is chosen by `params.behave`.

Started as the real one is: PYTHON -u -B tests/fake_worker.py --fd N.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time

BATCH = 10


class Fake:
    def __init__(self, fd: int) -> None:
        self.end = socket.socket(fileno=fd)
        self.orders: queue.Queue[dict] = queue.Queue()
        self.yield_asked = 0
        self.sending = threading.Lock()
        self.params: dict = {}
        self.attempt = self.line = self.progress = 0
        self.beating = True

    def send(self, kind: str, **fields: object) -> None:
        with self.sending:
            self.end.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")

    def beat(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            if self.beating:
                self.send(
                    "heartbeat", attempt=self.attempt, line=self.line, batch=BATCH, progress=self.progress
                )

    def read(self) -> None:
        for line in self.end.makefile("r"):
            message = json.loads(line)
            if message["type"] == "dump":
                faulthandler.dump_traceback(all_threads=True)
            elif message["type"] == "yield":
                self.yield_asked = message["attempt"]
            else:
                self.orders.put(message)
        os._exit(0)  # the lifeline

    def serve(self) -> None:
        self.send("hello", pid=os.getpid(), python="3", worker="fake")
        threading.Thread(target=self.read, daemon=True).start()
        while True:
            message = self.orders.get()
            getattr(self, "on_" + message.pop("type"))(message)

    def on_load(self, load: dict) -> None:
        self.params = load["params"]
        if "record" in self.params:
            with open(self.params["record"], "a") as record:
                record.write(json.dumps({"env": dict(os.environ), "load": load, "facts": facts()}) + "\n")
        threading.Thread(target=self.beat, args=(load["heartbeat_s"],), daemon=True).start()
        behave = self.params.get("behave", "work")
        if behave == "load_fails":
            print("about to fail", flush=True)
            self.send("load_failed", error="ImportError: no torch here", trace="Traceback: the whole of it\n")
            sys.exit(1)
        if behave == "load_runs_out":
            print("CUDA out of memory, says torch", flush=True)
            error = "OutOfMemoryError: CUDA out of memory"
            self.send("load_failed", error=error, trace="", out_of_memory=True)
            sys.exit(1)
        if behave == "load_dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if behave == "load_hangs":
            time.sleep(600)
        print("loaded, says the model", flush=True)
        self.send(
            "loaded",
            load_s=0.5,
            vram_bytes=self.params.get("vram_bytes", 0),
            device_bytes=self.params.get("device_bytes", 0),
            hardware="a fake",
        )

    def on_exit(self, _: dict) -> None:
        if self.params.get("behave") == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)

    def on_lease(self, lease: dict) -> None:
        self.attempt = lease["attempt"]
        self.dir = lease["dir"]
        self.failed = lease["checkpoint"]["failed"]
        self.yield_asked = 0  # of a lease before, which may have had the same number
        if "leases" in self.params:
            with open(self.params["leases"], "a") as record:
                record.write(json.dumps({"pid": os.getpid(), **lease}) + "\n")
        lock = os.open(os.path.join(self.dir, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print(f"job {lease['job']} begins", flush=True)
        self.last: tuple[str, dict] | None = None
        getattr(self, self.params.get("behave", "work"))(lease)
        os.close(lock)
        if self.last:
            self.send(self.last[0], **self.last[1])
        self.attempt = 0

    def checkpoint(self, upto: int, **changes: int) -> dict:
        zero = {"deferred": [], "results_crc": 0, "errors_bytes": 0, "errors_crc": 0}
        done = {"upto": upto, "done": upto - self.failed, "failed": self.failed, "results_bytes": upto * 10}
        return {**zero, **done, **changes}

    def report(self, kind: str, upto: int, **changes: int) -> None:
        timings = {"load_s": 0, "read_s": 0.1, "compute_s": 0.2, "write_s": 0.1, "sync_s": 0.1}
        fields = {"attempt": self.attempt, "checkpoint": self.checkpoint(upto, **changes), "timings": timings}
        if kind == "checkpoint":
            self.send(kind, **fields)
        else:
            self.last = (kind, fields)  # sent once the lock is free

    def suspect(self, first: int, last: int, *before: int) -> None:
        page = struct.pack("<QQQQQ", self.attempt, first, last, *(before or (0, 0))).ljust(64, b"\0")
        with open(os.path.join(self.dir, "suspects"), "wb") as file:
            file.write(page)

    # --- what a lease may come to -----------------------------------------------------------------------------------

    def work(self, lease: dict) -> None:
        upto = lease["checkpoint"]["upto"]
        if lease["canary"]:
            self.send("canary", attempt=self.attempt)
        while upto < lease["items"]:
            if self.yield_asked == self.attempt:
                self.report("yielded", upto)
                return
            time.sleep(self.params.get("batch_s", 0.01))
            upto = self.line = min(upto + BATCH, lease["items"])
            self.progress += 1
            if upto < lease["items"]:
                self.report("checkpoint", upto)
        self.report("finished", upto)

    deaf = work

    def gives_way(self, lease: dict) -> None:
        """An item does not fit beside others, who hold 30 GiB."""
        if lease["gives_way"]:
            self.report("yielded", 10)
            self.last[1]["others_bytes"] = 30 << 30
        else:
            self.work(lease)

    def segfault(self, _: dict) -> None:
        self.report("checkpoint", 10)
        self.suspect(21, 30, 11, 20)
        os.kill(os.getpid(), signal.SIGSEGV)

    def die_when_told(self, _: dict) -> None:
        self.report("checkpoint", 10)
        while not os.path.exists(os.path.join(self.dir, "die")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def stale_suspects(self, _: dict) -> None:
        self.attempt += 1
        self.suspect(21, 30)
        os._exit(3)

    def exit_without_result(self, _: dict) -> None:
        os._exit(0)

    def stop(self, _: dict) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def spin(self, _: dict) -> None:
        self.suspect(1, 10)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            spinning_for_ever()

    def flood(self, lease: dict) -> None:
        for _ in range(64):
            os.write(1, b"x" * 65535 + b"\n")
        self.report("finished", lease["items"])

    def endless_flood(self, _: dict) -> None:
        self.beating = False
        while True:
            os.write(1, b"x" * 65535 + b"\n")

    def garbage(self, _: dict) -> None:
        with self.sending:
            self.end.sendall(b"\x00\xff{nonsense\n")
        time.sleep(600)

    def endless_line(self, _: dict) -> None:
        with self.sending, contextlib.suppress(OSError):
            while True:
                self.end.sendall(b"x" * 65536)

    def heartbeat_flood(self, _: dict) -> None:
        while True:
            self.send("heartbeat", attempt=self.attempt, line=1, batch=1, progress=1)

    def foreign_attempt(self, _: dict) -> None:
        self.attempt += 1
        self.report("checkpoint", 10)
        time.sleep(600)

    def late_heartbeat(self, lease: dict) -> None:
        self.send("heartbeat", attempt=self.attempt - 1, line=999, batch=1, progress=1)
        self.work(lease)

    def backwards(self, _: dict) -> None:
        self.report("checkpoint", 20)
        self.report("checkpoint", 10)
        time.sleep(600)

    def finishes_early(self, _: dict) -> None:
        self.report("finished", 10)

    def lose(self, _: dict, *, exits: bool = False) -> None:
        cause = self.params["cause"]
        self.suspect(11, 20)
        checkpoint = self.checkpoint(10)
        fields = {"attempt": self.attempt, "cause": cause, "detail": "as told", "checkpoint": checkpoint}
        if exits:
            self.send("lost", **fields)
            os._exit(1)
        self.last = ("lost", fields)

    def lose_and_exit(self, lease: dict) -> None:
        self.lose(lease, exits=True)

    def daemonise(self, _: dict) -> None:
        """Leave a grandchild in a session of its own; unmarked, it sheds its environment, too."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open(self.params["orphan"], "w") as file:
                    file.write(str(os.getpid()))
                if self.params["marked"]:
                    time.sleep(600)
                os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"], {})
            os._exit(0)
        os.wait()
        while not os.path.exists(self.params["orphan"]) or not os.path.getsize(self.params["orphan"]):
            time.sleep(0.01)
        os._exit(7)


def spinning_for_ever() -> None:
    for _ in range(100_000):
        pass


def facts() -> dict:
    import resource

    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "session": os.getsid(0),
        "umask": os.umask(0o077),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "oom_score_adj": int(open("/proc/self/oom_score_adj").read()),
        "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) < 3},
        "fd_count": len(os.listdir("/proc/self/fd")),
    }


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    Fake(int(sys.argv[sys.argv.index("--fd") + 1])).serve()
