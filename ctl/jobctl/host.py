"""Verbs about the host: queue, handlers, tenants, device, ping."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final

import click
from gpujobd import protocol as p
from msgspec import UNSET, UnsetType

from jobctl.command import Session, message_option, session, tell, verb, write, write_json, write_list

QUEUE_ACTIONS: Final = {
    "stop": "nothing more is started; submissions are accepted",
    "start": "work goes on",
    "disable": "submissions are refused",
    "enable": "submissions are accepted",
    "drain": "nothing more is started, submissions are refused; what runs goes on",
}


@verb("ping")
def ping() -> None:
    """Ask the daemon whether it answers.

    Example:
      jobctl ping && echo it lives
    """
    here = session()
    started = time.perf_counter()
    pong = here.daemon.ask(p.Ping(id=here.daemon.next_id()), p.Pong)
    took_ms = (time.perf_counter() - started) * 1e3
    if here.json:
        welcome = here.daemon.connection().welcome
        boot = {"boot_id": welcome.boot_id} if welcome is not None else {}
        write_json({"program": pong.program, "seq": pong.seq, **boot, "ms": round(took_ms, 3)})
    else:
        write(f"{pong.program} answers in {took_ms:.1f} ms\n")


@verb("queue")
@click.argument("action", type=click.Choice(list(QUEUE_ACTIONS)))
@message_option
def queue(action: str, message: str) -> None:
    """Stop or start work, disable or enable submissions, or drain; for administrators. It survives a restart.

    Actions:
      stop     start nothing more, let what runs go on, accept submissions
      drain    the same, and refuse submissions
      start    end a stop or a drain
      disable  accept no submissions
      enable   accept them again

    Example:
      jobctl queue drain -m "new driver at 18:00"
    """
    here = session()
    here.daemon.ask(p.Queue(id=here.daemon.next_id(), action=action, message=message), p.Done)
    if here.json:
        write_json({"v": 1, "action": action})
    tell(f"queue: {QUEUE_ACTIONS[action]}")


@verb("handlers")
def handlers() -> None:
    """List the handlers that jobs can be submitted to, and what --param they take.

    Example:
      jobctl handlers
    """
    from jobctl.table import Column, table  # noqa: PLC0415  # ping needs none of it
    from jobctl.times import now, relative, spoken  # noqa: PLC0415

    here = session()
    found = here.daemon.ask(p.Handlers(id=here.daemon.next_id()), p.HandlerList).handlers
    if here.json:
        write_list("handlers", found)
        return
    if not found:
        tell("no handler is installed")
        return
    columns = (
        Column("HANDLER"),
        Column("LOADED ON"),
        Column("LOADS IN", right=True),
        Column("ITEMS/S", right=True),
        Column("PARAMS", shrink=True),
        Column("FAILURE", shrink=True),
    )
    at = now()
    write(
        table(
            columns,
            [
                (
                    view.name,
                    " ".join(view.loaded_on),
                    spoken(view.load_s) if view.load_s is not UNSET else "",
                    f"{view.items_per_s:,.0f}" if view.items_per_s is not UNSET else "",
                    " ".join(param_words(name, rule) for name, rule in view.params.items()),
                    (view.failure if view.failure is not UNSET else "")
                    + (f", again {relative(view.retry_at, at)}" if view.retry_at is not UNSET else ""),
                )
                for view in found
            ],
        )
    )


def param_words(name: str, rule: dict[str, object]) -> str:
    """`normalize=bool(true)`, `language=str(en|de)`: the name, the type, the default or the choices."""
    choices = rule.get("choices")
    inner = ""
    if isinstance(choices, list) and choices:
        inner = "|".join(str(choice) for choice in choices)
    elif "default" in rule:
        default = rule["default"]
        inner = str(default).lower() if isinstance(default, bool) else str(default)
    return f"{name}={rule.get('type', '?')}" + (f"({inner})" if inner else "")


@verb("tenants")
@click.option("-w", "--watch", "stay", is_flag=True, help="Stay, and show it anew when something changes.")
def tenants(stay: bool) -> None:
    """List tenants: their share, what they got of the devices, how far they are behind an equal split, their limits.

    FORECAST is what came of the forecasts: how far off the ends of jobs were, and how many came by the time that
    nine in ten should keep. Then what you take up yourself, and your quotas. Ctrl-C ends --watch.

    Examples:
      jobctl tenants
      jobctl tenants -w
      jobctl tenants -w --json | jq -c '.tenants[] | [.name, .owed_s]'
    """
    here = session()
    if not stay:
        _show_tenants(here, here.daemon.ask(p.Tenants(id=here.daemon.next_id()), p.TenantList), write)
        return
    request = p.Tenants(id=here.daemon.next_id(), follow=True)
    show = Screen().show if sys.stdout.isatty() and not here.json else Pages().show
    for reply in here.daemon.follow(lambda: request):
        if isinstance(reply, p.TenantList):
            _show_tenants(here, reply, show)


def _show_tenants(here: Session, reply: p.TenantList, show: Callable[[str], None]) -> None:
    if not here.json:
        show(tenants_page(reply))
        return
    more = {"you": reply.you, "accuracy": reply.accuracy}
    write_list("tenants", reply.tenants, **{key: value for key, value in more.items() if value is not UNSET})


class Pages:
    """One after the other, an empty line between."""

    def __init__(self) -> None:
        self._between = ""

    def show(self, page: str) -> None:
        write(self._between + page)
        sys.stdout.flush()
        self._between = "\n"


class Screen:
    """A page in the place of the one before, on a terminal; the last one stays when it ends."""

    def __init__(self) -> None:
        self._lines = 0

    def show(self, page: str) -> None:
        from jobctl.table import screen_height, screen_width, shorten  # noqa: PLC0415

        lines = [shorten(line, screen_width()) for line in page.splitlines()[: max(1, screen_height() - 1)]]
        up = f"\x1b[{self._lines}A" if self._lines else ""
        sys.stdout.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self._lines = len(lines)


def tenants_page(reply: p.TenantList) -> str:
    from jobctl.table import Column, counted, table  # noqa: PLC0415
    from jobctl.times import spoken  # noqa: PLC0415

    columns = [Column("TENANT", shrink=True)]
    columns += [
        Column(head, right=True)
        for head in ("SHARE", "GPU TIME", "OWED", "QUEUED", "RUNNING", "PAUSED", "ITEMS LEFT")
    ]
    columns += [Column("LIMITS", shrink=True), Column("FORECAST", shrink=True)]
    rows = [
        (
            view.name,
            f"{view.share:g}",
            spoken(view.served_s),
            ("-" if view.owed_s < 0 else "") + spoken(abs(view.owed_s)),
            counted(view.queued),
            counted(view.running),
            counted(view.paused),
            counted(view.items_left),
            limits_words(view),
            accuracy_words(view.accuracy),
        )
        for view in reply.tenants
    ]
    page = table(columns, rows) if rows else "no tenant has submitted anything yet\n"
    if reply.accuracy is not UNSET:
        jobs = counted(reply.accuracy.jobs)
        page += f"\nforecasts of all, {jobs} jobs so far: {accuracy_words(reply.accuracy)}\n"
    if reply.you is not UNSET:
        page += f"\nyou: {usage_words(reply.you)}\n"
    return page


def limits_words(view: p.TenantView) -> str:
    """`200 jobs, 10,000 items, 1 device, 1.0 of 4.7 GiB`: what the tenant is held to; what is not configured is left out."""
    from jobctl.table import counted, size  # noqa: PLC0415

    words = []
    if view.jobs_max is not UNSET:
        words.append(f"{counted(view.jobs_max)} jobs")
    if view.items_max is not UNSET:
        words.append(f"{counted(view.items_max)} items")
    if view.devices_max is not UNSET:
        words.append(f"{counted(view.devices_max)} device{'s' if view.devices_max > 1 else ''}")
    if view.bytes_max is not UNSET:
        kept = f"{size(view.bytes)} of " if view.bytes is not UNSET else ""
        words.append(kept + size(view.bytes_max))
    return ", ".join(words)


def accuracy_words(accuracy: p.Accuracy | UnsetType) -> str:
    """`12 % off, 91 % in time`."""
    if accuracy is UNSET:
        return ""
    return f"{accuracy.error * 100:.0f} % off, {accuracy.by_90 * 100:.0f} % in time"


def usage_words(you: p.Usage) -> str:
    """`3 of 500 jobs, 1,200 of 500,000 items, ...`: what counts against the caller's quotas."""
    from jobctl.table import counted, size  # noqa: PLC0415

    facts = (
        (counted(you.jobs), you.jobs_max, counted, "jobs"),
        (counted(you.items), you.items_max, counted, "items left"),
        (size(you.bytes), you.bytes_max, size, "kept"),
        (counted(you.submissions), you.submissions_max, counted, "submissions this minute"),
    )
    return ", ".join(
        f"{figure}{'' if most is UNSET else f' of {shown(most)}'} {what}"
        for figure, most, shown, what in facts
    )


@verb("device")
def device() -> None:
    """Show the devices: what is loaded, memory, load, temperature, who else is there, and whether they are well.

    Without NVML (the Python module pynvml), it is said that nothing is known from outside.

    Example:
      jobctl device --json
    """
    from jobctl.devices import devices_page  # noqa: PLC0415
    from jobctl.times import now  # noqa: PLC0415

    here = session()
    found = here.daemon.ask(p.Devices(id=here.daemon.next_id()), p.DeviceList).devices
    if here.json:
        write_list("devices", found)
    else:
        write(devices_page(found, now()))
