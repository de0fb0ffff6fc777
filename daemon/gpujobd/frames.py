r"""The journal's bytes: segments and frames. Pure functions, no I/O.

    segment := block 0 | frame* | zeros to its full size
    block 0 := magic "GJDSEG01" | version u32 | store 16 B | first_seq u64 | lost_from u64 | prev_header_crc u32
               | created_ns u64 | segment_bytes u64 | zeros | crc32(first 4,092 bytes) u32      (4,096 bytes)
    frame   := header | payload | zeros to the next multiple of 4,096
    header  := magic "JF1\n" | payload_len u32 | first_seq u64 | committed_seq u64 | nrec u32 | store_id u32
               | prev_header_crc u32 | body_crc u32 | header_crc u32                            (44 bytes)
    payload := msgpack array of nrec binary records; a watermark has none, a seal is the string "seal"

All little-endian. body_crc = crc32(payload and padding, seeded with the low half of first_seq); header_crc =
crc32(first 40 bytes). store_id is the first four bytes of the store's uuid, which no user sees: a record that
looks like a frame cannot pass for one.

Rule 1: a frame starts at a multiple of 4,096 and shares no block with another, so a write never touches a block
that was synced before. A sector (512 bytes) is written whole or not at all.
Rule 2: a frame names the header before it, so a lost, stale, doubled or misplaced frame breaks the chain.
Rule 3: the sequence jumps in one place only, at the start of a segment whose block 0 says from where (lost_from):
that is what `fsck --accept-loss` writes, and nothing else does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

BLOCK: Final = 4096
SECTOR: Final = 512
FRAME_BYTES_MAX: Final = 8 << 20
VERSION: Final = 1

_FRAME: Final = struct.Struct("<4sIQQIIIII")
_SEGMENT: Final = struct.Struct("<8sI16sQQIQQ")
_CRC: Final = struct.Struct("<I")
_FRAME_MAGIC: Final = b"JF1\n"
_SEGMENT_MAGIC: Final = b"GJDSEG01"
HEADER_BYTES: Final = _FRAME.size
_CHECKED_BYTES: Final = HEADER_BYTES - _CRC.size
_ZEROS: Final = bytes(1 << 20)

WATERMARK: Final = msgspec.msgpack.encode([])
SEAL: Final = msgspec.msgpack.encode("seal")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[bytes]).decode


class Header(NamedTuple):
    """The fixed part of one frame."""

    payload_len: int
    first_seq: int
    committed_seq: int  # all up to here was synced before this frame was written
    nrec: int
    store_id: int
    prev_header_crc: int
    body_crc: int
    header_crc: int

    @property
    def size(self) -> int:
        """Bytes on disk, padding included."""
        return _padded(HEADER_BYTES + self.payload_len)

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.nrec - 1


class SegmentHeader(NamedTuple):
    """Block 0."""

    store: bytes  # uuid, 16 bytes
    first_seq: int
    lost_from: int  # 0: nothing was lost before this segment
    prev_header_crc: int
    created_ns: int
    segment_bytes: int

    @property
    def begins(self) -> int:
        """The first sequence number this segment answers for, lost ones included."""
        return self.lost_from or self.first_seq


def store_id(store: bytes) -> int:
    return int.from_bytes(store[:4], "little")


def payload_of(records: Sequence[bytes]) -> bytes:
    return _encode(records)


def payload_bound(records: Sequence[bytes]) -> int:
    """No payload of these records is longer: five bytes a msgpack length at most."""
    return 5 + 5 * len(records) + sum(map(len, records))


def frame(payload: bytes, nrec: int, *, first_seq: int, store: int, prev_header_crc: int) -> bytes:
    """One frame, padded. With one frame in flight, all before it is committed."""
    size = _padded(HEADER_BYTES + len(payload))
    assert size <= FRAME_BYTES_MAX, size
    padding = bytes(size - HEADER_BYTES - len(payload))
    body_crc = crc32(padding, crc32(payload, first_seq & 0xFFFFFFFF))
    head = _FRAME.pack(
        _FRAME_MAGIC, len(payload), first_seq, first_seq - 1, nrec, store, prev_header_crc, body_crc, 0
    )[:_CHECKED_BYTES]
    return b"".join((head, _CRC.pack(crc32(head)), payload, padding))


def header_crc(framed: bytes) -> int:
    """What the next frame names as the header before it."""
    crc: int = _CRC.unpack_from(framed, _CHECKED_BYTES)[0]
    return crc


def parse(segment: bytes, offset: int) -> Header | None:
    """Read the header at `offset`; None unless it checks. The body is not looked at."""
    if len(segment) - offset < HEADER_BYTES or not segment.startswith(_FRAME_MAGIC, offset):
        return None
    fields = _FRAME.unpack_from(segment, offset)
    if crc32(segment[offset : offset + _CHECKED_BYTES]) != fields[8]:
        return None
    return Header(*fields[1:])


def body_checks(segment: bytes, offset: int, header: Header) -> bool:
    """Whether payload and padding are what the header promised."""
    end = offset + header.size
    if end > len(segment):
        return False
    with memoryview(segment) as view:
        return crc32(view[offset + HEADER_BYTES : end], header.first_seq & 0xFFFFFFFF) == header.body_crc


def records_of(segment: bytes, offset: int, header: Header) -> list[bytes]:
    """The records of a frame that checks."""
    with memoryview(segment) as view:
        start = offset + HEADER_BYTES
        records = _decode(view[start : start + header.payload_len]) if header.nrec else []
    assert len(records) == header.nrec, (header, len(records))
    return records


def is_seal(segment: bytes, offset: int, header: Header) -> bool:
    start = offset + HEADER_BYTES
    return not header.nrec and segment[start : start + header.payload_len] == SEAL


def has_hole(segment: bytes, offset: int, payload_len: int) -> bool:
    """Whether a sector of the frame at `offset` that should hold payload, other than the first, is all zero."""
    end = min(offset + HEADER_BYTES + payload_len, len(segment))
    return any(is_zero(segment, at, at + SECTOR) for at in range(offset + SECTOR, end, SECTOR))


def segment_block(header: SegmentHeader) -> bytes:
    """Block 0."""
    head = _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, *header).ljust(BLOCK - _CRC.size, b"\0")
    return head + _CRC.pack(crc32(head))


def parse_segment(segment: bytes) -> SegmentHeader | None:
    """Read block 0; None unless it checks."""
    if len(segment) < BLOCK or not segment.startswith(_SEGMENT_MAGIC):
        return None
    _, version, *fields = _SEGMENT.unpack_from(segment)
    (crc,) = _CRC.unpack_from(segment, BLOCK - _CRC.size)
    if version != VERSION or crc32(segment[: BLOCK - _CRC.size]) != crc:
        return None
    return SegmentHeader(*fields)


def is_zero(segment: bytes, start: int, end: int) -> bool:
    """Whether segment[start:end] holds nothing, at the speed of memcmp."""
    end = min(end, len(segment))
    for at in range(start, end, len(_ZEROS)):
        piece = segment[at : min(at + len(_ZEROS), end)]
        if piece != (_ZEROS if len(piece) == len(_ZEROS) else _ZEROS[: len(piece)]):
            return False
    return True


def last_nonzero(segment: bytes) -> int:
    """The end of the last block that holds anything."""
    end = len(segment)
    while end > 0 and is_zero(segment, max(end - BLOCK, 0), end):
        end = max(end - BLOCK, 0)
    return end


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
