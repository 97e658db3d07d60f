"""The frozen plan of one deployment: everything that was decided before the first byte moved.

Values only. `orchestrator/plan/make_plan.py` makes a plan (pure); the journal keeps it as JSON; `orchestrator/deployment/deployment.py`
follows it and reads no file of the process or environment again. Secrets are named in a plan, never held by it.
Seconds and bytes everywhere.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from agent.orders.orders import TimedCheck
from orchestrator.files.values import NotificationKind
from relay.package.identity import NuGetVersion, PackageId, PackageRef

OLD_VERSION: Final = "${old.version}"
"""Stands in the checks of an old version where `${package.version}` stood in the file."""


class _Planned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of the plan."""


class PlannedPackage(_Planned, frozen=True):
    """A package version of the release.

    Attributes:
        manifest: hex; empty until the package is in the depot.
        feed: name of the feed in the environment from which it is taken where the depot lacks it.
    """

    id: str
    version: str
    manifest: str = ""
    tree_bytes: int = 0
    nupkg_bytes: int = 0
    feed: str = ""

    @property
    def ref(self) -> PackageRef:
        """Raises `IdentityError`."""
        return PackageRef(PackageId.parse(self.id), NuGetVersion.parse(self.version))


class SecretSource(_Planned, frozen=True):
    """Where a secret's value is read when it is needed: `file`, an absolute path, or `env`, the other one being empty."""

    file: str = ""
    env: str = ""


class PlannedFeed(_Planned, frozen=True):
    url: str
    secret: str = ""


class PlannedRelay(_Planned, frozen=True):
    """A relay and where its token comes from.

    Attributes:
        generic: it serves every site, after the site's own.
        upstream: name of the relay that it fetches packages from; empty: the origin sends them.
        limit: most bytes per second of packages that come in; 0: no limit.
        prefer: what the origin wants of encodings that are about as fast.
        plain_http: it is given its token over plain http, too.
    """

    name: str
    url: str
    site: str
    generic: bool = False
    token: SecretSource | None = None
    ca_file: str = ""
    upstream: str = ""
    limit: float = 0.0
    plain_http: bool = False
    prefer: Literal["bytes", "time"] = "bytes"


class PlannedMachine(_Planned, frozen=True):
    """A machine. `key` is its agent's fingerprint; `relays` are names of relays, the closest first."""

    name: str
    address: str
    site: str
    key: str
    roles: tuple[str, ...]
    relays: tuple[str, ...]
    tags: dict[str, str] = {}


class FrozenFile(_Planned, frozen=True):
    """A script as it was when the plan was made. `path` is relative to `folder` (absolute), as the YAML wrote it."""

    folder: str
    path: str
    sha256: str


class ServerRun(_Planned, frozen=True):
    """Something that runs on the server: a script, or commands one after another (exactly one of the two is given).

    `variables` are the whole of what is resolved already, by the names that the script sees (VAR_PORT, …);
    `secrets` are names of secrets, which it sees as SECRET_<NAME>. It is ended where it prints nothing for `stall` seconds.
    """

    name: str
    script: FrozenFile | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    timeout: float = 600.0
    stall: float | None = None
    attempts: int = 1
    delay: float = 10.0
    idempotent: bool = False
    variables: dict[str, str] = {}
    secrets: tuple[str, ...] = ()


class PlannedAsk(_Planned, frozen=True):
    """A question to people.

    Attributes:
        text: filled in, but for `${machine.name}` and `${machine.address}`: those of the machines that went through.
        approvers: names of people, teams resolved; empty: everybody who may order in the environment.
        minimum: so many different people must agree.
        not_author: who made the release does not count.
        expires: seconds from when it was asked; 0: never.
        on_expiry: `pause` asks on and says that it is late, `stop` is a no, `proceed` a yes.
    """

    text: str
    approvers: tuple[str, ...] = ()
    minimum: int = 1
    not_author: bool = False
    expires: float = 0.0
    on_expiry: Literal["pause", "stop", "proceed"] = "pause"


