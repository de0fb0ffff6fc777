"""Programs that promise to keep what they acknowledged, each driven the same way: start, put, read, kill.

    record n  ->  its bytes follow from n alone, so that a reader knows a changed one when it sees it

Every one runs as a process of its own over a folder of its own and is ended with SIGKILL, never politely: what it does
at a clean stop is not the question. Sockets are Unix sockets where the program has them, else a free port of loopback.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gpujobd import protocol
from harness import Host

START_S = 30.0
IDS_MAX = 5_000  # of beanstalkd, which does not list what it has: more than are put here
WARNINGS = ("error", "warning:", "corrupt", "mismatch", "truncat", "bad ", "bogus")
REPLY_S = 10.0  # a write that is not answered by then was not acknowledged


class Refuses(Exception):
    """It says that something is wrong, instead of serving: the message is its own."""


def payload(n: int) -> str:
    return f"{n:06} {hashlib.sha256(b'%d' % n).hexdigest()}"


class Store(ABC):
    """One program with one setting."""

    title = ""
    setting = ""
    log = "*"  # glob of the files that hold the records
    errors = "stderr"  # where it tells the operator what is wrong

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def start(self) -> None:
        """Serve what is in the folder. Raises: Refuses."""

    @abstractmethod
    def put(self, n: int) -> bool:
        """Whether record n was acknowledged."""

    @abstractmethod
    def read(self) -> list[str]:
        """Every record it has. Raises: Refuses."""

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @classmethod
    def missing(cls) -> str:
        """The Debian package to install first; empty: nothing."""
        return ""

    def logs(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(self.log) if path.is_file())

    def warned(self) -> bool:
        """Whether it said anything that an operator would take for a warning."""
        text = (self.folder / self.errors).read_text(errors="replace").lower()
        return any(word in text for word in WARNINGS)

    def _launch(
        self, *command: object, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
    ) -> None:
        with (self.folder / self.errors).open("wb") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdin=stdin, stdout=stdout, stderr=errors, cwd=self.folder
            )

    def _said(self) -> str:
        lines = (self.folder / self.errors).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word"

    def _connect(self, address: str | tuple[str, int]) -> socket.socket:
        """Wait until it answers there. Raises: Refuses, where it ends instead."""
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Refuses(f"exit {self.process.returncode}: {self._said()}")
            sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
            try:
                sock.connect(address)
            except OSError:
                sock.close()
                time.sleep(0.01)
            else:
                sock.settimeout(REPLY_S)
                return sock
        raise Refuses(f"did not start: {self._said()}")


class Gpujobd(Store):
    title, setting, log, errors = "gpujobd", "default", "state/journal/seg-*", "daemon.log"

    def start(self) -> None:
        self._host = Host(
            self.folder, "[limits]\ndisk_free_bytes_min = 0"
        )  # the disk of a power cut is small
        self._host.launch()
        self.process = self._host.process
        self._connect(str(self._host.socket)).close()
        self._client = self._host.client()
        self._client.sock.settimeout(REPLY_S)
        self._client.ask(protocol.Queue, action="stop")  # the records are jobs; nobody is to run them

    def put(self, n: int) -> bool:
        try:
            return isinstance(self._client.submit("checksum", [{}], name=payload(n)), protocol.Accepted)
        except (OSError, ConnectionError):
            return False

    def read(self) -> list[str]:
        found: list[str] = []
        after = 0
        while True:
            page = self._client.ask(protocol.List, after=after)
            found += [job.name for job in page.jobs]
            if not page.next:
                return found
            after = page.next


class Sqlite(Store):
    title, setting, log = "SQLite", "WAL, synchronous=FULL", "records.db-wal"

    _WRITER = """
import sqlite3, sys
db = sqlite3.connect("records.db", isolation_level=None)
db.execute("pragma journal_mode=wal"); db.execute("pragma synchronous=full"); db.execute("pragma wal_autocheckpoint=0")
db.execute("create table if not exists records (text)")
print("ready", flush=True)
for line in sys.stdin:
    try:
        db.execute("insert into records values (?)", (line.strip(),)); print("ok", flush=True)
    except sqlite3.Error as error:
        print(error, flush=True)
"""
    _READER = """
import sqlite3, sys
try:
    for (text,) in sqlite3.connect("records.db").execute("select text from records"): print(text)
except sqlite3.Error as error:
    sys.exit(str(error))
