"""Who is there, where relays and strangers say what they like: only what a machine signed itself counts."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from harness.presences import Keys

from agent.orders.orders import Presence
from orchestrator.fleet.presence import Answers, Presences, merge_presences
from orchestrator.plan.plan import PlannedMachine
from relay.protocol.messages import AgentSeen

OWN = Keys()
NOW = time.time()
MACHINE = PlannedMachine("web1", "10.1.0.11", "fra", OWN.fingerprint, ("web",), ("a", "b"))


def shown(ago: float = 0.0, *, keys: Keys = OWN, age: float = 0.0, lain: float | None = None, **said: Any) -> AgentSeen:
    """A presence that was signed `ago` seconds ago, as a relay shows it."""
    return AgentSeen("web1", keys.presence(time=NOW - ago, **said), age, ago if lain is None else lain)


def merged(**answers: Any) -> Presences:
    return merge_presences([MACHINE], {name: [each] for name, each in answers.items()}, NOW)


def newest(answers: Answers) -> Presence:
    return merge_presences([MACHINE], answers, NOW).newest["web1"].presence


# --- relays that show old ones, and lie about time


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("old", [{"lain": 0.0}, {"lain": 626.0}, {"lain": 1e9}, {"lain": -1e9}], ids=str)
def test_an_old_presence_does_not_beat_the_fresh_one(order: str, old: dict[str, float]) -> None:
    answers = {"a": shown(626.0, version="old", **old), "b": shown(3.0, version="fresh", age=1.0)}
    found = merged(**{name: answers[name] for name in order})
    assert found.missing == {}
    assert found.present["web1"].version == "fresh"


@pytest.mark.parametrize("lie", [{"lain": 1e6}, {"age": 1e6}, {"age": 1e6, "lain": 1e6}], ids=str)
def test_a_relay_that_lies_about_the_time_that_has_passed_makes_nobody_late(lie: dict[str, float]) -> None:
    assert merged(a=shown(1.0, **lie), b=shown(4.0)).missing == {}


def test_of_two_fresh_ones_the_newer_counts() -> None:
    answers = {"a": [shown(20.0, version="older")], "b": [shown(2.0, version="newer")]}
    assert newest(answers).version == newest(dict(reversed(answers.items()))).version == "newer"


def test_a_clock_that_was_set_back_does_not_leave_the_machine_with_what_it_said_before() -> None:
    answers = {"a": [shown(-3600.0, version="ahead", age=500.0, lain=500.0)], "b": [shown(1.0, version="right")]}
    assert newest(answers).version == "right"


def test_of_one_relay_the_presence_counts_that_came_last() -> None:
    """Also where the one before is from a clock that was ahead."""
    ahead = shown(-600.0, version="ahead", start="1f3a", started=NOW + 590, age=5.0, lain=8.0)
    assert newest({"a": [ahead, shown(1.0, version="right", start="77b0", started=NOW - 3)]}).version == "right"


def test_a_clock_that_is_wrong_at_every_relay_is_wrong() -> None:
    found = merged(a=shown(626.0, lain=0.0), b=shown(630.0, lain=0.0))
    assert "its clock is 626 s behind" in found.missing["web1"]


# --- strangers


def test_scenario_38_a_strangers_presence_under_its_name_changes_nothing() -> None:
    stranger = shown(0.0, keys=Keys(), start="s", started=NOW - 5)
    found = merge_presences([MACHINE], {"a": [stranger, shown(2.0), stranger], "b": [stranger]}, NOW)
    assert found.missing == {}
    assert found.present["web1"].signing == OWN.signing
    assert MACHINE.key in found.strangers["web1"], "but it is known, with what was expected"
    assert merge_presences([MACHINE], {"a": [shown(2.0)]}, NOW).strangers == {}


# --- a copied home


def copies(first: dict[str, Any], second: dict[str, Any]) -> Presences:
    return merged(a=shown(**first), b=shown(**second))


def test_two_agents_that_live_with_the_same_keys_are_refused_and_both_named() -> None:
    one = {"ago": 2.0, "start": "1f3a", "started": NOW - 5000, "host": "web1-a"}
    other = {"ago": 5.0, "start": "77b0", "started": NOW - 900, "host": "web1-b"}
    for found in (copies(one, other), copies(other, one)):
        why = found.missing["web1"]
        assert why == found.doubled["web1"]
        assert why.startswith("two agents live with its keys: one on web1-a since ")
        assert "(start 1f3a), and one on web1-b since " in why
        assert "(start 77b0); a home was copied" in why
        assert found.present == {}


def test_both_at_one_relay_are_found_too() -> None:
    one, other = (shown(2.0, start=start, started=NOW - 60) for start in "ab")
    assert merge_presences([MACHINE], {"a": [one, other]}, NOW).doubled.keys() == {"web1"}


def test_an_agent_that_was_started_again_is_one_agent() -> None:
    """Also where a relay still shows what it said before, as if it had just come."""
    before = {"ago": 12.0, "start": "1f3a", "started": NOW - 5000, "version": "before"}
    after = {"ago": 1.0, "start": "77b0", "started": NOW - 10, "version": "after"}
    for lie in ({}, {"age": 0.0, "lain": 0.0}, {"age": 40.0}):
        found = copies({**before, **lie}, after)
        assert found.missing == {}
        assert found.present["web1"].version == "after"


def test_a_copy_that_is_gone_is_no_copy_any_more() -> None:
    one = {"ago": 2.0, "start": "1f3a", "started": NOW - 5000}
    gone = {"ago": 50.0, "start": "77b0", "started": NOW - 900, "age": 40.0}
    assert copies(one, gone).missing == {}


def test_agents_that_say_nothing_of_their_start_are_one() -> None:
    assert copies({"ago": 2.0}, {"ago": 3.0, "start": "77b0", "started": NOW - 900}).missing == {}


# --- many


def test_each_presence_is_looked_at_for_its_own_machine_alone() -> None:
    """Else a look at who is there would take a thousand times as long for a thousand machines as for one, squared."""

    class Name(str):
        __slots__ = ()

        def lower(self) -> str:
            looks.append(self)
            return super().lower()

    looks: list[str] = []
    names = [f"Web{number}" for number in range(50, 100)]
    machines = [msgspec.structs.replace(MACHINE, name=name) for name in names]
    answers = {relay: [AgentSeen(Name(name), shown().presence, 0.0, 0.0) for name in names] for relay in "ab"}
    assert len(merge_presences(machines, answers, NOW).strangers) == len(names)
    assert len(looks) == 2 * len(names)
