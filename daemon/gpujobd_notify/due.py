"""What is due: facts of the daemon in, things to be told out. No clock, no disk, no network.

    event  --+
             +--> record of the job, as far as it was told   +   Due, one a target
    job   ---+

Rule 1: nothing is told but what the daemon says happened: its events follow its commit, its lists are made of the same.
Rule 2: a Record says what was told already. An event that comes twice, or that a list has told before it, adds nothing;
so after a gap the list may overlap with the events that follow it.
Rule 3: what a Due tells is all in its Story: nobody is asked again when it is sent, hours later perhaps.
Rule 4: a key says which occasion of the job this is, and the id is made of it: the same fact has the same id, however
often it is derived.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from gpujobd import protocol as p
from msgspec import UNSET
from msgspec.structs import replace

FINAL: Final = frozenset({"completed", "failed", "cancelled", "expired"})
GONE: Final = "gone"
"""The state of a job that was removed before anybody could be told how it ended."""
STALLS: Final = frozenset({"stalled", "silent"})
CRASHES: Final = frozenset({"CrashLoop", "OutputDamaged"})
"""Reasons of the daemon's own for a pause: somebody has to look."""
DEVICE: Final = "device"
"""The occasion of endpoints that hear of ill devices; no job has it."""
HOUSE: Final = -1
"""In the place of an owner: the administrator configured it, it is no user's."""
DETAIL_CHARS_MAX: Final = 1000
STOPPING: Final = "DaemonStopping"


