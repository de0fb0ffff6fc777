"""Rows 11 and 21: the whole daemon with real workers, on file systems that fill up, and on one that forgets."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path

import mortal
import pytest
from campaign import Campaign, answers_or_died, ended, kill
from filesystems import FileSystem, losefs
from gpujobd import protocol
from gpujobd.daemon import EX_TEMPFAIL
from harness import Client, Host, fake, until

pytestmark = pytest.mark.slow

CRASHES = 5  # of one daemon
LOOK_S = 0.1  # how often the janitor looks at the disk here, and not every five seconds
ITEMS = 400
PING_S = 10.0  # generous: the promise is a second, on a host that has nothing else to do
DOOR_BYTES = 20 << 20  # free space under which nothing is accepted


def impatient(host: Host, **more: object) -> Host:
    """The same daemon with shorter waits, and segments that fit on a small disk."""
    plan = host.folder / "plan.json"
    constants = {"gpujobd.janitor.LOOK_S": LOOK_S, "gpujobd.janitor.SNAPSHOT_EVENTS": 40}
    plan.write_text(json.dumps({"constants": constants, "segment_bytes": 1 << 20, **more}))
    host.program = [sys.executable, mortal.__file__, plan, "-m", "gpujobd"]
    return host


def nobody_is_on(mounted: Path) -> bool:
    """Whether every process has let go of it: workers end when their daemon does, a moment later."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            open_files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            if any(
                path.startswith(f"{mounted}/")
                for path in [*open_files, os.readlink(f"/proc/{pid}/cwd") + "/"]
            ):
                return False
    return True


@pytest.mark.parametrize("block", range(2))
def test_a_crash_that_forgets_all_that_was_not_synced_breaks_no_promise(
    tmp_path: Path, block: int, cases, count, needs
) -> None:
    needs(21, "root", "fuse")
    handler = fake("toys:Count", batch_max=8, params={"call_s": 0.004})
    for seed in cases(2):
        luck = random.Random(seed)
        host = Host(tmp_path / str(seed), "[worker]\ncheckpoint_s = 0.02\n", {"count": handler})
        with losefs(host.folder / "state") as disk, ended(impatient(host)):
            campaign = Campaign(host, luck)
            for _ in range(CRASHES):
                host.start()
                campaign.hold_to_it()
                campaign.begin()
                time.sleep(luck.uniform(0.0, 0.5))
                kill(host)
                campaign.end()
                until(lambda: nobody_is_on(disk.root), "the workers to go")
                disk.crash(luck.choice(("none", "none", "sectors")), luck.getrandbits(32))
                count(21)
            host.start()
            campaign.hold_to_it()
            campaign.settle()
            assert host.stop() == 0
            assert "Traceback" not in host.log(), host.log()


# --- full ---------------------------------------------------------------------------------------------------------------


class Tiny:
    """A host whose state lies on a small file system, and that space in the test's hand."""

    def __init__(self, host: Host, root: Path) -> None:
        self.host, self.root = host, root
        self.yields = 0
        self._filler = root / "filler"

    def fill(self, leave: int) -> None:
        """Take all space but this, in ever smaller pieces: who writes meanwhile takes of the rest."""
        found = os.statvfs(self.root)
        wanted = piece = found.f_bavail * found.f_frsize - leave
        with self._filler.open("wb") as file:
            at = 0
            while at < wanted and piece >= found.f_frsize:
                try:
                    os.posix_fallocate(file.fileno(), at, min(piece, wanted - at))
                    at += piece
                except OSError:
                    piece //= 2

    def free(self) -> None:
        self._filler.unlink()

    def work(self, client: Client) -> int:
        """A job, as soon as the door is open."""
        items = [{"text": f"text {n}"} for n in range(ITEMS)]

        def asked() -> int:
            return getattr(client.submit("work", items), "job", 0)

        return until(asked, "the door to open")

    def wait_for_a_checkpoint(self, client: Client, job: int) -> None:
        until(lambda: client.job(job).items.done > 0, "a checkpoint")

    def wait_until_it_yields(self, client: Client, job: int) -> None:
        def waits() -> bool:
            shown = client.job(job)
            assert shown.state in ("queued", "running", "completed"), shown
            assert shown.items.failed == 0, shown
            self.yields += shown.reason == "DiskFull"
            return shown.reason == "DiskFull" or shown.state == "completed"  # it was faster than the filling

        until(waits, "the work to wait for space")
        asked = time.monotonic()
        assert isinstance(client.ask(protocol.Ping), protocol.Pong)
        assert time.monotonic() - asked < PING_S

    def finish(self, client: Client, job: int) -> None:
        """There is space again: the work goes on, and each item is in the output once."""
        (final,) = client.wait(job)
        assert (final.state, final.items.done, final.items.failed) == ("completed", ITEMS, 0), final
        assert [record["line"] for record in client.output(job)] == list(range(1, ITEMS + 1))


