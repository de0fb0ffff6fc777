"""Start, stop, and what the operator is told: the real program."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import msgspec
import pytest
from gpujobd import protocol
from harness import HANG_S, Client, Host, fake, hosted, until
from jobctl import describe

SLOW = "trouble:Slow"
COUNT = "toys:Count"


def texts(count):
    return [{"text": f"text {n}"} for n in range(count)]


def serve(folder, *options, check=False, env=None, before=()):
    """Run the daemon to its end; for those that do not get far."""
    return subprocess.run(
        [*before, sys.executable, "-m", "gpujobd", "serve", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=check,
        cwd=folder,
        env=env,
    )


def options(folder):
    return [
        "--config",
        folder / "gpujobd.toml",
        "--state-dir",
        folder / "state",
        "--socket",
        folder / "control.sock",
    ]


# --- starts that are refused ------------------------------------------------------------------------------------------


def test_an_unreadable_journal_is_refused_with_78_and_what_to_do(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        with host.client() as client:
            client.wait(client.submit("count", texts(3)).job)
        host.stop(signal.SIGKILL)
        (segment,) = (host.folder / "state" / "journal").glob("seg-*")
        rotten = bytearray(segment.read_bytes())
        rotten[4096 + 100] ^= 1  # the first frame; frames follow, so it is no torn tail
        segment.write_bytes(rotten)
        done = serve(tmp_path, *options(host.folder))
        assert done.returncode == 78
        assert segment.name in done.stderr
        assert "gpujobd fsck --state-dir" in done.stderr
        assert "Traceback" not in done.stderr
        assert segment.read_bytes() == rotten  # nothing was made worse
        fsck = [sys.executable, "-m", "gpujobd", "fsck", "--state-dir", host.folder / "state"]
        assert subprocess.run(fsck, capture_output=True, check=False).returncode == 1


def test_fsck_of_a_good_journal_is_0_and_of_none_is_78(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        assert host.stop() == 0
    fsck = [sys.executable, "-m", "gpujobd", "fsck", "--state-dir"]
    assert subprocess.run([*fsck, host.folder / "state"], capture_output=True, check=False).returncode == 0
    assert subprocess.run([*fsck, tmp_path / "nothing"], capture_output=True, check=False).returncode == 78


def test_two_daemons_do_not_share_a_state(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        elsewhere = [*options(host.folder)[:-1], tmp_path / "other.sock"]
        done = serve(tmp_path, *elsewhere)
        assert done.returncode == 1
        assert "another process has this journal open" in done.stderr
        with host.client() as client:
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)


def test_two_daemons_do_not_share_a_socket(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        done = serve(
            tmp_path,
            "--config",
            host.folder / "gpujobd.toml",
            "--state-dir",
            tmp_path / "b",
            "--socket",
            host.socket,
        )
        assert done.returncode == 1
        assert f"another daemon answers at {host.socket}" in done.stderr
        with host.client() as client:
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)


def test_a_file_at_the_sockets_path_is_left_alone(tmp_path):
    host = Host(tmp_path / "host")
    host.socket.write_text("precious")
    done = serve(tmp_path, *options(host.folder))
    assert done.returncode == 78
    assert f"{host.socket} is there and is no socket" in done.stderr
    assert host.socket.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_said_to_be_one(tmp_path):
    host = Host(tmp_path / "host")
    done = serve(tmp_path, *options(host.folder)[:-1], tmp_path / ("x" * 120))
    assert done.returncode == 78
    assert "too long" in done.stderr


def test_what_a_dead_daemon_left_at_the_path_is_replaced(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        host.stop(signal.SIGKILL)
        assert host.socket.is_socket()
        host.start()
        assert host.stop() == 0
        assert not host.socket.exists()


def test_python_without_assertions_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-O", "-m", "gpujobd", "serve"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert "python -O" in done.stderr


def test_a_bad_configuration_is_78_before_anything_is_made(tmp_path):
    host = Host(tmp_path / "host", "[limits]\nqueued = 1\n")
    done = serve(tmp_path, *options(host.folder))
    assert done.returncode == 78
    assert "line 3: limits.queued: unknown key" in done.stderr
    assert not (host.folder / "state").exists()


def test_the_folder_of_the_socket_is_open_to_everybody_whatever_the_umask(tmp_path):
    host = Host(tmp_path / "host", "", {"count": fake(COUNT)})
    host.socket = tmp_path / "run" / "gpujobd" / "control.sock"
    with host:
        assert host.socket.parent.stat().st_mode & 0o777 == 0o755
        assert (host.folder / "state").stat().st_mode & 0o777 == 0o700


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_second_sigterm_does_not_wait_for_the_batch(tmp_path):
    slow = fake(SLOW, batch_max=64, params={"item_s": 1.0})
    with hosted(tmp_path / "host", slow=slow) as host:
        with host.client() as client:
            job = client.submit("slow", texts(100)).job
            until(lambda: client.job(job).state == "running", "the lease")
            time.sleep(0.3)
        host.process.send_signal(signal.SIGTERM)
        until(lambda: "asking what runs to pause" in host.log(), "the first signal")
        began = time.monotonic()
        assert host.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 30  # the batch alone takes 64 s
        assert "not waiting any longer" in host.log()
        host.start()
        with host.client() as client:
            assert client.job(job).state in ("queued", "running")
            client.ask(protocol.Cancel, job=job)


def test_sigterm_all_the_way_to_the_end_does_not_cut_off_the_last_snapshot(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        while host.process.poll() is None:
            host.process.send_signal(signal.SIGTERM)
            time.sleep(0.0005)
        assert host.process.returncode == 0
        assert list((host.folder / "state" / "journal").glob("snap-*"))


def test_sighup_takes_a_good_configuration_and_keeps_the_old_one_over_a_bad_one(tmp_path):
    with hosted(tmp_path / "host", count=fake(COUNT)) as host, host.client() as client:
        host.configure("[limits]\nitems_per_job_max = 2\n", {"other": fake(COUNT)})
        host.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration reloaded: 2 handlers" in host.log(), "the reload")
        assert client.submit("count", texts(3)).code == "too_many_items"
        assert [h.name for h in client.ask(protocol.Handlers).handlers] == ["count", "other"]
        host.configure("[limits]\nitems_per_job_max = 0\n", {})
        host.process.send_signal(signal.SIGHUP)
        until(lambda: "the configuration stays as it was" in host.log(), "the refusal")
        assert "line 3: limits.items_per_job_max" in host.log()
        assert client.submit("count", texts(3)).limit == 2


def test_shares_and_limits_of_a_reload_are_pushed_to_those_who_follow_and_in_force(tmp_path):
    before = '[tenants.production]\nshare = 4\nmembers = ["@nobody"]\n'
    with hosted(tmp_path / "host", before, count=fake(COUNT)) as host, host.client() as client:
        client.ask(protocol.Queue, action="stop")
        seen = client.ask(protocol.Tenants, follow=True).tenants
        assert [(view.name, view.share, view.jobs_max) for view in seen] == [
            ("production", 4.0, msgspec.UNSET)
        ]
        host.configure("[tenants.production]\nshare = 2\nqueued_jobs_max = 1\n", {})
        host.process.send_signal(signal.SIGHUP)
        view = next(pushed_tenants(client))
        assert (view.share, view.jobs_max) == (2.0, 1)
        with host.client() as other:
            assert other.submit("count", texts(1), tenant="production").job
            refused = other.submit("count", texts(1), tenant="production")
            assert (refused.code, refused.limit) == ("quota", 1)
        assert next(view for view in pushed_tenants(client) if view.queued).queued == 1


def pushed_tenants(client):
    while True:
        reply = client.receive()
        if isinstance(reply, protocol.TenantList):
            yield reply.tenants[0]


def test_the_first_forecast_of_a_job_is_kept_with_it_and_what_came_of_it_over_a_restart(tmp_path):
    slow = fake(SLOW, batch_max=4, params={"item_s": 0.01})
    with hosted(tmp_path / "host", slow=slow) as host:
        with host.client() as client:
            client.wait(client.submit("slow", texts(60)).job)  # what the handler's items cost
            job = client.submit("slow", texts(100)).job
            until(lambda: client.job(job).foretold is not msgspec.UNSET, "the first forecast")
            told_then = client.job(job).foretold
            assert told_then.made_at < told_then.finish_at < told_then.finish_by_90
            (ended,) = client.wait(job)
            error = (ended.finished_at - told_then.finish_at) / (told_then.finish_at - told_then.made_at)
            assert ended.foretold.error == pytest.approx(error, abs=0.5)  # less than a second counts as one
            assert ended.foretold.kept_90 == (ended.finished_at <= told_then.finish_by_90)
            kept = client.ask(protocol.Tenants)
            assert (kept.accuracy.jobs, kept.tenants[0].accuracy) == (1, kept.accuracy)
            assert kept.accuracy.error == pytest.approx(abs(ended.foretold.error), abs=0.001)
        host.stop(signal.SIGKILL)
        host.start()
        with host.client() as client:
            assert client.ask(protocol.Tenants).accuracy == kept.accuracy
            assert client.job(job).foretold == ended.foretold
        shown = host.jobctl("show", str(job)).stdout
        assert "first forecast: done " in shown
        assert f"it took {describe.longer(ended.foretold.error)}" in shown


# --- systemd ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """The socket that sd_notify(3) talks to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.settimeout(HANG_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def told(sock):
    """Everything that was sent so far."""
    sock.setblocking(False)
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(sock.recv(1 << 16).decode())
    sock.settimeout(HANG_S)
    return messages


def test_systemd_is_told_ready_status_watchdog_and_stopping(tmp_path, systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    slow = fake(SLOW, batch_max=4, params={"item_s": 0.1})
    with hosted(tmp_path / "host", slow=slow) as host:
        starting = []
        while not (said := systemd.recv(1 << 16).decode()).startswith("READY=1\n"):
            starting.append(said)
        assert starting[0] == "STATUS=starting: reading the journal"
        assert all(said.startswith("STATUS=starting: ") for said in starting)  # not even a watchdog
        with host.client() as client:
            job = client.submit("slow", texts(500)).job
            until(lambda: client.job(job).items.done > 0, "a checkpoint")
        time.sleep(1.2)
        running = told(systemd)
        assert any("WATCHDOG=1" in message for message in running)
        assert any(re.search(r"STATUS=\S+ on cpu: \d+/500", message) for message in running)
        host.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration reloaded" in host.log(), "the reload")
        until(lambda: any("READY=1" in message for message in told(systemd)), "READY after the reload")
        assert host.stop() == 0
        ending = told(systemd)
        assert "STOPPING=1" in ending
        assert any(message.startswith("EXTEND_TIMEOUT_USEC=") for message in ending)


@pytest.mark.slow
def test_a_systemd_that_does_not_read_costs_nothing(tmp_path, systemd):
    systemd.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    with hosted(tmp_path / "host", count=fake(COUNT)) as host:
        time.sleep(2.5)
        with host.client() as client:
            assert isinstance(client.ask(protocol.Ping), protocol.Pong)
        assert host.stop() == 0


def test_a_socket_that_systemd_made_is_served_and_left(tmp_path):
    host = Host(tmp_path / "host", "", {"count": fake(COUNT)})
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(host.socket))
        listener.listen()
        early = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        early.connect(str(host.socket))  # a client waits from before the start
        early.sendall(protocol.frame(protocol.Hello([1])) + protocol.frame(protocol.Ping(id=1)))
        became = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
            "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'};"
            "os.execv(sys.executable, [sys.executable, '-m', 'gpujobd', *sys.argv[2:]])"
        )
        words = ["serve", *map(str, options(host.folder))]
        with (host.folder / "daemon.log").open("ab") as log:
            host.process = subprocess.Popen(
                [sys.executable, "-c", became, str(listener.fileno()), *words],
                pass_fds=[listener.fileno()],
                stderr=log,
            )
        with host_ended(host):
            early.settimeout(20)
            replies, frames = [], protocol.Frames()
            while len(replies) < 2:
                replies += map(protocol.decode_reply, frames.feed(early.recv(1 << 16)))
            assert isinstance(replies[1], protocol.Pong)
            early.close()
            assert host.stop() == 0
            assert host.socket.is_socket()  # it is systemd's


