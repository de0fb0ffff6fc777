"""Every request there is, by everybody there is, over a real socket: what is allowed, refused, and told.

The verbs come from the protocol itself: one that has no row in TABLE fails. Beside the table, written by hand, stands the
daemon's own (core/rights.py): both must say the same.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from gpujobd import protocol
from gpujobd.core.inputs import Who
from gpujobd.core.model import Job
from gpujobd.core.rights import RIGHTS, allowed
from gpujobd.protocol import Frames, frame
from harness import HANG_S, Client, Host, as_user, fake, hosted, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")

OWNER, MEMBER, OBSERVER, STRANGER = 30_201, 30_202, 30_203, 30_204
UIDS: Final = {"owner": OWNER, "member": MEMBER, "admin": 0, "observer": OBSERVER, "stranger": STRANGER}
CONFIG: Final = """
[access]
observers = ["30203"]
[tenants.shared]
members = ["30201", "30202"]
[limits]
queued_jobs_max = 5000
queued_jobs_per_uid_max = 5000
"""
KINDS: Final = {kind.__struct_config__.tag: kind for kind in protocol.AnyRequest.__args__}

# `ok`: it is done, or refused for what the job is, not for who asks. `none`: no such job. The job is the owner's, in the
# tenant `shared`. A verb with a colon is a case of the verb before it.
TABLE: Final = """
verb            owner      member     admin  observer   stranger
ping            ok         ok         ok     ok         ok
status          ok         ok         ok     ok         ok
handlers        ok         ok         ok     ok         ok
tenants         ok         ok         ok     ok         ok
devices         ok         ok         ok     ok         ok
last            ok         ok         ok     ok         ok
list            ok         ok         ok     ok         ok
events          ok         ok         ok     ok         ok
events:job      ok         ok         ok     ok         none
submit          ok         ok         ok     ok         ok
submit:shared   ok         ok         ok     forbidden  forbidden
submit:foreign  forbidden  forbidden  ok     forbidden  forbidden
submit:high     forbidden  forbidden  ok     forbidden  forbidden
submit:dry      ok         ok         ok     ok         ok
chunk           hangup     hangup     hangup hangup     hangup
show            ok         ok         ok     ok         none
wait            ok         ok         ok     ok         none
watch           ok         ok         ok     ok         none
output          ok         forbidden  ok     forbidden  none
output:errors   ok         forbidden  ok     forbidden  none
log             ok         forbidden  ok     forbidden  none
retry           ok         forbidden  ok     forbidden  none
cancel          ok         forbidden  ok     forbidden  none
pause           ok         forbidden  ok     forbidden  none
resume          ok         forbidden  ok     forbidden  none
resume:held     forbidden  forbidden  ok     forbidden  none
priority        ok         forbidden  ok     forbidden  none
priority:high   forbidden  forbidden  ok     forbidden  none
first           ok         forbidden  ok     forbidden  none
rm              ok         forbidden  ok     forbidden  none
queue           forbidden  forbidden  ok     forbidden  forbidden
attend          forbidden  forbidden  ok     ok         forbidden
hello           hangup     hangup     hangup hangup     hangup
"""
RELATIONS, *ROWS = (line.split() for line in TABLE.strip().splitlines())
EXPECTED: Final = {
    (row[0], relation): word for row in ROWS for relation, word in zip(RELATIONS[1:], row[1:], strict=True)
}
CASES: Final = [row[0] for row in ROWS]
STATES: Final = ("queued", "completed")
ONLY_OPEN: Final = {"resume:held", "priority:high"}  # of a final job nobody asks that
WORDS: Final = {"forbidden": "forbidden", "no_such_job": "none"}


def header(**fields: Any) -> dict[str, Any]:
    data = b'{"text": "a"}\n'
    return {
        "submit_id": uuid.uuid4().hex,
        "handler": "count",
        "items": 1,
        "input_bytes": len(data),
        "input_sha256": hashlib.sha256(data).digest(),
        "item_bytes": len(data) - 1,
        "input": data,
    } | fields


def fields_of(case: str, job: int) -> dict[str, Any]:
    """What a request of this case says."""
    verb, _, special = case.partition(":")
    fields: dict[str, Any] = {}
    names = {field.name: field for field in msgspec.structs.fields(KINDS[verb])}
    if "job" in names and (names["job"].required or special == "job"):
        fields["job"] = job
    if "jobs" in names:
        fields["jobs"] = [job]
    match verb:
        case "submit":
            more = {"shared": {"tenant": "shared"}, "foreign": {"tenant": "30299"}, "dry": {"dry_run": True}}
            return header(**more.get(special, {"priority": "high"} if special else {}))
        case "priority":
            fields["priority"] = special or "low"
        case "retry":
            fields["submit_id"] = uuid.uuid4().hex
        case "output":
            fields["errors"] = special == "errors"
        case "queue":
            fields["action"] = "enable"
        case "events":
            fields["since"] = 1
        case "chunk":
            fields["data"] = b"x"
    return fields


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    folder.chmod(0o755)
    with hosted(folder / "host", CONFIG, count=fake("toys:Count", job_params={})) as host:
        yield host
        assert host.process is not None
        assert host.process.poll() is None, host.log()
        assert "Traceback" not in host.log(), host.log()
    shutil.rmtree(folder)


# --- the matrix -----------------------------------------------------------------------------------------------------


def test_every_verb_has_its_rights_and_its_row() -> None:
    verbs = {case.partition(":")[0] for case in CASES}
    assert verbs == set(KINDS), "a new verb needs its row in TABLE"
    assert set(KINDS) - {"hello", "chunk"} == set(RIGHTS) - {"see_event", "see_notify"}, (
        "and its row in core/rights.py"
    )


WHO: Final = {
    "owner": Who(uid=OWNER, tenants=frozenset({"30201", "shared"})),
    "member": Who(uid=MEMBER, tenants=frozenset({"30202", "shared"})),
    "admin": Who(uid=0, admin=True, observer=True, tenants=frozenset({"root"})),
    "observer": Who(uid=OBSERVER, observer=True, tenants=frozenset({"30203"})),
    "stranger": Who(uid=STRANGER, tenants=frozenset({"30204"})),
}


def a_job(job_id: int = 1) -> Job:
    return Job(
        job_id=job_id,
        submit_id="x",
        owner=OWNER,
        tenant="shared",
        handler="count",
        items=1,
        input_bytes=1,
        input_sha256=b"",
        submitted_ns=1,
    )


@pytest.mark.parametrize("relation", UIDS)
@pytest.mark.parametrize("verb", [case for case in CASES if ":" not in case and case in RIGHTS])
def test_the_table_written_by_hand_and_the_daemons_own_say_the_same(verb: str, relation: str) -> None:
    names = {field.name: field for field in msgspec.structs.fields(KINDS[verb])}
    of_a_job = "jobs" in names or ("job" in names and names["job"].required)
    assert allowed(verb, WHO[relation], a_job() if of_a_job else None) == (EXPECTED[verb, relation] == "ok")


def switch(host: Host, action: str) -> None:
    with host.client() as client:
        client.ask(protocol.Queue, action=action)


def jobs_for(host: Host, state: str) -> dict[str, int]:
    """A job of the owner for every case, in this state."""

    def submit() -> dict[str, int]:
        with host.client() as client:
            made = {
                case: client.submit("count", [{"text": case}], tenant="shared").job
                for case in CASES
                if state == "queued" or case not in ONLY_OPEN
            }
            if state == "completed":
                client.wait(*made.values())
            return made

    switch(host, "stop" if state == "queued" else "start")
    made = as_user(OWNER, submit)
    if state == "queued":
        with host.client() as client:
            client.ask(protocol.Pause, job=made["resume:held"])
    return made


def answer(host: Host, case: str, job: int) -> str:
    """What came of it: a word of TABLE, or the code of another refusal."""
    kind = KINDS[case.partition(":")[0]]
    with host.client() as client:
        if kind is protocol.Hello:
            client.send(protocol.Hello([protocol.VERSION]))
            reply = client.receive()
        else:
            client.send(kind(id=1, **fields_of(case, job)))
            if (
                kind is protocol.Wait
            ):  # for a job that is queued it has no answer yet: then that of the ping is first
                client.send(protocol.Ping(id=2))
            reply = client.receive()
        if not isinstance(reply, protocol.Error):
            return "ok"
        if reply.id == 0:
            return "hangup"
        return WORDS.get(reply.code, f"refused: {reply.code}")


@pytest.fixture(scope="module")
def answers(host: Host) -> dict[tuple[str, str, str], str]:
    """By case, relation, state."""
    found = {}
    for state in STATES:
        for relation, uid in UIDS.items():
            made = jobs_for(host, state)
            said = as_user(
                uid, lambda made=made: {case: answer(host, case, job) for case, job in made.items()}
            )
            found |= {(case, relation, state): word for case, word in said.items()}
    switch(host, "start")
    return found


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("relation", UIDS)
@pytest.mark.parametrize("case", CASES)
def test_a_request_gets_what_the_table_says(
    answers: dict[tuple[str, str, str], str], case: str, relation: str, state: str
) -> None:
    if state == "completed" and case in ONLY_OPEN:
        return
    word, expected = answers[case, relation, state], EXPECTED[case, relation]
    if case == "last" and word == "none":
        assert relation in ("member", "observer", "stranger", "admin")  # he has no job of his own yet
    elif expected == "ok":
        assert word == "ok" or word.startswith("refused: bad_state"), word
    else:
        assert word == expected


def seen_by(host: Host, uid: int, job: int) -> tuple[bool, bool]:
    """Whether its events, and its line in the list, are shown."""

    def look() -> tuple[bool, bool]:
        with host.client() as client:
            events = set()
            reply = client.ask(protocol.Events, since=1)
            while isinstance(reply, protocol.EventSeen | protocol.Gap):
                events.add(reply.event.get("job") if isinstance(reply, protocol.EventSeen) else 0)
                reply = client.receive()
            listed = client.ask(protocol.List, after=job - 1, limit=1).jobs
            return job in events, job in [shown.id for shown in listed]

    return as_user(uid, look)


@pytest.mark.parametrize("relation", UIDS)
def test_streams_and_lists_show_just_what_may_be_shown(host: Host, relation: str) -> None:
    job = jobs_for(host, "completed")["show"]
    who, core_job = WHO[relation], a_job(job)
    assert seen_by(host, UIDS[relation], job) == (
        allowed("see_event", who, core_job),
        allowed("show", who, core_job),
    )


# --- a job that is somebody else's, and one that never was ------------------------------------------------------------


def raw_answers(host: Host, jobs: dict[str, int]) -> dict[str, bytes]:
    """The bytes of every answer, with the same request ids each time."""
    found = {}
    for case, job in jobs.items():
        fields = fields_of(case, job) | ({"submit_id": "s"} if case == "retry" else {})
        with host.client() as client:
            client.send(KINDS[case.partition(":")[0]](id=7, **fields))
            frames, body = Frames(), b""
            while not body:
                body = next(frames.feed(client.sock.recv(1 << 16)), b"")
            found[case] = body
    return found


ABOUT_A_JOB: Final = [case for case in CASES if EXPECTED[case, "stranger"] == "none"]


def test_of_a_foreign_job_and_of_none_the_answers_are_the_same_bytes(host: Host) -> None:
    switch(host, "stop")
    uid, cases = STRANGER, ABOUT_A_JOB

    def next_id() -> int:
        with host.client() as client:
            return client.submit("count", [{"text": "a"}]).job + 1

    first = as_user(OWNER, next_id)
    jobs = {case: first + number for number, case in enumerate(cases)}
    before = as_user(uid, lambda: raw_answers(host, jobs))

    def submit() -> list[int]:
        with host.client() as client:
            return [client.submit("count", [{"text": "a"}], tenant="shared").job for _ in cases]

    assert as_user(OWNER, submit) == list(jobs.values())
    assert as_user(uid, lambda: raw_answers(host, jobs)) == before  # queued
    switch(host, "start")

    def wait_and_remove() -> None:
        with host.client() as client:
            client.wait(*jobs.values())

    as_user(OWNER, wait_and_remove)
    assert as_user(uid, lambda: raw_answers(host, jobs)) == before  # completed

    def remove() -> None:
        with host.client() as client:
            for job in jobs.values():
                client.ask(protocol.Remove, job=job)

    as_user(OWNER, remove)
    assert as_user(uid, lambda: raw_answers(host, jobs)) == before  # removed
    assert len(cases) >= 14


# --- hostile words ------------------------------------------------------------------------------------------------------

STRINGS: Final = (
    "",
    "\0",
    "a\0b",
    "../../../etc/passwd",
    "/etc/shadow",
    "a\nERROR forged",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b1m",
    "\u202etxt.exe",
    "%s%n{0}{__class__}",
    "$(reboot)`reboot`;reboot",
    "' OR 1=1 --",
    "漢" * 10_000,
    "a" * 100_000,
    "\ufeff\u200b",
    "\U0010ffff",
)
NUMBERS: Final = (0, -1, 1 << 31, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)


def text_fields(kind: type) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind) if field.type is str]


def number_fields(kind: type) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind) if field.type is int and field.name != "id"]


HOSTILE: Final = [
    (verb, field, value)
    for verb, kind in KINDS.items()
    if verb not in ("hello", "chunk")
    for fields, values in ((text_fields(kind), STRINGS), (number_fields(kind), NUMBERS))
    for field in fields
    for value in values
]


def test_hostile_words_and_numbers_in_every_field_harm_nobody(host: Host) -> None:
    """Each gets one answer; the daemon, its log and its folders stay as they should be."""
    switch(host, "stop")
    before = sorted(path.name for path in host.folder.iterdir())

    def try_all() -> list[tuple[str, str, str]]:
        found = []
        with host.client() as client:
            job = client.submit("count", [{"text": "a"}]).job
        for verb, field, value in HOSTILE:
            fields = fields_of(verb, job) | {field: value}
            with host.client() as client:
                client.sock.settimeout(HANG_S)
                reply = client.ask(KINDS[verb], **fields)
                code = reply.code if isinstance(reply, protocol.Error) else "ok"
                found.append((verb, field, code))
                if code != "ok":
                    assert len(reply.message) <= 1100, (verb, field)
        return found

    found = as_user(STRANGER, try_all)
    assert len(found) == len(HOSTILE) >= 200
    assert not [case for case in found if case[2] == "internal"]
    assert sorted(path.name for path in host.folder.iterdir()) == before
    assert not [line for line in host.log().splitlines() if line.startswith("ERROR")]
    assert "\x1b" not in host.log()
    spool = host.folder / "state" / "spool"
    assert all(path.name.isdigit() for path in (spool / "jobs").iterdir())
    switch(host, "start")


def test_bytes_that_are_no_text_end_the_connection_and_nothing_else(host: Host) -> None:
    ended = 0
    for verb, kind in KINDS.items():
        for field in text_fields(kind):
            request = msgspec.msgpack.decode(
                msgspec.msgpack.encode(kind(id=1, **(fields_of(verb, 1) | {field: "mark" * 3})))
                if verb != "hello"
                else msgspec.msgpack.encode(protocol.Hello([1], "mark" * 3))
            )
            body = msgspec.msgpack.encode(request).replace(b"markmarkmark", b"\xff\xfe\xed\xa0\x80mark\xc3(")
            with host.client() as client:
                client.sock.sendall(protocol.HEAD.pack(len(body)) + body)
                reply = client.receive()
                assert isinstance(reply, protocol.Error), verb
                assert (reply.id, reply.code) == (0, "bad_request")
                with pytest.raises(ConnectionError):
                    client.receive()
            ended += 1
    assert ended >= 15
    with host.client() as client:
        assert isinstance(client.ask(protocol.Ping), protocol.Pong)


# --- descriptors ----------------------------------------------------------------------------------------------------------


def test_descriptors_sent_to_the_daemon_stay_with_the_sender(host: Host) -> None:
    """FIFOs, memory, folders, 200 at a time: refused by the kernel where it can, dropped by it where it cannot."""
    assert host.process is not None
    held = Path(f"/proc/{host.process.pid}/fd")
    before = len(list(held.iterdir()))

    def send() -> list[str]:
        fifo = f"{tempfile.mkdtemp()}/fifo"
        os.mkfifo(fifo)
        kinds = {
            "fifo": os.open(fifo, os.O_RDWR),
            "folder": os.open("/", os.O_RDONLY | os.O_DIRECTORY),
            "path": os.open("/etc/passwd", os.O_PATH),
            "memory": os.memfd_create("x"),
        }
        found = []
        for fds in (*([fd] for fd in kinds.values()), [kinds["memory"]] * 200):
            for greeted in (False, True):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.connect(str(host.socket))
                    sock.settimeout(HANG_S)
                    hello = frame(protocol.Hello([1]))
                    if greeted:
                        sock.sendall(hello)
                        sock.recv(1 << 16)
                    message = frame(protocol.Ping(id=1)) if greeted else hello
                    try:
                        socket.send_fds(sock, [message], fds)
                    except PermissionError:
                        found.append("refused")
                        continue
                    found.append("dropped")
                    assert sock.recv(1 << 16)
        return found

    found = as_user(STRANGER, send)
    assert len(found) == 10
    until(lambda: len(list(held.iterdir())) <= before, "the connections to end")
    with host.client() as client:
        assert isinstance(client.ask(protocol.Ping), protocol.Pong)


# --- rights that change while a connection lasts ---------------------------------------------------------------------------


def reloaded(host: Host, config: str) -> None:
    (host.folder / "gpujobd.toml").write_text(f'devices = ["cpu"]\n{config}')
    assert host.process is not None
    count = host.log().count("configuration reloaded")
    host.process.send_signal(signal.SIGHUP)
    until(lambda: host.log().count("configuration reloaded") > count, "the configuration to be read")


def in_two_steps(uid: int, begin: Callable[[], Any], go_on: Callable[[Any], Any]) -> Callable[[], Any]:
    """A child of this uid that has begun when this returns; calling the result lets it go on and returns what came of it."""
    import threading

    began, wait_r, wait_w = os.pipe(), *os.pipe()
    result: list[Any] = []

    def child() -> Any:
        kept = begin()
        os.write(began[1], b"x")
        os.read(wait_r, 1)
        return go_on(kept)

    thread = threading.Thread(target=lambda: result.append(as_user(uid, child)))
    thread.start()
    while not select.select([began[0]], [], [], 0.1)[0]:
        assert thread.is_alive(), "the child ended before it had begun"

    def rest() -> Any:
        os.write(wait_w, b"x")
        thread.join(HANG_S)
        for fd in (*began, wait_r, wait_w):
            os.close(fd)
        return result[0]

    return rest


def test_who_is_no_member_any_more_sees_nothing_through_the_connection_that_he_kept(host: Host) -> None:
    switch(host, "stop")
    with host.client() as client:
        job = as_user(
            OWNER, lambda: Client(host.socket).submit("count", [{"text": "a"}], tenant="shared").job
        )

        def begin() -> tuple[Client, Client]:
            asking, watching = Client(host.socket), Client(host.socket)
            assert isinstance(asking.ask(protocol.Show, job=job), protocol.OneJob)
            assert isinstance(watching.ask(protocol.Watch, job=job), protocol.JobChanged)
            return asking, watching

        def go_on(kept: tuple[Client, Client]) -> tuple[str, str]:
            asking, watching = kept
            shown, watched = asking.ask(protocol.Show, job=job), watching.receive()
            return getattr(shown, "code", "shown"), getattr(watched, "code", "watched")

        rest = in_two_steps(MEMBER, begin, go_on)
        reloaded(host, CONFIG.replace(', "30202"', ""))
        client.ask(protocol.SetPriority, job=job, priority="low")  # there is something to be watched
        assert rest() == ("no_such_job", "no_such_job")
        reloaded(host, CONFIG)
    switch(host, "start")


def test_who_is_no_observer_any_more_follows_no_more_events_of_others(host: Host) -> None:
    def begin() -> Client:
        client = Client(host.socket)
        client.send(protocol.Events(id=1, follow=True))
        client.send(protocol.Ping(id=2))
        while not isinstance(client.receive(), protocol.Pong):  # what others did a moment ago may come first
            pass
        return client

    def go_on(client: Client) -> list[str]:
        client.sock.settimeout(1.0)
        found = []
        try:
            while True:
                reply = client.receive()
                found.append(reply.event["event"] if isinstance(reply, protocol.EventSeen) else str(reply))
        except TimeoutError:
            return found

    rest = in_two_steps(OBSERVER, begin, go_on)
    reloaded(host, CONFIG.replace('"30203"', ""))
    switch(host, "disable")
    switch(host, "enable")
    assert "queue_switched" not in rest()
    reloaded(host, CONFIG)
