"""The barrier: every package is verified on every machine's own disk, or no step begins anywhere.

First everybody is asked what is there and how much room there is; only then does a byte move. Machines of a site begin
to pull as soon as their relays have been offered everything, while it still arrives there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from agent.orders.orders import Acquire, AcquireFacts, Report, Survey, SurveyFacts
from orchestrator.deployment.context import DeploymentFailedError, Engine, together
from orchestrator.deployment.packages import ref_of
from orchestrator.journal.events import Acquired, Barrier, LineBytes, Note, Replicated, Surveyed
from orchestrator.plan.placement import packages_at, relays_asked, relays_to_fill, short_of_room, trees_of
from orchestrator.plan.plan import Plan, PlannedPackage, PlannedRelay, ServerStep
from orchestrator.replication.cascade import Delivered, replicate_all
from orchestrator.replication.send import parcel, send_to, shipping_from
from relay.errors import StoreError, WaystationError
from relay.support.rate_limit import Pacer

if TYPE_CHECKING:
    from relay.protocol.client import RelayClient
    from relay.transfer.replicate import Progress, Shipping
    from relay.transfer.replicate import ReplicationResult as Sent


async def acquire(engine: Engine) -> dict[str, SurveyFacts]:
    """Ask, replicate, pull, verify: the whole stage. What each machine said of itself at its beginning, by name.

    Raises:
        DeploymentFailedError: a machine has no room, or could not get everything; nothing was started anywhere.
        UnreachableError: a relay could not be reached for too long.
        RefusedError: a relay or the depot says no.
    """
    facts = await survey(engine)
    short = short_of_room(engine.plan, facts)
    if short:
        raise DeploymentFailedError("there is not enough room: " + "; ".join(short))
    arriving = _Arriving(engine.plan)
    try:
        async with asyncio.timeout(engine.plan.acquire.deadline):
            await together(
                [_replicate_everything(engine, arriving), _pull_everywhere(engine, arriving), _build_here(engine)]
            )
    except TimeoutError as error:
        raise DeploymentFailedError(
            f"not everything was on every machine after {engine.plan.acquire.deadline:.0f} s (acquire: deadline), "
            f"so no step began: {'; '.join(arriving.told())}"
        ) from error
    await engine.note(Barrier(tuple(machine.name for machine in engine.plan.machines)))
    return facts


# --- what is there


async def survey(engine: Engine) -> dict[str, SurveyFacts]:
    """Ask every machine at once what stands under its roots. Raises `DeploymentFailedError`, `UnreachableError`."""

    async def ask(name: str) -> tuple[str, SurveyFacts]:
        report = await engine.perform(name, 0, "survey", Survey(trees_of(engine.plan, name)))
        facts = report.facts
        if report.state != "done" or not isinstance(facts, SurveyFacts):
            raise DeploymentFailedError(f"{name} could not be asked what it holds: {report.reason or report.state}")
        await engine.note(Surveyed(name, facts))
        return name, facts

    return dict(await together([ask(machine.name) for machine in engine.plan.machines]))


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

    def told(self) -> list[str]:
        """In words, who does not have everything, and why; the server's own trees where no machine lacks any."""
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


async def _replicate_everything(engine: Engine, arriving: _Arriving) -> None:
    """All packages at once: they share the lines of relays whose machines wait for all of them anyway."""
    relays = relays_to_fill(engine.plan)
    wanted = {
        relay.name: {package.manifest: package for package in packages_at(engine.plan, relay.name)} for relay in relays
    }
    packages = {manifest: package for there in wanted.values() for manifest, package in there.items()}
    pacers = {relay.name: Pacer(relay.limit) for relay in relays if relay.limit}
    async with shipping_from(engine.depot) as shipping:
        await together(
            [
                _replicate(
                    package, [r for r in relays if manifest in wanted[r.name]], engine, arriving, shipping, pacers
                )
                for manifest, package in packages.items()
            ]
        )


