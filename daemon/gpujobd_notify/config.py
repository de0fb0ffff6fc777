"""What the administrator sets: notify.toml.

Rule 1: everything is optional; the defaults here are the documentation's numbers. As it is delivered, nothing is sent
anywhere: where to is the administrator's to say.
Rule 2: an unknown key, a wrong type or a value out of bounds is refused with file, line and key. Nothing is guessed.
Rule 3: no secret stands in the file. A key that ends in `_secret` or `secrets` names a file: a credential of the unit
(LoadCredential=), or an absolute path. It is read with the configuration, so that `check` finds what is missing.
Rule 4: user-given targets are signed with nothing: a secret that all users shared would let each sign for the others.

Where files are:     as a service                        as an ordinary user
  configuration      /etc/gpujobd/notify.toml            $XDG_CONFIG_HOME/gpujobd/notify.toml   (~/.config)
  state              /var/lib/gpujobd-notify             $XDG_STATE_HOME/gpujobd-notify         (~/.local/state)
  socket             /run/gpujobd-notify/control.sock    $XDG_RUNTIME_DIR/gpujobd-notify/control.sock
"""

from __future__ import annotations

import base64
import binascii
import enum
import ipaddress
import os
import re
import ssl
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from gpujobd import protocol as p
from gpujobd.settings import Name, Positive, PositiveSeconds, read, wrong
from msgspec import Meta

from gpujobd_notify.due import DEVICE, Ear
from gpujobd_notify.targets import MAILTO, Target, TargetError, allowed, mail_address, parse

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SYSTEM_CONFIG: Final = Path("/etc/gpujobd/notify.toml")
SECRET_BYTES: Final = range(24, 65)  # standard-webhooks.md, "Signature scheme"
SECRET_FILE_BYTES_MAX: Final = 4096
ENDPOINTS_MAX: Final = 64  # in the notifier's memory, each with its queue; far fewer than an Attend may name


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


Hosts = tuple[Annotated[str, Meta(min_length=1, max_length=p.ATTEND_WORD_CHARS_MAX)], ...]


class Access(Section, frozen=True):
    admins: tuple[str, ...] = ("gpujobd-admin",)  # group names; root and the notifier's own user always


class Targets(Section, frozen=True):
    """What a user may give besides the name of an endpoint."""

    url_hosts: Hosts = ()
    mail_domains: Hosts = ()
    allow_networks: tuple[str, ...] = ()  # that are not public, and may be reached all the same


class Webhooks(Section, frozen=True):
    timeout_s: PositiveSeconds = 15.0  # of one try, from looking up the name to the answer's head
    in_flight_max: Positive = 4  # of one endpoint, and of one host that users named
    ca_file: str = ""  # besides the system's


class Security(enum.StrEnum):
    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


class Mail(Section, frozen=True):
    """The mail server that all mail goes through."""

    host: str = ""  # empty: no mail
    port: Annotated[int, Meta(ge=0, le=65535)] = 0  # 0: 587, or 465 with tls, or 25 with none
    security: Security = Security.STARTTLS
    user: str = ""
    password_secret: str = ""
    ca_file: str = ""
    sender: str = ""  # empty: gpujobd@ this host
    timeout_s: PositiveSeconds = 60.0  # of one try
    in_flight_max: Positive = 2
    digest_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0

    @property
    def real_port(self) -> int:
        return self.port or {Security.STARTTLS: 587, Security.TLS: 465, Security.NONE: 25}[self.security]


class Limits(Section, frozen=True):
    keep_days: Positive = 30  # what was delivered, or failed, or was muted
    pending_per_uid_max: Positive = 10_000


class Endpoint(Section, frozen=True, tag_field="kind"):
    users: bool = True  # whether users may name it; else administrators alone
    every_job: bool = False
    on: tuple[str, ...] = ()


class WebhookEndpoint(Endpoint, frozen=True, kw_only=True, tag="webhook"):
    url: str
    secrets: tuple[str, ...] = ()
    allow_networks: tuple[str, ...] = ()
    timeout_s: PositiveSeconds | None = None
    in_flight_max: Positive | None = None


class MailEndpoint(Endpoint, frozen=True, kw_only=True, tag="mail"):
    to: Annotated[tuple[str, ...], Meta(min_length=1, max_length=20)]
    digest_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    in_flight_max: Positive | None = None


