"""The engine with one fault each: what the simulation must find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
import pytest

from orchestrator.deployment.decisions import Desk
from orchestrator.deployment.steps import RollingStep
from orchestrator.deployment.tries import Tries
from orchestrator.deployment.turns import MachineTurnRunner
from orchestrator.journal import events as ev
from orchestrator.people.statement import Decide, SignedDecision
from orchestrator.rolling import rolling, shared, turn
from orchestrator.rolling.history import History, TurnHistory
from orchestrator.rolling.rolling import Roll, RotationState
from orchestrator.rolling.turn import AfterOutcome, Done, Turn

Mutant = Callable[[pytest.MonkeyPatch], None]


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = rolling._why_full

    def wrong(roll: Roll) -> str:
        wider = tuple(msgspec.structs.replace(phase, window=phase.window + 1) for phase in roll.phases)
        return right(replace(roll, phases=wider))

    patch.setattr(rolling, "_why_full", wrong)


def in_flight_counts_as_in_service(patch: pytest.MonkeyPatch) -> None:
    right = RollingStep._service

    async def wrong(self: RollingStep, roll: Roll) -> RotationState:
        found = await right(self, roll)
        # Two of them hide one that goes.
        return RotationState(found.inside | roll.in_flight, found.out)

    def may_start(roll: Roll, service: RotationState, machine: str, left: int) -> bool:
        return machine in service.out or len(service.inside) - 1 >= roll.min_in_service

    patch.setattr(RollingStep, "_service", wrong)
    patch.setattr(rolling, "_may_start", may_start)


def open_brackets_count_as_in_service(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        RotationState, "by_brackets", classmethod(lambda cls, machines, *_: cls(frozenset(machines), frozenset()))
    )
    patch.setattr(shared, "_gone", lambda *_: frozenset())


def one_failure_more_is_allowed(patch: pytest.MonkeyPatch) -> None:
    right = rolling.ended

    def wrong(roll: Roll, machine: str, **how: bool) -> Roll:
        more = replace(roll, max_failures=roll.max_failures + 1)
        return replace(right(more, machine, **how), max_failures=roll.max_failures)

    patch.setattr(rolling, "ended", wrong)


def no_is_a_yes(patch: pytest.MonkeyPatch) -> None:
    right = Desk.ask

    async def wrong(self: Desk, *arguments: Any) -> str:
        await right(self, *arguments)
        return ""

    patch.setattr(Desk, "ask", wrong)


def anybody_answers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("orchestrator.deployment.decisions.why_not", lambda *_: "")
    patch.setattr("orchestrator.people.judging.why_not", lambda *_: "")


def retry_begins_anew_what_was_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tries, "next", lambda self, **_: self._begun.clear())


def resume_forgets_what_it_began(patch: pytest.MonkeyPatch) -> None:
    """What was under way is begun once more, under another name."""
    right = History.turn

    def wrong(self: History, step: int, machine: str) -> TurnHistory | None:
        found = right(self, step, machine)
        return found and replace(found, begun=())

    patch.setattr(History, "turn", wrong)


def resume_forgets_how_the_roll_went(patch: pytest.MonkeyPatch) -> None:
    """Its failures, that is."""
    right = History.roll

    def wrong(self: History, step: Any) -> Roll:
        return replace(right(self, step), failed=(), stopped="")

    patch.setattr(History, "roll", wrong)


def kept_old_needs_no_after(patch: pytest.MonkeyPatch) -> None:
    right = turn._after

    def wrong(state: Turn, outcome: AfterOutcome) -> Turn:
        return turn._end(state, outcome) if outcome == "kept_old" else right(state, outcome)

    patch.setattr(turn, "_after", wrong)


def before_runs_before_its_bracket_stands(patch: pytest.MonkeyPatch) -> None:
    async def wrong(self: MachineTurnRunner) -> Done:
        rotation = self._step.rotation
        assert rotation is not None
        result = await self._here(rotation.before, "before", {})
        await self._context.recorder.record(ev.BracketOpened(self._turn.machine, rotation.name, self._step.number))
        self._context.out.add(self._turn.machine)
        return Done("done") if result.ok else Done("failed", result.reason)

    patch.setattr(MachineTurnRunner, "_before", wrong)


def pause_does_not_hold_the_roll(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Desk, "is_paused", property(lambda _: False))


def an_answer_is_for_any_machine(patch: pytest.MonkeyPatch) -> None:
    right = Desk._take_word

    async def wrong(self: Desk, said: SignedDecision, word: Decide) -> bool:
        if (word.machine, word.step) not in self._machines and self._machines:
            machine, step = next(iter(self._machines))
            word = msgspec.structs.replace(word, machine=machine, step=step)
        return await right(self, said, word)

    patch.setattr(Desk, "_take_word", wrong)


def bad_versions_go_in(patch: pytest.MonkeyPatch) -> None:
    """What failed behind the switch is called the old version that was kept."""
    patch.setattr(turn, "_is_old", lambda *_: True)


MUTANTS: Final[Mapping[str, Mutant]] = {
    mutant.__name__: mutant
    for mutant in (
        window_off_by_one,
        in_flight_counts_as_in_service,
        open_brackets_count_as_in_service,
        one_failure_more_is_allowed,
        no_is_a_yes,
        anybody_answers,
        retry_begins_anew_what_was_lost,
        resume_forgets_what_it_began,
        resume_forgets_how_the_roll_went,
        kept_old_needs_no_after,
        before_runs_before_its_bracket_stands,
        pause_does_not_hold_the_roll,
        an_answer_is_for_any_machine,
        bad_versions_go_in,
    )
}
