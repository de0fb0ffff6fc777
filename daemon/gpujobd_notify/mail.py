"""Mail: one try to hand a message to the mail server.

    2yz after the text                   delivered
    5yz for a recipient, or for the text never: it is about this message
    anything else                        later: it is about the server, as it is now

Rule 1: smtplib blocks, so it runs in a thread. A server that hangs after DATA, or sends a byte a second, holds that
thread until the deadline of the whole try; then its connection is shut down from outside, and the thread ends.
Rule 2: a password is sent over TLS only, and what the server says is shown as one printable line.
Rule 3: a text whose end was sent and not confirmed may have been taken. It is sent again: at least once, under the
Message-ID it had.
"""

from __future__ import annotations

import contextlib
import os
import smtplib
import socket
import ssl
import threading
from collections.abc import Sequence
from email.message import EmailMessage
from typing import Final

import msgspec
import trio

from gpujobd_notify.message import one_line
from gpujobd_notify.outcome import DELIVERED, Outcome, later, never

SAID_CHARS_MAX: Final = 200
GOODBYE_S: Final = 2.0


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """Where mail is handed in."""

    host: str
    port: int
    security: str  # starttls, tls, none
    timeout_s: float
    context: ssl.SSLContext
    user: str = ""
    password: str = ""


class _Line:
    """The connection of one try, so that it can be cut from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._over = False

    def hold(self, sock: socket.socket) -> None:
        """A descriptor of our own: smtplib replaces and closes its sockets as it likes."""
        with self._lock:
            self._sock = socket.socket(fileno=os.dup(sock.fileno()))
            over = self._over
        if over:
            self.cut()

    def cut(self) -> None:
        with self._lock:
            self._over = True
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None


async def send(
    server: Server, message: EmailMessage, to: Sequence[str], threads: trio.CapacityLimiter
) -> Outcome:
    """One try. Whatever the server does, this ends within its `timeout_s`."""
    line = _Line()
    with trio.move_on_after(server.timeout_s):
        try:
            return await trio.to_thread.run_sync(
                _hand_in, server, message, to, line, abandon_on_cancel=True, limiter=threads
            )
        finally:
            line.cut()
    return later(f"{server.host} did not take it within {server.timeout_s:g} s", ill=True)


def _hand_in(server: Server, message: EmailMessage, to: Sequence[str], line: _Line) -> Outcome:
    try:
        return _speak(server, message, to, line)
    except smtplib.SMTPRecipientsRefused as error:
        return _refused(error)
    except smtplib.SMTPDataError as error:
        said = _said(error.smtp_code, error.smtp_error)
        return never(said) if 500 <= error.smtp_code < 600 else later(said, ill=True)
    except smtplib.SMTPResponseException as error:
        return later(_said(error.smtp_code, error.smtp_error), ill=True)
    except (smtplib.SMTPException, OSError, ValueError) as error:
        return later(
            f"{server.host}: {one_line(str(error), SAID_CHARS_MAX) or type(error).__name__}", ill=True
        )
    finally:
        line.close()


def _speak(server: Server, message: EmailMessage, to: Sequence[str], line: _Line) -> Outcome:
    smtp = _connect(server, line)
    try:
        outcome = _deliver(smtp, message, to)
        _part(smtp)
        return outcome
    finally:
        smtp.close()


def _part(smtp: smtplib.SMTP) -> None:
    """The message is taken: whether the server says goodbye changes nothing."""
    with contextlib.suppress(smtplib.SMTPException, OSError):
        if smtp.sock is not None:
            smtp.sock.settimeout(GOODBYE_S)
        smtp.quit()


class _Smtp(smtplib.SMTP):
    """Tells where its connection is."""

    line: _Line

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        sock = socket.create_connection((host, port), timeout)
        self.line.hold(sock)
        return sock


class _SmtpTls(_Smtp):
    context: ssl.SSLContext

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self.context.wrap_socket(super()._get_socket(host, port, timeout), server_hostname=host)


def _connect(server: Server, line: _Line) -> smtplib.SMTP:
    kind = _SmtpTls if server.security == "tls" else _Smtp
    smtp = kind(timeout=server.timeout_s, local_hostname=socket.gethostname())
    smtp.line = line
    if isinstance(smtp, _SmtpTls):
        smtp.context = server.context
    smtp._host = server.host  # type: ignore[attr-defined]  # noqa: SLF001  # STARTTLS checks the certificate against it
    try:
        _begin(smtp, server)
    except BaseException:
        smtp.close()
        raise
    return smtp


def _begin(smtp: smtplib.SMTP, server: Server) -> None:
    code, said = smtp.connect(server.host, server.port)
    if code != 220:
        raise smtplib.SMTPConnectError(code, said)
    if server.security == "starttls":
        smtp.starttls(context=server.context)
    if server.user:
        smtp.login(server.user, server.password)


def _deliver(smtp: smtplib.SMTP, message: EmailMessage, to: Sequence[str]) -> Outcome:
    """Some of the recipients refused: the others have it, and a second try would tell them twice."""
    sender = message["From"].addresses[0].addr_spec
    refused = smtp.send_message(message, from_addr=sender, to_addrs=list(to))
    if not refused:
        return DELIVERED
    told = "; ".join(f"{address}: {_said(code, said)}" for address, (code, said) in refused.items())
    return never(f"delivered but to {told}")


def _refused(error: smtplib.SMTPRecipientsRefused) -> Outcome:
    answers = list(error.recipients.values())
    said = "; ".join(_said(code, text) for code, text in answers[:3])
    if all(500 <= code < 600 for code, _ in answers):
        return never(said)
    return later(said, ill=False)


def _said(code: int, text: bytes | str) -> str:
    words = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    return f"{code} {one_line(' '.join(words.split()), SAID_CHARS_MAX)}"
