"""The Debian packages in the hands of apt: built, installed, upgraded, removed, purged."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import BUILDDEB, SOCKET, UNIT, Host
from harness import ROOT, until

pytestmark = pytest.mark.slow

AUTOPKGTESTS = ROOT / "packaging" / "debian" / "tests"


@pytest.fixture
def bare_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host on which nothing of gpujobd is installed."""
    host = Host(re.sub(r"[^a-z]+", "-", request.node.name.removeprefix("test_"))[:40].strip("-"))
    try:
        host.boot()
        host.add_user("alice")
        yield host
    finally:
        host.forget()


def test_packages_build_with_the_quick_tests_and_lintian_is_content(tmp_path):
    done = subprocess.run([BUILDDEB, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"gpujobd", "gpujobd-notify", "jobctl"}


def run_autopkgtest(host, name, **environment):
    """A script of debian/tests as autopkgtest runs it: as root, in a folder of its own."""
    shutil.copytree(AUTOPKGTESTS, host.root / "opt" / "autopkgtest", dirs_exist_ok=True)
    words = [f"{key}={value}" for key, value in environment.items()]
    return host.run("env", "--chdir=/opt/autopkgtest", *words, f"./{name}")


def test_every_autopkgtest_is_run_here():
    named = re.findall(r"^Tests: (.*)$", (AUTOPKGTESTS / "control").read_text(), re.MULTILINE)
    here = Path(__file__).read_text(encoding="utf-8")
    assert named
    assert [name for name in named if f'"{name}"' not in here] == []
    assert sorted(named) == sorted(path.name for path in AUTOPKGTESTS.iterdir() if path.name != "control")


def test_a_job_of_an_ordinary_user_is_read_back(fresh_host):
    run_autopkgtest(fresh_host, "submit-and-read-back")


def test_a_hook_of_the_administrators_is_run_at_the_end_of_a_job(fresh_host):
    run_autopkgtest(fresh_host, "notifier-runs-a-hook")


def test_the_client_alone_says_that_there_is_no_daemon(bare_host, packages):
    bare_host.install([path for path in packages if path.name.startswith("jobctl_")])
    run_autopkgtest(bare_host, "client-alone")
    refused = bare_host.jobctl("list", check=False)
    assert refused.returncode == 3
    assert "no daemon answers" in refused.stderr
    for module in ("trio", "torch"):  # in the base of the host, maybe, but nothing of the client's
        code = f"import sys; import jobctl.__main__; print({module!r} in sys.modules)"
        assert bare_host.run("python3", "-c", code).stdout == "False\n"


def test_a_job_goes_on_across_an_upgrade(bare_host, previous, packages):
    bare_host.install(previous)
    inside = bare_host.root / "opt" / "packages"
    inside.mkdir(parents=True)
    for package in packages:
        shutil.copy(package, inside)
    run_autopkgtest(
        bare_host,
        "upgrade-resumes",
        GPUJOBD_PACKAGES=" ".join(f"/opt/packages/{package.name}" for package in packages),
    )
    version = bare_host.run("dpkg-query", "--show", "--showformat=${Version}", "gpujobd").stdout
    assert f"gpujobd_{version}_all.deb" in {package.name for package in packages}


def test_a_call_in_the_middle_of_an_upgrade_is_answered_by_the_new_version(bare_host, previous, packages):
    """dpkg unpacks all packages first and configures them minutes later, at worst."""
    bare_host.install(previous)
    before = bare_host.main_pid()
    for package in packages:
        shutil.copy(package, bare_host.root / "tmp")
    bare_host.run("dpkg", "--unpack", *[f"/tmp/{package.name}" for package in packages])
    assert bare_host.main_pid() == 0  # stopped, and nothing has asked for it
    job = bare_host.submit("checksum", [{"text": "in between"}])  # wakes it up
    woken = bare_host.main_pid()
    assert woken not in (0, before)
    bare_host.run("dpkg", "--configure", "--pending")
    bare_host.jobctl("wait", job)
    assert bare_host.main_pid() not in (0, before, woken)
    assert bare_host.systemctl("is-active", UNIT, SOCKET).stdout.split() == ["active", "active"]


def test_what_an_administrator_changed_is_kept_by_an_upgrade(bare_host, previous, packages):
    bare_host.install(previous)
    bare_host.write("etc/gpujobd/gpujobd.toml", "[limits]\nqueued_jobs_max = 7\n")
    bare_host.systemctl("disable", "--now", UNIT, SOCKET)
    bare_host.install(packages)
    assert "queued_jobs_max = 7" in (bare_host.root / "etc/gpujobd/gpujobd.toml").read_text()
    assert bare_host.state() == "inactive"
    assert bare_host.state(SOCKET) == "inactive"
    assert bare_host.systemctl("is-enabled", UNIT, check=False).stdout == "disabled\n"


def test_remove_keeps_the_state_and_purge_deletes_it(fresh_host):
    host = fresh_host
    job = host.submit("checksum", [{"text": "kept"}])
    host.jobctl("wait", job)
    output = host.jobctl("output", job).stdout
    state = host.root / "var/lib/gpujobd"

    host.run("apt-get", "-qq", "-y", "remove", "gpujobd")
    assert (state / "journal").is_dir()
    assert not list((host.root / "run/gpujobd").iterdir())
    assert host.jobctl("list", check=False).returncode == 3
    assert host.systemctl("--failed", "--no-legend").stdout == ""

    host.run("apt-get", "-qq", "-y", "install", *in_tmp(host))
    until(lambda: host.jobctl("ping", check=False).returncode == 0, "the daemon to answer")
    assert host.jobctl("output", job).stdout == output

    host.run("apt-get", "-qq", "-y", "purge", "gpujobd", "gpujobd-notify", "jobctl")
    left = host.run("find", "/", "-xdev", "-name", "*gpujobd*", "-not", "-path", "/tmp/*").stdout
    assert left == ""
    for user in ("gpujobd", "gpujobd-notify"):
        assert host.run("getent", "passwd", user).stdout  # users stay, so that no other one gets their files


def test_purge_leaves_the_mount_point_of_a_state_on_a_disk_of_its_own(fresh_host):
    host = fresh_host
    host.systemctl("stop", SOCKET)
    host.run("mv", "/var/lib/gpujobd", "/srv/state")
    host.run("mkdir", "/var/lib/gpujobd")
    host.run("mount", "--bind", "/srv/state", "/var/lib/gpujobd")
    host.run("apt-get", "-qq", "-y", "purge", "gpujobd")
    assert not list((host.root / "var/lib/gpujobd").iterdir())


def in_tmp(host):
    """Where Host.install() put the packages."""
    return [f"/tmp/{path.name}" for path in (host.root / "tmp").glob("*.deb")]
