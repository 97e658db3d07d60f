"""The sliding window: who may start, and what holds in every order of events."""

from __future__ import annotations

import pytest
from harness.seed import SOAK
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.locks.leases import Elsewhere
from orchestrator.plan.plan import MachineStep, MachineTurn, PlannedPhase
from orchestrator.rolling import shared
from orchestrator.rolling.rolling import (
    Roll,
    RotationState,
    begin,
    ended,
    passed,
    started,
    stop,
    why_waiting,
)

WEBS = ("web1", "web2", "web3", "web4", "web5")


def roll(
    *phases: tuple[int, int],
    machines: tuple[str, ...] = WEBS,
    min_in_service: int = 0,
    max_failures: int = 0,
    unhealthy_first: bool = True,
) -> Roll:
    """Of phases (machines, window)."""
    planned = tuple(PlannedPhase(count, window) for count, window in phases)
    return Roll(machines, planned, min_in_service, max_failures, unhealthy_first)


def service(*out: str, unknown: tuple[str, ...] = (), machines: tuple[str, ...] = WEBS) -> RotationState:
    """All in service but these."""
    return RotationState(frozenset(machines) - {*out, *unknown}, frozenset(out))


ALL_IN = service()


def next_starts(state: Roll, now: RotationState) -> list[str]:
    """Who starts where no other deployment has anything."""
    return shared.starts(state, now, shared.Own("shop", ""), Elsewhere())


def start(state: Roll, now: RotationState = ALL_IN) -> tuple[Roll, list[str]]:
    starts = next_starts(state, now)
    for machine in starts:
        state = started(state, machine)
    return state, starts


# --- the window


def test_the_window_slides_when_either_of_two_ends() -> None:
    state, starts = start(roll((0, 2)))
    assert starts == ["web1", "web2"]
    assert next_starts(state, ALL_IN) == []
    state, starts = start(ended(state, "web2"))
    assert starts == ["web3"], "the third starts when the second ends, though the first is still in flight"
    assert state.in_flight == {"web1", "web3"}


def test_a_phase_ends_when_its_machines_are_through() -> None:
    state, starts = start(roll((1, 1), (2, 2), (0, 5)))
    assert starts == ["web1"]
    state, starts = start(ended(state, "web1"))
    assert starts == ["web2", "web3"]
    state, starts = start(ended(state, "web3"))
    assert starts == [], "web2 is not through: its phase has not ended"
    wait = why_waiting(state, ALL_IN)
    assert wait == "phase 3 of 3 starts when web2 is through"
    assert start(ended(state, "web2"))[1] == ["web4", "web5"]


def test_parallel_is_one_phase_with_a_window_of_all() -> None:
    turns = tuple(MachineTurn(name, "", (), (), {}, "f" * 64) for name in WEBS)
    parallel = MachineStep(1, "all", turns, "parallel", phases=())
    assert next_starts(begin(parallel), ALL_IN) == list(WEBS)
    rolling = MachineStep(1, "all", turns, "rolling", phases=(PlannedPhase(0, 2),), max_failures=3, min_in_service=1)
    assert begin(rolling) == roll((0, 2), max_failures=3, min_in_service=1)


def test_a_plan_that_counts_too_few_still_reaches_every_machine() -> None:
    state, starts = start(roll((1, 1), (1, 2)))
    for _ in range(len(WEBS)):
        for machine in starts:
            state = ended(state, machine)
        state, starts = start(state)
    assert state.is_over
    assert set(state.started) == set(WEBS)


def test_a_machine_on_which_nothing_is_to_do_takes_no_slot_and_no_place_in_a_phase() -> None:
    state = passed(passed(roll((1, 1), (0, 1)), "web1"), "web2")
    state, starts = start(state)
    assert starts == ["web3"], "the canary is the first that is really deployed"
    assert passed(state, "web4").waiting == ("web5",)


# --- who is in service


def test_no_start_takes_the_number_in_service_below_the_minimum() -> None:
    state, starts = start(roll((0, 5), min_in_service=3))
    assert starts == ["web1", "web2"], "3 of 5 must stay"
    wait = why_waiting(state, ALL_IN)
    assert "3 in service" in wait


def test_a_machine_in_flight_does_not_count_even_if_its_probe_still_says_so() -> None:
    state = started(roll((0, 5), min_in_service=4), "web1")
    assert next_starts(state, ALL_IN) == [], "web1 may be taken out the next moment"


