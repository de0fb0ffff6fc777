"""Simulated people: real sockets, real frames, and manners of every kind.

    Person     submits (again, if the answer was lost), changes his mind, looks, reads outputs, hangs up half-way
    Follower   follows every event with a cursor, over restarts; one hangs for minutes, as a mail server would
    Stranger   sends what is no frame, half a frame, or never reads

Rule 1: what somebody was told is remembered over the lives of the daemon, and held against it (oracle.py).
Rule 2: who calls is told by the address the caller is bound to: there is one uid here, and a dozen people.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import msgspec
import trio
from gpujobd import protocol
from gpujobd.core.inputs import Who
from gpujobd.peer import Peer
from gpujobd.protocol import ErrorCode
from simulation.workers import item

PATIENCE_S: Final = 90.0
ASK_AGAIN_S: Final = 20.0
UNKNOWN: Final = (ErrorCode.NOT_ACCEPTED, ErrorCode.INTERNAL, ErrorCode.TIMED_OUT)
"""Refusals after which nobody knows: the journal died, and what it was writing may stand there after all."""
STREAM_BYTES_MIN: Final = 3_000  # a longer input is streamed


class HungUp(Exception):
    """The daemon is not there, or went."""


class Submission(msgspec.Struct, kw_only=True):
    """What somebody submitted, and what became of it as far as he knows."""

    submit_id: str
    uid: int
    handler: str
    input: bytes
    header: dict[str, Any]
    job: int = 0  # acknowledged under this id
    unsure: bool = False  # it was sent, and no answer came

    @property
    def lines(self) -> list[bytes]:
        return self.input.split(b"\n")[:-1]


class Town(Protocol):
    """What people need of their world."""

    socket: str
    luck: random.Random
    callers: int

    def heard(self, text: str) -> None: ...
    def submitted(self, submission: Submission) -> None: ...
    def accepted(self, submission: Submission, job: int) -> None: ...
    def refused(self, submission: Submission, code: str) -> None: ...
    def shown(self, job: protocol.Job) -> None: ...
    def read(self, job: int, text: bytes, *, errors: bool) -> None: ...
    def event_seen(self, seq: int, event: dict[str, object]) -> None: ...
    def gap_seen(self, cursor: int, first_seq: int) -> None: ...


def caller(sock: Any) -> Peer:
    """Stands in for peer.peer: the address says who calls."""
    name: bytes = sock.getpeername()
    uid = int(name.rpartition(b"-")[2])
    return Peer(1, uid, (uid,))


class Session:
    """One connection, one request at a time."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self._frames = protocol.Frames()
        self._replies: list[protocol.AnyReply] = []
        self._fds: list[int] = []
        self._id = 0

    @staticmethod
    @contextlib.asynccontextmanager
    async def open(town: Town, uid: int) -> AsyncIterator[Session]:
        """Raises: HungUp."""
        town.callers += 1
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        session = Session(sock)
        try:
            await sock.bind(f"\0gpujobd-simulation-{os.getpid()}-{town.callers}-{uid}")
            await sock.connect(town.socket)
            await session.send(protocol.Hello([protocol.VERSION], "simulation"))
            welcome = await session.receive()
            if not isinstance(welcome, protocol.Welcome):
                raise HungUp(str(welcome))
            yield session
        except OSError as error:
            raise HungUp(error.strerror or str(error)) from None
        finally:
            sock.close()
            for fd in session._fds:
                os.close(fd)

    async def send(self, request: protocol.AnyRequest) -> None:
        rest = memoryview(protocol.frame(request))
        while rest:
            rest = rest[await self.sock.send(rest) :]

    async def receive(self) -> protocol.AnyReply:
        while not self._replies:
            data, ancillary, _, _ = await self.sock.recvmsg(
                1 << 16, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC
            )
            for _, kind, passed in ancillary:
                if kind == socket.SCM_RIGHTS:
                    self._fds += struct.unpack(f"{len(passed) // 4}i", passed)
            if not data:
                raise HungUp("end of stream")
            self._replies += map(protocol.decode_reply, self._frames.feed(data))
        return self._replies.pop(0)

    async def ask(self, kind: type, **fields: Any) -> Any:
        self._id += 1
        await self.send(kind(id=self._id, **fields))
        return await self.answer()

    async def answer(self) -> Any:
        while isinstance(reply := await self.receive(), protocol.Alive):
            pass
        assert getattr(reply, "id", None) in (self._id, 0), reply
        if isinstance(reply, protocol.Error) and reply.id == 0:
            raise HungUp(reply.message)
        return reply

    async def chunk(self, data: bytes) -> None:
        await self.send(protocol.Chunk(id=self._id, data=data))

    def take_fd(self) -> int:
        return self._fds.pop()


