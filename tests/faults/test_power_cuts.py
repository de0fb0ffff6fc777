"""Rows 1 and 2: the power goes, in a disk that keeps any subset of what was not synced."""

from __future__ import annotations

import pytest
from test_journal_faults import survive_cuts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("block", range(8))
def test_power_cuts_at_random_operations_lose_nothing_acknowledged(block: int, cases, count) -> None:
    for seed in cases(20_000 // 8):
        count(1, survive_cuts(seed) and 1)
