"""Who gets in, who may do what, and how the others fare while somebody misbehaves: real users, real daemon."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import struct
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from gpujobd import protocol, server
from gpujobd.guests import CONNECTIONS_MAX, STREAMS_MAX, UPLOADS_MAX
from gpujobd.protocol import Frames, frame
from harness import HANG_S, as_user, fake, hosted, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")

OWNER, MEMBER, STRANGER, OBSERVER = 30_001, 30_002, 30_003, 30_004
CONFIG = """
[access]
observers = ["30004"]
[tenants.shared]
members = ["30001", "30002"]
[limits]
queued_jobs_max = 5000
"""
HELLO = frame(protocol.Hello([1]))


@pytest.fixture(scope="module")
def host():
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    folder.chmod(0o755)
    with hosted(folder / "host", CONFIG, count=fake("toys:Count", job_params={})) as host:
        yield host
        assert host.process.poll() is None, host.log()
        assert "Traceback" not in host.log(), host.log()
    shutil.rmtree(folder)


@pytest.fixture
def stopped_queue(host):
    with host.client() as client:
        client.ask(protocol.Queue, action="stop")
        yield
        for job in client.ask(protocol.List, states=["queued", "paused"]).jobs:
            client.ask(protocol.Cancel, job=job.id)
        client.ask(protocol.Queue, action="start")


# --- the notifier -----------------------------------------------------------------------------------------------------


def notifier_events(host):
    with host.client() as client:
        found, reply = [], client.ask(protocol.Events, since=1)
        while not isinstance(reply, protocol.Done):
            if isinstance(reply, protocol.EventSeen) and reply.event["event"].startswith("notifier"):
                found.append((reply.event["event"].removeprefix("notifier_"), reply.event.get("names")))
            reply = client.receive()
        return found


def test_a_notifier_is_here_while_its_connection_lasts_and_of_several_the_newest_counts(host, stopped_queue):
    def submit(target="ops"):
        def do():
            with host.client() as client:
                return client.submit("count", [{"text": "a"}], notify=[target], notify_on=["fail"])

        return as_user(OWNER, do)

    def attends():
        with host.client() as first, host.client() as second:
            assert isinstance(first.ask(protocol.Attend, names=["ops"]), protocol.Done)
            assert isinstance(first.ask(protocol.Attend, names=["ops"]), protocol.Done)
            assert isinstance(second.ask(protocol.Attend, names=["ops", "two"]), protocol.Done)
            assert second.ask(protocol.Attend, names=["no name"]).code == "bad_request"
            second.__exit__()
            until(lambda: notifier_events(host)[-1] == ("attached", ["ops"]), "the first to count again")

    assert submit().code == "no_notifier"
    as_user(OBSERVER, attends)
    until(lambda: notifier_events(host)[-1][0] == "left", "it to have left")
    said = [("attached", ["ops"]), ("attached", ["ops", "two"]), ("attached", ["ops"]), ("left", None)]
    assert notifier_events(host)[-4:] == said
    assert submit("two").code == "bad_notify"
    job = submit().job  # it left a moment ago

    def look():
        with host.client() as client:
            shown = client.ask(protocol.Show, job=job).job
            (listed,) = client.ask(protocol.List, after=job - 1).jobs
            event, reply = None, client.ask(protocol.Events, since=1, job=job)
            while not isinstance(reply, protocol.Done):
                event = reply.event if event is None else event
                reply = client.receive()
            told = [(seen.notify, seen.notify_on) for seen in (shown, listed)]
            return [*told, (event.get("notify"), event.get("notify_on"))]

    kept = (["ops"], ["fail"])
    for uid in (OWNER, OBSERVER, 0):
        assert as_user(uid, look) == [kept, kept, kept]

    def share():
        with host.client() as client:
            return client.submit("count", [{"text": "a"}], notify=["ops"], tenant="shared").job

    job = as_user(OWNER, share)
    hidden = as_user(MEMBER, lambda: [[word or None for word in seen] for seen in look()])
    assert hidden == [[None, None]] * 3


def test_a_retry_tells_whom_the_first_told_unless_it_says_otherwise(host):
    def attends_and_retries():
        with host.client() as client:
            client.ask(protocol.Attend, names=["ops", "lab"])
            job = client.submit("count", [{"text": "a"}, {}], notify=["ops"], notify_on=["start"]).job
            client.wait(job)
            found = []
            for fields in ({}, {"notify": ["lab"], "notify_on": ["fail"]}, {"notify": ["none"]}):
                again = client.ask(protocol.Retry, job=job, submit_id=uuid.uuid4().hex, **fields)
                shown = client.job(again.job)
                found.append((shown.notify, shown.notify_on))
            refused = client.ask(protocol.Retry, job=job, submit_id="x", notify=["nobody-such"])
            return found, refused.code

    found, code = as_user(0, attends_and_retries)
    assert found == [(["ops"], ["start"]), (["lab"], ["fail"]), (["none"], ["start"])]
    assert code == "bad_notify"


# --- places -----------------------------------------------------------------------------------------------------------


def crowd(host, uid, count):
    """A child of another uid that holds `count` silent or greeted connections until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            socks = []
            for _ in range(count):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.connect(str(host.socket))
                with contextlib.suppress(OSError):
                    sock.send(HELLO + frame(protocol.Events(id=1, follow=True)))
                socks.append(sock)
            welcomed = 0
            for sock in socks:
                sock.settimeout(20)
                replies = list(map(protocol.decode_reply, Frames().feed(sock.recv(1 << 16))))
                welcomed += isinstance(replies[0], protocol.Welcome)
            os.write(writer, struct.pack("i", welcomed))
            time.sleep(HANG_S)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        return child, struct.unpack("i", pipe.read(4))[0]


