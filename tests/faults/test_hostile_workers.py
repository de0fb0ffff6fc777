"""Row 16: workers that freeze, spin, crash, vanish, starve, shout and lie; and one that is left in peace."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import mortal
import pytest
from campaign import ended, read_events
from gpujobd import protocol
from harness import Client, Host, fake, until

pytestmark = pytest.mark.slow

CONFIG = "[worker]\nsilent_timeout_s = 4.0\nstall_timeout_s = 3.0\ncheckpoint_s = 0.05\n"
QUICK = {
    "gpujobd.worker.DUMP_S": 0.2,
    "gpujobd.worker.TERMINATE_S": 0.3,
}  # else ten seconds a worker that hangs

# what the handler does (tests/handlers/hostile.py): what it costs the item
COSTS = {
    "segfault": "",
    "vanish": "",
    "freeze": "",
    "spin": "",
    "orphan": "",
    "flood": "",
    "garbage": "",
    "oversize": "",
    "half": "",
    "twice": "",
    "late": "",
    "stale": "",
    "early": "",
    "lie": "",
    "backwards": "",
    "memory": "out_of_memory",
    "poison": "worker_lost",
}
HARMLESS = frozenset({"flood", "late", "memory"})  # the worker lives on


@pytest.mark.parametrize("do", COSTS)
def test_a_worker_that_misbehaves_costs_no_other_item(tmp_path, cases, count, do: str) -> None:
    folder, side = tmp_path / "host", tmp_path / "side"
    side.mkdir()
    host = Host(folder, CONFIG, {"hostile": fake("hostile:Hostile", batch_max=8, params={"side": str(side)})})
    (folder / "plan.json").write_text(json.dumps({"constants": QUICK}))
    host.program = [sys.executable, mortal.__file__, folder / "plan.json", "-m", "gpujobd"]
    with ended(host):
        host.start()
        with host.client() as client, host.client() as witness:
            for seed in cases(4):
                suffer(client, witness, random.Random(seed), do)
                if do == "orphan":
                    check_orphans_are_gone(side)
                count(16)
            assert isinstance(witness.ask(protocol.Ping), protocol.Pong)
        assert host.process.poll() is None
        assert "Traceback" not in host.log(), host.log()


def suffer(client: Client, witness: Client, rng: random.Random, do: str) -> None:
    """One job with one bad item: all others are done, once and in order."""
    size = rng.randrange(1, 40)
    bad = rng.randrange(size)
    name = f"{rng.getrandbits(40):x}"
    items = [{"text": f"{name}-{n}"} for n in range(size)]
    items[bad] |= {"do": do, "of": size}
    job = client.submit("hostile", items).job
    assert isinstance(witness.ask(protocol.Ping), protocol.Pong)
    (final,) = client.wait(job)
    lost = [bad + 1] if COSTS[do] else []
    where = f"{do} at {bad + 1} of {size}: {final}"
    assert final.state == "completed", where
    assert (final.items.done, final.items.failed) == (size - len(lost), len(lost)), where
    if do not in HARMLESS:
        assert final.interruptions, where
    output = client.output(job)
    assert [r["line"] for r in output] == [n for n in range(1, size + 1) if n not in lost], where
    assert [r["output"]["text"] for r in output] == [items[r["line"] - 1]["text"] for r in output], where
    errors = client.output(job, errors=True)
    assert [(e["line"], e["error"]["code"]) for e in errors] == [(n, COSTS[do]) for n in lost], where


def check_orphans_are_gone(side: Path) -> None:
    pids = [int(path.read_text()) for path in side.glob("orphan*") if path.stat().st_size]
    assert pids
    for pid in pids:
        until(lambda: not is_worker(pid), f"process {pid} to be killed")  # noqa: B023


def is_worker(pid: int) -> bool:
    """Whether it lives, and is no other process that got its number."""
    try:
        return b"gpujobd_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_left_in_peace_outlive_the_thread_that_started_them(tmp_path, count) -> None:
    """A worker that is tied to a thread dies when the daemon's pool lets that thread go, after ten idle seconds."""
    handlers = {name: fake("trouble:Slow", batch_max=4, params={"item_s": 0.1}) for name in ("one", "two")}
    host = Host(tmp_path / "host", "[limits]\ndisk_free_bytes_min = 0\n", handlers)
    with ended(host):
        host.start()
        busy = [threading.Thread(target=occupy_threads, args=(host,)) for _ in range(4)]
        for thread in busy:
            thread.start()
        with host.client() as client:
            first = client.submit("one", [{"text": "a"}]).job
            client.wait(first)
            quiet = client.submit("two", [{"text": str(n)} for n in range(140)]).job
            for thread in busy:
                thread.join()
            (final,) = client.wait(quiet)  # fourteen seconds
            assert final.items.done == 140
            events, _ = read_events(client)
            told = [event["event"] for event in events.values()]
            assert "worker_gone" not in told, told
            assert "lease_lost" not in told, told
            assert host.stop() == 0
    count(16)


def occupy_threads(host: Host) -> None:
    """Inputs on their way in: each piece is written in a thread, so that there are several."""
    with host.client() as client, contextlib.suppress(ConnectionError):
        for _ in range(5):
            client.submit("nobody", [{"text": "x" * 1000}] * 300)
            client.submit("one", [{"text": "x" * 1000}] * 300, input_sha256=os.urandom(32))
            time.sleep(0.05)
