"""Pull one package onto this machine: find the closest relay, verify everything, build the tree beside the running one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ulid import ULID

from agent import platform
from agent.sources import AnySource, Sources
from agent.state import AgentState, TreeRecord
from agent.tree import IncomingTree, take_from
from relay.client import ManifestDocument, RelayClient
from relay.content.chunk import Chunk
from relay.content.frames import Received
from relay.content.identity import ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.content.manifest import Manifest
from relay.errors import (
    ManifestError,
    NotFoundError,
    RefusedError,
    SignatureError,
    UnreachableError,
    UntrustedError,
    WaystationError,
)
from relay.fetch import ChunkSource, NoSourceLeftError, Tally, fetch
from relay.trust.keys import TrustPins

Progress = Callable[[int, int], None]
"""Called with (bytes of the tree that are verified on disk, bytes of the whole)."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to bring, and where. `digest` names the manifest outright: then no signature is needed."""

    package: PackageRef
    root: str
    digest: ManifestId | None = None
    switch: bool = False


@dataclass(slots=True)
class Pulled:
    """How it went: where each byte of the tree came from."""

    package: str
    version: str
    manifest: str
    tree: str
    already: bool
    tree_bytes: int
    resumed_bytes: int = 0
    from_disk_bytes: int = 0
    from_relays: dict[str, dict[str, int]] = field(default_factory=dict)
    wire_bytes: int = 0
    """Crossed the lines to the relays in both directions, manifest included."""
    failed: dict[str, str] = field(default_factory=dict)
    """Relays that were left on the way, and why."""
    switched: bool = False
    seconds: float = 0.0


async def pull(
    request: PullRequest,
    state: AgentState,
    sources: Sources,
    pins: TrustPins | None,
    *,
    progress: Progress | None = None,
) -> Pulled:
    """Bring the package, verified and durable, to `<root>/releases/<version>-<ulid>`. Goes on where a crash left it.

    Raises:
        SignatureError: nothing vouches for the package: no pinned key signed it, and no digest was given.
        NotFoundError: no relay has it.
        UntrustedError: the only relays that have it serve other bytes.
        UnreachableError: no relay could give all of it; what came is kept.
        LockedError: another process builds the same tree.
        StoreError: the disk is full or failed.
    """
    started = time.monotonic()
    root = os.path.abspath(request.root)
    await sources.measure()
    finder = _Finder(request, state, sources, pins)
    manifest = await finder.manifest()
    record = await asyncio.to_thread(state.installed, root, manifest.id)
    result = Pulled(
        package=str(manifest.package.id),
        version=manifest.package.version.normalized,
        manifest=f"sha256:{manifest.id}",
        tree="",
        already=record is not None,
        tree_bytes=manifest.tree_size,
        failed=finder.failed,
    )
    if record is None:
        record = await _build(manifest, root, state, finder.remaining(), sources, result, progress)
    result.tree = record.path
    if request.switch:
        result.switched = await asyncio.to_thread(_switch, root, record)
    result.wire_bytes = sum(s.traffic.total for s in sources.in_order() if isinstance(s, RelayClient))
    result.seconds = time.monotonic() - started
    return result


async def _build(
    manifest: Manifest,
    root: str,
    state: AgentState,
    order: list[AnySource],
    sources: Sources,
    result: Pulled,
    progress: Progress | None,
) -> TreeRecord:
    label = manifest.package.version.normalized
    tree = await asyncio.to_thread(IncomingTree, root, manifest, f"{label}-{ULID()}")
    told = _Told(tree, progress)
    try:
        result.resumed_bytes = told.done
        result.from_disk_bytes = await asyncio.to_thread(_take_installed, tree, state, told)
        await _fetch_missing(tree, order, sources, result, told)
        path = await asyncio.to_thread(tree.finish)
        ulid = tree.target.rpartition("-")[2]
        record = await asyncio.to_thread(lambda: state.record(manifest, ulid=ulid, root=root, path=path, label=label))
        await asyncio.to_thread(tree.clear)
        return record
    finally:
        tree.close()


class _Told:
    """Counts verified bytes on disk, and tells whoever watches."""

    def __init__(self, tree: IncomingTree, progress: Progress | None) -> None:
        self._whole = sum(tree.manifest.chunks[i].size for i in set(tree.missing_indexes()))
        self.done = sum(tree.manifest.chunks[i].size for i in tree.have)
        self._progress = progress

    def more(self, size: int) -> None:
        self.done += size
        if self._progress:
            self._progress(self.done, self._whole)


def _take_installed(tree: IncomingTree, state: AgentState, told: _Told) -> int:
    """Chunks that an installed tree still has, hashed as they are read. Returns bytes."""
    taken = 0
    wanted = {tree.manifest.chunk_id(i) for i in tree.missing}
    for record in state.newest_of(tree.manifest.package):
        if not wanted:
            break
        held = state.manifest(record)
        if held is None:
            continue
        for chunk in take_from(record.path, held, wanted):
            tree.write(chunk)
            wanted.discard(chunk.id)
            taken += chunk.size
            told.more(chunk.size)
    return taken


