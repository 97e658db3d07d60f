"""The packages of a deployment on their way to its relays, for as long as it lasts.

What must be true before steps begin is that machines hold packages. So a relay that fails ends nothing: it is told as
behind, its machines go on with another relay of their list, and it is tried again until the deployment ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal

from orchestrator.journal.events import Note, RelayBehind, Replicated
from orchestrator.plan.placement import packages_at, relays_to_fill
from orchestrator.plan.plan import Plan, PlannedPackage, PlannedRelay
from orchestrator.plan.routes import lineage
from orchestrator.replication.cascade import Cascaded, Delivered
from orchestrator.replication.send import open_relay, pacers_of, package_to_send, send, shipping_from
from relay.errors import ChunkInvalid, ChunkMissing, StoreError, UnreachableError, WaystationError
from relay.support.persistence import Persistence
from relay.support.progress import Bar
from relay.support.together import any_of

if TYPE_CHECKING:
    from orchestrator.depot.depot import Depot
    from orchestrator.journal.recorder import Recorder
    from relay.transfer.replicate import Shipping

AWAY_SECONDS: Final = 15.0
"""A relay that is away in the middle for longer counts as failed, until it is back: a restart takes less."""
OFFER_SECONDS: Final = 4.0
"""A relay that is no further than that behind another one of a machine's list is waited for: it is the nearer one."""
IDLE_SECONDS: Final = 2.0
LATE_SECONDS: Final = 8.0
"""For relays that have not got everything when all machines have: so long for one that gets nothing, and so long for one
that does. What is on its way there goes on beside the steps.
"""
_LOOK_SECONDS: Final = 60.0
"""Between two looks where nothing happens."""
PERSISTENCE: Final = Persistence(first_pause=1.0, longest_pause=10.0)
"""With relays that failed."""

State = Literal["wanted", "offered", "delivered"]
"""Of one package at one relay. A relay that was offered a package gives what has come, and waits for the rest itself."""


@asynccontextmanager
async def relays_filled(plan: Plan, depot: Depot, recorder: Recorder, bar: Bar) -> AsyncIterator[RelayFiller]:
    """While the context is open, packages go to the relays that need them, from `RelayFiller.begin` on."""
    async with shipping_from(depot) as shipping:
        filler = RelayFiller(plan, depot, recorder, bar, shipping)
        try:
            yield filler
        finally:
            await filler.close()