async def _replicate(
    package: PlannedPackage,
    relays: Sequence[PlannedRelay],
    engine: Engine,
    arriving: _Arriving,
    shipping: Shipping,
    pacers: Mapping[str, Pacer],
) -> None:
    """One package to all relays that get it. One that only passes it on may fail: then it is passed by."""
    ref = ref_of(package)
    what = await parcel(engine.depot, ref)
    bars = {relay.name: engine.bar(f"{relay.name} {ref}") for relay in relays}

    def heard(relay: str, here: int, whole: int) -> None:
        arriving.offered(relay, package.manifest)
        bars[relay](here, whole)

    async def send(relay: PlannedRelay, client: RelayClient, progress: Progress) -> Sent:
        return await send_to(engine.depot, what, client, progress, shipping=shipping, pacer=pacers.get(relay.name))

    async def delivered(done: Delivered) -> None:
        arriving.offered(done.relay, package.manifest)
        await engine.note(
            Replicated(
                relay=done.relay,
                package=package.id,
                version=package.version,
                package_bytes=done.package_bytes,
                wire_bytes=done.wire_bytes if done.chunks_sent else 0,
                chunks=done.chunks,
                chunks_sent=done.chunks_sent,
                seconds=done.seconds,
                lines=tuple(LineBytes(one.line, one.wire_bytes, one.encodings) for one in done.lines),
                fallbacks=done.fallbacks,
            )
        )

    async with AsyncExitStack() as stack:
        clients = {relay.name: await stack.enter_async_context(engine.open_relay(relay)) for relay in relays}
        must = set(relays_asked(engine.plan))
        done = await replicate_all(what.manifest, relays, clients, send, heard, delivered=delivered, must=must)
    for replan in done.replans:
        await engine.note(Note(f"{ref}: {replan}"))
    for name, error in done.failed.items():
        await engine.note(Note(f"relay {name} passes nothing on and has no {ref}: {error.message}"))


# --- to the machines


async def _pull_everywhere(engine: Engine, arriving: _Arriving) -> None:
    places = {site: asyncio.Semaphore(engine.plan.acquire.per_relay) for site in {m.site for m in engine.plan.machines}}

    async def pull(name: str) -> str:
        """Why it could not; empty where it could."""
        machine = engine.plan.machine(name)
        trees = trees_of(engine.plan, name)
        if not trees:
            return ""
        arriving.lacks(name, f"relay {machine.relays[0]} was not offered everything")
        await arriving.wait(machine.relays[:1])
        arriving.lacks(name, f"{engine.plan.acquire.per_relay} others of {machine.site} pulled (acquire: per_relay)")
        async with places[machine.site]:
            arriving.lacks(name, "nothing was heard of its pull")
            what = Acquire(trees, deadline=engine.plan.acquire.deadline, stall=engine.plan.acquire.stall)
            try:
                report = await engine.perform(name, 0, "acquire", what, on_progress=_shown(engine, name, arriving))
            except StoreError:
                raise
            except WaystationError as error:
                return f"{name}: {error.message}"
        if report.state != "done" or not isinstance(report.facts, AcquireFacts):
            arriving.lacks(name, report.reason or report.state)
            return f"{name}: {report.reason or report.state}"
        arriving.complete(name)
        await engine.note(Acquired(name, report.facts))
        return ""

    # Everybody is heard before anything is said: the reasons of all machines belong into one sentence.
    reasons = [why for why in await together([pull(machine.name) for machine in engine.plan.machines]) if why]
    if reasons:
        raise DeploymentFailedError(f"not every machine has everything, so no step began: {'; '.join(reasons)}")


def _shown(engine: Engine, name: str, arriving: _Arriving) -> Callable[[Report], None]:
    show = engine.bar(name)

    def hear(report: Report) -> None:
        show(report.done, report.whole)
        if report.whole:
            arriving.lacks(name, f"it had {report.done} of {report.whole} bytes")

    return hear


async def _build_here(engine: Engine) -> None:
    """Trees of packages that steps on the server use."""
    for step in engine.plan.steps:
        if isinstance(step, ServerStep) and step.package and step.package not in engine.server_trees:
            package = engine.plan.packages[step.package]
            engine.server_trees[step.package] = await engine.server_tree(package)
