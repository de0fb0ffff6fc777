"""What systemd is told: ready, what runs, still alive, on the way down. Without systemd, nothing.

Rule 1: the socket never blocks: a message that cannot be sent at once is dropped and counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import sdnotify


class Notifier:
    """sd_notify(3) by the sdnotify package, made non-blocking: a systemd that does not read must not stop the loop."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.dropped = 0
        self.watchdog_s = _watchdog_s(environ)
        self._notifier = None
        if environ.get("NOTIFY_SOCKET"):
            try:
                self._notifier = sdnotify.SystemdNotifier(
                    debug=True
                )  # debug: it says so when a message is lost
                self._notifier.socket.setblocking(False)
            except OSError:
                self.dropped += 1

    def send(self, **fields: str | int) -> None:
        """Send one message of `KEY=value` lines, such as READY=1."""
        if self._notifier is None:
            return
        message = "\n".join(f"{key}={value}" for key, value in fields.items())
        try:
            self._notifier.notify(message.encode("ascii", "replace").decode())
        except OSError:
            self.dropped += 1


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """How long systemd waits for a sign of life from this process; 0: it does not."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(environ.get("WATCHDOG_USEC", "0")) / 1e6
