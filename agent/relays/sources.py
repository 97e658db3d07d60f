"""The relays (and stores that stand in for them) of this agent, in the order in which to ask them."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from agent.config import AgentConfig
from agent.relays.candidates import Source
from agent.relays.dns import TTL_MIN, DiscoveryConfig, discovery_of, find_sources
from agent.relays.health import (
    FAILS_OUT,
    UNKNOWN,
    Health,
    ProbeResult,
    known,
    next_probe,
    record_failure,
    record_probes,
    record_success,
)
from agent.relays.memory import State, load_state, log_changes, save_state
from agent.relays.probe import probe
from agent.relays.ranking import Ranking, order_for_pull, rank
from relay.encoding.bundle import Event, NotSent, Received, Tap
from relay.encoding.holdings import Holdings
from relay.errors import ChunkInvalid, ChunkMissing, NotFoundError, StoreError, UntrustedError, WaystationError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest
from relay.protocol.client import ManifestDocument, PackagePointer, RelayClient
from relay.protocol.connection import ClientLimits, tls_from, token_from
from relay.stores.catalog import Catalog
from relay.stores.open import Store, open_store
from relay.transfer.download import RequestTiming

_PROBES = 3
"""Relays measured at the start of a pull, where their time has come: so many of those that look well, and as many of
the others."""
_PROBE_SECONDS = 3.0


class StoreSource:
    """A store on a shared file system, read as if it were a relay. Nothing is ever written there."""

    def __init__(self, location: str) -> None:
        self.name = location
        self._location = location
        self._store: Store | None = None

    async def package(self, id: PackageId, version: NuGetVersion) -> PackagePointer:
        catalog = await self._catalog()
        pointer = await catalog.look_up(PackageRef(id, version))
        signature = await catalog.signature(pointer.manifest_id)
        return PackagePointer(pointer.ref, pointer.manifest_id, signature, pointer.size)

    async def manifest(self, id: ManifestId, base: Manifest | None = None) -> ManifestDocument:  # noqa: ARG002
        catalog = await self._catalog()
        manifest = await catalog.manifest(id)
        if manifest is None:
            raise NotFoundError(f"not at {self.name}")
        return ManifestDocument(manifest, await catalog.signature(id))

    async def stream(
        self,
        manifest: Manifest,
        indexes: Sequence[int],
        *,
        bases: Holdings | None = None,  # noqa: ARG002 - as a relay's; here are files, and no line to save bytes on
        goodput: float = 0.0,  # noqa: ARG002
        tap: Tap | None = None,  # noqa: ARG002
    ) -> AsyncGenerator[Event, None]:
        """As a relay's. No chunk is ever sent as a difference."""
        chunks = (await self._open()).chunks
        for index in indexes:
            try:
                chunk = await chunks.get(manifest.chunk_id(index))
            except (ChunkMissing, ChunkInvalid):
                yield NotSent(((manifest.id, index),), "absent")
                continue
            yield Received(manifest.id, index, chunk, chunk.size)

    async def health(self, *, attempts: int = 1) -> None:  # noqa: ARG002 - as a relay's
        # Reading a name that is not there is enough: a share that is not mounted says so.
        await (await self._open()).documents.read("packages/none")

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()

    async def _open(self) -> Store:
        if self._store is None:
            self._store = await open_store(self._location, read_only=True)
        return self._store

    async def _catalog(self) -> Catalog:
        return Catalog((await self._open()).documents)


AnySource = RelayClient | StoreSource


