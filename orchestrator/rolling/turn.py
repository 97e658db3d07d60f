"""One machine's turn in a step: what comes next, whatever happened so far. Pure.

A turn is a fold: `begin(shape)`, then `turn.do` says what to do and `did(turn, done)` takes what became of it, until
`turn.do` is an `End`. The same `Done`s give the same turn. Repeats (`attempts`) are the caller's: a `Done` is the last
word on one `Do`.

    what happened                       then
    before failed, timed out, unknown   verify the old version → after not_started; a failure
    before never ran                    nothing was opened, nothing is closed; a failure
    failed before the switch            verify the old version → after kept_old; a failure
    … and the old version is ill        left out: the bracket stays open; a failure
    … and nothing was deployed before   left out; a failure
    failed after the switch             left out; a failure
    verify failed                       left out; a failure
    settle failed                       the new version is good: after deployed; a failure
    after failed                        rotation unknown: the bracket stays open; a failure that stops the roll
    the agent is lost                   left as found: the bracket stays open; a failure

Where a step has no rotation there is no bracket: the same rows, without `before`, `after` and the old version's check.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal, assert_never

from agent.orders.orders import TreeFacts
from orchestrator.plan.plan import MachineStep, MachineTurn, SwitchAction

AfterOutcome = Literal["deployed", "not_started", "kept_old"]
"""What `after` gets as OUTCOME."""

TurnEnding = Literal[
    "deployed", "already_current", "not_started", "kept_old", "left_out", "rotation_unknown", "lost", "failed"
]
"""How a turn ended. `failed`: a step without a rotation, after the switch or without one; `lost`: left as found."""

DoneState = Literal["done", "failed", "stopped", "refused", "unknown", "lost"]
"""What became of a thing to do: the words of an agent's final report, and `lost`: it cannot be said, for the agent or
the road to it is gone. `refused`: it never ran, which is also the word for what a cancel kept from starting.
`unknown` is a failure at that point, never a success.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step is made of on this machine, as far as the order of things depends on it.

    Attributes:
        actions: how many.
        names: of the actions, for people.
        switch: which of them (the first) lets `current` name the new tree; None where none does.
        verify: there are checks.
        old: the same checks can be made of what ran before.
        settle: a package is deployed, and becomes "good" when it is verified.
        current: the same was done here before, on the same tree: there is nothing to do.
        bare: nothing that we deployed runs here yet: there is no old version to go back to.
    """

    rotation: bool
    actions: int
    switch: int | None
    verify: bool
    old: bool
    settle: bool
    current: bool = False
    bare: bool = False
    names: tuple[str, ...] = ()


def shape_of(
    step: MachineStep, turn: MachineTurn, facts: TreeFacts | None, *, is_out: bool = False, is_forced: bool = False
) -> Shape:
    """The shape of a planned turn.

    Args:
        step: where the turn stands in.
        turn: of this machine.
        facts: what the agent found under the root; None where nothing is deployed.
        is_out: a bracket of an earlier deployment is open and was adopted: then a turn is never "already current",
            as `after` is owed to it.
        is_forced: a person wants every machine to have its turn, whatever was done on it before.
    """
    switches = [index for index, action in enumerate(turn.actions) if isinstance(action, SwitchAction)]
    deploys = bool(step.package)
    is_settled = facts is not None and facts.settled == turn.fingerprint and facts.current_manifest == facts.manifest
    return Shape(
        rotation=step.rotation is not None,
        actions=len(turn.actions),
        switch=switches[0] if switches else None,
        verify=bool(turn.verify),
        old=bool(turn.verify) and (not deploys or (facts is not None and bool(facts.current_version))),
        settle=deploys,
        current=deploys and is_settled and not is_out and not is_forced,
        bare=deploys and (facts is None or not facts.current_version),
        names=tuple(action.name for action in turn.actions),
    )


# --- what is to be done


@dataclass(frozen=True, slots=True)
class Before:
    """Run the rotation's `before`. From its start on the bracket is open."""


@dataclass(frozen=True, slots=True)
class Act:
    """Perform the action of this index, from 0."""

    index: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Check the new version."""


@dataclass(frozen=True, slots=True)
class VerifyOld:
    """Check that what ran before is still well."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Let the agent remember the new tree as good."""


@dataclass(frozen=True, slots=True)
class After:
    """Run the rotation's `after`, with this OUTCOME."""

    outcome: AfterOutcome


@dataclass(frozen=True, slots=True)
class TurnOutcome:
    """How the turn ended. `stop_roll`: no other machine may start, whatever `max_failures` allows."""

    outcome: TurnEnding
    failure: bool = False
    stop_roll: bool = False
    bracket_open: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class End:
    result: TurnOutcome


Do = Before | Act | Verify | VerifyOld | Settle | After | End


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a `Do`."""

    how: DoneState
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.how == "done"


DONE: Final = Done("done")


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a turn stands.

    Attributes:
        do: comes next; an `End` when nothing is left.
        began: actions that began, as far as it is known.
        is_open: the bracket.
        reasons: what went wrong, in order; a turn with one ends as a failure.
    """

    shape: Shape
    do: Do
    began: int = 0
    is_open: bool = False
    reasons: tuple[str, ...] = field(default=())


