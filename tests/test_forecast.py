"""What is promised about starts and ends, held against what then happens."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from core_floor import Floor
from core_house import ALICE, BOB, CAROL, EPOCH_NS, HANDLERS, ROOT, House, person, submission
from gpujobd.core import forecast as run_ahead
from gpujobd.core import inputs
from gpujobd.core.apply import job_of
from gpujobd.core.decide import decide
from gpujobd.core.events import Submitted
from gpujobd.core.forecast import Outlook, forecast
from gpujobd.core.model import S_NS, HandlerRule, Job, JobState, Lease, Priority, Rules, TenantRule

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


def random_world(seed: int) -> Floor:
    """A queue that has been running for a while: tenants, shares, handlers, levels and devices as luck has it."""
    luck = random.Random(seed)
    tenants = luck.choice((1, 2, 3, 5, 8, 12))
    handlers = list(HANDLERS)[: luck.choice((1, 1, 2, 3))]
    shares = {person(n).name: TenantRule(share=luck.choice((1.0, 1.0, 2.0, 4.0))) for n in range(tenants)}
    floor = Floor(
        rules(tenants=shares),
        devices=tuple(f"cuda:{n}" for n in range(luck.choice((1, 1, 1, 2, 3)))),
        load_s={handler: luck.choice((0.5, 2.0, 5.0, 10.0)) for handler in HANDLERS},
        room=luck.choice((1, 1, 2, 3)),
    )
    taught(floor)
    for _ in range(luck.choice((3, 10, 30, 60))):
        floor.submit(
            person(luck.randrange(tenants)),
            items=luck.choice((10, 50, 200, 1000, 3000)),
            handler=luck.choice(handlers),
            priority=luck.choice((*[Priority.NORMAL] * 6, Priority.LOW)),
        )
        if luck.random() < 0.2:
            floor.run(luck.random() * 20)
    floor.run(luck.random() * 60)
    return floor


def misses(floor: Floor) -> Iterator[tuple[str, float, float]]:
    """Of every start and end that is forecast: how far away it was, and by how much more than a round it was missed."""
    outlooks, begun_s = look(floor), floor.clock_s
    begun = {job_id for job_id, job in floor.state.jobs.items() if job.started_ns}
    expected = {
        i: (ahead_s(floor, o.start_ns), ahead_s(floor, o.finish_ns), ahead_s(floor, o.finish_90_ns))
        for i, o in outlooks.items()
    }
    tenants = len({floor.job(job_id).tenant for job_id in outlooks})
    slice_s = max(5.0, min(30.0, 120 / max(1, tenants)))
    round_s = tenants * (slice_s + 1) + 2 * sum(floor.load_s.values())
    floor.run(200_000)
    for job_id, (start_s, finish_s, _) in expected.items():
        pairs = [("end", finish_s, floor.finished[job_id] - begun_s)]
        if job_id not in begun:
            pairs.append(("start", start_s, floor.started[job_id] - begun_s))
        for what, forecast_s, true_s in pairs:
            yield f"{what} of job {job_id}", true_s, abs(forecast_s - true_s) - round_s


@pytest.mark.parametrize("turns", [run_ahead.TURNS_MAX, 0], ids=["near", "far"])
@pytest.mark.parametrize(
    "seeds", [pytest.param(8, id="some"), pytest.param(150, id="many", marks=pytest.mark.slow)]
)
def test_in_random_worlds_starts_and_ends_come_within_a_tenth_and_a_round_of_the_forecast(
    monkeypatch: pytest.MonkeyPatch, seeds: int, turns: int
) -> None:
    """Nine in ten of them: a tenant's own jobs may pass each other where a handler is not loaded. `far` is job by job from the first moment on."""
    monkeypatch.setattr(run_ahead, "TURNS_MAX", turns)
    found = [miss for seed in range(seeds) for miss in misses(random_world(seed))]
    kept = sum(by_s <= 0.1 * true_s for _, true_s, by_s in found)
    assert kept >= 0.9 * len(found), sorted(found, key=lambda miss: miss[2])[-5:]


class Moody(Floor):
    """Jobs differ in what their items cost, batches of a job among themselves, and loads from each other."""

    def __init__(self, luck: random.Random, deviation: float, **more: Any) -> None:
        self.luck = luck
        self.deviation = deviation
        self.factors: dict[int, float] = {}
        super().__init__(rules(), **more)

    def batch_takes_s(self, lease: Lease, items: int) -> float:
        if lease.job_id not in self.factors:
            self.factors[lease.job_id] = self.luck.lognormvariate(0, self.deviation)
        noise = self.luck.lognormvariate(0, 0.2)
        return super().batch_takes_s(lease, items) * self.factors[lease.job_id] * noise

    def load_takes_s(self, lease: Lease) -> float:
        return super().load_takes_s(lease) * self.luck.lognormvariate(0, 0.2)


