"""Row 21: the whole daemon with real workers, on a file system that forgets what was not synced."""

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
from campaign import Campaign, ended, kill
from filesystems import losefs
from harness import Host, fake, until

pytestmark = pytest.mark.slow

CRASHES = 5  # of one daemon
LOOK_S = 0.1  # how often the janitor looks at the disk here, and not every five seconds
ITEMS = 400
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
    for seed in cases(4):
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
