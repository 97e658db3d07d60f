"""The steps of a deployment, in the file's order: those on the server, and those over machines, parallel or rolling.

What comes next is decided by `orchestrator/rolling/rolling.py` (which machine) and `orchestrator/rolling/turn.py` (what on it); here
stands what then happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from agent.orders.operation_id import SERVER, OperationId
from agent.orders.orders import SurveyFacts
from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.server_runs import PROBE
from orchestrator.deployment.turns import MachineTurnRunner
from orchestrator.journal.events import GatePassed, StepEnded, StepStarted, TurnEnded, TurnStarted
from orchestrator.locks.leases import Claimed, Elsewhere, Lease, Promise, Tenant, claim
from orchestrator.locks.leases import machine as leased
from orchestrator.paths import operator
from orchestrator.plan.plan import AskStep, MachineStep, PlannedAsk, PlannedGate, PlannedStep, ServerRun, ServerStep
from orchestrator.rolling import rolling, shared
from orchestrator.rolling.rolling import Roll, RotationState
from orchestrator.rolling.turn import TurnOutcome
from relay.support.together import together

STUCK_SECONDS = 60.0
"""How long a roll that nothing in flight can move on looks at its probes again, before it is given up."""
_LOOK_AGAIN = 1.0
UNSURE: Final = 2
"""So many answers in a row that a probe cannot tell, and nothing more starts until a person says so."""
HELD_SECONDS = 2.0
"""Between two looks whether a machine is free that another deployment turns, while machines of ours are in flight."""


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


def _is_under_way(context: DeploymentContext, step: PlannedStep) -> bool:
    """An earlier process began what comes to its end in any case, also where nothing new starts any more."""
    match step:
        case ServerStep():
            return bool(context.history.server_run(step.number, _run_of(context, step).action))
        case MachineStep():
            return bool(context.history.roll(step).started)
        case AskStep():
            return False


# --- on the server


def _run_of(context: DeploymentContext, step: ServerStep) -> OperationId:
    return context.operation(step.number, SERVER, step.run.name)


async def _on_server(context: DeploymentContext, step: ServerStep) -> str:
    extra = {"PACKAGE_DIR": await context.trees.build(context.plan.packages[step.package])} if step.package else {}
    operation = _run_of(context, step)
    begun = context.history.server_run(step.number, operation.action)
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
        begun = context.history.server_run(step.number, operation.action)
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
        plan = context.plan
        self._own = shared.Own(plan.project, step.rotation.name if step.rotation else "")
        self._tenant = Tenant(plan.project, plan.environment, plan.label, context.recorder.deployment, operator())

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
                for task in self._running:
                    # What ended the step is raised already; the others' errors are the same, and heard here.
                    _ = task.cancelled() or task.exception()

    async def _roll(self) -> Roll:
        roll = self._context.history.roll(self._step)
        for machine in roll.started:
            if machine in roll.in_flight:
                self._take_up(machine)
        roll = await self._pass_current(roll)
        stuck_since: float | None = None
        told = ""
        clock = asyncio.get_running_loop().time
        while not roll.is_over:
            roll = self._stopped(roll)
            if (phase := roll.gate_due) is not None:
                roll = await self._pass_gate(roll, phase)
                continue
            service = await self._service(roll)
            await self._context.desk.obey()
            roll = self._stopped(roll)
            if self._context.desk.is_paused and not roll.stopped:
                roll = await self._in_pause(roll)
                stuck_since = None
                continue
            if any(task.done() for task in self._running):
                # It ended while the probes were asked; what it came to may let nothing more start.
                roll = await self._wait(roll, None)
                continue
            claimed = await self._claim(roll, service)
            for lease in claimed.leases:
                roll = rolling.started(roll, lease.machine)
                self._start(lease)
            service = shared.seen(roll, service, self._own, claimed.elsewhere)
            if self._running:
                stuck_since = None
                # What others do is not told here: it is looked for.
                roll = await self._wait(roll, HELD_SECONDS if service.held else None)
            elif not roll.is_over:
                why = rolling.why_waiting(roll, service)
                if why and why != told:
                    told = why
                    self._context.recorder.say(f"step {self._step.number} ({self._step.name}) waits: {why}")
                is_stuck = not shared.is_patient(roll, self._own, claimed.elsewhere)
                stuck_since = (stuck_since or clock()) if is_stuck else clock()
                if why and clock() - stuck_since > STUCK_SECONDS:
                    roll = rolling.stop(roll, why)
                await asyncio.sleep(_LOOK_AGAIN)
        return roll

    def _start(self, lease: Lease) -> None:
        turning = asyncio.create_task(self._turns[lease.machine].run())
        # Also where it is cancelled before it begins.
        turning.add_done_callback(partial(_give_back, lease))
        self._running[turning] = lease.machine

    def _take_up(self, machine: str) -> None:
        """A turn that an earlier process began: its lease went with that process."""
        key = self._context.plan.machine(machine).key

        async def run() -> TurnOutcome:
            async with leased(self._context.recorder.journal, self._tenant, machine, key, self._context.recorder.say):
                return await self._turns[machine].run()

        self._running[asyncio.create_task(run())] = machine

    def _stopped(self, roll: Roll) -> Roll:
        return rolling.stop(roll, self._context.stop.reason) if self._context.stop.reason else roll

    async def _in_pause(self, roll: Roll) -> Roll:
        """Nothing new starts; what is in flight comes to its end."""
        if self._running:
            return await self._wait(roll, None)
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

    async def _claim(self, roll: Roll, service: RotationState) -> Claimed:
        """Decide which machines start, and lease them: as one, against all other deployments of this environment."""
        if rolling.next_start(roll, service) is None:  # what others have can only make them fewer
            return Claimed((), Elsewhere())
        plan, number, machines = self._context.plan, self._step.number, frozenset(roll.machines)
        promise = Promise(self._context.recorder.deployment, self._own.rotation, roll.min_in_service, machines)
        claimed = await claim(
            self._context.recorder.journal,
            self._tenant,
            {machine.name: machine.key for machine in plan.machines if machine.name in machines},
            lambda elsewhere: shared.starts(roll, service, self._own, elsewhere),
            promise=promise if self._own.rotation and roll.min_in_service else None,
            entry=lambda machine: TurnStarted(machine, number),
        )
        self._context.recorder.tell(*(TurnStarted(lease.machine, number) for lease in claimed.leases))
        return claimed

    async def _wait(self, roll: Roll, seconds: float | None) -> Roll:
        done, _ = await asyncio.wait(self._running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
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
            return RotationState.by_brackets((*roll.machines, *beside), self._context.out, self._context.unsure)
        probe = rotation.probe
        answers = await together([self._probe(probe, machine) for machine in machines])
        status = dict(zip(machines, answers, strict=True))
        await self._pause_where_unsure(rotation.name, status)
        # Whatever a probe says: one whose bracket is open may be taken out the next moment.
        mine = self._context.out.intersection(machines)
        return RotationState(
            inside=frozenset(machine for machine, answer in status.items() if answer == 0) - mine,
            out=frozenset(machine for machine, answer in status.items() if answer == 1) | mine,
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


def _give_back(lease: Lease, _turn: object) -> None:
    lease.release()
