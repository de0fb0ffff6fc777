"""Mail: what stands in it, and what a mail server can do to whoever hands it in."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import email
import email.policy
import shutil
import socket
import ssl
import threading
import time

import pytest
import trio
from gpujobd_notify import mail, message
from gpujobd_notify.due import Story
from gpujobd_notify.outcome import Verdict
from hypothesis import given
from hypothesis import strategies as st

AT = dt.datetime(2026, 1, 31, 16, 3, 12, tzinfo=dt.UTC)
TO = ["alice@example.org"]
STORY = Story(
    kind="finish",
    at=AT,
    job=42,
    name="nightly",
    handler="embed",
    tenant="alice",
    state="completed",
    items=5000,
    done=4998,
    failed=2,
    failure_codes={"bad_json": 1, "rejected": 1},
    device="cuda:0",
    submitted_at=AT - dt.timedelta(seconds=192),
    started_at=AT - dt.timedelta(seconds=188),
    device_s=188.0,
)


def made(*stories):
    pairs = [(f"msg_{n}", story) for n, story in enumerate(stories)]
    return message.mail(pairs, sender="gpujobd@example.org", to=TO, host="host.example.org", now=AT)


def read_back(mail_message):
    return email.message_from_bytes(bytes(mail_message), policy=email.policy.default)


# --- text ---------------------------------------------------------------------------------------------------------


def test_a_mail_says_what_happened_the_figures_and_what_to_do_next():
    found = read_back(made(STORY))
    assert found["subject"] == "job 42 completed, 2 of 5,000 items failed (nightly)"
    assert found["auto-submitted"] == "auto-generated"
    assert found["message-id"] == "<msg_0@host.example.org>"
    assert found.get_content().replace("\r\n", "\n") == (
        "Job 42 completed, 2 of 5,000 items failed.\n"
        "\n"
        "  name       nightly\n"
        "  handler    embed\n"
        "  tenant     alice\n"
        "  items      5,000\n"
        "  done       4,998\n"
        "  failed     2\n"
        "                   1  bad_json\n"
        "                   1  rejected\n"
        "  submitted  2026-01-31 16:00:00 UTC\n"
        "  started    2026-01-31 16:00:04 UTC   after 4.0 s\n"
        "  ended      2026-01-31 16:03:12 UTC   after 3 min 8 s\n"
        "  device     3 min 8 s of cuda:0\n"
        "\n"
        "Fetch the results:\n"
        "    jobctl output 42 > results-42.jsonl\n"
        "\n"
        "See what failed, and why:\n"
        "    jobctl errors 42\n"
        "\n"
        "Try the failed items again:\n"
        "    jobctl retry 42 --failed-items\n"
        "\n"
        "-- \n"
        "gpujobd on host.example.org. To hear no more of this job: jobctl notifications mute --job 42\n"
    )


def test_the_commands_of_a_mail_are_commands_of_jobctl():
    from click.testing import CliRunner
    from jobctl.__main__ import cli

    for state in ("completed", "failed", "cancelled", "paused", "queued", "running", "gone"):
        for done, failed in ((0, 0), (1, 1)):
            story = Story(kind="finish", at=AT, job=42, state=state, items=2, done=done, failed=failed)
            for _, command in message._commands(story):
                words = command.split(" > ")[0].split()
                assert words[0] == "jobctl"
                asked = CliRunner().invoke(cli, [*words[1:2], "--help"])
                assert asked.exit_code == 0, command
                assert all(word in asked.output for word in words if word.startswith("--")), command


def test_a_digest_puts_what_is_wrong_first():
    fine = Story(kind="finish", at=AT, job=1, state="completed", items=3, done=3, name="a")
    lost = Story(kind="stall", at=AT, job=2, state="queued", items=3)
    text = read_back(made(fine, lost, STORY)).get_content()
    assert text.index("job 2 stalled") < text.index("job 42 completed") < text.index("job 1 completed")
    assert read_back(made(fine, lost))["subject"] == "2 notifications of gpujobd, 1 of them bad news"


def test_a_digest_that_is_tried_again_has_the_id_it_had():
    assert made(STORY, STORY)["message-id"] == made(STORY, STORY)["message-id"]
    assert made(STORY, STORY)["message-id"] != made(STORY)["message-id"]


TEXT = st.text(st.characters(codec="utf-8"), max_size=300)
ONE_LINE = {"kind": "start", "at": AT, "job": 1, "state": "running", "items": 1}


@given(TEXT, TEXT, TEXT, st.sampled_from(["finish", "start", "stall", "pause", "progress=50%", "device"]))
def test_no_word_of_a_users_makes_a_header_or_a_line(name, detail, handler, kind):
    story = Story(kind=kind, at=AT, job=1, name=name, detail=detail, handler=handler, state="failed", items=1)
    raw = bytes(made(story))
    found = read_back(made(story))
    assert {*found.keys()} <= {
        *("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "References"),
        *("Content-Type", "Content-Transfer-Encoding", "MIME-Version"),
    }
    assert all(len(line) < 998 for line in raw.splitlines())
    lines = found.get_content().splitlines()
    assert lines[1] == ""
    assert len(found["subject"]) < 200


def test_an_encoded_word_in_a_name_hides_no_header():
    """`email` decodes it; versions of Python before 3.11.10 and 3.12.5 then write what it hid as it is."""
    for hidden in ("=0D=0ABcc:_v@x", "=0D=0A=0D=0Aa_body"):
        found = read_back(made(Story(**ONE_LINE, name=f"x =?utf-8?q?a{hidden}?= y")))
        assert "Bcc" not in found
        assert found["subject"].startswith("job 1 has started (x = ?")
        assert found.get_content().startswith("Job 1 has started.")


# --- servers ------------------------------------------------------------------------------------------------------

PLAIN = ssl.create_default_context()


def server(port, **more):
    fields = {
        "host": "127.0.0.1",
        "port": port,
        "security": "none",
        "timeout_s": 20.0,
        "context": PLAIN,
    } | more
    return mail.Server(**fields)


async def send(port, *, to=TO, **more):
    return await mail.send(server(port, **more), made(STORY), to, trio.CapacityLimiter(4))


@contextlib.contextmanager
def bad_day(act):
    """A server that does that with every caller; act gets the socket and a file of its lines."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        callers = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    callers.append(sock)
                    with contextlib.suppress(OSError), sock, sock.makefile("rb") as lines:
                        act(sock, lines)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for sock in callers:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def dialogue(**answers):
    """An SMTP server that gives these answers to these words, `end` to the dot at the end."""

    def act(sock, lines):
        sock.sendall(answers.get("greeting", b"220 far.end\r\n"))
        for line in lines:
            word = line[:4].strip().upper().decode()
            sock.sendall(answers.get(word, b"354 go on\r\n" if word == "DATA" else b"250 ok\r\n"))
            if word == "DATA" and "DATA" not in answers:
                for text in lines:
                    if text == b".\r\n":
                        break
                sock.sendall(answers.get("end", b"250 taken\r\n"))

    return act


