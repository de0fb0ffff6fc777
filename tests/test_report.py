"""The story that the log tells of a job, and of the house."""

from __future__ import annotations

import logging
import typing

import msgspec
import pytest
from gpujobd import report
from gpujobd.core import events
from gpujobd.core.apply import apply
from gpujobd.core.model import S_NS, Checkpoint, Priority, Reason, State, Timings, YieldWhy

WORK = {"job_id": 1, "used_ns": 2 * S_NS, "vtime_ns": 2 * S_NS}


def submitted(**fields):
    known = {"job_id": 1, "submit_id": "a", "owner": 7, "tenant": "t", "handler": "embed", "items": 1000}
    return events.Submitted(at_ns=S_NS, input_bytes=9, input_sha256=b"", **(known | fields))


def leased(attempt=1, at_ns=3 * S_NS):
    return events.Leased(at_ns=at_ns, device="cpu", job_id=1, attempt=attempt, level=Priority.NORMAL)


def asked(why, **fields):
    return events.YieldRequested(at_ns=4 * S_NS, device="cpu", job_id=1, attempt=1, why=why, **fields)


def yielded(done=0, attempt=1):
    return events.Yielded(
        at_ns=5 * S_NS, attempt=attempt, checkpoint=Checkpoint(upto=done, done=done), **WORK
    )


def completed(attempt=1):
    point = Checkpoint(upto=1000, done=990, failed=10)
    timings = Timings(load_s=0.5, read_s=0.1, compute_s=1.25, write_s=0.2, sync_s=0.3)
    return events.Completed(at_ns=9 * S_NS, attempt=attempt, checkpoint=point, timings=timings, **WORK)


def paused(**fields):
    return events.Paused(at_ns=6 * S_NS, job_id=1, **fields)


@pytest.fixture
def told(caplog):
    """Apply these events one commit each; what was logged of them."""

    def tell(*history, verbose=False):
        caplog.set_level(logging.DEBUG if verbose else logging.INFO, logger="gpujobd")
        state = State()
        facts = [events.DevicesFound(at_ns=1, devices=("cpu",)), *history]
        for seq, event in enumerate(facts, 1):
            apply(state, event, seq)
            report.facts(state, [(seq, event)], {7: "alice", 0: "root"}.__getitem__)
        return [(r.levelname, r.event, r.getMessage()) for r in caplog.records]

    return tell


def test_the_whole_story_of_a_job_is_told_by_its_id(told, caplog):
    story = told(
        submitted(name="first"),
        leased(),
        asked(YieldWhy.PAUSE, by=7, detail="lunch"),
        yielded(done=400),
        paused(reason=Reason.HELD_BY_OWNER, detail="lunch", by=7),
        events.PriorityChanged(at_ns=6, job_id=1, priority=Priority.LOW, by=0),
        events.MovedFirst(at_ns=6, job_id=1, by=7, message="sorry"),
        events.Resumed(at_ns=7 * S_NS, job_id=1, by=7),
        leased(2),
        completed(2),
    )
    assert story == [
        ("INFO", "leased", "job 1 runs on cpu, attempt 1: 1,000 items for embed, submitted by alice as first 2.0 s ago"),
        ("INFO", "yield_requested", "job 1 is asked back: pause by alice: lunch"),
        ("INFO", "yielded", "job 1 gave cpu back: 400 done, 0 failed of 1,000"),
        ("INFO", "paused", "job 1 paused: HeldByOwner by alice: lunch"),
        ("INFO", "priority_changed", "job 1 has priority low by root"),
        ("INFO", "moved_first", "job 1 stands first in its line by alice: sorry"),
        ("INFO", "resumed", "job 1 resumed by alice"),
        ("INFO", "leased", "job 1 runs on cpu, attempt 2: 400 done, 0 failed of 1,000 so far"),
        ("INFO", "completed", "job 1 completed: 990 done, 10 failed of 1,000 in 4.0 s"),
    ]  # fmt: skip
    assert {(r.job_id, r.tenant, r.handler) for r in caplog.records} == {(1, "t", "embed")}
    assert [r.by_uid for r in caplog.records] == [None, 7, None, 7, 0, 7, 7, None, None]
    assert [r.attempt for r in caplog.records][-2:] == [2, 2]


def test_a_finished_job_has_its_stages_as_fields(told, caplog):
    told(submitted(), leased(), completed())
    found = caplog.records[-1].__dict__
    expected = {
        "queued_s": 2.0, "load_s": 0.5, "read_s": 0.1, "compute_s": 1.25, "write_s": 0.2, "sync_s": 0.3,
        "total_s": 8.0, "items": 1000, "failed": 10, "items_per_s": 500.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("event", "level", "word", "message"),
    [
        (events.Failed(at_ns=9, job_id=1, reason=Reason.INPUT_LOST, detail="gone"), "WARNING", "failed", "failed: InputLost: gone: 0 done"),
        (events.Cancelled(at_ns=9, job_id=1, by=7, message="no"), "INFO", "cancelled", "cancelled by alice: no: 0 done"),
        (events.Expired(at_ns=9, job_id=1), "INFO", "expired", "expired: its deadline has passed: 0 done"),
    ],
)  # fmt: skip
def test_a_job_that_never_ran_has_its_end(told, event, level, word, message):
    ((found_level, found_word, text),) = told(submitted(), event)
    assert (found_level, found_word) == (level, word)
    assert text.startswith(f"job 1 {message}, 0 failed of 1,000")


