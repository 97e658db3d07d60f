"""Events of the orchestrator that no deployment's journal has. The docstring of each says when it is told.

What happens in a deployment is told by its journal: `orchestrator/journal/trail.py` makes events of its entries.
"""

from __future__ import annotations

from relay.audit.event import Event


class KeysMade(Event, frozen=True, tag="orchestrator.keys_made"):
    """Keys that sign packages and orders were made: their ids."""

    operator: str
    folder: str
    package_key: str
    order_key: str


class PersonNamed(Event, frozen=True, tag="orchestrator.person_named"):
    """A person got an order key, in these environments (none: in all)."""

    operator: str
    folder: str
    person: str
    key: str
    environments: list[str]


class PackageAdded(Event, frozen=True, tag="orchestrator.package_added"):
    """A package was taken into the depot, or was there already; `source` is the file or feed that it is from."""

    operator: str
    package: str
    version: str
    manifest: str
    nupkg_sha256: str
    source: str


class PackageRemoved(Event, frozen=True, tag="orchestrator.package_removed"):
    """A package was taken out of the depot's list."""

    operator: str
    package: str
    version: str
    manifest: str


class ReleaseCreated(Event, frozen=True, tag="orchestrator.release_created"):
    """A release was frozen and signed; `new`: it was not there before. `document` is the SHA-256 of what was signed."""

    operator: str
    project: str
    label: str
    document: str
    new: bool


class LockTaken(Event, frozen=True, tag="orchestrator.lock_taken"):
    """A project's place in an environment is held: no other deployment of this project begins there."""

    operator: str
    project: str
    environment: str
    why: str
    label: str
    deployment: str


class LockGivenBack(Event, frozen=True, tag="orchestrator.lock_given_back"):
    """That place is free again."""

    operator: str
    project: str
    environment: str
    deployment: str


class FenceClaimed(Event, frozen=True, tag="orchestrator.fence_claimed"):
    """A deployment to be shuts out all of its project that began before it there: agents obey none with a lower fence."""

    project: str
    environment: str
    fence: int


class Decided(Event, frozen=True, tag="orchestrator.decided"):
    """A person decided something about a running deployment, such as `cancel`. That it was obeyed is told by the deployment."""

    operator: str
    environment: str
    deployment: str
    what: str
