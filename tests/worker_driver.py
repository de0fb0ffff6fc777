"""Plays the daemon: a real worker process at the other end of a real socket pair."""

from __future__ import annotations

import json
import os
import pathlib
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
WORKER = ROOT / "daemon" / "gpujobd_worker" / "__main__.py"
HANDLERS = ROOT / "tests" / "handlers"
HANG_LIMIT_S = 60.0

FRESH = {
    "upto": 0,
    "deferred": [],
    "results_bytes": 0,
    "results_crc": 0,
    "errors_bytes": 0,
    "errors_crc": 0,
    "done": 0,
    "failed": 0,
    "failure_codes": {},
}


class Job:
    """A job's folder, as the daemon would make it."""

    def __init__(self, folder: pathlib.Path, lines: list[Any], *, job_id: int = 42) -> None:
        """`lines`: bytes as they are, all else as JSON."""
        self.folder = folder
        self.job_id = job_id
        self.items = len(lines)
        self.checkpoint: dict[str, Any] = dict(FRESH)
        self.attempt = 0
        folder.mkdir(mode=0o700)
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "input.jsonl").write_bytes(b"".join(line + b"\n" for line in raw))
        (folder / "lock").touch(0o600)
        (folder / "suspects").write_bytes(bytes(64))

    def results(self) -> list[dict[str, Any]]:
        return self._records("results")

    def errors(self) -> list[dict[str, Any]]:
        return self._records("errors")

    def bytes_of(self, name: str) -> bytes:
        path = self.folder / f"{name}.jsonl"
        return path.read_bytes() if path.exists() else b""

    def suspects(self) -> tuple[int, int, int, int, int]:
        """attempt, current first, current last, previous first, previous last"""
        return struct.unpack_from("<QQQQQ", (self.folder / "suspects").read_bytes())

    def _records(self, name: str) -> list[dict[str, Any]]:
        data = self.bytes_of(name)[: self.checkpoint[f"{name}_bytes"]]
        return [json.loads(line) for line in data.splitlines()]


class WorkerDriver:
    """One worker. Close it, or use it as a context: only this process is ended."""

    def __init__(
        self, *, python: str = sys.executable, env: dict[str, str] | None = None, **options: Any
    ) -> None:
        ours, theirs = socket.socketpair()
        self.end = ours
        self.process = subprocess.Popen(
            [python, str(WORKER), "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                "PATH": os.environ["PATH"],
                "OMP_WAIT_POLICY": "PASSIVE",
                "HF_HUB_OFFLINE": "1",
                **(env or {}),
            },
            **options,
        )
        theirs.close()
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()
        self.log = b""
        self._buffer = b""
        self.seen: list[dict[str, Any]] = []  # all messages, heartbeats too

    # --- messages -------------------------------------------------------------------------------------------

    def send(self, kind: str, **fields: Any) -> None:
        self.end.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")

    def next(self, limit_s: float = HANG_LIMIT_S) -> dict[str, Any] | None:
        """The next message; None: the worker's end is closed. What it prints is collected meanwhile."""
        until = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left_s = until - time.monotonic()
            assert left_s > 0, f"no message in {limit_s} s; log:\n{self.log.decode(errors='replace')}"
            ready, _, _ = select.select([self.end, self._out], [], [], left_s)
            if self._out in ready:
                self._drain()
            if self.end in ready:
                piece = self._receive()
                if not piece:
                    return None
                self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        assert len(line) <= 1 << 20
        message = json.loads(line)
        self.seen.append(message)
        return message

    def expect(self, *kinds: str, limit_s: float = HANG_LIMIT_S) -> dict[str, Any]:
        """The next message of one of these types; heartbeats and checkpoints in between are passed over."""
        while True:
            message = self.next(limit_s)
            assert message is not None, f"worker gone; log:\n{self.read_log()}"
            if message["type"] in kinds:
                return message
            assert message["type"] in ("heartbeat", "checkpoint", "hello"), (message, self.read_log())

    def _receive(self) -> bytes:
        try:
            return self.end.recv(1 << 16)
        except ConnectionResetError:
            return b""

    def _drain(self) -> None:
        piece = os.read(self._out, 1 << 16)
        self.log += piece
        if not piece:
            self._out_closed()

    def _out_closed(self) -> None:
        time.sleep(0.01)

    # --- the daemon's side ----------------------------------------------------------------------------------

    def load(self, entry: str, **fields: Any) -> dict[str, Any]:
        message = {
            "handler": "test",
            "path": [str(HANDLERS)],
            "device": "cpu",
            "params": {},
            "threads": 1,
            "heartbeat_s": 0.1,
            "checkpoint_s": 0.05,
        }
        self.send("load", entry=entry, **{**message, **fields})
        return self.expect("loaded", "load_failed")

    def lease(self, job: Job, **fields: Any) -> None:
        job.attempt += 1
        message = {
            "job": job.job_id,
            "attempt": job.attempt,
            "dir": str(job.folder),
            "items": job.items,
            "batch_max": 16,
            "job_params": {},
            "failures_max": -1,
            "checkpoint": job.checkpoint,
            "suspects": [],
            "condemned": [],
            "canary": 0,
        }
        self.send("lease", **{**message, **fields})

    def run(self, job: Job, **fields: Any) -> dict[str, Any]:
        """Lease the job and return what ended the lease; the job's checkpoint moves along."""
        self.lease(job, **fields)
        return self.finish(job)

    def finish(self, job: Job, limit_s: float = HANG_LIMIT_S) -> dict[str, Any]:
        while True:
            message = self.next(limit_s)
            assert message is not None, f"worker gone; log:\n{self.read_log()}"
            if "checkpoint" in message:
                assert message["attempt"] == job.attempt
                job.checkpoint = message["checkpoint"]
            if message["type"] in ("finished", "yielded", "lost"):
                return message

    def until_gone(self, job: Job | None = None) -> int:
        """Read to the end of the pipe; the exit status."""
        while (message := self.next()) is not None:
            if job is not None and "checkpoint" in message:
                job.checkpoint = message["checkpoint"]
        return self.wait()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        self.read_log()
        return self.process.wait(HANG_LIMIT_S)

    def read_log(self) -> str:
        """All that is printed until the process closes its output, or what came in half a second."""
        while select.select([self._out], [], [], 0.5)[0]:
            piece = os.read(self._out, 1 << 16)
            if not piece:
                break
            self.log += piece
        return self.log.decode(errors="replace")

    def close(self) -> None:
        self.end.close()  # the lifeline: the worker exits by itself
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> WorkerDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
