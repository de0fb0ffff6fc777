"""Other ways to choose who is next, put in the place of the policy's own choices: all else is the same core.

gpujobd       as it is
FIFO          the job that was submitted first runs to its end, whoever it belongs to
round robin   one slice of each tenant in turn, whatever loading costs
fair share    whole jobs, of the tenant that has used least: as Slurm's fair-share factor without preemption
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

from gpujobd.core import policy
from gpujobd.core.model import Device, Rules, State, YieldWhy
from gpujobd.core.policy import Claim, Survey

Start = tuple[Device, Claim, bool] | None
Asked = tuple[Device, Claim, YieldWhy] | None


@dataclass(frozen=True)
class Rival:
    name: str
    next_start: Callable[[State, Rules, list[Claim], int], Start]
    due_yield: Callable[[State, Rules, Survey, int], Asked]

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """The core schedules this way meanwhile."""
        with (
            mock.patch.object(policy, "next_start", self.next_start),
            mock.patch.object(policy, "due_yield", self.due_yield),
        ):
            yield


def _never(_state: State, _rules: Rules, _seen: Survey, _now_ns: int) -> Asked:
    return None


def _by(key: Callable[[State, Rules, Claim], object]) -> Callable[[State, Rules, list[Claim], int], Start]:
    def next_start(state: State, rules: Rules, claims: list[Claim], now_ns: int) -> Start:
        free = policy.free_devices(state, now_ns)
        if not free or not claims:
            return None
        return free[0], min(claims, key=lambda claim: key(state, rules, claim)), True  # type: ignore[arg-type,return-value]

    return next_start


def _submitted(_state: State, _rules: Rules, claim: Claim) -> object:
    return claim.job.job_id


def _served_longest_ago(_state: State, _rules: Rules, claim: Claim) -> object:
    return claim.waits_since_ns, claim.job.job_id


def _used_least(state: State, rules: Rules, claim: Claim) -> object:
    used_ns = state.tenants[claim.job.tenant].used_ns
    return -claim.job.priority, used_ns / rules.share(claim.job.tenant), claim.job.job_id


def _slice_over(state: State, rules: Rules, seen: Survey, now_ns: int) -> Asked:
    for device in state.devices.values():
        lease = device.lease
        if lease is None or lease.yield_why is not None or not policy.turn_over(state, rules, device, now_ns):
            continue
        others = [claim for claim in seen.claims if claim.job.tenant != lease.tenant]
        if others:
            return device, others[0], YieldWhy.TURN_OVER
    return None


RIVALS = (
    Rival("gpujobd", policy.next_start, policy.due_yield),
    Rival("FIFO", _by(_submitted), _never),
    Rival("round robin", _by(_served_longest_ago), _slice_over),
    Rival("fair share", _by(_used_least), _never),
)
