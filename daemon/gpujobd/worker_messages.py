"""The words on a worker's pipe: newline-delimited JSON, at most LINE_BYTES_MAX a line, over one socketpair.

    daemon -> worker   load, lease, yield, dump, exit
    worker -> daemon   hello, loaded, load_failed, heartbeat, checkpoint, yielded, finished, canary, lost

Rule 1: nothing a worker says is believed before it was checked: a line too long, no JSON, an unknown type, a number
out of bounds, a foreign attempt or a checkpoint that goes backwards is a `Violation`, and costs the worker its life.
Rule 2: keys that are not known are ignored; types and bounds of the known ones are not.
Rule 3: `attempt` fences: all but hello, loaded and load_failed quote the lease they speak of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gpujobd.core.model import (
    CODE_CHARS_MAX,
    CODES_MAX,
    DEFERRED_MAX,
    Checkpoint,
    Deferred,
    ParamValue,
    Span,
    Timings,
)

LINE_BYTES_MAX: Final = 1 << 20
U32_MAX: Final = (1 << 32) - 1

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Text = Annotated[str, Meta(max_length=65536)]


class Violation(Exception):
    """The worker broke the protocol; the message says how."""


# --- daemon to worker -------------------------------------------------------------------------------------------


class ToWorker(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Load(ToWorker, frozen=True, tag="load"):
    """First message, once: build the handler."""

    handler: str
    entry: str
    path: tuple[str, ...]
    device: str
    params: dict[str, Any]
    threads: int
    heartbeat_s: float
    checkpoint_s: float


class Lease(ToWorker, frozen=True, tag="lease"):
    """Run this job; one at a time."""

    job: int
    attempt: int
    dir: str
    items: int
    batch_max: int
    job_params: dict[str, ParamValue]
    failures_max: int
    checkpoint: dict[str, Any]  # every field of a Checkpoint: the journal's encoding leaves zeros out
    suspects: tuple[Span, ...]
    condemned: tuple[int, ...]
    canary: int  # line to recompute first; 0: none
    gives_way: bool = (
        False  # an item that does not fit beside other processes waits for them, instead of failing
    )


class Yield(ToWorker, frozen=True, tag="yield"):
    attempt: int


class Dump(ToWorker, frozen=True, tag="dump"):
    """Write the stacks of all threads to stderr."""


class Exit(ToWorker, frozen=True, tag="exit"):
    """No lease is held: close the handler and leave."""


AnyToWorker = Load | Lease | Yield | Dump | Exit


# --- worker to daemon -------------------------------------------------------------------------------------------


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds a stage, since the last report of this attempt."""

    load_s: Seconds = 0.0
    read_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    write_s: Seconds = 0.0
    sync_s: Seconds = 0.0

    def timings(self) -> Timings:
        return Timings(**msgspec.structs.asdict(self))


