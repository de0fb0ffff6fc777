"""What packaging/ says twice says the same as the code."""

from __future__ import annotations

import re
import tomllib

import documents
import gpujobd
import msgspec
import pytest
from documents import ROOT
from gpujobd import config
from gpujobd_notify import config as notify_config

DEBIAN = ROOT / "packaging" / "debian"
CONTROL = (DEBIAN / "control").read_text(encoding="utf-8")
OF_THE_CLIENT = ("click", "msgspec")  # test_imports.py holds it to these
NOT_OF_THE_NOTIFIER = ("outcome", "psutil")  # the same


@pytest.mark.parametrize("name", documents.FILES)
def test_made_file_is_as_the_code_has_it(name):
    made = documents.FILES[name]()
    assert (ROOT / name).read_text(encoding="utf-8") == made, "run: python tests/documents.py --rewrite"


def test_the_configuration_that_is_installed_has_every_key_with_its_default(tmp_path):
    text = (ROOT / "packaging" / "gpujobd.toml").read_text(encoding="utf-8")
    path = tmp_path / "gpujobd.toml"
    path.write_text(text, encoding="utf-8")
    assert config.load(path) == config.load(None)
    path.write_text(re.sub(r"(?m)^#(?=[a-z\[])", "", text), encoding="utf-8")
    found = config.load(path).file
    assert found.tenants.keys() == {"research"}
    assert found == config.File(tenants=found.tenants)
    keys = {name for name, _ in documents.configuration()[1] if not name.startswith("`tenants.")}
    assert len(keys) == len(re.findall(r"(?m)^#[a-z_]+ = ", text.partition("[tenants.")[0]))


def test_the_notifiers_configuration_that_is_installed_has_every_key_with_its_default(tmp_path):
    text = (ROOT / "packaging" / "notify.toml").read_text(encoding="utf-8")
    path = tmp_path / "notify.toml"
    path.write_text(text, encoding="utf-8")
    assert notify_config.load(path).file == notify_config.File()
    ours, examples = text.split("#[endpoints.", 1)
    path.write_text(re.sub(r"(?m)^#(?=[a-z_]+ = )", "", ours), encoding="utf-8")
    assert notify_config.load(path).file == notify_config.File()
    sections = {field.name: field.type for field in msgspec.structs.fields(notify_config.File)}
    for name in sections.keys() - {"endpoints"}:
        section = re.search(rf"(?ms)^\[{name}\]\n(.*?)(?=^\[|\Z)", ours)[1]
        keys = [field.name for field in msgspec.structs.fields(sections[name])]
        assert re.findall(r"(?m)^#([a-z_]+) = ", section) == keys
    (tmp_path / "notify_ops").write_text("whsec_" + "A" * 32)
    path.write_text(
        '[mail]\nhost = "x"\n' + re.sub(r"(?m)^#", "", f"#[endpoints.{examples}"), encoding="utf-8"
    )
    loaded = notify_config.load(path, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert loaded.file.endpoints.keys() == {"ops", "audit"}


def test_the_package_has_the_version_of_the_code():
    first = (DEBIAN / "changelog").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"gpujobd ({gpujobd.__version__}) ")


def relation(requirement):
    """A requirement of pyproject.toml in Debian's words."""
    name, _, least = requirement.partition(">=")
    return f"python3-{name} (>= {least})"


def depends_of(package):
    paragraph = re.search(rf"^Package: {package}$.*?(?=^Package: |\Z)", CONTROL, re.MULTILINE | re.DOTALL)[0]
    field = re.search(r"^Depends:\n((?: .*\n)+)", paragraph, re.MULTILINE)[1]
    return {line.strip().rstrip(",") for line in field.splitlines()}


def test_the_packages_depend_on_what_the_code_requires_and_the_client_on_less():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {relation(one) for one in project["dependencies"]}
    filled_in = {"${misc:Depends}", "${python3:Depends}"}
    assert depends_of("gpujobd") == required | filled_in | {"jobctl (= ${binary:Version})"}
    optional = {relation(one) for one in project["optional-dependencies"]["notify"]}
    less = {one for one in required if one.split(" ")[0][8:] not in NOT_OF_THE_NOTIFIER}
    assert depends_of("gpujobd-notify") == less | optional | filled_in | {"jobctl (= ${binary:Version})"}
    assert (
        depends_of("jobctl")
        == {one for one in required if one.split(" ")[0][8:] in OF_THE_CLIENT} | filled_in
    )


def test_the_build_has_what_the_packages_depend_on():
    """The quick tests run where the packages are built, on the versions that they will meet."""
    build = set(re.search(r"^Build-Depends:\n((?: .*\n)+)", CONTROL, re.MULTILINE)[1].split("\n"))
    for package in ("gpujobd", "gpujobd-notify", "jobctl"):
        for one in depends_of(package):
            assert f" {one} <!nocheck>," in build or not one.startswith("python3-"), one
