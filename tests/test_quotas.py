"""What keeps one user, or one tenant, from taking all there is: every quota, through restarts, snapshots and time."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from core_house import (
    ALICE,
    BOB,
    CAROL,
    EPOCH_NS,
    HANDLERS,
    ROOT,
    House,
    check_bookkeeping,
    submission,
)
from gpujobd.core import inputs, snapshot
from gpujobd.core.apply import apply
from gpujobd.core.inputs import Who
from gpujobd.core.model import MINUTE_NS, NO_USE, S_NS, Rules, State, TenantRule, Use
from gpujobd.core.refused import Refused
from gpujobd.protocol import ErrorCode


def house(**changes: Any) -> House:
    return House(Rules(**({"handlers": HANDLERS} | changes)))


def refused(of: House, who: Who = ALICE, **changes: Any) -> Refused:
    before = of.state.seq
    with pytest.raises(Refused) as caught:
        of.give(inputs.Submit(who=who, submission=submission(**changes)))
    assert of.state.seq == before
    assert caught.value.code == ErrorCode.QUOTA
    return caught.value


def restarted(it: House, *, by_snapshot: bool) -> House:
    """The same house after a daemon that died: from its journal, or from a snapshot."""
    again = House.__new__(House)
    again.rules, again.now_ns, again.history = it.rules, it.now_ns, list(it.history)
    if by_snapshot:
        again.state = snapshot.load(list(snapshot.chunks(it.state)))
    else:
        again.state = State()
        for seq, event in enumerate(it.history, 1):
            apply(again.state, event, seq)
    again.give(inputs.Start(boot_id="again", version="1", devices=("cpu",)))
    return again


RESTARTS = pytest.mark.parametrize("by_snapshot", [False, True], ids=["journal", "snapshot"])

# limits, what the third submission changes, limit and figure of the refusal; ten items and 200 bytes each
QUOTAS: list[tuple[dict[str, Any], dict[str, Any], int, int]] = [
    ({"jobs_per_uid_max": 2}, {}, 2, 2),
    ({"items_per_uid_max": 25}, {}, 25, 20),
    ({"items_per_uid_max": 30}, {"items": 11, "input_bytes": 220}, 30, 20),
    ({"bytes_per_uid_max": 599}, {}, 599, 400),
    ({"bytes_per_uid_max": 600}, {"input_bytes": 201}, 600, 400),
    ({"submissions_per_minute_max": 2}, {}, 2, 2),
    ({"tenants": {"alice": TenantRule(queued_jobs_max=2)}}, {}, 2, 2),
    ({"tenants": {"alice": TenantRule(queued_items_max=25)}}, {}, 25, 20),
    ({"tenants": {"alice": TenantRule(spool_bytes_max=599)}}, {}, 599, 400),
]


@pytest.mark.parametrize(("limits", "third", "limit", "current"), QUOTAS)
def test_beyond_a_quota_the_refusal_names_limit_and_figure(
    limits: dict[str, Any], third: dict[str, Any], limit: int, current: int
) -> None:
    it = house(**limits)
    it.submit()
    it.submit()
    refusal = refused(it, **third)
    assert (refusal.limit, refusal.current) == (limit, current)
    assert str(limit) in refusal.message
    assert str(current) in refusal.message


@pytest.mark.parametrize(("limits", "third", "limit", "current"), QUOTAS)
@RESTARTS
def test_a_restart_forgives_nothing(
    limits: dict[str, Any], third: dict[str, Any], limit: int, current: int, by_snapshot: bool
) -> None:
    it = house(**limits)
    it.submit()
    it.submit()
    again = restarted(it, by_snapshot=by_snapshot)
    refusal = refused(again, **third)
    assert (refusal.limit, refusal.current) == (limit, current)


@pytest.mark.parametrize(("limits", "third", "limit", "current"), QUOTAS)
def test_one_users_quota_is_nobody_elses(
    limits: dict[str, Any], third: dict[str, Any], limit: int, current: int
) -> None:
    it = house(**limits)
    it.submit()
    it.submit()
    refused(it, **third)
    it.submit(BOB, **third)


def test_an_administrator_has_the_quotas_of_the_tenant_and_none_of_his_own() -> None:
    own = {"jobs_per_uid_max": 1, "items_per_uid_max": 1, "bytes_per_uid_max": 1}
    it = house(**own, submissions_per_minute_max=1, tenants={"alice": TenantRule(queued_jobs_max=3)})
    for _ in range(3):
        it.submit(ROOT, tenant="alice")
    assert refused(it, ROOT, tenant="alice").limit == 3
    it.submit(ROOT)


def test_a_tenants_quota_is_shared_by_its_members() -> None:
    it = house(tenants={"lab": TenantRule(queued_items_max=20)})
    it.submit(ALICE, tenant="lab")
    it.submit(BOB, tenant="lab")
    assert refused(it, BOB, tenant="lab").current == 20
    it.submit(BOB)


def test_what_is_done_counts_no_more_items_but_its_bytes_until_it_is_removed() -> None:
    it = house(items_per_uid_max=10, bytes_per_uid_max=500)
    job = it.submit()
    it.loaded()
    it.checkpoint(4)
    assert it.state.book.of_uid[ALICE.uid] == Use(jobs=1, items=6, bytes=240)
    it.submit(items=4, input_bytes=80)
    it.finish()
    assert it.state.book.of_uid[ALICE.uid] == Use(jobs=1, items=4, bytes=380)
    assert refused(it, items=1, input_bytes=121, item_bytes=100).current == 380
    it.give(inputs.Remove(who=ALICE, job_id=job))
    assert it.state.book.of_uid[ALICE.uid] == Use(jobs=1, items=4, bytes=80)
    it.submit(items=1, input_bytes=121, item_bytes=100)


def test_a_reservation_counts_until_it_is_released_and_not_twice() -> None:
    it = house()
    header = submission()
    it.give(inputs.Reserve(who=ALICE, submission=header))
    assert it.state.book.of_uid[ALICE.uid] == Use(jobs=1, items=10, bytes=200)
    it.give(inputs.Submit(who=ALICE, submission=header, reservation_id=1))
    assert it.state.book.of_uid[ALICE.uid] == Use(jobs=1, items=10, bytes=200)
    assert it.state.arrivals.counted(ALICE.uid, it.now_ns) == (1, 0)
    it.give(inputs.Reserve(who=BOB, submission=submission()))
    it.give(inputs.Release(reservation_id=2))
    assert BOB.uid not in it.state.book.of_uid
    assert "bob" not in it.state.book.of_tenant
    assert it.state.arrivals.counted(BOB.uid, it.now_ns) == (
        1,
        0,
    )  # it cost two writes to the journal all the same


# --- the rate -----------------------------------------------------------------------------------------------------


def at_second(it: House, second: float) -> None:
    it.now_ns = (EPOCH_NS // MINUTE_NS + 1) * MINUTE_NS + round(second * S_NS)


def test_a_burst_up_to_the_limit_is_taken_and_the_refusal_says_when_to_come_again() -> None:
    it = house(submissions_per_minute_max=10)
    at_second(it, 15)
    for _ in range(10):
        it.submit()
    refusal = refused(it)
    assert (refusal.limit, refusal.current) == (10, 10)
    assert (
        refusal.retry_after_s == 45 + 6
    )  # until a tenth of the burst lies more than a minute back, on average


@pytest.mark.parametrize("seed", range(20))
def test_who_comes_again_when_told_is_let_in_and_a_second_sooner_is_not(seed: int) -> None:
    rng = random.Random(seed)
    it = house(submissions_per_minute_max=rng.randint(1, 30))
    met = 0
    for _ in range(300):
        it.now_ns += round(rng.expovariate(1) * 3 * S_NS)
        try:
            it.submit()
        except Refused as refusal:
            wait_s = refusal.retry_after_s
            assert wait_s is not None
            assert 0 < wait_s <= 120
            now_ns, met = it.now_ns, met + 1
            it.now_ns = now_ns + (wait_s - 1) * S_NS
            refused(it)
            it.now_ns = now_ns + wait_s * S_NS
            it.submit()
    assert met


def test_in_no_minute_are_more_than_twice_the_limit_let_in() -> None:
    """The window slides by halves of two minutes: the bound that it keeps for certain is twice the limit."""
    it, times = house(submissions_per_minute_max=20), []
    rng = random.Random(1)
    for _ in range(4_000):
        it.now_ns += round(rng.random() * 0.5 * S_NS)
        try:
            it.submit()
        except Refused:
            continue
        times.append(it.now_ns)
    most = max(sum(at <= other < at + MINUTE_NS for other in times) for at in times)
    assert most <= 2 * 20
    hours = (times[-1] - times[0]) / MINUTE_NS
    assert len(times) <= 20 * (hours + 2)  # and over a long time, the limit


def test_a_repeat_and_a_refusal_count_as_no_submission() -> None:
    it = house(submissions_per_minute_max=2)
    header = submission()
    for _ in range(5):
        it.give(inputs.Submit(who=ALICE, submission=header))
    with pytest.raises(Refused):
        it.submit(handler="nothing")
    it.submit()
    refused(it)
    it.give(inputs.Submit(who=ALICE, submission=header))  # a lost answer is given again, whatever the rate


@pytest.mark.parametrize("step_s", [-3600, -61, -60, 61, 3600])
def test_a_clock_that_steps_locks_nobody_out(step_s: float) -> None:
    it = house(submissions_per_minute_max=3)
    for _ in range(3):
        it.submit()
    it.now_ns += round(step_s * S_NS)
    try:
        it.submit()
    except Refused as refusal:
        it.now_ns += (refusal.retry_after_s or 0) * S_NS
        it.submit()
    assert it.now_ns <= EPOCH_NS + (step_s + 120) * S_NS


def test_who_submitted_long_ago_is_not_remembered() -> None:
    it = house()
    for number in range(50):
        it.submit(Who(uid=5000 + number, name=f"u{number}", tenants=frozenset({f"u{number}"})))
    it.now_ns += 10 * MINUTE_NS
    it.submit(CAROL)
    assert it.state.arrivals.now == {CAROL.uid: 1}
    assert it.state.arrivals.before == {}


# --- kept along, made anew, read from before there were any ---------------------------------------------------------


def test_what_is_counted_along_is_what_the_jobs_add_up_to() -> None:
    rng = random.Random(3)
    it = house(tenants={"lab": TenantRule()})
    for _ in range(400):
        who = rng.choice([ALICE, BOB, CAROL])
        match rng.randrange(5):
            case 0 | 1:
                tenant = "lab" if who is not CAROL and rng.random() < 0.5 else ""
                items = rng.randint(1, 20)
                it.give(
                    inputs.Submit(
                        who=who, submission=submission(tenant=tenant, items=items, input_bytes=20 * items)
                    )
                )
            case 2:
                it.give(inputs.Reserve(who=who, submission=submission()))
            case 3 if it.state.reservations:
                it.give(inputs.Release(reservation_id=rng.choice(list(it.state.reservations))))
            case 4 if it.runs():
                it.loaded()
                it.finish()
        final = [j for j in it.state.jobs.values() if j.finished_ns and rng.random() < 0.1]
        for job in final:
            it.give(inputs.Remove(who=ROOT, job_id=job.job_id))
        check_bookkeeping(it.state)
    book = it.state.book
    for uses in (book.of_uid, book.of_tenant):
        assert sum(use.jobs for use in uses.values()) == book.open_jobs
        assert sum(use.items for use in uses.values()) == book.open_items
        assert sum(use.bytes for use in uses.values()) == book.stored_bytes


def test_a_snapshot_from_before_quotas_is_read_and_counted() -> None:
    it = house()
    it.submit()
    it.submit(BOB)
    pieces = list(snapshot.chunks(it.state))
    first = msgspec.msgpack.decode(pieces[0])
    assert first.pop("arrivals")
    state = snapshot.load([msgspec.msgpack.encode(first), *pieces[1:]])
    assert state.book.of_uid == it.state.book.of_uid
    assert state.arrivals.counted(ALICE.uid, it.now_ns) == (0, 0)
    assert state.book.of_uid.get(CAROL.uid, NO_USE) == Use()


def test_the_plan_and_the_facts_count_apart() -> None:
    """Two states, one ahead of the other by what is not on disk yet: a twin shares no counter."""
    it = house()
    it.submit()
    twin = snapshot.clone(it.state)
    it.submit()
    assert it.state.arrivals.counted(ALICE.uid, it.now_ns) == (2, 0)
    assert twin.arrivals.counted(ALICE.uid, it.now_ns) == (1, 0)
    assert twin.book.of_uid[ALICE.uid].jobs == 1
