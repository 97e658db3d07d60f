"""Whom a person leaves out, whom the rule for offline machines lets go, and the plan for the rest."""

from __future__ import annotations

import itertools

import pytest
from harness.files import parse_environment, parse_process
from harness.paths import ROOT
from harness.seed import chance

from orchestrator.plan.leave_out import Selection, why_not_left_out, with_machines, without
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import MachineStep, Plan, PlannedPackage
from relay.written.yaml_positions import PlanError

STAGING = (ROOT / "tests/orchestrator/data/staging.yaml").read_text(encoding="utf-8")
"""web1, web2 at fra, web3 at iad, web4 at sfo; web1 and web3 in rack r1."""
HEAD = "format: 1\nproject: webshop\npackages: { web: Acme.Web }\n"
FARM = "{ name: farm, roles: [web], deploy: web, to: /srv/webshop, strategy: { rolling: %s }%s }"


class _AnyScript:
    def script(self, folder: str, path: str) -> str:
        return "0" * 64

    def is_tracked(self, path: str) -> bool:
        return False


def plan(rolling: str = "{ window: 1 }", more: str = "", head: str = "", **selected: object) -> Plan:
    text = f"{HEAD}{head}steps:\n  - {FARM % (rolling, more)}\n"
    return make_plan(
        parse_process(text.encode(), "release.yaml", "/project"),
        parse_environment(STAGING.encode(), "staging.yaml", "/environments"),
        label="1.4.2",
        packages={"web": PlannedPackage("Acme.Web", "1.4.2", "ab" * 32, 1000, 400)},
        scripts=None,
        prompts={},
        files=_AnyScript(),
        selection=Selection(**({"why": "new kernel"} | selected)),  # type: ignore[arg-type]
    )


def step(made: Plan) -> MachineStep:
    [only] = made.steps
    assert isinstance(only, MachineStep)
    return only


def turns(made: Plan) -> list[str]:
    return [turn.machine for turn in step(made).turns]


@pytest.mark.parametrize(
    ("selected", "left"),
    [
        ({"exclude": ("WEB2",)}, ["web1", "web3", "web4"]),
        ({"exclude": ("site:fra", "web4")}, ["web3"]),
        ({"exclude": ("tag:rack=r1",)}, ["web2", "web4"]),
        ({"only": ("role:web",)}, ["web1", "web2", "web3", "web4"]),
        ({"only": ("site:iad", "web1")}, ["web1", "web3"]),
        ({"only": ("tag:rack=r1",), "exclude": ("web3",)}, ["web1"]),
    ],
)
def test_selectors_mean_names_sites_roles_and_tags(selected: dict[str, tuple[str, ...]], left: list[str]) -> None:
    made = plan(**selected)
    assert turns(made) == left == [machine.name for machine in made.machines]
    others = sorted({"web1", "web2", "web3", "web4"} - set(left))
    assert made.excluded == dict.fromkeys(others, "new kernel")
    assert sorted(turn.machine for turn in step(made).beside) == others


@pytest.mark.parametrize(
    ("selected", "words"),
    [
        ({"exclude": ("web7",)}, "there: web1, web2, web3, web4"),
        ({"exclude": ("site:ber",)}, "there: site:fra, site:iad, site:sfo"),
        ({"only": ("role:db",)}, "there: role:web"),
        ({"exclude": ("tag:rack=r9",)}, "there: tag:rack=r1, tag:rack=r2"),
        ({"exclude": ("tag:row=None",)}, "selects no machine"),
        ({"exclude": ("site:fra", "site:iad", "site:sfo")}, "leaves out every machine"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused_and_says_what_there_is(
    selected: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        plan(**selected)


def test_percentages_count_those_that_are_left_and_the_minimum_in_service_counts_all() -> None:
    made = plan('{ window: "50%", min_in_service: "50%", max_failures: "50%" }', exclude=("web4",))
    assert (step(made).phases[0].window, step(made).max_failures, step(made).min_in_service) == (1, 1, 2)
    assert "farm: without web4; 3 machines left" in made.notes
    with pytest.raises(PlanError, match="keeps 2 in service; without web3, web4, which count as out, 1 of 4"):
        plan('{ window: 1, min_in_service: "50%" }', exclude=("web3", "web4"))


def test_nobody_is_left_out_of_a_required_step_from_the_command_line() -> None:
    with pytest.raises(PlanError, match=r"step 1 \(farm\) is required, so nobody can leave out web2"):
        plan(more=", required: true", exclude=("web2",))


def test_relays_that_only_those_left_out_would_ask_are_not_asked() -> None:
    made = plan(exclude=("web3",))
    assert [relay.name for relay in made.relays] == ["fra", "hub"]
    assert made.beside is not None
    assert [relay.name for relay in made.beside.relays] == ["iad"]


def test_a_plan_with_other_machines_and_back_is_the_same_plan() -> None:
    whole = plan('{ phases: [ { machines: 1 }, { window: "50%" } ] }')
    names = [machine.name for machine in whole.machines]
    for count in range(1, 5):
        for some in itertools.combinations(names, count):
            part = with_machines(whole, some, {})
            assert turns(part) == list(some)
            assert sum(phase.machines or len(some) for phase in step(part).phases) >= len(some)
            back = with_machines(part, names, {})
            assert {turn.machine: turn for turn in step(back).turns} == {
                turn.machine: turn for turn in step(whole).turns
            }
            assert (back.machines, set(back.relays), back.beside) == (whole.machines, set(whole.relays), None)


# --- the rule


RULE = "acquire: { offline: { action: skip, at_most: 2%s } }\n"


def test_the_rule_lets_go_so_many_machines_of_these_roles_and_no_more() -> None:
    made = plan(head=RULE % "")
    assert why_not_left_out(made, "web1", 0) == ""
    one_less = without(made, "web1", "offline")
    assert turns(one_less) == ["web2", "web3", "web4"]
    assert one_less.excluded == {"web1": "offline"}
    assert why_not_left_out(one_less, "web2", 1) == ""
    assert "2 of at most 2 are left out" in why_not_left_out(without(one_less, "web2", "offline"), "web3", 2)
    assert "only machines with the role job" in why_not_left_out(plan(head=RULE % ", roles: [job]"), "web1", 0)
    assert "no rule" in why_not_left_out(plan(), "web1", 0)


def test_the_rule_never_breaks_what_a_step_keeps_in_service_nor_leaves_nobody() -> None:
    made = plan("{ window: 1, min_in_service: 3 }", head=RULE % "")
    assert "could not keep 3 in service" in why_not_left_out(made, "web1", 0)
    alone = plan(only=("web1",), head=RULE % "")
    assert why_not_left_out(alone, "web1", 0) == "no machine would be left"
    dice = chance("offline")
    for _ in range(50):
        least = dice.randrange(4)
        made, by_rule = plan(f"{{ window: 1, min_in_service: {least} }}", head=RULE % ""), 0
        for name in dice.sample(["web1", "web2", "web3", "web4"], 4):
            if not why_not_left_out(made, name, by_rule):
                made, by_rule = without(made, name, "offline"), by_rule + 1
        assert by_rule == min(2, 3 - least)
