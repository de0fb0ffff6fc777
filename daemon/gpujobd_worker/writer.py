"""Writing behind: from outcomes to durable records and checkpoints, in a thread of its own.

    results.jsonl   {"line": 7, "custom_id": "a7", "output": {...}}
    errors.jsonl    {"line": 9, "custom_id": "a9", "error": {"code": "...", "message": "...", "tries": 2}}

Rule 1: records stand in the order of put(); `line` is the original number, `custom_id` is absent where the item has none.
Rule 2: a checkpoint is reported AFTER both outputs were fdatasynced, and describes exactly the bytes synced. Its counts of
failures by code go on from the checkpoint the lease began with, so that what is cut back and redone is counted once.
Rule 3: an output that is not JSON is that item's failure; its neighbours do not notice.
Rule 4: a full disk fails no item: the outputs are cut back to the last checkpoint and the lease is lost.
Rule 5: this thread is the only one that touches the outputs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from json import encoder
from typing import Any, Callable, NamedTuple, Union

from gpujobd_worker.channel import Channel
from gpujobd_worker.failures import BAD_OUTPUT, Deferral, Failure, counted, shorten
from gpujobd_worker.files import JobFiles, LeaseLost, Output, lost_to
from gpujobd_worker.pipe import start_thread

WAITING_BYTES_MAX = 16 << 20  # roughly: what waits for a slow disk is counted by the length of its input
RECORD_BYTES = 1024  # what an outcome is counted as, on top of that

Outcome = Union[dict[str, Any], Failure, Deferral]
Checkpoint = dict[str, Any]


class Batch(NamedTuple):
    """The outcomes of consecutive lines, or of one deferred line."""

    upto: int  # the checkpoint's, once this is durable
    numbers: Sequence[int]  # original line numbers, one an outcome
    custom_ids: list[Any]  # None: the item has none
    outcomes: list[Outcome]
    deferred: list[list[int]] | None  # the whole list after this batch, where it changed
    input_bytes: int

    def weight(self) -> int:
        return self.input_bytes + RECORD_BYTES * len(self.outcomes)


def _make_encode() -> Callable[[object], str]:
    """json.dumps(record, allow_nan=False, ensure_ascii=False) without making an encoder a call: twice as fast.

    No markers, hence no check for circles: the recursion limit finds them, and an encoder with markers would take
    every object of a record that failed for a circle ever after.
    """
    slow = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
    make = getattr(encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C accelerator
        return slow.encode
    fast = make(None, slow.default, encoder.encode_basestring, None, ": ", ", ", False, False, False)
    return lambda record: "".join(fast(record, 0))


_encode = _make_encode()
_encode_ascii = json.JSONEncoder(allow_nan=False).encode


def record_bytes(record: dict[str, Any]) -> bytes:
    """One line. Raises whatever the record's objects raise when they are looked at."""
    line = _encode(record) + "\n"
    try:
        return line.encode()
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, impossible in UTF-8
        return _encode_ascii(record).encode() + b"\n"


class Writer:
    """The thread, the counters, and the latest durable checkpoint."""

    def __init__(
        self,
        files: JobFiles,
        checkpoint: Checkpoint,
        *,
        every_s: float,
        report: Callable[[Checkpoint], None],
        enough: Callable[[int], bool],
        stop: threading.Event,
    ) -> None:
        """`report` is told every checkpoint but the last.

        `stop` is set when work should end: the disk refused, or enough(failed items) says so.
        """
        self.checkpoint = checkpoint  # durable
        self.lost: LeaseLost | None = None
        self._files = files
        self._next = dict(checkpoint)  # not yet durable
        self._dirty = False
        self._every_s = every_s
        self._report = report
        self._enough = enough
        self._stop = stop
        self.write_s = 0.0
        self.sync_s = 0.0
        self._waiting: Channel[Batch] = Channel(WAITING_BYTES_MAX, Batch.weight)
        self._thread = start_thread("writer", self._run)

    def put(self, batch: Batch) -> None:
        """Hand over; waits while the disk is behind."""
        self._waiting.put(batch)

    def finish(self) -> None:
        """Write and sync all that was put. Afterwards `checkpoint` and `lost` tell how it went."""
        self._waiting.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except OSError as error:
            self._give_up(error)

    def _write_until_closed(self) -> None:
        due = time.monotonic() + self._every_s
        while True:
            batches = self._waiting.get_all(max(0.0, due - time.monotonic()) if self._dirty else None)
            if batches is None:
                break
            if batches:
                self._write(batches)
            if self._dirty and time.monotonic() >= due:
                self._sync()
                self._report(self.checkpoint)
                due = time.monotonic() + self._every_s
        self._sync()

    def _write(self, batches: list[Batch]) -> None:
        began = time.perf_counter()
        results: list[bytes] = []
        errors: list[bytes] = []
        codes: list[str] = []
        for batch in batches:
            self._encode(batch, results, errors, codes)
            self._next["upto"] = batch.upto
            if batch.deferred is not None:
                self._next["deferred"] = batch.deferred
        self._append(self._files.results, "results", "done", results)
        self._append(self._files.errors, "errors", "failed", errors)
        if codes:
            self._next["failure_codes"] = counted(self._next.get("failure_codes", {}), codes)
        self._dirty = True
        self.write_s += time.perf_counter() - began
        if errors and self._enough(self._next["failed"]):
            self._stop.set()

    @staticmethod
    def _encode(batch: Batch, results: list[bytes], errors: list[bytes], codes: list[str]) -> None:
        for number, custom_id, outcome in zip(batch.numbers, batch.custom_ids, batch.outcomes):
            head = {"line": number} if custom_id is None else {"line": number, "custom_id": custom_id}
            if type(outcome) is dict:
                try:
                    results.append(record_bytes({**head, "output": outcome}))
                    continue
                except Exception as error:  # noqa: BLE001 - objects of the handler's libraries are looked at here
                    failure = Failure(BAD_OUTPUT, shorten(f"not JSON: {error}"))
            elif isinstance(outcome, Failure):
                failure = outcome
            else:
                continue  # deferred: no record yet
            errors.append(record_bytes({**head, "error": failure._asdict()}))
            codes.append(failure.code)

    def _append(self, output: Output, name: str, counter: str, records: list[bytes]) -> None:
        if not records:
            return
        output.append(b"".join(records))
        self._next[f"{name}_bytes"] = output.size
        self._next[f"{name}_crc"] = output.crc
        self._next[counter] += len(records)

    def _sync(self) -> None:
        if not self._dirty:
            return
        began = time.perf_counter()
        self._files.sync()
        for output in (self._files.results, self._files.errors):
            output.keep()
        self.checkpoint = dict(self._next)
        self._dirty = False
        self.sync_s += time.perf_counter() - began

    def _give_up(self, error: OSError) -> None:
        """The disk refused: end the lease at the last checkpoint."""
        self.lost = lost_to(error, "writing the outputs")
        self._stop.set()
        self._waiting.close()
        if self.lost.cause == "disk_full":
            self._files.results.cut()
            self._files.errors.cut()
