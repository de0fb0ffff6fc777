"""The line to the daemon: one socket, frames with deadlines, and what to do when it breaks.

    Daemon      finds the socket, connects when first needed, connects again when that is safe
      Connection    one socket: Hello goes out together with the first request, Welcome is read with the first reply
    NotifierLine  the same to the notifier: other places to look, other words, no daemon

Rule 1: every wait has a deadline. A subscription has one too: the daemon shows every 60 s that it lives.
Rule 2: a request is sent a second time only where that cannot do a thing twice: reads, and what carries a
submit_id. Of the rest, a lost answer is told as such.
Rule 3: the daemon that was found first is kept: a restart must not turn one question over to another daemon.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Final, TypeVar

from gpujobd import protocol as p

from jobctl.exits import Exit, Failure, Refusal

Request = p.AnyRequest | p.AnyNotifierRequest
Reply = p.AnyReply | p.AnyNotifierReply
R = TypeVar("R", bound=p.Reply)
T = TypeVar("T")

ANSWER_S: Final = 60.0  # connections wait in systemd's socket while the daemon restarts and reads its journal
RECONNECT_S: Final = 30.0  # after a lost answer
FOLLOW_RECONNECT_S: Final = 60.0  # of a subscription
SILENCE_S: Final = 150.0  # two signs of life and a half of a subscription
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0
READ_BYTES: Final = 256 << 10
SYSTEMD: Final = "/run/systemd/system"  # is there where systemd runs the host (sd_booted(3))
FDS_MAX: Final = 4  # descriptors that may come with one read


class Lost(Exception):
    """The connection ended before the answer came, or the answer, `said`, is that only the next daemon knows."""

    def __init__(self, said: Refusal | None = None) -> None:
        super().__init__()
        self.said = said


class Connection:
    """One socket."""

    def __init__(
        self,
        path: str,
        within_s: float,
        decode: Callable[[bytes], Reply] = p.decode_reply,
        who: str = "daemon",
    ) -> None:
        """Raises: OSError where nobody listens at `path`."""
        self._decode = decode
        self._who = who
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Not settimeout: a connect that may not block fails at once where the daemon's line of callers is full.
            limit = struct.pack("ll", max(1, int(within_s)), 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise
        self._frames = p.Frames()
        self._bodies: deque[bytes] = deque()
        self._descriptors: deque[int] = deque()
        self._greeting = p.frame(p.Hello([p.VERSION], "jobctl"))
        self.welcome: p.Welcome | None = None

    def close(self) -> None:
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def send(self, *messages: Request, within_s: float = ANSWER_S) -> bool:
        """Return whether it went out. If not, why not may still be there to be received: the daemon hung up."""
        frames = self._greeting + b"".join(p.frame(message) for message in messages)
        self._greeting = b""
        self._socket.settimeout(within_s)
        try:
            self._socket.sendall(frames, socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise Failure(
                Exit.UNREACHABLE, f"the {self._who} has taken nothing for {within_s:.0f} s"
            ) from None
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self, deadline: float) -> Reply:
        """Return the next message after the Welcome. `deadline` is a time of time.monotonic().

        Raises: TimeoutError, Lost; Refusal where the daemon turned the connection away.
        """
        while True:
            while not self._bodies:
                self._read(deadline)
            try:
                reply = self._decode(self._bodies.popleft())
            except p.FrameError as error:
                raise Failure(Exit.UNREACHABLE, f"the {self._who} cannot be understood: {error}") from None
            if self.welcome is not None:
                return reply
            self._greeted(reply)

    def _greeted(self, reply: Reply) -> None:
        match reply:
            case p.Welcome(version=p.VERSION):
                self.welcome = reply
            case p.Welcome():
                raise Failure(
                    Exit.UNREACHABLE, f"the {self._who} speaks version {reply.version}, jobctl {p.VERSION}"
                )
            case p.Error():
                raise Refusal(reply)
            case _:
                raise Failure(Exit.UNREACHABLE, f"the {self._who} did not say welcome")

    def _read(self, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        room = socket.CMSG_SPACE(FDS_MAX * struct.calcsize("i"))
        try:
            received, ancillary, _, _ = self._socket.recvmsg(READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            raise Lost from None
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                count = len(value) // struct.calcsize("i")
                self._descriptors.extend(struct.unpack(f"{count}i", value[: count * struct.calcsize("i")]))
        if not received:
            raise Lost
        try:
            self._bodies.extend(self._frames.feed(received))
        except p.FrameError as error:
            raise Failure(Exit.UNREACHABLE, f"the {self._who} cannot be understood: {error}") from None

    def spoken_to(self) -> bool:
        """Whether something has come that was not received yet."""
        if self._bodies:
            return True
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass  # it broke: receive() tells how
        return True

    def descriptor(self) -> int:
        """Take the descriptor that came with a File reply; the caller closes it."""
        if not self._descriptors:
            raise Failure(Exit.UNREACHABLE, "the daemon sent no file")
        return self._descriptors.popleft()


class Daemon:
    """The daemon, over as many connections as it takes."""

    who: ClassVar[str] = "daemon"
    unit: ClassVar[str] = "gpujobd"

    def __init__(self, path: str | None = None) -> None:
        self._paths = [path] if path else self.places()
        self._connection: Connection | None = None
        self._last_id = 0

    @staticmethod
    def places() -> list[str]:
        """Where to look, the system's last."""
        return p.socket_paths()

    @staticmethod
    def decode(body: bytes) -> Reply:
        return p.decode_reply(body)

    def next_id(self) -> int:
        """An id for a request; the same request keeps its id when it is sent again."""
        self._last_id += 1
        return self._last_id

    def connection(self) -> Connection:
        """The open connection, or a new one to the first path that answers.

        Raises: Failure(UNREACHABLE) with every path that was tried.
        """
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> Connection:
        tried = []
        for path in self._paths:
            try:
                connection = Connection(path, ANSWER_S, self.decode, self.who)
            except OSError as error:
                tried.append(f"{path} ({error.strerror or error})")
            else:
                self._paths = [path]
                return connection
        raise Failure(
            Exit.UNREACHABLE, f"no {self.who} answers: tried " + ", ".join(tried) + self._who_knows()
        )

    def _who_knows(self) -> str:
        """Who tells why the service of this host is not there."""
        if self.places()[-1] in self._paths and os.path.isdir(SYSTEMD):
            return f"; `systemctl status {self.unit}` tells more"
        return ""

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _reconnect(self, give_up_at: float, again_in_s: float, said: Refusal | None = None) -> float:
        """Connect again; return how long to wait before the next time, should that not last either."""
        self.hang_up()
        if time.monotonic() >= give_up_at:
            raise said or Failure(Exit.UNREACHABLE, f"the {self.who} hangs up before it answers")
        while True:
            time.sleep(min(again_in_s, max(0.0, give_up_at - time.monotonic())))
            again_in_s = min(2 * again_in_s, BACKOFF_MAX_S)
            try:
                self.connection()
            except Failure:
                if time.monotonic() >= give_up_at:
                    raise
            else:
                return again_in_s

    # --- questions with one answer ------------------------------------------------------------------------------

    def persist(self, attempt: Callable[[], T]) -> T:
        """Run `attempt` until it ends, connecting again where the daemon goes away in between (rule 2).

        `attempt` raises Lost where the connection broke. Raises: Failure where the daemon stays away.
        """
        give_up_at = 0.0
        again_in_s = BACKOFF_FIRST_S
        while True:
            try:
                return attempt()
            except Lost as lost:
                give_up_at = give_up_at or time.monotonic() + RECONNECT_S
                again_in_s = self._reconnect(give_up_at, again_in_s, lost.said)

    def ask(self, request: Request, expect: type[R]) -> R:
        """Return the answer, of the type that is expected. For what may be asked twice.

        Raises: Refusal, Failure.
        """
        return self.persist(lambda: self.ask_once(request, expect))

    def ask_once(self, request: Request, expect: type[R]) -> R:
        """As `ask`, without a second time. Raises: Lost."""
        self.connection().send(request)
        return narrow(self.reply(_id(request)), expect, self.who)

    def reply(self, request_id: int, within_s: float = ANSWER_S) -> Reply:
        """Return the next reply to this request. Raises: Refusal, Failure, Lost."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                reply = self.connection().receive(deadline)
            except TimeoutError:
                raise Failure(Exit.UNREACHABLE, f"{self._paths[0]}: no answer for {within_s:.0f} s") from None
            if isinstance(reply, p.Error) and reply.id in (0, request_id):
                if reply.code == p.ErrorCode.NOT_ACCEPTED:
                    raise Lost(Refusal(reply))
                raise Refusal(reply)
            if isinstance(reply, p.Reply) and reply.id == request_id and not isinstance(reply, p.Alive):
                return reply

    def ask_each(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield one reply for every request, in their order, errors included. For what is not asked twice.

        They are pipelined, so that the daemon can put a whole window to disk at once.
        """
        window = p.IN_FLIGHT_MAX // 2
        for at in range(0, len(requests), window):
            batch = requests[at : at + window]
            try:
                self.connection().send(*batch)
                replies = self._replies({_id(request) for request in batch})
            except Lost:
                message = (
                    "the connection broke before the answer came: whether it was done, `jobctl show` tells"
                )
                raise Failure(Exit.UNREACHABLE, message) from None
            yield from (replies[_id(request)] for request in batch)

    def _replies(self, ids: set[int]) -> dict[int, Reply]:
        deadline = time.monotonic() + ANSWER_S
        replies: dict[int, Reply] = {}
        while len(replies) < len(ids):
            try:
                reply = self.connection().receive(deadline)
            except TimeoutError:
                raise Failure(Exit.UNREACHABLE, f"{self._paths[0]}: no answer for {ANSWER_S:.0f} s") from None
            if isinstance(reply, p.Error) and not reply.id:
                raise Refusal(reply)
            if isinstance(reply, p.Reply) and reply.id in ids:
                replies[reply.id] = reply
        return replies

    # --- subscriptions ------------------------------------------------------------------------------------------

    def follow(
        self, make: Callable[[], Request], *, deadline: float | None = None, tick_s: float | None = None
    ) -> Iterator[Reply | None]:
        """Yield the replies to `make()` over restarts of the daemon, until the final one, which is yielded too.

        `make` is called at every connection, so that it can ask for what comes after what was seen. With `tick_s`,
        None is yielded whenever that long nothing came.

        Raises: TimeoutError at `deadline`; Refusal; Failure where the daemon stays away.
        """
        back_by, again_in_s = 0.0, BACKOFF_FIRST_S
        while True:
            try:
                for reply in self._subscribe(make(), deadline, tick_s):
                    if reply is not None:
                        back_by, again_in_s = 0.0, BACKOFF_FIRST_S
                    yield reply
            except Lost:
                if not back_by:
                    back_by = time.monotonic() + FOLLOW_RECONNECT_S
                    notice("the daemon hung up; waiting for it to come back")
                try:
                    again_in_s = self._reconnect(min(back_by, deadline or back_by), again_in_s)
                except Failure:
                    if deadline and time.monotonic() >= deadline:
                        raise TimeoutError from None
                    raise
            else:
                return

    def _subscribe(
        self, request: Request, deadline: float | None, tick_s: float | None
    ) -> Iterator[Reply | None]:
        request_id = _id(request)
        self.connection().send(request)
        heard_at = time.monotonic()
        while True:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError
            if now >= heard_at + SILENCE_S:
                raise Lost
            stops = (
                [heard_at + SILENCE_S] + ([deadline] if deadline else []) + ([now + tick_s] if tick_s else [])
            )
            try:
                reply = self.connection().receive(min(stops))
            except TimeoutError:
                if tick_s:
                    yield None
                continue
            heard_at = time.monotonic()
            if isinstance(reply, p.Error) and reply.id in (0, request_id):
                raise Refusal(reply)
            if isinstance(reply, p.Reply) and reply.id == request_id and not isinstance(reply, p.Alive):
                yield reply
                if isinstance(reply, p.Done | p.Jobs):
                    return


