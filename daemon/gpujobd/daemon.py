"""The daemon put together: recover, serve, stop.

    recover:  configuration -> journal -> state -> socket -> devices -> Start -> READY
    serve:    turns, writer, server, supervisor, outlooks, janitor, watchdog: one nursery, one fate
    stop:     Stop -> leases yield -> last answers -> workers end -> last snapshot -> seal

Rule 1: nothing is answered before replay is done and what the last run left has been settled by `Start`.
Rule 2: a bug or a dead journal ends the process; systemd starts it again and replay restores it. Nobody limps on.
Rule 3: systemd hears of each stage in time: why a start was refused, how far a stop is, and that more time is needed.

Exit status: 0 stopped as asked; 1 a bug, or another daemon holds the state; 75 the journal could not be written
(a restart may help); 78 configuration or journal refused (a restart does not help).
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import stat
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import trio

from gpujobd import __version__, config, entries, report
from gpujobd.access import Directory
from gpujobd.catalog import kind
from gpujobd.config import Config
from gpujobd.core import inputs, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.events import AnyEvent, Checkpointed, ReservationReleased, Reserved, Submitted, decode
from gpujobd.core.model import Job, State
from gpujobd.disk import make_folders
from gpujobd.feed import Feed
from gpujobd.janitor import Janitor
from gpujobd.journal import Journal, JournalBusyError, JournalDead, JournalError, Recovered
from gpujobd.notify import Notifier
from gpujobd.outlooks import Outlooks
from gpujobd.server import Server
from gpujobd.settings import ConfigError
from gpujobd.snapfile import SnapshotDamagedError
from gpujobd.spool import Spool
from gpujobd.status import status
from gpujobd.submissions import Submissions
from gpujobd.supervisor import STOP_S, Supervisor, find_devices
from gpujobd.turns import Turns
from gpujobd.watchdog import Watchdog
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
ANSWERS_S: Final = 10.0  # at the end: for commits in flight, and for peers to take the answers
SETTLE_S: Final = 120.0  # for the last snapshot: what takes longer hangs
PAUSED_LOOK_S: Final = 0.05
LOG_LOOK_S: Final = 0.02  # while systemd's journal does not take all
CHANGES_MAX: Final = 20  # of a reload, in its entry
COLLECTIONS: Final = (20_000, 20, 20)
"""Thresholds of the garbage collector. What stays for long (jobs, events) cannot be in a cycle, and little else is
made in a burst of submissions: with Python's 700 it took a tenth of the time, and pauses of 70 ms were seen."""
OF_NO_WORKER: Final = (Submitted, Reserved, ReservationReleased, Checkpointed)
"""The events that come by the thousand; no worker has to do anything about them."""


