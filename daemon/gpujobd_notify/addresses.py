"""Which addresses may be connected to: what is public, and what the administrator allows.

Rule 1: the check is of the address that is connected to, at that moment: the name is looked up once, every address it has
is checked, and the connection goes to one of them. A name that changes in between reaches nothing.
Rule 2: one address that may not be reached refuses the name: half a name's addresses are no accident.
Rule 3: an address within another (IPv4-mapped, 6to4, NAT64, Teredo) is judged by the inner one as well.

Source: the special-purpose registries of IANA (RFC 6890), as written out below: what Python calls private differs by its
version.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Final

import httpcore
import trio

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SPECIAL_V4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this host
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carrier's NAT
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local: the metadata of clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
        ),
    )
)
PUBLIC_V6: Final = ipaddress.IPv6Network("2000::/3")  # nothing else is global unicast
SPECIAL_V6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, Teredo, ORCHID
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: an IPv4 address within, and a relay of somebody's
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
RESOLVERS_MAX: Final = 256
"""Threads: more than all places together begin in the half minute or minute after which a lookup gives up. One that hangs
keeps its thread when its try is over; were they fewer, a few dead names would be in the way of all others."""


class Forbidden(Exception):
    """The name has an address that may not be reached."""


def is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in SPECIAL_V4)
    if address in NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in PUBLIC_V6 and not any(address in network for network in SPECIAL_V6)


def may_reach(address: Address, allowed: Iterable[Network]) -> bool:
    """An IPv4 address in IPv6's clothes is that IPv4 address, also to the administrator's list."""
    if isinstance(address, ipaddress.IPv6Address) and address in MAPPED:
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return is_public(address) or any(address in network for network in allowed)


async def resolve(
    host: str, port: int, allowed: tuple[Network, ...], resolvers: trio.CapacityLimiter
) -> list[str]:
    """The addresses of a name, all of them such as may be reached. Raises: Forbidden, OSError."""
    found = await trio.to_thread.run_sync(
        lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        abandon_on_cancel=True,
        limiter=resolvers,
    )
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for text in addresses:
        if "%" in text or not may_reach(ipaddress.ip_address(text), allowed):
            raise Forbidden(f"{host} has the address {text}, which is not public and not in allow_networks")
    return addresses


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects for httpcore, to checked addresses only. TLS still asks for the name: SNI and certificate are the host's."""

    def __init__(self, allowed: tuple[Network, ...], resolvers: trio.CapacityLimiter) -> None:
        self._allowed = allowed
        self._resolvers = resolvers
        self._trio = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's signature; the whole try has a deadline
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        del timeout, local_address, socket_options
        try:
            addresses = await resolve(host, port, self._allowed, self._resolvers)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None
        problems = []
        for address in addresses:
            try:
                return await self._trio.connect_tcp(address, port)  # digits: nothing is looked up again
            except httpcore.ConnectError as error:
                problems.append(f"{address}: {error}")
        raise httpcore.ConnectError("; ".join(problems))

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's signature
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        del timeout, socket_options
        raise httpcore.ConnectError(f"{path}: webhooks go to the network only")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)
