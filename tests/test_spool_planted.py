"""What a worker gone wrong may leave in the spool under the names of files: nothing leads out of it, nothing waits.

The worker shares the daemon's uid, so nothing keeps it from planting this; what is promised is that the daemon does not
walk into it, and hands nothing out that is not the job's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gpujobd.grant import lock_is_free, read_suspects
from gpujobd.job_log import _open
from gpujobd.spool import Choice, InputMismatch, Spool
from gpujobd_worker import files
from harness import HANG_S

SECRET = b"the secret\n"
JOB = 7


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that belongs to somebody else's job, or is the journal."""
    path = tmp_path / "outside"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    (spool.path(JOB)).mkdir()
    return spool


def symlink(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside, path)


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "deeper").symlink_to(outside.parent)


def listening(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def zeros(path: Path, outside: Path) -> None:
    """A device that never ends."""
    if os.geteuid() != 0:
        pytest.skip("devices are made by root")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))


PLANTS = [symlink, hard_link, fifo, folder, listening, zeros]
CHOICE = Choice(job_id=JOB, failed_only=False, results_bytes=1, errors_bytes=1)


def at_once(do: Callable[[], object]) -> object:
    """What it returns, or the error that it raises. It must not wait for anybody."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(do())
        except (OSError, InputMismatch, files.LeaseLost) as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_S / 4)
    assert found, "it waits"
    return found[0]


def read_all(found: object) -> bytes:
    """What a client would get of a descriptor."""
    assert isinstance(found, int)
    try:
        assert stat.S_ISREG(os.fstat(found).st_mode)
        return os.pread(found, 100, 0)
    finally:
        os.close(found)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("errors", [False, True])
def test_an_output_that_is_no_plain_file_is_not_handed_out(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None], errors: bool
) -> None:
    plant(spool.path(JOB) / ("errors.jsonl" if errors else "results.jsonl"), outside)
    assert isinstance(at_once(lambda: spool.open_output(JOB, errors=errors)), OSError)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_log_that_is_no_plain_file_is_neither_read_nor_written(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(spool.path(JOB) / "log", outside)
    assert isinstance(at_once(lambda: spool.read_log(JOB, 0, 100)), OSError)
    assert isinstance(at_once(lambda: _open(spool.path(JOB))), OSError)
    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("plant", PLANTS)
def test_an_input_that_is_no_plain_file_is_written_anew_where_the_journal_has_it(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None]
) -> None:
    for name in ("input.jsonl", "input.jsonl.part"):
        plant(spool.path(JOB) / name, outside)
    found = at_once(lambda: spool.place(JOB, lambda: b"{}\n"))
    assert found is None or isinstance(found, OSError)  # a file does not take the place of a folder
    if found is None:
        assert (spool.path(JOB) / "input.jsonl").read_bytes() == b"{}\n"
    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", ["input.jsonl", "results.jsonl", "lines"])
def test_a_retry_reads_no_file_that_is_not_plain(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    for other in {"input.jsonl", "results.jsonl"} - {name}:
        (spool.path(JOB) / other).write_bytes(b'{"line": 1}\n')
    plant(spool.path(JOB) / name, outside)
    assert isinstance(at_once(lambda: spool.weigh(CHOICE)), OSError | InputMismatch)


@pytest.mark.parametrize("plant", PLANTS)
def test_an_incoming_input_takes_the_place_of_whatever_has_its_name(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(spool.root / "incoming" / "3", outside)

    def write() -> None:
        incoming = spool.incoming(3)
        incoming.write(b"{}\n")
        incoming.settle()

    assert at_once(write) is None
    assert (spool.root / "incoming" / "3").read_bytes() == b"{}\n"
    assert outside.read_bytes() == SECRET
    assert outside.parent.exists()


@pytest.mark.parametrize("plant", PLANTS)
def test_lock_and_suspects_wait_for_nobody(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None]
) -> None:
    for name in ("lock", "suspects"):
        plant(spool.path(JOB) / name, outside)
    assert at_once(lambda: lock_is_free(spool.path(JOB))) is True
    assert at_once(lambda: read_suspects(spool.path(JOB), 1, 10)) == ()


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", ["input.jsonl", "lock", "suspects", "results.jsonl", "errors.jsonl"])
def test_a_worker_waits_for_nobody_and_loses_its_lease(
    spool: Spool, outside: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    (spool.path(JOB) / "input.jsonl").write_bytes(b"{}\n")
    with contextlib.suppress(FileNotFoundError):
        (spool.path(JOB) / name).unlink()
    plant(spool.path(JOB) / name, outside)
    nothing = {"results_bytes": 0, "results_crc": 0, "errors_bytes": 0, "errors_crc": 0}

    def work() -> None:
        files.JobFiles(str(spool.path(JOB)), 1, nothing, lambda: False).close()

    found = at_once(work)
    harmless = {"lock": (fifo, zeros, hard_link), "suspects": (zeros, hard_link), "input.jsonl": (hard_link,)}
    if plant in harmless.get(name, ()):
        assert found is None
    else:
        assert isinstance(found, files.LeaseLost)
    if name != "suspects":  # a page that it maps: forty bytes of what it could write under any name
        assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("where", ["jobs", "incoming"])
def test_a_link_in_the_place_of_a_folder_of_the_daemon_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / where).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Not a directory"):
        Spool(tmp_path / "spool")


def test_a_link_in_the_place_of_a_jobs_folder_leads_nowhere(spool: Spool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("results.jsonl", "log", "suspects", "input.jsonl"):
        (other / name).write_bytes(SECRET)
    spool.path(8).symlink_to(other)
    for do in (
        lambda: spool.open_output(8, errors=False),
        lambda: spool.read_log(8, 0, 100),
        lambda: spool.place(8, lambda: b"{}\n"),
        lambda: spool.prepare(8, 1),
        lambda: spool.settle(8),
        lambda: spool.weigh(Choice(job_id=8, failed_only=False, results_bytes=1, errors_bytes=1)),
        lambda: _open(spool.path(8)),
    ):
        assert isinstance(at_once(do), OSError)
    assert read_suspects(spool.path(8), 1, 10) == ()
    spool.remove(8)
    assert sorted(path.name for path in other.iterdir()) == [
        "input.jsonl",
        "log",
        "results.jsonl",
        "suspects",
    ]
    assert not spool.path(8).is_symlink()


def test_removal_and_sweeping_delete_links_and_not_what_they_lead_to(spool: Spool, outside: Path) -> None:
    for plant in PLANTS[:5]:
        plant(spool.path(JOB) / plant.__name__, outside)
    (spool.root / "jobs" / "8").symlink_to(outside.parent)
    (spool.root / "incoming" / "x").symlink_to(outside)
    assert spool.sweep([JOB], []) == 2
    spool.remove(JOB)
    assert outside.read_bytes() == SECRET
    assert not list((spool.root / "jobs").iterdir())


@pytest.fixture
def deep(spool: Spool) -> Iterator[Spool]:
    """Folders in folders, by the thousand."""
    here = os.open(spool.path(JOB), os.O_RDONLY)
    for _ in range(3_000):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    yield spool
    here = os.open(spool.path(JOB), os.O_RDONLY) if spool.path(JOB).exists() else -1
    while here >= 0:  # from the top: the rest of each moves up, so that no recursion is needed here either
        below = os.open("d", os.O_RDONLY, dir_fd=here) if "d" in os.listdir(here) else -1
        if below < 0:
            os.close(here)
            return
        if "d" in os.listdir(below):
            os.rename("d", "e", src_dir_fd=below, dst_dir_fd=here)
        os.close(below)
        os.rmdir("d", dir_fd=here)
        if "e" in os.listdir(here):
            os.rename("e", "d", src_dir_fd=here, dst_dir_fd=here)


def test_a_tree_that_is_too_deep_to_delete_costs_space_and_not_the_daemon(deep: Spool) -> None:
    found = at_once(lambda: deep.remove(JOB))
    assert found is None or isinstance(found, OSError)
    assert deep.sweep([], []) in (0, 1)


def test_what_is_handed_out_is_a_plain_file_that_can_only_be_read(spool: Spool) -> None:
    assert read_all(spool.open_output(JOB, errors=False)) == b""
    (spool.path(JOB) / "results.jsonl").write_bytes(b"{}\n")
    fd = spool.open_output(JOB, errors=False)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND) == os.O_RDONLY
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    assert read_all(fd) == b"{}\n"


def test_the_spool_is_ours_alone(tmp_path: Path) -> None:
    (tmp_path / "spool" / "jobs").mkdir(parents=True, mode=0o777)
    spool = Spool(tmp_path / "spool")
    for path in (spool.root, spool.root / "jobs", spool.root / "incoming"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    if os.geteuid() == 0:
        os.chown(spool.root / "jobs", 12_345, 12_345)
        with pytest.raises(PermissionError, match="belongs to uid 12345"):
            Spool(tmp_path / "spool")
