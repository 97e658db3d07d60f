"""The steps of a deployment, in the file's order: those on the server, and those over machines, parallel or rolling.

What comes next is decided by `orchestrator/rolling/rolling.py` (which machine) and `orchestrator/rolling/turn.py` (what on it); here
stands what then happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from agent.checks.run_checks import run_checks
from agent.orders.operation_id import SERVER, OperationId
from agent.orders.orders import (
    CommandCheck,
    ControlService,
    HttpCheck,
    OpenAction,
    Report,
    RunScript,
    Settle,
    SurveyFacts,
    Switch,
    TcpCheck,
    TimedCheck,
    TreeFacts,
    Verify,
)
from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.decisions import obey
from orchestrator.deployment.server_runs import PROBE, RunResult
from orchestrator.journal.events import (
    BracketClosed,
    BracketOpened,
    Note,
    StepEnded,
    StepStarted,
    TurnEnded,
    TurnStarted,
)
from orchestrator.plan.plan import (
    OLD_VERSION,
    ApplyAction,
    AskStep,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedCheck,
    PlannedStep,
    ScriptAction,
    ServerRun,
    ServerStep,
    ServiceAction,
    SwitchAction,
)
from orchestrator.rolling import rolling, turn
from orchestrator.rolling.rolling import Roll, RotationState
from orchestrator.rolling.turn import Act, After, Before, Done, End, TurnOutcome, VerifyOld
from relay.errors import StoreError, WaystationError
from relay.support.together import together, told_if_slow

if TYPE_CHECKING:
    from orchestrator.fleet.fleet import Fleet

STUCK_SECONDS = 60.0
"""How long a roll that nothing in flight can move on looks at its probes again, before it is given up."""
_LOOK_AGAIN = 1.0
SILENCE_SECONDS = 15.0
"""After which a turn says what it is at."""


@dataclass(slots=True)
class StepsOutcome:
    """How the steps went.

    Attributes:
        failed: why steps failed, in order.
        left: machines whose turn failed within what their step allows.
    """

    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


async def run_steps(context: DeploymentContext, facts: Mapping[str, SurveyFacts]) -> StepsOutcome:
    """All steps, as their `when` says. A step that fails keeps those for success from starting."""
    outcome = StepsOutcome()
    for step in context.plan.steps:
        # Right before anything starts, so that nothing starts after a cancel.
        await obey(context.recorder, context.stop)
        skip = _why_skipped(step, outcome, context.stop.reason)
        if skip:
            await context.recorder.record(StepEnded(step.number, ok=True, skipped=True, reason=skip, name=step.name))
            continue
        await context.recorder.record(StepStarted(step.number, step.name))
        match step:
            case ServerStep():
                why = await _on_server(context, step)
            case AskStep():
                raise NotImplementedError
            case MachineStep():
                why = await _on_machines(context, step, facts, outcome)
        await context.recorder.record(StepEnded(step.number, ok=not why, reason=why, name=step.name))
        # A step that was only stopped has nothing to add to why everything stops.
        if why and why != context.stop.reason:
            outcome.failed.append(f"step {step.number} ({step.name}): {why}")
    return outcome


def _why_skipped(step: PlannedStep, outcome: StepsOutcome, stopping: str) -> str:
    if stopping:
        return stopping
    if outcome.failed and step.when == "success":
        return "a step before it failed"
    if not outcome.failed and step.when == "failure":
        return "no step before it failed"
    return ""


# --- on the server


async def _on_server(context: DeploymentContext, step: ServerStep) -> str:
    extra = {"PACKAGE_DIR": await context.trees.build(context.plan.packages[step.package])} if step.package else {}
    result = await context.runs.run(step.run, context.operation(step.number, SERVER, step.run.name), extra)
    return "" if result.ok else result.reason


# --- over machines


async def _on_machines(
    context: DeploymentContext, step: MachineStep, facts: Mapping[str, SurveyFacts], outcome: StepsOutcome
) -> str:
    """Why the step failed; empty where it did not."""
    roll = await RollingStep(context, step, facts).run()
    if roll.stopped:
        return roll.stopped
    outcome.left += roll.failed
    return ""


class RollingStep:
    """One step over its machines."""

    def __init__(self, context: DeploymentContext, step: MachineStep, facts: Mapping[str, SurveyFacts]) -> None:
        self._context = context
        self._step = step
        self._turns = {each.machine: MachineTurnRunner(context, step, each, facts) for each in step.turns}
        self._running: dict[asyncio.Task[TurnOutcome], str] = {}

    async def run(self) -> Roll:
        """Start turns as the window allows until all are through.

        No turn is left behind, whatever ends the step: each comes to its own end, or to where it was left.
        """
        try:
            return await self._roll()
        except asyncio.CancelledError:
            # What runs runs on, and what is open stays listed as open.
            for task in self._running:
                task.cancel()
            raise
        finally:
            if self._running:
                await asyncio.wait(self._running)

    async def _roll(self) -> Roll:
        roll = await self._pass_current(rolling.begin(self._step))
        stuck_since: float | None = None
        clock = asyncio.get_running_loop().time
        while not roll.is_over:
            service = await self._service(roll)
            await obey(self._context.recorder, self._context.stop)
            if self._context.stop.reason:
                roll = rolling.stop(roll, self._context.stop.reason)
            for machine in rolling.next_starts(roll, service):
                roll = rolling.started(roll, machine)
                self._running[asyncio.create_task(self._turns[machine].run())] = machine
            if self._running:
                stuck_since = None
                roll = await self._wait(roll)
            elif not roll.is_over:
                why = rolling.why_waiting(roll, service)
                if stuck_since is None and why:
                    self._context.recorder.say(f"step {self._step.number} ({self._step.name}) waits: {why}")
                stuck_since = stuck_since or clock()
                if why and clock() - stuck_since > STUCK_SECONDS:
                    roll = rolling.stop(roll, why)
                await asyncio.sleep(_LOOK_AGAIN)
        return roll

    async def _pass_current(self, roll: Roll) -> Roll:
        """Machines on which all of this was done before have no turn."""
        for machine, one in self._turns.items():
            if one.shape.current:
                await self._context.recorder.record(TurnEnded(machine, self._step.number, "already_current"))
                roll = rolling.passed(roll, machine)
        return roll

    async def _wait(self, roll: Roll) -> Roll:
        done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            machine = self._running.pop(task)
            result = task.result()
            roll = rolling.ended(roll, machine, failure=result.failure, stop_roll=result.stop_roll)
        return roll

    async def _service(self, roll: Roll) -> RotationState:
        """Which machines are in service now: as the rotation's probe says, or as our own brackets know."""
        machines = [machine for machine in roll.machines if machine not in roll.in_flight]
        rotation = self._step.rotation
        if rotation is None or rotation.probe is None or not roll.waiting or roll.stopped:
            return RotationState.by_brackets(roll.machines, self._context.out)
        probe = rotation.probe
        answers = await together([self._probe(probe, machine) for machine in machines])
        status = dict(zip(machines, answers, strict=True))
        return RotationState(
            inside=frozenset(machine for machine, answer in status.items() if answer == 0),
            out=frozenset(machine for machine, answer in status.items() if answer == 1),
        )

    async def _probe(self, probe: ServerRun, machine: str) -> int | None:
        operation = self._context.operation(self._step.number, machine, PROBE)
        result = await self._context.runs.run(probe, operation, self._turns[machine].variables)
        return result.exit_status


