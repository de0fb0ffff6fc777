"""Journals with holes: every kind of record lost, alone and in company; then the daemon starts, and people read their jobs."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from core_house import ALICE, BOB, ROOT, House, check_bookkeeping, persistent
from gpujobd import protocol, recovery
from gpujobd.core import events, inputs, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.decide import decide
from gpujobd.core.events import AnyEvent, decode
from gpujobd.core.mend import NOWHERE, Mender
from gpujobd.core.model import FINAL, JobState, State
from gpujobd.disk import Disk
from gpujobd.frames import BLOCK
from harness import HANG_S, Host, fake, until
from simulated_world import RULES, World

Numbered = list[tuple[int, AnyEvent]]


def mended(base: State, kept: Numbered, last_seq: int) -> Mender:
    mender, begun = Mender(base), base.seq
    for seq, event in kept:
        mender.take(seq, event)
    seqs = {seq for seq, _ in kept}
    mender.finish(last_seq, lambda seq: seq <= begun or seq in seqs)
    return mender


def goes_on(state: State, now_ns: int) -> None:
    """A daemon starts on it and looks at everything that is due."""
    check_bookkeeping(state)
    assert NOWHERE not in state.devices
    given: inputs.AnyInput = inputs.Start(boot_id="again", version="1", devices=("cpu",))
    for _ in range(1_000):
        more = decide(state, RULES, given, now_ns)
        if not more:
            break
        for event in more:
            apply(state, event, state.seq + 1)
        given = inputs.Tick()
    check_bookkeeping(state)
    snapshot.load(list(snapshot.chunks(state)))


def a_day(seed: int, steps: int = 150) -> tuple[list[bytes], Numbered, World]:
    world = World(seed)
    for _ in range(steps):
        world.step()
    world.commit()
    first = snapshot.load(world.base).seq + 1
    return world.base, list(enumerate(world.journal, first)), world


@pytest.mark.parametrize("seed", range(12))
def test_without_a_hole_the_state_is_that_of_a_replay(seed: int) -> None:
    base, numbered, _ = a_day(seed)
    plain = snapshot.load(base)
    for seq, event in numbered:
        apply(plain, event, seq)
    mender = mended(snapshot.load(base), numbered, plain.seq)
    assert persistent(mender.state) == persistent(plain)
    assert not mender.unknown
    assert not mender.notes


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_lost_the_rest_makes_a_state_that_goes_on(seed: int) -> None:
    rng = random.Random(seed)
    base, numbered, world = a_day(seed)
    begun = snapshot.load(base)
    last = numbered[-1][0] if numbered else begun.seq
    given = set(begun.jobs) | {event.job_id for _, event in numbered if isinstance(event, events.Submitted)}
    for _ in range(8):
        lost = set(
            rng.sample(range(begun.seq + 1, last + 1), min(len(numbered), rng.choice((1, 1, 2, 5, 40))))
        )
        at = rng.randint(begun.seq + 1, max(last, begun.seq + 1))
        lost |= set(range(at, min(last, at + rng.choice((0, 3, 30))) + 1))
        kept = [(seq, event) for seq, event in numbered if seq not in lost]
        try:
            mender = mended(snapshot.load(base), kept, last)
        except BaseException:
            print(f"seed {seed}, lost {sorted(lost)}")
            raise
        state = mender.state
        told = {event.job_id for _, event in kept if isinstance(event, events.Submitted)} | set(begun.jobs)
        gone = {event.job_id for _, event in kept if isinstance(event, events.Removed)} | set(begun.removed)
        assert told - gone <= set(state.jobs)
        assert set(state.jobs) <= told
        assert state.next_job_id > max(given, default=0)
        for _, event in kept:
            if isinstance(event, events.Completed) and (job := state.jobs.get(event.job_id)):
                assert (job.state, job.checkpoint) == (JobState.COMPLETED, event.checkpoint)
        for job in state.jobs.values():
            assert job.checkpoint.done + job.checkpoint.failed <= job.items
            assert (job.state is JobState.RUNNING) == any(
                device.lease and device.lease.job_id == job.job_id for device in state.devices.values()
            )
        goes_on(state, world.now_ns)


def history() -> Numbered:
    """Two jobs of two people, with a yield, a loss, a pause, and an end."""
    house = House()
    house.submit(ALICE)
    house.loaded()
    house.checkpoint(3)
    house.submit(BOB)
    house.wait(40)
    house.give_back(1)
    house.checkpoint(2)
    house.lose()
    house.wait(5)
    waits = 3 - house.runs()
    house.give(inputs.Pause(who=ROOT, job_id=waits))
    house.loaded()
    house.finish()
    house.give(inputs.Resume(who=ROOT, job_id=waits))
    house.finish()
    return list(enumerate(house.history, 1))


@pytest.mark.parametrize("lost", range(1, len(history()) + 1))
def test_any_single_record_may_be_lost_and_what_was_done_stays_done(lost: int) -> None:
    numbered = history()
    mender = mended(State(), [(seq, event) for seq, event in numbered if seq != lost], numbered[-1][0])
    state, gone = mender.state, dict(numbered)[lost]
    for job_id in (1, 2):
        if isinstance(gone, events.Submitted) and gone.job_id == job_id:
            assert job_id in mender.unknown
            assert job_id not in state.jobs
        elif isinstance(gone, events.Completed) and gone.job_id == job_id:
            assert state.jobs[job_id].state not in FINAL
        else:
            assert state.jobs[job_id].state is JobState.COMPLETED
            assert state.jobs[job_id].left == 0
    goes_on(state, 2_000_000_000 * 10**9)


def test_a_hole_at_the_end_gives_no_number_twice() -> None:
    numbered = history()
    mender = mended(State(), numbered[:2], 30)
    assert mender.state.next_job_id >= 1 + 28
    assert mender.state.seq == 30


# --- the whole daemon ---------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Three jobs: completed, half of it failed, and one that waits; killed, so that all of it is in the journal."""
    host = Host(tmp_path / "host", "", {"moody": fake("trouble:Moody", batch_max=2)})
    host.start()
    with host.client() as client:
        done = client.submit("moody", [{"text": str(n)} for n in range(6)]).job
        half = client.submit("moody", [{"text": "a"}, {"mood": "reject"}]).job
        client.wait(done, half)
        client.ask(protocol.Queue, action="stop")
        waits = client.submit("moody", [{"text": str(n)} for n in range(4)]).job
        assert (done, half, waits) == (1, 2, 3)
        until(lambda: client.ask(protocol.Ping).seq == settled(client), "all to be quiet")
    assert host.process is not None
    host.process.kill()
    host.process.wait()
    with host:
        pass_by(host)
        yield host


