r"""Reading ahead: from the bytes of input.jsonl to items, in a thread of its own.

Rule 1: a line is what stands between two "\\n"; its number is physical, 1-based, blank lines included.
Rule 2: a broken line is that line's failure alone. Every line is parsed for itself (never joined with others: two
broken lines can make a whole one), by the C scanner, which costs 1.2 us for a short item.
Rule 3: memory is bounded: blocks of READ_BYTES, lines of LINE_BYTES_MAX, CHUNKS_AHEAD chunks.
"""

from __future__ import annotations

import codecs
import json
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

from gpujobd_worker.channel import Channel
from gpujobd_worker.failures import BAD_JSON, ITEM_TOO_LARGE, Failure, shorten
from gpujobd_worker.files import INPUT, OPEN_FLAGS, LeaseLost, input_lost_to
from gpujobd_worker.pipe import start_thread

NUMBERS = "lines"
READ_BYTES = 1 << 18
LINE_BYTES_MAX = 1 << 20
CHUNK_LINES_MAX = 1024
CHUNKS_AHEAD = 4
SEGMENT_BYTES = 16 << 20  # a segment takes no further chunk beyond this

Item = Union[dict[str, Any], Failure]


class Chunk(NamedTuple):
    """Consecutive lines. `texts` are kept so that a second try gets fresh items, whatever the first did to them."""

    first: int
    texts: list[bytes]
    items: list[Item]


