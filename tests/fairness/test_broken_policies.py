"""Policies with one thing broken: what does not notice them proves nothing. Each is found within a few days."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import test_policy
from fairness import test_promises
from fairness.days import Day
from gpujobd.core import book, leases, policy

pytestmark = pytest.mark.slow

DAYS = 8
Patch = pytest.MonkeyPatch


def nothing_ages(patch: Patch) -> None:
    patch.setattr(policy, "lifted", lambda _rules, base, _waited_ns: base)


def loads_cost_nothing(patch: Patch) -> None:
    patch.setattr(policy, "_load_ns", lambda *_: 0)


def idle_time_is_saved_up(patch: Patch) -> None:
    patch.setattr(book, "start_ns", lambda *_: 0)


def a_turn_has_no_end(patch: Patch) -> None:
    patch.setattr(policy, "turn_over", lambda *_: False)


def whoever_comes_first_is_served(patch: Patch) -> None:
    patch.setattr(policy.Claim, "key", lambda self: (-self.level, self.job.line_key))


def shares_are_not_looked_at(patch: Patch) -> None:
    def charged(_state: Any, _rules: Any, lease: Any, given: Any) -> tuple[int, int]:
        used_ns = max(0, given.used_ns - lease.used_ns)
        return used_ns, used_ns

    patch.setattr(leases, "_charged", charged)


def an_urgent_job_waits_for_the_turn(patch: Patch) -> None:
    real = policy._beats

    def beats(state: Any, rules: Any, claim: Any, device: Any, now_ns: int) -> Any:
        if claim.level > device.lease.level and not policy.turn_over(state, rules, device, now_ns):
            return None
        return real(state, rules, claim, device, now_ns)

    patch.setattr(policy, "_beats", beats)


def one_device_is_forgotten(patch: Patch) -> None:
    real = policy.free_devices
    patch.setattr(policy, "free_devices", lambda *args: [d for d in real(*args) if d.name == "cuda:0"])


def a_price_keeps_a_device_idle(patch: Patch) -> None:
    real = policy.next_start

    def next_start(state: Any, rules: Any, claims: Any, now_ns: int) -> Any:
        found = real(state, rules, claims, now_ns)
        return found if found and policy.swap_due(state, rules, found[0], found[1]) else None

    patch.setattr(policy, "next_start", next_start)


def limits_on_devices_are_forgotten(patch: Patch) -> None:
    patch.setattr(policy, "devices_left", lambda state, *_: len(state.devices))


def a_limited_tenant_holds_all_up(patch: Patch) -> None:
    real = policy.survey

    def survey(*args: Any) -> Any:
        seen = real(*args)
        return msgspec.structs.replace(seen, claims=[]) if seen.held else seen

    patch.setattr(policy, "survey", survey)


def a_failing_handler_holds_all_up(patch: Patch) -> None:
    real = policy.survey

    def survey(*args: Any) -> Any:
        seen = real(*args)
        return msgspec.structs.replace(seen, claims=[]) if seen.blocked else seen

    patch.setattr(policy, "survey", survey)


BROKEN = [
    nothing_ages,
    loads_cost_nothing,
    a_turn_has_no_end,
    whoever_comes_first_is_served,
    one_device_is_forgotten,
    a_price_keeps_a_device_idle,
    limits_on_devices_are_forgotten,
    a_limited_tenant_holds_all_up,
    a_failing_handler_holds_all_up,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda variant: variant.__name__)
def test_a_policy_in_which(broken: Callable[[Patch], None], capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(8, 8 + DAYS):
        day = Day(seed)
        with Patch.context() as patch:
            broken(patch)
            try:
                day.live()
            except AssertionError as error:
                with capsys.disabled():
                    print(
                        f"\n{broken.__name__}: found on day {seed}, hour {day.hall.clock_s / 3600:.1f}: {error}"[
                            :200
                        ]
                    )
                return
    pytest.fail(f"{broken.__name__} was not found in {DAYS} days")


def test_a_policy_in_which_idle_time_is_saved_up_is_noticed() -> None:
    with Patch.context() as patch:
        idle_time_is_saved_up(patch)
        with pytest.raises(AssertionError):
            test_policy.test_credit_is_not_earned_while_nobody_is_there_either()


def test_a_policy_in_which_an_urgent_job_waits_for_the_turn_is_noticed() -> None:
    with Patch.context() as patch:
        an_urgent_job_waits_for_the_turn(patch)
        with pytest.raises(AssertionError):
            test_promises.test_an_urgent_job_does_not_wait_for_the_end_of_a_turn(1203.0)


def test_a_policy_that_does_not_look_at_shares_is_noticed() -> None:
    with Patch.context() as patch:
        shares_are_not_looked_at(patch)
        with pytest.raises(AssertionError):
            test_promises.test_four_to_one_is_kept_within_two_percent_over_an_hour(0.1, 0.0)


def test_a_policy_that_lets_the_single_one_save_up_is_noticed() -> None:
    def charged(_state: Any, rules: Any, lease: Any, given: Any) -> tuple[int, int]:
        used_ns = max(0, given.used_ns - lease.used_ns)
        return used_ns, round(used_ns / rules.share(lease.tenant))

    with Patch.context() as patch:
        patch.setattr(leases, "_charged", charged)
        with pytest.raises(AssertionError):
            test_promises.test_who_had_fewer_jobs_than_devices_has_saved_up_next_to_nothing()


def test_a_policy_without_prices_is_noticed_by_what_its_swaps_take() -> None:
    with Patch.context() as patch:
        loads_cost_nothing(patch)
        with pytest.raises(AssertionError):
            test_promises.test_swaps_take_no_more_than_their_part_once_everybody_is_served.hypothesis.inner_test(
                [40.0, 40.0], [0, 1], 1
            )
