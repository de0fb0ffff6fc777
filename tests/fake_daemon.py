"""A daemon that says what a test tells it to, over a real socket. Speaks gpujobd.protocol and keeps no state.

    with FakeDaemon(tmp_path / "s") as daemon:
        daemon.on(p.Ping, lambda call: [p.Pong(id=call.request.id, program="fake", seq=7)])
        ... run jobctl ...
        assert daemon.requests == [...]

A script returns the replies to send, and may yield them one by one; `HangUp` among them closes the connection, and a
`Descriptor` is sent along with the reply after it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpujobd import protocol as p


class HangUp:
    """Close the connection here."""


@dataclass
class Descriptor:
    """Send this descriptor with the next reply."""

    fd: int


@dataclass
class Call:
    """One request, and which connection it came over."""

    request: Any
    connection: int
    answered: threading.Event = field(default_factory=threading.Event)


Step = p.AnyReply | p.AnyNotifierReply | HangUp | Descriptor | None
Script = Callable[[Call], Iterable[Step]]


class FakeDaemon:
    def __init__(self, path: Path, decode: Callable[[bytes], Any] = p.decode_request) -> None:
        """`decode`: that of the notifier's requests makes it a notifier."""
        self.path = path
        self._decode = decode
        self.requests: list[Any] = []
        self.connections = 0
        self.greetings: list[p.Hello] = []
        self.welcome: p.AnyReply = p.Welcome(p.VERSION, "gpujobd 0.0.fake", "boot", os.getuid())
        self._scripts: dict[type, Script] = {}
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    def on(self, kind: type, script: Script) -> None:
        """Answer requests of this kind with this script."""
        self._scripts[kind] = script

    def answer(self, kind: type, *replies: p.AnyReply) -> None:
        """Answer every request of this kind with these replies, under its id."""
        from msgspec.structs import replace

        self.on(kind, lambda call: [replace(reply, id=call.request.id) for reply in replies])

    def asked(self, kind: type) -> list:
        return [request for request in self.requests if isinstance(request, kind)]

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> FakeDaemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        """Close everything, as a daemon that was killed; `start` brings it back."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self.path.unlink()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10)
                assert not thread.is_alive()
        self._threads.clear()

    def _spawn(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(sock)
            self._spawn(self._serve, sock, self.connections)

    def _serve(self, sock: socket.socket, number: int) -> None:
        frames = p.Frames()
        try:
            with sock:
                while received := sock.recv(1 << 20):
                    for body in frames.feed(received):
                        if not self._one(sock, number, self._decode(body)):
                            return
        except OSError:
            pass
        finally:
            self._open.discard(sock)

    def _one(self, sock: socket.socket, number: int, request: p.AnyRequest) -> bool:
        if isinstance(request, p.Hello):
            self.greetings.append(request)
            sock.sendall(p.frame(self.welcome))
            return not isinstance(self.welcome, p.Error)
        self.requests.append(request)
        script = self._scripts.get(type(request), lambda call: [])
        fds: list[int] = []
        for step in script(Call(request, number)):
            if isinstance(step, HangUp):
                return False
            if isinstance(step, Descriptor):
                fds = [step.fd]
            elif step is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sock.sendmsg([p.frame(step)], rights)
                fds = []
        return True


def a_job(**fields) -> p.Job:
    """A job as a daemon would show it; `total`, `done` and `failed` are of its items."""
    import datetime as dt

    items = p.Items(total=fields.pop("total", 10), done=fields.pop("done", 0), failed=fields.pop("failed", 0))
    known = {
        "id": 42,
        "tenant": "alice",
        "owner": "alice",
        "handler": "embed",
        "priority": "normal",
        "state": "queued",
        "submitted_at": dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC),
    }
    return p.Job(items=items, **{**known, **fields})
