"""The loop, in virtual time, over a journal that commits when the test says so."""

from __future__ import annotations

import hashlib

import pytest
import trio
import trio.testing
from gpujobd.core import inputs
from gpujobd.core.events import Reserved, Submitted, decode
from gpujobd.core.inputs import Submission, Who
from gpujobd.core.model import HandlerRule, Rules, State
from gpujobd.core.refused import Refused
from gpujobd.journal import JournalDead
from gpujobd.turns import INPUTS_A_TURN, Turns

ALICE = Who(uid=1000, name="alice", tenants=frozenset({"alice"}))
RULES = Rules(handlers={"h": HandlerRule()}, queued_jobs_max=3)
LINE = b"{}\n"


class MemoryLog:
    """A journal in memory: frames of records, durable when `commit` is called."""

    def __init__(self) -> None:
        self.frames: list[list[bytes]] = []
        self.seq = 0
        self.dead: str | None = None

    def add(self, records: list[bytes]) -> int:
        if self.dead:
            raise JournalDead(self.dead)
        self.frames.append(records)
        self.seq += len(records)
        return self.seq


class Loop:
    def __init__(self, rules: Rules = RULES) -> None:
        self.log = MemoryLog()
        self.turns = Turns(State(), State(), rules, self.log.add)
        self.seen: list[int] = []
        self.turns.followers.append(lambda facts: self.seen.extend(seq for seq, _ in facts))

    def commit(self) -> None:
        self.turns.committed(self.log.seq)


def submit(submit_id: str = "one", **fields: object) -> inputs.Submit:
    header = {
        "submit_id": submit_id,
        "handler": "h",
        "items": 1,
        "input_bytes": len(LINE),
        "input_sha256": hashlib.sha256(LINE).digest(),
        "item_bytes": 2,
    }
    return inputs.Submit(who=ALICE, submission=Submission(**header | fields), inline=LINE)


@pytest.fixture
def loop():
    return Loop()


def asking(loop, given, answers):
    loop.turns.ask(given, answers.append)


def test_what_waits_at_one_turn_shares_one_frame(loop):
    for n in range(3):
        asking(loop, submit(str(n)), [])
    loop.turns.turn(now_ns=1)
    (frame,) = loop.log.frames
    assert [type(decode(record)) for record in frame] == [Submitted] * 3


def test_an_answer_comes_after_the_commit_and_not_before(loop):
    answers = []
    asking(loop, submit(), answers)
    loop.turns.turn(now_ns=1)
    assert answers == []
    loop.commit()
    ((event,),) = answers
    assert event.job_id == 1


def test_a_refusal_is_answered_at_once(loop):
    answers = []
    asking(loop, submit(handler="unknown"), answers)
    loop.turns.turn(now_ns=1)
    assert isinstance(answers[0], Refused)
    assert loop.log.frames == []


def test_the_second_wish_sees_the_plan_of_the_first(loop):
    answers = []
    for n in range(4):
        asking(loop, submit(str(n)), answers)
    loop.turns.turn(now_ns=1)
    (refusal,) = answers
    assert refusal.code == "queue_full"


def test_reads_see_facts_and_not_plans(loop):
    asking(loop, submit(), [])
    loop.turns.turn(now_ns=1)
    assert loop.turns.head.jobs
    assert not loop.turns.state.jobs
    assert loop.seen == []
    loop.commit()
    assert loop.turns.state.jobs
    assert loop.seen == [1]


def test_repeated_submit_id_waits_for_the_first_that_is_in_flight(loop):
    first, again = [], []
    asking(loop, submit(), first)
    loop.turns.turn(now_ns=1)
    asking(loop, submit(), again)
    loop.turns.turn(now_ns=2)
    assert (first, again) == ([], [])
    loop.commit()
    assert len(first) == 1
    assert again == [[]]  # no event of its own, and the job is there for whoever looks
    assert len(loop.turns.state.jobs) == 1


def test_repeated_submit_id_with_other_content_is_refused_while_the_first_is_in_flight(loop):
    other = []
    asking(loop, submit(), [])
    loop.turns.turn(now_ns=1)
    asking(loop, submit(name="other"), other)
    loop.turns.turn(now_ns=2)
    assert other[0].code == "conflict"


def test_only_the_committed_part_of_what_is_planned_becomes_fact(loop):
    answers = []
    for n in range(2):
        asking(loop, submit(str(n)), answers)
        loop.turns.turn(now_ns=1)
    loop.turns.committed(1)
    assert len(answers) == len(loop.turns.state.jobs) == 1
    loop.turns.committed(2)
    assert len(answers) == 2


def test_a_dead_journal_answers_everybody_who_waits_and_everybody_who_comes(loop):
    waiting, unread, late = [], [], []
    asking(loop, submit("a"), waiting)
    loop.turns.turn(now_ns=1)
    asking(loop, submit("b"), unread)
    loop.turns.die(JournalDead("EIO"))
    asking(loop, submit("c"), late)
    assert [type(what[0]) for what in (waiting, unread, late)] == [JournalDead] * 3
    assert not loop.turns.state.jobs


def test_a_journal_that_dies_under_a_turn_answers_that_turn_too():
    async def main():
        loop, answers = Loop(), []
        loop.log.dead = "EIO"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.turns.run)
            loop.turns.ask(submit(), answers.append)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert [type(answer) for answer in answers] == [JournalDead]

    virtually(main)


def test_many_inputs_are_taken_some_at_a_time(loop):
    answers = []
    for _ in range(INPUTS_A_TURN + 1):
        asking(loop, submit(handler="unknown"), answers)
    loop.turns.turn(now_ns=1)
    assert len(answers) == INPUTS_A_TURN
    loop.turns.turn(now_ns=2)
    assert len(answers) == INPUTS_A_TURN + 1


def test_a_begin_time_wakes_its_job_though_nobody_asks():
    async def main():
        import time

        loop = Loop()
        begin_ns = time.time_ns() + 300_000_000  # far enough that a busy host submits before
        loop.turns.ask(submit(begin_ns=begin_ns), lambda _: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.turns.run)
            with trio.fail_after(3600):
                while not any(type(e).__name__ == "Woken" for e in events(loop)):
                    await trio.sleep(0.25)
                    time.sleep(0.005)  # noqa: ASYNC251  # begin times go by the wall clock, which is real
            nursery.cancel_scope.cancel()

    virtually(main)


def test_a_wish_that_is_cancelled_is_taken_back_when_it_has_come_true():
    async def main():
        loop, undone = Loop(), []
        reserve = inputs.Reserve(who=ALICE, submission=submit().submission)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.turns.run)
            with trio.move_on_after(1):
                await loop.turns.asked(reserve, undo=undone.append)
            assert undone == []
            loop.commit()
            nursery.cancel_scope.cancel()
        ((event,),) = undone
        assert isinstance(event, Reserved)

    virtually(main)


def test_a_wish_that_was_refused_leaves_nothing_to_take_back():
    async def main():
        loop, undone = Loop(), []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.turns.run)
            with pytest.raises(Refused):
                await loop.turns.asked(submit(handler="unknown"), undo=undone.append)
            nursery.cancel_scope.cancel()
        assert undone == []

    virtually(main)


def events(loop):
    return [decode(record) for frame in loop.log.frames for record in frame]


def virtually(main):
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
