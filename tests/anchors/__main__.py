"""The same faults for gpujobd and for programs that everybody trusts: `make bench-faults`.

    bit rot       one bit of the log flips while the program is down; it starts again and is asked for every record
    power cut     the program is writing when its file system (ext4 on a loop device) loses power
    failed sync   one sync of the disk fails (EIO), once; then the program is asked to keep more records

What may come of bit rot, best first: every record is right; it refuses, or says in its log that it dropped something;
records are gone and no word was said; records are there with other bytes. Nothing here is gpujobd's own test: records go
in and come out by each program's own protocol.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "faults"), str(HERE.parent / "bench")]

import machine  # noqa: E402
from filesystems import FileSystem  # noqa: E402
from stores import STORES, Refuses, Store, freeze, payload, served  # noqa: E402

RECORDS = 100
FLIPS = 150
CUTS = 20
WRITES_AFTER = 10
RECORDS_MAX = 4_000
IMAGE_MIB = 192
SYNCED_BY_THE_CLOCK_S = 1.5  # whoever syncs once a second has


def main() -> int:
    asked = _arguments()
    stores = [store for store in STORES if _installed(store)]
    print(f"seed {asked.seed}; {machine.describe(Path(tempfile.gettempdir()))}\n")
    rng = random.Random(asked.seed)
    flips, cuts = (max(1, round(n * asked.scale)) for n in (FLIPS, CUTS))
    _table(
        f"bit rot: {flips} flips of one bit in a log of {RECORDS} acknowledged records",
        ["all right", "refused or said", "silently lost", "wrong data"],
        ((store, bit_rot(store, rng, flips)) for store in stores),
    )
    _table(
        f"power cut: {cuts} cuts of a writing program's ext4",
        ["cuts with loss", "records lost", "acknowledged"],
        ((store, power_cuts(store, rng, cuts)) for store in stores),
    )
    _table(
        f"failed sync: one EIO, then {WRITES_AFTER} more writes",
        ["that write", "later ones acknowledged", "process"],
        ((store, failed_sync(store)) for store in stores),
    )
    return 0


# --- the three faults -----------------------------------------------------------------------------------------------


def bit_rot(kind: type[Store], rng: random.Random, flips: int) -> list[object]:
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="anchor-") as name:
        base, case = Path(name) / "base", Path(name) / "case"
        base.mkdir()
        with served(kind, base) as store:
            kept = [payload(n) for n in range(RECORDS) if store.put(n)]
        shutil.copytree(base, case, ignore=_sockets)
        assert _outcome(kind, case, kept) == "right", "a copy without a flip is not read back"
        shutil.rmtree(case)
        for _ in range(flips):
            shutil.copytree(base, case, ignore=_sockets)
            _flip(kind(case).logs(), rng)
            found[_outcome(kind, case, kept)] += 1
            shutil.rmtree(case)
    return [found[what] for what in ("right", "said", "lost", "wrong")]


def _outcome(kind: type[Store], folder: Path, kept: list[str]) -> str:
    try:
        with served(kind, folder) as store:
            read = store.read()
            said = store.warned()
    except Refuses:
        return "said"
    if set(read) - set(kept):
        return "wrong"
    if read == kept:
        return "right"
    return "said" if said else "lost"


def _flip(files: list[Path], rng: random.Random) -> None:
    """One bit somewhere in what is written of these files; zeros made ahead do not count."""
    used = [(path, len(path.read_bytes().rstrip(b"\0"))) for path in files]
    at = rng.randrange(sum(size for _, size in used))
    for path, size in used:
        if at < size:
            data = bytearray(path.read_bytes())
            data[at] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            return
        at -= size


def power_cuts(kind: type[Store], rng: random.Random, cuts: int) -> list[object]:
    with_loss = lost = acknowledged = 0
    for _ in range(cuts):
        with tempfile.TemporaryDirectory(prefix="anchor-") as name:
            disk = FileSystem("ext4", Path(name) / "image", Path(name) / "disk", IMAGE_MIB)
            with disk:
                kept = _write_until_cut(kind, disk, rng)
            with disk, served(kind, disk.root) as store:
                missing = set(kept) - set(store.read())
        acknowledged += len(kept)
        lost += len(missing)
        with_loss += bool(missing)
    return [with_loss, lost, acknowledged]


def _write_until_cut(kind: type[Store], disk: FileSystem, rng: random.Random) -> list[str]:
    """The records acknowledged before the power went."""
    kept: list[str] = []
    with served(kind, disk.root) as store:

        def write() -> None:
            n = 0
            while n < RECORDS_MAX and store.put(n):
                kept.append(payload(n))
                n += 1

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(rng.uniform(0.05, 0.5))
        freeze(store)
        disk.shut_down()
        store.kill()
        writer.join()
    return kept


def failed_sync(kind: type[Store]) -> list[object]:
    with tempfile.TemporaryDirectory(prefix="anchor-") as name, served(kind, Path(name)) as store:
        assert store.process is not None
        for n in range(RECORDS):
            store.put(n)
        time.sleep(SYNCED_BY_THE_CLOCK_S)
        with _one_sync_fails(store.process.pid):
            hit = store.put(RECORDS)
        later = sum(store.put(RECORDS + 1 + n) for n in range(WRITES_AFTER))
        status = store.process.poll()
    return [
        "acknowledged" if hit else "refused",
        f"{later} of {WRITES_AFTER}",
        "goes on" if status is None else f"exit {status}",
    ]


@contextlib.contextmanager
def _one_sync_fails(pid: int) -> Iterator[None]:
    """The next sync of each thread returns EIO, once, as the kernel reports it."""
    inject = "inject=fsync,fdatasync:error=EIO:when=1"
    command = [
        "strace",
        "-f",
        "-q",
        "-p",
        str(pid),
        "-e",
        "trace=fsync,fdatasync",
        "-e",
        inject,
        "-o",
        "/dev/null",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        while any(_tracer(task) != tracer.pid for task in Path(f"/proc/{pid}/task").iterdir()):
            time.sleep(0.01)
        yield
        time.sleep(SYNCED_BY_THE_CLOCK_S)
        tracer.terminate()


def _tracer(task: Path) -> int:
    return int((task / "status").read_text().partition("TracerPid:")[2].split()[0])


# --- what is printed ------------------------------------------------------------------------------------------------


def _table(title: str, columns: list[str], rows: Iterable[tuple[type[Store], list[object]]]) -> None:
    print(title)
    print(f"  {'':<12}{'':<34}" + "".join(f"{column:>{len(column) + 4}}" for column in columns))
    for store, figures in rows:
        cells = "".join(
            f"{figure!s:>{len(column) + 4}}" for column, figure in zip(columns, figures, strict=True)
        )
        print(f"  {store.title:<12}{store.setting:<34}{cells}", flush=True)
    print()


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_socket()]


def _installed(store: type[Store]) -> bool:
    if missing := store.missing():
        print(f"{store.title} is left out: apt install {missing}", file=sys.stderr)
    return not missing


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/anchors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
