"""A world around the core, from a seed: people, workers, clocks and power cuts, none of them well-behaved.

    truth      what workers really computed: lines by job, kept in `Truth`
    head       the plan: every event, at once
    facts      the same events, once "the disk has them": some frames later; a crash forgets the rest

Workers act on the facts, as the supervisor does, and report to the head. Each has moods: truthful, late (its reports
come again after its lease is over), lying (impossible checkpoints), dying.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any, Final

import msgspec
import pytest
from core_house import (
    ALICE,
    BOB,
    CAROL,
    EPOCH_NS,
    ROOT,
    WATCHER,
    bookkeeping,
    check_bookkeeping,
    persistent,
    submission,
)
from gpujobd.core import events, inputs, policy, residency, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.decide import Refused, decide, find_submitted
from gpujobd.core.forecast import forecast
from gpujobd.core.model import (
    FINAL,
    NEXT,
    NO_USE,
    S_NS,
    Checkpoint,
    Deferred,
    DeviceState,
    Expected,
    HandlerRule,
    Job,
    JobState,
    Lease,
    Priority,
    Rules,
    Span,
    State,
    TenantRule,
    Timings,
)

PEOPLE: Final = (ALICE, BOB, CAROL, ROOT, WATCHER)
RULES: Final = Rules(
    queued_jobs_max=14,
    jobs_per_uid_max=8,
    items_per_job_max=40,
    queued_items_max=200,
    input_bytes_max=3_000,
    item_bytes_max=99,
    spool_bytes_max=20_000,
    final_days=2,
    outputs_bytes_max=1_500,
    slice_ns=20 * S_NS,
    aging_ns=900 * S_NS,
    wait_max_ns=300 * S_NS,
    tenants={"alice": TenantRule(share=4.0, queued_jobs_max=4)},
    handlers={"embed": HandlerRule(), "rerank": HandlerRule(vram_bytes=30 << 30), "ocr": HandlerRule()},
)
KILLER: Final = 13  # this line of every job of carol kills its worker


class World:
    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.rules = RULES
        self.now_ns = EPOCH_NS
        self.devices = tuple(f"cuda:{n}" for n in range(self.luck.choice((1, 1, 2, 3))))
        self.head, self.facts = State(), State()
        self.frames: deque[list[events.AnyEvent]] = deque()  # decided, not yet committed
        self.journal: list[events.AnyEvent] = []  # committed, since `base`
        self.base = list(snapshot.chunks(self.facts))
        self.acknowledged: dict[int, inputs.Submission] = {}
        self.removed: set[int] = set()
        self.reservations: list[tuple[int, inputs.Who, inputs.Submission]] = []
        self.workers: dict[tuple[str, int, int], Worker] = {}
        self.late: deque[inputs.AnyInput] = deque(maxlen=20)
        self.refused: set[str] = set()
        self.seen: set[str] = set()
        self.number = 0
        self.start()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.luck.choices(
            (
                self.time_passes,
                self.somebody_wants,
                self.workers_work,
                self.house_keeping,
                self.look_from_outside,
                self.stop_or_crash,
            ),
            (20, 40, 40, 4, 6, 2),
        )[0]()
        if self.luck.random() < 0.7:
            self.commit()

    def give(self, given: inputs.AnyInput) -> list[events.AnyEvent]:
        """One input and its ticks are one frame, as in the daemon."""
        frame: list[events.AnyEvent] = []
        self.plan(decide(self.head, self.rules, given, self.now_ns), frame)
        answer = list(frame)
        for _ in range(10_000):
            more = decide(self.head, self.rules, inputs.Tick(), self.now_ns)
            if not more:
                break
            self.plan(more, frame)
        else:
            raise AssertionError("ticking does not come to rest")
        if frame:
            self.frames.append(frame)
        self.check_work_conserved()
        return answer

    def plan(self, more: list[events.AnyEvent], frame: list[events.AnyEvent]) -> None:
        for event in more:
            before = {j.job_id: j.state for j in self.head.jobs.values()}
            apply(self.head, event, self.head.seq + 1)
            for job_id, state in before.items():
                job = self.head.jobs.get(job_id)
                assert job is None or job.state is state or job.state in NEXT[state], (event, state, job)
                assert job is not None or state in FINAL, (event, state)
        frame += more

    def commit(self) -> None:
        """The disk has everything: the plan is fact, and whoever waited gets an answer."""
        while self.frames:
            for planned in self.frames.popleft():
                event = events.decode(events.encode(planned))  # as it comes back from the disk
                apply(self.facts, event, self.facts.seq + 1)
                self.journal.append(event)
                self.seen.add(type(event).__name__)
                if isinstance(event, events.Submitted):
                    assert event.job_id not in self.acknowledged, event
                    self.acknowledged[event.job_id] = inputs.Submission(
                        **{name: getattr(event, name) for name in SAME}, item_bytes=2
                    )
                if isinstance(event, events.Removed):
                    self.removed.add(event.job_id)

    # --- time and the house ---------------------------------------------------------------------------------------------

    def time_passes(self) -> None:
        seconds = self.luck.choice((0.1, 1, 1, 5, 20, 60, 400, 4000))
        if self.luck.random() < 0.03:
            seconds = self.luck.choice((-3600, -10, 86_400 * 3, 86_400 * 8))
        self.now_ns += round(seconds * S_NS)
        self.give(inputs.Tick())

    def house_keeping(self) -> None:
        luck = self.luck
        self.give(
            luck.choice(
                (
                    inputs.Retain(),
                    inputs.Retain(),
                    inputs.DiskSpace(full=luck.random() < 0.2),
                    inputs.DiskSpace(full=False),
                    inputs.Spooled(job_ids=tuple(luck.choices(range(1, 50), k=3))),
                    inputs.Foretell(jobs=tuple(self.expected() for _ in range(5))),
                    inputs.Unkillable(device=luck.choice(self.devices)),
                    inputs.Unloaded(device=luck.choice(self.devices), handler=luck.choice(HANDLERS)),
                )
            )
        )
        if luck.random() < 0.3:
            self.base, self.journal = list(snapshot.chunks(self.facts)), []

    def expected(self) -> Expected:
        job_id, finish_ns = (
            self.luck.randrange(1, self.number + 2),
            self.now_ns + self.luck.choice((0, 1, 900)) * S_NS,
        )
        return Expected(job_id, self.now_ns, self.now_ns, finish_ns, finish_ns + S_NS)

    def start(self) -> None:
        self.give(inputs.Start(boot_id=str(self.number), version="1", devices=self.devices))
        self.commit()

    def stop_or_crash(self) -> None:
        if self.luck.random() < 0.5:
            self.give(inputs.Stop())
            for _ in range(30):
                self.workers_work()
        if self.luck.random() < 0.5:
            self.commit()
        self.frames.clear()
        self.check_replay()
        self.head, self.facts = self.replayed(), self.facts
        self.workers.clear()
        self.reservations.clear()
        if self.luck.random() < 0.2:
            self.devices = tuple(f"cuda:{n}" for n in range(self.luck.choice((1, 2, 3))))
        self.start()

    def replayed(self) -> State:
        state = snapshot.load(self.base)
        for event in self.journal:
            apply(state, event, state.seq + 1)
        return state

    # --- people -----------------------------------------------------------------------------------------------------------

    def somebody_wants(self) -> None:
        try:
            self.luck.choices(
                (
                    self.submit,
                    self.burst,
                    self.reserve,
                    self.stream_ends,
                    self.touch_a_job,
                    self.switch,
                    self.notifier,
                ),
                (10, 2, 4, 4, 8, 1, 1),
            )[0]()
        except Refused as refusal:
            self.refused.add(refusal.code)
            fully_said = bool(refusal.message) and (refusal.limit is None) == (refusal.current is None)
            if not fully_said:
                raise AssertionError(refusal.message) from None

    def submission(self) -> inputs.Submission:
        luck = self.luck
        self.number += 1
        items = luck.choice((1, 1, 3, 15, 40, 40, 41))
        return inputs.Submission(
            submit_id=f"s{self.number}",
            handler=luck.choice((*HANDLERS, *HANDLERS, *HANDLERS, "unknown")),
            items=items,
            input_bytes=items * luck.choice((2, 20, 20, 100)) + (luck.random() < 0.03) * 100,
            input_sha256=self.number.to_bytes(32, "big"),
            item_bytes=2 if items > 1 or luck.random() < 0.9 else luck.choice((20, 100)),
            tenant=luck.choice(("", "", "", "lab", "production")),
            params={} if luck.random() < 0.95 else {"wrong": 1},
            priority=luck.choice((Priority.LOW, Priority.NORMAL, Priority.NORMAL, Priority.HIGH)),
            begin_ns=0 if luck.random() < 0.8 else self.now_ns + luck.choice((-5, 5, 500)) * S_NS,
            deadline_ns=0 if luck.random() < 0.8 else self.now_ns + luck.choice((0, 10, 1000)) * S_NS,
            failures_max=luck.choice((-1, -1, -1, 0, 3)),
            notify=luck.choice(((), (), (), ("ops",), ("mailto:a@example.org", "none"), ("none",))),
            notify_on=luck.choice(((), (), (), ("finish", "progress=25%"), ("never",))),
        )

    def submit(self) -> None:
        who, wanted = self.luck.choice(PEOPLE), self.submission()
        inline = b"x" * wanted.input_bytes if self.luck.random() < 0.5 else b""
        self.give(inputs.Submit(who=who, submission=wanted, inline=inline))
        job_id = find_submitted(self.head, who, wanted)
        assert job_id == self.head.next_job_id - 1
        assert self.give(inputs.Submit(who=who, submission=wanted)) == []  # the answer was lost: once more
        other = msgspec.structs.replace(wanted, input_sha256=bytes(32))
        with pytest.raises(Refused, match="other content"):
            self.give(inputs.Submit(who=who, submission=other))

    def burst(self) -> None:
        """One tenant's, until the door says no."""
        who = self.luck.choice(PEOPLE)
        for _ in range(10):
            self.number += 1
            wanted = submission(submit_id=f"s{self.number}", items=2, handler=self.luck.choice(HANDLERS))
            self.give(inputs.Submit(who=who, submission=wanted))

    def reserve(self) -> None:
        who, wanted = self.luck.choice(PEOPLE), self.submission()
        answer = self.give(inputs.Reserve(who=who, submission=wanted))
        if answer:
            assert isinstance(answer[0], events.Reserved)
            self.reservations.append((answer[0].reservation_id, who, wanted))

    def stream_ends(self) -> None:
        if not self.reservations:
            return
        held, who, wanted = self.reservations.pop(self.luck.randrange(len(self.reservations)))
        if self.luck.random() < 0.2:
            self.give(inputs.Release(reservation_id=held))
        else:
            self.give(
                inputs.Submit(who=who, submission=wanted, reservation_id=held)
            )  # never refused for room
            assert find_submitted(self.head, who, wanted)

    def touch_a_job(self) -> None:
        luck, who = self.luck, self.luck.choice(PEOPLE)
        job_id = luck.choice(list(self.head.jobs) or [1]) if luck.random() < 0.95 else 10**9
        kind = luck.choice(
            (inputs.Cancel, inputs.Pause, inputs.Resume, inputs.Resume, inputs.MoveFirst, inputs.Remove, None)
        )
        if kind is None:
            priority = luck.choice(list(Priority))
            self.give(inputs.SetPriority(who=who, job_id=job_id, priority=priority))
        else:
            self.give(kind(who=who, job_id=job_id))

    def notifier(self) -> None:
        """One comes, with what it can reach, or the last one goes."""
        if self.luck.random() < 0.3:
            self.give(inputs.Leave())
        else:
            names = self.luck.choice(((), ("ops",), ("ops", "lab")))
            self.give(inputs.Attend(who=self.luck.choice(PEOPLE), names=names, mail_domains=("*.org",)))

    def switch(self) -> None:
        verb = self.luck.choice([*inputs.QueueVerb, inputs.QueueVerb.START, inputs.QueueVerb.ENABLE])
        self.give(inputs.SwitchQueue(who=self.luck.choice(PEOPLE), verb=verb))

    # --- workers ------------------------------------------------------------------------------------------------------------

    def workers_work(self) -> None:
        """Every device does a little; what it does it reports, or not."""
        for device in list(self.facts.devices.values()):
            if device.lease is None:
                continue
            key = (device.name, device.lease.job_id, device.lease.attempt)
            if key not in self.workers:
                self.workers = {k: w for k, w in self.workers.items() if k[0] != device.name}
                self.workers[key] = Worker(self, device.lease, self.facts.jobs[device.lease.job_id])
            for given in self.workers[key].act(device.lease):
                self.give(given)
                self.late.append(given)
        if self.late and self.luck.random() < 0.1:
            stale = self.luck.choice(self.late)
            if isinstance(stale, inputs.Report) and not self.is_current(stale):
                assert not decide(self.head, self.rules, stale, self.now_ns), stale

    def look_from_outside(self) -> None:
        """Strangers come and go, drivers are replaced, devices are lost; mostly all is well."""
        luck = self.luck
        device = luck.choice(self.devices)
        troubles = ("DriverMismatch", "DeviceLost", "ComputeProhibited")
        trouble = luck.choice(troubles) if luck.random() < 0.15 else ""
        room = luck.choice((-1, -1, 0, 1, 6, 20, 31)) << 30 if luck.random() < 0.6 else -1
        self.give(
            inputs.DeviceSeen(device=device, trouble=trouble, total_bytes=80 << 30, room_bytes=max(-1, room))
        )
        lease = self.head.devices[device].lease
        if lease is not None and luck.random() < 0.3:
            self.give(inputs.MemoryWanted(device=device, attempt=lease.attempt))

    def is_current(self, given: inputs.Report) -> bool:
        device = self.head.devices.get(given.device)
        return bool(device and device.lease and device.lease.attempt == given.attempt)

    # --- what must hold -------------------------------------------------------------------------------------------------------

    def check_work_conserved(self) -> None:
        head = self.head
        if policy.may_start(head) and policy.free_devices(head, self.now_ns):
            claims = policy.survey(head, self.rules, self.now_ns).claims
            for device in policy.free_devices(head, self.now_ns):
                theirs = [c for c in claims if residency.takes(head, self.rules, device, c.job.handler)]
                assert not theirs, f"{device.name} is idle and a job waits"

    def check(self) -> None:
        for state in (self.head, self.facts):
            self.check_leases(state)
            self.check_limits(state)
            check_bookkeeping(state)
        self.check_jobs()
        self.check_reasons()

    def check_jobs(self) -> None:
        assert self.removed.isdisjoint(self.facts.jobs)
        assert set(self.acknowledged) == set(self.facts.jobs) | self.removed, (
            "a job is lost, or came from nowhere"
        )
        for job in self.facts.jobs.values():
            point = job.checkpoint
            deferred = len(point.deferred)
            assert point.upto <= job.items
            assert point.done + point.failed + deferred == point.upto, point
            assert job.state is not JobState.COMPLETED or job.left == 0, job
            assert (job.state in FINAL) == bool(job.finished_ns), job
            assert job.used_ns <= self.facts.tenants[job.tenant].used_ns, job

    def check_leases(self, state: State) -> None:
        running = {job.job_id: job for job in state.jobs.values() if job.state is JobState.RUNNING}
        leases = [device.lease for device in state.devices.values() if device.lease]
        assert sorted(lease.job_id for lease in leases) == sorted(running), (leases, running)
        for lease in leases:
            job = running[lease.job_id]
            assert (job.attempt, job.device, job.level) == (lease.attempt, lease.device, lease.level), (
                lease,
                job,
            )

    def check_limits(self, state: State) -> None:
        rules, kept = self.rules, state.book
        assert kept.open_jobs <= rules.queued_jobs_max
        assert kept.of_tenant.get("alice", NO_USE).jobs <= 4
        assert all(use.jobs <= rules.jobs_per_uid_max for uid, use in kept.of_uid.items() if uid != ROOT.uid)
        assert kept.open_items <= rules.queued_items_max

    def check_reasons(self) -> None:
        seen = policy.survey(self.head, self.rules, self.now_ns)
        waiting = [job for job in self.head.jobs.values() if job.state in (JobState.QUEUED, JobState.PAUSED)]
        for job in waiting:
            reason, detail = policy.waiting_reason(self.head, self.rules, job, self.now_ns, seen)
            assert detail, (reason, job)
            self.seen.add(reason)
        queued = [job.job_id for job in waiting if job.state is JobState.QUEUED]
        assert sorted(job.job_id for job in policy.order(self.head, self.rules, self.now_ns)) == sorted(
            queued
        )

    def check_replay(self) -> None:
        """Snapshot and journal give the state that lived; so does a snapshot taken now."""
        for other in (
            self.replayed(),
            snapshot.load(snapshot.chunks(self.facts)),
            snapshot.clone(self.facts),
        ):
            assert persistent(other) == persistent(self.facts)
            assert bookkeeping(other) == bookkeeping(self.facts)

    def check_forecast(self) -> None:
        steps = forecast(self.head, self.rules, self.now_ns)
        outlooks: dict[int, Any] = {}
        try:
            while True:
                next(steps)
        except StopIteration as end:
            outlooks = end.value
        positions = [outlook.position for outlook in outlooks.values() if outlook.position]
        assert sorted(positions) == list(range(1, len(positions) + 1)), positions
        for job_id, outlook in outlooks.items():
            assert self.head.jobs[job_id].state in (JobState.QUEUED, JobState.RUNNING)
            assert not outlook.finish_ns or outlook.start_ns <= outlook.finish_ns <= outlook.finish_90_ns, (
                outlook
            )