class TooLong(bytes):
    """Stands for a line over LINE_BYTES_MAX, whose bytes were not kept."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def parse(texts: list[bytes]) -> list[Item]:
    """One item a line."""
    scan = _decoder.raw_decode
    items: list[Item] = []
    for text in texts:
        try:
            line = text.decode()
            item, end = scan(line)
        except (ValueError, RecursionError):
            items.append(_parse_slowly(text))
            continue
        whole = end == len(line) and type(item) is dict
        items.append(item if whole else _parse_slowly(text))
    return items


def _parse_slowly(text: bytes) -> Item:
    """Parse a line that has blanks around its object, or find the words for what is wrong with it."""
    if isinstance(text, TooLong):
        return Failure(ITEM_TOO_LARGE, f"the line is longer than {LINE_BYTES_MAX} bytes")
    if not text.strip():
        return Failure(BAD_JSON, "the line is blank")
    if text.startswith(codecs.BOM_UTF8):
        return Failure(BAD_JSON, "the line begins with a byte order mark")
    try:
        item = _decoder.decode(text.decode())
    except RecursionError:
        return Failure(BAD_JSON, "nested too deeply")
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, a number of too many digits
        return Failure(BAD_JSON, shorten(str(error)))
    if not isinstance(item, dict):
        return Failure(BAD_JSON, f"not a JSON object but {type(item).__name__}")
    return item


def read_numbers(folder: int, items: int) -> list[int]:
    """The original line numbers of a retry, index 0 for line 1; empty: the job's own numbers are the original ones.

    Raises: LeaseLost.
    """
    try:
        with open(os.open(NUMBERS, os.O_RDONLY | OPEN_FLAGS, dir_fd=folder), "rb") as file:
            numbers = [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise input_lost_to(error, NUMBERS) from None
    except ValueError as error:
        raise LeaseLost("input_lost", f"{NUMBERS}: {error}") from None
    if len(numbers) < items:
        raise LeaseLost("input_lost", f"{NUMBERS} has {len(numbers)} numbers for {items} items")
    return numbers


def cut_lines(fd: int) -> Iterator[list[bytes]]:
    """All lines of a file, many at a time."""
    begun = b""  # of the line that the block before did not end
    at = 0
    while block := os.pread(fd, READ_BYTES, at):
        at += len(block)
        *lines, rest = block.split(b"\n")
        if not lines:
            begun = _bounded(begun, rest)
            continue
        lines[0] = _bounded(begun, lines[0])
        begun = rest
        yield lines
    if begun:
        yield [begun]


def _bounded(begun: bytes, more: bytes) -> bytes:
    if isinstance(begun, TooLong) or len(begun) + len(more) > LINE_BYTES_MAX:
        return TooLong()
    return begun + more if begun else more


def chunks(fd: int, after: int, last: int) -> Iterator[tuple[int, list[bytes]]]:
    """Lines after+1..last as (number of the first, lines), CHUNK_LINES_MAX at most.

    Raises: LeaseLost where the file ends before, OSError.
    """
    line = 0  # number of the last line seen
    for lines in cut_lines(fd):
        kept = lines[max(0, after - line) : last - line]
        first = max(line, after) + 1
        line += len(lines)
        for at in range(0, len(kept), CHUNK_LINES_MAX):
            yield first + at, kept[at : at + CHUNK_LINES_MAX]
        if line >= last:
            return
    if line < last:
        raise LeaseLost("input_lost", f"{INPUT} has {line} lines instead of {last}")


class Segment(NamedTuple):
    """Consecutive lines for one call."""

    first: int
    texts: list[bytes]
    items: list[Item]

    @property
    def last(self) -> int:
        return self.first + len(self.texts) - 1

    def input_bytes(self) -> int:
        return sum(map(len, self.texts))

    def halves(self) -> Iterator[Segment]:
        """The second half first, as a stack wants it; items fresh, whatever the failed call did to them."""
        middle = len(self.texts) // 2
        for first, texts in (
            (self.first + middle, self.texts[middle:]),
            (self.first, self.texts[:middle]),
        ):
            yield Segment(first, texts, parse(texts))


class Reader:
    """The thread, and the chunks it has ready."""

    def __init__(self, fd: int, after: int, last: int) -> None:
        self._fd = fd
        self._span = (after, last)
        self._ready: Channel[Chunk | LeaseLost] = Channel(CHUNKS_AHEAD)
        self.read_s = 0.0
        self._thread = start_thread("reader", self._run)

    def next(self) -> Chunk | None:
        """The next chunk; None: that was the last.

        Raises: LeaseLost.
        """
        got = self._ready.get()
        if isinstance(got, LeaseLost):
            raise got
        return got

    def stop(self) -> None:
        self._ready.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._read()
        except LeaseLost as lost:
            self._ready.put(lost)
        except OSError as error:
            self._ready.put(input_lost_to(error, INPUT))
        self._ready.close()

    def _read(self) -> None:
        began = time.perf_counter()
        for first, texts in chunks(self._fd, *self._span):
            chunk = Chunk(first, texts, parse(texts))
            self.read_s += time.perf_counter() - began
            if not self._ready.put(chunk):
                return
            began = time.perf_counter()


class Window:
    """Items read and not yet tried."""

    def __init__(self, reader: Reader, first: int) -> None:
        self._reader = reader
        self._chunk: Chunk = Chunk(first, [], [])
        self._at = 0  # of the chunk's lines, how many were taken

    @property
    def line(self) -> int:
        """The number of the next line."""
        return self._chunk.first + self._at

    def take(self, size: int) -> Segment | None:
        """The next `size` lines, fewer at the end; None: there are no more. Raises: LeaseLost."""
        first = self.line
        texts: list[bytes] = []
        items: list[Item] = []
        input_bytes = 0
        while len(texts) < size and input_bytes < SEGMENT_BYTES and self._fill():
            end = self._at + size - len(texts)
            piece = self._chunk.texts[self._at : end]
            texts += piece
            items += self._chunk.items[self._at : end]
            input_bytes += sum(map(len, piece))
            self._at = min(end, len(self._chunk.texts))
        return Segment(first, texts, items) if texts else None

    def _fill(self) -> bool:
        if self._at < len(self._chunk.texts):
            return True
        chunk = self._reader.next()
        if chunk is None:
            return False
        self._chunk, self._at = chunk, 0
        return True
