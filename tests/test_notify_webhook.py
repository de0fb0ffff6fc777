"""Webhooks against far ends on a bad day, and their signatures as another library checks them."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import json
import shutil
import ssl
import threading

import pytest
import trio

pytest.importorskip("httpx")

from gpujobd_notify import addresses, message, webhook
from gpujobd_notify.addresses import Forbidden, may_reach, resolve
from gpujobd_notify.due import Story
from gpujobd_notify.outcome import Verdict
from hypothesis import given
from hypothesis import strategies as st

AT = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)
HERE = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
CONTEXT = ssl.create_default_context()
BODY = message.payload(Story(kind="finish", at=AT, job=7, state="completed", items=3, done=3, name="naïve ✓"))
KEYS = [b"a" * 32, b"b" * 32]
OK = b"HTTP/1.1 204 No Content\r\n\r\n"


class FarEnd:
    """A server of our own making; `answer` gets the stream and the request's head and body."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.requests = []

    async def serve(self, stream):
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                head, body = await self._request(stream)
                self.requests.append((head, body))
                await self.answer(stream)

    async def _request(self, stream):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = await stream.receive_some()
            if not piece:
                return {}, b""
            data += piece
        raw, _, body = data.partition(b"\r\n\r\n")
        head = dict(line.split(": ", 1) for line in raw.decode().split("\r\n")[1:])
        head = {key.lower(): value for key, value in head.items()}
        while len(body) < int(head.get("content-length", 0)):
            body += await stream.receive_some()
        return head, body


def says(data):
    async def answer(stream):
        await stream.send_all(data)

    return answer


@contextlib.asynccontextmanager
async def far_end(answer, context=None):
    server = FarEnd(answer)
    listeners = (
        await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
        if context
        else await trio.open_tcp_listeners(0, host="127.0.0.1")
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        inner = getattr(listeners[0], "transport_listener", listeners[0])
        yield server, inner.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def post(url, **more):
    fields = {
        "keys": KEYS[:1],
        "allowed": HERE,
        "timeout_s": 20.0,
        "context": CONTEXT,
        "agent": "test",
    } | more
    return await webhook.post(url, "msg_1", BODY, resolvers=trio.CapacityLimiter(4), **fields)


def secret(key):
    return "whsec_" + base64.b64encode(key).decode()


# --- signatures ---------------------------------------------------------------------------------------------------


async def test_a_delivery_is_one_that_standardwebhooks_verifies_with_either_secret():
    library = pytest.importorskip("standardwebhooks")
    async with far_end(says(OK)) as (server, port):
        assert (await post(f"http://127.0.0.1:{port}/x", keys=KEYS)).verdict is Verdict.DELIVERED
    ((head, body),) = server.requests
    for key in KEYS:
        assert library.Webhook(secret(key)).verify(body, head)["data"]["job"] == 7
    with pytest.raises(library.WebhookVerificationError):
        library.Webhook(secret(b"c" * 32)).verify(body, head)
    with pytest.raises(library.WebhookVerificationError):
        library.Webhook(secret(KEYS[0])).verify(body.replace(b"7", b"8", 1), head)


def test_the_signature_is_that_of_the_specifications_example():
    """standard-webhooks.md, "Signature scheme": the same bytes as its reference implementations sign."""
    library = pytest.importorskip("standardwebhooks")
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = '{"test": 2432232314}'
    ours = webhook.signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body.encode())
    assert ours == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    then = dt.datetime.fromtimestamp(1614265330, dt.UTC)
    assert library.Webhook(secret(key)).sign("msg_p5jXN8AQM9LWM0D4loKWxJek", then, body) == ours


async def test_without_a_secret_there_is_an_id_and_no_signature():
    async with far_end(says(OK)) as (server, port):
        await post(f"http://127.0.0.1:{port}/", keys=[])
    ((head, body),) = server.requests
    assert head["webhook-id"] == "msg_1"
    assert "webhook-signature" not in head
    assert json.loads(body)["type"] == "job.finish"


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "verdict", "ill"),
    [
        (200, Verdict.DELIVERED, False),
        (299, Verdict.DELIVERED, False),
        (301, Verdict.LATER, False),
        (404, Verdict.LATER, False),
        (410, Verdict.GONE, False),
        (429, Verdict.LATER, True),
        (500, Verdict.LATER, True),
        (599, Verdict.LATER, True),
    ],
)
def test_what_a_status_means(status, verdict, ill):
    outcome = webhook.judge(status, "", AT)
    assert (outcome.verdict, outcome.ill) == (verdict, ill)


def test_retry_after_is_passed_on():
    assert webhook.judge(503, "120", AT).asked_s == 120
    assert webhook.judge(429, "Sat, 31 Jan 2026 12:00:30 GMT", AT).asked_s == 30
    assert webhook.judge(503, "tomorrow", AT).asked_s is None


async def test_a_redirect_is_not_followed():
    async with (
        far_end(says(OK)) as (elsewhere, other),
        far_end(
            says(b"HTTP/1.1 307 there\r\nLocation: http://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % other)
        ) as (_, port),
    ):
        outcome = await post(f"http://127.0.0.1:{port}/")
    assert (outcome.verdict, outcome.error) == (Verdict.LATER, "answered 307, and redirects are not followed")
    assert elsewhere.requests == []


async def slowly(stream):
    for byte in b"HTTP/1.1 200 ok\r\n" + b"x: y\r\n" * 1000:
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.01)


async def never(stream):
    await trio.sleep_forever()


async def for_ever(stream):
    await stream.send_all(b"HTTP/1.1 500 no\r\n\r\n")
    while True:
        await stream.send_all(b"x" * 65536)


async def hang_up(stream):
    await stream.aclose()


