"""The plan of one deployment, out of process, environment and package versions; or every reason why there is none.

Nothing is contacted. Script files are read to be hashed, and git is asked whether it tracks files with secrets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from orchestrator.files.environment import EnvironmentFile, Machine
from orchestrator.files.process import PreAcquireStep, ProcessFile, machine_scripts, package_of, undo_of
from orchestrator.files.script_files import Files, OnDisk
from orchestrator.plan.context import Ground
from orchestrator.plan.forecast import counted
from orchestrator.plan.leave_out import EVERYBODY, Selection, asked_by, beside_of, left_out
from orchestrator.plan.plan import (
    AcquirePlan,
    MachineStep,
    NotifyPlan,
    OfflineRule,
    Plan,
    PlannedFeed,
    PlannedMachine,
    PlannedPackage,
    PlannedRelay,
    PlannedStep,
    PreAcquire,
    SecretSource,
)
from orchestrator.plan.routes import lineage, planned_relay, secret_source, upstreams_of, wrong_ways
from orchestrator.plan.steps import is_http_url, plan_steps
from orchestrator.plan.unsupported import not_built
from relay.errors import IdentityError
from relay.package.identity import NuGetVersion
from relay.written.yaml_positions import Mistake, PlanError, shown, sorted_mistakes

_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")
"""What may name a tree on a machine (`agent.orders.orders.PackageTree`)."""


def make_plan(
    process: ProcessFile,
    environment: EnvironmentFile,
    *,
    label: str,
    packages: Mapping[str, PlannedPackage],
    scripts: PlannedPackage | None,
    prompts: Mapping[str, str],
    files: Files | None = None,
    people: Collection[str] = (),
    author: str | None = None,
    selection: Selection = EVERYBODY,
) -> Plan:
    """Decide everything that can be decided before the first byte moves.

    Args:
        process: what to do; it may have mistakes, which are told with those that are found here.
        environment: where; likewise.
        label: of the release.
        packages: versions by their names in the process. A manifest may be missing while the depot lacks the package.
        scripts: the package of `machine_scripts(process)`, where there are any.
        prompts: answers to the variables that are asked for.
        files: where scripts are read; this machine's disk.
        people: names that trust.json knows, of those who may decide in this environment.
        author: who made the release; empty where its key has no name, None where nobody made it yet.
        selection: which machines a person leaves out.

    Raises:
        PlanError: with every mistake of both files and of the options.
    """
    known = (*process.mistakes, *environment.mistakes)
    ground = Ground(process, environment, label, packages, prompts, files or OnDisk(), people, author)
    try:
        plan = _plan(ground, scripts, selection)
    except Exception:
        if not known:
            raise
        # What stands in for a mistake may be nothing that can be planned with.
        plan = None
    mistakes = [*known, *(found for found in ground.mistakes if not any(_follows(found, one) for one in known))]
    if mistakes or plan is None:
        raise PlanError(sorted_mistakes(mistakes, [process.name, environment.name]))
    return plan


def _follows(found: Mistake, known: Mistake) -> bool:
    """Whether it may well be said of what only stands in for another mistake: at its place, below it, or right above."""
    if found.file != known.file or not known.path:
        return False
    above = known.path.rpartition(".")[0] if not known.path.endswith("]") else known.path.rpartition("[")[0]
    return found.path in {known.path, above} or found.path.startswith((f"{known.path}.", f"{known.path}["))


def _plan(ground: Ground, scripts: PlannedPackage | None, selection: Selection) -> Plan:
    """Meant for use where the ground has no mistakes at the end."""
    process, environment = ground.process, ground.environment
    ground.mistakes += not_built(process, environment)
    _check_label(ground)
    planned_packages = _packages(ground)
    ground.left_out = _left_out(ground, selection)
    steps = plan_steps(ground)
    every = _machines(ground, steps)
    every_relay = _relays(ground, every)
    machines = tuple(machine for machine in every if machine.name not in ground.left_out)
    relays = asked_by(machines, every_relay)
    pre_acquire = tuple(_pre_acquire(ground, index, step) for index, step in enumerate(process.value.pre_acquire))
    notify = _notify(ground)
    feeds = _feeds(ground)
    secrets = _secrets(ground)
    acquire = _acquire(ground)
    deadline = ground.time_limit(process.value.deadline, process.at("deadline"), 0.0)
    if scripts is None and machine_scripts(process):
        ground.notes.append("the scripts for machines are not packed yet")
    return Plan(
        format=1,
        project=process.value.project,
        label=ground.label,
        environment=environment.value.environment,
        packages=planned_packages,
        scripts=scripts,
        relays=relays,
        feeds=feeds,
        machines=machines,
        secrets=secrets,
        machine_secrets=tuple(n for n, secret in process.value.secrets.items() if secret.available_to != "server"),
        pre_acquire=pre_acquire,
        acquire=acquire,
        steps=steps,
        notify=notify,
        deadline=deadline,
        notes=tuple(dict.fromkeys(ground.notes)),
        author=ground.author or "",
        excluded=dict(ground.left_out),
        beside=beside_of(every, every_relay, machines, relays),
    )


def _left_out(ground: Ground, selection: Selection) -> dict[str, str]:
    """Of the machines that some step is for."""
    roles = {role for step in ground.process.value.steps for role in step.roles}
    machines = {
        name: machine
        for name, machine in ground.environment.value.machines.items()
        if isinstance(machine, Machine) and roles.intersection(machine.roles)
    }
    left, wrong = left_out(selection, machines)
    for option, text in wrong:
        ground.wrong_option(option, text)
    return left


def _check_label(ground: Ground) -> None:
    if not _LABEL.fullmatch(ground.label):
        expected = "letters, digits, '.', '_', '+' and '-', at most 63 characters, such as 1.4.2"
        ground.wrong_option("release label", f"{shown(ground.label)}: expected {expected}")


def _packages(ground: Ground) -> dict[str, PlannedPackage]:
    """The process's packages with their versions, and the feed that each comes from."""
    declared = ground.process.value.packages
    planned = {}
    for name, use in declared.items():
        package, place = package_of(use), ground.process.at("packages", name)
        given = ground.packages.get(name)
        if given is None:
            ground.wrong(place, f"has no version: give one with --package {name}=VERSION")
            continue
        if given.id.lower() != package.id.lower():
            ground.wrong(place, f"is {package.id}, and the release holds {given.id} {given.version} under this name")
        if package.feed is not None and package.feed not in ground.environment.value.feeds:
            ground.wrong(
                place.below("feed"),
                f"there is no feed {shown(package.feed)}: define it under feeds: in {ground.environment.name}",
            )
        _check_version(ground, name, given)
        planned[name] = msgspec.structs.replace(given, feed=package.feed or "")
    for name in ground.packages:
        if name not in declared:
            known = ", ".join(declared) or "none"
            ground.wrong_option(f"--package {name}", f"is no package of {ground.process.name}: expected one of {known}")
    used = {step.deploy for step in ground.process.value.steps}
    ground.notes += [f"no step deploys package {name}" for name in declared if name not in used]
    return planned


