"""A whole lease over a real pipe: what comes in, what comes out, in which order."""

from __future__ import annotations

import ast
import hashlib
import pathlib
import signal
import sys

import pytest
from worker_driver import HANDLERS, HANG_LIMIT_S, ROOT, Job, WorkerDriver

PACKAGE = ROOT / "daemon" / "gpujobd_worker"


def texts(count: int) -> list[dict]:
    return [{"custom_id": f"a{i}", "text": f"text {i}"} for i in range(1, count + 1)]


@pytest.fixture
def worker():
    with WorkerDriver() as driver:
        yield driver


def test_finished_job_has_one_record_a_line_in_input_order(worker, tmp_path):
    worker.load("toys:Echo", params={"model": "m"})
    job = Job(tmp_path / "job", texts(100))
    last = worker.run(job, job_params={"normalize": True})
    assert last["type"] == "finished"
    assert last["checkpoint"]["upto"] == last["checkpoint"]["done"] == 100
    assert [record["line"] for record in job.results()] == list(range(1, 101))
    assert job.results()[6] == {
        "line": 7,
        "custom_id": "a7",
        "output": {
            "item": {"custom_id": "a7", "text": "text 7"},
            "params": {"model": "m"},
            "job_params": {"normalize": True},
        },
    }
    assert job.bytes_of("results").startswith(b'{"line": 1, "custom_id": "a1", "output": {')
    assert job.bytes_of("errors") == b""


