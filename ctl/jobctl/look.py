"""Verbs that look: status, list, show."""

from __future__ import annotations

from typing import Final

import click
from gpujobd import protocol as p

from jobctl import describe
from jobctl.command import Session, ids_argument, session, tell, verb, write, write_json, write_list
from jobctl.exits import Exit, Refusal, complain_of, worst
from jobctl.times import now

STATES: Final = (*describe.OPEN, *sorted(describe.FINAL))


@verb("status")
def status() -> None:
    """Show the devices, what runs with its progress, what waits, why and until when.

    The same as jobctl alone:
      jobctl
      jobctl --json
    """
    show_status(session())


def show_status(here: Session) -> None:
    table = here.daemon.ask(p.Status(id=here.daemon.next_id()), p.StatusTable)
    if here.json:
        write_json(
            {
                "v": 1,
                "switches": table.switches,
                "devices": table.devices,
                "running": table.running,
                "waiting": table.waiting,
                "paused": table.paused,
                "queued_in_all": table.queued_in_all,
            }
        )
    else:
        write(describe.status_page(table, now()))


@verb("list")
@click.option(
    "--state", "states", multiple=True, type=click.Choice(STATES), help="Only these; may be repeated."
)
@click.option("--tenant", default="", help="Only jobs of this tenant.")
@click.option("--handler", default="", help="Only jobs for this handler.")
@click.option("--mine", is_flag=True, help="Only jobs that you submitted.")
@click.option("-a", "--all", "every", is_flag=True, help="Final jobs too.")
@click.option("--newest", is_flag=True, help="The newest first.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option(
    "--changed-since", type=click.IntRange(min=0), metavar="SEQ", help="Changed by an event after this one."
)
def list_jobs(
    states: tuple[str, ...],
    tenant: str,
    handler: str,
    mine: bool,
    every: bool,
    newest: bool,
    limit: int | None,
    changed_since: int | None,
) -> None:
    """List jobs, the oldest first: those that wait, run or are paused; with --all or --state, others too.

    Examples:
      jobctl list --mine
      jobctl list --all --newest --limit 10
      jobctl list --state failed --tenant production --json
    """
    here = session()
    open_only = not states and not every and changed_since is None
    wanted = p.List(
        id=0,
        states=list(describe.OPEN if open_only else states),
        tenant=tenant,
        handler=handler,
        mine=mine,
        newest=newest,
        changed_since=changed_since or 0,
    )
    jobs, seq = _pages(here, wanted, limit)
    if here.json:
        write_list("jobs", jobs, seq=seq)
    elif jobs:
        write(describe.job_table(jobs, now()))
    elif open_only:
        tell("no job waits or runs; `jobctl list --all` shows the final ones")


def _pages(here: Session, wanted: p.List, limit: int | None) -> tuple[list[p.Job], int]:
    """All pages, and the number of the event after which the first was taken: what changed later is not missed."""
    from msgspec.structs import replace  # noqa: PLC0415

    jobs: list[p.Job] = []
    seq = -1
    while True:
        left = p.PAGE_JOBS_MAX if limit is None else min(p.PAGE_JOBS_MAX, limit - len(jobs))
        page = here.daemon.ask(replace(wanted, id=here.daemon.next_id(), limit=left), p.Jobs)
        jobs += page.jobs
        seq = page.seq if seq < 0 else seq
        if not page.next or (limit is not None and len(jobs) >= limit):
            return jobs, seq
        wanted = replace(wanted, after=page.next)


@verb("show")
@ids_argument
def show(ids: tuple[str, ...]) -> Exit:
    """Show all that is known of a job.

    Examples:
      jobctl show 42
      jobctl show @ --json
      jobctl show 3 5-9
    """
    here = session()
    wanted = here.jobs(ids)
    found: list[p.Job] = []
    exits = []
    for job in wanted:
        try:
            found.append(here.daemon.ask(p.Show(id=here.daemon.next_id(), job=job), p.OneJob).job)
        except Refusal as refusal:
            exits.append(complain_of(job, refusal.error, alone=len(wanted) == 1))
    if here.json and len(wanted) > 1:
        write_list("jobs", found)
    elif here.json:
        for job_found in found:
            write_json(job_found)
    else:
        write("\n".join(describe.job_lines(job_found, now()) for job_found in found))
    return worst(exits)
