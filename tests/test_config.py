"""Every mistake in a configuration is refused with its file, its line and its key."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from gpujobd import config
from gpujobd.config import load
from gpujobd.settings import ConfigError

MAIN = [
    # text, line, key, words
    ("[limits]\nqueued_jobs_max = 5\nqueued_jobs_mx = 5\n", 3, "limits.queued_jobs_mx", "unknown key"),
    ("devices = 'cpu'\n[nothing]\n", 1, "devices", "auto"),
    ("\n[nothing]\nx = 1\n", 2, "nothing", "unknown key"),
    ("[limits]\n# queued_jobs_max = 1\nqueued_jobs_max = 0\n", 3, "limits.queued_jobs_max", ">= 1"),
    ("[limits]\nqueued_jobs_max = 'many'\n", 2, "limits.queued_jobs_max", "Expected `int`"),
    ("[limits]\nqueued_jobs_max = 1.5\n", 2, "limits.queued_jobs_max", "Expected `int`"),
    ("[limits]\nqueued_jobs_max = true\n", 2, "limits.queued_jobs_max", "Expected `int`"),
    ("[limits]\nitem_bytes_max = 2000000\n", 2, "limits.item_bytes_max", "<= 1048576"),
    ("[limits]\nqueued_jobs_max = 99999999999999999999\n", 2, "limits.queued_jobs_max", ""),
    ("limits = 7\n", 1, "limits", "Expected `object`"),
    ("limits = {queued_jobs_max = 0}\n", 1, "limits.queued_jobs_max", ">= 1"),
    ("[scheduler]\nslice_s = nan\n", 2, "scheduler.slice_s", ""),
    ("[scheduler]\nslice_s = inf\n", 2, "scheduler.slice_s", ""),
    ("[scheduler]\nslice_s = -1\n", 2, "scheduler.slice_s", ">= 0.001"),
    ("[scheduler]\nslice_s = 0\n", 2, "scheduler.slice_s", ">= 0.001"),
    ("[scheduler]\nresume_on_start = 'yes'\n", 2, "scheduler.resume_on_start", "Expected `bool`"),
    ("[scheduler]\nswap_overhead_max = 5\n", 2, "scheduler.swap_overhead_max", "<= 1"),
    ("devices = []\n", 1, "devices", "length"),
    ("devices = ['gpu0']\n", 1, "devices", "regex"),
    ("devices = 'all'\n", 1, "devices", "regex"),
    ("[access]\nadmins = 'root'\n", 2, "access.admins", "Expected `array`"),
    ("[access]\nadmins = ['a', 7]\n", 2, "access.admins", "Expected `str`"),
    ("[tenants.a]\nshare = 1\n[tenants.b]\nshare = 0\n", 4, "tenants.b.share", ">= "),
    ("[tenants.a]\nshare = 1\n[tenants.b]\nshare = nan\n", 4, "tenants.b.share", ""),
    ("[tenants.a]\nmembers = ['x']\nmember = ['y']\n", 3, "tenants.a.member", "unknown key"),
    ('[tenants."a b"]\nshare = 1\n', 1, "tenants", "regex"),
    ("[tenants.a]\nmembers = [1]\n", 2, "tenants.a.members", "Expected `str`"),
    ("tenants.a.share = -1\n", 1, "tenants.a.share", ">= "),
]


def write(folder, text, name="gpujobd.toml"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "key", "words"), MAIN, ids=[f"{n}-{m[2]}" for n, m in enumerate(MAIN)]
)
def test_a_mistake_names_file_line_and_key(tmp_path, text, line, key, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load(path).rules()
    message = str(refused.value)
    assert message.startswith(f"{path}: line {line}: {key}"), message
    assert words in message


HANDLERS = [
    ("batch_max = 5\n", 1, "entry", "required"),
    ("entry = 'nothing'\n", 1, "entry", "regex"),
    ("entry = 'a:B'\nbatch = 5\n", 2, "batch", "unknown key"),
    ("entry = 'a:B'\npython = '/no/such/python'\n", 2, "python", "cannot be run"),
    ("entry = 'a:B'\npython = '/'\n", 2, "python", "cannot be run"),
    ("entry = 'a:B'\nvram_gib = inf\n", 2, "vram_gib", ""),
    ("entry = 'a:B'\n[job_params.n]\ntype = 'integer'\n", 3, "job_params.n.type", "regex"),
    ("entry = 'a:B'\n[job_params.n]\ndefault = 1\n", 2, "job_params.n.type", "required"),
    (
        "entry = 'a:B'\n[job_params.n]\ntype = 'int'\ndefault = 'x'\n",
        4,
        "job_params.n.default",
        "'x' is no int",
    ),
    (
        "entry = 'a:B'\n[job_params.n]\ntype = 'int'\ndefault = true\n",
        4,
        "job_params.n.default",
        "True is no int",
    ),
    (
        "entry = 'a:B'\n[job_params.n]\ntype = 'str'\nchoices = ['a', 1]\n",
        4,
        "job_params.n.choices",
        "1 is no str",
    ),
    (
        "entry = 'a:B'\n[job_params.n]\ntype = 'str'\ndefault = 'c'\nchoices = ['a', 'b']\n",
        4,
        "job_params.n.default",
        "none of the choices",
    ),
    ("entry = 'a:B'\n[job_params.n]\ntype = 'str'\nmin = 1\n", 4, "job_params.n.min", "no bounds"),
    ("entry = 'a:B'\n[job_params.n]\ntype = 'int'\nmin = 5\nmax = 4\n", 5, "job_params.n.max", "below min"),
    ("entry = 'a:B'\n[job_params.n]\ntype = 'int'\nmin = nan\n", 3, "job_params.n", ""),
    (
        "entry = 'a:B'\n[job_params.n]\ntype = 'int'\ndefault = 9\nmax = 4\n",
        4,
        "job_params.n.default",
        "out of bounds",
    ),
]


@pytest.mark.parametrize(
    ("text", "line", "key", "words"), HANDLERS, ids=[f"{n}-{m[2]}" for n, m in enumerate(HANDLERS)]
)
def test_a_mistake_in_a_handlers_file_names_file_line_and_key(tmp_path, text, line, key, words):
    main = write(tmp_path, "")
    path = write(tmp_path, text, "handlers.d/h.toml")
    with pytest.raises(ConfigError) as refused:
        load(main).rules()
    message = str(refused.value)
    assert message.startswith(f"{path}: line "), message
    assert f": {key}" in message
    assert words in message
    if "nan" not in text:
        assert f"line {line}:" in message


@pytest.mark.parametrize("text", ["devices = \n", "[limits\n", "a = 1\na = 2\n", 'y = "\\q"\n'])
def test_what_is_no_toml_is_refused_with_its_line(tmp_path, text):
    with pytest.raises(ConfigError, match="line"):
        load(write(tmp_path, text))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml: No such file"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path)
    path = write(tmp_path, "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path)
    write(tmp_path, "")
    (tmp_path / "handlers.d").mkdir()
    (tmp_path / "handlers.d" / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml: Is a directory"):
        load(path)


def test_a_handlers_name_is_a_word(tmp_path):
    path = write(tmp_path, "")
    write(tmp_path, "entry = 'a:B'\n", "handlers.d/two words.toml")
    with pytest.raises(ConfigError, match="two words"):
        load(path)


def test_nothing_is_needed_to_begin(tmp_path):
    found = load(write(tmp_path, ""))
    assert list(found.handlers) == ["checksum"]
    assert found.rules().queued_jobs_max == 1000


def test_every_key_arrives_where_it_is_used(tmp_path):
    path = write(
        tmp_path,
        "[limits]\nqueued_jobs_max = 7\n[scheduler]\nslice_s = 2.5\n[tenants.a]\nshare = 4\nqueued_jobs_max = 3\n"
        "members = ['alice', '@research']\n",
    )
    write(
        tmp_path,
        "entry = 'a:B'\nvram_gib = 2\n[job_params.n]\ntype = 'float'\ndefault = 1\nmin = 0\nmax = 2\n",
        "handlers.d/h.toml",
    )
    rules = load(path).rules()
    assert (rules.queued_jobs_max, rules.slice_ns, rules.share("a")) == (7, 2_500_000_000, 4.0)
    assert rules.tenants["a"].queued_jobs_max == 3
    assert rules.handlers["h"].vram_bytes == 2 << 30
    assert rules.handlers["h"].job_params["n"].max == 2


@pytest.mark.parametrize(("text", "status"), [("", 0), ("[limits]\nx = 1\n", 78)])
def test_check_says_good_or_78(tmp_path, text, status):
    path = write(tmp_path, text)
    done = subprocess.run(
        [sys.executable, "-m", "gpujobd", "check", "--config", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert (f"{path}: line 2: limits.x: unknown key" in done.stderr) == bool(status)
    assert ("good" in done.stdout) == (not status)


def test_a_relative_folder_in_the_environment_is_ignored(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert str(config.default_state_dir()) == "/home/alice/.local/state/gpujobd"
