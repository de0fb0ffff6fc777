"""What systemd hears: that all is well only while it is, how far the work is, and nothing that forges a message."""

from __future__ import annotations

import contextlib
import itertools
import socket
import types

import pytest
import trio
from gpujobd import watchdog
from gpujobd.core.apply import apply
from gpujobd.core.events import DeviceFellIll, DevicesFound, DiskFilled, Leased, QueueSwitched, Submitted
from gpujobd.core.model import Priority, Rules, State
from gpujobd.notify import Notifier
from gpujobd.pace import Progress
from gpujobd.status import status
from gpujobd.thread import OwnThread
from gpujobd.turns import Turns
from gpujobd.watchdog import LOOK_S, STUCK_S, Watchdog
from trio.testing import MockClock

WATCHDOG_S = 30.0


class Heard:
    """A notifier that keeps what it is told, with the time."""

    def __init__(self, watchdog_s=WATCHDOG_S):
        self.watchdog_s = watchdog_s
        self.said = []

    def send(self, **fields):
        self.said.append((trio.current_time(), fields))

    def times(self, key):
        return [at for at, fields in self.said if key in fields]

    def last(self, key):
        return [fields[key] for _, fields in self.said if key in fields][-1]


class World:
    """Real turns without a disk; what else is looked at, as it is said to be."""

    def __init__(self, watchdog_s=WATCHDOG_S):
        self.heard = Heard(watchdog_s)
        self.turns = Turns(State(), State(), Rules(), lambda _: 0)
        self.writer = types.SimpleNamespace(alive=True, sync_started_at=None)
        self.looked_at = None
        supervisor = types.SimpleNamespace(
            looked_at=lambda: trio.current_time() if self.looked_at is None else self.looked_at
        )
        self.dog = Watchdog(self.heard, self.turns, self.writer, supervisor, lambda: "idle")

    @contextlib.asynccontextmanager
    async def running(self, *, turning=True):
        async with trio.open_nursery() as nursery:
            if turning:
                nursery.start_soon(self.turns.run)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(self.dog.run)
            yield self
            nursery.cancel_scope.cancel()


@pytest.fixture
def clock():
    return MockClock(autojump_threshold=0)


async def test_an_idle_hour_is_an_hour_of_pings_in_time_and_of_one_status(clock):
    async with World().running() as world:
        await trio.sleep(3600)
    pings = world.heard.times("WATCHDOG")
    gaps = [after - before for before, after in itertools.pairwise(pings)]
    assert max(gaps) <= WATCHDOG_S / 2
    assert min(gaps) >= WATCHDOG_S / 4  # systemd wakes up for each
    assert len(world.heard.times("STATUS")) == 1


@pytest.mark.parametrize("watchdog_s", [1.0, 3.0, 10.0, 60.0])
async def test_pings_come_twice_as_often_as_systemd_wants_them(clock, watchdog_s):
    async with World(watchdog_s).running() as world:
        await trio.sleep(300)
    pings = itertools.pairwise(world.heard.times("WATCHDOG"))
    assert max(after - before for before, after in pings) <= watchdog_s / 2


async def test_without_a_watchdog_there_are_no_pings(clock):
    async with World(0.0).running() as world:
        await trio.sleep(60)
    assert world.heard.times("WATCHDOG") == []
    assert len(world.heard.times("STATUS")) == 1


def dead_thread(world, _):
    world.writer.alive = False


def stuck_sync(world, now):
    world.writer.sync_started_at = now


def stuck_supervisor(world, now):
    world.looked_at = now


def well_again(world, _):
    world.writer.alive, world.writer.sync_started_at, world.looked_at = True, None, None


@pytest.mark.parametrize(
    ("break_it", "said", "after_s"),
    [
        (dead_thread, "the journal's thread is dead", 0.0),
        (stuck_sync, "the disk has been syncing the journal for more than 20 s", STUCK_S),
        (stuck_supervisor, "nobody looked at the workers for more than 20 s", STUCK_S),
    ],
)
async def test_what_is_stuck_stops_the_pings_and_is_said_until_it_goes_on(
    clock, caplog, break_it, said, after_s
):
    async with World().running() as world:
        await trio.sleep(100)
        broke_at = trio.current_time()
        break_it(world, broke_at)
        await trio.sleep(after_s + 3 * LOOK_S)
        assert world.heard.last("STATUS") == f"stuck: {said}"
        await trio.sleep(200)
        assert max(world.heard.times("WATCHDOG")) <= broke_at + after_s + LOOK_S
        assert [r.event for r in caplog.records] == ["watchdog_stuck"]  # once
        assert said in caplog.records[0].getMessage()
        well_again(world, None)
        healed_at = trio.current_time()
        await trio.sleep(2 * LOOK_S)
        assert max(world.heard.times("WATCHDOG")) >= healed_at
        assert world.heard.last("STATUS") == "idle"
        assert [r.event for r in caplog.records] == ["watchdog_stuck", "watchdog_well"]


