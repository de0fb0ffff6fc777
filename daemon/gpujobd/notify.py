"""What systemd is told: ready, what runs, still alive, on the way down. Without systemd, nothing.

Rule 1: the socket never blocks. What cannot be sent at once is sent with the next message; of STATUS and WATCHDOG only
the newest counts, so these are dropped.
Rule 2: a value is one line of ASCII: what somebody named a file or a tenant tells systemd nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Final

import sdnotify

VALUE_CHARS_MAX: Final = 500  # systemd reads 4096 bytes a message
LATER_MAX: Final = 16
FLEETING: Final = frozenset({"STATUS", "WATCHDOG"})


class Notifier:
    """sd_notify(3) by the sdnotify package, made non-blocking: a systemd that does not read must not stop the loop."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.watchdog_s = _watchdog_s(environ)
        self._later: deque[str] = deque(maxlen=LATER_MAX)
        self._notifier = None
        if environ.get("NOTIFY_SOCKET"):
            try:
                self._notifier = sdnotify.SystemdNotifier(
                    debug=True
                )  # debug: it says so when a message is lost
                self._notifier.socket.setblocking(False)
            except OSError:
                self._notifier = None

    def send(self, **fields: str | int) -> None:
        """Send one message of `KEY=value` lines, such as READY=1, after those that did not get through."""
        if self._notifier is None:
            return
        self._later.append("\n".join(f"{key}={_line(value)}" for key, value in fields.items()))
        try:
            while self._later:
                self._notifier.notify(self._later[0])
                self._later.popleft()
        except OSError:
            if fields.keys() <= FLEETING:
                self._later.pop()


def _line(value: str | int) -> str:
    text = str(value).encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[: VALUE_CHARS_MAX - 3]}..."


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """How long systemd waits for a sign of life from this process; 0: it does not."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(environ.get("WATCHDOG_USEC", "0")) / 1e6
