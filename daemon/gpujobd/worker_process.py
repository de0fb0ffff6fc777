"""One worker as a process: how it is started, its two pipes, and how it is ended for certain.

    gpujobd  <== socketpair: messages, and the worker's lifeline ==>  PYTHON -u -B gpujobd_worker/__main__.py --fd N
             <-- one pipe: its stdout and stderr ------------------

Rule 1: the lifeline is the socketpair: its end closes with the daemon, however the daemon ends. PR_SET_PDEATHSIG is
never set: it is tied to the thread that forked, which trio ends after 10 idle seconds, and the worker with it.
Rule 2: a worker gets what is listed here and nothing else: descriptors, environment, limits. It is confined BEFORE the
first message is sent to it, and it does nothing before that.
Rule 3: both pipes are read at all times, so that a worker never waits for the daemon.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import trio

import gpujobd
from gpujobd import worker_messages as messages
from gpujobd.cgroup import MARK, Family, Group, Kin, new_mark

MAIN: Final = Path(gpujobd.__file__).resolve().parent.parent / "gpujobd_worker" / "__main__.py"
READ_BYTES: Final = 1 << 20  # also the size of the output pipe, where the kernel lets us
FLOOD_BYTES: Final = 1 << 16  # waiting at once: somebody prints in a loop
FLOOD_PAUSE_S: Final = 0.01
"""After so much at once the reader pauses. So a flood of output, at up to 100 MB/s, costs the daemon little time."""
DRAIN_S: Final = 1.0
"""How long the pipes of a dead worker are still read. What it wrote is there at once; only a process that cannot be
killed and holds the other end keeps them from ending."""
OOM_SCORE_ADJ: Final = 500  # when memory is short, the kernel takes a worker before the daemon
MESSAGES_PER_S_MAX: Final = 1000  # a worker needs about three

PASSED_ON: Final = frozenset({"PATH", "LANG", "TZ", "HOME", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "TMPDIR"})
PASSED_ON_PREFIXES: Final = ("LC_", "CUDA_", "NVIDIA_")


def environment(given: Mapping[str, str], *, device: str, threads: int) -> dict[str, str]:
    """A worker's environment: what is allowed of `given`, and what makes inference behave on a shared host."""
    passed = {k: v for k, v in given.items() if k in PASSED_ON or k.startswith(PASSED_ON_PREFIXES)}
    ours = {
        # Spinning OpenMP threads cost 22 -> 2 tokens/s as soon as one other process is busy (measured).
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Models are files that the administrator put there: nothing is fetched in the middle of a job.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that cuda:0 is what nvidia-smi calls 0
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if device.startswith("cuda"):
        ours["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        ours["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # its name before torch 2.9
    return passed | ours


class Listener(Protocol):
    """Whom a worker's pipes talk to. Nothing here blocks."""

    def heard(self, message: messages.AnyFromWorker) -> None:
        """Raises: Violation where the message is against the protocol."""

    def printed(self, output: bytes) -> None: ...
    def violated(self, how: str) -> None: ...


class WorkerProcess:
    """Started by start(); talk() serves its pipes until it is dead; kill() and then bury() end all of it."""

    def __init__(self, process: trio.Process, end: socket.socket, kin: Kin) -> None:
        self.pid = process.pid
        self.kin = kin
        self.died = trio.Event()
        """It is dead, and what it said before is delivered."""
        assert isinstance(process.stdout, trio.lowlevel.FdStream)
        with contextlib.suppress(OSError):  # over the user's limit for pipes: it stays as it is
            fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, READ_BYTES)
        self._process = process
        self._output = process.stdout
        self._end = trio.SocketStream(trio.socket.from_stdlib_socket(end))
        self._to_send, self._sendable = trio.open_memory_channel[bytes](64)

    @classmethod
    async def start(
        cls, python: str, *, main: Path, base: Path | None, device: str, threads: int
    ) -> WorkerProcess:
        """Start one in its own session and its own cgroup under `base`.

        Raises:
            OSError: the interpreter cannot be run, or the cgroup cannot be made.
        """
        mark = new_mark()
        kin: Kin = await trio.to_thread.run_sync(Group, base, mark) if base else Family(mark)
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = await trio.lowlevel.open_process(
                [python, "-u", "-B", str(main), "--fd", str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[its.fileno()],
                cwd="/",
                env=environment(os.environ, device=device, threads=threads) | {MARK: mark},
                start_new_session=True,
                umask=0o077,
            )
        except BaseException:
            ours.close()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(kin.bury)
            raise
        finally:
            its.close()
        worker = cls(process, ours, kin)
        with trio.CancelScope(shield=True):
            await worker._confine()
        return worker

    async def _confine(self) -> None:
        try:
            await trio.to_thread.run_sync(_confine, self.pid, self.kin)
        except OSError:
            await self.end()
            raise

    @property
    def status(self) -> int | None:
        """As subprocess: None while it lives, negative for a signal."""
        return self._process.returncode

    def send(self, message: messages.AnyToWorker) -> None:
        """Queue a message. A worker that has not read the last 64 will not read this one either: it is dropped.

        Raises:
            ValueError: it does not fit a line.
        """
        with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._to_send.send_nowait(messages.line(message))

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def talk(self, listener: Listener) -> None:
        """Serve both pipes until it is dead and they are empty."""
        async with trio.open_nursery() as nursery:
            all_heard, all_read = trio.Event(), trio.Event()
            nursery.start_soon(self._hear, listener, all_heard)
            nursery.start_soon(self._read, listener, all_read)
            nursery.start_soon(self._say)
            await self._process.wait()
            await self.kill()  # an orphan that holds the other ends of the pipes would keep them from ending
            with trio.move_on_after(DRAIN_S):
                await all_heard.wait()
                await all_read.wait()
            nursery.cancel_scope.cancel()
        self.died.set()

    async def _hear(self, listener: Listener, all_heard: trio.Event) -> None:
        lines = messages.Lines()
        began, count = trio.current_time(), 0
        try:
            async for piece in self._end:
                for message in lines.feed(bytes(piece)):
                    listener.heard(message)
                    count += 1
                if (now := trio.current_time()) >= began + 1:
                    began, count = now, 0
                elif count > MESSAGES_PER_S_MAX:
                    listener.violated(f"more than {MESSAGES_PER_S_MAX} messages in a second")
                    break
        except messages.Violation as violation:
            listener.violated(str(violation))
        except trio.BrokenResourceError:  # it died with unread messages of ours in its pipe
            pass
        all_heard.set()

    async def _read(self, listener: Listener, all_read: trio.Event) -> None:
        while output := await self._output.receive_some(READ_BYTES):
            listener.printed(bytes(output))
            if len(output) >= FLOOD_BYTES:
                await trio.sleep(FLOOD_PAUSE_S)
        all_read.set()

    def output_so_far(self) -> bytes:
        """What it has printed and nobody has read yet: it was printed before the message that is being handled."""
        output = bytearray()
        with contextlib.suppress(BlockingIOError, OSError):
            while len(output) < READ_BYTES and (piece := os.read(self._output.fileno(), READ_BYTES)):
                output += piece
        return bytes(output)

    async def _say(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for encoded in self._sendable:
                await self._end.send_all(encoded)

    async def kill(self) -> bool:
        """SIGKILL all of it once. Whether nothing is left: dead and reaped, and no kin."""
        if self.status is None:
            self._process.kill()
        # Given up when time is: /proc of a process in an uninterruptible sleep can block its reader, too.
        left = await trio.to_thread.run_sync(_kill, self.kin, abandon_on_cancel=True)
        return self.status is not None and not left

    async def end(self, limit_s: float = 5.0) -> bool:
        """Kill until nothing is left, for at most `limit_s`; then free what is held for it."""
        gone = False
        with trio.move_on_after(limit_s):
            while not (gone := await self.kill()):
                with trio.move_on_after(0.02):
                    await self._process.wait()
                await trio.sleep(0.01)
        await self.bury()
        return gone

    async def bury(self) -> None:
        """Close the pipes, remove the cgroup."""
        await trio.aclose_forcefully(self._end)
        await trio.aclose_forcefully(self._output)
        with trio.move_on_after(1.0):
            await trio.to_thread.run_sync(self.kin.bury, abandon_on_cancel=True)


def _confine(pid: int, kin: Kin) -> None:
    kin.add(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))  # a core would hold other people's items
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE_ADJ))


def _kill(kin: Kin) -> list[int]:
    kin.kill()
    return kin.pids()


def why_it_died(status: int, *, out_of_memory: bool) -> str:
    """The end of a process in words: status as of subprocess."""
    if status >= 0:
        return f"exit status {status}"
    if status == -signal.SIGKILL and out_of_memory:
        return "killed by the kernel: out of memory"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