class PlannedGate(_Planned, frozen=True):
    """Where a phase waits: for `check`, a run on the server that must end with 0, then for `ask`. At least one of both."""

    name: str
    check: ServerRun | None = None
    ask: PlannedAsk | None = None


class PreAcquire(_Planned, frozen=True):
    """A step before any byte moves; `undo` always runs, at the end or once everything is acquired."""

    run: ServerRun
    undo: ServerRun | None = None
    until: Literal["finished", "acquired"] = "finished"


class OfflineRule(_Planned, frozen=True):
    """Machines that may be left out where they cannot be reached: at most so many, of these roles (none named: of all)."""

    at_most: int
    roles: tuple[str, ...] = ()


class AcquirePlan(_Planned, frozen=True):
    """Limits of the acquisition. `per_relay`: machines of one site that pull at one time."""

    deadline: float = 1800.0
    stall: float = 60.0
    per_relay: int = 20
    offline: OfflineRule | None = None


class RotationPlan(_Planned, frozen=True):
    """How machines leave and enter their load balancer. `before` and `after` are idempotent; `probe` ends with 0 where
    the machine is in service, with 1 where it is not, with anything else where it cannot tell.
    """

    name: str
    before: ServerRun
    after: ServerRun
    probe: ServerRun | None = None


class ScriptAction(_Planned, frozen=True, tag="script"):
    """A script of the process on the machine: `path` inside the release's scripts package. `stall` as of a `ServerRun`."""

    name: str
    path: str
    variables: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    timeout: float = 600.0
    stall: float | None = None
    attempts: int = 1
    delay: float = 10.0
    idempotent: bool = False


class SwitchAction(_Planned, frozen=True, tag="switch"):
    name: str = "switch"


class ServiceAction(_Planned, frozen=True, tag="service"):
    name: str
    service: str
    action: Literal["start", "stop", "restart", "reload"]
    timeout: float = 120.0
    attempts: int = 1
    delay: float = 10.0
    idempotent: bool = False


ApplyAction = ScriptAction | SwitchAction | ServiceAction


class PlannedCheck(_Planned, frozen=True):
    """`on_server`: the server makes it, else the machine's agent. `for_old`: the same check with the version that a
    machine had before; its text still holds `${old.version}` where `${package.version}` stood, and nothing else.
    """

    check: TimedCheck
    for_old: TimedCheck
    on_server: bool = False


class MachineTurn(_Planned, frozen=True):
    """All that one step does on one machine, resolved.

    Attributes:
        variables: for `before`, `after` and `probe`: MACHINE, ADDRESS, TAG_*, VAR_*, …, by the names that they see.
        fingerprint: SHA-256 (hex) of all this: the same again on the same tree is "already current".
    """

    machine: str
    root: str
    actions: tuple[ApplyAction, ...]
    verify: tuple[PlannedCheck, ...]
    variables: dict[str, str]
    fingerprint: str


class PlannedPhase(_Planned, frozen=True):
    """`machines`: how many of the step's machines go through it (0: all that are left); `window`: how many at a time.

    Its gate stands behind it: when all its machines are through, before the next phase, or the next step, starts.
    """

    machines: int
    window: int
    gate: PlannedGate | None = None


OnFailure = Literal["ask", "rollback", "stop"]
"""What is done about a machine whose new version is bad: ask a person, switch back, or leave it out and fail."""


class MachineStep(_Planned, frozen=True, tag="machines"):
    """A step over machines.

    Attributes:
        number: counts all steps of the process from 1.
        turns: in the order of names, or in the one that the file lists.
        beside: turns of machines that take no part in this deployment. They have none here; those that are not
            `Plan.excluded` count as in service where they are.
        package: name of the deployed package among the release's; empty where nothing is deployed.
    """

    number: int
    name: str
    turns: tuple[MachineTurn, ...]
    strategy: Literal["parallel", "rolling"]
    phases: tuple[PlannedPhase, ...]
    package: str = ""
    label: str = ""
    keep: int = 3
    min_in_service: int = 0
    max_failures: int = 0
    unhealthy_first: bool = True
    rotation: RotationPlan | None = None
    when: Literal["success", "failure", "always"] = "success"
    required: bool = False
    on_failure: OnFailure = "stop"
    beside: tuple[MachineTurn, ...] = ()


