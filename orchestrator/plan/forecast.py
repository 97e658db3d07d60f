"""What a plan will cost and do, for people and as JSON. Pure.

Bytes are upper bounds: whole nupkgs, as if no relay and no machine held anything. How much less it is, only the relays
and machines can say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from agent.orders.orders import CommandCheck, HttpCheck, ServiceCheck, TcpCheck
from orchestrator.plan.placement import packages_at, placed_on, relays_to_fill
from orchestrator.plan.plan import (
    AskStep,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedAsk,
    PlannedCheck,
    PlannedGate,
    PlannedPackage,
    PlannedPhase,
    PlannedRelay,
    PlannedStep,
    ScriptAction,
    ServerRun,
    ServerStep,
    ServiceAction,
    SwitchAction,
)

_ON_FAILURE: Final = {
    "ask": "a person is asked what to do with the machine",
    "rollback": "the old one is switched back to",
    "stop": "the machine is left out, and the step fails",
}


class RelayForecast(msgspec.Struct, frozen=True):
    """`at_most`: bytes that cross the line to this relay. `unknown`: packages whose size is not known yet."""

    relay: str
    site: str
    packages: tuple[str, ...]
    at_most: int
    unknown: tuple[str, ...] = ()


class SiteForecast(msgspec.Struct, frozen=True):
    """`at_most`: bytes that cross the lines to this site's relays."""

    site: str
    relays: tuple[str, ...]
    machines: int
    at_most: int
    unknown: tuple[str, ...] = ()


class RoomForecast(msgspec.Struct, frozen=True):
    """`at_most`: bytes that new trees take on this machine under this root."""

    machine: str
    root: str
    at_most: int
    unknown: tuple[str, ...] = ()


class Forecast(msgspec.Struct, frozen=True):
    sites: tuple[SiteForecast, ...]
    relays: tuple[RelayForecast, ...]
    room: tuple[RoomForecast, ...]


def forecast(plan: Plan) -> Forecast:
    """Bytes per site and relay, and room per machine."""
    relays = tuple(_relay(plan, relay) for relay in relays_to_fill(plan))
    return Forecast(tuple(_sites(plan, relays)), relays, tuple(_room(plan)))


def document(plan: Plan) -> dict[str, Any]:
    """Plan and forecast for `release plan --json`; `format` is this document's version."""
    return {"format": 1, "plan": msgspec.to_builtins(plan), "forecast": msgspec.to_builtins(forecast(plan))}


def describe(plan: Plan) -> str:
    """The plan for a person, line by line."""
    return "\n".join(_lines(plan))


# --- bytes


def _relay(plan: Plan, relay: PlannedRelay) -> RelayForecast:
    packages = packages_at(plan, relay.name)
    at_most, unknown = _sum((package, package.nupkg_bytes) for package in packages)
    return RelayForecast(relay.name, relay.site, tuple(_names(plan, packages)), at_most, unknown)


def _names(plan: Plan, packages: Iterable[PlannedPackage]) -> Iterator[str]:
    """By their names in the process, sorted; the scripts are called so."""
    wanted = {package.id for package in packages}
    yield from sorted(name for name, package in plan.packages.items() if package.id in wanted)
    if plan.scripts is not None and plan.scripts.id in wanted:
        yield "scripts"


def _sites(plan: Plan, relays: Iterable[RelayForecast]) -> Iterator[SiteForecast]:
    by_site: dict[str, list[RelayForecast]] = {machine.site: [] for machine in plan.machines}
    for relay in relays:
        by_site.setdefault(relay.site, []).append(relay)
    for site in sorted(by_site):
        mine = by_site[site]
        yield SiteForecast(
            site,
            tuple(relay.relay for relay in mine),
            sum(machine.site == site for machine in plan.machines),
            sum(relay.at_most for relay in mine),
            tuple(sorted({name for relay in mine for name in relay.unknown})),
        )


