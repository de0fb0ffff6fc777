"""The daemon's events, followed for ever: what they make due goes into the outbox.

    connect -> ping -> attend -> (catch up) -> events --since cursor -> batches -> outbox
       ^                                            |
       +---- hung up, silent, a gap, another past --+

Rule 1: the cursor moves in the transaction that writes what is due; nothing is kept in between but what the events bring
again. A commit waits a moment for more, and longer where nothing is due: a disk is shared with the daemon.
Rule 2: what lies before the first connection ever is not told. From then on, what the daemon does not keep any more (a gap)
is derived from the jobs that have changed since.
Rule 3: the event at the cursor is asked for again. If it is another one, or the daemon is not that far, its state was
restored: what it took back is forgotten, what is due from then on gets new ids, and the log says so.
Rule 4: the daemon may be away as long as it likes; it is asked for again, after ten seconds at most. One that was stopped,
and for which systemd listens, is not called: that would start it, in the middle of its upgrade or against somebody's will.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import pwd
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

import trio
from gpujobd import __version__
from gpujobd import protocol as p
from msgspec.structs import replace

from gpujobd_notify import due
from gpujobd_notify.config import Config
from gpujobd_notify.due import Due, Ears, Record
from gpujobd_notify.store import Book, Cursor, Posting, Store
from gpujobd_notify.thread import Asked

log = logging.getLogger("gpujobd-notify")

READ_BYTES: Final = 256 << 10
CONNECT_S: Final = 10.0
ANSWER_S: Final = 60.0
SILENCE_S: Final = 150.0  # two signs of life and a half of the stream
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 10.0
REFUSED_S: Final = 10.0
COMMIT_DUE_S: Final = 0.05  # gathering, while something is due
COMMIT_S: Final = 2.0  # the same, while nothing is: what a kill makes the next start read again
BATCH_MAX: Final = 500  # postings in one commit
KNOWN_MAX: Final = 20_000  # jobs in memory, those that nobody wants to hear of included

SYSTEMD_UNITS: Final = Path("/run/systemd/units")  # has a link invocation:UNIT for every service that runs
ENDS_S: Final = 30.0  # from the end of its connections to that of the daemon: a snapshot
LOOK_S: Final = 0.1
SOCKET_UNITS: Final = tuple(
    Path(folder, "gpujobd.socket") for folder in ("/usr/lib/systemd/system", "/etc/systemd/system")
)

OF_JOBS: Final = due.FINAL | {
    "leased",
    "checkpointed",
    "yielded",
    "paused",
    "resumed",
    "lease_lost",
    "handler_load_failed",
}
OF_DEVICES: Final = frozenset({"device_fell_ill", "device_recovered"})
Event = dict[str, Any]


class Lost(Exception):
    """The connection is of no use any more; the message says why."""


class RefusedError(Exception):
    """The daemon does not take us for an observer, or does not know us at all."""


class Connection:
    """One connection to the daemon: questions first, one after the other, then the stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._frames = p.Frames()
        self._last_id = 0
        self._unread: list[p.AnyReply] = []

    async def greet(self) -> p.Welcome:
        await self._stream.send_all(p.frame(p.Hello([p.VERSION], f"gpujobd-notify {__version__}")))
        match await self._next():
            case p.Welcome(version=p.VERSION) as welcome:
                return welcome
            case p.Error() as error:
                raise Lost(error.message)
            case _:
                raise Lost("it did not say welcome")

    async def ask(self, kind: Callable[..., p.AnyRequest], **fields: Any) -> p.AnyReply:
        """One question, its final reply. Raises: Lost."""
        self._last_id += 1
        await self._stream.send_all(p.frame(kind(id=self._last_id, **fields)))
        while True:
            reply = await self._next()
            if isinstance(reply, p.Error) and reply.id == 0:
                raise Lost(reply.message)
            if isinstance(reply, p.Reply) and reply.id == self._last_id and not isinstance(reply, p.Alive):
                return reply

    async def follow(self, since: int) -> None:
        self._last_id += 1
        await self._stream.send_all(p.frame(p.Events(id=self._last_id, since=since, follow=True)))

    async def batch(self) -> list[p.AnyReply]:
        """What came of the stream; waits for something. Raises: Lost."""
        while not self._unread:
            await self._read()
        found, self._unread = self._unread, []
        return found

    async def _next(self) -> p.AnyReply:
        with trio.move_on_after(ANSWER_S):
            while not self._unread:
                await self._read()
            return self._unread.pop(0)
        raise Lost(f"no answer for {ANSWER_S:.0f} s")

    async def _read(self) -> None:
        try:
            piece = await self._stream.receive_some(READ_BYTES)
        except trio.BrokenResourceError as error:
            raise Lost(str(error)) from None
        if not piece:
            raise Lost("it hung up")
        try:
            self._unread += map(p.decode_reply, self._frames.feed(piece))
        except p.FrameError as error:
            raise Lost(f"it cannot be understood: {error}") from None


