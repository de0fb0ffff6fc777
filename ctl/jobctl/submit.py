"""The verb submit: check, declare, stream, and never twice.

    first reading, measured --> Submit with the bytes (up to 64 KiB) ------> Accepted
                            --> Submit --> GoOn --> second reading, Chunk.. --> Accepted

Rule 1: nothing is sent before the input is known to be good.
Rule 2: one submit_id for all tries: after a lost answer the daemon says which job it made, and makes no second one.
Rule 3: the second reading must give the bytes of the first; else the end of the stream is never sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from typing import BinaryIO, Final

import click
from gpujobd import protocol as p
from msgspec import UNSET
from msgspec.structs import replace

from jobctl.check import BAD_LINES_MAX, Measured, measure
from jobctl.command import Session, notify_options, occasions, session, tell, verb, write, write_json
from jobctl.exits import Exit, Failure
from jobctl.table import counted, size
from jobctl.times import Moment, now, relative, told

PRIORITIES: Final = ("high", "normal", "low")
COPY_BYTES: Final = 256 << 10


@verb("submit")
@click.argument("handler")
@click.argument("input_path", metavar="INPUT|-")
@click.option("--priority", type=click.Choice(PRIORITIES), default="normal", show_default=True)
@click.option("--tenant", default="", help="Who is charged. [default: you]")
@click.option("--name", default="", help="For people; need not be unique.")
@click.option("--param", "params", multiple=True, metavar="K=V", help="For the handler; may be repeated.")
@click.option("--begin", type=Moment(), metavar="TIME", help="Not before: 2h from now, or RFC 3339.")
@click.option("--deadline", type=Moment(), metavar="TIME", help="Expires then, if not done.")
@click.option(
    "--failures-max", type=click.IntRange(min=0), metavar="N", help="Fails if more items than that failed."
)
@notify_options
@click.option("--wait", "stay", is_flag=True, help="Wait for its end; exits as `jobctl wait` does.")
@click.option(
    "--dry-run", is_flag=True, help="Only say whether it would be accepted, and when it would start."
)
@click.option("--no-check", is_flag=True, help="Send the input unread; the daemon's worker finds bad items.")
@click.option(
    "--submit-id", metavar="WORD", help="For scripts that repeat themselves: the same word, the same job."
)
def submit(
    handler: str,
    input_path: str,
    priority: str,
    tenant: str,
    name: str,
    params: tuple[str, ...],
    begin: object,
    deadline: object,
    failures_max: int | None,
    notify: tuple[str, ...],
    notify_on: tuple[str, ...],
    stay: bool,
    dry_run: bool,
    no_check: bool,
    submit_id: str | None,
) -> Exit | None:
    """Submit a file of items (JSONL: one JSON object a line) as one job; - reads standard input.

    Prints the job's id, once it is on disk. The input is checked first: an input with bad lines is refused (exit
    code 6), the first ten of them are named, and nothing was sent.

    Examples:
      jobctl submit embed texts.jsonl
      jobctl submit embed texts.jsonl --param normalize=false --begin 2h --name nightly
      jobctl submit embed texts.jsonl --notify mailto:alice@example.org --notify-on fail,progress=25%
      make-items | jobctl submit embed - --wait && jobctl output @ > vectors.jsonl
    """
    here = session()
    _check_submit_id(submit_id)
    with _opened(input_path) as source:
        measured = _measured(source, input_path, check=not no_check)
        header = p.Submit(
            id=here.daemon.next_id(),
            submit_id=submit_id or uuid.uuid4().hex,
            handler=handler,
            items=measured.items,
            input_bytes=measured.size,
            input_sha256=measured.sha256,
            item_bytes=measured.longest,
            tenant=tenant,
            name=name,
            params=_converted(here, handler, params),
            priority=priority,
            begin_at=begin,  # type: ignore[arg-type]  # Moment() makes it one
            deadline_at=deadline,  # type: ignore[arg-type]
            failures_max=-1 if failures_max is None else failures_max,
            dry_run=dry_run,
            notify=list(notify),
            notify_on=occasions(notify_on),
        )
        accepted = _send(here, header, source, input_path)
    if dry_run:
        _forecast(here, header, accepted)
        return None
    return _accepted(here, header, accepted, stay=stay)


def _check_submit_id(submit_id: str | None) -> None:
    if submit_id is not None and not (
        submit_id.isascii() and submit_id.isprintable() and 0 < len(submit_id) <= 64
    ):
        raise click.UsageError("--submit-id takes 1 to 64 printable ASCII characters")


# --- the input --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The input as something that can be read twice: itself, or a copy of what comes out of a pipe."""
    try:
        source = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise Failure(Exit.USAGE, f"{path}: {error.strerror}") from None
    try:
        seekable = stat.S_ISREG(os.fstat(source.fileno()).st_mode) and path != "-"
        with contextlib.nullcontext(source) if seekable else _spooled(source) as again:
            yield again
    except IsADirectoryError as error:
        raise Failure(Exit.USAGE, f"{path}: {error.strerror}") from None
    finally:
        if path != "-":
            source.close()


