"""What is said: a story as JSON for programs, as plain text for people. No clock, no network.

Rule 1: what a user chose (a job's name, a message) is text in a line of its own making: control characters are replaced,
and a subject has at most 100 characters of it.
Rule 2: a mail is read on a telephone at night: first what happened, then the figures, then the command that goes on.
Rule 3: a mail says what it is (Auto-Submitted, RFC 3834), and has the same Message-ID however often it is tried.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any, Final

from gpujobd import protocol as p

from gpujobd_notify.due import DEVICE, FINAL, GONE, Story

USER_CHARS_MAX: Final = 100  # of a subject, that somebody else chose
STORIES_MAX: Final = 200  # in one digest


def payload(story: Story) -> bytes:
    """The body of a webhook, and the input of a hook: `type`, `timestamp` and `data`, as Standard Webhooks has them."""
    data: dict[str, Any] = {
        "kind": story.kind,
        "job": story.job or None,
        "name": story.name,
        "handler": story.handler,
        "tenant": story.tenant,
        "state": story.state,
        "reason": story.reason,
        "detail": story.detail,
        "device": story.device,
        "items": {"total": story.items, "done": story.done, "failed": story.failed} if story.job else None,
        "failure_codes": story.failure_codes,
        "submitted_at": _rfc3339(story.submitted_at),
        "started_at": _rfc3339(story.started_at),
        "device_s": story.device_s,
        "fetch": f"jobctl output {story.job}" if story.state in FINAL else "",
    }
    kept = {key: value for key, value in data.items() if value not in (None, "", {}, 0.0)}
    word = "device" if story.kind == DEVICE else f"job.{story.kind.partition('=')[0]}"
    whole = {"type": word, "timestamp": _rfc3339(story.at), "data": kept}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()


def _rfc3339(at: dt.datetime | None) -> str | None:
    return at.astimezone(dt.UTC).isoformat().replace("+00:00", "Z") if at else None


# --- mail -----------------------------------------------------------------------------------------------------------


def mail(
    stories: Sequence[tuple[str, Story]], *, sender: str, to: Sequence[str], host: str, now: dt.datetime
) -> EmailMessage:
    """One mail of one story, or a digest of many; each comes with its id."""
    assert 0 < len(stories) <= STORIES_MAX
    message = EmailMessage(policy=SMTP)
    message["From"] = sender
    message["To"] = ", ".join(to)
    # What looks like an encoded word would be decoded, and whatever it hides be a header: older versions of Python let it.
    message["Subject"] = _subject([story for _, story in stories]).replace("=?", "= ?")
    message["Date"] = email.utils.format_datetime(now)
    message["Message-ID"] = f"<{message_id([name for name, _ in stories])}@{host}>"
    message["Auto-Submitted"] = "auto-generated"
    if len(stories) == 1 and stories[0][1].job:
        message["References"] = f"<job-{stories[0][1].job}@{host}>"
    message.set_content("\n".join(_body([story for _, story in stories], host)) + "\n")
    return message


def message_id(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else "digest_" + hashlib.sha256("\0".join(ids).encode()).hexdigest()[:32]


def _subject(stories: Sequence[Story]) -> str:
    if len(stories) == 1:
        story = stories[0]
        named = f" ({one_line(story.name)})" if story.name else ""
        return f"{headline(story)}{named}"
    bad = sum(_is_bad(story) for story in stories)
    return f"{len(stories)} notifications of gpujobd" + (f", {bad} of them bad news" if bad else "")


def headline(story: Story) -> str:
    """What happened, in one line without a word of a user's."""
    if story.kind == DEVICE:
        return f"device {one_line(story.device)} is {story.state}" + (
            f": {story.reason}" if story.reason else ""
        )
    match story.kind, story.state:
        case p.NotifyOn.START, _:
            return f"job {story.job} has started"
        case p.NotifyOn.STALL, _:
            return f"job {story.job} stalled and waits to be tried again"
        case p.NotifyOn.PAUSE, _:
            return f"job {story.job} is paused" + (f": {story.reason}" if story.reason else "")
        case _, "completed" if story.failed:
            return f"job {story.job} completed, {story.failed:,} of {story.items:,} items failed"
        case _, "completed":
            return f"job {story.job} completed, all {story.items:,} items done"
        case _, state if state == GONE:
            return f"job {story.job} is over and was removed"
        case _, state if state in FINAL:
            return f"job {story.job} {story.state}" + (f": {story.reason}" if story.reason else "")
    return f"job {story.job}: {story.kind.partition('=')[2]} of its items were tried"


