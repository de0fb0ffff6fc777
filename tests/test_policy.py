"""Who runs next, for how long: what a tenant may rely on, tried in virtual hours."""

from __future__ import annotations

import pytest
from core_floor import Floor
from core_house import ALICE, BOB, CAROL, HANDLERS, ROOT, House, person, tried
from gpujobd.core import book, inputs, policy, snapshot
from gpujobd.core.model import S_NS, JobState, Priority, Reason, Rules, TenantRule, YieldWhy
from hypothesis import given, settings
from hypothesis import strategies as st

HOUR_S = 3600.0
BATCH_S = 1.0
LONG = 40_000  # items: more than an hour of work


def rules(**changes: object) -> Rules:
    roomy = {
        "queued_jobs_max": 10_000,
        "jobs_per_uid_max": 10_000,
        "items_per_uid_max": 100_000_000,
        "items_per_job_max": 1_000_000,
        "queued_items_max": 100_000_000,
        "handlers": HANDLERS,
    }
    return Rules(**(roomy | changes))  # type: ignore[arg-type]  # names and values are the tests' own


def reason(house: House, job_id: int) -> tuple[Reason, str]:
    return policy.waiting_reason(house.state, house.rules, house.job(job_id), house.now_ns)


# --- a burst of one tenant ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [10, 300])
def test_forty_quiet_tenants_start_within_one_turn_of_each_tenant_ahead_of_a_burst_of_a_thousand(
    items: int,
) -> None:
    floor = Floor(rules())
    for _ in range(1000):
        floor.submit(person(0), items=items)
    floor.run(60)
    begun_s = floor.clock_s
    quiet = [floor.submit(person(number), items=items) for number in range(1, 41)]
    floor.run(600)
    turn_s = 5 + BATCH_S  # 41 tenants: the shortest slice, and the batch at whose end it is noticed
    for ahead, job_id in enumerate(quiet, 1):
        assert floor.started[job_id] - begun_s <= ahead * turn_s, (ahead, job_id)


def test_a_newcomer_waits_for_the_running_turn_and_no_longer_when_all_others_ran_already() -> None:
    floor = Floor(rules())
    for who in (ALICE, BOB):
        floor.submit(who, items=LONG)
    floor.run(1000)
    job_id = floor.submit(CAROL, items=10)
    asked_s = floor.clock_s
    floor.run(200)
    assert floor.started[job_id] - asked_s <= 30 + BATCH_S + 30 + BATCH_S


# --- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_s", [0.0, 3.0])
def test_two_backlogged_tenants_never_differ_by_more_than_a_turn_a_batch_and_a_load(load_s: float) -> None:
    floor = Floor(rules(), load_s={"embed": load_s, "rerank": load_s})
    floor.submit(ALICE, items=LONG)
    floor.submit(BOB, items=LONG, handler="rerank")
    turn_s = max(30, load_s / 0.05)
    for _ in range(360):
        floor.run(10)
        apart_s = abs(floor.served_s("alice") - floor.served_s("bob"))
        assert apart_s <= turn_s + BATCH_S + load_s + 0.001, floor.clock_s


def test_four_to_one_shares_give_four_to_one_seconds() -> None:
    floor = Floor(rules(tenants={"alice": TenantRule(share=4.0)}))
    for who in (ALICE, BOB):
        floor.submit(who, items=LONG)
    floor.run(HOUR_S)
    assert floor.served_s("alice") / 4 == pytest.approx(floor.served_s("bob"), abs=30 + BATCH_S)
    assert floor.served_s("alice") / floor.served_s("bob") == pytest.approx(4.0, rel=0.05)
    assert floor.served_s("alice") + floor.served_s("bob") == pytest.approx(HOUR_S, abs=2)


def test_idle_time_earns_no_credit() -> None:
    floor = Floor(rules())
    floor.submit(ALICE, items=LONG)
    floor.run(HOUR_S)
    floor.submit(BOB, items=LONG)
    before_s = floor.served_s("alice")
    floor.run(600)
    assert floor.served_s("alice") - before_s == pytest.approx(300, abs=32)


def test_credit_is_not_earned_while_nobody_is_there_either() -> None:
    floor = Floor(rules())
    floor.submit(ALICE, items=1000)
    floor.run(HOUR_S)  # alice is done; then bob comes first, and alice again
    floor.submit(BOB, items=LONG)
    floor.submit(ALICE, items=LONG)
    before_s = floor.served_s("alice")
    floor.run(600)
    assert floor.served_s("alice") - before_s == pytest.approx(300, abs=32)


shares = st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=6)


