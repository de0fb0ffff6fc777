"""What the worker itself costs: `python tests/bench/bench_worker.py [ITEMS]`.

One job through a real worker process, with durable checkpoints, by handlers that do next to nothing. The figure to
hold is 100,000 items/s for `nothing` on two shared cores; the second lease is the one to look at, since by then the
size of calls is known. The folder is made beside this file, on the disk that the checkout is on: /tmp may be memory.

    nothing    a batch costs the handler nothing: all of it is reading, records, syncs
    checksum   the shipped handler: a SHA-256 an item
    call 1 ms  256 items a millisecond: what of a GPU that fast is lost to the worker
    alone      batch_max 1: the price of a call
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from worker_driver import Job, WorkerDriver  # noqa: E402 - found by the line above

CASES = {
    "nothing": ("toys:Nothing", {}, 256),
    "checksum": ("gpujobd_worker.handlers.checksum:Checksum", {}, 256),
    "call 1 ms": ("toys:Nothing", {"call_s": 0.001}, 256),
    "alone": ("toys:Nothing", {}, 1),
}


def cpu_s(pid: int) -> float:
    """Processor time of a process so far: proc_pid_stat(5), fields 14 and 15."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(entry: str, params: dict, batch_max: int, items: int) -> list[tuple[float, float]]:
    """(seconds from the lease to its last message, processor seconds) of five leases by one worker."""
    lines = [{"custom_id": f"a{i}", "text": f"description of package number {i}"} for i in range(items)]
    measured = []
    with WorkerDriver() as worker, tempfile.TemporaryDirectory(dir=ROOT / "bench") as folder:
        assert worker.load(entry, params=params, checkpoint_s=1.0, heartbeat_s=1.0)["type"] == "loaded"
        for lease in range(5):
            job = Job(pathlib.Path(folder) / str(lease), lines)
            began, cpu_began_s = time.perf_counter(), cpu_s(worker.process.pid)
            last = worker.run(job, batch_max=batch_max)
            measured.append((time.perf_counter() - began, cpu_s(worker.process.pid) - cpu_began_s))
            assert (last["type"], last["checkpoint"]["done"]) == ("finished", items)
    return measured


def main() -> None:
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    print(f"{'case':10} {'items/s':>9} {'(1st lease)':>12} {'CPU us/item':>12}")
    for case, (entry, params, batch_max) in CASES.items():
        first, *later = measure(entry, params, batch_max, items)
        best_s, best_cpu_s = (min(column) for column in zip(*later, strict=True))
        print(f"{case:10} {items / best_s:9,.0f} {items / first[0]:12,.0f} {best_cpu_s / items * 1e6:12.2f}")


if __name__ == "__main__":
    main()