"""

    def start(self) -> None:
        self._launch(sys.executable, "-c", self._WRITER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._line() != "ready":
            self.kill()
            raise Refuses(self._said())

    def put(self, n: int) -> bool:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{payload(n)}\n".encode())
            self.process.stdin.flush()
        except OSError:
            return False
        return self._line() == "ok"

    def read(self) -> list[str]:
        reader = subprocess.run(
            [sys.executable, "-c", self._READER],
            cwd=self.folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if reader.returncode:
            raise Refuses(reader.stderr.strip().rpartition("\n")[2])
        return reader.stdout.splitlines()

    def kill(self) -> None:
        super().kill()
        for pipe in (self.process.stdin, self.process.stdout) if self.process else ():
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _line(self) -> str:
        assert self.process is not None
        pipe: IO[bytes] | None = self.process.stdout
        assert pipe is not None
        return pipe.readline().decode().strip()


class Beanstalkd(Store):
    title, setting, log = "beanstalkd", "-f0 (sync at every write)", "binlog.*"
    _sync = "-f0"

    def start(self) -> None:
        with tempfile.NamedTemporaryFile(prefix="bs-") as name:
            path = name.name
        self._launch("beanstalkd", "-l", f"unix:{path}", "-b", self.folder, self._sync)
        self._sock = self._connect(path)
        self._file = self._sock.makefile("rb")
        os.unlink(path)

    def put(self, n: int) -> bool:
        body = payload(n).encode()
        try:
            self._sock.sendall(b"put 0 0 60 %d\r\n%s\r\n" % (len(body), body))
            answered = self._file.readline().startswith(b"INSERTED")
        except OSError:
            return False
        return answered

    def read(self) -> list[str]:
        found = []
        for job in range(1, IDS_MAX + 1):
            self._sock.sendall(b"peek %d\r\n" % job)
            status = self._file.readline().split()
            if status[:1] == [b"FOUND"]:
                found.append(self._file.read(int(status[2]) + 2)[:-2].decode(errors="replace"))
        return found

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("beanstalkd") else "beanstalkd"


class BeanstalkdDefault(Beanstalkd):
    setting, _sync = "default (sync every 50 ms)", "-f50"


class Redis(Store):
    title, setting, log = "Redis", "appendfsync always", "appendonlydir/*.incr.aof"
    _sync = "always"

    def start(self) -> None:
        with tempfile.NamedTemporaryFile(prefix="rd-") as name:
            path = name.name
        self._launch(
            *["redis-server", "--port", 0, "--unixsocket", path, "--dir", self.folder, "--save", ""],
            *["--appendonly", "yes", "--appendfsync", self._sync, "--logfile", self.folder / self.errors],
        )
        self._sock = self._connect(path)
        self._file = self._sock.makefile("rb")
        try:
            while self._ask("PING") != "PONG":  # it answers LOADING while it reads its log
                time.sleep(0.01)
        except OSError:
            raise Refuses(self._said()) from None

    def put(self, n: int) -> bool:
        try:
            return str(self._ask("RPUSH", "records", payload(n))).isdecimal()
        except OSError:
            return False

    def read(self) -> list[str]:
        found = self._ask("LRANGE", "records", "0", "-1")
        if not isinstance(found, list):
            raise Refuses(str(found))
        return found

    def _ask(self, *words: str) -> str | list[str]:
        self._sock.sendall(
            "".join([f"*{len(words)}\r\n", *(f"${len(w)}\r\n{w}\r\n" for w in words)]).encode()
        )
        return self._reply()

    def _reply(self) -> str | list[str]:
        line = self._file.readline().decode(errors="replace").strip()
        if not line:
            raise ConnectionResetError("Redis hung up")
        if line.startswith("$"):
            return self._file.read(int(line[1:]) + 2)[:-2].decode(errors="replace")
        if line.startswith("*"):
            return [str(self._reply()) for _ in range(int(line[1:]))]
        return line[1:]

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("redis-server") else "redis-server"


class RedisDefault(Redis):
    setting, _sync = "appendfsync everysec (default)", "everysec"


STORES: list[type[Store]] = [Gpujobd, Sqlite, Beanstalkd, BeanstalkdDefault, Redis, RedisDefault]


@contextlib.contextmanager
def served(kind: type[Store], folder: Path) -> Iterator[Store]:
    store = kind(folder)
    try:
        store.start()
        yield store
    finally:
        store.kill()


def freeze(store: Store) -> None:
    """Stop it where it stands, and wait until the kernel says so."""
    assert store.process is not None
    store.process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{store.process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)
