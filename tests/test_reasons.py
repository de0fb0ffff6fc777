"""Each word for why a job waits: that it can come about, that it is the right one, and what it says it waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
from core_floor import Floor
from core_house import ALICE, BOB, CAROL, HANDLERS, ROOT, House
from gpujobd.core import inputs, policy
from gpujobd.core.model import S_NS, Priority, Reason, Rules, TenantRule

LONG = 40_000  # items: more than an hour of work

Story = Callable[[], tuple[House, int]]


def rules(**changes: Any) -> Rules:
    return Rules(handlers=HANDLERS, **changes)


def priority() -> tuple[House, int]:
    house = House(rules())
    for _ in range(4):
        house.submit(ROOT, priority=Priority.HIGH)
    return house, house.submit(ALICE)


def priority_in_its_own_line() -> tuple[House, int]:
    house = House(rules())
    for _ in range(4):
        house.submit(ALICE)
    return house, house.submit(ALICE)


def priority_of_what_runs() -> tuple[House, int]:
    house = House(rules())
    house.submit(ROOT, priority=Priority.HIGH)
    return house, house.submit(ALICE)


def fair_share() -> tuple[House, int]:
    floor = Floor(rules())
    for who in (ALICE, BOB):
        floor.submit(who, items=LONG)
    floor.run(45)  # alice had her turn, bob has his
    floor.submit(CAROL)
    return floor, 1


def fair_share_of_equals() -> tuple[House, int]:
    house = House(rules())
    house.submit(ALICE, items=LONG)
    house.submit(CAROL)
    house.now_ns += 10 * S_NS
    return house, house.submit(BOB)


def running_devices_max() -> tuple[House, int]:
    house = House(rules(tenants={"alice": TenantRule(running_devices_max=1)}), devices=("cuda:0", "cuda:1"))
    house.submit(ALICE, items=LONG)
    return house, house.submit(ALICE)


def resources() -> tuple[House, int]:
    house = House(rules())
    house.submit(ALICE, items=LONG)
    return house, house.submit(BOB)


def resources_that_are_being_given_back() -> tuple[House, int]:
    floor = Floor(rules())
    floor.submit(ALICE, items=LONG)
    job_id = floor.submit(BOB)
    floor.loaded()
    floor.wait(30)
    return floor, job_id


def swap() -> tuple[House, int]:
    floor = Floor(rules(), load_s={"embed": 10.0, "rerank": 10.0})
    floor.loaded(handler="rerank", load_s=10.0)
    floor.give(inputs.Unloaded(device="cpu", handler="rerank"))
    floor.submit(ALICE, items=LONG)
    job_id = floor.submit(BOB, handler="rerank")
    floor.run(50)
    return floor, job_id


def begin_time() -> tuple[House, int]:
    house = House(rules())
    return house, house.submit(begin_ns=house.now_ns + 90 * S_NS)


def held(who: inputs.Who, message: str = "") -> Story:
    def story() -> tuple[House, int]:
        house = House(rules())
        house.submit(BOB)
        job_id = house.submit(ALICE)
        house.give(inputs.Pause(who=who, job_id=job_id, message=message))
        return house, job_id

    return story


def switched(verb: inputs.QueueVerb, message: str = "") -> Story:
    def story() -> tuple[House, int]:
        house, job_id = resources()
        house.give(inputs.SwitchQueue(who=ROOT, verb=verb, message=message))
        return house, job_id

    return story


def daemon_stopping() -> tuple[House, int]:
    house = House(rules())
    house.submit(ALICE)
    job_id = house.submit(BOB)
    house.give(inputs.Stop())
    return house, job_id


def stopped_with_the_daemon() -> tuple[House, int]:
    house = House(rules())
    job_id = house.submit(ALICE)
    house.give(inputs.Stop())
    house.give_back()
    return house, job_id


def backoff() -> tuple[House, int]:
    house = House(rules())
    job_id = house.submit(ALICE)
    for _ in range(2):
        house.lose()
    return house, job_id


def handler_failing() -> tuple[House, int]:
    house = House(rules())
    job_id = house.submit(BOB, handler="ocr")
    house.give(inputs.LoadFailed(device="cpu", attempt=house.lease().attempt, used_ns=0, error="no model"))
    return house, job_id


def handler_gone() -> tuple[House, int]:
    house, job_id = resources()
    house.rules = Rules(handlers={"ocr": HANDLERS["ocr"]})
    return house, job_id


def disk_full() -> tuple[House, int]:
    house, job_id = resources()
    house.give(inputs.DiskSpace(full=True, detail="no space left in the spool"))
    return house, job_id


def device_unhealthy() -> tuple[House, int]:
    house = House(rules())
    house.submit()
    house.give(inputs.Unkillable(device="cpu", detail="process 7 lives on"))
    house.lose("silent")
    return house, house.submit()


def no_device() -> tuple[House, int]:
    house = House(rules(), devices=())
    return house, house.submit()


def device_busy_elsewhere() -> tuple[House, int]:
    house = House(rules(), devices=("cuda:0",))
    detail = "other processes hold 80.0 GiB of 80.0 GiB"
    house.give(inputs.DeviceSeen(device="cuda:0", room_bytes=0, total_bytes=80 << 30, detail=detail))
    return house, house.submit()


def device_both_ill_and_busy_elsewhere() -> tuple[House, int]:
    """On trial, with words of a worker that quote an item."""
    house, job_id = device_busy_elsewhere()
    house.give(inputs.Unkillable(device="cuda:0", detail="a secret of somebody"))
    house.wait(3600)
    return house, job_id


def driver_replaced() -> tuple[House, int]:
    house = House(rules(), devices=("cuda:0",))
    house.give(inputs.DeviceSeen(device="cuda:0", trouble="DriverMismatch", detail="version mismatch"))
    return house, house.submit()


def crash_loop() -> tuple[House, int]:
    house = House(rules())
    job_id = house.submit()
    for boot in range(3):
        house.loaded()
        if boot == 0:
            house.checkpoint(1)
        house.give(inputs.Start(boot_id=str(boot), version="1", devices=("cpu",)))
    return house, job_id


def output_damaged() -> tuple[House, int]:
    house = House(rules())
    job_id = house.submit()
    house.loaded()
    house.lose("output_damaged", detail="results.jsonl has 3 of 10 bytes")
    return house, job_id


STORIES: Final[list[tuple[Story, Reason, str]]] = [
    (priority, Reason.PRIORITY, "a job of root and 2 more are ahead at level high"),
    (priority_in_its_own_line, Reason.PRIORITY, "job 2 and 2 more are ahead"),
    (priority_of_what_runs, Reason.PRIORITY, "cpu runs a job of root at level high"),
    (fair_share, Reason.FAIR_SHARE, "carol is owed 17 s"),
    (fair_share_of_equals, Reason.FAIR_SHARE, "carol is next at an equal share"),
    (running_devices_max, Reason.RUNNING_DEVICES_MAX, "alice runs on 1 devices, allowed are 1"),
    (resources, Reason.RESOURCES, "cpu runs a job of alice"),
    (
        resources_that_are_being_given_back,
        Reason.RESOURCES,
        "cpu runs a job of alice, which was asked to yield",
    ),
    (swap, Reason.SWAP, "rerank is loaded after 150 s more of embed"),
    (begin_time, Reason.BEGIN_TIME, "begins in 90 s"),
    (held(ALICE), Reason.HELD_BY_OWNER, "until somebody resumes it"),
    (held(ALICE, "wrong model"), Reason.HELD_BY_OWNER, "wrong model"),
    (held(ROOT), Reason.HELD_BY_ADMIN, "until an administrator resumes it"),
    (switched(inputs.QueueVerb.STOP), Reason.QUEUE_STOPPED, "until an administrator starts the queue"),
    (switched(inputs.QueueVerb.STOP, "new driver"), Reason.QUEUE_STOPPED, "new driver"),
    (switched(inputs.QueueVerb.DRAIN), Reason.DRAINING, "until an administrator starts the queue"),
    (daemon_stopping, Reason.DAEMON_STOPPING, "gpujobd is stopping, the job waits for its next start"),
    (stopped_with_the_daemon, Reason.DAEMON_STOPPING, "until gpujobd starts again, or somebody resumes it"),
    (backoff, Reason.BACKOFF, "lost 2 workers in a row, next try in 1 s"),
    (handler_failing, Reason.HANDLER_FAILING, "handler ocr failed to load, next try in 2 s: no model"),
    (handler_gone, Reason.HANDLER_FAILING, "handler embed is not configured"),
    (disk_full, Reason.DISK_FULL, "no space left in the spool"),
    (device_unhealthy, Reason.DEVICE_UNHEALTHY, "cpu: WorkerUnkillable, next try in 60 s"),
    (no_device, Reason.DEVICE_UNHEALTHY, "there is no device"),
    (
        device_busy_elsewhere,
        Reason.DEVICE_BUSY_ELSEWHERE,
        "cuda:0: other processes hold 80.0 GiB of 80.0 GiB",
    ),
    (
        device_both_ill_and_busy_elsewhere,
        Reason.DEVICE_BUSY_ELSEWHERE,
        "cuda:0: other processes leave 0.0 GiB",
    ),
    (driver_replaced, Reason.DEVICE_UNHEALTHY, "cuda:0: version mismatch"),
    (crash_loop, Reason.CRASH_LOOP, "running at 3 unclean stops in a row, each time after line 1"),
    (output_damaged, Reason.OUTPUT_DAMAGED, "results.jsonl has 3 of 10 bytes"),
]
OF_FAILED_JOBS: Final = {Reason.FAILURES_MAX, Reason.INPUT_LOST}


@pytest.mark.parametrize(("story", "reason", "detail"), STORIES)
def test_a_job_that_waits_says_for_what(story: Story, reason: Reason, detail: str) -> None:
    house, job_id = story()
    assert policy.waiting_reason(house.state, house.rules, house.job(job_id), house.now_ns) == (
        reason,
        detail,
    )


def test_every_word_has_its_story() -> None:
    assert {reason for _, reason, _ in STORIES} == {*Reason} - OF_FAILED_JOBS
