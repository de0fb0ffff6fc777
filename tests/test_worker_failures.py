"""One bad item never costs a job: whatever a handler does, and what becomes of the items around it."""

from __future__ import annotations

import pathlib

import pytest
from gpujobd_worker import Rejected, Transient, failures
from gpujobd_worker.failures import BROKEN, OOM, POISONED, REJECTED, TRANSIENT, classify
from worker_driver import HANDLERS, Job, WorkerDriver


def item(number: int, do: str = "", **more: object) -> dict:
    return {"custom_id": f"a{number}", "text": f"t{number}", "do": do, **more}


def items(count: int, special: dict[int, str]) -> list[dict]:
    """`special`: what the items with these numbers do."""
    return [item(number, special.get(number, "")) for number in range(1, count + 1)]


@pytest.fixture
def side(tmp_path):
    return tmp_path / "side"


@pytest.fixture
def worker():
    with WorkerDriver() as driver:
        yield driver


def calls(side: pathlib.Path) -> list[int]:
    """Items of each call, in order."""
    return [int(line.split(":")[0]) for line in side.read_text().splitlines()]


def codes(job: Job) -> dict[int, str]:
    return {record["line"]: record["error"]["code"] for record in job.errors()}


def load(worker: WorkerDriver, side: pathlib.Path, name: str = "Faulty", **params: object) -> None:
    assert worker.load(f"faults:{name}", params={"side": str(side), **params})["type"] == "loaded"


# --- items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "code", "message"),
    [
        ("reject", "rejected", "against a rule"),
        ("rejected", "rejected", "in its place"),
        ("raise", "handler_error", "KeyError: 't37'"),
        ("exception", "handler_error", "KeyError: 'in its place'"),
        ("sys.exit", "handler_error", "SystemExit: 3"),
        ("nan", "bad_output", "not JSON: Out of range float values are not JSON compliant"),
        ("bytes", "bad_output", "not JSON: Object of type bytes is not JSON serializable"),
        ("circle", "bad_output", "not JSON: "),
        ("list", "bad_output", "the output is list, not dict"),
    ],
)
def test_only_the_bad_item_of_a_batch_fails(worker, side, tmp_path, do, code, message):
    load(worker, side)
    job = Job(tmp_path / "job", items(100, {37: do}))
    assert worker.run(job)["type"] == "finished"
    (record,) = job.errors()
    assert record["line"] == 37
    assert record["custom_id"] == "a37"
    assert record["error"]["code"] == code
    assert record["error"]["message"].startswith(message)
    assert record["error"]["tries"] == 1
    assert [r["line"] for r in job.results()] == [line for line in range(1, 101) if line != 37]
    assert [r["output"]["text"] for r in job.results()] == [f"t{r['line']}" for r in job.results()]


@pytest.mark.parametrize("do", ["lose", "none"])
def test_answer_of_the_wrong_shape_is_bisected_to_its_item(worker, side, tmp_path, do):
    load(worker, side, "Short")
    job = Job(tmp_path / "job", items(50, {20: do}))
    worker.run(job)
    assert codes(job) == {20: "bad_output"}
    assert job.checkpoint["done"] == 49


def test_items_are_tried_again_as_they_were_whatever_the_failed_call_did_to_them(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(40, {30: "spoil"}))
    assert worker.run(job)["type"] == "finished"
    assert [record["output"]["text"] for record in job.results()] == [f"t{number}" for number in range(1, 41)]


def test_many_bad_items_each_fail_alone_and_order_is_kept(worker, side, tmp_path):
    load(worker, side)
    bad = {number: "raise" for number in range(1, 101) if number % 3 == 0}
    job = Job(tmp_path / "job", items(100, bad))
    worker.run(job)
    assert codes(job) == dict.fromkeys(bad, "handler_error")
    assert [r["line"] for r in job.results()] == [line for line in range(1, 101) if line not in bad]
    assert [r["line"] for r in job.errors()] == sorted(bad)


def test_items_that_check_refuses_never_reach_the_handler(worker, side, tmp_path):
    load(worker, side, "Checked")
    given = [item(1), item(2, check="value"), item(3, check="key"), item(4)]
    job = Job(tmp_path / "job", given)
    worker.run(job)
    assert [record["error"]["message"] for record in job.errors()] == ["too short", "KeyError: 'prompt'"]
    assert codes(job) == {2: "rejected", 3: "rejected"}
    assert "t2" not in side.read_text()


