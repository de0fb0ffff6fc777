"""How the core says no: one word of the protocol, and a sentence that names the value and the limit."""

from __future__ import annotations

from gpujobd.protocol import ErrorCode


class Refused(Exception):
    """A wish we decline. Nothing was written and nothing changed."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        limit: int | None = None,
        current: int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.limit = limit
        self.current = current
        self.retry_after_s = retry_after_s  # when the same wish may be granted, where that is known