@pytest.mark.parametrize(
    ("answers", "verdict", "ill", "told"),
    [
        ({}, Verdict.DELIVERED, False, ""),
        ({"QUIT": b"500 what?\r\n"}, Verdict.DELIVERED, False, ""),
        ({"greeting": b"554 no service\r\n"}, Verdict.LATER, True, "554 no service"),
        ({"greeting": b"421 busy\r\n"}, Verdict.LATER, True, "421 busy"),
        ({"MAIL": b"451 later\r\n"}, Verdict.LATER, True, "451 later"),
        ({"MAIL": b"550 not you\r\n"}, Verdict.LATER, True, "550 not you"),
        ({"RCPT": b"450 greylisted\r\n"}, Verdict.LATER, False, "450 greylisted"),
        ({"RCPT": b"550 no such user\r\n"}, Verdict.NEVER, False, "550 no such user"),
        ({"DATA": b"451 later\r\n"}, Verdict.LATER, True, "451 later"),
        ({"end": b"552 too large\r\n"}, Verdict.NEVER, False, "552 too large"),
        ({"end": b"452 full\r\n"}, Verdict.LATER, True, "452 full"),
        ({"greeting": b"HTTP/1.1 400 Bad Request\r\n"}, Verdict.LATER, True, ""),
        ({"greeting": b"220 " + b"x" * 100_000 + b"\r\n"}, Verdict.LATER, True, ""),
        ({"RCPT": b"550 \x1b[2J\xff\r\n"}, Verdict.NEVER, False, "550  [2J"),
    ],
)
async def test_what_a_servers_answer_means(answers, verdict, ill, told):
    with bad_day(dialogue(**answers)) as port:
        outcome = await send(port)
    assert (outcome.verdict, outcome.ill) == (verdict, ill), outcome
    assert told in outcome.error
    assert outcome.error.isprintable()


def hang_after_data(sock, lines):
    sock.sendall(b"220 far.end\r\n")
    for line in lines:
        sock.sendall(b"354 go on\r\n" if line.upper().startswith(b"DATA") else b"250 ok\r\n")
        if line.upper().startswith(b"DATA"):
            for _ in lines:
                pass


def byte_by_byte(sock, lines):
    for byte in b"220 " + b"x" * 5000:
        sock.sendall(bytes([byte]))
        time.sleep(0.02)


def silent(sock, lines):
    for _ in lines:
        pass


def cut_after_data(sock, lines):
    sock.sendall(b"220 far.end\r\n")
    for line in lines:
        if line.upper().startswith(b"DATA"):
            sock.sendall(b"354 go on\r\n")
            return
        sock.sendall(b"250 ok\r\n")