def settled(client: Any) -> int:
    import time

    time.sleep(0.3)
    return client.ask(protocol.Ping).seq


def pass_by(host: Host) -> None:
    """`with` starts it: stop it again the hard way, so that tests begin with a dead daemon."""
    assert host.process is not None
    host.process.kill()
    host.process.wait()


def journal_of(host: Host) -> Path:
    return host.folder / "state" / "journal"


def records(host: Host) -> Numbered:
    found = recovery.examine(Disk(), str(journal_of(host)))
    return [
        (seq, decode(record))
        for seq, record in recovery.records_after(Disk(), str(journal_of(host)), found.segments, 0)
    ]


def fsck(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpujobd", "fsck", "--state-dir", str(host.folder / "state"), *words],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def swap(host: Host) -> None:
    """What the last line of fsck says."""
    journal = journal_of(host)
    journal.rename(journal.with_name("journal.refused"))
    journal.with_name("journal.repaired").rename(journal)


def flipped(host: Host, seq: int) -> str:
    """Flip a bit of the frame that holds this record; the ranges that fsck says are unreadable then."""
    found = recovery.examine(Disk(), str(journal_of(host)))
    segment = max((s for s in found.segments if s.first_seq <= seq), key=lambda s: s.first_seq)
    with (journal_of(host) / segment.name).open("r+b") as file:
        file.seek(segment.locate(seq) + 60)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    report = fsck(host)
    assert report.returncode == 1
    assert "REFUSED" in report.stdout
    assert "given up: record" in report.stdout  # before anything is agreed to
    return report.stdout


def options(report: str) -> list[str]:
    """The command that the report proposes."""
    line = next(line for line in report.splitlines() if "gpujobd fsck --state-dir" in line)
    return shlex.split(line.partition("gpujobd fsck ")[2])


def outputs(host: Host, job: int) -> list[Any]:
    with host.client() as client:
        return client.output(job)


LOST: list[tuple[str, type, int, set[int]]] = [
    # what, its kind, of which job, the jobs that are not known afterwards
    ("the submission of a completed job", events.Submitted, 1, {1}),
    ("the submission of the job that waits", events.Submitted, 3, {3}),
    ("the beginning of a lease", events.Leased, 1, set()),
    ("a checkpoint or the end", events.Completed, 1, set()),
    ("the end of another", events.Completed, 2, set()),
]


QUICK = (LOST[0], LOST[2])  # a job that is lost, and one that is not: each takes four daemons


@pytest.mark.parametrize(
    ("what", "kind", "job", "unknown"),
    [pytest.param(*lost, id=lost[0], marks=[] if lost in QUICK else pytest.mark.slow) for lost in LOST],
)
def test_a_daemon_starts_on_the_repaired_copy_and_people_read_their_jobs(
    host: Host, what: str, kind: type, job: int, unknown: set[int]
) -> None:
    seq = next(seq for seq, event in records(host) if isinstance(event, kind) and event.job_id == job)
    before = {path.name: path.read_bytes() for path in journal_of(host).iterdir()}
    flipped(host, seq)
    report = fsck(host).stdout
    copied = fsck(host, *options(report))
    assert copied.returncode == 0, copied.stderr
    told = [line for line in report.splitlines() if line.startswith(("given up:", "job ", "kept:"))]
    assert told == [
        line for line in copied.stdout.splitlines() if line.startswith(("given up:", "job ", "kept:"))
    ]
    for gone in unknown:
        assert any("LOST" in line and str(gone) in line for line in told)
    assert {path.name for path in journal_of(host).iterdir()} == set(
        before
    )  # the journal itself is as it was
    swap(host)
    host.start()
    with host.client() as client:
        known = {shown.id for shown in client.ask(protocol.List).jobs}
        assert {1, 2, 3} - known >= unknown
        client.ask(protocol.Queue, action="start")
        ended = client.wait(*known)
        assert {shown.state for shown in ended} == {"completed"}
        for job_id, items in ((1, 6), (2, 1), (3, 4)):
            if job_id in known:
                assert len(client.output(job_id)) == items, "each item once"
        more = client.submit("moody", [{"text": "new"}]).job
        assert more > 3
        client.wait(more)
    assert host.stop() == 0
    host.start()  # and on what it wrote itself
    assert len(outputs(host, more)) == 1
    assert host.stop() == 0


def test_the_first_segment_is_gone_and_the_snapshot_too(host: Host) -> None:
    for path in journal_of(host).glob("snap-*"):
        path.unlink()
    (first, *_) = sorted(journal_of(host).glob("seg-*"))
    with first.open("r+b") as file:
        file.write(bytes(BLOCK))
    report = fsck(host)
    assert report.returncode == 1
    assert options(report.stdout) == ["--state-dir", str(host.folder / "state"), "--accept-loss", "none"]
    copied = fsck(host, *options(report.stdout))
    assert copied.returncode == 0, copied.stdout + copied.stderr
    swap(host)
    host.start()
    with host.client() as client:
        assert isinstance(client.ask(protocol.Queue, action="start"), protocol.Done)
        job = client.submit("moody", [{"text": "new"}]).job
        client.wait(job)
    assert host.stop() == 0


def test_a_readable_record_that_is_named_is_given_up_and_the_daemon_starts(host: Host) -> None:
    """A record that stops the daemon though its bytes are right."""
    seq = next(
        seq for seq, event in records(host) if isinstance(event, events.Submitted) and event.job_id == 2
    )
    copied = fsck(host, "--accept-loss", f"{seq}..{seq}")
    assert copied.returncode == 0, copied.stderr
    assert "job 2: LOST" in copied.stdout
    swap(host)
    host.start()
    with host.client() as client:
        assert client.ask(protocol.Show, job=2).code == "no_such_job"
        assert client.job(1).state == "completed"
    assert host.stop() == 0
