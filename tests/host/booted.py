"""A booted Debian 13 with its real systemd, the packages installed, and users who submit: what a host test talks to.

    def test_job_of_a_user_is_read_back(host):                   # one host for the tests of a file (conftest.py)
        job = host.jobctl("submit", "checksum", "-", user="alice", text='{"text": "a"}\\n').stdout.strip()
        host.jobctl("wait", job, user="alice")
        assert host.show()["NRestarts"] == "0"

    def test_after_a_reboot_it_is_there(fresh_host):             # one of its own, for tests that leave a mess
        fresh_host.stop()
        fresh_host.boot(keep=True)

    Host       boot, stop, run, files, users
      .run(*argv, user=, text=, check=)        a command in the host; its status is asserted unless check=False
      .jobctl(*words, user="alice", ...)       the same, of jobctl
      .start(*argv, user=)                     a command that runs while the test goes on; ended with the host
      .systemctl(*words), .show(unit)          unit properties as a dict
      .journal("gpujobd", JOB_ID=1)            entries of systemd's journal, as dicts of their fields
      .handler(name, entry, **keys)            a handler of tests/handlers, known after a reload
      .main_pid(), .worker_groups(), .pids()   what runs below the service
      .root                                    the host's / as seen from here: a Path to read and write

Rule 1: everything goes through the doors that an administrator or a user has: units, jobctl, files, signals.
Rule 2: what has no push is waited for by until(); nobody sleeps, and no time is asserted save limits against hanging.
Rule 3: a host that is not stopped by its test is stopped by its fixture, and testhost.sh ends it after TESTHOST_TTL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import HANDLERS, HANG_S, ROOT, fake, until

TESTHOST = ROOT / "tests" / "host" / "testhost.sh"
BUILDDEB = ROOT / "packaging" / "builddeb.sh"
UNIT = "gpujobd.service"
SOCKET = "gpujobd.socket"
CONFIG = "etc/gpujobd/gpujobd.toml"
PREVIOUS = "0.0.1~previous"  # a version lower than any
HANDLERS_INSIDE = "/srv/gpujobd/handlers"


def why_not() -> str:
    """What this machine lacks for booting a host; empty: nothing."""
    if os.geteuid() != 0:
        return "booting a test host needs root"
    if shutil.which("unshare") is None or "overlay" not in Path("/proc/filesystems").read_text():
        return "booting a test host needs unshare and overlayfs"
    return ""


def build_packages(folder: Path, *options: str) -> list[Path]:
    """The packages of this tree. `options`: as of builddeb.sh, such as "--version", "0.1.0~previous"."""
    done = subprocess.run(
        [BUILDDEB, "--no-check", *options, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [Path(line) for line in done.stdout.split()]


class Host:
    """See the head of this file. Names must differ where hosts run at the same time."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}-{os.getpid()}"
        self._started: list[subprocess.Popen[str]] = []

    # --- the machine ----------------------------------------------------------------------------------------------

    def boot(self, *, keep: bool = False, check: bool = True) -> None:
        """Boot a fresh copy of the base; `keep`: what the last boot left, as after a reboot."""
        self._testhost("boot", *["--keep"] * keep)
        if check:
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            assert state == "running", self.run("systemctl", "--failed", "--no-legend").stdout

    def stop(self) -> None:
        """Shut down cleanly."""
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
        self._started.clear()
        self._testhost("stop")

    def forget(self) -> None:
        """Stop, and remove its copy of the disk."""
        self.stop()
        base = Path(self._testhost("build").stdout.strip())
        shutil.rmtree(base.parent / f"host-{self.name}", ignore_errors=True)

    @property
    def root(self) -> Path:
        return Path(self._testhost("root").stdout.strip())

    def run(
        self, *argv: str, user: str = "root", text: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self._command(argv, user),
            env=self._environment(),
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"{shlex.join(argv)}: {done.returncode}\n{_both(done)}"
        return done

    def start(self, *argv: str, user: str = "root") -> subprocess.Popen[str]:
        """Start a command and return; its stdout and stderr are one pipe."""
        process = subprocess.Popen(
            self._command(argv, user),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def _command(self, argv: Sequence[str], user: str) -> list[str]:
        become: list[str] = []
        if user != "root":
            become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
            become += ["env", f"HOME=/home/{user}", f"USER={user}"]
        return [str(TESTHOST), "run", *become, *argv]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"TESTHOST_NAME": self.name}

    def _testhost(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [TESTHOST, *words],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"testhost.sh {' '.join(words)}: {done.returncode}\n{_both(done)}"
        return done

    # --- packages, users, files -----------------------------------------------------------------------------------

    def install(self, packages: Sequence[Path], *options: str) -> None:
        """As an administrator does, from files: there is no network in there."""
        for package in packages:
            shutil.copy(package, self.root / "tmp")
        paths = [f"/tmp/{package.name}" for package in packages]
        self.run("apt-get", "-qq", "-y", "install", *options, *paths)

    def add_user(self, name: str, *groups: str) -> int:
        """A user who may log in; returns the uid."""
        self.run("useradd", "--create-home", *(["--groups", ",".join(groups)] if groups else []), name)
        return int(self.run("id", "-u", name).stdout)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file of root's, with its folders."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def handler(self, name: str, entry: str, **keys: object) -> None:
        """Make a class of tests/handlers a handler; `entry`: "toys:Echo"."""
        inside = self.root / HANDLERS_INSIDE.lstrip("/")
        if not inside.exists():
            shutil.copytree(HANDLERS, inside, ignore=shutil.ignore_patterns("__pycache__"))
            self.run("chmod", "-R", "a+rX", HANDLERS_INSIDE)
        text = fake(entry, **keys).replace(str(HANDLERS), HANDLERS_INSIDE)
        self.write(f"etc/gpujobd/handlers.d/{name}.toml", text)
        self.systemctl("reload", UNIT)

    # --- systemd --------------------------------------------------------------------------------------------------

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", "--no-pager", *words, check=check)

    def show(self, unit: str = UNIT) -> dict[str, str]:
        """All properties of a unit."""
        lines = self.systemctl("show", "--all", unit).stdout.splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def state(self, unit: str = UNIT) -> str:
        """ActiveState, such as "active", "activating", "failed"."""
        return self.systemctl("show", "-P", "ActiveState", unit).stdout.strip()

    def until_active(self, unit: str = UNIT) -> None:
        until(lambda: self.state(unit) == "active", f"{unit} to be active")

    def journal(self, unit: str = "", **fields: str | int) -> list[dict[str, Any]]:
        """Entries of the journal, oldest first."""
        matches = [f"{field}={value}" for field, value in fields.items()]
        unit_words = ["--unit", unit] if unit else []
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--quiet", "--output=json", "--all", *unit_words, *matches).stdout
        return [json.loads(line) for line in lines.splitlines()]

    def messages(self, unit: str = UNIT) -> str:
        """What the journal says about a unit, one message a line."""
        return "\n".join(str(entry.get("MESSAGE")) for entry in self.journal(unit))

    # --- the service ----------------------------------------------------------------------------------------------

    def jobctl(
        self, *words: str, user: str = "alice", text: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return self.run("jobctl", *words, user=user, text=text, check=check)

    def submit(self, handler: str, items: Sequence[dict[str, Any]], user: str = "alice") -> str:
        """Submit; returns the id."""
        text = "".join(json.dumps(item) + "\n" for item in items)
        return self.jobctl("submit", handler, "-", user=user, text=text).stdout.strip()

    def job(self, job_id: str, user: str = "alice") -> dict[str, Any]:
        return json.loads(self.jobctl("show", job_id, "--json", user=user).stdout)

    def main_pid(self) -> int:
        """The daemon's pid in there; 0: none."""
        return int(self.systemctl("show", "-P", "MainPID", UNIT).stdout)

    def kill(self, number: str, pid: int) -> None:
        self.run("kill", f"-{number}", str(pid))

    def cgroup(self) -> Path:
        """The service's cgroup, seen from here."""
        return self.root / "sys/fs/cgroup/payload/system.slice" / UNIT

    def pids(self) -> list[int]:
        """Processes in the service's cgroup and those inside of it, by their pids in there; no zombies."""
        listed = self.run(
            "sh", "-c", f"cat $(find /sys/fs/cgroup/system.slice/{UNIT} -name cgroup.procs)", check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def worker_groups(self) -> list[str]:
        """Names of the cgroups of workers, below the service's."""
        found = self.run(
            "find", f"/sys/fs/cgroup/system.slice/{UNIT}", "-name", "gpujobd-worker-*", check=False
        )
        return found.stdout.split()


def _both(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.stdout}\n{done.stderr}"


@contextlib.contextmanager
def installed(name: str, packages: Sequence[Path]) -> Iterator[Host]:
    """A host with the service running, the users alice and bob, and an administrator, ada."""
    host = Host(name)
    try:
        host.boot()
        host.install(packages)
        host.add_user("alice")
        host.add_user("bob")
        host.add_user("ada", "gpujobd-admin")
        yield host
    finally:
        host.forget()
