"""What may import what: read from the source, without importing it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DAEMON, CLIENT = ROOT / "daemon", ROOT / "ctl"
STANDARD = sys.stdlib_module_names
# Pure parts of the standard library: they know no clock, no file and no luck.
PURE = {
    "__future__",
    "bisect",
    "collections",
    "copy",
    "enum",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "typing",
}
CORE = "gpujobd.core"


def imported(path: Path) -> set[str]:
    """Full names of all modules this file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def called(path: Path) -> set[str]:
    """Names of functions called by their bare name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(DAEMON / "gpujobd" / "core"), ids=ids)
def test_the_core_knows_no_clock_no_file_no_luck_and_no_loop(path: Path) -> None:
    assert tops(path) <= PURE | {"msgspec", "gpujobd"}
    own = {name for name in imported(path) if name.startswith("gpujobd")}
    assert {name for name in own if not name.startswith((CORE, "gpujobd.protocol"))} == set()
    assert called(path).isdisjoint({"open", "print", "input", "exec", "eval", "compile", "hash", "id"})


@pytest.mark.parametrize("path", files(DAEMON / "gpujobd"), ids=ids)
def test_the_daemon_imports_no_worker_and_nothing_that_touches_a_device(path: Path) -> None:
    assert tops(path).isdisjoint(
        {"torch", "transformers", "numpy", "gpujobd_worker", "gpujobd_notify", "jobctl"}
    )


def test_the_protocol_stands_on_msgspec_alone() -> None:
    assert tops(DAEMON / "gpujobd" / "protocol.py") <= STANDARD | {"msgspec"}


SHARED = ("notify", "peer", "protocol", "settings")  # what the notifier has of the daemon


@pytest.mark.parametrize("name", SHARED)
def test_what_the_notifier_shares_with_the_daemon_knows_nothing_of_it(name: str) -> None:
    assert tops(DAEMON / "gpujobd" / f"{name}.py") <= STANDARD | {"msgspec", "sdnotify", "trio"}


@pytest.mark.parametrize("path", files(CLIENT / "jobctl"), ids=ids)
def test_the_client_knows_the_protocol_and_nothing_else_of_the_daemon(path: Path) -> None:
    own = {name for name in imported(path) if name.split(".")[0] == "gpujobd"}
    allowed = {"gpujobd", "gpujobd.protocol", "gpujobd.__version__"}
    assert {name for name in own if name not in allowed and not name.startswith("gpujobd.protocol.")} == set()
    assert tops(path) <= STANDARD | {"gpujobd", "jobctl", "msgspec", "click"}


NOTIFIER = DAEMON / "gpujobd_notify"


@pytest.mark.parametrize("path", files(NOTIFIER), ids=ids)
def test_the_notifier_is_a_client_and_knows_of_the_daemon_what_it_shares_with_it(path: Path) -> None:
    allowed = {"gpujobd", "gpujobd.__version__", *(f"gpujobd.{name}" for name in SHARED)}
    own = {name for name in imported(path) if name.split(".")[0] == "gpujobd"}
    assert {name for name in own if ".".join(name.split(".")[:2]) not in allowed} == set()
    assert tops(path) <= STANDARD | {
        "gpujobd",
        "gpujobd_notify",
        "msgspec",
        "trio",
        "httpx",
        "httpcore",
        "click",
    }


@pytest.mark.parametrize("name", ["breaker", "due", "lanes", "message", "schedule", "targets"])
def test_what_the_notifier_decides_by_knows_no_clock_no_file_and_no_luck(name: str) -> None:
    text = {"base64", "datetime", "email", "hashlib", "ipaddress", "json", "re", "urllib"}
    path = NOTIFIER / f"{name}.py"
    assert tops(path) <= PURE | text | {"msgspec", "gpujobd", "gpujobd_notify"}
    own = {one.split(".")[1] for one in imported(path) if one.startswith("gpujobd_notify.")}
    assert own <= {"due", "targets"}
    assert called(path).isdisjoint({"open", "print", "input", "exec", "eval", "compile", "hash"})
    assert ".now(" not in path.read_text(encoding="utf-8")


WORKER = DAEMON / "gpujobd_worker"


@pytest.mark.parametrize("path", [p for p in files(WORKER) if "handlers" not in p.parts], ids=ids)
def test_the_worker_needs_nothing_installed(path: Path) -> None:
    own = {path.stem for path in WORKER.glob("*.py")} | {"gpujobd_worker"}
    optional = {"torch"}  # looked for, and done without
    assert tops(path) <= STANDARD | own | optional
    assert "gpujobd" not in tops(path)


@pytest.mark.parametrize("path", files(WORKER / "handlers"), ids=ids)
def test_handlers_know_their_libraries_and_not_the_daemon(path: Path) -> None:
    assert tops(path).isdisjoint({"gpujobd", "jobctl", "trio", "msgspec"})


@pytest.mark.parametrize("folder", ["daemon", "ctl", "tests", "systemd", "packaging"])
def test_folders_that_are_no_packages_have_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", [p for top in (DAEMON, CLIENT) for p in files(top)], ids=ids)
def test_rooms_have_names_that_say_what_is_in_them(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "common", "types", "errors", "misc"}


@pytest.mark.parametrize("path", files(DAEMON / "gpujobd" / "core"), ids=ids)
def test_the_rule_would_be_seen_to_be_broken(path: Path, tmp_path: Path) -> None:
    """The tests above read real imports: one that is added is found."""
    changed = tmp_path / path.name
    changed.write_text(path.read_text(encoding="utf-8") + "\n\ndef f():\n    import time\n", encoding="utf-8")
    assert "time" in tops(changed)
    assert not tops(changed) <= PURE | {"msgspec", "gpujobd"}