class Sources:
    """Finds, ranks and opens sources, and remembers how they did. Use as an async context manager."""

    def __init__(
        self,
        config: AgentConfig,
        state_path: Path,
        *,
        relays: Sequence[str] = (),
        token_file: str | None = None,
        limits: ClientLimits | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`relays`, given by hand, stand in place of everything that the configuration says.

        Raises:
            UsageError: the token cannot be read, or one of `relays` is none.
        """
        self._config = config
        self._path = state_path
        self._only = tuple(relays)
        self._token = token_from(token_file or config.token_file)
        self._limits = limits
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._clock = clock
        self._seed = config.name or socket.gethostname()
        self._discovery = DiscoveryConfig(relays=self._only) if self._only else discovery_of(config)
        self._down: set[str] = set()
        self._kept: State = State()
        self._found: tuple[Source, ...] = ()
        self._open: dict[str, AnySource] = {}
        self._stack = AsyncExitStack()
        self.notes: tuple[str, ...] = ()
        self.ttl = TTL_MIN
        """Seconds until it is worth looking again."""

    async def __aenter__(self) -> Self:
        self._kept = await asyncio.to_thread(load_state, self._path)
        await self.look_again()
        return self

    async def look_again(self) -> None:
        """Ask DNS once more, for a process that lives longer than its answers. What is open stays open."""
        found = await find_sources(self._discovery, self._kept.last_answers, self._rng, now=self._clock())
        self._found, self.notes, self.ttl = found.sources, found.notes, found.ttl
        if not self._only:
            # What was asked by hand once must not make an agent forget its own relays.
            healths = known(self._kept.healths, self._found)
            self._kept = replace(self._kept, healths=healths, last_answers=found.last)

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        # What may be lost is a preference; the pull itself stands.
        with suppress(StoreError):
            await asyncio.to_thread(save_state, self._path, replace(self._kept, saved_at=self._clock()))

    @property
    def healths(self) -> dict[str, Health]:
        """What is known of each source, by URL."""
        return self._kept.healths

    def ranking(self) -> Ranking:
        return rank(self._found, self._kept.healths, self._kept.current, self._clock(), self._seed)

    def in_order(self) -> list[AnySource]:
        """Every source, the one to ask first in front, opened (which contacts none of them).

        Those that just failed to answer come last, whatever their rank: better an unlikely source than none.
        """
        ranking = self.ranking()
        answering = order_for_pull(ranking, self._down)
        others = (ranked.source for ranked in ranking if ranked.source.url in self._down)
        return [self._opened(source) for source in (*answering, *others)]

    async def measure(self, *, everything: bool = False) -> dict[str, str]:
        """Ask the best few for health where their time has come; returns the failures by URL."""
        ranking = self.ranking()
        due = [r.source for r in ranking] if everything else self._due(ranking)
        results = await self._probe(due)
        # A pull is over before an ill source's next turn comes: the second pass that it needs is asked for at once.
        # Otherwise each machine would once more fetch over the long line what its own site holds.
        returning = [s for s in due if results[s.url].ok and not self._health(s.url).ok]
        results |= await self._probe(returning)
        self._down = {url for url, result in results.items() if not result.ok}
        return {url: result.reason for url, result in results.items() if not result.ok}

    async def _probe(self, sources: Sequence[Source]) -> dict[str, ProbeResult]:
        if not sources:
            return {}
        results = await probe(sources, self._check, _PROBE_SECONDS)
        self._keep(record_probes(self._kept.healths, results, self._clock()), self._kept.current)
        return results

    def goodput(self, name: str) -> float:
        """Of the line to a source, bytes per second of payload, as it was measured however long ago; 0 where it was not."""
        return self._health(self._url_of(name)).goodput or 0.0

    def succeeded(self, name: str, timing: RequestTiming) -> None:
        """It gave what it was asked for, and is the one in use now."""
        url = self._url_of(name)
        known, goodput = self._health(url).goodput, timing.goodput
        if not timing.is_steady and goodput is not None and goodput <= (known or goodput):
            # It waited for something else than the line: that says nothing of a line that is known to be faster.
            goodput = None
        health = record_success(self._health(url), self._clock(), timing.first_byte, goodput)
        self._keep({**self._kept.healths, url: health}, url)

    def failed(self, name: str, error: WaystationError) -> None:
        """It could not be reached, or sent other bytes: the latter puts it out at once.

        A relay that lies answers questions for its health all the better, so counting to three would never end.
        """
        url = self._url_of(name)
        health = self._health(url)
        for _ in range(FAILS_OUT if isinstance(error, UntrustedError) else 1):
            health = record_failure(health, self._clock(), error.message)
        self._keep({**self._kept.healths, url: health}, self._kept.current)

    def _health(self, url: str) -> Health:
        return self._kept.healths.get(url, UNKNOWN)

    def _due(self, ranking: Ranking) -> list[Source]:
        due = [ranked.source for ranked in ranking if self._is_due(self._health(ranked.source.url))]
        well = [source for source in due if self._health(source.url).ok]
        ill = [source for source in due if not self._health(source.url).ok]
        return well[:_PROBES] + ill[:_PROBES]

    def _is_due(self, health: Health) -> bool:
        if not 0.0 < health.last_checked <= self._clock():
            return True
        return next_probe(health, health.last_checked, self._rng) <= self._clock()

    async def _check(self, source: Source) -> float:
        started = time.monotonic()
        # Once: one refused connection moves a pull on, and a pause between tries would be taken for a slow answer.
        await self._opened(source).health(attempts=1)
        return time.monotonic() - started

    def _keep(self, healths: dict[str, Health], current: str | None) -> None:
        log_changes(self._kept.healths, healths)
        self._kept = replace(self._kept, current=current, healths=healths)

    def _opened(self, source: Source) -> AnySource:
        opened = self._open.get(source.url)
        if opened is None:
            if source.is_store:
                opened = StoreSource(source.url)
            else:
                opened = RelayClient(
                    source.url,
                    token=self._token,
                    connect_to=source.addresses,
                    limits=self._limits,
                    tls=tls_from(self._config.ca_file or None),
                )
            self._open[source.url] = opened
            self._stack.push_async_callback(opened.close)
        return opened

    def _url_of(self, name: str) -> str:
        return next((url for url, opened in self._open.items() if opened.name == name), name)
