"""What the administrator sets: gpujobd.toml, and one file a handler in handlers.d beside it.

Rule 1: everything is optional; the defaults here are the documentation's numbers.
Rule 2: an unknown key, a wrong type or a value out of bounds is refused with file, line and key. Nothing is guessed.
Rule 3: units and bounds are in the names.

Where files are:     as a service                    as an ordinary user
  configuration      /etc/gpujobd/gpujobd.toml       $XDG_CONFIG_HOME/gpujobd/gpujobd.toml  (~/.config)
  state              /var/lib/gpujobd                $XDG_STATE_HOME/gpujobd                (~/.local/state)
  socket             /run/gpujobd/control.sock       $XDG_RUNTIME_DIR/gpujobd/control.sock
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from gpujobd.core.model import S_NS, HandlerRule, ParamRule, ParamValue, Rules, TenantRule
from gpujobd.settings import ConfigError, Name, Positive, PositiveSeconds, read, wrong

Devices = Annotated[tuple["DeviceName", ...], Meta(min_length=1)]
DeviceName = Annotated[str, Meta(pattern=r"^(cpu|cuda:[0-9]+)$")]

SYSTEM_CONFIG: Final = Path("/etc/gpujobd/gpujobd.toml")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Limits(Section, frozen=True):
    """The door."""

    queued_jobs_max: Positive = 1000  # queued + running + paused
    queued_jobs_per_uid_max: Positive = 500
    """Half of the queue: one user alone must not be able to close the door to all others. So the next two."""
    queued_items_per_uid_max: Positive = 500_000
    spool_bytes_per_uid_max: Positive = 25_000_000_000
    submissions_per_uid_minute_max: Positive = 6_000
    """A script that submits its 1,000 small jobs one by one is not slowed; 41 users at it together ask for half of
    what the door takes. Each submission is a write to the journal, which nothing else bounds."""
    items_per_job_max: Positive = 50_000
    queued_items_max: Positive = 1_000_000
    input_bytes_max: Positive = 200_000_000
    item_bytes_max: Annotated[int, Meta(ge=1, le=1 << 20)] = 1 << 20
    spool_bytes_max: Positive = 50_000_000_000
    disk_free_bytes_min: Annotated[int, Meta(ge=0)] = 500_000_000
    """Free space under which submissions are refused with disk_low: room for what runs to finish."""
    events_bytes_max: Positive = 256_000_000


class Retention(Section, frozen=True):
    final_days: Positive = 30
    outputs_bytes_max: Positive = 25_000_000_000


class Scheduler(Section, frozen=True):
    slice_s: PositiveSeconds = 30.0
    aging_s: PositiveSeconds = 21_600.0
    swap_overhead_max: Annotated[float, Meta(ge=1e-4, le=1)] = 0.05
    wait_max_s: PositiveSeconds = 1800.0
    resume_on_start: bool = True


class Worker(Section, frozen=True):
    silent_timeout_s: PositiveSeconds = 60.0  # no heartbeat
    stall_timeout_s: PositiveSeconds = 300.0  # heartbeats, no progress; a handler may set its own
    pause_grace_s: PositiveSeconds = 60.0  # SIGTERM: how long a batch may take to end
    load_timeout_s: PositiveSeconds = 600.0  # how long a handler may take to load
    threads: Annotated[int, Meta(ge=0)] = 0
    """Compute threads of a worker (OMP_NUM_THREADS); 0: as many as the host has cores."""
    checkpoint_s: PositiveSeconds = 1.0
    """Work that kill -9 may cost. A checkpoint is two fdatasyncs: 0.5 % of the time at a batch a second, measured."""
    log_bytes_max: Positive = (
        4_000_000  # of one job's log; what a handler prints beyond it is counted, not kept
    )


class Access(Section, frozen=True):
    admins: tuple[str, ...] = ("gpujobd-admin",)  # group names; root always
    observers: tuple[str, ...] = (
        "gpujobd-notify",
    )  # users, or groups as "@name": they see every job and event
    high_priority: tuple[str, ...] = ()  # users or "@groups" that may submit with --priority high


class TenantSection(Section, frozen=True):
    share: Annotated[float, Meta(ge=1e-3, le=1e6)] = 1.0
    queued_jobs_max: Positive | None = None
    queued_items_max: Positive | None = None
    spool_bytes_max: Positive | None = None
    running_devices_max: Positive | None = None
    members: tuple[str, ...] = ()  # users, or groups as "@name": who may submit as this tenant


class ParamSection(Section, frozen=True):
    type: Annotated[str, Meta(pattern="^(str|int|float|bool)$")]
    default: ParamValue | None = None
    choices: tuple[ParamValue, ...] = ()
    min: float | None = None
    max: float | None = None


class Handler(Section, frozen=True):
    """handlers.d/NAME.toml."""

    entry: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    python: str = ""  # interpreter; empty: the daemon's own
    path: tuple[str, ...] = ()
    batch_max: Positive = 256
    stall_timeout_s: PositiveSeconds | None = None
    vram_gib: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    threads: Annotated[int, Meta(ge=0)] | None = None
    params: dict[str, Any] = {}
    job_params: dict[Name, ParamSection] = {}


class File(Section, frozen=True):
    """gpujobd.toml as it is written."""

    devices: Annotated[str, Meta(pattern="^auto$")] | Devices = "auto"
    limits: Limits = Limits()
    retention: Retention = Retention()
    scheduler: Scheduler = Scheduler()
    worker: Worker = Worker()
    access: Access = Access()
    tenants: dict[Name, TenantSection] = {}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, read and checked."""

    file: File = File()
    handlers: dict[str, Handler] = {}

    def rules(self) -> Rules:
        """What the core needs to know of all this."""
        limits, scheduler = self.file.limits, self.file.scheduler
        return Rules(
            queued_jobs_max=limits.queued_jobs_max,
            items_per_job_max=limits.items_per_job_max,
            queued_items_max=limits.queued_items_max,
            input_bytes_max=limits.input_bytes_max,
            item_bytes_max=limits.item_bytes_max,
            spool_bytes_max=limits.spool_bytes_max,
            jobs_per_uid_max=limits.queued_jobs_per_uid_max,
            items_per_uid_max=limits.queued_items_per_uid_max,
            bytes_per_uid_max=limits.spool_bytes_per_uid_max,
            submissions_per_minute_max=limits.submissions_per_uid_minute_max,
            final_days=self.file.retention.final_days,
            outputs_bytes_max=self.file.retention.outputs_bytes_max,
            slice_ns=round(scheduler.slice_s * S_NS),
            aging_ns=round(scheduler.aging_s * S_NS),
            swap_overhead_max=scheduler.swap_overhead_max,
            wait_max_ns=round(scheduler.wait_max_s * S_NS),
            resume_on_start=scheduler.resume_on_start,
            tenants={
                name: TenantRule(
                    share=section.share,
                    queued_jobs_max=section.queued_jobs_max,
                    queued_items_max=section.queued_items_max,
                    spool_bytes_max=section.spool_bytes_max,
                    running_devices_max=section.running_devices_max,
                )
                for name, section in self.file.tenants.items()
            },
            handlers={name: _handler_rule(handler) for name, handler in self.handlers.items()},
        )


