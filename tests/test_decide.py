"""What is refused, and what follows from reports: cases that the scripts do not tell."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from core_house import ALICE, BOB, CAROL, HANDLERS, ROOT, House, check_bookkeeping, submission
from gpujobd.core import events, inputs, policy
from gpujobd.core.decide import find_submitted
from gpujobd.core.leases import backoff_ns, canary_line
from gpujobd.core.model import (
    ERROR_MAX,
    NO_ACCURACY,
    S_NS,
    Checkpoint,
    Deferred,
    Expected,
    HandlerRule,
    JobState,
    ParamRule,
    Priority,
    Reason,
    Rules,
    Span,
    TenantRule,
    YieldWhy,
)
from gpujobd.core.refused import Refused
from gpujobd.protocol import ErrorCode


def house(devices: tuple[str, ...] = ("cpu",), **changes: Any) -> House:
    return House(Rules(**({"handlers": HANDLERS} | changes)), devices)


def refusal(of: House, given: inputs.AnyInput) -> Refused:
    before = of.state.seq
    with pytest.raises(Refused) as caught:
        of.give(given)
    assert of.state.seq == before
    return caught.value


def refused_submit(of: House, who: inputs.Who = ALICE, **changes: Any) -> Refused:
    return refusal(of, inputs.Submit(who=who, submission=submission(**changes)))


# --- limits -----------------------------------------------------------------------------------------------------------

LIMITS: list[tuple[dict[str, Any], dict[str, Any], ErrorCode, int, int]] = [
    ({"queued_jobs_max": 2}, {}, ErrorCode.QUEUE_FULL, 2, 2),
    ({"jobs_per_uid_max": 2}, {}, ErrorCode.QUOTA, 2, 2),
    ({"tenants": {"alice": TenantRule(queued_jobs_max=2)}}, {}, ErrorCode.QUOTA, 2, 2),
    ({"items_per_job_max": 20}, {"items": 21}, ErrorCode.TOO_MANY_ITEMS, 20, 21),
    ({"queued_items_max": 25}, {}, ErrorCode.BACKLOG_FULL, 25, 20),
    ({"input_bytes_max": 200}, {"input_bytes": 201}, ErrorCode.INPUT_TOO_LARGE, 200, 201),
    ({"item_bytes_max": 19}, {"item_bytes": 20}, ErrorCode.ITEM_TOO_LARGE, 19, 20),
    ({"spool_bytes_max": 599}, {}, ErrorCode.SPOOL_FULL, 599, 400),
]


@pytest.mark.parametrize(("limits", "third", "code", "limit", "current"), LIMITS)
def test_beyond_a_limit_the_refusal_names_code_limit_and_figure(
    limits: dict[str, Any], third: dict[str, Any], code: ErrorCode, limit: int, current: int
) -> None:
    it = house(**limits)
    it.submit()
    it.submit()
    refused = refused_submit(it, **third)
    assert (refused.code, refused.limit, refused.current) == (code, limit, current)
    assert str(limit) in refused.message
    assert str(current) in refused.message


@pytest.mark.parametrize(("limits", "third", "code", "limit", "current"), LIMITS)
def test_at_a_limit_a_reservation_counts_like_a_job(
    limits: dict[str, Any], third: dict[str, Any], code: ErrorCode, limit: int, current: int
) -> None:
    it = house(**limits)
    for _ in range(2):
        it.give(inputs.Reserve(who=ALICE, submission=submission()))
    refused = refusal(it, inputs.Reserve(who=ALICE, submission=submission(**third)))
    assert (refused.code, refused.limit, refused.current) == (code, limit, current)


def test_the_limits_themselves_are_allowed() -> None:
    it = house(
        queued_jobs_max=1, items_per_job_max=10, queued_items_max=10, input_bytes_max=200, spool_bytes_max=200
    )
    assert it.submit(items=10, item_bytes=19) == 1


def test_paused_jobs_count_and_final_jobs_do_not() -> None:
    it = house(queued_jobs_max=1)
    job_id = it.submit()
    it.give(inputs.Pause(who=ALICE, job_id=job_id))
    it.give_back()
    assert refused_submit(it, BOB).code == ErrorCode.QUEUE_FULL
    it.give(inputs.Cancel(who=ALICE, job_id=job_id))
    it.submit(BOB)


def test_outputs_count_against_the_spool_and_removal_gives_it_back() -> None:
    it = house(spool_bytes_max=400)
    job_id = it.submit()
    it.loaded()
    it.finish()  # 100 bytes of results
    assert refused_submit(it, input_bytes=101).code == ErrorCode.SPOOL_FULL
    it.submit(input_bytes=100)
    it.give(inputs.Remove(who=ALICE, job_id=job_id))
    assert it.state.book.stored_bytes == 100


def test_items_that_were_tried_leave_the_backlog() -> None:
    it = house(queued_items_max=15)
    it.submit(items=10)
    it.loaded()
    assert refused_submit(it, items=6).code == ErrorCode.BACKLOG_FULL
    it.checkpoint(1)
    it.submit(items=6)


def test_low_and_full_disks_and_a_stopping_daemon_close_the_door() -> None:
    it = house(disk_low=True)
    assert refused_submit(it).code == ErrorCode.DISK_LOW
    it.rules = msgspec.structs.replace(it.rules, disk_low=False)
    it.give(inputs.DiskSpace(full=True))
    assert refused_submit(it).code == ErrorCode.DISK_LOW
    it.give(inputs.Stop())
    assert refused_submit(it).code == ErrorCode.DRAINING


# --- what is in a submission ------------------------------------------------------------------------------------------

PARAMS = {
    "mode": ParamRule(type="str", default="fast", choices=("fast", "good")),
    "note": ParamRule(type="str"),
    "top": ParamRule(type="int", min=1, max=10),
    "heat": ParamRule(type="float", default=0.5, min=0.0),
    "flat": ParamRule(type="bool", default=False),
}
DEFAULTS = {"mode": "fast", "heat": 0.5, "flat": False}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {}),
        ({"mode": "good", "top": 10}, {"mode": "good", "top": 10}),
        ({"heat": 2}, {"heat": 2.0}),
        ({"flat": True, "note": ""}, {"flat": True, "note": ""}),
    ],
)
def test_parameters_are_kept_with_the_defaults_filled_in(given: dict[str, Any], kept: dict[str, Any]) -> None:
    it = house(handlers={"embed": HandlerRule(job_params=PARAMS)})
    job = it.job(it.submit(params=given))
    assert job.params == DEFAULTS | kept
    assert all(type(job.params[name]).__name__ == PARAMS[name].type for name in job.params)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speed": 1}, "embed has no parameter speed; it has: flat, heat, mode, note, top"),
        ({"mode": "best"}, "mode is one of fast, good"),
        ({"mode": 1}, "mode takes str, not int"),
        ({"top": 0}, "top is 0, allowed are 1 to 10"),
        ({"top": 11}, "top is 11, allowed are 1 to 10"),
        ({"top": 1.0}, "top takes int, not float"),
        ({"top": True}, "top takes int, not bool"),
        ({"heat": -0.1}, "heat is -0.1, allowed are at least 0"),
        ({"heat": float("nan")}, "heat is not a finite number of at most 64 bits"),
        ({"heat": float("inf")}, "heat is not a finite number of at most 64 bits"),
        ({"heat": 1 << 80}, "heat is not a finite number of at most 64 bits"),
        ({"flat": 1}, "flat takes bool, not int"),
        ({"note": "x" * 1001}, "note has 1001 characters, allowed are 1000"),
    ],
)
def test_parameters_outside_their_rules_are_refused(given: dict[str, Any], message: str) -> None:
    refused = refused_submit(house(handlers={"embed": HandlerRule(job_params=PARAMS)}), params=given)
    assert (refused.code, refused.message) == (ErrorCode.BAD_PARAMS, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"submit_id": ""},
        {"submit_id": "x" * 65},
        {"submit_id": "a\nb"},
        {"submit_id": "ä"},
        {"name": "x" * 101},
        {"name": "a\x1b[2J"},
        {"input_sha256": b"short"},
        {"items": 0},
        {"items": -1},
        {"input_bytes": 19},
        {"item_bytes": 1},
        {"item_bytes": 201},
        {"failures_max": -2},
        {"begin_ns": -1},
    ],
)
def test_a_header_that_no_honest_client_makes_is_bad_input(changes: dict[str, Any]) -> None:
    assert refused_submit(house(), **changes).code == ErrorCode.BAD_INPUT


def test_a_tenants_name_is_bounded_even_for_administrators() -> None:
    it = house()
    assert refused_submit(it, ROOT, tenant="x" * 101).code == ErrorCode.BAD_INPUT
    assert refused_submit(it, ROOT, tenant="a b").code == ErrorCode.BAD_INPUT
    assert it.job(it.submit(ROOT, tenant="anything")).tenant == "anything"


def test_a_person_without_a_name_is_a_tenant_by_number() -> None:
    it = house()
    assert it.job(it.submit(inputs.Who(uid=4711))).tenant == "4711"


def test_high_is_for_administrators_and_whoever_the_configuration_names() -> None:
    it = house()
    assert refused_submit(it, priority=Priority.HIGH).code == ErrorCode.FORBIDDEN
    it.submit(msgspec.structs.replace(ALICE, high=True), priority=Priority.HIGH)
    low = it.submit(priority=Priority.LOW)
    wish = inputs.SetPriority(who=ALICE, job_id=low, priority=Priority.HIGH)
    assert refusal(it, wish).code == ErrorCode.FORBIDDEN


def test_a_retry_takes_a_final_job_of_ones_own() -> None:
    it = house()
    old = it.submit()
    assert refused_submit(it, retry_of=old).code == ErrorCode.BAD_STATE
    it.loaded()
    it.finish()
    assert refused_submit(it, CAROL, retry_of=old).code == ErrorCode.NO_SUCH_JOB
    assert it.job(it.submit(retry_of=old)).retry_of == old


# --- submissions that come again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"items": 11},
        {"handler": "rerank"},
        {"input_sha256": bytes(32)},
        {"name": "other"},
        {"deadline_ns": 1 << 62},
        {"failures_max": 3},
        {"params": {"mode": "good"}},
    ],
)
def test_the_same_submit_id_with_other_content_is_a_conflict(change: dict[str, Any]) -> None:
    it = house(handlers={"embed": HandlerRule(job_params=PARAMS), "rerank": HandlerRule()})
    first = submission(params={"mode": "fast"})
    it.give(inputs.Submit(who=ALICE, submission=first))
    assert find_submitted(it.state, ALICE, first) == 1
    assert it.give(inputs.Submit(who=ALICE, submission=first)) == []
    other = msgspec.structs.replace(first, **change)
    for given in (inputs.Submit(who=ALICE, submission=other), inputs.Reserve(who=ALICE, submission=other)):
        assert refusal(it, given).code == ErrorCode.CONFLICT


def test_a_changed_priority_does_not_make_a_repeat_a_conflict() -> None:
    it = house()
    first = submission()
    it.give(inputs.Submit(who=ALICE, submission=first))
    it.give(inputs.SetPriority(who=ALICE, job_id=1, priority=Priority.LOW))
    assert it.give(inputs.Submit(who=ALICE, submission=first)) == []


def test_a_repeat_is_answered_even_when_the_door_is_closed() -> None:
    it = house()
    first = submission()
    it.give(inputs.Submit(who=ALICE, submission=first))
    it.give(inputs.Stop())
    assert it.give(inputs.Submit(who=ALICE, submission=first)) == []
    assert it.give(inputs.Reserve(who=ALICE, submission=first)) == []


def test_room_is_held_for_the_submission_it_was_asked_for_and_for_no_other() -> None:
    it = house(queued_jobs_max=1)
    it.give(inputs.Reserve(who=ALICE, submission=submission()))
    other = inputs.Submit(who=ALICE, submission=submission(), reservation_id=1)
    assert refusal(it, other).code == ErrorCode.QUEUE_FULL
    stolen = inputs.Submit(who=BOB, submission=submission(), reservation_id=1)
    assert refusal(it, stolen).code == ErrorCode.QUEUE_FULL


def test_a_small_input_rides_in_the_event_and_the_state_keeps_its_number_alone() -> None:
    it = house()
    it.give(inputs.Submit(who=ALICE, submission=submission(), inline=b"{}\n" * 10))
    submitted = next(event for event in it.history if isinstance(event, events.Submitted))
    assert submitted.input == b"{}\n" * 10
    number = it.history.index(submitted) + 1
    assert (it.job(1).inline_seq, it.state.book.inline) == (number, {1: number})
    assert it.give(inputs.Spooled(job_ids=(1, 1, 99)))[0].job_ids == (1,)  # type: ignore[union-attr]
    assert (it.job(1).inline_seq, it.state.book.inline) == (0, {})
    assert it.give(inputs.Spooled(job_ids=(1,))) == []


# --- jobs that are in -----------------------------------------------------------------------------------------------------

VERBS = (inputs.Cancel, inputs.Pause, inputs.Resume, inputs.MoveFirst, inputs.Remove)


@pytest.mark.parametrize("verb", VERBS)
def test_somebody_elses_job_is_no_such_job_in_the_very_same_words(verb: Any) -> None:
    it = house()
    it.submit(ALICE)
    foreign = refusal(it, verb(who=CAROL, job_id=1))
    missing = refusal(it, verb(who=CAROL, job_id=2))
    assert foreign.code == missing.code == ErrorCode.NO_SUCH_JOB
    assert foreign.message.replace("1", "2") == missing.message


@pytest.mark.parametrize("verb", [inputs.Cancel, inputs.Pause, inputs.Resume, inputs.MoveFirst])
def test_what_is_over_stays_as_it_is(verb: Any) -> None:
    it = house()
    it.submit()
    it.loaded()
    it.finish()
    refused = refusal(it, verb(who=ALICE, job_id=1))
    assert refused.code == ErrorCode.BAD_STATE
    assert "completed" in refused.message


def test_a_job_is_removed_only_when_it_is_over() -> None:
    it = house()
    it.submit()
    assert refusal(it, inputs.Remove(who=ALICE, job_id=1)).code == ErrorCode.BAD_STATE


def test_a_message_is_bounded() -> None:
    it = house()
    it.submit()
    refused = refusal(it, inputs.Cancel(who=ALICE, job_id=1, message="x" * 501))
    assert (refused.code, refused.limit, refused.current) == (ErrorCode.BAD_REQUEST, 500, 501)


def test_a_wish_already_granted_adds_nothing() -> None:
    it = house()
    it.submit()
    it.give(inputs.Cancel(who=ALICE, job_id=1))
    assert it.give(inputs.Cancel(who=ALICE, job_id=1)) == []
    assert it.give(inputs.SetPriority(who=ALICE, job_id=1, priority=Priority.NORMAL)) == []
    it.give(inputs.SwitchQueue(who=ROOT, verb=inputs.QueueVerb.STOP))
    assert it.give(inputs.SwitchQueue(who=ROOT, verb=inputs.QueueVerb.STOP)) == []


def test_a_running_job_whose_level_falls_gives_way() -> None:
    it = house()
    it.submit(ALICE)
    it.submit(BOB)
    found = it.give(inputs.SetPriority(who=ALICE, job_id=1, priority=Priority.LOW))
    assert [type(event).__name__ for event in found] == ["PriorityChanged", "YieldRequested"]
    assert it.lease().yield_why is YieldWhy.PRIORITY


STRONGER = [YieldWhy.TURN_OVER, YieldWhy.STOPPING, YieldWhy.DEADLINE, YieldWhy.PAUSE, YieldWhy.CANCEL]
ENDS = {
    YieldWhy.TURN_OVER: (JobState.QUEUED, None),
    YieldWhy.STOPPING: (JobState.PAUSED, Reason.DAEMON_STOPPING),
    YieldWhy.DEADLINE: (JobState.EXPIRED, None),
    YieldWhy.PAUSE: (JobState.PAUSED, Reason.HELD_BY_OWNER),
    YieldWhy.CANCEL: (JobState.CANCELLED, None),
}


def ask(it: House, why: YieldWhy) -> None:
    if why is YieldWhy.TURN_OVER:
        it.submit(BOB)
    elif why is YieldWhy.STOPPING:
        it.give(inputs.Stop())
    elif why is YieldWhy.DEADLINE:
        it.wait(1000)
    elif why is YieldWhy.PAUSE:
        it.give(inputs.Pause(who=ALICE, job_id=1))
    else:
        it.give(inputs.Cancel(who=ALICE, job_id=1))


@pytest.mark.parametrize("how", ["give_back", "lose", "load_failed"])
@pytest.mark.parametrize("first", STRONGER)
@pytest.mark.parametrize("second", STRONGER)
def test_of_two_wishes_the_stronger_decides_however_the_lease_ends(
    first: YieldWhy, second: YieldWhy, how: str
) -> None:
    it = house()
    job_id = it.submit(ALICE, items=50, deadline_ns=it.now_ns + 500 * S_NS)
    if YieldWhy.TURN_OVER in (first, second):
        it.loaded()  # while a handler loads, no turn ends
    it.wait(40)
    stronger = max(first, second, key=STRONGER.index)
    if stronger is YieldWhy.CANCEL and first is YieldWhy.CANCEL and second is YieldWhy.PAUSE:
        ask(it, first)
        with pytest.raises(Refused):
            ask(it, second)
    elif not (first is YieldWhy.STOPPING and second is YieldWhy.TURN_OVER):  # nobody is admitted then
        ask(it, first)
        ask(it, second)
    else:
        ask(it, second)
        ask(it, first)
    assert it.lease().yield_why is stronger
    if how == "load_failed":
        it.give(inputs.LoadFailed(device="cpu", attempt=it.lease().attempt, used_ns=0, error="x"))
    else:
        getattr(it, how)(used_s=40.0)
    if {first, second} == {YieldWhy.PAUSE, YieldWhy.DEADLINE}:
        stronger = YieldWhy.DEADLINE  # paused, and then the deadline ends the pause
    assert (it.job(job_id).state, it.job(job_id).reason) == ENDS[stronger]
    check_bookkeeping(it.state)


def test_a_job_that_was_done_before_it_yielded_is_completed_whatever_was_asked() -> None:
    it = house()
    it.submit()
    it.loaded()
    it.give(inputs.Cancel(who=ALICE, job_id=1))
    it.give_back(10)
    assert it.job(1).state is JobState.COMPLETED


# --- reports --------------------------------------------------------------------------------------------------------------


def test_reports_of_other_attempts_and_other_devices_change_nothing() -> None:
    it = house(("cuda:0", "cuda:1"))
    it.submit()
    attempt = it.lease("cuda:0").attempt
    point = it.job(1).checkpoint
    for device, number in (("cuda:0", attempt + 1), ("cuda:0", 0), ("cuda:1", attempt), ("cuda:7", attempt)):
        quoting: dict[str, Any] = {"device": device, "attempt": number, "used_ns": S_NS}
        for given in (
            inputs.CheckpointReached(checkpoint=point, **quoting),
            inputs.GaveBack(checkpoint=point, **quoting),
            inputs.Finished(checkpoint=point, **quoting),
            inputs.Lost(cause="died", **quoting),
            inputs.LoadFailed(error="x", **quoting),
            inputs.CanaryOk(**quoting),
        ):
            assert it.give(given) == []
    assert it.give(inputs.Loaded(device="cuda:7", handler="embed", load_ns=1)) == []
    assert it.give(inputs.Unloaded(device="cuda:0", handler="embed")) == []
    assert it.give(inputs.Unkillable(device="cuda:7")) == []


def test_time_is_charged_once_however_often_it_is_reported() -> None:
    it = house(tenants={"alice": TenantRule(share=2.0)})
    it.submit()
    it.loaded()
    it.checkpoint(1, used_s=10.0)
    it.checkpoint(1, used_s=0.0)
    it.checkpoint(1, used_s=-5.0)  # a clock of the supervisor's that went wrong gives nothing back
    tenant = it.state.tenants["alice"]
    assert (tenant.used_ns, it.job(1).used_ns) == (10 * S_NS, 10 * S_NS)
    assert tenant.vtimes_ns == (0, 5 * S_NS, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"upto": 2, "done": 2},
        {"upto": 11, "done": 11},
        {"upto": 6, "done": 5},
        {"upto": 5, "done": 6},
        {"upto": 5, "done": 4, "failed": 1},
        {"upto": 5, "done": 5, "results_bytes": 49},
        {"upto": 5, "done": 5, "results_bytes": 1 << 63},
        {"upto": 5, "done": 5, "results_bytes": 50, "results_crc": 1 << 32},
        {"upto": 5, "done": 5, "results_bytes": 50, "errors_crc": -1},
        {"upto": 7, "done": 5, "deferred": (Deferred(6, 1), Deferred(6, 1))},
        {"upto": 6, "done": 5, "deferred": (Deferred(9, 1),)},
        {"upto": 6, "done": 5, "deferred": (Deferred(6, 0),)},
        {"upto": 6, "done": 5, "failed": 1, "failure_codes": {"bad_json": 2}},
        {"upto": 6, "done": 5, "failed": 1, "failure_codes": {"bad_json": 2, "x": -1}},
        {"upto": 6, "done": 5, "failed": 1, "failure_codes": {"bad json": 1}},
        {"upto": 6, "done": 5, "failed": 1, "failure_codes": {"x" * 65: 1}},
    ],
)
def test_an_impossible_checkpoint_ends_the_lease_and_counts_for_nothing(wrong: dict[str, Any]) -> None:
    it = house()
    it.submit()
    it.loaded()
    it.checkpoint(5)
    believed = it.job(1).checkpoint
    lie = msgspec.structs.replace(believed, **({"results_bytes": 50} | wrong))
    found = it.checkpoint(0, checkpoint=lie)
    assert isinstance(found[0], events.LeaseLost)
    assert found[0].cause == "lied"
    assert it.job(1).checkpoint == believed
    for event in found:
        assert events.decode(events.encode(event)) == event


def test_counts_of_codes_go_on_with_the_checkpoint_and_never_back() -> None:
    it = house()
    it.submit(items=20)
    it.loaded()
    first = Checkpoint(upto=4, done=2, failed=2, failure_codes={"bad_json": 2})
    it.checkpoint(0, checkpoint=first)
    it.lose()
    it.wait(60)
    it.loaded()
    assert it.job(1).checkpoint.failure_codes == {"bad_json": 2}
    fewer = Checkpoint(upto=5, done=2, failed=3, failure_codes={"bad_json": 1, "rejected": 2})
    (lost, *_) = it.checkpoint(0, checkpoint=fewer)
    assert isinstance(lost, events.LeaseLost)
    it.wait(60)
    it.loaded()
    it.finish(checkpoint=Checkpoint(upto=20, done=17, failed=3, failure_codes={"bad_json": 2, "rejected": 1}))
    assert it.job(1).state is JobState.COMPLETED
    assert it.job(1).checkpoint.failure_codes == {"bad_json": 2, "rejected": 1}


def test_timings_that_are_no_seconds_are_left_out() -> None:
    from gpujobd.core.model import Timings

    it = house()
    it.submit()
    it.loaded()
    for worse in (-1.0, float("nan"), float("inf")):
        it.checkpoint(1, timings=Timings(compute_s=worse, read_s=1.0))
    assert it.job(1).timings == Timings()


def test_a_job_is_not_finished_while_items_are_left() -> None:
    it = house()
    it.submit()
    it.loaded()
    it.report(inputs.Finished, 9)
    assert it.job(1).state is not JobState.COMPLETED
    assert it.job(1).losses == 1


def test_deaths_of_a_deferred_line_are_counted_although_it_lies_behind_the_checkpoint() -> None:
    it = house()
    it.submit(items=3)
    it.loaded()
    point = it.job(1).checkpoint
    waiting = msgspec.structs.replace(point, upto=3, done=1, deferred=(Deferred(2, 1), Deferred(3, 1)))
    it.checkpoint(0, checkpoint=waiting)
    for seconds in (1, 3):
        it.lose("died", suspects=(Span(2, 2), Span(0, 0)))
        it.wait(seconds)
        it.checkpoint(0)
    assert it.job(1).deaths == {2: 2}
    assert it.job(1).canary_due == (2,)
    assert canary_line(it.job(1)) == 1


def test_a_job_of_one_line_needs_no_canary_to_be_done_with() -> None:
    it = house()
    it.submit(items=1)
    it.loaded()
    for seconds in (1, 3):
        it.lose("died", suspects=(Span(1, 1), Span(0, 0)))
        it.wait(seconds)
    assert (it.job(1).condemned, it.job(1).canary_due) == ((1,), ())
    assert not it.lease().canary


def test_the_canary_is_the_last_line_that_worked_else_the_one_under_least_suspicion() -> None:
    it = house()
    it.submit(items=5)
    job = it.job(1)
    assert canary_line(job, 1) == 2
    job = msgspec.structs.replace(job, deaths={2: 1, 3: 1}, canary_due=(1,))
    assert canary_line(job) == 4
    job = msgspec.structs.replace(job, deaths={2: 1, 3: 1, 4: 1, 5: 1})
    assert canary_line(job) == 2
    assert canary_line(msgspec.structs.replace(job, canary_due=(1, 2, 3, 4, 5))) == 0


def test_a_worker_that_dies_with_its_canary_in_hand_failed_it() -> None:
    it = house()
    it.submit()
    it.loaded()
    for seconds in (1, 3):
        it.lose("died", suspects=(Span(2, 2), Span(1, 1)))
        it.wait(seconds)
    assert it.lease().canary
    found = it.lose("silent")
    assert [type(event).__name__ for event in found[:2]] == ["LeaseLost", "DeviceFellIll"]
    assert it.state.devices["cpu"].reason == "CanaryFailed"


def test_an_illness_that_comes_back_waits_twice_as_long() -> None:
    it = house()
    it.submit()
    waits = []
    for _ in range(7):
        device = it.state.devices["cpu"]
        it.give(inputs.Unkillable(device="cpu"))
        waits.append((device.retry_at_ns - it.now_ns) // S_NS)
        it.wait(waits[-1])
    assert waits == [30, 60, 120, 240, 480, 600, 600]


def test_backoff_doubles_up_to_its_cap() -> None:
    assert [backoff_ns(n, 2, 300) for n in (1, 2, 3, 8, 9, 1000)] == [2, 4, 8, 256, 300, 300]


def test_a_handler_that_loads_again_has_its_failures_forgiven() -> None:
    it = house()
    it.submit(handler="ocr")
    it.give(inputs.LoadFailed(device="cpu", attempt=1, used_ns=0, error="x"))
    it.wait(2)
    it.loaded()
    assert (it.job(1).load_failures, it.state.learned["ocr"].load_failures) == (0, 0)


def test_what_an_item_costs_is_learned_without_the_loading() -> None:
    it = house()
    it.submit(items=1000)
    it.loaded(load_s=8.0)
    it.checkpoint(10, used_s=10.0)  # two seconds of work
    learned = it.state.learned["embed"]
    assert (learned.load_ns, learned.item_ns) == (8 * S_NS, S_NS // 5)
    it.checkpoint(0, used_s=3.0)  # a batch that is longer than a checkpoint's interval
    it.checkpoint(10, used_s=1.0)
    assert learned.item_ns == (3 * S_NS // 5 + 4 * S_NS // 10) // 4


# --- the house ------------------------------------------------------------------------------------------------------------


def test_devices_that_are_gone_after_a_restart_are_forgotten_with_their_leases() -> None:
    it = house(("cuda:0", "cuda:1"))
    it.submit(ALICE)
    it.submit(BOB)
    it.give(inputs.Start(boot_id="b", version="1", devices=("cuda:1",)))
    assert list(it.state.devices) == ["cuda:1"]
    assert sorted(job.state for job in it.state.jobs.values()) == ["queued", "running"]


def test_a_pause_that_was_asked_before_the_daemon_died_is_kept() -> None:
    it = house()
    it.submit()
    it.give(inputs.Pause(who=ALICE, job_id=1))
    it.give(inputs.Start(boot_id="b", version="1", devices=("cpu",)))
    assert (it.job(1).state, it.job(1).reason) == (JobState.PAUSED, Reason.HELD_BY_OWNER)


def test_without_resume_on_start_jobs_stay_paused_after_a_stop() -> None:
    it = house(resume_on_start=False)
    it.submit()
    it.give(inputs.Stop())
    it.give_back()
    it.give(inputs.Start(boot_id="b", version="1", devices=("cpu",)))
    assert (it.job(1).state, it.job(1).reason) == (JobState.PAUSED, Reason.DAEMON_STOPPING)


def test_jobs_stopped_with_the_daemon_come_back_in_their_old_order() -> None:
    it = house(("cuda:0", "cuda:1", "cuda:2"))
    ids = [it.submit() for _ in range(3)]
    it.give(inputs.Stop())
    for device in it.state.devices:
        it.give_back(device=device)
    it.give(inputs.Start(boot_id="b", version="1", devices=("cuda:0",)))
    assert it.runs("cuda:0") == ids[0]
    assert sorted(ids, key=lambda job_id: it.job(job_id).line_key) == ids


def test_room_that_was_held_is_free_after_a_restart() -> None:
    it = house(queued_jobs_max=1)
    it.give(inputs.Reserve(who=ALICE, submission=submission()))
    it.give(inputs.Start(boot_id="b", version="1", devices=("cpu",)))
    it.submit()


def test_retention_removes_the_oldest_first_by_age_and_by_bytes() -> None:
    it = house(final_days=2, outputs_bytes_max=150)
    it.submit()
    it.loaded()
    it.finish()
    it.wait(3 * 86_400)
    for _ in range(3):
        it.submit()
        it.finish()
        it.wait(1)
    assert [event.job_id for event in it.give(inputs.Retain())] == [1, 2, 3]  # type: ignore[union-attr]
    assert it.give(inputs.Retain()) == []


def test_retention_is_bounded_a_call() -> None:
    it = house(final_days=1, queued_jobs_max=5000, jobs_per_uid_max=5000)
    it.give(inputs.SwitchQueue(who=ROOT, verb=inputs.QueueVerb.STOP))
    for _ in range(1100):
        it.give(inputs.Cancel(who=ALICE, job_id=it.submit(items=1)))
    it.wait(2 * 86_400)
    assert [len(it.give(inputs.Retain())) for _ in range(3)] == [1000, 100, 0]
    it.wait(7 * 86_400)
    assert [len(it.give(inputs.Retain())[0].job_ids) for _ in range(2)] == [1000, 100]  # type: ignore[union-attr]
    assert it.give(inputs.Retain()) == []
    assert it.state.book.submit_ids == {}


# --- the clock is put back by a day ----------------------------------------------------------------------------------

DAY_S = 86_400


def test_clock_put_back_does_not_keep_a_job_in_backoff() -> None:
    it = house()
    it.submit()
    it.loaded()
    for _ in range(2):  # the first loss is redone at once
        it.lose()
    assert not it.runs()
    it.wait(-DAY_S)
    assert it.runs()
    check_bookkeeping(it.state)


def test_clock_put_back_does_not_wake_a_job_that_begins_later() -> None:
    it = house()
    it.submit(begin_ns=it.now_ns + 10 * S_NS)
    it.wait(-DAY_S)
    assert not it.runs()
    it.wait(DAY_S + 10)
    assert it.runs()


def test_clock_put_back_does_not_keep_a_handler_in_backoff() -> None:
    it = house()
    it.submit()
    it.give(inputs.LoadFailed(device="cpu", attempt=1, used_ns=0, error="x"))
    assert not it.runs()
    it.wait(-DAY_S)
    assert it.runs()


def test_clock_put_back_does_not_keep_a_device_unhealthy() -> None:
    it = house()
    it.submit()
    it.give(inputs.Unkillable(device="cpu"))
    it.lose()
    assert not it.runs()
    it.wait(-DAY_S)
    assert it.runs()


def two_of_a_line() -> tuple[House, int, int]:
    """alice's first job runs, her turn is long over, bob had more than she, and her second job waits for long."""
    it = house(aging_ns=100 * S_NS, tenants={"alice": TenantRule(share=1000.0)})
    it.submit(BOB)
    it.loaded()
    first, second = it.submit(), it.submit()
    it.finish(used_s=20)
    it.wait(99)
    it.submit(BOB)
    return it, first, second


