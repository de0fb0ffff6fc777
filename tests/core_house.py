"""The core with nothing around it: a clock in the hand, and a journal that is a list."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from gpujobd.core import book, inputs
from gpujobd.core.apply import apply
from gpujobd.core.decide import decide
from gpujobd.core.events import AnyEvent
from gpujobd.core.inputs import AnyInput, Submission, Who
from gpujobd.core.model import S_NS, Checkpoint, HandlerRule, Job, Lease, Rules, State

EPOCH_NS = 1_700_000_000 * S_NS
HANDLERS = {"embed": HandlerRule(), "rerank": HandlerRule(), "ocr": HandlerRule()}

ALICE = Who(uid=1001, name="alice", tenants=frozenset({"alice", "lab"}))
BOB = Who(uid=1002, name="bob", tenants=frozenset({"bob", "lab"}))
CAROL = Who(uid=1003, name="carol", tenants=frozenset({"carol"}))
ROOT = Who(uid=0, name="root", admin=True, tenants=frozenset({"root"}))
WATCHER = Who(uid=1009, name="watcher", observer=True, tenants=frozenset({"watcher"}))

_numbers = itertools.count(1)


def person(number: int) -> Who:
    name = f"user{number}"
    return Who(uid=2000 + number, name=name, tenants=frozenset({name}))


def submission(**changes: Any) -> Submission:
    """A fresh submission of ten small items."""
    number = next(_numbers)
    items = changes.get("items", 10)
    fields: dict[str, Any] = {
        "submit_id": f"s{number}",
        "handler": "embed",
        "items": items,
        "input_bytes": 20 * items,
        "input_sha256": number.to_bytes(32, "big"),
        "item_bytes": 19,
    }
    return Submission(**(fields | changes))


class House:
    """One state, carried from quiet to quiet. `history` is what a journal would hold."""

    def __init__(self, rules: Rules | None = None, devices: tuple[str, ...] = ("cpu",)) -> None:
        self.rules = rules or Rules(handlers=HANDLERS)
        self.state = State()
        self.now_ns = EPOCH_NS
        self.history: list[AnyEvent] = []
        self.give(inputs.Start(boot_id="boot", version="1", devices=devices))

    def give(self, given: AnyInput) -> list[AnyEvent]:
        """One input, and everything that follows from it until nothing does."""
        events = self.once(given)
        while more := self.once(inputs.Tick()):
            events += more
        return events

    def once(self, given: AnyInput) -> list[AnyEvent]:
        events = decide(self.state, self.rules, given, self.now_ns)
        for event in events:
            apply(self.state, event, self.state.seq + 1)
        self.history += events
        return events

    def wait(self, seconds: float) -> list[AnyEvent]:
        self.now_ns += round(seconds * S_NS)
        return self.give(inputs.Tick())

    # --- people ---

    def submit(self, who: Who = ALICE, **changes: Any) -> int:
        """Number of the new job."""
        self.give(inputs.Submit(who=who, submission=submission(**changes)))
        return self.state.next_job_id - 1

    def job(self, job_id: int) -> Job:
        return self.state.jobs[job_id]

    # --- workers ---

    def lease(self, device: str = "cpu") -> Lease:
        lease = self.state.devices[device].lease
        assert lease is not None, f"{device} is free"
        return lease

    def runs(self, device: str = "cpu") -> int:
        """The job on this device; 0: none."""
        lease = self.state.devices[device].lease
        return lease.job_id if lease else 0

    def loaded(
        self, device: str = "cpu", load_s: float = 2.0, handler: str = "", vram_bytes: int = 0
    ) -> list[AnyEvent]:
        handler = handler or self.lease(device).handler
        load_ns = round(load_s * S_NS)
        return self.give(
            inputs.Loaded(device=device, handler=handler, load_ns=load_ns, vram_bytes=vram_bytes)
        )

    def report(
        self, kind: Any, items: int | None = None, *, device: str = "cpu", used_s: float = 1.0, **more: Any
    ) -> list[AnyEvent]:
        """`items` more are done since the latest checkpoint; None: all of them. `used_s` more were used."""
        lease = self.lease(device)
        job = self.job(lease.job_id)
        point = job.checkpoint
        items = job.items - point.upto if items is None else items
        checkpoint = msgspec.structs.replace(
            point,
            upto=point.upto + items,
            done=point.done + items,
            results_bytes=point.results_bytes + 10 * items,
        )
        used_ns = lease.used_ns + round(used_s * S_NS)
        return self.give(
            kind(
                device=device,
                attempt=lease.attempt,
                used_ns=used_ns,
                checkpoint=more.pop("checkpoint", checkpoint),
                **more,
            )
        )

    def checkpoint(self, items: int, **more: Any) -> list[AnyEvent]:
        return self.report(inputs.CheckpointReached, items, **more)

    def give_back(self, items: int = 0, **more: Any) -> list[AnyEvent]:
        return self.report(inputs.GaveBack, items, **more)

    def finish(self, **more: Any) -> list[AnyEvent]:
        return self.report(inputs.Finished, **more)

    def lose(
        self, cause: str = "died", *, device: str = "cpu", used_s: float = 1.0, **more: Any
    ) -> list[AnyEvent]:
        lease = self.lease(device)
        used_ns = lease.used_ns + round(used_s * S_NS)
        return self.give(
            inputs.Lost(device=device, attempt=lease.attempt, used_ns=used_ns, cause=cause, **more)
        )


def persistent(state: State) -> Any:
    """What a snapshot carries, as plain values."""
    values = msgspec.to_builtins(
        {name: getattr(state, name) for name in state.__struct_fields__ if name != "book"}, str_keys=True
    )
    values["removed"] = list(values["removed"].items())  # in order
    return values


def bookkeeping(state: State) -> Any:
    """What `rebuild` makes, as plain values, jobs by their numbers."""
    values = {name: getattr(state.book, name) for name in state.book.__struct_fields__}
    values["lines"] = {
        tenant: {key: [job.job_id for job in line] for key, line in lines.items()}
        for tenant, lines in state.book.lines.items()
    }
    return values


def check_bookkeeping(state: State) -> None:
    """The indexes that were kept along equal the ones made anew."""
    kept, kept_book = bookkeeping(state), state.book
    book.rebuild(state)
    made = bookkeeping(state)
    state.book = kept_book
    for name, value in kept.items():
        assert value == made[name], (name, value, made[name])


def tried(done: int, failed: int = 0) -> Checkpoint:
    return Checkpoint(
        upto=done + failed, done=done, failed=failed, results_bytes=10 * done, errors_bytes=10 * failed
    )
