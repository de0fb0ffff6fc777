"""The daemon put together: recover, serve, stop.

    recover:  configuration -> journal -> state -> socket -> devices -> Start -> READY
    serve:    turns, writer, server, supervisor, outlooks, janitor, watchdog: one nursery, one fate
    stop:     Stop -> leases yield -> workers end -> last snapshot -> seal

Rule 1: nothing is answered before replay is done and what the last run left has been settled by `Start`.
Rule 2: a bug or a dead journal ends the process; systemd starts it again and replay restores it. Nobody limps on.

Exit status: 0 stopped as asked; 1 a bug, or another daemon holds the state; 75 the journal could not be written
(a restart may help); 78 configuration or journal refused (a restart does not help).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import os
import resource
import signal
import socket
import stat
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import trio

from gpujobd import __version__, config, report
from gpujobd.access import Directory
from gpujobd.config import Config, ConfigError
from gpujobd.core import inputs, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.events import AnyEvent, Checkpointed, ReservationReleased, Reserved, Submitted, decode
from gpujobd.core.model import Job, State
from gpujobd.feed import Feed
from gpujobd.janitor import Janitor
from gpujobd.journal import Journal, JournalBusyError, JournalDead, JournalError, Recovered
from gpujobd.notify import Notifier
from gpujobd.outlooks import Outlooks
from gpujobd.server import Server
from gpujobd.snapfile import SnapshotDamagedError
from gpujobd.spool import Spool
from gpujobd.submissions import Submissions
from gpujobd.supervisor import Supervisor, find_devices
from gpujobd.turns import Turns
from gpujobd.writer import Writer

log = logging.getLogger("gpujobd")

EX_TEMPFAIL: Final = 75
EX_CONFIG: Final = 78
BACKLOG: Final = 1024
DESCRIPTORS: Final = 65_536
SWITCH_S: Final = 0.0005  # a thread back from a sync takes the interpreter this soon; Python's 5 ms would be most of a commit
PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
)
"""Errors at the start that may be gone at the next one: systemd is to try again."""
LAST_ANSWERS_S: Final = 1.0  # a dead journal: time for "not accepted" to reach the clients
STUCK_S: Final = 20.0
STATUS_S: Final = 1.0
COLLECTIONS: Final = (20_000, 20, 20)
"""Thresholds of the garbage collector. What stays for long (jobs, events) cannot be in a cycle, and little else is
made in a burst of submissions: with Python's 700 it took a tenth of the time, and pauses of 70 ms were seen."""
OF_NO_WORKER: Final = (Submitted, Reserved, ReservationReleased, Checkpointed)
"""The events that come by the thousand; no worker has to do anything about them."""


class StartError(Exception):
    """The daemon cannot start; the message says why."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `gpujobd serve`."""

    config: Path | None = None
    state_dir: Path | None = None
    socket: Path | None = None


def replay(recovered: Recovered) -> State:
    """The state after the last event on disk."""
    seq = 0
    try:
        state = snapshot.load(recovered.snapshot[1]) if recovered.snapshot else State()
        for seq, record in recovered.records:
            apply(state, decode(record), seq)
    except msgspec.MsgspecError as error:
        where = f"record {seq}" if seq else "the snapshot"
        message = (
            f"{where} of the journal cannot be read by gpujobd {__version__}, a later one wrote it: {error}"
        )
        raise StartError(message, EX_CONFIG) from None
    return state


