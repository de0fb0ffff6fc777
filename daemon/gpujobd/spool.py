"""The files of jobs: inputs as they came in, outputs as the worker writes them.

    <state>/spool/nothing                         an empty file, handed out for outputs that are not there yet
    <state>/spool/incoming/<reservation>          an input, synced, before its job owns it
    <state>/spool/incoming/<reservation>.lines    original line numbers of a retry's items, one a line
    <state>/spool/jobs/<job>/                     0700: input.jsonl, lines, results.jsonl, errors.jsonl, lock, suspects, log

Rule 1: every name is made here from a number; no user names a path. Opens go through a directory descriptor and
never follow a link. What a worker gone wrong may have put in the place of a file (a link, a second name of a file
elsewhere, a FIFO that nobody writes) is not read, not written, not handed out, and waits for nobody: `open_plain`.
Rule 2: what a journal record relies on is synced BEFORE the record is written: file, then its directory.
Rule 3: every function here blocks; the daemon calls them in threads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from gpujobd.catalog import kind

log = logging.getLogger("gpujobd.spool")

SYNC_EVERY_BYTES: Final = 4 << 20  # so that the last sync of a 200 MB input does not stall everybody's
READ_BYTES: Final = 1 << 20
INPUT: Final = "input.jsonl"
RESULTS: Final = "results.jsonl"
ERRORS: Final = "errors.jsonl"
LINES: Final = "lines"
LOG: Final = "log"
NOTHING: Final = "nothing"  # an empty file: the output of a job that has none yet


class InputMismatch(Exception):
    """The bytes that came are not the bytes that were announced."""


class _Numbered(msgspec.Struct):
    line: int


_line_of = msgspec.json.Decoder(_Numbered)


class Tally:
    """What a header announces, found out from the bytes themselves, a piece at a time."""

    def __init__(self) -> None:
        self.bytes = 0
        self.longest = 0  # length of the longest line, newline not counted
        self._ended = 0  # lines that ended
        self._begun = 0  # bytes of the line that has not
        self._hash = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        self.bytes += len(data)
        first, *others = data.split(b"\n")
        self._begun += len(first)
        if others:
            self.longest = max(self.longest, self._begun, *map(len, others[:-1]))
            self._ended += len(others)
            self._begun = len(others[-1])
        self.longest = max(self.longest, self._begun)

    @property
    def items(self) -> int:
        """Lines, the last one counted though it may lack its newline."""
        return self._ended + (self._begun > 0)

    @property
    def sha256(self) -> bytes:
        return self._hash.digest()

    def check(self, *, items: int, longest: int, size: int, sha256: bytes) -> None:
        """Raises: InputMismatch where it is not what the header said."""
        for what, announced, came in (("bytes", size, self.bytes), ("lines", items, self.items)):
            if announced != came:
                raise InputMismatch(f"the header says {announced} {what}, {came} came")
        if self.longest > longest:
            raise InputMismatch(
                f"the header says that lines have at most {longest} bytes, one has {self.longest}"
            )
        if self.sha256 != sha256:
            raise InputMismatch("the SHA-256 of the bytes is not the header's")


class Incoming:
    """One input on its way in."""

    def __init__(self, folder: int, name: str) -> None:
        self._folder = folder
        self._fd = _create(name, folder)
        self._unsynced = 0
        self.tally = Tally()

    def write(self, data: bytes) -> None:
        _write_all(self._fd, data)
        self.tally.add(data)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_EVERY_BYTES:
            os.fdatasync(self._fd)
            self._unsynced = 0

    def settle(self) -> None:
        """Sync file and name: a record may now rely on it."""
        os.fsync(self._fd)
        os.fsync(self._folder)
        self.close()

    def close(self) -> None:
        """Let go of it; Spool.discard_incoming deletes what nobody will own."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which items of a final job are to be tried again."""

    job_id: int
    failed_only: bool
    results_bytes: int  # how much of the outputs counts: the checkpoint's lengths
    errors_bytes: int


def measure(data: bytes) -> tuple[int, int, bytes]:
    """Lines, length of the longest, and SHA-256 of an input in memory."""
    lines = data.split(b"\n")
    return len(lines) - (not lines[-1]), max(map(len, lines)), hashlib.sha256(data).digest()


