"""The steps of a plan: which machines, in what order, and all that is done on each, resolved."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec

from agent.orders.orders import Check as OrderedCheck
from agent.orders.orders import CommandCheck, HttpCheck, ServiceCheck, TcpCheck, TimedCheck
from orchestrator.files.environment import Machine, Rotation
from orchestrator.files.process import Apply, Check, Phase, Rolling, Step, rolling_of
from orchestrator.files.script_names import clashes, environment_name, slug
from orchestrator.files.values import least_of, most_of, part_of
from orchestrator.files.variables import Scope
from orchestrator.plan.context import SCRIPT_SECONDS, Ground
from orchestrator.plan.forecast import counted, phases_in_words
from orchestrator.plan.plan import (
    OLD_VERSION,
    ApplyAction,
    MachineStep,
    MachineTurn,
    PlannedCheck,
    PlannedPhase,
    PlannedStep,
    RotationPlan,
    ScriptAction,
    ServerRun,
    ServerStep,
    ServiceAction,
    SwitchAction,
)
from orchestrator.plan.questions import ask_step, planned_gate
from relay.written.yaml_positions import Place, shown

_SERVICE: Final = re.compile(r"[A-Za-z0-9@_][A-Za-z0-9@_.:-]{0,199}")
_WINDOWS_ROOT: Final = re.compile(r"[A-Za-z]:[\\/].+")
_SERVICE_SECONDS: Final = 120.0


def plan_steps(ground: Ground) -> tuple[PlannedStep, ...]:
    """Every step of the process. What is not built yet is left out here; `not_built` has refused it."""
    steps = ground.process.value.steps
    _check_titles(ground, steps)
    planned: list[PlannedStep] = []
    for index, step in enumerate(steps):
        place = ground.process.at("steps", index)
        if step.run_on is not None:
            planned.append(_server_step(ground, index + 1, step, place))
        elif step.ask is not None:
            planned.append(ask_step(ground, index + 1, step, place))
        else:
            planned.append(_Roll(ground, index + 1, step, place).plan())
    _check_roots(ground, planned)
    return tuple(planned)


def _check_titles(ground: Ground, steps: Sequence[Step]) -> None:
    seen: dict[str, int] = {}
    for index, step in enumerate(steps):
        first = seen.setdefault(step.name, index)
        if first != index:
            place = ground.process.at("steps", index, "name")
            ground.wrong(place, f"{shown(step.name)} is the name of step {first + 1} too: choose another")


def _check_roots(ground: Ground, steps: Sequence[PlannedStep]) -> None:
    """Two packages under one root would take `current` from each other, and a root inside another's folders is moved or
    removed with them.
    """
    owners: dict[str, dict[str, MachineStep]] = {}
    for step in steps:
        if not isinstance(step, MachineStep) or not step.package:
            continue
        place = ground.process.at("steps", step.number - 1, "to")
        for turn in step.turns:
            if not turn.root:
                continue
            mine = owners.setdefault(turn.machine, {})
            for root, first in mine.items():
                if why := _why_apart(turn.root, root, step, first):
                    ground.wrong(place, why)
            mine.setdefault(turn.root, step)


def _why_apart(root: str, other: str, step: MachineStep, first: MachineStep) -> str:
    """Why one machine cannot have both roots; empty where it can."""
    here, there = _folders(root), _folders(other)
    if here == there:
        same = f"{root} holds package {shown(first.package)} of step {first.number} already"
        return "" if first.package == step.package else same
    if here[: len(there)] == there:
        how = "lies inside"
    elif there[: len(here)] == here:
        how = "is around"
    else:
        return ""
    return (
        f"{root} {how} {other}, where step {first.number} installs {shown(first.package)}: expected a folder beside it"
    )


def _folders(root: str) -> list[str]:
    """From the file system's root on. Windows takes both separators, and no notice of case."""
    is_windows = _WINDOWS_ROOT.fullmatch(root) is not None
    return re.split(r"[\\/]", root.lower()) if is_windows else root.split("/")


