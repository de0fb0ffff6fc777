"""How inputs come in: small ones with their header, large ones in pieces, retries from what is already here.

    Submit with input      ------------------------------------------> Submitted
    Submit, GoOn, Chunk..  Reserved -> spool, hashed, synced --------> Submitted
    Retry                  Reserved -> selected from the old job ----> Submitted

Rule 1: admission is decided on the header, before a byte is streamed; whoever got GoOn is not refused for room.
Rule 2: bytes are on disk, synced, before the record that relies on them; a stream that breaks off leaves nothing.
"""

from __future__ import annotations

import datetime as dt
import errno
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio
from msgspec import UNSET

from gpujobd import protocol, server, views
from gpujobd.connection import Connection
from gpujobd.core import inputs, model
from gpujobd.core.admission import Refused, find_submitted
from gpujobd.core.apply import job_of
from gpujobd.core.decide import decide
from gpujobd.core.events import AnyEvent, Reserved, Submitted
from gpujobd.core.inputs import Submission
from gpujobd.core.model import FINAL, S_NS
from gpujobd.journal import JournalDead
from gpujobd.outlooks import Outlooks
from gpujobd.protocol import ErrorCode
from gpujobd.spool import Choice, Incoming, InputMismatch, Spool, Tally, measure
from gpujobd.turns import Outcome, Turns

WRITERS_MAX: Final = 4  # threads that write inputs at a time
CHUNK_S: Final = 10.0  # between two pieces


class Upload(msgspec.Struct, kw_only=True):
    """An input on its way in."""

    submission: Submission
    reservation_id: int
    incoming: Incoming


