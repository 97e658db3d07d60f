"""release.yaml: what a release does, as its project writes it. Strict; tests/orchestrator/data/whole.yaml shows every key.

What is not built yet stands here all the same and is loaded; `orchestrator/plan/unsupported.py` refuses it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from orchestrator.files.values import (
    Command,
    Duration,
    Name,
    NotificationKind,
    PackageName,
    ProjectName,
    ScriptPath,
    Share,
    Text,
    Title,
    VariableName,
)
from relay.written.decode import Kind, Written, load_as, schema_of
from relay.written.yaml_positions import LoadedFile

START: Final = "'waystation init' makes files to start from"
_Count = Annotated[int, Meta(ge=0, le=100_000)]
_ActionName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="a name of letters, digits, '.', '_' and '-', at most 63 characters",
    ),
]
_Run = ("timeout", "stall", "retry", "idempotent", "secrets")

Value = str | int | float | bool
"""A variable's value; numbers and truth values are kept as they were written."""


class Prompt(Written, frozen=True):
    """A variable that the operator gives: `--variable NAME=VALUE`. The whole value must be what `match` describes."""

    prompt: Text
    match: str = ""


class Secret(Written, frozen=True):
    """Who may see a secret: the server only, or machines of these roles (and the server, which seals it to them)."""

    available_to: Literal["server"] | tuple[Name, ...]


class Package(Written, frozen=True):
    """A package of the release: `id` alone is short for this."""

    id: PackageName
    """NuGet id."""
    via: Literal["relay", "direct"] = "relay"
    """How it comes to machines; `direct` is not built yet."""
    feed: Name | None = None
    """Name of a feed in the environment, from which the package is taken where the depot lacks it."""


class Retry(Written, frozen=True):
    attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    delay: Duration = "10s"


class Undo(Written, frozen=True):
    """What undoes a step before acquisition; a path alone is short for `script`."""

    kinds: ClassVar[Mapping[str, Kind]] = {"script": Kind(), "commands": Kind()}
    script: ScriptPath | None = None
    commands: tuple[Command, ...] = ()
    timeout: Duration | None = None
    stall: Duration | None = None
    retry: Retry | None = None
    secrets: tuple[Name, ...] = ()


class PreAcquireStep(Written, frozen=True):
    """A step on the server before any byte moves."""

    kinds: ClassVar[Mapping[str, Kind]] = {"script": Kind(), "commands": Kind()}
    name: Title
    """A title."""
    script: ScriptPath | None = None
    commands: tuple[Command, ...] = ()
    """One of the two: a script, or argument lists, one after another."""
    timeout: Duration | None = None
    """Of one attempt. Default: `10m`."""
    stall: Duration | None = None
    """It is ended as stalled where it prints nothing for so long. Without it, only its time counts."""
    retry: Retry | None = None
    """`attempts` (default 3), `delay` (`10s`). Without it, one attempt."""
    idempotent: bool = False
    """The step may be run again after an unknown outcome."""
    secrets: tuple[Name, ...] = ()
    """Names; seen as `SECRET_…`."""
    undo: ScriptPath | Undo | None = None
    """A script, or a mapping with `script` or `commands`, `timeout`, `stall`, `retry`, `secrets`. It is owed from the moment
    that the step may have begun; it sees `UNDO=1`.
    """
    until: Literal["finished", "acquired"] = "finished"
    """When it is undone: `finished` or `acquired`."""


class Offline(Written, frozen=True):
    """Machines that are left out where they cannot be reached."""

    action: Literal["skip"]
    """`skip`: they are left out, and named at the end."""
    at_most: Annotated[int, Meta(ge=1, le=100_000)]
    """So many; one more, and no step begins."""
    roles: tuple[Name, ...] = ()
    """Only machines with one of these roles. Without it, any."""