class FromWorker(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Hello(FromWorker, frozen=True, tag="hello"):
    pid: Count
    python: Text
    worker: Text


class Loaded(FromWorker, frozen=True, tag="loaded"):
    load_s: Seconds
    vram_bytes: Count = 0
    device_bytes: Count = 0  # all of the device's memory; 0: not known
    hardware: Text = ""
    uuid: Text = ""  # of the GPU


class LoadFailed(FromWorker, frozen=True, tag="load_failed"):
    """Last message before exit status 1."""

    error: Text
    trace: Annotated[str, Meta(max_length=LINE_BYTES_MAX)] = ""
    out_of_memory: bool = False


class Quoting(FromWorker, frozen=True):
    attempt: Count


class Heartbeat(Quoting, frozen=True, tag="heartbeat"):
    """Alive, this far. `progress` grows whenever a call of the handler returned."""

    line: Count = 0
    batch: Count = 0
    progress: Count = 0


class WorkDone(Quoting, frozen=True):
    checkpoint: Checkpoint
    timings: Times = Times()
    vram_bytes: Count = 0


class Checkpointed(WorkDone, frozen=True, tag="checkpoint"):
    """Both outputs are synced up to here; work goes on."""


class Yielded(WorkDone, frozen=True, tag="yielded"):
    others_bytes: Count = 0  # it gave way to others, who held so much of the device; 0: it was asked to yield


class Finished(WorkDone, frozen=True, tag="finished"):
    """Every item was tried."""


class CanaryPassed(Quoting, frozen=True, tag="canary"):
    pass


LostCause = Literal["died", "poisoned", "canary", "disk_full", "output_damaged", "failures_max", "input_lost"]
LAST_WORDS: Final = frozenset({"died", "poisoned", "canary"})  # the process exits after these


class Lost(Quoting, frozen=True, tag="lost"):
    """The lease is over."""

    cause: LostCause
    detail: Text = ""
    checkpoint: Checkpoint | None = None  # the last durable one, where it was not reported yet
    timings: Times = Times()
    vram_bytes: Count = 0


AnyFromWorker = (
    Hello | Loaded | LoadFailed | Heartbeat | Checkpointed | Yielded | Finished | CanaryPassed | Lost
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyFromWorker] = msgspec.json.Decoder(AnyFromWorker, strict=True)


def line(message: AnyToWorker) -> bytes:
    """Encode one message, newline included.

    Raises:
        ValueError: it is longer than a worker reads, or holds what JSON has no word for.
    """
    try:
        encoded = _encoder.encode(message) + b"\n"
    except (msgspec.MsgspecError, OverflowError, TypeError) as error:
        raise ValueError(str(error)) from None
    if len(encoded) > LINE_BYTES_MAX:
        raise ValueError(f"a message of {len(encoded)} bytes, allowed are {LINE_BYTES_MAX}")
    return encoded


def decode(encoded: bytes) -> AnyFromWorker:
    """Raises: Violation for anything that is no message; nothing else escapes, whatever the bytes."""
    try:
        return _decoder.decode(encoded)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise Violation(f"not a message: {error}") from None


class Lines:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[AnyFromWorker]:
        """Yield every message that is complete now.

        Raises:
            Violation: a line too long, or one that is no message; the stream cannot be followed any further.
        """
        self._buffer += data
        *whole, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        for encoded in whole:
            yield decode(bytes(_bounded(encoded)))
        _bounded(self._buffer)


def _bounded(encoded: bytearray) -> bytearray:
    if len(encoded) > LINE_BYTES_MAX:
        raise Violation(f"a line of over {LINE_BYTES_MAX} bytes")
    return encoded


def check_checkpoint(new: Checkpoint, before: Checkpoint, items: int) -> None:
    """Whether `new` can follow `before` in a job of `items` lines.

    Raises:
        Violation: it goes backwards, counts more than there is, or contradicts itself.
    """
    for name in ("upto", "results_bytes", "errors_bytes", "done", "failed"):
        now, was = getattr(new, name), getattr(before, name)
        if not was <= now <= 1 << 62:
            raise Violation(f"checkpoint goes backwards: {name} from {was} to {now}")
    if not (0 <= new.results_crc <= U32_MAX and 0 <= new.errors_crc <= U32_MAX):
        raise Violation("checkpoint with a CRC that has not 32 bits")
    if new.upto > items:
        raise Violation(f"checkpoint up to line {new.upto} of {items}")
    _check_deferred(new.deferred, new.upto)
    _check_codes(new, before)
    counted = new.done + new.failed + len(new.deferred)
    if counted > new.upto or (counted != new.upto and new.upto < items):
        raise Violation(f"checkpoint up to line {new.upto} that counts {counted}")


def _check_deferred(deferred: tuple[Deferred, ...], upto: int) -> None:
    if len(deferred) > DEFERRED_MAX:
        raise Violation(f"checkpoint with {len(deferred)} deferred items, allowed are {DEFERRED_MAX}")
    if any(not (1 <= item.line <= upto and item.tries >= 1) for item in deferred):
        raise Violation("checkpoint with a deferred item beyond its lines, or never tried")
    if len({item.line for item in deferred}) != len(deferred):
        raise Violation("checkpoint that defers an item twice")


def _check_codes(new: Checkpoint, before: Checkpoint) -> None:
    codes = new.failure_codes
    if len(codes) > CODES_MAX + 1:
        raise Violation(
            f"checkpoint with {len(codes)} error codes, allowed are {CODES_MAX} and one for the rest"
        )
    for code, count in codes.items():
        if not (code.isascii() and code.isidentifier() and len(code) <= CODE_CHARS_MAX) or count < 1:
            raise Violation(f"checkpoint that counts {count} of the error code {code[:CODE_CHARS_MAX]!r}")
    if any(codes.get(code, 0) < count for code, count in before.failure_codes.items()):
        raise Violation("checkpoint goes backwards: an error code was counted more often")
    if (counted := sum(codes.values())) > new.failed:
        raise Violation(f"checkpoint with error codes for {counted} items where {new.failed} failed")


def check_finished(final: Checkpoint, items: int) -> None:
    """Raises: Violation where items are left."""
    if final.upto != items or final.deferred or final.done + final.failed != items:
        raise Violation(f"finished with {items - final.done - final.failed} of {items} items left")
