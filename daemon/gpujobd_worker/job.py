"""One lease: the pipeline from a job's input to its outputs.

    reader thread          main thread                     writer thread
    bytes -> items  ==>  segments -> handler -> outcomes  ==>  records -> fdatasync -> checkpoint

Rule 1: outcomes go on in input order, whatever was split and tried again; deferred items follow at the end.
Rule 2: what has been computed is written and checkpointed BEFORE the lease is given back, and the files are closed and
the lock is free BEFORE the daemon hears of it.
Rule 3: a poisoned device ends the process without a last checkpoint: what came just before is not to be trusted.

Lines are this job's own, 1-based; the original numbers of a retry are used in the records only.
"""

from __future__ import annotations

import threading
from typing import Any

from gpujobd_worker.call import Caller, Cramped, Desk, Poisoned, log
from gpujobd_worker.failures import (
    OOM,
    POISONED,
    TRANSIENT,
    WORKER_LOST,
    Deferral,
    Failure,
    refusal_of,
    shorten,
)
from gpujobd_worker.files import GivenUp, JobFiles, LeaseLost
from gpujobd_worker.lines import Reader, Segment, Window, chunks, parse, read_numbers
from gpujobd_worker.pipe import TEXT_CHARS_MAX, Message, Pipe
from gpujobd_worker.terms import Terms
from gpujobd_worker.writer import Batch, Checkpoint, Outcome, Writer

DEFERRED_MAX = 1000
TRIES_MAX = 5
BACKOFF_FIRST_S = 1.0  # doubling: 1, 2, 4, 8 s before tries 2 to 5
FETCH_LINES = 64  # deferred lines read again in one pass over the input: 64 MiB at most
CANARIES_MAX = 5  # lines tried before a canary counts as failed
WORKER_LOST_TRIES = 2
PROCESS_ENDS = ("died", "poisoned", "canary")  # causes of loss after which only a new worker helps
EXIT_LOST = 1