class HookEndpoint(Endpoint, frozen=True, kw_only=True, tag="hook"):
    program: Annotated[tuple[str, ...], Meta(min_length=1)]
    users: bool = False
    timeout_s: PositiveSeconds = 60.0
    in_flight_max: Positive = 1
    environment: dict[str, str] = {}  # msgspec copies defaults


AnyEndpoint = WebhookEndpoint | MailEndpoint | HookEndpoint


class File(Section, frozen=True):
    """notify.toml as it is written."""

    access: Access = Access()
    targets: Targets = Targets()
    webhooks: Webhooks = Webhooks()
    mail: Mail = Mail()
    limits: Limits = Limits()
    endpoints: dict[Name, AnyEndpoint] = {}  # msgspec copies defaults


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, read and checked. `secrets`: what stands in the files that were named."""

    file: File = File()
    secrets: dict[str, bytes] = {}

    @property
    def ears(self) -> tuple[Ear, ...]:
        """Endpoints that hear of every job, or of devices."""
        heard = []
        for name, endpoint in sorted(self.file.endpoints.items()):
            on = endpoint.on or ((p.NotifyOn.FINISH,) if endpoint.every_job else ())
            if not endpoint.every_job:
                on = tuple(word for word in on if word == DEVICE)
            if on:
                heard.append(Ear(name=name, on=tuple(map(str, on))))
        return tuple(heard)

    def attend(self, request_id: int) -> p.Attend:
        """What the daemon is told that can be reached."""
        endpoints = self.file.endpoints
        return p.Attend(
            id=request_id,
            names=sorted(name for name, endpoint in endpoints.items() if endpoint.users),
            admin_names=sorted(name for name, endpoint in endpoints.items() if not endpoint.users),
            url_hosts=list(self.file.targets.url_hosts),
            mail_domains=list(self.file.targets.mail_domains) if self.file.mail.host else [],
        )

    def check_target(self, text: str, *, admin: bool) -> Target:
        """Raises: TargetError for what is no target, or none that this caller may use."""
        target = parse(text)
        if target.name:
            endpoint = self.file.endpoints.get(target.name)
            if endpoint is None or not (endpoint.users or admin):
                named = ", ".join(sorted(n for n, e in self.file.endpoints.items() if e.users or admin))
                raise TargetError(f"there is no endpoint {target.name!r}; there are: {named or 'none'}")
        elif target.endpoint == MAILTO:
            if not self.file.mail.host or not allowed(target.host, self.file.targets.mail_domains):
                raise TargetError(f"mail to {target.host!r} is not allowed here")
        elif not allowed(target.host, self.file.targets.url_hosts):
            raise TargetError(f"the host {target.host!r} is not allowed here")
        return target


def networks(words: Iterable[str]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(word) for word in words)


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read `path`; None: the usual place, where absence is no error.

    Raises:
        ConfigError: a named file is missing, or something in one is wrong.
    """
    where = path or default_config_path()
    file = read(where, File) if path is not None or where.exists() else File()
    if len(file.endpoints) > ENDPOINTS_MAX:
        raise wrong(where, "endpoints", f"{len(file.endpoints)} endpoints, at most {ENDPOINTS_MAX}")
    secrets: dict[str, bytes] = {}
    _check_networks(where, "targets.allow_networks", file.targets.allow_networks)
    _check_authorities(where, "webhooks.ca_file", file.webhooks.ca_file)
    _check_mail(where, file.mail, secrets, environ)
    for name, endpoint in file.endpoints.items():
        _check_endpoint(where, f"endpoints.{name}", endpoint, file, secrets, environ)
    return Config(file=file, secrets=secrets)


def _check_networks(path: Path, key: str, words: Iterable[str]) -> None:
    for word in words:
        try:
            ipaddress.ip_network(word)
        except ValueError as error:
            raise wrong(path, key, f"{error}") from None


def _check_mail(path: Path, mail: Mail, secrets: dict[str, bytes], environ: Mapping[str, str]) -> None:
    if mail.sender and not _is_address(mail.sender):
        raise wrong(path, "mail.sender", f"{mail.sender!r} is no address such as gpujobd@example.org")
    if bool(mail.user) != bool(mail.password_secret):
        raise wrong(path, "mail.user", "user and password_secret belong together")
    if mail.user and mail.security is Security.NONE:
        raise wrong(path, "mail.security", "a password is not sent without TLS")
    _check_authorities(path, "mail.ca_file", mail.ca_file)
    if mail.password_secret:
        secrets[mail.password_secret] = secret(path, "mail.password_secret", mail.password_secret, environ)


