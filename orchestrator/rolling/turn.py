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

What the table leaves out is so with `on_failure: stop`. With `ask`, a person decides before the turn ends, and so does
one of an action that began and whose end was not seen. With `rollback`, what failed after the switch goes back by itself,
once; where that fails too, and where the agent is lost, a person decides.

    retry      what failed is done again, and the turn goes on from there
    rollback   current names the old tree, what followed the switch is done again with it, the old version is checked
               → after rolled_back; a failure
    put-back   after put_back, whatever runs there
    exclude    left out: the bracket stays open; no failure
    fail       left out; a failure

Where a step has no rotation there is no bracket: the same rows, without `before`, `after` and the old version's check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, assert_never

from agent.orders.orders import TreeFacts
from orchestrator.plan.plan import MachineStep, MachineTurn, OnFailure, SwitchAction

AfterOutcome = Literal["deployed", "not_started", "kept_old", "rolled_back", "put_back"]
"""What `after` gets as OUTCOME."""

TurnEnding = Literal[
    "deployed",
    "already_current",
    "not_started",
    "kept_old",
    "rolled_back",
    "put_back",
    "excluded",
    "left_out",
    "rotation_unknown",
    "lost",
    "failed",
]
"""How a turn ended. `failed`: a step without a rotation, after the switch or without one; `lost`: left as found;
`excluded`: left out by a person's word.
"""

Answer = Literal["retry", "rollback", "put-back", "exclude", "fail"]
"""What a person says of a machine whose turn waits."""

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
        on_failure: what is done about a new version that is bad.
        old_tree: another tree is current here, so that there is one to switch back to.
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
    on_failure: OnFailure = "stop"
    old_tree: bool = False


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
        on_failure=step.on_failure,
        old_tree=facts is not None and bool(facts.current_version) and facts.current_manifest != facts.manifest,
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
class Ask:
    """A person says what becomes of the machine: one of these, the reasons being the turn's."""

    choices: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Back:
    """Let `current` name the tree that it named before."""


@dataclass(frozen=True, slots=True)
class Redo:
    """Perform the action of this index again, with the old version."""

    index: int


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


Do = Before | Act | Verify | VerifyOld | Settle | After | Ask | Back | Redo | End


def word_of(do: Do) -> str:
    """What is to be done, in a word or two: for the journal, and for people."""
    match do:
        case Act(index):
            return f"action {index + 1}"
        case Redo(index):
            return f"action {index + 1} again"
        case After(outcome):
            return f"after {outcome}"
        case _:
            return _WORDS[type(do)]


_WORDS: Final[Mapping[type, str]] = {
    Before: "before",
    Verify: "verify",
    VerifyOld: "verify old",
    Settle: "settle",
    Ask: "ask",
    Back: "switch back",
    End: "end",
}


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a `Do`; `answer` is there where it was an `Ask` that is done."""

    how: DoneState
    reason: str = ""
    answer: Answer | None = None

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
        goes_back: the old version is to run again.
        failed: what a retry does again.
        is_lost: the agent was, when that failed.
    """

    shape: Shape
    do: Do
    began: int = 0
    is_open: bool = False
    reasons: tuple[str, ...] = field(default=())
    goes_back: bool = False
    failed: Do | None = None
    is_lost: bool = False


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
        case Ask(choices):
            return _did_ask(turn, choices, done)
        case Back():
            return _redo(turn, (turn.shape.switch or 0) + 1) if done.ok else _leave(turn, done, "switching back")
        case Redo(index):
            return _redo(turn, index + 1) if done.ok else _leave(turn, done, f"{_action(turn, index)} again")
        case End():
            raise ValueError("the turn has ended")
        case unexpected:
            assert_never(unexpected)


def is_out(turn: Turn) -> bool:
    """Whether `before` has taken the machine out: where it failed, nothing is done that would need it."""
    return turn.is_open and not (turn.reasons and turn.reasons[0].startswith("before:"))


def interrupted(turn: Turn, done: Done) -> Turn:
    """The turn where `before` was run again, because time had passed or a process had died, and it failed."""
    return _leave(turn, done, "before again")


# --- one step each


def _did_before(turn: Turn, done: Done) -> Turn:
    if done.how == "refused":
        return _end(_failed(turn, done, "before"), "not_started")
    turn = replace(turn, is_open=True)
    return _act(turn, 0) if done.ok else _keep_old(_failed(turn, done, "before"))


