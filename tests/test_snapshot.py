"""A snapshot is the state it was taken of, whole or not at all."""

from __future__ import annotations

import pytest
from core_house import ALICE, BOB, HANDLERS, ROOT, House, bookkeeping, persistent, person, submission
from gpujobd.core import inputs
from gpujobd.core.apply import apply
from gpujobd.core.model import DEFERRED_MAX, Deferred, Expected, Rules, Span, State
from gpujobd.core.snapshot import CHUNK_BYTES_MAX, SnapshotError, chunks, clone, load


def busy_house() -> House:
    """Something of everything."""
    house = House(Rules(handlers=HANDLERS), devices=("cuda:0", "cuda:1"))
    house.submit(ALICE, params={})
    house.submit(BOB, items=50, deadline_ns=house.now_ns + 10**12)
    house.submit(ALICE, begin_ns=house.now_ns + 10**12)
    house.submit(ROOT, tenant="production")
    house.give(inputs.Pause(who=ROOT, job_id=4, message="wait for it"))
    house.give(inputs.Foretell(jobs=(Expected(1, 1, 1, 2, 3), Expected(2, 1, 1, 2, 3))))
    house.loaded("cuda:0")
    house.finish(device="cuda:0")
    house.give(inputs.Remove(who=ALICE, job_id=1))
    house.lose("died", device="cuda:1", suspects=(Span(3, 3), Span(1, 2)))
    house.give(inputs.Reserve(who=ALICE, submission=submission()))
    house.give(inputs.SwitchQueue(who=ROOT, verb=inputs.QueueVerb.DISABLE, message="today"))
    return house


def test_what_is_loaded_equals_what_was_written_bookkeeping_included() -> None:
    house = busy_house()
    for other in (load(chunks(house.state)), clone(house.state)):
        assert persistent(other) == persistent(house.state)
        assert bookkeeping(other) == bookkeeping(house.state)


def test_an_empty_state_is_a_snapshot_too() -> None:
    assert persistent(load(chunks(State()))) == persistent(State())


def test_what_happens_after_the_call_is_not_in_the_snapshot() -> None:
    house = busy_house()
    before = persistent(house.state)
    pieces = chunks(house.state)
    house.wait(5000)
    house.give(inputs.Stop())
    assert persistent(house.state) != before
    assert persistent(load(pieces)) == before


def test_a_clone_lives_on_by_itself_and_the_same_events_make_it_equal_again() -> None:
    house = busy_house()
    twin = clone(house.state)
    before = persistent(twin)
    known = len(house.history)
    house.wait(5000)
    house.give(inputs.SwitchQueue(who=ROOT, verb=inputs.QueueVerb.ENABLE))
    house.submit(person(7))
    assert persistent(twin) == before
    for event in house.history[known:]:
        apply(twin, event, twin.seq + 1)
    assert persistent(twin) == persistent(house.state)
    assert bookkeeping(twin) == bookkeeping(house.state)


def test_pieces_are_bounded_even_for_jobs_as_large_as_they_get() -> None:
    house = House(
        Rules(handlers=HANDLERS, items_per_job_max=10**6, queued_items_max=10**9, items_per_uid_max=10**9)
    )
    for _ in range(200):
        house.submit(items=5000, input_bytes=10_000)
    heavy = tuple(Deferred(line, 1) for line in range(4001, 4001 + DEFERRED_MAX))
    for job in house.state.jobs.values():
        job.checkpoint = type(job.checkpoint)(upto=5000, done=4000, deferred=heavy)
    pieces = list(chunks(house.state))
    assert max(map(len, pieces)) <= CHUNK_BYTES_MAX
    assert persistent(load(pieces)) == persistent(house.state)


def test_pieces_that_are_not_all_of_one_snapshot_are_refused() -> None:
    pieces = list(chunks(busy_house().state))
    for at in range(len(pieces)):
        with pytest.raises(SnapshotError):
            load(pieces[:at] + pieces[at + 1 :])
    for broken in ([*pieces, pieces[-1]], pieces[::-1], [pieces[0], *pieces], [b"", *pieces], [b"\xc1"], []):
        with pytest.raises(SnapshotError):
            load(broken)
