"""The notifier put together: configuration, outbox, socket; then follow, deliver and answer, until SIGTERM.

Rule 1: it is ready when it can be asked, whether or not gpujobd is there.
Rule 2: an outbox that cannot be written ends the process; systemd starts it again, and the cursor says where it was.
Rule 3: SIGTERM: nothing more is begun; what is in flight has STOP_S to end. What does not end is sent again, under its id.
Rule 4: SIGHUP reads the configuration again; one that is wrong is refused, and STATUS says so until a good one comes.

Exit status: 0 stopped as asked; 1 a bug, or another notifier has the state; 75 the outbox could not be read or written (a
restart may help); 78 configuration or outbox refused (it does not).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sqlite3
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import trio
from gpujobd import __version__
from gpujobd import protocol as p
from gpujobd.notify import Notifier as Systemd
from gpujobd.settings import ConfigError

from gpujobd_notify import config
from gpujobd_notify.config import Config
from gpujobd_notify.deliver import Deliveries
from gpujobd_notify.follower import Follower
from gpujobd_notify.server import Server
from gpujobd_notify.store import Store, StoreBusyError, StoreError
from gpujobd_notify.thread import Asked

log = logging.getLogger("gpujobd-notify")

EX_TEMPFAIL: Final = 75
EX_CONFIG: Final = 78
BACKLOG: Final = 64
STOP_S: Final = 5.0
NICENESS: Final = 10
"""The daemon and its workers come first: an answer is waited for, a notification is not. Hooks inherit it."""
STATUS_S: Final = 5.0
STUCK_S: Final = 30.0  # a turn of the deliveries, which wait for the outbox alone


class StartError(Exception):
    """The notifier cannot start; the message says why."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `gpujobd-notify serve`."""

    config: Path | None = None
    state_dir: Path | None = None
    socket: Path | None = None
    daemon_socket: Path | None = None


class Program:
    """One run. Made by `serve`."""

    def __init__(self, options: Options, cfg: Config, store: Store, systemd: Systemd) -> None:
        self._options = options
        self._systemd = systemd
        self._asked = Asked(store)
        self._store = store
        self._trouble = ""
        self._deliveries = Deliveries(cfg, self._asked)
        self._follower = Follower(
            cfg, _daemon_paths(options), self._asked, self._deliveries.posting, self._deliveries.poke
        )
        self._server = Server(cfg, self._asked, self._deliveries, self._follower, uuid.uuid4().hex)

    async def run(self, listener: socket.socket) -> None:
        """Until a signal says stop."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follower.run)
                nursery.start_soon(self._deliveries.run)
                nursery.start_soon(self._server.run, trio.socket.from_stdlib_socket(listener))
                nursery.start_soon(self._tell_systemd)
                log.info("gpujobd-notify %s is ready", __version__)
                self._systemd.send(READY=1, STATUS=self._status())
                async for number in signals:
                    if number != signal.SIGHUP:
                        break
                    await self._reload()
                log.info("%s: stopping", signal.Signals(number).name)
                self._systemd.send(STOPPING=1)
                with trio.move_on_after(STOP_S):
                    await self._deliveries.stop()
                nursery.cancel_scope.cancel()

    async def _reload(self) -> None:
        self._systemd.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        load = config.load
        try:
            fresh = await trio.to_thread.run_sync(load, self._options.config)
            await self._deliveries.reload(fresh)
        except (ConfigError, OSError) as error:
            self._trouble = f"reload refused: {error}"
            log.error("the configuration stays as it was: %s", error)  # noqa: TRY400  # no stack: it is no bug
        else:
            self._trouble = ""
            self._store.pending_per_uid_max = fresh.file.limits.pending_per_uid_max
            self._follower.reload(fresh)
            self._server.reload(fresh)
            log.info("configuration reloaded: %d endpoints", len(fresh.file.endpoints))
        self._systemd.send(READY=1, STATUS=self._status())

    async def _tell_systemd(self) -> None:
        """STATUS, and a sign of life while the deliveries turn: they wait for nothing but the outbox."""
        said, every_s = "", min(STATUS_S, self._systemd.watchdog_s / 3 or STATUS_S)
        while True:
            status = self._status()
            if status != said:
                self._systemd.send(STATUS=status)
            said = status
            if self._systemd.watchdog_s and await self._is_well():
                self._systemd.send(WATCHDOG=1)
            await trio.sleep(every_s)

    async def _is_well(self) -> bool:
        """Whether the outbox answers."""
        with trio.move_on_after(STUCK_S):
            await self._asked(Store.cursor)
            return True
        return False

    def _status(self) -> str:
        doing = f"{self._follower.state}; {self._deliveries.in_flight} in flight"
        return f"{self._trouble}; {doing}" if self._trouble else doing


def _daemon_paths(options: Options) -> list[str]:
    if options.daemon_socket is not None:
        return [str(options.daemon_socket.absolute())]
    return [p.SYSTEM_SOCKET] if config.is_service() else p.socket_paths()


def state_dir(options: Options) -> Path:
    return (options.state_dir or config.default_state_dir()).absolute()


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen at `path`, replacing what a dead notifier left there: the lock of the state says that none lives.

    Raises: StartError.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _clear(path)
            sock.bind(str(path))
            path.chmod(0o666)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            raise StartError(f"{path}: {error.strerror or error}", EX_CONFIG) from None
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o755)  # whatever the umask: who may do what is decided by uid
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartError(f"{path} is there and is no socket", EX_CONFIG)
        path.unlink()


def set_up_log(*, verbose: bool) -> None:
    """Lines to stderr: with a priority for systemd's journal where stderr leads there, else with the time."""
    handler = logging.StreamHandler(sys.stderr)
    to_journal = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(
        _Line("%(message)s" if to_journal else "%(asctime)s %(levelname)s %(message)s", to_journal)
    )
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every URL: some are secrets
    logging.getLogger("httpcore").setLevel(logging.WARNING)


