"""What a deployment left whose process is dead: runs on the server, brackets, and undos that are owed.

Everything here stands under the project's lock in the environment: no deployment of it runs there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import msgspec

from agent.orders.operation_id import OperationId
from agent.orders.orders import Survey, SurveyFacts
from agent.orders.orders import Verify as VerifyOrder
from agent.runs import runs as processes
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.deployment.turns import checks_of_new, checks_of_old, done_by, make_checks, tree_facts
from orchestrator.fleet.fences import seen_of
from orchestrator.fleet.fleet import Fleet
from orchestrator.journal.events import BracketClosed, Note
from orchestrator.journal.recorder import Recorder, Tell
from orchestrator.journal.views import OpenBracket, operations
from orchestrator.locks.leases import Tenant, claim
from orchestrator.locks.leases import machine as leased
from orchestrator.locks.locks import hold
from orchestrator.paths import operator
from orchestrator.plan.placement import trees_of
from orchestrator.plan.plan import MachineStep, MachineTurn, Plan, RotationPlan
from orchestrator.replication.send import open_relay
from orchestrator.rolling import shared
from orchestrator.rolling.turn import Done
from orchestrator.trust.keyring import load_signer
from orchestrator.trust.secrets import SecretStore
from relay.errors import NotFoundError, RefusedError, StoreError, UnreachableError, UsageError, WaystationError
from relay.support.together import told_if_slow

if TYPE_CHECKING:
    from orchestrator.journal.journal import Journal
    from orchestrator.paths import Paths


PUT_BACK: Final = "put_back"
"""OUTCOME that `after` gets where a person puts a machine back."""
FORCED_SECONDS: Final = 10.0
"""For the checks of a machine that goes back whatever they say."""
LEAVE_SECONDS: Final = 5.0
"""For a relay to take the last word to an agent."""


async def settle(paths: Paths, journal: Journal, plan: Plan, *, adopt: bool, tell: Tell) -> list[OpenBracket]:
    """Make room for a new deployment. Gives the project's open brackets, which the new deployment answers for.

    `tell` hears what is waited for.

    Raises:
        RefusedError: brackets are open, and `adopt` was not said; or another project left a machine of the plan out, and
            is not alive to put it back. Nothing was changed.
    """
    await _check_others(journal, plan)
    brackets = [bracket for bracket in journal.open_brackets(plan.environment) if bracket.project == plan.project]
    if brackets and not adopt:
        told = "; ".join(f"{b.machine} is out of {b.rotation}, opened by {b.label}" for b in brackets)
        raise RefusedError(
            f"an earlier deployment left machines out of their rotation: {told}",
            hint="'waystation rotation list' shows them, 'rotation close MACHINE' closes one, or deploy with --adopt",
        )
    for bracket in brackets:
        await wait_for_orphans(paths, journal, bracket, tell)
    return brackets


async def _check_others(journal: Journal, plan: Plan) -> None:
    """What a living deployment of another project has out is waited for, machine by machine, once its turn comes."""
    tenant = Tenant(plan.project, plan.environment, plan.label, "", operator())
    elsewhere = (await claim(journal, tenant, {}, lambda _: ())).elsewhere
    names = frozenset(machine.name for machine in plan.machines)
    if told := shared.why_refused(shared.Own(plan.project, ""), names, elsewhere):
        raise RefusedError(
            f"another project left machines out of their rotation: {'; '.join(told)}",
            hint="they are put back first, by the command that is named, or by a deployment of that project",
        )


async def wait_for_orphans(
    paths: Paths, journal: Journal, bracket: OpenBracket, tell: Tell = lambda _line: None
) -> None:
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
        what = f"waiting for {operation.action!r} of {bracket.machine}, which {bracket.label} left running"
        with told_if_slow(tell, what):
            await runs.take_up(script, operation, turn.variables)


def of_deployment(
    paths: Paths, journal: Journal, deployment: str, tell: Tell = lambda _line: None
) -> tuple[Plan, ServerRuns]:
    """The plan of a deployment, and what runs its scripts: in its own folder and journal."""
    plan = msgspec.json.decode(journal.plan(deployment), type=Plan)
    secrets = SecretStore(plan.secrets, plan.machine_secrets)
    return plan, ServerRuns(paths.deployment(deployment), secrets, Recorder(journal, deployment, tell))


def planned_bracket(plan: Plan, bracket: OpenBracket) -> tuple[RotationPlan, MachineTurn, MachineStep]:
    """The rotation as the deployment that answers for the bracket had planned it."""
    for step in plan.steps:
        if isinstance(step, MachineStep) and step.rotation is not None and step.rotation.name == bracket.rotation:
            for turn in step.turns:
                if turn.machine == bracket.machine:
                    return step.rotation, turn, step
    raise NotFoundError(
        f"deployment {bracket.owner} has no turn of {bracket.machine} in {bracket.rotation}",
        hint="Put it back yourself, then 'waystation rotation close --by-hand'",
    )


# --- one bracket, by a person's word


@dataclass(frozen=True, slots=True)
class Word:
    """What a person says of a machine that is out.

    Attributes:
        by_hand: it was put back already: nothing is run and nothing is checked.
        force: it goes back whatever its checks say.
        why: for the record.
    """

    by_hand: bool = False
    force: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class Closing:
    """What came of it.

    Attributes:
        ill: what its checks said against the machine; empty where they held, or where there are none.
        failed: why it is still out; empty where it is in again.
    """

    rotation: str
    ill: str = ""
    failed: str = ""


async def close_bracket(
    paths: Paths,
    journal: Journal,
    machine: str,
    environment: str | None,
    word: Word,
    *,
    tell: Tell = lambda _line: None,
) -> Closing:
    """Make the checks of the step that left the machine out, on the version that is current there; where they hold, run
    the `after` that the deployment had planned, with OUTCOME=put_back.

    Raises:
        NotFoundError: the machine has no open bracket.
        UsageError: it has one in several environments or rotations.
        LockedError: a deployment of its project runs there and will close it itself.
    """
    bracket = _the_bracket(journal, machine, environment)
    why = f"rotation close {machine} of"
    with hold(journal, bracket.project, bracket.environment, operator=operator(), label=bracket.label, why=why):
        if word.by_hand:
            closing = Closing(bracket.rotation)
        else:
            await wait_for_orphans(paths, journal, bracket, tell)
            closing = await _put_back(paths, journal, bracket, force=word.force, tell=tell)
        _note(journal, bracket, closing, word)
    return closing


def _the_bracket(journal: Journal, machine: str, environment: str | None) -> OpenBracket:
    found = [b for b in journal.open_brackets(environment) if b.machine.lower() == machine.lower()]
    if not found:
        raise NotFoundError(f"{machine} has no open bracket", hint="'waystation rotation list' shows all that are open")
    if len(found) > 1:
        rotations = ", ".join(f"{b.rotation} in {b.environment}" for b in found)
        raise UsageError(f"{machine} is out of several rotations: {rotations}", hint="Name one with --environment")
    return found[0]


async def _put_back(paths: Paths, journal: Journal, bracket: OpenBracket, *, force: bool, tell: Tell) -> Closing:
    plan, runs = of_deployment(paths, journal, bracket.owner)
    rotation, turn, step = planned_bracket(plan, bracket)
    tenant = Tenant(bracket.project, bracket.environment, bracket.label, bracket.owner, operator())
    async with leased(journal, tenant, bracket.machine, plan.machine(bracket.machine).key, tell):
        ill = await _why_ill(paths, journal, bracket, plan, force=force)
        if ill and not force:
            return Closing(rotation.name, ill, f"it is not well: {ill}")
        operation = OperationId.of(bracket.owner, step.number, bracket.machine, "after-put-back")
        done = await runs.run(rotation.after, operation, {**turn.variables, "OUTCOME": PUT_BACK})
        return Closing(rotation.name, ill, done.reason)


def _note(journal: Journal, bracket: OpenBracket, closing: Closing, word: Word) -> None:
    """What was found, what was done about it, and in whose name."""
    said = f" although it is not well ({closing.ill})" if closing.ill else ""
    how = " by hand" if word.by_hand else " by force" if word.force else ""
    why = f": {word.why}" if word.why else ""
    if closing.failed:
        note = Note(f"{operator()} could not put it back{how}: {closing.failed}{why}", bracket.machine)
        journal.append(bracket.owner, note)
    else:
        note = Note(f"put back by {operator()}{how}{said}{why}", bracket.machine)
        journal.append(bracket.owner, BracketClosed(bracket.machine, bracket.rotation, PUT_BACK), note)


# --- is it well?


async def _why_ill(paths: Paths, journal: Journal, bracket: OpenBracket, plan: Plan, *, force: bool) -> str:
    """What the step's checks say against the machine now; empty where they hold, or where the step has none.

    Where a person forces it, they have a short time: an agent that is gone must not keep a person waiting.
    """
    _, turn, step = planned_bracket(plan, bracket)
    if not turn.verify:
        return ""
    try:
        async with asyncio.timeout(FORCED_SECONDS if force else None), _fleet(paths, journal, bracket, plan) as fleet:
            try:
                return await _verify(fleet, plan, step, turn, Names(journal, bracket, step.number))
            finally:
                await _leave(fleet, bracket.machine)
    except TimeoutError:
        return f"its checks have said nothing in {FORCED_SECONDS:.0f} s"
    except StoreError:
        raise
    except WaystationError as error:
        return f"its checks could not be made: {error.message}"


@asynccontextmanager
async def _fleet(paths: Paths, journal: Journal, bracket: OpenBracket, plan: Plan) -> AsyncIterator[Fleet]:
    """The machines of the deployment that answers for the bracket, under a fence of its own."""
    async with AsyncExitStack() as stack:
        clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in plan.relays}
        fleet = Fleet(
            plan,
            clients,
            signer=load_signer(paths.trust, "order"),
            journal=journal.id,
            folder=paths.deployment(bracket.owner),
            recorder=Recorder(journal, bracket.owner),
            fence=journal.claim(bracket.project, bracket.environment),
        )
        yield await stack.enter_async_context(fleet)


@dataclass(frozen=True, slots=True)
class Names:
    """Operations of one look at a machine. An order that was given before under its name would only be answered again."""

    journal: Journal
    bracket: OpenBracket
    step: int

    def next(self, action: str) -> OperationId:
        """One that never was."""
        wanted = OperationId.of(self.bracket.owner, self.step, self.bracket.machine, action)
        known = [OperationId.parse(one) for one in operations(self.journal.entries(self.bracket.owner))]
        used = [one.attempt for one in known if replace(one, attempt=1) == wanted]
        return replace(wanted, attempt=max(used, default=0) + 1)


async def _verify(fleet: Fleet, plan: Plan, step: MachineStep, turn: MachineTurn, names: Names) -> str:
    here = await fleet.presences()
    if turn.machine in here.missing:
        return here.missing[turn.machine]
    seen = [fence.fence for fence in seen_of(here.present, plan.project, plan.environment).get(turn.machine, ())]
    if seen and max(seen) >= fleet.fence:
        fleet.fence = names.journal.claim(plan.project, plan.environment, seen)
    checks = checks_of_new(turn)
    if step.package:
        report = await fleet.perform(names.next("survey-put-back"), Survey(trees_of(plan, turn.machine)))
        found = report.facts if isinstance(report.facts, SurveyFacts) else None
        facts = tree_facts(plan, step, turn, found)
        if facts is None:
            return f"it could not be asked what it holds: {report.reason or report.state}"
        if not facts.current_version:
            return f"nothing that was deployed is current under {turn.root}"
        if facts.current_manifest != facts.manifest:
            checks = checks_of_old(turn, facts)
    variables = {**turn.variables, "DEPLOYMENT": names.bracket.owner}

    async def perform(order: VerifyOrder) -> Done:
        return done_by(await fleet.perform(names.next("verify-put-back"), order))

    done = await make_checks(perform, plan, checks, turn.root, variables)
    return "" if done.ok else done.reason or done.how


async def _leave(fleet: Fleet, machine: str) -> None:
    """The agent may forget what it was asked: nothing follows."""
    with suppress(UnreachableError, TimeoutError):
        async with asyncio.timeout(LEAVE_SECONDS):
            await fleet.acknowledge(machine, ends=True)