def test_one_that_is_out_counts_against_the_minimum_and_goes_first() -> None:
    state = roll((0, 5), min_in_service=4)
    state, starts = start(state, service("web4"))
    assert starts == ["web4"], "it lowers nothing; any other would"
    assert start(ended(state, "web4"), ALL_IN)[1] == ["web1"], "it is back in service: one may go"


def test_below_the_minimum_those_that_are_out_may_still_come_back() -> None:
    state = roll((0, 5), min_in_service=3)
    assert next_starts(state, service("web1", "web2", "web3")) == ["web1", "web2", "web3"]


def test_two_machines_of_which_one_is_down_do_not_lose_the_live_one() -> None:
    pair = ("a", "b")
    state, starts = start(roll((0, 1), machines=pair, min_in_service=1), service("b", machines=pair))
    assert starts == ["b"]
    state = ended(state, "b", failure=False)
    assert next_starts(state, service("b", machines=pair)) == [], "b is still out: a is the last one"
    assert next_starts(state, service(machines=pair)) == ["a"]


def test_of_whom_nobody_can_tell_neither_counts_nor_is_taken_lightly() -> None:
    state = roll((0, 5), min_in_service=2)
    two_known = service(unknown=("web1", "web2", "web3"))
    assert next_starts(state, two_known) == ["web1", "web2", "web3"], "the two that are known to serve stay"
    one_known = service(unknown=("web1", "web2", "web3", "web4"))
    assert next_starts(state, one_known) == [], "perhaps all four serve, perhaps none"
    blind = service(unknown=WEBS)
    wait = why_waiting(state, blind)
    assert "nobody can tell" in wait


def test_a_listed_order_is_kept_as_far_as_the_minimum_lets_it() -> None:
    listed = roll((0, 1), unhealthy_first=False)
    assert next_starts(listed, service("web3")) == ["web1"]
    tight = roll((0, 1), unhealthy_first=False, min_in_service=4)
    assert next_starts(tight, service("web3")) == ["web3"], "no other may start, and it would never end"


def test_machines_that_are_out_go_before_unknown_ones_and_those_before_healthy_ones() -> None:
    state = roll((0, 5))
    assert next_starts(state, service("web5", unknown=("web4",))) == ["web5", "web4", "web1", "web2", "web3"]


def test_a_roll_that_can_never_go_on_says_so() -> None:
    pair = ("a", "b")
    state = roll((0, 1), machines=pair, min_in_service=2)
    wait = why_waiting(state, service(machines=pair))
    assert wait == "2 in service, and min_in_service: 2 must stay while one is out"
    assert not state.is_over


def test_without_a_probe_a_machine_is_out_where_a_bracket_is_open() -> None:
    assert RotationState.by_brackets(WEBS, {"web2"}) == service("web2")


# --- failures


def test_more_failures_than_allowed_stop_and_those_in_flight_finish() -> None:
    state, _ = start(roll((0, 3), max_failures=1))
    state = ended(state, "web1", failure=True)
    assert not state.stopped
    state, starts = start(state)
    assert starts == ["web4"]
    state = ended(state, "web2", failure=True)
    assert state.stopped == "2 failures (web1, web2), 1 allowed"
    assert next_starts(state, ALL_IN) == []
    assert why_waiting(state, ALL_IN).startswith("stopped: 2 failures")
    assert not state.is_over, "web3 and web4 are still in flight"
    state = ended(ended(state, "web3"), "web4", failure=True)
    assert state.is_over
    assert state.waiting == ("web5",)
    assert state.failed == ("web1", "web2", "web4")


def test_an_unknown_capacity_stops_whatever_the_number_of_failures() -> None:
    state, _ = start(roll((0, 1), max_failures=5))
    state = ended(state, "web1", failure=True, stop_roll=True)
    assert state.is_over
    assert "web1" in state.stopped


def test_a_stop_from_outside_keeps_its_first_reason() -> None:
    state, _ = start(roll((0, 1)))
    state = ended(stop(state, "cancelled by ann"), "web1", failure=True)
    assert state.stopped == "cancelled by ann"


