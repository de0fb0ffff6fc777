"""Mail and web servers as they are on their bad days."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

PIECE = b"x" * 65_536
LARGE_BYTES = 10_000_000

Act = Callable[[socket.socket], None]


def _lines(sock: socket.socket) -> Iterator[bytes]:
    with sock.makefile("rb") as file:
        yield from file


def mail(sock: socket.socket, on_data: Act) -> None:
    """Be an SMTP server up to DATA, then do that."""
    sock.sendall(b"220 far.end\r\n")
    for line in _lines(sock):
        if line.upper().startswith(b"DATA"):
            sock.sendall(b"354 go on\r\n")
            on_data(sock)
            return
        sock.sendall(b"250 ok\r\n")


def _hang(sock: socket.socket) -> None:
    while sock.recv(65_536):
        pass


def _hang_after_data(sock: socket.socket) -> None:
    mail(sock, _hang)


def _cut_after_data(sock: socket.socket) -> None:
    mail(sock, lambda _: None)


def _refuse(sock: socket.socket) -> None:
    sock.sendall(b"554 no service\r\n")


def _busy(sock: socket.socket) -> None:
    sock.sendall(b"220 far.end\r\n")
    for _ in _lines(sock):
        sock.sendall(b"451 later\r\n")


def _error(sock: socket.socket) -> None:
    sock.recv(65_536)
    sock.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n")


def _elsewhere(sock: socket.socket) -> None:
    sock.recv(65_536)
    sock.sendall(b"HTTP/1.1 302 there\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


def _byte_by_byte(sock: socket.socket) -> None:
    sock.recv(65_536)
    for byte in b"HTTP/1.1 200 ok\r\nContent-Length: 0\r\n\r\n":
        sock.sendall(bytes([byte]))
        time.sleep(1)


def _large(sock: socket.socket) -> None:
    sock.recv(65_536)
    sock.sendall(b"HTTP/1.1 200 ok\r\nContent-Length: %d\r\n\r\n" % LARGE_BYTES)
    for _ in range(LARGE_BYTES // len(PIECE)):
        sock.sendall(PIECE)


BAD_DAYS: dict[str, tuple[str, Act]] = {
    "refuses mail": ("mail", _refuse),
    "hangs after DATA": ("mail", _hang_after_data),
    "says 4xx to everything": ("mail", _busy),
    "cuts the line after DATA": ("mail", _cut_after_data),
    "answers 500": ("web", _error),
    "sends elsewhere": ("web", _elsewhere),
    "answers a byte a second": ("web", _byte_by_byte),
    "answers with ten megabytes": ("web", _large),
    "never answers": ("web", _hang),
}


@contextlib.contextmanager
def far_end(act: Act) -> Iterator[int]:
    """Serve like that on a port of this machine, every caller in a thread of his own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        callers: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    sock, _ = server.accept()
                    callers.append(sock)
                    threading.Thread(target=answer, args=[sock], daemon=True).start()

        def answer(sock: socket.socket) -> None:
            with contextlib.suppress(OSError), sock:
                act(sock)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for sock in callers:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
