"""Which questions and machines wait, by what the journal says so far."""

from __future__ import annotations

from harness.people_kit import DEPLOYMENT, GATE, SIGN_OFF, planned

from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.journal.views import is_paused, machines_asked
from orchestrator.people.asks import open_asks, planned_asks
from orchestrator.people.judging import Answer

OPENED = ev.AskOpened(GATE, 2, "canary looks good", "Open https://10.1.0.11/", 900.0)


def entries(*events: ev.Event) -> list[JournalEntry]:
    return [JournalEntry(number, DEPLOYMENT, 100.0 + number, event) for number, event in enumerate(events, 1)]


def test_every_question_of_a_plan_has_one_id_in_the_order_of_the_steps() -> None:
    asks = planned_asks(planned())
    assert list(asks) == [GATE, SIGN_OFF]
    assert asks[GATE].approvers == ("anna", "ben", "clara")
    assert asks[SIGN_OFF].approvers == ()


def test_a_question_is_open_from_when_it_was_asked_until_it_is_settled() -> None:
    (asked,) = open_asks(entries(OPENED))
    assert (asked.ask, asked.step, asked.name, asked.since, asked.at) == (GATE, 2, "canary looks good", 101.0, 900.0)
    assert open_asks(entries(OPENED, ev.AskClosed(GATE, "approved"))) == ()
    assert open_asks(entries(OPENED, ev.Ended("cancelled"))) == ()
    assert open_asks([]) == ()


def test_a_question_that_is_asked_again_by_a_resume_keeps_its_answers_and_its_time() -> None:
    answered = ev.AskAnswered(GATE, 7, "anna", "approve", "fine")
    (asked,) = open_asks(entries(OPENED, answered, ev.Resumed("a", "h", 1, 2), OPENED))
    assert asked.since == 101.0
    assert asked.answers == (Answer("anna", "approve", 102.0, "fine", 7, recorded=True),)


def test_a_question_that_is_asked_again_after_it_was_settled_is_new() -> None:
    answered = ev.AskAnswered(GATE, 7, "anna", "reject", "bad")
    (asked,) = open_asks(entries(OPENED, answered, ev.AskClosed(GATE, "rejected"), OPENED))
    assert (asked.since, asked.answers) == (104.0, ())


def test_a_machine_waits_until_somebody_decides_or_its_turn_ends() -> None:
    asked = ev.MachineAsked("web1", 2, "verify failed", ("retry", "fail"))
    (waiting,) = machines_asked(entries(asked))
    assert (waiting.machine, waiting.step, waiting.choices, waiting.since) == ("web1", 2, ("retry", "fail"), 101.0)
    assert machines_asked(entries(asked, ev.MachineDecided("web1", 2, "retry", 3, "anna"))) == ()
    assert machines_asked(entries(asked, ev.TurnEnded("web1", 2, "left_out"))) == ()
    other = ev.MachineDecided("web2", 2, "retry", 3, "anna")
    assert len(machines_asked(entries(asked, other))) == 1
    again = machines_asked(entries(asked, ev.MachineDecided("web1", 2, "retry", 3, "anna"), asked))
    assert [one.since for one in again] == [103.0]


def test_it_is_paused_from_a_pause_until_somebody_lets_it_go_on() -> None:
    paused, on = ev.Paused("network", "anna"), ev.Unpaused("ben")
    assert [is_paused(entries(*said)) for said in ((), (paused,), (paused, on), (paused, on, paused))] == [
        False, True, False, True,
    ]  # fmt: skip