@pytest.mark.parametrize("moved", [False, True])
def test_behind_a_running_job_of_its_own_tenant_and_priority_nothing_ages(moved: bool) -> None:
    it, first, second = two_of_a_line()
    if moved:
        it.give(inputs.MoveFirst(who=ALICE, job_id=second))
    it.wait(2)
    assert (
        it.lease().yield_why is None
    )  # it was, and got the device again, and was, as fast as the disk could
    assert it.runs() == first


# --- forecasts --------------------------------------------------------------------------------------------------------


def foretold(it: House, job_id: int, finish_s: float, finish_90_s: float = 200.0) -> list[str]:
    made_ns = it.now_ns
    expected = Expected(
        job_id, made_ns, made_ns, made_ns + round(finish_s * S_NS), made_ns + round(finish_90_s * S_NS)
    )
    return [type(event).__name__ for event in it.give(inputs.Foretell(jobs=(expected,)))]


def test_the_end_of_a_job_is_held_against_its_first_forecast() -> None:
    it = house()
    first, second = it.submit(), it.submit()
    assert foretold(it, first, 100) == ["Foretold"]
    assert foretold(it, first, 50) == []  # the first one counts
    assert foretold(it, 99, 50) == []
    foretold(it, second, 100)
    it.loaded()
    it.now_ns += 150 * S_NS
    it.finish()
    assert it.job(first).forecast_error == pytest.approx(0.5)
    seen = it.state.tenants["alice"].accuracy
    assert (seen.jobs, seen.error, seen.late, seen.by_90) == (1, 0.5, 0.5, 1.0)
    it.now_ns += 10_000 * S_NS
    it.finish()
    seen = it.state.accuracy
    assert it.job(second).forecast_error == pytest.approx(100.5)
    assert (seen.jobs, seen.by_90) == (2, 0.5)
    assert seen.error == pytest.approx((0.5 + ERROR_MAX) / 2)  # one counts so much at most
    assert foretold(it, first, 100) == []  # it is over


