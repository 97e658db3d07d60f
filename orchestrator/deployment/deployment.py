"""A deployment, from its first step to its last: pre-acquisition, acquisition, steps.

Whatever happens on the way, what pre-acquisition opened is undone, the end is written down, and every bracket that is
still open is listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from agent.orders.orders import SurveyFacts
from orchestrator.deployment.acquisition import acquire
from orchestrator.deployment.context import SERVER, DeploymentFailedError, Engine, together, undo_step
from orchestrator.deployment.notify import target_of
from orchestrator.deployment.steps import Outcome, run_steps
from orchestrator.files.values import NotificationKind
from orchestrator.fleet.presence import Muster
from orchestrator.journal.events import (
    BracketAdopted,
    DecisionTaken,
    Ended,
    FinalState,
    Note,
    Notified,
    PreAcquireEnded,
    PreAcquireStarted,
    Refused,
)
from orchestrator.journal.views import OpenBracket
from orchestrator.plan.plan import PreAcquire
from relay.errors import RefusedError, StoreError, UnreachableError, WaystationError

DECISIONS_SECONDS = 0.5
"""Between two looks at what people decided."""
ACKNOWLEDGE_SECONDS = 10.0
"""For a relay to take an agent's acknowledgement at the end. An agent that gets none keeps its results for longer."""
STOP_SECONDS = 5.0
"""For a relay to take the order that stops a pull."""
CANCEL = "cancel"
"""Kind of the decision that ends a deployment: nothing new starts, what is in flight comes to its end."""


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended."""

    state: FinalState
    reason: str = ""
    left: tuple[str, ...] = ()
    """Machines whose turn failed, within what their step allows."""
    out: tuple[str, ...] = ()
    """Machines that are left out of their rotation."""


async def roll_out(engine: Engine, adopted: Iterable[OpenBracket] = (), *, adopt: bool = False) -> Result:
    """Run the whole deployment. Errors of the road and refusals become the reason of its end.

    Args:
        engine: all that it works with; its deployment has begun in the journal.
        adopted: open brackets of earlier deployments that this one answers for.
        adopt: go on although agents know of another orchestrator's unfinished deployment.

    Raises:
        StoreError: the journal could not be written: what it could not take did not happen.
    """
    undo = _Undo(engine)
    try:
        return await _to_the_end(engine, undo, adopted, adopt=adopt)
    except asyncio.CancelledError:
        _tell_what_is_open(engine, undo)
        raise


async def _to_the_end(engine: Engine, undo: _Undo, adopted: Iterable[OpenBracket], *, adopt: bool) -> Result:
    watching = asyncio.create_task(_watch(engine))
    deadline = _deadline(engine)
    try:
        result = await _stages(engine, undo, adopted, adopt=adopt)
    finally:
        watching.cancel()
        if deadline is not None:
            deadline.cancel()
    failed = await undo.everything()
    if failed and result.state == "succeeded":
        result = Result("failed", f"all steps are done, but this could not be undone: {', '.join(failed)}")
    await _close(engine, result)
    return result


async def _stages(engine: Engine, undo: _Undo, adopted: Iterable[OpenBracket], *, adopt: bool) -> Result:
    try:
        await _adopt(engine, adopted)
        await _pre_acquire(engine, undo)
        await _meet(engine, adopt=adopt)
        facts = await _acquire_or_stop(engine)
        await undo.those_until_acquired()
        outcome = await run_steps(engine, facts, partial(_obey, engine))
    except WaystationError as error:
        outcome = Outcome(failed=[] if str(error) == engine.stopping else [str(error)])
    reason = "; ".join([*([engine.stopping] if engine.stopping else []), *outcome.failed])
    state: FinalState = "cancelled" if engine.cancelled else "failed" if reason else "succeeded"
    return Result(state, reason, tuple(outcome.left), tuple(sorted(engine.out)))


# --- what people and the clock decide


async def _watch(engine: Engine) -> None:
    """Take up decisions as they are made."""
    while True:
        await _obey(engine)
        await asyncio.sleep(DECISIONS_SECONDS)


async def _obey(engine: Engine) -> None:
    """Take up what was decided by now: decisions are rows, whoever wrote them."""
    pending = await asyncio.to_thread(engine.journal.pending_decisions, None, engine.deployment)
    for decision in pending:
        # Obeyed, then taken: who finds none that waits knows that all are obeyed.
        if decision.kind == CANCEL:
            engine.cancel(f"cancelled by {decision.operator}")
        if await asyncio.to_thread(engine.journal.take_decision, decision.number, engine.deployment):
            engine.tell(DecisionTaken(decision.number, decision.operator, decision.kind, decision.data))


def _deadline(engine: Engine) -> asyncio.TimerHandle | None:
    seconds = engine.plan.deadline
    if not seconds:
        return None
    why = f"the deadline of {seconds:.0f} s is over"
    return asyncio.get_running_loop().call_later(seconds, engine.stop, why)


# --- before the first byte


async def _adopt(engine: Engine, brackets: Iterable[OpenBracket]) -> None:
    """Brackets that this deployment will close: their machines are out, and go first."""
    machines = {machine.name for machine in engine.plan.machines}
    for bracket in brackets:
        if bracket.machine in machines:
            await engine.note(BracketAdopted(bracket.machine, bracket.rotation, bracket.owner))
        engine.out.add(bracket.machine)


async def _pre_acquire(engine: Engine, undo: _Undo) -> None:
    """One after another. An undo is owed from the moment that its step may have begun."""
    for step in engine.plan.pre_acquire:
        await _obey(engine)
        if engine.stopping:
            raise DeploymentFailedError(engine.stopping)
        await engine.note(PreAcquireStarted(step.run.name, undo_due=step.undo is not None))
        undo.owe(step)
        result = await engine.run_here(step.run, 0, SERVER, f"pre-{step.run.name}", {})
        await engine.note(
            PreAcquireEnded(step.run.name, ok=result.ok, undo_due=step.undo is not None, reason=result.reason)
        )
        if not result.ok:
            raise DeploymentFailedError(f"{step.run.name} failed before a byte moved: {result.reason}")


@dataclass
class _Undo:
    """What pre-acquisition opened, and is to be closed in the opposite order."""

    engine: Engine
    owed: list[PreAcquire] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def owe(self, step: PreAcquire) -> None:
        if step.undo is not None:
            self.owed.append(step)

    async def those_until_acquired(self) -> None:
        await self._undo([step for step in self.owed if step.until == "acquired"])

    async def everything(self) -> list[str]:
        """Undo all that is left; the names of those that failed."""
        await self._undo(list(self.owed))
        return self.failed

    async def _undo(self, steps: Sequence[PreAcquire]) -> None:
        for step in reversed(steps):
            self.owed.remove(step)
            if not await undo_step(step, self.engine.deployment, self.engine.runs, self.engine.note):
                self.failed.append(step.run.name)


async def _meet(engine: Engine, *, adopt: bool) -> None:
    """Everybody must be there, with a clock that is right, and know of no other orchestrator that is at work.

    Raises:
        DeploymentFailedError: somebody is not.
        RefusedError: another orchestrator's deployment is not over.
    """
    here = await engine.fleet.presences()
    if here.missing:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(here.missing.items()))
        raise DeploymentFailedError(f"not every machine can be given orders: {reasons}")
    foreign = _other_orchestrators(engine, here)
    if foreign and not adopt:
        raise RefusedError(
            f"another orchestrator has not finished here: {'; '.join(foreign)}",
            hint="End that deployment first, or take over with --adopt: it can order nothing any more then",
        )
    engine.refused_before = {name: presence.refused for name, presence in here.present.items()}
    await _claim(engine, here)


def _other_orchestrators(engine: Engine, here: Muster) -> list[str]:
    seen = {name: presence.fences.get(engine.plan.environment) for name, presence in here.present.items()}
    return [
        f"{name} knows deployment {fence.deployment}"
        for name, fence in sorted(seen.items())
        if fence is not None and fence.open and fence.journal != engine.journal.id
    ]


async def _claim(engine: Engine, here: Muster) -> None:
    """A fence above all that any agent has seen: from the first order on, whoever led before is shut out."""
    environment = engine.plan.environment
    fences = [presence.fences.get(environment) for presence in here.present.values()]
    seen = [fence.fence for fence in fences if fence is not None]
    fence = engine.fence
    if seen and max(seen) >= fence:
        fence = await asyncio.to_thread(engine.journal.claim, environment, seen)
        note = Note(f"agents have seen fence {max(seen)}: this deployment goes on with {fence}")
        await asyncio.to_thread(engine.journal.take_up, engine.deployment, fence, engine.operator, note)
        engine.tell(note)
    engine.fence = fence
    engine.fleet.claim(fence)
    engine.has_met = True


# --- acquisition


async def _acquire_or_stop(engine: Engine) -> Mapping[str, SurveyFacts]:
    """The barrier. A cancel ends it at once: nothing is in flight but bytes, and what came is kept."""
    acquiring = asyncio.create_task(acquire(engine))
    stopped = asyncio.create_task(engine.stopped.wait())
    try:
        await asyncio.wait({acquiring, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if acquiring.done():
            return acquiring.result()
        raise DeploymentFailedError(engine.stopping)
    finally:
        stopped.cancel()
        if not acquiring.done():
            acquiring.cancel()
            with suppress(asyncio.CancelledError, WaystationError):
                await acquiring
        if acquiring.cancelled() or acquiring.exception() is not None:
            await _stop_pulls(engine)


async def _stop_pulls(engine: Engine) -> None:
    """Nobody waits for them any more. Where no relay takes that soon, they end by themselves at their own deadline."""

    async def stop(machine: str) -> None:
        with suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await engine.fleet.stop(engine.fleet.operation(machine, 0, "acquire", 1))

    await together([stop(machine.name) for machine in engine.plan.machines])


# --- the end


def _tell_what_is_open(engine: Engine, undo: _Undo) -> None:
    """Somebody left in the middle. All of it stands in the journal; they should hear of it now."""
    if engine.out:
        engine.tell(Note(f"still out of their rotation: {', '.join(sorted(engine.out))}"))
    if undo.owed:
        engine.tell(Note(f"not undone: {', '.join(step.run.name for step in undo.owed)}"))


async def _close(engine: Engine, result: Result) -> None:
    """Let agents forget what is on disk here, tell who wanted to hear of it, and write the end down."""
    if engine.has_met:
        await _note_refusals(engine)
        await engine.fleet.logs_arrived()
        await together([_acknowledge(engine, machine.name) for machine in engine.plan.machines])
    if result.out:
        await _notify(engine, "rotation_open", result)
    await _notify(engine, "finished" if result.state == "succeeded" else "failed", result)
    ended = Ended(result.state, result.reason)
    await asyncio.to_thread(engine.journal.set_state, engine.deployment, result.state, result.reason, ended)
    engine.tell(ended)


async def _note_refusals(engine: Engine) -> None:
    """Letters that agents refused meanwhile and that were not ours: somebody else can write into the mail."""
    here = await engine.fleet.presences()
    for name, presence in here.present.items():
        for text in presence.refused:
            if text not in engine.refused_before.get(name, ()) and f" {engine.deployment}/" not in text:
                await engine.note(Refused(name, text))


async def _acknowledge(engine: Engine, machine: str) -> None:
    try:
        async with asyncio.timeout(ACKNOWLEDGE_SECONDS):
            await engine.fleet.acknowledge(machine, ends=True)
    except StoreError:
        raise
    except (UnreachableError, TimeoutError) as error:
        why = getattr(error, "message", f"no relay took the acknowledgement within {ACKNOWLEDGE_SECONDS:.0f} s")
        await engine.note(Note(f"it keeps its results for now: {why}", machine))


async def _notify(engine: Engine, event: NotificationKind, result: Result) -> None:
    told = {
        "event": event,
        "project": engine.plan.project,
        "label": engine.plan.label,
        "environment": engine.plan.environment,
        "deployment": engine.deployment,
        "state": result.state,
        "reason": result.reason,
        "out": list(result.out),
    }
    if any(event in plan.on for plan in engine.plan.notify):
        targets = ", ".join(target_of(plan) for plan in engine.plan.notify if event in plan.on)
        errors = await engine.notify(told)
        await engine.note(*(Notified(event, targets, error) for error in errors or [""]))