def _spooled(source: BinaryIO) -> BinaryIO:
    """A copy: in memory if it is small, else in a file without a name, which is gone when we are."""
    import tempfile  # noqa: PLC0415  # for pipes alone

    start = source.read(p.INLINE_BYTES_MAX + 1)
    if len(start) <= p.INLINE_BYTES_MAX:
        return io.BytesIO(start)
    copy: BinaryIO = tempfile.TemporaryFile(prefix="jobctl-")  # noqa: SIM115  # the caller closes it
    try:
        copy.write(start)
        while piece := source.read(COPY_BYTES):
            copy.write(piece)
        copy.seek(0)
    except OSError as error:
        copy.close()
        raise Failure(Exit.FAILED, f"the input cannot be put aside: {error.strerror}") from None
    return copy


def _measured(source: BinaryIO, path: str, *, check: bool) -> Measured:
    """Raises: Failure(REFUSED) with the first bad lines."""
    measured = measure(source, check=check)
    if measured.bad:
        many = f", the first {BAD_LINES_MAX}" if len(measured.bad) == BAD_LINES_MAX else ""
        for line in measured.bad:
            click.echo(f"jobctl: {path}: {line}", err=True)
        raise Failure(Exit.REFUSED, f"bad_input: {len(measured.bad)} bad lines{many}; nothing was sent")
    if not measured.items:
        raise Failure(Exit.REFUSED, f"bad_input: {path} holds no items")
    return measured


# --- parameters -------------------------------------------------------------------------------------------------


def _converted(here: Session, handler: str, words: tuple[str, ...]) -> dict[str, str | int | float | bool]:
    """`k=v` words as the handler declares them. Names it does not know are left for the daemon to refuse."""
    if not words:
        return {}
    reply = here.daemon.ask(p.Handlers(id=here.daemon.next_id()), p.HandlerList)
    declared = next((view.params for view in reply.handlers if view.name == handler), {})
    params: dict[str, str | int | float | bool] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise click.UsageError(f"--param takes K=V, not {word!r}")
        kind = str(declared.get(key, {}).get("type", "str"))
        params[key] = _value(key, value, kind)
    return params


def _value(key: str, text: str, kind: str) -> str | int | float | bool:
    """Raises: Failure(REFUSED) for a value that is not of that type."""
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    with contextlib.suppress(ValueError):
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    if kind not in ("bool", "int", "float"):
        return text
    raise Failure(Exit.REFUSED, f"bad_params: {key}={text}: {key} is of type {kind}")


# --- sending ----------------------------------------------------------------------------------------------------


