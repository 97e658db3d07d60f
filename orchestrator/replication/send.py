"""Send packages of the depot to relays: one to several relays at once, each only what it lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from orchestrator.depot.depot import Depot
from orchestrator.files.environment import EnvironmentFile
from orchestrator.plan.plan import PlannedRelay
from orchestrator.plan.routes import planned_relay, upstreams_of, wrong_ways
from orchestrator.replication.cascade import Cascaded, Heard, OnDelivered, OnFailed, replicate_all
from orchestrator.trust.secrets import read_secret
from relay.encoding.choose_bases import MOSTLY_NEW, OTHERS_MAX
from relay.encoding.planner import Prefer
from relay.errors import RefusedError, WaystationError
from relay.package.identity import PackageRef
from relay.package.manifest import Manifest
from relay.protocol.client import RelayClient
from relay.protocol.credentials import tls_from
from relay.protocol.followed import Current, Followed
from relay.support.progress import Progress
from relay.support.rate_limit import Pacer
from relay.transfer.encoder_pool import Payloads
from relay.transfer.link_history import Lines
from relay.transfer.probe import Explained
from relay.transfer.replicate import PATIENCE, ReplicationResult, Shipping, plan, replicate
from relay.written.yaml_positions import PlanError


@dataclass(frozen=True, slots=True)
class PackageToSend:
    """A signed package of the depot that is ready to be sent, and what may save bytes.

    `known` are other versions of it, `others` are packages that may hold parts of it.
    """

    ref: PackageRef
    manifest: Manifest
    signature: bytes
    known: Sequence[Manifest]
    others: Sequence[Manifest] = ()


async def package_to_send(depot: Depot, ref: PackageRef) -> PackageToSend:
    """Get a package ready.

    Raises:
        NotFoundError: it is not in the depot.
        RefusedError: it is not signed.
    """
    manifest = await depot.manifest(depot.catalog.get(ref))
    signature = await depot.catalog.signature(manifest.id)
    if not signature:
        raise RefusedError(f"{ref} is not signed", hint="Add its nupkg again to sign it")
    known = await depot.other_versions(ref)
    return PackageToSend(ref, manifest, signature, known, await _others(depot, ref, manifest, known))


async def _others(depot: Depot, ref: PackageRef, manifest: Manifest, known: Sequence[Manifest]) -> list[Manifest]:
    """Packages whose parts this one may carry. None where a version before it holds nearly all of it anyway."""
    there = {id for one in known for id in one.chunk_ids()}
    fresh = sum(entry.size for entry in manifest.chunks if entry.id not in there)
    if fresh <= MOSTLY_NEW * manifest.stream_size:
        return []
    pointers = sorted((p for p in depot.catalog.all() if p.ref.id != ref.id), key=lambda p: p.published, reverse=True)
    return list((await depot.catalog.manifests_of(p.manifest_id for p in pointers[:OTHERS_MAX])).values())


@asynccontextmanager
async def shipping_from(depot: Depot) -> AsyncIterator[Shipping]:
    """Encoders and the memory of lines, for all that is sent from `depot` meanwhile: what is alike is encoded once."""
    payloads = Payloads(depot.store.chunks)
    try:
        yield Shipping(payloads=payloads, lines=Lines(depot.store.documents), recipes=depot.recipes)
    finally:
        await payloads.close()


def shipping_of(what: PackageToSend, shipping: Shipping, pacer: Pacer | None, prefer: Prefer) -> Shipping:
    """How `what` is sent, given what it shares with all others."""
    return replace(shipping, known=what.known, others=what.others, pacer=pacer, prefer=prefer)


async def send_to(
    depot: Depot,
    what: PackageToSend,
    relay: RelayClient,
    progress: Progress,
    patience: float = PATIENCE,
    *,
    shipping: Shipping,
    pacer: Pacer | None = None,
    prefer: Prefer = "bytes",
) -> ReplicationResult:
    """To one relay. `pacer` is the limit of its line, shared by all that goes there. Raises as `relay.transfer.replicate.replicate`."""
    how = shipping_of(what, shipping, pacer, prefer)
    return await replicate(
        what.manifest, what.signature, depot.store.chunks, relay, how, progress=progress, patience=patience
    )


async def send(
    depot: Depot,
    what: PackageToSend,
    relays: Sequence[PlannedRelay],
    clients: Mapping[str, RelayClient],
    shipping: Shipping,
    heard: Heard,
    *,
    pacers: Mapping[str, Pacer | None],
    patience: float = PATIENCE,
    delivered: OnDelivered | None = None,
    failed: OnFailed | None = None,
) -> Cascaded:
    """To all relays at once, by the ways that they name. `clients` and `pacers` are by name; see `replicate_all`."""

    async def to(relay: PlannedRelay, client: RelayClient, progress: Progress) -> ReplicationResult:
        pacer, prefer = pacers[relay.name], relay.prefer
        return await send_to(depot, what, client, progress, patience, shipping=shipping, pacer=pacer, prefer=prefer)

    return await replicate_all(
        what.manifest, relays, clients, to, heard, delivered=delivered, failed=failed, patience=patience
    )


def pacers_of(relays: Iterable[PlannedRelay]) -> dict[str, Pacer | None]:
    """The limits of the lines to these relays, by name, where they have one."""
    return {relay.name: Pacer(relay.limit) if relay.limit else None for relay in relays}


async def plan_for(
    depot: Depot,
    what: PackageToSend,
    relays: Sequence[PlannedRelay],
    clients: Mapping[str, RelayClient],
    shipping: Shipping,
) -> tuple[dict[str, Explained], dict[str, WaystationError]]:
    """What `send` would do at each relay that the origin itself sends to, by name, and who could not be asked. Nothing
    is sent but questions.
    """
    planned: dict[str, Explained] = {}
    pacers = pacers_of(relays)
    failed: dict[str, WaystationError] = {}
    for relay in relays:
        if relay.upstream:
            continue
        how = shipping_of(what, shipping, pacers[relay.name], relay.prefer)
        try:
            planned[relay.name] = await plan(what.manifest, depot.store.chunks, clients[relay.name], how)
        except WaystationError as error:
            failed[relay.name] = error
    return planned, failed


# --- the relays of an environment


def relays_of(environment: EnvironmentFile) -> list[PlannedRelay]:
    """All relays that the environment names, in its order.

    Raises:
        PlanError: a `from:` or `limit:` that cannot be.
    """
    if mistakes := wrong_ways(environment):
        raise PlanError(mistakes)
    upstreams = upstreams_of(environment.value)
    return [planned_relay(environment, name, upstreams.get(name, "")) for name in environment.value.relays]


def open_relay(relay: PlannedRelay) -> RelayClient:
    """A client for a relay of the environment, with its token. Contacts nothing.

    Raises:
        NotFoundError, RefusedError: its token cannot be read.
        UsageError: it has no usable URL.
    """
    return RelayClient(
        relay.url, token=_token_of(relay), tls=tls_from(relay.ca_file or None), plain_http=relay.plain_http
    )


def _token_of(relay: PlannedRelay) -> Current[str | None] | None:
    """What gives its token now: it may be replaced while a deployment runs."""
    source, name = relay.token, f"token of relay {relay.name}"
    if source is None:
        return None
    return Followed(f"the {name}", [source.file] if source.file else [], lambda: read_secret(name, source).reveal())
