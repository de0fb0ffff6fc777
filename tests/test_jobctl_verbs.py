"""Every verb against a scripted daemon, in this process: what is asked, what is shown, how it ends."""

from __future__ import annotations

import datetime as dt
import json
import os

import pytest
from fake_daemon import Descriptor, FakeDaemon, HangUp, a_job
from gpujobd import protocol as p
from jobctl.__main__ import run
from jobctl.times import now


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBCTL_SOCKET", str(tmp_path / "s"))
    monkeypatch.delenv("COLUMNS", raising=False)
    with FakeDaemon(tmp_path / "s") as fake:
        yield fake


def soon(minutes):
    return now() + dt.timedelta(minutes=minutes, seconds=5)


ERROR = p.Error(id=0, code=p.ErrorCode.NO_SUCH_JOB, message="there is no job 9")


# --- looking ----------------------------------------------------------------------------------------------------


def status():
    """Made when it is asked for: its times are relative to now."""
    return p.StatusTable(
        id=0,
        switches=p.Switches(stopped=True, message="new driver"),
        devices=[p.DeviceView(name="cuda:0", state="ok", loaded=["embed"], job=41, hardware="NVIDIA H200")],
        running=[
            a_job(
                id=41,
                state="running",
                done=500,
                failed=2,
                total=50_000,
                forecast=p.Forecast(finish_at=soon(3)),
                timings=p.JobTimings(items_per_s=812.4),
            )
        ],
        waiting=[a_job(id=43, reason="FairShare", position=1, forecast=p.Forecast(start_at=soon(5)))],
        paused=2,
        queued_in_all=18,
    )


