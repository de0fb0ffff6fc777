r"""The message pipe to the daemon, and the worker's lifeline.

    message := JSON object, UTF-8, no newline inside, at most MESSAGE_BYTES_MAX | "\\n"

Rule 1: end of file means that the daemon is gone: the process exits at once, in the middle of a call too.
Rule 2: a message that does not parse is the daemon's bug: the process exits, the daemon sees a dead worker.
Rule 3: nothing is sent after last_words().
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from typing import Any, Callable, NoReturn

MESSAGE_BYTES_MAX = 1 << 20
READ_BYTES = 1 << 16
TEXT_CHARS_MAX = 2000  # of a detail or an error text in a message

EXIT_DAEMON_GONE = 0
EXIT_BUG = 70  # EX_SOFTWARE

Message = dict[str, Any]


def start_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Start one of the worker's own threads. If it raises, the process ends: a worker without it would lie."""

    def run() -> None:
        try:
            target()
        except BaseException:  # noqa: BLE001 - the end of the process, whatever it was
            traceback.print_exc()
            leave(EXIT_BUG)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's shutdown, which waits for threads and runs the handler's code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the daemon reads no more, or the handler closed it
            stream.flush()
    os._exit(status)


class Pipe:
    """The worker's end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def send(self, kind: str, **fields: object) -> None:
        """Send one message; blocks while the daemon does not read."""
        with self._sending:
            self._write(kind, fields)

    def last_words(self, status: int, kind: str, **fields: object) -> NoReturn:
        """Send one message and end the process; no other thread gets a word in between or after."""
        with self._sending:
            self._write(kind, fields)
            leave(status)

    def _write(self, kind: str, fields: dict[str, object]) -> None:
        fields = {name: _utf8(value) if isinstance(value, str) else value for name, value in fields.items()}
        message = json.dumps({"type": kind, **fields}, allow_nan=False).encode() + b"\n"
        assert len(message) <= MESSAGE_BYTES_MAX, len(message)  # pairs with receive()
        try:
            self._end.sendall(message)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(EXIT_DAEMON_GONE)

    def receive(self, deliver: Callable[[Message], None]) -> None:
        """Deliver every message that comes; ends with the process."""
        buffer = bytearray()
        while piece := self._read():
            buffer += piece
            *lines, rest = buffer.split(b"\n")
            for line in lines:
                deliver(_parse(line))
            buffer = rest
            if len(buffer) > MESSAGE_BYTES_MAX:
                raise ValueError(f"a message of over {MESSAGE_BYTES_MAX} bytes")
        os._exit(EXIT_DAEMON_GONE)

    def _read(self) -> bytes:
        try:
            return self._end.recv(READ_BYTES)
        except ConnectionResetError:
            return b""


def _utf8(text: str) -> str:
    """Without lone surrogates, which other JSON readers refuse; an exception may quote an item that has one."""
    return text.encode("utf-8", "backslashreplace").decode()


def _parse(line: bytearray) -> Message:
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError(f"not a message: {bytes(line[:200])!r}")  # noqa: TRY004 - the text is wrong, not a type
    return message
