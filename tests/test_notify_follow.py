"""The notifier beside a daemon: what it learns, what it makes of gaps, restarts and other pasts."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import far_ends
import pytest
from gpujobd import protocol as p
from gpujobd_notify import follower
from harness import ROOT, until
from mortal import locate
from notify_house import TARGETS, FarWeb, NotifyHost, fake_past

pytest.importorskip("httpx")


@pytest.fixture
def web():
    with FarWeb() as web:
        yield web


@pytest.fixture
def past(tmp_path):
    with fake_past(tmp_path / "s") as past:
        yield past


@pytest.fixture
def notifier(tmp_path, past):
    with NotifyHost(tmp_path / "n", past.daemon.path) as notifier:
        notifier.wait_until_it_follows()
        yield notifier


def wait_for(web, *facts):
    until(lambda: {*facts} <= web.facts(), f"{facts}, there are {web.facts()}")


def test_what_a_job_asked_for_is_told_and_nothing_else(past, notifier, web):
    past.submit(1, web.url("/a"), on=["start", "fail"])
    past.submit(2, web.url("/b"))
    past.submit(3)
    for job in (1, 2, 3):
        past.run(job, failed=1)
    wait_for(web, (1, "start"), (1, "fail"), (2, "finish"))
    assert web.facts() == {(1, "start"), (1, "fail"), (2, "finish")}
    assert {(path, body["data"]["job"]) for path, _, body in web.told} == {("/a", 1), ("/b", 2)}
    with notifier.client() as client:
        assert {n.state for n in client.notifications()} == {"delivered"}
    attend = past.attended[0]
    assert (attend.names, attend.url_hosts, attend.mail_domains) == ([], ["127.0.0.1"], [])


@pytest.mark.slow
def test_a_daemon_that_is_away_is_waited_for_and_nothing_is_missed(past, notifier, web):
    past.submit(1, web.url())
    past.stop()
    past.run(1)
    past.start()
    wait_for(web, (1, "finish"))


@pytest.mark.slow
def test_a_notifier_that_was_down_tells_what_it_missed(past, notifier, web):
    past.submit(1, web.url(), on=["start", "finish"])
    assert notifier.stop() == 0
    past.run(1)
    notifier.start()
    wait_for(web, (1, "start"), (1, "finish"))


def test_after_a_gap_what_is_due_is_derived_from_the_jobs(past, notifier, web):
    past.submit(1, web.url(), on=["start", "finish"])
    past.submit(2, web.url())
    with notifier.client() as client:
        until(lambda: client.ask_seq() >= past.seq, "both")
    notifier.stop()
    past.run(1)
    past.submit(3, web.url())
    past.run(3)
    past.run(2)
    past.add("removed", job=2)
    past.forget(past.add("daemon_stopping"))
    notifier.start()
    wait_for(web, (1, "start"), (1, "finish"), (3, "finish"), (2, "finish"))
    gone = next(body for _, _, body in web.told if body["data"]["job"] == 2)
    assert gone["data"]["state"] == "gone"
    past.submit(4, web.url())
    past.run(4)
    wait_for(web, (4, "finish"))
    assert len(web.told) == 5


@pytest.mark.parametrize("seen", [pytest.param("behind", marks=pytest.mark.slow), "another"])
def test_a_restored_daemon_is_noticed_and_its_new_past_is_told(past, notifier, web, seen):
    past.submit(1, web.url())
    past.run(1)
    wait_for(web, (1, "finish"))
    first_id = web.told[0][1]
    with notifier.client() as client:
        until(lambda: client.ask_seq() >= past.seq, "the end of the old past")
    past.stop()
    del past.events[1:]
    past.jobs.clear()
    for _ in range(9 if seen == "another" else 0):
        past.add("disk_freed")
    past.start()
    until(lambda: "was restored" in notifier.log(), "the notifier to see it")
    until(lambda: len(past.attended) >= 2, "it to come back")
    past.submit(1, web.url())
    past.run(1)
    until(lambda: len(web.told) == 2, "the same job of another past")
    assert web.told[1][1] != first_id


@pytest.mark.slow
def test_jobs_from_before_the_notifier_are_told_from_then_on(tmp_path, past, web):
    past.submit(1, web.url(), on=["start", "finish"])
    past.add("leased", job=1, attempt=1, device="cpu", level=1)
    past.submit(2, web.url())
    past.run(2)
    with NotifyHost(tmp_path / "n", past.daemon.path) as notifier:
        notifier.wait_until_it_follows()
        past.add("completed", job=1, attempt=1, checkpoint={"done": 10})
        wait_for(web, (1, "finish"))
        assert web.facts() == {(1, "finish")}


def test_a_reload_tells_the_daemon_what_can_be_reached_now(past, notifier, web):
    house = f'[endpoints.house]\nkind = "webhook"\nurl = "{web.url("/house")}"\nevery_job = true\n'
    past.submit(1)
    past.submit(5)
    past.run(5)
    with notifier.client() as client:
        until(lambda: client.ask_seq() >= past.seq, "what was before")
    notifier.configure(f'{TARGETS}\n{house}allow_networks = ["127.0.0.0/8"]\n')
    notifier.process.send_signal(signal.SIGHUP)
    until(lambda: len(past.attended) == 2, "it to attend anew")
    assert past.attended[1].names == ["house"]
    past.run(1)
    wait_for(web, (1, "finish"))
    notifier.configure("nonsense = 1\n")
    notifier.process.send_signal(signal.SIGHUP)
    until(lambda: "stays as it was" in notifier.log(), "the refusal")
    past.submit(2)
    past.run(2)
    wait_for(web, (2, "finish"))
    assert web.facts() == {(1, "finish"), (2, "finish")}, "what was over before is not told"


@pytest.mark.slow
def test_ill_devices_are_told_to_who_listens_for_them(tmp_path, past, web):
    house = f'[endpoints.house]\nkind = "webhook"\nurl = "{web.url()}"\non = ["device"]\n'
    config = f'{house}allow_networks = ["127.0.0.0/8"]\n'
    with NotifyHost(tmp_path / "n", past.daemon.path, config) as notifier:
        notifier.wait_until_it_follows()
        past.add("device_fell_ill", device="cuda:0", reason="CanaryFailed", detail="x", retry_at_ns=0)
        past.add("device_recovered", device="cuda:0")
        until(lambda: len(web.told) == 2, "both")
    assert sorted(body["data"]["state"] for _, _, body in web.told) == ["ill", "well"]
    assert {body["type"] for _, _, body in web.told} == {"device"}


@pytest.mark.slow
def test_a_second_notifier_on_the_same_state_is_refused(tmp_path, past, notifier):
    second = NotifyHost(notifier.folder, past.daemon.path)
    second.launch()
    assert second.process.wait(60) == 1
    assert "another notifier has" in notifier.log()


PLACES = [
    "store.Store.commit:before",
    "store.Store.commit:after",
    "store.Store.delivered:before",
    "store.Store.delivered:after",
    "store.Store.failed:before",
    "store.Store.failed:after",
    "webhook.post:before",
    "webhook.post:after",
    "follower.Follower._commit:before",
    "follower.Follower._take:after",
    "deliver.Deliveries._note:before",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_to_die_at_is_in_the_code(place):
    owner, name = locate("gpujobd_notify." + place.partition(":")[0])
    assert callable(getattr(owner, name))


def story(past, web, dice, jobs):
    """Jobs that run in a random order among each other; returns what must be told of them."""
    wanted, steps = set(), []
    for job in jobs:
        failed = dice.choice([0, 1])
        on = dice.choice([[], ["start", "fail"], ["finish", "pause"]])
        past.submit(job, web.url(f"/{job}"), on=on)
        kinds = on or ["finish"]
        steps.append([lambda j=job: past.add("leased", job=j, attempt=1, device="cpu", level=1)])
        wanted |= {(job, "start")} if "start" in kinds else set()
        if dice.random() < 0.5:
            steps[-1] += [
                lambda j=job: past.add("paused", job=j, reason="HeldByOwner"),
                lambda j=job: past.add("resumed", job=j),
            ]
            wanted |= {(job, "pause")} if "pause" in kinds else set()
        counts = {"done": 10 - failed, "failed": failed}
        steps[-1].append(lambda j=job, c=counts: past.add("completed", job=j, attempt=1, checkpoint=c))
        if "finish" in kinds or ("fail" in kinds and failed):
            wanted.add((job, "finish" if "finish" in kinds else "fail"))
    while steps:
        chosen = dice.choice(steps)
        chosen.pop(0)()
        steps = [left for left in steps if left]
        yield wanted
    yield wanted


def impatient(notifier, tmp_path, place="", call=1):
    """It tries again at once, and dies at that place, if there is one, while `fuse` is there."""
    plan, fuse = tmp_path / "plan", tmp_path / "fuse"
    waits = {
        "gpujobd_notify.schedule.WAITS_S": [0.05] * 50,
        "gpujobd_notify.breaker.FAILURES_MAX": 1000,
        "gpujobd_notify.follower.KNOWN_MAX": 2,  # so that what is in memory is forgotten and read again
    }
    death = {"at": f"gpujobd_notify.{place}", "call": call, "fuse": str(fuse)} if place else {}
    plan.write_text(json.dumps({"constants": waits} | death))
    program = ROOT / "tests" / "faults" / "mortal.py"
    notifier.program = [sys.executable, program, plan, "-m", "gpujobd_notify"]
    return fuse


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_a_death_at_any_place_loses_nothing_and_invents_nothing(tmp_path, past, web, place):
    dice = random.Random(place)
    flaky = iter([204, 500, 204, 204, 500] + [204] * 10_000)
    web.answer = lambda _: next(flaky)
    notifier = NotifyHost(tmp_path / "n", past.daemon.path)
    fuse = impatient(notifier, tmp_path, place, call=1 if "follower" in place or "commit" in place else 2)
    with notifier:
        notifier.wait_until_it_follows()
        fuse.touch()
        steps = story(past, web, dice, range(1, 9))
        wanted = next(steps)
        for _ in steps:
            time.sleep(0.01)
        assert notifier.process.wait(60) == -signal.SIGKILL, notifier.log()
        notifier.start()
        with notifier.client() as client:
            until(
                lambda: not client.notifications(states=["pending"]) and client.ask_seq() == past.seq,
                "all of it",
            )
            until(lambda: not client.notifications(states=["pending"]), "all of it")
    assert web.facts() == wanted
    assert_ids_are_of_facts(web)


def assert_ids_are_of_facts(web):
    """The same id at every repeat, and never for two facts."""
    by_id = {}
    for path, name, body in web.told:
        assert by_id.setdefault(name, (path, body["data"]["kind"], body["timestamp"])) == (
            path,
            body["data"]["kind"],
            body["timestamp"],
        )
    assert len({*by_id.values()}) == len(by_id)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.slow
def test_kills_of_either_at_random_moments_lose_nothing_and_invent_nothing(tmp_path, past, web, number):
    seed = int(os.environ.get("GPUJOBD_SEED", "0")) or random.randrange(1 << 32)
    print(f"GPUJOBD_SEED={seed}")
    dice = random.Random(seed)
    web.answer = lambda _: dice.choice([204, 204, 204, 503])
    notifier = NotifyHost(tmp_path / "n", past.daemon.path)
    impatient(notifier, tmp_path)
    with notifier:
        notifier.wait_until_it_follows()
        steps = story(past, web, dice, range(1, 30))
        wanted = next(steps)
        for step, _ in enumerate(steps):
            if step % 6 == 0:
                if dice.random() < 0.3:
                    past.stop()
                    past.start()
                else:
                    notifier.kill()
                    notifier.launch()
                    time.sleep(dice.random() * 0.8)
        notifier.kill()
        web.answer = lambda _: 204
        notifier.start()
        with notifier.client() as client:
            until(lambda: client.ask_seq() == past.seq, "the newest event")
            until(lambda: not client.notifications(states=["pending"]), "all of it")
    assert web.facts() == wanted
    assert_ids_are_of_facts(web)


@pytest.mark.slow
def test_what_waits_for_a_dead_far_end_waits_on_disk_and_not_in_memory(tmp_path, past):
    def memory_bytes():
        return int((Path("/proc") / str(notifier.process.pid) / "statm").read_text().split()[1]) * 4096

    with (
        far_ends.far_end(far_ends.BAD_DAYS["never answers"][1]) as port,
        NotifyHost(tmp_path / "n", past.daemon.path) as notifier,
    ):
        notifier.wait_until_it_follows()
        before = memory_bytes()
        for job in range(1, 5001):
            past.submit(job, f"http://127.0.0.1:{port}/{job}")
            past.add("cancelled", job=job, by=0)
        with notifier.client() as client:
            until(lambda: client.ask_seq() == past.seq, "all of it to be due")
            (view,) = client.ask(p.Notifications).endpoints
            assert view.in_flight <= 5
            assert view.queued == 5000
        assert memory_bytes() - before < 20_000_000


def test_a_daemon_that_was_stopped_while_systemd_listens_for_it_is_not_called(tmp_path):
    units, unit = tmp_path / "units", tmp_path / "gpujobd.socket"
    assert not follower.is_asleep(units, [unit])  # no systemd
    units.mkdir()
    assert not follower.is_asleep(units, [unit])  # nobody listens
    unit.touch()
    assert follower.is_asleep(units, [tmp_path / "none", unit])
    (units / "invocation:gpujobd.service").symlink_to("0123")
    assert not follower.is_asleep(units, [unit])
    assert follower.run_of_the_daemon(units) == "0123"