async def test_a_sync_that_takes_its_time_is_not_stuck(clock):
    async with World().running() as world:
        world.writer.sync_started_at = trio.current_time()
        await trio.sleep(STUCK_S - LOOK_S)
        assert world.dog.stuck() == ""


async def test_turns_that_are_not_made_stop_the_pings(clock):
    async with World().running(turning=False) as world:
        world.turns.turned_at = trio.current_time()
        await trio.sleep(STUCK_S + 200)
    assert max(world.heard.times("WATCHDOG")) <= world.turns.turned_at + STUCK_S + LOOK_S
    assert world.heard.last("STATUS") == "stuck: no turn was made for more than 20 s"


async def test_time_is_asked_for_in_pieces_and_not_for_ever(clock):
    world = World()
    await world.dog.ask_for_time(60, lambda: "stopping")
    asked = world.heard.times("EXTEND_TIMEOUT_USEC")
    assert 2 * max(b - a for a, b in itertools.pairwise(asked)) < watchdog.PIECE_S
    assert asked[-1] - asked[0] <= 60
    assert world.heard.last("STATUS") == "stopping"


async def test_a_thread_that_died_is_seen():
    thread = OwnThread("test")
    assert thread.alive  # nobody misses it
    with thread.running():
        assert thread.alive
        assert await thread.do(lambda: 5) == 5
        thread._calls.put(None)
        thread._thread.join()
        assert not thread.alive
    assert thread.alive


# --- the line ---------------------------------------------------------------------------------------------------------


def state_of(*events):
    state = State()
    for seq, event in enumerate(events, 1):
        apply(state, event, seq)
    return state


def job(job_id, tenant="alice"):
    return Submitted(
        at_ns=1, job_id=job_id, submit_id=str(job_id), owner=1, tenant=tenant, handler="h", items=50_000,
        input_bytes=2, input_sha256=b"",
    )  # fmt: skip


def runs(job_id, device):
    return Leased(at_ns=2, device=device, job_id=job_id, attempt=1, level=Priority.NORMAL)


def rate(_):
    return Progress(line=1, batch=1, items_per_s=310.4)


def test_the_line_says_what_runs_how_fast_and_what_waits():
    state = state_of(DevicesFound(at_ns=1, devices=("cuda:0",)), job(1), job(2), runs(1, "cuda:0"))
    assert status(state, rate) == "alice on cuda:0: 0/50,000, 310/s; 1 waiting"
    assert status(state, lambda _: None) == "alice on cuda:0: 0/50,000; 1 waiting"
    assert status(State(), rate) == "idle; 0 waiting"
    assert status(State(), rate, "reload refused: x") == "idle; 0 waiting; reload refused: x"


def test_the_line_says_what_is_wrong():
    state = state_of(
        DevicesFound(at_ns=1, devices=("cuda:0", "cuda:1")),
        QueueSwitched(at_ns=1, stopped=True, disabled=True, draining=False, by=0),
        DiskFilled(at_ns=1),
        DeviceFellIll(at_ns=1, device="cuda:1", reason="CanaryFailed", detail="long " * 99, retry_at_ns=9),
    )
    assert (
        status(state, rate)
        == "idle; 0 waiting; queue stopped, disabled; disk full; cuda:1 unhealthy: CanaryFailed"
    )


def test_the_line_is_bounded_however_many_devices_and_however_long_their_tenants():
    devices = tuple(f"cuda:{number}" for number in range(64))
    jobs = [job(number, "x" * 200) for number in range(1, 65)]
    leases = [runs(number, f"cuda:{number - 1}") for number in range(1, 65)]
    line = status(state_of(DevicesFound(at_ns=1, devices=devices), *jobs, *leases), rate)
    assert len(line) < 450
    assert line.endswith(", 60 more; 0 waiting")


# --- the socket -------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def heard(sock):
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(1 << 16).decode("ascii"))
    return found


@pytest.fixture
def notifier(systemd):
    found = Notifier()
    yield found
    found._notifier.socket.close()


@pytest.mark.parametrize("value", ["a\nMAINPID=1", "a\rb\0", "tenant ö\u2028", "x" * 5000, "\udcff"])
def test_a_value_is_one_line_of_ascii(notifier, systemd, value):
    notifier.send(READY=1, STATUS=value)
    (message,) = heard(systemd)
    ready, line = message.split("\n")
    assert ready == "READY=1"
    assert line.startswith("STATUS=")
    assert line.isprintable()
    assert len(line) <= 507


def test_a_systemd_that_does_not_read_misses_what_is_fleeting_and_nothing_else(notifier, systemd):
    for number in range(2000):
        notifier.send(STATUS=number, WATCHDOG=1)
    notifier.send(RELOADING=1)
    notifier.send(STATUS="newest")
    notifier.send(READY=1)
    before = heard(systemd)
    assert 0 < len(before) < 2000
    assert not any("READY" in message for message in before)
    notifier.send(STATUS="now")
    assert heard(systemd) == ["RELOADING=1", "READY=1", "STATUS=now"]


def test_without_systemd_nothing_is_said(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().send(READY=1)