@contextlib.contextmanager
def host_ended(host):
    try:
        yield
    finally:
        host.__exit__()


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full disk takes root, for a file system of its own")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("NOT TESTED: no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_refuses_at_the_door_and_holds_work_without_failing_an_item(tmp_path, small_disk):
    config = "[limits]\ndisk_free_bytes_min = 40000000\n[worker]\ncheckpoint_s = 0.2\n"
    slow = fake(SLOW, batch_max=4, params={"item_s": 0.02})
    host = Host(tmp_path / "host", config, {"slow": slow})
    (host.folder / "state").symlink_to(small_disk)
    with host, host.client() as client:
        job = client.submit("slow", texts(800)).job
        until(lambda: client.job(job).items.done > 0, "a checkpoint")
        filler = small_disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * (1 << 16))
                file.flush()
        until(lambda: client.job(job).reason == "DiskFull", "the work to wait")
        assert client.submit("slow", texts(1)).code == "disk_low"
        assert client.ask(protocol.Status).switches.disk_full
        held = client.job(job).items
        assert held.failed == 0
        filler.unlink()
        (final,) = client.wait(job)
        assert (final.state, final.items.done, final.items.failed) == ("completed", 800, 0)
        assert [record["line"] for record in client.output(job)] == list(range(1, 801))
        assert isinstance(client.submit("slow", texts(1)), protocol.Accepted)
        assert host.stop() == 0


