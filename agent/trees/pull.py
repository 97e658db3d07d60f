"""Pull one package onto this machine: find the closest relay, verify everything, build the tree beside the running one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ulid import ULID

from agent import platform
from agent.acts import TreeDamaged
from agent.relays.sources import AnySource, Sources
from agent.trees.installed import AgentState, TreeRecord
from agent.trees.tree import IncomingTree, TreeHoldings, clear_leftovers, damage_in, take_from
from relay.audit.event import tell
from relay.encoding.bundle import Received
from relay.encoding.choose_bases import worth_asking
from relay.encoding.holdings import Holdings
from relay.errors import (
    ManifestError,
    NotFoundError,
    RefusedError,
    SignatureError,
    StoreError,
    UnreachableError,
    UntrustedError,
    WaystationError,
)
from relay.folders import check_folder
from relay.package.chunk import Chunk
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.package.manifest import Manifest
from relay.protocol.client import ManifestDocument, RelayClient
from relay.protocol.messages import EncodedBytes
from relay.support.progress import Progress
from relay.support.together import first_result
from relay.transfer.download import (
    PERSISTENCE,
    STALL_SECONDS,
    ChunksAbsentError,
    ChunkSource,
    DownloadLimits,
    NoSourceLeftError,
    OvertakenError,
    Receiver,
    SourceTally,
    StalledError,
    download,
    sum_encodings,
)
from relay.trust.envelopes import check_manifest_signature, verify_package
from relay.trust.keys import TrustPins

BESIDE_SECONDS = 2.0
"""A source that says nothing of a package for so long is not waited for alone: the next one is asked as well."""
_OTHERS_MAX = 8
"""Trees of other packages that are offered to a relay as bases: each is read to its last byte before."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to bring, and where.

    Attributes:
        digest: names the manifest outright: then no signature is needed, and the package may still be arriving.
        label: of the tree's folder, `<label>-<ulid>`; by default the version.
        signed: a pinned package key must have signed exactly this, also where `digest` is given.
    """

    package: PackageRef
    root: str
    digest: ManifestId | None = None
    switch: bool = False
    label: str | None = None
    signed: bool = False


@dataclass(slots=True)
class Pulled:
    """How it went: where each byte of the tree came from.

    Attributes:
        from_relays: chunks, bytes of the tree and of payload, by relay.
        encodings: the same by encoding.
        fallbacks: differences that could not be decoded, and were asked for again plainly.
        wire_bytes: what crossed the lines to the relays in both directions, manifest included.
        failed: relays that were left on the way, and why.
    """

    package: str
    version: str
    manifest: str
    tree: str
    already: bool
    tree_bytes: int
    resumed_bytes: int = 0
    from_disk_bytes: int = 0
    from_relays: dict[str, dict[str, int]] = field(default_factory=dict)
    encodings: tuple[EncodedBytes, ...] = ()
    fallbacks: int = 0
    wire_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    switched: bool = False
    seconds: float = 0.0


async def pull(
    request: PullRequest,
    state: AgentState,
    sources: Sources,
    pins: TrustPins | None,
    *,
    progress: Progress | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> Pulled:
    """Bring the package, verified and durable, to `<root>/releases/<version>-<ulid>`. Goes on where a crash left it.

    Raises:
        SignatureError: nothing vouches for the package: no pinned key signed it, and no digest was given.
        NotFoundError: no relay has it.
        UntrustedError: the only relays that have it serve other bytes.
        UnreachableError: no relay could give all of it; what came is kept.
        LockedError: another process builds the same tree.
        StoreError: this machine's disk is full or failed. What was built is removed: it takes no room, and what a
            failed disk says it holds is not to be built upon.
    """
    started = time.monotonic()
    request = replace(request, root=os.path.abspath(request.root))  # noqa: ASYNC240 - contacts no disk
    if pins is None and (request.signed or request.digest is None):
        raise _no_pins()
    unwell = await sources.measure()
    finder = _Finder(request, state, sources, pins)
    manifest = await finder.manifest()
    record = await asyncio.to_thread(_whole_tree, state, request, manifest)
    result = _result(manifest, record, unwell | finder.failed)
    if record is None:
        limits = DownloadLimits(persistence=replace(PERSISTENCE, patience=stall_seconds))
        build = _Build(request, manifest, finder.signature, state, sources, result, progress, limits)
        record = await build.run(finder.remaining())
    else:
        await asyncio.to_thread(_tidy_up, state, record, manifest, finder.signature)
    result.tree = record.path
    if request.switch:
        result.switched = await asyncio.to_thread(switch_to, record)
    result.wire_bytes = sum(s.traffic.total for s in sources.in_order() if isinstance(s, RelayClient))
    result.seconds = time.monotonic() - started
    return result


def installed(request: PullRequest, state: AgentState, pins: TrustPins | None) -> Pulled | None:
    """What the request asks for, where it stands here already, so that no relay is asked; else None. Blocking.

    Its record, every byte of its files and (where `signed`) its kept signature count.
    """
    if request.digest is None:
        return None
    record = state.installed(os.path.abspath(request.root), request.digest)
    manifest = state.manifest(record) if record is not None else None
    if record is None or manifest is None or manifest.package != request.package:
        return None
    try:
        if request.signed:
            check_signature(manifest, state.signature(manifest.id), pins)
    except SignatureError:
        return None
    if not _still_stands(record, manifest):
        return None
    clear_leftovers(record.root, manifest)
    return _result(manifest, record, {})


def check_signature(manifest: Manifest, signature: bytes, pins: TrustPins | None) -> None:
    """Check that a pinned package key signed exactly this manifest.

    Raises:
        SignatureError: none did.
    """
    if pins is None:
        raise _no_pins()
    if not signature:
        raise SignatureError(f"nothing that is signed came with {manifest.package}")
    check_manifest_signature(
        signature,
        pins,
        id_key=manifest.package.id.key,
        version=manifest.package.version.url,
        manifest_id=manifest.id,
        nupkg_sha256=manifest.nupkg.sha256,
    )


def _result(manifest: Manifest, record: TreeRecord | None, failed: dict[str, str]) -> Pulled:
    return Pulled(
        package=str(manifest.package.id),
        version=manifest.package.version.normalized,
        manifest=f"sha256:{manifest.id}",
        tree="" if record is None else record.path,
        already=record is not None,
        tree_bytes=manifest.tree_size,
        failed=failed,
    )


def _no_pins() -> SignatureError:
    return SignatureError(
        "this agent has no trust.json, so nothing can vouch for a package",
        hint="Put the origin's trust.json into the agent's home ('agent init --trust FILE'), or give --digest",
    )


def _whole_tree(state: AgentState, request: PullRequest, manifest: Manifest) -> TreeRecord | None:
    """The installed tree; one that was edited or damaged does not count."""
    record = state.installed(request.root, manifest.id)
    return record if record is not None and _still_stands(record, manifest) else None


def _still_stands(record: TreeRecord, manifest: Manifest) -> bool:
    """Whether the tree is as it was installed; where it is not, the log says what is wrong with it."""
    damage = damage_in(record.path, manifest)
    if damage:
        tell(TreeDamaged(record.path, damage))
    return not damage


def _tidy_up(state: AgentState, record: TreeRecord, manifest: Manifest, signature: bytes) -> None:
    clear_leftovers(record.root, manifest)
    if signature and not state.signature(manifest.id):
        state.keep_signature(manifest.id, signature)


@dataclass(eq=False)
class _Build(Receiver):
    """One tree on its way from sources to the disk, and the tally of it in `result`."""

    request: PullRequest
    manifest: Manifest
    signature: bytes
    state: AgentState
    sources: Sources
    result: Pulled
    progress: Progress | None
    limits: DownloadLimits
    done: int = 0
    whole: int = 0

    async def run(self, order: list[AnySource]) -> TreeRecord:
        target = f"{self.request.label or self.manifest.package.version.normalized}-{ULID()}"
        tree = self.tree = await asyncio.to_thread(IncomingTree, self.request.root, self.manifest, target)
        try:
            path = await self._fill(tree, order)
            label, _, ulid = tree.target.rpartition("-")
            record = await asyncio.to_thread(
                lambda: self.state.record(
                    self.manifest, ulid=ulid, root=self.request.root, path=path, label=label, signature=self.signature
                )
            )
            await asyncio.to_thread(tree.clear)
            return record
        finally:
            await asyncio.to_thread(tree.close)

    async def _fill(self, tree: IncomingTree, order: list[AnySource]) -> str:
        """Every chunk from wherever it is nearest: the interrupted build, trees already here, the relays."""
        try:
            self.whole = sum(self.manifest.chunks[i].size for i in tree.wanted)
            self.result.resumed_bytes = self.done = sum(self.manifest.chunks[i].size for i in tree.have)
            await asyncio.to_thread(self._take_installed, tree)
            await self._download(order)
            return await asyncio.to_thread(tree.finish)
        except StoreError:
            await asyncio.to_thread(tree.clear)
            raise

    def _take_installed(self, tree: IncomingTree) -> None:
        """Chunks that an installed tree still has, hashed as they are read."""
        wanted = {self.manifest.chunk_id(i) for i in tree.missing}
        for path, held in self.state.newest_of(self.manifest.package):
            if not wanted:
                return
            for chunk in take_from(path, held, wanted):
                tree.write(chunk)
                wanted.discard(chunk.id)
                self.result.from_disk_bytes += chunk.size
                self._tell(chunk.size)

    async def _download(self, order: list[AnySource]) -> None:
        try:
            tallies = await download(self.manifest, self.tree.missing, order, self)
        except NoSourceLeftError as error:
            raise _sharpest(error, self.result.failed, self.manifest) from error
        for name, tally in tallies.items():
            self._count(name, tally)
        self.result.encodings = tuple(sum_encodings(tallies.values()))
        self.result.fallbacks = sum(tally.fallbacks for tally in tallies.values())

    # --- as the receiver of the download

    async def take(self, batch: Sequence[Received]) -> None:
        """As `Receiver`: into the tree."""
        await asyncio.to_thread(_write_all, self.tree, [received.chunk for received in batch])
        self._tell(sum(received.chunk.size for received in batch))

    async def left(self, source: ChunkSource, error: WaystationError) -> None:
        """As `Receiver`."""
        self.result.failed[source.name] = error.message
        if isinstance(error, OvertakenError):
            self.sources.overtaken(source.name, error)
        elif not isinstance(error, ChunksAbsentError):
            self.sources.failed(source.name, error)

    def goodput(self, source: str) -> float:
        """As `Receiver`."""
        return self.sources.goodput(source)

    async def bases(self) -> Holdings | None:
        """As `Receiver`."""
        return await asyncio.to_thread(self._find_bases, self.tree.missing)

    def _find_bases(self, missing: Sequence[int]) -> Holdings | None:
        """What a relay may build on: the newest tree of the same package, and others that hold the same parts."""
        own: list[tuple[str, Manifest]] = []
        others: dict[ManifestId, tuple[str, Manifest]] = {}
        for path, manifest in self.state.newest_of(self.manifest.package):
            if manifest.package.id == self.manifest.package.id:
                own.append((path, manifest))
            else:
                others.setdefault(manifest.id, (path, manifest))
        useful = worth_asking(self.manifest, missing, [manifest for _, manifest in others.values()])
        trees = own[:1] + [others[id] for id in useful[:_OTHERS_MAX]]
        return TreeHoldings(trees) if trees else None

    def _count(self, name: str, tally: SourceTally) -> None:
        if tally.chunks:
            self.result.from_relays[name] = {
                "chunks": tally.chunks,
                "bytes": tally.bytes,
                "payload_bytes": tally.payload_bytes,
            }
        if tally.error is None and not tally.overtaken:
            self.result.failed.pop(name, None)
            # What went well before a source failed must not wash the failure away.
            for timing in tally.timings:
                self.sources.succeeded(name, timing)

    def _tell(self, size: int) -> None:
        self.done += size
        if self.progress:
            self.progress(self.done, self.whole)


def _write_all(tree: IncomingTree, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        tree.write(chunk)


def may_come(error: WaystationError) -> bool:
    """Whether what a pull failed with may be over in a moment: a relay that is away, or that was not offered it yet."""
    if not isinstance(error, NoSourceLeftError):
        return isinstance(error, UnreachableError | NotFoundError) and not isinstance(error, StoreError)
    answers = (ChunksAbsentError, StalledError)
    return any(isinstance(one, UnreachableError) and not isinstance(one, answers) for one in error.errors.values())


def _sharpest(error: NoSourceLeftError, failed: dict[str, str], manifest: Manifest) -> WaystationError:
    """Where the relays that could be reached all served wrong bytes, that is the news, not the road."""
    causes = error.errors.values()
    if causes and all(isinstance(cause, UntrustedError) for cause in causes):
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return UntrustedError(f"no relay serves {manifest.package} as it was signed ({told})")
    return error


def switch_to(record: TreeRecord) -> bool:
    """Let `current` of its root name this tree; False where it did already. Blocking.

    Raises:
        RefusedError: something that is no link has that name, or another user can write to the root.
        StoreError: the disk says no; it names what it named before.
    """
    root = record.root
    current, target = os.path.join(root, "current"), os.path.relpath(record.path, root)
    try:
        check_folder(root)
        if platform.current_target(root) == target:
            return False
        platform.point_current(root, target)
    except FileExistsError as error:
        raise RefusedError(
            f"{current} is no link, and is not replaced", hint="Move it away; the tree itself is installed"
        ) from error
    except OSError as error:
        raise StoreError(f"{current} cannot name the new tree: {error.strerror or error}") from error
    return True


class _Finder:
    """Finds the manifest that is meant, and the sources that have it; leaves every source that cannot help."""

    def __init__(self, request: PullRequest, state: AgentState, sources: Sources, pins: TrustPins | None) -> None:
        self._request = request
        self._state = state
        self._sources = sources
        self._pins = pins
        self._order = sources.in_order()
        self._silent: list[str] = []
        """Sources before which another one answered, though it was asked later."""
        self.failed: dict[str, str] = {}
        """Why sources are not asked for chunks, or only at last."""
        self.signature = b""
        """What was verified, of the manifest that was found."""
        if not self._order:
            raise UnreachableError(
                "no relay is known" + "".join(f"; {note}" for note in sources.notes),
                hint="Name one with --relay, or set site and domain in agent.yaml",
            )

    def remaining(self) -> list[AnySource]:
        """Sources that did not fail so far, in order; those that said nothing come last."""
        well = [source for source in self._order if source.name not in self.failed]
        return well + [source for source in self._order if source.name in self._silent]

    async def manifest(self) -> Manifest:
        errors: list[WaystationError] = []

        def failed(number: int, error: Exception) -> None:
            if not isinstance(error, UntrustedError | UnreachableError | RefusedError):
                raise error
            errors.append(error)
            self._leave(self._order[number], error)

        asking = [partial(self._ask, source) for source in self._order]
        found = await first_result(asking, stagger=BESIDE_SECONDS, failed=failed)
        if found is None:
            raise self._verdict(errors)
        number, (manifest, self.signature) = found
        for source in self._order[:number]:
            if source.name not in self.failed:
                self._silent.append(source.name)
                by = self._order[number].name
                self._leave(source, UnreachableError(f"{source.name} said nothing while {by} answered"))
        return manifest

    def _leave(self, source: AnySource, error: WaystationError) -> None:
        self.failed[source.name] = error.message
        if not isinstance(error, NotFoundError):
            self._sources.failed(source.name, error)

    async def _ask(self, source: AnySource) -> tuple[Manifest, bytes]:
        """The manifest, and the signature that was verified of it (empty: none was)."""
        if self._request.digest is not None:
            document = await self._document(source, self._request.digest)
            if not self._request.signed:
                return document.manifest, b""
            return self._vouched_for(document, document.signature)
        assert self._pins is not None  # noqa: S101 - `pull` refused that before
        ref = self._request.package
        pointer = await source.package(ref.id, ref.version)
        statement = verify_package(pointer.signature, self._pins)
        document = await self._document(source, ManifestId(statement.manifest))
        return self._vouched_for(document, pointer.signature)

    def _vouched_for(self, document: ManifestDocument, signature: bytes) -> tuple[Manifest, bytes]:
        check_signature(document.manifest, signature, self._pins)
        return document.manifest, signature

    async def _document(self, source: AnySource, id: ManifestId) -> ManifestDocument:
        document = await source.manifest(id, await asyncio.to_thread(self._base))
        if document.manifest.package != self._request.package:
            raise ManifestError(
                f"manifest sha256:{id[:16]}… is of {document.manifest.package}, not {self._request.package}"
            )
        return document

    def _base(self) -> Manifest | None:
        """The manifest of the newest installed tree of the same package: against it, the new one costs little."""
        _, newest = next(self._state.newest_of(self._request.package), ("", None))
        return newest if newest is not None and newest.package.id == self._request.package.id else None

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
