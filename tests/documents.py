"""The parts of the documents that are made from the code, so that they cannot say something else.

    <!-- made: NAME -->
    ...made...
    <!-- end -->

In a manual page the marks are roff comments, and the part is a list:

    .\\" made: NAME
    .It Cm WORD ...made...
    What it means.
    .\\" end

The configuration that the Debian package installs is made as a whole: what a key means is taken from DESIGN.md.

    python tests/documents.py              say which parts are not as the code has them
    python tests/documents.py --rewrite    make them anew

Rule 1: of a table every cell but the last is made, of a list the line of each entry; what it means is people's, and is
kept on a rewrite.
Rule 2: a new row or entry comes without a meaning, and a test refuses those: whoever adds a key explains it.
"""

from __future__ import annotations

import enum
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

ROOT: Final = Path(__file__).resolve().parent.parent
PART: Final = re.compile(r"^<!-- made: ([a-z_ ]+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
PART_OF_A_MANUAL: Final = re.compile(r'^\.\\" made: ([a-z_ ]+)\n(.*?)^\.\\" end$', re.MULTILINE | re.DOTALL)

COLUMN_MAX: Final = 48  # a cell that is longer stands out of its column

Row = tuple[str, ...]


# --- parts ------------------------------------------------------------------------------------------------------


def parts(text: str) -> dict[str, str]:
    found = PART_OF_A_MANUAL if is_manual(text) else PART
    return {part[1]: part[2] for part in found.finditer(text)}


def rewritten(text: str) -> str:
    """The document with every part as the code has it now."""
    if is_manual(text):
        return PART_OF_A_MANUAL.sub(
            lambda part: f'.\\" made: {part[1]}\n{make_list(part[1], part[2])}.\\" end', text
        )
    return PART.sub(lambda part: f"<!-- made: {part[1]} -->\n{make(part[1], part[2])}<!-- end -->", text)


def is_manual(text: str) -> bool:
    return text.startswith(".")


def make(name: str, before: str) -> str:
    """The part of this name; `before` is where the explanations are taken from."""
    kind, _, what = name.partition(" ")
    if kind == "figure":
        return f"```\n{FIGURES[what]()}```\n"
    header, rows = TABLES[name]() if name in TABLES else FAMILIES[kind](what)
    return table(header, rows, explained(before))


def table(header: Row, rows: Iterable[Row], meanings: dict[str, str]) -> str:
    """Aligned, so that it can be read in a terminal; the last column is people's."""
    lines = [header, *((*row, meanings.get(row[0], "")) for row in rows)]
    widths = [min(COLUMN_MAX, max(len(line[column]) for line in lines)) for column in range(len(header) - 1)]

    def drawn(line: Row) -> str:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        return f"| {' | '.join(cells)} | {line[-1]} |\n".replace("|  |", "| |")

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|---|\n"
    return drawn(lines[0]) + rule + "".join(map(drawn, lines[1:]))


def explained(before: str) -> dict[str, str]:
    """First cell to last cell of a table."""
    found = {}
    for line in before.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if len(cells) > 1:
            found[cells[0]] = cells[-1]
    return found


def make_list(name: str, before: str) -> str:
    """The part of this name in a manual page; `before` is where the explanations are taken from."""
    meanings = entries(before)
    return "".join(f".It {line}\n{meanings.get(_word_of(line), '')}" for line in LISTS[name]())


def entries(before: str) -> dict[str, str]:
    """The word of every entry of a list to what it means."""
    found = re.findall(r"^\.It (.*)\n((?:(?!\.It ).*\n)*)", before, re.MULTILINE)
    return {_word_of(line): meaning for line, meaning in found}


def _word_of(line: str) -> str:
    """Of `Cm WORD ...`."""
    return line.split(" ")[1]


# --- what they are made from --------------------------------------------------------------------------------------


def lifecycle() -> str:
    """Every move of a job, and the events that make it."""
    from gpujobd.core.model import NEXT, JobState

    assert set(MOVED_BY) == {(a, b) for a, onward in NEXT.items() for b in onward}
    lines = []
    for state in JobState:
        onward = sorted(NEXT[state], key=list(JobState).index)
        for number, after in enumerate(onward):
            lead = f"{state.value:<8} --+--> " if not number else " " * 11 + "+--> "
            lines.append(f"{lead}{after.value:<10} {', '.join(MOVED_BY[state, after])}")
        if not onward:
            lines.append(f"{state.value:<10} final")
    return "\n".join(lines) + "\n"


MOVED_BY: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("queued", "running"): ("leased",),
    ("queued", "paused"): ("paused",),
    ("queued", "cancelled"): ("cancelled",),
    ("queued", "expired"): ("expired",),
    ("queued", "failed"): ("failed",),
    ("running", "queued"): ("yielded", "lease_lost", "handler_load_failed"),
    ("running", "paused"): ("yielded or lease_lost, then paused",),
    ("running", "completed"): ("completed",),
    ("running", "failed"): ("lease_lost or handler_load_failed, then failed",),
    ("running", "cancelled"): ("yielded or lease_lost, then cancelled",),
    ("running", "expired"): ("yielded or lease_lost, then expired",),
    ("paused", "queued"): ("resumed",),
    ("paused", "cancelled"): ("cancelled",),
    ("paused", "expired"): ("expired",),
}


