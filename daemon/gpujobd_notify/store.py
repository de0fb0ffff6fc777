"""What outlives a kill: the cursor, the jobs somebody wants to hear of, and the outbox. One SQLite file.

    meta       cursor, the event it stands at, epoch: how much of the daemon's past was seen
    jobs       the Record of each job that is not over, as far as it was told
    outbox     what is due, and what became of it: pending -> delivered | failed | muted
    defaults, mutes, disabled     what people set, and what a far end did (410)

Rule 1: what an event makes due is in the outbox in the same transaction that moves the cursor past the event. So a
kill at any point costs nothing and repeats nothing here; what was sent and not noted is sent again, under its old id.
Rule 2: WAL with synchronous=FULL: a commit that returned is on disk.
Rule 3: what is over is kept for a while and then deleted; what one uid may have pending is bounded.
Rule 4: one connection, used by one thread at a time; nobody holds it over a wait for somebody else.
Rule 5: a file that does not check, or that a later version wrote, is refused at the start and left as it is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from gpujobd import protocol as p

from gpujobd_notify.due import Due, Record, Story

VERSION: Final = 1
BUSY_S: Final = 5.0
PENDING, DELIVERED, FAILED, MUTED = (str(state) for state in p.NotificationState)
PAGE: Final = 500
PRUNED_AT_ONCE: Final = 1000

SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (job INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    job INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    kind TEXT NOT NULL,
    target TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    urgent INTEGER NOT NULL,
    state TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL,
    created_at REAL NOT NULL,
    next_at REAL NOT NULL,
    over_at REAL,
    error TEXT NOT NULL DEFAULT '',
    story BLOB NOT NULL
);
CREATE INDEX to_send ON outbox (endpoint, urgent, next_at, number) WHERE state = 'pending';
CREATE INDEX of_uid ON outbox (uid, state);
CREATE INDEX of_job ON outbox (job);
CREATE INDEX over ON outbox (over_at) WHERE over_at IS NOT NULL;
CREATE TABLE defaults (uid INTEGER PRIMARY KEY, notify BLOB NOT NULL);
CREATE TABLE mutes (
    uid INTEGER NOT NULL, job INTEGER NOT NULL, endpoint TEXT NOT NULL, PRIMARY KEY (uid, job, endpoint)
) WITHOUT ROWID;
CREATE TABLE disabled (endpoint TEXT PRIMARY KEY, why TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
"""

NEXT: Final = """
WITH line AS (
    SELECT number, uid, row_number() OVER (PARTITION BY uid ORDER BY next_at, number) AS place FROM outbox
    WHERE state = 'pending' AND endpoint = :endpoint AND urgent = :urgent AND next_at <= :now
    AND number NOT IN (SELECT value FROM json_each(:but)) AND uid NOT IN (SELECT value FROM json_each(:full))
)
SELECT outbox.* FROM outbox JOIN line USING (number)
ORDER BY line.place, line.uid <= :after_uid, line.uid LIMIT :limit
"""
LIST: Final = """
SELECT * FROM outbox WHERE number > :after AND (:uid IS NULL OR uid = :uid) AND (:job = 0 OR job = :job)
AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states))) ORDER BY number LIMIT :limit
"""

EVERYBODY: Final = -2
"""In the place of a uid, of a mute: whoever's job it is."""


class StoreError(Exception):
    """The outbox cannot be used, and a restart would not help; the message says what would."""