@settings(max_examples=8, deadline=None)
@given(shares=shares, handlers=st.lists(st.sampled_from(["embed", "rerank"]), min_size=6, max_size=6))
def test_whatever_the_shares_seconds_follow_them(shares: list[float], handlers: list[str]) -> None:
    names = [f"user{number}" for number in range(len(shares))]
    by_name = {name: TenantRule(share=share) for name, share in zip(names, shares, strict=True)}
    floor = Floor(rules(tenants=by_name), room=2)
    for number in range(len(shares)):
        floor.submit(person(number), items=LONG, handler=handlers[number])
    floor.run(HOUR_S)
    per_share = [floor.served_s(name) / share for name, share in zip(names, shares, strict=True)]
    slack_s = 2 * (30 + BATCH_S) / min(shares)  # a turn each
    assert max(per_share) - min(per_share) <= slack_s
    assert sum(floor.served_s(name) for name in names) == pytest.approx(HOUR_S, abs=2)


# --- turns ----------------------------------------------------------------------------------------------------------


def test_alone_in_the_queue_a_job_is_never_asked_to_yield() -> None:
    floor = Floor(rules())
    for _ in range(3):
        floor.submit(ALICE, items=2000)
    floor.run(HOUR_S)
    assert floor.yields == []
    assert len(floor.finished) == 3


def test_a_turn_goes_on_over_several_jobs_of_its_tenant() -> None:
    floor = Floor(rules())
    first = [floor.submit(ALICE, items=100) for _ in range(9)]  # ten seconds each
    other = floor.submit(BOB, items=100)
    floor.run(200)
    assert floor.started[other] == pytest.approx(30)
    assert [floor.started[job_id] for job_id in first[:4]] == pytest.approx([0, 10, 20, 40])


def test_more_tenants_make_shorter_turns_down_to_five_seconds() -> None:
    floor = Floor(rules())
    lengths = []
    for number in range(30):
        floor.submit(person(number), items=LONG)
        lengths.append(policy.slice_ns(floor.state, floor.rules) / S_NS)
    assert lengths[:4] == [30, 30, 30, 30]
    assert lengths[4:8] == [24, 20, pytest.approx(120 / 7), 15]
    assert lengths[23:] == [5] * 7


def test_a_tenants_own_jobs_run_in_order_whatever_their_handlers_and_first_comes_first() -> None:
    floor = Floor(rules(), load_s={"embed": 1, "rerank": 1})
    ids = [
        floor.submit(ALICE, items=10, handler=handler) for handler in ("embed", "rerank", "embed", "rerank")
    ]
    floor.give(inputs.MoveFirst(who=ALICE, job_id=ids[3]))
    floor.run(60)
    assert sorted(ids, key=floor.started.__getitem__) == [ids[0], ids[3], ids[1], ids[2]]


# --- priority -------------------------------------------------------------------------------------------------------


def test_a_higher_level_is_asked_for_at_once_and_gets_the_next_batch_boundary() -> None:
    floor = Floor(rules())
    floor.submit(ALICE, items=LONG)
    floor.run(10.5)
    job_id = floor.submit(ROOT, items=10, priority=Priority.HIGH)
    ((asked_s, asked),) = floor.yields
    assert (asked_s, asked.why) == (10.5, YieldWhy.PRIORITY)
    floor.run(10)
    assert floor.started[job_id] == 11
    assert floor.job(1).interruptions == 0


def test_one_urgent_job_takes_one_device_the_one_with_the_weakest_claim() -> None:
    floor = Floor(rules(), devices=("cuda:0", "cuda:1", "cuda:2"))
    floor.submit(ALICE, items=LONG)
    low = floor.submit(BOB, items=LONG, priority=Priority.LOW)
    floor.submit(CAROL, items=LONG)
    floor.run(5)
    floor.submit(ROOT, items=LONG, priority=Priority.HIGH)
    floor.run(25)
    assert [asked.job_id for _, asked in floor.yields] == [low]


def test_a_job_of_a_low_level_runs_after_waiting_aging_s_under_a_stream_of_others() -> None:
    floor = Floor(rules(aging_ns=600 * S_NS))
    floor.submit(ALICE, items=LONG)
    floor.submit(BOB, items=LONG)
    low = floor.submit(CAROL, items=50, priority=Priority.LOW)
    floor.run(580)
    assert low not in floor.started
    floor.run(100)
    assert 600 <= floor.started[low] <= 600 + 31 * 2
    assert floor.job(low).level is Priority.NORMAL


