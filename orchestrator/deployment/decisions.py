"""Where people and the clock decide while a deployment runs.

Decisions are signed rows of the journal, written by any process. Each is obeyed first and taken up then: where a process
dies in between, the next one obeys it again, and what it did is known by the number of the row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from agent.orders.operation_id import SERVER
from orchestrator.files.values import NotificationKind
from orchestrator.journal.events import (
    AskAnswered,
    AskClosed,
    AskOpened,
    MachineAsked,
    MachineDecided,
    Note,
    Paused,
    Unpaused,
)
from orchestrator.people.asks import ask_id
from orchestrator.people.judging import Answer, Judgement, answer_of, is_late, judge, why_not
from orchestrator.people.statement import (
    Approve,
    Cancel,
    Decide,
    GoOn,
    Pause,
    Refusal,
    Reject,
    SignedDecision,
    read_decision,
    used_statements,
)
from orchestrator.rolling.history import MachineHistory
from relay.errors import StoreError, WaystationError

if TYPE_CHECKING:
    from orchestrator.journal.journal import Decision
    from orchestrator.journal.recorder import Recorder
    from orchestrator.plan.plan import Plan, PlannedAsk
    from orchestrator.rolling.history import History
    from relay.trust.keys import TrustPins

DECISIONS_SECONDS: Final = 0.5
"""Between two looks at what people decided."""

Notify = Callable[[NotificationKind, str], Awaitable[None]]
"""Tells the plan's receivers of an event, and why it happened."""


class WaitsForPeopleError(WaystationError):
    """Nothing goes on before a person has decided, and nobody wants to wait for that here."""


@dataclass
class StopToken:
    """Whether anything new may start. What is in flight comes to its end in any case.

    Attributes:
        reason: why nothing may; empty while all goes on.
        by_person: whether a person stopped it.
    """

    reason: str = ""
    by_person: bool = False
    _requested: asyncio.Event = field(default_factory=asyncio.Event)

    def request(self, reason: str, *, by_person: bool = False) -> None:
        """Let nothing new start. The first reason stays."""
        self.reason = self.reason or reason
        self.by_person = self.by_person or by_person
        self._requested.set()

    async def wait(self) -> None:
        await self._requested.wait()


@dataclass
class _Question:
    """One that people are asked."""

    name: str
    step: int
    ask: PlannedAsk
    at: float
    answers: list[Answer]
    told: str = ""
    settled: asyncio.Future[Judgement] = field(default_factory=asyncio.Future)


@dataclass
class _Machine:
    """One of which people are asked what becomes of it. `since`: seconds since 1970."""

    choices: Sequence[str]
    since: float
    decided: asyncio.Future[MachineDecided] = field(default_factory=asyncio.Future)


