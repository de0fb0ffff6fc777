"""A real notifier in a folder of its own, a far end that keeps what it is told, and a daemon with a past of its own making.

Everything started here is ended here, by process id.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fake_daemon import FakeDaemon, a_job
from gpujobd import protocol as p
from harness import HANG_S, Client, until
from msgspec.structs import replace

START = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)
LOCAL = 'allow_networks = ["127.0.0.0/8"]\n'
TARGETS = f'[targets]\nurl_hosts = ["127.0.0.1"]\n{LOCAL}'


class NotifierClient(Client):
    """The same connection, other words."""

    def receive(self) -> Any:
        while not self.replies:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the notifier hung up")
            self.replies += map(p.decode_notifier_reply, self.frames.feed(data))
        return self.replies.pop(0)

    def notifications(self, **fields: Any) -> list[p.NotificationView]:
        reply = self.ask(p.Notifications, **fields)
        assert isinstance(reply, p.NotificationList), reply
        return reply.notifications

    def ask_seq(self) -> int:
        """Of the newest event that it has written down."""
        return self.ask(p.Ping).seq

    def endpoints(self) -> dict[str, p.EndpointView]:
        return {view.name: view for view in self.ask(p.Notifications).endpoints}


class NotifyHost:
    """A folder with a notify.toml, and the notifier that goes by it."""

    def __init__(self, folder: Path, daemon: Path, config: str = TARGETS) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.daemon = daemon
        self.socket = folder / "notify.sock"
        self.program: list[object] = [sys.executable, "-m", "gpujobd_notify"]
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(config)

    def configure(self, config: str) -> None:
        (self.folder / "notify.toml").write_text(config)

    def __enter__(self) -> NotifyHost:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self.launch()
        self.wait_until_it_answers()

    def launch(self) -> None:
        with (self.folder / "notifier.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *[*self.program, "serve", "-v", "--config", self.folder / "notify.toml"],
                    *["--state-dir", self.folder / "state", "--socket", self.socket],
                    *["--daemon-socket", self.daemon],
                ],
                stderr=log,
                cwd=self.folder,
                env=os.environ | self.environment,
            )

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(OSError), self.client():
                return
            time.sleep(0.02)
        raise AssertionError(f"the notifier does not answer:\n{self.log()}")

    def wait_until_it_follows(self) -> None:
        until(lambda: "follows gpujobd" in self.log(), "the notifier to follow")

    def client(self) -> NotifierClient:
        return NotifierClient(self.socket)

    def log(self) -> str:
        path = self.folder / "notifier.log"
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(HANG_S)


class FarWeb:
    """A webhook's receiver: what it was told, in order. `answer` may be replaced: path to status."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, dict[str, Any]]] = []  # path, webhook-id, body
        self.answer = lambda path: 204
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # http.server's name
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status = web.answer(self.path)
                web.told.append((self.path, self.headers["webhook-id"], body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        class Listener(http.server.ThreadingHTTPServer):
            daemon_threads = False

            def handle_error(self, *_: object) -> None:
                pass  # a notifier that was killed does not wait for its answer

        self._server = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FarWeb:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def facts(self) -> set[tuple[int, str]]:
        """Which job, what: as often as it may have come."""
        return {(body["data"].get("job", 0), body["data"]["kind"]) for _, _, body in list(self.told)}


class Past:
    """The events and jobs of a daemon that never was, for a FakeDaemon to show."""

    def __init__(self) -> None:
        self.events: list[tuple[int, dict[str, Any]]] = []
        self.jobs: dict[int, p.Job] = {}
        self.changed: dict[int, int] = {}
        self.first_seq = 1
        self.clock = 0
        self.attended: list[p.Attend] = []
        self.over = False
        self._grown = threading.Condition()
        self.add("daemon_started", boot_id="b", version="0")

    @property
    def seq(self) -> int:
        return self.events[-1][0]

    def add(self, tag: str, **fields: Any) -> int:
        """One more fact."""
        with self._grown:
            seq = self.events[-1][0] + 1 if self.events else 1
            self.clock += 1  # time goes on, also where a daemon is restored and its numbers do not
            at = START + dt.timedelta(seconds=self.clock)
            self.events.append((seq, {"event": tag, "at": at} | fields))
            if "job" in fields:
                self._show(tag, seq, at, fields)
            self._grown.notify_all()
        return seq

    def _show(self, tag: str, seq: int, at: dt.datetime, fields: dict[str, Any]) -> None:
        number = fields["job"]
        if tag == "submitted":
            self.jobs[number] = a_job(
                id=number,
                owner=str(fields["owner"]),
                total=fields["items"],
                submitted_at=at,
                notify=fields.get("notify", []),
                notify_on=fields.get("notify_on", []),
            )
        job = self.jobs[number]
        match tag:
            case "leased":
                job = replace(job, state="running", started_at=job.started_at or at)
            case "completed" | "failed" | "cancelled" | "expired":
                counts = fields.get("checkpoint", {})
                items = p.Items(
                    total=job.items.total, done=counts.get("done", 0), failed=counts.get("failed", 0)
                )
                job = replace(job, state=tag, finished_at=at, items=items)
            case "paused":
                job = replace(job, state="paused", reason=fields["reason"])
            case "resumed" | "lease_lost":
                job = replace(job, state="queued")
        if tag == "removed":
            self.jobs.pop(number)
        else:
            self.jobs[number] = job
            self.changed[number] = seq

    def submit(self, number: int, *notify: str, on: list[str] | None = None, items: int = 10) -> None:
        fields = {"owner": os.getuid(), "tenant": "t", "handler": "h", "items": items}
        self.add("submitted", job=number, notify=list(notify), notify_on=on or [], **fields)

    def run(self, number: int, *, failed: int = 0) -> None:
        self.add("leased", job=number, attempt=1, device="cpu", level=1)
        self.add("completed", job=number, attempt=1, checkpoint={"done": 10 - failed, "failed": failed})

    def forget(self, first_seq: int) -> None:
        """What is older is not kept any more."""
        self.events = [(seq, event) for seq, event in self.events if seq >= first_seq]
        self.first_seq = first_seq

    def stop(self) -> None:
        """As a daemon that was killed."""
        self.over = True
        self.daemon.stop()

    def start(self) -> None:
        self.over = False
        self.daemon.start()

    def serve(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon
        daemon.on(p.Attend, self._attend)
        daemon.on(p.Ping, lambda call: [p.Pong(id=call.request.id, program="fake", seq=self.seq)])
        daemon.on(p.List, self._list)
        daemon.on(p.Show, self._one)
        daemon.on(p.Events, self._follow)

    def _attend(self, call):
        self.attended.append(call.request)
        return [p.Done(id=call.request.id)]

    def _list(self, call):
        asked = call.request
        found = [
            job for number, job in sorted(self.jobs.items()) if self.changed[number] > asked.changed_since
        ]
        page = [job for job in found if job.id > asked.after][:3]
        more = page and page[-1].id < max(job.id for job in found)
        return [p.Jobs(id=asked.id, jobs=page, seq=self.seq, next=page[-1].id if more else 0)]

    def _one(self, call):
        job = self.jobs.get(call.request.job)
        if job is None:
            return [p.Error(id=call.request.id, code="no_such_job", message="there is no such job")]
        return [p.OneJob(id=call.request.id, job=job)]

    def _follow(self, call):
        cursor = call.request.since - 1
        if cursor + 1 < self.first_seq:
            yield p.Gap(id=call.request.id, first_seq=self.first_seq)
            cursor = self.first_seq - 1
        while not self.over:
            with self._grown:
                found = [(seq, event) for seq, event in self.events if seq > cursor]
                if not found:
                    self._grown.wait(0.02)
            for seq, event in found:
                yield p.EventSeen(id=call.request.id, seq=seq, event=event)
                cursor = seq


@contextlib.contextmanager
def fake_past(path: Path):
    """A Past that is served on `path`."""
    past = Past()
    past.serve(FakeDaemon(path))
    past.start()
    try:
        yield past
    finally:
        past.stop()


def dead_port() -> int:
    """A port of this machine at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return gone.getsockname()[1]
