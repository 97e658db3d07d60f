"""Send packages of the depot to relays: one to several relays at once, each only what it lacks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.depot import Depot
from orchestrator.environment import EnvironmentFile
from orchestrator.plan import PlannedRelay, SecretSource
from orchestrator.secrets import read_secret
from relay.client import RelayClient, tls_from
from relay.content.identity import PackageRef
from relay.content.manifest import Manifest
from relay.errors import RefusedError, WaystationError
from relay.replicate import PATIENCE, Progress, Replicated, replicate

Bar = Callable[[str], Progress]
"""Makes a named progress bar."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A signed package of the depot that is ready to be sent, and other versions of it that may save bytes."""

    ref: PackageRef
    manifest: Manifest
    signature: bytes
    known: Sequence[Manifest]


@dataclass(slots=True)
class Sent:
    """What became of one package at several relays."""

    replicated: list[Replicated] = field(default_factory=list)
    """In the order of the relays."""
    failed: dict[str, WaystationError] = field(default_factory=dict)
    """By the relay's URL."""


async def parcel(depot: Depot, ref: PackageRef) -> Parcel:
    """Get a package ready.

    Raises:
        NotFoundError: it is not in the depot.
        RefusedError: it is not signed.
    """
    manifest = await depot.manifest(depot.catalog.get(ref))
    signature = await depot.catalog.signature(manifest.id)
    if not signature:
        raise RefusedError(f"{ref} is not signed", hint="Add its nupkg again to sign it")
    return Parcel(ref, manifest, signature, await depot.other_versions(ref))


async def send_to(
    depot: Depot, what: Parcel, relay: RelayClient, progress: Progress, patience: float = PATIENCE
) -> Replicated:
    """To one relay. Raises as `relay.replicate.replicate`."""
    return await replicate(
        what.manifest,
        what.signature,
        depot.store.chunks,
        relay,
        known=what.known,
        progress=progress,
        patience=patience,
    )


async def send(
    depot: Depot, what: Parcel, relays: Sequence[RelayClient], *, bar: Bar, patience: float = PATIENCE
) -> Sent:
    """To all relays at once; one that fails leaves the others alone."""
    sent = Sent()

    async def to(relay: RelayClient) -> Replicated | None:
        try:
            return await send_to(depot, what, relay, bar(relay.url), patience)
        except WaystationError as error:
            sent.failed[relay.url] = error
            return None

    results = await asyncio.gather(*(to(relay) for relay in relays))
    sent.replicated = [done for done in results if done is not None]
    return sent


# --- the relays of an environment


def relays_of(environment: EnvironmentFile) -> list[PlannedRelay]:
    """All relays that the environment names, in its order."""

    def near(path: str) -> str:
        return os.path.normpath(os.path.join(environment.folder, path)) if path else ""

    return [
        PlannedRelay(
            name,
            relay.url,
            relay.site or "",
            relay.generic,
            SecretSource(near(relay.token.file or ""), relay.token.env or "") if relay.token else None,
            near(relay.ca_file or ""),
        )
        for name, relay in environment.value.relays.items()
    ]


def open_relay(relay: PlannedRelay) -> RelayClient:
    """A client for a relay of the environment, with its token. Contacts nobody.

    Raises:
        NotFoundError, RefusedError: its token cannot be read.
        UsageError: it has no usable URL.
    """
    token = None if relay.token is None else read_secret(f"token of relay {relay.name}", relay.token).reveal()
    return RelayClient(relay.url, token=token, tls=tls_from(relay.ca_file or None))
