"""What a lease message grants, and how the batches of it are bounded."""

from __future__ import annotations

from typing import Any

from gpujobd_worker.pipe import Message


class Terms:
    """The lease message. Lines are this job's own, 1-based."""

    def __init__(self, message: Message) -> None:
        self.attempt: int = message["attempt"]
        self.folder: str = message["dir"]
        self.items: int = message["items"]
        self.batch_max: int = max(1, message["batch_max"])
        self.job_params: dict[str, Any] = message.get("job_params", {})
        self.failures_max: int = message.get("failures_max", -1)
        self.checkpoint: dict[str, Any] = message["checkpoint"]
        self.condemned = frozenset(message.get("condemned", []))
        self.canary: int = message.get("canary", 0)
        self.gives_way: bool = message.get("gives_way", False)
        alone = [(line, line) for line in self.condemned]
        self._alone = sorted(alone + [(first, last) for first, last in message.get("suspects", [])])

    def share(self, line: int, size: int) -> int:
        """How many of the `size` lines from `line` on may share a call; suspects and condemned lines go alone."""
        for first, last in self._alone:
            if first <= line <= last:
                return 1
            if line < first:
                size = min(size, first - line)
        return size

    def is_suspect(self, line: int) -> bool:
        return any(first <= line <= last for first, last in self._alone)

    def too_many(self, failed: int) -> bool:
        return 0 <= self.failures_max < failed
