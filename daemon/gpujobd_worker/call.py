"""One call of the handler, and what is made of however it ends.

Rule 1: handlers are called in the main thread only, and never two at a time.
Rule 2: the suspects page says what is in hand BEFORE the handler, its check() included, sees it.
Rule 3: a call of several items that fails is split by the caller of this module; only an item that fails alone fails.
Rule 4: nothing of an exception is kept but its text, and memory is freed outside the except block (see failures.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from gpujobd_worker.batch import Sizer
from gpujobd_worker.device import Gauge
from gpujobd_worker.failures import (
    BAD_OUTPUT,
    BROKEN,
    HANDLER_ERROR,
    OOM,
    OUT_OF_MEMORY,
    POISONED,
    Failure,
    Verdict,
    classify,
    failure_of,
    refusal_of,
)
from gpujobd_worker.files import Page
from gpujobd_worker.lines import Item, Segment, parse
from gpujobd_worker.terms import Terms
from gpujobd_worker.writer import Outcome

OTHERS_BYTES_MIN = 1 << 30  # less is a desktop, the driver, or an error of the estimate: that is always there
TRACES_MAX = 10  # tracebacks a lease writes to its log: a job of broken items must not flood it


class Poisoned(Exception):
    """The device's context is lost, and this process with it."""


class Cramped(Exception):
    """An item does not fit into what other processes leave of the device: it is to wait for them, not to fail."""

    def __init__(self, others_bytes: int) -> None:
        super().__init__(others_bytes)
        self.others_bytes = others_bytes


class Pulse:
    """What the heartbeat tells; written by the main thread, read by the heartbeat's."""

    def __init__(self) -> None:
        self.attempt = 0  # 0: no lease
        self.line = 0
        self.batch = 0
        self.progress = 0  # grows whenever a call has returned


class Desk:
    """What a worker keeps from lease to lease."""

    def __init__(self, handler: Any, gauge: Gauge, pulse: Pulse) -> None:
        self.handler = handler
        self.check: Any = getattr(handler, "check", None)
        self.gauge = gauge
        self.pulse = pulse
        self.sizer = Sizer()
        self.memory_short = False  # the latest call ran out of memory


