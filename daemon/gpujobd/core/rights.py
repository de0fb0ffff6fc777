"""Who may do what to whose job: one table, and what is not in it is not allowed.

    relation         who
    owner            the uid that submitted the job
    member           may submit as the job's tenant
    admin            root and the configured administrators
    observer         sees every job and every event, for monitoring and notifying; nothing of what is in them
    anybody          whoever can reach the socket

Rule 1: default deny. A verb that is not in the table is nobody's.
Rule 2: members see each other's jobs, because they share a line and wait for one another, and a wait that cannot be
seen cannot be understood. They neither read outputs nor touch the jobs: what is inside is between owner and daemon.
An observer sees as much, and whom jobs tell of their ends, for he may be the notifier.
Rule 3: to somebody without the right to see a job it does not exist: the same answer as for a number never given.
Rule 4: what is finer than a verb (priority high, lifting an administrator's hold) is said in decide().
"""

from __future__ import annotations

import enum
from typing import Final

from gpujobd.core.inputs import Who
from gpujobd.core.model import Job


class Relation(enum.Enum):
    OWNER = "owner"
    MEMBER = "member"
    ADMIN = "admin"
    OBSERVER = "observer"
    ANYBODY = "anybody"


R = Relation
_ALL: Final = frozenset({R.ANYBODY})
_SEE: Final = frozenset({R.OWNER, R.MEMBER, R.ADMIN, R.OBSERVER})
_OWN: Final = frozenset({R.OWNER, R.ADMIN})

RIGHTS: Final[dict[str, frozenset[Relation]]] = {
    # The house: what everybody may know. Other people's jobs are counted there, never shown.
    "ping": _ALL,
    "status": _ALL,
    "handlers": _ALL,
    "tenants": _ALL,
    "devices": _ALL,
    "submit": _ALL,
    "list": _ALL,  # each job in it takes `show`
    "last": _ALL,  # the caller's own, by definition
    "events": _ALL,  # each event in it takes `see_event`
    # One job.
    "show": _SEE,
    "wait": _SEE,
    "watch": _SEE,
    "see_event": _SEE,
    "see_notify": frozenset({R.OWNER, R.ADMIN, R.OBSERVER}),  # an address is not its tenant's business
    "output": _OWN,
    "log": _OWN,
    "cancel": _OWN,
    "pause": _OWN,
    "resume": _OWN,
    "retry": _OWN,
    "priority": _OWN,
    "first": _OWN,
    "rm": _OWN,
    "attend": frozenset({R.ADMIN, R.OBSERVER}),
    # The queue as a whole.
    "queue": frozenset({R.ADMIN}),
}


def relations(who: Who, job: Job | None) -> frozenset[Relation]:
    """What `who` is to this job, or to the house where there is none."""
    found = {R.ANYBODY}
    if who.admin:
        found.add(R.ADMIN)
    if who.observer:
        found.add(R.OBSERVER)
    if job is not None and job.owner == who.uid:
        found.add(R.OWNER)
    if job is not None and job.tenant in who.tenants:
        found.add(R.MEMBER)
    return frozenset(found)


def allowed(verb: str, who: Who, job: Job | None) -> bool:
    rights = RIGHTS.get(verb, frozenset())
    return R.ANYBODY in rights or not rights.isdisjoint(relations(who, job))
