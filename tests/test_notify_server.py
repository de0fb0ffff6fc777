"""The notifier's own socket: who sees and changes what; and a scene with the real daemon."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from gpujobd import protocol as p
from harness import Host, as_user, fake, until
from notify_house import TARGETS, FarWeb, NotifierClient, NotifyHost, fake_past

pytest.importorskip("httpx")

ALICE, BOB = 30_001, 30_002
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")


@pytest.fixture(scope="module")
def folder():
    """One that every user can reach; pytest's own are for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def web():
    with FarWeb() as web:
        yield web


@pytest.fixture(scope="module")
def past(folder):
    with fake_past(folder / "s") as past:
        yield past


@pytest.fixture(scope="module")
def notifier(folder, past):
    house = '[endpoints.page]\nkind = "hook"\nprogram = ["/bin/false"]\n'
    with NotifyHost(folder / "n", past.daemon.path, f"{TARGETS}{house}") as notifier:
        (folder / "n").chmod(0o755)
        notifier.wait_until_it_follows()
        yield notifier


@pytest.fixture
def client(notifier):
    with notifier.client() as client:
        yield client


def ask_as(uid, notifier, kind, **fields):
    def ask():
        with NotifierClient(notifier.socket) as client:
            return client.ask(kind, **fields)

    return as_user(uid, ask)


def submit(past, job, uid, *notify):
    fields = {"owner": uid, "tenant": "t", "handler": "h", "items": 10, "notify_on": []}
    past.add("submitted", job=job, notify=list(notify), **fields)


def settled(client, job):
    return until(
        lambda: [n for n in client.notifications(job=job, all=True) if n.state != "pending"], "an end"
    )


NUMBER = 1 << 63  # one more than the outbox can look up


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (p.Notifications, {"job": NUMBER}),
        (p.Notifications, {"after": NUMBER}),
        (p.Notifications, {"job": -1}),
        (p.Notifications, {"states": ["\x01" * 300_000]}),
        (p.NotificationRetry, {"notification": NUMBER}),
        (p.NotificationMute, {"job": NUMBER}),
        (p.NotifyDefaults, {"set": True, "notify": ["\x01" * 300_000]}),
        (p.NotifyDefaults, {"set": True, "notify_on": ["\x01" * 300_000]}),
    ],
)
def test_what_cannot_be_looked_up_is_refused_and_ends_nothing(notifier, client, kind, fields):
    refused = client.ask(kind, **fields)
    assert isinstance(refused, p.Error)
    assert len(refused.message) <= 500
    assert notifier.process.poll() is None
    assert isinstance(client.ask(p.Ping), p.Pong)


@needs_root
def test_everybody_sees_and_changes_his_own_and_root_all(past, notifier, web, client):
    web.answer = lambda _: 404
    for job, uid in ((1, ALICE), (2, BOB)):
        submit(past, job, uid, web.url())
        past.run(job)
    until(lambda: len(client.notifications(all=True)) == 2, "both")
    (mine,) = ask_as(ALICE, notifier, p.Notifications).notifications
    assert (mine.job, mine.kind, mine.owner) == (1, "finish", str(ALICE))
    (other,) = ask_as(BOB, notifier, p.Notifications).notifications
    assert ask_as(ALICE, notifier, p.Notifications, job=2).notifications == []
    assert ask_as(ALICE, notifier, p.Notifications, all=True).code == "forbidden"
    assert ask_as(ALICE, notifier, p.NotificationRetry, notification=other.id).code == "no_such_notification"
    assert ask_as(ALICE, notifier, p.NotificationRetry, notification=999).code == "no_such_notification"
    web.answer = lambda _: 204
    until(lambda: client.notifications(job=1, all=True)[0].tries == 1, "its try")
    assert isinstance(ask_as(ALICE, notifier, p.NotificationRetry, notification=mine.id), p.Done)
    assert settled(client, 1)[0].state == "delivered"
    assert ask_as(ALICE, notifier, p.NotificationRetry, notification=mine.id).code == "bad_state"
    names = {view.name for view in ask_as(ALICE, notifier, p.Notifications).endpoints}
    assert "page" not in names
    assert "page" in client.endpoints()


@needs_root
def test_a_mute_of_ones_own_leaves_others_alone(past, notifier, web, client):
    web.answer = lambda _: 204
    assert isinstance(ask_as(ALICE, notifier, p.NotificationMute, endpoint=web.url()), p.Done)
    for job, uid in ((11, ALICE), (12, BOB)):
        submit(past, job, uid, web.url())
        past.run(job)
    assert settled(client, 12)[0].state == "delivered"
    assert settled(client, 11)[0].state == "muted"
    assert isinstance(ask_as(ALICE, notifier, p.NotificationMute, endpoint=web.url(), muted=False), p.Done)
    assert ask_as(ALICE, notifier, p.NotificationMute).code == "bad_request"