def test_what_did_not_happen_is_refused() -> None:
    state = started(roll((0, 1)), "web1")
    with pytest.raises(ValueError):
        started(state, "web1")
    with pytest.raises(ValueError):
        started(state, "web9")
    with pytest.raises(ValueError):
        passed(state, "web1")
    with pytest.raises(ValueError):
        ended(state, "web2")
    through = ended(state, "web1")
    with pytest.raises(ValueError):
        ended(through, "web1")


# --- in every order of events


class Rolling(RuleBasedStateMachine):
    """A fleet whose machines really leave and enter service, and a probe that is sometimes late or silent."""

    @initialize(
        count=st.integers(1, 8),
        phases=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=3),
        min_in_service=st.integers(0, 4),
        max_failures=st.integers(0, 3),
        unhealthy_first=st.booleans(),
        data=st.data(),
    )
    def begin(
        self,
        count: int,
        phases: list[tuple[int, int]],
        min_in_service: int,
        max_failures: int,
        unhealthy_first: bool,
        data: st.DataObject,
    ) -> None:
        machines = tuple(f"m{number}" for number in range(count))
        self.roll = roll(
            *phases,
            machines=machines,
            min_in_service=min_in_service,
            max_failures=max_failures,
            unhealthy_first=unhealthy_first,
        )
        self.serving = data.draw(st.sets(st.sampled_from(machines)))
        self.order: list[str] = []
        self.failures = 0
        self.has_stopped = False

    def seen(self, silent: set[str]) -> RotationState:
        """A probe never lies, but it may be silent."""
        machines = set(self.roll.machines)
        return RotationState(frozenset(self.serving - silent), frozenset(machines - self.serving - silent))

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        silent = data.draw(st.sets(st.sampled_from(self.roll.machines)))
        for machine in next_starts(self.roll, self.seen(silent)):
            assert not self.has_stopped, "a start after the stop"
            was_serving = machine in self.serving
            left = self.serving - self.roll.in_flight - {machine}
            assert not was_serving or len(left) >= self.roll.min_in_service
            self.roll = started(self.roll, machine)
            self.order.append(machine)

    @precondition(lambda self: self.roll.in_flight)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.serving.discard(data.draw(st.sampled_from(sorted(self.roll.in_flight))))

    @precondition(lambda self: self.roll.in_flight)
    @rule(data=st.data(), failure=st.booleans(), stop_roll=st.booleans())
    def end(self, data: st.DataObject, failure: bool, stop_roll: bool) -> None:
        machine = data.draw(st.sampled_from(sorted(self.roll.in_flight)))
        stop_roll = stop_roll and failure
        self.roll = ended(self.roll, machine, failure=failure, stop_roll=stop_roll)
        (self.serving.discard if failure else self.serving.add)(machine)
        self.failures += failure
        self.has_stopped |= stop_roll or self.failures > self.roll.max_failures

    @precondition(lambda self: self.roll.waiting)
    @rule(data=st.data())
    def pass_by(self, data: st.DataObject) -> None:
        self.roll = passed(self.roll, data.draw(st.sampled_from(self.roll.waiting)))

    @rule()
    def stops_exactly_when_it_must(self) -> None:
        assert bool(self.roll.stopped) == self.has_stopped

    @invariant()
    def never_more_in_flight_than_the_window_and_one_phase_at_a_time(self) -> None:
        phases = [(phase.machines or len(self.roll.machines), phase.window) for phase in self.roll.phases]
        at = 0
        for number, (count, window) in enumerate(phases):
            last = number == len(phases) - 1
            group = self.order[at:] if last else self.order[at : at + count]
            flying = self.roll.in_flight.intersection(group)
            assert len(flying) <= window
            assert not flying or len(self.roll.in_flight) == len(flying), "machines of two phases in flight"
            at += count

    @invariant()
    def every_machine_once(self) -> None:
        assert len(set(self.order)) == len(self.order)
        assert set(self.order) | self.roll.passed | set(self.roll.waiting) == set(self.roll.machines)

    @invariant()
    def it_goes_on_or_says_why_not(self) -> None:
        now = self.seen(set())
        wait = why_waiting(self.roll, now)
        assert bool(wait) != bool(self.roll.is_over or next_starts(self.roll, now))


TestRolling = Rolling.TestCase
TestRolling.pytestmark = [pytest.mark.long]
TestRolling.settings = settings(max_examples=150 if SOAK else 50, stateful_step_count=30, deadline=None)