class Caller:
    """Calls the handler for one lease."""

    def __init__(self, desk: Desk, terms: Terms, page: Page) -> None:
        self.compute_s = 0.0
        self._desk = desk
        self._terms = terms
        self._page = page
        self._traces = 0

    def outcomes(self, segment: Segment) -> list[Outcome] | None:
        """One outcome a line, in order; None: the call failed for several items, split it.

        Raises:
            Poisoned: the page still names the segment.
            Cramped: nothing has come of it, and nothing is held against it.
        """
        pulse, (first, last) = self._desk.pulse, (segment.first, segment.last)
        pulse.line, pulse.batch = first, len(segment.items)
        self._page.write(first, last)
        items: list[Item] = segment.items
        if self._desk.check is not None:
            items = [self._checked(item) for item in items]
        wanted = [item for item in items if type(item) is dict]
        answer: list[Outcome] | Verdict = self._answer(segment, wanted) if wanted else []
        pulse.batch = 0
        self._page.clear(first, last)
        if isinstance(answer, Verdict):
            if len(wanted) > 1:
                return None
            answer = [self._failure(answer)]
        if len(wanted) == len(items):
            return answer
        rest = iter(answer)
        return [next(rest) if type(item) is dict else item for item in items]

    def canary(self, item: dict[str, Any]) -> Verdict | None:
        """Compute an item for the sake of computing. None: it went well. Raises: Cramped."""
        answer = self._call([item])
        if not isinstance(answer, Verdict):
            return None
        self._give_way(answer)
        return answer

    def _checked(self, item: Item) -> Item:
        if isinstance(item, Failure):
            return item
        try:
            self._desk.check(item)
        except BaseException as error:  # noqa: BLE001 - the handler's code: anything may come
            return refusal_of(error)
        return item

    def _answer(self, segment: Segment, items: list[Any]) -> list[Outcome] | Verdict:
        """Call, and once more where a single item ran out of memory: what others left behind is freed by then.

        Raises: Poisoned.
        """
        answer = self._call(items)
        if isinstance(answer, Verdict) and answer.kind == OOM:
            self._make_room(len(items), answer)
            if len(items) == 1:
                answer = self._call([item for item in parse(segment.texts) if type(item) is dict][:1])
        if isinstance(answer, Verdict) and answer.kind == POISONED:
            raise Poisoned(answer.message)
        return answer

    def _call(self, items: list[Any]) -> list[Outcome] | Verdict:
        size = len(items)
        began = time.perf_counter()
        try:
            answer = _judge(self._desk.handler(items, **self._terms.job_params), size)
        except BaseException as error:  # noqa: BLE001 - the handler's code: anything may come, sys.exit() included
            answer = classify(error)
        took_s = time.perf_counter() - began
        self.compute_s += took_s
        self._desk.pulse.progress += 1
        if isinstance(answer, Verdict):
            return self._aggravated(answer)
        self._desk.memory_short = False
        self._desk.sizer.took(size, took_s, self._terms.batch_max)
        return answer

    def _aggravated(self, verdict: Verdict) -> Verdict:
        """A complaint of the context itself, right after memory ran out, means that the context is gone."""
        if verdict.kind != OOM:
            return verdict
        again, self._desk.memory_short = self._desk.memory_short, True
        return verdict._replace(kind=POISONED) if again and verdict.accelerator else verdict

    def _make_room(self, items: int, verdict: Verdict) -> None:
        """Free what can be freed. Raises: Poisoned, where not even that works."""
        log(f"{items} items at once do not fit: {verdict.message}")
        try:
            self._desk.gauge.free()
        except RuntimeError as error:
            raise Poisoned(f"freeing memory: {error}") from None
        if items > 1:
            self._desk.sizer.too_big(items)

    def _give_way(self, verdict: Verdict) -> None:
        """Memory ran out for a single item: was it others who took it? Raises: Cramped."""
        others_bytes = self._desk.gauge.others_bytes() if verdict.kind == OOM and self._terms.gives_way else 0
        if others_bytes >= OTHERS_BYTES_MIN:
            log(f"an item does not fit beside the {others_bytes} bytes of other processes: it waits for them")
            raise Cramped(others_bytes)

    def _failure(self, verdict: Verdict) -> Failure:
        """The failure of an item that was alone in its call. Raises: Cramped."""
        self._give_way(verdict)
        if verdict.kind == OOM:
            return Failure(OUT_OF_MEMORY, verdict.message, tries=2)
        if verdict.kind == BROKEN:
            self._traces += 1
            if self._traces <= TRACES_MAX:
                log(verdict.trace)
            return Failure(HANDLER_ERROR, verdict.message)
        return Failure(verdict.kind, verdict.message)


def _judge(outputs: Any, size: int) -> list[Outcome] | Verdict:
    """Take a call's answer apart. An exception in an item's place is that item's failure."""
    if not isinstance(outputs, (list, tuple)):
        return Verdict(BAD_OUTPUT, f"the handler returned {type(outputs).__name__}, not a list")
    if len(outputs) != size:
        return Verdict(BAD_OUTPUT, f"the handler returned {len(outputs)} outputs for {size} items")
    outcomes: list[Outcome] = []
    for output in outputs:
        if type(output) is dict:
            outcomes.append(output)
        elif isinstance(output, BaseException):
            verdict = classify(output)
            if verdict.kind == POISONED:
                return verdict
            code = OUT_OF_MEMORY if verdict.kind == OOM else None
            outcomes.append(Failure(code, verdict.message) if code else failure_of(output))
        elif isinstance(output, dict):
            outcomes.append(dict(output))
        else:
            outcomes.append(Failure(BAD_OUTPUT, f"the output is {type(output).__name__}, not dict"))
    return outcomes


def log(text: str) -> None:
    """To stderr, which is the job's log."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()
