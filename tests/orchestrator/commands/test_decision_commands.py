"""`release approve | reject | decide | pause | go-on | cancel` on a real journal while no process runs the deployment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from harness.people_kit import DEPLOYMENT, GATE, OTHER, SIGN_OFF, Office, planned
from harness.process import run

from orchestrator.journal import events as ev
from orchestrator.journal.journal import Decision
from orchestrator.locks.locks import hold
from orchestrator.people.statement import Cancel, Decide, Pause, SignedDecision, read_decision
from relay.errors import NotFoundError, RefusedError, UsageError, WaystationError
from relay.main import waystation

LATER = "01JD0000000000000000000002"


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    made = Office(tmp_path)
    monkeypatch.setenv("WAYSTATION_HOME", str(made.home))
    monkeypatch.delenv("WAYSTATION_PERSON", raising=False)
    monkeypatch.delenv("WAYSTATION_KEYS", raising=False)
    yield made
    made.journal.close()


def call(*words: str) -> str:
    """What `release …` prints."""
    return CliRunner().invoke(waystation, ["release", *words], catch_exceptions=False, standalone_mode=False).stdout


def told(*words: str) -> list[dict[str, Any]]:
    document = json.loads(call(*words, "--json"))
    assert document["format"] == 1
    decisions: list[dict[str, Any]] = document["decisions"]
    return decisions


def refused(*words: str, by: type[WaystationError] = RefusedError, code: int = 1) -> str:
    with pytest.raises(by) as caught:
        call(*words)
    assert caught.value.exit_code == code
    return str(caught.value)


def rows(office: Office, deployment: str = DEPLOYMENT) -> list[Decision]:
    return office.journal.pending_decisions(deployment)


def said(office: Office, row: Decision) -> SignedDecision:
    found = read_decision(row, office.pins, office.plan)
    assert isinstance(found, SignedDecision), found
    return found


# --- questions


@pytest.mark.parametrize("gate", ["canary looks good", GATE, "web farm/canary looks good"])
def test_a_yes_is_a_signed_row_that_waits_for_whoever_resumes(office: Office, gate: str) -> None:
    office.ask()
    (one,) = told("approve", gate, "-m", "flat", "--as", "anna")
    assert (one["by"], one["kind"], one["is_alive"], one["state"], one["needed"]) == (
        "anna", "approve", False, "waiting", 1,
    )  # fmt: skip
    assert one["waits_for"] == ["ben"]
    (row,) = rows(office)
    assert row.number == one["decision"]
    assert (said(office, row).by, row.data["why"]) == ("anna", "flat")


def test_the_second_yes_is_the_one_that_was_needed(office: Office) -> None:
    office.ask()
    assert "1 more must agree: ben" in call("approve", GATE, "--as", "anna")
    assert "waystation release resume" in call("approve", GATE, "--as", "ben")
    assert "is settled already, approved: anna, ben agreed" in refused("approve", GATE, "--as", "anna")
    assert len(rows(office)) == 2


def test_a_no_settles_it_and_needs_its_reason(office: Office) -> None:
    office.ask()
    assert "a no needs its reason" in refused("reject", GATE, "--as", "anna")
    assert "a no needs its reason" in refused("reject", GATE, "--as", "anna", "-m", "  ")
    (one,) = told("reject", GATE, "--as", "anna", "-m", "errors doubled")
    assert one["state"] == "rejected"
    assert "settled already, rejected: anna said no: errors doubled" in refused("approve", GATE, "--as", "ben")


def test_whoever_does_not_count_is_refused_at_once_and_nothing_is_written(office: Office) -> None:
    office.ask()
    assert "clara made the release" in refused("approve", GATE, "--as", "clara")
    assert "is not one of those who are asked: anna, ben, clara" in refused("approve", GATE)
    assert "dora may not decide in staging" in refused("approve", GATE, "--as", "dora")
    assert "there is no key of eve" in refused("approve", GATE, "--as", "eve", by=NotFoundError)
    assert rows(office) == []


def test_who_acts_may_stand_in_the_environment(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.ask()
    monkeypatch.setenv("WAYSTATION_PERSON", "ben")
    assert told("approve", GATE)[0]["by"] == "ben"


def test_where_nobody_is_named_everybody_who_may_order_can_answer(office: Office) -> None:
    office.ask(SIGN_OFF)
    (one,) = told("approve", "sign off")
    assert (one["state"], "@" in one["by"]) == ("approved", True)


def test_a_question_that_is_not_open_is_refused_with_those_that_are(office: Office) -> None:
    office.ask(SIGN_OFF)
    words = refused("approve", "canary looks good", "--as", "anna", by=NotFoundError)
    assert "no question 'canary looks good' is open" in words
    assert f"Open now: {SIGN_OFF!r} of webshop 1.4.2 in staging ({DEPLOYMENT})" in words
    office.journal.append(DEPLOYMENT, ev.AskClosed(SIGN_OFF, "approved"))
    assert "Open now: nothing" in refused("approve", "sign off", by=NotFoundError)


def test_one_name_for_two_open_questions_is_refused_with_both(office: Office) -> None:
    office.ask()
    office.begin(OTHER, office.plan)
    office.ask(deployment=OTHER)
    words = refused("approve", "canary looks good", "--as", "anna")
    assert DEPLOYMENT in words
    assert OTHER in words
    assert told("approve", GATE, "--as", "anna", "--deployment", OTHER)[0]["deployment"] == OTHER
    assert rows(office) == []


def test_after_its_time_a_question_that_stops_or_proceeds_takes_no_answer(office: Office) -> None:
    office.ask(at=1000.0)
    assert "is over since 1970-01-01 00:16:40 UTC, and then: stop" in refused("approve", GATE, "--as", "anna")
    assert rows(office) == []


# --- machines

ASKED = ev.MachineAsked("web2", 2, "verify failed", ("retry", "exclude", "fail"))


def test_what_is_to_be_done_with_a_machine_is_decided_once(office: Office) -> None:
    office.journal.append(DEPLOYMENT, ASKED)
    (one,) = told("decide", "WEB2", "retry", "-m", "disk was full", "--as", "anna")
    assert (one["machine"], one["step"], one["what"]) == ("web2", 2, "retry")
    assert said(office, rows(office)[0]).saying == Decide("web2", 2, "retry", "disk was full")
    assert "anna decided retry of web2 already" in refused("decide", "web2", "fail", "--as", "ben")
    assert len(rows(office)) == 1


def test_only_what_can_be_chosen_for_that_machine_is_taken(office: Office) -> None:
    office.journal.append(DEPLOYMENT, ASKED)
    words = refused("decide", "web2", "rollback")
    assert "rollback is none of retry, exclude, fail" in words
    assert "verify failed" in words
    assert "Expected one of retry" in refused("decide", "web2", "explode", by=UsageError, code=2)
    assert "Those that do: web2 of webshop 1.4.2" in refused("decide", "web1", "retry", by=NotFoundError)
    assert rows(office) == []


# --- deployments


def test_everything_in_an_environment_is_paused_and_goes_on_and_nothing_else(office: Office) -> None:
    office.begin(OTHER, office.plan)
    office.begin(LATER, msgspec.structs.replace(office.plan, environment="production"))
    assert [one["deployment"] for one in told("pause", "-e", "staging", "-m", "network")] == [DEPLOYMENT, OTHER]
    assert rows(office, LATER) == []
    assert said(office, rows(office)[0]).saying == Pause("network")
    assert "nothing is under way that is not paused already in staging" in refused("pause", "-e", "staging")
    assert len(told("go-on", "-e", "staging")) == 2
    assert [row.kind for row in rows(office)] == ["pause", "go-on"]
    assert "nothing is paused in staging" in refused("go-on", "-e", "staging")


def test_a_pause_of_the_deployment_itself_can_be_ended(office: Office) -> None:
    office.journal.append(DEPLOYMENT, ev.Paused("the probe cannot tell"))
    assert "nothing is under way that is not paused already" in refused("pause", DEPLOYMENT)
    assert told("go-on", DEPLOYMENT.lower(), "--as", "anna")[0]["by"] == "anna"


def test_without_a_name_there_must_be_only_one(office: Office) -> None:
    office.begin(OTHER, office.plan)
    for command in ("pause", "cancel"):
        assert "2 deployments are under way" in refused(command)
    assert told("cancel", OTHER, "--now", "-m", "wrong version")[0]["now"] is True
    assert said(office, rows(office, OTHER)[0]).saying == Cancel(now=True, why="wrong version")


def test_who_may_not_decide_in_an_environment_pauses_nothing_there(office: Office) -> None:
    assert "dora may not decide in staging" in refused("pause", "--as", "dora")
    assert rows(office) == []


def test_what_has_ended_takes_no_decision(office: Office) -> None:
    office.journal.set_state(DEPLOYMENT, "failed", "web1", ev.Ended("failed", "web1"))
    assert "has ended: failed" in refused("cancel", DEPLOYMENT)
    assert "no deployment is under way" in refused("cancel", by=NotFoundError)
    assert "there is no deployment" in refused("pause", OTHER, by=NotFoundError)
    assert "nothing was deployed yet into 'nowhere'" in refused("pause", "-e", "nowhere", by=NotFoundError)


def test_where_a_process_runs_the_deployment_it_is_taken_up_at_once(office: Office) -> None:
    with hold(office.journal, "webshop", "staging", operator="x@y", label="1.4.2", why="deploy", deployment=DEPLOYMENT):
        assert "taken up at once" in call("cancel")


def test_a_reason_that_no_journal_can_hold_is_refused(office: Office) -> None:
    for why in ("x" * 2001, "half \udc80"):
        assert "expected at most 2000 characters of text" in refused("cancel", "-m", why, by=UsageError, code=2)
    assert rows(office) == []


@pytest.mark.processes
def test_a_refusal_is_told_on_standard_error_with_exit_code_1(office: Office) -> None:
    office.ask()
    done = run(office.home, "release", "approve", GATE, "--as", "clara")
    assert (done.code, done.out) == (1, "")
    assert "clara made the release, and another person is to agree" in done.err
    assert run(office.home, "release", "reject", "--help").out.rstrip().endswith("--as anna")


def test_the_plan_of_the_kit_asks_what_these_tests_answer() -> None:
    assert planned().author == "clara"