def test_a_disk_that_is_full_at_the_start_is_a_passing_failure(tmp_path, small_disk):
    host = Host(tmp_path / "host")
    (host.folder / "state").symlink_to(small_disk)
    with (small_disk / "filler").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 16))
            file.flush()
    done = serve(tmp_path, *options(host.folder))
    assert done.returncode == 75
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("when", [3, 5, 9, 14])
def test_a_sync_that_fails_is_not_accepted_and_the_next_start_has_what_was(tmp_path, when):
    if shutil.which("strace") is None:
        pytest.skip("NOT TESTED: strace is missing (apt install strace)")
    host = Host(tmp_path / "host", "", {"count": fake(COUNT)})
    inject = f"inject=fdatasync:error=EIO:when={when + 20}+"
    with (host.folder / "daemon.log").open("ab") as log:
        host.process = subprocess.Popen(
            [
                *[
                    "strace",
                    "-f",
                    "-qq",
                    "-o",
                    "/dev/null",
                    "--seccomp-bpf",
                    "-e",
                    "trace=fdatasync",
                    "-e",
                    inject,
                ],
                *[sys.executable, "-m", "gpujobd", "serve", *map(str, options(host.folder))],
            ],
            stderr=log,
        )
    accepted, codes = [], []
    with host_ended(host):
        client = until(lambda: _try_client(host), "the daemon")
        with client, contextlib.suppress(ConnectionError, OSError):
            client.ask(protocol.Queue, action="stop")
            for n in range(200):
                reply = client.submit("count", texts(1), submit_id=f"eio-{n}")
                if isinstance(reply, protocol.Accepted):
                    accepted.append(reply.job)
                else:
                    codes.append(reply.code)
        assert host.process.wait(HANG_S) == 75
        assert codes[:1] == ["not_accepted"]
        assert set(codes) == {"not_accepted"}
        assert "the journal is dead" in host.log()
        assert "Traceback" not in host.log()
    host.start()
    with host_ended(host), host.client() as client:
        known = [job.id for job in client.ask(protocol.List, limit=500).jobs]
        assert set(accepted) <= set(known)
        assert len(known) <= len(accepted) + 1
        again = client.submit("count", texts(1), submit_id=f"eio-{len(accepted)}")
        assert isinstance(again, protocol.Accepted)