class Lease:
    """The run of one lease, from its message to its last one."""

    def __init__(
        self, message: Message, desk: Desk, pipe: Pipe, checkpoint_s: float, stop: threading.Event
    ) -> None:
        """`stop` asks for the lease to end at the next batch boundary."""
        self._terms = Terms(message)
        self._desk = desk
        self._pipe = pipe
        self._checkpoint_s = checkpoint_s
        self._stop = stop
        # line -> tries, in the order they are tried in
        self._deferred: dict[int, int] = dict(self._terms.checkpoint["deferred"])
        self._numbers: list[int] = []
        self._caller: Caller
        self._writer: Writer
        self._reader: Reader
        self._told_s: dict[str, float] = {}  # timings reported so far
        self._gives_way: dict[str, int] = {}  # what its last message says besides, if it gives way to others

    def run(self) -> None:
        """Compute until the end, a yield or a loss, and report which.

        Files are not closed in a `finally`: after a bug of ours the threads use them until the process ends.
        """
        terms = self._terms
        self._desk.pulse.attempt = terms.attempt
        try:
            files = JobFiles(terms.folder, terms.attempt, terms.checkpoint, self._stop.is_set)
        except LeaseLost as lost:
            self._report_lost(lost, {})
            return
        except GivenUp:
            self._tell("yielded", {"checkpoint": terms.checkpoint})
            return
        ending, report = self._work(files)
        files.close()
        if ending is not None:
            self._report_lost(ending, report)
        else:
            point = report["checkpoint"]
            left = terms.items - point["done"] - point["failed"]
            self._tell("yielded" if left else "finished", {**report, **self._gives_way})

    def _tell(self, kind: str, fields: dict[str, Any]) -> None:
        """The last message of the lease."""
        pulse = self._desk.pulse
        pulse.attempt = pulse.line = pulse.batch = 0
        self._pipe.send(kind, attempt=self._terms.attempt, **fields)

    def _report_lost(self, lost: LeaseLost, report: dict[str, Any]) -> None:
        """The lease is over; after some causes the process is, too."""
        detail = shorten(lost.detail, TEXT_CHARS_MAX)
        log(f"lease lost: {lost.cause}: {detail}")
        fields = {"cause": lost.cause, "detail": detail, **report}
        if lost.cause in PROCESS_ENDS:
            self._pipe.last_words(EXIT_LOST, "lost", attempt=self._terms.attempt, **fields)
        self._tell("lost", fields)

    def _work(self, files: JobFiles) -> tuple[LeaseLost | None, dict[str, Any]]:
        """The pipeline. Returns why the lease is lost, if it is, and the last report."""
        terms = self._terms
        self._caller = Caller(self._desk, terms, files.page)
        try:
            self._numbers = read_numbers(files.folder, terms.items)
            if terms.canary:
                self._run_canary(files.input)
        except LeaseLost as lost:
            return lost, {}
        except Cramped as cramped:
            self._gives_way = {"others_bytes": cramped.others_bytes}
            return None, {"checkpoint": terms.checkpoint}
        self._reader = Reader(files.input, terms.checkpoint["upto"], terms.items)
        self._writer = Writer(
            files,
            terms.checkpoint,
            every_s=self._checkpoint_s,
            report=self._report,
            enough=terms.too_many,
            stop=self._stop,
        )
        ended = self._compute(files.input)
        self._reader.stop()
        self._writer.finish()
        return self._writer.lost or ended or self._too_many(), self._report_fields(self._writer.checkpoint)

    def _too_many(self) -> LeaseLost | None:
        failed, allowed = self._writer.checkpoint["failed"], self._terms.failures_max
        if not self._terms.too_many(failed):
            return None
        return LeaseLost("failures_max", f"{failed} items failed, allowed are {allowed}")

    def _report(self, checkpoint: Checkpoint) -> None:
        """Called by the writer's thread."""
        self._pipe.send("checkpoint", attempt=self._terms.attempt, **self._report_fields(checkpoint))

    def _report_fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a report says; its timings are those since the report before."""
        now_s = {
            "load_s": 0.0,
            "read_s": self._reader.read_s,
            "compute_s": self._caller.compute_s,
            "write_s": self._writer.write_s,
            "sync_s": self._writer.sync_s,
        }
        since_s = {stage: spent_s - self._told_s.get(stage, 0.0) for stage, spent_s in now_s.items()}
        self._told_s = now_s
        return {
            "checkpoint": checkpoint,
            "timings": since_s,
            "vram_bytes": self._desk.gauge.peak_bytes(),
        }

    # --- computing ------------------------------------------------------------------------------------------

    def _compute(self, fd: int) -> LeaseLost | None:
        """Hand outcomes to the writer until the end or a stop; what ended it early is returned, for the writer still
        has to write what it got.
        """
        try:
            self._try_all(Window(self._reader, self._terms.checkpoint["upto"] + 1))
            if not self._stop.is_set():
                self._try_deferred(fd)
        except LeaseLost as lost:
            return lost
        except Cramped as cramped:
            self._gives_way = {"others_bytes": cramped.others_bytes}
        except Poisoned as error:
            self._report_lost(LeaseLost("poisoned", str(error)), {})  # the process ends here
        return None

    def _try_all(self, window: Window) -> None:
        split: list[Segment] = []  # halves of calls that failed, the next one last
        while not self._stop.is_set():
            segment = split.pop() if split else self._next(window)
            if segment is None:
                return
            custom_ids = [_custom_id(item) for item in segment.items]
            outcomes = self._outcomes(segment)
            if outcomes is None:
                split.extend(segment.halves())
            else:
                self._put(segment, custom_ids, outcomes)

    def _next(self, window: Window) -> Segment | None:
        return window.take(self._terms.share(window.line, self._desk.sizer.size(self._terms.batch_max)))

    def _outcomes(self, segment: Segment) -> list[Outcome] | None:
        if segment.first in self._terms.condemned:  # and so alone: see Terms.share
            return [Failure(WORKER_LOST, "its worker died twice with this item in hand", WORKER_LOST_TRIES)]
        return self._caller.outcomes(segment)

    def _put(self, segment: Segment, custom_ids: list[Any], outcomes: list[Outcome]) -> None:
        before = len(self._deferred)
        for index, outcome in enumerate(outcomes):
            if type(outcome) is Failure and outcome.code == TRANSIENT:
                outcomes[index] = self._deferral(segment.first + index, 1, outcome)
        deferred = list(map(list, self._deferred.items())) if len(self._deferred) != before else None
        numbers = self._numbers_of(segment.first, segment.last)
        self._writer.put(Batch(segment.last, numbers, custom_ids, outcomes, deferred, segment.input_bytes()))

    def _numbers_of(self, first: int, last: int) -> Any:
        return self._numbers[first - 1 : last] if self._numbers else range(first, last + 1)

    # --- trying again ---------------------------------------------------------------------------------------

    def _deferral(self, line: int, tries: int, failure: Failure) -> Outcome:
        """Note the line for another try, unless it had all of them or too many wait already."""
        if tries >= TRIES_MAX:
            return failure._replace(tries=tries)
        if line not in self._deferred and len(self._deferred) >= DEFERRED_MAX:
            text = f"{DEFERRED_MAX} items wait to be tried again, this one cannot: {failure.message}"
            return Failure(TRANSIENT, shorten(text), tries)
        self._deferred.pop(line, None)
        self._deferred[line] = tries
        return Deferral(tries)

    def _try_deferred(self, fd: int) -> None:
        """One by one: the page can name only neighbours, and a line named wrongly could be blamed."""
        waited_for = 0
        fetched: dict[int, bytes] = {}
        while self._deferred and not self._stop.is_set():
            line, tries = next(iter(self._deferred.items()))
            if tries != waited_for:
                waited_for = tries
                if self._stop.wait(BACKOFF_FIRST_S * 2 ** (tries - 1)):
                    return
            if line not in fetched:
                fetched = _fetch(fd, sorted(list(self._deferred)[:FETCH_LINES]))
            self._try_again(line, tries, fetched.pop(line))

    def _try_again(self, line: int, tries: int, text: bytes) -> None:
        segment = Segment(line, [text], parse([text]))
        custom_id = _custom_id(segment.items[0])
        outcomes = self._outcomes(segment)
        assert outcomes is not None  # a single item is never split
        (outcome,) = outcomes
        del self._deferred[line]
        if isinstance(outcome, Failure):
            if outcome.code == TRANSIENT:
                outcome = self._deferral(line, tries + 1, outcome)
            else:
                outcome = outcome._replace(tries=max(outcome.tries, tries + 1))
        deferred = list(map(list, self._deferred.items()))
        self._writer.put(
            Batch(
                self._terms.items, self._numbers_of(line, line), [custom_id], [outcome], deferred, len(text)
            )
        )

    # --- the canary -----------------------------------------------------------------------------------------

    def _run_canary(self, fd: int) -> None:
        """Compute a line that has killed nobody, to see whether worker and device are well.

        An exception of the item's own does not fail the canary at once, since nobody knows that the line is a good
        one; of CANARIES_MAX lines one must pass. A job without such lines proves nothing, and passes.

        Raises:
            LeaseLost: it failed.
        """
        tried = 0
        for line in range(self._terms.canary, self._terms.items + 1):
            if line != self._terms.canary and self._terms.is_suspect(line):
                continue
            item = self._usable(_fetch(fd, [line])[line])
            if item is None:
                continue
            verdict = self._caller.canary(item)
            if verdict is None:
                break
            tried += 1
            if verdict.kind in (OOM, POISONED) or tried >= CANARIES_MAX:
                raise LeaseLost("canary", f"line {line}: {verdict.message}")
        self._pipe.send("canary", attempt=self._terms.attempt)

    def _usable(self, text: bytes) -> dict[str, Any] | None:
        (item,) = parse([text])
        if isinstance(item, Failure):
            return None
        try:
            if self._desk.check is not None:
                self._desk.check(item)
        except BaseException as error:  # noqa: BLE001 - the handler's code: anything may come
            refusal_of(error)
            return None
        return item


def _custom_id(item: Any) -> Any:
    """What the record repeats: a string or a number; None where there is none, or something else."""
    custom_id = item.get("custom_id") if type(item) is dict else None
    return custom_id if isinstance(custom_id, (str, int, float)) else None


def _fetch(fd: int, lines: list[int]) -> dict[int, bytes]:
    """Read these lines, sorted, in one pass. Raises: LeaseLost, OSError."""
    found: dict[int, bytes] = {}
    wanted = set(lines)
    for first, texts in chunks(fd, lines[0] - 1, lines[-1]):
        for line in wanted.intersection(range(first, first + len(texts))):
            found[line] = texts[line - first]
    return found