def _send(here: Session, header: p.Submit, source: BinaryIO, path: str) -> p.Accepted:
    """Raises: Refusal, Failure."""
    if header.input_bytes <= p.INLINE_BYTES_MAX and not header.dry_run:
        source.seek(0)
        data = source.read(p.INLINE_BYTES_MAX + 1)
        if hashlib.sha256(data).digest() != header.input_sha256:
            raise _changed(path)
        return here.daemon.ask(replace(header, input=data), p.Accepted)
    return here.daemon.persist(lambda: _send_once(here, header, source, path))


def _send_once(here: Session, header: p.Submit, source: BinaryIO, path: str) -> p.Accepted:
    connection = here.daemon.connection()
    connection.send(header)
    reply = here.daemon.reply(header.id)
    if isinstance(reply, p.GoOn):
        _stream(here, header, source, path)
        reply = here.daemon.reply(header.id)
    if isinstance(reply, p.Accepted):
        return reply
    raise Failure(
        Exit.UNREACHABLE, f"the daemon cannot be understood: {type(reply).__name__} is no answer to that"
    )


def _stream(here: Session, header: p.Submit, source: BinaryIO, path: str) -> None:
    """Send the pieces and the end. Stops early where the daemon has something to say, or hung up."""
    connection = here.daemon.connection()
    digest = hashlib.sha256()
    sent = 0
    source.seek(0)
    while piece := source.read(p.CHUNK_BYTES_MAX):
        sent += len(piece)
        if sent > header.input_bytes:
            break
        digest.update(piece)
        if not connection.send(p.Chunk(id=header.id, data=piece)) or connection.spoken_to():
            return
    if sent != header.input_bytes or digest.digest() != header.input_sha256:
        here.daemon.hang_up()  # the daemon forgets what came without its end
        raise _changed(path)
    connection.send(p.Chunk(id=header.id, data=b""))


def _changed(path: str) -> Failure:
    return Failure(Exit.REFUSED, f"bad_input: {path} changed while it was read; nothing was submitted")


# --- what is said -----------------------------------------------------------------------------------------------


def _accepted(here: Session, header: p.Submit, accepted: p.Accepted, *, stay: bool) -> Exit | None:
    if here.json:
        answer: dict[str, object] = {"id": accepted.job, "submit_id": header.submit_id}
        write_json(answer | _outlook(accepted))
    else:
        write(f"{accepted.job}\n")
    tell(f"job {accepted.job}: {counted(header.items)} items for {header.handler}{_when(accepted)}")
    if not stay:
        return None
    from jobctl import follow  # noqa: PLC0415  # most submissions do not stay

    if sys.stderr.isatty():
        return follow.report([follow.watch_job(here, accepted.job, follow.Bar())])
    return follow.report(follow.wait_for(here, [accepted.job]))


def _outlook(accepted: p.Accepted) -> dict[str, object]:
    known = {"position": accepted.position, "forecast": accepted.forecast}
    return {key: value for key, value in known.items() if value is not UNSET}


def _when(accepted: p.Accepted) -> str:
    text = f", number {accepted.position} in line" if accepted.position is not UNSET else ""
    if accepted.forecast is not UNSET and accepted.forecast.start_at is not UNSET:
        text += f", starts {relative(accepted.forecast.start_at, now())}"
    return text


def _forecast(here: Session, header: p.Submit, accepted: p.Accepted) -> None:
    if here.json:
        answer = {"accepted": True, "items": header.items, "input_bytes": header.input_bytes}
        write_json(answer | _outlook(accepted))
        return
    at = now()
    lines = [f"would be accepted: {counted(header.items)} items, {size(header.input_bytes)}"]
    if accepted.position is not UNSET:
        lines.append(f"position: {counted(accepted.position)}")
    if accepted.forecast is not UNSET:
        for label, moment in (
            ("starts", accepted.forecast.start_at),
            ("done", accepted.forecast.finish_at),
            ("at the latest", accepted.forecast.finish_by_90),
        ):
            if moment is not UNSET:
                lines.append(f"{label}: {told(moment, at)}")
    write("\n".join(lines) + "\n")
