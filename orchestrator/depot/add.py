"""Packages into the depot: files at hand, or a package of a feed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator.depot.nuget_client import FeedDownload, download
from relay.errors import WaystationError
from relay.package.zip_reader import DEFAULT_LIMITS, WalkLimits
from relay.stores.catalog import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable

    from securesystemslib.signer import CryptoSigner

    from orchestrator.depot.depot import Added, Depot
    from orchestrator.depot.feed_policy import FeedCredentials, FeedPolicy
    from relay.package.identity import PackageRef
    from relay.support.progress import Progress


async def add_files(
    depot: Depot,
    signer: CryptoSigner,
    paths: Iterable[str],
    bar: Callable[[str], Progress],
    limits: WalkLimits = DEFAULT_LIMITS,
) -> tuple[list[Added], dict[str, WaystationError]]:
    """What was added, and why each other path was refused: one bad file does not keep the others out."""
    added: list[Added] = []
    errors: dict[str, WaystationError] = {}
    for path in paths:
        name = os.path.basename(path)
        try:
            show, provenance = bar(name), Provenance("added", name)
            added.append(one := await depot.add(path, signer, provenance, progress=show, limits=limits))
            show(one.manifest.stream_size, one.manifest.stream_size)
        except WaystationError as error:
            errors[path] = error
    return added, errors


async def add_from_feed(
    depot: Depot,
    signer: CryptoSigner,
    feed_url: str,
    ref: PackageRef,
    *,
    policy: FeedPolicy,
    credentials: FeedCredentials | None = None,
    sha512: str | None = None,
    progress: Progress | None = None,
    limits: WalkLimits = DEFAULT_LIMITS,
) -> tuple[Added, FeedDownload]:
    """Download one package, check that it is `ref`, and add it. Raises as `download` and `Depot.add`."""
    with tempfile.TemporaryDirectory(prefix="waystation-feed-") as folder:
        path = os.path.join(folder, "package.nupkg")
        got = await download(feed_url, ref.id, ref.version, path, sha512=sha512, policy=policy, credentials=credentials)
        provenance = Provenance("added", got.source_url, got.verified_by)
        return await depot.add(path, signer, provenance, progress=progress, expected=ref, limits=limits), got