def _try_client(host):
    assert host.process.poll() is None, host.log()
    try:
        return Client(host.socket)
    except OSError:
        return None


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_few_descriptors_mean_fewer_callers_and_not_a_dead_daemon(tmp_path):
    host = Host(tmp_path / "host", "", {"count": fake(COUNT)})
    with (host.folder / "daemon.log").open("ab") as log:
        host.process = subprocess.Popen(
            [
                "sh",
                "-c",
                'ulimit -n 64; exec "$@"',
                "sh",
                sys.executable,
                "-m",
                "gpujobd",
                "serve",
                *map(str, options(host.folder)),
            ],
            stderr=log,
        )
    with host_ended(host):
        first = until(lambda: _try_client(host), "the daemon")
        assert "connections at a time: RLIMIT_NOFILE is 64" in host.log()
        crowd = []
        for _ in range(500):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            crowd.append(sock)
            with contextlib.suppress(OSError):
                sock.connect(str(host.socket))
        with first:
            job = first.submit("count", texts(10)).job
            assert first.wait(job)[0].state == "completed"
        for sock in crowd:
            sock.close()
        assert host.process.poll() is None
        assert "Traceback" not in host.log()


# --- what goes with time ----------------------------------------------------------------------------------------------


def test_files_of_removed_jobs_go(tmp_path):
    with hosted(tmp_path / "host", "[retention]\noutputs_bytes_max = 1\n", count=fake(COUNT)) as host:
        with host.client() as client:
            job = client.submit("count", texts(3)).job
            client.wait(job)
            other = client.submit("count", texts(3)).job
            client.wait(other)
            client.ask(protocol.Remove, job=other)
            until(
                lambda: not (host.folder / "state" / "spool" / "jobs" / str(other)).exists(),
                "the files to go",
            )
        host.stop()
        host.start()  # retention is applied at the start
        until(lambda: not list((host.folder / "state" / "spool" / "jobs").iterdir()), "the files to go")