class RelayFiller:
    """Brings packages to relays, and knows how far each is."""

    def __init__(self, plan: Plan, depot: Depot, recorder: Recorder, bar: Bar, shipping: Shipping) -> None:
        self._plan = plan
        self._depot = depot
        self._recorder = recorder
        self._bar = bar
        self._shipping = shipping
        # They share the lines: what is sent to one relay is paced together.
        self._pacers = pacers_of(plan.relays)
        self._states: dict[str, dict[str, State]] = {}
        """By relay, then by manifest."""
        self._failures: dict[str, tuple[float, str]] = {}
        """Of relays that failed: since when, by the loop's clock, and why last."""
        self._told: set[tuple[str, str]] = set()
        """Relays and manifests of which the journal says that one has not got the other."""
        self._moved: dict[str, float] = {}
        """When each relay got something last, by the loop's clock."""
        self._offered_at: dict[str, float] = {}
        """When each relay had been offered everything, by the loop's clock."""
        self._here: dict[tuple[str, str], int] = {}
        """Bytes of each manifest at each relay, the most that was heard."""
        self._patience = min(AWAY_SECONDS, plan.acquire.stall)
        self._news = asyncio.Event()
        self._works: set[asyncio.Task[None]] = set()

    # --- what others ask, and wait for

    @property
    def behind(self) -> dict[str, str]:
        """Relays that have not got everything, with the reason."""
        lacking = [name for name, states in self._states.items() if set(states.values()) - {"delivered"}]
        return {name: self._failures.get(name, (0.0, "it was still on its way there"))[1] for name in lacking}

    async def until_offered(self, machine: str, patience: float) -> None:
        """Return when the nearest relay of its list that is well was offered everything, or when another one was offered
        everything a while ago: one that takes nothing and does not fail holds up no machine.

        Raises:
            UnreachableError: all of them have failed for `patience` seconds.
        """
        while True:
            relays = [name for name in self._plan.machine(machine).relays if name in self._states]
            well = [name for name in relays if name not in self._failures]
            offered = [name for name in well if "wanted" not in self._states[name].values()]
            if not relays or (offered and offered[0] == well[0]):
                return
            until = min(self._offered_at[name] for name in offered) + OFFER_SECONDS if offered else None
            if not well:
                until = max(self._failures[name][0] for name in relays) + patience
            try:
                async with asyncio.timeout_at(until):
                    await self._news.wait()
            except TimeoutError:
                if offered:
                    return
                told = "; ".join(f"relay {name}: {self._failures[name][1]}" for name in relays)
                raise UnreachableError(f"{told}, for {patience:.0f} s (acquire: stall)") from None

    async def until_settled(self, machines: asyncio.Event) -> None:
        """Return when each relay has everything, or has failed. Once all `machines` have everything, one that gets nothing
        any more has failed: without room, say, it is asked again and again. One that still gets some is behind, too, and
        what is on its way there goes on until the deployment ends.

        Raises:
            StoreError, ChunkInvalid, ChunkMissing: the depot's medium failed, or the depot lost some of a package.
            NotFoundError, RefusedError: a package is not in the depot, or not signed.
        """
        clock = asyncio.get_running_loop().time
        everywhere_at = 0.0
        is_told = False
        while lacking := self._lacking():
            if not machines.is_set():
                await any_of(_LOOK_SECONDS, self._news.wait(), machines.wait())
                continue
            everywhere_at = everywhere_at or clock()
            moved = max(everywhere_at, *(self._moved[name] for name in lacking))
            left = min(moved + IDLE_SECONDS, everywhere_at + LATE_SECONDS) - clock()
            if left > 0:
                if not is_told:
                    is_told = True
                    names = ", ".join(sorted(lacking))
                    self._recorder.say(
                        f"machines have everything; waiting for relay {names}, which still takes packages"
                    )
                await any_of(left, self._news.wait())
                continue
            for name in lacking:
                for package in self._packages_lacking(name):
                    await self._fail(name, package, self._why_late(name))
            return

    def _lacking(self) -> list[str]:
        """Relays that did not fail, and have not got everything. Raises what ended the work on one."""
        for work in self._works:
            if work.done():
                work.result()
        open_ones = [name for name in self._states if name not in self._failures]
        return [name for name in open_ones if set(self._states[name].values()) != {"delivered"}]

    def _why_late(self, relay: str) -> str:
        idle = asyncio.get_running_loop().time() - self._moved[relay]
        return f"it took nothing for {idle:.0f} s" if idle > IDLE_SECONDS else "every machine had everything before it"

    def _packages_lacking(self, relay: str) -> list[PlannedPackage]:
        states = self._states[relay]
        return [one for one in packages_at(self._plan, relay) if states[one.manifest] != "delivered"]

    # --- which relays

    def begin(self) -> None:
        """Those that the plan names."""
        self._fill(relays_to_fill(self._plan))

    def widen(self, machine: str) -> bool:
        """Every other relay of the machine's list as well. False where all were asked for before."""
        others = [name for name in self._plan.machine(machine).relays if name not in self._states]
        self._fill([self._plan.relay(name) for name in others])
        return bool(others)

    async def close(self) -> None:
        """Send nothing any more. What a relay has by now stays there."""
        for work in self._works:
            work.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)

    def _fill(self, relays: Iterable[PlannedRelay]) -> None:
        wanted: dict[tuple[str, str], tuple[PlannedPackage, list[str]]] = {}
        for relay in relays:
            packages = packages_at(self._plan, relay.name)
            self._states[relay.name] = {package.manifest: "wanted" for package in packages}
            self._moved[relay.name] = asyncio.get_running_loop().time()
            for package in packages:
                # Relays that fetch from each other go together; others do not wait for each other's end.
                key = (package.manifest, self._way_to(relay.name)[-1])
                wanted.setdefault(key, (package, []))[1].append(relay.name)
        for package, names in wanted.values():
            work = asyncio.create_task(self._bring(package, names))
            self._works.add(work)
            work.add_done_callback(lambda _: self._tell())

    def _way_to(self, relay: str) -> Sequence[str]:
        """The relay, and those that it fetches through, up to the one that the origin sends to."""
        return lineage(relay, {each.name: each.upstream for each in self._plan.relays})

    # --- one package

    async def _bring(self, package: PlannedPackage, relays: Collection[str]) -> None:
        """To all of these, again and again, until the last one has it."""
        left, rounds = set(relays), 0
        while left:
            if rounds:
                await asyncio.sleep(PERSISTENCE.pause(rounds))
            rounds += 1
            done = await self._send(package, left)
            left &= done.failed.keys()

    async def _send(self, package: PlannedPackage, names: Collection[str]) -> Cascaded:
        """One round: to these, through those that they fetch from, which have it by now or failed before."""
        on_the_way = {above for name in names for above in self._way_to(name)}
        relays = [relay for relay in self._plan.relays if relay.name in on_the_way]
        what = await package_to_send(self._depot, package.ref)
        bars, content = {name: self._bar(f"{name} {what.ref}") for name in names}, what.manifest.stream_size
        for name, show in bars.items():
            show(self._here.get((name, package.manifest), 0), content)

        def heard(relay: str, here: int, whole: int) -> None:
            if here > self._here.get((relay, package.manifest), -1):
                self._here[relay, package.manifest] = here
                self._moved[relay] = asyncio.get_running_loop().time()
                self._reach(relay, package, "offered")
            if relay in bars:
                bars[relay](here, whole)

        async def delivered(done: Delivered) -> None:
            if done.relay in names:
                bars[done.relay](content, content)
                await self._recorder.record(_replicated(done, package))
                self._reach(done.relay, package, "delivered")

        async def failed(relay: str, error: WaystationError) -> None:
            if isinstance(error, StoreError | ChunkInvalid | ChunkMissing):
                raise error
            if relay in names:
                await self._fail(relay, package, error.message)

        async with AsyncExitStack() as stack:
            clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in relays}
            done = await send(
                self._depot,
                what,
                relays,
                clients,
                self._shipping,
                heard,
                pacers=self._pacers,
                patience=self._patience,
                delivered=delivered,
                failed=failed,
            )
        for replan in done.replans:
            await self._recorder.record(Note(f"{what.ref}: {replan}"))
        return done

    async def _fail(self, relay: str, package: PlannedPackage, why: str) -> None:
        since, _ = self._failures.get(relay, (asyncio.get_running_loop().time(), ""))
        self._failures[relay] = (since, why)
        if (relay, package.manifest) not in self._told:
            self._told.add((relay, package.manifest))
            await self._recorder.record(RelayBehind(relay, package.id, package.version, why))
        self._states[relay][package.manifest] = "wanted"
        # Machines that have no other relay with their packages get one.
        for machine in self._plan.machines:
            known = [name for name in machine.relays if name in self._states]
            if relay in known and all(name in self._failures for name in known):
                self.widen(machine.name)
        self._tell()

    def _reach(self, relay: str, package: PlannedPackage, state: State) -> None:
        """A relay came so far with a package. What is delivered stays so."""
        states = self._states.get(relay, {})
        if states.get(package.manifest, "delivered") != "delivered":
            states[package.manifest] = state
            if "wanted" not in states.values():
                self._offered_at.setdefault(relay, asyncio.get_running_loop().time())
            self._failures.pop(relay, None)
            self._told.discard((relay, package.manifest))
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _replicated(done: Delivered, package: PlannedPackage) -> Replicated:
    return Replicated(
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
