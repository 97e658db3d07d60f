"""The identical nupkg as a file: out of the depot or from a relay, and believed only after a pinned key vouched for it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiofiles

from agent.trees.pull import check_signature
from orchestrator.depot.depot import open_depot
from relay.errors import ConflictError, UntrustedError, UsageError
from relay.package.identity import PackageRef
from relay.package.manifest import Manifest
from relay.support.durable import sync_folder
from relay.support.progress import Progress

if TYPE_CHECKING:
    from relay.protocol.client import RelayClient
    from relay.trust.keys import TrustPins


@dataclass(frozen=True, slots=True)
class Fetched:
    """A nupkg that is the signed one, to the last byte. `new` is False where the same file stood there already."""

    manifest: Manifest
    path: str
    new: bool


async def fetch_from_depot(location: str, ref: PackageRef, pins: TrustPins, path: str, progress: Progress) -> Fetched:
    """Out of the depot at `location`; a nupkg that it lost is made of its chunks again.

    Raises:
        NotFoundError: no such package, or its nupkg is lost and cannot be made.
        SignatureError: no pinned package key signed it.
        ConflictError: another file stands at `path`.
        UsageError: `path` cannot be written.
        UntrustedError, StoreError: the depot is damaged, or its medium failed.
    """
    async with open_depot(location) as depot:
        manifest = await depot.manifest(depot.catalog.get(ref))
        check_signature(manifest, await depot.catalog.signature(manifest.id), pins)
        return await _write(manifest, depot.nupkgs.read(manifest), path, progress)


async def fetch_from_relay(
    relay: RelayClient, ref: PackageRef, pins: TrustPins, path: str, progress: Progress
) -> Fetched:
    """From a relay, whose client is opened and closed. Raises as `fetch_from_depot`, with what `RelayClient.nupkg` raises."""
    async with relay:
        pointer = await relay.package(ref.id, ref.version)
        document = await relay.manifest(pointer.manifest)
        manifest = document.manifest
        if manifest.package != ref:
            raise UntrustedError(f"{relay.url} answers with {manifest.package} where {ref} was asked for")
        check_signature(manifest, document.signature, pins)
        return await _write(manifest, relay.nupkg(ref), path, progress)


async def _write(manifest: Manifest, pieces: AsyncGenerator[bytes, None], path: str, progress: Progress) -> Fetched:
    """Whole, durable and checked, or not at all; never over another file."""
    temporary = f"{path}.{secrets.token_hex(4)}.part"
    try:
        async with aclosing(pieces):
            if await asyncio.to_thread(_stands, path, manifest):
                return Fetched(manifest, path, new=False)
            await _spool(manifest, pieces, temporary, progress)
        await asyncio.to_thread(_name, temporary, path)
    except FileExistsError as error:
        raise ConflictError(f"{path} is there already, and is another file", hint="Nothing was overwritten") from error
    except OSError as error:
        raise UsageError(f"{error.filename or path}: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return Fetched(manifest, path, new=True)


async def _spool(manifest: Manifest, pieces: AsyncGenerator[bytes, None], temporary: str, progress: Progress) -> None:
    sha256, sha512, size = hashlib.sha256(), hashlib.sha512(), 0
    async with aiofiles.open(temporary, "xb") as file:
        async for piece in pieces:
            size += len(piece)
            if size > manifest.nupkg.size:
                break
            await asyncio.to_thread(sha512.update, piece)
            await asyncio.to_thread(sha256.update, piece)
            await file.write(piece)
            progress(size, manifest.nupkg.size)
        await file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    found = (size, sha256.hexdigest(), b64encode(sha512.digest()).decode())
    if found != (manifest.nupkg.size, manifest.nupkg.sha256, manifest.nupkg.sha512):
        raise UntrustedError(f"what came is not the nupkg of {manifest.package}: its SHA-512 is another")


def _stands(path: str, manifest: Manifest) -> bool:
    """Whether the same file is there. Raises `FileExistsError` for another one."""
    try:
        with open(path, "rb") as file:
            same = os.fstat(file.fileno()).st_size == manifest.nupkg.size
            if same and hashlib.file_digest(file, "sha256").hexdigest() == manifest.nupkg.sha256:
                return True
    except FileNotFoundError:
        return False
    raise FileExistsError(path)


def _name(temporary: str, path: str) -> None:
    """Give the finished file its name, unless it was taken meanwhile. Raises `FileExistsError`."""
    os.link(temporary, path, follow_symlinks=False)
    os.unlink(temporary)
    sync_folder(os.path.dirname(path))
