"""The packages of a release: made sure to be in the depot, taken from their feeds where they are not, and signed.

The process's own scripts for machines become a package too: what runs on a machine is always something that was signed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from orchestrator.depot.feed_policy import FeedCredentials, FeedPolicy
from orchestrator.files.process import ProcessFile, package_of
from orchestrator.files.script_files import read_script
from orchestrator.plan.plan import PlannedFeed, PlannedPackage
from relay.errors import ConflictError, IdentityError, NotFoundError, RefusedError, SignatureError, UsageError
from relay.package.identity import ManifestId, parse_digest
from relay.package.manifest import Manifest
from relay.stores.catalog import Pointer, Provenance

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

    from orchestrator.depot.depot import Depot
    from orchestrator.trust.secrets import SecretStore
    from relay.support.progress import Bar
    from relay.trust.keys import TrustPins

_FEED_POLICY: Final = FeedPolicy(allow_private=True)
"""A feed that the environment's file names is often one of the house. It still leads nowhere but to its own host."""


# --- what is meant


def wanted_packages(process: ProcessFile, versions: Mapping[str, str]) -> dict[str, PlannedPackage]:
    """The process's packages in these versions; a name that it does not know is kept, for the plan to refuse."""
    known = {name: package_of(use) for name, use in process.value.packages.items()}
    return {
        name: PlannedPackage(known[name].id, version, feed=known[name].feed or "")
        if name in known
        else PlannedPackage(name, version)
        for name, version in versions.items()
    }


async def known_packages(location: str, packages: Mapping[str, PlannedPackage]) -> dict[str, PlannedPackage]:
    """Fill in what the depot knows of these; one that it lacks stays as it is. No depot is made where there is none."""
    from orchestrator.depot.depot import open_depot

    if location.startswith("disk:") and not os.path.isdir(location.removeprefix("disk:")):  # noqa: ASYNC240 - once
        return dict(packages)
    found: dict[str, PlannedPackage] = {}
    async with open_depot(location) as depot:
        for name, package in packages.items():
            pointer = _find(depot, package)
            found[name] = package if pointer is None else _with_manifest(package, await depot.manifest(pointer))
    return found


def _find(depot: Depot, package: PlannedPackage) -> Pointer | None:
    """None, too, where it is no package: the plan says so, with whatever else is wrong."""
    try:
        return depot.catalog.find(package.ref)
    except IdentityError:
        return None


# --- into the depot


async def ensure_packages(
    depot: Depot,
    packages: Mapping[str, PlannedPackage],
    feeds: Mapping[str, PlannedFeed],
    secrets: SecretStore,
    signer: CryptoSigner,
    bar: Bar | None = None,
    *,
    policy: FeedPolicy | None = None,
    pins: TrustPins | None = None,
) -> dict[str, PlannedPackage]:
    """Every package of a release, signed and in the depot, with its manifest and sizes filled in.

    Whatever can be refused is refused before the first feed is asked. Every chunk of them was read then.

    Args:
        depot: where they belong.
        packages: by their names in the process.
        feeds: of the environment, by name.
        secrets: where the feeds' credentials are: `user:password`, or a token alone.
        signer: the package key.
        bar: shows what comes from a feed.
        policy: where a feed may lead.
        pins: what machines believe; their word on a signature is had now, where they are given.

    Raises:
        NotFoundError: the depot lacks one that has no feed, or the feed has none such either.
        ConflictError: one has other bytes than when it was planned.
        RefusedError: one is not signed, a feed's secret cannot be used, or the feed refuses us.
        UntrustedError: the feed sends what it must not.
        UnreachableError: the feed cannot be reached.
        StoreError: the depot's medium failed.
    """
    await depot.catalog.load()
    lacking = {name: package for name, package in packages.items() if depot.catalog.find(package.ref) is None}
    for package in lacking.values():
        if not package.feed:
            raise _not_found(package)
        if package.feed not in feeds:
            raise UsageError(f"{package.id} comes from the feed {package.feed!r}, which the environment does not name")
    for package in lacking.values():
        await _take_from_feed(depot, package, feeds[package.feed], secrets, signer, bar, policy or _FEED_POLICY)
    return {name: await _filled(depot, package, pins) for name, package in packages.items()}


