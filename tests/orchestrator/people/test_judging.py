"""What answers come to: listed people only, so many different ones, never the author, and one no is enough."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.people.judging import Answer, answer_of, is_late, judge, why_not
from orchestrator.people.statement import Approve, Pause, Reject, SignedDecision
from orchestrator.plan.plan import PlannedAsk

NAMES = ("anna", "ben", "clara", "dora")
UNNAMED = ("root@host", "ci@build")
EXPIRY = 100.0

asks = st.builds(
    PlannedAsk,
    text=st.just("?"),
    approvers=st.lists(st.sampled_from(NAMES[:3]), unique=True).map(tuple),
    minimum=st.integers(1, 3),
    not_author=st.booleans(),
    expires=st.just(0.0),
    on_expiry=st.sampled_from(["pause", "stop", "proceed"]),
)
authors = st.sampled_from([*NAMES, ""])
answers = st.builds(
    Answer,
    by=st.sampled_from([*NAMES, *UNNAMED]),
    verdict=st.sampled_from(["approve", "approve", "reject"]),
    at=st.floats(0, 200),
    why=st.just("so"),
)
several = st.lists(answers, max_size=8)


@given(asks, authors, several)
def test_a_yes_has_as_many_different_people_as_are_needed_and_all_of_them_count(
    ask: PlannedAsk, author: str, said: list[Answer]
) -> None:
    found = judge(ask, author, said, now=0.0)
    assert len(set(found.agreed)) == len(found.agreed)
    for name in found.agreed:
        assert any(answer.by == name and answer.verdict == "approve" for answer in said)
        assert not ask.approvers or name in ask.approvers
        assert not ask.not_author or (name != author and author and "@" not in name)
        assert ask.minimum == 1 or "@" not in name
    assert (found.state == "approved") == (len(found.agreed) == ask.minimum)
    assert found.goes_on == (found.state == "approved")
    assert (found.needed == 0) == (found.state != "waiting")


@given(asks, authors, several)
def test_who_does_not_count_changes_nothing(ask: PlannedAsk, author: str, said: list[Answer]) -> None:
    counted = [answer for answer in said if not why_not(ask, author, answer.by)]
    assert judge(ask, author, said, now=0.0) == judge(ask, author, counted, now=0.0)


@given(asks, authors, several, several)
def test_what_is_settled_stays_so_whatever_is_said_later(
    ask: PlannedAsk, author: str, said: list[Answer], later: list[Answer]
) -> None:
    found = judge(ask, author, said, now=0.0)
    if found.state != "waiting":
        assert judge(ask, author, [*said, *later], now=0.0) == found


@given(asks, authors, several)
def test_one_no_of_somebody_who_counts_settles_what_waits(ask: PlannedAsk, author: str, said: list[Answer]) -> None:
    before = judge(ask, author, said, now=0.0)
    for name in NAMES:
        if before.state == "waiting" and not why_not(ask, author, name):
            found = judge(ask, author, [*said, Answer(name, "reject", 1.0, "no")], now=0.0)
            assert (found.state, found.goes_on) == ("rejected", False)
            assert found.reason == f"{name} said no: no"


@given(asks, authors, several)
def test_the_same_said_twice_counts_once(ask: PlannedAsk, author: str, said: list[Answer]) -> None:
    doubled = [answer for answer in said for _ in (1, 2)]
    assert judge(ask, author, doubled, now=0.0) == judge(ask, author, said, now=0.0)


@given(asks, authors, several)
def test_whom_it_waits_for_could_still_settle_it(ask: PlannedAsk, author: str, said: list[Answer]) -> None:
    found = judge(ask, author, said, now=0.0)
    assert set(found.waits_for) <= set(ask.approvers) - set(found.agreed)
    if found.state == "waiting" and len(found.waits_for) >= found.needed:
        rest = [Answer(name, "approve", 1.0) for name in found.waits_for]
        assert judge(ask, author, [*said, *rest], now=0.0).state == "approved"


@given(asks, authors, several, st.floats(0, 200))
def test_after_its_time_a_question_is_settled_by_its_rule_and_by_what_was_said_before(
    ask: PlannedAsk, author: str, said: list[Answer], now: float
) -> None:
    found = judge(ask, author, said, now=now, at=EXPIRY)
    if ask.on_expiry == "pause":
        plain = judge(ask, author, said, now=0.0)
        assert (found.state, found.agreed) == (plain.state, plain.agreed)
        assert found.late == (found.state == "waiting" and now >= EXPIRY)
        return
    in_time = judge(ask, author, [answer for answer in said if answer.at <= EXPIRY], now=0.0)
    if in_time.state != "waiting":
        assert found == in_time
    elif now >= EXPIRY:
        assert (found.state, found.goes_on) == ("expired", ask.on_expiry == "proceed")
    else:
        assert found.state == "waiting"


@given(asks, authors, several)
def test_an_answer_that_was_written_down_in_time_counts_whenever_it_is_read_again(
    ask: PlannedAsk, author: str, said: list[Answer]
) -> None:
    recorded = [Answer(one.by, one.verdict, 500.0, one.why, recorded=True) for one in said]
    assert judge(ask, author, recorded, now=0.0, at=EXPIRY) == judge(ask, author, recorded, now=0.0)
    assert not any(is_late(ask, one, EXPIRY) for one in recorded)


def test_what_expired_while_nobody_looked_is_late_and_says_so() -> None:
    ask = PlannedAsk("?", on_expiry="proceed")
    assert judge(ask, "", [], now=120.0, at=EXPIRY, since=110.0).late
    assert not judge(ask, "", [], now=120.0, at=EXPIRY, since=90.0).late


def test_a_person_who_thinks_better_of_it_in_time_has_said_the_last_of_it() -> None:
    ask = PlannedAsk("?", ("anna", "ben"), minimum=2)
    yes, no = Answer("anna", "approve", 1.0), Answer("anna", "reject", 2.0, "wait")
    assert judge(ask, "", [yes], now=0.0).waits_for == ("ben",)
    assert judge(ask, "", [yes, no], now=0.0).state == "rejected"


def test_each_reason_why_somebody_does_not_count_is_told() -> None:
    listed = PlannedAsk("?", ("anna", "ben"), not_author=True)
    assert "not one of those who are asked: anna, ben" in why_not(listed, "ben", "clara")
    assert "ben made the release" in why_not(listed, "ben", "ben")
    assert "nobody knows who made the release" in why_not(listed, "", "ben")
    assert "a key without a name" in why_not(PlannedAsk("?", minimum=2), "ben", "root@host")
    assert why_not(PlannedAsk("?"), "", "root@host") == ""
    assert why_not(listed, "ben", "anna") == ""


def test_only_an_answer_is_an_answer() -> None:
    said = SignedDecision(7, "id", "anna", 5.0, Approve("2/x", "fine"))
    assert answer_of(said) == Answer("anna", "approve", 5.0, "fine", 7)
    no = SignedDecision(8, "id", "anna", 5.0, Reject("2/x", "bad"))
    assert answer_of(no) == Answer("anna", "reject", 5.0, "bad", 8)
    assert answer_of(SignedDecision(9, "id", "anna", 5.0, Pause())) is None


def test_a_frozen_question_reads_back() -> None:
    ask = PlannedAsk("?", ("anna",), 1, not_author=True, expires=5.0, on_expiry="stop")
    assert msgspec.json.decode(msgspec.json.encode(ask), type=PlannedAsk) == ask
