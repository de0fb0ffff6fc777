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
from typing import Final, NoReturn

import msgspec
import trio
from msgspec import UNSET

from gpujobd import protocol, server, views
from gpujobd.connection import Connection
from gpujobd.core import inputs, model
from gpujobd.core.admission import find_submitted
from gpujobd.core.apply import job_of
from gpujobd.core.decide import decide
from gpujobd.core.events import AnyEvent, Reserved, Submitted
from gpujobd.core.inputs import Submission
from gpujobd.core.model import FINAL, S_NS
from gpujobd.core.refused import Refused
from gpujobd.journal import JournalDead
from gpujobd.outlooks import Outlooks
from gpujobd.protocol import ErrorCode
from gpujobd.spool import Choice, Incoming, InputMismatch, Spool, Tally, measure
from gpujobd.turns import Outcome, Turns

WRITERS_MAX: Final = 4  # threads that write inputs at a time
CHUNK_S: Final = 10.0  # between two pieces
UPLOAD_S: Final = 60.0  # for a whole input, and what its bytes take at the least rate: room is held meanwhile
UPLOAD_BYTES_S_MIN: Final = 100_000
SELECTIONS_MAX: Final = 2  # retries that read through an input at a time; writers must not wait for them
YEAR_MAX: Final = 2200  # nanoseconds since 1970 have 63 bits