def test_long_messages_are_cut(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(1, {1: "raise text:" + "x" * 10_000}))
    worker.run(job)
    assert len(job.errors()[0]["error"]["message"]) == 500


def test_tracebacks_of_failing_items_reach_the_log_but_not_all_of_them(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(50, dict.fromkeys(range(1, 51), "raise")))
    worker.run(job)
    assert worker.read_log().count("KeyError: 't") == 10


# --- trying again -----------------------------------------------------------------------------------------------


def test_transient_items_are_tried_again_at_the_end(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(20, {5: "transient:2", 9: "transient:2"}))
    assert worker.run(job)["type"] == "finished"
    assert [record["line"] for record in job.results()][-2:] == [5, 9]
    assert job.checkpoint["done"] == 20
    assert job.checkpoint["deferred"] == []


@pytest.mark.slow
def test_transient_item_fails_after_five_tries(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(3, {2: "transient:99"}))
    worker.run(job)
    (record,) = job.errors()
    assert record["error"] == {"code": "transient", "message": "not now", "tries": 5}


def test_deferred_items_survive_in_the_checkpoint(side, tmp_path):
    job = Job(tmp_path / "job", items(20, {5: "transient:3"}))
    with WorkerDriver() as worker:
        load(worker, side)
        worker.lease(job, batch_max=1)
        while worker.expect("checkpoint")["checkpoint"]["upto"] < 20:
            pass
        worker.send("yield", attempt=job.attempt)  # in the wait before the second try
        assert worker.finish(job)["type"] == "yielded"
        assert job.checkpoint["deferred"] == [[5, 1]]
    with WorkerDriver() as worker:
        load(worker, side)
        job.checkpoint["deferred"] = [[5, 4]]
        job.items = 20
        worker.lease(job)
        worker.send("yield", attempt=job.attempt)
        assert worker.finish(job)["checkpoint"]["deferred"] == [[5, 4]]