def test_hello_comes_first_and_loaded_tells_the_hardware(worker):
    loaded = worker.load("toys:Echo")
    hello = worker.seen[0]
    assert hello["type"] == "hello"
    assert hello["pid"] == worker.process.pid
    assert hello["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert loaded["load_s"] >= 0
    assert loaded["device_bytes"] > 1 << 28
    assert loaded["hardware"]


def test_several_leases_in_a_row_are_run_by_one_worker(worker, tmp_path):
    worker.load("toys:Echo")
    for number in range(3):
        job = Job(tmp_path / str(number), texts(20))
        assert worker.run(job)["type"] == "finished"
        assert len(job.results()) == 20


def test_item_without_custom_id_has_none_in_its_record(worker, tmp_path):
    worker.load("toys:Echo")
    given = [{"text": "a"}, {"text": "b", "custom_id": None}, {"custom_id": 5}, {"custom_id": ["no"]}]
    job = Job(tmp_path / "job", given)
    worker.run(job)
    assert [record.get("custom_id", "absent") for record in job.results()] == [
        "absent",
        "absent",
        5,
        "absent",
    ]


def test_retry_records_quote_the_original_lines(worker, tmp_path):
    worker.load("faults:Faulty")
    job = Job(tmp_path / "job", [{"text": "a"}, {"text": "b", "do": "reject"}, {"text": "c"}])
    (job.folder / "lines").write_text("7\n900\n49999\n")
    worker.run(job)
    assert [record["line"] for record in job.results()] == [7, 49999]
    assert [record["line"] for record in job.errors()] == [900]


BROKEN_LINES = {
    b"": "blank",
    b"   ": "blank",
    b"{": "Expecting property name",
    b'{"a": 1} {"b": 2}': "Extra data",
    b'{"a": 1},{"b": 2}': "Extra data",
    b'{"a": [{}': "delimiter",
    b"{}]}": "Extra data",
    b"[1, 2]": "not a JSON object but list",
    b'"text"': "not a JSON object but str",
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": -Infinity}': "-Infinity is not JSON",
    b'{"a": "\xff"}': "utf-8",
    b'\xef\xbb\xbf{"a": 1}': "byte order mark",
    b'{"a": "tab\there"}': "control character",
    b"[" * 100_000: "nested too deeply",
    b'{"a": ' + b"9" * 5000 + b"}": "digits",
}


def test_broken_lines_fail_alone_and_say_why(worker, tmp_path):
    worker.load("toys:Echo")
    lines: list = []
    for line in BROKEN_LINES:
        lines += [line, b' {"text": "fine"}\r']
    job = Job(tmp_path / "job", lines)
    last = worker.run(job)
    assert last["checkpoint"]["failed"] == len(BROKEN_LINES)
    assert [record["line"] for record in job.errors()] == list(range(1, 2 * len(BROKEN_LINES), 2))
    for record, why in zip(job.errors(), BROKEN_LINES.values(), strict=True):
        assert record["error"]["code"] == "bad_json"
        assert why in record["error"]["message"]
    assert [record["output"]["item"] for record in job.results()] == [{"text": "fine"}] * len(BROKEN_LINES)


def test_line_over_one_mib_is_too_large_and_its_neighbours_are_not(worker, tmp_path):
    worker.load("gpujobd_worker.handlers.checksum:Checksum")
    longest = b'{"text": "%s"}' % (b"x" * ((1 << 20) - 12))
    assert len(longest) == 1 << 20
    job = Job(
        tmp_path / "job", [longest, longest + b" ", b'{"text": "%s"}' % (b"x" * 5_000_000), {"text": "abc"}]
    )
    worker.run(job)
    assert [record["line"] for record in job.results()] == [1, 4]
    assert [(r["line"], r["error"]["code"]) for r in job.errors()] == [
        (2, "item_too_large"),
        (3, "item_too_large"),
    ]


def test_last_line_needs_no_newline(worker, tmp_path):
    worker.load("toys:Echo")
    job = Job(tmp_path / "job", texts(3))
    path = job.folder / "input.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert worker.run(job)["type"] == "finished"
    assert len(job.results()) == 3


def test_text_survives_as_utf8_and_half_pairs_as_escapes(worker, tmp_path):
    worker.load("faults:Faulty")
    job = Job(tmp_path / "job", [{"text": "grüße 你好 🎉 \u2028"}, {"text": "x", "do": "surrogate"}])
    worker.run(job)
    assert "grüße 你好 🎉 \u2028".encode() in job.bytes_of("results")
    assert job.results()[1]["output"]["text"] == "half a pair: \ud800"


def test_checksum_is_sha256_of_the_text(worker, tmp_path):
    worker.load("gpujobd_worker.handlers.checksum:Checksum")
    job = Job(tmp_path / "job", [{"text": "abc"}, {"text": 5}, {"prompt": "abc"}])
    worker.run(job)
    (record,) = job.results()
    assert record["output"] == {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}
    assert [r["error"]["code"] for r in job.errors()] == ["rejected", "rejected"]
    again = Job(tmp_path / "again", [{"text": "abc"}])
    worker.run(again, job_params={"rounds": 2})
    assert (
        again.results()[0]["output"]["sha256"] == hashlib.sha256(hashlib.sha256(b"abc").digest()).hexdigest()
    )


def test_heartbeats_go_on_while_a_call_hangs_and_stand_still(worker, tmp_path):
    worker.load("faults:Faulty", heartbeat_s=0.02)
    job = Job(tmp_path / "job", [{"text": "a"}, {"text": "b", "do": "hang"}])
    worker.lease(job, suspects=[[1, 2]])
    beats = []
    while len(beats) < 5:
        message = worker.next()
        if message["type"] == "heartbeat" and message["line"] == 2:
            beats.append(message)
    assert {beat["attempt"] for beat in beats} == {1}
    assert {beat["batch"] for beat in beats} == {1}
    assert len({beat["progress"] for beat in beats}) == 1
    assert job.suspects() == (1, 2, 2, 1, 1)


def test_heartbeats_come_during_a_slow_load(worker):
    worker.load("faults:SlowToLoad", params={"load_s": 0.5}, heartbeat_s=0.05)
    assert sum(message["type"] == "heartbeat" for message in worker.seen) >= 3


def test_dump_message_and_signal_write_the_stacks_of_a_hanging_call(worker, tmp_path):
    worker.load("faults:Faulty")
    worker.lease(Job(tmp_path / "job", [{"text": "a", "do": "hang"}]))
    while worker.next().get("line") != 1:
        pass
    worker.send("dump")
    assert "in suffer" in worker.read_log()
    worker.log = b""
    worker.process.send_signal(signal.SIGUSR2)
    assert "in suffer" in worker.read_log()


@pytest.mark.parametrize("busy", [False, True])
def test_lifeline_ends_the_worker_idle_or_in_a_call(tmp_path, busy):
    with WorkerDriver() as worker:
        worker.load("faults:Faulty")
        if busy:
            worker.lease(Job(tmp_path / "job", [{"text": "a", "do": "hang"}]))
            while worker.next().get("line") != 1:
                pass
        worker.end.close()
        assert worker.process.wait(HANG_LIMIT_S) == 0


def test_lifeline_ends_a_worker_that_is_still_loading():
    with WorkerDriver() as worker:
        worker.send(
            "load",
            entry="faults:SlowToLoad",
            path=[str(HANDLERS)],
            device="cpu",
            params={"load_s": 3600},
        )
        worker.expect("heartbeat")
        worker.end.close()
        assert worker.process.wait(HANG_LIMIT_S) == 0


def test_exit_closes_the_handler_and_ends_with_zero(worker):
    worker.load("faults:Closing")
    worker.send("exit")
    assert worker.until_gone() == 0
    assert b"closed" in worker.log


def test_interrupt_from_the_terminal_is_left_to_the_daemon(worker, tmp_path):
    worker.load("toys:Echo")
    worker.process.send_signal(signal.SIGINT)
    job = Job(tmp_path / "job", texts(3))
    assert worker.run(job)["type"] == "finished"


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("no_such_module:Echo", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("toys:NoSuchClass", "AttributeError: module 'toys' has no attribute 'NoSuchClass'"),
        ("toys", "ValueError: entry is 'toys', not module:Class"),
        ("faults:Unloadable", "FileNotFoundError: /srv/models/none"),
        ("faults:Quitter", "SystemExit: no licence"),
        ("faults:NotCallable", "faults:NotCallable cannot be called: it has no __call__"),
    ],
)
def test_handler_that_does_not_load_is_reported_and_the_worker_exits(worker, entry, error):
    message = worker.load(entry)
    assert message["type"] == "load_failed"
    assert message["error"] == error
    assert worker.until_gone() == 1


