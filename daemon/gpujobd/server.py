"""The control socket: who may come in, and what is done for each request.

Rule 1: a place is taken before accept(), so that the descriptors of clients can never use up the daemon's.
Rule 2: one row a verb in `Server._verbs`; wishes go to `Turns`, reads are answered from `state` at once.
Rule 3: what a caller may not see does not exist for him: a foreign job and a missing one get the same answer.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import os
import resource
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Final

import trio
from msgspec import UNSET
from msgspec.structs import replace

from gpujobd import __version__, protocol, views
from gpujobd.access import Directory
from gpujobd.catalog import kind
from gpujobd.config import Config
from gpujobd.connection import PING_S, Connection, Connections
from gpujobd.core import inputs, model, policy
from gpujobd.core.apply import job_of
from gpujobd.core.events import AnyEvent, Submitted
from gpujobd.core.inputs import AnyInput, Who
from gpujobd.core.model import FINAL, JobState, State
from gpujobd.core.refused import Refused
from gpujobd.core.rights import allowed
from gpujobd.feed import Feed
from gpujobd.guests import CONNECTIONS_MAX as CONNECTIONS_PER_UID_MAX
from gpujobd.guests import STREAMS_MAX, Guest, Guests
from gpujobd.journal import JournalDead
from gpujobd.outlooks import Outlooks
from gpujobd.peer import Peer, peer, take_no_descriptors
from gpujobd.protocol import AnyRequest, ErrorCode
from gpujobd.spool import Spool
from gpujobd.submissions import Submissions
from gpujobd.supervisor import Supervisor
from gpujobd.turns import Outcome, Turns

log = logging.getLogger("gpujobd.server")

CONNECTIONS_MAX: Final = 512
CONNECTIONS_RESERVED: Final = 16  # the last ones are for administrators
SPOKEN_S: Final = 0.02
COMPLAIN_S: Final = 60.0  # about callers that were turned away: once in so long
JOBS_A_PASS: Final = 16  # shown between two looks at who else wants the loop: about half a millisecond
PAGE_BYTES: Final = 512 << 10  # of a page of jobs: names and parameters are their owners' choice
LOOK_EVERY_JOBS: Final = 2000  # a long list lets others have the loop in between
SURVEY_KEPT_NS: Final = 100_000_000
TENANTS_GAP_S: Final = 1.0  # between two lists that are pushed
EVENTS_GAP_S: Final = 0.1  # between two pieces of a stream that is not behind: a follower costs by the second
ANYTHING: Final = 0  # no job has this number
LOG_READ_BYTES: Final = 64 << 10

NO_NAMES: Final = protocol.Error(
    id=0, code=ErrorCode.INTERNAL, message="the host's user database does not answer"
)

Verb = Callable[[Connection, Any], Awaitable[None] | None]


class Server:
    """Answers requests. `turns` carries wishes; `feed`, `outlooks`, `spool` and `submissions` serve the rest."""

    def __init__(
        self,
        turns: Turns,
        config: Config,
        directory: Directory,
        feed: Feed,
        outlooks: Outlooks,
        spool: Spool,
        submissions: Submissions,
        supervisor: Supervisor,
        boot_id: str,
    ) -> None:
        self._turns = turns
        self._config = config
        self._directory = directory
        self._feed = feed
        self._outlooks = outlooks
        self._spool = spool
        self._submissions = submissions
        self._supervisor = supervisor
        self._boot_id = boot_id
        self._guests = Guests()
        self._connections = Connections()
        self._places = _places()
        self._complained_at = -math.inf
        self._accepting = trio.CancelScope()
        self._attending: dict[Connection, protocol.Attend] = {}  # the newest last: it is the one that counts
        self._watchers: dict[int, set[trio.Event]] = {}  # job id, or -id for its log, or ANYTHING
        self._verbs: dict[type, Verb] = {
            protocol.Ping: self._ping,
            protocol.Status: self._status,
            protocol.Submit: self._submit,
            protocol.Chunk: self._chunk,
            protocol.Retry: self._retry,
            protocol.List: self._list,
            protocol.Show: self._show,
            protocol.Last: self._last,
            protocol.Wait: self._wait,
            protocol.Watch: self._watch,
            protocol.Output: self._output,
            protocol.Log: self._log,
            protocol.Events: self._events,
            protocol.Cancel: self._wish,
            protocol.Pause: self._wish,
            protocol.Resume: self._wish,
            protocol.SetPriority: self._wish,
            protocol.First: self._wish,
            protocol.Remove: self._wish,
            protocol.Queue: self._wish,
            protocol.Handlers: self._handlers,
            protocol.Tenants: self._tenants,
            protocol.Devices: self._devices,
            protocol.Attend: self._attend,
        }

        self._surveyed: tuple[int, int, policy.Survey] | None = (
            None  # seq and time of the state that was looked at
        )

    @property
    def _state(self) -> State:
        return self._turns.state

    def reload(self, config: Config) -> None:
        self._config = config
        self._surveyed = None  # it was made by the rules of before
        self._wake_watchers(ANYTHING)

    async def hush(self) -> None:
        """The daemon is about to end: nothing more is asked, and what was asked is answered; then return."""
        self._connections.hush()
        self._accepting.cancel()
        await self._turns.answered()
        await trio.sleep(SPOKEN_S)  # tasks that waited for the answer say it now
        while not self._connections.taken:  # noqa: ASYNC110  # as in Turns.answered
            await trio.sleep(SPOKEN_S)

    # --- connections --------------------------------------------------------------------------------------------

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Accept and serve until cancelled."""
        take_no_descriptors(listener)  # what is sent before accept() counts, too
        places = trio.Semaphore(self._places)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._connections.run)
            with self._accepting:
                await self._accept(listener, places, nursery)

    async def _accept(
        self, listener: trio.socket.SocketType, places: trio.Semaphore, nursery: trio.Nursery
    ) -> None:
        while True:
            await places.acquire()
            try:
                sock, _ = await listener.accept()
            except OSError as error:  # the peer hung up in the queue, or the host is out of descriptors
                places.release()
                self._complain(f"accept: {error.strerror}")
                await trio.sleep(0.1)
                continue
            nursery.start_soon(self._serve, sock, places)

    async def _serve(self, sock: trio.socket.SocketType, places: trio.Semaphore) -> None:
        try:
            found = peer(sock)
            take_no_descriptors(sock)
            with self._guests.visiting(found.uid) as guest:
                who = await self._directory.who(found)
                if who is None:
                    _say_at_once(sock, NO_NAMES)
                    return
                refusal = self._turned_away(who, guest)
                if refusal is None:
                    connection = Connection(sock, found, who, guest, self._dispatch, self._connections)
                    await connection.run(lambda hello: self._welcome(hello, found))
                else:
                    _say_at_once(sock, refusal)
        except OSError as error:
            log.debug("a connection ended before it began: %s", error)
        finally:
            sock.close()
            places.release()

    def _turned_away(self, who: Who, guest: Guest) -> protocol.Error | None:
        """Why not; said BEFORE a word is read: who is turned away must not hold a place for a moment."""
        if who.admin:
            return None
        for current, limit, whose in (
            (guest.connections, CONNECTIONS_PER_UID_MAX, "your"),
            (len(self._guests), self._places - _reserved(self._places), "all"),
        ):
            if current > limit:
                message = f"{limit} of {limit} of {whose} connections are in use"
                self._complain(f"uid {who.uid} was turned away: {message}")
                code = ErrorCode.TOO_MANY_CONNECTIONS
                return protocol.Error(id=0, code=code, message=message, limit=limit, current=limit)
        return None

    def _complain(self, message: str) -> None:
        """Warn, but not as often as a caller wants."""
        if trio.current_time() - self._complained_at >= COMPLAIN_S:
            self._complained_at = trio.current_time()
            extra = kind("callers_turned_away")
            log.warning("%s (said at most once in %.0f s)", message, COMPLAIN_S, extra=extra)

    def _welcome(self, hello: protocol.Hello, found: Peer) -> protocol.Welcome | protocol.Error:
        if protocol.VERSION not in hello.versions:
            offered = ", ".join(map(str, hello.versions[:8])) or "none"
            message = f"protocol versions offered: {offered}; this daemon speaks {protocol.VERSION}"
            return protocol.Error(id=0, code=ErrorCode.BAD_REQUEST, message=message)
        return protocol.Welcome(protocol.VERSION, f"gpujobd {__version__}", self._boot_id, found.uid)

    def _dispatch(self, connection: Connection, request: AnyRequest) -> Awaitable[None] | None:
        who = self._directory.known(connection.peer)
        if who is not None:
            connection.who = who
        elif not isinstance(request, protocol.Chunk):  # that was admitted with its header
            return self._dispatch_anew(connection, request)
        return self._verbs[type(request)](connection, request)

    async def _dispatch_anew(self, c: Connection, request: Any) -> None:
        """The same, once it is known again what the caller may do. Only his own next request waits for that."""
        if not await self._renew(c):
            c.fail(request.id, NO_NAMES.code, NO_NAMES.message)
        elif (pending := self._verbs[type(request)](c, request)) is not None:
            await pending

    async def _renew(self, c: Connection) -> bool:
        """Whether the caller's rights are those of the last minute now."""
        who = await self._directory.who(c.peer)
        if who is not None:
            c.who = who
        return who is not None

    # --- wishes -------------------------------------------------------------------------------------------------

    def _wish(self, c: Connection, request: Any) -> None:
        try:
            given = _input_of(request, c.who)
        except ValueError as error:
            c.fail(request.id, ErrorCode.BAD_REQUEST, str(error))
            return

        def answer(outcome: Outcome) -> None:
            if isinstance(outcome, Exception):
                fail(c, request.id, outcome)
            else:
                c.finish(protocol.Done(id=request.id))

        self._turns.ask(given, answer)

    def _attend(self, c: Connection, request: protocol.Attend) -> None:
        def answer(outcome: Outcome) -> None:
            if isinstance(outcome, Exception):
                fail(c, request.id, outcome)
            else:
                self._attends(c, request)
                c.finish(protocol.Done(id=request.id))

        self._turns.ask(_attendance(request, c.who), answer)

    def _attends(self, c: Connection, request: protocol.Attend) -> None:
        again = self._attending.pop(c, None) is not None
        self._attending[c] = request
        if c.leaving:
            self._left(c)
        elif not again:
            c.on_close.append(lambda: self._left(c))

    def _left(self, c: Connection) -> None:
        """Of several notifiers, such as one and that which takes its place, the newest that is left counts."""
        if self._attending.pop(c, None) is None:
            return
        if self._attending:
            other, said = next(reversed(self._attending.items()))
            self._turns.put(_attendance(said, other.who))
        else:
            self._turns.put(inputs.Leave())

    def _submit(self, c: Connection, request: protocol.Submit) -> None:
        self._submissions.submit(c, request)

    def _chunk(self, c: Connection, request: protocol.Chunk) -> Awaitable[None]:
        return self._submissions.chunk(c, request)

    def _retry(self, c: Connection, request: protocol.Retry) -> None:
        job = self._visible("retry", c, request.id, request.job)
        if job is not None:
            self._task(c, self._submissions.retry, request, job)

    def _task(self, c: Connection, run: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Answer in a task of the connection, so that its other requests go on."""
        assert c.nursery is not None
        c.nursery.start_soon(run, c, *args)

    def _read_task(self, c: Connection, run: Callable[..., Awaitable[None]], *args: Any) -> None:
        """The same for what costs or weighs something: a few at a time of one uid, with room for the answer."""
        self._task(c, self._in_turn, run, *args)

    async def _in_turn(self, c: Connection, run: Callable[..., Awaitable[None]], *args: Any) -> None:
        while True:
            await c.room()
            async with c.guest.reads:
                if c.has_room:
                    await run(c, *args)
                    return

    def _stream_task(self, c: Connection, run: Callable[..., Awaitable[None]], request: Any) -> None:
        """The same for what may last for ever."""
        if c.guest.streams >= STREAMS_MAX and not c.who.admin:
            message = f"{STREAMS_MAX} of {STREAMS_MAX} of your waits and subscriptions are open"
            code = ErrorCode.TOO_MANY_REQUESTS
            c.fail(request.id, code, message, limit=STREAMS_MAX, current=c.guest.streams)
            return
        c.guest.streams += 1  # at once: the next request may be here before the task begins
        self._task(c, self._in_stream, run, request)

    async def _in_stream(self, c: Connection, run: Callable[..., Awaitable[None]], request: Any) -> None:
        try:
            await run(c, request)
        finally:
            c.guest.streams -= 1

    # --- reads --------------------------------------------------------------------------------------------------

    def _visible(self, verb: str, c: Connection, request_id: int, job_id: int) -> model.Job | None:
        """The job, if the caller may do that with it; else he is told that he may not, or that there is none."""
        job = self._state.jobs.get(job_id)
        if job is not None and allowed(verb, c.who, job):
            return job
        if job is not None and allowed("show", c.who, job):
            c.fail(
                request_id,
                ErrorCode.FORBIDDEN,
                f"job {job_id} is not yours: {verb} takes its owner or an administrator",
            )
            return None
        c.fail(request_id, ErrorCode.NO_SUCH_JOB, f"no job {job_id}")
        return None

    async def _still(self, verb: str, c: Connection, request_id: int, job_id: int) -> bool:
        """Whether somebody who follows a job may go on; else he is told. A job that was removed ends by itself."""
        if not await self._renew(c):
            c.fail(request_id, NO_NAMES.code, NO_NAMES.message)
            return False
        return job_id not in self._state.jobs or self._visible(verb, c, request_id, job_id) is not None

    def _view(self, who: Who, job: model.Job) -> protocol.Job:
        reason = self._reason(job) if job.state in (JobState.QUEUED, JobState.PAUSED) else None
        outlook = self._outlooks.of(job.job_id)
        told = bool(job.notify or job.notify_on) and allowed("see_notify", who, job)
        return views.job(self._state, job, reason, self._directory.name, outlook, told=told)

    def _reason(self, job: model.Job) -> tuple[model.Reason, str]:
        """Why a job waits. One look at everybody who waits serves all jobs shown of the same state."""
        if job.state is JobState.PAUSED:
            return policy.held_reason(job)
        seen = self._surveyed
        if seen is None or seen[0] != self._state.seq or time.time_ns() - seen[1] > SURVEY_KEPT_NS:
            now_ns = time.time_ns()
            found = policy.survey(self._state, self._turns.rules, now_ns)
            seen = self._surveyed = (self._state.seq, now_ns, found)
        return policy.waiting_reason(self._state, self._turns.rules, job, seen[1], seen[2])

    def _ping(self, c: Connection, request: protocol.Ping) -> None:
        c.finish(protocol.Pong(id=request.id, program=f"gpujobd {__version__}", seq=self._state.seq))

    def _show(self, c: Connection, request: protocol.Show) -> None:
        job = self._visible("show", c, request.id, request.job)
        if job is not None:
            c.finish(protocol.OneJob(id=request.id, job=self._view(c.who, job)))

    def _last(self, c: Connection, request: protocol.Last) -> None:
        mine = self._state.book.submit_ids.get(c.who.uid, {}).values()
        job = self._state.jobs.get(max(mine, default=0))
        if job is None:  # the newest was removed
            job = self._state.jobs.get(max((i for i in mine if i in self._state.jobs), default=0))
        if job is not None:
            c.finish(protocol.OneJob(id=request.id, job=self._view(c.who, job)))
            return
        c.fail(request.id, ErrorCode.NO_SUCH_JOB, "you have submitted no job yet")

    def _list(self, c: Connection, request: protocol.List) -> None:
        if strange := sorted({*request.states} - {*JobState}):
            message = f"there is no state {strange[0]!r}; there are: {', '.join(JobState)}"
            c.fail(request.id, ErrorCode.BAD_REQUEST, message)
            return
        self._read_task(c, self._list_page, request)

    async def _list_page(self, c: Connection, request: protocol.List) -> None:
        limit = max(1, min(request.limit, protocol.PAGE_JOBS_MAX))
        page: list[protocol.Job] = []
        size = onward = 0
        async with contextlib.aclosing(self._each_job(newest=request.newest)) as jobs:
            async for job in jobs:
                if not _wanted(job, request, c.who):
                    continue
                if len(page) == limit or size > PAGE_BYTES:
                    onward = page[-1].id
                    break
                page.append(self._view(c.who, job))
                size += protocol.size(page[-1])
                if len(page) % JOBS_A_PASS == 0:
                    await trio.lowlevel.checkpoint()
        c.finish(protocol.Jobs(id=request.id, jobs=page, seq=self._state.seq, next=onward))

    async def _each_job(self, *, newest: bool = False) -> AsyncGenerator[model.Job, None]:
        """Every job there is now, with pauses in which others get the loop, and jobs may go."""
        ids = list(self._state.jobs)
        for looked, job_id in enumerate(reversed(ids) if newest else ids, 1):
            if looked % LOOK_EVERY_JOBS == 0:
                await trio.lowlevel.checkpoint()
            job = self._state.jobs.get(job_id)
            if job is not None:
                yield job

    async def _views(self, who: Who, jobs: Iterable[model.Job]) -> list[protocol.Job]:
        """As many of them as fit a page."""
        page: list[protocol.Job] = []
        size = 0
        for job in jobs:
            if len(page) == protocol.PAGE_JOBS_MAX or size > PAGE_BYTES:
                break
            page.append(self._view(who, job))
            size += protocol.size(page[-1])
            if len(page) % JOBS_A_PASS == 0:
                await trio.lowlevel.checkpoint()
        return page

    def _status(self, c: Connection, request: protocol.Status) -> None:
        self._task(c, self._fresh_status, request)

    async def _fresh_status(self, c: Connection, request: protocol.Status) -> None:
        await self._outlooks.fresh()
        await self._in_turn(c, self._status_table, request)

    async def _status_table(self, c: Connection, request: protocol.Status) -> None:
        waiting, queued, paused = [], 0, 0
        async for job in self._each_job():
            if job.state is JobState.QUEUED:
                queued += 1
                if allowed("show", c.who, job):
                    waiting.append(job)
            elif job.state is JobState.PAUSED and allowed("show", c.who, job):
                paused += 1
        first = heapq.nsmallest(
            protocol.PAGE_JOBS_MAX, waiting, key=lambda job: self._outlooks.rank(job.job_id)
        )
        shown = await self._views(c.who, first)
        running = [
            job
            for device in self._state.devices.values()
            if device.lease and allowed("show", c.who, job := self._state.jobs[device.lease.job_id])
        ]
        c.finish(
            protocol.StatusTable(
                id=request.id,
                switches=views.switches(self._state),
                devices=self._device_views(c.who, brief=True),
                running=[self._view(c.who, job) for job in running],
                waiting=[job for job in shown if job.state == JobState.QUEUED],
                paused=paused,
                queued_in_all=queued,
            )
        )

    def _output(self, c: Connection, request: protocol.Output) -> None:
        job = self._visible("output", c, request.id, request.job)
        if job is not None:
            self._read_task(c, self._hand_out, request, job)

    async def _hand_out(self, c: Connection, request: protocol.Output, job: model.Job) -> None:
        counted = job.checkpoint.errors_bytes if request.errors else job.checkpoint.results_bytes
        try:
            fd = await trio.to_thread.run_sync(
                lambda: self._spool.open_output(job.job_id, errors=request.errors)
            )
        except OSError as error:
            c.fail(request.id, ErrorCode.INTERNAL, f"the output cannot be opened: {error.strerror}")
        else:
            c.finish(protocol.File(id=request.id, bytes=counted), fd)

    def _handlers(self, c: Connection, request: protocol.Handlers) -> None:
        c.finish(protocol.HandlerList(id=request.id, handlers=views.handlers(self._state, self._config)))

    def _tenants(self, c: Connection, request: protocol.Tenants) -> None:
        if request.follow:
            self._stream_task(c, self._follow_tenants, request)
        else:
            self._read_task(c, self._tenant_list, request)

    async def _tenant_list(self, c: Connection, request: protocol.Tenants) -> None:
        c.finish(self._tenant_reply(c, request.id))

    def _tenant_reply(self, c: Connection, request_id: int) -> protocol.TenantList:
        return protocol.TenantList(
            id=request_id,
            tenants=views.tenants(self._state, self._config, c.who),
            you=views.usage(self._state, self._turns.rules, c.who, time.time_ns()),
            accuracy=views.accuracy(self._state.accuracy),
        )

    def _devices(self, c: Connection, request: protocol.Devices) -> None:
        self._task(c, self._device_list, request)

    async def _device_list(self, c: Connection, request: protocol.Devices) -> None:
        await self._supervisor.seen_lately()
        c.finish(protocol.DeviceList(id=request.id, devices=self._device_views(c.who)))

    def _device_views(self, who: Who, *, brief: bool = False) -> list[protocol.DeviceView]:
        def sees(job: model.Job) -> bool:
            return allowed("show", who, job)

        state, hardware = self._state, self._supervisor.hardware
        devices = state.devices.values()
        names = self._directory.name if who.admin else None
        return [views.device(d, sees, state, hardware(d.name), names, brief=brief) for d in devices]

    # --- streams ------------------------------------------------------------------------------------------------

    def follow(self, facts: list[tuple[int, AnyEvent]]) -> None:
        """Wake those who wait for a job that changed, and those who wait for any."""
        self._wake_watchers(ANYTHING)
        for _, event in facts:
            job_id = getattr(event, "job_id", 0)
            if job_id in self._watchers:
                self._wake_watchers(job_id)

    async def _follow_tenants(self, c: Connection, request: protocol.Tenants) -> None:
        while await self._renew(c):
            with self._watching(ANYTHING) as changed:
                c.send(self._tenant_reply(c, request.id))
                await c.room()
                await trio.sleep(TENANTS_GAP_S)
                await _or_alive(c, request.id, changed)
        c.fail(request.id, NO_NAMES.code, NO_NAMES.message)

    def log_grew(self, job_id: int) -> None:
        self._wake_watchers(-job_id)

    def _wake_watchers(self, key: int) -> None:
        for waiter in self._watchers.pop(key, ()):
            waiter.set()

    @contextlib.contextmanager
    def _watching(self, *keys: int) -> Iterator[trio.Event]:
        """An event that is set at the next change of one of the jobs (or, by -id, logs)."""
        event = trio.Event()
        for key in keys:
            self._watchers.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            for key in keys:
                waiters = self._watchers.get(key)
                if waiters is not None:
                    waiters.discard(event)
                    if not waiters:
                        del self._watchers[key]

    def _wait(self, c: Connection, request: protocol.Wait) -> None:
        if len(request.jobs) > protocol.PAGE_JOBS_MAX:
            limit, asked = protocol.PAGE_JOBS_MAX, len(request.jobs)
            message = f"{asked} jobs were named, one request waits for at most {limit}"
            c.fail(request.id, ErrorCode.BAD_REQUEST, message, limit=limit, current=asked)
        elif all(self._visible("wait", c, request.id, job_id) for job_id in request.jobs):
            self._stream_task(c, self._wait_final, request)

    async def _wait_final(self, c: Connection, request: protocol.Wait) -> None:
        while open_jobs := [
            i for i in request.jobs if (j := self._state.jobs.get(i)) and j.state not in FINAL
        ]:
            with self._watching(*open_jobs) as changed:
                await _or_alive(c, request.id, changed)
        for job_id in request.jobs:
            if not await self._still("wait", c, request.id, job_id):
                return
        await self._in_turn(c, self._ended, request)

    async def _ended(self, c: Connection, request: protocol.Wait) -> None:
        left = [job for i in request.jobs if (job := self._state.jobs.get(i))]
        shown = await self._views(c.who, left)
        if len(shown) < len(
            left
        ):  # people's words take more than a page: the ends of all jobs are what counts
            shown = [replace(self._view(c.who, job), params=UNSET, reason_detail=UNSET) for job in left]
        c.finish(protocol.Jobs(id=request.id, jobs=shown, seq=self._state.seq))

    def _watch(self, c: Connection, request: protocol.Watch) -> None:
        job = self._visible("watch", c, request.id, request.job)
        if job is not None:
            self._stream_task(c, self._watch_job, request)

    async def _watch_job(self, c: Connection, request: protocol.Watch) -> None:
        while await self._still("watch", c, request.id, request.job):
            job = self._state.jobs.get(request.job)
            if job is None:
                c.finish(protocol.Done(id=request.id))
                return
            with self._watching(request.job) as changed:
                c.send(protocol.JobChanged(id=request.id, job=self._view(c.who, job)))
                if job.state in FINAL:
                    c.finish(protocol.Done(id=request.id))
                    return
                await c.room()
                await _or_alive(c, request.id, changed)

    def _log(self, c: Connection, request: protocol.Log) -> None:
        job = self._visible("log", c, request.id, request.job)
        if job is not None:
            self._stream_task(c, self._read_log, request)

    async def _read_log(self, c: Connection, request: protocol.Log) -> None:
        offset = 0
        while True:
            job = self._state.jobs.get(request.job)
            last = job is None or job.state in FINAL or not request.follow
            with self._watching(request.job, -request.job) as grown:
                try:
                    piece = await trio.to_thread.run_sync(
                        self._spool.read_log, request.job, offset, LOG_READ_BYTES
                    )
                except OSError as error:
                    c.fail(request.id, ErrorCode.INTERNAL, f"the log cannot be read: {error.strerror}")
                    return
                if not await self._still("log", c, request.id, request.job):
                    return
                if piece:
                    offset += len(piece)
                    c.send(protocol.LogPiece(id=request.id, data=piece))
                    await c.room()
                elif last:
                    break
                else:
                    await _or_alive(c, request.id, grown)
        c.finish(protocol.Done(id=request.id))

    def _events(self, c: Connection, request: protocol.Events) -> None:
        if request.job and self._visible("see_event", c, request.id, request.job) is None:
            return
        self._stream_task(c, self._stream, request)

    async def _stream(self, c: Connection, request: protocol.Events) -> None:
        cursor = request.since - 1 if request.since else self._feed.seq
        if cursor + 1 < self._feed.first_seq:
            c.send(protocol.Gap(id=request.id, first_seq=self._feed.first_seq))
            cursor = self._feed.first_seq - 1
        end = self._feed.seq
        while request.follow or cursor < end:
            if not await self._renew(c):
                c.fail(request.id, NO_NAMES.code, NO_NAMES.message)
                return
            next_at = trio.current_time() + EVENTS_GAP_S
            cursor = await self._send_events(c, request, cursor)
            await c.room()
            if request.follow and cursor >= self._feed.seq:
                await _or_alive(c, request.id, self._feed.grown(cursor))
                await trio.sleep_until(next_at)
        c.finish(protocol.Done(id=request.id))

    async def _send_events(self, c: Connection, request: protocol.Events, cursor: int) -> int:
        """Send some of what comes after `cursor`; how far that was."""
        async with c.guest.reads:
            found = await self._feed.after(cursor)
            if not found:
                return max(cursor, self._feed.seq)  # numbers that fsck gave up
            if found[0][0] > cursor + 1:
                c.send(protocol.Gap(id=request.id, first_seq=found[0][0]))
            for seq, event in found:
                if self._sees_event(c.who, event, request.job):
                    told, frank = self._sees_notify(c.who, event), self._hears_workers(c.who, event)
                    shown = views.event(event, told=told, frank=frank)
                    c.send(protocol.EventSeen(id=request.id, seq=seq, event=shown))
            return found[-1][0]

    def _sees_event(self, who: Who, event: AnyEvent, only_job: int) -> bool:
        job_id = getattr(event, "job_id", 0)
        if only_job and job_id != only_job:
            return False
        if who.admin or who.observer:
            return True
        gone = self._state.removed.get(job_id)
        if gone is not None:
            return gone.owner == who.uid
        job = self._state.jobs.get(job_id)
        return job is not None and allowed("see_event", who, job)

    def _sees_notify(self, who: Who, event: AnyEvent) -> bool:
        """Whether the event is shown with whom it is to be told to; the job may be removed by now."""
        if not isinstance(event, Submitted) or not (event.notify or event.notify_on):
            return False
        return allowed("see_notify", who, job_of(event))

    def _hears_workers(self, who: Who, event: AnyEvent) -> bool:
        """Whether the event is shown in the words of workers: to administrators, and to who may read the job's log."""
        if who.admin or not views.in_words_of_workers(event):
            return True
        job = self._state.jobs.get(getattr(event, "job_id", 0))
        return job is not None and allowed("log", who, job)


async def _or_alive(c: Connection, request_id: int, event: trio.Event) -> None:
    """Wait for the event; every PING_S without it, show the peer that the stream lives."""
    while not event.is_set():
        with trio.move_on_after(PING_S) as waited:
            await event.wait()
        if waited.cancelled_caught:
            c.send(protocol.Alive(id=request_id))


def _places() -> int:
    """How many connections there may be: descriptors must be left for the journal, the workers and the inputs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= 4 * CONNECTIONS_MAX:
        return CONNECTIONS_MAX
    places = max(8, min(CONNECTIONS_MAX, limit // 4))
    extra = kind("few_connections")
    log.warning("only %d connections at a time: RLIMIT_NOFILE is %d", places, limit, extra=extra)
    return places


def _reserved(places: int) -> int:
    """How many of the places are for administrators."""
    return min(CONNECTIONS_RESERVED, places // 4)


def _say_at_once(sock: trio.socket.SocketType, refusal: protocol.Error) -> None:
    """An empty socket takes a frame without waiting; a peer that is gone already is no loss."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(sock.fileno())) as now:
        now.setblocking(False)
        now.send(protocol.frame(refusal))


def fail(c: Connection, request_id: int, error: Exception) -> None:
    """Answer with what went wrong."""
    match error:
        case Refused():
            known = ("limit", error.limit), ("current", error.current), ("retry_after_s", error.retry_after_s)
            figures = {name: figure for name, figure in known if figure is not None}
            c.fail(request_id, error.code, error.message, **figures)
        case JournalDead():
            message = "the journal cannot be written: whether this was kept, the next start knows"
            c.fail(request_id, ErrorCode.NOT_ACCEPTED, message)
        case _:
            raise error


def _wanted(job: model.Job, request: protocol.List, who: Who) -> bool:
    """Whether a list shows the job: the caller's filters, then his rights."""
    if request.after and (job.job_id >= request.after if request.newest else job.job_id <= request.after):
        return False
    if request.states and job.state not in request.states:
        return False
    if request.tenant and job.tenant != request.tenant:
        return False
    if request.handler and job.handler != request.handler:
        return False
    if request.mine and job.owner != who.uid:
        return False
    if request.changed_since and job.changed_seq <= request.changed_since:
        return False
    return allowed("show", who, job)


def _attendance(request: protocol.Attend, who: Who) -> inputs.Attend:
    return inputs.Attend(
        who=who,
        names=tuple(request.names),
        admin_names=tuple(request.admin_names),
        url_hosts=tuple(request.url_hosts),
        mail_domains=tuple(request.mail_domains),
    )


def priority(word: str) -> model.Priority:
    """Raises: ValueError for a word that is no level."""
    try:
        return model.Priority[word.upper()]
    except KeyError:
        raise ValueError(f"priority is high, normal or low, not {word!r}") from None


def _queue_verb(word: str) -> inputs.QueueVerb:
    """Raises: ValueError for a word that is none."""
    if word not in {*inputs.QueueVerb}:
        raise ValueError(f"queue takes {', '.join(inputs.QueueVerb)}, not {word!r}")
    return inputs.QueueVerb(word)


def _input_of(request: AnyRequest, who: Who) -> AnyInput:
    """The wish that a request stands for. Raises: ValueError for a word that is none."""
    match request:
        case protocol.Cancel():
            return inputs.Cancel(who=who, job_id=request.job, message=request.message)
        case protocol.Pause():
            return inputs.Pause(who=who, job_id=request.job, message=request.message)
        case protocol.Resume():
            return inputs.Resume(who=who, job_id=request.job, message=request.message)
        case protocol.SetPriority():
            return inputs.SetPriority(
                who=who, job_id=request.job, priority=priority(request.priority), message=request.message
            )
        case protocol.First():
            return inputs.MoveFirst(who=who, job_id=request.job, message=request.message)
        case protocol.Remove():
            return inputs.Remove(who=who, job_id=request.job, message=request.message)
        case protocol.Queue():
            return inputs.SwitchQueue(who=who, verb=_queue_verb(request.action), message=request.message)
        case _:
            raise AssertionError(request)
