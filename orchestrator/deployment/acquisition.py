"""The barrier: every package is verified on every machine's own disk, or no step begins anywhere.

Every machine is asked first what is there and how much room there is; only then does a byte move. Machines
begin to pull as soon as one of their relays has been offered everything, while it still arrives there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from agent.orders.operation_id import OperationId
from agent.orders.orders import Acquire, AcquireFacts, PackageTree, Report, Survey, SurveyFacts
from orchestrator.deployment.context import DeploymentContext, DeploymentFailedError
from orchestrator.deployment.tries import Tries
from orchestrator.fleet.fleet import LostError
from orchestrator.journal.events import Acquired, Barrier, Note, Surveyed
from orchestrator.plan.forecast import counted
from orchestrator.plan.placement import placed_on, short_of_room, to_fetch, trees_of
from orchestrator.plan.plan import Plan, ServerStep
from relay.errors import StoreError, UnreachableError, WaystationError
from relay.support.console import size
from relay.support.together import together

WAITING_SECONDS: Final = 15.0
"""Between two looks at who is waited for; what stays the same from one to the next is told."""


async def acquire(context: DeploymentContext) -> dict[str, SurveyFacts]:
    """Ask, replicate, pull, verify: the whole stage. What each machine said of itself at its beginning, by name.

    A stop ends it at once: nothing is in flight but bytes, and what came is kept.

    Raises:
        DeploymentFailedError: a machine has no room, or could not get everything; nothing was started anywhere.
        RefusedError: the depot says no.
    """
    if context.history.barrier is not None:
        # Before an earlier process of this deployment died. A tree that was damaged since then is found by its switch.
        return dict(context.history.surveyed)
    arriving = _Arriving(context)
    acquiring = asyncio.create_task(_acquire(context, arriving))
    stopped = asyncio.create_task(context.stop.wait())
    try:
        await asyncio.wait({acquiring, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if acquiring.done():
            return acquiring.result()
        raise DeploymentFailedError(context.stop.reason)
    finally:
        stopped.cancel()
        if not acquiring.done():
            acquiring.cancel()
            with suppress(asyncio.CancelledError, WaystationError):
                await acquiring
        if acquiring.cancelled() or acquiring.exception() is not None:
            await _stop_pulls(context, arriving)


async def _acquire(context: DeploymentContext, arriving: _Arriving) -> dict[str, SurveyFacts]:
    waiting = asyncio.create_task(_tell_who_is_waited_for(context, arriving))
    try:
        async with asyncio.timeout(context.plan.acquire.deadline):
            facts = await _survey(context, arriving)
            if short := short_of_room(context.plan, facts):
                raise DeploymentFailedError("there is not enough room: " + "; ".join(short))
            context.recorder.say(_forecast(context.plan, facts))
            context.filler.begin()
            everywhere = asyncio.Event()
            await together([context.filler.until_settled(everywhere), _everywhere(context, arriving, everywhere)])
    except TimeoutError as error:
        raise DeploymentFailedError(
            f"not everything was on every machine after {context.plan.acquire.deadline:.0f} s (acquire: deadline), "
            f"so no step began: {'; '.join(arriving.reasons())}"
        ) from error
    finally:
        waiting.cancel()
    machines = tuple(machine.name for machine in context.plan.machines)
    await context.recorder.record(Barrier(machines, context.by_rule))
    return facts


def _forecast(plan: Plan, facts: Mapping[str, SurveyFacts]) -> str:
    """Which bytes will move, told before one does."""
    lacking = to_fetch(plan, facts)
    if not lacking:
        return "every machine holds everything already: nothing moves to them"
    told = ", ".join(f"{machine} ({size(lacking[machine])})" for machine in sorted(lacking)[:8])
    more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
    return f"to be brought to {len(lacking)} of {counted(len(facts), 'machine')}: {told}{more}"


async def _tell_who_is_waited_for(context: DeploymentContext, arriving: _Arriving) -> None:
    """Where nothing changes for a while, people read what is missing; each thing once."""
    told: set[str] = set()
    before: set[str] = set()
    while True:
        await asyncio.sleep(WAITING_SECONDS)
        now = set(arriving.reasons())
        for reason in sorted(now & before - told):
            context.recorder.tell(Note(f"still waits: {reason}"))
            told.add(reason)
        before = now


async def _everywhere(context: DeploymentContext, arriving: _Arriving, done: asyncio.Event) -> None:
    """Every machine has everything, and so has the server."""
    await together([_pull_everywhere(context, arriving), _build_here(context)])
    done.set()


async def _stop_pulls(context: DeploymentContext, arriving: _Arriving) -> None:
    """End pulls that are not awaited any more. Where no relay takes that soon, they end at their own deadline."""
    await context.fleet.stop_all(arriving.pulls.values())


# --- what is there


async def _survey(context: DeploymentContext, arriving: _Arriving) -> dict[str, SurveyFacts]:
    """Ask every machine at once what stands under its roots. Raises `DeploymentFailedError`, `UnreachableError`."""

    async def ask(name: str) -> tuple[str, SurveyFacts] | None:
        arriving.lacks(name, "it was asked what it holds, and no relay has brought its answer")
        operation, what = context.operation(0, name, "survey"), Survey(trees_of(context.plan, name))
        try:
            report = await arriving.tries(name).order(context.fleet, operation, lambda _: what)
        except StoreError:
            raise
        except UnreachableError as error:
            if await _why_needed(context, arriving, name, error):
                raise
            return None
        facts = report.facts
        if report.state != "done" or not isinstance(facts, SurveyFacts):
            raise DeploymentFailedError(f"{name} could not be asked what it holds: {report.reason or report.state}")
        if name not in context.history.surveyed:
            await context.recorder.record(Surveyed(name, facts))
        arriving.complete(name)
        return name, facts

    answers = await together([ask(machine.name) for machine in context.plan.machines])
    return dict(answer for answer in answers if answer is not None)


async def _why_needed(context: DeploymentContext, arriving: _Arriving, name: str, error: UnreachableError) -> str:
    """Why the deployment cannot go on without a machine that something failed for; empty where it does.

    Only one that no relay sees any more is offline. A relay that takes nothing is another matter.
    """
    if context.plan.acquire.offline is None:
        return "it is needed"
    if name not in (await context.fleet.presences()).offline:
        return "it is there, so it is not left out (acquire: offline)"
    if refused := await context.leave_out(name, error.message):
        return refused
    arriving.complete(name)
    return ""


# --- to the machines


class _Arriving:
    """What each machine waits for, and the last pull that it was given."""

    def __init__(self, context: DeploymentContext) -> None:
        past = {machine.name: context.history.preparation(machine.name) for machine in context.plan.machines}
        self._tries = {name: Tries(prepared, again=True) for name, prepared in past.items()}
        self.pulls: dict[str, OperationId] = {}
        self._waiting: dict[str, str] = {}

    def tries(self, machine: str) -> Tries:
        """The orders that it was given."""
        return self._tries[machine]

    def lacks(self, machine: str, why: str) -> None:
        """Remember why `machine` does not have everything yet."""
        self._waiting[machine] = why

    def complete(self, machine: str) -> None:
        self._waiting.pop(machine, None)

    def reasons(self) -> list[str]:
        """Which machine does not have everything, and why, in words; what else was waited for where no machine lacks any."""
        waiting = [f"{machine}: {why}" for machine, why in sorted(self._waiting.items())]
        return waiting or ["a relay has not got everything, or the server has not built its own trees"]


async def _pull_everywhere(context: DeploymentContext, arriving: _Arriving) -> None:
    slots = {
        site: asyncio.Semaphore(context.plan.acquire.per_relay) for site in {m.site for m in context.plan.machines}
    }

    async def pull(name: str) -> str:
        """Why it could not; empty where it could."""
        machine = context.plan.machine(name)
        trees = trees_of(context.plan, name)
        if not trees:
            return ""
        is_first, why, away = True, "", None
        # Where its relays gave it nothing, the others of its list are filled as well, and it is asked once more.
        while is_first or (why and not isinstance(away, LostError) and context.filler.widen(name)):
            is_first, away = False, None
            arriving.lacks(name, f"relay {machine.relays[0]} was not offered everything")
            try:
                await context.filler.until_offered(name, context.plan.acquire.stall)
                arriving.lacks(
                    name, f"{context.plan.acquire.per_relay} others of {machine.site} pulled (acquire: per_relay)"
                )
                async with slots[machine.site]:
                    why = await _pull(context, name, trees, arriving)
            except StoreError:
                raise
            except WaystationError as error:
                why = error.message
                away = error if isinstance(error, UnreachableError) else None
        if away is not None and context.plan.acquire.offline is not None:
            refused = await _why_needed(context, arriving, name, away)
            why = refused and f"{why}; {refused}"
        return why and f"{name}: {why}"

    # All answers are awaited first: the reasons of all machines belong into one sentence.
    reasons = [why for why in await together([pull(machine.name) for machine in context.plan.machines]) if why]
    if reasons:
        raise DeploymentFailedError(f"not every machine has everything, so no step began: {'; '.join(reasons)}")


async def _pull(context: DeploymentContext, name: str, trees: tuple[PackageTree, ...], arriving: _Arriving) -> str:
    """Why it could not; empty where it could."""
    arriving.lacks(name, "nothing was heard of its pull")
    limits = context.plan.acquire

    def order(operation: OperationId) -> Acquire:
        arriving.pulls[name] = operation
        return Acquire(trees, deadline=limits.deadline, stall=limits.stall)

    report = await arriving.tries(name).order(
        context.fleet,
        context.operation(0, name, "acquire"),
        order,
        on_progress=_shown(context, name, arriving),
        patience=limits.stall,
    )
    if report.state != "done" or not isinstance(report.facts, AcquireFacts):
        why = report.reason or report.state
        arriving.lacks(name, why)
        return why
    arriving.complete(name)
    whole = sum(tree.tree_bytes for tree in report.facts.trees)
    context.bar(name)(whole, whole)
    await context.recorder.record(Acquired(name, report.facts))
    return ""


def _shown(context: DeploymentContext, name: str, arriving: _Arriving) -> Callable[[Report], None]:
    show, planned = context.bar(name), sum(package.tree_bytes for package, _, _ in placed_on(context.plan, name))
    show(0, planned)

    def hear(report: Report) -> None:
        show(report.done, max(planned, report.whole))
        if report.whole:
            arriving.lacks(name, f"it had {report.done} of {report.whole} bytes")

    return hear


async def _build_here(context: DeploymentContext) -> None:
    """Trees of packages that steps on the server use."""
    for step in context.plan.steps:
        if isinstance(step, ServerStep) and step.package:
            await context.trees.build(context.plan.packages[step.package])
