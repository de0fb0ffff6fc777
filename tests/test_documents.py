"""The documents say what the code does: what can be made from it is made, what is shown is tried."""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
import typing

import documents
import msgspec
import pytest
from documents import ROOT
from gpujobd import config, protocol
from gpujobd.core import events, model
from gpujobd.core.apply import apply
from gpujobd.core.rights import RIGHTS
from gpujobd.protocol import AnyReply, AnyRequest, ErrorCode
from gpujobd.spool import measure
from jobctl.__main__ import VERBS

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in documents.DOCUMENTS}
PROTOCOL, DESIGN, README = TEXTS["PROTOCOL.md"], TEXTS["DESIGN.md"], TEXTS["README.md"]
ALL_PARTS = [(name, part) for name, text in TEXTS.items() for part in documents.parts(text)]


@pytest.mark.parametrize(("document", "part"), ALL_PARTS)
def test_made_part_is_as_the_code_has_it(document, part):
    body = documents.parts(TEXTS[document])[part]
    assert body == documents.make(part, body), f"run: python tests/documents.py --rewrite ({document})"


@pytest.mark.parametrize(
    ("document", "part"), [p for p in ALL_PARTS if not p[1].startswith(("figure", "rights"))]
)
def test_every_row_is_explained(document, part):
    rows = documents.explained(documents.parts(TEXTS[document])[part])
    assert len(rows) > 1
    assert [key for key, meaning in rows.items() if not meaning] == []


def test_every_mark_is_a_part():
    for name, text in TEXTS.items():
        opened = re.findall(r"^<!-- made: ", text, re.MULTILINE)
        assert len(documents.parts(text)) == len(opened) == text.count("\n<!-- end -->"), name


def test_every_request_with_fields_has_its_table_and_its_name_in_a_heading():
    headings = " ".join(re.findall(r"^###? (.*)$", PROTOCOL, re.MULTILINE))
    parts = documents.parts(PROTOCOL)
    for tag, record in documents.members("request").items():
        assert tag == "hello" or re.search(rf"\b{tag}\b", headings), tag
        assert f"request {tag}" in parts or not list(documents.fields(record)), tag


def test_every_reply_with_fields_has_its_table_and_every_reply_is_named():
    parts = documents.parts(PROTOCOL)
    for tag, record in documents.members("reply").items():
        assert f"`{tag}`" in PROTOCOL, tag
        assert f"reply {tag}" in parts or not list(documents.fields(record)), tag


def test_every_word_of_the_notifiers_socket_has_its_table_and_its_name():
    parts = documents.parts(PROTOCOL)
    ours = {*documents.members("request").values(), *documents.members("reply").values()}
    for kind in ("asked", "answered"):
        for tag, record in documents.members(kind).items():
            assert f"`{tag}`" in PROTOCOL, tag
            assert record in ours or f"{kind} {tag}" in parts, tag


def test_every_record_in_a_reply_has_its_table():
    for name in documents.members("record"):
        assert f"record {name}" in documents.parts(PROTOCOL), name


def test_every_code_reason_event_and_verb_has_its_row():
    parts = documents.parts(PROTOCOL)
    for part, words in (
        ("error codes", {code.value for code in ErrorCode}),
        ("reasons", {reason.value for reason in model.Reason}),
        ("yields", {why.value for why in model.YieldWhy}),
        ("events", {event.__struct_config__.tag for event in typing.get_args(events.AnyEvent)}),
        ("rights", set(RIGHTS)),
    ):
        assert words <= documents.explained(parts[part]).keys(), part


def test_every_verb_but_the_stream_of_an_input_has_a_row_of_rights():
    verbs = {request.__struct_config__.tag for request in typing.get_args(AnyRequest)}
    assert verbs - {"hello", "chunk"} <= RIGHTS.keys()


