"""A job that stays in its middle until the test lets it go on, so that what happens meanwhile is not a race.

    job = Midway(host)                    # alice's; some of its items are computed, most are not
    host.systemctl("restart", UNIT)
    job.go_on()
    job.assert_whole()                    # every item in the output, once, in order
    job.assert_nothing_computed_twice()

Its handler is `count` (tests/handlers/toys.py), which notes each item that it computes and is slow while its gate is
closed: of the job's quarter of a minute at least, a test needs the first moments.
"""

from __future__ import annotations

import hashlib
import itertools
import json

from booted import Host
from harness import until

BATCH = 4
CALL_S = 0.2
ITEMS = 400
SIDE = "/var/cache/gpujobd/computed"  # where the service may write
GATE = "/srv/gpujobd/gate"
NUMBERS = itertools.count(1)


class Midway:
    """See the head of this file."""

    def __init__(self, host: Host, items: int = ITEMS) -> None:
        self.host = host
        self.texts = [f"item {number}" for number in range(items)]
        number = next(NUMBERS)  # files of its own: with other settings the handler is loaded anew
        self.side, self.gate = f"{SIDE}-{number}"[1:], f"{GATE}-{number}"
        params = {"side": f"{SIDE}-{number}", "gate": self.gate, "call_s": CALL_S}
        host.handler("count", "toys:Count", batch_max=BATCH, params=params)
        self.job_id = host.submit("count", [{"text": text} for text in self.texts])
        self.until_more()

    def computed(self) -> list[str]:
        """Texts in the order in which they were computed, repeated ones too."""
        side = self.host.root / self.side
        return side.read_text().splitlines() if side.exists() else []

    def until_more(self) -> None:
        """Wait for two more batches; the job is not over then."""
        enough = len(self.computed()) + 2 * BATCH
        until(lambda: len(self.computed()) >= enough, f"job {self.job_id} to move")
        assert len(self.computed()) < len(self.texts) // 2

    def go_on(self) -> None:
        """Open the gate, and wait for the end."""
        self.host.write(self.gate, "")
        self.host.jobctl("wait", self.job_id)

    def events(self) -> list[str]:
        """What happened to it, in one word each, but for checkpoints."""
        lines = self.host.jobctl("events", "--job", self.job_id, "--json").stdout.splitlines()
        words = [json.loads(line)["event"] for line in lines]
        return [word for word in words if word != "checkpointed"]

    def assert_whole(self) -> None:
        job = self.host.job(self.job_id)
        assert job["state"] == "completed", job
        assert job["items"] == {"total": len(self.texts), "done": len(self.texts), "failed": 0}
        lines = self.host.jobctl("output", self.job_id).stdout.splitlines()
        assert [json.loads(line)["line"] for line in lines] == list(range(1, len(self.texts) + 1))
        sums = [hashlib.sha256(text.encode()).hexdigest() for text in self.texts]
        assert [json.loads(line)["output"]["sha256"] for line in lines] == sums

    def assert_nothing_computed_twice(self) -> None:
        assert self.computed() == self.texts
