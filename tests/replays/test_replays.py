"""Each situation, cut short, under each way to choose: tables can be made, and gpujobd is the one that is itself."""

from __future__ import annotations

import pytest
from gpujobd.core import policy
from replays import page
from replays.measures import live, percentile
from replays.rivals import RIVALS
from replays.situations import SITUATIONS, Situation


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_a_situation_cut_short_makes_its_table(situation: Situation) -> None:
    before = policy.next_start
    outcomes = [live(situation, rival, hours=0.3) for rival in RIVALS]
    assert policy.next_start is before  # rivals are put in for a while only
    assert len({len(outcome.waits_s) for outcome in outcomes}) == 1
    assert all(outcome.computing_s + outcome.loading_s <= outcome.wanted_s + 1 for outcome in outcomes)
    table = page.as_markdown(outcomes)
    assert table.count("\n") == 2 + 1 + len(RIVALS)
    assert situation.title in page.as_text(outcomes)


def test_a_burst_makes_others_wait_where_jobs_go_in_order_and_not_here() -> None:
    situation = SITUATIONS[0]
    ours, fifo = (live(situation, rival, hours=1) for rival in RIVALS[:2])
    quiet = "40 quiet tenants"
    assert percentile(ours.waits_s[quiet], 99) < 180 < percentile(fifo.waits_s[quiet], 50)
    assert ours.jain > 0.9 > fifo.jain
