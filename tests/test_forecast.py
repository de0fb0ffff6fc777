"""What is promised about starts and ends, held against what then happens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from core_floor import Floor
from core_house import ALICE, BOB, CAROL, HANDLERS, ROOT, House, person, submission
from gpujobd.core import inputs
from gpujobd.core.apply import job_of
from gpujobd.core.events import Submitted
from gpujobd.core.forecast import Outlook, forecast
from gpujobd.core.model import S_NS, Job, JobState, Priority, Rules, TenantRule

ROOMY = {
    "queued_jobs_max": 200_000,
    "jobs_per_uid_max": 200_000,
    "items_per_uid_max": 10**12,
    "submissions_per_minute_max": 10**9,
    "items_per_job_max": 10_000_000,
    "queued_items_max": 10**12,
    "spool_bytes_max": 10**15,
    "bytes_per_uid_max": 10**15,
    "input_bytes_max": 10**12,
}


def rules(**changes: object) -> Rules:
    return Rules(**({"handlers": HANDLERS} | ROOMY | changes))  # type: ignore[arg-type]  # the tests' own values


def look(house: House, extra: Job | None = None) -> dict[int, Outlook]:
    steps = forecast(house.state, house.rules, house.now_ns, extra)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return dict(end.value)


def taught(floor: Floor) -> Floor:
    """Let the floor's handlers be measured by one small job of each."""
    for handler in HANDLERS:
        floor.submit(ROOT, items=100, handler=handler)
    floor.run(600)
    assert all(job.state is JobState.COMPLETED for job in floor.state.jobs.values())
    return floor


def ahead_s(floor: Floor, at_ns: int) -> float:
    return (at_ns - floor.now_ns) / S_NS


# --- held against what happens -------------------------------------------------------------------------------------------


def worlds() -> Iterator[tuple[str, Floor]]:
    yield "one tenant, jobs in a row", few(Floor(rules()), [(ALICE, 300, "embed")] * 5)
    yield "three tenants, long jobs", few(Floor(rules()), [(w, 3000, "embed") for w in (ALICE, BOB, CAROL)])
    yield (
        "a burst and a quiet one",
        few(Floor(rules()), [(ALICE, 400, "embed")] * 20 + [(BOB, 100, "embed"), (CAROL, 2000, "embed")]),
    )
    shares = rules(tenants={"alice": TenantRule(share=4.0)})
    yield "four to one", few(Floor(shares), [(ALICE, 2000, "embed"), (BOB, 2000, "embed")] * 3)
    loads = {"embed": 4.0, "rerank": 8.0, "ocr": 2.0}
    yield (
        "three handlers that displace each other",
        few(
            Floor(rules(), load_s=loads),
            [(ALICE, 4000, "embed"), (BOB, 4000, "rerank"), (CAROL, 4000, "ocr")],
        ),
    )
    yield (
        "two devices",
        few(Floor(rules(), devices=("cuda:0", "cuda:1")), [(person(n), 2000, "embed") for n in range(5)] * 2),
    )


def few(floor: Floor, jobs: list[tuple[inputs.Who, int, str]]) -> Floor:
    taught(floor)
    for who, items, handler in jobs:
        floor.submit(who, items=items, handler=handler)
    floor.run(5)
    return floor


