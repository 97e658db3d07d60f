"""A plan says whom it asks, and is refused where they cannot answer."""

from __future__ import annotations

import re

import msgspec
import pytest
from harness.files import parse_environment, parse_process
from harness.paths import ROOT
from harness.people_kit import GATE, PROCESS, STAGING, TEAMS, AnyScript, planned

from orchestrator.files.process import server_scripts
from orchestrator.people.asks import planned_asks
from orchestrator.plan.forecast import describe, document
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import AskStep, MachineStep, Plan, PlannedPackage, ServerRun, ServerStep
from relay.written.yaml_positions import PlanError

HEAD = "format: 1\nproject: webshop\npackages: { web: Acme.Web }\nsteps:\n"


def mistakes(
    process: str = PROCESS,
    environment: str = STAGING + TEAMS,
    people: tuple[str, ...] = ("anna", "ben", "clara"),
    author: str | None = "clara",
) -> list[str]:
    with pytest.raises(PlanError) as caught:
        planned(process, environment, people, author)
    return [str(mistake) for mistake in caught.value.mistakes]


def ask(keys: str) -> str:
    return f"{HEAD}  - {{ name: sign off, ask: Ready?, {keys} }}\n"


def gate_of(plan: Plan) -> MachineStep:
    step = plan.steps[1]
    assert isinstance(step, MachineStep)
    return step


# --- what is planned


def test_a_gate_stands_behind_its_phase_with_its_check_and_its_question() -> None:
    first, second = gate_of(planned()).phases
    assert second.gate is None
    assert first.gate is not None
    assert first.gate.ask is not None
    assert first.gate.ask.approvers == ("anna", "ben", "clara")
    assert (first.gate.ask.minimum, first.gate.ask.not_author) == (2, True)
    assert (first.gate.ask.expires, first.gate.ask.on_expiry) == (14400.0, "stop")
    assert first.gate.ask.text == "Open https://${machine.address}/ of 1.4.2"
    check = first.gate.check
    assert check is not None
    assert check.script is not None
    assert (check.script.path, check.idempotent, check.secrets) == ("ops/error-rate.sh", True, ())
    seen = {"GATE": "canary looks good", "STEP": "web farm", "VERSION": "1.4.2", "RELEASE": "1.4.2"}
    assert seen.items() <= check.variables.items()


def test_variables_of_a_question_are_filled_in_but_for_the_machines_that_went_through() -> None:
    environment = (STAGING + TEAMS).replace("log_level: warn", 'log_level: warn, page: "https://${machine.name}:1/"')
    text = PROCESS.replace("Open https://${machine.address}/ of ${release.label}", "${page} in ${environment}")
    asks = planned_asks(planned(text, environment))
    assert asks[GATE].text == "https://${machine.name}:1/ in staging"


def test_a_step_that_asks_waits_for_everybody_where_nobody_is_named() -> None:
    step = planned().steps[2]
    assert isinstance(step, AskStep)
    assert (step.number, step.ask.text, step.ask.approvers) == (3, "Business owner agrees to 1.4.2", ())
    assert (step.ask.minimum, step.ask.expires, step.ask.on_expiry) == (1, 0.0, "pause")


def test_a_person_of_two_teams_is_asked_once() -> None:
    made = planned(ask("approvers: [ben, team:shop, anna]"))
    assert planned_asks(made)["1/sign off"].approvers == ("ben", "anna")


@pytest.mark.parametrize("strategy", ["parallel", "rolling"])
def test_where_the_file_says_nothing_a_person_is_asked_about_a_bad_machine(strategy: str) -> None:
    step = f"roles: [web], deploy: web, to: /srv/x, strategy: {strategy}"
    for written, expected in (("", "ask"), (", on_failure: rollback", "rollback"), (", on_failure: stop", "stop")):
        (made,) = planned(f"{HEAD}  - {{ name: farm, {step}{written} }}\n").steps
        assert isinstance(made, MachineStep)
        assert made.on_failure == expected


def test_a_frozen_plan_that_says_nothing_of_failures_stops_as_it_was_made_to() -> None:
    step = msgspec.to_builtins(gate_of(planned()))
    del step["on_failure"]
    assert msgspec.convert(step, MachineStep).on_failure == "stop"


