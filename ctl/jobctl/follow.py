"""Verbs that stay until a job is final: wait, watch. Pushed by the daemon, never polled.

Rule 1: a restart of the daemon is survived: the question is asked again, and the answer is the same.
Rule 2: leaving early changes nothing for the job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

import click
from gpujobd import protocol as p

from jobctl import describe
from jobctl.command import Session, complain, ids_argument, session, tell, verb, write, write_line, write_list
from jobctl.exits import Exit, Failure, worst
from jobctl.table import clean, counted, screen_width, shorten
from jobctl.times import Duration, now, spoken

REDRAW_S: Final = 0.5  # for the clock; news are drawn when they come, but not faster than DRAW_GAP_S
DRAW_GAP_S: Final = 0.1
BAR_CELLS_MAX: Final = 30
BAR_CELLS_MIN: Final = 8


@verb("wait")
@ids_argument
@click.option("--timeout", type=Duration(), metavar="DURATION", help="Give up after so long: exit code 5.")
def wait(ids: tuple[str, ...], timeout: float | None) -> Exit:
    """Wait until every job is final.

    Exits with 0 if all of them completed without a failed item, with 1 if one did not, with 5 if it took too long.

    Examples:
      jobctl wait 42 && jobctl output 42 > results.jsonl
      jobctl wait @ --timeout 2h
    """
    here = session()
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        jobs = wait_for(here, here.jobs(ids), deadline)
    except TimeoutError:
        raise Failure(Exit.TIMED_OUT, f"timed_out: not final after {spoken(timeout or 0)}") from None
    if here.json:
        write_list("jobs", jobs)
    return report(jobs)


def wait_for(here: Session, ids: Sequence[int], deadline: float | None = None) -> list[p.Job]:
    """Return the jobs once all are final. Raises: TimeoutError at `deadline`; Refusal."""
    jobs: list[p.Job] = []
    for at in range(0, len(ids), p.PAGE_JOBS_MAX):
        part = list(ids[at : at + p.PAGE_JOBS_MAX])
        for reply in here.daemon.follow(partial(p.Wait, part, id=here.daemon.next_id()), deadline=deadline):
            if isinstance(reply, p.Jobs):
                jobs += reply.jobs
    return jobs


def report(jobs: Sequence[p.Job]) -> Exit:
    """Say how the jobs ended: of those that went well only to a person. Returns the worst."""
    for job in jobs:
        if describe.ended(job):
            complain(describe.ending(job))
        else:
            tell(describe.ending(job))
    return worst(describe.ended(job) for job in jobs)


@verb("watch")
@click.argument("job", metavar="ID")
def watch(job: str) -> Exit:
    """Follow one job until it is final: a progress bar on a terminal, else one line a change.

    Exits as `wait` does. Ctrl-C leaves; the job goes on.

    Examples:
      jobctl watch @
      jobctl watch 42 --json | jq .items.done
    """
    here = session()
    ids = here.jobs((job,))
    if len(ids) != 1:
        raise click.UsageError("watch follows one job")
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty() and not here.json
    return report([watch_job(here, ids[0], Bar() if on_terminal else Lines(json=here.json))])


def watch_job(here: Session, job_id: int, screen: Lines | Bar) -> p.Job:
    """Draw the job until it is final; return it as it ended. Raises: Refusal, Failure, KeyboardInterrupt."""
    job: p.Job | None = None
    request = p.Watch(id=here.daemon.next_id(), job=job_id)
    try:
        for reply in here.daemon.follow(lambda: request, tick_s=REDRAW_S):
            if isinstance(reply, p.JobChanged):
                job = reply.job
            if job is not None:
                screen.show(job, news=reply is not None)
                if job.state in describe.FINAL:
                    return job
    except KeyboardInterrupt:
        screen.end()
        complain(f"left; job {job_id} goes on: `jobctl watch {job_id}` comes back to it")
        raise
    finally:
        screen.end()
    raise Failure(Exit.USAGE, f"no_such_job: job {job_id} was removed")


class Lines:
    """One line a change, as text or as JSON."""

    def __init__(self, *, json: bool) -> None:
        self._json = json
        self._last = ""

    def show(self, job: p.Job, *, news: bool) -> None:
        if not news:
            return
        if self._json:
            write_line(job)
            return
        text = _line(job)
        if text != self._last:
            write(text + "\n")
        self._last = text

    def end(self) -> None:
        pass


def _line(job: p.Job) -> str:
    parts = [str(job.id), job.state, describe.progress(job)]
    if job.state == "running":
        parts.append(describe.items_per_s(job))
    parts.append(describe.outlook(job, now()))
    return clean(", ".join(part for part in parts if part))


class Bar:
    """A progress bar on the last line of a terminal, on stderr: stdout is for data."""

    def __init__(self) -> None:
        self._drawn_at = 0.0
        self._drawn = False

    def show(self, job: p.Job, *, news: bool) -> None:
        at = time.monotonic()
        if at - self._drawn_at < DRAW_GAP_S and news and job.state not in describe.FINAL:
            return
        self._drawn_at, self._drawn = at, True
        sys.stderr.write("\r" + bar_line(job, _terminal_width() - 1) + "\x1b[K")
        sys.stderr.flush()

    def end(self) -> None:
        if self._drawn:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self._drawn = False


def bar_line(job: p.Job, width: int) -> str:
    """`42 running [#####-----] 50 %  25,000/50,000  812 items/s  done in 31 s`, within `width`."""
    items = job.items
    tried = items.done + items.failed
    texts = [f"{percent:>3} %" for percent in (describe.percent(items),)]
    texts.append(f"{counted(tried)}/{counted(items.total)}")
    if items.failed:
        texts.append(f"{counted(items.failed)} failed")
    if job.state == "running":
        texts.append(describe.items_per_s(job))
    texts.append(describe.outlook(job, now()))
    tail = clean("  ".join(text for text in texts if text))
    head = f"{job.id} {job.state} "
    cells = min(BAR_CELLS_MAX, width - len(head) - len(tail) - 3)
    if cells < BAR_CELLS_MIN:
        return shorten(head + tail, width)
    full = cells * tried // items.total if items.total else cells
    return f"{head}[{'#' * full}{'-' * (cells - full)}] {tail}"


def _terminal_width() -> int:
    return max(20, screen_width())
