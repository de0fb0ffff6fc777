"""The state as clients see it."""

from __future__ import annotations

import pytest
from gpujobd import views
from gpujobd.core import events
from gpujobd.core.apply import apply
from gpujobd.core.forecast import Outlook
from gpujobd.core.model import Reason, State
from msgspec import UNSET

LEASED = events.Leased(at_ns=1, device="cpu", job_id=1, attempt=1, level=1)
ENDS = {
    "queued": [],
    "running": [LEASED],
    "paused": [events.Paused(at_ns=1, job_id=1, reason=Reason.HELD_BY_OWNER)],
    "cancelled": [events.Cancelled(at_ns=1, job_id=1, by=0)],
}


@pytest.mark.parametrize("ends", ENDS)
def test_forecast_of_an_earlier_second_is_shown_only_of_a_job_that_is_to_run(ends):
    state = State()
    submitted = events.Submitted(
        at_ns=1, job_id=1, submit_id="a", owner=0, tenant="t", handler="h", items=1, input_bytes=2, input_sha256=b""
    )  # fmt: skip
    history = [events.DevicesFound(at_ns=1, devices=("cpu",)), submitted, *ENDS[ends]]
    for seq, event in enumerate(history, 1):
        apply(state, event, seq)
    seen = views.job(state, state.jobs[1], None, str, Outlook(position=1, start_ns=1, finish_ns=2))
    assert seen.state == ends
    assert (seen.forecast is not UNSET) == (ends in ("queued", "running"))


def test_the_words_of_workers_are_withheld_where_they_may_quote_an_item_and_those_of_the_daemon_are_not():
    def detail(fact, frank):
        return views.event(fact, frank=frank).get("detail", "")

    def lost(cause):
        return events.LeaseLost(at_ns=1, job_id=1, attempt=1, cause=cause, detail="line 7: secret")

    for cause in ("died", "poisoned", "canary"):
        assert (detail(lost(cause), True), detail(lost(cause), False)) == ("line 7: secret", "")
    for cause in ("stalled", "silent", "failures_max"):
        assert detail(lost(cause), False) == "line 7: secret"
    ill = events.DeviceFellIll(
        at_ns=1, device="cpu", reason="CanaryFailed", detail="line 7: secret", retry_at_ns=2
    )
    assert (detail(ill, True), detail(ill, False)) == ("line 7: secret", "")
    assert views.event(ill, frank=False)["reason"] == "CanaryFailed"
