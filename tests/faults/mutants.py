"""Ways to break gpujobd that the suites must notice.

Each is one replacement in one file of the program, which a copy of the tree gets, and the tests that must fail on that
copy. The text must stand in the file exactly once: a mutant that no longer fits is an error, never a pass.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path


class Misfit(Exception):
    """The program changed, and the mutant must follow."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    killed_by: tuple[str, ...]  # arguments of pytest
    scale: float = 0.02  # of the fault suite: so many cases are enough

    def infect(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        if (found := text.count(self.old)) != 1:
            raise Misfit(f"{self.name}: {found} places in {self.file} read {self.old!r}")
        path.write_text(text.replace(self.old, self.new))


CUTS = ("tests/faults/test_power_cuts.py", "-k", "random_operations or any_operation")
DYING = ("tests/faults/test_power_cuts.py", "-k", "dies")
QUICK = ("-m", "not slow")

MUTANTS = [
    Mutant(
        "a commit without a sync",
        "daemon/gpujobd/journal.py",
        "            self._disk.fdatasync(self._fd)\n        except OSError as error:\n",
        "        except OSError as error:\n",
        CUTS,
    ),
    Mutant(
        "an answer before the sync",
        "daemon/gpujobd/writer.py",
        "        self.committed = await self._in_thread(lambda: self._journal.append(records))\n"
        "        self._announce()\n        self._on_commit(self.committed)\n",
        "        self.committed += len(records)\n        self._announce()\n        self._on_commit(self.committed)\n"
        "        await self._in_thread(lambda: self._journal.append(records))\n",
        ("tests/test_writer.py",),
    ),
    Mutant(
        "a new segment whose name is not synced",
        "daemon/gpujobd/journal.py",
        "            self._spares.name(self._path(segment.name))\n        self._disk.fsync_dir(self.directory)\n",
        "            self._spares.name(self._path(segment.name))\n",
        CUTS,
    ),
    Mutant(
        "a failed sync that is tried again",
        "daemon/gpujobd/journal.py",
        "            self._disk.fdatasync(self._fd)\n        except OSError as error:\n",
        "            try:\n                self._disk.fdatasync(self._fd)\n            except OSError:\n"
        "                self._disk.fdatasync(self._fd)\n        except OSError as error:\n",
        CUTS,
    ),
    Mutant(
        "segments that grow instead of being written full of zeros",
        "daemon/gpujobd/spares.py",
        "            for at in range(0, self._segment_bytes, len(_PIECE)):\n"
        "                put(self._disk, fd, _PIECE[: self._segment_bytes - at], at)\n",
        "            put(self._disk, fd, bytes(1), self._segment_bytes - 1)\n",
        DYING,
        scale=0.5,
    ),
    Mutant(
        "any damage taken for a torn tail",
        "daemon/gpujobd/recovery.py",
        "    return frames.has_hole(held, offset, header.payload_len)\n",
        "    return True\n",
        ("tests/test_journal_faults.py", "-k", "flips"),
    ),
    Mutant(
        "two frames in flight",
        "daemon/gpujobd/journal.py",
        "            self._disk.fdatasync(self._fd)\n        except OSError as error:\n",
        "            if first_seq % 2:\n                self._disk.fdatasync(self._fd)\n        except OSError as error:\n",
        CUTS,
    ),
    Mutant(
        "a tail that is not written again",
        "daemon/gpujobd/recovery.py",
        "            put(disk, fd, again[at : at + _PIECE_BYTES], start + at)\n        disk.fdatasync(fd)\n",
        "            pass\n",
        CUTS,
    ),
    Mutant(
        "reports of a lease that is over",
        "daemon/gpujobd/core/leases.py",
        "    return lease if lease is not None and lease.attempt == given.attempt else None\n",
        "    return lease\n",
        (*QUICK, "tests/test_decide.py", "tests/test_simulation.py"),
    ),
    Mutant(
        "a repeat that becomes a second job",
        "daemon/gpujobd/core/admission.py",
        "    job_id = state.book.submit_ids.get(who.uid, {}).get(submission.submit_id, 0)\n",
        "    job_id = 0\n",
        (*QUICK, "tests/test_decide.py"),
    ),
    Mutant(
        "only some errors of the decoder",
        "daemon/gpujobd/protocol.py",
        "        return decoder.decode(body)\n"
        "    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:\n",
        "        return decoder.decode(body)\n    except msgspec.DecodeError as error:\n",
        ("tests/faults/test_fuzz.py", "-k", "mutated_requests_decode"),
    ),
    Mutant(
        "a checkpoint that is told before its sync",
        "daemon/gpujobd_worker/files.py",
        "            os.fdatasync(self._fd)\n",
        "            pass\n",
        CUTS,
    ),
    Mutant(
        "workers that die with the thread that started them",
        "daemon/gpujobd/worker_process.py",
        "                umask=0o077,\n",
        "                umask=0o077,\n                preexec_fn=lambda: __import__('ctypes').CDLL(None).prctl(1, 9),\n",
        ("tests/faults/test_hostile_workers.py", "-k", "outlive"),
    ),
]
