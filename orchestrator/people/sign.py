"""Signing a decision and leaving it in the journal."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ulid import ULID

from orchestrator.paths import Paths, operator
from orchestrator.people.statement import Saying, Statement, row_data, sign_statement
from orchestrator.trust.keyring import load_person_signer, load_pins
from relay.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from securesystemslib.signer import Signer

    from orchestrator.journal.journal import Journal


@dataclass(frozen=True, slots=True)
class Acting:
    """Who acts in an environment: `by` as in `SignedDecision`, `who` is user and host."""

    by: str
    who: str
    signer: Signer = field(repr=False)


def acting(paths: Paths, environment: str) -> Acting:
    """Who acts here, as far as trust.json believes it.

    Raises:
        NotFoundError: there is no such key, or no trust.json.
        RefusedError: trust.json does not know the key, or not under this name, or not for this environment; or the key's
            file is open to others.
    """
    signer, who = load_person_signer(paths.trust, paths.person, paths.keys), operator()
    keyid, pins = signer.public_key.keyid, load_pins(paths.trust)
    whose = paths.person or "the order key"
    key = next((key for key in pins.order if key.keyid == keyid), None)
    if key is None or key.name != paths.person:
        names = ", ".join(key.name for key in pins.order if key.name) or "nobody"
        raise RefusedError(f"trust.json does not know {whose} by this key", hint=f"It knows {names} by name")
    if key not in pins.order_keys(environment):
        raise RefusedError(
            f"{whose} may not decide in {environment}: trust.json names {', '.join(key.environments or ())}"
        )
    return Acting(paths.person or who, who, signer)


def decide(
    journal: Journal, paths: Paths, deployment: str, saying: Saying, *, clock: Callable[[], float] = time.time
) -> int:
    """Sign what a person (`Paths.person`) says of a deployment, and write it down; gives the number of the row.

    Whether that person may say so is not asked here: `judging.why_not` tells.

    Raises:
        NotFoundError: there is no such deployment, or no such key.
        RefusedError: see `acting`.
        StoreError: as `Journal`.
    """
    of = journal.deployment(deployment)
    person = acting(paths, of.environment)
    statement = Statement(
        format=1,
        id=str(ULID()),
        deployment=deployment,
        project=of.project,
        environment=of.environment,
        label=of.label,
        who=person.who,
        at=clock(),
        saying=saying,
    )
    envelope = sign_statement(statement, person.signer)
    return journal.decide(of.environment, deployment, saying.kind, row_data(statement), person.by, envelope)
