"""What a plan needs where: trees on machines, packages at relays, room on disks. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from agent.orders.orders import CommandCheck, PackageTree, SurveyFacts
from orchestrator.plan.plan import MachineStep, MachineTurn, Plan, PlannedPackage, PlannedRelay, ScriptAction
from orchestrator.plan.routes import lineage

ROOM_TO_SPARE = 64 << 20
"""Bytes that must stay free on each file system beside the trees."""


def placed_on(plan: Plan, machine: str) -> Iterator[tuple[PlannedPackage, str, str]]:
    """What must stand on this machine before the first step: package, root (empty: the agent's own folder) and label.

    Each package once under each root, in the order of the steps.
    """
    seen: set[tuple[str, str, str]] = set()
    for step in plan.steps_with(machine):
        [turn] = [turn for turn in step.turns if turn.machine == machine]
        for package, root, label in _of_turn(plan, step, turn):
            key = (root, package.id.lower(), package.version.lower())
            if key not in seen:
                seen.add(key)
                yield package, root, label


def _of_turn(plan: Plan, step: MachineStep, turn: MachineTurn) -> Iterator[tuple[PlannedPackage, str, str]]:
    if step.package:
        yield plan.packages[step.package], turn.root, step.label
    if plan.scripts is not None and _runs_scripts(turn):
        yield plan.scripts, "", "scripts"


def _runs_scripts(turn: MachineTurn) -> bool:
    checks = (planned.check.check for planned in turn.verify if not planned.on_server)
    return any(isinstance(action, ScriptAction) for action in turn.actions) or any(
        isinstance(check, CommandCheck) for check in checks
    )


def trees_of(plan: Plan, machine: str) -> tuple[PackageTree, ...]:
    """The same as an order asks for it. Every package has its manifest by now."""
    return tuple(
        PackageTree(id=package.id, version=package.version, manifest=package.manifest, root=root, label=label)
        for package, root, label in placed_on(plan, machine)
    )


def packages_at(plan: Plan, relay: str) -> list[PlannedPackage]:
    """What the machines that this relay serves will ask it for, and what other relays fetch through it; each package
    once.
    """
    upstreams = {each.name: each.upstream for each in plan.relays}
    wanted: dict[tuple[str, str], PlannedPackage] = {}
    for asked in [relay, *(name for name in relays_asked(plan) if relay in lineage(name, upstreams)[1:])]:
        wanted |= _packages_for(plan, asked)
    return list(wanted.values())


def relays_to_fill(plan: Plan) -> list[PlannedRelay]:
    """The relays that packages go to: those of the sites concerned; for a site without one, the first that its
    machines ask; and those that one of these fetches through.
    """
    upstreams = {each.name: each.upstream for each in plan.relays}
    chosen = {name for asked in relays_asked(plan) for name in lineage(asked, upstreams)}
    return [relay for relay in plan.relays if relay.name in chosen]


def relays_asked(plan: Plan) -> list[str]:
    """Names of those among them that machines will ask; the others only pass packages on."""
    chosen = {relay.name for relay in plan.relays if not relay.generic and _packages_for(plan, relay.name)}
    chosen |= {machine.relays[0] for machine in plan.machines if not chosen.intersection(machine.relays)}
    return [relay.name for relay in plan.relays if relay.name in chosen]


def _packages_for(plan: Plan, relay: str) -> dict[tuple[str, str], PlannedPackage]:
    return {
        (package.id.lower(), package.version.lower()): package
        for machine in plan.machines
        if relay in machine.relays
        for package, _, _ in placed_on(plan, machine.name)
    }


def short_of_room(plan: Plan, facts: Mapping[str, SurveyFacts]) -> list[str]:
    """In words, the file systems of machines that cannot take what must be pulled onto them."""
    sizes = {package.manifest: package.tree_bytes for package in plan.every_package()}
    short = []
    for machine, said in facts.items():
        needed: dict[str, int] = defaultdict(int)
        free: dict[str, int] = {}
        roots: dict[str, str] = {}
        for tree in said.trees:
            room = tree.file_system or tree.root
            free[room] = min(tree.free_bytes, free.get(room, tree.free_bytes))
            roots.setdefault(room, tree.root or "the agent's own folder")
            if not tree.installed:
                needed[room] += sizes.get(tree.manifest, 0)
        short += [
            f"{machine} has {free[room]:,} bytes free for {roots[room]} and needs {missing + ROOM_TO_SPARE:,}"
            for room, missing in needed.items()
            if missing and missing + ROOM_TO_SPARE > free[room]
        ]
    return short


def to_fetch(plan: Plan, facts: Mapping[str, SurveyFacts]) -> dict[str, int]:
    """Bytes of the trees that each machine lacks, by its name; those that lack none are left out."""
    sizes = {package.manifest: package.tree_bytes for package in plan.every_package()}
    lacking = {
        machine: [sizes.get(tree.manifest, 0) for tree in said.trees if not tree.installed]
        for machine, said in facts.items()
    }
    return {machine: sum(trees) for machine, trees in lacking.items() if trees}
