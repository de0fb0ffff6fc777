"""What must hold, looked at from outside: the facts as they were committed, and what people were told.

    after every turn      work conserved, one lease a device, limits kept, nobody starved, nothing runs that does not
    after every commit    numbers without gaps, ids never again, final states final, only the lease's own attempt
    at a job's end        every item exactly once, in its outputs, and what its text says
    at every start        nothing told is gone, nothing came twice, inputs are whole, replay is what was lived

Rule 1: the oracle has a memory of its own. It believes the daemon nothing that it can find out otherwise.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable
from typing import Any, Final

import msgspec
from core_house import bookkeeping, check_bookkeeping
from gpujobd import protocol
from gpujobd.core import events, policy, residency, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.leases import BACKOFF_MAX_NS, ILL_MAX_NS
from gpujobd.core.model import FINAL, S_NS, Job, JobState, Priority, Rules, State, YieldWhy
from gpujobd.daemon import Daemon
from gpujobd.journal import Recovered
from simulation.people import Submission
from simulation.pulse import Pulse
from simulation.workers import outcome_of

REST_MAX_S: Final = 2 * (ILL_MAX_NS / S_NS) + BACKOFF_MAX_NS / S_NS + 300
"""The longest backoff, a job's after its canary failed, then a device's or a handler's that began just before its end."""