def _handler_rule(handler: Handler) -> HandlerRule:
    return HandlerRule(
        job_params={
            name: ParamRule(type=p.type, default=p.default, choices=p.choices, min=p.min, max=p.max)
            for name, p in handler.job_params.items()
        },
        vram_bytes=round(handler.vram_gib * (1 << 30)),
    )


# A first job can be run before anything is configured: this handler needs nothing but Python.
FIRST_HANDLER: Final = {
    "checksum": Handler(entry="gpujobd_worker.handlers.checksum:Checksum", batch_max=4096)
}


def load(path: Path | None) -> Config:
    """Read `path` and handlers.d beside it; None: the usual place, where absence is no error.

    Raises:
        ConfigError: a named file is missing, or something in one is wrong.
    """
    try:
        return _load(path or default_config_path(), named=path is not None)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None


def _load(path: Path, *, named: bool) -> Config:
    file = read(path, File) if named or path.exists() else File()
    folder = path.parent / "handlers.d"
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    handlers = {entry.stem: _handler(entry) for entry in entries if entry.suffix == ".toml"}
    return Config(file=file, handlers=handlers or FIRST_HANDLER)


def _handler(path: Path) -> Handler:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", path.stem):
        raise ConfigError(f"{path}: a handler's name has 1 to 64 letters, digits, _ and -")
    handler = read(path, Handler)
    if handler.python and not (os.path.isfile(handler.python) and os.access(handler.python, os.X_OK)):
        raise wrong(path, "python", f"{handler.python} cannot be run")
    for name, param in handler.job_params.items():
        _check_param(path, f"job_params.{name}", param)
    return handler