class MachineTurnRunner:
    """What one step does on one machine."""

    def __init__(
        self, context: DeploymentContext, step: MachineStep, planned: MachineTurn, facts: Mapping[str, SurveyFacts]
    ) -> None:
        self._context = context
        self._step = step
        self._turn = planned
        self._facts = tree_facts(context.plan, step, planned, facts.get(planned.machine))
        is_out, is_forced = planned.machine in context.out, context.plan.force
        self.shape = turn.shape_of(step, planned, self._facts, is_out=is_out, is_forced=is_forced)
        self.variables = {**planned.variables, "DEPLOYMENT": context.recorder.deployment}

    async def run(self) -> TurnOutcome:
        machine, number = self._turn.machine, self._step.number
        await self._context.recorder.record(TurnStarted(machine, number))
        state = turn.begin(self.shape)
        while not isinstance(do := state.do, End):
            words = f"{machine}: still at {self._words_of(do)}"
            with told_if_slow(self._context.recorder.say, words, SILENCE_SECONDS):
                done = await self._do(do)
            state = turn.did(state, done)
        result = do.result
        await self._context.recorder.record(
            TurnEnded(
                machine,
                number,
                result.outcome,
                failure=result.failure,
                stop_roll=result.stop_roll,
                bracket_open=result.bracket_open,
                reason=result.reason,
            )
        )
        return result

    def _words_of(self, do: turn.Do) -> str:
        return self._turn.actions[do.index].name if isinstance(do, Act) else type(do).__name__.lower()

    async def _do(self, do: turn.Do) -> Done:
        try:
            match do:
                case Before():
                    return await self._before()
                case Act(index):
                    return await self._act(index)
                case turn.Verify():
                    return await self._verify("verify", checks_of_new(self._turn))
                case VerifyOld():
                    return await self._verify("verify-old", checks_of_old(self._turn, self._facts))
                case turn.Settle():
                    return await self._settle()
                case After(outcome):
                    return await self._after(outcome)
                case End():
                    raise AssertionError("the turn has ended")
        except StoreError:
            # What the journal could not take must not happen.
            raise
        except WaystationError as error:
            return Done("lost", str(error))

    # --- the bracket

    async def _before(self) -> Done:
        rotation = self._step.rotation
        assert rotation is not None  # noqa: S101 - only such a step has a bracket
        machine = self._turn.machine
        await self._context.recorder.record(BracketOpened(machine, rotation.name, self._step.number))
        self._context.out.add(machine)
        result = await self._here(rotation.before, "before", {})
        if result.ok:
            self._context.recorder.tell(Note(f"out of {rotation.name}", machine))
        return _done(result)

    async def _after(self, outcome: str) -> Done:
        rotation = self._step.rotation
        assert rotation is not None  # noqa: S101 - only such a step has a bracket
        result = await self._here(rotation.after, "after", {"OUTCOME": outcome})
        if result.ok:
            await self._context.recorder.record(BracketClosed(self._turn.machine, rotation.name, outcome))
            self._context.out.discard(self._turn.machine)
        return _done(result)

    async def _here(self, what: ServerRun, name: str, extra: Mapping[str, str]) -> RunResult:
        return await self._context.runs.run(what, self._operation(name), {**self.variables, **extra})

    # --- on the machine

    async def _act(self, index: int) -> Done:
        action = self._turn.actions[index]
        attempts, delay = (1, 0.0) if isinstance(action, SwitchAction) else (action.attempts, action.delay)
        name = f"{index + 1}-{action.name}"
        for attempt in range(1, attempts + 1):
            operation = self._operation(name, attempt)
            report = await self._context.fleet.perform(operation, self._order(action, operation))
            again = report.state == "failed" or (report.state == "unknown" and _may_repeat(action))
            if not again or attempt == attempts:
                return _done_by(report)
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def _operation(self, name: str, attempt: int = 1) -> OperationId:
        return self._context.operation(self._step.number, self._turn.machine, name, attempt)

    def _order(self, action: ApplyAction, operation: OperationId) -> OpenAction:
        match action:
            case SwitchAction():
                return Switch(self._turn.root, self._context.plan.packages[self._step.package].manifest)
            case ServiceAction():
                return ControlService(action.service, action.action, action.timeout, action.idempotent)
            case ScriptAction():
                scripts = self._context.plan.scripts
                assert scripts is not None  # noqa: S101 - made with the release wherever a machine runs a script
                # Only this machine can open the secrets, and only in this operation.
                sealing = self._context.fleet.presence(self._turn.machine).sealing
                return RunScript(
                    package=scripts.manifest,
                    path=action.path,
                    variables={**self.variables, **action.variables, "ATTEMPT": str(operation.attempt)},
                    secrets=self._context.secrets.sealed(action.secrets, sealing, str(operation)),
                    root=self._turn.root,
                    timeout=action.timeout,
                    idempotent=action.idempotent,
                    stall=action.stall,
                )

    async def _settle(self) -> Done:
        manifest = self._context.plan.packages[self._step.package].manifest
        what = Settle(self._turn.root, manifest, self._turn.fingerprint, self._step.keep)
        return _done_by(await self._context.fleet.perform(self._operation("settle"), what))

    async def _verify(self, name: str, checks: Checks) -> Done:
        plan = self._context.plan
        return await make_checks(
            self._context.fleet, plan, self._operation(name), checks, self._turn.root, self.variables
        )


