"""The relays (and stores that stand in for them) of this agent, in the order in which to ask them."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from agent.config import AgentConfig
from agent.relays.candidates import Source
from agent.relays.dns import TTL_MIN, check_discovery, find_sources, names_of
from agent.relays.health import (
    UNKNOWN,
    Health,
    ProbeResult,
    next_probe,
    record_failure,
    record_overtaken,
    record_probes,
    record_success,
)
from agent.relays.memory import State, load_state, log_changes, save_state
from agent.relays.probe import probe
from agent.relays.ranking import Ranking, rank
from agent.relays.tokens import Tokens, keys_of, relay_key
from relay.encoding.bundle import Event, NotSent, Received, Tap
from relay.encoding.holdings import Holdings
from relay.errors import ChunkInvalid, ChunkMissing, NotFoundError, StoreError, UntrustedError, WaystationError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest
from relay.protocol.client import ManifestDocument, PackagePointer, RelayClient
from relay.protocol.connection import ClientLimits, TokenRefusedError
from relay.protocol.credentials import tls_from
from relay.protocol.messages import Ending
from relay.stores.catalog import Catalog
from relay.stores.open import Store, open_store
from relay.transfer.download import OvertakenError, RequestTiming

_PROBES = 3
"""Relays measured at the start of a pull, where their time has come: so many of those that look well, and as many of
the others."""
_PROBE_SECONDS = 3.0


@dataclass(eq=False)
class StoreSource:
    """The store at the location `name`, read as if it were a relay. Nothing is ever written there."""

    name: str
    _store: Store | None = field(default=None, init=False)

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

    async def health(self, *, attempts: int = 1, scope: str = "") -> None:  # noqa: ARG002 - as a relay's
        # Reading a name that is not there is enough: a share that is not mounted says so.
        await (await self._open()).documents.read("packages/none")

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()

    async def _open(self) -> Store:
        if self._store is None:
            self._store = await open_store(self.name, read_only=True)
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
            UsageError: the token or the authority cannot be read, or a relay or name cannot be used.
        """
        self._path = state_path
        self._only = tuple(relays)
        self._tokens = Tokens(token_file or config.token_file, {} if token_file else config.tokens)
        self._plain_http = {relay_key(name) for name in config.plain_http}
        self._relay = partial(RelayClient, limits=limits, tls=tls_from(config.ca_file or None))
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._clock = clock
        self._seed = config.name or socket.gethostname()
        self._discovery = AgentConfig(relays=self._only) if self._only else config
        check_discovery(self._discovery)
        self._names = names_of(self._discovery)
        self._down: set[str] = set()
        self._refused: dict[str, str | None] = {}
        """The tokens that relays refused, by URL."""
        self._endings: dict[str, Ending] = {}
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
        if self._names is not None:
            for source in (source for answer in self._kept.last_answers for source in answer.sources):
                self._names.remember(source.target, source.addresses)
        found = await find_sources(
            self._discovery, self._kept.last_answers, self._rng, now=self._clock(), names=self._names
        )
        self._found, self.notes, self.ttl = found.sources, found.notes, found.ttl
        if not self._only:
            # Relays given by hand once must not make an agent forget its own. Those that are gone are forgotten: what is
            # kept must not grow with every relay that ever was.
            here = {source.url for source in self._found}
            healths = {url: health for url, health in self._kept.healths.items() if url in here}
            self._kept = replace(self._kept, healths=healths, last_answers=found.last)

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        # What may be lost is a preference; the pull itself stands.
        with suppress(StoreError):
            await asyncio.to_thread(save_state, self._path, self._kept)

    @property
    def healths(self) -> dict[str, Health]:
        """What is known of each source, by URL."""
        return self._kept.healths

    def endings(self) -> tuple[Ending, ...]:
        """When the tokens end that relays were asked with, by their word."""
        return tuple(self._endings.values())

    def ranking(self) -> Ranking:
        return rank(self._found, self._kept.healths, self._kept.current, self._clock(), self._seed)

    def in_order(self) -> list[AnySource]:
        """Every source, the one to ask first in front, opened (which contacts none of them).

        Those that just failed to answer come last: an unlikely source is better than none.
        """
        ordered = sorted((ranked.source for ranked in self.ranking()), key=lambda source: source.url in self._down)
        return [self._opened(source) for source in ordered]

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
        results = await probe(sources, self._check, _PROBE_SECONDS)
        self._keep(record_probes(self._kept.healths, results, self._clock()), self._kept.current)
        return results

    def goodput(self, url: str) -> float:
        """Of the line to a source, bytes per second of payload, as it was measured however long ago; 0 where it was not."""
        return self._health(url).goodput or 0.0

    def succeeded(self, url: str, timing: RequestTiming) -> None:
        """It gave what it was asked for, and is the one in use now."""
        before, goodput = self._health(url).goodput, timing.goodput
        if not timing.is_steady and goodput is not None and goodput <= (before or goodput):
            # It waited for something else than the line: that says nothing of a line that is known to be faster.
            goodput = None
        health = record_success(self._health(url), self._clock(), timing.first_byte, goodput)
        self._keep({**self._kept.healths, url: health}, url)

    def failed(self, url: str, error: WaystationError) -> None:
        """It could not be reached, or sent other bytes, or refuses our token: the latter two put it out at once.

        A relay that lies answers questions for its health all the better, so counting to three would never end.
        """
        is_final = isinstance(error, UntrustedError | TokenRefusedError)
        health = record_failure(self._health(url), self._clock(), error.message, is_final=is_final)
        self._keep({**self._kept.healths, url: health}, self._kept.current)

    def overtaken(self, url: str, error: OvertakenError) -> None:
        """Another source was faster by far. What is kept of its rate says at most "ten times slower": it may have been a
        bad moment.
        """
        goodput = max(error.rate, error.of_other / 10)
        health = record_overtaken(self._health(url), self._clock(), goodput, error.message)
        self._keep({**self._kept.healths, url: health}, self._kept.current)

    def _health(self, url: str) -> Health:
        return self._kept.healths.get(url, UNKNOWN)

    def _due(self, ranking: Ranking) -> list[Source]:
        due = [r.source for r in ranking if self._is_due(self._health(r.source.url)) or self._has_new_token(r.source)]
        well = [source for source in due if self._health(source.url).ok]
        ill = [source for source in due if not self._health(source.url).ok]
        return well[:_PROBES] + ill[:_PROBES]

    def _is_due(self, health: Health) -> bool:
        if not 0.0 < health.last_checked <= self._clock():
            return True
        return next_probe(health, health.last_checked, self._rng) <= self._clock()

    def _has_new_token(self, source: Source) -> bool:
        """Since it refused the one before."""
        return source.url in self._refused and self._refused[source.url] != self._tokens.of(source.url)()

    async def _check(self, source: Source) -> float:
        started = time.monotonic()
        try:
            # Once: one refused connection moves a pull on, and a pause between tries would be taken for a slow answer.
            # With the token that a pull shows: a relay that refuses it is of no use, however soon it does.
            answer = await self._opened(source).health(attempts=1, scope="read")
        except TokenRefusedError:
            self._refused[source.url] = self._tokens.of(source.url)()
            raise
        self._refused.pop(source.url, None)
        self._endings.pop(source.url, None)
        if answer is not None and answer.token is not None:
            self._endings[source.url] = Ending("token", answer.token.id, f"for {source.url}", answer.token.ends)
        return time.monotonic() - started

    def _keep(self, healths: dict[str, Health], current: str | None) -> None:
        log_changes(self._kept.healths, healths)
        self._kept = replace(self._kept, current=current, healths=healths)

    def _opened(self, source: Source) -> AnySource:
        opened = self._open.get(source.url)
        if opened is None:
            opened = StoreSource(source.url) if source.is_store else self._client(source)
            self._open[source.url] = opened
            self._stack.push_async_callback(opened.close)
        return opened

    def _client(self, source: Source) -> RelayClient:
        return self._relay(
            source.url,
            token=self._tokens.of(source.url),
            names=self._names if source.addresses else None,
            plain_http=not self._plain_http.isdisjoint(keys_of(source.url)),
        )