async def ensure_scripts(depot: Depot, scripts: PlannedPackage | None, pins: TrustPins) -> None:
    """The package of the process's own scripts, where it has any, is whole in the depot. Raises as `ensure_packages`."""
    if scripts is not None:
        await _filled(depot, scripts, pins)


async def _take_from_feed(
    depot: Depot,
    package: PlannedPackage,
    feed: PlannedFeed,
    secrets: SecretStore,
    signer: CryptoSigner,
    bar: Bar | None,
    policy: FeedPolicy,
) -> None:
    from orchestrator.depot.add import add_from_feed

    ref = package.ref
    credentials = _credentials(secrets.value(feed.secret).reveal()) if feed.secret else None
    progress = bar(str(ref)) if bar else None
    try:
        added, _ = await add_from_feed(
            depot, signer, feed.url, ref, policy=policy, credentials=credentials, progress=progress
        )
    except NotFoundError as error:
        raise _not_found(package, str(error)) from error
    await depot.recipe(added.manifest)


def _credentials(secret: str) -> FeedCredentials:
    """NuGet feeds take Basic: with a token as the password, they take any user."""
    user, colon, password = secret.partition(":")
    return FeedCredentials(user, password) if colon else FeedCredentials("waystation", secret)


def _not_found(package: PlannedPackage, why: str = "") -> NotFoundError:
    name = f"{package.id}.{package.version}.nupkg"
    return NotFoundError(
        f"{package.id} {package.version} is not in the depot" + (f", and {why}" if why else ""),
        hint=f"Add its file with 'waystation package add {name}', or take it from a feed with "
        f"'waystation package add --feed URL {package.id} {package.version}' (or name its feed in the process)",
    )


async def _filled(depot: Depot, package: PlannedPackage, pins: TrustPins | None = None) -> PlannedPackage:
    manifest = await depot.manifest(depot.catalog.get(package.ref))
    if package.manifest and package.manifest != manifest.id:
        raise ConflictError(
            f"{package.id} {package.version} in the depot is not the one that was planned "
            f"(manifest {manifest.id[:16]}…, planned {package.manifest[:16]}…)",
            hint="A version never changes its bytes: find out who put the other one there",
        )
    signature = await depot.catalog.signature(manifest.id)
    if not signature:
        raise RefusedError(f"{package.id} {package.version} is not signed", hint="Add its nupkg again to sign it")
    if pins is not None:
        _check_signature(manifest, signature, pins)
    if mended := await depot.make_whole(manifest):
        depot.notes.append(mended)
    return _with_manifest(package, manifest)


def _check_signature(manifest: Manifest, signature: bytes, pins: TrustPins) -> None:
    from agent.trees.pull import check_signature

    try:
        check_signature(manifest, signature, pins)
    except SignatureError as error:
        raise RefusedError(
            f"no machine would believe {manifest.package} of the depot: {error.message}",
            hint="Add its nupkg again to sign it",
        ) from error


def _with_manifest(package: PlannedPackage, manifest: Manifest) -> PlannedPackage:
    return msgspec.structs.replace(
        package, manifest=manifest.id, tree_bytes=manifest.tree_size, nupkg_bytes=manifest.nupkg.size
    )


# --- the process's own scripts


async def build_scripts_package(
    folder: str, paths: Iterable[str], project: str, depot: Depot, signer: CryptoSigner
) -> PlannedPackage | None:
    """A signed package of exactly the scripts that machines run; None where there are none.

    Its version is made of its contents, so the same scripts are the same package and need not be sent again.

    Args:
        folder: of the process.
        paths: relative to it, with `/`.
        project: names the package: words of letters, digits and '_' with single '.' or '-' between them.
        depot: where it is put.
        signer: the package key.

    Raises:
        ScriptPathError: a script that cannot be read, or lies outside of `folder`.
        UsageError: one has a name that no package can have.
        IdentityError: `project` can name no package.
        StoreError: the depot's medium failed.
    """
    wanted = sorted(set(paths))
    if not wanted:
        return None
    scripts = await asyncio.to_thread(_read_scripts, folder, wanted)
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in scripts.items()}
    package = PlannedPackage(f"Waystation.Scripts.{project}", _scripts_version(digests))
    await depot.catalog.load()
    there = depot.catalog.find(package.ref)
    if there is None or not await _holds(depot, there, digests):
        await _add_scripts(depot, package, scripts, project, signer)
    return await _filled(depot, package)


