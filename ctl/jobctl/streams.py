"""Verbs that read what happened: log, events.

Rule 1: a stream that is followed survives a restart of the daemon and goes on where it was: events by their number,
a log by what of it was written already.
"""

from __future__ import annotations

import codecs
import datetime as dt
import sys
from typing import Final

import click
from gpujobd import protocol as p

from jobctl.command import complain, session, verb, write, write_line
from jobctl.table import clean
from jobctl.times import local, now, spoken


@verb("log")
@click.argument("job", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is final.")
def log(job: str, follow: bool) -> None:
    """Write what the job's worker wrote to its standard output and error.

    Examples:
      jobctl log 42
      jobctl log @ -f
    """
    here = session()
    ids = here.jobs((job,))
    if len(ids) != 1:
        raise click.UsageError("name one job")
    request = p.Log(id=here.daemon.next_id(), job=ids[0], follow=follow)
    out = LogWriter(ids[0], json=here.json)

    def again() -> p.Log:
        out.rewind()
        return request

    for reply in here.daemon.follow(again):
        if isinstance(reply, p.LogPiece):
            out.take(reply.data)
    out.end()


class LogWriter:
    """Writes a log once, though it is sent again from its start after a reconnection.

    As it came into a file; before a person without what would move the cursor; as JSON a line each.
    """

    def __init__(self, job: int, *, json: bool) -> None:
        self._job = job
        self._json = json
        self._raw = not json and not sys.stdout.isatty()
        self._written = 0  # bytes, over all connections
        self._seen = 0  # bytes, of this connection
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def rewind(self) -> None:
        self._seen = 0

    def take(self, data: bytes) -> None:
        new = data[max(0, self._written - self._seen) :]
        self._seen += len(data)
        self._written = max(self._written, self._seen)
        if self._raw:
            click.echo(new, nl=False)
            return
        *lines, self._rest = (self._rest + self._text.decode(new)).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        if self._rest:
            self._line(self._rest)
            self._rest = ""

    def _line(self, line: str) -> None:
        if self._json:
            write_line({"job": self._job, "text": line})
        else:
            write(clean(line.rsplit("\r", 1)[-1]) + "\n")  # of a progress bar, what it showed at last


@verb("events")
@click.option("-f", "--follow", is_flag=True, help="Go on for ever; without --since, from now on.")
@click.option(
    "--since", type=click.IntRange(min=1), metavar="SEQ", help="From the event with this number on."
)
@click.option("--job", metavar="ID", help="Of this job alone.")
def events(follow: bool, since: int | None, job: str | None) -> None:
    """Write the events that you may see: facts, numbered for ever, each once.

    Examples:
      jobctl events -f
      jobctl events --job 42
      jobctl events --since 1234 -f --json
    """
    here = session()
    ids = here.jobs((job,)) if job else [0]
    if len(ids) != 1:
        raise click.UsageError("--job takes one job")
    cursor = since or (0 if follow else 1)
    request_id = here.daemon.next_id()
    if not cursor:  # learnt before the stream begins, so that a reconnection misses nothing
        cursor = here.daemon.ask(p.Ping(id=here.daemon.next_id()), p.Pong).seq + 1

    def onward() -> p.Events:
        return p.Events(id=request_id, since=cursor, follow=follow, job=ids[0])

    for reply in here.daemon.follow(onward):
        match reply:
            case p.EventSeen():
                cursor = reply.seq + 1
                if here.json:
                    write_line({"seq": reply.seq, **reply.event})
                else:
                    write(event_line(reply.seq, reply.event))
            case p.Gap():
                if here.json:
                    write_line({"event": "gap", "first_seq": reply.first_seq})
                if since is not None or cursor > 1:
                    complain(_gap(cursor, reply.first_seq))


def _gap(cursor: int, first_seq: int) -> str:
    return (
        f"events {cursor} to {first_seq - 1} are not kept any more: "
        f"`jobctl list --changed-since {cursor - 1}` tells where things stand"
    )


def event_line(seq: int, event: dict[str, object]) -> str:
    """`1234  17:05:12  leased  job=42 device=cuda:0 attempt=1`."""
    shown = dict(event)
    name, at = str(shown.pop("event", "?")), shown.pop("at", None)
    when = local(at, now()) if isinstance(at, dt.datetime) else str(at or "")
    fields = " ".join(
        f"{key.removesuffix('_ns')}={_value(key, value)}"
        for key, value in shown.items()
        if key not in UNTOLD and value not in ("", [], {}, None)
    )
    return clean(f"{seq:>6}  {when}  {name:<18}  {fields}".rstrip()) + "\n"


UNTOLD: Final = {"vtime_ns", "timings", "vram_bytes"}
"""Fields of events that are for programs: they are in --json."""
MOMENTS: Final = {"begin_ns", "deadline_ns", "retry_at_ns"}


def _value(key: str, value: object) -> str:
    """As people read it: durations with their unit, moments in local time, of a checkpoint what was done."""
    if isinstance(value, dict):
        kept = ("upto", "done", "failed") if key == "checkpoint" else tuple(value)
        return ",".join(f"{name}:{value[name]}" for name in kept if name in value)
    if key in MOMENTS and isinstance(value, int):
        return local(dt.datetime.fromtimestamp(value / 1e9, tz=dt.UTC), now()).replace(" ", "T")
    if key.endswith("_ns") and isinstance(value, int):
        return spoken(value / 1e9).replace(" ", "")
    text = str(value)
    return repr(text) if " " in text else text