def _check_param(path: Path, section: str, param: ParamSection) -> None:
    """What a job is offered must be what it would be allowed. Raises: ConfigError."""
    for key, values in (("default", (param.default,)), ("choices", param.choices)):
        for value in values:
            if value is not None and not _is_a(param.type, value):
                raise wrong(path, f"{section}.{key}", f"{value!r} is no {param.type}")
    if param.choices and param.default is not None and param.default not in param.choices:
        raise wrong(path, f"{section}.default", f"{param.default!r} is none of the choices")
    for key, bound in (("min", param.min), ("max", param.max)):
        if bound is not None and param.type not in ("int", "float"):
            raise wrong(path, f"{section}.{key}", f"a {param.type} has no bounds")
    least = -math.inf if param.min is None else param.min
    most = math.inf if param.max is None else param.max
    if not least <= most:
        raise wrong(path, f"{section}.max", f"{most:g} is below min")
    if isinstance(param.default, int | float) and not least <= param.default <= most:
        raise wrong(path, f"{section}.default", f"{param.default!r} is out of bounds")


def _is_a(kind: str, value: ParamValue) -> bool:
    return type(value).__name__ == kind or (kind == "float" and type(value) is int)


AT_START: Final = frozenset({"devices"})
"""Keys that are read once."""


def changes(old: Config, new: Config) -> list[str]:
    """What is different, for people; parameters of handlers by name alone: they may be secret."""
    before, after = _flat(old.file), _flat(new.file)
    found = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            when = " (with the next start)" if key in AT_START else ""
            found.append(f"{key}: {_shown(before, key)} -> {_shown(after, key)}{when}")
    for name in sorted(old.handlers.keys() | new.handlers.keys()):
        was, is_now = old.handlers.get(name), new.handlers.get(name)
        if was is None or is_now is None:
            found.append(f"handler {name} {'added' if was is None else 'removed'}")
        elif was != is_now:
            keys = [k for k in Handler.__struct_fields__ if getattr(was, k) != getattr(is_now, k)]
            found.append(f"handler {name} changed: {', '.join(keys)}")
    return found


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """`limits.queued_jobs_max` and the like, with their values."""
    found: dict[str, Any] = {}
    for key, value in msgspec.to_builtins(section).items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if values.get(key) is not None else "none"


def is_service() -> bool:
    """Root, or the system user of the package, serves the host; anybody else serves himself."""
    return os.geteuid() == 0 or "STATE_DIRECTORY" in os.environ


def default_config_path() -> Path:
    if is_service():
        return SYSTEM_CONFIG
    return _xdg("XDG_CONFIG_HOME", ".config") / "gpujobd" / "gpujobd.toml"


def default_state_dir() -> Path:
    if is_service():
        return Path("/var/lib/gpujobd")
    return _xdg("XDG_STATE_HOME", ".local/state") / "gpujobd"


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / fallback


def interpreter(handler: Handler) -> str:
    return handler.python or sys.executable


def threads(config: Config, handler: Handler) -> int:
    chosen = handler.threads if handler.threads is not None else config.file.worker.threads
    return chosen or os.cpu_count() or 1
