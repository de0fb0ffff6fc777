"""Verbs that change jobs: cancel, pause, resume, retry, priority, first, rm.

Rule 1: each job on its own: what cannot be done to one is told with its id, and the others are done.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Final

import click
from gpujobd import protocol as p

from jobctl.command import (
    Session,
    ids_argument,
    message_option,
    notify_options,
    occasions,
    session,
    tell,
    verb,
    write,
    write_json,
)
from jobctl.exits import Exit, Refusal, complain_of, worst

PRIORITIES: Final = ("high", "normal", "low")


def _each(words: tuple[str, ...], make: Callable[[int, int], p.AnyRequest], done: str) -> Exit:
    """Ask `make(request id, job)` for every job. `done`: what has become of a job, for a person."""
    here = session()
    jobs = here.jobs(words)
    requests = [make(here.daemon.next_id(), job) for job in jobs]
    good: list[int] = []
    bad: list[dict[str, object]] = []
    exits = []
    for job, reply in zip(jobs, here.daemon.ask_each(requests), strict=True):
        if isinstance(reply, p.Error):
            exits.append(complain_of(job, reply, alone=len(jobs) == 1))
            bad.append({"id": job, "code": reply.code, "message": reply.message})
        else:
            good.append(job)
            tell(f"job {job}: {done}")
    _write(here, good, bad)
    return worst(exits)


def _write(here: Session, good: list[int], bad: list[dict[str, object]]) -> None:
    if here.json:
        write_json({"v": 1, "done": good, "failed": bad})


@verb("cancel")
@ids_argument
@message_option
def cancel(ids: tuple[str, ...], message: str) -> Exit:
    """Cancel jobs for good. One that runs stops at the end of its batch; what was done stays readable.

    Examples:
      jobctl cancel 42 -m "wrong model"
      jobctl cancel 3 5-9
    """
    return _each(ids, lambda id_, job: p.Cancel(id=id_, job=job, message=message), "cancelled")


@verb("pause")
@ids_argument
@message_option
def pause(ids: tuple[str, ...], message: str) -> Exit:
    """Hold jobs until they are resumed. One that runs stops at the end of its batch; nothing is lost.

    Example:
      jobctl pause @ -m "let the others go first"
    """
    return _each(ids, lambda id_, job: p.Pause(id=id_, job=job, message=message), "paused")


@verb("resume")
@ids_argument
@message_option
def resume(ids: tuple[str, ...], message: str) -> Exit:
    """Let paused jobs wait for their turn again; they go on where they were.

    Example:
      jobctl resume 42
    """
    return _each(ids, lambda id_, job: p.Resume(id=id_, job=job, message=message), "waits for its turn")


@verb("priority")
@click.argument("words", nargs=-1, required=True, metavar="ID... LEVEL")
@message_option
def priority(words: tuple[str, ...], message: str) -> Exit:
    """Set the level of jobs: high, normal or low.

    Example:
      jobctl priority 42 low
    """
    *ids, level = words
    if level not in PRIORITIES or not ids:
        raise click.UsageError(f"name jobs, then a level: {', '.join(PRIORITIES)}")
    return _each(
        tuple(ids),
        lambda id_, job: p.SetPriority(id=id_, job=job, priority=level, message=message),
        f"priority {level}",
    )


@verb("first")
@ids_argument
@message_option
def first(ids: tuple[str, ...], message: str) -> Exit:
    """Move jobs to the head of their tenant's own line, in the order given; other tenants lose nothing by it.

    Example:
      jobctl first 42
    """
    # The last one moved stands first: so the first one named is moved last.
    here = session()
    jobs = [str(job) for job in reversed(here.jobs(ids))]
    return _each(tuple(jobs), lambda id_, job: p.First(id=id_, job=job, message=message), "at the head")


@verb("rm")
@ids_argument
@message_option
def rm(ids: tuple[str, ...], message: str) -> Exit:
    """Remove final jobs and their files. Their ids are never used again.

    Example:
      jobctl rm 3 5-9
    """
    return _each(ids, lambda id_, job: p.Remove(id=id_, job=job, message=message), "removed")


@verb("retry")
@ids_argument
@click.option("--failed-items", is_flag=True, help="Only the items that failed; else all that are not done.")
@notify_options
@message_option
def retry(
    ids: tuple[str, ...],
    failed_items: bool,
    notify: tuple[str, ...],
    notify_on: tuple[str, ...],
    message: str,
) -> Exit:
    """Make a new job of what a final one left undone, and print its id. Line numbers stay those of the first input.

    It tells whom the first one told, unless --notify says otherwise.

    Example:
      jobctl retry 42 --failed-items
    """
    here = session()
    jobs = here.jobs(ids)
    good: list[dict[str, int]] = []
    bad: list[dict[str, object]] = []
    exits = []
    for job in jobs:
        request = p.Retry(
            id=here.daemon.next_id(),
            job=job,
            submit_id=uuid.uuid4().hex,  # so that it can be asked again after a lost answer
            failed_items=failed_items,
            message=message,
            notify=list(notify),
            notify_on=occasions(notify_on),
        )
        try:
            accepted = here.daemon.ask(request, p.Accepted)
        except Refusal as refusal:
            exits.append(complain_of(job, refusal.error, alone=len(jobs) == 1))
            bad.append({"id": job, "code": refusal.error.code, "message": refusal.error.message})
            continue
        good.append({"id": accepted.job, "retry_of": job})
        tell(f"job {accepted.job} retries job {job}")
        if not here.json:
            write(f"{accepted.job}\n")
    if here.json:
        write_json({"v": 1, "done": good, "failed": bad})
    return worst(exits)