def _check_version(ground: Ground, name: str, package: PlannedPackage) -> None:
    try:
        NuGetVersion.parse(package.version)
    except IdentityError as error:
        ground.wrong_option(f"--package {name}", error.message)


def _machines(ground: Ground, steps: Sequence[PlannedStep]) -> tuple[PlannedMachine, ...]:
    """Those that some step is for, by name. A machine without a key could be any other."""
    over = [step for step in steps if isinstance(step, MachineStep)]
    names = sorted({turn.machine for step in over for turn in (*step.turns, *step.beside)})
    keys: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for name, machine in ground.environment.value.machines.items():
        place = ground.environment.at("machines", name)
        if not isinstance(machine, Machine):
            if name != "from":
                ground.wrong(place, "expected a mapping with address, site, roles and key")
            continue
        if spelled.setdefault(name.lower(), name) != name:
            ground.wrong(place, f"differs from {shown(spelled[name.lower()])} in case only: machines' names do not")
        if name.lower() == "server":
            ground.wrong(place, "is what records call the server itself: give the machine another name")
        if machine.key and keys.setdefault(machine.key, name) != name:
            ground.wrong(place.below("key"), f"is the key of {keys[machine.key]} too: every agent has its own")
        if not machine.key and name in names:
            ground.wrong(
                place.below("key"), "is missing: run 'waystation agent init' there, and write down what it prints"
            )
    return tuple(_machine(ground, name) for name in names)


def _machine(ground: Ground, name: str) -> PlannedMachine:
    machine = ground.machine(name)
    relays = ground.environment.value.relays
    own = [relay for relay, value in relays.items() if value.site == machine.site]
    generic = [relay for relay, value in relays.items() if value.generic and relay not in own]
    if not own and not generic:
        ground.wrong(
            ground.environment.at("machines", name, "site"),
            f"no relay serves the site {shown(machine.site)}: add one under relays:, or mark one 'generic: true'",
        )
    tags = {tag: str(value) for tag, value in machine.tags.items()}
    return PlannedMachine(name, machine.address, machine.site, machine.key, machine.roles, (*own, *generic), tags)