def begin(shape: Shape) -> Turn:
    if shape.current:
        return Turn(shape, End(TurnOutcome("already_current")))
    turn = Turn(shape, Before())
    return turn if shape.rotation else _act(turn, 0)


def did(turn: Turn, done: Done) -> Turn:
    """The turn after its `do` became `done`. Raises `ValueError` where the turn has ended."""
    match turn.do:
        case Before():
            return _did_before(turn, done)
        case Act(index):
            return _did_act(turn, index, done)
        case Verify():
            return _settle(turn) if done.ok else _leave(turn, done, "verify")
        case VerifyOld():
            return _did_verify_old(turn, done)
        case Settle():
            return _did_settle(turn, done)
        case After(outcome):
            return _did_after(turn, outcome, done)
        case End():
            raise ValueError("the turn has ended")
        case unexpected:
            assert_never(unexpected)


# --- one step each


def _did_before(turn: Turn, done: Done) -> Turn:
    if done.how == "refused":
        return _end(_failed(turn, done, "before"), "not_started")
    turn = replace(turn, is_open=True)
    return _act(turn, 0) if done.ok else _keep_old(_failed(turn, done, "before"))


def _did_act(turn: Turn, index: int, done: Done) -> Turn:
    named = f" ({turn.shape.names[index]})" if turn.shape.names else ""
    what = f"action {index + 1}{named}"
    if done.how == "refused":
        return _did_not_act(_failed(turn, done, what), index)
    turn = replace(turn, began=index + 1)
    if done.ok:
        return _act(turn, index + 1)
    if done.how == "lost" or _may_have_switched(turn.shape, index, done):
        return _leave(turn, done, what)
    return _did_not_act(_failed(turn, done, what), index)


def _did_not_act(turn: Turn, index: int) -> Turn:
    """An action failed. Where the old version is what runs, it goes back if it is well."""
    return _keep_old(turn) if _is_old(turn, index) else _end(turn, "left_out")


def _is_old(turn: Turn, index: int) -> bool:
    if turn.shape.switch is not None:
        return index <= turn.shape.switch
    # Nothing is switched here: scripts and services touched what runs, and only the checks can call it well.
    return not turn.began or (turn.is_open and turn.shape.old)


def _may_have_switched(shape: Shape, index: int, done: Done) -> bool:
    """A switch that failed changed nothing; of one that was stopped, or whose end was not seen, this is not known."""
    return index == shape.switch and done.how in {"unknown", "stopped"}


def _did_verify_old(turn: Turn, done: Done) -> Turn:
    if not done.ok:
        return _leave(turn, done, "verify of the old version")
    return _after(turn, _outcome_of_old(turn))


def _did_settle(turn: Turn, done: Done) -> Turn:
    if done.how == "lost":
        return _leave(turn, done, "settle")
    return _after(turn if done.ok else _failed(turn, done, "settle"), "deployed")


def _did_after(turn: Turn, outcome: AfterOutcome, done: Done) -> Turn:
    if not done.ok:
        return _end(_failed(turn, done, f"after {outcome}"), "rotation_unknown", stop_roll=True)
    return _end(replace(turn, is_open=False), outcome)


def _act(turn: Turn, index: int) -> Turn:
    if index < turn.shape.actions:
        return replace(turn, do=Act(index))
    return replace(turn, do=Verify()) if turn.shape.verify else _settle(turn)


def _settle(turn: Turn) -> Turn:
    return replace(turn, do=Settle()) if turn.shape.settle else _after(turn, "deployed")


def _keep_old(turn: Turn) -> Turn:
    if turn.is_open and turn.shape.old:
        return replace(turn, do=VerifyOld())
    outcome = _outcome_of_old(turn)
    if turn.is_open and turn.shape.bare and outcome == "kept_old":
        # There is nothing to put back: a balancer would be told that a machine is ready on which nothing runs.
        return _end(turn, "left_out")
    return _after(turn, outcome)


def _outcome_of_old(turn: Turn) -> AfterOutcome:
    """`not_started`: `before` itself failed, so that no action was even asked for."""
    return "not_started" if turn.reasons[0].startswith("before") else "kept_old"


def _after(turn: Turn, outcome: AfterOutcome) -> Turn:
    return replace(turn, do=After(outcome)) if turn.is_open else _end(turn, outcome)


def _leave(turn: Turn, done: Done, what: str) -> Turn:
    return _end(_failed(turn, done, what), "lost" if done.how == "lost" else "left_out")


def _failed(turn: Turn, done: Done, what: str) -> Turn:
    how = {"failed": "failed", "lost": "lost the agent"}.get(done.how, done.how)
    return replace(turn, reasons=(*turn.reasons, f"{what}: {done.reason or how}"))


def _end(turn: Turn, outcome: TurnEnding, *, stop_roll: bool = False) -> Turn:
    if outcome == "left_out" and not turn.is_open:
        outcome = "failed"
    result = TurnOutcome(outcome, bool(turn.reasons), stop_roll, turn.is_open, "; ".join(turn.reasons))
    return replace(turn, do=End(result))
