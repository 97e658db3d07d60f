"""People of a simulated deployment: what they say when they are asked, and what they say unasked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from orchestrator.journal import events as ev
from orchestrator.journal.journal import Decision
from orchestrator.people.asks import planned_asks
from orchestrator.people.statement import (
    Approve,
    Cancel,
    Decide,
    GoOn,
    Pause,
    Refusal,
    Reject,
    Saying,
    SignedDecision,
)
from orchestrator.plan.plan import PlannedAsk
from simulation.scenario import AUTHOR, DEPLOYMENT, PEOPLE

if TYPE_CHECKING:
    from simulation.world import World

Said = tuple[float, str, Saying, bytes]
"""In so many seconds, by whom, what, and the envelope."""


def rows_about(world: World, event: ev.Event) -> list[Decision]:
    """What people will say because of this event, with when."""
    said = _said(world, event)
    if not said:
        return []
    first = len(world.rows) + 1
    return [
        Decision(
            number,
            "prod",
            DEPLOYMENT,
            world.now + seconds,
            by,
            saying.kind,
            {"id": str(number), "said": saying},
            envelope,
        )
        for number, (seconds, by, saying, envelope) in enumerate(said, first)
    ]


def _said(world: World, event: ev.Event) -> Iterable[Said]:
    match event:
        case ev.Started():
            return _unasked(world)
        case ev.Paused():
            return [(0.5 + 1.5 * world.scenario.fate("goes on", len(world.rows)), "anna", GoOn(), b"signed")]
        case ev.AskOpened(ask=ask):
            return _of_ask(world, ask, planned_asks(world.scenario.plan)[ask])
        case ev.MachineAsked(machine=machine, step=step, choices=choices):
            return _of_machine(world, machine, step, choices)
        case _:
            return ()


def _unasked(world: World) -> Iterator[Said]:
    scenario = world.scenario
    if scenario.cancel is not None:
        yield scenario.cancel, "ben", Cancel(now=scenario.kills), b"signed"
    for at, seconds in scenario.pauses:
        yield at, "anna", Pause("wait"), b"signed"
        yield at + seconds, "anna", GoOn(), b"signed"
    if scenario.fate("early") < 0.3:
        # Of machines that nobody asks about: it must never count when somebody does.
        for machine in scenario.plan.machines:
            yield 0.0, "dora", Decide(machine.name, scenario.machine_steps[0].number, "exclude"), b"signed"


def counts(ask: PlannedAsk, by: str) -> bool:
    """Whether the word of this person counts, as the process file's documentation says it."""
    return (not ask.approvers or by in ask.approvers) and not (ask.not_author and by == AUTHOR)


def _of_ask(world: World, name: str, ask: PlannedAsk) -> Iterator[Said]:
    fate = world.scenario.fate
    able = [person for person in PEOPLE if counts(ask, person)]
    others = [person for person in PEOPLE if person not in able]
    if fate("noise", name) < 0.4:
        for person in others:
            yield 0.3, person, Reject(name, "no") if fate("no", name) < 0.5 else Approve(name), b"signed"
        yield 0.4, able[0], Approve(name), b"forged"
        yield 0.5, able[0], Approve("9/another"), b"signed"
        if ask.minimum > 1:
            yield 0.6, able[0], Approve(name), b"signed"
            yield 0.7, able[0], Approve(name), b"signed"
    when, how = 1 + 2 * fate("when", name), fate("how", name)
    if how < 0.12:
        yield when, able[-1], Reject(name, "it looks bad"), b"signed"
    elif how < 0.25 and ask.expires:
        # Nobody says anything in time, and then somebody does.
        for person in able[: ask.minimum]:
            yield ask.expires + when, person, Approve(name), b"signed"
    else:
        for number, person in enumerate(able[: ask.minimum]):
            yield when + number, person, Approve(name), b"signed"


def _of_machine(world: World, machine: str, step: int, choices: Collection[str]) -> Iterator[Said]:
    mine = [e.event for e in world.entries if isinstance(e.event, ev.MachineAsked) and e.event.machine == machine]
    nth = len([event for event in mine if event.step == step])
    wanted = [choice for choice in choices if choice != "retry"] if nth > 2 else [*choices, "retry"]
    what = world.scenario.one_of(tuple(wanted), "decides", machine, step, nth)
    when = 0.5 + 2 * world.scenario.fate("decides", machine, step, nth)
    if world.scenario.fate("wrong", machine, nth) < 0.2:
        yield when / 3, "dora", Decide(machine, step + 7, "exclude"), b"signed"
        yield when / 2, "ben", Decide(machine, step, "fail"), b"forged"
        if "rollback" not in choices:
            yield when / 2, "ben", Decide(machine, step, "rollback"), b"signed"
    world.later(when - 0.2, "mended", machine, key=("mended", machine, step, nth))
    yield when, "anna", Decide(machine, step, what), b"signed"  # type: ignore[arg-type]


def read_row(row: Decision, used: Collection[str]) -> SignedDecision | Refusal:
    """Stands for `orchestrator.people.statement.read_decision`: the signatures of this world are words."""
    if row.envelope != b"signed":
        return Refusal(row.number, "it is not signed")
    if row.data["id"] in used:
        return Refusal(row.number, "it was obeyed before")
    return SignedDecision(row.number, row.data["id"], row.operator, row.at, row.data["said"])