HANDLERS: Final = ("embed", "rerank", "ocr")
SAME: Final = ("submit_id", "handler", "items", "input_bytes", "input_sha256")


class Worker:
    """One attempt at one job. It knows the files of the job: what was checkpointed and reported, no more."""

    def __init__(self, world: World, lease: Lease, job: Job) -> None:
        self.world = world
        self.luck = world.luck
        self.lease = lease
        self.job = msgspec.structs.replace(job)
        self.point = job.checkpoint
        self.used_ns = 0
        self.loaded = lease.loaded
        self.canary = lease.canary
        self.mood = self.luck.choices(("truthful", "lying", "dying"), (30, 1, 3))[0]

    def act(self, lease: Lease) -> list[inputs.AnyInput]:
        luck = self.luck
        self.used_ns += luck.choice((0, 1, 3, 30)) * S_NS
        if not self.loaded:
            return [self.load()]
        if self.canary and not (self.mood == "dying" and luck.random() < 0.2):
            self.canary = False
            return [inputs.CanaryOk(device=lease.device, attempt=lease.attempt, used_ns=self.used_ns)]
        if self.mood == "dying" and luck.random() < 0.3:
            return [self.die(luck.choice(CAUSES))]
        if self.mood == "lying" and luck.random() < 0.5:
            self.point = luck.choice(LIES)(self.point)
            return [self.report(inputs.CheckpointReached)]
        suspects = {line for span in self.job.suspects for line in range(span.first, span.last + 1)}
        for _ in range(luck.choice((1, 5, 20))):
            if self.point.upto == self.job.items:
                break
            line = self.point.upto + 1
            alone = line in suspects
            if self.kills(line) and line not in self.condemned():
                call = Span(line, line) if alone else Span(line, min(line + 4, self.job.items))
                return [self.die("died", (call, Span(max(1, line - 1), max(1, line - 1))))]
            self.point = self.try_line(line)
        if self.point.upto == self.job.items:
            self.point = msgspec.structs.replace(
                self.point, deferred=(), done=self.point.done + len(self.point.deferred)
            )
            return [self.report(inputs.Finished)]
        if luck.random() < 0.02:  # it ran out of memory beside others
            room_bytes = luck.choice((0, 1, 8, 40)) << 30
            return [msgspec.structs.replace(self.report(inputs.GaveBack), cramped_bytes=room_bytes)]
        return [self.report(inputs.GaveBack if lease.yield_why else inputs.CheckpointReached)]

    def kills(self, line: int) -> bool:
        return self.job.tenant == "carol" and line == KILLER

    def condemned(self) -> set[int]:
        return {*self.job.condemned, *(self.job.canary_due if self.lease.canary else ())}

    def try_line(self, line: int) -> Checkpoint:
        point, luck = self.point, self.luck.random()
        replace = msgspec.structs.replace
        if luck < 0.05 or line in self.condemned():
            return replace(point, upto=line, failed=point.failed + 1, errors_bytes=point.errors_bytes + 9)
        if luck < 0.1:
            return replace(point, upto=line, deferred=(*point.deferred, Deferred(line, 1)))
        return replace(point, upto=line, done=point.done + 1, results_bytes=point.results_bytes + 7)

    def load(self) -> inputs.AnyInput:
        lease = self.lease
        if self.luck.random() < (0.5 if lease.handler == "ocr" else 0.05):
            error = "no such model"
            return inputs.LoadFailed(
                device=lease.device, attempt=lease.attempt, used_ns=self.used_ns, error=error
            )
        self.loaded = True
        return inputs.Loaded(
            device=lease.device,
            handler=lease.handler,
            load_ns=self.luck.choice((1, 9)) * S_NS,
            vram_bytes=self.luck.choice((0, 2, 25)) << 30,
        )

    def die(self, cause: str, suspects: tuple[Span, ...] = ()) -> inputs.AnyInput:
        return inputs.Lost(
            device=self.lease.device,
            attempt=self.lease.attempt,
            used_ns=self.used_ns,
            cause=cause,
            suspects=suspects or (Span(0, 0), Span(1, 1)),
        )

    def report(self, kind: Any) -> inputs.AnyInput:
        return kind(  # type: ignore[no-any-return]  # any of the three
            device=self.lease.device,
            attempt=self.lease.attempt,
            used_ns=self.used_ns,
            checkpoint=self.point,
            timings=Timings(compute_s=0.5),
        )


CAUSES: Final = (
    "died", "silent", "stalled", "poisoned", "canary", "disk_full", "output_damaged", "failures_max", "input_lost",
)  # fmt: skip
LIES: Final = (
    lambda point: msgspec.structs.replace(point, upto=10**6, done=10**6),
    lambda point: msgspec.structs.replace(point, upto=point.upto + 1),
    lambda point: msgspec.structs.replace(point, done=-1),
    lambda point: msgspec.structs.replace(point, results_bytes=1 << 70),
    lambda point: msgspec.structs.replace(point, failed=point.failed + 10**6),
    lambda point: msgspec.structs.replace(point, deferred=tuple(Deferred(1, 1) for _ in range(2000))),
)
UNHEALTHY: Final = DeviceState.UNHEALTHY