class NotifierLine(Daemon):
    """The notifier. Whatever it is asked may be asked twice: nothing adds up."""

    who = "notifier"
    unit = "gpujobd-notify"

    @staticmethod
    def places() -> list[str]:
        return p.notify_socket_paths()

    @staticmethod
    def decode(body: bytes) -> Reply:
        return p.decode_notifier_reply(body)

    def answer(self, request: Request) -> Reply:
        """As `ask`, with an Error among the answers. Raises: Failure."""

        def attempt() -> Reply:
            self.connection().send(request)
            return self.reply(_id(request))

        try:
            return self.persist(attempt)
        except Refusal as refusal:
            if not refusal.error.id:
                raise
            return refusal.error


def _id(request: Request) -> int:
    assert isinstance(request, p.Request)  # Hello is the connection's own business
    return request.id


def narrow(reply: Reply, expect: type[R], who: str = "daemon") -> R:
    """Raises: Failure where the answer is something else."""
    if isinstance(reply, expect):
        return reply
    kind = reply.__struct_config__.tag
    raise Failure(Exit.UNREACHABLE, f"the {who} cannot be understood: {kind!r} is no answer to that")


def notice(text: str) -> None:
    """Tell a person who is watching; scripts are not bothered."""
    if sys.stderr.isatty():
        sys.stderr.write(f"jobctl: {text}\n")
