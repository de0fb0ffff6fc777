"""A snapshot's file: chunks of somebody else's bytes, kept so that no damage passes for a snapshot.

    file    := magic "GJDSNP01" | version u32 | store 16 B | seq u64 | chunk* | end
    chunk   := length u32 | crc32(bytes, seeded with the chunk's number) u32 | bytes
    end     := 0xFFFFFFFF u32 | number of chunks u32 | sha256 of all before it, 32 B           (then nothing)

Rule 1: a snapshot has its name only once it was synced, read back and checked: tmp, fsync, read, rename, fsync_dir.
Rule 2: it is valid as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import Final
from zlib import crc32

from gpujobd.disk import Disk, put

_HEAD: Final = struct.Struct("<8sI16sQ")
_CHUNK: Final = struct.Struct("<II")
_MAGIC: Final = b"GJDSNP01"
_VERSION: Final = 1
_END: Final = 0xFFFFFFFF
_SHA_BYTES: Final = 32


class SnapshotDamagedError(Exception):
    """The file is no whole snapshot; the message says where and why."""


class Chunks(Iterator[bytes]):
    """The chunks of one snapshot, checked as they come: only a full pass proves the file.

    Raises:
        SnapshotDamagedError: on making or on reading.
        OSError: the device refused to read.
    """

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._sha = hashlib.sha256()
        self._offset = 0
        self._number = 0
        self._fd = disk.open(path)
        try:
            self._size = disk.size(self._fd)
            head = self._take(_HEAD.size)
            magic, version, self.store, self.seq = _HEAD.unpack(head)
            if magic != _MAGIC or version != _VERSION:
                raise SnapshotDamagedError("no snapshot header")  # noqa: TRY301 - as every other wrong byte
        except BaseException:
            self.close()
            raise

    def __next__(self) -> bytes:
        if self._fd < 0:
            raise StopIteration
        try:
            return self._chunk()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    def _chunk(self) -> bytes:
        so_far = self._sha.digest()
        length, crc = _CHUNK.unpack(self._take(_CHUNK.size))
        if length == _END:
            self._check_end(crc, so_far)
            raise StopIteration
        chunk = self._take(length)
        if crc32(chunk, self._number) != crc:
            raise SnapshotDamagedError(f"chunk {self._number} before offset {self._offset} does not check")
        self._number += 1
        return chunk

    def _check_end(self, chunks: int, so_far: bytes) -> None:
        sha = self._take(_SHA_BYTES)
        if chunks != self._number or sha != so_far or self._offset != self._size:
            raise SnapshotDamagedError(f"the end at offset {self._offset} does not check")

    def _take(self, size: int) -> bytes:
        if size > self._size - self._offset:
            raise SnapshotDamagedError(f"cut short: {self._size} bytes, {size} more wanted at {self._offset}")
        piece = self._disk.pread(self._fd, size, self._offset) if size else b""
        if len(piece) != size:
            raise SnapshotDamagedError(f"cut short at offset {self._offset}")
        self._offset += size
        self._sha.update(piece)
        return piece


def write(disk: Disk, path: str, store: bytes, seq: int, chunks: Iterable[bytes]) -> None:
    """Write, sync, drop from the cache, read back and check the file at `path`.

    Raises:
        OSError: what was written is not to be used.
        SnapshotDamagedError: the device gave back something else.
    """
    fd = disk.open(path, write=True, create=True)
    try:
        sha = _write_all(disk, fd, _HEAD.pack(_MAGIC, _VERSION, store, seq), chunks)
        disk.fsync(fd)
        disk.forget(fd)
    finally:
        disk.close(fd)
    if check(disk, path) != sha:
        raise SnapshotDamagedError("the device gave back another snapshot")


def check(disk: Disk, path: str) -> bytes:
    """Read the whole file; its sha256. Raises as Chunks does."""
    chunks = Chunks(disk, path)
    for _ in chunks:
        pass
    return chunks._sha.digest()  # noqa: SLF001 - the reader's own running sum, end included


def _write_all(disk: Disk, fd: int, head: bytes, chunks: Iterable[bytes]) -> bytes:
    """Returns the sha256 of the whole file."""
    sha = hashlib.sha256()
    offset = number = 0

    def add(piece: bytes) -> None:
        nonlocal offset
        put(disk, fd, piece, offset)
        sha.update(piece)
        offset += len(piece)

    add(head)
    for chunk in chunks:
        assert len(chunk) < _END
        add(_CHUNK.pack(len(chunk), crc32(chunk, number)) + chunk)
        number += 1
    digest = sha.digest()
    add(_CHUNK.pack(_END, number) + digest)
    return sha.digest()