class Daemon:
    """One run. Made by `serve`."""

    def __init__(self, options: Options, cfg: Config, journal: Journal, recovered: Recovered) -> None:
        self._options = options
        self._config = cfg
        self._notifier = Notifier()
        self._journal = journal
        head = replay(recovered)
        state = snapshot.clone(head)
        self._turns = Turns(head, state, cfg.rules(), self._add)
        self._writer = Writer(journal, self._turns.committed)
        self._spool = Spool(state_dir(options) / "spool")
        self._directory = Directory(cfg)
        self._feed = Feed(journal, state.seq)
        self._outlooks = Outlooks(self._turns)
        self._janitor = Janitor(self._turns, journal, self._spool, cfg)
        self._supervisor = Supervisor(
            cfg,
            state=lambda: self._turns.state,
            report=self._turns.put,
            prepare=self._prepare,
            on_log=self._log_grew,
        )
        self._boot_id = uuid.uuid4().hex
        submissions = Submissions(self._turns, self._spool, self._outlooks, self._prepare)
        self._server = Server(
            self._turns,
            cfg,
            self._directory,
            self._feed,
            self._outlooks,
            self._spool,
            submissions,
            self._supervisor,
            self._boot_id,
        )
        self._turns.followers += [
            self._feed.follow,
            self._server.follow,
            self._janitor.follow,
            lambda facts: report.facts(self._turns.state, facts),
            self._poke,
        ]

    def _poke(self, facts: list[tuple[int, AnyEvent]]) -> None:
        if not all(isinstance(event, OF_NO_WORKER) for _, event in facts):
            self._supervisor.poke()

    def _add(self, records: list[bytes]) -> int:
        return self._writer.add(records)

    def _log_grew(self, job_id: int) -> None:
        self._server.log_grew(job_id)

    async def _prepare(self, job: Job) -> Path:
        await self._janitor.prepare(job)
        return self._spool.path(job.job_id)

    async def run(self) -> None:
        """Serve until a signal says stop. Raises: JournalDead, StartError."""
        await trio.to_thread.run_sync(self._sweep)
        devices = await find_devices(self._config)
        async with self._listener() as listener, trio.open_nursery() as nursery:
            nursery.start_soon(self._until_dead, self._writer.run)
            nursery.start_soon(self._turns.run)
            nursery.start_soon(self._directory.learn, {job.owner for job in self._turns.state.jobs.values()})
            await self._turns.asked(inputs.Start(boot_id=self._boot_id, version=__version__, devices=devices))
            nursery.start_soon(self._supervisor.run)
            nursery.start_soon(self._outlooks.run)
            nursery.start_soon(self._until_dead, self._janitor.run)
            nursery.start_soon(self._watchdog)
            nursery.start_soon(self._server.run, listener)
            self._notifier.send(READY=1, STATUS=self._status())
            log.info("ready: %d jobs, devices %s", len(self._turns.state.jobs), ", ".join(devices))
            await self._obey_signals()
            nursery.cancel_scope.cancel()

    def _sweep(self) -> None:
        """Delete files that a crash left without an owner."""
        state = self._turns.state
        held = {job.reservation_id for job in state.jobs.values() if job.reservation_id}
        swept = self._spool.sweep(state.jobs.keys(), held)
        if swept:
            log.info("deleted %d files and folders that no job owns", swept)

    # --- signals ------------------------------------------------------------------------------------------------

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            stopping = False
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    if number == signal.SIGHUP:
                        await self._reload()
                    elif not stopping:
                        stopping = True
                        log.info("%s: asking what runs to pause", signal.Signals(number).name)
                        nursery.start_soon(self._stop, nursery.cancel_scope)
                    else:
                        log.info("%s again: not waiting any longer", signal.Signals(number).name)
                        self._supervisor.hurry()

    async def _reload(self) -> None:
        self._notifier.send(RELOADING=1, MONOTONIC_USEC=int(trio.current_time() * 1e6))
        try:
            fresh = await trio.to_thread.run_sync(config.load, self._options.config)
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)  # noqa: TRY400  # no stack: it is no bug
        else:
            self._config = fresh
            low = self._turns.rules.disk_low
            self._turns.rules = msgspec.structs.replace(fresh.rules(), disk_low=low)
            for part in (self._directory, self._server, self._janitor, self._supervisor):
                part.reload(fresh)
            log.info("configuration reloaded: %d handlers", len(fresh.handlers))
        self._notifier.send(READY=1, STATUS=self._status())

    async def _stop(self, done: trio.CancelScope) -> None:
        """Pause at a batch boundary, then end."""
        self._notifier.send(STOPPING=1)
        await self._turns.asked(inputs.Stop())
        grace_s = self._config.file.worker.pause_grace_s
        with trio.move_on_after(grace_s) as grace:
            said_at = -math.inf
            while any(device.lease for device in self._turns.state.devices.values()):
                if trio.current_time() - said_at >= STATUS_S:
                    said_at = trio.current_time()
                    self._notifier.send(EXTEND_TIMEOUT_USEC=10_000_000, STATUS=self._status())
                await trio.sleep(0.05)
        if grace.cancelled_caught:
            log.warning(
                "a batch did not end within %.0f s: its worker is killed, the job resumes at its checkpoint",
                grace_s,
            )
        done.cancel()

    async def settle(self) -> None:
        """After a clean end: a snapshot, so that the next start replays nothing, and the seal."""
        await trio.to_thread.run_sync(self._settle)

    def _settle(self) -> None:
        state = self._turns.state
        try:
            self._journal.write_snapshot(state.seq, snapshot.chunks(state))
        except (OSError, SnapshotDamagedError) as error:
            log.warning("no last snapshot, the next start replays more: %s", error)
        self._journal.seal()

    async def _until_dead(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run what writes the journal; when that dies, tell everybody who waits, then end the process."""
        try:
            await run()
        except JournalDead as dead:
            self._turns.die(dead)
            await trio.sleep(LAST_ANSWERS_S)
            raise

    # --- systemd ------------------------------------------------------------------------------------------------

    async def _watchdog(self) -> None:
        period = self._notifier.watchdog_s / 3 or STATUS_S
        told = ""
        while True:
            ill = self._ill()
            if not ill:
                self._notifier.send(WATCHDOG=1, STATUS=self._status())
            elif ill != told:
                log.critical(
                    "%s for more than %.0f s: the watchdog is not told that all is well", ill, STUCK_S
                )
                self._notifier.send(STATUS=f"stuck: {ill}")
            told = ill
            await trio.sleep(min(period, STATUS_S))

    def _ill(self) -> str:
        """What has not moved for too long: the loop, a sync, the look at the workers; empty if all is well."""
        now = trio.current_time()
        sync = self._writer.sync_started_at
        if now - self._turns.turned_at >= STUCK_S:
            return "no turn was made"
        if sync is not None and now - sync >= STUCK_S:
            return "the disk has been syncing the journal"
        if now - self._supervisor.looked_at() >= STUCK_S:
            return "nobody looked at the workers"
        return ""

    def _status(self) -> str:
        state = self._turns.state
        running = [_progress(state, device.lease.job_id) for device in state.devices.values() if device.lease]
        return f"{', '.join(running) or 'idle'}; {state.book.open_jobs - len(running)} waiting" + (
            "; stopping" if state.stopping else ""
        )

    @contextlib.asynccontextmanager
    async def _listener(self) -> AsyncIterator[trio.socket.SocketType]:
        inherited = _inherited_socket()
        path = socket_path(self._options)
        sock = inherited or _bind(path)
        try:
            yield trio.socket.from_stdlib_socket(sock)
        finally:
            sock.close()
            if inherited is None:
                path.unlink(missing_ok=True)


def _progress(state: State, job_id: int) -> str:
    job = state.jobs[job_id]
    tried = job.checkpoint.done + job.checkpoint.failed
    return f"job {job_id} of {job.tenant} on {job.device}: {tried}/{job.items}"


def state_dir(options: Options) -> Path:
    return (options.state_dir or config.default_state_dir()).absolute()


def socket_path(options: Options) -> Path:
    from gpujobd.protocol import socket_paths  # noqa: PLC0415

    if options.socket is not None:
        return options.socket.absolute()
    return Path("/run/gpujobd/control.sock") if config.is_service() else Path(socket_paths()[0])


def _inherited_socket() -> socket.socket | None:
    """The listening socket that systemd made (sd_listen_fds(3))."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return None
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if count != 1:
        raise StartError(f"systemd passed {count} sockets, the unit should name one", EX_CONFIG)
    sock = socket.socket(fileno=3)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _bind(path: Path) -> socket.socket:
    """Listen at `path`, replacing what a dead daemon left there.

    Raises:
        StartError: a daemon answers there, or it is no socket.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o755)  # whatever the umask: who may do what is decided by uid, verb by verb
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartError(f"{path} is there and is no socket", EX_CONFIG)
        if _answers(path):
            raise StartError(f"another daemon answers at {path}")
        path.unlink()
    try:
        sock.bind(str(path))
    except OSError as error:
        raise StartError(f"{path}: {error.strerror or error}", EX_CONFIG) from None
    path.chmod(0o666)
    sock.listen(BACKLOG)
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # its line of callers is full, or it is not ours to call: somebody listens
            return True
        return True


def _limit_ourselves() -> None:
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_S)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(options: Options) -> int:
    """Run the daemon in the foreground; returns the exit status."""
    _limit_ourselves()
    try:
        cfg = config.load(options.config)
        folder = state_dir(options)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = Journal(folder / "journal")
        return _serve(options, cfg, journal)
    except ConfigError as error:
        log.critical("%s", error)
        return EX_CONFIG
    except StartError as error:
        log.critical("%s", error)
        return error.status
    except OSError as error:
        log.critical("%s", f"{error.filename}: {error.strerror}" if error.filename else error)
        return EX_TEMPFAIL if error.errno in PASSING else EX_CONFIG


def _serve(options: Options, cfg: Config, journal: Journal) -> int:
    status = 0
    gc.disable()  # replay makes no garbage that needs a collector, and millions of things for it to walk
    try:
        recovered = journal.open()
        daemon = Daemon(options, cfg, journal, recovered)
    except JournalBusyError as error:
        raise StartError(str(error)) from None
    except JournalError as error:
        log.critical("%s; `gpujobd fsck --state-dir %s` tells more", error, state_dir(options))
        return EX_CONFIG
    except JournalDead as dead:
        log.critical("the journal cannot be opened: %s", dead)
        return EX_TEMPFAIL
    del recovered
    gc.freeze()
    gc.set_threshold(*COLLECTIONS)
    gc.enable()
    try:
        trio.run(_run, daemon)
    except* JournalDead as dead:
        log.critical("the journal is dead, nothing of what was in flight was accepted: %s", _first(dead))
        status = EX_TEMPFAIL
    finally:
        journal.close()
    return status


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of a group that is no group itself."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _run(daemon: Daemon) -> None:
    await daemon.run()
    await daemon.settle()