def _relays(ground: Ground, machines: Sequence[PlannedMachine]) -> tuple[PlannedRelay, ...]:
    """Those that a machine of this plan may ask, and those that packages come to them through, in the file's order."""
    ground.mistakes += wrong_ways(ground.environment)
    upstreams = upstreams_of(ground.environment.value)
    used = {relay for machine in machines for asked in machine.relays for relay in lineage(asked, upstreams)}
    planned = []
    for name, relay in ground.environment.value.relays.items():
        place = ground.environment.at("relays", name)
        if not is_http_url(relay.url) or relay.url.rstrip("/").count("/") != 2:
            ground.wrong(place.below("url"), f"{shown(relay.url)}: expected such as https://relay.example:7443")
        if relay.site is None and not relay.generic:
            ground.wrong(place, "serves nobody: expected the key site, or 'generic: true'")
        if name in used:
            planned.append(planned_relay(ground.environment, name, upstreams.get(name, "")))
            if token := planned[-1].token:
                ground.check_source(token, place.below("token"))
    return tuple(planned)


def _pre_acquire(ground: Ground, index: int, step: PreAcquireStep) -> PreAcquire:
    place, scope = ground.process.at("pre_acquire", index), ground.server_scope()
    variables = ground.common_variables(step.name)
    run = ground.server_run(step.name, place, step, variables, scope)
    undo = undo_of(step)
    if undo is None:
        return PreAcquire(run, until=step.until)
    undoing = ground.server_run(f"undo {step.name}", place.below("undo"), undo, variables | {"UNDO": "1"}, scope)
    return PreAcquire(run, undoing, step.until)


def _acquire(ground: Ground) -> AcquirePlan:
    acquire, place = ground.process.value.acquire, ground.process.at("acquire")
    return AcquirePlan(
        ground.time_limit(acquire.deadline, place.below("deadline"), 1800.0),
        ground.time_limit(acquire.stall, place.below("stall"), 60.0),
        acquire.per_relay,
        _offline(ground),
    )


def _offline(ground: Ground) -> OfflineRule | None:
    rule = ground.process.value.acquire.offline
    if rule is None:
        return None
    known = {role for step in ground.process.value.steps for role in step.roles}
    ground.notes += [f"acquire: offline: no step is for the role {role}" for role in rule.roles if role not in known]
    of = f" with the role {' or '.join(rule.roles)}" if rule.roles else ""
    ground.notes.append(f"at most {counted(rule.at_most, 'machine')}{of} may be left out while offline")
    return OfflineRule(rule.at_most, rule.roles)


def _notify(ground: Ground) -> tuple[NotifyPlan, ...]:
    planned = []
    for index, notify in enumerate(ground.process.value.notify):
        place = ground.process.at("notify", index)
        if notify.url is not None and not is_http_url(notify.url):
            ground.wrong(place.below("url"), f"{shown(notify.url)}: expected an http or https URL")
        if notify.url_secret is not None and notify.url_secret not in ground.process.value.secrets:
            ground.wrong(
                place.below("url_secret"),
                f"there is no secret {shown(notify.url_secret)}: declare it under secrets: with available_to: server",
            )
        if notify.url_secret is not None:
            ground.needed_secrets.setdefault(notify.url_secret, place.below("url_secret"))
        planned.append(NotifyPlan(notify.on, notify.url or "", notify.url_secret or ""))
    return tuple(planned)


def _feeds(ground: Ground) -> dict[str, PlannedFeed]:
    used = {package_of(use).feed for use in ground.process.value.packages.values()}
    planned = {}
    for name, feed in ground.environment.value.feeds.items():
        place = ground.environment.at("feeds", name)
        if not is_http_url(feed.url):
            ground.wrong(
                place.below("url"), f"{shown(feed.url)}: expected a feed such as https://feed.example/v3/index.json"
            )
        if name in used:
            if feed.secret is not None:
                ground.needed_secrets.setdefault(feed.secret, place.below("secret"))
            planned[name] = PlannedFeed(feed.url, feed.secret or "")
    return planned


def _secrets(ground: Ground) -> dict[str, SecretSource]:
    """Sources of all that is needed. What operations use for themselves is not the project's to ask for."""
    process, environment = ground.process.value, ground.environment.value
    theirs = {
        name: f"rotation {title}" for title, rotation in environment.rotation.items() for name in rotation.secrets
    }
    theirs |= {feed.secret: f"feed {title}" for title, feed in environment.feeds.items() if feed.secret}
    for name in process.secrets:
        place = ground.process.at("secrets", name)
        ground.needed_secrets.setdefault(name, place)
        if name in theirs:
            ground.wrong(
                place, f"belongs to the environment's {theirs[name]}: a process cannot have it; choose another name"
            )
    planned = {}
    for name, place in ground.needed_secrets.items():
        source = environment.secrets.get(name)
        if source is None:
            ground.wrong(
                place,
                f"secret {shown(name)} has no source: say under secrets: in {ground.environment.name} where it is",
            )
        else:
            planned[name] = secret_source(ground.environment, source)
            ground.check_source(planned[name], ground.environment.at("secrets", name))
    return planned
