"""What people are asked: the questions of a plan, and those that are open by what the journal says. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.people.judging import Answer
from orchestrator.plan.plan import AskStep, MachineStep, Plan, PlannedAsk


class OpenAsk(msgspec.Struct, frozen=True):
    """A question that is not settled.

    Attributes:
        ask: its id, `STEP/NAME`.
        step: number of the step.
        name: of the gate, or of the step that asks.
        text: as people read it.
        since: when it was asked; `at`: when its time is over, 0: never. Seconds since 1970.
        answers: as they were written down, oldest first.
    """

    ask: str
    step: int
    name: str
    text: str
    since: float
    at: float = 0.0
    answers: tuple[Answer, ...] = ()


def ask_id(step: int, name: str) -> str:
    """The id of a question: of the gate `name` in step `step`, or of the step itself."""
    return f"{step}/{name}"


def planned_asks(plan: Plan) -> dict[str, PlannedAsk]:
    """Every question of a plan by its id, in the order in which they may come up."""
    found: dict[str, PlannedAsk] = {}
    for step in plan.steps:
        if isinstance(step, AskStep):
            found[ask_id(step.number, step.name)] = step.ask
        elif isinstance(step, MachineStep):
            for phase in step.phases:
                if phase.gate is not None and phase.gate.ask is not None:
                    found[ask_id(step.number, phase.gate.name)] = phase.gate.ask
    return found


def open_asks(entries: Iterable[JournalEntry]) -> tuple[OpenAsk, ...]:
    """The questions that wait for answers, in the order in which they were asked.

    A question that is asked again while it is open (a resume says so) keeps its answers and when it was first asked; one
    that is asked again after it was settled is new. After the end of the deployment nothing is open.
    """
    found: dict[str, OpenAsk] = {}
    for entry in entries:
        match entry.event:
            case ev.AskOpened(ask=ask, step=step, name=name, text=text, at=at):
                found.setdefault(ask, OpenAsk(ask, step, name, text, entry.at, at))
            case ev.AskAnswered(ask=ask, decision=decision, by=by, verdict=verdict, why=why) if ask in found:
                known = found[ask]
                answer = Answer(by, verdict, entry.at, why, decision, recorded=True)
                found[ask] = msgspec.structs.replace(known, answers=(*known.answers, answer))
            case ev.AskClosed(ask=ask):
                found.pop(ask, None)
            case ev.Ended():
                found.clear()
    return tuple(found.values())


def is_paused(entries: Iterable[JournalEntry]) -> bool:
    """Whether nothing new starts until a person says so."""
    last: ev.Event | None = None
    for entry in entries:
        if isinstance(entry.event, ev.Paused | ev.Unpaused):
            last = entry.event
    return isinstance(last, ev.Paused)
