"""The core with workers that do what they should, in virtual time: loads, batches, checkpoints, yields, as asked.

One batch is one report; a yield is obeyed at its end. So an hour of a device is a few thousand steps.
"""

from __future__ import annotations

import heapq
from typing import Any

import msgspec
from core_house import EPOCH_NS, House
from gpujobd.core import inputs
from gpujobd.core.events import Leased, YieldRequested
from gpujobd.core.model import S_NS, Lease, Rules


class Floor(House):
    def __init__(
        self,
        rules: Rules | None = None,
        devices: tuple[str, ...] = ("cpu",),
        *,
        load_s: dict[str, float] | None = None,
        item_s: float = 0.1,
        batch: int = 10,
        room: int = 1,
    ) -> None:
        self.load_s = load_s or {}
        self.item_ns = round(item_s * S_NS)
        self.batch = batch
        self.room = room  # handlers a device holds at once
        self.loading_s = 0.0
        self.loads = 0
        self.started: dict[int, float] = {}
        self.finished: dict[int, float] = {}
        self.yields: list[tuple[float, YieldRequested]] = []
        self.turns: list[tuple[float, str]] = []  # when a turn began, and whose
        self._agenda: list[tuple[int, int, str, Lease]] = []
        self._order = 0
        super().__init__(rules, devices)

    @property
    def clock_s(self) -> float:
        return (self.now_ns - EPOCH_NS) / S_NS

    def once(self, given: inputs.AnyInput) -> list[Any]:
        events = super().once(given)
        for event in events:
            if isinstance(event, Leased):
                self.started.setdefault(event.job_id, self.clock_s)
                if event.turn_ns:
                    self.turns.append((self.clock_s, self.job(event.job_id).tenant))
                self._begin(self.lease(event.device))
            elif isinstance(event, YieldRequested):
                self.yields.append((self.clock_s, event))
        return events

    def run(self, seconds: float) -> None:
        """Let the devices work for so long."""
        end_ns = self.now_ns + round(seconds * S_NS)
        while self._agenda and self._agenda[0][0] <= end_ns:
            at_ns, _, device, lease = heapq.heappop(self._agenda)
            self.now_ns = at_ns
            current = self.state.devices[device].lease
            if current is not None and current.attempt == lease.attempt and current.job_id == lease.job_id:
                self._act(current)
        self.now_ns = end_ns
        self.give(inputs.Tick())

    def served_s(self, tenant: str) -> float:
        known = self.state.tenants.get(tenant)
        return known.used_ns / S_NS if known else 0.0

    def _begin(self, lease: Lease) -> None:
        if lease.loaded:
            self._next_batch(lease)
        else:
            self._at(self.load_takes_s(lease), lease)

    def load_takes_s(self, lease: Lease) -> float:
        return self.load_s.get(lease.handler, 0.0)

    def batch_takes_s(self, lease: Lease, items: int) -> float:  # for floors where jobs differ
        return items * self.item_ns / S_NS

    def _at(self, seconds: float, lease: Lease) -> None:
        self._order += 1
        at_ns = self.now_ns + round(seconds * S_NS)
        heapq.heappush(self._agenda, (at_ns, self._order, lease.device, msgspec.structs.replace(lease)))

    def _next_batch(self, lease: Lease) -> None:
        job = self.job(lease.job_id)
        items = min(self.batch, job.left)
        self._at(self.batch_takes_s(lease, items), lease)

    def _act(self, lease: Lease) -> None:
        if not lease.loaded:
            self._load(lease)
            self._next_batch(lease)
            return
        job = self.job(lease.job_id)
        items = min(self.batch, job.left)
        kind: Any = inputs.CheckpointReached
        if items == job.left:
            kind = inputs.Finished
            self.finished[job.job_id] = self.clock_s
        elif lease.yield_why is not None:
            kind = inputs.GaveBack
        used_s = (self.now_ns - lease.granted_ns - lease.used_ns) / S_NS
        self.report(kind, items, device=lease.device, used_s=used_s)
        if kind is inputs.CheckpointReached:
            self._next_batch(lease)

    def _load(self, lease: Lease) -> None:
        loaded = self.state.devices[lease.device].loaded
        for handler in loaded[: max(0, len(loaded) + 1 - self.room)]:
            self.give(inputs.Unloaded(device=lease.device, handler=handler))
        load_s = (self.now_ns - lease.granted_ns) / S_NS
        self.loads += 1
        self.loading_s += load_s
        self.loaded(lease.device, load_s)