def wire_type(kind: Any) -> str:
    """A type in the words of PROTOCOL.md."""
    names = {int: "int", str: "str", bool: "bool", float: "float", bytes: "bin", object: "any"}
    if kind in names:
        return names[kind]
    if getattr(kind, "__name__", "") == "datetime":
        return "time"
    if typing.get_origin(kind) is list:
        return f"[{wire_type(typing.get_args(kind)[0])}]"
    if typing.get_origin(kind) is dict:
        key, value = typing.get_args(kind)
        return f"{{{wire_type(key)}: {wire_type(value)}}}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [k for k in typing.get_args(kind) if k not in (types.NoneType, msgspec.UnsetType)]
        return " or ".join(map(wire_type, inner))
    assert issubclass(kind, msgspec.Struct), kind
    return kind.__name__


def fields(record: type, *, without: Sequence[str] = ("id",)) -> Iterator[tuple[str, Any, str]]:
    """Name, type and default ("" where it must be there, "-" where it may be absent) of every field."""
    for field in msgspec.structs.fields(record):
        if field.name not in without:
            yield field.name, field.type, _default(field)


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory
    if value is msgspec.NODEFAULT:
        return ""
    if value in (msgspec.UNSET, None):
        return "-"
    if value in (list, dict):
        return "[]" if value is list else "{}"
    return (
        {True: "true", False: "false", "": '""'}.get(value, str(value))
        if not isinstance(value, int) or isinstance(value, bool)
        else str(value)
    )


def message(kind: str) -> Callable[[str], tuple[Row, list[Row]]]:
    """Fields of a request, a reply or a record, by its tag or name; `asked` and `answered` are the notifier's."""

    def rows(name: str) -> tuple[Row, list[Row]]:
        record = members(kind)[name]
        return ("field", "type", "default", "what"), [(n, wire_type(t), d) for n, t, d in fields(record)]

    return rows


def members(kind: str) -> dict[str, type]:
    from gpujobd import protocol

    if kind == "record":
        records = (
            protocol.Job, protocol.Items, protocol.Forecast, protocol.Foretold, protocol.Accuracy, protocol.JobTimings,
            protocol.DeviceView, protocol.HeldView, protocol.OtherView,
            protocol.HandlerView, protocol.TenantView, protocol.Usage, protocol.Switches,
            protocol.NotificationView, protocol.EndpointView,
        )  # fmt: skip
        return {record.__name__.lower(): record for record in records}
    unions = {
        "request": protocol.AnyRequest,
        "reply": protocol.AnyReply,
        "asked": protocol.AnyNotifierRequest,
        "answered": protocol.AnyNotifierReply,
    }
    return {record.__struct_config__.tag: record for record in typing.get_args(unions[kind])}


def error_codes() -> tuple[Row, list[Row]]:
    from gpujobd.protocol import ErrorCode
    from jobctl.exits import exit_of

    return ("code", "exit", "when"), [(code.value, str(exit_of(code).value)) for code in ErrorCode]


def limits() -> tuple[Row, list[Row]]:
    from gpujobd import connection, protocol, server, submissions

    rows = []
    for module in (protocol, connection, submissions, server):
        for name in LIMITS:
            value = getattr(module, name, None)
            if value is not None and name not in {row[0] for row in rows}:
                rows.append((name, f"{value:g}" if isinstance(value, float) else f"{value:,}"))
    assert {row[0] for row in rows} == set(LIMITS)
    return ("limit", "value", "what happens at it"), rows