def while_it_writes(tiny: Tiny) -> None:
    """Outputs, checkpoints and the job's log, which its handler fills."""
    with tiny.host.client() as client:
        job = tiny.work(client)
        tiny.wait_for_a_checkpoint(client, job)
        tiny.fill(0)
        tiny.wait_until_it_yields(client, job)
        tiny.free()
        tiny.finish(client, job)


def at_the_door(tiny: Tiny) -> None:
    """Refused with a word for it, and accepted when there is space."""
    with tiny.host.client() as client:
        tiny.fill(DOOR_BYTES // 2)
        until(lambda: getattr(client.submit("work", [{}]), "code", "") == "disk_low", "the door to close")
        tiny.free()
        until(lambda: isinstance(client.submit("work", [{}]), protocol.Accepted), "the door to open")
        tiny.finish(client, tiny.work(client))


def before_it_leases(tiny: Tiny) -> None:
    """Accepted, and no space to begin."""
    with tiny.host.client() as client:
        client.ask(protocol.Queue, action="stop")
        job = tiny.work(client)
        tiny.fill(0)
        until(lambda: client.ask(protocol.Status).switches.disk_full, "the daemon to see that it is full")
        client.ask(protocol.Queue, action="start")
        tiny.wait_until_it_yields(client, job)
        tiny.free()
        tiny.finish(client, job)


def while_it_stops_and_starts(tiny: Tiny) -> None:
    """No space for the last snapshot. The next start may find none either, and says that a later one may."""
    with tiny.host.client() as client:
        job = tiny.work(client)
        tiny.wait_for_a_checkpoint(client, job)
        tiny.fill(0)
    assert tiny.host.stop() == 0, tiny.host.log()
    tiny.host.launch()
    started = answers_or_died(tiny.host)
    if started:
        with tiny.host.client() as client:
            tiny.wait_until_it_yields(client, job)
    tiny.free()
    if not started:
        assert tiny.host.process is not None
        assert tiny.host.process.wait() == EX_TEMPFAIL, tiny.host.log()
        tiny.host.start()
    with tiny.host.client() as client:
        tiny.finish(client, job)


STAGES = (at_the_door, while_it_writes, before_it_leases, while_it_stops_and_starts)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("block", range(2))
def test_a_disk_that_fills_up_fails_no_item_and_work_goes_on_when_there_is_space(
    tmp_path: Path, kind: str, block: int, cases, count, needs
) -> None:
    needs(11, "root", "loop", f"mkfs.{kind}")
    config = f"[limits]\ndisk_free_bytes_min = {DOOR_BYTES}\n[worker]\ncheckpoint_s = 0.02\n"
    work = fake("trouble:Slow", batch_max=8, params={"item_s": 0.004})
    for seed in cases(2):
        luck = random.Random(seed)
        host = impatient(Host(tmp_path / str(seed), config, {"work": work}))
        with FileSystem(kind, tmp_path / f"{seed}.image", host.folder / "state") as disk, ended(host):
            host.start()
            tiny = Tiny(host, disk.root)
            stages = [
                before_it_leases,
                *luck.sample(STAGES * 2, 4),
            ]  # there it yields; elsewhere it may be faster
            luck.shuffle(stages)
            for stage in stages:
                stage(tiny)
                count(11)
            assert tiny.yields
            assert host.stop() == 0, host.log()
            assert "Traceback" not in host.log(), host.log()
            until(lambda: nobody_is_on(disk.root), "the workers to go")
