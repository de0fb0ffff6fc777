"""losefs: a file system in memory, through FUSE, that forgets what was not synced.

    python losefs.py MOUNTPOINT                     until it is unmounted

    os.setxattr(MOUNTPOINT, "user.losefs", json)    {"do": "crash", "keep": "none|all|sectors", "seed": 1}
                                                    {"do": "fail", "call": "write|fsync|fsyncdir|create|rename",
                                                     "path": "part of a name", "errno": 5, "after": 0, "sticky": false}
                                                    {"do": "limit", "bytes": 1000000}      {"do": "heal"}

Rule 1: bytes are durable after fsync or fdatasync of the file, names after fsync of their directory. A rename between
two directories is one change, durable with either. Nothing else promises anything.
Rule 2: of what is not durable a crash keeps nothing ("none"), everything ("all"), or any subset of sectors of 512 bytes
and of changes of names ("sectors").
Rule 3: after a failed sync the bytes count as clean: they are read, the next sync succeeds, and a crash takes them.
Rule 4: whoever asks for a crash has ended every process that holds a file here.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import stat
import sys
import time
from typing import Any

import pyfuse3
import trio
from pyfuse3 import FUSEError

SECTOR = 512
CONTROL = b"user.losefs"
ROOM = 1 << 34  # bytes, as long as there is no limit


@dataclasses.dataclass
class Fault:
    call: str
    errno: int
    path: str = ""
    after: int = 0
    sticky: bool = False


@dataclasses.dataclass
class Inode:
    mode: int
    uid: int = 0
    gid: int = 0
    changed_ns: int = dataclasses.field(default_factory=time.time_ns)
    names: dict[bytes, int] = dataclasses.field(default_factory=dict)  # of a directory
    kept_names: dict[bytes, int] = dataclasses.field(default_factory=dict)  # those that are durable
    held: bytearray = dataclasses.field(default_factory=bytearray)  # of a file: what is read
    before: dict[int, bytes] = dataclasses.field(
        default_factory=dict
    )  # sector: what is durable there instead
    doomed: dict[int, bytes] = dataclasses.field(default_factory=dict)  # the same, where a sync has failed
    kept_size: int = 0

    def write(self, at: int, piece: bytes) -> None:
        self._remember(at // SECTOR, -(-(at + len(piece)) // SECTOR))
        if len(self.held) < at + len(piece):
            self.held.extend(bytes(at + len(piece) - len(self.held)))
        self.held[at : at + len(piece)] = piece

    def resize(self, size: int) -> None:
        if size < len(self.held):
            self._remember(size // SECTOR, -(-len(self.held) // SECTOR))
            del self.held[size:]
        self.held.extend(bytes(size - len(self.held)))

    def _remember(self, first: int, end: int) -> None:
        for sector in range(first, end):
            if sector not in self.before:
                found = self.doomed.pop(sector, None)
                at = sector * SECTOR
                self.before[sector] = bytes(self.held[at : at + SECTOR]) if found is None else found

    def sync(self) -> None:
        self.before.clear()
        self.kept_size = len(self.held)

    def fail_sync(self) -> None:
        self.doomed |= self.before
        self.before.clear()

    def crash(self, keep: str, luck: random.Random) -> None:
        share = luck.choice((0.1, 0.5, 0.9)) if keep == "sectors" else float(keep == "all")
        lost = self.doomed | {s: old for s, old in self.before.items() if luck.random() >= share}
        size = len(self.held) if luck.random() < share else self.kept_size
        self.held.extend(bytes(max(0, size - len(self.held))))
        for sector, old in lost.items():
            self.held[sector * SECTOR : (sector + 1) * SECTOR] = old.ljust(SECTOR, b"\0")
        del self.held[size:]
        self.held.extend(bytes(size - len(self.held)))
        self.before.clear()
        self.doomed.clear()
        self.kept_size = size


Change = list[tuple[int, bytes, int | None]]  # directory, name, inode or gone


class LoseFS(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.inodes = {pyfuse3.ROOT_INODE: Inode(stat.S_IFDIR | 0o755)}
        self.changes: list[Change] = []  # of names, not yet durable, in order
        self.faults: list[Fault] = []
        self.limit: int | None = None
        self._next = pyfuse3.ROOT_INODE + 1

    # --- faults -----------------------------------------------------------------------------------------------------

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: object) -> None:
        if name != CONTROL:
            raise FUSEError(errno.ENOTSUP)
        match json.loads(value):
            case {"do": "crash", "keep": keep, "seed": seed}:
                self._crash(keep, random.Random(seed))
            case {"do": "fail", **fault}:
                self.faults.append(Fault(**fault))
            case {"do": "limit", "bytes": limit}:
                self.limit = limit
            case {"do": "heal"}:
                self.faults, self.limit = [], None
            case _:
                raise FUSEError(errno.EINVAL)

    def _crash(self, keep: str, luck: random.Random) -> None:
        for change in self.changes:
            if keep == "all" or (keep == "sectors" and luck.random() < 0.5):
                self._make_durable(change)
        self.changes, self.faults = [], []
        for inode in self.inodes.values():
            inode.names = dict(inode.kept_names)
            inode.crash(keep, luck)
        self._forget_unreachable()

    def _forget_unreachable(self) -> None:
        reached, todo = set(), [pyfuse3.ROOT_INODE]
        while todo:
            reached.add(number := todo.pop())
            todo += self.inodes[number].names.values()
        self.inodes = {number: inode for number, inode in self.inodes.items() if number in reached}

    def _meet(self, call: str, inode: int, name: bytes = b"") -> int:
        """The error that this call meets; 0: none."""
        for fault in self.faults:
            if fault.call == call and fault.path in (name.decode() or self._name(inode)):
                fault.after -= 1
                if fault.after < 0:
                    if not fault.sticky:
                        self.faults.remove(fault)
                    return fault.errno
        return 0

    def _name(self, wanted: int) -> str:
        for inode in self.inodes.values():
            for name, number in inode.names.items():
                if number == wanted:
                    return name.decode()
        return ""

    def _take_room(self, size: int) -> None:
        if self.limit is not None and size > 0 and self._used() + size > self.limit:
            raise FUSEError(errno.ENOSPC)

    def _used(self) -> int:
        return sum(len(inode.held) for inode in self.inodes.values())

    # --- names ------------------------------------------------------------------------------------------------------

    def _change(self, *change: tuple[int, bytes, int | None]) -> None:
        for folder, name, number in change:
            if number is None:
                del self.inodes[folder].names[name]
            else:
                self.inodes[folder].names[name] = number
        self.changes.append(list(change))

    def _make_durable(self, change: Change) -> None:
        for folder, name, number in change:
            kept = self.inodes[folder].kept_names
            if number is None:
                kept.pop(name, None)
            else:
                kept[name] = number

    async def fsyncdir(self, inode: int, datasync: bool) -> None:
        if failed := self._meet("fsyncdir", inode):
            raise FUSEError(failed)
        kept: list[Change] = []
        names: set[tuple[int, bytes]] = set()  # an earlier change of the same name goes with a later one
        for change in reversed(self.changes):
            touched = {(folder, name) for folder, name, _ in change}
            if touched & names or any(folder == inode for folder, _ in touched):
                names |= touched
                kept.append(change)
        for change in reversed(kept):
            self._make_durable(change)
        self.changes = [change for change in self.changes if not any(change is other for other in kept)]

    def _child(self, folder: int, name: bytes) -> int:
        found = self.inodes[folder].names.get(name)
        if found is None:
            raise FUSEError(errno.ENOENT)
        return found

    def _make(self, folder: int, name: bytes, mode: int, ctx: Any) -> int:
        if failed := self._meet("create", folder, name):
            raise FUSEError(failed)
        number, self._next = self._next, self._next + 1
        self.inodes[number] = Inode(mode, ctx.uid, ctx.gid)
        self._change((folder, name, number))
        return number

    async def lookup(self, folder: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(self._child(folder, name))

    async def mkdir(self, folder: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(self._make(folder, name, stat.S_IFDIR | mode, ctx))

    async def create(self, folder: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        number = self._make(folder, name, stat.S_IFREG | mode, ctx)
        return await self.open(number, flags, ctx), self._attributes(number)

    async def unlink(self, folder: int, name: bytes, ctx: object) -> None:
        self._child(folder, name)
        self._change((folder, name, None))

    async def rmdir(self, folder: int, name: bytes, ctx: object) -> None:
        if self.inodes[self._child(folder, name)].names:
            raise FUSEError(errno.ENOTEMPTY)
        self._change((folder, name, None))

    async def rename(self, folder: int, name: bytes, to: int, new: bytes, flags: int, ctx: object) -> None:
        if failed := self._meet("rename", folder, name):
            raise FUSEError(failed)
        number = self._child(folder, name)
        if flags & 1 and new in self.inodes[to].names:  # RENAME_NOREPLACE
            raise FUSEError(errno.EEXIST)
        self._change((folder, name, None), (to, new, number))

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, inode: int, start: int, token: Any) -> None:
        for at, (name, number) in enumerate(list(self.inodes[inode].names.items())):
            if at >= start and not pyfuse3.readdir_reply(token, name, self._attributes(number), at + 1):
                break

    # --- attributes -------------------------------------------------------------------------------------------------

    def _attributes(self, number: int) -> pyfuse3.EntryAttributes:
        if number not in self.inodes:
            raise FUSEError(errno.ENOENT)
        inode, entry = self.inodes[number], pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_nlink = number, inode.mode, 1
        entry.st_uid, entry.st_gid = inode.uid, inode.gid
        entry.st_size, entry.st_blksize = len(inode.held), 4096
        entry.st_blocks = -(-len(inode.held) // SECTOR)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.changed_ns
        entry.attr_timeout = entry.entry_timeout = 0  # the kernel must not remember what a crash takes
        return entry

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(self, number: int, wanted: Any, fields: Any, fh: object, ctx: object) -> Any:
        inode = self.inodes[number]
        if fields.update_size:
            self._take_room(wanted.st_size - len(inode.held))
            inode.resize(wanted.st_size)
        if fields.update_mode:
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(wanted.st_mode)
        if fields.update_uid:
            inode.uid = wanted.st_uid
        if fields.update_gid:
            inode.gid = wanted.st_gid
        return self._attributes(number)

    async def access(self, inode: int, mode: int, ctx: object) -> bool:
        return True

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = 4096
        room = ROOM if self.limit is None else self.limit
        told.f_blocks = room // 4096
        told.f_bfree = told.f_bavail = max(0, room - self._used()) // 4096
        told.f_files = told.f_ffree = told.f_favail = 1 << 20
        told.f_namemax = 255
        return told

    # --- bytes ------------------------------------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self.inodes[inode].resize(0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=False)

    async def read(self, fh: int, at: int, size: int) -> bytes:
        return bytes(self.inodes[fh].held[at : at + size])

    async def write(self, fh: int, at: int, piece: bytes) -> int:
        if failed := self._meet("write", fh):
            raise FUSEError(failed)
        inode = self.inodes[fh]
        self._take_room(at + len(piece) - len(inode.held))
        inode.write(at, bytes(piece))
        return len(piece)

    async def fsync(self, fh: int, datasync: bool) -> None:
        if failed := self._meet("fsync", fh):
            self.inodes[fh].fail_sync()
            raise FUSEError(failed)
        self.inodes[fh].sync()

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    async def releasedir(self, fh: int) -> None:
        pass

    async def forget(self, inodes: list[tuple[int, int]]) -> None:
        pass


def main() -> None:
    options = {*pyfuse3.default_options, "fsname=losefs", "allow_other"}
    pyfuse3.init(LoseFS(), sys.argv[1], options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