LIMITS: Final = (
    "FRAME_BYTES_MAX", "INLINE_BYTES_MAX", "CHUNK_BYTES_MAX", "PAGE_JOBS_MAX", "IN_FLIGHT_MAX",
    "NOTIFY_TARGETS_MAX", "NOTIFY_TARGET_CHARS_MAX", "ATTEND_WORDS_MAX", "ATTEND_WORD_CHARS_MAX", "PAGE_NOTIFICATIONS_MAX",
    "FIRST_FRAME_S", "FRAME_S", "IDLE_S", "WRITE_S", "PING_S", "OUT_BYTES_MAX", "CHUNK_S",
    "CONNECTIONS_MAX", "CONNECTIONS_RESERVED", "CONNECTIONS_PER_UID_MAX",
)  # fmt: skip


def rights() -> tuple[Row, list[Row]]:
    from gpujobd.core.rights import RIGHTS, Relation

    header = ("verb", *(relation.value for relation in Relation), "remark")
    rows = [
        (
            verb,
            *("yes" if relation in granted or Relation.ANYBODY in granted else "" for relation in Relation),
        )
        for verb, granted in RIGHTS.items()
    ]
    return header, rows


def event_tags() -> tuple[Row, list[Row]]:
    """Events as clients get them: `at` and `job` for at_ns and job_id, nothing that serves the daemon alone."""
    from gpujobd import views
    from gpujobd.core.events import AnyEvent

    rows = []
    for event in typing.get_args(AnyEvent):
        names = [f.name for f in msgspec.structs.fields(event) if f.name not in views.WITHHELD | {"at_ns"}]
        rows.append((event.__struct_config__.tag, ", ".join("job" if n == "job_id" else n for n in names)))
    return ("event", "fields besides event and at", "the fact"), rows


def reasons() -> tuple[Row, list[Row]]:
    from gpujobd.core.model import Reason

    return ("reason", "what it means, and what to do"), [(reason.value,) for reason in Reason]


def yields() -> tuple[Row, list[Row]]:
    from gpujobd.core.model import YieldWhy

    return ("yielding", "what becomes of the job"), [(why.value,) for why in YieldWhy]


def item_codes() -> tuple[Row, list[Row]]:
    from gpujobd_worker import failures

    names = (
        "REJECTED",
        "TRANSIENT",
        "HANDLER_ERROR",
        "BAD_OUTPUT",
        "BAD_JSON",
        "OUT_OF_MEMORY",
        "WORKER_LOST",
        "ITEM_TOO_LARGE",
    )
    return ("code", "the item"), [(getattr(failures, name),) for name in names]


def exit_codes() -> tuple[Row, list[Row]]:
    from jobctl.exits import Exit

    return ("exit", "when"), [(str(code.value),) for code in Exit]


def configuration() -> tuple[Row, list[Row]]:
    from gpujobd import config

    rows = [*_keys(config.File, ""), *_keys(config.TenantSection, "tenants.NAME.")]
    return ("key in gpujobd.toml", "default", "what"), rows


def configuration_file() -> str:
    """Every key of gpujobd.toml as a comment with its default, below what DESIGN.md says of it."""
    body = parts((ROOT / "DESIGN.md").read_text(encoding="utf-8"))["configuration"]
    meanings, written, section = explained(body), [CONFIGURATION_HEAD], ""
    for name, default in configuration()[1]:
        above, _, key = name.strip("`").rpartition(".")
        if above == "tenants.NAME":
            break  # a key with a name in it has no default to show
        if above != section:
            section = above
            written.append(f"\n[{section}]")
        what = meanings.get(name, "").replace("`", "")
        written += [
            *textwrap.wrap(what, 110, initial_indent="# ", subsequent_indent="# "),
            f"#{key} = {default}",
        ]
    return "\n".join(written) + CONFIGURATION_TAIL


CONFIGURATION_HEAD: Final = """\
# The configuration of gpujobd. Every key is optional, and stands here with its default; gpujobd.toml(5) tells more of each.
# `gpujobd check` says whether the file is good, `systemctl reload gpujobd` takes it over.
# Handlers have a file each in handlers.d/ beside this one; /usr/share/doc/gpujobd/examples/ has one to start from.
"""
CONFIGURATION_TAIL: Final = """

# Every user is the tenant of his own name. A section changes what a tenant may have, or makes one of several users.
#[tenants.research]
#share = 4
#queued_jobs_max = 200
#members = ["alice", "@research"]
"""


