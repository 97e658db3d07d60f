"""The steps of a deployment, in the file's order: those on the server, and those over machines, parallel or rolling.

What comes next is decided by `orchestrator/rolling/rolling.py` (which machine) and `orchestrator/rolling/turn.py` (what on it); here
stands what then happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.orders.operation_id import SERVER
from agent.orders.orders import SurveyFacts
from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.server_runs import PROBE
from orchestrator.deployment.turns import MachineTurnRunner
from orchestrator.journal.events import GatePassed, StepEnded, StepStarted, TurnEnded
from orchestrator.plan.plan import AskStep, MachineStep, PlannedAsk, PlannedGate, PlannedStep, ServerRun, ServerStep
from orchestrator.rolling import rolling
from orchestrator.rolling.rolling import Roll, RotationState
from orchestrator.rolling.turn import TurnOutcome
from relay.support.together import together

STUCK_SECONDS = 60.0
"""How long a roll that nothing in flight can move on looks at its probes again, before it is given up."""
_LOOK_AGAIN = 1.0
UNSURE: Final = 2
"""So many answers in a row that a probe cannot tell, and nothing more starts until a person says so."""


@dataclass(slots=True)
class StepsOutcome:
    """How the steps went.

    Attributes:
        failed: why steps failed, in order.
        left: machines whose turn failed within what their step allows, and those that a person left out.
    """

    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def take(self, roll: Roll) -> None:
        """The machines that a step left."""
        self.left += [machine for machine in (*roll.failed, *roll.excluded) if machine not in self.left]


async def run_steps(context: DeploymentContext, facts: Mapping[str, SurveyFacts]) -> StepsOutcome:
    """All steps, as their `when` says. A step that fails keeps those for success from starting."""
    outcome = StepsOutcome()
    for step in context.plan.steps:
        if (over := context.history.steps.get(step.number)) is not None:
            _recall(context, step, over, outcome)
            continue
        skip = ""
        if not _is_under_way(context, step):
            # Right before anything starts, so that nothing starts after a cancel, or in a pause.
            await context.desk.free()
            skip = _why_skipped(step, outcome, context.stop.reason)
        if skip:
            await context.recorder.record(StepEnded(step.number, ok=True, skipped=True, reason=skip, name=step.name))
            continue
        if step.number not in context.history.begun_steps:
            await context.recorder.record(StepStarted(step.number, step.name))
        why = await _run(context, step, facts, outcome)
        await context.recorder.record(StepEnded(step.number, ok=not why, reason=why, name=step.name))
        # A step that was only stopped has nothing to add to why everything stops.
        if why and why != context.stop.reason:
            outcome.failed.append(_failed(step, why))
    return outcome


async def _run(
    context: DeploymentContext, step: PlannedStep, facts: Mapping[str, SurveyFacts], outcome: StepsOutcome
) -> str:
    """Why the step failed; empty where it did not."""
    match step:
        case ServerStep():
            return await _on_server(context, step)
        case AskStep():
            return await _ask(context, step.number, step.name, step.ask)
        case MachineStep():
            return await _on_machines(context, step, facts, outcome)


def _is_under_way(context: DeploymentContext, step: PlannedStep) -> bool:
    """Whether an earlier process left something of it in the middle: that comes to its end, whatever was decided since."""
    match step:
        case ServerStep():
            return context.history.server_run(step.number, SERVER, step.run.name) > 0
        case AskStep():
            return False
        case MachineStep():
            return bool(context.history.roll(step).in_flight)


def _recall(context: DeploymentContext, step: PlannedStep, over: StepEnded, outcome: StepsOutcome) -> None:
    """What became of a step before this process."""
    if not over.ok:
        outcome.failed.append(_failed(step, over.reason))
    elif isinstance(step, MachineStep) and not over.skipped:
        outcome.take(context.history.roll(step))


def _failed(step: PlannedStep, why: str) -> str:
    return f"step {step.number} ({step.name}): {why}"


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
    operation = context.operation(step.number, SERVER, step.run.name)
    begun = context.history.server_run(step.number, SERVER, operation.action)
    result = await context.runs.run(step.run, operation, extra, begun=begun)
    while result.state == "unknown":
        # It began, and nobody saw its end: whether it did its work is for a person to find out.
        choices = ("retry", "fail") if step.required else ("retry", "exclude", "fail")
        said = await context.desk.decide(SERVER, step.number, result.reason, choices)
        if said is None or said.what == "fail":
            break
        if said.what == "exclude":
            return ""
        result = await context.runs.run(step.run, operation, extra)
    return "" if result.ok else result.reason


# --- people


async def _ask(context: DeploymentContext, step: int, name: str, ask: PlannedAsk, text: str = "") -> str:
    """Why people said no; empty where they agreed."""
    return await context.desk.ask(step, name, ask, text or ask.text)


async def _gate(context: DeploymentContext, step: MachineStep, phase: int, gate: PlannedGate, roll: Roll) -> str:
    """Why the gate is not passed; empty where it is."""
    machines = [context.plan.machine(name) for name in roll.machines_of(phase)]
    if gate.check is not None:
        operation = context.operation(step.number, SERVER, f"gate-{phase + 1}")
        begun = context.history.server_run(step.number, SERVER, operation.action)
        extra = {"MACHINES": " ".join(machine.name for machine in machines)}
        result = await context.runs.run(gate.check, operation, extra, begun=begun)
        if not result.ok:
            return f"its check says no: {result.reason}"
    if gate.ask is not None:
        text = gate.ask.text.replace("${machine.name}", ", ".join(machine.name for machine in machines))
        text = text.replace("${machine.address}", ", ".join(machine.address for machine in machines))
        return await _ask(context, step.number, gate.name, gate.ask, text)
    return ""


# --- over machines


async def _on_machines(
    context: DeploymentContext, step: MachineStep, facts: Mapping[str, SurveyFacts], outcome: StepsOutcome
) -> str:
    """Why the step failed; empty where it did not."""
    roll = await RollingStep(context, step, facts).run()
    if roll.stopped:
        return roll.stopped
    outcome.take(roll)
    return ""


class RollingStep:
    """One step over its machines."""

    def __init__(self, context: DeploymentContext, step: MachineStep, facts: Mapping[str, SurveyFacts]) -> None:
        self._context = context
        self._step = step
        self._turns = {each.machine: MachineTurnRunner(context, step, each, facts) for each in step.turns}
        self._running: dict[asyncio.Task[TurnOutcome], str] = {}
        self._unsure: dict[str, int] = {}
        """How often in a row the probe could not tell of a machine."""

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
        roll = self._context.history.roll(self._step)
        for machine in roll.started:
            if machine in roll.in_flight:
                self._start(machine)
        roll = await self._pass_current(roll)
        stuck_since: float | None = None
        clock = asyncio.get_running_loop().time
        while not roll.is_over:
            if (phase := roll.gate_due) is not None:
                roll = await self._pass_gate(roll, phase)
                continue
            service = await self._service(roll)
            await self._context.desk.obey()
            if self._context.stop.reason:
                roll = rolling.stop(roll, self._context.stop.reason)
            if self._context.desk.is_paused and not roll.stopped:
                roll = await self._in_pause(roll)
                continue
            for machine in rolling.next_starts(roll, service):
                roll = rolling.started(roll, machine)
                self._start(machine)
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

    def _start(self, machine: str) -> None:
        self._running[asyncio.create_task(self._turns[machine].run())] = machine

    async def _in_pause(self, roll: Roll) -> Roll:
        """Nothing new starts; what is in flight comes to its end."""
        if self._running:
            return await self._wait(roll)
        await self._context.desk.free()
        self._unsure.clear()
        return roll

    async def _pass_gate(self, roll: Roll, phase: int) -> Roll:
        gate = self._step.phases[phase].gate
        assert gate is not None  # noqa: S101 - a gate that is due is there
        why = await _gate(self._context, self._step, phase, gate, roll)
        if why:
            return rolling.stop(roll, self._context.stop.reason or f"gate {gate.name!r}: {why}")
        await self._context.recorder.record(GatePassed(self._step.number, phase + 1, gate.name))
        return rolling.passed_gate(roll)

    async def _pass_current(self, roll: Roll) -> Roll:
        """Machines on which all of this was done before have no turn."""
        for machine, one in self._turns.items():
            if one.shape.current and machine in roll.waiting:
                await self._context.recorder.record(TurnEnded(machine, self._step.number, "already_current"))
                roll = rolling.passed(roll, machine)
        return roll

    async def _wait(self, roll: Roll) -> Roll:
        done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            machine = self._running.pop(task)
            result = task.result()
            roll = rolling.ended(
                roll,
                machine,
                failure=result.failure,
                stop_roll=result.stop_roll,
                is_excluded=result.outcome == "excluded",
            )
        return roll

    async def _service(self, roll: Roll) -> RotationState:
        """Which machines are in service now: as the rotation's probe says, or as our own brackets know."""
        # Whoever has no part and is not left out either counts where it is in service.
        beside = [turn.machine for turn in self._step.beside if turn.machine not in self._context.plan.excluded]
        machines = [machine for machine in (*roll.machines, *beside) if machine not in roll.in_flight]
        rotation = self._step.rotation
        if rotation is None or rotation.probe is None or not roll.waiting or roll.stopped:
            return RotationState.by_brackets((*roll.machines, *beside), self._context.out)
        probe = rotation.probe
        answers = await together([self._probe(probe, machine) for machine in machines])
        status = dict(zip(machines, answers, strict=True))
        await self._pause_where_unsure(rotation.name, status)
        return RotationState(
            inside=frozenset(machine for machine, answer in status.items() if answer == 0),
            out=frozenset(machine for machine, answer in status.items() if answer == 1),
        )

    async def _pause_where_unsure(self, rotation: str, status: Mapping[str, int | None]) -> None:
        """A balancer that cannot be asked is no balancer that says "out": a person looks before anything more starts."""
        self._unsure = {m: self._unsure.get(m, 0) + 1 for m, answer in status.items() if answer not in {0, 1}}
        unsure = sorted(machine for machine, times in self._unsure.items() if times >= UNSURE)
        if unsure and not self._context.desk.is_paused:
            await self._context.desk.pause(
                f"the probe of {rotation} cannot tell whether {', '.join(unsure)} is in service"
            )

    async def _probe(self, probe: ServerRun, machine: str) -> int | None:
        operation = self._context.operation(self._step.number, machine, PROBE)
        turns = (*self._step.turns, *self._step.beside)
        variables = next(turn.variables for turn in turns if turn.machine == machine)
        result = await self._context.runs.run(probe, operation, variables)
        return result.exit_status
