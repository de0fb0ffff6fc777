"""What notifications cost those who asked for none, while every far end is on a bad day.

A job computes, 64 clients ask, and 1,000 jobs are cancelled meanwhile, each of them with somebody to tell: by mail through
a server that is dead for 180 s after DATA, and by webhooks to one that sends a byte a second and one that never answers.
Then the same again with nobody to tell and no notifier, turn about.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import door
import far_ends
import load
import machine
from gpujobd import protocol
from harness import Host, until
from notify_house import NotifyHost
from rows import Row, Setting

BENCH = Path(__file__).resolve().parent
WINDOW_S = 10
ASKED_PER_S = 320
DUE = 1_000
ITEMS = 50_000
BATCH = 16
DEAD_S = 180
COST_MAX = 1.05
ROUNDS = 3  # for each repetition: one p99 differs from the next by as much as the row allows
DAYS = ("answers a byte a second", "never answers")


def _dead_after_data(sock) -> None:  # far_ends' own
    far_ends.mail(sock, lambda _: time.sleep(DEAD_S))


def notifications(setting: Setting) -> Iterator[Row]:
    p99: dict[bool, list[float]] = {False: [], True: []}
    rate: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS * setting.repetitions):
        for told in (False, True) if number % 2 else (True, False):
            folder = setting.folder / f"{number}{'on' if told else 'off'}"
            folder.mkdir()
            found_p99, found_rate = _with_far_ends(folder) if told else _scene(folder, [])
            p99[told].append(found_p99)
            rate[told].append(found_rate)
    slower = statistics.median(p99[True]) / statistics.median(p99[False])
    less = statistics.median(rate[False]) / statistics.median(rate[True])
    yield Row(
        f"show, p99, 64 clients, {DUE:,} notifications due and every far end dead, against none due",
        f"<= {COST_MAX} x",
        f"{slower:.3f} x",
        slower <= COST_MAX,
        f"{_spread(p99[True], 'ms')} against {_spread(p99[False], 'ms')}; {ASKED_PER_S} a second, open loop",
    )
    yield Row(
        "items of the job that runs meanwhile, without notifications against with them",
        f"<= {COST_MAX} x",
        f"{less:.3f} x",
        less <= COST_MAX,
        f"{_spread(rate[False], '/s', 0)} against {_spread(rate[True], '/s', 0)}",
    )


def _spread(values: list[float], unit: str, digits: int = 1) -> str:
    middle, low, high = (f"{v:,.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} {unit} ({low} to {high})"


def _with_far_ends(folder: Path) -> tuple[float, float]:
    with contextlib.ExitStack() as stack:
        mail = stack.enter_context(far_ends.far_end(_dead_after_data))
        webs = [stack.enter_context(far_ends.far_end(far_ends.BAD_DAYS[day][1])) for day in DAYS]
        config = (
            '[targets]\nurl_hosts = ["127.0.0.1"]\nmail_domains = ["far.end"]\nallow_networks = ["127.0.0.0/8"]\n'
            f'[mail]\nhost = "127.0.0.1"\nport = {mail}\nsecurity = "none"\ntimeout_s = {DEAD_S}\n'
        )
        targets = ["mailto:somebody@far.end", *(f"http://127.0.0.1:{port}/" for port in webs)]
        return _scene(folder, targets, config)


def _scene(folder: Path, targets: list[str], config: str = "") -> tuple[float, float]:
    """p99 of `show` in ms, and items a second of the job that runs."""
    busy = f'entry = "noting:Busy"\npath = ["{BENCH}"]\nbatch_max = {BATCH}\n'
    host = Host(folder / "host", door.WIDE_OPEN, {"busy": busy})
    with host, contextlib.ExitStack() as stack, host.client() as client:
        if targets:
            notifier = stack.enter_context(NotifyHost(folder / "notifier", host.socket, config))
            notifier.wait_until_it_follows()
        running = client.submit("busy", [{"n": n} for n in range(ITEMS)]).job
        wishes = [{"notify": [targets[n % len(targets)]]} if targets else {} for n in range(DUE)]
        jobs = [client.submit("busy", [{"n": 1}], **wish).job for wish in wishes]
        until(lambda: client.job(running).items.done > 0, "the job to run")
        found = _under_way(host, client, running, jobs)
        if targets:
            with notifier.client() as asked:
                due = until(lambda: _due(asked), "what is due to be in the outbox")
                assert not any(view.state == "delivered" for view in due)
        return found


def _due(asked) -> list[protocol.NotificationView]:  # notify_house's client
    first = asked.ask(protocol.Notifications, all=True)
    found = first.notifications + asked.notifications(all=True, after=first.next) if first.next else []
    return found if len(found) == DUE else []


def _under_way(host: Host, client, running: int, jobs: list[int]) -> tuple[float, float]:
    """Cancel the jobs, evenly over the window, while the crowd asks."""
    asking = door.loader("crowd", host, ASKED_PER_S, WINDOW_S, str(len(jobs)))
    began, before = time.perf_counter(), client.job(running).items.done
    for number, job in enumerate(jobs):
        time.sleep(max(0.0, began + number * WINDOW_S / len(jobs) - time.perf_counter()))
        done = client.ask(protocol.Cancel, job=job)
        assert isinstance(done, protocol.Done), done
    shown = client.job(running)
    took = time.perf_counter() - began
    assert shown.state == "running", "the job was too short for the window"
    return machine.percentile(door.finding(asking)["ms"], 99), (shown.items.done - before) / took


assert load.CROWD == 64  # as the row says
