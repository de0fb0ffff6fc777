"""The core under a virtual clock, with devices that do what they are told and take the time it takes.

    real            decide(), apply(), policy, prices learned from what is reported
    simulated       people who submit (`arrive`), loading, batches, the clock

    device          one handler after the other into `room` places, the least recently used out first
    a load          takes its handler's `load_s`, more or less; given back while it loads, it is abandoned at once
    a batch         takes its handler's `batch_s`, more or less; a yield is obeyed at its end
    a tick          comes where a turn ends or a load is earned, as the daemon's own ticks do, give or take a second

Everything follows from the seed. A day of one device is some thousand batches, and a second of CPU.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from core_house import EPOCH_NS, House, submission
from gpujobd.core import inputs, policy
from gpujobd.core.events import AnyEvent, HandlerLoadFailed, Leased, YieldRequested
from gpujobd.core.inputs import AnyInput, Who
from gpujobd.core.model import S_NS, HandlerRule, Lease, Priority, Rules

ROOMY = {
    "queued_jobs_max": 1_000_000,
    "jobs_per_uid_max": 1_000_000,
    "items_per_uid_max": 10**15,
    "submissions_per_minute_max": 10**9,
    "items_per_job_max": 10**12,
    "queued_items_max": 10**15,
    "spool_bytes_max": 10**18,
    "bytes_per_uid_max": 10**18,
    "input_bytes_max": 10**15,
}


@dataclass(frozen=True)
class Kind:
    """What a handler is like."""

    load_s: float
    batch_s: float = 1.0
    spread: float = 0.0  # a load or a batch takes so much less or more, by chance
    fails_s: float = 0.0  # it never loads, and takes so long to say so; 0: it loads


@dataclass(frozen=True)
class Arrival:
    """A job as it is submitted: so much work, in batches of its handler."""

    at_s: float
    tenant: str
    handler: str
    work_s: float
    priority: Priority = Priority.NORMAL


def rules(kinds: dict[str, Kind], **changes: Any) -> Rules:
    handlers = dict.fromkeys(kinds, HandlerRule())
    return Rules(**(ROOMY | {"handlers": handlers} | changes))


def person(tenant: str) -> Who:
    return Who(uid=1000, name=tenant, high=True, tenants=frozenset({tenant}))


class Hall(House):
    def __init__(
        self, rules: Rules, kinds: dict[str, Kind], *, devices: int = 1, room: int = 1, seed: int = 0
    ) -> None:
        self.kinds = kinds
        self.room = room
        self.luck = random.Random(seed)
        self.watchers: list[Callable[[AnyInput, list[AnyEvent]], None]] = []
        self.submitted: dict[int, Arrival] = {}
        self.computes_s: dict[int, float] = {}  # job -> when its first batch was begun
        self.loading_ns = 0
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        super().__init__(rules, tuple(f"cuda:{number}" for number in range(devices)))

    @property
    def clock_s(self) -> float:
        return (self.now_ns - EPOCH_NS) / S_NS

    # --- time ---

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """At this time of the clock, or now if that is over."""
        self._order += 1
        heapq.heappush(self._agenda, (max(self.now_ns, EPOCH_NS + round(seconds * S_NS)), self._order, act))

    def run(self, until_s: float) -> None:
        end_ns = EPOCH_NS + round(until_s * S_NS)
        while self._agenda and self._agenda[0][0] <= end_ns:
            self.now_ns, _, act = heapq.heappop(self._agenda)
            act()
        self.now_ns = max(self.now_ns, end_ns)

    def once(self, given: AnyInput) -> list[AnyEvent]:
        events = super().once(given)
        self.history.clear()  # nobody reads it, and days of it would fill the memory
        for watch in self.watchers:
            watch(given, events)
        for event in events:
            if isinstance(event, Leased):
                self._begin(msgspec.structs.replace(self.lease(event.device)))
            elif isinstance(event, HandlerLoadFailed):
                self.at((event.retry_at_ns - EPOCH_NS) / S_NS, self._tick)
            elif isinstance(event, YieldRequested):
                lease = self.lease(event.device)
                if not lease.loaded:
                    self.at(0, self._guarded(msgspec.structs.replace(lease), self._abandon))
        return events

    # --- people ---

    def arrive(self, arrival: Arrival) -> None:
        self.at(arrival.at_s, lambda: self._submit(arrival))

    def _submit(self, arrival: Arrival) -> None:
        batches = max(1, round(arrival.work_s / self.kinds[arrival.handler].batch_s))
        job_id = self.state.next_job_id
        self.submitted[job_id] = arrival
        wanted = submission(handler=arrival.handler, items=batches, priority=arrival.priority)
        self.give(inputs.Submit(who=person(arrival.tenant), submission=wanted))
        assert self.state.next_job_id == job_id + 1, "a submission was refused"

    # --- devices ---

    def _begin(self, lease: Lease) -> None:
        if lease.loaded:
            self._next_batch(lease)
            return
        kind = self.kinds[lease.handler]
        loaded = self.state.devices[lease.device].loaded
        for handler in loaded[: max(0, len(loaded) + 1 - self.room)]:
            super().once(inputs.Unloaded(device=lease.device, handler=handler))
        if kind.fails_s:
            self._later(kind.fails_s, lease, self._fail)
        else:
            self._later(self._about(kind.load_s, kind), lease, self._load)

    def _later(self, seconds: float, lease: Lease, act: Callable[[Lease], None]) -> None:
        self.at(self.clock_s + seconds, self._guarded(lease, act))

    def _guarded(self, begun: Lease, act: Callable[[Lease], None]) -> Callable[[], None]:
        """Nothing of a lease that is over is done."""

        def guarded() -> None:
            lease = self.state.devices[begun.device].lease
            if lease is not None and (lease.job_id, lease.attempt) == (begun.job_id, begun.attempt):
                act(lease)

        return guarded

    def _about(self, seconds: float, kind: Kind) -> float:
        return seconds * (1 + kind.spread * self.luck.uniform(-1, 1))

    def _load(self, lease: Lease) -> None:
        load_ns = self.now_ns - lease.granted_ns
        self.loading_ns += load_ns
        self.give(inputs.Loaded(device=lease.device, handler=lease.handler, load_ns=load_ns))
        if lease.loaded:
            self._next_batch(lease)

    def _used_ns(self, lease: Lease) -> int:
        return self.now_ns - lease.granted_ns

    def _fail(self, lease: Lease) -> None:
        self.give(
            inputs.LoadFailed(
                device=lease.device, attempt=lease.attempt, used_ns=self._used_ns(lease), error="no model"
            )
        )

    def _abandon(self, lease: Lease) -> None:
        """What was loaded so far is lost."""
        self.loading_ns += self.now_ns - lease.granted_ns
        self._report(inputs.GaveBack, lease, 0)

    def _next_batch(self, lease: Lease) -> None:
        kind = self.kinds[lease.handler]
        self.computes_s.setdefault(lease.job_id, self.clock_s)
        batch_s = self._about(kind.batch_s, kind)
        self._tick_when_something_is_due(lease, batch_s)
        self._later(batch_s, lease, self._batch_done)

    def _tick_when_something_is_due(self, lease: Lease, batch_s: float) -> None:
        state, device = self.state, self.state.devices[lease.device]
        if device.turn is None or not state.book.lines:
            return
        uncharged_ns = policy.uncharged_ns(lease, self.now_ns)
        moments = [policy.turn_ns(state, self.rules, lease.tenant) - device.turn.used_ns - uncharged_ns]
        for name, learned in state.learned.items():
            if name not in device.loaded:
                price_ns = round(learned.load_ns / self.rules.swap_overhead_max)
                moments.append(price_ns - device.since_load_ns - uncharged_ns)
        own_ns, share = state.tenants[lease.tenant].vtimes_ns[lease.level], self.rules.share(lease.tenant)
        for vtime_ns, name in state.book.active[lease.level][:3]:  # when somebody else has the least time
            if name != lease.tenant:
                moments.append(round((vtime_ns - own_ns) * share) - uncharged_ns + 1000)
        for moment_ns in moments:
            if 0 < moment_ns < batch_s * S_NS:
                self._later(moment_ns / S_NS, lease, lambda _: self._tick())

    def _tick(self) -> None:
        self.give(inputs.Tick())

    def _batch_done(self, lease: Lease) -> None:
        job = self.job(lease.job_id)
        if job.left == 1:
            self._report(inputs.Finished, lease, 1)
        elif lease.yield_why is not None:
            self._report(inputs.GaveBack, lease, 1)
        else:
            self._report(inputs.CheckpointReached, lease, 1)
            self._next_batch(lease)

    def _report(self, kind: Any, lease: Lease, items: int) -> None:
        used_s = (self._used_ns(lease) - lease.used_ns) / S_NS
        self.report(kind, items, device=lease.device, used_s=used_s)