def _server_step(ground: Ground, number: int, step: Step, place: Place) -> ServerStep:
    package = _package(ground, step, place)
    variables = ground.common_variables(step.name, package)
    run = ground.server_run(step.name, place, step, variables, ground.server_scope(package))
    return ServerStep(
        number,
        step.name,
        run,
        package=package,
        when=step.when,
        required=step.required,
        on_rollback=_going_back(ground, step, run, place.below("on_rollback")),
    )


def _going_back(ground: Ground, step: Step, run: ServerRun, place: Place) -> Literal["skip", "refuse"] | ServerRun:
    """What stands in the step's place when a release goes back: a script sees, may and takes what the step does."""
    match step.on_rollback:
        case None | "refuse":
            return "refuse"
        case "skip":
            return "skip"
        case path:
            return msgspec.structs.replace(
                run,
                name=f"roll back {step.name}",
                script=ground.frozen(ground.process, path, place),
                commands=(),
                variables=run.variables | {"ROLLBACK": "1"},
            )


def _package(ground: Ground, step: Step, place: Place) -> str:
    name = step.deploy or ""
    if name and name not in ground.process.value.packages:
        known = ", ".join(ground.process.value.packages) or "none"
        ground.wrong(place.below("deploy"), f"there is no package {shown(name)} under packages: (there: {known})")
        return ""
    return name