def _did_act(turn: Turn, index: int, done: Done) -> Turn:
    what = _action(turn, index)
    if done.how == "refused":
        return _did_not_act(_failed(turn, done, what), index)
    turn = replace(turn, began=index + 1)
    if done.ok:
        return _act(turn, index + 1)
    is_unseen = done.how == "unknown" and turn.shape.on_failure != "stop"
    if done.how == "lost" or is_unseen or _may_have_switched(turn.shape, index, done):
        return _leave(turn, done, what)
    return _did_not_act(_failed(turn, done, what), index)


def _action(turn: Turn, index: int) -> str:
    named = f" ({turn.shape.names[index]})" if turn.shape.names else ""
    return f"action {index + 1}{named}"


def _did_not_act(turn: Turn, index: int) -> Turn:
    """An action failed. Where the old version is what runs, it goes back if it is well."""
    return _keep_old(turn) if _is_old(turn, index) else _bad(turn)


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
    return _after(turn, "rolled_back" if turn.goes_back else _outcome_of_old(turn))


def _did_settle(turn: Turn, done: Done) -> Turn:
    if done.how == "lost":
        return _leave(turn, done, "settle")
    return _after(turn if done.ok else _failed(turn, done, "settle"), "deployed")


def _did_after(turn: Turn, outcome: AfterOutcome, done: Done) -> Turn:
    if not done.ok:
        return _end(_failed(turn, done, f"after {outcome}"), "rotation_unknown", stop_roll=True)
    return _end(replace(turn, is_open=False), outcome)


def _did_ask(turn: Turn, choices: Sequence[Answer], done: Done) -> Turn:
    answer = done.answer if done.ok else "fail"
    if answer is None or answer not in {*choices, "fail"}:
        raise ValueError(f"{answer!r} is no answer to this question: expected one of {', '.join(choices)}")
    match answer:
        case "retry":
            assert turn.failed is not None  # noqa: S101 - something failed, or nobody were asked
            return replace(turn, do=turn.failed, reasons=turn.reasons[:-1], failed=None, is_lost=False)
        case "rollback":
            return replace(turn, do=Back(), goes_back=True)
        case "put-back":
            return _after(turn, "put_back")
        case "exclude":
            return _end(turn, "excluded")
        case "fail":
            said = turn if done.ok else _failed(turn, done, "what a person decides")
            return _end(said, "lost" if turn.is_lost else "left_out")
        case unexpected:
            assert_never(unexpected)


def _redo(turn: Turn, index: int) -> Turn:
    if index < turn.began:
        return replace(turn, do=Redo(index))
    return replace(turn, do=VerifyOld()) if turn.shape.old else _after(turn, "rolled_back")


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
        return _bad(turn)
    return _after(turn, outcome)


def _outcome_of_old(turn: Turn) -> AfterOutcome:
    """`not_started`: `before` itself failed, so that no action was even asked for."""
    return "not_started" if turn.reasons[0].startswith("before") else "kept_old"


def _after(turn: Turn, outcome: AfterOutcome) -> Turn:
    return replace(turn, do=After(outcome)) if turn.is_open else _end(turn, outcome)


def _leave(turn: Turn, done: Done, what: str) -> Turn:
    return _bad(replace(_failed(turn, done, what), is_lost=done.how == "lost"))


def _bad(turn: Turn) -> Turn:
    """What serves, or would serve, is not known to be good."""
    goes = _may_go_back(turn)
    if turn.shape.on_failure == "stop":
        return _end(turn, "lost" if turn.is_lost else "left_out")
    if turn.shape.on_failure == "rollback" and goes and not turn.is_lost:
        return replace(turn, do=Back(), goes_back=True)
    choices: tuple[Answer, ...] = ("retry", *(("rollback",) if goes else ()), "put-back", "exclude", "fail")
    return replace(turn, do=Ask(choices), failed=turn.do)


def _may_go_back(turn: Turn) -> bool:
    switch = turn.shape.switch
    return turn.shape.old_tree and switch is not None and turn.began > switch and not turn.goes_back


def _failed(turn: Turn, done: Done, what: str) -> Turn:
    how = {"failed": "failed", "lost": "lost the agent"}.get(done.how, done.how)
    return replace(turn, reasons=(*turn.reasons, f"{what}: {done.reason or how}"))


def _end(turn: Turn, outcome: TurnEnding, *, stop_roll: bool = False) -> Turn:
    if outcome == "left_out" and not turn.is_open:
        outcome = "failed"
    # A person has answered for these.
    failure = bool(turn.reasons) and outcome not in {"excluded", "put_back"}
    result = TurnOutcome(outcome, failure, stop_roll, turn.is_open, "; ".join(turn.reasons))
    return replace(turn, do=End(result))
