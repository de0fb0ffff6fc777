"""`checksum`: the SHA-256 of a text. Needs nothing but Python, and gives the same answer on every host.

For hosts without torch: to see a job go through, to try an installation, to measure the daemon without a model.

    {"text": "abc"}  ->  {"sha256": "ba7816bf...", "bytes": 3}

Job parameter `rounds` (int, default 1): hash the digest again, so many times in all; it makes an item take longer.
"""

from __future__ import annotations

import hashlib
from typing import Any

ROUNDS_MAX = 10_000_000


class Checksum:
    def __init__(self, *, device: str) -> None:
        self.device = device  # asked for by the contract, used by nothing

    def check(self, item: dict[str, Any]) -> None:
        if not isinstance(item.get("text"), str):
            raise ValueError("the item has no text, or it is not a string")  # noqa: TRY004 - checks answer with ValueError

    def __call__(self, batch: list[dict[str, Any]], *, rounds: int = 1) -> list[dict[str, Any]]:
        return [_checksum(item["text"], min(max(rounds, 1), ROUNDS_MAX)) for item in batch]


def _checksum(text: str, rounds: int) -> dict[str, Any]:
    text_bytes = text.encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(text_bytes)
    for _ in range(rounds - 1):
        digest = hashlib.sha256(digest.digest())
    return {"sha256": digest.hexdigest(), "bytes": len(text_bytes)}
