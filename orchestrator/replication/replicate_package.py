"""One package of the depot to the relays that a person named, or what that would take."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from orchestrator.depot.depot import Depot, open_depot
from orchestrator.plan.plan import PlannedRelay
from orchestrator.replication.alternatives import Alternatives, alternatives
from orchestrator.replication.cascade import Delivered
from orchestrator.replication.send import (
    PackageToSend,
    open_relay,
    pacers_of,
    package_to_send,
    plan_for,
    relays_of,
    send,
    shipping_from,
)
from relay.errors import UsageError, WaystationError
from relay.package.identity import PackageRef
from relay.protocol.client import RelayClient
from relay.support.progress import Bar
from relay.transfer.probe import Explained
from relay.transfer.replicate import PATIENCE, Shipping

if TYPE_CHECKING:
    from ssl import SSLContext

    from orchestrator.files.environment import EnvironmentFile
    from relay.encoding.codecs import Coding
    from relay.encoding.planner import Prefer
    from relay.protocol.followed import Current


@dataclass(frozen=True, slots=True)
class Targets:
    """Relays that are not contacted yet, a client for each by its name, and how many machines stand behind them."""

    relays: Sequence[PlannedRelay]
    clients: Mapping[str, RelayClient]
    machines: int = 0

    def __post_init__(self) -> None:
        if len({client.url for client in self.clients.values()}) != len(self.relays):
            raise UsageError("a relay is named twice")

    @classmethod
    def of_environment(cls, environment: EnvironmentFile) -> Targets:
        """Every relay of it, with its own token. Raises `PlanError`, and as `open_relay`."""
        relays = relays_of(environment)
        return cls(relays, {one.name: open_relay(one) for one in relays}, len(environment.value.machines))

    @classmethod
    def of_urls(cls, urls: Sequence[str], token: Current[str | None], tls: Current[SSLContext]) -> Targets:
        """Raises `UsageError`: one is no URL."""
        clients = [RelayClient(url, token=token, tls=tls) for url in urls]
        relays = [PlannedRelay(client.url, client.url, "") for client in clients]
        return cls(relays, {client.url: client for client in clients})

    def told(self, limit: float | None, prefer: Prefer | None) -> Targets:
        """The same with this limit (bytes per second) and this wish in place of their own, where they are given."""
        relays = [
            msgspec.structs.replace(one, limit=limit or one.limit, prefer=prefer or one.prefer) for one in self.relays
        ]
        return replace(self, relays=relays)


@dataclass(frozen=True, slots=True)
class Replication:
    """What became of it. `failed` is by URL, `arithmetic` (and what other ways would take) by the relay's name."""

    nupkg_bytes: int
    delivered: Sequence[Delivered]
    arithmetic: Mapping[str, tuple[Explained, Alternatives]]
    failed: Mapping[str, WaystationError]
    replans: Sequence[str] = ()


async def replicate_package(
    location: str,
    ref: PackageRef,
    targets: Targets,
    bar: Bar,
    *,
    patience: float = PATIENCE,
    encoding: Coding | None = None,
    explains: bool = False,
    exact: bool = False,
) -> Replication:
    """Send it to all targets at once. One that fails leaves the others alone.

    Args:
        location: of the depot.
        ref: the package.
        targets: where to.
        bar: makes a bar for each relay.
        patience: seconds that a relay may be away in the middle.
        encoding: used whatever is planned.
        explains: keep the arithmetic.
        exact: send also what a relay lacks to make the identical nupkg by itself.

    Raises:
        NotFoundError: it is not in the depot, or the depot's disk damaged it and its nupkg.
        RefusedError: it is not signed.
        UsageError, StoreError: the depot cannot be opened, or its medium failed.
    """
    relays, bars = targets.relays, {relay.name: bar(relay.name) for relay in targets.relays}
    async with _ready(location, ref, targets, encoding, explains=explains, exact=exact) as (depot, package, shipping):
        for client in targets.clients.values():
            client.limits = client.limits.within(patience)

        async def delivered(one: Delivered) -> None:
            bars[one.relay](package.manifest.stream_size, package.manifest.stream_size)

        done = await send(
            depot,
            package,
            relays,
            targets.clients,
            shipping,
            lambda relay, here, whole: bars[relay](here, whole),
            pacers=pacers_of(relays),
            patience=patience,
            delivered=delivered,
        )
        explained = {one.relay: one.sent.explained for one in done.delivered if one.sent and one.sent.explained}
        return Replication(
            package.manifest.nupkg.size,
            done.delivered,
            await _arithmetic(depot, package, explained, targets.machines),
            _by_url(targets, done.failed),
            [*depot.notes, *map(str, done.replans)],
        )


async def plan_replication(
    location: str, ref: PackageRef, targets: Targets, encoding: Coding | None = None
) -> Replication:
    """Ask what is missing, and send nothing. Raises as `replicate_package`."""
    async with _ready(location, ref, targets, encoding, explains=True) as (depot, package, shipping):
        explained, failed = await plan_for(depot, package, targets.relays, targets.clients, shipping)
        arithmetic = await _arithmetic(depot, package, explained, targets.machines)
        return Replication(package.manifest.nupkg.size, (), arithmetic, _by_url(targets, failed))


@asynccontextmanager
async def _ready(
    location: str, ref: PackageRef, targets: Targets, encoding: Coding | None, *, explains: bool, exact: bool = False
) -> AsyncIterator[tuple[Depot, PackageToSend, Shipping]]:
    async with AsyncExitStack() as stack:
        depot = await stack.enter_async_context(open_depot(location))
        for client in targets.clients.values():
            await stack.enter_async_context(client)
        package = await package_to_send(depot, ref)
        if mended := await depot.make_whole(package.manifest):
            depot.notes.append(mended)
        shipping = await stack.enter_async_context(shipping_from(depot))
        if exact:
            # Engines may be here that were not when it was added: then less has to be sent.
            await depot.recipe(package.manifest)
        nupkgs = depot.nupkgs if exact else None
        yield depot, package, replace(shipping, force=encoding, explains=explains, nupkgs=nupkgs)


async def _arithmetic(
    depot: Depot, package: PackageToSend, explained: Mapping[str, Explained], machines: int
) -> dict[str, tuple[Explained, Alternatives]]:
    bases = {str(one.package.version): one for one in package.known}
    return {
        relay: (one, await alternatives(depot, package.manifest, bases.get(one.base_version), machines))
        for relay, one in explained.items()
    }


def _by_url(targets: Targets, failed: Mapping[str, WaystationError]) -> dict[str, WaystationError]:
    return {targets.clients[name].url: error for name, error in failed.items()}