def _check_endpoint(
    path: Path,
    section: str,
    endpoint: AnyEndpoint,
    file: File,
    secrets: dict[str, bytes],
    environ: Mapping[str, str],
) -> None:
    """Raises: ConfigError for what could only fail when it is used."""
    for word in endpoint.on:
        if not p.is_occasion(word) and word != DEVICE:
            raise wrong(path, f"{section}.on", f"{word!r} is no occasion")
    match endpoint:
        case WebhookEndpoint():
            _check_webhook(path, section, endpoint, secrets, environ)
        case MailEndpoint():
            if not file.mail.host:
                raise wrong(path, section, "a mail endpoint needs mail.host")
            for address in endpoint.to:
                if not _is_address(address):
                    raise wrong(path, f"{section}.to", f"{address!r} is no address such as ops@example.org")
        case HookEndpoint():
            program = endpoint.program[0]
            if not (os.path.isabs(program) and os.path.isfile(program) and os.access(program, os.X_OK)):
                raise wrong(path, f"{section}.program", f"{program} cannot be run")


def _check_webhook(
    path: Path,
    section: str,
    endpoint: WebhookEndpoint,
    secrets: dict[str, bytes],
    environ: Mapping[str, str],
) -> None:
    try:
        urlsplit(endpoint.url)
        target = parse(endpoint.url)
    except (TargetError, ValueError) as error:
        raise wrong(path, f"{section}.url", str(error)) from None
    if target.endpoint == MAILTO or target.name:
        raise wrong(path, f"{section}.url", f"{endpoint.url!r} is no https:// or http:// address")
    _check_networks(path, f"{section}.allow_networks", endpoint.allow_networks)
    for name in endpoint.secrets:
        raw = secret(path, f"{section}.secrets", name, environ)
        try:
            key = base64.b64decode(raw.removeprefix(b"whsec_"), validate=True)
        except binascii.Error:
            key = b""
        if not raw.startswith(b"whsec_") or len(key) not in SECRET_BYTES:
            raise wrong(path, f"{section}.secrets", f"{name} is not whsec_ and 24 to 64 bytes in base64")
        secrets[name] = key


def _is_address(text: str) -> bool:
    try:
        mail_address(text)
    except TargetError:
        return False
    return True


def _check_authorities(path: Path, key: str, name: str) -> None:
    if not name:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(name)
    except OSError as error:
        raise wrong(path, key, f"{name} has no certificates: {error.strerror or error}") from None


def secret(path: Path, key: str, name: str, environ: Mapping[str, str]) -> bytes:
    """What stands in the file of this name, without white space around it. Raises: ConfigError."""
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    if not os.path.isabs(name):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
            raise wrong(path, key, f"{name!r} is neither an absolute path nor the name of a credential")
        if not folder:
            raise wrong(path, key, f"{name}: no credentials came with the unit (LoadCredential=)")
        name = os.path.join(folder, name)
    try:
        with open(name, "rb") as file:
            if not name.startswith(f"{folder or '//'}/") and os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                raise wrong(path, key, f"{name} can be read by everybody: chmod o-r")
            found = file.read(SECRET_FILE_BYTES_MAX).strip()
    except OSError as error:
        raise wrong(path, key, f"{name}: {error.strerror}") from None
    if not found:
        raise wrong(path, key, f"{name} is empty")
    return found


def is_service() -> bool:
    return os.geteuid() == 0 or "STATE_DIRECTORY" in os.environ


def default_config_path() -> Path:
    if is_service():
        return SYSTEM_CONFIG
    return _xdg("XDG_CONFIG_HOME", ".config") / "gpujobd" / "notify.toml"


def default_state_dir() -> Path:
    if is_service():
        return Path("/var/lib/gpujobd-notify")
    return _xdg("XDG_STATE_HOME", ".local/state") / "gpujobd-notify"


def default_socket() -> Path:
    return Path(p.SYSTEM_NOTIFY_SOCKET if is_service() else p.own_socket("gpujobd-notify"))


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / fallback