class Acquire(Written, frozen=True):
    """Bringing every package to every machine."""

    deadline: Duration = "30m"
    """Of the whole acquisition, what machines are asked before included. Machines wait for relays that are away until then, or until `stall`."""
    stall: Duration = "60s"
    """A source that sends nothing for so long is left; a machine that gets nothing from any relay for so long has failed."""
    per_relay: Annotated[int, Meta(ge=1, le=1000)] = 20
    """Machines of one site that pull at one time."""
    offline: Offline | None = None
    """Which machines are left out where no relay has seen them, or where they are lost on the way, see below. Without it,
    none.
    """


class Gate(Written, frozen=True):
    """Where a phase waits, when all its machines are through: for a check, then for people."""

    name: Title
    """A title that no other gate of the step has."""
    check: ScriptPath | None = None
    """A script on the server that must end with 0; it sees `GATE`. At least one of `check` and `ask`."""
    ask: Text | None = None
    """The question. `${machine.name}` and `${machine.address}` stand for the machines that went through the phase."""
    approvers: tuple[Text, ...] = ()
    """Who may answer: names of people that trust.json knows, and `team:NAME` of the environment's `teams`. Default:
    everybody who may decide in the environment.
    """
    minimum: Annotated[int, Meta(ge=1, le=100)] = 1
    """So many different people must agree; the no of one settles it."""
    not_author: bool = False
    """Who made the release does not count."""
    expires: Duration | None = None
    """How long it waits. Default: for ever."""
    on_expiry: Literal["pause", "stop", "proceed"] = "pause"
    """What happens then: `pause` waits on and says that it is late, `stop` is a no, `proceed` a yes."""


class Phase(Written, frozen=True):
    """A stretch of a rolling step: so many machines (without it: all that are left), `window` of them at a time."""

    machines: Share | None = None
    """How many it takes. Without it, in the last phase, all that are left."""
    window: Share = 1
    """Machines in flight at one time."""
    gate: Gate | None = None
    """Where it waits before the next phase, or the next step, starts; see below."""


class MaxPer(Written, frozen=True):
    """Never more than `machines` in flight that have the same value of this tag."""

    tag: Name
    machines: Annotated[int, Meta(ge=1)] = 1


class Rolling(Written, frozen=True):
    """How a step rolls: one `window` for all machines, or `phases`."""

    window: Share | None = None
    """Machines in flight at one time. Default: 1."""
    phases: tuple[Phase, ...] = ()
    """In place of `window`: stretches, one after another."""
    min_in_service: Share = 0
    """Machines that must be known to be in service before one starts; a percentage is rounded up."""
    max_failures: Share = 0
    """Of the whole step; one more stops it. A percentage is rounded down."""
    order: tuple[Name, ...] = ("unhealthy", "name")
    """Who goes first; machines' names between the two come first."""
    max_per: MaxPer | None = None
    """Not built yet."""


class Strategy(Written, frozen=True):
    rolling: Rolling


class Apply(Written, frozen=True):
    """Something done on the machine: a script, or an action of its service manager."""

    kinds: ClassVar[Mapping[str, Kind]] = {"script": Kind(may=("secrets", "stall")), "service": Kind(needs=("action",))}
    name: _ActionName | None = None
    """For logs and operation ids."""
    script: ScriptPath | None = None
    """A script of the process, run on the machine."""
    service: Text | None = None
    action: Literal["start", "stop", "restart", "reload"] | None = None
    """`start`, `stop`, `restart` or `reload` by the machine's service manager."""
    timeout: Duration | None = None
    """Of one attempt. Default: `10m`, of a service `2m`."""
    stall: Duration | None = None
    """Of a script: as in `pre_acquire`."""
    retry: Retry | None = None
    idempotent: bool = False
    secrets: tuple[Name, ...] = ()
    """As in `pre_acquire`; `secrets` for scripts only."""