class Spool:
    """The folder, held open."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root
        self._root = _own_folder(str(root))
        self._incoming = _own_folder("incoming", self._root)
        self._jobs = _own_folder("jobs", self._root)
        os.close(_create(NOTHING, self._root))
        self._ready: set[int] = set()  # jobs whose input this run has made or found whole
        os.fsync(self._incoming)
        os.fsync(self._jobs)
        _sync_folder(root)
        _sync_folder(root.parent)

    def incoming(self, reservation_id: int) -> Incoming:
        return Incoming(self._incoming, str(reservation_id))

    def discard_incoming(self, reservation_id: int) -> None:
        for name in (str(reservation_id), f"{reservation_id}.{LINES}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._incoming)

    def path(self, job_id: int) -> Path:
        return self.root / "jobs" / str(job_id)

    def prepare(self, job_id: int, reservation_id: int) -> None:
        """Make the job's directory with the input that was streamed in it, synced; doing it again changes nothing.

        Raises:
            FileNotFoundError: there is no input anywhere.
        """
        with self._folder_of(job_id) as folder:
            if job_id in self._ready and _exists(INPUT, folder):
                return
            os.fsync(self._jobs)  # first: what moves into a folder that a power cut takes goes with it
            if not _exists(INPUT, folder):
                self._adopt(reservation_id, folder)
            os.fsync(folder)  # also what a run before this one has made and perhaps not synced
            self._ready.add(job_id)

    def place(self, job_id: int, inline: Callable[[], bytes]) -> None:
        """The same for an input that the journal holds: not synced, so that a small job starts at once.

        Until `settle`, the journal's copy is the one that counts: what an earlier run left here is written anew.
        """
        with self._folder_of(job_id) as folder:
            if job_id not in self._ready or not _exists(INPUT, folder):
                _write(folder, INPUT, inline(), sync=False)
                self._ready.add(job_id)

    def settle(self, job_id: int) -> None:
        """Sync what `place` made; from now on the journal need not hold it.

        Raises:
            FileNotFoundError: it is gone.
            OSError: it is to be placed again first: a second sync of the same bytes would succeed and prove nothing.
        """
        folder = self._open_job(job_id)
        try:
            self._sync_input(job_id, folder)
        except OSError:
            self._ready.discard(job_id)
            raise
        finally:
            os.close(folder)

    def _sync_input(self, job_id: int, folder: int) -> None:
        if job_id not in self._ready:
            raise OSError(errno.EIO, f"the input of job {job_id} is to be written anew before it is synced")
        fd = open_plain(INPUT, folder)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(folder)
        os.fsync(self._jobs)

    @contextlib.contextmanager
    def _folder_of(self, job_id: int) -> Iterator[int]:
        """The job's directory, made if it is not there."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(str(job_id), 0o700, dir_fd=self._jobs)
        folder = self._open_job(job_id)
        try:
            yield folder
        finally:
            os.close(folder)

    def _adopt(self, reservation_id: int, folder: int) -> None:
        """Move input and line numbers in; the input last, since its presence says that all is done."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{reservation_id}.{LINES}", LINES, src_dir_fd=self._incoming, dst_dir_fd=folder)
            os.fsync(folder)
        os.rename(str(reservation_id), INPUT, src_dir_fd=self._incoming, dst_dir_fd=folder)

    def open_output(self, job_id: int, *, errors: bool) -> int:
        """A read-only descriptor of a plain file; of an empty one where the worker has not made it yet.

        Raises:
            OSError: something else has its name.
        """
        try:
            folder = self._open_job(job_id)
        except FileNotFoundError:
            return _to_hand_out(NOTHING, self._root)
        try:
            return _to_hand_out(ERRORS if errors else RESULTS, folder)
        except FileNotFoundError:
            return _to_hand_out(NOTHING, self._root)
        finally:
            os.close(folder)

    def read_log(self, job_id: int, offset: int, bytes_max: int) -> bytes:
        try:
            folder = self._open_job(job_id)
        except FileNotFoundError:
            return b""
        try:
            fd = open_plain(LOG, folder)
        except FileNotFoundError:
            return b""
        finally:
            os.close(folder)
        try:
            return os.pread(fd, bytes_max, offset)
        finally:
            os.close(fd)

    def remove(self, job_id: int) -> None:
        """Delete all files of a job."""
        _delete(str(job_id), self._jobs)
        self._ready.discard(job_id)

    def sweep(self, job_ids: Collection[int], reservation_ids: Collection[int]) -> int:
        """Delete what no job owns: left by a crash between a file and its record. Returns how many.

        Raises: nothing for a name that cannot be deleted: it costs space, not the start.
        """
        swept = 0
        for name in os.listdir(self._jobs):
            if not (name.isascii() and name.isdigit() and int(name) in job_ids):
                swept += _deleted(name, self._jobs)
        for name in os.listdir(self._incoming):
            number = name.removesuffix(f".{LINES}")
            if not (number.isascii() and number.isdigit() and int(number) in reservation_ids):
                swept += _deleted(name, self._incoming)
        return swept

    def weigh(self, choice: Choice) -> Tally:
        """What a retry's input will be.

        Raises:
            FileNotFoundError: the job's input is gone.
            InputMismatch: its files do not belong together any more.
        """
        tally = Tally()
        for _, line in self._chosen(choice):
            tally.add(line + b"\n")
        return tally

    def select(self, choice: Choice, reservation_id: int) -> None:
        """Write a retry's input, synced, and beside it the line numbers its items had in the first job of the chain.

        Raises: as weigh.
        """
        chosen = self.incoming(reservation_id)
        numbers = bytearray()
        try:
            for number, line in self._chosen(choice):
                chosen.write(line + b"\n")
                numbers += b"%d\n" % number
            _write(self._incoming, f"{reservation_id}.{LINES}", bytes(numbers))
            chosen.settle()
        finally:
            chosen.close()

    def _chosen(self, choice: Choice) -> Iterator[tuple[int, bytes]]:
        folder = self._open_job(choice.job_id)
        try:
            if choice.failed_only:
                failed = set(_recorded(folder, ERRORS, choice.errors_bytes))
                yield from ((number, line) for number, line in _original(folder) if number in failed)
            else:
                done = set(_recorded(folder, RESULTS, choice.results_bytes))
                yield from ((number, line) for number, line in _original(folder) if number not in done)
        except (ValueError, msgspec.MsgspecError) as error:
            raise InputMismatch(f"the files of job {choice.job_id} are damaged: {error}") from None
        finally:
            os.close(folder)

    def free_bytes(self) -> int:
        found = os.fstatvfs(self._jobs)
        return found.f_bavail * found.f_frsize

    def _open_job(self, job_id: int) -> int:
        return os.open(
            str(job_id), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._jobs
        )


def _delete(name: str, folder: int) -> None:
    """Delete a file, a link or a tree; no link is followed."""
    with contextlib.suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=folder)
        except IsADirectoryError:
            _delete_tree(name, folder)


def _delete_tree(name: str, folder: int) -> None:
    try:
        shutil.rmtree(name, dir_fd=folder)
    except (
        RecursionError
    ):  # somebody made folders in folders by the thousand: that costs space, not the daemon
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name) from None


def _own_folder(name: str, parent: int | None = None) -> int:
    """Open a folder that is ours alone, made if it is not there. Raises: PermissionError where it is another's."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, f"belongs to uid {found.st_uid}", name)
    if found.st_mode & 0o077:
        os.fchmod(fd, 0o700)
    return fd


