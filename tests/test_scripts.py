"""Scenarios as text: tests/scripts/*.txt. The file name is the claim; `pytest --rewrite` writes what happens now.

    # why this matters
    rules queued_jobs_max=2            only at the top: Rules, and devices=cuda:0,cuda:1
    submit alice items=10              commands, one a line; see `Script`
    ----
    t=0s Submitted job=1 ...           what followed: events, refusals, answers

A person is alice, bob, carol (members: alice and bob of tenant lab), root (administrator) or watcher (observer).
Times are since the start of the script: 30s, or +30s for "from now".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from core_house import (
    ALICE,
    BOB,
    CAROL,
    EPOCH_NS,
    HANDLERS,
    ROOT,
    WATCHER,
    House,
    check_bookkeeping,
    submission,
)
from gpujobd.core import inputs, policy
from gpujobd.core.decide import Refused
from gpujobd.core.events import AnyEvent
from gpujobd.core.model import S_NS, Checkpoint, JobState, Priority, Rules, Span

SCRIPTS = Path(__file__).parent / "scripts"
PEOPLE = {who.name: who for who in (ALICE, BOB, CAROL, ROOT, WATCHER)}
GIB = 1 << 30
UNSAID = {"at_ns", "input_sha256", "input_bytes", "submit_id", "vtime_ns", "timings", "version", "boot_id"}


class Script:
    """Runs commands against one House. A command `load-failed` is the method `load_failed`."""

    def __init__(self, words: list[str]) -> None:
        named = dict(word.split("=", 1) for word in words)
        devices = tuple(named.pop("devices", "cpu").split(","))
        limits = {name: int(value) for name, value in named.items()}
        self.house = House(Rules(handlers=HANDLERS, **limits), devices)  # type: ignore[arg-type]  # all are numbers
        self.submissions: dict[str, inputs.Submission] = {}

    def run(self, line: str) -> list[str]:
        verb, *words = line.split()
        command: Callable[..., list[AnyEvent] | str] = getattr(self, verb.replace("-", "_"))
        positional = [word for word in words if "=" not in word]
        named = dict(word.split("=", 1) for word in words if "=" in word)
        try:
            answer = command(*positional, **named)
        except Refused as refusal:
            figures = f" ({refusal.current}/{refusal.limit})" if refusal.limit is not None else ""
            return [f"refused {refusal.code}: {refusal.message}{figures}"]
        check_bookkeeping(self.house.state)
        return [answer] if isinstance(answer, str) else [shown(event) for event in answer]

    # --- people ---

    def submit(self, who: str, **named: str) -> list[AnyEvent]:
        return self.house.give(inputs.Submit(who=PEOPLE[who], submission=self._submission(named)))

    def reserve(self, who: str, **named: str) -> list[AnyEvent]:
        return self.house.give(inputs.Reserve(who=PEOPLE[who], submission=self._submission(named)))

    def streamed(self, who: str, reservation: str, *, submit_id: str) -> list[AnyEvent]:
        wanted = self.submissions[submit_id]
        return self.house.give(
            inputs.Submit(who=PEOPLE[who], submission=wanted, reservation_id=int(reservation))
        )

    def release(self, reservation: str) -> list[AnyEvent]:
        return self.house.give(inputs.Release(reservation_id=int(reservation)))

    def cancel(self, who: str, job: str) -> list[AnyEvent]:
        return self.house.give(inputs.Cancel(who=PEOPLE[who], job_id=int(job)))

    def pause(self, who: str, job: str) -> list[AnyEvent]:
        return self.house.give(inputs.Pause(who=PEOPLE[who], job_id=int(job)))

    def resume(self, who: str, job: str) -> list[AnyEvent]:
        return self.house.give(inputs.Resume(who=PEOPLE[who], job_id=int(job)))

    def first(self, who: str, job: str) -> list[AnyEvent]:
        return self.house.give(inputs.MoveFirst(who=PEOPLE[who], job_id=int(job)))

    def rm(self, who: str, job: str) -> list[AnyEvent]:
        return self.house.give(inputs.Remove(who=PEOPLE[who], job_id=int(job)))

    def priority(self, who: str, job: str, level: str) -> list[AnyEvent]:
        return self.house.give(
            inputs.SetPriority(who=PEOPLE[who], job_id=int(job), priority=Priority[level.upper()])
        )

    def queue(self, who: str, verb: str) -> list[AnyEvent]:
        return self.house.give(inputs.SwitchQueue(who=PEOPLE[who], verb=inputs.QueueVerb(verb)))

    def show(self, job: str) -> str:
        it = self.house.job(int(job))
        if it.state in (JobState.QUEUED, JobState.PAUSED):
            reason, detail = policy.waiting_reason(self.house.state, self.house.rules, it, self.house.now_ns)
            return f"job {job} is {it.state}, {reason}: {detail}"
        why = f", {it.reason}: {it.reason_detail}" if it.reason else ""
        return f"job {job} is {it.state}{why}, {it.checkpoint.done} done, {it.checkpoint.failed} failed"

    # --- workers ---

    def loaded(self, load: str = "2s", device: str = "cpu", gib: str = "0") -> list[AnyEvent]:
        return self.house.loaded(device, seconds(load), vram_bytes=int(gib) * GIB)

    def load_failed(self, device: str = "cpu", used: str = "1s") -> list[AnyEvent]:
        return self._report(inputs.LoadFailed, device, used, error="no such model")

    def checkpoint(self, items: str, *, device: str = "cpu", used: str = "1s") -> list[AnyEvent]:
        return self.house.checkpoint(int(items), device=device, used_s=seconds(used))

    def fail(self, items: str, device: str = "cpu", used: str = "1s") -> list[AnyEvent]:
        """A checkpoint behind so many failed items."""
        point = self.house.job(self.house.runs(device)).checkpoint
        failed = msgspec.structs.replace(
            point, upto=point.upto + int(items), failed=point.failed + int(items)
        )
        return self.house.checkpoint(0, device=device, used_s=seconds(used), checkpoint=failed)

    def claim(self, device: str = "cpu", **numbers: str) -> list[AnyEvent]:
        """A checkpoint of these very numbers, possible or not."""
        wrong = Checkpoint(**{name: int(value) for name, value in numbers.items()})
        return self.house.checkpoint(0, device=device, checkpoint=wrong)

    def give_back(self, items: str = "0", *, device: str = "cpu", used: str = "1s") -> list[AnyEvent]:
        return self.house.give_back(int(items), device=device, used_s=seconds(used))

    def finish(self, device: str = "cpu", used: str = "1s") -> list[AnyEvent]:
        return self.house.finish(device=device, used_s=seconds(used))

    def lose(
        self, cause: str, *, device: str = "cpu", used: str = "1s", hand: str = "0-0,0-0"
    ) -> list[AnyEvent]:
        """`hand`: the call in hand and the one before it."""
        spans = tuple(Span(*map(int, span.split("-"))) for span in hand.split(","))
        return self._report(inputs.Lost, device, used, cause=cause, suspects=spans)

    def late(self, cause: str, *, attempt: str, device: str = "cpu") -> list[AnyEvent]:
        """The report of an attempt that is over."""
        return self.house.give(inputs.Lost(device=device, attempt=int(attempt), used_ns=S_NS, cause=cause))

    def canary_ok(self, device: str = "cpu", used: str = "1s") -> list[AnyEvent]:
        return self._report(inputs.CanaryOk, device, used)

    def unkillable(self, device: str = "cpu") -> list[AnyEvent]:
        return self.house.give(inputs.Unkillable(device=device, detail="process 7 lives on"))

    # --- devices, from outside; each has 80 GiB ---

    def see(self, device: str, room: str = "", trouble: str = "") -> list[AnyEvent]:
        """A look at it: others leave so many GiB, or something is wrong with it."""
        room_bytes = round(float(room) * GIB) if room else -1
        detail = f"others leave {room} GiB" if room else "says the driver" if trouble else ""
        seen = inputs.DeviceSeen(
            device=device, trouble=trouble, detail=detail, total_bytes=80 * GIB, room_bytes=room_bytes
        )
        return self.house.give(seen)

    def cramped(self, room: str, device: str) -> list[AnyEvent]:
        """Its worker ran out of memory beside others that leave so many GiB."""
        return self.house.give_back(0, device=device, cramped_bytes=round(float(room) * GIB))

    def wanted(self, device: str) -> list[AnyEvent]:
        attempt = self.house.lease(device).attempt
        return self.house.give(inputs.MemoryWanted(device=device, attempt=attempt, detail="0.1 GiB are left"))

    def device(self, name: str) -> str:
        it = self.house.state.devices[name]
        why = f", {it.reason}: {it.reason_detail}" if it.reason else ""
        return f"{name} is {it.state}{why}"

    # --- the house ---

    def wait(self, text: str) -> list[AnyEvent]:
        return self.house.wait(seconds(text))

    def tick(self) -> list[AnyEvent]:
        return self.house.wait(0)

    def stop(self) -> list[AnyEvent]:
        return self.house.give(inputs.Stop())

    def start(self) -> list[AnyEvent]:
        """After `stop`, or without it: then the daemon was killed."""
        devices = tuple(self.house.state.devices)
        return self.house.give(inputs.Start(boot_id="boot", version="1", devices=devices))

    def disk(self, how: str) -> list[AnyEvent]:
        return self.house.give(inputs.DiskSpace(full=how == "full"))

    def retain(self) -> list[AnyEvent]:
        return self.house.give(inputs.Retain())

    # --- parts ---

    def _report(self, kind: Any, device: str, used: str, **fields: Any) -> list[AnyEvent]:
        lease = self.house.lease(device)
        used_ns = lease.used_ns + round(seconds(used) * S_NS)
        return self.house.give(kind(device=device, attempt=lease.attempt, used_ns=used_ns, **fields))

    def _submission(self, named: dict[str, str]) -> inputs.Submission:
        known = self.submissions.get(named.get("submit_id", ""))
        if known is not None and len(named) == 1:
            return known
        fields: dict[str, Any] = {}
        for name, value in named.items():
            if name in ("begin", "deadline"):
                base_ns = self.house.now_ns if value.startswith("+") else EPOCH_NS
                fields[f"{name}_ns"] = base_ns + round(seconds(value) * S_NS)
            elif name == "priority":
                fields[name] = Priority[value.upper()]
            else:
                fields[name] = int(value) if value.lstrip("-").isdigit() else value
        made = submission(**fields)
        self.submissions[made.submit_id] = made
        return made


def seconds(text: str) -> float:
    number, unit = float(text.lstrip("+")[:-1]), text[-1]
    return number * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[unit]


def shown(event: AnyEvent) -> str:
    """`t=1s Leased device=cpu job=1 attempt=1`: every field that says something, in seconds where it is a time."""
    words = [f"t={_number((event.at_ns - EPOCH_NS) / S_NS)}s", type(event).__name__]
    for field in msgspec.structs.fields(event):
        value = getattr(event, field.name)
        if field.name in UNSAID or value == field.default or value in ((), {}, b""):
            continue
        words.append(_word(field.name, value))
    return " ".join(words)


def _word(name: str, value: Any) -> str:
    if name == "job_id":
        return f"job={value}"
    if isinstance(value, Checkpoint):
        return f"upto={value.upto} done={value.done} failed={value.failed}"
    if name == "suspects":
        return "suspects=" + ",".join(f"{span.first}-{span.last}" for span in value)
    if isinstance(value, tuple):
        return f"{name}=" + ",".join(map(str, value))
    if isinstance(value, Priority):
        return f"{name}={value.name.lower()}"
    if name.endswith("_ns"):
        since_ns = EPOCH_NS if value >= EPOCH_NS else 0
        return f"{name[:-3]}={_number((value - since_ns) / S_NS)}s"
    return f"{name}='{value}'" if " " in str(value) else f"{name}={value}"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def played(text: str) -> str:
    """The script with what happens now behind every block of commands."""
    script: Script | None = None
    out: list[str] = []
    answers: list[str] = []
    answering = False
    for line in [*text.splitlines(), ""]:
        if not line:
            if answering or answers:
                out += ["----", *answers, ""]
            elif out and out[-1]:
                out.append("")
            answers, answering = [], False
        elif line == "----":
            answering = True
        elif not answering:
            out.append(line)
            if line.startswith("#"):
                continue
            if line.startswith("rules"):
                script = Script(line.split()[1:])
                continue
            script = script or Script([])
            answers += script.run(line)
            answering = False
    return "\n".join(out).rstrip("\n") + "\n"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.txt")), ids=lambda path: path.stem)
def test_script(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    now = played(text)
    if request.config.getoption("--rewrite"):
        path.write_text(now, encoding="utf-8")
    else:
        assert now == text