def test_waiting_adds_up_over_interruptions() -> None:
    house = House(rules(aging_ns=100 * S_NS))
    low = house.submit(ALICE, items=50, priority=Priority.LOW)
    house.submit(BOB, items=50)  # asks for the device at once
    house.give_back(5)
    house.wait(60)
    house.give(inputs.Pause(who=ALICE, job_id=low))
    house.wait(1000)  # held, not waiting
    house.give(inputs.Resume(who=ALICE, job_id=low))
    assert policy.survey(house.state, house.rules, house.now_ns).claims[0].level is Priority.LOW
    house.wait(41)
    assert policy.survey(house.state, house.rules, house.now_ns).claims[0].level is Priority.NORMAL


# --- handlers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenants", [2, 3, 6])
@pytest.mark.parametrize("load_s", [1.0, 10.0, 20.0])
def test_loading_takes_at_most_swap_overhead_max_of_the_time(tenants: int, load_s: float) -> None:
    floor = Floor(rules(), load_s=dict.fromkeys(HANDLERS, load_s))
    for number in range(tenants):
        floor.submit(person(number), items=10 * LONG, handler=list(HANDLERS)[number % 3])
    floor.run(2 * HOUR_S)
    first_loads_s = 3 * load_s  # nothing is known of a handler before
    assert floor.loading_s - first_loads_s <= 0.05 * floor.clock_s + load_s
    assert floor.loads >= 6  # and yet everybody is served
    assert min(floor.served_s(f"user{number}") for number in range(tenants)) > 0


def test_nobody_waits_beyond_wait_max_s_for_a_load_to_be_earned() -> None:
    floor = Floor(rules(), load_s={"embed": 5.0, "rerank": 200.0})  # earned after 4,000 s
    floor.loaded(handler="rerank", load_s=200.0)
    floor.give(inputs.Unloaded(device="cpu", handler="rerank"))
    floor.submit(ALICE, items=LONG)
    job_id = floor.submit(BOB, items=LONG, handler="rerank")
    floor.run(2 * HOUR_S)
    assert 1800 <= floor.started[job_id] <= 1800 + 5 + BATCH_S


def test_a_free_device_loads_at_once_when_there_is_no_other_work() -> None:
    floor = Floor(rules(), load_s={"embed": 10.0, "rerank": 10.0})
    floor.submit(ALICE, items=10)
    job_id = floor.submit(BOB, items=10, handler="rerank")
    floor.run(60)
    assert floor.started[job_id] == 11


def test_among_equals_the_loaded_handler_goes_on_until_the_load_is_earned() -> None:
    floor = Floor(rules(), load_s={"embed": 10.0, "rerank": 10.0})
    floor.loaded(handler="rerank", load_s=10.0)
    floor.give(inputs.Unloaded(device="cpu", handler="rerank"))
    floor.submit(ALICE, items=LONG)
    cold = floor.submit(BOB, items=LONG, handler="rerank")
    warm = floor.submit(CAROL, items=LONG)
    floor.run(400)
    assert floor.started[warm] < floor.started[cold]
    assert 200 <= floor.started[cold] <= 200 + 30 + 10 + BATCH_S


def test_a_dear_handler_is_not_passed_over_for_cheap_ones_that_earn_their_loads_sooner() -> None:
    loads = {"embed": 4.0, "rerank": 8.0, "ocr": 2.0}  # earned after 80, 160 and 40 seconds
    floor = Floor(rules(), load_s=loads)
    for handler in HANDLERS:
        floor.submit(ROOT, items=10, handler=handler)
    floor.run(30)
    begun_s = floor.clock_s
    floor.submit(ALICE, items=LONG)
    dear = floor.submit(BOB, items=LONG, handler="rerank")
    floor.submit(CAROL, items=LONG, handler="ocr")
    floor.run(HOUR_S)
    assert floor.started[dear] - begun_s <= 160 + BATCH_S + loads["ocr"]
    for name in ("alice", "bob", "carol"):
        assert floor.served_s(name) == pytest.approx(HOUR_S / 3, rel=0.15)


def test_a_handler_that_is_loaded_too_costs_no_swap() -> None:
    floor = Floor(rules(), load_s={"embed": 20.0, "rerank": 20.0}, room=2)
    floor.submit(ALICE, items=LONG)
    floor.submit(BOB, items=LONG, handler="rerank")
    floor.run(HOUR_S)
    assert floor.loads == 2
    assert len(floor.turns) > 80  # short turns


# --- devices --------------------------------------------------------------------------------------------------------


def test_two_devices_serve_two_tenants_without_ever_taking_turns() -> None:
    floor = Floor(rules(), devices=("cuda:0", "cuda:1"))
    for who in (ALICE, BOB):
        floor.submit(who, items=LONG)
    floor.run(HOUR_S)
    assert floor.yields == []
    assert floor.served_s("alice") == pytest.approx(HOUR_S, abs=2)


