"""Who may do what: every cell of the table, and what is not in it."""

from __future__ import annotations

import pytest
from core_house import ALICE, BOB, CAROL, ROOT, WATCHER, House
from gpujobd.core.inputs import Who
from gpujobd.core.model import Job
from gpujobd.core.rights import RIGHTS, Relation, allowed, relations

EVERYBODY = {"ping", "status", "handlers", "tenants", "devices", "submit", "list", "last", "events"}
SEEING = {"show", "wait", "watch", "see_event"}
OWNING = {"output", "log", "cancel", "pause", "resume", "retry", "priority", "first", "rm"}
RIGHT_OF = {
    "owner": EVERYBODY | SEEING | OWNING | {"see_notify"},
    "admin": EVERYBODY | SEEING | OWNING | {"see_notify", "attend", "queue"},
    "member": EVERYBODY | SEEING,
    "observer": EVERYBODY | SEEING | {"see_notify", "attend"},
    "anybody": EVERYBODY,
}
PEOPLE = {"owner": ALICE, "admin": ROOT, "member": BOB, "observer": WATCHER, "anybody": CAROL}


def lab_job() -> Job:
    house = House()
    return house.job(house.submit(ALICE, tenant="lab"))


@pytest.mark.parametrize("verb", sorted(RIGHTS))
@pytest.mark.parametrize("relation", sorted(RIGHT_OF))
def test_each_verb_is_allowed_to_just_these(verb: str, relation: str) -> None:
    assert allowed(verb, PEOPLE[relation], lab_job()) == (verb in RIGHT_OF[relation])


@pytest.mark.parametrize("relation", sorted(RIGHT_OF))
def test_a_verb_that_is_not_in_the_table_is_nobodys(relation: str) -> None:
    assert not allowed("shutdown", PEOPLE[relation], lab_job())
    assert not allowed("", PEOPLE[relation], None)


def test_without_a_job_nobody_owns_anything() -> None:
    assert relations(ALICE, None) == {Relation.ANYBODY}
    assert not allowed("cancel", ALICE, None)
    assert allowed("queue", ROOT, None)


def test_a_name_gives_no_rights_the_uid_does() -> None:
    namesake = Who(uid=5555, name="alice", tenants=frozenset({"alice"}))
    house = House()
    job = house.job(house.submit(ALICE))
    assert relations(namesake, job) == {Relation.ANYBODY, Relation.MEMBER}
    assert not allowed("output", namesake, job)


def test_relations_add_up() -> None:
    job = lab_job()
    everything = Who(uid=ALICE.uid, name="alice", admin=True, observer=True, tenants=frozenset({"lab"}))
    assert relations(everything, job) == set(Relation)
