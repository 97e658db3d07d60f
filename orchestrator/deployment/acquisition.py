"""The barrier: every package is verified on every machine's own disk, or no step begins anywhere.

Every machine is asked first what is there and how much room there is; only then does a byte move. Machines of a site
begin to pull as soon as their relays have been offered everything, while it still arrives there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final

from agent.orders.orders import Acquire, AcquireFacts, Report, Survey, SurveyFacts
from orchestrator.deployment.context import DeploymentContext, DeploymentFailedError
from orchestrator.deployment.packages import ref_of
from orchestrator.journal.events import Acquired, Barrier, Note, Replicated, Surveyed
from orchestrator.plan.placement import packages_at, relays_asked, relays_to_fill, short_of_room, trees_of
from orchestrator.plan.plan import Plan, PlannedPackage, PlannedRelay, ServerStep
from orchestrator.replication.cascade import Delivered
from orchestrator.replication.send import open_relay, pacers_of, package_to_send, send, shipping_from
from relay.errors import StoreError, UnreachableError, WaystationError
from relay.support.together import together

if TYPE_CHECKING:
    from relay.support.rate_limit import Pacer
    from relay.transfer.replicate import Shipping


STOP_SECONDS: Final = 5.0
"""For a relay to take the order that stops a pull."""


async def acquire(context: DeploymentContext) -> dict[str, SurveyFacts]:
    """Ask, replicate, pull, verify: the whole stage. What each machine said of itself at its beginning, by name.

    A stop ends it at once: nothing is in flight but bytes, and what came is kept.

    Raises:
        DeploymentFailedError: a machine has no room, or could not get everything; nothing was started anywhere.
        UnreachableError: a relay could not be reached for too long.
        RefusedError: a relay or the depot says no.
    """
    acquiring = asyncio.create_task(_acquire(context))
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
            await _stop_pulls(context)


async def _acquire(context: DeploymentContext) -> dict[str, SurveyFacts]:
    facts = await _survey(context)
    short = short_of_room(context.plan, facts)
    if short:
        raise DeploymentFailedError("there is not enough room: " + "; ".join(short))
    arriving = _Arriving(context.plan)
    try:
        async with asyncio.timeout(context.plan.acquire.deadline):
            await together(
                [_replicate_everything(context, arriving), _pull_everywhere(context, arriving), _build_here(context)]
            )
    except TimeoutError as error:
        raise DeploymentFailedError(
            f"not everything was on every machine after {context.plan.acquire.deadline:.0f} s (acquire: deadline), "
            f"so no step began: {'; '.join(arriving.reasons())}"
        ) from error
    await context.recorder.record(Barrier(tuple(machine.name for machine in context.plan.machines)))
    return facts


async def _stop_pulls(context: DeploymentContext) -> None:
    """End pulls that are not awaited any more. Where no relay takes that soon, they end at their own deadline."""

    async def stop(machine: str) -> None:
        with suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await context.fleet.stop(context.operation(0, machine, "acquire"))

    await together([stop(machine.name) for machine in context.plan.machines])


# --- what is there


async def _survey(context: DeploymentContext) -> dict[str, SurveyFacts]:
    """Ask every machine at once what stands under its roots. Raises `DeploymentFailedError`, `UnreachableError`."""

    async def ask(name: str) -> tuple[str, SurveyFacts]:
        report = await context.fleet.perform(context.operation(0, name, "survey"), Survey(trees_of(context.plan, name)))
        facts = report.facts
        if report.state != "done" or not isinstance(facts, SurveyFacts):
            raise DeploymentFailedError(f"{name} could not be asked what it holds: {report.reason or report.state}")
        await context.recorder.record(Surveyed(name, facts))
        return name, facts

    return dict(await together([ask(machine.name) for machine in context.plan.machines]))


# --- to the relays


class _Arriving:
    """Which relays have been offered everything: from then on their machines may pull. And what each one waits for."""

    def __init__(self, plan: Plan) -> None:
        relays = relays_to_fill(plan)
        self._open = {relay.name: {package.manifest for package in packages_at(plan, relay.name)} for relay in relays}
        self._events = {name: asyncio.Event() for name in self._open}
        for name, lacking in self._open.items():
            if not lacking:
                self._events[name].set()
        self._waiting: dict[str, str] = {}

    def lacks(self, machine: str, why: str) -> None:
        """Remember why `machine` does not have everything yet."""
        self._waiting[machine] = why

    def complete(self, machine: str) -> None:
        self._waiting.pop(machine, None)

    def reasons(self) -> list[str]:
        """Which machine does not have everything, and why, in words; the server's own trees where no machine lacks any."""
        waiting = [f"{machine}: {why}" for machine, why in sorted(self._waiting.items())]
        return waiting or ["the server has not built its own trees"]

    def offered(self, relay: str, manifest: str) -> None:
        self._open[relay].discard(manifest)
        if not self._open[relay]:
            self._events[relay].set()

    async def wait(self, relays: Iterable[str]) -> None:
        """Until each of these that gets packages at all has been offered everything."""
        for name in relays:
            if name in self._events:
                await self._events[name].wait()