@pytest.mark.parametrize("answer", [slowly, never])
async def test_a_try_ends_at_its_deadline_whatever_trickles_in(answer):
    async with far_end(answer) as (_, port):
        outcome = await post(f"http://127.0.0.1:{port}/", timeout_s=0.3)
    assert (outcome.verdict, outcome.ill, outcome.error) == (Verdict.LATER, True, "no answer within 0.3 s")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (for_ever, "answered 500"),
        (says(b"HTTP/1.1 500 no\r\nContent-Length: 10000000\r\n\r\n"), "answered 500"),
        (hang_up, "Server disconnected without sending a response."),
        (says(b"SSH-2.0-OpenSSH_9\r\n\r\n"), "illegal"),
        (says(b"HTTP/1.1 200 ok\r\n" + b"x: " + b"y" * 300_000), ""),
    ],
)
async def test_only_the_head_of_an_answer_is_read_and_only_its_status_shown(answer, told):
    async with far_end(answer) as (_, port):
        outcome = await post(f"http://127.0.0.1:{port}/", timeout_s=30.0)
    assert outcome.verdict is Verdict.LATER
    assert told in outcome.error
    assert "xxx" not in outcome.error


async def test_nobody_there_is_the_far_ends_illness():
    async with far_end(says(OK)) as (_, port):
        pass
    outcome = await post(f"http://127.0.0.1:{port}/")
    assert (outcome.verdict, outcome.ill) == (Verdict.LATER, True)


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with far_end(says(OK)) as (_, port):
        assert (await post(f"http://127.0.0.1:{port}/")).verdict is Verdict.DELIVERED


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.168.1.1",
        "198.18.0.1",
        "203.0.113.7",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_what_is_not_public_is_not_reached(text):
    assert not may_reach(ipaddress.ip_address(text), ())


@pytest.mark.parametrize(
    "text",
    [
        "1.1.1.1",
        "8.8.8.8",
        "172.15.0.1",
        "172.32.0.1",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ],
)
def test_what_is_public_is_reached(text):
    assert may_reach(ipaddress.ip_address(text), ())


def test_the_administrators_networks_are_reached_in_ipv6_clothes_too():
    allowed = (ipaddress.ip_network("10.0.0.0/8"),)
    assert may_reach(ipaddress.ip_address("10.1.2.3"), allowed)
    assert may_reach(ipaddress.ip_address("::ffff:10.1.2.3"), allowed)
    assert not may_reach(ipaddress.ip_address("192.168.0.1"), allowed)


@given(st.ip_addresses())
def test_python_never_calls_private_what_we_call_public(address):
    if may_reach(address, ()):
        inner = getattr(address, "ipv4_mapped", None) or address
        if inner not in addresses.NAT64:
            kinds = ("private", "loopback", "link_local", "multicast", "unspecified", "reserved")
            assert [kind for kind in kinds if getattr(inner, f"is_{kind}")] == [], address


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "0x7f.1", "127.1"])
async def test_whatever_the_spelling_loopback_is_refused_before_anything_is_sent(host):
    async with far_end(says(OK)) as (server, port):
        outcome = await post(f"http://{host}:{port}/", allowed=())
    assert outcome.verdict is Verdict.NEVER
    assert "not public" in outcome.error
    assert server.requests == []


async def test_one_bad_address_of_a_name_refuses_all(monkeypatch):
    found = [(2, 1, 6, "", ("8.8.8.8", 443)), (2, 1, 6, "", ("169.254.169.254", 443))]
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Forbidden, match=r"169\.254\.169\.254"):
        await resolve("rebind.example.org", 443, (), trio.CapacityLimiter(1))


async def test_the_address_that_was_checked_is_the_one_that_is_spoken_to(monkeypatch):
    """A name that points elsewhere at its second lookup is not looked up a second time."""
    answers = ["127.0.0.1"]
    async with far_end(says(OK)) as (server, port):
        real = addresses.socket.getaddrinfo

        def lookup(host, *rest, **more):
            if host == "rebind.example.org":
                return [(2, 1, 6, "", (answers.pop(), port))]
            return real(host, *rest, **more)

        monkeypatch.setattr(addresses.socket, "getaddrinfo", lookup)
        assert (await post(f"http://rebind.example.org:{port}/")).verdict is Verdict.DELIVERED
    assert answers == []
    assert server.requests[0][0]["host"] == f"rebind.example.org:{port}"


async def test_a_name_server_that_hangs_is_given_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: over.wait(60))
    try:
        outcome = await post("http://slow.example.org/", timeout_s=0.2)
    finally:
        over.set()
    assert outcome.error == "no answer within 0.2 s"


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate of hook.example.org, by itself."""
    import subprocess

    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *[
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ],
            *["-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=hook.example.org"],
            *["-addext", "subjectAltName=DNS:hook.example.org"],
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.mark.parametrize(
    ("host", "trusted", "told"),
    [
        ("hook.example.org", True, ""),
        ("other.example.org", True, "certificate verify failed"),
        ("hook.example.org", False, "certificate verify failed"),
    ],
)
async def test_the_certificate_must_be_the_hosts_whatever_its_address(
    authority, monkeypatch, host, trusted, told
):
    certificate, key = authority
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(certificate, key)
    async with far_end(says(OK), served) as (_, port):
        real = addresses.socket.getaddrinfo

        def lookup(name, *rest, **more):
            return real("127.0.0.1" if name.endswith("example.org") else name, *rest, **more)

        monkeypatch.setattr(addresses.socket, "getaddrinfo", lookup)
        context = webhook.contexts(str(certificate) if trusted else "")
        outcome = await post(f"https://{host}:{port}/", context=context)
    assert told in outcome.error
    assert (outcome.verdict is Verdict.DELIVERED) == (not told)
