"""The torch handler of gpujobd-handler(7) on Debian's own python3-torch: `make test-host-torch`.

Apart from the other host tests: its root is fetched once and is several times as large.
"""

from __future__ import annotations

import os
import re

import pytest
from booted import Host, installed
from harness import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("GPUJOBD_HOST_TORCH" not in os.environ, reason="by name: make test-host-torch"),
]

PAGE = (ROOT / "man/gpujobd-handler.7").read_text(encoding="utf-8")
MODEL = (
    "import sys, torch; sys.path.append('/srv/gpujobd/handlers'); sys.path.append('/usr/lib/python3/dist-packages'); \
import iris; torch.manual_seed(1); torch.save(iris.network().state_dict(), '/srv/models/iris.pt')"
)


def example(path: str) -> str:
    """The file that the manual page shows under this name."""
    found = re.search(rf"^\.Bd -literal.*\n# {re.escape(path)}\n((?:(?!\.Ed).*\n)*)", PAGE, re.MULTILINE)
    assert found, path
    return found[1].replace("\\e", "\\").replace("\\&", "")


@pytest.fixture(scope="module")
def torch_host(packages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTHOST_MORE", "python3-torch")
        with installed("torch", packages) as booted:
            yield booted


def test_torch_handler_of_the_manual_runs_on_debians_torch(torch_host: Host):
    host = torch_host
    host.write("srv/gpujobd/handlers/iris.py", example("/srv/gpujobd/handlers/iris.py"))
    host.run("mkdir", "-p", "/srv/models")
    host.run("python3", "-c", MODEL)
    toml = example("/etc/gpujobd/handlers.d/iris.toml")
    host.write("etc/gpujobd/handlers.d/iris.toml", re.sub(r"^python = .*\n", "", toml, flags=re.MULTILINE))
    host.run("gpujobd", "check")
    host.systemctl("restart", "gpujobd")
    job = host.submit("iris", [{"features": [5.1, 3.5, 1.4, 0.2]}, {"features": [1, 2]}])
    host.jobctl("wait", job, check=False)
    shown = host.job(job)
    log = host.jobctl("log", job, check=False).stdout
    assert shown["items"] == {"total": 2, "done": 1, "failed": 1}, log
    assert '"label": ' in host.jobctl("output", job).stdout
    assert "features must be a list of 4 numbers" in host.jobctl("errors", job).stdout