class StoreBusyError(Exception):
    """Another notifier has it."""


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """How far the events were seen, and the event there, by which a daemon that was restored is told from the one before."""

    seq: int
    at: dt.datetime | None = None
    mark: str = ""
    epoch: int = 0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the outbox."""

    number: int
    id: str
    job: int
    uid: int
    kind: str
    target: str
    endpoint: str
    urgent: bool
    state: str
    tries: int
    due_at: float
    created_at: float
    next_at: float
    over_at: float | None
    error: str
    story: Story


class Posting(msgspec.Struct, frozen=True, kw_only=True):
    """A Due with its queue, and when it is to be sent first."""

    due: Due
    endpoint: str
    next_at: float
    digest: bool = False  # it goes out together with what waits there already
    error: str = ""  # why it can never be sent


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """What one commit writes."""

    cursor: Cursor
    records: dict[int, Record | None]  # None: nothing comes of it any more
    postings: list[Posting]
    now: float


class Store:
    """The open file. Every method is one transaction, and blocks: it is called in a thread."""

    def __init__(self, folder: Path, pending_per_uid_max: int = 10_000) -> None:
        """Raises: StoreError, StoreBusyError, OSError."""
        self.pending_per_uid_max = pending_per_uid_max
        self._lock = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        path = folder / "outbox.db"
        try:
            _take(self._lock, folder)
            self._db = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64
            )
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
                self._db.execute(f"PRAGMA {setting}")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise StoreError(f"{path}: a later version wrote it ({version}, this one knows {VERSION})")
            if version == 0:
                self._create()
            (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise  # a full disk, a file that is not ours: a restart may help
            raise StoreError(_damaged(path, str(error))) from None
        if found != "ok":
            raise StoreError(_damaged(path, found))

    def _create(self) -> None:
        with self._transaction():
            for statement in filter(str.strip, SCHEMA.split(";")):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={VERSION}")

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    # --- the events -----------------------------------------------------------------------------------------------

    def cursor(self) -> Cursor | None:
        """None: nothing was ever followed."""
        found = self._db.execute("SELECT value FROM meta WHERE key = 'cursor'").fetchone()
        return msgspec.msgpack.decode(found[0], type=Cursor) if found else None

    def commit(self, book: Book) -> int:
        """Write what events made due, and that they were seen: all of it, or nothing. How much is new."""
        with self._transaction():
            for job, record in book.records.items():
                self._put_record(job, record)
            pending: dict[int, int] = {}
            new = sum(self._post(posting, book.cursor.epoch, book.now, pending) for posting in book.postings)
            ended = [(job,) for job, record in book.records.items() if record is None]
            self._db.executemany("DELETE FROM mutes WHERE job = ?", ended)
            value = msgspec.msgpack.encode(book.cursor)
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('cursor', ?)", (value,))
        return new

    def _put_record(self, job: int, record: Record | None) -> None:
        if record is None:
            self._db.execute("DELETE FROM jobs WHERE job = ?", (job,))
        else:
            self._db.execute(
                "INSERT OR REPLACE INTO jobs VALUES (?, ?)", (job, msgspec.msgpack.encode(record))
            )

    def _post(self, posting: Posting, epoch: int, now: float, pending: dict[int, int]) -> int:
        due, story = posting.due, posting.due.story
        state, error = (
            (FAILED, posting.error) if posting.error else self._fate(due, posting.endpoint, pending)
        )
        next_at = posting.next_at
        if posting.digest:
            next_at = self._digest_at(posting.endpoint, due.target, now) or next_at
        values = (
            *(due.id(epoch), story.job, due.uid, story.kind, due.target, posting.endpoint, due.urgent, state),
            *(story.at.timestamp(), now, next_at, None if state == PENDING else now, error),
            msgspec.msgpack.encode(story),
        )
        done = self._db.execute(
            "INSERT OR IGNORE INTO outbox (id, job, uid, kind, target, endpoint, urgent, state, due_at, created_at,"
            " next_at, over_at, error, story) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )
        if state == PENDING:
            pending[due.uid] = pending.get(due.uid, 0) + done.rowcount
        return done.rowcount

    def _fate(self, due: Due, endpoint: str, pending: dict[int, int]) -> tuple[str, str]:
        """In which state it begins, and why where it is not to be sent."""
        muted = self._db.execute(
            "SELECT 1 FROM mutes WHERE uid IN (?, ?) AND job IN (0, ?) AND endpoint IN ('', ?, ?) LIMIT 1",
            (due.uid, EVERYBODY, due.story.job, endpoint, due.target),
        ).fetchone()
        if muted:
            return MUTED, ""
        if why := self._disabled(endpoint, due.target):
            return FAILED, why
        if due.uid not in pending:
            of_uid = "SELECT count(*) FROM outbox WHERE uid = ? AND state = 'pending'"
            (pending[due.uid],) = self._db.execute(of_uid, (due.uid,)).fetchone()
        if pending[due.uid] >= self.pending_per_uid_max:
            return (
                FAILED,
                f"{pending[due.uid]} are pending already, at most {self.pending_per_uid_max} may be",
            )
        return PENDING, ""

    def _digest_at(self, endpoint: str, target: str, now: float) -> float | None:
        """When the digest that is being gathered goes out."""
        found = self._db.execute(
            "SELECT max(next_at) FROM outbox WHERE endpoint = ? AND target = ? AND state = 'pending' AND urgent = 0"
            " AND tries = 0 AND next_at > ?",
            (endpoint, target, now),
        ).fetchone()
        return float(found[0]) if found[0] is not None else None

    def records(self, jobs: Iterable[int]) -> dict[int, Record]:
        found = {}
        for job in jobs:
            row = self._db.execute("SELECT record FROM jobs WHERE job = ?", (job,)).fetchone()
            if row:
                found[job] = msgspec.msgpack.decode(row[0], type=Record)
        return found

    def open_jobs(self) -> list[Record]:
        """Jobs whose end was not told."""
        rows = self._db.execute("SELECT record FROM jobs").fetchall()
        return [msgspec.msgpack.decode(row[0], type=Record) for row in rows]

    def forget_jobs(self) -> None:
        """Of a past that a restored daemon took back."""
        with self._transaction():
            self._db.execute("DELETE FROM jobs")

    # --- the outbox -----------------------------------------------------------------------------------------------

    def waiting(self, now: float) -> tuple[list[str], float | None]:
        """Endpoints that have something to send, and when the next is due where nothing is."""
        names = self._db.execute(
            "SELECT DISTINCT endpoint FROM outbox WHERE state = 'pending' AND next_at <= ?", (now,)
        ).fetchall()
        later = self._db.execute(
            "SELECT min(next_at) FROM outbox WHERE state = 'pending' AND next_at > ?", (now,)
        ).fetchone()
        return [name for (name,) in names], later[0]

    def next(
        self,
        endpoint: str,
        now: float,
        limit: int,
        *,
        urgent: bool,
        but: Sequence[int] = (),
        full: Sequence[int] = (),
        after_uid: int = -1,
    ) -> list[Row]:
        """What to send next there; of each uid in turn, so that who has much to be told is not ahead of all others.

        `but`: numbers, and `full`: uids that are left out; `after_uid`: whose turn was the latest.
        """
        given = {
            "endpoint": endpoint,
            "urgent": urgent,
            "now": now,
            "limit": limit,
            "but": msgspec.json.encode(but).decode(),
            "full": msgspec.json.encode(full).decode(),
            "after_uid": after_uid,
        }
        return [_row(row) for row in self._db.execute(NEXT, given).fetchall()]

    def digest(self, row: Row, limit: int) -> list[Row]:
        """All that goes out in one mail with this one: the same target, the same moment."""
        rows = self._db.execute(
            "SELECT * FROM outbox WHERE state = 'pending' AND endpoint = ? AND target = ? AND urgent = ? AND next_at = ?"
            " AND tries = ? AND uid = ? ORDER BY number LIMIT ?",
            (row.endpoint, row.target, row.urgent, row.next_at, row.tries, row.uid, limit),
        )
        return [_row(found) for found in rows.fetchall()]

    def delivered(self, numbers: Sequence[int], now: float) -> None:
        with self._transaction():
            self._db.executemany(
                "UPDATE outbox SET state = 'delivered', tries = tries + 1, over_at = ?, error = ''"
                " WHERE number = ? AND state <> 'delivered'",
                [(now, number) for number in numbers],
            )

    def failed(self, numbers: Sequence[int], error: str, next_at: float | None, now: float) -> None:
        """A try failed. `next_at`: of the next one; None: there is none."""
        state, over_at = (PENDING, None) if next_at is not None else (FAILED, now)
        with self._transaction():
            self._db.executemany(
                "UPDATE outbox SET state = ?, tries = tries + 1, next_at = ?, over_at = ?, error = ?"
                " WHERE number = ? AND state = 'pending'",
                [(state, next_at or now, over_at, error, number) for number in numbers],
            )

    def disable(self, name: str, why: str, now: float) -> None:
        """Nothing goes there any more: an endpoint by its name, or one URL."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO disabled VALUES (?, ?, ?)", (name, why, now))
            self._db.execute(
                "UPDATE outbox SET state = 'failed', over_at = ?, error = ? WHERE state = 'pending'"
                " AND (endpoint = ? OR target = ?)",
                (now, why, name, name),
            )

    def enable(self, *names: str) -> None:
        with self._transaction():
            self._db.executemany("DELETE FROM disabled WHERE endpoint = ?", [(name,) for name in names])

    def disabled(self) -> dict[str, str]:
        return dict(
            self._db.execute("SELECT endpoint, why FROM disabled ORDER BY at DESC LIMIT 500").fetchall()
        )

    def _disabled(self, *names: str) -> str:
        for name in names:
            found = self._db.execute("SELECT why FROM disabled WHERE endpoint = ?", (name,)).fetchone()
            if found:
                return str(found[0])
        return ""

    def tidy(self, now: float, keep_s: float, give_up_s: float) -> int:
        """Give up what is too old, delete what is over for long enough; how much was deleted."""
        with self._transaction():
            self._db.execute("DELETE FROM disabled WHERE at < ? AND instr(endpoint, '://')", (now - keep_s,))
            self._db.execute(
                "UPDATE outbox SET state = 'failed', over_at = ?, error = 'given up: ' || error"
                " WHERE state = 'pending' AND created_at < ?",
                (now, now - give_up_s),
            )
            gone = self._db.execute(
                "DELETE FROM outbox WHERE number IN"
                " (SELECT number FROM outbox WHERE over_at < ? ORDER BY over_at LIMIT ?)",
                (now - keep_s, PRUNED_AT_ONCE),
            )
        return gone.rowcount

    # --- what people ask --------------------------------------------------------------------------------------------

    def get(self, number: int) -> Row | None:
        found = self._db.execute("SELECT * FROM outbox WHERE number = ?", (number,)).fetchone()
        return _row(found) if found else None

    def retry(self, number: int, now: float) -> None:
        """Send it now, and as if it were new: it has the whole schedule before it."""
        with self._transaction():
            self._db.execute(
                "UPDATE outbox SET state = 'pending', tries = 0, next_at = ?, created_at = ?, over_at = NULL"
                " WHERE number = ?",
                (now, now, number),
            )

    def list(self, uid: int | None, job: int, states: Sequence[str], after: int, limit: int) -> list[Row]:
        """Of one uid, or (None) of all; oldest first."""
        wanted = msgspec.json.encode(list(states)).decode() if states else None
        rows = self._db.execute(
            LIST, {"after": after, "uid": uid, "job": job, "states": wanted, "limit": limit}
        )
        return [_row(row) for row in rows.fetchall()]

    def queued(self) -> dict[str, int]:
        """Pending, by endpoint."""
        rows = self._db.execute(
            "SELECT endpoint, count(*) FROM outbox WHERE state = 'pending' GROUP BY endpoint"
        )
        return dict(rows.fetchall())

    def mute(self, uid: int, job: int, endpoint: str, now: float, *, muted: bool) -> None:
        """`uid`: whose jobs; EVERYBODY for all. What is pending and meant is not sent; unmuting holds for what comes."""
        key = uid, job, endpoint
        with self._transaction():
            if not muted:
                self._db.execute("DELETE FROM mutes WHERE uid = ? AND job = ? AND endpoint = ?", key)
                return
            self._db.execute("INSERT OR IGNORE INTO mutes VALUES (?, ?, ?)", key)
            self._db.execute(
                "UPDATE outbox SET state = 'muted', over_at = ? WHERE state = 'pending'"
                " AND (uid = ? OR ? = ?) AND (job = ? OR ? = 0) AND (endpoint = ? OR target = ? OR ? = '')",
                (now, uid, uid, EVERYBODY, job, job, endpoint, endpoint, endpoint),
            )

    def mutes(self, uid: int) -> int:
        (count,) = self._db.execute("SELECT count(*) FROM mutes WHERE uid = ?", (uid,)).fetchone()
        return int(count)

    def defaults(self, uid: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Targets and occasions of jobs that name none."""
        found = self._db.execute("SELECT notify FROM defaults WHERE uid = ?", (uid,)).fetchone()
        if not found:
            return (), ()
        return msgspec.msgpack.decode(found[0], type=tuple[tuple[str, ...], tuple[str, ...]])

    def set_defaults(self, uid: int, notify: Sequence[str], on: Sequence[str]) -> None:
        with self._transaction():
            if notify:
                value = msgspec.msgpack.encode((notify, on))
                self._db.execute("INSERT OR REPLACE INTO defaults VALUES (?, ?)", (uid, value))
            else:
                self._db.execute("DELETE FROM defaults WHERE uid = ?", (uid,))


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusyError(f"another notifier has {folder}") from None


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path} is damaged ({what}): `sqlite3 {path} .recover` may save what is pending; without the file the notifier"
        " begins anew with what happens from then on"
    )


def _row(row: tuple[Any, ...]) -> Row:
    names = Row.__struct_fields__
    fields = dict(zip(names, row[: len(names)], strict=True))
    fields["urgent"] = bool(fields["urgent"])
    fields["story"] = msgspec.msgpack.decode(fields["story"], type=Story)
    return Row(**fields)