@pytest.mark.parametrize(("written", "expected"), [("", "refuse"), ("on_rollback: refuse, ", "refuse"), ("on_rollback: skip, ", "skip")])  # fmt: skip
def test_a_server_step_that_says_nothing_lets_nobody_go_back(written: str, expected: str) -> None:
    (step,) = planned(f"{HEAD}  - {{ name: schema, run_on: server, {written}script: up.sh }}\n").steps
    assert isinstance(step, ServerStep)
    assert step.on_rollback == expected


def test_the_script_of_going_back_sees_and_may_what_its_step_does() -> None:
    text = f"{HEAD}  - {{ name: schema, run_on: server, script: up.sh, on_rollback: ops/down.sh, timeout: 2m }}\n"
    (step,) = planned(text).steps
    assert isinstance(step, ServerStep)
    assert isinstance(step.on_rollback, ServerRun)
    assert step.on_rollback.script is not None
    assert (step.on_rollback.script.path, step.on_rollback.timeout) == ("ops/down.sh", 120.0)
    assert step.on_rollback.variables == step.run.variables | {"ROLLBACK": "1"}


def test_scripts_of_gates_and_of_going_back_are_frozen_with_the_release() -> None:
    text = PROCESS.replace("on_rollback: skip", "on_rollback: ops/down.sh")
    process = parse_process(text.encode(), "release.yaml", "/project")
    assert server_scripts(process) == ["ops/down.sh", "ops/error-rate.sh"]


def test_the_plan_says_who_will_be_asked_as_text_and_as_json() -> None:
    made = planned()
    text = describe(made)
    assert re.search(
        r"gate canary looks good, after phase 1: runs check canary looks good: ops/error-rate.sh .*, then asks "
        r"anna, ben, clara, 2 of whom must agree, but not who made the release: Open https://.*; waits 4 h and then stops",
        text,
    )
    assert "step 3 sign off: asks everybody who may decide there: Business owner agrees to 1.4.2" in text
    assert "where a new version is bad: a person is asked" in text
    assert "going back leaves it out" in text
    phases = document(made)["plan"]["steps"][1]["phases"]
    assert phases[0]["gate"]["ask"]["approvers"] == ("anna", "ben", "clara")
    assert document(made)["plan"]["author"] == "clara"


def test_the_whole_is_planned_with_the_names_of_its_people() -> None:
    """tests/orchestrator/data/whole.yaml, but for machines that may be left out: this environment has none of them."""
    text, left = re.subn(rb", offline: \{[^}]*\}", b"", (ROOT / "tests/orchestrator/data/whole.yaml").read_bytes())
    assert left == 1
    made = make_plan(
        parse_process(text, "whole.yaml", "/project"),
        parse_environment((STAGING + TEAMS).encode(), "staging.yaml", "/environments"),
        label="1.4.2",
        packages={"web": PlannedPackage("Acme.Web", "1.4.2"), "db": PlannedPackage("Acme.Schema", "2.0.0")},
        scripts=None,
        prompts={"change": "CHG000042"},
        files=AnyScript(),
        people=("anna", "ben", "clara"),
        author="ben",
    )
    asks = planned_asks(made)
    assert {name: one.approvers for name, one in asks.items()} == {GATE: ("anna", "ben"), "3/sign off": ("clara",)}