FIELDS = {
    "job_id": 1,
    "device": "cpu",
    "attempt": 1,
    "level": model.Priority.NORMAL,
    "reason": model.Reason.HELD_BY_OWNER,
    "checkpoint": model.Checkpoint(upto=1, done=1),
    "cause": "died",
    "by": 0,
    "error": "no",
}
TO_BE_THERE = {"queued": [], "running": ["leased"], "paused": ["paused"]}


def make_event(tag):
    """The event of this tag, of job 1 on the CPU."""
    kind = next(e for e in typing.get_args(events.AnyEvent) if e.__struct_config__.tag == tag)
    required = [f.name for f in msgspec.structs.fields(kind) if f.required]
    return kind(**{name: FIELDS.get(name, 1) for name in required})


def submitted():
    return events.Submitted(
        at_ns=1, job_id=1, submit_id="a", owner=0, tenant="t", handler="h", items=1, input_bytes=2, input_sha256=b""
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "words"), [(*move, by) for move, by in documents.MOVED_BY.items()]
)
def test_events_of_the_figure_make_the_moves_it_shows(before, after, words):
    for word in words:
        first, _, then = word.partition(", then ")
        for tag in first.split(" or "):
            state = model.State()
            history = [events.DevicesFound(at_ns=1, devices=("cpu",)), submitted()]
            history += map(make_event, [*TO_BE_THERE[before], tag, *([then] if then else [])])
            for seq, event in enumerate(history, 1):
                if seq == len(history) - bool(then):
                    assert state.jobs[1].state == before
                apply(state, event, seq)
            assert state.jobs[1].state == after


# --- examples -----------------------------------------------------------------------------------------------------


def examples():
    """Messages in PROTOCOL.md: (who says it, its JSON)."""
    blocks = re.findall(r"(?:^    .*\n)+", PROTOCOL, re.MULTILINE)
    for block in blocks:
        for who, text in re.findall(r"^([CS]): (.*(?:\n +.*)*)", textwrap.dedent(block), re.MULTILINE):
            yield who, json.loads(" ".join(text.split()))


def test_examples_are_messages_without_a_key_of_their_own():
    kinds = set()
    for who, message in examples():
        decoded = msgspec.convert(message, AnyRequest if who == "C" else AnyReply)
        known = {field.encode_name for field in msgspec.structs.fields(decoded)}
        assert set(message) - {"verb", "reply"} <= known, message
        protocol.frame(decoded)
        kinds.add(type(decoded))
        if isinstance(decoded, protocol.Submit) and decoded.input:
            header = (decoded.items, decoded.item_bytes, decoded.input_sha256)
            assert (*header, decoded.input_bytes) == (*measure(decoded.input), len(decoded.input))
        if isinstance(decoded, protocol.EventSeen):
            tags = [event.__struct_config__.tag for event in typing.get_args(events.AnyEvent)]
            assert decoded.event["event"] in tags
    assert len(kinds) >= 12


def test_a_request_answered_in_an_example_was_asked_in_it():
    asked = {message["id"] for who, message in examples() if who == "C" and "id" in message}
    assert {message["id"] for who, message in examples() if who == "S" and "id" in message} <= asked


def test_example_configuration_is_accepted_and_shows_the_defaults_it_repeats():
    loaded = config.load(ROOT / "examples" / "gpujobd.toml")
    assert set(loaded.handlers) == {path.stem for path in (ROOT / "examples" / "handlers.d").glob("*.toml")}
    written = tomllib.loads((ROOT / "examples" / "gpujobd.toml").read_text())
    for section in ("limits", "retention", "scheduler", "worker"):
        defaults = msgspec.to_builtins(getattr(config.File(), section))
        assert written[section].items() <= defaults.items(), section


