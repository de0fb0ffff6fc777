"""What went wrong, for one item or for a whole call, in words that outlive the exception.

Rule 1: an exception holds the frames of the call, and with them its tensors. It is turned into a Verdict, which is
text, inside the except block; whatever frees memory runs after that block (PyTorch FAQ, "My out of memory exception
handler can't allocate memory").
Rule 2: a handler's own text never decides the fate of a worker: "CUDA error: ..." counts in a RuntimeError, the type
torch raises, and only at the start; a ValueError quoting an item counts for nothing.

    kind       what is done                                         examples
    rejected   the item fails, for good                             Rejected
    transient  the item waits for the end of the job                Transient
    oom        free, halve, go on                                   torch.OutOfMemoryError, CUBLAS_STATUS_ALLOC_FAILED
    poisoned   the process ends: only a new one helps               device-side assert, illegal memory access
    broken     bisect; alone, the item fails: handler_error         all else
    bad_output bisect; alone, the item fails                        wrong length, not a list, not JSON
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpujobd_worker import Rejected, Transient

# Codes of error records. Wire format: add, never rename.
REJECTED = "rejected"
TRANSIENT = "transient"
HANDLER_ERROR = "handler_error"
BAD_OUTPUT = "bad_output"
BAD_JSON = "bad_json"
OUT_OF_MEMORY = "out_of_memory"
WORKER_LOST = "worker_lost"
ITEM_TOO_LARGE = "item_too_large"
OTHER = "other"  # in the counts of a checkpoint only: the codes that are beyond CODES_MAX

# Kinds of verdicts which are no codes.
OOM = "oom"
POISONED = "poisoned"
BROKEN = "broken"

CODES_MAX = (
    10  # counted by themselves; there are fewer, and a count of them must stay small whatever is added
)
MESSAGE_CHARS_MAX = 500
CHAIN_MAX = 8  # links of __cause__ and __context__ looked at

# Anywhere in the text. The allocators of cuBLAS and cuDNN live outside torch's own, so theirs come untidy
# (pytorch issues 128601, 2300; the list accelerate keeps); NOT_INITIALIZED is a handle that found no memory.
OOM_TEXTS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "RESOURCE_EXHAUSTED",
)
# At the start of the text.
POISON_TEXTS = ("CUDA error:", "HIP error:", "cuDNN error:", "CUDA driver error:")
# Errors of the call, not of the context: the next call is fine.
HARMLESS_TEXTS = (
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_BAD_PARAM",
    "no kernel image is available",
)


class Failure(NamedTuple):
    """Why one item failed: what its error record says."""

    code: str
    message: str
    tries: int = 1


class Deferral(NamedTuple):
    """An item that wants to be tried again, and how often it was tried."""

    tries: int


class Verdict(NamedTuple):
    kind: str
    message: str
    accelerator: bool = (
        False  # it came from the device's context, not from an allocator that cleans up after itself
    )
    trace: str = ""


def counted(before: dict[str, int], codes: Iterable[str]) -> dict[str, int]:
    """The counts with these failures added: a new dict, for the one before belongs to a checkpoint."""
    counts = dict(before)
    for code in codes:
        known = code in counts or len(counts) - (OTHER in counts) < CODES_MAX
        word = code if known else OTHER
        counts[word] = counts.get(word, 0) + 1
    return counts


def shorten(text: str, chars_max: int = MESSAGE_CHARS_MAX) -> str:
    return text if len(text) <= chars_max else text[: chars_max - 3] + "..."


def describe(error: BaseException) -> str:
    """`TypeName: text`, capped."""
    return shorten(f"{type(error).__name__}: {_text(error)}".rstrip(": "))


def failure_of(error: BaseException) -> Failure:
    """The failure of a single item whose call, or whose place in the answer, gave this exception."""
    if isinstance(error, Rejected):
        return Failure(REJECTED, shorten(_text(error)))
    if isinstance(error, Transient):
        return Failure(TRANSIENT, shorten(_text(error)))
    return Failure(HANDLER_ERROR, describe(error))


def refusal_of(error: BaseException) -> Failure:
    """The failure of an item that the handler's check() did not let pass: any exception says no."""
    if isinstance(error, (Rejected, ValueError)):
        return Failure(REJECTED, shorten(_text(error)))
    return Failure(REJECTED, describe(error))


def classify(error: BaseException) -> Verdict:
    """Judge what a call raised."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-20))
    if isinstance(error, Rejected):
        return Verdict(REJECTED, shorten(_text(error)), trace=trace)
    if isinstance(error, Transient):
        return Verdict(TRANSIENT, shorten(_text(error)), trace=trace)
    for link in _chain(error):
        kind = _kind(link)
        if kind != BROKEN:
            return Verdict(kind, describe(link), accelerator=_from_context(link), trace=trace)
    return Verdict(BROKEN, describe(error), trace=trace)


def _kind(error: BaseException) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OOM
    if not isinstance(error, RuntimeError):
        return BROKEN
    text = _text(error)
    if any(sign in text[:1000] for sign in OOM_TEXTS):
        return OOM
    if any(sign in text[:1000] for sign in HARMLESS_TEXTS):
        return BROKEN
    return POISONED if _from_context(error) or text.startswith(POISON_TEXTS) else BROKEN


def _from_context(error: BaseException) -> bool:
    """torch.AcceleratorError (since 2.8), or the RuntimeError it was before: the context itself complains."""
    if type(error).__name__ == "AcceleratorError":
        return True
    plain = isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError"
    return plain and _text(error).startswith("CUDA error: out of memory")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it came from, nearest first: handlers wrap what torch raises."""
    link: BaseException | None = error
    for _ in range(CHAIN_MAX):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _text(error: BaseException) -> str:
    """str(error), for exceptions whose own __str__ may raise."""
    try:
        return str(error)
    except Exception as worse:  # noqa: BLE001 - code of the handler's libraries
        return f"(no text: its __str__ raised {type(worse).__name__})"