class Desk:
    """The questions of one deployment that are open, and what people decide."""

    def __init__(
        self,
        recorder: Recorder,
        plan: Plan,
        pins: Callable[[], TrustPins],
        stop: StopToken,
        history: History,
        *,
        waits: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is read yet.

        Args:
            recorder: where decisions stand, and what comes of them.
            plan: of the deployment.
            pins: whose keys count now.
            stop: what a cancel requests.
            history: what an earlier process asked and heard.
            waits: whether to wait for people; otherwise `WaitsForPeopleError` is raised where all that is left waits.
            clock: seconds since 1970.
        """
        self._recorder = recorder
        self._plan = plan
        self._pins = pins
        self._stop = stop
        self._history = history
        self._waits = waits
        self._clock = clock
        self._since = clock()
        self._used = used_statements(history.entries)
        self._asks: dict[str, _Question] = {}
        self._machines: dict[tuple[str, int], _Machine] = {}
        self._paused = history.paused.reason if history.paused is not None else ""
        self._obeying = asyncio.Lock()
        self._noted: set[int] = set()
        self._recalled: set[tuple[str, int]] = set()
        """Machines and steps of which the question that an earlier process asked was taken up: the next one is new."""
        self._turns = 0
        self._turns_waiting = 0
        self._steps_waiting = 0
        self._idle = asyncio.Event()
        self.notify: Notify | None = None
        """Of the deployment."""
        self.kill: Callable[[], Awaitable[None]] | None = None
        """Ends what runs, where a person wants it to end now."""
        self._telling: set[asyncio.Future[None]] = set()
        if history.cancelled_by:
            stop.request(f"cancelled by {history.cancelled_by}", by_person=True)

    # --- what is waited for

    @property
    def is_paused(self) -> bool:
        """Nothing new may start."""
        return bool(self._paused)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One machine's turn is under way."""
        self._turns += 1
        try:
            yield
        finally:
            self._turns -= 1

    async def free(self) -> None:
        """Take up what was decided by now, and wait while the deployment is paused.

        Raises:
            WaitsForPeopleError: it is paused, and nobody waits here.
            StoreError: the journal could not be read or written.
        """
        await self.obey()
        if self._paused and not self._stop.reason:
            self._recorder.say(f"paused: {self._paused}; 'waystation release go-on' lets it go on")
            with self._step_waits():
                while self._paused and not self._stop.reason:
                    await self._moment()
                    await self.obey()

    async def ask(self, step: int, name: str, ask: PlannedAsk, text: str) -> str:
        """Ask people, and wait for what they say: why not; empty where they agreed. Raises as `free`."""
        asked = ask_id(step, name)
        past = self._history.ask(asked)
        if past.closed is not None:
            goes_on = past.closed.outcome == "approved" or (
                past.closed.outcome == "expired" and ask.on_expiry == "proceed"
            )
            return "" if goes_on else past.closed.reason
        since = past.opened or self._clock()
        at = since + ask.expires if ask.expires else 0.0
        answers = [
            Answer(each.by, each.verdict, since, each.why, each.decision, recorded=True) for each in past.answers
        ]
        question = self._asks[asked] = _Question(name, step, ask, at, answers)
        try:
            if past.opened is None:
                await self._recorder.record(AskOpened(asked, step, name, text, at))
            self._tell("waiting", f"{name}: {text}")
            with self._step_waits():
                await self.obey()
                await self._until(question.settled)
        finally:
            del self._asks[asked]
        if not question.settled.done():
            return self._stop.reason
        judgement = question.settled.result()
        return "" if judgement.goes_on else judgement.reason

    async def decide(self, machine: str, step: int, reason: str, choices: Sequence[str]) -> MachineDecided | None:
        """Ask what becomes of a machine; None where the deployment is stopped before anybody says it. Raises as `free`."""
        about = (machine, step)
        past = MachineHistory() if about in self._recalled else self._history.machine_asked(step, machine)
        self._recalled.add(about)
        if past.decided is not None:
            return past.decided
        since = past.asked or self._clock()
        waiting = self._machines[about] = _Machine(choices, since)
        try:
            if past.asked is None:
                await self._recorder.record(MachineAsked(machine, step, reason, tuple(choices)))
            self._tell("waiting", f"{machine}: {reason}")
            with self._step_waits() if machine == SERVER else self._turn_waits():
                await self.obey()
                await self._until(waiting.decided)
                # Stopped by a cancel, perhaps, while a word about this machine is being taken down: it counts.
                async with self._obeying:
                    pass
        finally:
            del self._machines[about]
        return waiting.decided.result() if waiting.decided.done() else None

    async def pause(self, reason: str, by: str = "") -> None:
        """Let nothing new start until a person says so. Raises `StoreError`."""
        if not self._paused:
            await self._recorder.record(Paused(reason, by))
            self._paused = reason or f"by {by}"
            self._tell("paused", reason)

    # --- what people say

    async def obey(self) -> None:
        """Take up what was decided by now, and settle the questions whose time is over. Raises `StoreError`."""
        async with self._obeying:
            for row in await self._recorder.pending_decisions():
                said = read_decision(row, self._pins(), self._plan, self._used)
                if await (self._refuse(row, said.reason) if isinstance(said, Refusal) else self._apply(said)):
                    await self._recorder.take(row)
                    if not isinstance(said, Refusal):
                        self._used.add(said.id)
            for asked, question in list(self._asks.items()):
                await self._judge(asked, question)
        if not self._waits and self._all_wait():
            self._idle.set()

    async def close(self) -> None:
        """The deployment ends: what was decided and came to nothing is taken up as such. Raises `StoreError`."""
        for row in await self._recorder.pending_decisions():
            await self._refuse(row, "the deployment has ended, or nothing asked for it")
            await self._recorder.take(row)
        if self._telling:
            await asyncio.wait(self._telling)

    async def _refuse(self, row: Decision, why: str) -> bool:
        await self._recorder.record(Note(f"a decision of {row.operator} ({row.kind}) does not count: {why}"))
        return True

    async def _apply(self, said: SignedDecision) -> bool:
        """Whether it is done with; what nothing asks for yet waits."""
        match said.saying:
            case Cancel(now=now):
                self._stop.request(f"cancelled by {said.by}", by_person=True)
                if now and self.kill is not None:
                    await self.kill()
                return True
            case Pause(why=why):
                await self.pause(why or f"{said.by} wants it", said.by)
                return True
            case GoOn(why=why):
                if self._paused:
                    await self._recorder.record(Unpaused(said.by, why))
                    self._paused = ""
                return True
            case Approve() | Reject():
                return await self._take_answer(said)
            case Decide():
                return await self._take_word(said, said.saying)

    async def _take_answer(self, said: SignedDecision) -> bool:
        answer, asked = answer_of(said), getattr(said.saying, "ask", "")
        question = self._asks.get(asked)
        if question is None or answer is None:
            return await self._is_over(said, over=self._history.ask(asked).closed is not None)
        if any(each.decision == said.number for each in question.answers):
            return True
        why = why_not(question.ask, self._plan.author, said.by)
        if not why and is_late(question.ask, answer, question.at):
            why = "its time was over"
        if why:
            await self._recorder.record(Note(f"{said.by} on {question.name!r} does not count: {why}"))
            return True
        await self._recorder.record(AskAnswered(asked, said.number, said.by, answer.verdict, answer.why))
        question.answers.append(answer)
        return True

    async def _take_word(self, said: SignedDecision, word: Decide) -> bool:
        waiting = self._machines.get((word.machine, word.step))
        if waiting is None or waiting.decided.done():
            return await self._is_over(said, over=waiting is not None)
        if said.at < waiting.since:
            await self._recorder.record(Note(f"{said.by} decided {word.what} before this was asked", word.machine))
            return True
        if word.what not in waiting.choices:
            choices = ", ".join(waiting.choices)
            await self._recorder.record(
                Note(f"{said.by} decided {word.what}, which is none of {choices}", word.machine)
            )
            return True
        decided = MachineDecided(word.machine, word.step, word.what, said.number, said.by, word.why)
        await self._recorder.record(decided)
        waiting.decided.set_result(decided)
        return True

    async def _is_over(self, said: SignedDecision, *, over: bool) -> bool:
        if over and said.number not in self._noted:
            self._noted.add(said.number)
            await self._recorder.record(Note(f"what {said.by} decided ({said.saying.kind}) was settled before"))
        return over

    async def _judge(self, asked: str, question: _Question) -> None:
        if question.settled.done():
            return
        found = judge(
            question.ask,
            self._plan.author,
            question.answers,
            now=self._clock(),
            at=question.at,
            since=self._since,
        )
        if found.state == "waiting":
            self._tell_who_is_waited_for(question, found)
            return
        await self._recorder.record(AskClosed(asked, found.state, found.reason, found.late))
        question.settled.set_result(found)

    def _tell_who_is_waited_for(self, question: _Question, found: Judgement) -> None:
        """Each change of it, once."""
        whom = ", ".join(found.waits_for) or "anybody who may order here"
        more = f"{found.needed} of " if found.needed > 1 or len(found.waits_for) > 1 else ""
        late = "; its time is over" if found.late else ""
        words = f"{question.name!r} waits for {more}{whom}{late}"
        if words != question.told:
            question.told = words
            self._recorder.say(f"{words}; 'waystation release approve' or 'reject' answers")

    # --- waiting

    async def _until(self, settled: asyncio.Future[Judgement] | asyncio.Future[MachineDecided]) -> None:
        while not settled.done() and not self._stop.reason:
            await self._moment(settled)

    async def _moment(self, *others: asyncio.Future[Judgement] | asyncio.Future[MachineDecided]) -> None:
        """Until something may have changed."""
        tasks = [asyncio.ensure_future(self._stop.wait()), asyncio.ensure_future(self._idle.wait())]
        try:
            await asyncio.wait([*tasks, *others], timeout=DECISIONS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self._idle.is_set() and not any(other.done() for other in others):
            raise WaitsForPeopleError("it waits for people")

    def _all_wait(self) -> bool:
        """Nothing is under way but what waits for people."""
        return bool(self._steps_waiting or self._turns_waiting) and self._turns == self._turns_waiting

    @contextmanager
    def _step_waits(self) -> Iterator[None]:
        self._steps_waiting += 1
        try:
            yield
        finally:
            self._steps_waiting -= 1

    @contextmanager
    def _turn_waits(self) -> Iterator[None]:
        self._turns_waiting += 1
        try:
            yield
        finally:
            self._turns_waiting -= 1

    def _tell(self, event: Literal["waiting", "paused"], reason: str) -> None:
        if self.notify is not None:
            task = asyncio.ensure_future(self.notify(event, reason))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)


@asynccontextmanager
async def decisions_obeyed(desk: Desk, stop: StopToken, deadline: float | None) -> AsyncIterator[None]:
    """While the block runs, take up decisions as they are made, and stop after `deadline` seconds (None: never).

    Where the journal cannot be read, the deployment stops too: a cancel may stand in it.
    """
    watch = asyncio.create_task(_watch(desk, stop))
    why = "its deadline is over"
    timer = asyncio.get_running_loop().call_later(deadline, stop.request, why) if deadline is not None else None
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        watch.cancel()
        await asyncio.wait([watch])


async def _watch(desk: Desk, stop: StopToken) -> None:
    try:
        while True:
            await desk.obey()
            await asyncio.sleep(DECISIONS_SECONDS)
    except Exception as error:  # what ends this task unheard must end the deployment
        why = error.message if isinstance(error, StoreError) else repr(error)
        stop.request(f"what people decide cannot be read: {why}")
