"""What one user can learn of another's jobs: everything he can read is read, and nothing marked is in it.

The victim's words, items, parameters and errors all carry MARK. Job ids begin at FIRST_ID, so that a number that is one
is known when it is seen, as a number or in a sentence.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from core_house import ALICE, House
from gpujobd import protocol
from gpujobd.core import events
from gpujobd.journal import Journal
from gpujobd.status import status
from harness import Client, Host, as_user, fake, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")

VICTIM, SPY, MATE, OBSERVER = 30_101, 30_102, 30_103, 30_104
MARK = "xyzzy"
FIRST_ID = 7_700_000
IDS = re.compile(rb"(?<![\d.])77000\d\d(?!\d)")
CONFIG = """
[access]
observers = ["30104"]
high_priority = ["30101"]
[tenants.lab]
members = ["30101", "30103"]
[scheduler]
slice_s = 0.5
"""


@pytest.fixture
def host() -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    folder.chmod(0o755)
    host = Host(
        folder / "host",
        CONFIG,
        {"loud": fake("loud:Loud", **{"job_params.note": {"type": "str", "default": ""}}, batch_max=1)},
    )
    begin_at(host.folder / "state" / "journal", FIRST_ID)
    with host:
        yield host
        assert host.process is not None
        assert host.process.poll() is None, host.log()
    shutil.rmtree(folder)


def begin_at(journal_folder: Path, job_id: int) -> None:
    """A journal in which ids have come this far."""
    journal_folder.parent.mkdir(mode=0o700)
    journal = Journal(journal_folder)
    journal.open()
    first = events.Submitted(
        at_ns=1,
        job_id=job_id,
        submit_id="first",
        owner=0,
        tenant="root",
        handler="loud",
        items=1,
        input_bytes=3,
        input_sha256=b"x" * 32,
    )
    journal.append([events.encode(first), events.encode(events.Cancelled(at_ns=1, job_id=job_id, by=0))])
    journal.close()


class Tap:
    """A socket that keeps what it received."""

    def __init__(self, client: Client) -> None:
        self._sock = client.sock
        self.heard = bytearray()
        client.sock = self  # type: ignore[assignment]  # all the client does with it is passed on

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recvmsg(self, *arguments: Any) -> Any:
        received = self._sock.recvmsg(*arguments)
        self.heard += received[0]
        return received


def everything(host: Host, own: int, foreign: list[int]) -> bytes:
    """All that the caller gets out of the daemon, own job and others', by every verb there is."""
    with host.client() as client:
        tap = Tap(client)
        for kind in (protocol.Status, protocol.Devices, protocol.Handlers, protocol.Tenants, protocol.Last):
            client.ask(kind)
        for fields in ({}, {"tenant": str(VICTIM)}, {"tenant": "lab"}, {"handler": "loud"}, {"newest": True}):
            client.ask(protocol.List, **fields)
        client.ask(protocol.Show, job=own)
        client.ask(protocol.Output, job=own)
        for job in foreign:
            for kind in (protocol.Show, protocol.Watch, protocol.Output, protocol.Log, protocol.Events):
                client.ask(kind, job=job)
            for kind in (protocol.Cancel, protocol.Pause, protocol.Resume, protocol.First, protocol.Remove):
                client.ask(kind, job=job)
            client.ask(protocol.SetPriority, job=job, priority="low")
            client.ask(protocol.Retry, job=job, submit_id=uuid.uuid4().hex)
            client.ask(protocol.Wait, jobs=[own, job])
        client.submit("loud", [{}], tenant="lab")
        client.submit("loud", [{}], tenant=str(VICTIM))
        client.submit("loud", [{}], dry_run=True)
        client.submit("loud", [{}], submit_id=f"{MARK}-1"[6:])
        client.ask(protocol.Queue, action="stop")
        heard = bytes(tap.heard)
    return heard + all_events(host) + all_log(host, own) + a_look(host, own)


def a_look(host: Host, job: int) -> bytes:
    with host.client() as client:
        tap = Tap(client)
        client.ask(protocol.Watch, job=job)
        return bytes(tap.heard)