class ServerStep(_Planned, frozen=True, tag="server"):
    """A step on the server. `package`: its tree is there as PACKAGE_DIR.

    `on_rollback`: what going back from this release means, where the step began: leave it as it is, run this, or nobody
    may go back.
    """

    number: int
    name: str
    run: ServerRun
    package: str = ""
    when: Literal["success", "failure", "always"] = "success"
    required: bool = False
    on_rollback: Literal["skip", "refuse"] | ServerRun = "refuse"


class AskStep(_Planned, frozen=True, tag="ask"):
    """A step that waits for people."""

    number: int
    name: str
    ask: PlannedAsk
    when: Literal["success", "failure", "always"] = "success"
    required: bool = False


PlannedStep = MachineStep | ServerStep | AskStep


class NotifyPlan(_Planned, frozen=True):
    """A CloudEvents receiver; exactly one of `url` and `url_secret` (name of a secret) is given."""

    on: tuple[NotificationKind, ...]
    url: str = ""
    url_secret: str = ""


class PlannedBeside(_Planned, frozen=True):
    """Machines that have turns in the steps' `beside`, and the relays that no other machine of the plan asks."""

    machines: tuple[PlannedMachine, ...] = ()
    relays: tuple[PlannedRelay, ...] = ()


class Plan(_Planned, frozen=True):
    """One deployment, frozen.

    Attributes:
        scripts: the package that holds the process's own scripts for machines, where there are any.
        secrets: where the values of all secrets come from, by name.
        machine_secrets: names that may go to machines (sealed); all others never leave the server.
        deadline: of the whole deployment; 0: none.
        notes: what a person should know of it: effective numbers, what the plan cannot promise.
        force: every machine has its turn, also one on which all of it was done before.
        author: name of the person who signed the release; empty where the key has no name.
        excluded: machines that are left out, and why. They stand in `beside`, and count as out of service.
        beside: of the steps' machines those that take no part.
        retries: ULID of the deployment whose plan this one goes on with, for some of its machines.
    """

    format: Literal[1]
    project: str
    label: str
    environment: str
    packages: dict[str, PlannedPackage]
    scripts: PlannedPackage | None
    relays: tuple[PlannedRelay, ...]
    feeds: dict[str, PlannedFeed]
    machines: tuple[PlannedMachine, ...]
    secrets: dict[str, SecretSource]
    machine_secrets: tuple[str, ...]
    pre_acquire: tuple[PreAcquire, ...]
    acquire: AcquirePlan
    steps: tuple[PlannedStep, ...]
    notify: tuple[NotifyPlan, ...] = ()
    deadline: float = 0.0
    notes: tuple[str, ...] = ()
    force: bool = False
    author: str = ""
    excluded: dict[str, str] = {}
    beside: PlannedBeside | None = None
    retries: str = ""

    def every_package(self) -> list[PlannedPackage]:
        """Those of the release, and that of its scripts."""
        return [*self.packages.values(), *([self.scripts] if self.scripts else [])]

    def machine(self, name: str) -> PlannedMachine:
        """Raises `KeyError`."""
        return {machine.name: machine for machine in self.machines}[name]

    def relay(self, name: str) -> PlannedRelay:
        """Raises `KeyError`."""
        return {relay.name: relay for relay in self.relays}[name]

    def steps_with(self, machine: str) -> list[MachineStep]:
        """The steps in which this machine has a turn, in order."""
        return [
            step
            for step in self.steps
            if isinstance(step, MachineStep) and any(turn.machine == machine for turn in step.turns)
        ]
