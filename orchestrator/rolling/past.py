"""What went before in one environment, read out of the journal for those who go on from it or back."""

from __future__ import annotations

import msgspec

from orchestrator.journal.events import DeploymentRecord
from orchestrator.journal.journal import Journal
from orchestrator.plan.plan import Plan
from orchestrator.rolling.again import Attempt
from orchestrator.rolling.going_back import Past, some_step_began
from relay.errors import RefusedError, UsageError


def past_records(journal: Journal, project: str | None, environment: str) -> list[DeploymentRecord]:
    """Deployments into an environment, the oldest first. Raises `StoreError`."""
    every = journal.deployments(environment, limit=None)
    return [record for record in reversed(every) if project is None or record.project == project]


def past_of(journal: Journal, project: str | None, environment: str) -> list[Past]:
    """Those of one project, the oldest first.

    Raises:
        UsageError: no project is named, and several were deployed there.
        RefusedError: nothing was.
        StoreError: the journal cannot be read.
    """
    records = past_records(journal, project, environment)
    projects = sorted({record.project for record in records})
    if len(projects) > 1:
        raise UsageError(
            f"several projects are in {environment}: {', '.join(projects)}", hint="Name one with --project"
        )
    if not records:
        raise RefusedError(f"nothing was deployed yet into {environment}" + (f" of {project}" if project else ""))
    return [Past(record, record.state == "succeeded" or _began(journal, record.deployment)) for record in records]


def attempt_of(journal: Journal, deployment: str) -> Attempt:
    """A deployment with its plan and its entries. Raises `NotFoundError`, `StoreError`."""
    return Attempt(deployment, _plan(journal, deployment), journal.entries(deployment))


def chain_of(journal: Journal, deployment: str) -> list[Attempt]:
    """The deployment, those whose machines it tried again, and those that did so with its own; the oldest first.

    Raises:
        RefusedError: another one began there since.
        NotFoundError: there is no such deployment.
    """
    record = journal.deployment(deployment)
    chain = [deployment]
    while earlier := _plan(journal, chain[0]).retries:
        chain.insert(0, earlier)
    for later in past_records(journal, record.project, record.environment):
        if later.deployment <= deployment:
            continue
        if _plan(journal, later.deployment).retries in chain:
            chain.append(later.deployment)
        elif later.goal != "stage" and _began(journal, later.deployment):
            raise RefusedError(
                f"{later.label} was deployed into {record.environment} since {record.label} (deployment {later.deployment})",
                hint="Retry that one, or deploy the other again by its label",
            )
    return [attempt_of(journal, one) for one in chain]


def _plan(journal: Journal, deployment: str) -> Plan:
    return msgspec.json.decode(journal.plan(deployment), type=Plan)


def _began(journal: Journal, deployment: str) -> bool:
    return some_step_began(journal.entries(deployment))
