"""The input of a submission: read once, checked, counted and hashed, whatever its size.

Rule 1: never the whole input in memory: a line at a time, of which at most ITEM_BYTES_MAX + 1 bytes are kept.
Rule 2: what is counted is what the daemon counts: a line ends with a newline, the last may lack it, and the length of a
line is without it.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Final

import msgspec
from msgspec import UNSET

ITEM_BYTES_MAX: Final = 1 << 20
BAD_LINES_MAX: Final = 10  # named; the rest would not be read


class Entry(msgspec.Struct):
    """The part of an item that concerns the client; the rest is only checked for being JSON."""

    custom_id: object = UNSET


class Measured(msgspec.Struct):
    """What the header of a submission declares."""

    items: int
    size: int  # bytes
    sha256: bytes
    longest: int
    bad: list[str]  # the first bad lines: "line 17: not JSON: ..."


_decode = msgspec.json.Decoder(Entry).decode


def measure(source: BinaryIO, *, check: bool) -> Measured:
    """Read `source` from where it is to its end."""
    digest = hashlib.sha256()
    found = Measured(0, 0, b"", 0, [])
    seen: dict[str, int] = {}
    while piece := source.readline(ITEM_BYTES_MAX + 1):
        digest.update(piece)
        length = len(piece)
        while not piece.endswith(b"\n") and (more := source.readline(ITEM_BYTES_MAX)):
            digest.update(more)  # the rest of a line that is too long
            length += len(more)
            if more.endswith(b"\n"):
                piece += b"\n"
        found.items += 1
        found.size += length
        length -= piece.endswith(b"\n")
        found.longest = max(found.longest, length)
        if check and (fault := _fault(piece, length, found.items, seen)):
            found.bad.append(f"line {found.items}: {fault}")
            if len(found.bad) == BAD_LINES_MAX:
                break
    found.sha256 = digest.digest()
    return found


def _fault(piece: bytes, length: int, line: int, seen: dict[str, int]) -> str:
    """What is wrong with this line; empty: nothing. `seen` keeps the line of every custom_id."""
    if length > ITEM_BYTES_MAX:
        return f"{length} bytes, at most {ITEM_BYTES_MAX} are allowed"
    if not piece.strip():
        return "blank"
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {error.start + 1}"
    if line == 1 and piece.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte order mark"
    try:
        entry = _decode(piece)
    except RecursionError:
        return "nested too deeply"
    except msgspec.ValidationError:
        return "not a JSON object"
    except msgspec.DecodeError as error:
        return f"not JSON: {error}"
    return "" if entry.custom_id is UNSET else _id_fault(entry.custom_id, line, seen)


def _id_fault(custom_id: object, line: int, seen: dict[str, int]) -> str:
    if not isinstance(custom_id, str):
        return "custom_id is not a string"
    first = seen.setdefault(custom_id, line)
    return "" if first == line else f"custom_id {custom_id[:80]!r} is that of line {first}"
