"""The frame of the fault suite: fresh seeds, what a row needs of the host, and one table at the end.

    for seed in cases(1_500):     # fewer with GPUJOBD_FAULTS_SCALE=0.05, the one case with GPUJOBD_SEED=N
        survive(seed)
        count(5)                  # one more in row 5 of the table, whatever process of xdist this is

Rule 1: a case follows from its seed alone. A failure prints the command that replays the one case it failed in.
Rule 2: what ran is counted where it ran, one by one, so that the table cannot promise more than was done.
Rule 3: what the host does not have is said aloud: the row skips with its reason, and the table shows it.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import secrets
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator

import pytest

ROWS = {
    1: ("power cut in the simulated disk, whole store", 20_000),
    2: ("power cut at every operation of the scenarios", 5_000),
    3: ("I/O error at every operation", 3_000),
    4: ("bit rot: journal, snapshot, outputs, blocks", 290_000),
    5: ("kill -9 of the store, real disk", 1_500),
    6: ("kill -9 at the k-th system call", 300),
    7: ("kill -9 of the whole daemon", 226),
    8: ("power cut of a real kernel file system", 450),
    9: ("power cut below a real kernel file system", 40),
    10: ("failed sync of a real kernel file system", 12),
    11: ("full disk, whole daemon", 40),
    12: ("API sequences by hypothesis", 2_500),
    13: ("days of a daemon in simulation", 30),
    14: ("mutated frames, clients and workers", 1_270_000),
    15: ("clients that take what there is", 4),
    16: ("workers that misbehave", 69),
    17: ("far ends on a bad day, told of jobs by the notifier", 720),
    18: ("SIGTERM at random moments", 65),
    19: ("clocks that step, processes that stand still", 50),
    20: ("other users and what they hand in", 200),
    21: ("file system that forgets, whole daemon", 20),
    22: ("variants of the program that are broken", 13),
}
"""Row: what goes wrong, and how often in a run of scale 1."""

COUNTED, SKIPPED = "fault counted", "fault skipped"
CASE = pytest.StashKey[int]()
FIRST = pytest.StashKey[int]()
RUN_SEED = pytest.StashKey[int]()
TABLE = pytest.StashKey["Table"]()
SEED = os.environ.get("GPUJOBD_SEED")
SCALE = float(os.environ.get("GPUJOBD_FAULTS_SCALE", "1"))


# --- what tests use -------------------------------------------------------------------------------------------


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """count(row, n=1): so many more faults were met, and survived."""
    counted: dict[int, int] = {}

    def add(row: int, n: int = 1) -> None:
        assert row in ROWS, row
        counted[row] = counted.get(row, 0) + n

    yield add
    first = request.node.stash.get(FIRST, -1)
    request.node.user_properties += [(COUNTED, (row, n, first)) for row, n in counted.items()]


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Callable[[int], Iterator[int]]:
    """cases(n): the seeds of n cases, fresh in every run; GPUJOBD_SEED alone where it is set."""

    def draw(n: int) -> Iterator[int]:
        first = request.config.stash[RUN_SEED] ^ zlib.crc32(request.node.nodeid.encode())
        request.node.stash[FIRST] = first if SEED is None else int(SEED)
        for seed in range(first, first + scaled(n)) if SEED is None else [int(SEED)]:
            request.node.stash[CASE] = seed
            yield seed

    return draw


@pytest.fixture
def sampled() -> Callable[[range, int], Iterable[int]]:
    """sampled(space, seed): all of a space that is to be exhausted; with GPUJOBD_FAULTS_SCALE below 1 a part of it."""
    return lambda space, seed: space if SCALE >= 1 else random.Random(seed).sample(space, scaled(len(space)))


@pytest.fixture
def needs(request: pytest.FixtureRequest) -> Callable[..., None]:
    """needs(row, "root", "loop", "fuse", "mkfs.xfs", ...): skip, and say so in the table, where one is missing."""

    def check(row: int, *things: str) -> None:
        for thing in things:
            if why := missing(thing):
                request.node.user_properties.append((SKIPPED, (row, why)))
                pytest.skip(f"row {row}: {why}")

    return check


def scaled(n: int) -> int:
    """As many as GPUJOBD_FAULTS_SCALE makes of n, at least one."""
    return max(1, round(n * SCALE))


def missing(thing: str) -> str:
    """Why the host cannot do it; empty: it can."""
    match thing:
        case "root":
            return "" if os.geteuid() == 0 else "not root"
        case "loop":
            found = subprocess.run(
                ["losetup", "--find"], capture_output=True, check=False, env=os.environ | {"PATH": PATH}
            )
            return "" if found.returncode == 0 else "no loop devices"
        case "fuse":
            return _missing_fuse()
        case command:
            return "" if shutil.which(command, path=PATH) else f"no {command}"


PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where mkfs is, whoever asks


def _missing_fuse() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    try:
        import pyfuse3  # noqa: F401
    except ImportError:
        return "no pyfuse3 (tests/faults/needs.sh)"
    return missing("fusermount3")


# --- the run's seed, and the command that replays a case ------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    inherited = getattr(config, "workerinput", {}).get("faults_seed")
    config.stash[RUN_SEED] = secrets.randbits(40) if inherited is None else inherited
    config.stash[TABLE] = Table()
    config.pluginmanager.register(config.stash[TABLE], "faults table")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """xdist: every worker draws from the same seed."""
    node.workerinput["faults_seed"] = node.config.stash[RUN_SEED]  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    report = yield
    if report.failed and CASE in item.stash:
        replay = f"GPUJOBD_SEED={item.stash[CASE]} .venv/bin/pytest -m slow '{item.nodeid}'"
        report.sections.append(("replay this case alone", replay))
    return report


# --- the table ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Line:
    """One row, over all tests that counted for it."""

    count: int = 0
    seconds: float = 0.0
    firsts: list[int] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    failed: int = 0


class Table:
    """Gathers from the reports of tests, which xdist brings to the process that prints."""

    def __init__(self) -> None:
        self.lines: dict[int, Line] = collections.defaultdict(Line)
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            self._failed.add(report.nodeid)
        if report.when == "teardown":
            self._add(report)

    def _add(self, report: pytest.TestReport) -> None:
        for what, told in report.user_properties:
            line = self.lines[told[0]] if what in (COUNTED, SKIPPED) else Line()
            if what == SKIPPED:
                line.skipped.append(told[1])
            elif what == COUNTED:
                line.count += told[1]
                line.seconds += self._seconds.pop(report.nodeid, 0.0)
                line.failed += report.nodeid in self._failed
                line.firsts += [told[2]] if told[2] >= 0 else []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.lines:
            return
        terminalreporter.section("faults", sep="=")
        for text in self.text():
            terminalreporter.line(text)

    def text(self) -> Iterator[str]:
        yield f"{'row':>3}  {'what goes wrong':<48}{'met':>11}{'planned':>11}{'time':>9}  first seed"
        for row, line in sorted(self.lines.items()):
            what, planned = ROWS[row]
            seed = str(min(line.firsts)) if line.firsts else "-"
            planned = scaled(planned)
            yield f"{row:>3}  {what:<48}{line.count:>11,}{planned:>11,}{line.seconds:>7.1f} s  {seed}"
            if line.failed:
                yield f"     FAILED: {line.failed} of its tests"
            for why in dict.fromkeys(line.skipped):
                yield f"     SKIPPED {line.skipped.count(why)} of its tests: {why}"
        skipped = sum(bool(line.skipped) for line in self.lines.values())
        met = sum(line.count for line in self.lines.values())
        yield f"{met:,} faults met, {skipped} rows skipped or in part, scale {SCALE:g}"