def moody_world(seed: int, deviation: float) -> Floor:
    luck = random.Random(seed)
    handlers = list(HANDLERS)[: luck.choice((1, 1, 2, 3))]
    floor = Moody(
        luck,
        deviation,
        devices=tuple(f"cuda:{n}" for n in range(luck.choice((1, 1, 2)))),
        load_s={handler: luck.choice((0.5, 2.0, 5.0)) for handler in HANDLERS},
        room=luck.choice((1, 3)),
    )
    for handler in handlers * 6:
        floor.submit(ROOT, items=luck.choice((50, 200, 500)), handler=handler)
    floor.run(5_000)
    tenants = luck.choice((1, 1, 2, 3, 5, 8))
    for _ in range(luck.choice((1, 2, 5, 12, 30))):
        who = person(luck.randrange(tenants))
        floor.submit(who, items=luck.choice((50, 200, 1000)), handler=luck.choice(handlers))
    return floor


@pytest.mark.parametrize(
    ("seeds", "deviation", "least", "most"),
    [
        pytest.param(40, 0.2, 0.86, 0.98, id="some"),
        pytest.param(250, 0.1, 0.90, 0.98, id="many-alike", marks=pytest.mark.slow),
        pytest.param(250, 0.2, 0.88, 0.97, id="many", marks=pytest.mark.slow),
        pytest.param(250, 0.4, 0.85, 0.95, id="many-unlike", marks=pytest.mark.slow),
    ],
)
def test_about_nine_in_ten_jobs_are_done_by_the_time_that_nine_in_ten_should_keep(
    seeds: int, deviation: float, least: float, most: float
) -> None:
    """And about half of them by the one that half should keep."""
    by_90: list[bool] = []
    by_half: list[bool] = []
    for seed in range(seeds):
        floor = moody_world(seed, deviation)
        outlooks, begun_ns = look(floor), floor.now_ns
        floor.run(100_000)
        for job_id, outlook in outlooks.items():
            finished_ns = floor.job(job_id).finished_ns
            assert finished_ns > begun_ns
            by_90.append(finished_ns <= outlook.finish_90_ns)
            by_half.append(finished_ns <= outlook.finish_ns)
    assert least <= sum(by_90) / len(by_90) <= most
    assert 0.35 <= sum(by_half) / len(by_half) <= 0.65


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


def test_nine_in_ten_is_later_by_what_jobs_were_seen_to_differ() -> None:
    floor = taught(Floor(rules()))
    learned = floor.state.learned["embed"]
    learned.job_item_ns, learned.job_spread_ns = learned.item_ns, 0
    job_id = floor.submit(ALICE, items=1000)
    length_s = ahead_s(floor, look(floor)[job_id].finish_ns)
    assert late_s(floor, job_id) == pytest.approx(0.05 * length_s, rel=0.01)
    learned.job_spread_ns = learned.item_ns // 4
    varying_s = late_s(floor, job_id)
    deviation_s = 1.28 * 1.25 / 4 * length_s
    assert varying_s == pytest.approx(deviation_s * (1 + 0.38**2) ** 0.5, rel=0.01)
    learned.load_spread_ns = 100 * S_NS
    floor.lease().loaded = False
    assert late_s(floor, job_id) > varying_s + 100


def late_s(floor: Floor, job_id: int) -> float:
    outlook = look(floor)[job_id]
    return (outlook.finish_90_ns - outlook.finish_ns) / S_NS


def test_chances_of_many_jobs_make_up_for_each_other_and_a_wrong_mean_does_not() -> None:
    floor = taught(Floor(rules()))
    learned = floor.state.learned["embed"]
    learned.job_item_ns, learned.job_spread_ns = learned.item_ns, learned.item_ns // 4
    ids = [floor.submit(ALICE, items=1000) for _ in range(16)]
    first, last = late_s(floor, ids[0]), late_s(floor, ids[-1])
    assert last / first == pytest.approx((16 + (16 * 0.38) ** 2) ** 0.5 / (1 + 0.38**2) ** 0.5, rel=0.02)


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


@pytest.mark.parametrize(
    ("who", "changes"),
    [
        (BOB, {}),
        (BOB, {"tenant": "lab"}),
        (BOB, {"priority": Priority.LOW}),
        (ROOT, {"priority": Priority.HIGH, "tenant": "production"}),
        (BOB, {"begin_ns": EPOCH_NS + 700 * S_NS}),
        (ALICE, {"handler": "ocr"}),
        (ALICE, {"handler": "rerank"}),
    ],
    ids=["plain", "tenant", "low", "high", "begin", "load", "backoff"],
)
def test_a_job_that_is_not_submitted_yet_is_forecast_as_if_it_were(
    who: inputs.Who, changes: dict[str, Any]
) -> None:
    floor = taught(Floor(rules(), load_s={"ocr": 3.0}))
    floor.state.learned["rerank"].retry_at_ns = floor.now_ns + 50 * S_NS  # it failed to load
    for _ in range(3):
        floor.submit(ALICE, items=1000)
    floor.submit(BOB, items=300)
    wanted = inputs.Submit(who=who, submission=submission(items=100, **changes))
    (event,) = decide(floor.state, floor.rules, wanted, floor.now_ns)
    assert isinstance(event, Submitted)
    extra = look(floor, job_of(event))[event.job_id]
    assert extra.position
    assert floor.now_ns <= extra.start_ns < extra.finish_ns < extra.finish_90_ns
    floor.give(wanted)
    if floor.job(event.job_id).state is JobState.QUEUED:
        assert look(floor)[event.job_id] == extra


