"""Which packages are here. Manifests and pointers are documents in the store; this is a cache over them, filled by a scan.

manifests/<sha256>          the canonical manifest
signatures/<sha256>         the DSSE envelope that came with it
packages/<id>/<version>     the pointer: this id and version is that manifest, since when and from where
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

import msgspec

from relay.audit.acts import DocumentDamaged
from relay.audit.event import tell
from relay.errors import ConflictError, IdentityError, ManifestError, NotFoundError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.package.manifest import Manifest, parse_named
from relay.stores.contract import Documents
from relay.support.together import Flights

_CACHED_BYTES = 32 << 20
"""Canonical bytes of the manifests kept parsed."""

How = Literal["added", "replicated", "pushed", "mirrored"]


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a package came here, and what vouched for its bytes then."""

    how: How
    source: str = ""
    verified_by: str = ""


class Pointer(msgspec.Struct, frozen=True):
    """One published package."""

    id: str
    version: str
    manifest: str
    nupkg_sha256: str
    size: int
    """Bytes of the nupkg."""
    published: str
    """UTC, ISO 8601."""
    provenance: Provenance

    @property
    def ref(self) -> PackageRef:
        return PackageRef(PackageId.parse(self.id), NuGetVersion.parse(self.version))

    @property
    def manifest_id(self) -> ManifestId:
        return ManifestId(parse_digest(self.manifest))