def all_events(host: Host) -> bytes:
    with host.client() as client:
        tap = Tap(client)
        reply = client.ask(protocol.Events, since=1)
        while not isinstance(reply, protocol.Done):
            reply = client.receive()
        return bytes(tap.heard)


def all_log(host: Host, job: int) -> bytes:
    with host.client() as client:
        reply, pieces = client.ask(protocol.Log, job=job), b""
        while isinstance(reply, protocol.LogPiece):
            pieces += reply.data
            reply = client.receive()
        return pieces


def words(heard: bytes) -> list[bytes]:
    """What stands in the frames, numbers written out; what is no frame as it is."""
    found = [heard]
    with contextlib.suppress(protocol.FrameError, msgspec.MsgspecError):
        found.extend(repr(msgspec.msgpack.decode(body)).encode() for body in protocol.Frames().feed(heard))
    return found


def leaks(heard: bytes, own: set[int], asked_for: set[int]) -> list[bytes]:
    """What of it the caller should not have got. An id he named himself may be quoted back to him."""
    allowed = {str(job).encode() for job in own | asked_for}
    found = [text for text in words(heard) if MARK.encode() in text]
    return found + [text for text in words(heard) if set(IDS.findall(text)) - allowed]


def submit(host: Host, uid: int, items: list[dict[str, Any]], **fields: Any) -> int:
    def do() -> int:
        with host.client() as client:
            reply = client.submit("loud", items, **fields)
            assert isinstance(reply, protocol.Accepted), reply
            return reply.job

    return as_user(uid, do)


def secretly(host: Host, items: list[dict[str, Any]], uid: int = VICTIM, **fields: Any) -> int:
    marked = [{"custom_id": f"{MARK}-{n}", "text": f"{MARK} {n}"} | item for n, item in enumerate(items)]
    secret = {
        "name": f"{MARK} name",
        "params": {"note": f"{MARK} note"},
        "submit_id": f"{MARK}{uuid.uuid4()}",
    }
    return submit(host, uid, marked, **(secret | fields))


def state_of(host: Host, job: int) -> str:
    with host.client() as client:
        return client.job(job).state


def test_a_stranger_learns_nothing_of_anothers_jobs_by_any_verb_in_any_state(host: Host) -> None:
    own = submit(host, SPY, [{"wait_s": 0.05}] * 200)
    until(lambda: state_of(host, own) == "running", "the spy's job to run")
    foreign = [secretly(host, [{"wait_s": 0.05}] * 100), secretly(host, [{}], priority="high")]
    foreign.append(secretly(host, [{"fail": 1}, {}], tenant="lab"))
    foreign.append(secretly(host, [{}], tenant="lab", uid=MATE))
    heard = [as_user(SPY, lambda: everything(host, own, foreign))]  # beaten by a higher level
    until(lambda: state_of(host, foreign[0]) == "running", "the victim's turn")
    heard.append(as_user(SPY, lambda: everything(host, own, foreign)))

    def talk() -> None:
        with host.client() as client:
            client.ask(protocol.Pause, job=foreign[0], message=f"{MARK} message")
            client.ask(protocol.First, job=foreign[2], message=f"{MARK} message")
            client.ask(protocol.Wait, jobs=[foreign[2]])
            client.ask(protocol.Remove, job=foreign[2], message=f"{MARK} message")

    as_user(VICTIM, talk)
    heard.append(as_user(SPY, lambda: everything(host, own, foreign)))
    foreign += [secretly(host, [{"die": 1}], priority="high") for _ in range(3)]

    def ill() -> bool:
        with host.client() as client:
            return client.ask(protocol.Devices).devices[0].state == "unhealthy"

    until(ill, "the device to fall ill")
    with host.client() as client:
        (device,) = client.ask(protocol.Devices).devices
        assert IDS.search(str(device.reason_detail).encode())  # an administrator is told which jobs it were
    heard.append(as_user(SPY, lambda: everything(host, own, foreign)))
    with host.client() as client:
        for job in foreign:
            client.ask(protocol.Cancel, job=job, message=f"{MARK} message")
    heard.append(as_user(SPY, lambda: everything(host, own, foreign)))
    own_ids = mine(host)
    for text in heard:
        found = leaks(text, own_ids, set(foreign))
        assert not found, found[0][:2000]
    assert all(len(text) > 5_000 for text in heard), "he was told next to nothing: that is no test"
    assert any(b"a job of 30101" in text for text in heard), "whose job is ahead is told"


