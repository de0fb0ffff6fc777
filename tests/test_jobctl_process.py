"""jobctl as a process: where it looks for the daemon, how it ends, what it imports, and its completion files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import gpujobd
import pytest
from fake_daemon import Descriptor, FakeDaemon
from gpujobd import protocol as p
from jobctl import __main__ as entry
from jobctl import connection, shell
from jobctl.exits import Failure

PONG = p.Pong(id=0, program="fake", seq=7)


def jobctl(*words, **environment):
    kept = {
        key: value for key, value in os.environ.items() if key not in ("JOBCTL_SOCKET", "XDG_RUNTIME_DIR")
    }
    return subprocess.run(
        [sys.executable, "-m", "jobctl", *words],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- where the daemon is ----------------------------------------------------------------------------------------


def test_socket_beats_environment_beats_the_users_own(tmp_path):
    (tmp_path / "gpujobd").mkdir()
    places = {
        "option": tmp_path / "a",
        "environment": tmp_path / "b",
        "own": tmp_path / "gpujobd" / "control.sock",
    }
    daemons = {name: FakeDaemon(path) for name, path in places.items()}
    for name, daemon in daemons.items():
        daemon.answer(p.Ping, p.Pong(id=0, program=name, seq=1))
        daemon.start()
    try:
        own = {"XDG_RUNTIME_DIR": str(tmp_path)}
        both = {**own, "JOBCTL_SOCKET": str(places["environment"])}
        assert jobctl("ping", **own).stdout.startswith("own ")
        assert jobctl("ping", **both).stdout.startswith("environment ")
        assert jobctl("ping", "--socket", str(places["option"]), **both).stdout.startswith("option ")
        assert jobctl("--socket", str(places["option"]), "ping", **both).stdout.startswith("option ")
    finally:
        for daemon in daemons.values():
            daemon.stop()


def test_without_a_daemon_every_path_that_was_tried_is_named(tmp_path):
    done = jobctl("ping", XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert str(tmp_path / "gpujobd" / "control.sock") in done.stderr
    assert p.SYSTEM_SOCKET in done.stderr


@pytest.mark.parametrize(("booted", "told"), [(True, True), (False, False)])
def test_where_systemd_runs_the_host_it_is_said_who_knows_more(tmp_path, monkeypatch, booted, told):
    monkeypatch.setattr(connection, "SYSTEMD", str(tmp_path if booted else tmp_path / "none"))
    monkeypatch.setattr(p, "socket_paths", lambda: [str(tmp_path / "own"), str(tmp_path / "system")])
    monkeypatch.setattr(p, "SYSTEM_SOCKET", str(tmp_path / "system"))
    with pytest.raises(Failure) as failure:
        connection.Daemon().connection()
    assert ("systemctl status gpujobd" in str(failure.value)) is told
    with pytest.raises(Failure) as failure:  # another daemon was asked for
        connection.Daemon(str(tmp_path / "own")).connection()
    assert "systemctl" not in str(failure.value)


def test_the_users_own_socket_is_beside_the_state_where_there_is_no_run_time_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert p.socket_paths() == [str(tmp_path / "state/gpujobd/control.sock"), "/run/gpujobd/control.sock"]
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/alice")
    assert p.own_socket() == "/home/alice/.local/state/gpujobd/control.sock"


# --- how it ends ------------------------------------------------------------------------------------------------


def test_unknown_verbs_and_options_are_usage_errors():
    for words in (["nope"], ["ping", "--nope"], ["show"], ["queue", "explode"]):
        assert jobctl(*words).returncode == 2


def test_the_version_needs_no_metadata_of_the_distribution():
    """A package of the client alone has none to ask."""
    code = "import importlib.metadata as m; m.version = None; from jobctl.__main__ import run; run(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f"jobctl {gpujobd.__version__}\n"


def test_a_reader_that_has_read_enough_ends_it_quietly(tmp_path):
    results = tmp_path / "results"
    results.write_bytes(b'{"line": 1}\n' * 500_000)
    source = os.open(results, os.O_RDONLY)
    with FakeDaemon(tmp_path / "s") as daemon:
        daemon.on(
            p.Output,
            lambda call: [Descriptor(source), p.File(id=call.request.id, bytes=results.stat().st_size)],
        )
        with subprocess.Popen(
            [sys.executable, "-m", "jobctl", "output", "42", "--socket", str(daemon.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout.readline() == b'{"line": 1}\n'
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(60) != 0
    os.close(source)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path):
    with FakeDaemon(tmp_path / "s") as daemon, open("/dev/full", "wb") as full:
        daemon.answer(p.Ping, PONG)
        done = subprocess.run(
            [sys.executable, "-m", "jobctl", "ping", "--socket", str(daemon.path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "jobctl: cannot write: No space left on device\n"


@pytest.mark.parametrize(("closed", "code"), [("0<&-", 0), ("1>&-", 1), ("2>&-", 0)])
def test_a_closed_stream_is_no_crash_and_only_output_is_missed(closed, code):
    command = f"{sys.executable} -m jobctl completion bash {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == ("jobctl: cannot write: Bad file descriptor\n" if code else "")


def test_a_name_that_the_locale_cannot_show_does_not_end_a_table(tmp_path):
    from fake_daemon import a_job

    with FakeDaemon(tmp_path / "s") as daemon:
        daemon.answer(p.List, p.Jobs(id=0, jobs=[a_job(name="模型")], seq=1))
        done = jobctl("list", "--socket", str(daemon.path), PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "??" in done.stdout


def test_it_starts_without_what_the_verb_does_not_need(tmp_path):
    """The imports are what a short command costs."""
    code = (
        "import sys; from jobctl.__main__ import run; code = run(['ping'])\n"
        "print(code, *sorted(name for name in sys.modules))"
    )
    with FakeDaemon(tmp_path / "s") as daemon:
        daemon.answer(p.Ping, PONG)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "JOBCTL_SOCKET": str(daemon.path)},
            capture_output=True,
            text=True,
            check=True,
        )
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    bare = "import sys, click, msgspec, socket; print(*sys.modules)"  # what click brings along is click's
    brought = subprocess.run(
        [sys.executable, "-c", bare], capture_output=True, text=True, check=True
    ).stdout.split()
    unwanted = {"trio", "asyncio", "psutil", "hashlib", "json", "tempfile", "shutil", "subprocess", "locale"}
    assert (unwanted - set(brought)).isdisjoint(modules)
    assert {name for name in modules if name.startswith("gpujobd")} == {"gpujobd", "gpujobd.protocol"}
    assert {name for name in modules if name.startswith("jobctl.")} <= {
        f"jobctl.{name}" for name in ("__main__", "command", "connection", "exits", "host")
    }


def test_help_of_every_verb_has_an_example():
    context = click.Context(entry.cli, info_name="jobctl")
    for name in entry.VERBS:
        command = entry.cli.get_command(context, name)
        assert command.name == name
        shown = command.get_help(click.Context(command, parent=context, info_name=name))
        assert f"\n    jobctl {name}" in shown or name == "status", name
        assert "--json" in shown


# --- completion -------------------------------------------------------------------------------------------------


def options_of(name):
    command = entry.cli.get_command(click.Context(entry.cli), name)
    return {
        o
        for param in command.params
        if isinstance(param, click.Option)
        for o in param.opts
        if o.startswith("--")
    }


@pytest.mark.parametrize("name", shell.FILES)
def test_a_completion_file_knows_every_verb_and_long_option_and_no_other(name):
    text = (shell.FOLDER / shell.FILES[name]).read_text()
    words = set(re.findall(r"[\w-]+", text))
    assert set(entry.VERBS) | set(entry.ALIASES) <= words
    known = {option for verb in entry.VERBS for option in options_of(verb)} | {"--help", "--version"}
    if name == "fish":
        found = {f"--{option}" for option in re.findall(r"(?<!set )-l ([a-z-]+)", text)}
    else:
        found = set(re.findall(r"--[a-z][a-z-]+", text))
    assert found == known


def test_completion_prints_the_file(capfd):
    for name, file in shell.FILES.items():
        assert entry.run(["completion", name]) == 0
        assert capfd.readouterr().out == (Path(shell.FOLDER) / file).read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("jobctl canc", {"cancel"}),
        ("jobctl queue d", {"disable", "drain"}),
        ("jobctl submit --prio", {"--priority"}),
        ("jobctl submit --priority l", {"low"}),
        ("jobctl --socket /x/y ls --mi", {"--mine"}),
        ("jobctl completion ", {"bash", "zsh", "fish"}),
        ("jobctl notifications de", {"defaults"}),
        ("jobctl notifications --state f", {"failed"}),
        ("jobctl submit h in --notify-on st", {"start", "stall"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(line, expected):
    words = line.split(" ")
    script = (
        f"source {shell.FOLDER / 'jobctl.bash'}; COMP_WORDS=({' '.join(map(repr, words))}); "
        f'COMP_CWORD={len(words) - 1}; _jobctl; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
