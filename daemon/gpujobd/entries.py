"""One entry of the daemon's log, and its three ways out: a line to read, a JSON line, an entry of systemd's journal.

    auto      `journal` where standard error leads there anyway, else `text`
    journal   systemd's journal itself, with every field (journald.py)
    text      <local time> LEVEL message
    json      one object a line

Rule 1: an entry says its kind and its fields by `extra=kind(...)` (catalog.py); all three ways tell the same.
Rule 2: nothing that came from outside begins a line of its own, forges a field, or drives a terminal.
Rule 3: a bug that ends the process, or one of its threads, is an entry like any other, with its trace.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Final

from gpujobd import journald
from gpujobd.catalog import FIELDS, kind
from gpujobd.journald import Journald

FORMATS: Final = ("auto", "text", "json", "journal")
PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
"""syslog(3)'s levels."""

log = logging.getLogger("gpujobd.log")


class Readable(logging.Formatter):
    """`<local time> LEVEL message`; systemd adds the time itself."""

    def __init__(self, *, times: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s" if times else "%(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """One line, whatever it quotes: people's words must not forge lines, nor drive a terminal."""
        return printable(super().formatMessage(record))


class JsonLines(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, object] = {
            "at": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        found |= {name: record.__dict__[name] for name in FIELDS if name in record.__dict__}
        if record.exc_info:
            found["trace"] = self.formatException(record.exc_info)
        return printable(json.dumps(found, ensure_ascii=False))


class ToJournal(logging.Handler):
    """systemd's journal. Once an entry was not taken at once, flushed() is due until nothing is left."""

    def __init__(self, path: str = journald.SOCKET) -> None:
        super().__init__()
        self._journald = Journald(_missed, path)
        self._on_left: Callable[[], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            framed = journald.entry(_fields(record))
        except (TypeError, ValueError):  # the message does not fit its arguments: logging's way is to say so
            self.handleError(record)
        else:
            if not self._journald.send(framed) and self._on_left is not None:
                self._on_left()

    def flushed(self) -> bool:
        """Send what was left, as far as journald takes it; whether nothing is left now."""
        self.acquire()
        try:
            return self._journald.flush()
        finally:
            self.release()

    def call_when_left(self, on_left: Callable[[], None] | None) -> None:
        """From now on call this, in any thread, whenever an entry was not taken at once; None: nothing.

        Under the lock that emit() holds: what was told before is called no more when this returns.
        """
        self.acquire()
        self._on_left = on_left
        self.release()

    def close(self) -> None:
        self._journald.close()
        super().close()


TRACES: Final = logging.Formatter()


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    message = printable(record.getMessage())
    if record.exc_info:
        trace = TRACES.formatException(record.exc_info)
        message = "\n".join([message, *map(printable, trace.splitlines())])
    yield "MESSAGE", message
    yield "PRIORITY", PRIORITIES.get(record.levelno, 6)
    yield "SYSLOG_IDENTIFIER", "gpujobd"
    yield "SYSLOG_TIMESTAMP", _utc(record)  # one that had to wait comes late
    yield "LOGGER", record.name
    yield "CODE_FILE", record.pathname
    yield "CODE_LINE", record.lineno
    yield "CODE_FUNC", record.funcName
    given = record.__dict__
    for name, there in FIELDS.items():
        if (value := given.get(name)) is not None:
            yield there, value


def _missed(count: int) -> bytes:
    """The entry that stands where others are missing."""
    message = "%d log entries were dropped while journald did not read"
    extra = kind("entries_dropped", dropped=count)
    where = (log.name, logging.WARNING, __file__, 0)
    return journald.entry(_fields(log.makeRecord(*where, message, (count,), None, "_missed", extra)))


def _utc(record: logging.LogRecord) -> str:
    return dt.datetime.fromtimestamp(record.created, tz=dt.UTC).isoformat().replace("+00:00", "Z")


def printable(text: str) -> str:
    """The same with everything that is no printable character written out, in a way that JSON reads back."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def set_up(style: str, *, verbose: bool) -> None:
    """Send the daemon's log where `style`, one of FORMATS, says."""
    handler: logging.Handler
    if style == "journal" or (style == "auto" and journald.is_stderr()):
        handler = ToJournal()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines() if style == "json" else Readable(times=sys.stderr.isatty()))
    root = logging.getLogger("gpujobd")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    sys.excepthook = _crashed
    threading.excepthook = _thread_crashed


def to_journal() -> ToJournal | None:
    """Where the daemon's log goes, if that is systemd's journal."""
    found = (handler for handler in logging.getLogger("gpujobd").handlers if isinstance(handler, ToJournal))
    return next(found, None)


def _crashed(bug: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    log.critical(
        "a bug ends the daemon: %s", _last(error), exc_info=(bug, error, trace), extra=kind("crashed")
    )


def _thread_crashed(args: threading.ExceptHookArgs) -> None:
    assert args.exc_value is not None
    log.critical(
        "a bug ended the thread %s: %s",
        args.thread.name if args.thread else "?",
        _last(args.exc_value),
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        extra=kind("thread_crashed"),
    )


def _last(error: BaseException) -> str:
    """What went wrong, out of groups of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
