"""The bracket table, row by row, and what holds whatever happens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.orders import HttpCheck, TimedCheck, TreeFacts
from orchestrator.plan.plan import (
    ApplyAction,
    MachineStep,
    MachineTurn,
    PlannedCheck,
    RotationPlan,
    ScriptAction,
    ServerRun,
    ServiceAction,
    SwitchAction,
)
from orchestrator.rolling.turn import (
    DONE,
    Act,
    After,
    Before,
    Done,
    DoneState,
    End,
    Settle,
    Shape,
    Turn,
    TurnOutcome,
    Verify,
    VerifyOld,
    begin,
    did,
    shape_of,
)

FULL = Shape(rotation=True, actions=3, switch=1, verify=True, old=True, settle=True)
"""configure, switch, restart; with a rotation, checks and an old version."""
BARE = Shape(rotation=False, actions=3, switch=1, verify=True, old=True, settle=True)
"""The same without a rotation."""
SCRIPTS = Shape(rotation=True, actions=2, switch=None, verify=True, old=True, settle=False)
"""Nothing is deployed: two scripts in a bracket."""

FAILED = Done("failed", "exit status 3")
UNKNOWN = Done("unknown", "nobody saw its end")
LOST = Done("lost", "no relay has seen web1 for 95 s")
REFUSED = Done("refused", "cancelled")
STOPPED = Done("stopped", "cancelled")


def words(shape: Shape, *dones: Done) -> tuple[list[str], TurnOutcome]:
    """What a turn asks for, each answered by the next of `dones` and then by success, and how it ends."""
    asked, answers, turn = [], list(dones), begin(shape)
    while not isinstance(do := turn.do, End):
        asked.append(word(do))
        turn = did(turn, answers.pop(0) if answers else DONE)
    assert not answers, f"the turn ended before {answers}"
    return asked, do.result


def word(do: object) -> str:
    match do:
        case Act(index):
            return str(index)
        case After(outcome):
            return f"after {outcome}"
        case _:
            return {Before: "before", Verify: "verify", VerifyOld: "old", Settle: "settle"}[type(do)]


def ok(count: int) -> list[Done]:
    return [DONE] * count


def with_(shape: Shape, **changes: Any) -> Shape:
    return replace(shape, **changes)


ROWS: list[tuple[str, Shape, list[Done], str, TurnOutcome]] = [
    # what happened, shape, answers, what is done in this order, how it ends (its reason is compared apart)
    ("all is well", FULL, [], "before 0 1 2 verify settle after-deployed", TurnOutcome("deployed")),
    (
        "all is well and there was no old version",
        with_(FULL, old=False),
        [],
        "before 0 1 2 verify settle after-deployed",
        TurnOutcome("deployed"),
    ),
    (
        "all is well without checks",
        with_(FULL, verify=False),
        [],
        "before 0 1 2 settle after-deployed",
        TurnOutcome("deployed"),
    ),
    ("all is well without a package", SCRIPTS, [], "before 0 1 verify after-deployed", TurnOutcome("deployed")),
    ("all is well without a rotation", BARE, [], "0 1 2 verify settle", TurnOutcome("deployed")),
    ("the same was done before", with_(FULL, current=True), [], "", TurnOutcome("already_current")),
    # before
    ("before failed", FULL, [FAILED], "before old after-not_started", TurnOutcome("not_started", failure=True)),
    (
        "before timed out",
        FULL,
        [Done("failed", "timed out")],
        "before old after-not_started",
        TurnOutcome("not_started", failure=True),
    ),
    (
        "nobody saw before end",
        FULL,
        [UNKNOWN],
        "before old after-not_started",
        TurnOutcome("not_started", failure=True),
    ),
    (
        "before failed and there was no old version",
        with_(FULL, old=False),
        [FAILED],
        "before after-not_started",
        TurnOutcome("not_started", failure=True),
    ),
    (
        "before failed and there are no checks",
        with_(FULL, verify=False, old=False),
        [FAILED],
        "before after-not_started",
        TurnOutcome("not_started", failure=True),
    ),
    (
        "before failed and the old version is ill",
        FULL,
        [FAILED, FAILED],
        "before old",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "before failed and so did after",
        FULL,
        [FAILED, DONE, FAILED],
        "before old after-not_started",
        TurnOutcome("rotation_unknown", failure=True, stop_roll=True, bracket_open=True),
    ),
    ("before was never started", FULL, [REFUSED], "before", TurnOutcome("not_started", failure=True)),
    # before the switch
    (
        "failed before the switch",
        FULL,
        [*ok(1), FAILED],
        "before 0 old after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "the switch itself failed",
        FULL,
        [*ok(2), FAILED],
        "before 0 1 old after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "nobody saw a script before the switch end",
        FULL,
        [*ok(1), UNKNOWN],
        "before 0 old after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "cancelled before the switch",
        FULL,
        [*ok(1), STOPPED],
        "before 0 old after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "refused before the switch",
        FULL,
        [*ok(1), REFUSED],
        "before 0 old after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "failed before the switch and there was no old version",
        with_(FULL, old=False),
        [*ok(1), FAILED],
        "before 0 after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "failed before the switch and the old version is ill",
        FULL,
        [*ok(1), FAILED, FAILED],
        "before 0 old",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    ("failed before the switch without a rotation", BARE, [FAILED], "0", TurnOutcome("kept_old", failure=True)),
    # after the switch
    (
        "failed after the switch",
        FULL,
        [*ok(3), FAILED],
        "before 0 1 2",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "refused after the switch",
        FULL,
        [*ok(3), REFUSED],
        "before 0 1 2",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "nobody saw the restart end",
        FULL,
        [*ok(3), UNKNOWN],
        "before 0 1 2",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "nobody saw the switch end",
        FULL,
        [*ok(2), UNKNOWN],
        "before 0 1",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "the switch was stopped",
        FULL,
        [*ok(2), STOPPED],
        "before 0 1",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "verify failed",
        FULL,
        [*ok(4), FAILED],
        "before 0 1 2 verify",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "failed after the switch without a rotation",
        BARE,
        [*ok(2), FAILED],
        "0 1 2",
        TurnOutcome("failed", failure=True),
    ),
    ("verify failed without a rotation", BARE, [*ok(3), FAILED], "0 1 2 verify", TurnOutcome("failed", failure=True)),
    # nothing is switched
    (
        "a script failed, what runs is well",
        SCRIPTS,
        [*ok(1), FAILED],
        "before 0 old after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "a script failed and nothing can call it well",
        with_(SCRIPTS, verify=False, old=False),
        [*ok(1), FAILED],
        "before 0",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "the first script was refused and there are no checks",
        with_(SCRIPTS, verify=False, old=False),
        [*ok(1), REFUSED],
        "before 0 after-kept_old",
        TurnOutcome("kept_old", failure=True),
    ),
    (
        "the second script was refused and there are no checks",
        with_(SCRIPTS, verify=False, old=False),
        [*ok(2), REFUSED],
        "before 0 1",
        TurnOutcome("left_out", failure=True, bracket_open=True),
    ),
    (
        "a script failed without a rotation",
        with_(SCRIPTS, rotation=False),
        [FAILED],
        "0",
        TurnOutcome("failed", failure=True),
    ),
    # settle
    (
        "settle failed",
        FULL,
        [*ok(5), FAILED],
        "before 0 1 2 verify settle after-deployed",
        TurnOutcome("deployed", failure=True),
    ),
    (
        "settle failed without a rotation",
        BARE,
        [*ok(4), FAILED],
        "0 1 2 verify settle",
        TurnOutcome("deployed", failure=True),
    ),
    # after
    (
        "after failed",
        FULL,
        [*ok(6), FAILED],
        "before 0 1 2 verify settle after-deployed",
        TurnOutcome("rotation_unknown", failure=True, stop_roll=True, bracket_open=True),
    ),
    (
        "nobody saw after end",
        FULL,
        [*ok(6), UNKNOWN],
        "before 0 1 2 verify settle after-deployed",
        TurnOutcome("rotation_unknown", failure=True, stop_roll=True, bracket_open=True),
    ),
    # the agent is gone
    ("lost before the switch", FULL, [*ok(1), LOST], "before 0", TurnOutcome("lost", failure=True, bracket_open=True)),
    (
        "lost after the switch",
        FULL,
        [*ok(3), LOST],
        "before 0 1 2",
        TurnOutcome("lost", failure=True, bracket_open=True),
    ),
    (
        "lost while it was checked",
        FULL,
        [*ok(4), LOST],
        "before 0 1 2 verify",
        TurnOutcome("lost", failure=True, bracket_open=True),
    ),
    (
        "lost while the old version was checked",
        FULL,
        [FAILED, LOST],
        "before old",
        TurnOutcome("lost", failure=True, bracket_open=True),
    ),
    (
        "lost while it settled",
        FULL,
        [*ok(5), LOST],
        "before 0 1 2 verify settle",
        TurnOutcome("lost", failure=True, bracket_open=True),
    ),
    ("lost without a rotation", BARE, [LOST], "0", TurnOutcome("lost", failure=True)),
]


@pytest.mark.parametrize(("shape", "answers", "asked", "ends"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_every_row_of_the_table(shape: Shape, answers: list[Done], asked: str, ends: TurnOutcome) -> None:
    seen, result = words(shape, *answers)
    assert " ".join(each.replace("after ", "after-") for each in seen) == asked
    assert with_reason(result, "") == ends


def with_reason(result: TurnOutcome, reason: str) -> TurnOutcome:
    return TurnOutcome(result.outcome, result.failure, result.stop_roll, result.bracket_open, reason)


def test_a_failure_says_what_failed_and_why() -> None:
    assert words(FULL, *ok(1), FAILED)[1].reason == "action 1: exit status 3"


def test_an_action_that_fails_is_told_by_its_name() -> None:
    named = with_(FULL, names=("configure", "switch", "restart"))
    assert words(named, *ok(1), FAILED)[1].reason == "action 1 (configure): exit status 3"
    assert words(named, *ok(3), FAILED)[1].reason == "action 3 (restart): exit status 3"
    both = words(FULL, FAILED, Done("failed", "503"))[1].reason
    assert both == "before: exit status 3; verify of the old version: 503"
    assert words(FULL, *ok(6), Done("failed"))[1].reason == "after deployed: failed"
    assert words(FULL)[1].reason == ""


def test_nothing_follows_the_end() -> None:
    turn = begin(with_(FULL, current=True))
    with pytest.raises(ValueError, match="ended"):
        did(turn, DONE)


# --- whatever happens

HOWS = st.sampled_from(get_args(DoneState))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    actions = draw(st.integers(0, 4))
    verify = draw(st.booleans())
    return Shape(
        rotation=draw(st.booleans()),
        actions=actions,
        switch=draw(st.none() | st.integers(0, actions - 1)) if actions else None,
        verify=verify,
        old=verify and draw(st.booleans()),
        settle=draw(st.booleans()),
        current=draw(st.booleans()),
    )


def run(shape: Shape, hows: list[DoneState]) -> tuple[list[tuple[object, Done]], Turn]:
    """What was done and what became of it, and the turn at its end. After `hows`, all goes well."""
    turn = begin(shape)
    story: list[tuple[object, Done]] = []
    answers = [Done(how, "because") for how in hows] + [Done("done", "because")] * 20
    for done in answers:
        if isinstance(turn.do, End):
            break
        story.append((turn.do, done))
        turn = did(turn, done)
    return story, turn


@given(shapes(), st.lists(HOWS, max_size=12))
def test_whatever_happens_the_turn_ends_and_the_bracket_tells_the_truth(shape: Shape, hows: list[DoneState]) -> None:
    story, turn = run(shape, hows)
    assert isinstance(turn.do, End), "a turn that does not end"
    result = turn.do.result
    dos = [do for do, _ in story]
    begun = any(isinstance(do, Before) and done.how != "refused" for do, done in story)
    closed = any(isinstance(do, After) and done.ok for do, done in story)

    assert result.bracket_open == (begun and not closed)
    assert not any(isinstance(do, After) for do in dos) or begun
    assert not any(isinstance(do, (Before, After, VerifyOld)) for do in dos) or shape.rotation
    assert len(dos) == len(set(map(repr, dos))), "something was done twice"
    assert result.failure == any(not done.ok for _, done in story)
    assert not result.stop_roll or result.outcome == "rotation_unknown"
    assert bool(result.reason) == result.failure


@given(shapes(), st.lists(HOWS, max_size=12))
def test_nothing_new_serves_that_was_not_checked(shape: Shape, hows: list[DoneState]) -> None:
    story, turn = run(shape, hows)
    assert isinstance(turn.do, End)
    for do, _ in story:
        if do == After("deployed"):
            done = [each for each, answer in story if answer.ok]
            assert {Act(index) for index in range(shape.actions)} <= set(done)
            assert not shape.verify or Verify() in done
        if isinstance(do, After) and do.outcome != "deployed" and shape.switch is not None:
            assert (Act(shape.switch), Done("done", "because")) not in story
            assert not shape.old or VerifyOld() in [each for each, answer in story if answer.ok]


@given(shapes(), st.lists(HOWS, max_size=12))
def test_the_same_ends_give_the_same_turn(shape: Shape, hows: list[DoneState]) -> None:
    story, turn = run(shape, hows)
    again = begin(shape)
    for do, done in story:
        assert again.do == do
        again = did(again, done)
    assert again == turn


# --- the shape of a planned turn

RUN = ServerRun("run", commands=(("true",),))
CHECK = TimedCheck(HttpCheck("http://10.0.0.1/version"))


def step(
    actions: tuple[ApplyAction, ...], *, package: str = "web", rotation: bool = True, verify: bool = True
) -> MachineStep:
    turn = MachineTurn(
        machine="web1",
        root="/srv/webshop",
        actions=actions,
        verify=(PlannedCheck(CHECK, CHECK),) if verify else (),
        variables={},
        fingerprint="f" * 64,
    )
    return MachineStep(
        number=1,
        name="web farm",
        turns=(turn,),
        strategy="rolling",
        phases=(),
        package=package,
        rotation=RotationPlan("web", RUN, RUN) if rotation else None,
    )


def facts(*, current: str = "a" * 64, version: str = "1.0.0", settled: str = "") -> TreeFacts:
    return TreeFacts(
        root="/srv/webshop",
        manifest="b" * 64,
        free_bytes=1,
        installed=True,
        current_manifest=current,
        current_version=version,
        settled=settled,
    )


ACTIONS = (ScriptAction("configure", "configure.sh"), SwitchAction(), ServiceAction("restart", "webshop", "restart"))


def shape(planned: MachineStep, found: TreeFacts | None, *, is_out: bool = False, is_forced: bool = False) -> Shape:
    return shape_of(planned, planned.turns[0], found, is_out=is_out, is_forced=is_forced)


def test_a_planned_turn_has_its_shape() -> None:
    names = ("configure", "switch", "restart")
    assert shape(step(ACTIONS), facts()) == with_(FULL, names=names, old_tree=True)
    assert shape(step(ACTIONS, rotation=False), facts()) == with_(BARE, names=names, old_tree=True)
    assert shape(step(ACTIONS), facts(current="", version="")).old is False
    without = shape(step(ACTIONS, verify=False), facts())
    assert (without.verify, without.old) == (False, False)
    assert shape(step(ACTIONS[:1], package=""), None) == with_(SCRIPTS, actions=1, names=("configure",))


def test_the_same_again_on_the_same_tree_is_already_current() -> None:
    assert shape(step(ACTIONS), facts(current="b" * 64, settled="f" * 64)).current
    assert not shape(step(ACTIONS), facts(current="a" * 64, settled="f" * 64)).current, "another tree is current"
    assert not shape(step(ACTIONS), facts(current="b" * 64, settled="e" * 64)).current, "the step has changed"


def test_a_forced_turn_is_never_already_current() -> None:
    assert not shape(step(ACTIONS), facts(current="b" * 64, settled="f" * 64), is_forced=True).current


def test_a_machine_that_is_out_is_never_already_current() -> None:
    assert not shape(step(ACTIONS), facts(current="b" * 64, settled="f" * 64), is_out=True).current