class Story(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is told, as it was when it happened. Times are UTC."""

    kind: str  # of NotifyOn, `progress=50%`, or `device`
    at: dt.datetime
    job: int = 0
    name: str = ""
    handler: str = ""
    tenant: str = ""
    state: str = ""
    items: int = 0
    done: int = 0
    failed: int = 0
    failure_codes: dict[str, int] = {}
    reason: str = ""
    detail: str = ""
    device: str = ""
    submitted_at: dt.datetime | None = None
    started_at: dt.datetime | None = None
    device_s: float = 0.0  # charged so far


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to be told to one target."""

    key: str
    uid: int
    target: str
    urgent: bool
    story: Story

    def id(self, epoch: int) -> str:
        """The same for the same fact and target; `epoch` counts the pasts that a restored daemon took back."""
        words = f"{epoch}\0{self.story.job}\0{self.key}\0{self.target}".encode()
        return "msg_" + base64.b32encode(hashlib.sha256(words).digest()[:20]).decode().lower()


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job somebody wants to hear of: what is known of it, and how much of that was told."""

    job: int
    uid: int
    handler: str
    items: int
    submitted_at: dt.datetime
    tenant: str = ""
    name: str = ""
    notify: tuple[str, ...] = ()
    notify_on: tuple[str, ...] = ()
    done: int = 0
    failed: int = 0
    failure_codes: dict[str, int] = {}
    device: str = ""
    device_s: float = 0.0
    started_at: dt.datetime | None = None  # told, if it was to be
    paused: bool = False  # the same
    percent: int = 0  # of its items, when that was told last
    over: bool = False  # the same


class Ear(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint of the house that hears of every job."""

    name: str
    on: tuple[str, ...]


Ears = tuple[Ear, ...]
Told = tuple[Record, list[Due]]


def submitted(event: Mapping[str, Any], defaults: tuple[tuple[str, ...], tuple[str, ...]]) -> Record:
    """A job that begins. `defaults`: what its owner set for jobs that say nothing themselves."""
    notify, on = tuple(event.get("notify", ())), tuple(event.get("notify_on", ()))
    if not notify:
        notify, on = defaults
    return Record(
        job=event["job"],
        uid=event["owner"],
        handler=event["handler"],
        items=event["items"],
        submitted_at=event["at"],
        tenant=event.get("tenant", ""),
        name=event.get("name", ""),
        notify=() if notify == (p.NOBODY,) else notify,
        notify_on=on,
    )


def observe(record: Record, event: Mapping[str, Any], seq: int, ears: Ears) -> Told:
    """What an event of a known job makes due, and what is known and told after it."""
    at = event["at"]
    match event["event"]:
        case "leased":
            return _leased(record, at, event.get("device", ""), ears)
        case "checkpointed":
            return _progressed(_counted(record, event), at, ears)
        case "yielded":
            return replace(_counted(record, event), paused=False), []
        case "completed" | "failed" | "cancelled" | "expired" as state:
            reason, detail = event.get("reason", ""), event.get("detail", "") or event.get("message", "")
            return _over(_counted(record, event), state, at, reason, detail, ears)
        case "paused":
            return _paused(record, at, event.get("reason", ""), event.get("detail", ""), f"{seq}", ears)
        case "resumed":
            return replace(record, paused=False), []
        case "lease_lost" | "handler_load_failed":
            lost = _counted(record, event)
            return lost, _stalled(lost, at, event.get("cause", ""), event.get("detail", ""), f"{seq}", ears)
        case _:
            return record, []


def caught_up(record: Record, job: p.Job, seq: int, now: dt.datetime, ears: Ears) -> Told:
    """What the present state of a job makes due, where the events that led there are not kept any more.

    A stall in between is not told: the state does not show it.
    """
    due: list[Due] = []
    record = _counted_so_far(record, job)
    if job.started_at is not UNSET:
        record, due = _leased(record, job.started_at, record.device, ears)
    reason, detail = job.reason or "", job.reason_detail or ""
    if job.state in FINAL:
        record, more = _over(record, job.state, job.finished_at or now, reason, detail, ears)
    elif job.state == "paused":
        record, more = _paused(record, now, reason, detail, f"gap{seq}", ears)
    else:
        record, more = _progressed(replace(record, paused=False), now, ears)
    return record, due + more


def known(job: p.Job, uid: int, defaults: tuple[tuple[str, ...], tuple[str, ...]]) -> Record:
    """The record of a job whose submission was not seen."""
    fields = {"job": job.id, "owner": uid, "handler": job.handler, "items": job.items.total}
    more = {"at": job.submitted_at, "tenant": job.tenant, "name": job.name or ""}
    wishes = {"notify": job.notify or (), "notify_on": job.notify_on or ()}
    return submitted(fields | more | wishes, defaults)


def already(record: Record, job: p.Job) -> Record:
    """As if all that the job shows had been told: of what was before the notifier, nothing is."""
    running = _counted_so_far(record, job)
    return replace(
        running,
        started_at=job.started_at or None,
        paused=job.state == "paused",
        percent=_percent(running),
        over=job.state in FINAL,
    )


def vanished(record: Record, now: dt.datetime, ears: Ears) -> Told:
    """The job is over and removed, and no event of its end is kept."""
    return _over(record, GONE, now, "", "it was removed before its end could be told", ears)


def of_a_device(event: Mapping[str, Any], seq: int, ears: Ears) -> list[Due]:
    """What is due when a device falls ill or is well again."""
    ill = event["event"] == "device_fell_ill"
    story = Story(
        kind=DEVICE,
        at=event["at"],
        device=event.get("device", ""),
        state="ill" if ill else "well",
        reason=event.get("reason", ""),
        detail=event.get("detail", "")[:DETAIL_CHARS_MAX],
    )
    heard = [ear for ear in ears if DEVICE in ear.on]
    return [Due(key=f"device:{seq}", uid=HOUSE, target=e.name, urgent=ill, story=story) for e in heard]


# --- the occasions ------------------------------------------------------------------------------------------------


def _leased(record: Record, at: dt.datetime, device: str, ears: Ears) -> Told:
    first = record.started_at is None
    record = replace(record, device=device, paused=False, started_at=record.started_at or at)
    if not first:
        return record, []
    return record, _tell(record, {p.NotifyOn.START}, _story(record, p.NotifyOn.START, "running", at), ears)


def _progressed(record: Record, at: dt.datetime, ears: Ears) -> Told:
    """Steps that were passed since the last look are told as one, the last of them. The end is told as an end."""
    percent, due = _percent(record), list[Due]()
    if percent >= 100 or percent <= record.percent:
        return record, []
    for target, uid, on in _audience(record, ears):
        for step in filter(None, map(p.progress_step, on)):
            passed = percent // step * step
            if passed > record.percent // step * step:
                story = _story(record, f"progress={passed}%", "running", at)
                due.append(Due(key=story.kind, uid=uid, target=target, urgent=False, story=story))
    return replace(record, percent=percent), due


def _over(record: Record, state: str, at: dt.datetime, reason: str, detail: str, ears: Ears) -> Told:
    """Once for each target, whatever it asked for: an end is told as a failure where it is one and that was wanted."""
    if record.over:
        return record, []
    record = replace(record, over=True, paused=False)
    bad = state in ("failed", "expired") or (state == "completed" and record.failed > 0)
    due = []
    for target, uid, on in _audience(record, ears):
        kind = next(
            (k for k in (p.NotifyOn.FAIL, p.NotifyOn.FINISH) if k in on and (bad or k != p.NotifyOn.FAIL)),
            None,
        )
        if kind is not None:
            story = _story(record, kind, state, at, reason, detail)
            due.append(Due(key="over", uid=uid, target=target, urgent=False, story=story))
    return record, due


def _paused(record: Record, at: dt.datetime, reason: str, detail: str, when: str, ears: Ears) -> Told:
    """A crash loop is told to those, too, who asked for stalls: nothing goes on before somebody has looked."""
    if record.paused or reason == STOPPING:
        return record, []
    record = replace(record, paused=True)
    crash = reason in CRASHES
    wanted = {p.NotifyOn.PAUSE, p.NotifyOn.STALL} if crash else {p.NotifyOn.PAUSE}
    story = _story(record, p.NotifyOn.PAUSE, "paused", at, reason, detail)
    return record, _tell(record, wanted, story, ears, key=f"pause:{when}", urgent=crash)


def _stalled(record: Record, at: dt.datetime, cause: str, detail: str, when: str, ears: Ears) -> list[Due]:
    if cause not in STALLS:
        return []
    story = _story(record, p.NotifyOn.STALL, "queued", at, cause, detail)
    return _tell(record, {p.NotifyOn.STALL}, story, ears, key=f"stall:{when}", urgent=True)


def _tell(
    record: Record, wanted: set[p.NotifyOn], story: Story, ears: Ears, *, key: str = "", urgent: bool = False
) -> list[Due]:
    """One Due for everybody who wants one of these occasions."""
    audience = [(target, uid) for target, uid, on in _audience(record, ears) if wanted & {*on}]
    return [
        Due(key=key or story.kind, uid=uid, target=target, urgent=urgent, story=story)
        for target, uid in audience
    ]


def _audience(record: Record, ears: Ears) -> list[tuple[str, int, tuple[str, ...]]]:
    """Who hears of this job: target, on whose behalf, on which occasions. A target that is named twice hears it once."""
    on = record.notify_on or (p.NotifyOn.FINISH,)
    own = [(target, record.uid, on) for target in dict.fromkeys(record.notify)]
    return own + [(ear.name, HOUSE, ear.on) for ear in ears if ear.name not in record.notify]


def _story(
    record: Record, kind: str, state: str, at: dt.datetime, reason: str = "", detail: str = ""
) -> Story:
    return Story(
        kind=str(kind),
        at=at,
        job=record.job,
        name=record.name,
        handler=record.handler,
        tenant=record.tenant,
        state=state,
        items=record.items,
        done=record.done,
        failed=record.failed,
        failure_codes=record.failure_codes,
        reason=reason,
        detail=detail[:DETAIL_CHARS_MAX],
        device=record.device,
        submitted_at=record.submitted_at,
        started_at=record.started_at,
        device_s=round(record.device_s, 3),
    )


def _counted(record: Record, event: Mapping[str, Any]) -> Record:
    """With the counts that the event brings, if it does."""
    checkpoint = event.get("checkpoint")
    device_s = record.device_s + event.get("used_ns", 0) / 1e9
    if checkpoint is None:
        return replace(record, device_s=device_s)
    return replace(
        record,
        device_s=device_s,
        done=checkpoint.get("done", 0),
        failed=checkpoint.get("failed", 0),
        failure_codes=event.get("failure_codes") or checkpoint.get("failure_codes", {}),
    )


def _counted_so_far(record: Record, job: p.Job) -> Record:
    return replace(
        record,
        done=job.items.done,
        failed=job.items.failed,
        failure_codes=job.failure_codes or {},
        device=job.device or record.device,
        device_s=job.gpu_s or 0.0,
    )


def _percent(record: Record) -> int:
    return (record.done + record.failed) * 100 // record.items if record.items else 0
