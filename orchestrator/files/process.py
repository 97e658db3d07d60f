"""release.yaml: what a release does, as its project writes it. Strict; tests/orchestrator/data/whole.yaml shows every key.

What is not built yet stands here all the same and is loaded; `orchestrator/plan/unsupported.py` refuses it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from orchestrator.files.decode import Kind, Written, fit, schema_of
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
from orchestrator.files.yaml_positions import LoadedFile, load

_Count = Annotated[int, Meta(ge=0, le=100_000)]
_ActionName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="a name of letters, digits, '.', '_' and '-', at most 63 characters",
    ),
]
_Run = ("timeout", "retry", "idempotent", "secrets")

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
    via: Literal["relay", "direct"] = "relay"
    feed: Name | None = None


class Retry(Written, frozen=True):
    attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    delay: Duration = "10s"


class Undo(Written, frozen=True):
    """What undoes a step before acquisition; a path alone is short for `script`."""

    kinds: ClassVar[Mapping[str, Kind]] = {"script": Kind(), "commands": Kind()}
    script: ScriptPath | None = None
    commands: tuple[Command, ...] = ()
    timeout: Duration | None = None
    retry: Retry | None = None
    secrets: tuple[Name, ...] = ()


class PreAcquireStep(Written, frozen=True):
    """A step on the server before any byte moves."""

    kinds: ClassVar[Mapping[str, Kind]] = {"script": Kind(), "commands": Kind()}
    name: Title
    script: ScriptPath | None = None
    commands: tuple[Command, ...] = ()
    timeout: Duration | None = None
    retry: Retry | None = None
    idempotent: bool = False
    secrets: tuple[Name, ...] = ()
    undo: ScriptPath | Undo | None = None
    until: Literal["finished", "acquired"] = "finished"


class Offline(Written, frozen=True):
    """Machines that may be left out where they cannot be reached."""

    action: Literal["skip"]
    at_most: _Count | None = None
    roles: tuple[Name, ...] = ()


class Acquire(Written, frozen=True):
    """Bringing every package to every machine: `per_relay` machines of one site pull at one time."""

    deadline: Duration = "30m"
    stall: Duration = "60s"
    per_relay: Annotated[int, Meta(ge=1, le=1000)] = 20
    offline: Offline | None = None


class Gate(Written, frozen=True):
    """Where a phase waits for a check or for people."""

    name: Title
    check: ScriptPath | None = None
    ask: Text | None = None
    approvers: tuple[Text, ...] = ()
    minimum: Annotated[int, Meta(ge=1, le=100)] = 1
    not_author: bool = False
    expires: Duration | None = None
    on_expiry: Literal["pause", "stop", "proceed"] = "pause"


class Phase(Written, frozen=True):
    """A stretch of a rolling step: so many machines (without it: all that are left), `window` of them at a time."""

    machines: Share | None = None
    window: Share = 1
    gate: Gate | None = None


class MaxPer(Written, frozen=True):
    """Never more than `machines` in flight that have the same value of this tag."""

    tag: Name
    machines: Annotated[int, Meta(ge=1)] = 1


class Rolling(Written, frozen=True):
    """How a step rolls: one `window` for all machines, or `phases`."""

    window: Share | None = None
    phases: tuple[Phase, ...] = ()
    min_in_service: _Count = 0
    max_failures: _Count = 0
    order: tuple[Name, ...] = ("unhealthy", "name")
    max_per: MaxPer | None = None


class Strategy(Written, frozen=True):
    rolling: Rolling


class Apply(Written, frozen=True):
    """Something done on the machine: a script, or an action of its service manager."""

    kinds: ClassVar[Mapping[str, Kind]] = {"script": Kind(may=("secrets",)), "service": Kind(needs=("action",))}
    name: _ActionName | None = None
    script: ScriptPath | None = None
    service: Text | None = None
    action: Literal["start", "stop", "restart", "reload"] | None = None
    timeout: Duration | None = None
    retry: Retry | None = None
    idempotent: bool = False
    secrets: tuple[Name, ...] = ()


class Check(Written, frozen=True):
    """What must hold once a machine was deployed to, for a stretch of time, within a deadline.

    `from: server`: the server asks; else the machine's agent does. A `command` begins with a program of the server, or,
    on a machine, with the path of a script of this process, which travels signed as all that machines run.
    """

    kinds: ClassVar[Mapping[str, Kind]] = {
        "http": Kind(may=("expect", "contains", "status")),
        "tcp": Kind(),
        "command": Kind(),
        "service": Kind(),
    }
    http: Text | None = None
    tcp: Text | None = None
    command: Command | None = None
    service: Text | None = None
    expect: str | None = None
    contains: str | None = None
    status: Annotated[int, Meta(ge=100, le=599)] = 200
    lasting: Duration = msgspec.field(name="for", default="0s")
    deadline: Duration = "60s"
    timeout: Duration = "10s"
    from_: Literal["machine", "server"] = msgspec.field(name="from", default="machine")


class OneOf(Written, frozen=True):
    """One machine of this role, whichever is there."""

    one_of: Name


class Step(Written, frozen=True):
    """A step: over machines (`roles`), on the server (`run_on`), or a question to people (`ask`)."""

    kinds: ClassVar[Mapping[str, Kind]] = {
        "roles": Kind(may=("deploy", "to", "keep", "strategy", "rotation", "apply", "verify", "on_failure")),
        "run_on": Kind(may=("deploy", "script", "commands", *_Run)),
        "ask": Kind(may=("approvers", "minimum", "not_author", "expires", "on_expiry")),
    }
    name: Title
    roles: tuple[Name, ...] = ()
    run_on: Literal["server"] | OneOf | None = None
    ask: Text | None = None
    when: Literal["success", "failure", "always"] = "success"
    required: bool = False

    deploy: Name | None = None
    to: Text | None = None
    keep: Annotated[int, Meta(ge=0, le=1000)] = 3
    strategy: Literal["parallel", "rolling"] | Strategy = "parallel"
    rotation: Name | None = None
    apply: tuple[Literal["switch"] | Apply, ...] | None = None
    verify: tuple[Check, ...] = ()
    on_failure: Literal["ask", "rollback", "stop"] | None = None

    script: ScriptPath | None = None
    commands: tuple[Command, ...] = ()
    timeout: Duration | None = None
    retry: Retry | None = None
    idempotent: bool = False
    secrets: tuple[Name, ...] = ()

    approvers: tuple[Text, ...] = ()
    minimum: Annotated[int, Meta(ge=1, le=100)] = 1
    not_author: bool = False
    expires: Duration | None = None
    on_expiry: Literal["pause", "stop", "proceed"] = "pause"


class Notify(Written, frozen=True):
    """Who is told of what, at a URL that stands here or in a secret."""

    kinds: ClassVar[Mapping[str, Kind]] = {"url": Kind(), "url_secret": Kind()}
    on: tuple[NotificationKind, ...]
    url: Text | None = None
    url_secret: Name | None = None


class Process(Written, frozen=True, kw_only=True):
    """The whole of release.yaml."""

    format: Literal[1]
    project: ProjectName
    variables: dict[VariableName, Value | Prompt] = msgspec.field(default_factory=dict)
    secrets: dict[Name, Secret] = msgspec.field(default_factory=dict)
    packages: dict[Name, PackageName | Package] = msgspec.field(default_factory=dict)
    pre_acquire: tuple[PreAcquireStep, ...] = ()
    acquire: Acquire = Acquire()
    steps: Annotated[tuple[Step, ...], Meta(min_length=1)]
    notify: tuple[Notify, ...] = ()
    busy: Annotated[
        str,
        Meta(
            pattern=r"^(fail|replace|wait [0-9]{1,6}(s|m|h|d))$", description="fail, replace, or wait with a duration"
        ),
    ] = "fail"
    deadline: Duration | None = None


ProcessFile = LoadedFile[Process]


def load_process(path: str) -> ProcessFile:
    """Raises `PlanError` with every mistake of the file."""
    return fit(load(path), Process)


def json_schema() -> dict[str, Any]:
    """JSON Schema of release.yaml, for editors."""
    return schema_of(Process)


def package_of(use: str | Package) -> Package:
    """The long form."""
    return Package(id=use) if isinstance(use, str) else use


def undo_of(step: PreAcquireStep) -> Undo | None:
    """The long form; a script in the short form has its step's secrets, time and tries."""
    if isinstance(step.undo, str):
        return Undo(script=step.undo, timeout=step.timeout, retry=step.retry, secrets=step.secrets)
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
    paths += [step.script for step in process.value.steps]
    return list(dict.fromkeys(path for path in paths if path is not None))