async def _replicate_everything(context: DeploymentContext, arriving: _Arriving) -> None:
    """All packages at once: they share the lines of relays whose machines wait for all of them anyway."""
    relays = relays_to_fill(context.plan)
    wanted = {
        relay.name: {package.manifest: package for package in packages_at(context.plan, relay.name)} for relay in relays
    }
    packages = {manifest: package for there in wanted.values() for manifest, package in there.items()}
    pacers = pacers_of(relays)
    async with shipping_from(context.depot) as shipping:
        await together(
            [
                _replicate(
                    package, [r for r in relays if manifest in wanted[r.name]], context, arriving, shipping, pacers
                )
                for manifest, package in packages.items()
            ]
        )


async def _replicate(
    package: PlannedPackage,
    relays: Sequence[PlannedRelay],
    context: DeploymentContext,
    arriving: _Arriving,
    shipping: Shipping,
    pacers: Mapping[str, Pacer | None],
) -> None:
    """One package to all relays that get it. One that only passes it on may fail: then it is passed by."""
    ref = ref_of(package)
    what = await package_to_send(context.depot, ref)
    bars = {relay.name: context.bar(f"{relay.name} {ref}") for relay in relays}

    def heard(relay: str, here: int, whole: int) -> None:
        arriving.offered(relay, package.manifest)
        bars[relay](here, whole)

    async def delivered(done: Delivered) -> None:
        arriving.offered(done.relay, package.manifest)
        await context.recorder.record(
            Replicated(
                relay=done.relay,
                package=package.id,
                version=package.version,
                package_bytes=done.package_bytes,
                wire_bytes=done.wire_bytes if done.chunks_sent else 0,
                chunks=done.chunks,
                chunks_sent=done.chunks_sent,
                seconds=done.seconds,
                lines=done.lines,
                fallbacks=done.fallbacks,
            )
        )

    async with AsyncExitStack() as stack:
        clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in relays}
        must = set(relays_asked(context.plan))
        done = await send(
            context.depot, what, relays, clients, shipping, heard, pacers=pacers, delivered=delivered, must=must
        )
    for replan in done.replans:
        await context.recorder.record(Note(f"{ref}: {replan}"))
    for name, error in done.failed.items():
        await context.recorder.record(Note(f"relay {name} passes nothing on and has no {ref}: {error.message}"))


# --- to the machines


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
        arriving.lacks(name, f"relay {machine.relays[0]} was not offered everything")
        await arriving.wait(machine.relays[:1])
        arriving.lacks(name, f"{context.plan.acquire.per_relay} others of {machine.site} pulled (acquire: per_relay)")
        async with slots[machine.site]:
            arriving.lacks(name, "nothing was heard of its pull")
            shown = _shown(context, name, arriving)
            what = Acquire(trees, deadline=context.plan.acquire.deadline, stall=context.plan.acquire.stall)
            try:
                report = await context.fleet.perform(context.operation(0, name, "acquire"), what, shown)
            except StoreError:
                raise
            except WaystationError as error:
                return f"{name}: {error.message}"
        if report.state != "done" or not isinstance(report.facts, AcquireFacts):
            arriving.lacks(name, report.reason or report.state)
            return f"{name}: {report.reason or report.state}"
        arriving.complete(name)
        await context.recorder.record(Acquired(name, report.facts))
        return ""

    # All answers are awaited first: the reasons of all machines belong into one sentence.
    reasons = [why for why in await together([pull(machine.name) for machine in context.plan.machines]) if why]
    if reasons:
        raise DeploymentFailedError(f"not every machine has everything, so no step began: {'; '.join(reasons)}")


def _shown(context: DeploymentContext, name: str, arriving: _Arriving) -> Callable[[Report], None]:
    show = context.bar(name)

    def hear(report: Report) -> None:
        show(report.done, report.whole)
        if report.whole:
            arriving.lacks(name, f"it had {report.done} of {report.whole} bytes")

    return hear


async def _build_here(context: DeploymentContext) -> None:
    """Trees of packages that steps on the server use."""
    for step in context.plan.steps:
        if isinstance(step, ServerStep) and step.package:
            await context.trees.build(context.plan.packages[step.package])