def handler_keys() -> tuple[Row, list[Row]]:
    from gpujobd import config

    rows = [*_keys(config.Handler, ""), *_keys(config.ParamSection, "job_params.NAME.")]
    return ("key in handlers.d/NAME.toml", "default", "what"), rows


def _keys(section: type, prefix: str) -> Iterator[Row]:
    """Keys with their defaults; tables below a table are followed, tables by name are not."""
    for field in msgspec.structs.fields(section):
        kind = field.type
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _keys(kind, f"{prefix}{field.name}.")
        elif typing.get_origin(kind) is not dict or typing.get_args(kind)[1] is Any:
            yield f"`{prefix}{field.name}`", _toml(field)


def _toml(field: msgspec.structs.FieldInfo) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory
    if value is msgspec.NODEFAULT:
        return "(must be set)"
    if value is None:
        return "-"
    if value is dict:
        return "{}"
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{one}"' for one in value) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"{value:_}"


def keys_of(section: str) -> Callable[[], Iterator[str]]:
    """The list of the keys of one section of gpujobd.toml; "": of those that stand before any."""

    def lines() -> Iterator[str]:
        from gpujobd import config

        if section == "tenants":
            return _key_lines(config.TenantSection, "tenants.NAME.")
        every = _key_lines(config.File, "")
        return (line for line in every if _word_of(line).rpartition(".")[0] == section)

    return lines


def notify_keys_of(section: str) -> Callable[[], Iterator[str]]:
    """The list of the keys of one section of notify.toml; `endpoint`: of those that every kind of endpoint has."""

    def lines() -> Iterator[str]:
        from gpujobd_notify import config

        kinds = {
            "webhook": config.WebhookEndpoint,
            "mails": config.MailEndpoint,
            "hook": config.HookEndpoint,
        }
        of_all = {field.name for field in msgspec.structs.fields(config.Endpoint)}
        if section == "endpoint":
            return _key_lines(config.Endpoint, "")
        if section in kinds:
            return (line for line in _key_lines(kinds[section], "") if _word_of(line) not in of_all)
        every = _key_lines(config.File, "")
        return (line for line in every if _word_of(line).rpartition(".")[0] == section)

    return lines


def handler_list() -> Iterator[str]:
    from gpujobd import config

    yield from _key_lines(config.Handler, "")
    yield from _key_lines(config.ParamSection, "job_params.NAME.")


def _key_lines(section: type, prefix: str) -> Iterator[str]:
    """`Va KEY = DEFAULT (type, bounds)`, as the file would have it."""
    for field in msgspec.structs.fields(section):
        kind, key = field.type, f"{prefix}{field.name}"
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _key_lines(kind, f"{key}.")
        elif typing.get_origin(kind) is not dict or typing.get_args(kind)[1] is Any:
            default, words = _toml(field), toml_type(kind)
            if default in ("-", "(must be set)"):
                note = "not set" if default == "-" else "must be set"
                yield f"Va {key} Pq {words}; {note}"
            else:
                quoted = default.replace('"', r"\(dq")
                yield f"Va {key} No = {quoted} Pq {words}"