def test_of_a_handler_that_no_device_takes_now_nothing_is_promised() -> None:
    large = {"embed": HandlerRule(vram_bytes=40 << 30), "ocr": HandlerRule(vram_bytes=1 << 30)}
    house = House(rules(handlers=large), devices=("cuda:0",))
    house.give(inputs.DeviceSeen(device="cuda:0", total_bytes=80 << 30, room_bytes=10 << 30))
    crowded_out, fits, behind = (
        house.submit(ALICE),
        house.submit(BOB, handler="ocr"),
        house.submit(BOB, handler="ocr"),
    )
    assert set(look(house)) == {fits, behind}
    house.give(inputs.DeviceSeen(device="cuda:0", total_bytes=80 << 30, room_bytes=80 << 30))
    assert crowded_out in look(house)


# --- cost ------------------------------------------------------------------------------------------------------------------


def queue_of(jobs: int, tenants: int) -> Floor:
    floor = taught(Floor(rules()))
    luck = random.Random(1)
    for number in range(jobs):
        floor.submit(person(number % tenants), items=luck.choice((10, 1000, 50_000)))
    return floor


CALLS_MAX = 20_000  # of functions in a step: at 0.2 us each below 5 ms


@pytest.mark.parametrize(("jobs", "tenants"), [(1000, 41), (1000, 500), (5000, 1)])
def test_no_step_does_more_than_a_bounded_piece_of_the_work(jobs: int, tenants: int) -> None:
    """Calls, not seconds: the figures in seconds are the benchmark's (`bench.py forecast`)."""
    floor = queue_of(jobs, tenants)
    calls: list[int] = []

    def count(frame: Any, event: str, what: Any) -> None:  # the interpreter's own signature
        calls[-1] += event in ("call", "c_call")

    steps = forecast(floor.state, floor.rules, floor.now_ns)
    going = True
    while going:
        calls.append(0)
        sys.setprofile(count)
        going = next(steps, "ended") is None
        sys.setprofile(None)
    assert len(look(floor)) == jobs
    assert max(calls) <= CALLS_MAX
    assert len(calls) >= 30


@pytest.mark.parametrize("odd_ns", [0, 1, 100, 127, 128, 129, 255])
def test_a_job_that_wakes_between_two_numbers_that_a_float_has_is_reached(
    odd_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Today's time in ns has steps of 256 as a float; a backoff ends whenever it likes."""
    monkeypatch.setattr(run_ahead, "TURNS_MAX", 4)
    floor = taught(Floor(rules()))
    for number in range(20):
        floor.submit(person(number % 2), items=1000)
    sleeper = floor.submit(CAROL, items=100, begin_ns=floor.now_ns // 256 * 256 + 500 * S_NS + odd_ns)
    steps = forecast(floor.state, floor.rules, floor.now_ns)
    assert sum(1 for _ in zip(range(1_000), steps, strict=False)) < 1_000
    assert look(floor)[sleeper].finish_ns


def test_longer_jobs_cost_no_more() -> None:
    def steps(items: int) -> int:
        floor = taught(Floor(rules()))
        for number in range(300):
            floor.submit(person(number % 41), items=items)
        return sum(1 for _ in forecast(floor.state, floor.rules, floor.now_ns))

    assert steps(5_000_000) <= 1.5 * steps(5_000)


def test_the_state_may_move_on_between_the_steps() -> None:
    floor = queue_of(200, 10)
    steps = forecast(floor.state, floor.rules, floor.now_ns)
    for _ in steps:
        floor.run(20)
        floor.submit(person(99), items=10)
        queued = (job for job in floor.state.jobs.values() if job.state is JobState.QUEUED)
        floor.give(inputs.Cancel(who=ROOT, job_id=next(queued).job_id))
    assert look(floor)


@pytest.mark.parametrize("turns", [run_ahead.TURNS_MAX, 0], ids=["near", "far"])
def test_a_tenant_at_its_limit_of_devices_is_forecast_to_wait_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr(run_ahead, "TURNS_MAX", turns)
    limited = rules(tenants={"alice": TenantRule(running_devices_max=1)})
    floor = taught(Floor(limited, devices=("cuda:0", "cuda:1")))
    first, second = floor.submit(ALICE, items=1000), floor.submit(ALICE, items=1000)
    other, last = floor.submit(BOB, items=500), floor.submit(BOB, items=500)
    outlooks = look(floor)
    assert ahead_s(floor, outlooks[second].start_ns) == pytest.approx(100, abs=3)
    assert ahead_s(floor, outlooks[second].finish_ns) == pytest.approx(200, abs=3)
    assert ahead_s(floor, outlooks[last].start_ns) == pytest.approx(50, abs=3)
    begun_s = floor.clock_s
    floor.run(300)
    assert floor.started[second] - begun_s == pytest.approx(100, abs=3)
    assert floor.started[other] == pytest.approx(begun_s, abs=1)
    assert floor.finished[first] - begun_s == pytest.approx(100, abs=3)
