"""A row of the journal is somebody's word only where that person's key signed just this, and it counts once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from harness.people_kit import DEPLOYMENT, GATE, OTHER, Office, planned

from orchestrator.journal.journal import Decision
from orchestrator.people.sign import acting, decide
from orchestrator.people.statement import (
    Approve,
    Cancel,
    Decide,
    GoOn,
    Pause,
    Refusal,
    Reject,
    Saying,
    SignedDecision,
    is_person,
    read_decision,
    used_statements,
)
from orchestrator.trust.keyring import load_signer
from relay.errors import ConflictError, NotFoundError, RefusedError
from relay.trust.envelopes import sign_document
from relay.trust.keys import TrustPins

SAYINGS: tuple[Saying, ...] = (
    Approve(GATE, "fine"),
    Approve(GATE),
    Reject(GATE, "errors"),
    Decide("web1", 2, "put-back", "by hand"),
    Pause("network"),
    GoOn(),
    Cancel(now=True),
    Cancel(),
)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    made.journal.close()


def written(office: Office, saying: Saying = SAYINGS[0], person: str = "anna") -> Decision:
    number = decide(office.journal, office.paths(person), DEPLOYMENT, saying)
    return next(row for row in office.journal.pending_decisions(DEPLOYMENT) if row.number == number)


def read(office: Office, row: Decision, **options: object) -> SignedDecision | Refusal:
    return read_decision(row, office.pins, office.plan, **options)  # type: ignore[arg-type]


def refused(office: Office, row: Decision, **options: object) -> str:
    found = read(office, row, **options)
    assert isinstance(found, Refusal), found
    assert found.number == row.number
    return found.reason


@pytest.mark.parametrize("saying", SAYINGS, ids=lambda saying: saying.kind)
def test_what_a_person_says_comes_back_as_it_was_said_and_whose_word_it_is(office: Office, saying: Saying) -> None:
    row = written(office, saying)
    found = read(office, row)
    assert isinstance(found, SignedDecision)
    assert (found.number, found.by, found.saying, row.operator) == (row.number, "anna", saying, "anna")
    assert found.at >= row.at > 0


def test_the_key_without_a_name_is_told_by_user_and_host_which_is_no_name(office: Office) -> None:
    found = read(office, written(office, person=""))
    assert isinstance(found, SignedDecision)
    assert "@" in found.by
    assert not is_person(found.by)
    assert is_person("anna")


def test_what_is_not_signed_is_nobodys_word(office: Office) -> None:
    number = office.journal.decide("staging", DEPLOYMENT, "approve", {"ask": GATE}, "anna")
    assert refused(office, office.journal.pending_decisions(DEPLOYMENT)[0]) == "it is not signed"
    assert number


def test_a_signature_that_was_touched_or_is_of_another_document_does_not_count(office: Office) -> None:
    row = written(office)
    broken = bytearray(row.envelope)
    at = broken.index(b'"sig":"') + 12
    broken[at] = ord("A") if broken[at] != ord("A") else ord("B")
    assert "not signed by a trusted key" in refused(office, with_(row, envelope=bytes(broken)))
    signer = load_signer(office.paths().trust, "order")
    order = sign_document(b"{}", "application/vnd.waystation.order+json", signer)
    assert "the signed document is a" in refused(office, with_(row, envelope=order))
    assert refused(office, with_(row, envelope=b"{}"))
    assert refused(office, with_(row, envelope=b"\xff" * 70000))


def test_a_person_whose_key_was_taken_out_of_trust_json_or_is_for_another_environment_says_nothing(
    office: Office,
) -> None:
    row = written(office)
    others = tuple(key for key in office.pins.order if key.name != "anna")
    without = TrustPins(format=1, package=office.pins.package, order=others)
    assert isinstance(read_decision(row, without, office.plan), Refusal)
    with pytest.raises(RefusedError, match="dora may not decide in staging"):
        decide(office.journal, office.paths("dora"), DEPLOYMENT, SAYINGS[0])


def test_the_package_key_decides_nothing(office: Office) -> None:
    row = written(office)
    payload = msgspec.json.decode(row.envelope)["payload"]
    signer = load_signer(office.paths().trust, "package")
    forged = sign_document(
        msgspec.json.decode(f'"{payload}"', type=bytes), "application/vnd.waystation.decision+json", signer
    )
    assert "not signed by a trusted key" in refused(office, with_(row, envelope=forged))


def test_a_row_of_another_deployment_project_environment_or_label_is_refused(office: Office) -> None:
    row = written(office)
    assert "another deployment" in refused(office, with_(row, deployment=OTHER))
    for change in ({"label": "1.4.3"}, {"environment": "production"}, {"project": "other"}):
        plan = msgspec.structs.replace(office.plan, **change)
        found = read_decision(row, office.pins, plan)
        assert isinstance(found, Refusal)
        assert "another deployment" in found.reason


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"ask": "3/sign off"}},
        {"kind": "reject"},
        {"kind": "cancel"},
        {"operator": "ben"},
        {"environment": "production"},
    ],
)
def test_columns_that_say_something_else_than_was_signed_are_refused(office: Office, change: dict[str, object]) -> None:
    row = written(office)
    if "data" in change:
        change = {"data": row.data | change["data"]}  # type: ignore[operator]
    assert "columns were changed" in refused(office, with_(row, **change))


def test_the_same_words_are_written_once_and_obeyed_once(office: Office) -> None:
    row = written(office)
    with pytest.raises(ConflictError):
        office.journal.decide(row.environment, DEPLOYMENT, row.kind, row.data, row.operator, row.envelope)
    # Whoever writes into the file itself:
    with sqlite3.connect(office.journal.path) as connection:
        columns = "environment, deployment, at, operator, kind, data, envelope"
        connection.execute(f"INSERT INTO decisions ({columns}) SELECT {columns} FROM decisions")  # noqa: S608
    connection.close()
    first, copy = office.journal.pending_decisions(DEPLOYMENT)
    assert office.journal.take_decision(first.number)
    assert not office.journal.take_decision(first.number)
    used = used_statements(office.journal.entries(DEPLOYMENT))
    assert refused(office, copy, used=used) == "it was obeyed before"


def test_the_same_statement_in_other_bytes_is_refused(office: Office) -> None:
    """It would be another envelope to the journal, and could be written twice."""
    row = written(office)
    spaced = msgspec.json.format(row.envelope)
    assert spaced != row.envelope
    assert "one form" in refused(office, with_(row, envelope=spaced))
    twice = msgspec.json.decode(row.envelope)
    twice["signatures"].append({"keyid": "0" * 64, "sig": "AAAA"})
    assert refused(office, with_(row, envelope=msgspec.json.encode(twice, order="sorted")))


def test_a_no_without_a_reason_and_words_that_are_unknown_are_no_statement(office: Office) -> None:
    assert "not an understood document" in refused(office, written(office, Reject(GATE, "")))
    assert "not an understood document" in refused(office, written(office, Decide("web1", 2, "explode")))  # type: ignore[arg-type]


def test_nobody_acts_by_a_key_that_trust_json_does_not_know_or_knows_by_another_name(office: Office) -> None:
    with pytest.raises(NotFoundError, match="there is no key of eve"):
        acting(office.paths("eve"), "staging")
    people = office.home / "trust" / "people"
    (people / "eve.key").write_bytes((people / "ben.key").read_bytes())
    (people / "eve.key").chmod(0o600)
    with pytest.raises(RefusedError, match="does not know eve by this key"):
        acting(office.paths("eve"), "staging")


def test_nothing_is_said_of_a_deployment_that_is_not_there(office: Office) -> None:
    with pytest.raises(NotFoundError):
        decide(office.journal, office.paths("anna"), OTHER, GoOn())


def test_a_row_is_read_by_the_plan_that_was_frozen_and_by_no_other(office: Office) -> None:
    row = written(office)
    assert isinstance(read_decision(row, office.pins, planned()), SignedDecision)


def with_(row: Decision, **changes: object) -> Decision:
    values = {name: getattr(row, name) for name in Decision.__slots__}
    return Decision(**(values | changes))  # type: ignore[arg-type]