@needs_root
def test_defaults_hold_for_jobs_that_say_nothing(past, notifier, web, client):
    fields = {"set": True, "notify": [web.url("/default")], "notify_on": ["start"]}
    reply = ask_as(ALICE, notifier, p.NotifyDefaults, **fields)
    assert (reply.notify, reply.notify_on) == (fields["notify"], ["start"])
    submit(past, 21, ALICE)
    submit(past, 22, BOB)
    submit(past, 23, ALICE, "none")
    for job in (21, 22, 23):
        past.run(job)
    assert settled(client, 21)[0].kind == "start"
    assert client.notifications(job=22, all=True) == client.notifications(job=23, all=True) == []
    assert ask_as(ALICE, notifier, p.NotifyDefaults, set=True).notify == []
    for bad in ({"notify": ["page"]}, {"notify": ["https://example.org/"]}, {"notify_on": ["now"]}):
        assert ask_as(ALICE, notifier, p.NotifyDefaults, set=True, **bad).code == "bad_notify"


def test_pages_have_an_end(past, notifier, web, client):
    web.answer = lambda _: 204
    for job in range(100, 130):
        past.submit(job, web.url())
        past.run(job)
    until(lambda: len(client.notifications(all=True)) >= 30, "all of them")
    seen, after = [], 0
    while True:
        page = client.ask(p.Notifications, all=True, after=after, limit=7)
        seen += [n.id for n in page.notifications]
        after = page.next
        if not after:
            break
    assert seen == sorted({n.id for n in client.notifications(all=True)})
    assert client.ask(p.Notifications, states=["lost"]).code == "bad_request"


@pytest.mark.parametrize(
    "first",
    [
        p.frame(p.Ping(id=1)),
        p.frame(p.Hello([1])) * 2,
        p.frame(p.Hello([99])),
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        p.frame(p.Hello([1])) + p.frame(p.Status(id=1)),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_who_does_not_speak_is_told_so_and_hung_up_on(notifier, first):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(notifier.socket))
        sock.sendall(first)
        said = b""
        while piece := sock.recv(1 << 16):
            said += piece
    *_, last = map(p.decode_notifier_reply, p.Frames().feed(said))
    assert (last.id, last.code) == (0, "bad_request")


def test_a_crowd_of_silent_clients_is_sent_away(notifier, client):
    socks = []
    try:
        for _ in range(150):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            socks.append(sock)
            sock.connect(str(notifier.socket))  # without a time: a full backlog is then waited for
            sock.settimeout(60)
        for sock in socks:
            while sock.recv(1 << 16):
                pass
    except ConnectionResetError:
        pass
    finally:
        for sock in socks:
            sock.close()
    assert client.ask(p.Ping).program.startswith("gpujobd-notify")


# --- with the daemon ----------------------------------------------------------------------------------------------


def test_a_real_job_is_told_of_by_a_real_notifier_across_kills_of_both(tmp_path):
    with (
        FarWeb() as web,
        Host(tmp_path / "host", "", {"echo": fake("toys:Echo")}) as host,
        NotifyHost(tmp_path / "n", host.socket) as notifier,
    ):
        notifier.wait_until_it_follows()
        with host.client() as client:
            wishes = {"notify": [web.url()], "notify_on": ["start", "finish"]}
            first = client.submit("echo", [{"n": 1}], **wishes)
            assert isinstance(first, p.Accepted), first
            until(lambda: web.facts() == {(first.job, "start"), (first.job, "finish")}, "both")
            assert client.submit("echo", [{"n": 1}], notify=["https://example.org/"]).code == "bad_notify"
        notifier.kill()
        with host.client() as client:
            second = client.submit("echo", [{"n": 1}], notify=[web.url()])
            assert isinstance(second, p.Accepted), second
            client.wait(second.job)
        host.process.kill()
        host.process.wait()
        host.start()
        notifier.start()
        until(lambda: (second.job, "finish") in web.facts(), "what it missed")
        body = next(b for _, _, b in web.told if b["data"]["job"] == second.job)
        assert body["data"]["items"] == {"total": 1, "done": 1, "failed": 0}
        assert notifier.stop() == 0
        assert len({name for _, name, _ in web.told}) == 3
