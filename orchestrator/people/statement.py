"""What a person says of a deployment, and the signed form in which the journal keeps it. Pure.

Each row of the journal's decisions carries a DSSE envelope, signed by the person's order key, over a `Statement`. It names
the deployment, the question or the machine, and itself (`id`): a row that was copied to another place says so, and one that
was copied beside itself was used before. The columns of the row are for looking things up; they must say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec

from orchestrator.journal import events as ev
from relay.errors import SignatureError
from relay.trust.envelopes import check_form, decode_document, sign_document, verify_document

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from orchestrator.journal.events import JournalEntry
    from orchestrator.journal.journal import Decision
    from orchestrator.plan.plan import Plan
    from relay.trust.keys import TrustPins

DECISION_TYPE: Final = "application/vnd.waystation.decision+json"
"""Of the signed statement."""

MachineChoice = Literal["retry", "rollback", "put-back", "exclude", "fail"]
"""What may be decided of a machine."""

Why = Annotated[str, msgspec.Meta(max_length=2000)]
_Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
_Short = Annotated[str, msgspec.Meta(max_length=200)]
_Ulid = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-HJKMNP-TV-Z]{26}\Z")]


class _Saying(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="kind"):
    """One kind of decision."""

    @property
    def kind(self) -> str:
        """The tag, as it stands in the column `kind`."""
        return str(self.__struct_config__.tag)


class Approve(_Saying, frozen=True, tag="approve"):
    """Yes to a question; `ask` is its id (`STEP/NAME`)."""

    ask: _Short
    why: Why = ""


class Reject(_Saying, frozen=True, tag="reject"):
    """No, and why."""

    ask: _Short
    why: _Reason


class Decide(_Saying, frozen=True, tag="decide"):
    """What is to be done with a machine whose turn of step `step` waits for a person."""

    machine: _Short
    step: int
    what: MachineChoice
    why: Why = ""


class Pause(_Saying, frozen=True, tag="pause"):
    """Nothing new starts until somebody says `GoOn`."""

    why: Why = ""


class GoOn(_Saying, frozen=True, tag="go-on"):
    """It goes on."""

    why: Why = ""


class Cancel(_Saying, frozen=True, tag="cancel"):
    """Nothing new starts, what is in flight comes to its end; `now`: it is killed."""

    now: bool = False
    why: Why = ""


Saying = Approve | Reject | Decide | Pause | GoOn | Cancel


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is signed.

    Attributes:
        id: a ULID that is made for each statement: none counts twice.
        deployment: its ULID; `project`, `environment` and `label` are those of its plan.
        who: user and host, as the person's own machine says it; always with an `@`.
        at: seconds since 1970, by the person's clock.
    """

    format: Literal[1]
    id: _Ulid
    deployment: _Ulid
    project: _Short
    environment: _Short
    label: _Short
    who: Annotated[str, msgspec.Meta(pattern="@", max_length=400)]
    at: float
    saying: Saying


@dataclass(frozen=True, slots=True)
class SignedDecision:
    """A row that counts, as far as its signature and what it is bound to can say.

    Attributes:
        number: of the row.
        id: of the statement.
        by: the name of the person whose key signed it; user and host (with an `@`) where that key has no name.
        at: seconds since 1970: when it was said, or written where that was later.
    """

    number: int
    id: str
    by: str
    at: float
    saying: Saying


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that does not count: unsigned, forged, or said of something else. Nobody is believed to have said it."""

    number: int
    reason: str


def is_person(by: str) -> bool:
    """Whether `by` is the name of a person, and not the user and host of a key without a name."""
    return bool(by) and "@" not in by


def row_data(statement: Statement) -> dict[str, Any]:
    """The column `data` for a statement: what it says, and its id."""
    said = msgspec.to_builtins(statement.saying)
    return {"id": statement.id} | {name: value for name, value in said.items() if name != "kind"}


def sign_statement(statement: Statement, signer: Signer) -> bytes:
    """The envelope. Raises `UsageError` where it is larger than one may be."""
    return sign_document(_encode(statement), DECISION_TYPE, signer)


def read_decision(
    row: Decision, pins: TrustPins, plan: Plan, used: Collection[str] = frozenset()
) -> SignedDecision | Refusal:
    """What a row says and whose word it is, or why it does not count. Whether that person may say so, `judging` tells.

    Args:
        row: as the journal holds it.
        pins: whose keys count: those that may order in the plan's environment.
        plan: of the deployment that is asked to obey.
        used: ids of statements that were obeyed before (`used_statements`).
    """
    try:
        return _read(row, pins, plan, used)
    except SignatureError as error:
        return Refusal(row.number, error.message)


def used_statements(entries: Iterable[JournalEntry]) -> set[str]:
    """Ids of the statements that were taken up."""
    taken = (entry.event for entry in entries)
    return {str(event.data["id"]) for event in taken if isinstance(event, ev.DecisionTaken) and "id" in event.data}


def _read(row: Decision, pins: TrustPins, plan: Plan, used: Collection[str]) -> SignedDecision:
    if not row.envelope:
        raise SignatureError("it is not signed")
    keys = pins.order_keys(plan.environment)
    payload, keyid = verify_document(row.envelope, keys, DECISION_TYPE)
    check_form(row.envelope)
    statement = decode_document(payload, Statement)
    if _encode(statement) != payload:
        raise SignatureError("the statement is not in the one form that statements have")
    about = (statement.deployment, statement.project, statement.environment, statement.label)
    if about != (row.deployment, plan.project, plan.environment, plan.label):
        of = f"{statement.project} {statement.label} in {statement.environment} ({statement.deployment})"
        raise SignatureError(f"it was said of another deployment: {of}")
    by = next(key.name for key in keys if key.keyid == keyid) or statement.who
    columns = (row.environment, row.kind, row.data, row.operator)
    if columns != (statement.environment, statement.saying.kind, row_data(statement), by):
        raise SignatureError(f"its columns were changed: what was signed is {statement.saying.kind!r} by {by!r}")
    if statement.id in used:
        raise SignatureError("it was obeyed before")
    return SignedDecision(row.number, statement.id, by, max(statement.at, row.at), statement.saying)


def _encode(statement: Statement) -> bytes:
    """In canonical form."""
    return msgspec.json.encode(statement, order="sorted")