class Check(Written, frozen=True):
    """What must hold once a machine was deployed to, for a stretch of time, within a deadline."""

    kinds: ClassVar[Mapping[str, Kind]] = {
        "http": Kind(may=("expect", "contains", "status")),
        "tcp": Kind(),
        "command": Kind(),
        "service": Kind(),
    }
    http: Text | None = None
    """URL; one GET, no redirect, no proxy, at most 1 MiB."""
    tcp: Text | None = None
    """`HOST:PORT`: something listens there."""
    command: Command | None = None
    """An argument list that ends with 0. On a machine it begins with a script of the process, which sees what scripts
    see there, but for secrets; on the server with a program. It is started many times.
    """
    service: Text | None = None
    """The machine's service manager says that it is active."""
    expect: str | None = None
    """With `http`: the whole body, read as a person would: by its charset, without a byte order mark, spaces around it and
    at the ends of lines.
    """
    contains: str | None = None
    """With `http`: a part of the body."""
    status: Annotated[int, Meta(ge=100, le=599)] = 200
    """With `http`: the status."""
    lasting: Duration = msgspec.field(name="for", default="0s")
    """How long it must hold without a break."""
    deadline: Duration = "60s"
    """By when it must hold."""
    timeout: Duration = "10s"
    """Of one try."""
    from_: Literal["machine", "server"] = msgspec.field(name="from", default="machine")
    """Who asks: `machine` or `server`."""


class OneOf(Written, frozen=True):
    """One machine of this role, whichever is there."""

    one_of: Name


class Step(Written, frozen=True):
    """A step: over machines (`roles`), on the server (`run_on`), or a question to people (`ask`)."""

    kinds: ClassVar[Mapping[str, Kind]] = {
        "roles": Kind(may=("deploy", "to", "keep", "strategy", "rotation", "apply", "verify", "on_failure")),
        "run_on": Kind(may=("deploy", "script", "commands", "on_rollback", *_Run)),
        "ask": Kind(may=("approvers", "minimum", "not_author", "expires", "on_expiry")),
    }
    name: Title
    """A title that no other step has."""
    roles: tuple[Name, ...] = ()
    """Machines that have one of these."""
    run_on: Literal["server"] | OneOf | None = None
    """`server`."""
    ask: Text | None = None
    """The question that the step waits with."""
    when: Literal["success", "failure", "always"] = "success"
    """Run it after `success`, `failure`, or `always`, of the steps before it."""
    required: bool = False
    """No machine of it can be left out from the command line."""

    deploy: Name | None = None
    """Name of a package. Over machines it is installed under `to`; on the server its verified tree is there as
    `PACKAGE_DIR`.
    """
    to: Text | None = None
    """Absolute folder on the machine."""
    keep: Annotated[int, Meta(ge=0, le=1000)] = 3
    """So many of the newest trees stay, and in any case the current one and the last good one."""
    strategy: Literal["parallel", "rolling"] | Strategy = "parallel"
    """`parallel`, `rolling` (one machine at a time), or a mapping `rolling:`."""
    rotation: Name | None = None
    """Name of a rotation in the environment."""
    apply: tuple[Literal["switch"] | Apply, ...] | None = None
    """What is done on the machine, in order. Default: `[switch]`."""
    verify: tuple[Check, ...] = ()
    """What must hold then."""
    on_failure: Literal["ask", "rollback", "stop"] | None = None
    """What is done about a machine whose new version is bad: `ask` a person (default), `rollback` to the old one, or
    `stop`: leave it out and fail.
    """

    script: ScriptPath | None = None
    commands: tuple[Command, ...] = ()
    timeout: Duration | None = None
    stall: Duration | None = None
    retry: Retry | None = None
    idempotent: bool = False
    secrets: tuple[Name, ...] = ()
    """On the server, as in `pre_acquire`."""
    on_rollback: ScriptPath | None = None
    """What going back to this release means for it: `skip`, a script that runs in its place (it sees `ROLLBACK=1`), or
    `refuse` (default): nobody may go back.
    """

    approvers: tuple[Text, ...] = ()
    minimum: Annotated[int, Meta(ge=1, le=100)] = 1
    not_author: bool = False
    expires: Duration | None = None
    on_expiry: Literal["pause", "stop", "proceed"] = "pause"
    """With `ask`: as in a gate."""


