"""Deployments as they stand now: their views, out of the journal and its locks."""

from __future__ import annotations

import msgspec

from orchestrator.journal.journal import Journal
from orchestrator.journal.locks import holder
from orchestrator.journal.views import DeploymentSummary, DeploymentView, open_brackets, summary, view
from orchestrator.plan.plan import Plan
from relay.errors import NotFoundError


def find_deployment(journal: Journal, deployment: str | None, environment: str | None) -> str:
    """The ULID of the deployment that is named, else of the newest. Raises `NotFoundError`, `StoreError`."""
    if deployment is not None:
        return journal.deployment(deployment.upper()).deployment
    newest = journal.deployments(environment, limit=1)
    if not newest:
        raise NotFoundError("nothing was deployed yet" + (f" in {environment}" if environment else ""))
    return newest[0].deployment


def deployment_view(journal: Journal, deployment: str) -> DeploymentView:
    """All of one deployment. Raises `NotFoundError`, `StoreError`."""
    record = journal.deployment(deployment)
    holding = holder(journal, record.environment)
    return view(
        record,
        journal.entries(deployment),
        is_alive=holding is not None and holding.deployment == deployment,
        plan=msgspec.json.decode(journal.plan(deployment), type=Plan),
        brackets=open_brackets(journal.brackets(record.environment)),
    )


def summaries(journal: Journal, environment: str | None, limit: int) -> list[DeploymentSummary]:
    """The newest deployments first. Raises `StoreError`."""
    records = journal.deployments(environment, limit=limit)
    holders = [holder(journal, name) for name in {record.environment for record in records}]
    alive = {found.deployment for found in holders if found is not None}
    return [summary(record, is_alive=record.deployment in alive) for record in records]