def test_params_the_handler_does_not_take_are_a_load_failure(worker):
    message = worker.load("toys:Nothing", params={"modle": 1})
    assert message["type"] == "load_failed"
    assert "modle" in message["error"]
    assert "Traceback" in message["trace"]


def test_flood_of_output_reaches_the_log_and_the_job_goes_on(worker, tmp_path):
    worker.load("faults:Loud")
    job = Job(tmp_path / "job", [{"text": "a"}, {"text": "b"}])
    assert worker.run(job)["type"] == "finished"
    worker.read_log()
    assert worker.log.count(b"x" * 997) >= 200


def test_exception_in_a_thread_of_the_handler_is_the_handlers_affair(worker, tmp_path):
    worker.load("faults:WithThread")
    assert worker.run(Job(tmp_path / "job", texts(2)))["type"] == "finished"


def python_without_packages(folder: pathlib.Path, flags: str) -> str:
    """This interpreter without site-packages, where an editable install would show the daemon's folder."""
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {flags} "$@"\n')
    wrapper.chmod(0o700)
    return str(wrapper)


@pytest.mark.parametrize("flags", ["-S", "-I -S"])
def test_neither_the_worker_nor_its_surroundings_are_on_the_import_path(tmp_path, flags):
    with WorkerDriver(python=python_without_packages(tmp_path, flags)) as worker:
        worker.load("spy:Spy")
        job = Job(tmp_path / "job", [{}])
        assert worker.run(job)["type"] == "finished"
    output = job.results()[0]["output"]
    assert output["path"][0] == str(HANDLERS)
    assert not [path for path in output["path"] if pathlib.Path(path).resolve() in (PACKAGE, PACKAGE.parent)]
    assert not {"torch", "msgspec", "trio", "numpy"} & set(output["modules"])
    assert "gpujobd_worker" in output["modules"]


def test_system_python_runs_the_worker_too(tmp_path):
    with WorkerDriver(python="/usr/bin/python3") as worker:
        worker.load("gpujobd_worker.handlers.checksum:Checksum", path=[])
        assert worker.run(Job(tmp_path / "job", texts(5)))["type"] == "finished"


def test_half_a_surrogate_pair_in_an_error_does_not_break_the_message(worker):
    """Other JSON readers refuse the escape that json.dumps makes of it."""
    message = worker.load("no_such_\ud800:Echo")
    assert message["type"] == "load_failed"
    assert "no_such_\\ud800" in message["error"]


def test_message_that_is_no_json_ends_the_worker(worker):
    worker.load("toys:Echo")
    worker.end.sendall(b"rubbish\n")
    assert worker.until_gone() == 70


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "handlers")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_module_of_the_worker_is_python_39_and_standard_library_only(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            assert top == "gpujobd_worker" or top in sys.stdlib_module_names, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "handlers").glob("*.py")), ids=lambda path: path.name)
def test_shipped_handler_is_python_39(path):
    ast.parse(path.read_text(), feature_version=(3, 9))
