"""A TOML file into records: what the daemon's configuration and the notifier's are both read with.

Rule 1: an unknown key, a wrong type or a value out of bounds is refused with file, line and key. Nothing is guessed.
Rule 2: this module knows nothing of the daemon: the notifier imports it as well.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1, le=10**15)]
PositiveSeconds = Annotated[float, Meta(ge=1e-3, le=1e9)]  # 30 years: what is longer is meant as "never"
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ConfigError(Exception):
    """Names file, line and key."""


def wrong(path: Path, key: str, what: str) -> ConfigError:
    section, _, last = key.rpartition(".")
    return ConfigError(f"{path}: line {_line_of(path.read_text(), last, section)}: {key}: {what}")


T = TypeVar("T")


def read(path: Path, shape: type[T]) -> T:
    try:
        text = path.read_text(encoding="utf-8")
        return msgspec.convert(tomllib.loads(text), shape)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_place(text, shape, str(error))}") from None


def _place(text: str, shape: type, message: str) -> str:
    """Turn msgspec's "... - at `$.limits.x`" into a line and a key.

    It names no key of a table with free names (`$.tenants[...].share`): the one that is wrong is searched for.
    """
    what, _, where = message.partition(" - at `")
    where = re.sub(r"^key` in `|\[\d+\]|`$", "", where).lstrip("$").strip(".")
    if "[...]" in where:
        where = _named_key(text, shape, where, message)
    unknown = re.search(r"unknown field `([^`]+)`", what)
    missing = re.search(r"missing required field `([^`]+)`", what)
    keys = [k for k in where.split(".") if k] + ([unknown[1]] if unknown else [])
    if missing:
        line = _line_of(text, "", ".".join(keys))
        return f"line {line}: {'.'.join([*keys, missing[1]])}: is required"
    line = _line_of(text, keys[-1], ".".join(keys[:-1]))
    return f"line {line}: {'.'.join(keys)}: {'unknown key' if unknown else what}"


def _named_key(text: str, shape: type, where: str, message: str) -> str:
    """`tenants[...].share` as `tenants.NAME.share`, for the first NAME that alone brings the same message."""
    table, _, rest = where.partition("[...]")
    known = tomllib.loads(text)
    if table not in known or not isinstance(known[table], dict):
        return where.replace("[...]", "")
    for name, section in known[table].items():
        try:
            msgspec.convert(known | {table: {name: section}}, shape)
        except msgspec.ValidationError as error:
            if str(error) == message:
                return f"{table}.{name}{rest}".replace("[...]", "")
    return where.replace("[...]", "")


def _line_of(text: str, key: str, section: str) -> int:
    """Line that sets `key` in `section`; else the line that opens the section, or a part of it; else 1."""
    current, opened = "", 0
    full = f"{section}.{key}".strip(".")
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+([^\]]+)\]", line):
            current = _bare(header[1])
            if current in (section, full) and not opened:
                opened = number
            continue
        if setting := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            name = f"{current}.{_bare(setting[1])}".strip(".")
            if name == full:
                return number
            if full.startswith(f"{name}.") and not opened:  # an inline table
                opened = number
    return opened or 1


def _bare(key: str) -> str:
    """A TOML key without quotes and spaces."""
    return re.sub(r"[\s\"']", "", key)
