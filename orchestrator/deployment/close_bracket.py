"""Close a bracket that a deployment left open: put the machine back, and write down that it is in again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.deployment.recovery import of_deployment, planned_bracket, wait_for_orphans
from orchestrator.journal.events import BracketClosed, Note
from orchestrator.journal.locks import hold
from orchestrator.journal.views import OpenBracket, open_brackets
from relay.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from orchestrator.journal.journal import Journal
    from orchestrator.paths import Places

PUT_BACK = "put_back"


@dataclass(frozen=True, slots=True)
class Closed:
    rotation: str
    ok: bool
    reason: str = ""


async def close_bracket(
    places: Places, journal: Journal, machine: str, environment: str | None, *, by_hand: bool, message: str
) -> Closed:
    """Run the `after` that the deployment had planned, with OUTCOME=put_back; `by_hand` runs nothing.

    Raises:
        NotFoundError: the machine has no open bracket.
        UsageError: it has one in several environments or rotations.
        LockedError: a deployment runs there and will close it itself.
    """
    from orchestrator.paths import operator

    bracket = _the_bracket(journal, machine, environment)
    with hold(
        journal, bracket.environment, operator=operator(), label=bracket.label, why=f"rotation close {machine} of"
    ):
        result = Closed(bracket.rotation, ok=True)
        if not by_hand:
            await wait_for_orphans(places, journal, bracket)
            result = await _run_after(places, journal, bracket)
        if result.ok:
            why = f"put back by {operator()}" + (" by hand" if by_hand else "") + (f": {message}" if message else "")
            journal.append(
                bracket.owner, BracketClosed(bracket.machine, bracket.rotation, PUT_BACK), Note(why, bracket.machine)
            )
    return result


def _the_bracket(journal: Journal, machine: str, environment: str | None) -> OpenBracket:
    found = [b for b in open_brackets(journal.brackets(environment)) if b.machine.lower() == machine.lower()]
    if not found:
        raise NotFoundError(f"{machine} has no open bracket", hint="'waystation rotation list' shows all that are open")
    if len(found) > 1:
        places = ", ".join(f"{b.rotation} in {b.environment}" for b in found)
        raise UsageError(f"{machine} is out of several rotations: {places}", hint="Name one with --environment")
    return found[0]


async def _run_after(places: Places, journal: Journal, bracket: OpenBracket) -> Closed:
    plan, runs = of_deployment(places, journal, bracket.owner)
    rotation, turn, step = planned_bracket(plan, bracket)
    operation = f"{bracket.owner}/{step}/{bracket.machine}/after-put-back"
    done = await runs.run(rotation.after, operation, {**turn.variables, "OUTCOME": PUT_BACK})
    return Closed(bracket.rotation, done.ok, done.reason)