# --- the checks of one machine


Checks = Sequence[tuple[PlannedCheck, TimedCheck]]
"""As they were planned, and what is asked now."""


def checks_of_new(planned: MachineTurn) -> Checks:
    """Is the version of this release well?"""
    return [(each, each.check) for each in planned.verify]


def checks_of_old(planned: MachineTurn, facts: TreeFacts | None) -> Checks:
    """Is the version well that `facts` found there?"""
    return [(each, _for_old(each.for_old, facts)) for each in planned.verify]


async def make_checks(
    fleet: Fleet, plan: Plan, operation: OperationId, checks: Checks, root: str, variables: Mapping[str, str]
) -> Done:
    """Those of the machine, as this operation, and those of the server at once; the first that fails is the reason."""
    here = [check for planned, check in checks if planned.on_server]
    there = tuple(check for planned, check in checks if not planned.on_server)
    scripts = plan.scripts.manifest if plan.scripts else ""

    async def ask() -> Done:
        signed = tuple(_signed(timed, scripts) for timed in there)
        return _done_by(await fleet.perform(operation, Verify(signed, root, dict(variables))))

    results = await together(([ask()] if there else []) + ([_check_here(here)] if here else []))
    return next((done for done in results if not done.ok), turn.DONE)


def _signed(timed: TimedCheck, scripts: str) -> TimedCheck:
    """A machine's command names the package that its script is signed in."""
    if not isinstance(timed.check, CommandCheck):
        return timed
    return replace(timed, check=replace(timed.check, package=scripts))