class Upload(msgspec.Struct, kw_only=True):
    """An input on its way in."""

    submission: Submission
    place: trio.Semaphore  # of its uid; one is taken
    reservation_id: int = 0  # 0: not reserved yet
    incoming: Incoming | None = None  # None: not open yet
    piece_by: float = math.inf
    whole_by: float = math.inf
    over: bool = False


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
        self._selections = trio.CapacityLimiter(SELECTIONS_MAX)
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
            c.nursery.start_soon(self._try_in_turn, c, request.id, submission)
        elif request.input is not None:
            given = inputs.Submit(who=c.who, submission=submission, inline=request.input)
            self._turns.ask(given, lambda outcome: self._accepted(c, request.id, submission, outcome))
        else:
            c.nursery.start_soon(self._reserve, c, request.id, submission)

    async def _try_in_turn(self, c: Connection, request_id: int, submission: Submission) -> None:
        async with c.guest.labours:
            await self._try(c, request_id, submission)

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
        await c.guest.uploads.acquire()
        upload = Upload(submission=submission, place=c.guest.uploads)
        if c not in self._uploads:
            self._uploads[c] = {}
            c.on_close.append(lambda: self._hung_up(c))
        self._uploads[c][request_id] = upload  # from here on, hanging up gives everything back
        self._turns.ask(
            inputs.Reserve(who=c.who, submission=submission),
            lambda outcome: self._reserved(c, request_id, upload, outcome),
        )

    def _reserved(self, c: Connection, request_id: int, upload: Upload, outcome: Outcome) -> None:
        events = [] if isinstance(outcome, Exception) else outcome
        reserved = next((event for event in events if isinstance(event, Reserved)), None)
        if reserved is not None:
            upload.reservation_id = reserved.reservation_id
        if upload.over:  # the peer hung up meanwhile
            self._release(upload)
        elif reserved is None:  # refused; or said before, and the answer was lost
            self._forget(c, request_id)
            self._accepted(c, request_id, upload.submission, outcome)
        elif not c.leaving:  # else _hung_up will give it back
            assert c.nursery is not None
            c.nursery.start_soon(self._begin, c, request_id, upload)

    async def _begin(self, c: Connection, request_id: int, upload: Upload) -> None:
        try:
            upload.incoming = await trio.to_thread.run_sync(self._spool.incoming, upload.reservation_id)
        except OSError as error:
            self._forget(c, request_id)
            self._release(upload)
            c.fail(request_id, *_disk(error))
            return
        now = trio.current_time()
        upload.piece_by = now + CHUNK_S
        upload.whole_by = now + UPLOAD_S + upload.submission.input_bytes / UPLOAD_BYTES_S_MIN
        self._expect(c)
        c.send(protocol.GoOn(id=request_id))

    def _expect(self, c: Connection) -> None:
        """When the peer of these uploads must have sent something."""
        uploads = self._uploads.get(c, {}).values()
        c.owes_by = min((min(u.piece_by, u.whole_by) for u in uploads), default=math.inf)

    async def chunk(self, c: Connection, request: protocol.Chunk) -> None:
        """Take one piece; the connection reads no further until it is written."""
        upload = self._uploads.get(c, {}).get(request.id)
        if upload is None or upload.incoming is None:
            raise protocol.FrameError(f"no submission {request.id} waits for input")
        if len(request.data) > protocol.CHUNK_BYTES_MAX:
            raise protocol.FrameError(f"a chunk has at most {protocol.CHUNK_BYTES_MAX} bytes")
        if not request.data:
            await self._finish(c, request.id, upload, upload.incoming)
        elif upload.incoming.tally.bytes + len(request.data) > upload.submission.input_bytes:
            self._give_up(c, request.id, ErrorCode.BAD_INPUT, "more bytes came than the header says")
        else:
            try:
                await trio.to_thread.run_sync(upload.incoming.write, request.data, limiter=self._writers)
            except OSError as error:
                self._give_up(c, request.id, *_disk(error))
            upload.piece_by = trio.current_time() + CHUNK_S
        self._expect(c)

    async def _finish(self, c: Connection, request_id: int, upload: Upload, incoming: Incoming) -> None:
        header = upload.submission
        try:
            incoming.tally.check(
                items=header.items,
                longest=header.item_bytes,
                size=header.input_bytes,
                sha256=header.input_sha256,
            )
            await trio.to_thread.run_sync(incoming.settle, limiter=self._writers)
        except (InputMismatch, OSError) as error:
            code, message = (
                (ErrorCode.BAD_INPUT, str(error)) if isinstance(error, InputMismatch) else _disk(error)
            )
            self._forget(c, request_id)
            self._release(upload)
            c.fail(request_id, code, message)
            return
        self._forget(c, request_id)  # whatever the peer does now, the submission is carried to its end
        given = inputs.Submit(who=c.who, submission=header, reservation_id=upload.reservation_id)

        def answer(outcome: Outcome) -> None:
            if isinstance(outcome, Refused):
                self._release(upload)
            self._accepted(c, request_id, header, outcome)

        self._turns.ask(given, answer)

    def _give_up(self, c: Connection, request_id: int, code: str, message: str) -> NoReturn:
        """Raises: FrameError: the pieces that still come cannot be told from requests that are meant."""
        upload = self._forget(c, request_id)
        self._release(upload)
        c.fail(request_id, code, message)
        raise protocol.FrameError(message)

    def _forget(self, c: Connection, request_id: int) -> Upload:
        """It is no upload of this connection any more."""
        upload = self._uploads[c].pop(request_id)
        upload.over = True
        upload.place.release()
        return upload

    def _release(self, upload: Upload) -> None:
        """Nobody will own it; the file goes when the release is a fact."""
        if upload.incoming is not None:
            upload.incoming.close()
        if upload.reservation_id:
            self._turns.put(inputs.Release(reservation_id=upload.reservation_id))

    def _hung_up(self, c: Connection) -> None:
        for request_id in list(self._uploads[c]):
            self._release(self._forget(c, request_id))
        del self._uploads[c]

    # --- retries ------------------------------------------------------------------------------------------------

    async def retry(self, c: Connection, request: protocol.Retry, job: model.Job) -> None:
        """Make a new job of what a final one left undone."""
        async with c.guest.labours:
            await self._retry_once(c, request, job)

    async def _retry_once(self, c: Connection, request: protocol.Retry, job: model.Job) -> None:
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
            tally = await trio.to_thread.run_sync(self._spool.weigh, choice, limiter=self._selections)
            if tally.items:
                await self._retry(c, request.id, _again(job, request, tally), choice)
            else:
                what = "no failed items" if request.failed_items else "no items left to do"
                c.fail(request.id, ErrorCode.BAD_STATE, f"job {job.job_id} has {what}")
        except (Refused, JournalDead) as error:
            server.fail(c, request.id, error)
        except FileNotFoundError:
            c.fail(request.id, ErrorCode.BAD_STATE, f"the input of job {job.job_id} is not kept any more")
        except InputMismatch as damage:
            c.fail(request.id, ErrorCode.INTERNAL, str(damage))
        except OSError as error:
            c.fail(request.id, *_disk(error))

    async def _retry(self, c: Connection, request_id: int, header: Submission, choice: Choice) -> None:
        outcome = await self._turns.asked(inputs.Reserve(who=c.who, submission=header), undo=self._give_back)
        room = next((event.reservation_id for event in outcome if isinstance(event, Reserved)), 0)
        if not room:
            self._accepted(c, request_id, header, outcome)
            return
        try:
            await trio.to_thread.run_sync(self._spool.select, choice, room, limiter=self._selections)
        except BaseException:  # the peer hung up, or the disk is full: nobody will own it
            self._turns.put(inputs.Release(reservation_id=room))
            raise
        given = inputs.Submit(who=c.who, submission=header, reservation_id=room)

        def answer(outcome: Outcome) -> None:
            if isinstance(outcome, Refused):
                self._turns.put(inputs.Release(reservation_id=room))
            self._accepted(c, request_id, header, outcome)

        self._turns.ask(given, answer)

    def _give_back(self, events: list[AnyEvent]) -> None:
        for event in events:
            if isinstance(event, Reserved):
                self._turns.put(inputs.Release(reservation_id=event.reservation_id))


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
        notify=tuple(request.notify),
        notify_on=tuple(request.notify_on),
    )


def _ns(moment: dt.datetime | None) -> int:
    if moment is None:
        return 0
    if moment.tzinfo is None:
        raise ValueError(f"the time {moment.isoformat()} has no zone")
    if moment.year > YEAR_MAX:
        raise ValueError(f"the time {moment.isoformat()} is after the year {YEAR_MAX}")
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
        message=request.message,
        notify=tuple(request.notify) or job.notify,
        notify_on=tuple(request.notify_on) or job.notify_on,
    )


def _job_id(outcome: list[AnyEvent]) -> int:
    return next((event.job_id for event in outcome if isinstance(event, Submitted)), 0)


def _disk(error: OSError) -> tuple[ErrorCode, str]:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (
        ErrorCode.DISK_LOW if full else ErrorCode.INTERNAL
    ), f"the input cannot be stored: {error.strerror}"
