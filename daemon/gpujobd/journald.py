r"""Entries for systemd's journal, in its native protocol, without ever waiting for it.

    NAME=value\n                               a value without a line break
    NAME\n <length: u64, little endian> value\n     any other: whatever is in it, it begins no field of its own

An entry is one datagram to SOCKET; one too large for that is a sealed memfd that is passed there instead.
(https://systemd.io/JOURNAL_NATIVE_PROTOCOL)

Rule 1: nothing here blocks. What journald does not take at once waits here, up to WAITING_BYTES_MAX; what comes beyond
that is dropped and counted, and the count is an entry of its own at that place.
Rule 2: a journald that is stopped, restarted, or gone is felt by nobody: each send names the socket's path anew.
Rule 3: send() and flush() may be called from any thread, one at a time: logging's lock sees to that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

SOCKET: Final = "/run/systemd/journal/socket"
WAITING_BYTES_MAX: Final = 4 << 20
CLOSE_S: Final = 1.0  # for what waits, when the process ends
CLOSE_LOOK_S: Final = 0.01
LATER: Final = frozenset(
    {
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ETOOMANYREFS,
        errno.ENOENT,
        errno.ECONNREFUSED,
    }
)
"""It is full, or restarts, or we are short of something: the same entry may go through in a moment."""
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def is_stderr(environ: Mapping[str, str] = os.environ, fd: int = 2) -> bool:
    """Whether our standard error leads to systemd's journal (sd_journal_stream(3), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        about = os.fstat(fd)
        return environ.get("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}"
    return False


def entry(fields: Iterable[tuple[str, object]]) -> bytes:
    """The bytes of one entry. Nearly all values are of one line: these are encoded in one go."""
    lines, framed = [], bytearray()
    for name, value in fields:
        text = str(value)
        if "\n" in text:
            raw = text.encode("utf-8", "backslashreplace")
            framed += b"%b\n%b%b\n" % (name.encode(), struct.pack("<Q", len(raw)), raw)
        else:
            lines.append(f"{name}={text}\n")
    return "".join(lines).encode("utf-8", "backslashreplace") + framed


class Journald:
    """See the module's rules. `missed(count)` makes the entry that tells of dropped ones."""

    def __init__(self, missed: Callable[[int], bytes], path: str = SOCKET) -> None:
        self.dropped = 0  # since the last entry that told of it
        self._missed = missed
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def send(self, framed: bytes) -> bool:
        """Send it now, or keep it, or count it; whether nothing is left for flush()."""
        if self.flush() and self._taken(framed):
            return not self.dropped
        self._keep(framed)
        return False

    def flush(self) -> bool:
        """Send what waits, as far as journald takes it; whether nothing is left."""
        while self._waiting:
            if not self._taken(self._waiting[0]):
                return False
            self._waiting_bytes -= len(self._waiting.popleft())
        if self.dropped and self._taken(self._missed(self.dropped)):
            self.dropped = 0
        return not self.dropped

    def close(self) -> None:
        """The process ends: what waits gets a moment."""
        give_up_at = time.monotonic() + CLOSE_S
        while not self.flush() and time.monotonic() < give_up_at:
            time.sleep(CLOSE_LOOK_S)
        self._socket.close()

    def _keep(self, framed: bytes) -> None:
        # After a first loss all are dropped until the count has been told: it must stand where they are missing.
        if self.dropped or self._waiting_bytes + len(framed) > WAITING_BYTES_MAX:
            self.dropped += 1
            return
        self._waiting.append(framed)
        self._waiting_bytes += len(framed)

    def _taken(self, framed: bytes) -> bool:
        """Whether it need not be sent again: journald has it, or it can never be sent."""
        try:
            self._socket.sendto(framed, self._path)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                return self._lost(error)
        else:
            return True
        try:
            self._send_sealed(framed)
        except OSError as error:
            return self._lost(error)
        return True

    def _lost(self, error: OSError) -> bool:
        if error.errno in LATER:
            return False
        self.dropped += 1
        return True

    def _send_sealed(self, framed: bytes) -> None:
        fd = os.memfd_create("gpujobd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            left = memoryview(framed)
            while left:
                left = left[os.write(fd, left) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            self._socket.sendmsg([], rights, 0, self._path)
        finally:
            os.close(fd)
