"""What a plan needs where is decided from the plan alone, and nobody gets what they do not need."""

from __future__ import annotations

from agent.orders.orders import CommandCheck, SurveyFacts, TimedCheck, TreeFacts
from orchestrator.plan.placement import ROOM_TO_SPARE, packages_at, placed_on, relays_to_fill, short_of_room, trees_of
from orchestrator.plan.plan import (
    AcquirePlan,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedCheck,
    PlannedMachine,
    PlannedPackage,
    PlannedPhase,
    PlannedRelay,
    ScriptAction,
    SwitchAction,
)

WEB = PlannedPackage("Acme.Web", "1.0.0", "a" * 64, tree_bytes=1000, nupkg_bytes=500)
JOBS = PlannedPackage("Acme.Jobs", "1.0.0", "b" * 64, tree_bytes=10, nupkg_bytes=5)
SCRIPTS = PlannedPackage("Waystation.Scripts.shop", "1.0.0-h1", "c" * 64, tree_bytes=1, nupkg_bytes=1)
KEY = "sha256:" + "0" * 64


def machine(name: str, site: str, *relays: str) -> PlannedMachine:
    return PlannedMachine(name, "127.0.0.1", site, KEY, ("web",), relays)


def step(number: int, package: str, *machines: str, script: bool = False) -> MachineStep:
    actions = (SwitchAction(), *([ScriptAction("restart", "ops/restart.sh")] if script else []))
    turns = tuple(MachineTurn(name, f"/srv/{package}", actions, (), {}, "f" * 64) for name in machines)
    return MachineStep(number, f"step {number}", turns, "parallel", (PlannedPhase(0, 1),), package, "1.0.0")


def plan(*steps: MachineStep, machines: tuple[PlannedMachine, ...], relays: tuple[PlannedRelay, ...]) -> Plan:
    return Plan(
        format=1,
        project="shop",
        label="1.0.0",
        environment="production",
        packages={"web": WEB, "jobs": JOBS},
        scripts=SCRIPTS,
        relays=relays,
        feeds={},
        machines=machines,
        secrets={},
        machine_secrets=(),
        pre_acquire=(),
        acquire=AcquirePlan(),
        steps=steps,
    )


FRA, IAD = PlannedRelay("fra", "http://fra", "fra"), PlannedRelay("iad", "http://iad", "iad")
HUB = PlannedRelay("hub", "http://hub", "", generic=True)
TWO_SITES = (machine("web1", "fra", "fra", "hub"), machine("job1", "iad", "iad", "hub"))


def test_a_machine_holds_each_package_of_its_steps_once_under_each_root() -> None:
    made = plan(step(1, "web", "web1"), step(2, "web", "web1"), machines=TWO_SITES, relays=(FRA, IAD, HUB))

    assert [(package.id, root) for package, root, _ in placed_on(made, "web1")] == [("Acme.Web", "/srv/web")]
    assert [tree.manifest for tree in trees_of(made, "web1")] == [WEB.manifest]


def test_only_machines_that_run_a_script_get_the_scripts() -> None:
    made = plan(step(1, "web", "web1", script=True), step(2, "jobs", "job1"), machines=TWO_SITES, relays=(FRA, IAD))

    assert [tree.id for tree in trees_of(made, "web1")] == ["Acme.Web", "Waystation.Scripts.shop"]
    assert [tree.id for tree in trees_of(made, "job1")] == ["Acme.Jobs"]


def test_a_relay_gets_what_its_own_machines_need() -> None:
    made = plan(step(1, "web", "web1"), step(2, "jobs", "job1"), machines=TWO_SITES, relays=(FRA, IAD, HUB))

    assert [package.id for package in packages_at(made, "fra")] == ["Acme.Web"]
    assert [package.id for package in packages_at(made, "iad")] == ["Acme.Jobs"]


def test_a_generic_relay_is_filled_only_for_a_site_that_has_no_other() -> None:
    both = plan(step(1, "web", "web1", "job1"), machines=TWO_SITES, relays=(FRA, IAD, HUB))
    assert [relay.name for relay in relays_to_fill(both)] == ["fra", "iad"]

    bare = (machine("web1", "fra", "fra", "hub"), machine("job1", "lab", "hub"))
    one = plan(step(1, "web", "web1", "job1"), machines=bare, relays=(FRA, HUB))
    assert [relay.name for relay in relays_to_fill(one)] == ["fra", "hub"]


def test_a_relay_on_the_way_is_filled_with_what_those_below_it_fetch_through_it() -> None:
    far = PlannedRelay("far", "http://far", "far")
    hop = PlannedRelay("hop", "http://hop", "hop", upstream="far")
    below = PlannedRelay("iad", "http://iad", "iad", upstream="hop")
    made = plan(step(1, "web", "web1"), step(2, "jobs", "job1"), machines=TWO_SITES, relays=(FRA, below, far, hop))

    assert [relay.name for relay in relays_to_fill(made)] == ["fra", "iad", "far", "hop"]
    assert [package.id for package in packages_at(made, "far")] == ["Acme.Jobs"]
    assert [package.id for package in packages_at(made, "hop")] == ["Acme.Jobs"]
    assert [package.id for package in packages_at(made, "fra")] == ["Acme.Web"]


def facts(free: int, *, installed: bool = False, file_system: str = "disk", root: str = "/srv/web") -> TreeFacts:
    return TreeFacts(root, WEB.manifest, free, installed, file_system)


def test_room_is_counted_for_each_file_system_and_not_for_what_is_there() -> None:
    made = plan(step(1, "web", "web1"), machines=TWO_SITES, relays=(FRA,))
    enough, needed = ROOM_TO_SPARE + 2 * WEB.tree_bytes, ROOM_TO_SPARE + WEB.tree_bytes

    def short(*trees: TreeFacts) -> list[str]:
        return short_of_room(made, {"web1": SurveyFacts(trees)})

    assert short(facts(needed)) == []
    assert "web1" in short(facts(needed - 1))[0]
    assert "/srv/web" in short(facts(needed - 1))[0]
    assert short(facts(0, installed=True)) == []
    # Two trees on one file system share its room; on two they do not.
    assert short(facts(enough), facts(enough, root="/srv/other")) == []
    assert len(short(facts(enough - 1), facts(enough - 1, root="/srv/other"))) == 1
    assert short(facts(needed), facts(needed, root="/srv/other", file_system="other")) == []


def test_a_machine_whose_check_is_a_script_gets_the_scripts() -> None:
    check = TimedCheck(CommandCheck(("ops/check.sh",)))
    here, there = PlannedCheck(check, check, on_server=True), PlannedCheck(check, check)
    for planned, wanted in ((here, ["Acme.Web"]), (there, ["Acme.Web", "Waystation.Scripts.shop"])):
        turn = MachineTurn("web1", "/srv/web", (SwitchAction(),), (planned,), {}, "f" * 64)
        made_step = MachineStep(1, "one", (turn,), "parallel", (PlannedPhase(0, 1),), "web", "1.0.0")
        made = plan(made_step, machines=TWO_SITES, relays=(FRA,))
        assert [tree.id for tree in trees_of(made, "web1")] == wanted