class _Roll:
    """One step over machines."""

    def __init__(self, ground: Ground, number: int, step: Step, place: Place) -> None:
        self._ground = ground
        self._number = number
        self._step = step
        self._place = place
        self._package = _package(ground, step, place)
        self._hashes: dict[str, str] = {}
        """SHA-256 of this step's scripts by their path."""

    def plan(self) -> MachineStep:
        step, rolling = self._step, rolling_of(self._step.strategy)
        self._check_work()
        every = self._ordered(self._machines(), rolling)
        names = [name for name in every if name not in self._ground.left_out]
        beside = [name for name in every if name in self._ground.left_out]
        # Whoever is left out may be out of service, too, and the promise is about all.
        least = least_of(rolling.min_in_service, len(every)) if rolling else 0
        self._check_left_out(names, beside, least)
        rotation = self._rotation()
        phases = self._phases(rolling, len(names), 0 if beside else least)
        self._note(names, beside, rolling, phases, rotation, least)
        return MachineStep(
            self._number,
            step.name,
            tuple(self._turn(name) for name in names),
            strategy="rolling" if rolling else "parallel",
            phases=phases,
            package=self._package,
            label=self._ground.label if self._package else "",
            keep=step.keep,
            min_in_service=least,
            max_failures=most_of(rolling.max_failures, len(names)) if rolling else 0,
            unhealthy_first="unhealthy" in rolling.order if rolling else True,
            rotation=rotation,
            when=step.when,
            required=step.required,
            on_failure=step.on_failure or "ask",
            beside=tuple(self._turn(name) for name in beside),
        )

    def _check_left_out(self, names: list[str], beside: list[str], least: int) -> None:
        """What a person leaves out must be neither required nor needed."""
        title, who = f"step {self._number} ({self._step.name})", ", ".join(beside)
        if beside and self._step.required:
            self._ground.wrong_option(
                "machines to leave out",
                f"{title} is required, so nobody can leave out {who} of it from the command line",
            )
        if beside and names and len(names) - 1 < least:
            self._ground.wrong_option(
                "machines to leave out",
                f"{title} keeps {least} in service; without {who}, which count as out, {len(names) - 1} of "
                f"{len(names) + len(beside)} are in service while one is deployed to: leave out fewer",
            )

    # --- which machines, how many at a time

    def _machines(self) -> list[str]:
        machines = {
            name: machine
            for name, machine in self._ground.environment.value.machines.items()
            if isinstance(machine, Machine)
        }
        for index, role in enumerate(self._step.roles):
            if not any(role in machine.roles for machine in machines.values()):
                self._ground.wrong(
                    self._place.below("roles", index),
                    f"no machine has the role {shown(role)}: give it to one in {self._ground.environment.name}",
                )
        if not self._step.roles:
            self._ground.wrong(self._place.below("roles"), "is empty: a step needs machines; name at least one role")
        return sorted(name for name, machine in machines.items() if set(machine.roles) & set(self._step.roles))

    def _ordered(self, names: list[str], rolling: Rolling | None) -> list[str]:
        """By name, but for machines that `order` lists: they come first, in its order."""
        order = rolling.order if rolling else ()
        place = self._place.below("strategy", "rolling", "order")
        listed = [word for word in order if word not in {"unhealthy", "name"}]
        for index, word in enumerate(order):
            if word in order[:index]:
                self._ground.wrong(place.below(index), f"{shown(word)} stands twice: keep one")
            elif word in listed and word not in names:
                self._ground.wrong(
                    place.below(index),
                    f"no machine of this step is called {shown(word)}: expected unhealthy, name or one of {', '.join(names) or 'none'}",
                )
        if "unhealthy" in order[1:] or "name" in order[:-1]:
            self._ground.wrong(place, "expected unhealthy at the beginning and name at the end")
        first = [name for name in dict.fromkeys(listed) if name in names]
        return [*first, *(name for name in names if name not in first)]

    def _phases(self, rolling: Rolling | None, count: int, least: int) -> tuple[PlannedPhase, ...]:
        if rolling is None:
            return (PlannedPhase(0, max(count, 1)),)
        place = self._place.below("strategy", "rolling")
        if rolling.window is not None and rolling.phases:
            self._ground.wrong(place, "has both window and phases: expected one of them; a phase has its own window")
        if count and count - 1 < least:
            self._ground.wrong(
                place.below("min_in_service"),
                f"cannot be kept: of {count} machines, {count - 1} are in service while one is deployed to; "
                f"expected at most {count - 1}",
            )
        if not rolling.phases:
            window = rolling.window if rolling.window is not None else 1
            return (PlannedPhase(0, self._window(window, count, place.below("window"))),)
        return self._several(rolling.phases, count, place.below("phases"))

    def _several(self, phases: tuple[Phase, ...], count: int, place: Place) -> tuple[PlannedPhase, ...]:
        """The phases with their numbers. Those that find no machine left are dropped, as a small environment has them."""
        planned, left = [], count
        self._check_gates(phases, place)
        for index, phase in enumerate(phases):
            here = place.below(index)
            gate = None
            if phase.gate is not None:
                gate = planned_gate(self._ground, phase.gate, here.below("gate"), self._step, self._package)
            last = index == len(phases) - 1
            window = self._window(phase.window, count, here.below("window"))
            if phase.machines is None and not last:
                self._ground.wrong(here, "takes all machines that are left, and phases follow: give it 'machines'")
            machines = left if phase.machines is None else min(left, part_of(phase.machines, count))
            if phase.machines is not None and part_of(phase.machines, count) == 0:
                self._ground.wrong(here.below("machines"), "is 0: a phase needs at least one machine")
            left -= machines
            if machines:
                takes_rest = phase.machines is None
                planned.append(PlannedPhase(0 if takes_rest else machines, min(window, machines), gate))
            if last and left and phase.machines is not None:
                self._ground.wrong(
                    here, f"leaves {left} of {count} machines without a phase: add one without 'machines' for the rest"
                )
        return tuple(planned)

    def _check_gates(self, phases: tuple[Phase, ...], place: Place) -> None:
        names = [phase.gate.name if phase.gate else "" for phase in phases]
        for index, name in enumerate(names):
            if name and name in names[:index]:
                self._ground.wrong(
                    place.below(index, "gate", "name"),
                    f"{shown(name)} is the name of another gate of this step: choose another",
                )

    def _window(self, share: int | str, count: int, place: Place) -> int:
        window = part_of(share, count)
        if window == 0:
            self._ground.wrong(place, "is 0: no machine could ever start; expected at least 1, or a percentage")
        return max(1, min(window, max(count, 1)))

    def _note(
        self,
        names: list[str],
        beside: list[str],
        rolling: Rolling | None,
        phases: Sequence[PlannedPhase],
        rotation: RotationPlan | None,
        least: int,
    ) -> None:
        title, count = self._step.name, len(names)
        if beside:
            self._ground.notes.append(f"{title}: without {', '.join(beside)}; {counted(count, 'machine')} left")
        if not count:
            return
        if rolling is None:
            self._ground.notes.append(f"{title}: parallel, {counted(count, 'machine')}, all at once")
            if rotation and count:
                self._ground.notes.append(f"{title}: all {count} machines leave rotation {rotation.name} together")
            return
        words = ", then ".join(phases_in_words(phases, count))
        service = f"at least {least} in service" if least else "no minimum in service"
        stop = f"more than {most_of(rolling.max_failures, count)} failures stop it"
        self._ground.notes.append(f"{title}: {words}; {service}; {stop}")
        most = count - least  # those that are left out count as out
        if any(phase.window > most for phase in phases) and most > 0:
            self._ground.notes.append(f"{title}: in fact at most {most} at a time, for the minimum in service")
        if rotation and rotation.probe is None:
            self._ground.notes.append(
                f"{title}: rotation {rotation.name} has no probe, so who is in service is what Waystation did itself"
            )

    # --- what is done on one of them

    def _check_work(self) -> None:
        step, place = self._step, self._place
        switches = [item for item in step.apply or () if item == "switch"]
        if step.deploy and not step.to:
            self._ground.wrong(
                place, "the key 'to' is missing: expected the absolute folder on the machine, such as /srv/app"
            )
        if step.deploy and step.apply is not None and len(switches) != 1:
            self._ground.wrong(
                place.below("apply"), f"has 'switch' {len(switches)} times: a deployment needs it exactly once"
            )
        if not step.deploy and step.on_failure == "rollback":
            self._ground.wrong(place.below("on_failure"), "is rollback, and the step deploys nothing to go back from")
        if not step.deploy and switches:
            self._ground.wrong(
                place.below("apply"), "has 'switch', and the step deploys nothing: name a package with 'deploy'"
            )
        if not step.deploy and not step.apply and not step.verify:
            self._ground.wrong(place, "does nothing: expected one of the keys deploy, apply, verify")

    def _turn(self, name: str) -> MachineTurn:
        step, ground = self._step, self._ground
        scope = ground.machine_scope(name, self._package)
        root = self._root(scope)
        variables = self._variables(name, scope, root)
        turn = MachineTurn(
            name,
            root,
            self._actions(name, scope, variables),
            tuple(self._check(scope, check, self._place.below("verify", i)) for i, check in enumerate(step.verify)),
            variables,
            fingerprint="",
        )
        return msgspec.structs.replace(turn, fingerprint=self._fingerprint(turn))

    def _root(self, scope: Scope) -> str:
        if self._step.to is None:
            return ""
        expected = "an absolute folder without '..', such as /srv/app"
        filled = self._ground.fill(scope, self._step.to, self._place.below("to"), _is_root, expected)
        return _plain_root(filled)

    def _variables(self, name: str, scope: Scope, root: str) -> dict[str, str]:
        machine = self._ground.machine(name)
        for first, second in clashes(machine.tags):
            self._ground.wrong(
                self._ground.environment.at("machines", name, "tags", second),
                f"scripts would see it and {shown(first)} both as {environment_name('TAG_', first)}: rename one",
            )
        return {
            "MACHINE": name,
            "ADDRESS": machine.address,
            "SITE": machine.site,
            "ROLES": ",".join(machine.roles),
            **{environment_name("TAG_", tag): str(value) for tag, value in machine.tags.items()},
            **self._ground.common_variables(self._step.name, self._package),
            **({"ROOT": root} if root else {}),
            **self._ground.seen_variables(scope),
        }

    def _actions(self, name: str, scope: Scope, variables: Mapping[str, str]) -> tuple[ApplyAction, ...]:
        if self._step.apply is None:
            return (SwitchAction(),) if self._package else ()
        actions: list[ApplyAction] = []
        for index, item in enumerate(self._step.apply):
            place = self._place.below("apply", index)
            if not isinstance(item, Apply):
                actions.append(SwitchAction())
            elif item.script is not None:
                actions.append(self._script(name, item, item.script, variables, place))
            else:
                actions.append(self._service(scope, item, place))
        return tuple(actions)

    def _script(self, name: str, item: Apply, path: str, variables: Mapping[str, str], place: Place) -> ScriptAction:
        ground = self._ground
        self._hashes[path] = ground.frozen(ground.process, path, place.below("script")).sha256
        self._check_available(name, item.secrets, place.below("secrets"))
        attempts, delay = ground.retries(item.retry, place)
        return ScriptAction(
            item.name or slug(os.path.splitext(os.path.basename(path))[0]),
            path,
            dict(variables),
            ground.process_secrets(item.secrets, place.below("secrets")),
            timeout=ground.time_limit(item.timeout, place.below("timeout"), SCRIPT_SECONDS),
            stall=ground.stall_limit(item.stall, place),
            attempts=attempts,
            delay=delay,
            idempotent=item.idempotent,
        )

    def _check_available(self, name: str, secrets: tuple[str, ...], place: Place) -> None:
        roles = self._ground.machine(name).roles
        for index, secret in enumerate(secrets):
            declared = self._ground.process.value.secrets.get(secret)
            if declared is None:
                continue
            if declared.available_to == "server":
                self._ground.wrong(
                    place.below(index),
                    f"{shown(secret)} is available to the server only, and this script runs on machines: "
                    f"name their roles in secrets.{secret}.available_to",
                )
            elif not set(roles) & set(declared.available_to):
                self._ground.wrong(
                    place.below(index),
                    f"{shown(secret)} is available to {', '.join(declared.available_to) or 'no role'}, and machines of "
                    f"this step have other roles: add one to secrets.{secret}.available_to",
                )

    def _service(self, scope: Scope, item: Apply, place: Place) -> ServiceAction:
        service = self._service_name(scope, item.service or "", place.below("service"))
        attempts, delay = self._ground.retries(item.retry, place)
        action = item.action or "restart"
        return ServiceAction(
            item.name or slug(f"{action}-{service}"),
            service,
            action,
            timeout=self._ground.time_limit(item.timeout, place.below("timeout"), _SERVICE_SECONDS),
            attempts=attempts,
            delay=delay,
            idempotent=item.idempotent,
        )

    def _service_name(self, scope: Scope, text: str, place: Place) -> str:
        expected = "a service's name, such as webshop or app@1.service"
        return self._ground.fill(scope, text, place, _SERVICE.fullmatch, expected)

    # --- its checks

    def _check(self, scope: Scope, check: Check, place: Place) -> PlannedCheck:
        now = self._timed(scope, check, place)
        if OLD_VERSION.encode() in msgspec.json.encode(now.check):
            self._ground.wrong(place, f"holds {OLD_VERSION}, which Waystation itself puts there: leave it out")
        old = now
        if self._package:
            old = self._timed(scope.with_facts({"package.version": OLD_VERSION}), check, place, judge=False)
        on_server = check.from_ == "server"
        if on_server and check.service is not None:
            self._ground.wrong(place.below("from"), "the server cannot see a machine's services: leave 'from' out")
        return PlannedCheck(now, old, on_server=on_server)

    def _timed(self, scope: Scope, check: Check, place: Place, *, judge: bool = True) -> TimedCheck:
        """`judge`: look at the result, too; the text with the old version's mark in it may be no URL."""
        ground = self._ground
        lasting = ground.seconds(check.lasting, place.below("for"), 0.0)
        deadline = ground.seconds(check.deadline, place.below("deadline"), 60.0)
        timeout = ground.time_limit(check.timeout, place.below("timeout"), 10.0)
        if judge and lasting >= deadline:
            ground.wrong(
                place.below("deadline"), f"{check.deadline} is over before 'for' is: expected more than {check.lasting}"
            )
        return TimedCheck(self._question(scope, check, place, judge=judge), lasting, deadline, timeout)

    def _question(self, scope: Scope, check: Check, place: Place, *, judge: bool) -> OrderedCheck:
        ground = self._ground
        if check.http is not None:
            expected = "a URL such as http://${machine.address}:8080/health"
            url = ground.fill(scope, check.http, place.below("http"), is_http_url if judge else None, expected)
            return HttpCheck(
                url,
                None if check.expect is None else ground.fill(scope, check.expect, place.below("expect")),
                None if check.contains is None else ground.fill(scope, check.contains, place.below("contains")),
                check.status,
            )
        if check.tcp is not None:
            expected = "HOST:PORT, such as ${machine.address}:8080"
            text = ground.fill(scope, check.tcp, place.below("tcp"), _names_a_port if judge else None, expected)
            return TcpCheck(*_host_and_port(text))
        if check.command is not None:
            if judge and check.from_ == "machine":
                script = check.command[0]
                self._hashes[script] = ground.frozen(ground.process, script, place.below("command", 0)).sha256
            return CommandCheck(ground.fill_command(scope, check.command, place.below("command")))
        return ServiceCheck(self._service_name(scope, check.service or "", place.below("service")))

    # --- the rest

    def _rotation(self) -> RotationPlan | None:
        name = self._step.rotation
        if name is None:
            return None
        rotation = self._ground.environment.value.rotation.get(name)
        if rotation is None:
            known = ", ".join(self._ground.environment.value.rotation) or "none"
            self._ground.wrong(
                self._place.below("rotation"),
                f"there is no rotation {shown(name)}: define it under rotation: in {self._ground.environment.name} "
                f"(there: {known})",
            )
            return None
        return RotationPlan(
            name,
            before=self._bracket(name, "before", rotation.before, rotation),
            after=self._bracket(name, "after", rotation.after, rotation),
            probe=None if rotation.probe is None else self._bracket(name, "probe", rotation.probe, rotation),
        )

    def _bracket(self, name: str, which: str, path: str, rotation: Rotation) -> ServerRun:
        """One of a rotation's scripts. They are idempotent by contract; what they see comes from each turn."""
        ground = self._ground
        place = ground.environment.at("rotation", name)
        attempts, delay = ground.retries(rotation.retry, place)
        return ServerRun(
            f"{which} {name}",
            script=ground.frozen(ground.environment, path, place.below(which)),
            timeout=ground.time_limit(rotation.timeout, place.below("timeout"), SCRIPT_SECONDS),
            stall=ground.stall_limit(rotation.stall, place),
            attempts=attempts,
            delay=delay,
            idempotent=True,
            secrets=ground.use_secrets(rotation.secrets, place.below("secrets")),
        )

    def _fingerprint(self, turn: MachineTurn) -> str:
        """Over all that the turn does, scripts by their contents. Without the release's label: it may change while
        nothing else does, and then there is nothing to do.
        """
        plain = msgspec.structs.replace(turn, variables=_unlabelled(turn.variables), actions=())
        actions = [
            msgspec.structs.replace(action, variables=_unlabelled(action.variables))
            if isinstance(action, ScriptAction)
            else action
            for action in turn.actions
        ]
        return hashlib.sha256(msgspec.json.encode([plain, actions, self._hashes], order="sorted")).hexdigest()


