"""Which part of a deployment is tried again: the machines that are not through, with the plan as it was frozen. Pure.

A deployment and those that tried parts of it again are a chain, the oldest first. What counts of a machine in a step is
its last turn in the chain, so that nothing that was done once is done twice, and nobody is left out for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from orchestrator.journal.events import JournalEntry, StepEnded, TurnEnded
from orchestrator.plan.leave_out import with_machines
from orchestrator.plan.plan import MachineStep, Plan, PlannedStep
from relay.errors import NotFoundError, RefusedError

GOOD_ENDINGS = frozenset({"deployed", "already_current"})
"""Of a turn that nobody needs to try again."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A deployment of a chain."""

    deployment: str
    plan: Plan
    entries: Sequence[JournalEntry]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a chain has come.

    Attributes:
        unfinished: machines that are not through all of their steps, and why.
        turns: (step, machine) of turns that ended well.
        steps: numbers of the steps that are no machines' and were done.
    """

    unfinished: Mapping[str, str]
    turns: frozenset[tuple[int, str]]
    steps: frozenset[int]


def progress(chain: Sequence[Attempt]) -> Progress:
    """Fold over everything that the chain's journals tell of turns and steps."""
    scope = chain[0].plan
    last: dict[tuple[int, str], TurnEnded] = {}
    done: set[int] = set()
    for event in _events(chain):
        if isinstance(event, TurnEnded):
            last[event.step, event.machine] = event
        elif event.ok and not event.skipped:
            done.add(event.step)
    good = frozenset(key for key, end in last.items() if end.outcome in GOOD_ENDINGS and not end.failure)
    unfinished: dict[str, str] = {}
    for step in _machine_steps(scope):
        for turn in (*step.turns, *step.beside):
            if (step.number, turn.machine) not in good:
                end = last.get((step.number, turn.machine))
                unfinished.setdefault(turn.machine, _why(chain, turn.machine, end))
    ours = frozenset(step.number for step in scope.steps if not isinstance(step, MachineStep))
    return Progress(unfinished, good, ours & done)


def plan_again(chain: Sequence[Attempt], names: Collection[str]) -> Plan:
    """The plan of the chain's first deployment for the machines `names`; without names, for all that are not through.

    Steps on the server, and questions, that were done are not repeated; others wait until no machine is left behind.

    Raises:
        NotFoundError: a machine that the plan does not know.
        RefusedError: nothing is left to do.
    """
    scope, so_far = chain[0].plan, progress(chain)
    chosen = _named(scope, names) if names else set(so_far.unfinished)
    behind = {name: why for name, why in so_far.unfinished.items() if name not in chosen}
    plan = with_machines(scope, chosen, behind)
    notes = [f"again for {', '.join(sorted(chosen)) or 'no machine'}, as planned in deployment {chain[0].deployment}"]
    steps: list[PlannedStep] = []
    for step in plan.steps:
        if isinstance(step, MachineStep):
            if (left := _without_done(step, so_far)).turns:
                steps.append(left)
        elif step.when != "success" or (step.number not in so_far.steps and not behind):
            steps.append(step)
        else:
            why = "was done" if step.number in so_far.steps else f"waits until {', '.join(sorted(behind))} are through"
            notes.append(f"step {step.number} ({step.name}) {why}, and is not run")
    if not any(step.when == "success" for step in steps):
        raise RefusedError(f"nothing of {scope.label} in {scope.environment} is left to do: every machine is through")
    return replace(plan, steps=tuple(steps), notes=tuple(notes), force=False, retries=chain[-1].deployment)


def _without_done(step: MachineStep, so_far: Progress) -> MachineStep:
    """Of a step that deploys, the machine itself knows whether all was done; of another one only the journal does."""
    done = () if step.package else [turn for turn in step.turns if (step.number, turn.machine) in so_far.turns]
    turns = tuple(turn for turn in step.turns if turn not in done)
    return replace(step, turns=turns, beside=(*step.beside, *done))


def _named(plan: Plan, names: Collection[str]) -> set[str]:
    known = {
        turn.machine.lower(): turn.machine for step in _machine_steps(plan) for turn in (*step.turns, *step.beside)
    }
    for name in names:
        if name.lower() not in known:
            raise NotFoundError(
                f"{name} has no part in {plan.label} of {plan.environment}",
                hint=f"Its machines are {', '.join(sorted(known.values()))}; one that came later gets it by a deploy",
            )
    return {known[name.lower()] for name in names}


def _why(chain: Sequence[Attempt], machine: str, end: TurnEnded | None) -> str:
    if end is not None:
        return f"{end.outcome.replace('_', ' ')}: {end.reason}" if end.reason else end.outcome.replace("_", " ")
    reasons = [attempt.plan.excluded[machine] for attempt in chain if machine in attempt.plan.excluded]
    return reasons[-1] if reasons else "it never began"


def _machine_steps(plan: Plan) -> Iterator[MachineStep]:
    yield from (step for step in plan.steps if isinstance(step, MachineStep))


def _events(chain: Sequence[Attempt]) -> Iterator[TurnEnded | StepEnded]:
    for attempt in chain:
        yield from (entry.event for entry in attempt.entries if isinstance(entry.event, TurnEnded | StepEnded))