def test_alone_it_shows_what_runs_what_waits_why_and_until_when(daemon, capfd):
    daemon.answer(p.Status, status())
    assert run([]) == 0
    shown = capfd.readouterr().out
    assert "queue: stopped: nothing is started -- new driver" in shown
    assert "500/50,000" in shown
    assert "812 items/s" in shown
    assert "done in 3 min" in shown
    assert "FairShare" in shown
    assert "in 5 min" in shown
    assert "and 17 more in line" in shown
    assert "2 paused" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_status_in_json_holds_the_same(daemon, capfd):
    daemon.answer(p.Status, status())
    assert run(["--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["v"] == 1
    assert shown["running"][0]["items"] == {"total": 50_000, "done": 500, "failed": 2}
    assert shown["switches"] == {"stopped": True, "message": "new driver"}


def test_a_list_follows_the_pages_and_hides_final_jobs(daemon, capfd):
    def pages(call):
        if call.request.after:
            yield p.Jobs(id=call.request.id, jobs=[a_job(id=3)], seq=12)
        else:
            yield p.Jobs(id=call.request.id, jobs=[a_job(id=1), a_job(id=2)], seq=11, next=2)

    daemon.on(p.List, pages)
    assert run(["ls", "--mine", "--tenant", "alice", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert [job["id"] for job in shown["jobs"]] == [1, 2, 3]
    assert shown["seq"] == 11  # the older: what changed while the pages came is asked for again
    first, second = daemon.asked(p.List)
    assert (first.states, first.mine, first.tenant, second.after) == (
        ["running", "queued", "paused"],
        True,
        "alice",
        2,
    )


def test_a_list_of_all_states_asks_for_no_state(daemon):
    daemon.answer(p.List, p.Jobs(id=0, jobs=[], seq=1))
    assert run(["list", "--all"]) == 0
    assert run(["list", "--changed-since", "7"]) == 0
    assert run(["list", "--state", "failed", "--state", "expired"]) == 0
    assert [request.states for request in daemon.asked(p.List)] == [[], [], ["failed", "expired"]]
    assert daemon.asked(p.List)[1].changed_since == 7


def test_a_limit_holds_over_pages(daemon, capfd):
    jobs = [a_job(id=n) for n in range(1, 4)]
    daemon.on(
        p.List, lambda call: [p.Jobs(id=call.request.id, jobs=jobs[: call.request.limit], seq=1, next=9)]
    )
    assert run(["list", "--limit", "2"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 3


def test_a_list_fits_80_columns_and_shows_no_escape_of_a_stranger(daemon, capfd):
    job = a_job(name="\x1b]0;pwned\x07" + "n" * 90, handler="h" * 40, tenant="t" * 40, reason="FairShare")
    daemon.answer(p.List, p.Jobs(id=0, jobs=[job], seq=1))
    assert run(["list"]) == 0
    shown = capfd.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_one_job_is_a_bare_object_and_several_are_a_list(daemon, capfd):
    daemon.on(p.Show, lambda call: [p.OneJob(id=call.request.id, job=a_job(id=call.request.job))])
    assert run(["show", "42", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["id"] == 42
    assert run(["show", "3", "5-6", "--json"]) == 0
    assert [job["id"] for job in json.loads(capfd.readouterr().out)["jobs"]] == [3, 5, 6]


def test_show_tells_reason_times_and_items(daemon, capfd):
    job = a_job(
        state="paused",
        reason="CrashLoop",
        reason_detail="3 unclean stops",
        done=5,
        params={"normalize": True, "n": 1},
    )
    daemon.answer(p.Show, p.OneJob(id=0, job=job))
    assert run(["show", "42"]) == 0
    facts = dict(line.split(":", 1) for line in capfd.readouterr().out.splitlines())
    assert facts["reason"].strip() == "CrashLoop"
    assert facts["detail"].strip() == "3 unclean stops"
    assert facts["items"].strip() == "5 of 10 done (50 %)"
    assert facts["params"].strip() == "normalize=true n=1"
    assert "ago)" in facts["submitted"]


def test_of_several_jobs_a_missing_one_is_named_and_the_others_shown(daemon, capfd):
    def show(call):
        if call.request.job == 9:
            return [p.Error(id=call.request.id, code=p.ErrorCode.NO_SUCH_JOB, message="there is no job 9")]
        return [p.OneJob(id=call.request.id, job=a_job(id=call.request.job))]

    daemon.on(p.Show, show)
    assert run(["show", "8", "9"]) == 2
    shown = capfd.readouterr()
    assert shown.err == "jobctl: job 9: no_such_job: there is no job 9\n"
    assert shown.out.startswith("id:")


def test_at_asks_for_the_last_job(daemon, capfd):
    daemon.answer(p.Last, p.OneJob(id=0, job=a_job(id=7)))
    daemon.on(p.List, lambda call: [p.Jobs(id=call.request.id, jobs=[a_job(id=7), a_job(id=4)], seq=1)])
    daemon.on(p.Show, lambda call: [p.OneJob(id=call.request.id, job=a_job(id=call.request.job))])
    assert run(["show", "@", "@~1", "--json"]) == 0
    assert [job["id"] for job in json.loads(capfd.readouterr().out)["jobs"]] == [7, 4]


def test_handlers_tenants_and_devices_are_shown_as_tables_and_lists(daemon, capfd):
    handler = p.HandlerView(
        name="embed",
        entry="x:Y",
        params={
            "normalize": {"type": "bool", "default": True},
            "language": {"type": "str", "choices": ["en", "de"]},
        },
        loaded_on=["cuda:0"],
        load_s=1.9,
    )
    tenant = p.TenantView(
        name="alice", share=4.0, served_s=7500.0, owed_s=-12.0, queued=3, running=1, paused=0, items_left=1234
    )
    daemon.answer(p.Handlers, p.HandlerList(id=0, handlers=[handler]))
    daemon.answer(p.Tenants, p.TenantList(id=0, tenants=[tenant]))
    daemon.answer(p.Devices, p.DeviceList(id=0, devices=status().devices))
    for words, key, expected in (
        ("handlers", "handlers", "normalize=bool(true) language=str(en|de)"),
        ("tenants", "tenants", "2 h 05 min"),
        ("device", "devices", "NVIDIA H200"),
    ):
        assert run([words]) == 0
        shown = capfd.readouterr().out
        assert expected in shown
        assert max(map(len, shown.splitlines())) <= 80
        assert run([words, "--json"]) == 0
        assert len(json.loads(capfd.readouterr().out)[key]) == 1


GIB = 1 << 30


def test_device_page_tells_what_is_known_from_outside_and_who_holds_the_memory(daemon, capfd):
    seen = p.DeviceView(
        name="cuda:0",
        state="busy_elsewhere",
        loaded=["embed"],
        reason="OtherProcesses",
        reason_detail="other processes hold 70.0 GiB of 80.0 GiB: pid 9 70.0 GiB",
        memory_bytes=3 * GIB,
        memory_total_bytes=80 * GIB,
        hardware="NVIDIA H200",
        since=soon(-10),
        held=[p.HeldView(handler="embed", pid=4711, bytes=4 * GIB)],
        others=[p.OtherView(pid=9, bytes=70 * GIB, command="py\x1b[31m", user="bob"), p.OtherView(pid=8)],
        others_bytes=70 * GIB,
        memory_used_bytes=74 * GIB,
        utilisation=93.0,
        temperature_c=61.0,
        power_w=402.4,
        power_limit_w=700.0,
        throttled=["thermal"],
        driver="610.43",
        seen_at=soon(-1),
    )
    blind = p.DeviceView(name="cuda:1", state="ok", loaded=[], unseen="no NVML: no module pynvml")
    daemon.answer(p.Devices, p.DeviceList(id=0, devices=[seen, blind]))
    assert run(["device"]) == 0
    shown = capfd.readouterr().out
    for words in (
        "74.0 GiB of 80.0 GiB",  # of everybody, where that is known
        "busy_elsewhere since",
        "OtherProcesses: other processes hold 70.0 GiB of 80.0 GiB: pid 9 70.0 GiB",
        "driver 610.43",
        "93 % busy, 61 °C, 402 of 700 W, held back by thermal",
        "not ours: 70.0 GiB",
        "4711   4.0 GiB  handler embed",
        "9  70.0 GiB  not ours py\\x1b[31m  bob",
        "8         ?  not ours",
        "cuda:1\n  no NVML: no module pynvml",
    ):
        assert words in shown, shown
    assert "\x1b" not in shown


def test_device_without_anything_from_outside_is_a_row_and_nothing_else(daemon, capfd):
    daemon.answer(p.Devices, p.DeviceList(id=0, devices=[p.DeviceView(name="cpu", state="ok", loaded=[])]))
    assert run(["device"]) == 0
    assert capfd.readouterr().out == "DEVICE  STATE\ncpu     ok\n"


# --- changing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind", "fields"),
    [
        (["cancel", "3", "-m", "wrong"], p.Cancel, {"job": 3, "message": "wrong"}),
        (["pause", "3", "-m", "later"], p.Pause, {"job": 3, "message": "later"}),
        (["resume", "3"], p.Resume, {"job": 3}),
        (["priority", "3", "low"], p.SetPriority, {"job": 3, "priority": "low"}),
        (["first", "3"], p.First, {"job": 3}),
        (["rm", "3"], p.Remove, {"job": 3}),
        (["queue", "drain", "-m", "driver"], p.Queue, {"action": "drain", "message": "driver"}),
    ],
)
def test_a_verb_asks_what_it_says_and_is_quiet(daemon, capfd, words, kind, fields):
    daemon.answer(kind, p.Done(id=0))
    assert run(words) == 0
    (request,) = daemon.asked(kind)
    assert {key: getattr(request, key) for key in fields} == fields
    assert capfd.readouterr() == ("", "")


def test_a_bulk_verb_does_what_it_can_names_the_rest_and_exits_with_the_worst(daemon, capfd):
    def cancel(call):
        refusal = {
            4: (p.ErrorCode.BAD_STATE, "job 4 is completed"),
            5: (p.ErrorCode.FORBIDDEN, "job 5 is not yours"),
        }.get(call.request.job)
        if refusal:
            return [p.Error(id=call.request.id, code=refusal[0], message=refusal[1])]
        return [p.Done(id=call.request.id)]

    daemon.on(p.Cancel, cancel)
    assert run(["cancel", "3-6", "--json"]) == 4
    shown = capfd.readouterr()
    assert json.loads(shown.out)["done"] == [3, 6]
    assert [each["id"] for each in json.loads(shown.out)["failed"]] == [4, 5]
    assert shown.err.splitlines() == [
        "jobctl: job 4: bad_state: job 4 is completed",
        "jobctl: job 5: forbidden: job 5 is not yours",
    ]


def test_more_jobs_than_one_window_are_all_asked(daemon):
    daemon.answer(p.Cancel, p.Done(id=0))
    assert run(["cancel", "1-100"]) == 0
    assert [request.job for request in daemon.asked(p.Cancel)] == list(range(1, 101))


def test_a_change_whose_answer_is_lost_is_not_asked_twice(daemon, capfd):
    daemon.on(p.Cancel, lambda call: [HangUp()])
    assert run(["cancel", "3"]) == 3
    assert len(daemon.asked(p.Cancel)) == 1
    assert "whether it was done" in capfd.readouterr().err


def test_first_moves_the_first_named_last_so_that_it_stands_first(daemon):
    daemon.answer(p.First, p.Done(id=0))
    assert run(["first", "3", "7"]) == 0
    assert [request.job for request in daemon.asked(p.First)] == [7, 3]


def test_retry_prints_the_new_ids_and_keeps_its_submit_id_over_a_lost_answer(daemon, capfd):
    def retry(call):
        if call.connection == 1:
            return [HangUp()]
        return [p.Accepted(id=call.request.id, job=50)]

    daemon.on(p.Retry, retry)
    assert run(["retry", "42", "--failed-items"]) == 0
    assert capfd.readouterr().out == "50\n"
    first, second = daemon.asked(p.Retry)
    assert first == second
    assert first.failed_items


def test_a_level_that_is_none_is_a_usage_error(daemon):
    assert run(["priority", "3", "urgent"]) == 2
    assert daemon.requests == []


# --- reading back -----------------------------------------------------------------------------------------------


@pytest.fixture
def handed_out(daemon, tmp_path):
    """Makes the daemon hand out these bytes, of which `counted` count."""
    opened = []

    def hand_out(text: bytes, counted: int):
        path = tmp_path / "results"
        path.write_bytes(text)

        def give(call):
            opened.append(os.open(path, os.O_RDONLY))
            return [Descriptor(opened[-1]), p.File(id=call.request.id, bytes=counted)]

        daemon.on(p.Output, give)

    yield hand_out
    for fd in opened:
        os.close(fd)


def test_output_writes_exactly_what_counts(handed_out, capfd):
    handed_out(b'{"line": 1}\n{"line": 2}\n{"li', 24)
    assert run(["output", "42"]) == 0
    assert capfd.readouterr().out == '{"line": 1}\n{"line": 2}\n'


def test_output_goes_into_a_file_and_replaces_it(handed_out, tmp_path):
    handed_out(b"x" * 3_000_000, 2_999_999)
    (tmp_path / "out").write_bytes(b"y" * 4_000_000)
    assert run(["output", "42", "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == b"x" * 2_999_999


def test_output_that_is_shorter_than_what_counts_is_said(handed_out, capfd):
    handed_out(b"abc", 5)
    assert run(["output", "42"]) == 1
    assert "the file ends after 3 of 5 bytes" in capfd.readouterr().err


def test_no_descriptor_is_leaked(handed_out):
    handed_out(b"abc", 3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert run(["output", "42", "-o", "/dev/null"]) == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 10  # the fake's own: one a call, until the test ends


def test_errors_are_grouped_by_code_and_message(handed_out, daemon, capfd):
    records = [
        {"line": n, "error": {"code": "handler", "message": f"item 'x{n}' has {n} tokens", "tries": 1}}
        for n in range(1, 8)
    ]
    records += [{"line": 9, "error": {"code": "worker_lost", "message": "died"}}]
    text = b"".join(json.dumps(record).encode() + b"\n" for record in records) + b"broken\n"
    handed_out(text, len(text))
    assert run(["errors", "42", "--summary"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split() == ["7", "handler", "item", "'…'", "has", "N", "tokens", "1"]
    assert len(lines) == 4
    assert run(["errors", "42", "--summary", "--json"]) == 0
    groups = json.loads(capfd.readouterr().out)["groups"]
    assert (groups[0]["count"], groups[0]["code"], groups[0]["line"]) == (7, "handler", 1)
    assert daemon.asked(p.Output)[0].errors


def test_a_file_without_its_descriptor_is_no_file(daemon, capfd):
    daemon.answer(p.Output, p.File(id=0, bytes=3))
    assert run(["output", "42"]) == 3
    assert "sent no file" in capfd.readouterr().err


# --- failing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (p.ErrorCode.QUEUE_FULL, 6),
        (p.ErrorCode.FORBIDDEN, 4),
        (p.ErrorCode.NO_SUCH_JOB, 2),
        (p.ErrorCode.BAD_STATE, 2),
        (p.ErrorCode.TIMED_OUT, 3),
        (p.ErrorCode.INTERNAL, 3),
        ("a_code_of_tomorrow", 6),
    ],
)
def test_a_refusal_is_one_line_and_its_exit_code(daemon, capfd, code, exit_code):
    daemon.answer(p.Ping, p.Error(id=0, code=code, message="no\nmore\x1b[31m"))
    assert run(["ping"]) == exit_code
    assert capfd.readouterr() == ("", f"jobctl: {code}: no more\\x1b[31m\n")


def test_a_daemon_whose_journal_stays_dead_is_quoted_in_the_end(daemon, capfd, monkeypatch):
    monkeypatch.setattr("jobctl.connection.RECONNECT_S", 0.2)
    daemon.answer(p.Ping, p.Error(id=0, code=p.ErrorCode.NOT_ACCEPTED, message="who knows"))
    assert run(["ping"]) == 3
    assert capfd.readouterr().err == "jobctl: not_accepted: who knows\n"
    assert len(daemon.asked(p.Ping)) > 1


def test_a_connection_that_is_turned_away_says_why(daemon, capfd):
    daemon.welcome = p.Error(id=0, code=p.ErrorCode.TOO_MANY_CONNECTIONS, message="128 of 128 are in use")
    assert run(["ping"]) == 3
    assert capfd.readouterr().err == "jobctl: too_many_connections: 128 of 128 are in use\n"


def test_a_daemon_of_another_version_is_not_understood(daemon, capfd):
    daemon.welcome = p.Welcome(99, "gpujobd 99", "boot", 0)
    assert run(["ping"]) == 3
    assert "version 99" in capfd.readouterr().err


def test_an_answer_to_something_else_is_not_understood(daemon, capfd):
    daemon.answer(p.Ping, p.Done(id=0))
    assert run(["ping"]) == 3
    assert "'done' is no answer to that" in capfd.readouterr().err


def test_a_read_is_asked_again_when_its_answer_is_lost(daemon):
    daemon.on(
        p.Ping,
        lambda call: [HangUp()] if call.connection < 3 else [p.Pong(id=call.request.id, program="x", seq=1)],
    )
    assert run(["ping"]) == 0
    assert daemon.connections == 3