@pytest.mark.parametrize("floor", [pytest.param(floor, id=name) for name, floor in worlds()])
def test_starts_and_ends_come_as_forecast_give_or_take_a_turn_of_each_tenant(floor: Floor) -> None:
    outlooks = look(floor)
    begun_s = floor.clock_s
    waiting = [job_id for job_id, job in floor.state.jobs.items() if job.state is JobState.QUEUED]
    running = [job_id for job_id, job in floor.state.jobs.items() if job.state is JobState.RUNNING]
    assert set(outlooks) == {*waiting, *running}
    forecasts = {
        job_id: (ahead_s(floor, outlook.start_ns), ahead_s(floor, outlook.finish_ns))
        for job_id, outlook in outlooks.items()
    }
    tenants = len({floor.job(job_id).tenant for job_id in outlooks})
    floor.run(30_000)
    slack_s = 31.0 * tenants + 2 * sum(floor.load_s.values())
    for job_id in [*waiting, *running]:
        start_s, finish_s = forecasts[job_id]
        if job_id in waiting:
            true_start_s = floor.started[job_id] - begun_s
            assert start_s == pytest.approx(true_start_s, rel=0.1, abs=slack_s), f"start of job {job_id}"
        true_finish_s = floor.finished[job_id] - begun_s
        assert finish_s == pytest.approx(true_finish_s, rel=0.1, abs=slack_s), f"end of job {job_id}"


def test_with_one_tenant_the_forecast_is_exact_to_the_batch() -> None:
    floor = few(Floor(rules()), [(ALICE, 300, "embed")] * 5)
    outlooks = look(floor)
    begun_s = floor.clock_s
    forecasts = {job_id: ahead_s(floor, outlook.finish_ns) for job_id, outlook in outlooks.items()}
    floor.run(600)
    for job_id, finish_s in forecasts.items():
        assert finish_s == pytest.approx(floor.finished[job_id] - begun_s, abs=1.1)


def test_positions_are_the_order_in_which_jobs_then_start() -> None:
    floor = few(
        Floor(rules()), [(ALICE, 50, "embed")] * 3 + [(BOB, 50, "embed")] * 3 + [(CAROL, 200, "embed")]
    )
    outlooks = look(floor)
    waiting = sorted(
        (job_id for job_id in outlooks if outlooks[job_id].position), key=lambda j: outlooks[j].position
    )
    floor.run(1000)
    assert waiting == sorted(waiting, key=floor.started.__getitem__)


# --- only what was measured ------------------------------------------------------------------------------------------------


def test_of_what_was_never_measured_only_the_start_is_told() -> None:
    house = House(rules())
    house.submit(ALICE)
    house.submit(BOB)
    outlooks = look(house)
    assert outlooks[1] == Outlook(position=0)
    assert (outlooks[2].position, outlooks[2].finish_ns) == (1, 0)


def test_what_comes_after_an_end_that_nobody_knows_is_not_known_either() -> None:
    floor = taught(Floor(rules()))
    floor.rules = rules(handlers={**HANDLERS, "new": HANDLERS["embed"]})
    floor.submit(ALICE, items=100, handler="new")
    second = floor.submit(ALICE, items=100, handler="embed")
    other = floor.submit(BOB, items=LONG, handler="embed")
    outlooks = look(floor)
    assert outlooks[other].start_ns
    assert (outlooks[second].start_ns, outlooks[second].finish_ns) == (0, 0)
    assert outlooks[second].position == 2


LONG = 100_000


def test_nine_in_ten_is_later_by_a_tenth_or_by_what_was_seen_to_vary() -> None:
    floor = taught(Floor(rules()))
    job_id = floor.submit(ALICE, items=1000)
    steady = look(floor)[job_id]
    assert steady.finish_90_ns - steady.finish_ns == pytest.approx(
        0.1 * (steady.finish_ns - floor.now_ns), rel=0.01
    )
    floor.state.learned["embed"].item_spread_ns = floor.state.learned["embed"].item_ns // 2
    varying = look(floor)[job_id]
    assert varying.finish_90_ns - varying.finish_ns == pytest.approx(
        0.8 * (varying.finish_ns - floor.now_ns), rel=0.01
    )


def test_what_the_house_does_not_start_has_a_position_and_no_time() -> None:
    floor = taught(Floor(rules()))
    running = floor.submit(ALICE, items=1000)
    floor.give(inputs.SwitchQueue(who=ROOT, verb=inputs.QueueVerb.STOP))
    waiting = floor.submit(BOB, items=1000)
    outlooks = look(floor)
    assert outlooks[waiting] == Outlook(position=1)
    assert ahead_s(floor, outlooks[running].finish_ns) == pytest.approx(100, abs=1)


