"""Who is at the other end of a Unix socket, as the kernel says.

Rule 1: identity is SO_PEERCRED and SO_PEERGROUPS, never what a client says.
Rule 2: descriptors are not taken: where the kernel knows how (Linux 6.16), who sends one is told so; else receiving
without a place for them drops them.
Rule 3: this module knows nothing of the daemon: the notifier imports it as well.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

import msgspec
import trio

SO_PEERGROUPS: Final = 59  # asm-generic/socket.h; not in Python's socket module
SO_PASSRIGHTS: Final = 83  # the same
GETSOCKOPT_BYTES_MAX: Final = 1024  # Python's own limit


class Peer(msgspec.Struct, frozen=True):
    pid: int
    uid: int
    gids: tuple[int, ...]


def peer(sock: trio.socket.SocketType | socket.socket) -> Peer:
    """The process that called connect(), as it was then (unix(7))."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GETSOCKOPT_BYTES_MAX)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = b""  # more than 256 groups: only the first one counts
    return Peer(pid, uid, (gid, *struct.unpack(f"{len(groups) // 4}i", groups)))


def take_no_descriptors(sock: trio.socket.SocketType | socket.socket) -> None:
    """A descriptor can hang who closes it, for as long as a FUSE server likes: let the kernel refuse it."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise
