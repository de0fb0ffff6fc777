"""Row 17: who tells others of events hangs with a mail server that hangs, and nobody else notices."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import far_ends
import pytest
from gpujobd import protocol
from harness import Host, fake
from test_fuzz import MEMORY_GROWTH_MAX, memory_bytes

pytestmark = pytest.mark.slow

JOBS = 40
FOLLOWERS = 3


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("far") / "host", "", {"echo": fake("toys:Echo")}) as host:
        yield host


@contextlib.contextmanager
def follower(host: Host, kind: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, far_ends.__file__, host.socket, kind, port]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"follows\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def work_and_ask(host: Host) -> list[float]:
    """Submit, finish and read back jobs; how long each of the answers in between took."""
    took = []
    with host.client() as client:
        for _ in range(JOBS):
            began = time.perf_counter()
            accepted = client.submit("echo", [{"n": 1}, {"n": 2}])
            took.append(time.perf_counter() - began)
            assert isinstance(accepted, protocol.Accepted), accepted
            (job,) = client.wait(accepted.job)
            assert (job.state, job.items.done) == ("completed", 2)
            assert len(client.output(accepted.job)) == 2
    return took


@pytest.mark.parametrize("day", far_ends.BAD_DAYS)
def test_a_far_end_on_a_bad_day_is_felt_by_its_follower_alone(host, day: str, count, record_property) -> None:
    kind, act = far_ends.BAD_DAYS[day]
    before = memory_bytes(host)
    with far_ends.far_end(act) as port, contextlib.ExitStack() as stack:
        for _ in range(FOLLOWERS):
            process = stack.enter_context(follower(host, kind, port))
        took = work_and_ask(host)
        assert process.poll() is None, "the follower gave up: nothing was tried"
    assert memory_bytes(host) - before < MEMORY_GROWTH_MAX
    record_property("slowest submission", f"{max(took) * 1000:.0f} ms")
    with host.client() as client:  # the events are all there for whoever comes later
        client.send(protocol.Events(id=1, since=1))
        numbers = []
        while isinstance(reply := client.receive(), protocol.EventSeen):
            numbers.append(reply.seq)
        assert numbers == list(range(1, len(numbers) + 1))
    count(17, FOLLOWERS)