def _is_bad(story: Story) -> bool:
    return (
        story.state in ("failed", "expired", "ill", GONE)
        or story.failed > 0
        or story.kind in ("stall", "pause")
    )


def _body(stories: Sequence[Story], host: str) -> Iterator[str]:
    if len(stories) == 1:
        yield from _one(stories[0])
    else:
        for title, bad in (("To be looked at", True), ("All well", False)):
            some = [story for story in stories if _is_bad(story) is bad]
            if some:
                yield f"{title}:"
                yield ""
                yield from (f"  {headline(story)}{_titled(story)}" for story in some)
                yield ""
        yield "jobctl show ID tells all of one, jobctl output ID fetches its results."
    yield ""
    yield "-- "
    job = stories[0].job if len(stories) == 1 else 0
    which = (
        f"this job: jobctl notifications mute --job {job}"
        if job
        else "a job: jobctl notifications mute --job ID"
    )
    yield f"gpujobd on {host}. To hear no more of {which}"


def _titled(story: Story) -> str:
    return f'  "{one_line(story.name)}"' if story.name else ""


def _one(story: Story) -> Iterator[str]:
    line = headline(story)
    yield f"{line[0].upper()}{line[1:]}."
    yield ""
    yield from _aligned(_figures(story))
    for title, command in _commands(story):
        yield ""
        yield f"{title}:"
        yield f"    {command}"


def _aligned(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    return (f"  {name:<10} {value}".rstrip() for name, value in rows)


def _figures(story: Story) -> Iterator[tuple[str, str]]:
    if story.name:
        yield "name", one_line(story.name)
    if story.handler:
        yield "handler", one_line(story.handler)
    if story.tenant:
        yield "tenant", one_line(story.tenant)
    if story.items:
        yield "items", f"{story.items:,}"
    if story.items and story.kind != p.NotifyOn.START:
        yield "done", f"{story.done:,}"
        yield "failed", f"{story.failed:,}"
        for code, count in sorted(story.failure_codes.items(), key=lambda pair: (-pair[1], pair[0])):
            yield "", f"{count:>7,}  {one_line(code)}"
    if story.reason:
        yield "reason", one_line(story.reason)
    if story.detail:
        yield "detail", one_line(story.detail, 500)
    yield from _times(story)


def _times(story: Story) -> Iterator[tuple[str, str]]:
    over = story.state in FINAL
    if story.submitted_at:
        yield "submitted", _clock(story.submitted_at)
    if story.started_at:
        waited = f"   after {span(story.started_at - story.submitted_at)}" if story.submitted_at else ""
        yield "started", f"{_clock(story.started_at)}{waited}"
    if story.kind != p.NotifyOn.START:
        ran = f"   after {span(story.at - story.started_at)}" if over and story.started_at else ""
        yield "ended" if over else "at", f"{_clock(story.at)}{ran}"
    if story.device_s and story.device:
        yield "device", f"{span(dt.timedelta(seconds=story.device_s))} of {one_line(story.device)}"
    elif story.device:
        yield "device", one_line(story.device)


def _commands(story: Story) -> Iterator[tuple[str, str]]:
    """What to do next, as it can be pasted."""
    if story.kind == DEVICE:
        yield "More about it", "jobctl devices"
        return
    match story.state:
        case state if state in FINAL:
            if story.done:
                yield "Fetch the results", f"jobctl output {story.job} > results-{story.job}.jsonl"
            if story.failed:
                yield "See what failed, and why", f"jobctl errors {story.job}"
                yield "Try the failed items again", f"jobctl retry {story.job} --failed-items"
            if not story.done and not story.failed:
                yield "All that is known of it", f"jobctl show {story.job}"
        case "paused":
            yield "What its worker said", f"jobctl log {story.job}"
            yield "Go on with it", f"jobctl resume {story.job}"
        case "queued":
            yield "What its worker said", f"jobctl log {story.job}"
        case "running":
            yield "Watch it", f"jobctl watch {story.job}"


def _clock(at: dt.datetime) -> str:
    return at.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def span(length: dt.timedelta) -> str:
    """3 h 5 min, 2 min 5 s, 0.3 s: two units at most."""
    seconds = max(0.0, length.total_seconds())
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def one_line(text: str, chars_max: int = USER_CHARS_MAX) -> str:
    """What somebody else chose, as it can stand in a line: printable, and no longer than that."""
    shown = "".join(c if c.isprintable() else " " for c in text[: chars_max + 1])
    return shown if len(shown) <= chars_max else f"{shown[: chars_max - 3]}..."
