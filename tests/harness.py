"""A real daemon in a folder of its own, a real client of its socket, and other users to be.

Everything started here is ended here, by process id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gpujobd import protocol

ROOT = Path(__file__).resolve().parent.parent
HANDLERS = Path(__file__).resolve().parent / "handlers"
HANG_S = 120.0  # nothing here takes so long: a test that waits for this has failed

T = TypeVar("T")


class Client:
    """One connection, requests one at a time or pipelined by hand."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.frames = protocol.Frames()
        self.replies: list[protocol.AnyReply] = []
        self.fds: list[int] = []
        self.last_id = 0
        try:
            self.sock.connect(
                str(path)
            )  # before the timeout is set: with one, a full queue is an error, not a wait
            self.sock.settimeout(HANG_S)
            self.send(protocol.Hello([protocol.VERSION], "tests"))
            self.welcome = self.receive()
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def send(self, request: protocol.AnyRequest) -> None:
        self.sock.sendall(protocol.frame(request))

    def receive(self) -> protocol.AnyReply:
        while not self.replies:
            data, ancillary, _, _ = self.sock.recvmsg(1 << 16, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
            for _, kind, passed in ancillary:
                if kind == socket.SCM_RIGHTS:
                    self.fds += struct.unpack(f"{len(passed) // 4}i", passed)
            if not data:
                raise ConnectionError("the daemon hung up")
            self.replies += map(protocol.decode_reply, self.frames.feed(data))
        return self.replies.pop(0)

    def ask(self, kind: type, **fields: Any) -> Any:
        """Send a request, return its next reply."""
        self.last_id += 1
        self.send(kind(id=self.last_id, **fields))
        reply = self.receive()
        while isinstance(reply, protocol.Alive):
            reply = self.receive()
        assert getattr(reply, "id", None) in (self.last_id, 0), reply
        return reply

    def submit(self, handler: str, lines: Iterable[object], **fields: Any) -> Any:
        """Submit items (JSON objects, or bytes as they are); small inputs inline, large ones streamed."""
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        data = b"".join(line + b"\n" for line in raw)
        header: dict[str, Any] = {
            "submit_id": uuid.uuid4().hex,
            "handler": handler,
            "items": len(raw),
            "input_bytes": len(data),
            "input_sha256": hashlib.sha256(data).digest(),
            "item_bytes": max(map(len, raw)),
        } | fields
        if len(data) <= protocol.INLINE_BYTES_MAX:
            return self.ask(protocol.Submit, **header, input=data)
        reply = self.ask(protocol.Submit, **header)
        if not isinstance(reply, protocol.GoOn):
            return reply
        for at in range(0, len(data), protocol.CHUNK_BYTES_MAX):
            self.send(protocol.Chunk(id=self.last_id, data=data[at : at + protocol.CHUNK_BYTES_MAX]))
        self.send(protocol.Chunk(id=self.last_id, data=b""))
        return self.receive()

    def job(self, job_id: int) -> protocol.Job:
        reply = self.ask(protocol.Show, job=job_id)
        assert isinstance(reply, protocol.OneJob), reply
        return reply.job

    def wait(self, *job_ids: int) -> list[protocol.Job]:
        reply = self.ask(protocol.Wait, jobs=list(job_ids))
        assert isinstance(reply, protocol.Jobs), reply
        return reply.jobs

    def output(self, job_id: int, *, errors: bool = False) -> list[Any]:
        return [json.loads(line) for line in self.raw_output(job_id, errors=errors).splitlines()]

    def raw_output(self, job_id: int, *, errors: bool = False) -> bytes:
        reply = self.ask(protocol.Output, job=job_id, errors=errors)
        assert isinstance(reply, protocol.File), reply
        fd = self.fds.pop()
        try:
            return os.pread(fd, reply.bytes, 0) if reply.bytes else b""
        finally:
            os.close(fd)


class Host:
    """A folder with a configuration, and the daemon that serves it."""

    def __init__(self, folder: Path, config: str = "", handlers: dict[str, str] | None = None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        self.socket = folder / "control.sock"
        self.program: list[object] = [sys.executable, "-m", "gpujobd"]
        self.environment: dict[str, str] = {}  # on top of ours
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(config, handlers or {})

    def configure(self, config: str, handlers: dict[str, str]) -> None:
        (self.folder / "gpujobd.toml").write_text(
            config if "devices" in config else f'devices = ["cpu"]\n{config}'
        )
        (self.folder / "handlers.d").mkdir(exist_ok=True)
        for name, text in handlers.items():
            (self.folder / "handlers.d" / f"{name}.toml").write_text(text)

    def __enter__(self) -> Host:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def start(self, *options: str) -> None:
        """Start it, with these options besides, and return when it answers."""
        self.launch(*options)
        self.wait_until_it_answers()

    def launch(self, *options: str) -> None:
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *[*self.program, "serve", "--config", self.folder / "gpujobd.toml"],
                    *["--state-dir", self.folder / "state", "--socket", self.socket],
                    *options,
                ],
                stderr=log,
                cwd=self.folder,
                env=os.environ | self.environment,
            )

    def wait_until_it_answers(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(OSError), self.client():
                return
            time.sleep(0.02)
        raise AssertionError(f"the daemon does not answer:\n{self.log()}")

    def client(self) -> Client:
        return Client(self.socket)

    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(HANG_S)

    def results(self, job_id: int) -> Path:
        return self.folder / "state" / "spool" / "jobs" / str(job_id) / "results.jsonl"

    def jobctl(self, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobctl", "--socket", str(self.socket), *words],
            input=text,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )


def fake(entry: str, **keys: object) -> str:
    """A handler file for a class of tests/handlers."""
    lines = [f'entry = "{entry}"', f'path = ["{HANDLERS}"]']
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if not isinstance(value, dict)]
    for key, value in keys.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def until(true: Callable[[], T], what: str) -> T:
    """Wait for something that has no push."""
    deadline = time.monotonic() + HANG_S
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {HANG_S:.0f} s for {what}"
        time.sleep(0.01)
    return value


def as_user(uid: int, do: Callable[[], T]) -> T:
    """Run `do` in a forked child with another uid (root only) and return what it returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(writer, pickle.dumps(do()))
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child of uid {uid} failed"
    return pickle.loads(answer)


@contextlib.contextmanager
def hosted(folder: Path, config: str = "", **handlers: str) -> Iterator[Host]:
    with Host(folder, config, handlers) as host:
        yield host
