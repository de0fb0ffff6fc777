"""Daemon, notifier and client as processes, and a far end: a job is told as its owner asked, and the client says so."""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import HANG_S, Host, fake, hosted, until

CONFIG = """
[targets]
url_hosts = ["127.0.0.1"]
allow_networks = ["127.0.0.0/8"]
[endpoints.ops]
kind = "webhook"
url = "http://127.0.0.1:{port}/ops"
allow_networks = ["127.0.0.0/8"]
"""


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.got: list[tuple[str, str, dict[str, Any]]] = []

    def told(self, job: int) -> set[tuple[str, str]]:
        """Path and type of what was told of this job."""
        return {(path, body["type"]) for path, _, body in list(self.got) if body["data"].get("job") == job}


class Answer(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.got.append((self.path, self.headers["webhook-id"], body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(HANG_S)


@contextlib.contextmanager
def notifying(host: Host, config: str) -> Iterator[Path]:
    """The notifier beside this daemon; its socket."""
    folder = host.folder / "notifier"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    (folder / "notify.toml").write_text(config)
    options = ["--config", folder / "notify.toml", "--state-dir", folder / "state"]
    options += ["--socket", folder / "control.sock", "--daemon-socket", host.socket]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "gpujobd_notify", "serve", *options], stderr=log)
    try:
        yield folder / "control.sock"
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def notifications(host: Host, socket: Path, *words: str) -> dict[str, Any]:
    done = host.jobctl("notifications", *words, "--json", "--notify-socket", str(socket))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def submit(host: Host, *words: str) -> int:
    """Repeated until the notifier has said that it is here."""

    def once() -> str:
        done = host.jobctl("submit", "moody", "-", *words, text='{"mood": "reject"}\n{"text": "a"}\n')
        assert done.returncode == 0 or "no_notifier" in done.stderr, done.stderr
        return done.stdout

    return int(until(once, "a notifier to be here"))


def test_a_job_is_told_to_whom_its_owner_named_and_jobctl_shows_what_became_of_it(
    tmp_path: Path, receiver: Receiver
) -> None:
    config = CONFIG.format(port=receiver.server_port)
    url = f"http://127.0.0.1:{receiver.server_port}/own"
    with hosted(tmp_path / "host", moody=fake("trouble:Moody")) as host, notifying(host, config) as socket:
        job = submit(host, "--notify", "ops", "--notify", url, "--notify-on", "start,fail")
        until(lambda: len(receiver.told(job)) == 4, "all to be told")
        assert receiver.told(job) == {
            (path, kind) for path in ("/ops", "/own") for kind in ("job.start", "job.fail")
        }
        (body,) = [body for path, _, body in receiver.got if path == "/own" and body["type"] == "job.fail"]
        assert body["data"]["failure_codes"] == {"rejected": 1}
        until(
            lambda: (
                [one["state"] for one in notifications(host, socket, str(job))["notifications"]]
                == ["delivered"] * 4
            ),
            "the notifier to have noted it",
        )
        shown = host.jobctl("notifications", "--notify-socket", str(socket)).stdout
        assert shown.count("delivered") == 4
        assert "closed" in shown
        kept = host.jobctl("notifications", "defaults", "--notify", "ops", "--notify-socket", str(socket))
        assert kept.returncode == 0, kept.stderr
        by_default = submit(host)
        until(lambda: receiver.told(by_default) == {("/ops", "job.finish")}, "the default to be told")
        assert not receiver.told(submit(host, "--notify", "none"))
        refused = host.jobctl("submit", "moody", "-", "--notify", "opps", text="{}\n")
        assert (refused.returncode, "there are: ops" in refused.stderr) == (6, True)
