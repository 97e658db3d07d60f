"""Deployments as they stand now: their views, out of the journal and its locks."""

from __future__ import annotations

import msgspec

from agent.orders.operation_id import SERVER
from orchestrator.journal.journal import Journal
from orchestrator.journal.views import DeploymentSummary, DeploymentView, summary, view
from orchestrator.locks.locks import holder
from orchestrator.plan.plan import Plan
from relay.errors import NotFoundError, UsageError


def find_deployment(journal: Journal, deployment: str | None, environment: str | None) -> str:
    """The ULID of the deployment that is named, else of the newest. Raises `NotFoundError`, `StoreError`."""
    if deployment is not None:
        return journal.deployment(deployment.upper()).deployment
    newest = journal.deployments(environment, limit=1)
    if not newest:
        raise NotFoundError("nothing was deployed yet" + (f" in {environment}" if environment else ""))
    return newest[0].deployment


def the_unfinished(journal: Journal, deployment: str | None, environment: str | None) -> str:
    """The ULID of the deployment that is named, else of the only one that did not end.

    Raises:
        NotFoundError: there is none.
        UsageError: there are several.
        StoreError: the journal cannot be read.
    """
    if deployment is not None:
        return journal.deployment(deployment.upper()).deployment
    found = journal.deployments(environment, state="running", limit=None)
    where = f" in {environment}" if environment else ""
    if not found:
        raise NotFoundError(f"every deployment{where} has ended", hint="'waystation release history' lists them")
    if len(found) > 1:
        several = ", ".join(f"{one.deployment} ({one.label} into {one.environment})" for one in found)
        raise UsageError(f"several deployments{where} did not end: {several}", hint="Name one")
    return found[0].deployment


def check_environment(journal: Journal, environment: str | None) -> None:
    """A name that nothing was ever deployed into is not silently empty. Raises `NotFoundError`, `StoreError`."""
    if environment is not None and not journal.deployments(environment, limit=1):
        known = sorted({record.environment for record in journal.deployments(limit=None)})
        raise NotFoundError(
            f"nothing was deployed yet into {environment!r}", hint=f"The journal knows {', '.join(known) or 'none'}"
        )


def check_machine(view: DeploymentView, machine: str | None) -> None:
    """Raises `NotFoundError` where no part of the deployment is on a machine of this name, nor on the server."""
    known = [SERVER, *(one.name for one in view.machines)]
    if machine is not None and machine.lower() not in {name.lower() for name in known}:
        label = f"{view.summary.label} in {view.summary.environment}"
        raise NotFoundError(f"{machine!r} has no part in the deployment of {label}", hint=f"It has: {', '.join(known)}")


def deployment_view(journal: Journal, deployment: str) -> DeploymentView:
    """All of one deployment. Raises `NotFoundError`, `StoreError`."""
    record = journal.deployment(deployment)
    holding = holder(journal, record.project, record.environment)
    return view(
        record,
        journal.entries(deployment),
        is_alive=holding is not None and holding.deployment == deployment,
        plan=msgspec.json.decode(journal.plan(deployment), type=Plan),
        brackets=journal.open_brackets(record.environment),
    )


def summaries(journal: Journal, environment: str | None, limit: int) -> list[DeploymentSummary]:
    """The newest deployments first. Raises `StoreError`."""
    records = journal.deployments(environment, limit=limit)
    places = {(record.project, record.environment) for record in records}
    holders = [holder(journal, *place) for place in places]
    alive = {found.deployment for found in holders if found is not None}
    return [
        summary(
            record,
            journal.entries(record.deployment) if record.state == "running" else (),
            is_alive=record.deployment in alive,
        )
        for record in records
    ]
