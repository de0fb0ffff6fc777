"""What goes with time: old segments, with the inputs in them brought to safety, and the history before them."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from gpujobd import protocol
from harness import Host, fake, until

# The daemon with small segments and frequent snapshots; all else is what it always is.
SMALL = """
import sys
from gpujobd import janitor, journal
from gpujobd.__main__ import main
journal.Journal.__init__.__defaults__ = (None, 256 << 10)
janitor.SNAPSHOT_EVENTS = 40
janitor.LOOK_S = 0.1
janitor.LEASE_ROOM_BYTES = 1 << 20
main(sys.argv[1:])
"""
CONFIG = "[limits]\nevents_bytes_max = 300000\nqueued_jobs_max = 5000\nqueued_jobs_per_uid_max = 5000\n"


class Small(Host):
    def start(self) -> None:
        words = ["serve", "--config", self.folder / "gpujobd.toml", "--state-dir", self.folder / "state"]
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SMALL, *map(str, words), "--socket", str(self.socket)], stderr=log
            )
        until(self._answers, "the daemon")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(OSError), self.client():
            return True
        return False

    def segments(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "state" / "journal").glob("seg-*"))


@pytest.mark.slow
def test_old_segments_go_when_their_inputs_are_in_the_spool_and_a_late_follower_is_told_of_the_gap(tmp_path):
    with Small(tmp_path / "host", CONFIG, {"count": fake("toys:Count")}) as host:
        with host.client() as client:
            client.ask(protocol.Queue, action="stop")
            first = host.segments()[0]
            items = [{"text": "x" * 900} for _ in range(10)]
            jobs = [client.submit("count", items).job for _ in range(120)]
            until(lambda: host.segments()[0] != first, "the oldest segment to go")
            spooled = {int(path.name) for path in (host.folder / "state" / "spool" / "jobs").iterdir()}
            assert jobs[0] in spooled
            gap = client.ask(protocol.Events, since=1)
            assert isinstance(gap, protocol.Gap)
            assert gap.first_seq > 1
            seen = client.receive()
            assert seen.seq == gap.first_seq
            until(lambda: isinstance(client.receive(), protocol.Done), "the rest of the events")
            changed = client.ask(protocol.List, changed_since=gap.first_seq, limit=1)
            assert changed.seq >= gap.first_seq
        host.stop()
        host.start()  # from the snapshot and what is left of the journal
        with host.client() as client:
            client.ask(protocol.Queue, action="start")
            client.ask(protocol.Cancel, job=jobs[1])
            wanted = [jobs[0], *jobs[2:5], jobs[-1]]
            assert {job.state for job in client.wait(*wanted)} == {"completed"}
            assert client.job(jobs[0]).items.done == 10
        assert "Traceback" not in host.log()