def _room(plan: Plan) -> Iterator[RoomForecast]:
    for machine in plan.machines:
        roots: dict[str, list[PlannedPackage]] = {}
        for package, root, _ in placed_on(plan, machine.name):
            if root:
                roots.setdefault(root, []).append(package)
        for root, packages in roots.items():
            at_most, unknown = _sum((package, package.tree_bytes) for package in packages)
            yield RoomForecast(machine.name, root, at_most, unknown)


def _sum(sizes: Iterable[tuple[PlannedPackage, int]]) -> tuple[int, tuple[str, ...]]:
    """Bytes of the packages whose size is known, and the others by name. Without a manifest nothing is known."""
    known = list(sizes)
    at_most = sum(size for package, size in known if package.manifest)
    return at_most, tuple(f"{package.id} {package.version}" for package, _ in known if not package.manifest)


# --- words


def _lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.project} {plan.label} → {plan.environment}"
    yield "packages"
    for name, package in plan.packages.items():
        where = f"sha256:{package.manifest[:12]}…" if package.manifest else "not in the depot yet"
        source = f", from feed {package.feed}" if package.feed and not package.manifest else ""
        yield f"  {name}: {package.id} {package.version} ({where}{source})"
    for early in plan.pre_acquire:
        undo = f", undone when {early.until}" if early.undo else ""
        yield f"before acquisition: {_run(early.run)}{undo}"
    yield from _acquisition(plan)
    for step in plan.steps:
        match step:
            case ServerStep():
                yield from _server(step)
            case AskStep():
                yield f"step {step.number} {step.name}: asks {_asked(step.ask)}{_conditions(step)}"
            case MachineStep():
                yield from _machines(plan, step)
    for notify in plan.notify:
        yield f"tells {notify.url or f'the address in secret {notify.url_secret}'} of {', '.join(notify.on)}"
    if plan.deadline:
        yield f"deadline: {_seconds(plan.deadline)}"
    if plan.notes:
        yield "notes"
        yield from (f"  {note}" for note in plan.notes)


def _acquisition(plan: Plan) -> Iterator[str]:
    whole = forecast(plan)
    yield f"acquisition: every machine holds everything before the first step, within {_seconds(plan.acquire.deadline)}"
    for site in whole.sites:
        bytes_ = _bytes(site.at_most, site.unknown)
        through = f"relays {', '.join(site.relays)}" if site.relays else "generic relays"
        yield f"  site {site.site or '(generic)'}: at most {bytes_} to {through}; {counted(site.machines, 'machine')}"
    for room in whole.room:
        yield f"  {room.machine}: at most {_bytes(room.at_most, room.unknown)} under {room.root}"


def _server(step: ServerStep) -> Iterator[str]:
    package = f", with the files of package {step.package}" if step.package else ""
    yield f"step {step.number} {step.name}: on the server: {_run(step.run)}{package}{_conditions(step)}"
    match step.on_rollback:
        case "refuse":
            pass
        case "skip":
            yield "  going back leaves it out"
        case run:
            yield f"  going back runs in its place {_run(run)}"


def _machines(plan: Plan, step: MachineStep) -> Iterator[str]:
    deploys = f"deploys {step.package}" if step.package else "deploys nothing"
    yield f"step {step.number} {step.name}: {deploys} on {counted(len(step.turns), 'machine')}{_conditions(step)}"
    yield f"  {step.strategy}: {'; '.join(phases_in_words(step.phases, len(step.turns)))}"
    if step.strategy == "rolling":
        yield f"  at least {step.min_in_service} in service; more than {step.max_failures} failures stop it"
    for number, phase in enumerate(step.phases, 1):
        if phase.gate is not None:
            yield f"  gate {phase.gate.name}, after phase {number}: {_gate(phase.gate)}"
    yield f"  where a new version is bad: {_ON_FAILURE[step.on_failure]}"
    if step.rotation is not None:
        probe = step.rotation.probe and step.rotation.probe.script
        seen = f", probe {probe.path}" if probe else ""
        yield f"  rotation {step.rotation.name}: {_run(step.rotation.before)}, {_run(step.rotation.after)}{seen}"
    told: dict[tuple[str, ...], str] = {}
    for turn in step.turns:
        machine, done = plan.machine(turn.machine), tuple(_turn(turn))
        as_before = f": as {told[done]}" if done in told else ""
        yield f"  {turn.machine} ({machine.address}, site {machine.site}, relays {', '.join(machine.relays)}){as_before}"
        if not as_before:
            told[done] = turn.machine
            yield from (f"    {line}" for line in done)


