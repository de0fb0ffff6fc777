"""notify.toml: what is accepted, and how what is not is named."""

from __future__ import annotations

import base64
import os

import pytest
from click.testing import CliRunner
from gpujobd.settings import ConfigError
from gpujobd_notify.__main__ import main
from gpujobd_notify.config import load
from gpujobd_notify.targets import TargetError

KEY = "whsec_" + base64.b64encode(b"k" * 32).decode()

WHOLE = """
[access]
admins = ["ops"]

[targets]
url_hosts = ["*.example.org"]
mail_domains = ["example.org"]
allow_networks = ["10.1.0.0/16"]

[webhooks]
timeout_s = 5

[mail]
host = "mail.example.org"
security = "tls"
user = "gpujobd"
password_secret = "mail-password"
digest_s = 300

[endpoints.chat]
kind = "webhook"
url = "https://chat.example.org/hook"
secrets = ["chat", "chat-old"]
on = ["fail", "stall"]
every_job = true

[endpoints.oncall]
kind = "mail"
to = ["oncall@example.org"]
users = false

[endpoints.page]
kind = "hook"
program = ["/bin/true", "x"]
on = ["device"]
"""


@pytest.fixture
def credentials(tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "mail-password").write_text("s3cret\n")
    (folder / "chat").write_text(KEY + "\n")
    (folder / "chat-old").write_text(KEY)
    return {"CREDENTIALS_DIRECTORY": str(folder)}


def written(tmp_path, text):
    path = tmp_path / "notify.toml"
    path.write_text(text)
    return path


def test_everything_can_be_set_and_secrets_come_from_their_files(tmp_path, credentials):
    config = load(written(tmp_path, WHOLE), credentials)
    assert config.secrets == {"mail-password": b"s3cret", "chat": b"k" * 32, "chat-old": b"k" * 32}
    assert [(ear.name, ear.on) for ear in config.ears] == [("chat", ("fail", "stall")), ("page", ("device",))]
    attend = config.attend(1)
    assert (attend.names, attend.admin_names) == (["chat"], ["oncall", "page"])
    assert (attend.url_hosts, attend.mail_domains) == (["*.example.org"], ["example.org"])


def test_as_it_is_delivered_nothing_is_sent_anywhere(tmp_path):
    config = load(written(tmp_path, ""))
    assert config.ears == ()
    for target in ("https://example.org/", "mailto:a@example.org", "ops"):
        with pytest.raises(TargetError):
            config.check_target(target, admin=True)


def test_who_may_name_what(tmp_path, credentials):
    config = load(written(tmp_path, WHOLE), credentials)
    for target in ("chat", "https://a.example.org/x", "mailto:bob@example.org"):
        config.check_target(target, admin=False)
    config.check_target("oncall", admin=True)
    for target in ("oncall", "page", "nothing", "https://example.org/", "mailto:bob@example.net"):
        with pytest.raises(TargetError):
            config.check_target(target, admin=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[mail]\nhsot = 'x'\n", "line 2: mail.hsot: unknown key"),
        ("[mail]\nport = 70000\n", "line 2: mail.port"),
        ("[mail]\nsecurity = 'ssl'\n", "line 2: mail.security"),
        ("[mail]\nuser = 'x'\n", "mail.user: user and password_secret belong together"),
        (
            "[mail]\nsecurity = 'none'\nuser = 'x'\npassword_secret = 'p'\n",
            "mail.security: a password is not sent",
        ),
        ("[webhooks]\nca_file = '/dev/null'\n", "line 2: webhooks.ca_file: /dev/null has no certificates"),
        ("[mail]\nca_file = '/nowhere'\n", "line 2: mail.ca_file"),
        ("[mail]\nsender = 'x\\r\\nBcc: y'\n", "line 2: mail.sender"),
        (
            "[targets]\nallow_networks = ['10.0.0.1/8']\n",
            "line 2: targets.allow_networks: 10.0.0.1/8 has host bits",
        ),
        ("[endpoints.a]\nkind = 'fax'\n", "endpoints.a"),
        ("[endpoints.a]\nkind = 'webhook'\n", "endpoints.a.url: is required"),
        ("[endpoints.a]\nkind = 'webhook'\nurl = 'ftp://x'\n", "line 3: endpoints.a.url"),
        ("[endpoints.a]\nkind = 'webhook'\nurl = 'https://x/'\nwait = 1\n", "endpoints.a.wait: unknown key"),
        (
            "[endpoints.a]\nkind = 'webhook'\nurl = 'https://x/'\non = ['sometimes']\n",
            "line 4: endpoints.a.on",
        ),
        ("[endpoints.a]\nkind = 'mail'\nto = ['a@example.org']\n", "a mail endpoint needs mail.host"),
        ("[mail]\nhost='m'\n[endpoints.a]\nkind = 'mail'\nto = ['a']\n", "line 5: endpoints.a.to"),
        (
            "[endpoints.a]\nkind = 'hook'\nprogram = ['true']\n",
            "line 3: endpoints.a.program: true cannot be run",
        ),
        (
            "[endpoints.a]\nkind = 'webhook'\nurl = 'https://x/'\nsecrets = ['s']\n",
            "no credentials came with the unit",
        ),
        (
            "[endpoints.a]\nkind = 'webhook'\nurl = 'https://x/'\nsecrets = ['../s']\n",
            "neither an absolute path",
        ),
        ("[endpoints.'a b']\nkind = 'webhook'\nurl = 'https://x/'\n", "notify.toml"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, text, told):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text), {})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        ("whsec_c2hvcnQ=", 0o600, "24 to 64 bytes"),
        ("c" * 40, 0o600, "24 to 64 bytes"),
        ("whsec_!!!", 0o600, "24 to 64 bytes"),
        ("", 0o600, "is empty"),
        (KEY, 0o644, "can be read by everybody"),
    ],
)
def test_a_secret_that_is_none_is_refused(tmp_path, content, mode, told):
    secret = tmp_path / "secret"
    secret.write_text(content)
    secret.chmod(mode)
    text = f"[endpoints.a]\nkind = 'webhook'\nurl = 'https://x/'\nsecrets = ['{secret}']\n"
    with pytest.raises(ConfigError, match=told):
        load(written(tmp_path, text), {})


def test_check_says_what_there_is_and_what_is_wrong(tmp_path):
    good = written(tmp_path, "[endpoints.page]\nkind = 'hook'\nprogram = ['/bin/true']\n")
    done = CliRunner().invoke(main, ["check", "--config", str(good)])
    assert (done.exit_code, done.output.splitlines()[1]) == (0, "endpoint page: hook, for administrators")
    done = CliRunner().invoke(main, ["check", "--config", str(written(tmp_path, "x = 1"))])
    assert done.exit_code == 78
    assert "line 1: x: unknown key" in done.output


def test_the_example_is_good(tmp_path, monkeypatch):
    from harness import ROOT

    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "mail-password").write_text("x")
    (folder / "chat-secret").write_text(KEY)
    hook = tmp_path / "page"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    text = (ROOT / "examples" / "notify.toml").read_text().replace("/usr/local/bin/page-somebody", str(hook))
    config = load(written(tmp_path, text), os.environ | {"CREDENTIALS_DIRECTORY": str(folder)})
    assert {"chat", "oncall"} <= set(config.file.endpoints)
