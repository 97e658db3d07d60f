"""What a deployment's journal takes is told as events, after it is on the disk, and without what checks and people said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.trail import events, names

from agent.orders.orders import VerifyFacts
from orchestrator.journal import events as ev
from orchestrator.journal.journal import Journal
from orchestrator.journal.trail import KINDS, name_of
from relay.audit.log import log_to_file
from relay.errors import NotFoundError

ULID = "01JD0000000000000000000000"
PLAN = b'{"format":1,"project":"shop","label":"1.4.2","environment":"production","steps":[]}'
CANARY = "says 'value-of-a-variable-4711', expected something else"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(str(tmp_path / "journal.db")) as opened:
        yield opened


def test_every_act_is_told_once_with_who_and_where(journal: Journal, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with log_to_file(str(path)):
        journal.begin(ULID, PLAN, journal.claim("shop", "production"), "ann@deploy1")
        number = journal.decide("production", ULID, "cancel", {"why": CANARY}, "bob@desk")
        assert journal.take_decision(number)
        assert not journal.take_decision(number)
        journal.set_state(ULID, "failed", CANARY, ev.Ended("failed", CANARY))
    assert names(path.read_text()) == [
        "orchestrator.fence_claimed",
        "deployment.started",
        "orchestrator.decided",
        "deployment.decision_taken",
        "deployment.ended",
    ]
    _, started, decided, taken, ended = events(path.read_text())
    assert (started["operator"], started["label"], started["environment"]) == ("ann@deploy1", "1.4.2", "production")
    assert (decided["operator"], decided["what"], taken["operator"]) == ("bob@desk", "cancel", "bob@desk")
    assert ended["state"] == "failed"


def test_what_checks_saw_and_people_typed_stays_in_the_journal(journal: Journal, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal.begin(ULID, PLAN, 1, "ann")
    facts = (
        ev.Reported(f"{ULID}/1/web1/verify/1", "web1", "failed", CANARY, facts=VerifyFacts((CANARY,))),
        ev.TurnEnded("web1", 1, "left_out", failure=True, reason=CANARY),
        ev.StepEnded(1, ok=False, reason=CANARY),
        ev.DecisionTaken(1, "ann", "retry", {"why": CANARY}),
    )
    with log_to_file(str(path)):
        journal.append(ULID, *facts)
        journal.set_state(ULID, "failed", CANARY, ev.Ended("failed", CANARY))
    assert "4711" not in path.read_text()
    assert len(names(path.read_text())) == len(facts) + 1
    assert [entry.event for entry in journal.entries(ULID)][1:-1] == list(facts)


def test_what_the_journal_did_not_take_is_not_told(journal: Journal, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with log_to_file(str(path)), pytest.raises(NotFoundError):
        journal.append(ULID, ev.Note("of a deployment that never began"))
    assert not path.exists()


def test_every_kind_of_entry_is_an_event_of_its_own() -> None:
    assert len({name_of(kind) for kind in KINDS}) == len(KINDS) > 20
    assert all(kind.__doc__ for kind in KINDS)