def test_a_lost_lease_says_its_cause(told):
    lost = events.LeaseLost(at_ns=9, job_id=1, attempt=1, cause="died", detail="signal 9")
    assert told(submitted(), leased(), lost)[-1] == (
        "WARNING",
        "lease_lost",
        "job 1 lost its lease: died: signal 9",
    )
    failed = events.HandlerLoadFailed(
        at_ns=9, device="cpu", job_id=1, attempt=1, error="no model", retry_at_ns=10, used_ns=0, vtime_ns=0
    )
    expected = ("WARNING", "handler_load_failed", "job 1 lost its lease: embed did not load: no model")
    assert told(submitted(), leased(), failed)[-1] == expected


@pytest.mark.parametrize(
    ("reason", "word"), [(Reason.CRASH_LOOP, "crash_loop"), (Reason.OUTPUT_DAMAGED, "output_damaged")]
)
def test_a_pause_that_somebody_must_look_into_is_a_kind_of_its_own(told, reason, word):
    ((level, found, text),) = told(submitted(), paused(reason=reason, detail="why"))
    assert (level, found, text) == ("ERROR", word, f"job 1 paused: {reason}: why")


def test_submissions_and_checkpoints_are_told_to_those_who_ask_for_everything(told, caplog):
    point = Checkpoint(upto=5, done=5)
    history = submitted(), leased(), events.Checkpointed(at_ns=5, attempt=1, checkpoint=point, **WORK)
    assert [word for _, word, _ in told(*history)] == ["leased"]
    caplog.clear()
    assert [word for _, word, _ in told(*history, verbose=True)] == ["submitted", "leased", "checkpointed"]


@pytest.mark.parametrize("kind", typing.get_args(events.AnyEvent), ids=lambda k: k.__struct_config__.tag)
@pytest.mark.parametrize("job_id", [1, 2])
def test_no_event_is_too_strange_to_be_told(caplog, kind, job_id):
    caplog.set_level(logging.DEBUG, logger="gpujobd")
    state = State()
    apply(state, submitted(), 1)
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    known = {"job_id": job_id, "reason": Reason.CRASH_LOOP, "why": YieldWhy.PAUSE, "priority": Priority.LOW}
    known |= {"lines": (1, 2), "checkpoint": Checkpoint(), "level": Priority.LOW}
    report.facts(state, [(2, kind(**{name: known.get(name, 1) for name in required}))], str)
    assert all(record.message_id for record in caplog.records)


def test_what_concerns_the_house_says_who_and_why(told):
    switch = {"stopped": True, "disabled": False, "draining": False}
    story = told(
        events.QueueSwitched(at_ns=2, by=7, message="new driver", **switch),
        events.QueueSwitched(at_ns=2, by=0, **(switch | {"stopped": False})),
        events.DiskFilled(at_ns=3, detail="12 bytes free"),
        events.DiskFreed(at_ns=4),
        events.DeviceFellIll(at_ns=5, device="cpu", reason="CanaryFailed", detail="line 3", retry_at_ns=9),
        events.DeviceRecovered(at_ns=6, device="cpu"),
        events.DeviceCrowded(at_ns=6, device="cpu", room_bytes=5, detail="others hold 3 GiB"),
        events.DeviceCleared(at_ns=6, device="cpu"),
        events.DriverMismatched(at_ns=6, device="cpu", detail="version mismatch"),
        events.HandlerLoaded(at_ns=7, device="cpu", handler="embed", load_ns=S_NS // 2),
    )
    assert story == [
        ("WARNING", "queue_switched", "the queue is stopped by alice: new driver"),
        ("WARNING", "queue_switched", "the queue is open by root"),
        ("ERROR", "disk_filled", "the disk is full, work waits: 12 bytes free"),
        ("INFO", "disk_freed", "there is disk space again, work goes on"),
        ("ERROR", "device_fell_ill", "device cpu is unhealthy: CanaryFailed: line 3"),
        ("INFO", "device_recovered", "device cpu is ok again"),
        ("WARNING", "device_crowded", "device cpu is busy elsewhere: others hold 3 GiB"),
        ("INFO", "device_cleared", "device cpu has room for every handler again"),
        ("ERROR", "driver_mismatched", "device cpu: the driver was replaced: version mismatch"),
        ("INFO", "handler_loaded", "embed loaded on cpu in 0.50 s"),
    ]


def test_a_job_that_is_removed_is_told_where_a_person_wanted_it(told):
    cancelled = events.Cancelled(at_ns=9, job_id=1, by=7)
    story = told(submitted(), cancelled, events.Removed(at_ns=9, job_id=1, by=7))
    assert story[-1] == ("INFO", "removed", "job 1 removed by alice")
    story = told(submitted(), cancelled, events.Removed(at_ns=9, job_id=1))
    assert story[-1][1] == "cancelled"
