"""What the orchestrator's commands share: options and arguments, what they mean, and how a package is shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from relay.config import home
from relay.errors import IdentityError, UsageError

if TYPE_CHECKING:
    from relay.package.identity import PackageRef
    from relay.stores.catalog import Pointer

depot_option = click.option(
    "--depot", metavar="LOCATION", help="Where packages are kept. [default: depot in $WAYSTATION_HOME]"
)
trust_option = click.option(
    "--trust",
    "trust_folder",
    metavar="DIR",
    help="Folder of the keys and of trust.json. [default: trust in $WAYSTATION_HOME]",
)


def depot_location(given: str | None) -> str:
    """Of the depot's store."""
    return given or f"disk:{os.path.join(home(), 'depot')}"


def trust_folder(given: str | None) -> str:
    """Of the keys, absolute."""
    return os.path.abspath(given) if given else os.path.join(home(), "trust")


def pointer_document(pointer: Pointer) -> dict[str, Any]:
    return {
        "id": pointer.id,
        "version": pointer.version,
        "manifest": f"sha256:{pointer.manifest}",
        "nupkg_sha256": pointer.nupkg_sha256,
        "size": pointer.size,
        "published": pointer.published,
        "provenance": {
            "how": pointer.provenance.how,
            "source": pointer.provenance.source,
            "verified_by": pointer.provenance.verified_by,
        },
    }


def package_ref(id: str, version: str) -> PackageRef:
    """What was typed as ID VERSION. Raises `UsageError`."""
    from relay.package.identity import NuGetVersion, PackageId, PackageRef

    try:
        return PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
    except IdentityError as error:
        raise UsageError(error.message) from error
