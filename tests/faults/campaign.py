"""Clients that submit, read and meddle while their daemon dies again and again, and what must be true all the same.

Rule 1: the ledger holds what clients were told, and nothing that they only think.
Rule 2: after every start the daemon is held to it: each promise kept, each question without an answer asked again,
no job more than these, nothing shown as running that is not.
Rule 3: in the end every job is final, and every line of every job is in its outputs once and in order; the events
are numbered without a gap, are those that were seen before, and none follows a job's last one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpujobd import protocol
from harness import HANG_S, Client, Host, until

FINAL = frozenset({"completed", "failed", "cancelled", "expired"})
FINAL_EVENTS = FINAL
AFTER_FINAL = frozenset({"removed", "inputs_spooled"})
SAMPLE = 5  # promises that are asked again after every start


class Wish(NamedTuple):
    """A submission: with it, all of its items can be made again. `of`: a retry of that job."""

    submit_id: str
    items: int
    pad: int = 0
    of: int = 0

    def texts(self) -> list[str]:
        return [f"{self.submit_id} {n} " + "." * self.pad for n in range(self.items)]


class Ledger:
    def __init__(self) -> None:
        self.promised: dict[int, Wish] = {}  # job: what was acknowledged
        self.unanswered: dict[str, Wish] = {}
        self.ended: dict[int, str] = {}  # job: the final state it was shown in
        self.removed: set[int] = set()
        self.perhaps_removed: set[int] = set()
        self.retried: set[int] = set()
        self.facts: dict[int, dict] = {}
        self.repeats = 0

    def promise(self, wish: Wish, job: int) -> None:
        """The daemon has said that this is the job."""
        known = self.promised.setdefault(job, wish)
        assert known == wish, f"job {job} was promised to {known} and to {wish}"
        earlier = [other for other, it in self.promised.items() if it.submit_id == wish.submit_id]
        assert earlier == [job], f"{wish.submit_id} is promised as jobs {earlier}"
        self.unanswered.pop(wish.submit_id, None)

    def saw(self, job: protocol.Job) -> None:
        before = self.ended.get(job.id)
        assert before in (None, job.state), f"job {job.id} was {before} and is {job.state}"
        if job.state in FINAL:
            self.ended[job.id] = job.state

    def saw_fact(self, seq: int, event: dict) -> None:
        known = self.facts.setdefault(seq, event)
        assert known == event, f"event {seq} was {known} and is {event}"


class Campaign:
    """Many lives of one daemon. `rng` decides everything that the clients choose."""

    def __init__(self, host: Host, rng: random.Random) -> None:
        self.host = host
        self.rng = rng
        self.ledger = Ledger()
        self.surprises: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._calls: list[tuple[Wish, subprocess.Popen[str]]] = []

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for _, call in self._calls:
            call.kill()
            call.communicate()

    # --- a life -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the clients loose. The daemon answers."""
        self._over.clear()
        for play in (self._submit, self._read, self._meddle, self._follow):
            rng = random.Random(self.rng.random())
            thread = threading.Thread(target=self._play, args=(play, rng), name=play.__name__)
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        """The daemon is dead: its clients are, too."""
        self._over.set()
        for thread in self._threads:
            thread.join(HANG_S)
            assert not thread.is_alive(), f"{thread.name} hangs"
        self._threads.clear()
        if self.surprises:
            raise self.surprises[0]

    def _play(self, play: Callable[[Client, random.Random], None], rng: random.Random) -> None:
        try:
            with self.host.client() as client:
                while not self._over.is_set():
                    play(client, rng)
        except TimeoutError as error:  # it lives, and does not answer
            self.surprises.append(error)
        except OSError:
            pass  # the daemon is gone
        except BaseException as error:  # noqa: BLE001 - told by end()
            self.surprises.append(error)

    # --- clients ------------------------------------------------------------------------------------------------------

    def _submit(self, client: Client, rng: random.Random) -> None:
        time.sleep(rng.expovariate(50))
        what = rng.random()
        if what < 0.15 and self.ledger.promised:
            self.repeat(client, *rng.choice(list(self.ledger.promised.items())))
        elif what < 0.2:
            self._break_off(client, rng)
        else:
            wish = Wish(uuid.UUID(int=rng.getrandbits(128)).hex, rng.randrange(1, 40))
            if what < 0.4:
                wish = wish._replace(
                    items=rng.randrange(80, 120), pad=1000
                )  # too large to ride in the header
            self.ask(client, wish)

    def ask(self, client: Client, wish: Wish) -> None:
        """Submit; the answer may never come."""
        self.ledger.unanswered[wish.submit_id] = wish
        if wish.of:
            reply = client.ask(protocol.Retry, job=wish.of, submit_id=wish.submit_id)
        else:
            items = [{"text": text} for text in wish.texts()]
            reply = client.submit("count", items, submit_id=wish.submit_id)
        if isinstance(reply, protocol.Accepted):
            self.ledger.promise(wish, reply.job)
        else:
            assert isinstance(reply, protocol.Error), reply
            assert reply.code not in ("internal", "bad_request", "conflict"), reply
            # Dead, or on its way: whether it was kept is not known. Else it was refused, and must never be there.
            if reply.code not in ("not_accepted", "timed_out"):
                self.ledger.unanswered.pop(wish.submit_id, None)

    def repeat(self, client: Client, job: int, wish: Wish) -> None:
        """Ask again for what was promised."""
        if wish.of and wish.of in self.ledger.perhaps_removed:
            return
        self.ledger.repeats += 1
        self.ask(client, wish)

    def _break_off(self, client: Client, rng: random.Random) -> None:
        """Hang up in the middle of an input."""
        with self.host.client() as other:
            reply = other.ask(
                protocol.Submit,
                submit_id=uuid.UUID(int=rng.getrandbits(128)).hex,
                handler="count",
                items=2000,
                input_bytes=200_000,
                input_sha256=bytes(32),
                item_bytes=200,
            )
            if isinstance(reply, protocol.GoOn):
                other.send(protocol.Chunk(id=other.last_id, data=b"x" * rng.randrange(1, 100_000)))

    def _read(self, client: Client, rng: random.Random) -> None:
        time.sleep(rng.expovariate(40))
        kinds = [protocol.Ping, protocol.Status, protocol.Tenants, protocol.Devices]
        reply = client.ask(rng.choice(kinds))
        assert not isinstance(reply, protocol.Error), reply
        if isinstance(reply, protocol.StatusTable):
            for job in [*reply.running, *reply.waiting]:
                self.ledger.saw(job)
        if self.ledger.promised:
            job_id = rng.choice(list(self.ledger.promised))
            shown = client.ask(protocol.Show, job=job_id)
            if isinstance(shown, protocol.Error):
                assert job_id in self.ledger.perhaps_removed, shown
            else:
                self.ledger.saw(shown.job)

    def _meddle(self, client: Client, rng: random.Random) -> None:
        time.sleep(rng.expovariate(40))
        if not self.ledger.promised:
            return
        job = rng.choice(list(self.ledger.promised)[-10:])
        what = rng.random()
        if what < 0.3:
            client.ask(protocol.Cancel, job=job, message="enough")
        elif what < 0.45:
            client.ask(protocol.Pause, job=job)
        elif what < 0.6:
            client.ask(protocol.Resume, job=job)
        elif what < 0.7:
            client.ask(protocol.SetPriority, job=job, priority=rng.choice(["low", "normal", "high"]))
        elif what < 0.85:
            self._retry(client, rng)
        elif what < 0.95:
            self._remove(client, rng)
        else:
            client.ask(protocol.Queue, action=rng.choice(["stop", "start", "start"]))

    def _retry(self, client: Client, rng: random.Random) -> None:
        cancelled = {job for job, state in self.ledger.ended.items() if state == "cancelled"}
        if some := sorted(cancelled - self.ledger.perhaps_removed - self.ledger.retried):
            self.ledger.retried.add(some[-1])
            self.ask(client, Wish(uuid.UUID(int=rng.getrandbits(128)).hex, 0, of=some[-1]))

    def _remove(self, client: Client, rng: random.Random) -> None:
        if some := sorted(set(self.ledger.ended) - self.ledger.retried - self.ledger.removed):
            job = rng.choice(some)
            self.ledger.perhaps_removed.add(job)
            if isinstance(client.ask(protocol.Remove, job=job), protocol.Done):
                self.ledger.removed.add(job)

    def _follow(self, client: Client, rng: random.Random) -> None:
        client.send(protocol.Events(id=1 << 20, since=max(self.ledger.facts, default=0) + 1, follow=True))
        while not self._over.is_set():
            reply = client.receive()
            if isinstance(reply, protocol.EventSeen):
                self.ledger.saw_fact(reply.seq, reply.event)

    def call_jobctl(self) -> None:
        """A user at a terminal, who does not care that the daemon dies: jobctl asks until it is answered."""
        wish = Wish(uuid.UUID(int=self.rng.getrandbits(128)).hex, 3)
        self.ledger.unanswered[wish.submit_id] = wish
        lines = "".join(json.dumps({"text": text}) + "\n" for text in wish.texts())
        words = ["submit", "count", "-", "--submit-id", wish.submit_id]
        call = subprocess.Popen(
            [sys.executable, "-m", "jobctl", "--socket", str(self.host.socket), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        call.stdin.write(lines)
        call.stdin.close()
        call.stdin = None
        self._calls.append((wish, call))

    def _hear_jobctl(self) -> None:
        for wish, call in self._calls:
            out, told = call.communicate(timeout=HANG_S)
            assert call.returncode in (0, 3), told
            if call.returncode == 0:
                self.ledger.promise(wish, int(out))
        self._calls.clear()

    # --- after a start --------------------------------------------------------------------------------------------------

    def hold_to_it(self) -> None:
        """The daemon has just started: is everything there that was promised, and nothing else?"""
        self._hear_jobctl()
        with self.host.client() as client:
            status = client.ask(protocol.Status)
            if status.switches.stopped:
                assert status.running == [], status.running
                client.ask(protocol.Queue, action="start")
            jobs = listed(client)
            for job in jobs.values():
                self.ledger.saw(job)
                assert job.reason != "OutputDamaged", job
                if job.state == "paused" and job.reason == "CrashLoop":
                    client.ask(protocol.Resume, job=job.id)
            for wish in list(self.ledger.unanswered.values()):
                self.ask(client, wish)  # whether it was kept or not, from now on it is
                self.ask(client, wish)
            some = list(self.ledger.promised.items())
            for job, wish in self.rng.sample(some, min(SAMPLE, len(some))):
                self.repeat(client, job, wish)
            self._compare(set(listed(client)))

    def _compare(self, there: set[int]) -> None:
        promised = set(self.ledger.promised)
        missing = promised - there - self.ledger.perhaps_removed
        assert not missing, f"promised and not there: {missing}"
        assert not there - promised, f"there and asked by nobody: {there - promised}"
        assert not there & self.ledger.removed, f"removed and there: {there & self.ledger.removed}"

    # --- in the end -------------------------------------------------------------------------------------------------------

    def settle(self, *, lost_items_max: int = 0) -> None:
        """Let all work end, then look at all of it."""
        self._hear_jobctl()
        with self.host.client() as client:
            client.ask(protocol.Queue, action="start")
            self._let_finish(client)
            jobs = listed(client)
            self._compare(set(jobs))
            assert client.ask(protocol.Status).running == []
            lost = sum(self._check_outputs(client, job) for job in jobs.values())
            assert lost <= lost_items_max, f"{lost} items failed"
            self._check_events(client)

    def _let_finish(self, client: Client) -> None:
        def left() -> list[int]:
            jobs = listed(client).values()
            for job in jobs:
                self.ledger.saw(job)
                if job.state == "paused":
                    client.ask(protocol.Resume, job=job.id)
            return [job.id for job in jobs if job.state not in FINAL]

        while some := left()[: protocol.PAGE_JOBS_MAX]:
            for job in client.wait(*some):
                self.ledger.saw(job)

    def _check_outputs(self, client: Client, job: protocol.Job) -> int:
        """Every line once, in order, with the right output; returns how many were lost to their workers."""
        wish = self.ledger.promised[job.id]
        origin = wish
        while origin.of:
            origin = self.ledger.promised[origin.of]
        texts = origin.texts()
        results, errors = client.output(job.id), client.output(job.id, errors=True)
        done, failed = [r["line"] for r in results], [e["line"] for e in errors]
        where = f"job {job.id} of {wish.submit_id}"
        assert done == sorted(set(done)), f"{where}: lines twice or out of order: {done}"
        assert failed == sorted(set(failed)), f"{where}: {failed}"
        assert not {*done} & {*failed}, f"{where}: done and failed: {done}, {failed}"
        assert (len(done), len(failed)) == (job.items.done, job.items.failed), f"{where}: {job}"
        if job.state == "completed":
            assert len(done) + len(failed) == job.items.total, f"{where}: {job}"
            assert wish.of or sorted(done + failed) == list(range(1, wish.items + 1)), f"{where}: {job}"
        for record in results:
            text = texts[record["line"] - 1]
            assert record["output"] == {"sha256": hashlib.sha256(text.encode()).hexdigest()}, where
        assert {e["error"]["code"] for e in errors} <= {"worker_lost"}, errors
        return len(failed)

    def _check_events(self, client: Client) -> None:
        events, first = read_events(client)
        numbers = sorted(events)
        assert numbers == list(range(first, numbers[-1] + 1)), "a gap in the events"
        for seq, event in self.ledger.facts.items():
            if seq >= first:
                assert events.get(seq) == event, f"event {seq} was {event} and is {events.get(seq)}"
        ended: dict[int, str] = {}
        for seq in numbers:
            name, job = events[seq]["event"], events[seq].get("job")
            if job in ended:
                assert name in AFTER_FINAL, f"job {job} was {ended[job]}, then came {events[seq]}"
            if job and name in FINAL_EVENTS:
                ended[job] = name


def listed(client: Client) -> dict[int, protocol.Job]:
    """Every job there is."""
    jobs: dict[int, protocol.Job] = {}
    after = 0
    while True:
        page = client.ask(protocol.List, after=after)
        jobs |= {job.id: job for job in page.jobs}
        after = page.next
        if not after:
            return jobs


def read_events(client: Client) -> tuple[dict[int, dict], int]:
    """All that are kept, by number, and the first number."""
    client.last_id += 1
    client.send(protocol.Events(id=client.last_id, since=1))
    events: dict[int, dict] = {}
    first = 1
    while not isinstance(reply := client.receive(), protocol.Done):
        if isinstance(reply, protocol.Gap):
            assert not events, f"a gap after {max(events)}"
            first = reply.first_seq
        elif isinstance(reply, protocol.EventSeen):
            events[reply.seq] = reply.event
    return events, first


@contextlib.contextmanager
def ended(host: Host) -> Iterator[Host]:
    """A host that the test starts itself, as often as it likes; whatever happens, nothing of it is left."""
    try:
        yield host
    finally:
        host.__exit__()


def kill(host: Host) -> None:
    """As nobody would do it on purpose."""
    assert host.process is not None
    with contextlib.suppress(ProcessLookupError):
        host.process.send_signal(signal.SIGKILL)
    assert host.process.wait(HANG_S) == -signal.SIGKILL, host.log()


def wait_for_death(host: Host) -> bool:
    """Whether the process has ended by SIGKILL; it is about to."""
    assert host.process is not None
    return host.process.wait(HANG_S) == -signal.SIGKILL


def answers_or_died(host: Host) -> bool:
    """Whether it answers; it may die before."""
    assert host.process is not None

    def seen() -> str:
        if host.process.poll() is not None:
            return "dead"
        with contextlib.suppress(OSError), host.client():
            return "alive"
        return ""

    return until(seen, "the daemon to answer or to die") == "alive"
