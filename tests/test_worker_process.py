"""How a worker is started and ended: what it gets, what it does not get, and what is left of it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio
from gpujobd import cgroup, devices, grant, worker_messages
from gpujobd.config import Config, File, Handler
from gpujobd.core.model import Checkpoint, Deferred, Span
from gpujobd.devices import find_devices
from gpujobd.job_log import JobLog
from gpujobd.worker_messages import Lines, Violation, check_checkpoint
from gpujobd.worker_process import WorkerProcess, environment, why_it_died

FAKE = Path(__file__).with_name("fake_worker.py")
HANG_S = 20


class Ears:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.messages: list[worker_messages.AnyFromWorker] = []
        self.output = b""
        self.violations: list[str] = []

        self.new = trio.Event()

    def heard(self, message: worker_messages.AnyFromWorker) -> None:
        self.messages.append(message)
        self.new.set()

    async def hear(self, count: int) -> None:
        while len(self.messages) < count:
            await self.new.wait()
            self.new = trio.Event()

    def printed(self, output: bytes) -> None:
        self.output += output

    def violated(self, how: str) -> None:
        self.violations.append(how)


def load(**params: Any) -> worker_messages.Load:
    return worker_messages.Load(
        handler="fake",
        entry="fake:Fake",
        path=(),
        device="cpu",
        params=params,
        threads=1,
        heartbeat_s=0.1,
        checkpoint_s=0.1,
    )


async def start(base: Path | None = None) -> WorkerProcess:
    return await WorkerProcess.start(sys.executable, main=FAKE, base=base, device="cpu", threads=3)


async def worker_facts(tmp_path: Path) -> dict[str, Any]:
    """What a worker finds around itself."""
    process, ears = await start(), Ears()
    with trio.fail_after(HANG_S):
        process.send(load(record=str(tmp_path / "record")))
        process.send(worker_messages.Exit())
        await process.talk(ears)
    assert await process.end()
    assert process.status == 0
    return json.loads((tmp_path / "record").read_text())


async def test_worker_gets_listed_variables_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SMTP_PASSWORD": "secret",
        "PYTHONPATH": "/evil",
        "LD_PRELOAD": "",
        "LC_TIME": "C",
        "CUDA_VISIBLE_DEVICES": "1",
        "NVIDIA_X": "y",
        "TZ": "UTC",
    }.items():
        monkeypatch.setenv(name, value)
    env = (await worker_facts(tmp_path))["env"]
    assert not {"SMTP_PASSWORD", "PYTHONPATH", "LD_PRELOAD", "NOTIFY_SOCKET"} & set(env)
    assert (env["LC_TIME"], env["CUDA_VISIBLE_DEVICES"], env["NVIDIA_X"], env["TZ"]) == ("C", "1", "y", "UTC")
    assert (env["OMP_WAIT_POLICY"], env["OMP_NUM_THREADS"], env["HF_HUB_OFFLINE"]) == ("PASSIVE", "3", "1")
    assert env[cgroup.MARK].startswith(f"{os.getpid()}-")


def test_environment_on_a_gpu_asks_for_segments_that_grow() -> None:
    on_gpu = environment({}, device="cuda:0", threads=2)
    on_cpu = environment({}, device="cpu", threads=2)
    assert set(on_gpu) - set(on_cpu) == {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


async def test_worker_is_confined_before_it_loads(tmp_path: Path) -> None:
    facts = (await worker_facts(tmp_path))["facts"]
    assert (facts["cwd"], facts["umask"], facts["core"]) == ("/", 0o077, [0, 0])
    assert facts["session"] == facts["pid"] != os.getsid(0)
    assert facts["oom_score_adj"] == 500
    assert facts["fds"]["0"] == "/dev/null"
    assert facts["fds"]["1"] == facts["fds"]["2"]
    # stdin, stdout, stderr, the pipe, and the one that lists them
    assert facts["fd_count"] <= 6


async def test_lifeline_ends_a_worker_whose_daemon_is_gone() -> None:
    process, ears = await start(), Ears()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.talk, ears)
            process.send(load(behave="load_hangs"))
            await ears.hear(1)
            await process._end.send_eof()  # what the kernel does when the daemon dies
            await process.died.wait()
    assert process.status == 0
    assert await process.end()


@pytest.mark.slow
async def test_worker_outlives_the_thread_that_forked_it() -> None:
    """trio ends a thread after 10 idle seconds; a parent-death signal would come with that."""
    process, ears = await start(), Ears()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.talk, ears)
        process.send(load())
        await trio.sleep(12)
        assert process.status is None
        assert await process.end()
        nursery.cancel_scope.cancel()


async def test_cancelled_start_leaves_no_process_and_no_cgroup() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with trio.move_on_after(0.001):
        process = await start(cgroup.delegated())
        with trio.CancelScope(shield=True):
            assert await process.end()
    left = [c for c in psutil.Process().children() if c.pid not in before]
    assert left == []


async def test_end_kills_a_worker_that_will_not_leave() -> None:
    process, ears = await start(), Ears()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.talk, ears)
            process.send(load(behave="deaf"))
            await ears.hear(2)
            process.send(worker_messages.Exit())
            assert await process.end()
            nursery.cancel_scope.cancel()
    assert process.status == -signal.SIGKILL


@pytest.mark.parametrize(
    ("status", "out_of_memory", "words"),
    [
        (0, False, "exit status 0"),
        (70, True, "exit status 70"),
        (-signal.SIGSEGV, True, "killed by SIGSEGV"),
        (-signal.SIGKILL, False, "killed by SIGKILL"),
        (-signal.SIGKILL, True, "killed by the kernel: out of memory"),
        (-63, False, "killed by signal 63"),
    ],
)
def test_end_of_a_process_in_words(status: int, out_of_memory: bool, words: str) -> None:
    assert why_it_died(status, out_of_memory=out_of_memory) == words


# --- cgroups ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base() -> Path:
    found = cgroup.delegated()
    if found is None:
        pytest.skip("no cgroup v2 subtree may be written here")
    return found


def test_group_reaches_processes_that_left_session_and_parent(base: Path) -> None:
    group = cgroup.Group(base, cgroup.new_mark())
    script = "read go; (setsid sleep 600 &); (setsid sleep 600 &); wait"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True) as shell:
        group.add(shell.pid)
        assert shell.stdin is not None
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        shell.wait(HANG_S)
        wait_until(lambda: len(group.pids()) == 2)
        group.kill()
        wait_until(lambda: group.pids() == [])
    group.bury()
    assert not list(base.glob(f"{cgroup.PREFIX}-{group.mark}"))


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_own_folder_is_the_one_this_process_is_in() -> None:
    folder = cgroup._own_folder()
    if folder is None:
        pytest.skip("no cgroup v2 is mounted here")
    assert str(os.getpid()) in (folder / "cgroup.procs").read_text().split()


@pytest.mark.parametrize(("oom_kill", "killed"), [(0, False), (1, True), (12, True)])
def test_group_knows_of_a_kill_for_memory(tmp_path: Path, oom_kill: int, killed: bool) -> None:
    group = cgroup.Group(tmp_path, "1-1")
    events = tmp_path / f"{cgroup.PREFIX}-1-1" / "memory.events"
    events.write_text(f"low 0\nhigh 0\nmax 3\noom 3\noom_kill {oom_kill}\noom_group_kill 0\n")
    assert group.out_of_memory() is killed


def test_sweep_removes_groups_of_dead_daemons_and_no_others(base: Path) -> None:
    gone, ours = base / f"{cgroup.PREFIX}-4194304-1", cgroup.Group(base, cgroup.new_mark())
    gone.mkdir()  # no process has that number: pid_max is 4194304
    cgroup.sweep(base)
    assert not gone.exists()
    assert ours.pids() == []
    ours.bury()


# --- messages -----------------------------------------------------------------------------------------------------------

GOOD = Checkpoint(upto=20, done=15, failed=3, deferred=(Deferred(4, 1), Deferred(9, 2)), results_bytes=9)
BEFORE = Checkpoint(upto=10, done=9, failed=1, results_bytes=5)


def test_checkpoint_that_follows_is_believed() -> None:
    check_checkpoint(GOOD, BEFORE, 50)
    check_checkpoint(GOOD, GOOD, 50)
    check_checkpoint(Checkpoint(), Checkpoint(), 1)
    deferred_in_hand = Checkpoint(upto=50, done=45, failed=3, deferred=(Deferred(4, 1),), results_bytes=9)
    check_checkpoint(deferred_in_hand, GOOD, 50)
    counted = msgspec.structs.replace(GOOD, failure_codes={"bad_json": 1, "other": 2})
    check_checkpoint(counted, BEFORE, 50)  # one failed under a version that did not count
    check_checkpoint(counted, counted, 50)


@pytest.mark.parametrize(
    "changes",
    [
        {"upto": 9},
        {"upto": 51},
        {"done": 16},
        {"done": 8},
        {"done": -1},
        {"failed": 0},
        {"results_bytes": 4},
        {"results_bytes": 1 << 63},
        {"errors_bytes": -1},
        {"results_crc": 1 << 32},
        {"errors_crc": -1},
        {"deferred": ()},
        {"deferred": (Deferred(4, 1), Deferred(4, 1))},
        {"deferred": (Deferred(4, 1), Deferred(21, 1))},
        {"deferred": (Deferred(4, 1), Deferred(0, 1))},
        {"deferred": (Deferred(4, 1), Deferred(9, 0))},
        {"upto": 1018, "done": 15, "deferred": tuple(Deferred(n, 1) for n in range(1, 1001))},
    ],
)
def test_checkpoint_that_cannot_be_is_a_violation(changes: dict[str, Any]) -> None:
    with pytest.raises(Violation, match="checkpoint"):
        check_checkpoint(msgspec.structs.replace(GOOD, **changes), BEFORE, 50)


MANY: dict[str, int] = {f"code_{n}": 1 for n in range(12)}


@pytest.mark.parametrize(
    "codes",
    [
        {},
        {"bad_json": 1},
        {"bad_json": 2, "rejected": 2},
        {"bad_json": 2, "rejected": 0},
        {"bad_json": 3, "rejected": -1},
        {"bad_json": 2, "no code": 1},
        {"bad_json": 2, "x" * 65: 1},
        {"bad_json": 2, "\x1b[2J": 1},
        {"bad_json": 2, "": 1},
        {"bad_json": 2} | MANY,
    ],
)
def test_counts_of_codes_that_cannot_be_are_a_violation(codes: dict[str, int]) -> None:
    before = msgspec.structs.replace(BEFORE, failed=2, done=8, failure_codes={"bad_json": 2})
    after = msgspec.structs.replace(GOOD, failed=3 if codes.keys() != {"bad_json"} | MANY.keys() else 14)
    if after.failed == 14:
        after = msgspec.structs.replace(after, done=15, upto=31)
    with pytest.raises(Violation, match="code"):
        check_checkpoint(msgspec.structs.replace(after, failure_codes=codes), before, 50)


SAID = [
    {"type": "hello", "pid": 4, "python": "3", "worker": "1"},
    {"type": "loaded", "load_s": 1.5, "vram_bytes": 1, "device_bytes": 2, "hardware": "h"},
    {"type": "heartbeat", "attempt": 3, "line": 4, "batch": 5, "progress": 6},
    {"type": "checkpoint", "attempt": 3, "checkpoint": {"upto": 1, "done": 1}, "timings": {"read_s": 0.5}},
    {"type": "lost", "attempt": 3, "cause": "poisoned", "detail": "d"},
]
STREAM = b"".join(json.dumps(message).encode() + b"\n" for message in SAID)


def test_messages_are_the_same_wherever_the_stream_is_cut() -> None:
    whole = list(Lines().feed(STREAM))
    assert len(whole) == len(SAID)
    for cut in range(len(STREAM)):
        lines = Lines()
        assert [*lines.feed(STREAM[:cut]), *lines.feed(STREAM[cut:])] == whole


@pytest.mark.parametrize(
    "message",
    [
        {"type": "heartbeat", "attempt": -1},
        {"type": "heartbeat", "attempt": "3"},
        {"type": "heartbeat", "attempt": 3, "progress": 1.5},
        {"type": "loaded", "load_s": -0.1},
        {"type": "loaded", "load_s": 1e300},
        {"type": "lost", "attempt": 3, "cause": "boredom"},
        {"type": "checkpoint", "attempt": 3, "checkpoint": {}, "timings": {"read_s": -1}},
        {"type": "checkpoint", "attempt": 3},
        {"type": "load", "handler": "x"},
        {"attempt": 3},
        [],
        3,
    ],
)
def test_message_out_of_bounds_is_a_violation(message: object) -> None:
    with pytest.raises(Violation):
        list(Lines().feed(json.dumps(message).encode() + b"\n"))


def test_mutated_messages_raise_nothing_but_violations() -> None:
    chance = random.Random(20_000)
    violations = 0
    for _ in range(20_000):
        mutated = bytearray(STREAM)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        try:
            list(Lines().feed(bytes(mutated)))
        except Violation:
            violations += 1
    assert violations > 10_000


def test_deep_nesting_is_a_violation() -> None:
    with pytest.raises(Violation):
        list(Lines().feed(b'{"type":"hello","x":' + b"[" * 100_000 + b"\n"))


# --- a job's files ------------------------------------------------------------------------------------------------------


def test_lock_is_free_when_nobody_holds_it_and_is_not_kept(tmp_path: Path) -> None:
    assert grant.lock_is_free(tmp_path)
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not grant.lock_is_free(tmp_path)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert grant.lock_is_free(tmp_path)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("page", "spans"),
    [
        ((7, 21, 30, 11, 20), (Span(21, 30), Span(11, 20))),
        ((7, 21, 30, 0, 0), (Span(21, 30),)),
        ((7, 0, 0, 11, 20), (Span(0, 0), Span(11, 20))),
        ((7, 0, 0, 0, 0), ()),
        ((7, 30, 21, 0, 0), ()),
        ((7, 21, 51, 0, 5), ()),
        ((6, 21, 30, 11, 20), ()),
    ],
)
def test_suspects_are_read_where_they_can_be_true(
    tmp_path: Path, page: tuple[int, ...], spans: tuple[Span, ...]
) -> None:
    (tmp_path / "suspects").write_bytes(grant.SUSPECTS.pack(*page).ljust(64, b"\0"))
    assert grant.read_suspects(tmp_path, 7, 50) == spans


@pytest.mark.parametrize("what", ["missing", "short", "link", "folder", "fifo"])
def test_page_of_suspects_that_is_none_accuses_nobody(tmp_path: Path, what: str) -> None:
    path = tmp_path / "suspects"
    if what == "short":
        path.write_bytes(b"\0" * 39)
    elif what == "link":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    assert grant.read_suspects(tmp_path, 0, 50) == ()


async def test_log_is_bounded_over_leases_and_remarks_still_come_through(tmp_path: Path) -> None:
    for lease in range(2):
        log = JobLog(tmp_path, 1, 100, lambda _: None)
        await log.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.run)
            log.feed(b"x" * 70)
            log.remark(f"lease {lease}")
            log.close()
    text = (tmp_path / "log").read_text()
    assert text == (
        "x" * 70
        + "[gpujobd: lease 0]\n"
        + "x" * 11
        + "[gpujobd: lease 1]\n\n[log full: 59 more bytes dropped]\n"
    )


async def test_log_keeps_what_came_before_a_cancellation(tmp_path: Path) -> None:
    log = JobLog(tmp_path, 1, 100, lambda _: None)
    await log.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        log.feed(b"last words")
        nursery.cancel_scope.cancel()
    assert (tmp_path / "log").read_text() == "last words"


# --- devices ------------------------------------------------------------------------------------------------------------


def python_that(tmp_path: Path, does: str) -> str:
    path = tmp_path / f"python-{len(list(tmp_path.iterdir()))}"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def configured(*pythons: str, devices: Any = "auto") -> Config:
    handlers = {f"h{n}": Handler(entry="m:C", python=python) for n, python in enumerate(pythons)}
    return Config(file=File(devices=devices), handlers=handlers)


async def test_listed_devices_are_taken_as_they_are() -> None:
    assert await find_devices(configured(devices=("cuda:3", "cpu"))) == ("cuda:3", "cpu")


async def test_devices_are_those_that_some_interpreter_sees(tmp_path: Path) -> None:
    one = python_that(tmp_path, "echo warning; echo gpujobd-devices:1")
    two = python_that(tmp_path, "echo gpujobd-devices:2")
    dead = python_that(tmp_path, "echo gpujobd-devices:9; exit 1")
    mute = python_that(tmp_path, "exit 0")
    assert await find_devices(configured(one, two, dead, mute, "/nonexistent")) == ("cuda:0", "cuda:1")
    assert await find_devices(configured(dead, mute)) == ("cpu",)


async def test_probe_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PROBE_S", 0.2)
    with trio.fail_after(HANG_S):
        assert await find_devices(configured(python_that(tmp_path, "exec sleep 600"))) == ("cpu",)


async def test_interpreter_whose_torch_is_none_or_not_for_gpus_sees_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported in vain')")
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    handler = Handler(entry="m:C", python=sys.executable, path=(str(tmp_path),))
    with_torch = Config(file=File(), handlers={"h": handler})
    assert await find_devices(with_torch) == ("cpu",)


async def test_torch_built_for_gpus_is_asked_how_many_there_are(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 3)\n"
    )
    (tmp_path / "torch" / "version.py").write_text("cuda = '12.8'\n")
    handler = Handler(entry="m:C", python=sys.executable, path=(str(tmp_path),))
    with_torch = Config(file=File(), handlers={"h": handler})
    assert await find_devices(with_torch) == ("cuda:0", "cuda:1", "cuda:2")
