"""Where the daemon touches the world, and who stands there in a simulation. One table; nothing else is replaced.

The daemon's own code runs: turns, writer, journal, recovery, server, connections, submissions, feed, outlooks, spool,
janitor, supervisor, workers, put together and stopped by daemon.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import gpujobd_worker.files
import gpujobd_worker.lines
import gpujobd_worker.writer
import pytest
import trio
from gpujobd import (
    access,
    cgroup,
    daemon,
    gpus,
    grant,
    janitor,
    job_log,
    journal,
    server,
    spool,
    supervisor,
    turns,
    watchdog,
    worker,
    writer,
)
from gpujobd.config import Config
from gpujobd.core import policy
from gpujobd.core.inputs import Who
from gpujobd.core.model import S_NS
from gpujobd.notify import Notifier
from gpujobd.peer import Peer
from simulation.clock import Clock, Uuids
from simulation.disk import SpoolDisk
from simulation.people import caller
from simulation.pulse import Pulse
from simulation.threads import JournalThread, Threads


def periods(pulse: Pulse) -> dict[tuple[Any, str], float]:
    """The daemon's periods that no configuration sets."""
    return {
        (turns, "TICK_S"): pulse.tick_s,
        (policy, "ROUND_NS"): round(pulse.round_s * S_NS),
        (supervisor, "LOOK_S"): pulse.look_s,
        (gpus, "ACTIVE_S"): pulse.sight_s,
        (gpus, "WARM_S"): 2 * pulse.sight_s,
        (gpus, "WATCH_S"): 12 * pulse.sight_s,
        (gpus, "FRESH_S"): 2 * pulse.sight_s,
        (gpus, "CALM_S"): 3 * pulse.sight_s,
        (gpus, "STALE_S"): 12 * pulse.sight_s,
        (worker, "HEARTBEAT_S"): pulse.heartbeat_s,
        (watchdog, "LOOK_S"): pulse.status_s,
        (watchdog, "STUCK_S"): pulse.stuck_s,
        (daemon, "PAUSED_LOOK_S"): pulse.look_s / 5,
        (janitor, "LOOK_S"): pulse.janitor_s,
        (janitor, "RETAIN_S"): pulse.retain_s,
        (janitor, "SNAPSHOT_EVENTS"): pulse.snapshot_events,
    }


class Systemd(Notifier):
    """Hears what the daemon tells systemd."""

    def __init__(self, watchdog_s: float, told: Callable[[dict[str, Any]], None]) -> None:
        super().__init__({})
        self.watchdog_s = watchdog_s
        self._told = told

    def send(self, **fields: Any) -> None:
        self._told(fields)


class Signals:
    """Stands in for trio.open_signal_receiver."""

    def __init__(self) -> None:
        self._send: trio.MemorySendChannel[int] | None = None

    @contextlib.contextmanager
    def open(self, *_: int) -> Iterator[AsyncIterator[int]]:
        self._send, receive = trio.open_memory_channel[int](10)
        try:
            yield receive
        finally:
            self._send = None

    def send(self, number: int) -> bool:
        """False: nobody listens yet, or any more."""
        if self._send is None:
            return False
        self._send.send_nowait(number)
        return True


class WorkersOs:
    """Files as a worker process opens them: they stay open when the daemon dies."""

    def __init__(self, disk: SpoolDisk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(os if name in ("open", "close") else self._disk, name)


@contextlib.contextmanager
def simulated(
    *,
    clock: Clock,
    uuids: Uuids,
    threads: Threads,
    disk: SpoolDisk,
    signals: Signals,
    process: type,
    driver: type,
    people: dict[int, Who],
    pulse: Pulse,
) -> Iterator[None]:
    def look_up(config: Config, peer: Peer) -> Who:
        return people[peer.uid]

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(("gpujobd.", "gpujobd_worker.")) and getattr(module, "time", None) is time:
                patch.setattr(module, "time", clock)
        for module in (daemon, journal):
            patch.setattr(module, "uuid", uuids)
        for module in (spool, job_log, grant):
            patch.setattr(module, "os", disk)
        for module in (gpujobd_worker.files, gpujobd_worker.lines):
            patch.setattr(module, "os", WorkersOs(disk))
        patch.setattr(gpujobd_worker.writer, "start_thread", lambda *_: None)
        patch.setattr(trio.to_thread, "run_sync", threads.run_sync)
        patch.setattr(trio, "open_signal_receiver", signals.open)
        patch.setattr(
            daemon, "_on_stop_signals", lambda _: None
        )  # the signals of this process are not its own
        patch.setattr(writer, "OwnThread", JournalThread)
        patch.setattr(worker, "WorkerProcess", process)
        patch.setattr(gpus, "Nvml", driver)
        patch.setattr(cgroup, "delegated", lambda: None)
        patch.setattr(cgroup, "become_subreaper", lambda: None)
        patch.setattr(server, "peer", caller)
        patch.setattr(access, "_look_up", look_up)
        patch.setattr(access, "_user_name", lambda uid: people[uid].name)
        for (module, name), value in periods(pulse).items():
            patch.setattr(module, name, value)
        yield