@asynccontextmanager
async def connected(paths: Sequence[str]) -> AsyncIterator[Connection]:
    """To the first that answers. Raises: Lost."""
    stream, tried = None, []
    for path in paths:
        if path == p.SYSTEM_SOCKET and is_asleep():
            raise Lost("it is stopped, and is not started for this")
        try:
            with trio.fail_after(CONNECT_S):
                stream = await trio.open_unix_socket(path)
            break
        except (OSError, trio.TooSlowError) as error:
            tried.append(f"{path} ({getattr(error, 'strerror', '') or 'does not answer'})")
    if stream is None:
        raise Lost(f"no daemon answers: tried {', '.join(tried)}")
    async with stream:
        yield Connection(stream)


def run_of_the_daemon(units: Path = SYSTEMD_UNITS) -> str:
    """Which one systemd shows; "": none."""
    try:
        return os.readlink(units / "invocation:gpujobd.service")
    except OSError:
        return ""


def is_asleep(units: Path = SYSTEMD_UNITS, sockets: Sequence[Path] = SOCKET_UNITS) -> bool:
    """Whether systemd listens for a daemon that does not run: it tells of services that do, and sockets are files of it."""
    return units.is_dir() and not run_of_the_daemon(units) and any(path.exists() for path in sockets)


class Follower:
    """Follows for as long as it is run."""

    def __init__(
        self,
        config: Config,
        paths: Sequence[str],
        asked: Asked,
        posting: Callable[[Due], Posting],
        on_due: Callable[[], None],
        *,
        now: Callable[[], float] = time.time,
        units: Path = SYSTEMD_UNITS,
    ) -> None:
        self._config = config
        self._ears: Ears = config.ears
        self._paths = paths
        self._asked = asked
        self._posting = posting
        self._on_due = on_due
        self._now = now
        self._known: OrderedDict[int, Record | None] = OrderedDict()  # None: nobody wants to hear of it
        self._defaults: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._changed: dict[int, Record | None] = {}
        self._postings: list[Posting] = []
        self._cursor = Cursor(seq=0)
        self._written = Cursor(seq=0)
        self._commit_at = float("inf")
        self._behind = False  # events are missing: the jobs must be listed
        self._relist = False  # all of them: somebody hears of every job from now on
        self._restored = False
        self._again = trio.CancelScope()
        self._units = units
        self._heard = ""  # the run of the daemon that was spoken to last
        self.state = "is looking for gpujobd"

    def reload(self, config: Config) -> None:
        """The daemon is told anew what can be reached. Who now hears of every job needs to know those there are."""
        self._relist = self._relist or bool({*config.ears} - {*self._ears})
        self._behind = self._behind or self._relist
        self._config, self._ears = config, config.ears
        self._again.cancel()

    @property
    def seq(self) -> int:
        """Of the newest event that is written down."""
        return self._written.seq

    def take_defaults(self, uid: int, notify: Sequence[str], on: Sequence[str]) -> None:
        """Somebody has set his."""
        self._defaults[uid] = tuple(notify), tuple(on)

    async def run(self) -> None:
        again_in_s = BACKOFF_FIRST_S
        while True:
            began = trio.current_time()
            with trio.CancelScope() as self._again:
                try:
                    await self._follow()
                except RefusedError as error:
                    self._say(f"is turned away by gpujobd: {error}")
                    again_in_s = REFUSED_S
                except (Lost, OSError, trio.BrokenResourceError) as error:
                    self._say(f"waits for gpujobd: {error}")
                    await self._outlast()
            self._forget_uncommitted()
            if trio.current_time() - began > 2 * BACKOFF_MAX_S:
                again_in_s = BACKOFF_FIRST_S
            if not self._again.cancelled_caught:
                await trio.sleep(again_in_s * random.uniform(0.8, 1.2))  # noqa: S311  # no secret
                again_in_s = min(BACKOFF_MAX_S, 2 * again_in_s)

    async def _outlast(self) -> None:
        """Let the run end that hung up: systemd would take a call meanwhile for a wish to start the next."""
        with trio.move_on_after(ENDS_S):
            while self._heard and self._heard == run_of_the_daemon(self._units):  # noqa: ASYNC110  # systemd pushes nothing
                await trio.sleep(LOOK_S)
        self._heard = ""

    def _say(self, state: str) -> None:
        if state != self.state:
            log.warning("%s", state)
        self.state = state

    def _forget_uncommitted(self) -> None:
        """The events bring it again."""
        self._known.clear()
        self._changed.clear()
        self._postings.clear()
        self._commit_at = float("inf")

    # --- one connection ---------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        async with connected(self._paths) as connection:
            await connection.greet()
            self._heard = run_of_the_daemon(self._units) if self._paths == [p.SYSTEM_SOCKET] else ""
            pong = await connection.ask(p.Ping)  # before attend, from when jobs are accepted
            newest = pong.seq if isinstance(pong, p.Pong) else 0
            await self._attend(connection)
            found = await self._asked(Store.cursor)
            if found is None:
                await self._begin_anew(connection, newest)
            else:
                self._cursor = self._written = found
                if newest < found.seq or self._restored:
                    await self._start_over(connection)
                elif self._behind:
                    await self._catch_up(connection)
            self._behind = self._relist = self._restored = False
            await connection.follow(self._cursor.seq)
            await self._take_all(connection)

    async def _attend(self, connection: Connection) -> None:
        request = self._config.attend(0)
        fields = {
            name: getattr(request, name) for name in ("names", "admin_names", "url_hosts", "mail_domains")
        }
        reply = await connection.ask(p.Attend, **fields)
        if isinstance(reply, p.Error):
            raise RefusedError(f"{reply.message} ([access] observers must name this program's user)")

    async def _take_all(self, connection: Connection) -> None:
        """The stream, until it ends or is found to be another's."""
        self.state = f"follows gpujobd from event {self._cursor.seq} on"
        log.info("%s", self.state)
        heard_at, checked = trio.current_time(), False
        while True:
            replies: list[p.AnyReply] = []
            with trio.move_on_at(min(self._commit_at, heard_at + SILENCE_S)):
                replies = await connection.batch()
            if replies:
                heard_at = trio.current_time()
            elif trio.current_time() >= heard_at + SILENCE_S:
                raise Lost(f"it said nothing for {SILENCE_S:.0f} s")
            if replies and not checked:
                replies, checked = self._checked(replies)
            await self._take([(r.seq, r.event) for r in self._events(replies)])
            if trio.current_time() >= self._commit_at or len(self._postings) >= BATCH_MAX:
                await self._commit()

    def _events(self, replies: Iterable[p.AnyReply]) -> list[p.EventSeen]:
        seen = []
        for reply in replies:
            match reply:
                case p.EventSeen():
                    seen.append(reply)
                case p.Gap(first_seq=first) if first > (seen[-1].seq if seen else self._cursor.seq) + 1:
                    self._behind = True
                    raise Lost(
                        f"events before {first} are not kept any more: catching up by the list of jobs"
                    )
                case p.Error():
                    raise Lost(reply.message)
        return seen

    def _checked(self, replies: list[p.AnyReply]) -> tuple[list[p.AnyReply], bool]:
        """Without the event at the cursor, which comes first and must be the one that was seen there."""
        first = next((r for r in replies if isinstance(r, p.EventSeen)), None)
        if first is None:
            return replies, False
        if first.seq == self._cursor.seq:
            if self._cursor.mark and _mark(first.event) != self._cursor.mark:
                self._restored = True
                raise Lost(f"its event {first.seq} is another than before: its state was restored")
            replies = [r for r in replies if r is not first]
        return replies, True

    # --- events -----------------------------------------------------------------------------------------------------

    async def _take(self, events: list[tuple[int, Event]]) -> None:
        """What a piece of the stream makes due."""
        if not events:
            return
        await self._learn(events)
        for seq, event in events:
            self._observe(seq, event)
        seq, event = events[-1]
        self._cursor = replace(self._cursor, seq=seq, at=event["at"], mark=_mark(event))
        self._commit_within(COMMIT_DUE_S if self._postings else COMMIT_S)

    def _commit_within(self, seconds: float) -> None:
        self._commit_at = min(self._commit_at, trio.current_time() + seconds)

    async def _learn(self, events: list[tuple[int, Event]]) -> None:
        """Have in memory what is known of the jobs and owners in these events."""
        named = {event["job"] for _, event in events if event["event"] in OF_JOBS}
        missing = named - self._known.keys()
        if missing:
            found = await self._asked(Store.records, missing)
            self._known.update({job: found.get(job) for job in missing})
        for job in named:
            self._known.move_to_end(job)
        if len(self._defaults) > KNOWN_MAX:
            self._defaults.clear()
        for _, event in events:
            if event["event"] == "submitted" and not event.get("notify"):
                await self._defaults_of(event["owner"])
        self._forget_oldest(KNOWN_MAX + len(named))

    def _forget_oldest(self, most: int) -> None:
        """Jobs that no event has named for long. What is not written yet stays: the outbox has an older record."""
        for job in list(islice(self._known, max(0, len(self._known) - most))):
            if job not in self._changed:
                del self._known[job]

    async def _defaults_of(self, uid: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if uid not in self._defaults:
            self._defaults[uid] = await self._asked(Store.defaults, uid)
        return self._defaults[uid]

    def _observe(self, seq: int, event: Event) -> None:
        tag = event["event"]
        if tag == "submitted":
            record = due.submitted(event, self._defaults.get(event["owner"], ((), ())))
            self._keep(event["job"], record if self._wanted(record) else None)
        elif tag in OF_JOBS:
            known = self._known.get(event["job"])
            if known is not None:
                record, found = due.observe(known, event, seq, self._ears)
                if record != known:
                    self._keep(event["job"], record)
                self._postings += map(self._posting, found)
        elif tag == "removed":
            self._known[event["job"]] = None
            self._changed[event["job"]] = None
        elif tag in OF_DEVICES:
            self._postings += map(self._posting, due.of_a_device(event, seq, self._ears))

    def _wanted(self, record: Record) -> bool:
        return bool(record.notify) or any(set(ear.on) != {due.DEVICE} for ear in self._ears)

    def _keep(self, job: int, record: Record | None) -> None:
        """A job that is over is not kept: nothing comes after it."""
        self._known[job] = None if record is None or record.over else record
        if record is not None:
            self._changed[job] = self._known[job]

    async def _commit(self) -> None:
        """Write all that was gathered. A cancellation comes before or after, not in between."""
        self._commit_at = float("inf")
        if self._cursor == self._written and not self._changed and not self._postings:
            return
        book = Book(cursor=self._cursor, records=self._changed, postings=self._postings, now=self._now())
        self._changed, self._postings = {}, []
        with trio.CancelScope(shield=True):
            new = await self._asked(Store.commit, book)
        self._written = book.cursor
        self.state = f"follows gpujobd, event {book.cursor.seq}"
        if new:
            self._on_due()

    # --- lists ------------------------------------------------------------------------------------------------------

    async def _begin_anew(self, connection: Connection, seq: int) -> None:
        """The first time: jobs that are there are known, and nothing of their past is told. What is after `seq` comes."""
        async for page in self._pages(connection, 0):
            for job, record, _ in await self._records_of(page.jobs):
                self._keep_if_wanted(due.already(record, job))
        await self._arrive(seq)

    def _keep_if_wanted(self, record: Record) -> None:
        if self._wanted(record) and not record.over:
            self._keep(record.job, record)

    async def _start_over(self, connection: Connection) -> None:
        """The daemon was restored: what it does from its past on is due, under ids of its own."""
        before = self._cursor
        log.error(
            "gpujobd was restored to a state before event %d: ids of jobs may be given again", before.seq
        )
        await self._asked(Store.forget_jobs)
        self._known.clear()
        self._cursor = replace(before, epoch=before.epoch + 1, mark="")
        seq = 0
        async for page in self._pages(connection, 0):
            seq = seq or page.seq
            for job, record, _ in await self._records_of(page.jobs):
                fresh = due.already(record, job) if _is_older(job, before.at) else record
                self._derive(fresh, job, page.seq)
        await self._arrive(seq)

    async def _catch_up(self, connection: Connection) -> None:
        """Events are missing, or somebody hears of all jobs from now on: what is due from the state of those that changed.

        Of one that nobody wanted to hear of, what was before the cursor is not told.
        """
        seq, seen, before = 0, set[int](), self._cursor.at
        async for page in self._pages(connection, 0 if self._relist else self._cursor.seq):
            seq = seq or page.seq
            for job, record, kept in await self._records_of(page.jobs):
                seen.add(job.id)
                told = due.already(record, job) if not kept and _is_older(job, before) else record
                self._derive(told, job, page.seq)
            await self._write_some()
        for record in await self._asked(Store.open_jobs):
            if record.job not in seen and await self._is_gone(connection, record.job):
                self._told(due.vanished(record, self._moment(), self._ears))
        log.warning("caught up with gpujobd by its list of jobs: %d were looked at", len(seen))
        await self._arrive(seq)

    async def _write_some(self) -> None:
        """What is derived so far. The cursor stays where it was until all is."""
        if self._changed or self._postings:
            await self._commit()

    async def _arrive(self, seq: int) -> None:
        """From here on the events say the rest."""
        self._cursor = replace(self._cursor, seq=max(1, seq), at=self._moment(), mark="")
        await self._commit()

    def _derive(self, record: Record, job: p.Job, seq: int) -> None:
        if self._wanted(record) and not record.over:
            self._told(due.caught_up(record, job, seq, self._moment(), self._ears))

    def _told(self, told: due.Told) -> None:
        record, found = told
        self._keep(record.job, record)
        self._postings += map(self._posting, found)

    async def _pages(self, connection: Connection, changed_since: int) -> AsyncIterator[p.Jobs]:
        after = 0
        while True:
            page = await connection.ask(p.List, after=after, changed_since=changed_since)
            if isinstance(page, p.Error):
                raise RefusedError(page.message)
            assert isinstance(page, p.Jobs)
            yield page
            after = page.next
            if not after:
                return

    async def _records_of(self, jobs: list[p.Job]) -> list[tuple[p.Job, Record, bool]]:
        """Each with its record: the one that is kept, or (False) what the job itself says."""
        kept = await self._asked(Store.records, [job.id for job in jobs])
        uids = await trio.to_thread.run_sync(_uids, {job.owner for job in jobs if job.id not in kept})
        found = []
        for job in jobs:
            record = kept.get(job.id)
            if record is None:
                uid = uids[job.owner]
                record = due.known(job, uid, ((), ()) if job.notify else await self._defaults_of(uid))
            found.append((job, record, job.id in kept))
        return found

    async def _is_gone(self, connection: Connection, job: int) -> bool:
        reply = await connection.ask(p.Show, job=job)
        return isinstance(reply, p.Error) and reply.code == p.ErrorCode.NO_SUCH_JOB

    def _moment(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self._now(), dt.UTC)


def _mark(event: Event) -> str:
    """What tells this event from another of the same number."""
    return f"{event['event']} {event.get('job', '')} {event['at'].isoformat()}"


def _is_older(job: p.Job, at: dt.datetime | None) -> bool:
    """Whether all that the job shows was before that."""
    latest = job.finished_at or job.started_at or job.submitted_at
    return at is not None and isinstance(latest, dt.datetime) and latest <= at


def _uids(names: Iterable[str]) -> dict[str, int]:
    """Owners as the daemon shows them: a name, or the uid in digits."""
    found = {}
    for name in names:
        try:
            found[name] = int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
        except KeyError:
            found[name] = due.HOUSE  # nobody's: administrators see it
    return found