class Catalog:
    """Published packages and known manifests of one store."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._pointers: dict[tuple[str, str], Pointer] = {}
        self._parsed: OrderedDict[ManifestId, Manifest] = OrderedDict()
        self._loading: Flights[ManifestId, Manifest | None] = Flights()

    async def load(self) -> None:
        """Read every pointer again. The store is the truth; this may be called at any time."""
        self._pointers = {pointer.ref.key: pointer for pointer in await self.look_up_all()}

    # --- packages

    def all(self) -> list[Pointer]:
        """Every published package, by id and then version."""
        return _in_order(self._pointers.values())

    def of_id(self, id: PackageId) -> list[Pointer]:
        return [pointer for pointer in self.all() if pointer.ref.id == id]

    def find(self, ref: PackageRef) -> Pointer | None:
        return self._pointers.get(ref.key)

    def get(self, ref: PackageRef) -> Pointer:
        """Raises `NotFoundError`, naming what versions there are."""
        pointer = self.find(ref)
        if pointer is not None:
            return pointer
        versions = [str(p.version) for p in self.of_id(ref.id)]
        hint = f"Here are: {', '.join(versions[-5:])}" if versions else "No version of it is here"
        raise NotFoundError(f"{ref} is not here", hint=hint)

    async def look_up(self, ref: PackageRef) -> Pointer:
        """One pointer, straight from the store: for who asks once and has not scanned.

        Raises:
            NotFoundError: no such package, or its pointer is damaged.
        """
        pointer = await self._read_pointer(_pointer_name(ref))
        if pointer is None:
            raise NotFoundError(f"{ref} is not here")
        return pointer

    async def look_up_all(self, id: PackageId | None = None) -> list[Pointer]:
        """Every package, or every version of one id, straight from the store; in order, as `all` gives them.

        The cache stays as it is: a publish that ends while this reads must not be forgotten again.
        """
        names = await self._documents.list(f"packages/{id.key}" if id else "packages")
        found = [await self._read_pointer(name) for name in names]
        return _in_order(pointer for pointer in found if pointer is not None)

    def check_free(self, manifest: Manifest) -> Pointer | None:
        """The pointer that says the same already, or None where the name is free. Raises as `check_name`."""
        return self.check_name(manifest.package, manifest.nupkg.sha256)

    def check_name(self, ref: PackageRef, nupkg_sha256: str) -> Pointer | None:
        """As `check_free`, before there is a manifest.

        Raises:
            ConflictError: the id and version stand for another nupkg.
        """
        there = self.find(ref)
        if there is not None and there.nupkg_sha256 != nupkg_sha256:
            raise ConflictError(
                f"{ref} is here already with other bytes "
                f"(nupkg sha256 {there.nupkg_sha256[:16]}…, this one {nupkg_sha256[:16]}…)",
                hint="A version never changes its bytes: give the new build a new version",
            )
        return there

    async def publish(self, manifest: Manifest, provenance: Provenance) -> Pointer:
        """Make it visible. All its chunks must be durable already. Doing it again changes nothing.

        Raises:
            ConflictError: the id and version stand for another nupkg.
        """
        there = self.check_free(manifest)
        if there is not None:
            return there
        pointer = Pointer(
            id=str(manifest.package.id),
            version=manifest.package.version.normalized,
            manifest=manifest.id,
            nupkg_sha256=manifest.nupkg.sha256,
            size=manifest.nupkg.size,
            published=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance=provenance,
        )
        name = _pointer_name(manifest.package)
        if not await self._documents.create(name, msgspec.json.encode(pointer)):
            # Another process of this store was first: what it wrote counts, unless it is damaged.
            first = await self._read_pointer(name)
            if first is not None:
                self._pointers[manifest.package.key] = first
                return self.check_free(manifest) or first
            await self._documents.write(name, msgspec.json.encode(pointer))
        self._pointers[manifest.package.key] = pointer
        return pointer

    async def remove(self, ref: PackageRef) -> Pointer:
        """Take the package out of sight. Its chunks stay until a sweep. Raises `NotFoundError`."""
        pointer = self.get(ref)
        await self._documents.remove(_pointer_name(ref))
        self._pointers.pop(ref.key, None)
        return pointer

    # --- manifests

    async def keep_manifest(self, manifest: Manifest, signature: bytes) -> None:
        """Durable, not listed. The last envelope that came with it is the one that is handed on."""
        name = f"manifests/{manifest.id}"
        created = await self._documents.create(name, manifest.canonical)
        if not created and await self._documents.read(name) != manifest.canonical:
            # Damaged since: this mends it.
            await self._documents.write(name, manifest.canonical)
        if signature and await self.signature(manifest.id) != signature:
            await self._documents.write(f"signatures/{manifest.id}", signature)
        self._remember(manifest)

    async def manifest(self, id: ManifestId) -> Manifest | None:
        """A manifest that is kept here, parsed; one load however many ask."""
        if id in self._parsed:
            self._parsed.move_to_end(id)
            return self._parsed[id]
        return await self._loading.join(id, lambda: self._load_manifest(id))

    async def signature(self, id: ManifestId) -> bytes:
        """The DSSE envelope, empty where there is none."""
        return await self._documents.read(f"signatures/{id}") or b""

    async def manifests_of(self, ids: Iterable[ManifestId]) -> dict[ManifestId, Manifest]:
        """Those of `ids` that are kept here."""
        found = {id: await self.manifest(id) for id in ids}
        return {id: manifest for id, manifest in found.items() if manifest is not None}

    async def _read_pointer(self, name: str) -> Pointer | None:
        """A pointer that is damaged counts as absent: the package can be published again."""
        raw = await self._documents.read(name)
        if raw is None:
            return None
        try:
            pointer = msgspec.json.decode(raw, type=Pointer)
            same = _pointer_name(pointer.ref) == name and bool(pointer.manifest_id)
        except (msgspec.DecodeError, UnicodeDecodeError, IdentityError) as error:
            tell(DocumentDamaged(name, str(error)))
            return None
        return pointer if same else None

    async def _load_manifest(self, id: ManifestId) -> Manifest | None:
        raw = await self._documents.read(f"manifests/{id}")
        try:
            manifest = await asyncio.to_thread(parse_named, raw or b"", id)
        except ManifestError:
            # One that is damaged counts as absent: it can be offered again.
            return None
        self._remember(manifest)
        return manifest

    def _remember(self, manifest: Manifest) -> None:
        self._parsed[manifest.id] = manifest
        self._parsed.move_to_end(manifest.id)
        while len(self._parsed) > 1 and sum(len(m.canonical) for m in self._parsed.values()) > _CACHED_BYTES:
            self._parsed.popitem(last=False)


def _in_order(pointers: Iterable[Pointer]) -> list[Pointer]:
    return sorted(pointers, key=lambda p: (p.ref.id.key, p.ref.version))


def _pointer_name(ref: PackageRef) -> str:
    return f"packages/{ref.id.key}/{ref.version.url}"
