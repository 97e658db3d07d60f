"""What of a deployment is tried again: what the journal does not call done, and nothing twice."""

from __future__ import annotations

import pytest

from orchestrator.journal import events as ev
from orchestrator.plan.plan import (
    AcquirePlan,
    AskStep,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedAsk,
    PlannedMachine,
    PlannedPhase,
    PlannedStep,
    ServerRun,
    ServerStep,
)
from orchestrator.rolling.again import Attempt, plan_again, progress
from relay.errors import NotFoundError, RefusedError

WEB = ("web1", "web2", "web3")


def server(number: int, name: str, **more: str) -> ServerStep:
    return ServerStep(number, name, ServerRun(name, commands=(("true",),)), **more)  # type: ignore[arg-type]


def farm(number: int, package: str = "web") -> MachineStep:
    turns = tuple(MachineTurn(name, "/srv/shop", (), (), {}, "f") for name in WEB)
    return MachineStep(number, f"farm {number}", turns, "rolling", (PlannedPhase(0, 1),), package, min_in_service=2)


def plan(*steps: PlannedStep) -> Plan:
    machines = tuple(PlannedMachine(name, "10.0.0.1", "fra", name, ("web",), ()) for name in WEB)
    return Plan(
        format=1,
        project="shop",
        label="1.4.2",
        environment="prod",
        packages={},
        scripts=None,
        relays=(),
        feeds={},
        machines=machines,
        secrets={},
        machine_secrets=(),
        pre_acquire=(),
        acquire=AcquirePlan(),
        steps=steps,
        force=True,
    )


def attempt(one: Plan, *told: ev.Event, name: str = "D1") -> Attempt:
    return Attempt(name, one, [ev.JournalEntry(at, name, at, event) for at, event in enumerate(told, 1)])


def ended(machine: str, outcome: str = "deployed", step: int = 1, *, failure: bool = False) -> ev.TurnEnded:
    return ev.TurnEnded(machine, step, outcome, failure=failure, reason="its script failed" if failure else "")


def turns(made: Plan) -> dict[int, list[str]]:
    return {step.number: [turn.machine for turn in step.turns] for step in made.steps if isinstance(step, MachineStep)}


def test_only_machines_that_are_not_through_have_a_turn_and_the_others_count_as_in_service() -> None:
    first = attempt(plan(farm(1)), ended("web1"), ended("web2", "kept_old", failure=True))
    assert progress([first]).unfinished == {"web2": "kept old: its script failed", "web3": "it never began"}
    made = plan_again([first], ())
    assert turns(made) == {1: ["web2", "web3"]}
    assert (made.excluded, made.retries, made.force) == ({}, "D1", False)
    [step] = made.steps
    assert isinstance(step, MachineStep)
    assert [turn.machine for turn in step.beside] == ["web1"]
    assert step.min_in_service == 2


def test_who_is_not_named_and_not_through_is_left_out_of_this_one_by_name() -> None:
    first = attempt(plan(farm(1)), ended("web1"), ended("web2", "left_out", failure=True))
    made = plan_again([first], ("WEB3",))
    assert turns(made) == {1: ["web3"]}
    assert made.excluded == {"web2": "left out: its script failed"}


def test_a_turn_that_ended_badly_is_not_good_whatever_its_word_is() -> None:
    first = attempt(
        plan(farm(1)), ended("web1", failure=True), ended("web2", "put_back"), ended("web3", "already_current")
    )
    assert set(progress([first]).unfinished) == {"web1", "web2"}


def test_the_last_word_in_the_chain_counts_for_every_machine_of_its_first_plan() -> None:
    whole = plan(farm(1))
    first = attempt(whole, ended("web1"), ended("web2", "kept_old", failure=True))
    second = attempt(plan_again([first], ("web3",)), ended("web3"), name="D2")
    made = plan_again([first, second], ())
    assert turns(made) == {1: ["web2"]}
    assert made.retries == "D2"
    third = attempt(made, ended("web2"), name="D3")
    with pytest.raises(RefusedError, match="every machine is through"):
        plan_again([first, second, third], ())
    assert turns(plan_again([first, second, third], ("web1",))) == {1: ["web1"]}


def test_steps_on_the_server_that_were_done_are_not_repeated_and_others_wait_for_all_machines() -> None:
    ask = AskStep(2, "sign off", PlannedAsk("well?"))
    whole = plan(server(1, "schema"), ask, farm(3), server(4, "contract"), server(5, "report", when="always"))
    done = [
        ev.StepEnded(1, ok=True),
        ev.StepEnded(2, ok=True),
        ev.StepEnded(4, ok=True, skipped=True),
        ev.StepEnded(5, ok=True),
    ]
    first = attempt(whole, *done, ended("web1", step=3), ended("web2", "lost", step=3, failure=True))
    assert [step.number for step in plan_again([first], ()).steps] == [3, 4, 5]
    some = plan_again([first], ("web2",))
    assert [step.number for step in some.steps] == [3, 5]
    assert "step 4 (contract) waits until web3 are through, and is not run" in some.notes


def test_a_step_without_a_package_that_was_done_on_a_machine_is_not_done_there_again() -> None:
    whole = plan(farm(1, package=""), farm(2))
    first = attempt(
        whole, *(ended(name) for name in WEB), ended("web1", step=2), ended("web2", "kept_old", 2, failure=True)
    )
    assert turns(plan_again([first], ())) == {2: ["web2", "web3"]}


def test_a_machine_that_the_plan_does_not_know_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="web9 has no part"):
        plan_again([attempt(plan(farm(1)))], ("web9",))
