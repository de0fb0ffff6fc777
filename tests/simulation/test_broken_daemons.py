"""Daemons with one thing broken: a simulation that lives with them happily ever after proves nothing.

Each variant takes away one promise's mechanism. It must be found within a few simulated days.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gpujobd import spool, supervisor, turns, watchdog, worker
from gpujobd.core import admission, leases, policy
from gpujobd.feed import Feed
from gpujobd.journal import Journal
from gpujobd.turns import Turns
from gpujobd_worker.files import JobFiles
from simulation.pulse import HARSH
from simulation.world import World

pytestmark = pytest.mark.slow

WORLDS = 6
DAYS = 1.0

Patch = pytest.MonkeyPatch


def acknowledges_before_the_commit(patch: Patch) -> None:
    def carry(self: Turns, *args: Any) -> None:
        waited = len(self._waiting)
        real(self, *args)
        while len(self._waiting) > waited:
            _, answer, events = self._waiting.pop()
            answer(events)

    real = turns.Turns._carry
    patch.setattr(turns.Turns, "_carry", carry)


def commits_without_a_sync(patch: Patch) -> None:
    patch.setattr(Journal, "_write", _unsynced(Journal._write))


def _unsynced(write: Callable[..., bytes]) -> Callable[..., bytes]:
    def unsynced(self: Journal, *args: Any) -> bytes:
        sync, self._disk.fdatasync = self._disk.fdatasync, lambda _: None  # type: ignore[method-assign]
        try:
            return write(self, *args)
        finally:
            self._disk.fdatasync = sync  # type: ignore[method-assign]

    return unsynced


def checkpoints_before_the_outputs_are_synced(patch: Patch) -> None:
    patch.setattr(JobFiles, "sync", lambda _: None)


def accepts_inputs_before_they_are_synced(patch: Patch) -> None:
    patch.setattr(spool.Incoming, "settle", lambda self: self.close())


def does_not_know_a_submit_id_again(patch: Patch) -> None:
    patch.setattr(admission, "find_submitted", lambda *_: 0)


def believes_old_attempts(patch: Patch) -> None:
    def any_lease(state: Any, given: Any) -> Any:
        device = state.devices.get(given.device)
        return device.lease if device else None

    def believe(self: Any, message: Any) -> None:
        real(
            self,
            type(message)(**{**_fields(message), "attempt": self.grant.attempt}) if self.grant else message,
        )

    real = worker.Worker._on_lease_message
    patch.setattr(leases, "lease_of", any_lease)
    patch.setattr(worker.Worker, "_on_lease_message", believe)


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


def forgets_what_was_asked_of_a_lease(patch: Patch) -> None:
    patch.setattr(leases, "_asked", lambda *_: [])


def serves_who_had_most(patch: Patch) -> None:
    def survey(*args: Any) -> policy.Survey:
        seen = real(*args)
        return policy.Survey(seen.claims[::-1], seen.blocked, seen.held)

    real = policy.survey
    patch.setattr(policy, "survey", survey)


def leaves_the_second_device_idle(patch: Patch) -> None:
    def free_devices(*args: Any) -> Any:
        return [device for device in real(*args) if device.name == "cuda:0"]

    real = policy.free_devices
    patch.setattr(policy, "free_devices", free_devices)


def tells_systemd_that_all_is_well(patch: Patch) -> None:
    patch.setattr(watchdog.Watchdog, "stuck", lambda _: "")


def drops_an_event_now_and_then(patch: Patch) -> None:
    async def after(self: Feed, cursor: int) -> list[Any]:
        return [pair for pair in await real(self, cursor) if pair[0] % 50]

    real = Feed.after
    patch.setattr(Feed, "after", after)


def forgets_to_begin_a_lease(patch: Patch) -> None:
    def begin(self: Any, lease: Any, job: Any, now: float) -> Any:
        return None if job.job_id % 10 == 0 else real(self, lease, job, now)

    real = supervisor.Supervisor._begin
    patch.setattr(supervisor.Supervisor, "_begin", begin)


def cuts_nothing_back_at_the_start_of_a_lease(patch: Patch) -> None:
    patch.setattr("gpujobd_worker.files.Output.cut", lambda _: None)


VARIANTS = [
    acknowledges_before_the_commit,
    commits_without_a_sync,
    checkpoints_before_the_outputs_are_synced,
    accepts_inputs_before_they_are_synced,
    does_not_know_a_submit_id_again,
    believes_old_attempts,
    forgets_what_was_asked_of_a_lease,
    serves_who_had_most,
    leaves_the_second_device_idle,
    tells_systemd_that_all_is_well,
    drops_an_event_now_and_then,
    forgets_to_begin_a_lease,
    cuts_nothing_back_at_the_start_of_a_lease,
]


@pytest.mark.parametrize("broken", VARIANTS, ids=lambda variant: variant.__name__)
def test_a_daemon_that(broken: Callable[[Patch], None], capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5001, 5001 + WORLDS):
        world = World(seed, HARSH)
        with Patch.context() as patch:
            broken(patch)
            try:
                world.live(DAYS)
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - whatever gives it away
                with capsys.disabled():
                    print(
                        f"\n{broken.__name__}: found in world {seed}, hour {world.clock.world_s / 3600:.1f}: {_say(error)}"
                    )
                return
    pytest.fail(f"{broken.__name__} was not found in {WORLDS} worlds of {DAYS:g} days")


def _say(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {str(error)[:150]}"
