"""A machine with a daemon, its people and its workers, from a seed: one life of the daemon after the other.

World.live(days)      lives until so many days of the world have passed
one life              a trio run: the journal is opened, Daemon put together and run, with everybody else beside it
its end               SIGTERM, SIGKILL, power cut, a dead journal, the watchdog; then the next life, from the disk
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import signal
import tempfile
from collections import Counter, deque
from pathlib import Path
from typing import Any, Final

import trio
from gpujobd import config
from gpujobd.core.events import encode
from gpujobd.core.inputs import Who
from gpujobd.daemon import Daemon, Options
from gpujobd.journal import Journal, JournalDead
from gpujobd.server import log as server_log
from sim_disk import PowerCut
from simulation import seams
from simulation.clock import Clock, Uuids, repeatable
from simulation.disk import JournalDisk, Killed, SpoolDisk
from simulation.faults import DAY_S, HOUR_S, Faults
from simulation.oracle import Oracle
from simulation.people import Follower, Person, Stranger
from simulation.pulse import SLOW, Pulse
from simulation.threads import JournalThread, Threads
from simulation.workers import Machine, simulated_driver, simulated_process

SEGMENT_BYTES: Final = 256 << 10
TAIL_LINES: Final = 60

CONFIG: Final = """
devices = ["cuda:0", "cuda:1"]
[limits]
queued_jobs_max = 60
queued_jobs_per_uid_max = 20
queued_items_per_uid_max = 1200
submissions_per_uid_minute_max = 12
items_per_job_max = 400
queued_items_max = 4000
input_bytes_max = 100000
events_bytes_max = 2000000
[retention]
final_days = 1
outputs_bytes_max = 150000
[scheduler]
slice_s = {pulse.slice_s}
aging_s = {pulse.aging_s}
wait_max_s = {pulse.wait_max_s}
[worker]
checkpoint_s = {pulse.checkpoint_s}
silent_timeout_s = {pulse.silent_s}
stall_timeout_s = {pulse.stall_s}
load_timeout_s = {pulse.load_timeout_s}
pause_grace_s = {pulse.grace_s}
[tenants.cid]
share = 2
[tenants.lab]
members = ["dora", "emil"]
"""
HANDLER: Final = 'entry = "simulated:Model"\nbatch_max = 64\n'
MODELS: Final = ("embed", "rerank", "ocr")


def _who(uid: int, name: str, **rights: Any) -> Who:
    return Who(uid=uid, name=name, tenants=frozenset({name, *rights.pop("tenants", ())}), **rights)


PEOPLE: Final = {
    who.uid: who
    for who in (
        _who(1001, "ann"),
        _who(1002, "ben"),
        _who(1003, "cid"),
        _who(1004, "dora", tenants=("lab",)),
        _who(1005, "emil", tenants=("lab",)),
        _who(1006, "root", admin=True, observer=True, high=True),
        _who(1007, "mail", observer=True),
        _who(1008, "audit", admin=True, observer=True, high=True),
        _who(1009, "eve"),
    )
}


class World:
    """Town for the people, Surroundings for the machines."""

    def __init__(self, seed: int, pulse: Pulse = SLOW) -> None:
        self.seed, self.pulse = seed, pulse
        self.folder = tempfile.mkdtemp(
            dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, prefix="gpujobd-"
        )
        self.socket = f"{self.folder}/control.sock"
        self.clock = Clock()
        self.luck = random.Random(f"{seed} people and workers")
        self.faults = Faults(random.Random(f"{seed} faults"), self._kill, self.note, pulse)
        self.journal_disk = JournalDisk(self.faults, random.Random(f"{seed} journal"))
        spool = f"{self.folder}/state/spool"
        self.spool_disk = SpoolDisk(spool, self.faults, random.Random(f"{seed} spool"))
        self.oracle = Oracle(spool, lambda: self.clock.world_s, pulse, lambda uid: PEOPLE[uid].admin)
        self.machines: list[Machine] = []
        self.callers = self.hired = 0
        self.endings: Counter[str] = Counter()
        self.trace = hashlib.blake2b(digest_size=16)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.nursery: trio.Nursery
        self._uuids = Uuids(random.Random(f"{seed} uuids"))
        self._signals = seams.Signals()
        self._ending = ""
        self._ended_s = 0.0
        self._told_alive_s = 0.0
        self._excused_s = -1e9  # until when the watchdog may have gone without news
        self._people = self._make_people()
        self._configure()

    def _make_people(self) -> list[Person | Follower | Stranger]:
        def person(uid: int, idles: float, busy: int = 0, handlers: tuple[str, ...] = MODELS) -> Person:
            return Person(self, PEOPLE[uid], every_s=self.pulse.idle_s * idles, handlers=handlers, busy=busy)

        return [
            *(person(uid, 2, busy=4, handlers=("embed",)) for uid in (1001, 1002, 1003)),
            *(person(uid, 1) for uid in (1004, 1005)),
            person(1006, 3),
            Follower(self, PEOPLE[1007], hangs=True),
            Follower(self, PEOPLE[1008], hangs=False),
            Stranger(self, PEOPLE[1009], every_s=self.pulse.idle_s * 6),
        ]

    def _configure(self) -> None:
        folder = Path(self.folder)
        (folder / "gpujobd.toml").write_text(CONFIG.format(pulse=self.pulse))
        (folder / "handlers.d").mkdir()
        for model in MODELS:
            (folder / "handlers.d" / f"{model}.toml").write_text(HANDLER)
        (folder / "state").mkdir()

    # --- lives ------------------------------------------------------------------------------------------------------------

    def live(self, days: float) -> None:
        """Raises: whatever an invariant says."""
        self._until_s = days * DAY_S
        watcher = _Watcher(self)
        logging.getLogger("gpujobd").addHandler(watcher)
        level, propagate = logging.getLogger("gpujobd").level, logging.getLogger("gpujobd").propagate
        logging.getLogger("gpujobd").setLevel(logging.INFO)
        logging.getLogger("gpujobd").propagate = False
        JournalThread.delays, JournalThread.now_s = self.faults, lambda: self.clock.world_s
        try:
            with (
                repeatable(self.seed),
                seams.simulated(
                    clock=self.clock,
                    uuids=self._uuids,
                    threads=Threads(self.faults),
                    disk=self.spool_disk,
                    signals=self._signals,
                    process=simulated_process(self),
                    driver=simulated_driver(self),
                    people=PEOPLE,
                    pulse=self.pulse,
                ),
            ):
                while self._ending != "the end":
                    self._one_life()
                    self.clock.pass_between_lives(self.luck.choice((0.5, 3, 10, 100)))
        finally:
            logging.getLogger("gpujobd").removeHandler(watcher)
            logging.getLogger("gpujobd").setLevel(level)
            logging.getLogger("gpujobd").propagate = propagate
            shutil.rmtree(self.folder)

    def _one_life(self) -> None:
        self._ending = ""
        self.faults.begin_life()
        self.spool_disk.begin_life()
        self._told_alive_s = self.clock.world_s
        lived = False
        try:
            journal = Journal("/journal", self.journal_disk, segment_bytes=SEGMENT_BYTES)
            recovered = journal.open()
            self.oracle.recovered(recovered)
            options = Options(
                config=Path(self.folder) / "gpujobd.toml",
                state_dir=Path(self.folder) / "state",
                socket=Path(self.socket),
            )
            systemd = seams.Systemd(self.pulse.watchdog_s, self._systemd)
            daemon = Daemon(options, config.load(options.config), journal, recovered, systemd)
            lived = True
            self.oracle.begin_life(daemon)
            trio.run(self._run, daemon, clock=self.clock.begin_life())
            self._expect(
                self._ending in ("SIGTERM", "SIGTERM twice", "the end"),
                "the daemon stopped, and nobody asked",
            )
        except BaseException as error:  # noqa: BLE001 - a life ends in any way there is, and all are judged
            self._judge(error)
        if not self._ended_s:
            self._ended_s = self.clock.world_s
        self.clock.end_life(self._ended_s)
        self._ended_s = 0.0
        if lived:
            self.oracle.end_life()
        self._bury()

    def _judge(self, error: BaseException) -> None:
        """A death that was planned is one; everything else is what the simulation is for."""
        leaves = list(_leaves(error))
        wrong = [leaf for leaf in leaves if isinstance(leaf, AssertionError)]
        if wrong and not self._ending:
            raise error
        if wrong or not all(isinstance(leaf, Killed | PowerCut | JournalDead | OSError) for leaf in leaves):
            raise error
        if any(isinstance(leaf, Killed | PowerCut) for leaf in leaves):
            self._ending = self._ending or "power cut"
        else:
            self._expect(
                self.faults.errors_of_this_life > 0 or self.spool_disk.full, f"died of nothing: {leaves}"
            )
            self._ending = (
                "dead journal" if any(isinstance(leaf, JournalDead) for leaf in leaves) else "no start"
            )

    def _bury(self) -> None:
        self.note(f"END {self._ending}")
        self.endings[self._ending] += 1
        self.spool_disk.dead = False
        self.spool_disk.end_life()
        self.journal_disk.off = False
        for machine in self.machines:
            machine.bury_daemon()
        self.machines.clear()
        if self._ending == "power cut":
            self.journal_disk.cut_power()
            self.spool_disk.cut_power()
        else:
            self.journal_disk.restart_process()
        self.journal_disk.log.clear()

    @staticmethod
    def _expect(true: bool, otherwise: str) -> None:
        if not true:
            raise AssertionError(otherwise)

    async def _run(self, daemon: Daemon) -> None:
        turns = daemon._turns
        turns.followers.insert(
            0, lambda facts: [self._fact(seq, encode(event), event) for seq, event in facts]
        )
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            for person in self._people:
                nursery.start_soon(person.live)
            nursery.start_soon(self.faults.run, self._strike)
            nursery.start_soon(self._watch)
            nursery.start_soon(self._look_closely)
            nursery.start_soon(self._end)
            await daemon.run()
            await daemon.settle()
            self._ended_s = self.clock.world_s
            nursery.cancel_scope.cancel()

    def _fact(self, seq: int, record: bytes, event: object) -> None:
        self.trace.update(b"%d " % seq + record)
        self.tail.append(f"{self.clock.world_s:.3f} {seq} {event!r:.300}")

    async def _end(self) -> None:
        await trio.sleep(max(0.0, self._until_s - self.clock.world_s))
        while not self._signals.send(signal.SIGTERM):  # noqa: ASYNC110 - the daemon is still starting
            await trio.sleep(1)
        self._ending = "the end"

    async def _look_closely(self) -> None:
        while True:
            await trio.sleep(4 * self.pulse.idle_s)
            self.oracle.look_closely(self.clock.time_ns())

    # --- faults -----------------------------------------------------------------------------------------------------------

    def _kill(self, how: str) -> None:
        """The process is gone from here on. Raises: Killed."""
        self.faults.happen(how)
        self._ending = how
        self._ended_s = self.clock.world_s
        self.spool_disk.dead = self.journal_disk.off = True
        raise Killed

    def _strike(self, what: str) -> None:
        luck = self.luck
        match what:
            case "kill" | "power cut":
                if luck.random() < 0.3:
                    self._kill(what)
                self.faults.end_soon(what)
            case "SIGTERM" | "SIGTERM twice":
                if self._signals.send(signal.SIGTERM):
                    self._ending = self._ending or what
                    self.faults.happen(what)
                    if what == "SIGTERM twice":
                        self._signals.send(signal.SIGTERM)
            case "SIGHUP":
                if self._signals.send(signal.SIGHUP):
                    self.faults.happen(what)
            case "clock step":
                self.clock.step(luck.choice((-86_400, -3600, -5, 5, 3600, 30_000, 86_400)))
                self.faults.happen(what)
            case "process stopped":
                self._excuse(3 * self.pulse.stuck_s)
                self.clock.freeze(self.pulse.watchdog_s * luck.choice((0.03, 0.4, 0.9)))
                self.faults.happen(what)
            case "disk full":
                self.nursery.start_soon(self._fill_disk, luck.uniform(0.1, 3) * HOUR_S / self.pulse.eagerness)
            case "strangers":
                self.faults.come(luck.choice(("cuda:0", "cuda:1")), self.clock.world_s)
            case "driver replaced":
                self.faults.replace_driver(self.clock.world_s)
            case "device ill":
                self.faults.fall_ill(luck.choice(("cuda:0", "cuda:1")), self.clock.world_s)

    async def _fill_disk(self, seconds: float) -> None:
        self.faults.happen("disk full")
        self.spool_disk.full = True
        self.journal_disk.space = self.journal_disk._used() + 10_000
        try:
            await trio.sleep(seconds)
        finally:  # whoever restarts a daemon makes room first
            self.spool_disk.full = False
            self.journal_disk.space = None

    # --- systemd ----------------------------------------------------------------------------------------------------------

    def _systemd(self, fields: dict[str, Any]) -> None:
        now_s = self.clock.world_s
        if "WATCHDOG" in fields:
            since_s = JournalThread.since_s
            assert since_s is None or now_s - since_s < self.pulse.stuck_s, (
                "all is well, it says, and a sync is stuck"
            )
            assert now_s - self._told_alive_s < self.pulse.stuck_s or now_s < self._excused_s, (
                f"systemd heard nothing for {now_s - self._told_alive_s:.0f} s, and nothing was wrong"
            )
            self._told_alive_s = now_s

    def _excuse(self, seconds: float) -> None:
        self._excused_s = self.clock.world_s + seconds

    async def _watch(self) -> None:
        """systemd's side of WatchdogSec=."""
        while True:
            await trio.sleep(self.pulse.status_s)
            since_s = JournalThread.since_s
            if since_s is not None and self.clock.world_s - since_s > self.pulse.stuck_s / 2:
                self._excuse(3 * self.pulse.stuck_s)
            if self.clock.world_s - self._told_alive_s > self.pulse.watchdog_s:
                self._expect(
                    self.clock.world_s < self._excused_s, "the watchdog ended a daemon that was well"
                )
                self._kill("watchdog")

    # --- what people and machines call --------------------------------------------------------------------------------------

    def heard(self, text: str) -> None:
        self.note(text)

    def note(self, text: str) -> None:
        line = f"{self.clock.world_s:.3f} {text}"
        self.trace.update(line.encode())
        self.tail.append(line)

    def submitted(self, submission: Any) -> None:
        self.oracle.submitted(submission)

    def accepted(self, submission: Any, job: int) -> None:
        self.oracle.accepted(submission, job)

    def refused(self, submission: Any, code: str) -> None:
        self.faults.count[f"refused {code}"] += 1

    def shown(self, job: Any) -> None:
        self.oracle.shown(job)

    def read(self, job: int, text: bytes, *, errors: bool) -> None:
        self.oracle.read(job, text, errors=errors)

    def event_seen(self, seq: int, event: dict[str, object]) -> None:
        self.oracle.event_seen(seq, event)

    def gap_seen(self, cursor: int, first_seq: int) -> None:
        self.note(f"gap from {cursor + 1} to {first_seq}")
        self.faults.count["gap"] += 1
        self.oracle.gap_seen(cursor, first_seq)

    def trouble(self, device: str) -> str:
        return self.faults.trouble()

    def load_trouble(self, handler: str) -> str:
        return self.faults.load_trouble(handler)

    def foreign_bytes(self, device: str) -> int:
        return self.faults.foreign_bytes(device, self.clock.world_s)

    def driver_trouble(self) -> str:
        return self.faults.driver_trouble(self.clock.world_s)

    def device_is_ill(self, device: str) -> bool:
        return self.faults.device_is_ill(device, self.clock.world_s)


class _Watcher(logging.Handler):
    """The daemon's log goes into the tail of the trace; a stack in it is a bug that a connection swallowed."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.tail.append(f"{self._world.clock.world_s:.3f} LOG {record.getMessage()}")
        if record.exc_info and record.name == server_log.name and not self._world._ending:
            raise AssertionError(record.getMessage()) from record.exc_info[1]


def _leaves(error: BaseException) -> Any:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