def end(*children):
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_uid_gets_its_places_and_the_rest_a_reason(host):
    child, welcomed = crowd(host, STRANGER, CONNECTIONS_MAX + 20)
    try:
        assert welcomed == CONNECTIONS_MAX

        def one_more():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(HANG_S)
            sock.connect(str(host.socket))
            return protocol.decode_reply(next(Frames().feed(sock.recv(1 << 16))))

        refusal = as_user(STRANGER, one_more)  # before it has said a word
        assert (refusal.code, refusal.limit) == ("too_many_connections", CONNECTIONS_MAX)
        with host.client() as client:
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)
    finally:
        end(child)


def test_the_last_places_are_for_administrators(host):
    children = []
    try:
        welcomed = []
        for n in range(5):
            child, number = crowd(host, 31_000 + n, CONNECTIONS_MAX)
            children.append(child)
            welcomed.append(number)
        assert sum(welcomed) == server.CONNECTIONS_MAX - server.CONNECTIONS_RESERVED
        admins = [host.client() for _ in range(server.CONNECTIONS_RESERVED - 1)]
        for client in admins:
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)
            client.sock.close()
        assert "was turned away" in host.log()
        assert host.log().count("was turned away") < 5  # whatever the crowd, the log stays readable
    finally:
        end(*children)
    until(lambda: len(os.listdir(f"/proc/{host.process.pid}/fd")) < 60, "the places to be given back")


# --- what one uid can cost ----------------------------------------------------------------------------------------------


def test_subscriptions_are_bounded_by_uid_and_not_by_connection(host):
    def subscribe():
        refused = 0
        clients = []
        for _ in range(6):
            client = host.client()
            clients.append(client)
            for n in range(50):
                client.send(protocol.Events(id=n + 1, follow=True))
            client.send(protocol.Ping(id=100))
            while not isinstance(reply := client.receive(), protocol.Pong):
                refused += isinstance(reply, protocol.Error) and reply.code == "too_many_requests"
        return refused

    assert as_user(STRANGER, subscribe) == 300 - STREAMS_MAX


def test_uploads_of_one_uid_wait_for_each_other_and_not_for_anybody_elses(host, stopped_queue):
    header = {
        "handler": "count",
        "items": 20_000,
        "input_bytes": 200_000,
        "input_sha256": b"x" * 32,
        "item_bytes": 50,
    }

    def go_on(count):
        with host.client() as client:
            for n in range(count):
                client.send(protocol.Submit(id=n + 1, submit_id=uuid.uuid4().hex, **header))
            client.sock.settimeout(1.0)
            granted = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    granted += isinstance(client.receive(), protocol.GoOn)
            return granted

    assert as_user(STRANGER, lambda: go_on(UPLOADS_MAX + 10)) == UPLOADS_MAX
    assert as_user(MEMBER, lambda: go_on(3)) == 3


