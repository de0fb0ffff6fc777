"""Row 7: kill -9 of the whole daemon, among clients and workers: at random times, and at named places in the code."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path

import mortal
import pytest
from campaign import Campaign, answers_or_died, ended, kill, wait_for_death
from failpoints import FAILPOINTS, START, STOP, Failpoint
from harness import Host, fake, until

pytestmark = pytest.mark.slow

# Small rooms, so that what happens once in days happens every second: rolls, snapshots, segments that are dropped.
SMALL = {
    "segment_bytes": 128 << 10,
    "constants": {
        "gpujobd.janitor.LOOK_S": 0.05,
        "gpujobd.janitor.SNAPSHOT_EVENTS": 100,
        "gpujobd.janitor.SNAPSHOT_BYTES": 256 << 10,
    },
}
LIVES = 5
BLOCKS = 6
CONFIG = """
[worker]
checkpoint_s = 0.02
[limits]
events_bytes_max = {events_bytes_max}
"""


def make_host(folder: Path, plan: dict | None = None) -> Host:
    """A daemon and workers that are mortal by `plan`, which may be replaced between two lives; None: real ones."""
    handler = {"batch_max": 8, "params": {"call_s": 0.004}}
    if plan is None:
        return Host(
            folder, CONFIG.format(events_bytes_max=256_000_000), {"count": fake("toys:Count", **handler)}
        )
    folder.mkdir()
    path = folder / "plan.json"
    python = mortal.interpreter(path, folder / "python")
    count = fake("toys:Count", python=str(python), **handler)
    host = Host(folder, CONFIG.format(events_bytes_max=500_000), {"count": count})
    host.program = [sys.executable, mortal.__file__, path, "-m", "gpujobd"]
    path.write_text(json.dumps(plan))
    return host


# --- at random times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("rooms", ["real", "small"])
def test_kill_9_at_random_times_breaks_no_promise(tmp_path, cases, count, rooms: str, block: int) -> None:
    for seed in cases(5):
        rng = random.Random(seed)
        host = make_host(tmp_path / str(seed), SMALL if rooms == "small" else None)
        with ended(host), Campaign(host, rng) as campaign:
            for _ in range(LIVES):
                (live_and_die if rng.random() < 0.9 else die_while_getting_up)(campaign, rng)
                count(7)
            host.start()
            campaign.hold_to_it()
            campaign.settle()
            assert host.stop() == 0
            assert "Traceback" not in host.log(), host.log()


def live_and_die(campaign: Campaign, rng: random.Random) -> None:
    host = campaign.host
    host.start()
    campaign.hold_to_it()
    if rng.random() < 0.2:
        campaign.call_jobctl()
    campaign.begin()
    time.sleep(rng.uniform(0.0, 0.4))
    kill(host)
    campaign.end()


def die_while_getting_up(campaign: Campaign, rng: random.Random) -> None:
    campaign.host.launch()
    time.sleep(rng.uniform(0.0, 0.5))
    kill(campaign.host)


# --- at named places --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(BLOCKS))
def test_death_at_a_named_place_breaks_no_promise(tmp_path, cases, count, block: int) -> None:
    points = FAILPOINTS[block::BLOCKS]
    for seed in cases(len(points)):  # seeds follow each other: every place has its turn
        rng = random.Random(seed)
        point = points[seed % len(points)]
        print(point)
        host = make_host(tmp_path / str(seed), SMALL)
        with ended(host), Campaign(host, rng) as campaign:
            if point.phase == START:
                live_and_die(campaign, rng)
            die_at(point, campaign, rng)
            count(7)
            arm(host, SMALL)
            host.start()
            campaign.hold_to_it()
            campaign.settle()
            assert host.stop() == 0
            assert "Traceback" not in host.log(), host.log()


def arm(host: Host, plan: dict) -> None:
    (host.folder / "plan.json").write_text(json.dumps(plan))


def die_at(point: Failpoint, campaign: Campaign, rng: random.Random) -> None:
    host, fuse = campaign.host, campaign.host.folder / "fuse"
    how = rng.choice(["kill", "power"])
    plan = {"at": point.at, "call": rng.randint(1, point.calls), "how": how, "fuse": str(fuse)}
    arm(host, SMALL | plan)
    if point.phase == START:
        fuse.touch()
    host.launch()
    if answers_or_died(host):
        if point.phase != START:
            fuse.touch()
            campaign.begin()
        if point.phase == STOP:
            time.sleep(rng.uniform(0.0, 0.3))
            host.process.send_signal(signal.SIGTERM)
        until(lambda: not fuse.exists() or host.process.poll() is not None, f"a run to get to {plan}")
        if point.at.startswith("gpujobd_worker.") and how == "kill":
            time.sleep(rng.uniform(0.0, 0.2))  # the daemon notices, or not yet
            kill(host)
    assert wait_for_death(host), f"{plan}: {host.process.poll()}\n{host.log()}"
    campaign.end()
    assert not fuse.exists(), plan