def test_more_than_a_thousand_deferred_items_fail_at_once(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", [item(number, "transient:2") for number in range(1, 1004)])
    worker.run(job, batch_max=4)
    assert codes(job) == dict.fromkeys((1001, 1002, 1003), "transient")
    assert "1000 items wait to be tried again" in job.errors()[0]["error"]["message"]
    assert job.checkpoint["done"] == 1000


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", ["tidy", "cublas", "cudnn", "cpu", "python", "wrapped"])
def test_batch_that_does_not_fit_is_halved_and_the_size_remembered(worker, side, tmp_path, short):
    load(worker, side, fits=5, short=short)
    job = Job(tmp_path / "job", items(100, {}))
    assert worker.run(job)["type"] == "finished"
    assert [record["line"] for record in job.results()] == list(range(1, 101))
    assert job.errors() == []
    assert max(calls(side)) > 5  # it was tried
    before = len(calls(side))
    again = Job(tmp_path / "again", items(100, {}))
    worker.run(again)
    assert max(calls(side)[before:]) <= 5  # and not again


@pytest.mark.parametrize("short", ["tidy", "cublas", "cpu", "python"])
def test_single_item_that_does_not_fit_fails_alone(worker, side, tmp_path, short):
    load(worker, side)
    job = Job(tmp_path / "job", items(40, {23: f"short:{short}"}))
    assert worker.run(job)["type"] == "finished"
    assert codes(job) == {23: "out_of_memory"}
    assert job.errors()[0]["error"]["tries"] == 2
    assert job.checkpoint["done"] == 39


def test_one_complaint_of_the_context_about_memory_is_survived(worker, side, tmp_path):
    load(worker, side, fits=8, short="accelerator")
    job = Job(tmp_path / "job", items(100, {}))
    assert worker.run(job)["type"] == "finished"
    assert job.checkpoint["done"] == 100


def test_second_complaint_of_the_context_in_a_row_means_poison(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(20, {7: "short:accelerator"}))
    last = worker.run(job)
    assert (last["type"], last["cause"]) == ("lost", "poisoned")
    assert worker.until_gone() == 1


@pytest.fixture
def others(tmp_path):
    """GiB that other processes hold of a GPU."""
    path = tmp_path / "others"
    path.write_text("40")
    return path


def crowded(worker, others):
    return worker.load("crowded:Crowded", device="cuda:0", params={"others": str(others)})


def test_worker_tells_which_gpu_it_has(worker, others):
    loaded = crowded(worker, others)
    assert (loaded["uuid"], loaded["device_bytes"]) == ("0000-aa", 80 << 30)


def test_item_that_does_not_fit_beside_others_waits_for_them_and_fails_nothing(worker, others, tmp_path):
    crowded(worker, others)
    job = Job(tmp_path / "job", [{"gib": 50 if n == 7 else 1} for n in range(20)])
    last = worker.run(job, gives_way=True)
    assert last["type"] == "yielded"
    assert last["others_bytes"] == (40 << 30) - (512 << 20)  # its own context is a guess
    assert (job.checkpoint["upto"], job.errors()) == (7, [])
    others.write_text("0")
    assert worker.run(job, gives_way=True)["type"] == "finished"
    assert (len(job.results()), job.errors()) == (20, [])


@pytest.mark.parametrize(("gib", "gives_way"), [(0, True), (1, True), (40, False)])
def test_item_that_does_not_fit_alone_or_with_nobody_to_wait_for_fails(
    worker, others, tmp_path, gib, gives_way
):
    others.write_text(str(gib))
    crowded(worker, others)
    job = Job(tmp_path / "job", [{"gib": 75 if n == 7 else 0} for n in range(20)])
    assert worker.run(job, gives_way=gives_way)["type"] == "finished"
    assert codes(job) == {8: "out_of_memory"}


def test_canary_that_does_not_fit_beside_others_condemns_no_device(worker, others, tmp_path):
    crowded(worker, others)
    job = Job(tmp_path / "job", [{"gib": 50}] * 3)
    last = worker.run(job, gives_way=True, canary=2)
    assert last["type"] == "yielded"
    assert last["others_bytes"] > 0
    assert last["checkpoint"]["upto"] == 0


def test_load_says_whether_it_ran_out_of_memory(worker, others):
    others.write_text("75")
    failed = crowded(worker, others)
    assert (failed["type"], failed["out_of_memory"]) == ("load_failed", True)
    with WorkerDriver() as another:
        failed = another.load("crowded:Crowded", params={"others": "/nonexistent"})
        assert failed["out_of_memory"] is False


@pytest.mark.slow
def test_torch_running_out_of_real_memory_finishes_every_item(worker, tmp_path):
    pytest.importorskip("torch")
    worker.load("real_oom:Hungry", params={"item_mib": 16, "more_mib": 200})
    job = Job(tmp_path / "job", items(100, {}))
    last = worker.run(job, batch_max=64)
    assert last["type"] == "finished", worker.read_log()
    assert [record["output"]["sum"] for record in job.results()] == [1000.0] * 100
    assert "do not fit" in worker.read_log()


# --- poison, death, canary --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", ["assert", "old assert", "illegal", "cudnn"])
def test_poisoned_context_ends_the_process_with_the_call_on_the_page(worker, side, tmp_path, poison):
    load(worker, side)
    job = Job(tmp_path / "job", items(100, {50: f"poison:{poison}"}))
    last = worker.run(job)
    assert (last["type"], last["cause"]) == ("lost", "poisoned")
    assert worker.until_gone() == 1
    attempt, first, final, previous_first, previous_final = job.suspects()
    assert attempt == 1
    assert first <= 50 <= final
    assert previous_final == first - 1
    assert previous_first <= previous_final
    assert job.checkpoint["upto"] < 50


@pytest.mark.parametrize(("do", "status"), [("segfault", -11), ("exit", 3)])
def test_item_that_kills_its_worker_is_found_by_suspects_one_by_one(side, tmp_path, do, status):
    job = Job(tmp_path / "job", items(100, {50: do}))
    with WorkerDriver() as worker:
        load(worker, side)
        worker.lease(job)
        assert worker.until_gone(job) == status
    _, *page = job.suspects()
    suspects = [span for span in (page[:2], page[2:]) if span != [0, 0]]
    with WorkerDriver() as worker:  # one by one: now the page names the line alone
        load(worker, side)
        worker.lease(job, suspects=suspects)
        assert worker.until_gone(job) == status
        assert job.suspects()[1:3] == (50, 50)
    with WorkerDriver() as worker:  # blamed twice: it fails, after a canary
        load(worker, side)
        before = len(calls(side))
        worker.lease(job, suspects=suspects, condemned=[50], canary=1)
        worker.expect("canary")
        assert worker.finish(job)["type"] == "finished"
        assert calls(side)[before] == 1
    assert codes(job) == {50: "worker_lost"}
    assert job.errors()[0]["error"]["tries"] == 2
    assert [record["line"] for record in job.results()] == [line for line in range(1, 101) if line != 50]


def test_lines_in_suspect_spans_are_called_one_by_one_and_others_are_not(worker, side, tmp_path):
    load(worker, side)
    warm = Job(tmp_path / "warm", items(200, {}))
    worker.run(warm)
    before = len(calls(side))
    job = Job(tmp_path / "job", items(60, {}))
    worker.run(job, suspects=[[20, 25], [30, 30]])
    assert calls(side)[before:] == [16, 3, 1, 1, 1, 1, 1, 1, 4, 1, 16, 14]
    assert [record["line"] for record in job.results()] == list(range(1, 61))


def test_canary_output_is_thrown_away(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(10, {}))
    worker.run(job, condemned=[4], canary=2)
    assert [record["line"] for record in job.results()] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert side.read_text().splitlines()[0] == "1: t2"


@pytest.mark.parametrize("do", ["poison:assert", "short:tidy"])
def test_canary_that_meets_a_sick_device_loses_the_lease(worker, side, tmp_path, do):
    load(worker, side)
    job = Job(tmp_path / "job", items(10, {2: do}))
    last = worker.run(job, condemned=[4], canary=2)
    assert (last["type"], last["cause"]) == ("lost", "canary")
    assert worker.until_gone() == 1
    assert job.suspects()[1:] == (0, 0, 0, 0)  # no line is to blame
    assert not job.bytes_of("errors")


def test_canary_that_is_a_bad_item_itself_is_replaced_by_the_next(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", [b"broken", item(2, "raise"), item(3, "segfault"), item(4)])
    worker.lease(job, condemned=[3], suspects=[[3, 3]], canary=1)
    worker.expect("canary")
    assert worker.finish(job)["type"] == "finished"
    assert side.read_text().splitlines()[:2] == ["1: t2", "1: t4"]


def test_canary_fails_when_everything_raises(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(10, dict.fromkeys(range(1, 11), "raise")))
    assert worker.run(job, condemned=[10], canary=1)["cause"] == "canary"


def test_job_of_one_item_has_no_other_canary_and_passes(worker, side, tmp_path):
    load(worker, side)
    job = Job(tmp_path / "job", items(1, {1: "segfault"}))
    assert worker.run(job, condemned=[1])["type"] == "finished"
    assert codes(job) == {1: "worker_lost"}


# --- words ------------------------------------------------------------------------------------------------------


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(HANDLERS))
    import faults

    return faults


def test_every_untidy_form_is_classified(faults):
    for form, make in faults.SHORT_OF_MEMORY.items():
        assert classify(make()).kind == OOM, form
    for form, make in faults.POISON.items():
        assert classify(make()).kind == POISONED, form


def test_real_torch_exceptions_are_classified():
    torch = pytest.importorskip("torch")
    assert classify(torch.OutOfMemoryError("CUDA out of memory.")).kind == OOM
    assert not classify(torch.OutOfMemoryError("CUDA out of memory.")).accelerator
    if hasattr(torch, "AcceleratorError"):
        assert classify(torch.AcceleratorError("CUDA error: device-side assert triggered")).kind == POISONED
        short = classify(torch.AcceleratorError("CUDA error: out of memory"))
        assert (short.kind, short.accelerator) == (OOM, True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Rejected("no"), REJECTED),
        (Transient("later"), TRANSIENT),
        (ValueError("bad text: 'CUDA error: device-side assert triggered'"), BROKEN),
        (ValueError("CUDA error: out of memory"), BROKEN),
        (RuntimeError("the item says 'CUDA error: device-side assert'"), BROKEN),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 7"), BROKEN),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling cublasSgemm"), BROKEN),
        (RecursionError("maximum recursion depth exceeded"), BROKEN),
        (KeyboardInterrupt(), BROKEN),
    ],
)
def test_only_what_torch_raises_decides_over_a_worker(error, kind):
    assert classify(error).kind == kind


def test_exception_without_a_text_is_described_all_the_same():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert classify(Mute()).message == "Mute: (no text: its __str__ raised RuntimeError)"
    assert classify(KeyError()).message == "KeyError"


def test_codes_beyond_the_bound_are_counted_together_and_the_counts_before_stay_as_they_were():
    before = failures.counted({}, ["a", "b", "a"])
    after = failures.counted(before, [*(f"c{n}" for n in range(20)), "a", "other"])
    assert before == {"a": 2, "b": 1}
    assert len(after) == failures.CODES_MAX + 1
    assert (after["a"], after["b"], after["c7"], after["other"]) == (3, 1, 1, 13)
    assert failures.counted(after, ["c19", "c7"]) == {**after, "other": 14, "c7": 2}
