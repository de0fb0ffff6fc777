"""Where something may be told: an endpoint's name, a URL, or `mailto:ADDRESS`. Reads text, reaches nothing.

    target                        goes through the endpoint         is
    NAME                          NAME                              of the configuration
    https://HOST[:PORT]/...       https://HOST:PORT                 one queue and one breaker a far end
    mailto:USER@DOMAIN            mailto:                           the one mail server

Rule 1: what a user gave goes into headers, logs and lookups: one form is accepted, and anything else refused.
Rule 2: patterns of hosts and domains: `example.org`, `*.example.org` for all below it, `*` for any.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

import msgspec
from gpujobd import protocol as p

MAILTO: Final = "mailto:"
PORTS: Final = {"https": 443, "http": 80}
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
HOST: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*", re.ASCII
)
LOCAL: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*", re.ASCII)


class TargetError(ValueError):
    """What was given cannot be told anything; the message says why."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str  # whose queue, lane and breaker it has
    host: str = ""  # of a URL or an address, in lower case
    name: str = ""  # of an endpoint of the configuration
    address: str = ""  # of mail


def parse(text: str) -> Target:
    """Raises: TargetError."""
    if not text.isascii() or not text.isprintable() or " " in text or len(text) > p.NOTIFY_TARGET_CHARS_MAX:
        raise TargetError(
            f"a target is at most {p.NOTIFY_TARGET_CHARS_MAX} printable ASCII characters without spaces"
        )
    if NAME.fullmatch(text):
        return Target(endpoint=text, name=text)
    scheme, _, rest = text.partition(":")
    if scheme.lower() == "mailto":
        address = mail_address(rest)
        return Target(endpoint=MAILTO, host=address.rpartition("@")[2].lower(), address=address)
    if scheme.lower() in PORTS:
        return _url(text)
    raise TargetError(f"{text!r} is neither a name, nor https://..., nor mailto:ADDRESS")


def _url(text: str) -> Target:
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").lower(), parts.port or PORTS[parts.scheme]
    except ValueError:
        raise TargetError(f"{text!r} is no URL") from None
    if parts.username is not None or parts.password is not None:
        raise TargetError("a URL with a user or a password is not accepted")
    if "\\" in text or parts.fragment:
        raise TargetError(f"{text!r} is no URL of a webhook")
    bare = host.removesuffix(".")
    if not (HOST.fullmatch(bare) or _is_ip(host)):
        raise TargetError(f"{text!r} has no host")
    shown = f"[{bare}]" if ":" in bare else bare
    return Target(endpoint=f"{parts.scheme}://{shown}:{port}", host=bare)


def mail_address(text: str) -> str:
    """An address that can stand in a header and in RCPT as it is. Raises: TargetError."""
    local, at, domain = text.rpartition("@")
    if not (at and len(local) <= 64 and LOCAL.fullmatch(local) and HOST.fullmatch(domain.lower())):
        raise TargetError(f"{text!r} is no address such as user@example.org")
    return text


def allowed(host: str, patterns: Iterable[str]) -> bool:
    return any(_fits(host, pattern.lower()) for pattern in patterns)


def _fits(host: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    return host.endswith(pattern[1:]) and host != pattern[2:] if pattern.startswith("*.") else host == pattern


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
