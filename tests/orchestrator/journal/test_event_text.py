"""Lines of a deployment: what they say has happened, and every thing has its name."""

from __future__ import annotations

from orchestrator.journal.event_text import line
from orchestrator.journal.events import Barrier, BracketAdopted, BracketOpened, Ended, StepEnded, UndoEnded, outcome_of


def test_a_bracket_that_opens_is_not_told_as_a_machine_that_is_out() -> None:
    assert "out of web" not in line(BracketOpened("web1", "web", 1)).replace("to be taken out of web", "")


def test_steps_are_told_by_number_and_name() -> None:
    assert (
        line(StepEnded(2, ok=False, reason="exit status 7", name="schema")) == "step 2 (schema) failed: exit status 7"
    )
    skipped = StepEnded(3, ok=True, skipped=True, reason="a step before it failed", name="web farm")
    assert line(skipped) == "step 3 (web farm) is skipped: a step before it failed"


def test_a_bracket_is_adopted_from_a_label_and_not_from_an_id() -> None:
    told = line(BracketAdopted("web1", "web", "01M83DSN7Z2DSFFFVQGSAHJFQ0", "1.4.2"))
    assert told == "web1: its bracket in web, opened by 1.4.2, is adopted"


def test_an_end_with_machines_left_is_no_success() -> None:
    assert line(Ended("succeeded")) == "succeeded"
    assert line(Ended("succeeded", "not deployed: web2")) == "done with exclusions: not deployed: web2"
    assert outcome_of("failed", "because") == "failed"


def test_an_undo_is_told_when_it_is_done() -> None:
    assert line(UndoEnded("open vpn", ok=True)) == "undone: open vpn"


def test_one_machine_is_one_machine() -> None:
    assert line(Barrier(("web1",))).endswith(": 1 machine")