def all_seen(host: Host, jobs: list[int]) -> bytes:
    """What an observer is shown of these jobs, and told of all that happened."""
    with host.client() as client:
        tap = Tap(client)
        for kind in (protocol.Status, protocol.Devices, protocol.Handlers, protocol.Tenants, protocol.List):
            client.ask(kind)
        for job in jobs:
            assert isinstance(client.ask(protocol.Show, job=job), protocol.OneJob)
            for kind in (protocol.Output, protocol.Log, protocol.Cancel, protocol.Remove):
                assert client.ask(kind, job=job).code == "forbidden"
            assert client.ask(protocol.Output, job=job, errors=True).code == "forbidden"
        heard = bytes(tap.heard)
    return heard + all_events(host) + b"".join(a_look(host, job) for job in jobs)


def test_an_observer_sees_every_job_and_nothing_of_what_is_in_them(host: Host) -> None:
    """The notifier is one: it follows what becomes of jobs, and is the one process with a network."""

    def marked(**item: Any) -> dict[str, Any]:
        return {"custom_id": f"{MARK}-1", "text": f"{MARK} text"} | item

    foreign = [
        submit(host, VICTIM, [marked(), marked(fail=1)]),
        submit(host, VICTIM, [marked(fail=1), marked()], failures_max=0, tenant="lab"),
        submit(host, VICTIM, [marked(die=1)]),
    ]

    def over() -> bool:
        with host.client() as client:
            jobs = [client.job(job) for job in foreign]
            return all(job.state in ("completed", "failed") for job in jobs[:2]) and bool(
                jobs[2].interruptions
            )

    until(over, "them to fail in their ways")
    heard = as_user(OBSERVER, lambda: all_seen(host, foreign))
    assert not [text[:2000] for text in words(heard) if MARK.encode() in text]
    assert {str(job).encode() for job in foreign} <= set(IDS.findall(b" ".join(words(heard))))
    assert b"handler_error" in heard  # how many failed with what, he is told


def mine(host: Host) -> set[int]:
    def ids() -> set[int]:
        with host.client() as client:
            return {job.id for job in client.ask(protocol.List, mine=True).jobs}

    return as_user(SPY, ids)


def test_whoever_owns_a_job_of_a_tenant_he_is_no_member_of_sees_no_number_of_the_others(host: Host) -> None:
    """An administrator's submission for a tenant: its owner sees his job, not his neighbours'."""
    with host.client() as client:
        client.ask(protocol.Queue, action="stop")
        client.ask(protocol.Queue, action="start")
    running = secretly(host, [{"wait_s": 0.05}] * 200, tenant="lab")
    until(lambda: state_of(host, running) == "running", "it to run")
    waiting = secretly(host, [{}], tenant="lab", uid=MATE)
    with host.client() as client:
        assert client.job(waiting).reason_detail == "cpu runs a job of lab"
    second = secretly(host, [{}], tenant="lab", uid=MATE)
    third = secretly(host, [{}], tenant="lab")
    with host.client() as client:
        assert client.job(second).reason_detail == f"job {waiting} is ahead"
        assert client.job(third).reason_detail == "a job of lab and 1 more are ahead"


def test_systemd_is_told_whose_job_runs_and_not_which() -> None:
    """`systemctl status` shows it to everybody."""
    house = House()
    house.submit(ALICE, name=MARK)
    assert status(house.state, lambda _: None) == "alice on cpu: 0/10; 0 waiting"