def test_what_a_person_holds_or_moves_is_not_held_against_the_forecast() -> None:
    it = house()
    ids = [it.submit() for _ in range(5)]
    for job_id in ids:
        foretold(it, job_id, 100)
    it.give(inputs.Pause(who=ALICE, job_id=ids[1]))
    it.give(inputs.MoveFirst(who=ALICE, job_id=ids[2]))
    it.give(inputs.SetPriority(who=ALICE, job_id=ids[3], priority=Priority.LOW))
    it.give(inputs.Cancel(who=ALICE, job_id=ids[4]))
    assert [it.job(job_id).expected is None for job_id in ids] == [False, True, True, True, False]
    assert it.job(ids[4]).forecast_error is None
    assert it.state.accuracy == NO_ACCURACY


def test_the_means_of_many_forecasts_forget_the_old_ones() -> None:
    accuracy = NO_ACCURACY
    wrong = Expected(1, 0, 0, 100 * S_NS, 110 * S_NS)
    for _ in range(200):
        accuracy = accuracy.judged(wrong, 150 * S_NS)
    assert (accuracy.error, accuracy.by_90) == (pytest.approx(0.5), 0.0)
    for _ in range(500):
        accuracy = accuracy.judged(wrong, 90 * S_NS)
    assert accuracy.jobs == 700
    assert (accuracy.error, accuracy.late) == (pytest.approx(0.1, abs=0.01), pytest.approx(-0.1, abs=0.01))
    assert accuracy.by_90 == pytest.approx(1.0, abs=0.01)


def test_clock_put_back_does_not_keep_a_low_job_waiting_for_another_day() -> None:
    it = house()
    others = it.submit(BOB, items=500)
    low = it.submit(ALICE, items=50, priority=Priority.LOW)
    it.submit(ALICE, items=50, priority=Priority.LOW)
    it.wait(-DAY_S)
    it.wait(60)  # it has waited for aging_s, as far as anybody knows: the turn is over
    it.give_back(5, used_s=60.0)
    assert it.runs() == low
    it.wait(60)
    it.give_back(5, used_s=60.0)
    it.wait(60)
    assert it.runs() == others, "once"
    assert [claim.level for claim in policy.survey(it.state, it.rules, it.now_ns).claims] == [Priority.LOW]
