"""The verb notifications: what the notifier has told, has still to tell and cannot; retry, mute, unmute, defaults.

Rule 1: the notifier is asked, over a socket of its own: the daemon knows of no notification. Where it does not run, that
is said (exit 3), and is no trouble of the daemon's.
Rule 2: jobs are named as everywhere; `@` alone takes a question to the daemon.
"""

from __future__ import annotations

import os
from typing import Any, Final

import click
from gpujobd import protocol as p
from msgspec import UNSET

from jobctl.command import Session, notify_options, occasions, session, tell, verb, write, write_json
from jobctl.connection import NotifierLine
from jobctl.exits import Exit, complain, worst
from jobctl.table import Column, counted, table
from jobctl.times import now, relative

ACTIONS: Final = ("list", "retry", "mute", "unmute", "defaults")
STATES: Final = tuple(state.value for state in p.NotificationState)
COLUMNS: Final = (
    Column("ID", right=True),
    Column("JOB", right=True),
    Column("ON"),
    Column("TO", shrink=True),
    Column("STATE"),
    Column("TRIES", right=True),
    Column("WHEN"),
    Column("OF"),
    Column("LAST ERROR", shrink=True),
)
ENDPOINT_COLUMNS: Final = (
    Column("ENDPOINT", shrink=True),
    Column("KIND"),
    Column("BREAKER"),
    Column("SENDING", right=True),
    Column("QUEUED", right=True),
    Column("LAST ERROR", shrink=True),
)


@verb("notifications")
@click.argument("words", nargs=-1, metavar="[ID...|retry N...|mute|unmute|defaults]")
@click.option("-a", "--all", "everybodys", is_flag=True, help="Everybody's; for administrators.")
@click.option(
    "--state", "states", multiple=True, type=click.Choice(STATES), help="Only these; may be repeated."
)
@click.option("--job", metavar="ID", help="mute, unmute: about this job.")
@click.option("--endpoint", default="", metavar="NAME", help="mute, unmute: to this endpoint.")
@click.option("--clear", is_flag=True, help="defaults: tell nobody of jobs submitted without --notify.")
@notify_options
@click.option(
    "--notify-socket",
    metavar="PATH",
    help="Socket of the notifier. [default: $JOBCTL_NOTIFY_SOCKET, the user's own, the system's]",
)
def notifications(
    words: tuple[str, ...],
    everybodys: bool,
    states: tuple[str, ...],
    job: str | None,
    endpoint: str,
    clear: bool,
    notify: tuple[str, ...],
    notify_on: tuple[str, ...],
    notify_socket: str | None,
) -> Exit | None:
    """List what was told of your jobs, is to be told, or could not be; and how the endpoints are.

    Actions:
      retry N...  send these notifications now, by their number
      mute        keep quiet: --job ID, --endpoint NAME, or both
      unmute      speak again
      defaults    whom to tell of jobs submitted without --notify; with --notify or --clear, set it

    Examples:
      jobctl notifications 42
      jobctl notifications --state failed
      jobctl notifications mute --job 42
      jobctl notifications defaults --notify mailto:alice@example.org --notify-on fail,stall
    """
    action, rest = (words[0], words[1:]) if words and words[0] in ACTIONS else ("list", words)
    _check_options(action, list=bool(everybodys or states), mute=bool(job or endpoint),
                   defaults=bool(clear or notify or notify_on))  # fmt: skip
    here = session()
    line = NotifierLine(notify_socket or os.environ.get("JOBCTL_NOTIFY_SOCKET"))
    try:
        match action:
            case "list":
                _list(here, line, rest, states, everybodys=everybodys)
            case "retry":
                return _retry(here, line, rest)
            case "defaults":
                _none_left(action, rest)
                _defaults(here, line, notify, occasions(notify_on), clear=clear)
            case _:
                _none_left(action, rest)
                _mute(here, line, job, endpoint, muted=action == "mute")
    finally:
        line.hang_up()
    return None


def _check_options(action: str, **given: bool) -> None:
    """Options of another action would be passed over in silence."""
    of = {"list": "--all and --state", "mute": "--job and --endpoint", "defaults": "--notify and --clear"}
    mine = "mute" if action == "unmute" else action
    for other, is_given in given.items():
        if is_given and other != mine:
            raise click.UsageError(f"{of[other]} have no meaning with {action}")


def _none_left(action: str, words: tuple[str, ...]) -> None:
    if words:
        raise click.UsageError(f"{action} takes options only, not {words[0]!r}")


# --- list -------------------------------------------------------------------------------------------------------