class Oracle:
    def __init__(
        self, spool: str, now_s: Callable[[], float], pulse: Pulse, is_admin: Callable[[int], bool]
    ) -> None:
        self.facts: list[tuple[str, int]] = []  # tag and job of every committed event, by number - 1
        self.finished = self.items = self.records_read = 0
        self._spool, self._now_s, self._is_admin = spool, now_s, is_admin
        # A lease without any event: loading, then a stall, each with its dump, its terms and its kills.
        self._silent_lease_s = pulse.load_timeout_s + pulse.stall_s + 10 * pulse.look_s + 300
        self._unheard_lease_s = 2 * pulse.look_s + 30  # a lease the supervisor does not know of
        self._batch_s = 30 * pulse.item_s + pulse.checkpoint_s + 10 * pulse.load_s
        self._base: list[bytes] = []  # snapshot of what was lived until the last death
        self._lived: State | None = None
        self._submissions: dict[tuple[int, str], Submission] = {}
        self._jobs: dict[int, events.Submitted] = {}
        self._by_submit_id: dict[tuple[int, str], int] = {}
        self._told: dict[int, Submission] = {}
        self._removed: set[int] = set()
        self._forgotten: set[int] = set()
        self._final: dict[int, JobState] = {}
        self._attempts: dict[int, int] = {}
        self._granted: dict[int, tuple[float, int]] = {}  # since when, and how often
        self._held: dict[int, YieldWhy] = {}  # jobs that somebody paused or cancelled
        self._heard_of_lease: dict[str, float] = {}
        self._daemon: Daemon
        self._looked_s = 0.0
        self._rests_since_s: dict[str, float] = {}  # devices, handlers and jobs in backoff
        self._waits_s: dict[str, float] = {}
        self._gaps: dict[tuple[str, str], float] = {}
        self.widest_gap_s = self.longest_wait_s = 0.0

    # --- starts and ends ------------------------------------------------------------------------------------------------

    def recovered(self, found: Recovered) -> None:
        """What the journal holds after whatever happened: at least what was lived, in the same order."""
        records = list(found.records)
        found.records = iter(records)
        if self._lived is None:
            return
        state = snapshot.load(found.snapshot[1]) if found.snapshot else State()
        lived = self._lived
        assert state.seq <= lived.seq, "a snapshot of what never was"
        for seq, record in records:
            if seq > lived.seq:
                self._note_fact(seq, events.decode(record))  # in flight, and it reached the disk
                continue
            apply(state, events.decode(record), seq)
        assert state.seq == lived.seq, f"facts up to {lived.seq} were told, the journal ends at {state.seq}"
        assert not (differ := _difference(state, lived)), f"replay is not what was lived: {differ}"

    def begin_life(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._looked_s = self._now_s()
        self._heard_of_lease.clear()
        self._rests_since_s.clear()
        self._gaps.clear()
        state = daemon._turns.state
        assert state.seq == len(self.facts), (state.seq, len(self.facts))
        self._check_nothing_lost(state)
        for job in state.jobs.values():
            self._check_input(job)
            self._check_outputs(job)
        daemon._turns.followers.append(self._follow)
        turn = daemon._turns.turn

        def turn_and_look(now_ns: int) -> None:
            turn(now_ns)
            self._after_turn(now_ns)

        daemon._turns.turn = turn_and_look  # type: ignore[method-assign]

    def end_life(self) -> None:
        self._lived = self._daemon._turns.state
        check_bookkeeping(self._lived)
        check_bookkeeping(self._daemon._turns.head)

    def _check_nothing_lost(self, state: State) -> None:
        expected = self._jobs.keys() - self._removed
        assert state.jobs.keys() == expected, f"lost or doubled: {state.jobs.keys() ^ expected}"
        lost = self._told.keys() - self._jobs.keys()
        assert not lost, f"acknowledged and lost: {lost}"
        for job_id, final in self._final.items():
            assert job_id in self._removed or state.jobs[job_id].state is final, (job_id, final)

    # --- facts ------------------------------------------------------------------------------------------------------------

    def _follow(self, facts: list[tuple[int, events.AnyEvent]]) -> None:
        for seq, event in facts:
            self._note_fact(seq, event)
        state = self._daemon._turns.state
        for _, event in facts:
            if isinstance(event, events.Completed | events.Failed | events.Cancelled | events.Expired):
                self.finished += 1
                self._check_outputs(state.jobs.get(event.job_id))

    def _note_fact(self, seq: int, event: events.AnyEvent) -> None:
        assert seq == len(self.facts) + 1, f"event {seq} follows {len(self.facts)}"
        job_id = getattr(event, "job_id", 0)
        self.facts.append((str(type(event).__struct_config__.tag), job_id))
        if job_id in self._final:
            assert isinstance(event, events.Removed), f"job {job_id} was {self._final[job_id]}: {event}"
        match event:
            case events.Submitted():
                self._note_submitted(event)
            case events.YieldRequested() if event.why in (YieldWhy.CANCEL, YieldWhy.PAUSE):
                self._held[job_id] = event.why
            case events.YieldRequested():
                assert self._held.pop(job_id, None) is not YieldWhy.CANCEL, (
                    f"a cancel was taken back: {event}"
                )
            case events.Paused() if event.by >= 0:
                self._held[job_id] = YieldWhy.PAUSE
            case events.Resumed():
                self._held.pop(job_id, None)
            case events.Leased():
                assert job_id not in self._held, f"job {job_id} runs, and it was to {self._held[job_id]}"
                assert event.attempt == self._attempts.get(job_id, 0) + 1, event
                self._attempts[job_id] = event.attempt
                began_s, times = self._granted.get(job_id, (self._now_s(), 0))
                recent = self._now_s() - began_s < 60
                self._granted[job_id] = (began_s, times + 1) if recent else (self._now_s(), 1)
                assert times < 50 or not recent, (
                    f"job {job_id} gets its lease and loses it, and gets nothing done"
                )
                self._heard_of_lease[event.device] = self._now_s()
            case events.Completed():
                self._final[job_id] = JobState.COMPLETED
            case events.Failed():
                self._final[job_id] = JobState.FAILED
            case events.Cancelled():
                self._final[job_id] = JobState.CANCELLED
            case events.Expired():
                self._final[job_id] = JobState.EXPIRED
            case events.Removed():
                assert job_id in self._final, event
                self._removed.add(job_id)
                self._final.pop(job_id)
            case events.SubmitIdsForgotten():
                self._forgotten.update(event.job_ids)
            case events.LeaseLost() | events.DeviceFellIll() | events.HandlerLoadFailed():
                self._gaps.clear()
        if isinstance(event, events.Progress | events.LeaseLost | events.CanaryPassed):
            assert event.attempt == self._attempts[job_id], f"a report of an old attempt counted: {event}"
        for device in self._daemon._turns.state.devices.values() if hasattr(self, "_daemon") else ():
            if device.lease and device.lease.job_id == job_id:
                self._heard_of_lease[device.name] = self._now_s()

    def _note_submitted(self, event: events.Submitted) -> None:
        key = (event.owner, event.submit_id)
        assert event.job_id not in self._jobs, f"id {event.job_id} was given twice"
        assert event.job_id > max(self._jobs, default=0), event.job_id
        before = self._by_submit_id.get(key)
        assert before is None or before in self._forgotten, f"{key} made two jobs: {before}, {event.job_id}"
        said = self._submissions.get(key)
        assert said is None or len(said.lines) == event.items, event
        assert said is not None or event.retry_of, f"nobody submitted {event}"
        self._jobs[event.job_id] = msgspec.structs.replace(event, input=b"")
        self._by_submit_id[key] = event.job_id

    # --- what people were told -----------------------------------------------------------------------------------------------

    def submitted(self, submission: Submission) -> None:
        self._submissions[submission.uid, submission.submit_id] = submission

    def accepted(self, submission: Submission, job_id: int) -> None:
        made = self._jobs.get(job_id)
        assert made is not None, f"job {job_id} was acknowledged and is not on disk"
        assert (made.owner, made.submit_id) == (submission.uid, submission.submit_id), made
        before = self._told.setdefault(job_id, submission)
        assert before is submission, f"job {job_id} was given to two submissions"

    def shown(self, job: protocol.Job) -> None:
        made = self._jobs.get(job.id)
        assert made is not None, job
        assert job.items.total == made.items, job
        if job.state == JobState.QUEUED:
            assert isinstance(job.reason, str), f"job {job.id} waits and nobody says why"

    def event_seen(self, seq: int, event: dict[str, object]) -> None:
        tag, job_id = self.facts[seq - 1]
        assert (event["event"], event.get("job", 0)) == (tag, job_id), (seq, event, tag, job_id)

    def gap_seen(self, cursor: int, first_seq: int) -> None:
        kept = self._daemon._journal.first_seq
        assert cursor + 1 < first_seq <= kept, f"events from {kept} on are kept, {cursor + 1} was a gap"

    def read(self, job_id: int, text: bytes, *, errors: bool) -> None:
        numbers = [self._check_record(job_id, line, errors=errors) for line in text.splitlines()]
        assert len(numbers) == len(set(numbers)), f"job {job_id} hands out an item twice"
        self.records_read += len(numbers)

    # --- inputs and outputs ----------------------------------------------------------------------------------------------------

    def _check_input(self, job: Job) -> None:
        """One that came in pieces is in the spool before its job is acknowledged, and stays to the end."""
        made = self._jobs[job.job_id]
        if job.state in FINAL or made.retry_of or not made.reservation_id:
            return
        held = [b"nothing"]
        for path in (f"jobs/{job.job_id}/input.jsonl", f"incoming/{made.reservation_id}"):
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self._spool, path), "rb") as file:
                held = file.read().splitlines()
                break
        assert held == self._root(job.job_id).lines, f"job {job.job_id} was accepted, its input is not there"

    def _check_outputs(self, job: Job | None) -> None:
        """Every item that counts is in exactly one of the outputs, once."""
        if job is None or not job.checkpoint.upto:
            return
        point = job.checkpoint
        done = self._records(job, "results.jsonl", point.results_bytes, point.results_crc)
        failed = self._records(job, "errors.jsonl", point.errors_bytes, point.errors_crc, errors=True)
        assert (len(done), len(failed)) == (point.done, point.failed), job
        lines = {*done, *failed}
        assert len(lines) == len(done) + len(failed), f"job {job.job_id} has an item twice"
        if not job.retry_of:
            assert lines == set(range(1, point.upto + 1)) - {item.line for item in point.deferred}, job
        if job.state is JobState.COMPLETED:
            assert len(lines) == job.items
            self.items += job.items

    def _records(self, job: Job, name: str, size: int, crc: int, *, errors: bool = False) -> list[int]:
        if not size:
            return []
        try:
            with open(os.path.join(self._spool, "jobs", str(job.job_id), name), "rb") as file:
                counted = file.read(size)
        except OSError as error:
            raise AssertionError(f"job {job.job_id}: {size} bytes of {name} count, and: {error}") from None
        assert len(counted) == size, f"job {job.job_id}: {name} has {len(counted)} bytes, {size} count"
        assert zlib.crc32(counted) == crc, f"job {job.job_id}: {name} is not what was checkpointed"
        return [self._check_record(job.job_id, line, errors=errors) for line in counted.splitlines()]

    def _check_record(self, job_id: int, text: bytes, *, errors: bool) -> int:
        record = msgspec.json.decode(text)
        line = self._root(job_id).lines[record["line"] - 1]
        expected = outcome_of(line, 2)
        if errors:
            code = record["error"]["code"]
            assert code == "worker_lost" or isinstance(expected, tuple), (job_id, record, line)
        else:
            assert record["output"] == expected, (job_id, record, line)
        return int(record["line"])

    def _root(self, job_id: int) -> Submission:
        """What the first job of a chain of retries was submitted with."""
        made = self._jobs[job_id]
        while made.retry_of:
            made = self._jobs[made.retry_of]
        return self._submissions[made.owner, made.submit_id]

    # --- after every turn ----------------------------------------------------------------------------------------------------

    def _after_turn(self, now_ns: int) -> None:
        turns, supervisor = self._daemon._turns, self._daemon._supervisor
        head, state, rules = turns.head, turns.state, turns.rules
        now_s = self._now_s()
        free = [d for d in head.devices.values() if d.lease is None and policy.usable(d, now_ns)]
        if free and policy.may_start(head):
            claims = policy.survey(head, rules, now_ns).claims
            taken = [c for d in free for c in claims if residency.takes(head, rules, d, c.job.handler)]
            assert not taken, f"a device is idle and job {taken[0].job.job_id} waits"
        self._check_leases(state, supervisor, now_s)
        self._check_limits(head, rules)
        self._check_waiting(state, rules, now_ns, now_s)
        self._check_fairness(state, rules)
        self._check_backoffs(state, rules, now_ns, now_s)

    def _check_leases(self, state: State, supervisor: Any, now_s: float) -> None:
        for device in state.devices.values():
            lease = device.lease
            if lease is None:
                continue
            job = state.jobs[lease.job_id]
            assert (job.state, job.attempt, job.device) == (JobState.RUNNING, lease.attempt, device.name), job
            heard_s = self._heard_of_lease.setdefault(device.name, now_s)
            assert now_s - heard_s < self._silent_lease_s, (
                f"nothing was heard of job {job.job_id} on {device.name}"
            )
            grant = supervisor._grants.get(device.name)
            known = grant is not None and grant.key == (lease.job_id, lease.attempt)
            assert known or now_s - heard_s < self._unheard_lease_s, (
                f"job {job.job_id} is shown as running and is not"
            )

    def _check_limits(self, head: State, rules: Rules) -> None:
        book = head.book
        assert book.open_jobs <= rules.queued_jobs_max
        assert book.open_items <= rules.queued_items_max
        for uid, use in book.of_uid.items():
            if not self._is_admin(uid):
                assert use.jobs <= rules.jobs_per_uid_max, (uid, use)
                assert use.items <= rules.items_per_uid_max, (uid, use)

    def _check_waiting(self, state: State, rules: Rules, now_ns: int, now_s: float) -> None:
        """No tenant that could run waits for ever, and everybody who waits is told one reason."""
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        well = policy.may_start(state) and any(policy.usable(d, now_ns) for d in state.devices.values())
        served = {device.lease.tenant for device in state.devices.values() if device.lease}
        blocked = policy.blocked_handlers(state, rules, now_ns)
        for tenant in self._waits_s.keys() - state.book.lines.keys():
            del self._waits_s[tenant]
        for tenant, lines in state.book.lines.items():
            if tenant in served or not lines:
                self._waits_s[tenant] = 0.0
            elif well and not any(handler in blocked for _, handler in lines):
                waited_s = self._waits_s[tenant] = self._waits_s.get(tenant, 0.0) + passed_s
                self.longest_wait_s = max(waited_s, self.longest_wait_s)
                longest_s = (rules.aging_ns + rules.wait_max_ns) / S_NS + self._round_s(state, rules)
                assert waited_s <= longest_s, f"{tenant} has waited {waited_s:.0f} s"

    def _check_backoffs(self, state: State, rules: Rules, now_ns: int, now_s: float) -> None:
        """Nothing waits for another try longer than the longest backoff, whatever somebody does to the clock."""
        resting = {device.name for device in state.devices.values() if not policy.usable(device, now_ns)}
        waiting_for_others = policy.shut_out(state, rules, now_ns).keys()  # as long as those like
        resting |= policy.blocked_handlers(state, rules, now_ns).keys() - waiting_for_others
        asleep = (state.jobs[job_id] for _, job_id in state.book.asleep)
        resting |= {f"job {job.job_id}" for job in asleep if job.begin_ns < job.retry_at_ns}
        for name in self._rests_since_s.keys() - resting:
            del self._rests_since_s[name]
        for name in resting:
            rested_s = now_s - self._rests_since_s.setdefault(name, now_s)
            assert rested_s < REST_MAX_S, f"{name} has been resting for {rested_s:.0f} s"

    def _round_s(self, state: State, rules: Rules) -> float:
        """A turn, a batch and a load of everybody who is there, and of two devices that must be given back."""
        turn_s = max((known.load_ns for known in state.learned.values()), default=0) / rules.swap_overhead_max
        return (len(state.book.present) + 2) * (max(turn_s, rules.slice_ns) / S_NS + self._batch_s)

    def _check_fairness(self, state: State, rules: Rules) -> None:
        """Two tenants that both always have work differ by at most a turn, a batch and a load on each device."""
        level = Priority.NORMAL
        there = sorted(
            name
            for name, lines in state.book.lines.items()
            if any(key[0] is level for key in lines) and name in FAIR
        )
        pairs = {(one, other) for at, one in enumerate(there) for other in there[at + 1 :]}
        for pair in self._gaps.keys() - pairs:
            del self._gaps[pair]
        bound_s = len(state.devices) * self._round_s(state, rules) / (len(state.book.present) + 2)
        for one, other in pairs:
            gap_s = (state.tenants[one].vtimes_ns[level] - state.tenants[other].vtimes_ns[level]) / S_NS
            began_s = abs(self._gaps.setdefault((one, other), gap_s))
            self.widest_gap_s = max(self.widest_gap_s, abs(gap_s) if began_s < bound_s else 0.0)
            assert abs(gap_s) <= bound_s + began_s, (
                f"{one} and {other} differ by {gap_s:.0f} s of virtual time"
            )

    def look_closely(self, now_ns: int) -> None:
        """What is too much to look at after every turn."""
        turns = self._daemon._turns
        for state in (turns.head, turns.state):
            check_bookkeeping(state)
            seen = policy.survey(state, turns.rules, now_ns)
            for job in state.jobs.values():
                if job.state in (JobState.QUEUED, JobState.PAUSED):
                    reason, _ = policy.waiting_reason(state, turns.rules, job, now_ns, seen)
                    assert reason
                assert (job.state in FINAL) == bool(job.finished_ns), job
        copy = snapshot.load(snapshot.chunks(turns.state))
        assert not (differ := _difference(copy, turns.state)), differ
        assert bookkeeping(copy) == bookkeeping(turns.state)


def _difference(one: State, other: State) -> str:
    """What a snapshot carries and is not the same in both; empty: nothing."""
    for name in one.__struct_fields__:
        mine, its = getattr(one, name), getattr(other, name)
        if name == "book" or (mine == its and (name != "removed" or list(mine) == list(its))):
            continue
        if isinstance(mine, dict):
            key = next(key for key in {**mine, **its} if mine.get(key) != its.get(key))
            mine, its = mine.get(key), its.get(key)
        return f"{name}: {mine!r:.500} is not {its!r:.500}"
    return ""


FAIR: Final = ("ann", "ben", "cid")  # tenants that always have work for the same handler