# --- what is refused


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("approvers: [anna, eve]", "release.yaml:5: steps[0].approvers[1]: trust.json names no 'eve' who may decide in staging (there: anna, ben, clara): 'waystation trust person eve' names one"),
        ("approvers: [Anna]", "release.yaml:5: steps[0].approvers[0]: 'Anna': expected the name of a person"),
        ("approvers: [team:ops]", "release.yaml:5: steps[0].approvers[0]: there is no team 'ops': define it under teams: in staging.yaml (there: shop, business)"),
        ("approvers: [anna, ben], minimum: 3", "release.yaml:5: steps[0].minimum: is 3, more than the 2 of those who are asked: it can never be met"),
        ("minimum: 4", "release.yaml:5: steps[0].minimum: is 4, more than the 3 whom trust.json names"),
        ("approvers: [clara], not_author: true", "release.yaml:5: steps[0].not_author: cannot be met: clara made the release"),
        ("approvers: [anna], on_expiry: proceed", "release.yaml:5: steps[0].on_expiry: is proceed, and it never expires"),
        ("expires: 0s", "release.yaml:5: steps[0].expires: 0s is over before anything began"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_answered_is_refused_with_file_and_line(keys: str, expected: str) -> None:
    (told,) = mistakes(ask(keys))
    assert told.startswith(expected)


def test_without_names_nobody_can_be_told_from_the_author_nor_from_each_other() -> None:
    (told,) = mistakes(ask("not_author: true"), people=())
    assert told.startswith("release.yaml:5: steps[0].not_author: needs people with names, and trust.json names nobody")
    (told,) = mistakes(ask("minimum: 2"), people=())
    assert told.startswith("release.yaml:5: steps[0].minimum: needs people with names")
    (told,) = mistakes(ask("approvers: [anna], not_author: true"), author="")
    assert told.startswith("release.yaml:5: steps[0].not_author: nobody knows who made the release")


def test_before_there_is_a_release_nobody_is_its_author() -> None:
    assert planned(ask("approvers: [clara], not_author: true"), author=None).author == ""


def test_a_member_of_a_team_whom_trust_json_does_not_know_is_refused_in_the_environment() -> None:
    line = len(STAGING.splitlines()) + 1
    (told,) = mistakes(ask("approvers: [team:shop]"), people=("anna",))
    assert told.startswith(f"staging.yaml:{line}: teams.shop[1]: trust.json names no 'ben'")
    (told,) = mistakes(ask("approvers: [team:shop]"), STAGING + "teams: { shop: [] }\n")
    assert told.startswith(f"staging.yaml:{line}: teams.shop: has nobody")


def test_a_team_that_no_step_asks_may_name_anybody() -> None:
    assert planned(ask("approvers: [anna]"), STAGING + "teams: { later: [zoe] }\n")


def phases(*gates: str) -> str:
    listed = ", ".join(f"{{ machines: 1, gate: {{ {gate} }} }}" for gate in gates)
    return (
        f"{HEAD}  - {{ name: farm, roles: [web], deploy: web, to: /srv/x, "
        f"strategy: {{ rolling: {{ phases: [ {listed}, {{}} ] }} }} }}\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (phases("name: g"), "steps[0].strategy.rolling.phases[0].gate: waits for nothing"),
        (phases("name: g, check: a.sh, minimum: 2"), "phases[0].gate: says who is asked, and asks nothing"),
        (phases("name: g, check: a.sh", "name: g, ask: x"), "phases[1].gate.name: 'g' is the name of another gate"),
        (phases("name: g, ask: '${nothing}'"), "phases[0].gate.ask: 'nothing' is undefined"),
        (ask("minimum: 1").replace("Ready?", '"${machine.name}"'), "steps[0].ask: ${machine.name}: a machine stands only"),
        (f"{HEAD}  - {{ name: x, roles: [web], verify: [ {{ tcp: 'h:1' }} ], on_failure: rollback }}\n", "steps[0].on_failure: is rollback, and the step deploys nothing"),
        (f"{HEAD}  - {{ name: x, roles: [web], verify: [ {{ tcp: 'h:1' }} ], on_rollback: skip }}\n", "steps[0].on_rollback"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(text: str, expected: str) -> None:
    told = mistakes(text)
    assert len(told) == 1
    assert expected in told[0]
    assert told[0].startswith("release.yaml:5: ")


def test_a_gate_whose_phase_finds_no_machine_left_is_left_out_but_its_mistakes_are_told() -> None:
    gates = phases(*(f"name: g{number}, check: a.sh" for number in range(5)))
    (step,) = planned(gates).steps
    assert isinstance(step, MachineStep)
    assert [phase.gate.name for phase in step.phases if phase.gate] == ["g0", "g1", "g2", "g3"]
    assert mistakes(gates.replace("name: g4, check: a.sh", "name: g4"))