class Person:
    """One user. `submissions` outlive the daemon, as a person does."""

    def __init__(
        self, town: Town, who: Who, *, every_s: float, handlers: tuple[str, ...], busy: int = 0
    ) -> None:
        """`busy`: how many jobs he always wants in line."""
        self.who = who
        self.submissions: dict[str, Submission] = {}
        self._town, self._luck = town, town.luck
        self._every_s, self._handlers, self._busy = every_s, handlers, busy
        self._known: list[int] = []
        self._switched = ""

    async def live(self) -> None:
        while True:
            await trio.sleep(self._luck.expovariate(1 / self._every_s))
            try:
                await self._something()
            except HungUp as error:
                self._town.heard(f"{self.who.name}: {error}")
                await trio.sleep(ASK_AGAIN_S)

    async def _something(self) -> None:
        lost = [s for s in self.submissions.values() if s.unsure]
        with trio.move_on_after(PATIENCE_S * self._luck.choice((0.01, 1, 1, 1, 1))):
            async with Session.open(self._town, self.who.uid) as session:
                if lost and self._luck.random() < 0.8:
                    await self._submit(session, self._luck.choice(lost))
                    return
                if self._busy:
                    await self._keep_busy(session)
                    return
                doing = self._luck.choices(
                    (self._submit_new, self._change, self._look, self._read, self._retry, self._switch),
                    (8, 6, 6, 4, 1, 1),
                )[0]
                await doing(session)

    # --- submitting ---------------------------------------------------------------------------------------------------

    async def _submit_new(self, session: Session, **header: Any) -> None:
        for _ in range(self._luck.choice((1, 1, 1, 1, 6))):
            await self._submit(session, self._new(header))

    def _new(self, header: dict[str, Any]) -> Submission:
        luck = self._luck
        items = luck.choice((1, 2, 10, 30, 60, 150)) if not self._busy else 60
        kinds = luck.choices(
            ("ok", "bad", "later", "poison"),
            (100, 1, 1, 0.1 if items < 60 and not self._busy else 0),
            k=items,
        )
        data = b"".join(item(kind, luck.randrange(10**6)) + b"\n" for kind in kinds)
        submission = Submission(
            submit_id=f"{self.who.name}-{len(self.submissions) + 1}",
            uid=self.who.uid,
            handler=luck.choice(self._handlers),
            input=data,
            header=header or self._extras(),
        )
        self.submissions[submission.submit_id] = submission
        return submission

    def _extras(self) -> dict[str, Any]:
        luck, extras = self._luck, {}
        if luck.random() < 0.2:
            extras["priority"] = luck.choice(("low", "high"))
        if luck.random() < 0.1:
            extras["failures_max"] = luck.choice((0, 3))
        if luck.random() < 0.1:
            extras["tenant"] = luck.choice(sorted(self.who.tenants))
        return extras

    async def _submit(self, session: Session, submission: Submission) -> None:
        data = submission.input
        header: dict[str, Any] = {
            "submit_id": submission.submit_id,
            "handler": submission.handler,
            "items": len(submission.lines),
            "input_bytes": len(data),
            "input_sha256": hashlib.sha256(data).digest(),
            "item_bytes": max(map(len, submission.lines)),
            **submission.header,
        }
        submission.unsure = True
        self._town.submitted(submission)
        if len(data) < STREAM_BYTES_MIN:
            reply = await session.ask(protocol.Submit, **header, input=data)
        else:
            reply = await session.ask(protocol.Submit, **header)
            if isinstance(reply, protocol.GoOn):
                reply = await self._stream(session, data)
        self._told(submission, reply)

    async def _stream(self, session: Session, data: bytes) -> Any:
        broken = self._luck.random()
        for at in range(0, len(data), 2000):
            if broken < 0.05:
                raise HungUp("hung up half-way, on purpose")
            if broken < 0.08:
                await trio.sleep(30)  # longer than the daemon waits for a piece
            await session.chunk(data[at : at + 2000])
        await session.chunk(b"")
        return await session.answer()

    def _told(self, submission: Submission, reply: Any) -> None:
        self._town.heard(f"{self.who.name}: {submission.submit_id}: {reply!r:.120}")
        if isinstance(reply, protocol.Accepted):
            submission.unsure = False
            submission.job = reply.job
            self._town.accepted(submission, reply.job)
            self._known.append(reply.job)
            del self._known[:-40]
        else:
            assert isinstance(reply, protocol.Error), reply
            submission.unsure = reply.code in UNKNOWN
            self._town.refused(submission, reply.code)

    async def _keep_busy(self, session: Session) -> None:
        reply = await session.ask(protocol.List, mine=True, states=["queued", "running"])
        if isinstance(reply, protocol.Jobs):
            for _ in range(self._busy - len(reply.jobs)):
                await self._submit_new(session, priority="normal")

    # --- everything else ------------------------------------------------------------------------------------------------

    async def _change(self, session: Session) -> None:
        if not self._known:
            return
        job = self._luck.choice(self._known)
        kind, fields = self._luck.choice(
            (
                (protocol.Cancel, {}),
                (protocol.Pause, {}),
                (protocol.Resume, {}),
                (protocol.Resume, {}),
                (protocol.Resume, {}),
                (protocol.SetPriority, {"priority": self._luck.choice(("low", "normal", "high"))}),
                (protocol.First, {}),
                (protocol.Remove, {}),
            )
        )
        reply = await session.ask(kind, job=job, **fields)
        self._town.heard(f"{self.who.name}: {kind.__name__} {job}: {reply!r:.100}")
        assert isinstance(reply, protocol.Done | protocol.Error), reply

    async def _look(self, session: Session) -> None:
        kind, fields = self._luck.choice(
            (
                (protocol.List, {"mine": True, "newest": True, "limit": 5}),
                (protocol.Status, {}),
                (protocol.Tenants, {}),
                (protocol.Devices, {}),
                (protocol.Handlers, {}),
                (protocol.Ping, {}),
                (protocol.Last, {}),
                (protocol.Show, {"job": self._luck.choice(self._known or [1])}),
                (protocol.Wait, {"jobs": self._known[-1:]}),
                (protocol.Log, {"job": self._luck.choice(self._known or [1])}),
            )
        )
        reply = await session.ask(kind, **fields)
        while isinstance(reply, protocol.LogPiece):
            reply = await session.answer()
        for job in _jobs_in(reply):
            self._town.shown(job)

    async def _read(self, session: Session) -> None:
        if not self._known:
            return
        job, errors = self._luck.choice(self._known), self._luck.random() < 0.2
        reply = await session.ask(protocol.Output, job=job, errors=errors)
        if isinstance(reply, protocol.File):
            fd = session.take_fd()
            self._town.read(job, os.pread(fd, reply.bytes, 0) if reply.bytes else b"", errors=errors)

    async def _retry(self, session: Session) -> None:
        if self._known:
            submit_id = f"{self.who.name}-retry-{self._luck.randrange(10**9)}"
            job, failed = self._luck.choice(self._known), self._luck.random() < 0.5
            reply = await session.ask(protocol.Retry, job=job, submit_id=submit_id, failed_items=failed)
            if isinstance(reply, protocol.Accepted):
                self._town.heard(f"{self.who.name}: retry of {job} is {reply.job}")
                self._known.append(reply.job)

    async def _switch(self, session: Session) -> None:
        """An administrator's; everybody else is refused. What was switched off is switched on soon."""
        verbs = {"stop": "start", "drain": "start", "disable": "enable"}
        verb = verbs.get(self._switched) or self._luck.choice(sorted(verbs))
        reply = await session.ask(protocol.Queue, action=verb)
        if self.who.admin:
            assert isinstance(reply, protocol.Done), reply
            self._switched = "" if self._switched else verb
            while self._switched:
                await trio.sleep(self._luck.choice((5, 60)))
                await session.ask(protocol.Queue, action=verbs[self._switched])
                self._switched = ""
        else:
            assert isinstance(reply, protocol.Error), reply