def _create(name: str, folder: int) -> int:
    """A new, empty file, whatever had its name."""
    _delete(name, folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=folder)


def open_plain(name: str, folder: int, flags: int = os.O_RDONLY) -> int:
    """Open without waiting for anybody, and without following a link.

    Raises:
        OSError: EINVAL: something is there, and it is no plain file with this name alone.
    """
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=folder)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EINVAL, "is no plain file with one name", name)
    return fd


@contextlib.contextmanager
def folder_at(path: Path) -> Iterator[int]:
    """A job's folder, as Spool.path names it, open for a moment; never through a link in its place."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _to_hand_out(name: str, folder: int) -> int:
    """For a client: nothing of how it was opened is left on it."""
    fd = open_plain(name, folder)
    os.set_blocking(fd, True)
    return fd


def _deleted(name: str, folder: int) -> bool:
    try:
        _delete(name, folder)
    except OSError as error:
        message = "%s belongs to no job and cannot be deleted: %s"
        log.warning(message, name, error.strerror, extra=kind("sweep_failed"))
        return False
    return True


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(folder: int, name: str, data: bytes, *, sync: bool = True) -> None:
    """Write and rename, so that `name` is there whole or not at all. The caller syncs the folder."""
    part = f"{name}.part"
    fd = _create(part, folder)
    try:
        _write_all(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)


def _file_lines(folder: int, name: str, size: int | None = None) -> Iterator[bytes]:
    """Lines without their newline, of the first `size` bytes."""
    with open(open_plain(name, folder), "rb", buffering=READ_BYTES) as file:
        left = size
        for line in file:
            if left is not None:
                left -= len(line)
                if left < 0:
                    return
            yield line.rstrip(b"\n")


def _recorded(folder: int, name: str, size: int) -> Iterator[int]:
    """Original line numbers of the records in an output file."""
    try:
        for record in _file_lines(folder, name, size):
            yield _line_of.decode(record).line
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _original(folder: int) -> Iterator[tuple[int, bytes]]:
    """Items of a job with the line numbers they had in the first job of a chain of retries."""
    if not _exists(LINES, folder):
        yield from enumerate(_file_lines(folder, INPUT), 1)
        return
    numbers = map(int, _file_lines(folder, LINES))
    yield from zip(numbers, _file_lines(folder, INPUT), strict=True)