async def _fetch_missing(
    tree: IncomingTree, order: list[AnySource], sources: Sources, result: Pulled, told: _Told
) -> None:
    async def deliver(batch: list[Received]) -> None:
        await asyncio.to_thread(_write_all, tree, [received.chunk for received in batch])
        told.more(sum(received.chunk.size for received in batch))

    async def on_failure(source: ChunkSource, error: WaystationError) -> None:
        result.failed[source.name] = error.message
        sources.failed(source.name, error)

    tallies: dict[str, Tally] = {}
    try:
        tallies = await fetch(tree.manifest, tree.missing, order, deliver, on_failure=on_failure)
    except NoSourceLeftError as error:
        raise _sharpest(error, result.failed, tree.manifest) from error
    for name, tally in tallies.items():
        if tally.chunks:
            result.from_relays[name] = {
                "chunks": tally.chunks,
                "bytes": tally.bytes,
                "payload_bytes": tally.payload_bytes,
            }
        for measured in tally.measured:
            sources.succeeded(name, measured)


def _write_all(tree: IncomingTree, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        tree.write(chunk)


def _sharpest(error: NoSourceLeftError, failed: dict[str, str], manifest: Manifest) -> WaystationError:
    """Where the relays that could be reached all served wrong bytes, that is the news, not the road."""
    causes = error.errors.values()
    if causes and all(isinstance(cause, UntrustedError) for cause in causes):
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return UntrustedError(f"no relay serves {manifest.package} as it was signed ({told})")
    return error


def _switch(root: str, record: TreeRecord) -> bool:
    target = os.path.relpath(record.path, root)
    if platform.current_target(root) == target:
        return False
    platform.point_current(root, target)
    return True


class _Finder:
    """Finds the manifest that is meant, and who has it; leaves behind every source that cannot help."""

    def __init__(self, request: PullRequest, state: AgentState, sources: Sources, pins: TrustPins | None) -> None:
        self._request = request
        self._state = state
        self._sources = sources
        self._pins = pins
        self._order = sources.in_order()
        self.failed: dict[str, str] = {}
        if not self._order:
            raise UnreachableError(
                "no relay is known" + "".join(f"; {note}" for note in sources.notes),
                hint="Name one with --relay, or set site and domain in agent.yaml",
            )
        if request.digest is None and pins is None:
            raise SignatureError(
                "this agent has no trust.json, so nothing can vouch for a package",
                hint="Put the origin's trust.json into the agent's home ('agent init --trust FILE'), or give --digest",
            )

    def remaining(self) -> list[AnySource]:
        """Sources that did not fail so far, in order."""
        return [source for source in self._order if source.name not in self.failed]

    async def manifest(self) -> Manifest:
        errors: list[WaystationError] = []
        for source in self._order:
            try:
                return await self._ask(source)
            except (UntrustedError, UnreachableError, RefusedError) as error:
                errors.append(error)
                self.failed[source.name] = error.message
                if not isinstance(error, NotFoundError):
                    self._sources.failed(source.name, error)
        raise self._verdict(errors)

    async def _ask(self, source: AnySource) -> Manifest:
        if self._request.digest is not None:
            return (await self._document(source, self._request.digest)).manifest
        assert self._pins is not None
        from relay.trust.envelopes import check_manifest_signature, verify_package

        ref = self._request.package
        pointer = await source.package(ref.id, ref.version)
        statement = verify_package(pointer.signature, self._pins)
        document = await self._document(source, ManifestId(statement.manifest))
        check_manifest_signature(
            pointer.signature,
            self._pins,
            id_key=ref.id.key,
            version=ref.version.url,
            manifest_id=document.manifest.id,
            nupkg_sha256=document.manifest.nupkg.sha256,
        )
        return document.manifest

    async def _document(self, source: AnySource, id: ManifestId) -> ManifestDocument:
        document = await source.manifest(id, await asyncio.to_thread(self._base))
        if document.manifest.package != self._request.package:
            raise ManifestError(
                f"manifest sha256:{id[:16]}… is of {document.manifest.package}, not {self._request.package}"
            )
        return document

    def _base(self) -> Manifest | None:
        """The manifest of the newest installed tree of the same package: against it, the new one costs little."""
        for record in self._state.newest_of(self._request.package):
            if record.package.lower() == self._request.package.id.key:
                return self._state.manifest(record)
        return None

    def _verdict(self, errors: list[WaystationError]) -> WaystationError:
        told = "; ".join(f"{name}: {why}" for name, why in self.failed.items())
        told = f"{self._request.package} could not be taken from any relay ({told})"
        if any(isinstance(error, UntrustedError) for error in errors):
            return UntrustedError(told)
        if not all(isinstance(error, NotFoundError) for error in errors):
            return UnreachableError(told, hint="'waystation agent relays' shows how each was found")
        return NotFoundError(
            told,
            hint="Replicate it first: waystation package replicate ID VERSION --relay URL",
        )


def parse_request(id: str, version: str, root: str, digest: str | None, *, switch: bool) -> PullRequest:
    """Text from the command line to values. Raises `IdentityError`."""
    ref = PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
    return PullRequest(ref, root, ManifestId(parse_digest(digest)) if digest else None, switch)