def test_with_two_devices_nobody_gets_both_while_another_tenant_has_none() -> None:
    floor = Floor(rules(), devices=("cuda:0", "cuda:1"))
    for _ in range(2):
        for who in (ALICE, BOB, CAROL):
            floor.submit(who, items=LONG)
    for _ in range(600):
        floor.run(1)
        held = [device.lease.tenant for device in floor.state.devices.values() if device.lease]
        assert len(set(held)) == 2, floor.clock_s


def test_two_devices_and_three_tenants_share_by_thirds() -> None:
    floor = Floor(rules(), devices=("cuda:0", "cuda:1"))
    for who in (ALICE, BOB, CAROL):
        floor.submit(who, items=2 * LONG)
    floor.run(HOUR_S)
    for name in ("alice", "bob", "carol"):
        assert floor.served_s(name) == pytest.approx(2 * HOUR_S / 3, rel=0.03)


def test_an_ill_device_gets_nothing_before_its_next_try() -> None:
    house = House(rules())
    house.submit()
    house.give(inputs.Unkillable(device="cpu", detail="process 7 lives on"))
    house.lose("silent")
    waiting = house.submit()
    assert house.runs() == 0
    assert reason(house, waiting) == (Reason.DEVICE_UNHEALTHY, "cpu: WorkerUnkillable, next try in 60 s")
    house.wait(59)
    assert house.runs() == 0
    house.wait(1)
    assert house.runs() == 1
    assert house.lease().canary
    house.loaded()
    house.checkpoint(3)
    assert house.state.devices["cpu"].state == "ok"


# --- order ----------------------------------------------------------------------------------------------------------


def test_the_order_alternates_between_tenants_by_their_virtual_times() -> None:
    house = House(rules(tenants={"alice": TenantRule(share=2.0)}))
    house.submit(CAROL, items=100)
    for _ in range(4):
        house.submit(ALICE, items=10)
    for _ in range(2):
        house.submit(BOB, items=10)
    house.submit(ROOT, items=10, priority=Priority.HIGH)
    house.submit(CAROL, items=10, begin_ns=house.now_ns + S_NS)
    names = [
        house.state.jobs[job.job_id].tenant for job in policy.order(house.state, house.rules, house.now_ns)
    ]
    assert names == ["root", "alice", "bob", "alice", "alice", "bob", "alice", "carol"]


def test_what_runs_is_charged_ahead_when_jobs_are_put_in_order() -> None:
    house = House(rules())
    house.submit(ALICE, items=100)
    house.loaded()
    house.checkpoint(5, used_s=5.0)
    assert house.job(1).checkpoint == tried(5) or house.job(1).checkpoint.done == 5
    second = house.submit(ALICE, items=1)
    other = house.submit(BOB, items=1)
    order = [job.job_id for job in policy.order(house.state, house.rules, house.now_ns)]
    assert order == [other, second]
    assert house.job(1).state is JobState.RUNNING


# --- numbers --------------------------------------------------------------------------------------------------------------


def test_months_of_a_small_share_fit_a_file_and_change_nobodys_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time runs at device time over share: it is taken back now and then, and differences alone count."""

    def live() -> Floor:
        shares = {"alice": 0.001, "user2": 4.0}
        floor = Floor(rules(tenants={name: TenantRule(share=share) for name, share in shares.items()}))
        for _ in range(3):
            floor.submit(ALICE, items=10 * LONG)
            floor.run(HOUR_S)  # alone, most of the time
            floor.submit(person(1), items=LONG)
            floor.submit(person(2), items=LONG)
            floor.run(HOUR_S)
        return floor

    plain = live()
    most_ns = max(tenant.vtimes_ns[Priority.NORMAL] for tenant in plain.state.tenants.values())
    monkeypatch.setattr(book, "REBASE_NS", 1_000 * S_NS)
    rebased = live()
    assert rebased.turns == plain.turns
    assert max(tenant.vtimes_ns[Priority.NORMAL] for tenant in rebased.state.tenants.values()) < most_ns / 2
    assert rebased.served_s("alice") == plain.served_s("alice") > HOUR_S


def test_virtual_time_ends_before_a_file_could_not_hold_it() -> None:
    """A tenant that is present and cannot be served holds the clock; another is charged beyond all that is real."""
    floor = Floor(rules())
    floor.submit(ALICE, items=10 * LONG)
    floor.run(10)
    floor.submit(BOB)
    for _ in range(3):
        book.charge(floor.state, floor.state.tenants["alice"], Priority.NORMAL, 1 << 63)
    snapshot.clone(floor.state)
    assert list(snapshot.chunks(floor.state))