def _list(
    here: Session, line: NotifierLine, words: tuple[str, ...], states: tuple[str, ...], *, everybodys: bool
) -> None:
    jobs = here.jobs(words) if words else [0]
    found: list[p.NotificationView] = []
    endpoints: dict[str, p.EndpointView] = {}
    for job in jobs:
        after = -1
        while after:
            reply = line.ask(
                p.Notifications(
                    id=line.next_id(), job=job, states=list(states), all=everybodys, after=max(0, after)
                ),
                p.NotificationList,
            )
            found += reply.notifications
            endpoints |= {view.name: view for view in reply.endpoints}
            after = reply.next
    shown = [endpoints[name] for name in sorted(endpoints)]
    if here.json:
        write_json({"v": 1, "notifications": found, "endpoints": shown})
    else:
        _show(found, shown)


def _show(found: list[p.NotificationView], endpoints: list[p.EndpointView]) -> None:
    at = now()
    if found:
        several = len({view.owner for view in found}) > 1
        write(table(COLUMNS, [_row(view, at, owner=several) for view in found]))
    else:
        tell("nothing was to be told")
    if endpoints:
        write(("\n" if found else "") + table(ENDPOINT_COLUMNS, [_endpoint(view, at) for view in endpoints]))


def _row(view: p.NotificationView, at: Any, *, owner: bool) -> tuple[str, ...]:
    next_at, done_at = view.next_try_at, view.delivered_at
    when = f"again {relative(next_at, at)}" if next_at is not UNSET and next_at > at else ""
    return (
        str(view.id),
        str(view.job) if view.job else "",
        view.kind,
        view.target,
        view.state,
        counted(view.tries) if view.tries else "",
        relative(done_at, at) if done_at is not UNSET else when,
        view.owner if owner and view.owner is not UNSET else "",
        view.last_error if view.last_error is not UNSET and view.state != "delivered" else "",
    )


def _endpoint(view: p.EndpointView, at: Any) -> tuple[str, ...]:
    until = f" {relative(view.until_at, at)}" if view.until_at is not UNSET and view.until_at > at else ""
    state = (
        "disabled" if view.disabled is not UNSET else f"{view.state}, again{until}" if until else view.state
    )
    error = view.disabled if view.disabled is not UNSET else view.last_error
    return (
        view.name,
        view.kind,
        state,
        counted(view.in_flight) if view.in_flight else "",
        counted(view.queued) if view.queued else "",
        error if error is not UNSET else "",
    )


# --- change -----------------------------------------------------------------------------------------------------


def _retry(here: Session, line: NotifierLine, words: tuple[str, ...]) -> Exit:
    if not words:
        raise click.UsageError("retry takes the numbers of notifications, as the list shows them")
    numbers = [_number(word) for word in words]
    good: list[int] = []
    bad: list[dict[str, object]] = []
    exits = []
    for number in numbers:
        reply = line.answer(p.NotificationRetry(id=line.next_id(), notification=number))
        if isinstance(reply, p.Error):
            which = "" if len(numbers) == 1 else f"notification {number}: "
            exits.append(complain(which, reply))
            bad.append({"id": number, "code": reply.code, "message": reply.message})
        else:
            good.append(number)
            tell(f"notification {number}: is sent again")
    if here.json:
        write_json({"v": 1, "done": good, "failed": bad})
    return worst(exits)


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 1 << 63):
        raise click.UsageError(f"{word!r} is no number of a notification")
    return int(word)


def _mute(here: Session, line: NotifierLine, job: str | None, endpoint: str, *, muted: bool) -> None:
    if not (job or endpoint):
        raise click.UsageError("name what to keep quiet about: --job ID, --endpoint NAME, or both")
    jobs = here.jobs((job,)) if job else [0]
    for job_id in jobs:
        line.ask(p.NotificationMute(id=line.next_id(), job=job_id, endpoint=endpoint, muted=muted), p.Done)
    if here.json:
        write_json({"v": 1, "jobs": [j for j in jobs if j], "endpoint": endpoint, "muted": muted})
    about = f"job {job}" if job else "every job"
    tell(
        f"{'quiet' if muted else 'not quiet any more'} about {about}"
        + (f", to {endpoint}" if endpoint else "")
    )


def _defaults(
    here: Session, line: NotifierLine, notify: tuple[str, ...], notify_on: list[str], *, clear: bool
) -> None:
    if clear and (notify or notify_on):
        raise click.UsageError("--clear tells nobody: it stands alone")
    if notify_on and not notify:
        raise click.UsageError("--notify-on says when: name with --notify whom, too")
    change = clear or bool(notify)
    request = p.NotifyDefaults(id=line.next_id(), set=change, notify=list(notify), notify_on=notify_on)
    reply = line.ask(request, p.Defaults)
    if here.json:
        write_json({"v": 1, "notify": reply.notify, "notify_on": reply.notify_on})
    elif reply.notify:
        write(f"{', '.join(reply.notify)} on {', '.join(reply.notify_on or [p.NotifyOn.FINISH])}\n")
    else:
        tell("nobody is told of jobs submitted without --notify")