class Notify(Written, frozen=True):
    """A receiver and the events that it hears of, at a URL that stands here or in a secret."""

    kinds: ClassVar[Mapping[str, Kind]] = {"url": Kind(), "url_secret": Kind()}
    on: tuple[NotificationKind, ...]
    """Of `failed`, `finished`, `rotation_open` (machines are left out), `waiting` (for a person), `paused`."""
    url: Text | None = None
    url_secret: Name | None = None
    """Where; or the secret that holds the URL."""


class Process(Written, frozen=True, kw_only=True):
    """The whole of release.yaml."""

    format: Literal[1]
    """The form of this file: `1`."""
    project: ProjectName
    """A name; releases are told apart by project and label."""
    variables: dict[VariableName, Value | Prompt] = msgspec.field(default_factory=dict)
    """Name to text, number or truth value, or to a prompt."""
    secrets: dict[Name, Secret] = msgspec.field(default_factory=dict)
    """Name to who may see it: `available_to: server`, or `available_to: [ROLE, …]`, to whose machines it may be sent,
    sealed.
    """
    packages: dict[Name, PackageName | Package] = msgspec.field(default_factory=dict)
    """Name to a package id, or to a mapping, see below."""
    pre_acquire: tuple[PreAcquireStep, ...] = ()
    """Steps on the server before a byte moves."""
    acquire: Acquire = Acquire()
    """Limits of the acquisition."""
    steps: Annotated[tuple[Step, ...], Meta(min_length=1)]
    """At least one."""
    notify: tuple[Notify, ...] = ()
    """Who is told of what."""
    busy: Annotated[
        str,
        Meta(
            pattern=r"^(fail|replace|wait [0-9]{1,6}(s|m|h|d))$", description="fail, replace, or wait with a duration"
        ),
    ] = "fail"
    """What happens where another deployment runs there. Nothing but `fail` is built yet."""
    deadline: Duration | None = None
    """Of the whole deployment; after it nothing new starts."""


ProcessFile = LoadedFile[Process]


def load_process(path: str) -> ProcessFile:
    """Raises `PlanError` with every mistake of the file."""
    return load_as(path, Process, START)


def json_schema() -> dict[str, Any]:
    """JSON Schema of release.yaml, for editors."""
    return schema_of(Process)


def package_of(use: str | Package) -> Package:
    """The long form."""
    return Package(id=use) if isinstance(use, str) else use


def undo_of(step: PreAcquireStep) -> Undo | None:
    """The long form; a script in the short form has its step's secrets, time and tries."""
    if isinstance(step.undo, str):
        return Undo(script=step.undo, timeout=step.timeout, stall=step.stall, retry=step.retry, secrets=step.secrets)
    return step.undo


def rolling_of(strategy: Literal["parallel", "rolling"] | Strategy) -> Rolling | None:
    """The long form; None: in parallel."""
    if isinstance(strategy, Strategy):
        return strategy.rolling
    return Rolling() if strategy == "rolling" else None


def machine_scripts(process: ProcessFile) -> list[str]:
    """Paths of the scripts that go to machines, relative to the process file's folder, each once, as they come up."""
    paths: list[str | None] = []
    for step in process.value.steps:
        paths += [item.script for item in step.apply or () if isinstance(item, Apply)]
        paths += [check.command[0] for check in step.verify if check.command and check.from_ == "machine"]
    return list(dict.fromkeys(path for path in paths if path is not None))


def server_scripts(process: ProcessFile) -> list[str]:
    """Paths of the process's scripts that run on the server, relative to its folder, each once, as they come up."""
    paths: list[str | None] = []
    for early in process.value.pre_acquire:
        undo = undo_of(early)
        paths += [early.script, undo.script if undo else None]
    for step in process.value.steps:
        rolling = rolling_of(step.strategy)
        paths += [step.script, None if step.on_rollback in {"skip", "refuse"} else step.on_rollback]
        paths += [phase.gate.check for phase in (rolling.phases if rolling else ()) if phase.gate is not None]
    return list(dict.fromkeys(path for path in paths if path is not None))