def is_http_url(text: str) -> bool:
    """Whether `text` is an absolute http or https URL with a host, in printable ASCII without spaces."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text and len(text) <= 2048
    return plain and parts.scheme in {"http", "https"} and bool(parts.hostname) and port != 0


def _is_root(text: str) -> bool:
    """Whether `text` is an absolute folder, of Windows or of other systems, without `..`: behind a link, that is anywhere."""
    parts = re.split(r"[\\/]", text)
    absolute = text.startswith("/") or _WINDOWS_ROOT.fullmatch(text) is not None
    names = [part for part in parts[1:] if part not in {"", "."}]
    return absolute and bool(names) and ".." not in parts and text.isprintable() and len(text) <= 4096


def _plain_root(text: str) -> str:
    """The same folder without `.`, doubled separators, and one at the end."""
    separator = "/" if text.startswith("/") else r"[\\/]"
    first, *parts = re.split(separator, text)
    names = [part for part in parts if part not in {"", "."}]
    return ("/" if "/" in text[:3] else "\\").join([first, *names])


def _unlabelled(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "RELEASE"}


def _names_a_port(text: str) -> bool:
    host, port = _host_and_port(text)
    return bool(host) and 0 < port < 65536


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    return host.removeprefix("[").removesuffix("]"), number
