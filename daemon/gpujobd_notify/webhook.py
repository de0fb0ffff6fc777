"""Webhooks, as Standard Webhooks 1.0 has them: one POST, signed, and what its answer means.

    webhook-id          of the notification: the same at every try, so that whoever gets it twice can tell
    webhook-timestamp   of the try, in seconds
    webhook-signature   v1,BASE64(HMAC-SHA256(secret, "ID.TIMESTAMP.BODY")), one a secret: two while it is rotated

    2xx delivered   410 nothing goes there any more   anything else later; 429 and 5xx: the far end is ill

Rule 1: no redirect is followed: the address that was checked is the one that is spoken to.
Rule 2: nothing of the answer but its head is read, and that within the deadline of the whole try: ten megabytes, or a byte
a second, cost a connection and nothing else.
Rule 3: nothing of the answer is shown but its status: who names a URL must not read through it what others' hosts say.
Rule 4: a connection each: what a far end does to one try is over with it. No proxy of the environment is used.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import ssl
import time
from collections.abc import Sequence
from typing import Final

import httpcore
import httpx
import trio

from gpujobd_notify.addresses import CheckedBackend, Forbidden, Network
from gpujobd_notify.outcome import DELIVERED, Outcome, Verdict, later, never
from gpujobd_notify.schedule import retry_after_s

ILL: Final = frozenset({408, 425, 429}) | frozenset(range(500, 600))


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def headers(
    message_id: str, timestamp: int, body: bytes, keys: Sequence[bytes], agent: str
) -> dict[str, str]:
    found = {
        "content-type": "application/json",
        "user-agent": agent,
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
    }
    if keys:
        found["webhook-signature"] = " ".join(signature(key, message_id, timestamp, body) for key in keys)
    return found


def contexts(ca_file: str) -> ssl.SSLContext:
    """The system's authorities, and the administrator's. Raises: OSError (ssl.SSLError)."""
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    return context


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's own, over a backend that checks addresses: httpx has no argument for it."""

    def __init__(self, context: ssl.SSLContext, backend: CheckedBackend) -> None:
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context, max_connections=1, max_keepalive_connections=0, network_backend=backend
        )


async def post(
    url: str,
    message_id: str,
    body: bytes,
    *,
    keys: Sequence[bytes],
    allowed: tuple[Network, ...],
    timeout_s: float,
    context: ssl.SSLContext,
    resolvers: trio.CapacityLimiter,
    agent: str,
) -> Outcome:
    """One try. Whatever the far end does, this ends within `timeout_s`."""
    told = headers(message_id, int(time.time()), body, keys, agent)
    with trio.move_on_after(timeout_s):
        try:
            transport = _Transport(context, CheckedBackend(allowed, resolvers))
            async with (
                httpx.AsyncClient(
                    transport=transport,
                    trust_env=False,
                    follow_redirects=False,
                    timeout=None,  # noqa: S113  # above
                ) as client,
                client.stream("POST", url, content=body, headers=told) as response,
            ):
                return judge(
                    response.status_code, response.headers.get("retry-after", ""), dt.datetime.now(dt.UTC)
                )
        except Forbidden as error:
            return never(str(error))
        except httpx.InvalidURL as error:
            return never(f"no URL: {error}")
        except (httpx.HTTPError, OSError, ssl.SSLError) as error:
            return later(_one_line(error), ill=True)
    return later(f"no answer within {timeout_s:g} s", ill=True)


def judge(status: int, retry_after: str, now: dt.datetime) -> Outcome:
    """What an answer means."""
    if 200 <= status < 300:
        return DELIVERED
    if status == 410:
        return Outcome(verdict=Verdict.GONE, error="410: it wants no more of these")
    asked_s = retry_after_s(retry_after, now) if retry_after else None
    redirected = ", and redirects are not followed" if 300 <= status < 400 else ""
    return later(f"answered {status}{redirected}", ill=status in ILL, asked_s=asked_s)


def _one_line(error: Exception) -> str:
    """What it says, or what caused it says: of a certificate that is refused, only the innermost tells why."""
    inner: BaseException | None = error
    while inner is not None:
        if text := " ".join(str(inner).split()):
            return text
        inner = inner.__cause__ or inner.__context__
    return type(error).__name__
