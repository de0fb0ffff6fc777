"""Row 18: SIGTERM at random moments, among clients and workers; SIGTERM twice; a loop or a disk that hangs."""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import mortal
import pytest
from campaign import Campaign, ended, kill
from gpujobd import protocol
from harness import HANG_S, Host, fake, hosted, until

pytestmark = pytest.mark.slow

STOPS = 4  # of one daemon
WATCHDOG_S = 1.5


@pytest.mark.parametrize("block", range(3))
def test_sigterm_at_a_random_moment_wastes_nothing_that_was_computed(
    tmp_path, cases, count, block: int
) -> None:
    for seed in cases(4):
        rng = random.Random(seed)
        side = tmp_path / f"{seed}.side"
        handler = fake("toys:Count", batch_max=8, params={"side": str(side), "call_s": 0.004})
        host = Host(tmp_path / str(seed), "[worker]\ncheckpoint_s = 0.02\n", {"count": handler})
        with ended(host), Campaign(host, rng) as campaign:
            for _ in range(STOPS):
                host.start()
                campaign.hold_to_it()
                campaign.begin()
                time.sleep(rng.uniform(0.0, 0.6))
                assert host.stop() == 0, host.log()
                campaign.end()
                count(18)
            host.start()
            campaign.hold_to_it()
            campaign.settle()
            assert host.stop() == 0
            assert "did not end within" not in host.log()  # every pause was at a batch's end
            assert "Traceback" not in host.log(), host.log()
            check_side(side)


def check_side(side: Path) -> None:
    """Every item was computed once at most, whatever stopped its job."""
    texts = (
        side.read_text().splitlines() if side.exists() else []
    )  # none: every job was cancelled before its turn
    twice = [text for text, times in Counter(texts).items() if times > 1]
    assert not twice, twice


def test_an_output_that_sigterm_interrupted_is_the_same_to_the_byte(tmp_path, cases, count) -> None:
    for seed in cases(6):
        rng = random.Random(seed)
        items = [{"text": f"{seed} {n}"} for n in range(400)]
        handler = fake("toys:Count", batch_max=8, params={"call_s": 0.01})
        host = Host(tmp_path / str(seed), "", {"count": handler})
        with ended(host):
            host.start()
            with host.client() as client:
                broken = client.submit("count", items).job
            for _ in range(2):
                time.sleep(rng.uniform(0.05, 0.4))
                assert host.stop() == 0
                count(18)
                host.start()
            with host.client() as client:
                client.wait(broken)
                whole = client.submit("count", items).job
                client.wait(whole)
                assert client.raw_output(broken) == client.raw_output(whole) != b""


def test_a_second_sigterm_ends_a_batch_that_does_not_end(tmp_path, cases, count) -> None:
    for seed in cases(3):
        rng = random.Random(seed)
        handler = fake("trouble:Slow", batch_max=64, params={"item_s": 5.0})
        with hosted(tmp_path / str(seed), slow=handler) as host:
            with host.client() as client:
                job = client.submit("slow", [{"text": str(n)} for n in range(64)]).job
                until(lambda: client.job(job).state == "running", "the lease")  # noqa: B023
            host.process.send_signal(signal.SIGTERM)
            time.sleep(rng.uniform(0.0, 0.3))
            assert host.stop() == 0  # within HANG_S; the batch takes longer
            assert HANG_S < 64 * 5
            host.start()
            with host.client() as client:
                assert client.job(job).state in ("queued", "running")
                assert client.job(job).items.done == 0
            kill(host)
            count(18)


# --- systemd's watchdog -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "stuck"),
    [
        ("gpujobd.server.Server._ping:before", ""),  # the loop: it cannot even say so
        ("gpujobd.disk.Disk.fdatasync:before", "stuck: "),
    ],
)
def test_what_hangs_in_the_daemon_starves_the_watchdog(tmp_path, count, at: str, stuck: str) -> None:
    folder = tmp_path / "host"
    host = Host(folder, "", {"count": fake("toys:Count")})
    plan, fuse = folder / "plan.json", folder / "fuse"
    plan.write_text(
        json.dumps(
            {
                "at": at,
                "how": "hang",
                "fuse": str(fuse),
                "constants": {"gpujobd.watchdog.STUCK_S": WATCHDOG_S / 2},
            }
        )
    )
    host.program = [sys.executable, mortal.__file__, plan, "-m", "gpujobd"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ended(host):
        systemd.bind(str(tmp_path / "notify"))
        host.environment = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6)),
        }
        host.start()
        assert told(systemd, 3 * WATCHDOG_S).count("WATCHDOG=1") >= 3
        fuse.touch()
        with host.client() as client:
            client.send(protocol.Ping(id=1))
            client.send(protocol.Queue(id=2, action="stop"))
            until(lambda: not fuse.exists(), "the hang")
            meanwhile = told(systemd, WATCHDOG_S)  # what was said before, and while nobody could know
            after = told(systemd, 2 * WATCHDOG_S)
        assert "WATCHDOG=1" not in after, after
        assert stuck in meanwhile + after, meanwhile + after
        kill(host)
    count(18)


def told(systemd: socket.socket, for_s: float) -> str:
    """All that the daemon tells systemd in that time."""
    until_at = time.monotonic() + for_s
    heard = []
    while (left := until_at - time.monotonic()) > 0:
        systemd.settimeout(left)
        try:
            heard.append(systemd.recv(4096).decode())
        except TimeoutError:
            break
    return "\n".join(heard)
