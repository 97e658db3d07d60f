"""Options that the orchestrator's commands share, and what they mean where they are not given."""

from __future__ import annotations

import os

import click

from relay.config import home

depot_option = click.option(
    "--depot", metavar="LOCATION", help="Where packages are kept. [default: depot in $WAYSTATION_HOME]"
)
trust_option = click.option(
    "--trust", "trust_folder", metavar="DIR", help="Folder of the keys. [default: trust in $WAYSTATION_HOME]"
)


def depot_location(given: str | None) -> str:
    """Of the depot's store."""
    return given or f"disk:{os.path.join(home(), 'depot')}"


def trust_folder(given: str | None) -> str:
    """Of the keys, absolute."""
    return os.path.abspath(given) if given else os.path.join(home(), "trust")
