"""What a deployment left whose process is dead: runs on the server, brackets, and undos that are owed.

Everything here stands under the environment's lock: no deployment runs there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from agent.orders.operation_id import SERVER, OperationId
from agent.runs import runs as processes
from orchestrator.deployment.context import undo_step
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.journal.events import BracketClosed, Ended, Note
from orchestrator.journal.locks import hold
from orchestrator.journal.recorder import Recorder
from orchestrator.journal.views import OpenBracket, open_brackets, operations, undos_due
from orchestrator.paths import operator
from orchestrator.plan.plan import MachineStep, MachineTurn, Plan, RotationPlan
from orchestrator.trust.secrets import SecretStore
from relay.errors import NotFoundError, RefusedError, UsageError, WaystationError

if TYPE_CHECKING:
    from orchestrator.journal.journal import Journal
    from orchestrator.paths import Paths


PUT_BACK: Final = "put_back"
"""OUTCOME that `after` gets where a person puts a machine back."""


async def settle(paths: Paths, journal: Journal, environment: str, *, adopt: bool) -> list[OpenBracket]:
    """Make room for a new deployment: those whose process is dead are over, and what they owed is done.

    Gives the open brackets, which the new deployment answers for.

    Raises:
        RefusedError: brackets are open, and `adopt` was not said. Nothing was changed.
    """
    brackets = open_brackets(journal.brackets(environment))
    if brackets and not adopt:
        told = "; ".join(f"{b.machine} is out of {b.rotation}, opened by {b.label}" for b in brackets)
        raise RefusedError(
            f"an earlier deployment left machines out of their rotation: {told}",
            hint="'waystation rotation list' shows them, 'rotation close MACHINE' closes one, or deploy with --adopt",
        )
    for bracket in brackets:
        await wait_for_orphans(paths, journal, bracket)
    for left in journal.deployments(environment, state="running", limit=None):
        await _undo(paths, journal, left.deployment)
        reason = "interrupted: its process ended before it did"
        journal.set_state(left.deployment, "failed", reason, Ended("failed", reason))
    return brackets


async def _undo(paths: Paths, journal: Journal, deployment: str) -> None:
    """What was opened before acquisition is closed, however late. One that fails is written down, and the others follow."""
    due = undos_due(journal.entries(deployment))
    if not due:
        return
    plan, runs = of_deployment(paths, journal, deployment)
    recorder = Recorder(journal, deployment)
    for name in due:
        for step in plan.pre_acquire:
            if step.run.name != name or step.undo is None:
                continue
            try:
                await runs.take_up(step.run, OperationId.of(deployment, 0, SERVER, f"pre-{name}"), {})
                await undo_step(step, runs, recorder)
            except WaystationError as error:
                await recorder.record(Note(f"{name} could not be undone: {error}"))


async def wait_for_orphans(paths: Paths, journal: Journal, bracket: OpenBracket) -> None:
    """Wait for the `before` or `after` of this machine that a dead process left running, and write its end down.

    Nothing may be said to the balancer beside it: what it says last would win. Its own time limit bounds the wait.
    """
    for one in operations(journal.entries(bracket.owner)).values():
        operation = OperationId.parse(one.operation)
        if one.result is not None or one.machine != bracket.machine or operation.action not in {"before", "after"}:
            continue
        plan, runs = of_deployment(paths, journal, bracket.owner)
        if await asyncio.to_thread(processes.state_of, runs.run_folder(operation)) == "new":
            continue
        rotation, turn, _ = planned_bracket(plan, bracket)
        script = rotation.before if operation.action == "before" else rotation.after
        await runs.take_up(script, operation, turn.variables)


def of_deployment(paths: Paths, journal: Journal, deployment: str) -> tuple[Plan, ServerRuns]:
    """The plan of a deployment, and what runs its scripts: in its own folder and journal."""
    plan = msgspec.json.decode(journal.plan(deployment), type=Plan)
    secrets = SecretStore(plan.secrets, plan.machine_secrets)
    return plan, ServerRuns(paths.deployment(deployment), secrets, Recorder(journal, deployment))


def planned_bracket(plan: Plan, bracket: OpenBracket) -> tuple[RotationPlan, MachineTurn, int]:
    """The rotation as the deployment that answers for the bracket had planned it."""
    for step in plan.steps:
        if isinstance(step, MachineStep) and step.rotation is not None and step.rotation.name == bracket.rotation:
            for turn in step.turns:
                if turn.machine == bracket.machine:
                    return step.rotation, turn, step.number
    raise NotFoundError(
        f"deployment {bracket.owner} has no turn of {bracket.machine} in {bracket.rotation}",
        hint="Put it back yourself, then 'waystation rotation close --by-hand'",
    )


# --- one bracket, by a person's word


async def close_bracket(
    paths: Paths, journal: Journal, machine: str, environment: str | None, *, by_hand: bool, message: str
) -> tuple[str, str]:
    """Run the `after` that the deployment had planned, with OUTCOME=put_back; `by_hand` runs nothing. The rotation, and why
    the machine could not be put back (empty where it is in again).

    Raises:
        NotFoundError: the machine has no open bracket.
        UsageError: it has one in several environments or rotations.
        LockedError: a deployment runs there and will close it itself.
    """
    bracket = _the_bracket(journal, machine, environment)
    with hold(
        journal, bracket.environment, operator=operator(), label=bracket.label, why=f"rotation close {machine} of"
    ):
        failed = "" if by_hand else await _run_after(paths, journal, bracket)
        if not failed:
            why = f"put back by {operator()}" + (" by hand" if by_hand else "") + (f": {message}" if message else "")
            journal.append(
                bracket.owner, BracketClosed(bracket.machine, bracket.rotation, PUT_BACK), Note(why, bracket.machine)
            )
    return bracket.rotation, failed


def _the_bracket(journal: Journal, machine: str, environment: str | None) -> OpenBracket:
    found = [b for b in open_brackets(journal.brackets(environment)) if b.machine.lower() == machine.lower()]
    if not found:
        raise NotFoundError(f"{machine} has no open bracket", hint="'waystation rotation list' shows all that are open")
    if len(found) > 1:
        rotations = ", ".join(f"{b.rotation} in {b.environment}" for b in found)
        raise UsageError(f"{machine} is out of several rotations: {rotations}", hint="Name one with --environment")
    return found[0]


async def _run_after(paths: Paths, journal: Journal, bracket: OpenBracket) -> str:
    """Why it failed; empty where it did not."""
    await wait_for_orphans(paths, journal, bracket)
    plan, runs = of_deployment(paths, journal, bracket.owner)
    rotation, turn, step = planned_bracket(plan, bracket)
    operation = OperationId.of(bracket.owner, step, bracket.machine, "after-put-back")
    done = await runs.run(rotation.after, operation, {**turn.variables, "OUTCOME": PUT_BACK})
    return done.reason