def _scripts_version(digests: Mapping[str, str]) -> str:
    # A path holds no NUL and a digest has a fixed length, so no two sets of files give the same text.
    text = "".join(f"{path}\0{digest}" for path, digest in sorted(digests.items()))
    return f"1.0.0-h{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _read_scripts(folder: str, paths: Iterable[str]) -> dict[str, bytes]:
    return {path: read_script(folder, path) for path in paths}


async def _holds(depot: Depot, pointer: Pointer, digests: Mapping[str, str]) -> bool:
    """Whether the package that is there is whole and signed, and has these files.

    Packing them again could give other bytes by another zlib, and with them a conflict for nothing.
    """
    manifest = await depot.catalog.manifest(pointer.manifest_id)
    if manifest is None or not await depot.catalog.signature(manifest.id):
        return False
    files = {manifest.parts[i].path: manifest.part_sha256(i) for i in manifest.tree_parts}
    ids = set(manifest.chunk_ids())
    return files == dict(digests) and await depot.store.chunks.sound_many(ids) == ids


async def _add_scripts(
    depot: Depot, package: PlannedPackage, scripts: Mapping[str, bytes], project: str, signer: CryptoSigner
) -> None:
    with tempfile.TemporaryDirectory(prefix="waystation-scripts-") as folder:
        path = await asyncio.to_thread(_pack, folder, package, scripts, project)
        provenance = Provenance("added", f"scripts of {project}")
        added = await depot.add(path, signer, provenance, expected=package.ref)
        await depot.recipe(added.manifest)


def _pack(folder: str, package: PlannedPackage, scripts: Mapping[str, bytes], project: str) -> str:
    from relay.package.pack import pack_file

    ref = package.ref
    tree = os.path.join(folder, "tree")
    for path, data in scripts.items():
        target = Path(tree, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        # A script is started by its interpreter; its mode must not make another package of the same bytes.
        target.chmod(0o644)
    output, about = os.path.join(folder, "scripts.nupkg"), f"Scripts of {project}"
    pack_file(tree, output, id=ref.id, version=ref.version, authors="Waystation", description=about)
    return output


# --- onto the server


class ServerTrees:
    """Verified trees of packages of the depot, for steps on the server. Built as an agent builds them."""

    def __init__(self, depot_location: str, pins: TrustPins, folder: str) -> None:
        """Build below `folder`, out of what is there and in the depot; the same package again is the same tree."""
        self._depot_location = depot_location
        self._pins = pins
        self._folder = folder

    async def build(self, package: PlannedPackage) -> str:
        """The path of the package's tree, every byte of which was just read; one that is still whole is not built anew.

        Raises:
            SignatureError: no pinned package key signed exactly what was planned.
            UntrustedError: the same, where no other source is left to ask.
            NotFoundError, UnreachableError: it is not in the depot, or the depot lost some of it.
            LockedError: another process builds the same tree.
            StoreError: the disk is full or failed.
        """
        from agent.config import AgentConfig
        from agent.relays.sources import Sources
        from agent.trees.installed import AgentState
        from agent.trees.pull import PullRequest, pull

        home = os.path.join(os.path.abspath(self._folder), "state")  # noqa: ASYNC240 - contacts no disk
        manifest = ManifestId(parse_digest(package.manifest))
        request = PullRequest(package.ref, self._folder, manifest, signed=True)
        config, relays = AgentConfig(name="server"), [self._depot_location]
        async with Sources(config, Path(home, "relays.json"), relays=relays) as sources:
            return (await pull(request, AgentState(home), sources, self._pins)).tree