@pytest.mark.parametrize("act", [hang_after_data, byte_by_byte, silent])
async def test_a_server_that_hangs_holds_neither_the_try_nor_its_thread(act):
    threads = trio.CapacityLimiter(1)
    with bad_day(act) as port:
        outcome = await mail.send(server(port, timeout_s=0.3), made(STORY), TO, threads)
        assert (outcome.verdict, outcome.ill) == (Verdict.LATER, True)
        assert "within 0.3 s" in outcome.error or "timed out" in outcome.error
        with trio.fail_after(10):
            while threads.borrowed_tokens:  # noqa: ASYNC110  # a thread ends when it ends
                await trio.sleep(0.01)


async def test_a_line_that_is_cut_after_data_is_tried_again():
    with bad_day(cut_after_data) as port:
        outcome = await send(port)
    assert (outcome.verdict, outcome.ill) == (Verdict.LATER, True)


async def test_goodbye_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(mail, "GOODBYE_S", 0.2)

    def act(sock, lines):
        def answer(word, text):
            for line in lines:
                if line.upper().startswith(word):
                    sock.sendall(text)
                    return

        sock.sendall(b"220 far.end\r\n")
        for word, text in ((b"EHLO", b"250 ok\r\n"), (b"MAIL", b"250 ok\r\n"), (b"RCPT", b"250 ok\r\n")):
            answer(word, text)
        answer(b"DATA", b"354 go on\r\n")
        answer(b".\r\n", b"250 taken\r\n")
        silent(sock, lines)

    with bad_day(act) as port:
        assert (await send(port)).verdict is Verdict.DELIVERED


# --- a server as servers are --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    import subprocess

    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
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
            *[
                "-keyout",
                folder / "key.pem",
                "-out",
                folder / "certificate.pem",
                "-days",
                "2",
                "-subj",
                "/CN=here",
            ],
            *["-addext", "subjectAltName=IP:127.0.0.1"],
        ],
        check=True,
        capture_output=True,
    )
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return served, ssl.create_default_context(cafile=str(folder / "certificate.pem"))


@contextlib.contextmanager
def aiosmtpd(ssl_context=None, **more):
    """Keeps what it took in `.taken`. On a loop of ours: its own controller calls its port, and that is 0."""
    smtp = pytest.importorskip("aiosmtpd.smtp")

    class Handler:
        def __init__(self):
            self.taken = []

        async def handle_DATA(self, _server, _session, envelope):  # noqa: N802  # aiosmtpd's name
            self.taken.append(envelope)
            return "250 taken"

    handler, loop = Handler(), asyncio.new_event_loop()

    def protocol():
        return smtp.SMTP(handler, hostname="far.end", loop=loop, **more)

    listening = loop.run_until_complete(loop.create_server(protocol, "127.0.0.1", 0, ssl=ssl_context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield handler, listening.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.run_until_complete(ended(loop, listening))
        loop.close()


async def ended(loop, listening):
    listening.close()
    for task in asyncio.all_tasks(loop) - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0.05)  # for its transports to close


async def test_a_mail_arrives_as_it_was_written():
    with aiosmtpd() as (handler, port):
        assert (await send(port, to=[*TO, "bob@example.org"])).verdict is Verdict.DELIVERED
    (envelope,) = handler.taken
    assert envelope.mail_from == "gpujobd@example.org"
    assert envelope.rcpt_tos == ["alice@example.org", "bob@example.org"]
    found = email.message_from_bytes(envelope.content, policy=email.policy.default)
    assert found.get_content() == read_back(made(STORY)).get_content()


def only(user, password):
    from aiosmtpd.smtp import AuthResult

    def check(_server, _session, _envelope, _mechanism, data):
        return AuthResult(success=(data.login, data.password) == (user, password), handled=False)

    return check


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize(("password", "verdict"), [("right", Verdict.DELIVERED), ("wrong", Verdict.LATER)])
async def test_a_password_goes_over_tls(certificate, security, password, verdict):
    pytest.importorskip("aiosmtpd")
    served, trusting = certificate
    more = {"ssl_context": served} if security == "tls" else {"tls_context": served, "require_starttls": True}
    # It counts STARTTLS alone as TLS.
    auth = {"authenticator": only(b"gpujobd", b"right"), "auth_require_tls": security == "starttls"}
    with aiosmtpd(**more, **auth) as (handler, port):
        outcome = await send(port, security=security, context=trusting, user="gpujobd", password=password)
    assert outcome.verdict is verdict, outcome
    assert len(handler.taken) == (verdict is Verdict.DELIVERED)
    assert ("535" in outcome.error) == (verdict is Verdict.LATER)


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_certificate_that_is_not_trusted_gets_no_mail(certificate, security):
    served, _ = certificate
    more = {"ssl_context": served} if security == "tls" else {"tls_context": served}
    with aiosmtpd(**more) as (handler, port):
        outcome = await send(port, security=security)
    assert (outcome.verdict, outcome.ill) == (Verdict.LATER, True)
    assert "certificate" in outcome.error
    assert handler.taken == []


async def test_a_server_without_starttls_gets_no_mail():
    with aiosmtpd() as (handler, port):
        outcome = await send(port, security="starttls")
    assert "STARTTLS" in outcome.error
    assert handler.taken == []