def test_wide_names_and_reasons_of_others_do_not_break_the_administrators_table(host, stopped_queue):
    def submit():
        with host.client() as client:
            for n in range(400):
                job = client.submit("count", [{"text": "a"}], name="漢" * 100, submit_id=f"wide-{n}").job
                client.ask(protocol.Pause, job=job, message="漢" * 500)

    as_user(STRANGER, submit)
    with host.client() as client:
        after, seen = 0, []
        while True:
            page = client.ask(protocol.List, states=["paused"], after=after)
            seen += page.jobs
            if not page.next:
                break
            after = page.next
        assert len(seen) == 400
        assert isinstance(client.ask(protocol.Status), protocol.StatusTable)
        for job in seen:
            client.ask(protocol.Cancel, job=job.id, message="漢" * 500)
        ended = client.wait(*(job.id for job in seen))
        assert [job.state for job in ended] == ["cancelled"] * 400


def test_words_of_users_forge_no_line_of_the_log(host, stopped_queue):
    def speak():
        with host.client() as client:
            job = client.submit("count", [{"text": "a"}]).job
            client.ask(protocol.Pause, job=job, message="x\nERROR device cpu is on fire\x1b[2J\x9b1m")
            bad = client.submit("count", [{"text": "a"}], name="a\nb").code
            strange = client.ask(protocol.List, states=["a\nERROR forged"] * 50_000)
            return bad, strange.code, len(strange.message)

    assert as_user(STRANGER, speak)[:2] == ("bad_input", "bad_request")
    until(lambda: "on fire" in host.log(), "the line")
    assert not [line for line in host.log().splitlines() if line.startswith("ERROR")]
    assert "\x1b" not in host.log()
    assert "\x9b" not in host.log()


def test_a_thousand_unknown_parameters_are_refused_in_a_line(host):
    with host.client() as client:
        reply = client.submit("count", [{"text": "a"}], params={f"p{n}" * 10: "x" for n in range(10_000)})
        assert reply.code == "bad_params"
        assert len(reply.message) < 1100


def test_the_newest_job_is_the_newest_that_is_left(host):
    def run():
        with host.client() as client:
            first = client.submit("count", [{"text": "a"}], submit_id="first").job
            second = client.submit("count", [{"text": "a"}], submit_id="second").job
            client.wait(first, second)
            before = client.ask(protocol.Last).job.id
            client.ask(protocol.Remove, job=second)
            after = client.ask(protocol.Last).job.id
            client.ask(protocol.Remove, job=first)
            return before - second, after - first, client.ask(protocol.Last).code

    assert as_user(30_009, run) == (0, 0, "no_such_job")


# --- and the others, meanwhile ------------------------------------------------------------------------------------------


def flood(host, uid, requests, connections):
    """A child that sends `requests` as fast as it can on many connections, reading what comes; cut off, it comes again."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            chosen = selectors.DefaultSelector()
            for _ in range(connections):
                call_in(host, chosen)
            while True:
                for key, ready in chosen.select():
                    try:
                        if ready & selectors.EVENT_READ and not key.fileobj.recv(1 << 18):
                            raise ConnectionResetError
                        if ready & selectors.EVENT_WRITE:
                            key.fileobj.send(requests)
                    except BlockingIOError:
                        pass
                    except OSError:
                        chosen.unregister(key.fileobj)
                        key.fileobj.close()
                        call_in(host, chosen)
        finally:
            os._exit(1)
    return child


def call_in(host, chosen):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(host.socket))
    sock.sendall(HELLO)
    sock.setblocking(False)
    chosen.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)


def pings(host, count):
    """Another user's pings, one after the other; how many were answered, none of them after HANG_S."""

    def ping():
        with host.client() as client:
            return sum(isinstance(client.ask(protocol.Ping), protocol.Pong) for _ in range(count))

    return as_user(MEMBER, ping)


FLOODS = {
    "pings": frame(protocol.Ping(id=1)),
    "lists": frame(protocol.List(id=1)),
    "statuses": frame(protocol.Status(id=1)),
    "lasts": frame(protocol.Last(id=1)),
    "events": frame(protocol.Events(id=1, since=1)),
    "tenants": frame(protocol.Tenants(id=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FLOODS)
def test_another_users_pings_are_answered_under_a_flood_that_never_ends(host, stopped_queue, what):
    with host.client() as client:
        for n in range(300):
            client.submit("count", [{"text": "a"}], submit_id=f"flood-{n}")
    one = FLOODS[what]
    many = b"".join(one[:-1] + bytes([n]) if one[-1] == 1 else one for n in range(60))
    many = many if what == "pings" else one
    child = flood(host, STRANGER, many, 100)
    try:
        time.sleep(0.5)
        assert pings(host, 200) == 200
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert ended is None, "the flood has ended: nothing was shown"
    finally:
        end(child)