def _jobs_in(reply: Any) -> list[protocol.Job]:
    match reply:
        case protocol.Jobs():
            return reply.jobs
        case protocol.OneJob():
            return [reply.job]
        case protocol.StatusTable():
            return [*reply.running, *reply.waiting]
        case _:
            return []


class Follower:
    """Follows every event. A cursor survives the daemon; what was missed must come, or be named as a gap."""

    def __init__(self, town: Town, who: Who, *, hangs: bool) -> None:
        self.who = who
        self.cursor = 0
        self._town, self._hangs = town, hangs
        self._luck = town.luck

    async def live(self) -> None:
        while True:
            try:
                async with Session.open(self._town, self.who.uid) as session:
                    await session.send(protocol.Events(id=1, since=self.cursor + 1, follow=True))
                    while True:
                        await self._one(await session.receive())
            except HungUp as error:
                self._town.heard(f"{self.who.name}: {error}")
            await trio.sleep(ASK_AGAIN_S)

    async def _one(self, reply: protocol.AnyReply) -> None:
        match reply:
            case protocol.EventSeen():
                assert reply.seq == self.cursor + 1, f"event {reply.seq} came after {self.cursor}, and no gap"
                self.cursor = reply.seq
                self._town.event_seen(reply.seq, reply.event)
                if self._hangs and reply.event["event"] in ("completed", "failed"):
                    await trio.sleep(180)  # the mail server after DATA
            case protocol.Gap():
                assert reply.first_seq > self.cursor + 1, (reply, self.cursor)
                self._town.gap_seen(self.cursor, reply.first_seq)
                self.cursor = reply.first_seq - 1
            case protocol.Error():
                raise HungUp(reply.message)
            case _:
                assert isinstance(reply, protocol.Alive), reply