def _gate(gate: PlannedGate) -> str:
    check = f"runs {_run(gate.check)}" if gate.check else ""
    ask = f"asks {_asked(gate.ask)}" if gate.ask else ""
    return ", then ".join(part for part in (check, ask) if part)


def _asked(ask: PlannedAsk) -> str:
    """Who is asked, what, and until when."""
    who = ", ".join(ask.approvers) or "everybody who may decide there"
    many = f", {ask.minimum} of whom must agree" if ask.minimum > 1 else ""
    author = ", but not who made the release" if ask.not_author else ""
    over = {"pause": "says then that it is late", "stop": "then stops", "proceed": "then goes on"}[ask.on_expiry]
    until = f"; waits {_seconds(ask.expires)} and {over}" if ask.expires else ""
    return f"{who}{many}{author}: {ask.text}{until}"


def phases_in_words(phases: Iterable[PlannedPhase], count: int) -> Iterator[str]:
    """How `count` machines go through them."""
    left = count
    for phase in phases:
        machines = phase.machines or left
        left -= machines
        yield f"{counted(machines, 'machine')}, {phase.window} at a time"


def _turn(turn: MachineTurn) -> Iterator[str]:
    """What is done on its machine, in order."""
    for action in turn.actions:
        match action:
            case SwitchAction():
                yield f"switch {turn.root}/current"
            case ServiceAction():
                yield f"{action.action} service {action.service}"
            case ScriptAction():
                secrets = f", with secrets {', '.join(action.secrets)}" if action.secrets else ""
                yield f"script {action.path} (at most {_seconds(action.timeout)}{secrets})"
    yield from (f"verify {_check(check)}" for check in turn.verify)


def _check(planned: PlannedCheck) -> str:
    timed = planned.check
    match timed.check:
        case HttpCheck(url=url, expect=expect):
            what = url if expect is None else f"{url} says {expect}"
        case TcpCheck(host=host, port=port):
            what = f"tcp {host}:{port}"
        case CommandCheck(argv=argv):
            what = " ".join(argv)
        case ServiceCheck(name=name):
            what = f"service {name}"
    lasting = f" for {_seconds(timed.lasting)}" if timed.lasting else ""
    asker = "the server" if planned.on_server else "the machine"
    return f"{what}{lasting}, within {_seconds(timed.deadline)}, asked by {asker}"


def _run(run: ServerRun) -> str:
    what = run.script.path if run.script else counted(len(run.commands), "command")
    tries = f", {run.attempts} attempts" if run.attempts > 1 else ""
    secrets = f", secrets {', '.join(run.secrets)}" if run.secrets else ""
    return f"{run.name}: {what} (at most {_seconds(run.timeout)}{tries}{secrets})"


def _conditions(step: PlannedStep) -> str:
    return {"success": "", "failure": ", after a failure only", "always": ", whatever was before"}[step.when] + (
        ", required" if step.required else ""
    )


def counted(number: int, word: str) -> str:
    """`1 machine`, `2 machines`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _seconds(value: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if value >= size and value % size == 0:
            return f"{value / size:g} {unit}"
    return f"{value:g} s"


def _bytes(value: int, unknown: Iterable[str]) -> str:
    missing = ", ".join(unknown)
    return f"{value:,} bytes" + (f" and {missing}, whose size is not known yet" if missing else "")
