"""Kinds of log entries: the code, the catalog for `journalctl -x`, and the names of fields agree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import typing

import pytest
from documents import ROOT
from gpujobd.catalog import FIELDS, MESSAGE_IDS, kind
from gpujobd.core.events import AnyEvent
from jobctl.__main__ import VERBS

CATALOG = ROOT / "systemd" / "gpujobd.catalog"
TEXT = CATALOG.read_text(encoding="utf-8")
ENTRY = re.compile(
    r"^# (\w+)\n-- ([0-9a-f]{32})\n((?:[A-Z][\w-]+: [^\n]*\n)+)\n(.*?)(?=\n# \w+\n-- |\Z)",
    re.MULTILINE | re.DOTALL,
)
ENTRIES = {word: (number, head, body) for word, number, head, body in ENTRY.findall(TEXT)}
ALWAYS = {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "SYSLOG_TIMESTAMP", "LOGGER", "CODE_FILE", "CODE_LINE"}
LEVELS = {"info", "warning", "error", "critical", "exception", "log"}
DAEMON = sorted((ROOT / "daemon" / "gpujobd").rglob("*.py"))


def test_numbers_are_128_bits_and_each_is_one_kind():
    assert all(re.fullmatch(r"[0-9a-f]{32}", number) for number in MESSAGE_IDS.values())
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)


def test_code_and_catalog_have_the_same_kinds_with_the_same_numbers():
    assert {word: number for word, (number, _, _) in ENTRIES.items()} == MESSAGE_IDS
    assert len(re.findall(r"^-- ", TEXT, re.MULTILINE)) == len(ENTRIES)


@pytest.mark.parametrize("word", MESSAGE_IDS)
def test_every_text_says_what_it_is_and_where_to_read_on(word):
    _, head, body = ENTRIES[word]
    keys = dict(line.split(": ", 1) for line in head.splitlines())
    assert keys.keys() == {"Subject", "Defined-By", "Documentation"}
    assert keys["Defined-By"] == "gpujobd"
    page = re.fullmatch(r"man:([\w.-]+)\((\d)\)", keys["Documentation"])
    assert (ROOT / "man" / f"{page[1]}.{page[2]}").exists()
    assert body.strip()
    assert set(re.findall(r"@(\w+)@", head + body)) <= {*FIELDS.values()} | ALWAYS
    assert all(len(line) <= 100 for line in body.splitlines())


def test_commands_in_the_texts_exist():
    assert set(re.findall(r"`jobctl (\w+)", TEXT)) <= VERBS.keys()
    assert set(re.findall(r"`gpujobd (\w+)", TEXT)) <= {"check", "fsck", "serve"}


def test_names_of_fields_are_such_as_journald_takes_and_none_is_there_twice():
    names = [*FIELDS.values(), *ALWAYS]
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name) for name in names)
    assert len(set(names)) == len(names)


def test_systemd_reads_the_catalog(tmp_path):
    if shutil.which("journalctl") is None:
        pytest.skip("NOT TESTED: journalctl is missing (apt install systemd)")
    folder = tmp_path / "usr" / "lib" / "systemd" / "catalog"
    folder.mkdir(parents=True)
    (tmp_path / "var" / "lib" / "systemd" / "catalog").mkdir(parents=True)
    shutil.copy(CATALOG, folder)

    def journalctl(*words):
        command = ["journalctl", f"--root={tmp_path}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    assert journalctl("--update-catalog").stderr == ""
    listed = dict(line.split(" ", 1) for line in journalctl("--list-catalog").stdout.splitlines())
    assert listed.keys() == set(MESSAGE_IDS.values())
    assert listed[MESSAGE_IDS["ready"]] == "gpujobd: gpujobd is ready"


# --- calls --------------------------------------------------------------------------------------------------------


def log_calls(tree):
    """Calls that log at a level an operator sees."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = node.func.value
            if isinstance(named, ast.Name) and named.id in ("log", "logger") and node.func.attr in LEVELS:
                yield node


@pytest.mark.parametrize("path", DAEMON, ids=lambda path: path.name)
def test_every_entry_that_an_operator_sees_has_a_kind(path):
    for call in log_calls(ast.parse(path.read_text(encoding="utf-8"))):
        given = {keyword.arg for keyword in call.keywords}
        assert "extra" in given, f"{path.name}:{call.lineno}: extra=kind(...) is missing"


def words_of(path):
    """The literal kinds that a file uses, and the names of their fields."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = (
            getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        )
        if called in ("kind", "_extra") and node.args:
            yield from ((c.value, node) for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant))
        if called == "_log" and len(node.args) > 1:
            yield from ((c.value, node) for c in ast.walk(node.args[1]) if isinstance(c, ast.Constant))


@pytest.mark.parametrize("path", DAEMON, ids=lambda path: path.name)
def test_kinds_and_fields_that_the_code_names_are_in_the_tables(path):
    for word, call in words_of(path):
        if word and not word.endswith("_"):  # f"worker_{cause}" is tried where causes are
            assert word in MESSAGE_IDS, f"{path.name}:{call.lineno}"
        fields = {keyword.arg for keyword in call.keywords if keyword.arg}
        assert fields - {"level"} <= FIELDS.keys(), f"{path.name}:{call.lineno}"


def test_every_kind_is_used():
    used = {word for path in DAEMON for word, _ in words_of(path)}
    tags = {event.__struct_config__.tag for event in typing.get_args(AnyEvent)}
    by_cause = {f"worker_{cause}" for cause in ("load", "silent", "stalled")}
    source = (ROOT / "daemon" / "gpujobd" / "report.py").read_text(encoding="utf-8")
    named = set(re.findall(r'"(\w+)"', source))
    assert used | tags | by_cause | named >= MESSAGE_IDS.keys()


def test_an_unknown_kind_is_a_bug():
    with pytest.raises(KeyError):
        kind("no_such_kind")