def toml_type(kind: Any) -> str:
    """A type in the words of gpujobd.toml(5), with its bounds: `integer, 1 or more`."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, *metas = typing.get_args(kind)
        bounds = "".join(_bounds(meta) for meta in metas)
        return toml_type(inner) + bounds
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        words = dict.fromkeys(toml_type(k) for k in typing.get_args(kind) if k is not types.NoneType)
        return " or ".join(words)
    if typing.get_origin(kind) is tuple:
        inner_words = toml_type(typing.get_args(kind)[0])
        return "array" if " or " in inner_words else f"array of {inner_words}s"
    if typing.get_origin(kind) is dict:
        return "table"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(f"\\(dq{one.value}\\(dq" for one in kind)
    names = {int: "integer", str: "string", bool: "boolean", float: "number"}
    return names[kind] if kind in names else toml_type(kind.__value__)


def _bounds(meta: msgspec.Meta) -> str:
    """Bounds that only keep a number from overflowing are not told."""
    most = "" if meta.le is None or meta.le >= 1e9 else _number(meta.le)
    if meta.gt is not None:
        return f", more than {_number(meta.gt)}" + (f", at most {most}" if most else "")
    if meta.ge is not None:
        return f", {_number(meta.ge)} to {most}" if most else f", {_number(meta.ge)} or more"
    return ""


def _number(value: float) -> str:
    return f"{value:_}" if isinstance(value, int) else f"{value:_.6f}".rstrip("0").rstrip(".")


def exit_list() -> Iterator[str]:
    from jobctl.exits import Exit

    return (f"Sy {code.value}" for code in Exit)


def daemon_exit_list() -> Iterator[str]:
    from gpujobd import daemon

    return (f"Sy {status}" for status in (0, 1, daemon.EX_TEMPFAIL, daemon.EX_CONFIG))


def log_field_list() -> Iterator[str]:
    from gpujobd.catalog import FIELDS

    return (f"Va {there}" for there in FIELDS.values())


def refusal_list() -> Iterator[str]:
    return (f"Cm {code} Pq exit {status}" for code, status in error_codes()[1])


def words(rows: Callable[[], tuple[Row, list[Row]]]) -> Callable[[], Iterator[str]]:
    """The list of a table's first column."""
    return lambda: (f"Cm {row[0]}" for row in rows()[1])


def log_fields() -> tuple[Row, list[Row]]:
    from gpujobd.catalog import FIELDS

    return ("in JSON lines", "in the journal", "what"), [
        (f"`{name}`", f"`{there}`") for name, there in FIELDS.items()
    ]


FIGURES: Final[dict[str, Callable[[], str]]] = {"lifecycle": lifecycle}
TABLES: Final[dict[str, Callable[[], tuple[Row, list[Row]]]]] = {
    "error codes": error_codes,
    "limits": limits,
    "rights": rights,
    "events": event_tags,
    "reasons": reasons,
    "yields": yields,
    "item codes": item_codes,
    "exit codes": exit_codes,
    "configuration": configuration,
    "handler keys": handler_keys,
    "log fields": log_fields,
}
LISTS: Final[dict[str, Callable[[], Iterator[str]]]] = {
    "keys": keys_of(""),
    "keys limits": keys_of("limits"),
    "keys retention": keys_of("retention"),
    "keys scheduler": keys_of("scheduler"),
    "keys worker": keys_of("worker"),
    "keys access": keys_of("access"),
    "keys tenants": keys_of("tenants"),
    **{
        f"notify keys {section}": notify_keys_of(section)
        for section in (
            "access",
            "targets",
            "webhooks",
            "mail",
            "limits",
            "endpoint",
            "webhook",
            "mails",
            "hook",
        )
    },
    "handler keys": handler_list,
    "exit codes": exit_list,
    "daemon exit codes": daemon_exit_list,
    "log fields": log_field_list,
    "refusals": refusal_list,
    "reasons": words(reasons),
    "yields": words(yields),
    "item codes": words(item_codes),
}
FAMILIES: Final = {kind: message(kind) for kind in ("request", "reply", "asked", "answered", "record")}
FILES: Final[dict[str, Callable[[], str]]] = {"packaging/gpujobd.toml": configuration_file}
DOCUMENTS: Final = ("README.md", "DESIGN.md", "PROTOCOL.md", "CONTRIBUTING.md")
MANUALS: Final = (
    "man/gpujobd.8", "man/gpujobd.toml.5", "man/jobctl.1", "man/gpujobd-handler.7", "man/gpujobd-notify.8",
    "man/gpujobd-notify.toml.5",
)  # fmt: skip


def main() -> int:
    stale = []
    for name in (*DOCUMENTS, *MANUALS):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        now = rewritten(text)
        if now != text and "--rewrite" in sys.argv[1:]:
            path.write_text(now, encoding="utf-8")
            print(f"{name}: rewritten")
        elif now != text:
            made = make_list if is_manual(text) else make
            stale += [f"{name}: {part}" for part, body in parts(text).items() if made(part, body) != body]
    for name, make_file in FILES.items():  # last: they are made from the documents
        path, now = ROOT / name, make_file()
        if path.read_text(encoding="utf-8") != now and "--rewrite" in sys.argv[1:]:
            path.write_text(now, encoding="utf-8")
            print(f"{name}: rewritten")
        elif path.read_text(encoding="utf-8") != now:
            stale.append(name)
    print("\n".join(stale) or "the documents say what the code does")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