async def _check_here(checks: Sequence[TimedCheck]) -> Done:
    result = await run_checks(checks)
    return turn.DONE if result.ok else Done("failed", "; ".join(result.texts))


def tree_facts(plan: Plan, step: MachineStep, planned: MachineTurn, found: SurveyFacts | None) -> TreeFacts | None:
    """What was found under this turn's root; None where nothing is deployed, or the machine was not asked."""
    if not step.package or found is None:
        return None
    manifest = plan.packages[step.package].manifest
    return next((tree for tree in found.trees if tree.root == planned.root and tree.manifest == manifest), None)


def _for_old(check: TimedCheck, facts: TreeFacts | None) -> TimedCheck:
    """The check with the version that the machine had before."""
    version = facts.current_version if facts is not None else ""

    def filled(text: str) -> str:
        return text.replace(OLD_VERSION, version)

    what = check.check
    match what:
        case HttpCheck():
            expect, contains = (None if text is None else filled(text) for text in (what.expect, what.contains))
            what = replace(what, url=filled(what.url), expect=expect, contains=contains)
        case TcpCheck():
            what = replace(what, host=filled(what.host))
        case CommandCheck():
            what = replace(what, argv=tuple(map(filled, what.argv)))
    return replace(check, check=what)


def _may_repeat(action: ApplyAction) -> bool:
    return not isinstance(action, SwitchAction) and action.idempotent


def _done(result: RunResult) -> Done:
    return turn.DONE if result.ok else Done("failed", result.reason)


def _done_by(report: Report) -> Done:
    match report.state:
        case "done":
            return turn.DONE
        case "failed" | "stopped" | "refused" | "unknown":
            return Done(report.state, report.reason)
        case "running":
            return Done("unknown", "its last report says that it runs")