def test_without_a_device_jobs_still_have_their_order() -> None:
    house = House(rules(), devices=())
    ids = [house.submit(ALICE), house.submit(ALICE), house.submit(BOB)]
    outlooks = look(house)
    assert [outlooks[job_id].position for job_id in ids] == [1, 3, 2]
    assert not any(outlook.start_ns for outlook in outlooks.values())


def test_begin_times_failing_handlers_and_ill_devices_delay_the_start() -> None:
    floor = taught(Floor(rules()))
    later = floor.submit(ALICE, begin_ns=floor.now_ns + 500 * S_NS)
    assert ahead_s(floor, look(floor)[later].start_ns) == pytest.approx(500, abs=1)
    floor.state.learned["ocr"].retry_at_ns = floor.now_ns + 50 * S_NS
    failing = floor.submit(BOB, handler="ocr")
    assert ahead_s(floor, look(floor)[failing].start_ns) == pytest.approx(50, abs=1)
    floor.give(inputs.Unkillable(device="cpu"))
    assert ahead_s(floor, look(floor)[failing].start_ns) == pytest.approx(50, abs=1)
    ill = floor.submit(CAROL)
    assert ahead_s(floor, look(floor)[ill].start_ns) == pytest.approx(30, abs=1)


def test_a_higher_level_is_forecast_first_and_a_lower_one_last() -> None:
    floor = taught(Floor(rules()))
    floor.submit(ALICE, items=1000)
    low = floor.submit(BOB, items=100, priority=Priority.LOW)
    high = floor.submit(ROOT, items=100, priority=Priority.HIGH)
    outlooks = look(floor)
    assert ahead_s(floor, outlooks[high].start_ns) <= 2
    assert ahead_s(floor, outlooks[low].start_ns) == pytest.approx(110, abs=2)


def test_a_job_that_is_not_submitted_yet_is_forecast_as_if_it_were() -> None:
    floor = taught(Floor(rules()))
    for _ in range(3):
        floor.submit(ALICE, items=1000)
    wanted = submission(items=100)
    supposed = job_of(
        Submitted(
            at_ns=floor.now_ns,
            job_id=floor.state.next_job_id,
            owner=BOB.uid,
            tenant="bob",
            submit_id="s",
            handler="embed",
            items=100,
            input_bytes=1,
            input_sha256=wanted.input_sha256,
        )
    )
    extra = look(floor, supposed)[supposed.job_id]
    before = floor.state.seq
    assert floor.state.seq == before
    job_id = floor.submit(BOB, items=100)
    assert job_id == supposed.job_id
    assert look(floor)[job_id] == extra


# --- cost ------------------------------------------------------------------------------------------------------------------


def queue_of(jobs: int, tenants: int) -> Floor:
    floor = taught(Floor(rules()))
    luck = random.Random(1)
    for number in range(jobs):
        floor.submit(person(number % tenants), items=luck.choice((10, 1000, 50_000)))
    return floor


def test_a_thousand_jobs_cost_a_bounded_number_of_short_steps() -> None:
    """Steps, not seconds: the figure in seconds is the benchmark's."""
    floor = queue_of(1000, 41)
    steps = sum(1 for _ in forecast(floor.state, floor.rules, floor.now_ns))
    assert steps <= 150  # of a hundred choices each
    assert len(look(floor)) == 1000


def test_the_state_may_move_on_between_the_steps() -> None:
    floor = queue_of(200, 10)
    steps = forecast(floor.state, floor.rules, floor.now_ns)
    for _ in steps:
        floor.run(20)
        floor.submit(person(99), items=10)
        queued = (job for job in floor.state.jobs.values() if job.state is JobState.QUEUED)
        floor.give(inputs.Cancel(who=ROOT, job_id=next(queued).job_id))
    assert look(floor)
