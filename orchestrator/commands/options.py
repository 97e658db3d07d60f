"""What the orchestrator's commands share: options and arguments, what they mean, and how a package is shown."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import click

from relay.config import home
from relay.errors import IdentityError, UsageError
from relay.support.console import print_json, run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.depot.depot import Depot
    from orchestrator.journal.journal import Journal
    from orchestrator.paths import Paths
    from relay.package.identity import PackageRef
    from relay.stores.catalog import Pointer

T = TypeVar("T")

DONE, FAILED, WITH_EXCLUSIONS, CANCELLED = 0, 1, 5, 130
"""Exit codes of what deploys."""

depot_option = click.option(
    "--depot", metavar="LOCATION", help="Where packages are kept. [default: depot in $WAYSTATION_HOME]"
)
trust_option = click.option(
    "--trust",
    "trust_folder",
    metavar="DIR",
    help="Folder of the keys and of trust.json. [default: trust in $WAYSTATION_HOME]",
)
journal_option = click.option(
    "--journal", metavar="FILE", help="The journal of deployments. [default: journal.db in $WAYSTATION_HOME]"
)


def depot_location(given: str | None) -> str:
    """Of the depot's store."""
    return given or f"disk:{os.path.join(home(), 'depot')}"


def in_depot(given: str | None, work: Callable[[Depot], Awaitable[T]]) -> T:
    """What `work` gives, of the depot that was typed."""

    async def main() -> T:
        from orchestrator.depot.depot import open_depot

        async with open_depot(depot_location(given)) as depot:
            return await work(depot)

    return run(main())


def trust_folder(given: str | None) -> str:
    """Of the keys, absolute."""
    return os.path.abspath(given) if given else os.path.join(home(), "trust")


def paths_of(depot: str | None = None, trust: str | None = None, journal: str | None = None) -> Paths:
    """Where all of this orchestrator is, given what was typed."""
    from orchestrator.paths import Paths

    return Paths(
        home=home(),
        depot=depot_location(depot),
        trust=trust_folder(trust),
        journal=journal or os.path.join(home(), "journal.db"),
    )


def check_installed() -> None:
    """Raises `UsageError` where only what agents and relays need is installed."""
    if find_spec("sqlalchemy") is None:
        raise UsageError(
            "releases need SQLAlchemy, which is not installed", hint="pip install 'waystation[orchestrator]'"
        )


def open_journal(paths: Paths) -> Journal:
    """Raises `UsageError` where only what agents and relays need is installed, and as `Journal.open`."""
    check_installed()
    from orchestrator.journal.journal import Journal

    return Journal.open(paths.journal)


def answer(document: object, text: str, *, as_json: bool) -> None:
    """Print what a command found, as one JSON document or as text."""
    if as_json:
        print_json(document)
    else:
        click.echo(text)


def time_text(seconds: float) -> str:
    """A time of the journal, for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


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


def package_ref(id: str, version: str, hint: str = "") -> PackageRef:
    """What was typed as ID VERSION. Raises `UsageError`."""
    from relay.package.identity import NuGetVersion, PackageId, PackageRef

    try:
        return PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
    except IdentityError as error:
        raise UsageError(error.message, hint=hint) from error