class StartError(Exception):
    """The daemon cannot start; the message says why, `code` says it to systemd."""

    def __init__(self, message: str, status: int = 1, code: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


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

    def __init__(
        self,
        options: Options,
        cfg: Config,
        journal: Journal,
        recovered: Recovered,
        notifier: Notifier | None = None,
    ) -> None:
        began = time.monotonic()
        self._options = options
        self._config = cfg
        self._notifier = notifier or Notifier()
        self._trouble = ""  # the configuration that was refused
        self._reload_wanted = trio.Event()
        self._stopping = False
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
        self._watchdog = Watchdog(self._notifier, self._turns, self._writer, self._supervisor, self._status)
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
            self._outlooks.follow,
            self._janitor.follow,
            lambda facts: report.facts(self._turns.state, facts, self._directory.name),
            self._poke,
        ]
        self._replay_s = time.monotonic() - began

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
        self._notifier.send(STATUS="starting: looking for devices")
        devices = await find_devices(self._config)
        async with self._listener() as listener, trio.open_nursery() as nursery:
            nursery.start_soon(self._until_dead, self._writer.run)
            nursery.start_soon(self._turns.run)
            nursery.start_soon(self._directory.learn, {job.owner for job in self._turns.state.jobs.values()})
            await self._turns.asked(inputs.Start(boot_id=self._boot_id, version=__version__, devices=devices))
            nursery.start_soon(self._supervisor.run)
            nursery.start_soon(self._outlooks.run)
            nursery.start_soon(self._until_dead, self._janitor.run)
            nursery.start_soon(self._watchdog.run)
            nursery.start_soon(_flush_log)
            nursery.start_soon(self._server.run, listener)
            self._notifier.send(READY=1, STATUS=self._status())
            self._say_ready(devices)
            await self._obey_signals()
            nursery.cancel_scope.cancel()

    def _say_ready(self, devices: tuple[str, ...]) -> None:
        state = self._turns.state
        jobs, names = len(state.jobs), ", ".join(devices)
        extra = kind("ready", version=__version__, jobs=jobs, replay_s=round(self._replay_s, 3))
        message = "gpujobd %s is ready: %d jobs, %d of them open, replayed in %.2f s; devices %s"
        log.info(message, __version__, jobs, state.book.open_jobs, self._replay_s, names, extra=extra)

    def _sweep(self) -> None:
        """Delete files that a crash left without an owner."""
        state = self._turns.state
        held = {job.reservation_id for job in state.jobs.values() if job.reservation_id}
        swept = self._spool.sweep(state.jobs.keys(), held)
        if swept:
            log.info("deleted %d files and folders that no job owns", swept, extra=kind("files_swept"))

    # --- signals ------------------------------------------------------------------------------------------------

    async def _obey_signals(self) -> None:
        _on_stop_signals(
            lambda *_: None
        )  # for those that come when the receiver is gone: workers are being ended
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reload_when_wanted)
                async for number in signals:
                    name = signal.Signals(number).name
                    if number == signal.SIGHUP:
                        self._reload_wanted.set()
                    elif not self._stopping:
                        self._stopping = True
                        log.info("%s: asking what runs to pause", name, extra=kind("stopping"))
                        nursery.start_soon(self._stop, nursery.cancel_scope)
                    else:
                        log.info("%s again: not waiting any longer", name, extra=kind("hurried"))
                        self._supervisor.hurry()

    async def _reload_when_wanted(self) -> None:
        """One at a time; a configuration on a disk that hangs must not keep SIGTERM waiting."""
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            if not self._stopping:
                await self._reload()

    async def _reload(self) -> None:
        self._notifier.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        load = config.load
        try:
            fresh = await trio.to_thread.run_sync(load, self._options.config, abandon_on_cancel=True)
        except ConfigError as error:
            self._trouble = f"reload refused: {error}"
            message = "the configuration stays as it was: %s"
            log.error(message, error, extra=kind("config_refused"))  # noqa: TRY400  # no stack: it is no bug
        else:
            self._trouble = ""
            self._take(fresh)
        self._notifier.send(READY=1, STATUS=self._status())

    def _take(self, fresh: Config) -> None:
        """Go by this configuration from here on."""
        changes = config.changes(self._config, fresh)
        more = [f"and {len(changes) - CHANGES_MAX} more"] if len(changes) > CHANGES_MAX else []
        self._config = fresh
        low = self._turns.rules.disk_low
        self._turns.rules = msgspec.structs.replace(fresh.rules(), disk_low=low)
        for part in (self._directory, self._server, self._janitor, self._supervisor):
            part.reload(fresh)
        told = "; ".join([*changes[:CHANGES_MAX], *more]) or "nothing has changed"
        message = "configuration reloaded: %d handlers; %s"
        log.info(message, len(fresh.handlers), told, extra=kind("config_reloaded"))

    async def _stop(self, done: trio.CancelScope) -> None:
        """Pause at a batch boundary, give the last answers, then end."""
        self._notifier.send(STOPPING=1)
        await self._turns.asked(inputs.Stop())
        grace_s = self._config.file.worker.pause_grace_s
        async with trio.open_nursery() as nursery:
            longest_s = grace_s + ANSWERS_S + STOP_S
            nursery.start_soon(self._watchdog.ask_for_time, longest_s, self._status)
            with trio.move_on_after(grace_s) as grace:
                while self._leased():  # noqa: ASYNC110  # once in a life: an event would cost every turn
                    await trio.sleep(PAUSED_LOOK_S)
            if grace.cancelled_caught:
                message = "a batch did not end within %.0f s: its worker is killed, the job resumes at its checkpoint"
                log.warning(message, grace_s, extra=kind("grace_over"))
            with trio.move_on_after(ANSWERS_S):
                await self._server.hush()
            nursery.cancel_scope.cancel()
        done.cancel()  # the time asked for last is longer than STOP_S, in which the workers end

    def _leased(self) -> bool:
        return any(device.lease for device in self._turns.state.devices.values())

    async def settle(self) -> None:
        """After a clean end: a snapshot, so that the next start replays nothing, and the seal."""
        _on_stop_signals(
            signal.SIG_IGN
        )  # no worker will inherit it; handlers of ours go before the interpreter does
        async with trio.open_nursery() as nursery:
            ending = "stopping: writing the last snapshot"
            nursery.start_soon(self._watchdog.ask_for_time, SETTLE_S, lambda: ending)
            await trio.to_thread.run_sync(self._settle)
            nursery.cancel_scope.cancel()
        log.info(
            "stopped: %d jobs wait for the next start",
            self._turns.state.book.open_jobs,
            extra=kind("stopped"),
        )

    def _settle(self) -> None:
        state = self._turns.state
        try:
            self._journal.write_snapshot(state.seq, snapshot.chunks(state))
        except (OSError, SnapshotDamagedError) as error:
            message = "no last snapshot, the next start replays more: %s"
            log.warning(message, error, extra=kind("snapshot_failed"))
        self._journal.seal()

    async def _until_dead(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run what writes the journal; when that dies, tell everybody who waits, then end the process."""
        try:
            await run()
        except JournalDead as dead:
            self._turns.die(dead)
            await trio.sleep(LAST_ANSWERS_S)
            raise

    def _status(self) -> str:
        return status(self._turns.state, self._supervisor.progress, self._trouble)

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


async def _flush_log() -> None:
    """What systemd's journal did not take at once, it gets as soon as it reads again; until then this sleeps."""
    handler = entries.to_journal()
    if handler is None:
        return
    token = trio.lowlevel.current_trio_token()

    def wake() -> None:
        left.set()

    # Any thread may write to the log.
    handler.call_when_left(lambda: token.run_sync_soon(wake, idempotent=True))
    try:
        while True:
            left = trio.Event()  # before the look: what comes after it sets this one
            while not handler.flushed():  # noqa: ASYNC110  # its socket does not tell when it takes more
                await trio.sleep(LOG_LOOK_S)
            await left.wait()
    finally:
        handler.call_when_left(None)


def _on_stop_signals(handler: Callable[[int, object], None] | signal.Handlers) -> None:
    """What a further SIGTERM does, that nobody waits for: it must not cut off the last snapshot."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


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


def _prepare_process() -> None:
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_S)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(
        signal.SIGHUP, signal.SIG_IGN
    )  # while it starts and ends there is nothing to reload, or to die of
    if sys.stderr is not None:
        faulthandler.enable()  # systemd's watchdog aborts: the stacks say where it hung


def serve(options: Options) -> int:
    """Run the daemon in the foreground; returns the exit status."""
    _prepare_process()
    notifier = Notifier()
    try:
        cfg = config.load(options.config)
        folder = state_dir(options)
        make_folders(folder)
        return _serve(options, cfg, Journal(folder / "journal"), notifier)
    except ConfigError as error:
        return _refuse(notifier, str(error), EX_CONFIG, errno.EINVAL)
    except StartError as error:
        return _refuse(notifier, str(error), error.status, error.code)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        code = error.errno or errno.EIO
        return _refuse(notifier, what, EX_TEMPFAIL if error.errno in PASSING else EX_CONFIG, code)


def _refuse(notifier: Notifier, why: str, status: int, code: int) -> int:
    """Tell everybody why there is no daemon; `code` is what systemd shows as the error."""
    log.critical("%s", why, extra=kind("start_refused"))
    notifier.send(STATUS=f"refused: {why}", ERRNO=code)
    return status


def _serve(options: Options, cfg: Config, journal: Journal, notifier: Notifier) -> int:
    status = 0
    gc.disable()  # replay makes no garbage that needs a collector, and millions of things for it to walk
    try:
        notifier.send(STATUS="starting: reading the journal")
        recovered = journal.open()
        _say_recovered(recovered)
        daemon = Daemon(options, cfg, journal, recovered, notifier)
    except JournalBusyError as error:
        raise StartError(str(error), code=errno.EBUSY) from None
    except JournalError as error:
        what = f"{error}; `gpujobd fsck --state-dir {state_dir(options)}` tells more"
        raise StartError(what, EX_CONFIG, errno.EUCLEAN) from None
    except JournalDead as dead:
        raise StartError(f"the journal cannot be opened: {dead}", EX_TEMPFAIL, errno.EIO) from None
    del recovered
    gc.freeze()
    gc.set_threshold(*COLLECTIONS)
    gc.enable()
    try:
        trio.run(_run, daemon)
    except* JournalDead as dead:
        message = "the journal is dead, nothing of what was in flight was acknowledged: %s"
        log.critical(message, _first(dead), extra=kind("journal_dead"))
        notifier.send(STATUS=f"the journal is dead: {_first(dead)}", ERRNO=errno.EIO)
        status = EX_TEMPFAIL
    finally:
        journal.close()
    return status


def _say_recovered(recovered: Recovered) -> None:
    """What the last run left behind, where it is not as it should be."""
    if recovered.torn:
        message = "the last write was cut short: it was acknowledged to nobody, and is set aside"
        log.warning(message, extra=kind("journal_torn"))
    for name, why in recovered.damaged_snapshots.items():
        message = "%s is damaged, an older one serves: %s"
        log.error(message, name, why, extra=kind("snapshot_damaged"))
    for first, last in recovered.lost:
        message = "records %d to %d of the journal were given up by fsck"
        log.warning(message, first, last, extra=kind("journal_lost"))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of a group that is no group itself."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _run(daemon: Daemon) -> None:
    await daemon.run()
    await daemon.settle()
