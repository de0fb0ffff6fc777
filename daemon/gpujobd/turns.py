"""Decide, append, apply, act: the one loop through which everything passes.

    inbox --> decide(head) --> apply(head) --> journal --(committed)--> apply(state) --> answers, followers
                  |  ^                |
       Refused <--+  +---- Tick <-----+   until quiet

Rule 1: `head` is the plan: decide() reads it, so that a second wish sees the first. `state` is the facts: the same
events, applied once the journal has them on disk. Whatever leaves the daemon comes from `state`, or waits for the
commit. If the journal dies, the plan dies with the process and nobody has seen it.
Rule 2: nothing here waits for a disk but the answers that must.
Rule 3: one frame is in flight; what arrives meanwhile is gathered into the next (group commit).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from gpujobd.core.apply import apply
from gpujobd.core.decide import decide
from gpujobd.core.events import AnyEvent, encode
from gpujobd.core.inputs import AnyInput, Tick
from gpujobd.core.model import Rules, State
from gpujobd.core.refused import Refused
from gpujobd.journal import JournalDead

INPUTS_A_TURN: Final = 512  # then others get the loop: about 5 ms
ANSWERED_LOOK_S: Final = 0.01
TICK_S: Final = 0.25  # begin times, deadlines and turns are seen this late at most

Outcome = list[AnyEvent] | Refused | JournalDead
Answer = Callable[[Outcome], None]
Follower = Callable[[list[tuple[int, AnyEvent]]], None]


class Turns:
    """Owner of both states. `add` gives records to the journal and returns the last one's number."""

    def __init__(self, head: State, state: State, rules: Rules, add: Callable[[list[bytes]], int]) -> None:
        assert head.seq == state.seq
        self.head = head
        self.state = state
        self.rules = rules
        self.followers: list[Follower] = []  # called with committed events, after they were applied
        self.turned_at = 0.0  # trio.current_time() of the last turn, for the watchdog
        self._add = add
        self._inbox: deque[tuple[AnyInput, Answer | None]] = deque()
        self._wake = trio.Event()
        self._planned: deque[tuple[int, AnyEvent]] = deque()
        self._waiting: deque[tuple[int, Answer, list[AnyEvent]]] = deque()
        self._dead: JournalDead | None = None

    def put(self, given: AnyInput) -> None:
        """A report that nobody waits for."""
        self._inbox.append((given, None))
        self._wake.set()

    def ask(self, given: AnyInput, answer: Answer) -> None:
        """A wish: `answer` is called once, with the events when they are on disk, or with the refusal."""
        if self._dead is not None:
            answer(self._dead)
            return
        self._inbox.append((given, answer))
        self._wake.set()

    async def asked(
        self, given: AnyInput, undo: Callable[[list[AnyEvent]], None] | None = None
    ) -> list[AnyEvent]:
        """The same for a task that can wait. Where it is cancelled, `undo` gets what has come of the wish.

        Raises:
            Refused: nothing was written.
            JournalDead: it cannot be known whether it was written.
        """
        done = trio.Event()
        outcome: Outcome = []
        left = False

        def answer(what: Outcome) -> None:
            nonlocal outcome
            outcome = what
            done.set()
            if left:
                take_back()

        def take_back() -> None:
            if undo is not None and not isinstance(outcome, Exception):
                undo(outcome)

        self.ask(given, answer)
        try:
            await done.wait()
        except trio.Cancelled:
            left = True
            if done.is_set():
                take_back()
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            while True:
                await self._wake.wait()  # lets others have the loop, also where it is set already
                self._wake = trio.Event()
                try:
                    self.turn(time.time_ns())
                except JournalDead as dead:
                    self.die(dead)
                    await trio.sleep_forever()  # the writer ends the process
                self.turned_at = trio.current_time()
                if self._inbox:
                    self._wake.set()

    async def _tick(self) -> None:
        """Time passes; one timer, not one for every turn."""
        while True:
            self._wake.set()
            await trio.sleep(TICK_S)

    def turn(self, now_ns: int) -> None:
        """Carry the inputs that wait, and what is due by now, through to quiet."""
        planned: list[AnyEvent] = []
        for _ in range(min(len(self._inbox), INPUTS_A_TURN)):
            given, answer = self._inbox.popleft()
            self._carry(given, answer, planned, now_ns)
        while events := decide(self.head, self.rules, Tick(), now_ns):
            self._plan(events, planned)
        if planned:
            last = self._add([encode(event) for event in planned])  # durable only when committed() says so
            assert last == self.head.seq, (last, self.head.seq)
        self._answer()

    def _carry(self, given: AnyInput, answer: Answer | None, planned: list[AnyEvent], now_ns: int) -> None:
        try:
            events = decide(self.head, self.rules, given, now_ns)
        except Refused as refusal:
            if answer is not None:
                answer(refusal)
            return
        self._plan(events, planned)
        if answer is not None:
            self._waiting.append((self.head.seq, answer, events))

    def _plan(self, events: list[AnyEvent], planned: list[AnyEvent]) -> None:
        for event in events:
            seq = self.head.seq + 1
            apply(self.head, event, seq)
            self._planned.append((seq, event))
        planned += events

    def committed(self, seq: int) -> None:
        """The journal has everything up to `seq` on disk: the plan has become fact."""
        facts: list[tuple[int, AnyEvent]] = []
        while self._planned and self._planned[0][0] <= seq:
            number, event = self._planned.popleft()
            apply(self.state, event, number)
            facts.append((number, event))
        for follower in self.followers:
            follower(facts)
        self._answer()

    def _answer(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.state.seq:
            _, answer, events = self._waiting.popleft()
            answer(events)

    async def answered(self) -> None:
        """Wait until everybody who asked has the answer. Only of use where nobody asks any more."""
        while self._inbox or self._waiting:  # noqa: ASYNC110  # an event would cost every answer
            await trio.sleep(ANSWERED_LOOK_S)

    def die(self, reason: JournalDead) -> None:
        """The journal is dead: everybody who waits is told at once, and everybody who comes."""
        self._dead = reason
        for _, answer, _ in self._waiting:
            answer(reason)
        for _, unanswered in self._inbox:
            if unanswered is not None:
                unanswered(reason)
        self._waiting.clear()
        self._inbox.clear()