def test_example_handler_asks_for_parameters_that_its_class_takes():
    loaded = config.load(ROOT / "examples" / "gpujobd.toml")
    module, _, name = loaded.handlers["embed"].entry.partition(":")
    source = (ROOT / "daemon" / module.replace(".", "/")).with_suffix(".py").read_text()
    signatures = dict(
        re.findall(r"def (__init__|__call__)\(\s*(.*?)\) ->", source.partition(f"class {name}")[2], re.DOTALL)
    )
    for key in loaded.handlers["embed"].params:
        assert f"{key}:" in signatures["__init__"], key
    for key in loaded.handlers["embed"].job_params:
        assert f"{key}:" in signatures["__call__"], key


def test_the_handler_in_the_readme_runs_and_its_configuration_is_accepted(tmp_path):
    code, toml = re.search(r"```python\n(.*?)```\n\n```toml\n(.*?)```", README, re.DOTALL).groups()
    space = {}
    exec(code, space)
    handler = space["Lengths"](device="cpu")
    with pytest.raises(ValueError, match="no text"):
        handler.check({})
    assert handler([{"text": " four"}], strip=True) == [{"characters": 4}]
    (tmp_path / "handlers.d").mkdir()
    (tmp_path / "gpujobd.toml").write_text("")
    (tmp_path / "handlers.d" / "lengths.toml").write_text(toml)
    assert config.load(tmp_path / "gpujobd.toml").handlers["lengths"].entry == "lengths:Lengths"


# --- places -------------------------------------------------------------------------------------------------------


def mapped():
    """Paths in the map of the README; a line indented deeper stands below the folder above it."""
    block = re.search(r"## The map\n\n```\n(.*?)```", README, re.DOTALL)[1]
    folders = [(-1, "")]
    for line in block.splitlines():
        names, indent = re.split(r"\s{2,}", line.strip())[0], len(line) - len(line.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        for name in re.split(r",\s*", names):
            yield folders[-1][1] + name
        if names.endswith("/"):
            folders.append((indent, folders[-1][1] + names))


def test_the_map_names_only_what_is_there():
    paths = list(mapped())
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_map_names_every_module_of_the_daemon():
    named = {path.removesuffix("/") for path in mapped()}
    for folder in ("daemon/gpujobd", "daemon/gpujobd/core"):
        modules = {
            f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"
        }
        assert modules <= named


def test_files_that_the_documents_name_exist():
    for name, text in TEXTS.items():
        for path in re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+|\w+\.py)`", text):
            places = [
                ROOT,
                ROOT / "daemon",
                ROOT / "daemon/gpujobd",
                ROOT / "daemon/gpujobd/core",
                ROOT / "ctl/jobctl",
            ]
            places += [ROOT / "daemon/gpujobd_worker", ROOT / "tests"]
            if path in ("utils.py", "helpers.py", "common.py"):
                continue  # named because there are none
            assert any((place / path).exists() for place in places), (name, path)


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), (name, target)


def test_commands_of_make_that_the_documents_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, text in TEXTS.items():
        assert (
            set(
                re.findall(
                    r"\bmake ([a-z-]+)\b",
                    "\n".join(re.findall(r"`.*?`|^ {4}make.*|^make.*", text, re.MULTILINE)),
                )
            )
            <= targets
        ), name


def test_commands_of_jobctl_that_the_documents_name_exist():
    for name, text in TEXTS.items():
        code = "\n".join(re.findall(r"`[^`\n]+`|^```\n.*?^```", text, re.MULTILINE | re.DOTALL))
        verbs = set(re.findall(r"(?:^\$ |[`|&] ?)jobctl ([a-z]+)", code, re.MULTILINE))
        assert verbs <= VERBS.keys(), name


def test_documents_keep_their_size():
    assert len(DESIGN.splitlines()) <= 465
    figures = README.partition("## Figures")[2].partition("\n## ")[0]
    assert len(README.splitlines()) - len(figures.splitlines()) <= 150


def test_every_file_that_the_security_checklist_names_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 30
    for name in named:
        places = (ROOT / "tests" / name, ROOT / "daemon" / "gpujobd" / name, ROOT / "daemon" / name)
        assert any(place.is_file() for place in places), name