class _Line(logging.Formatter):
    """One entry, one line, whatever others put into it; sd-daemon(3) has the numbers."""

    def __init__(self, pattern: str, to_journal: bool) -> None:
        super().__init__(pattern)
        self._to_journal = to_journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not record.exc_info:
            text = "".join(c if c.isprintable() else " " for c in text)
        if not self._to_journal:
            return text
        number = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{number}>{line}" for line in text.splitlines())


def _stand_back() -> None:
    """The processors are the daemon's and its workers'. Under the unit systemd has seen to it, and its filter forbids it."""
    wanted = NICENESS - os.getpriority(os.PRIO_PROCESS, 0)
    if wanted > 0:
        with contextlib.suppress(PermissionError):
            os.nice(wanted)


def serve(options: Options) -> int:
    """Run the notifier in the foreground; returns the exit status."""
    os.umask(0o077)
    _stand_back()
    systemd = Systemd()
    try:
        cfg = config.load(options.config)
        folder = state_dir(options)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Store(folder, cfg.file.limits.pending_per_uid_max)) as store:
            return _serve(options, cfg, store, systemd)
    except (ConfigError, StoreError) as error:
        return _refuse(systemd, str(error), EX_CONFIG)
    except StoreBusyError as error:
        return _refuse(systemd, str(error), 1)
    except StartError as error:
        return _refuse(systemd, str(error), error.status)
    except (OSError, sqlite3.Error) as error:
        return _refuse(
            systemd, f"{getattr(error, 'filename', None) or state_dir(options)}: {error}", EX_TEMPFAIL
        )


def _serve(options: Options, cfg: Config, store: Store, systemd: Systemd) -> int:
    with listening((options.socket or config.default_socket()).absolute()) as listener:
        broken = ""
        try:
            trio.run(_run, options, cfg, store, systemd, listener)
        except* sqlite3.Error as group:
            broken = f"the outbox cannot be written: {_first(group)}"
        if broken:
            return _refuse(systemd, broken, EX_TEMPFAIL)
    log.info("stopped")
    return 0


async def _run(
    options: Options, cfg: Config, store: Store, systemd: Systemd, listener: socket.socket
) -> None:
    await Program(options, cfg, store, systemd).run(listener)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _refuse(systemd: Systemd, message: str, status: int) -> int:
    log.error("%s", message)
    systemd.send(STATUS=f"refused: {message}")
    return status
