"""Row 17: the notifier meets mail and web servers on a bad day. They are felt by what goes to them, and by nobody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import far_ends
import pytest
from gpujobd import protocol
from harness import Host, fake, until
from notify_house import FarWeb, NotifyHost
from test_fuzz import MEMORY_GROWTH_MAX, memory_bytes

pytestmark = pytest.mark.slow
pytest.importorskip("httpx")

JOBS = 40
DELIVERS = {"answers with ten megabytes"}  # after its 200: nobody reads the rest
ALERT = ["finish", "start"]


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("far") / "host", "", {"echo": fake("toys:Echo")}) as host:
        yield host


def notifier_of(folder: Path, host: Host, port: int) -> NotifyHost:
    config = f"""
        [targets]
        url_hosts = ["127.0.0.1"]
        mail_domains = ["far.end"]
        allow_networks = ["127.0.0.0/8"]
        [webhooks]
        timeout_s = 2
        [mail]
        host = "127.0.0.1"
        port = {port}
        security = "none"
        timeout_s = 2
    """
    return NotifyHost(folder, host.socket, config)


def work_and_ask(host: Host, *targets: str) -> tuple[list[int], list[float]]:
    """Submit, finish and read back jobs; how long each of the answers in between took."""
    jobs, took = [], []
    with host.client() as client:
        for _ in range(JOBS):
            began = time.perf_counter()
            accepted = client.submit("echo", [{"n": 1}, {"n": 2}], notify=list(targets), notify_on=ALERT)
            took.append(time.perf_counter() - began)
            assert isinstance(accepted, protocol.Accepted), accepted
            (job,) = client.wait(accepted.job)
            assert (job.state, job.items.done) == ("completed", 2)
            assert len(client.output(accepted.job)) == 2
            jobs.append(accepted.job)
    return jobs, took


@pytest.mark.parametrize("day", far_ends.BAD_DAYS)
def test_a_far_end_on_a_bad_day_is_felt_by_what_goes_there(
    host, tmp_path, day: str, count, record_property
) -> None:
    kind, act = far_ends.BAD_DAYS[day]
    before = memory_bytes(host)
    with (
        far_ends.far_end(act) as port,
        FarWeb() as web,
        notifier_of(tmp_path / "n", host, port) as notifier,
    ):
        notifier.wait_until_it_follows()
        bad = "mailto:somebody@far.end" if kind == "mail" else f"http://127.0.0.1:{port}/"
        jobs, took = work_and_ask(host, bad, web.url())
        until(
            lambda: web.facts() == {(job, word) for job in jobs for word in ALERT}, "the far end that is well"
        )
        with notifier.client() as client:
            until(lambda: bad_ones(client, bad, day), "the one that is not to be tried")
            assert all(view.in_flight <= 5 for view in client.endpoints().values())
        assert notifier.stop() == 0, notifier.log()
    assert memory_bytes(host) - before < MEMORY_GROWTH_MAX
    record_property("slowest submission", f"{max(took) * 1000:.0f} ms")
    count(17, 2 * JOBS)


def bad_ones(client, target: str, day: str) -> bool:
    """Whether it was tried, with the outcome of such a day: nothing is delivered that was not taken."""
    shown = [view for view in client.notifications(all=True) if view.target == target]
    delivered = [view for view in shown if view.state == "delivered"]
    if day in DELIVERS:
        return len(delivered) == 2 * JOBS
    assert delivered == []
    assert {view.state for view in shown} <= {"pending", "failed"}
    return len(shown) == 2 * JOBS and any(view.tries for view in shown)