class Stranger:
    """Means no good."""

    def __init__(self, town: Town, who: Who, *, every_s: float) -> None:
        self.who = who
        self._town, self._luck, self._every_s = town, town.luck, every_s

    async def live(self) -> None:
        while True:
            await trio.sleep(self._luck.expovariate(1 / self._every_s))
            with contextlib.suppress(HungUp), trio.move_on_after(700):
                async with Session.open(self._town, self.who.uid) as session:
                    await self._luck.choice((self._nonsense, self._half, self._never_read, self._deaf))(
                        session
                    )

    async def _nonsense(self, session: Session) -> None:
        await session.sock.send(self._luck.randbytes(self._luck.choice((5, 100, 5000))))
        with contextlib.suppress(protocol.FrameError):
            await session.receive()

    async def _half(self, session: Session) -> None:
        frame = protocol.frame(protocol.List(id=1))
        await session.sock.send(frame[: self._luck.randrange(1, len(frame))])
        await trio.sleep(self._luck.choice((0, 5, 30)))

    async def _never_read(self, session: Session) -> None:
        with trio.move_on_after(60):
            for number in range(1, 60):
                await session.send(protocol.List(id=number))
            await trio.sleep(60)

    async def _deaf(self, session: Session) -> None:
        await session.send(protocol.Events(id=1, since=1, follow=True))
        await trio.sleep(400)