class Submissions:
    """Requests that make jobs."""

    def __init__(
        self,
        turns: Turns,
        spool: Spool,
        outlooks: Outlooks,
        prepare: Callable[[model.Job], Awaitable[object]],
    ) -> None:
        self._turns = turns
        self._spool = spool
        self._outlooks = outlooks
        self._prepare = prepare
        self._writers = trio.CapacityLimiter(WRITERS_MAX)
        self._uploads: dict[Connection, dict[int, Upload]] = {}

    def submit(self, c: Connection, request: protocol.Submit) -> None:
        try:
            submission = _submission(request)
            if request.input is not None:
                _check_inline(request)
        except ValueError as error:
            c.fail(request.id, ErrorCode.BAD_INPUT, str(error))
            return
        assert c.nursery is not None
        if request.dry_run:
            c.nursery.start_soon(self._try, c, request.id, submission)
        elif request.input is not None:
            given = inputs.Submit(who=c.who, submission=submission, inline=request.input)
            self._turns.ask(given, lambda outcome: self._accepted(c, request.id, submission, outcome))
        else:
            c.nursery.start_soon(self._reserve, c, request.id, submission)

    async def _try(self, c: Connection, request_id: int, submission: Submission) -> None:
        """What would happen: decided for real, run ahead, then thrown away."""
        given = inputs.Submit(who=c.who, submission=submission, inline=b"\n")
        try:
            events = decide(self._turns.head, self._turns.rules, given, time.time_ns())
        except Refused as refusal:
            server.fail(c, request_id, refusal)
            return
        event = next((event for event in events if isinstance(event, Submitted)), None)
        outlook = await self._outlooks.of_extra(job_of(event)) if event else None
        c.finish(
            protocol.Accepted(
                id=request_id,
                job=0,
                forecast=views.forecast(outlook),
                position=outlook.position if outlook and outlook.position else UNSET,
            )
        )

    def _accepted(self, c: Connection, request_id: int, submission: Submission, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            server.fail(c, request_id, outcome)
            return
        job_id = _job_id(outcome) or find_submitted(self._turns.state, c.who, submission)
        c.finish(
            protocol.Accepted(id=request_id, job=job_id, forecast=views.forecast(self._outlooks.of(job_id)))
        )

    # --- streams ------------------------------------------------------------------------------------------------

    async def _reserve(self, c: Connection, request_id: int, submission: Submission) -> None:
        try:
            outcome = await self._turns.asked(inputs.Reserve(who=c.who, submission=submission))
        except (Refused, JournalDead) as error:
            server.fail(c, request_id, error)
            return
        reserved = next((event for event in outcome if isinstance(event, Reserved)), None)
        if reserved is None:  # said before, and the answer was lost
            self._accepted(c, request_id, submission, outcome)
            return
        incoming = await trio.to_thread.run_sync(self._spool.incoming, reserved.reservation_id)
        upload = Upload(
            submission=submission,
            reservation_id=reserved.reservation_id,
            incoming=incoming,
        )
        if c not in self._uploads:
            self._uploads[c] = {}
            c.on_close.append(lambda: self._hung_up(c))
        self._uploads[c][request_id] = upload
        c.owes_by = trio.current_time() + CHUNK_S
        c.send(protocol.GoOn(id=request_id))

    async def chunk(self, c: Connection, request: protocol.Chunk) -> None:
        """Take one piece; the connection reads no further until it is written."""
        upload = self._uploads.get(c, {}).get(request.id)
        if upload is None:
            raise protocol.FrameError(f"no submission {request.id} waits for input")
        if len(request.data) > protocol.CHUNK_BYTES_MAX:
            raise protocol.FrameError(f"a chunk has at most {protocol.CHUNK_BYTES_MAX} bytes")
        if not request.data:
            del self._uploads[c][request.id]
            await self._finish(c, request.id, upload)
            c.owes_by = trio.current_time() + CHUNK_S if self._uploads[c] else math.inf
        elif upload.incoming.tally.bytes + len(request.data) > upload.submission.input_bytes:
            self._give_up(c, request.id, ErrorCode.BAD_INPUT, "more bytes came than the header says")
        else:
            try:
                await trio.to_thread.run_sync(upload.incoming.write, request.data, limiter=self._writers)
            except OSError as error:
                self._give_up(c, request.id, *_disk(error))
            c.owes_by = trio.current_time() + CHUNK_S

    async def _finish(self, c: Connection, request_id: int, upload: Upload) -> None:
        header = upload.submission
        try:
            upload.incoming.tally.check(
                items=header.items,
                longest=header.item_bytes,
                size=header.input_bytes,
                sha256=header.input_sha256,
            )
            await trio.to_thread.run_sync(upload.incoming.settle, limiter=self._writers)
        except (InputMismatch, OSError) as error:
            code, message = (
                (ErrorCode.BAD_INPUT, str(error)) if isinstance(error, InputMismatch) else _disk(error)
            )
            self._drop(upload)
            c.fail(request_id, code, message)
            return
        given = inputs.Submit(who=c.who, submission=header, reservation_id=upload.reservation_id)
        try:
            outcome: Outcome = await self._turns.asked(given)
        except Refused as refusal:
            self._drop(upload)
            outcome = refusal
        except JournalDead as dead:
            outcome = dead
        self._accepted(c, request_id, header, outcome)

    def _give_up(self, c: Connection, request_id: int, code: str, message: str) -> None:
        upload = self._uploads[c].pop(request_id)
        self._drop(upload)
        c.fail(request_id, code, message)
        raise protocol.FrameError(
            message
        )  # the pieces that still come cannot be told from requests that are meant

    def _drop(self, upload: Upload) -> None:
        """Nobody will own it; the file goes when the release is a fact."""
        upload.incoming.close()
        self._turns.put(inputs.Release(reservation_id=upload.reservation_id))

    def _hung_up(self, c: Connection) -> None:
        for upload in self._uploads.pop(c, {}).values():
            self._drop(upload)

    # --- retries ------------------------------------------------------------------------------------------------

    async def retry(self, c: Connection, request: protocol.Retry, job: model.Job) -> None:
        """Make a new job of what a final one left undone."""
        if job.state not in FINAL:
            c.fail(
                request.id,
                ErrorCode.BAD_STATE,
                f"job {job.job_id} is {job.state}: only a final job can be retried",
            )
            return
        earlier = self._turns.state.book.submit_ids.get(c.who.uid, {}).get(request.submit_id, 0)
        known = self._turns.state.jobs.get(earlier)
        if known is not None and known.retry_of == job.job_id:  # said before, and the answer was lost
            c.finish(protocol.Accepted(id=request.id, job=earlier))
            return
        choice = Choice(
            job_id=job.job_id,
            failed_only=request.failed_items,
            results_bytes=job.checkpoint.results_bytes,
            errors_bytes=job.checkpoint.errors_bytes,
        )
        try:
            await self._prepare(job)
            tally = await trio.to_thread.run_sync(self._spool.weigh, choice, limiter=self._writers)
            if tally.items:
                await self._retry(c, request.id, _again(job, request, tally), choice)
            else:
                what = "no failed items" if request.failed_items else "no items left to do"
                c.fail(request.id, ErrorCode.BAD_STATE, f"job {job.job_id} has {what}")
        except (Refused, JournalDead) as error:
            server.fail(c, request.id, error)
        except FileNotFoundError:
            c.fail(request.id, ErrorCode.BAD_STATE, f"the input of job {job.job_id} is not kept any more")
        except OSError as error:
            c.fail(request.id, *_disk(error))

    async def _retry(self, c: Connection, request_id: int, header: Submission, choice: Choice) -> None:
        outcome = await self._turns.asked(inputs.Reserve(who=c.who, submission=header))
        room = next((event.reservation_id for event in outcome if isinstance(event, Reserved)), 0)
        if room:
            try:
                incoming = await trio.to_thread.run_sync(
                    self._spool.select, choice, room, limiter=self._writers
                )
                await trio.to_thread.run_sync(incoming.settle, limiter=self._writers)
                given = inputs.Submit(who=c.who, submission=header, reservation_id=room)
                outcome = await self._turns.asked(given)
            except BaseException:
                self._turns.put(inputs.Release(reservation_id=room))
                raise
        self._accepted(c, request_id, header, outcome)


def _submission(request: protocol.Submit) -> Submission:
    """Raises: ValueError for a word or a time that is none."""
    return Submission(
        submit_id=request.submit_id,
        handler=request.handler,
        items=request.items,
        input_bytes=request.input_bytes,
        input_sha256=request.input_sha256,
        item_bytes=request.item_bytes,
        tenant=request.tenant,
        name=request.name,
        params=request.params,
        priority=server.priority(request.priority),
        begin_ns=_ns(request.begin_at),
        deadline_ns=_ns(request.deadline_at),
        failures_max=request.failures_max,
    )


def _ns(moment: dt.datetime | None) -> int:
    if moment is None:
        return 0
    if moment.tzinfo is None:
        raise ValueError(f"the time {moment.isoformat()} has no zone")
    return max(1, round(moment.timestamp() * S_NS))


def _check_inline(request: protocol.Submit) -> None:
    """Raises: ValueError where the bytes are not what the header says."""
    data = request.input or b""
    if len(data) > protocol.INLINE_BYTES_MAX:
        raise ValueError(
            f"an input in the header has at most {protocol.INLINE_BYTES_MAX} bytes, not {len(data)}"
        )
    lines, longest, sha256 = measure(data)
    if (len(data), lines, sha256) != (request.input_bytes, request.items, request.input_sha256):
        raise ValueError("the bytes are not what the header says: length, lines or SHA-256 differ")
    if longest > request.item_bytes:
        raise ValueError(f"a line has {longest} bytes, the header says {request.item_bytes}")


def _again(job: model.Job, request: protocol.Retry, tally: Tally) -> Submission:
    """The header of a retry."""
    return Submission(
        submit_id=request.submit_id,
        handler=job.handler,
        items=tally.items,
        input_bytes=tally.bytes,
        input_sha256=tally.sha256,
        item_bytes=tally.longest,
        tenant=job.tenant,
        name=job.name,
        params=job.params,
        priority=job.priority,
        failures_max=job.failures_max,
        retry_of=job.job_id,
    )


def _job_id(outcome: list[AnyEvent]) -> int:
    return next((event.job_id for event in outcome if isinstance(event, Submitted)), 0)


def _disk(error: OSError) -> tuple[ErrorCode, str]:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (
        ErrorCode.DISK_LOW if full else ErrorCode.INTERNAL
    ), f"the input cannot be stored: {error.strerror}"
