"""environments/NAME.yaml: machines, relays, rotations, secrets and rules, as operations write them. Strict.

What is not built yet stands here all the same and is loaded; `orchestrator/plan/unsupported.py` refuses it by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from orchestrator.files.process import START, Process, ProcessFile, Retry, Value
from orchestrator.files.values import (
    Command,
    Duration,
    MachineName,
    Name,
    PersonName,
    Rate,
    ScriptPath,
    Text,
    VariableName,
)
from relay.written.decode import Kind, Written, fit_with_stand_ins, load_as, schema_of
from relay.written.yaml_positions import LoadedFile, Mistake, PlanError, load, sorted_mistakes

T = TypeVar("T", Process, "Environment")
_Date = Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", description="a date such as 2026-12-20")]
_VariableOfProcess = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$", description="the name of an environment variable")
]


class Requires(Written, frozen=True):
    """The same release must have succeeded in that environment."""

    environment: Name
    within: Duration | None = None


class Freeze(Written, frozen=True):
    """From the first day to the last, nothing is deployed."""

    from_: _Date = msgspec.field(name="from")
    to: _Date
    reason: Text
    override: Text | None = None


class Token(Written, frozen=True):
    """Where a relay's bearer token is."""

    kinds: ClassVar[Mapping[str, Kind]] = {"file": Kind(), "env": Kind()}
    file: Text | None = None
    env: _VariableOfProcess | None = None


class Relay(Written, frozen=True):
    """Where packages are kept for the machines of a site."""

    url: Text
    """Such as `https://relay.example:7443`."""
    site: Name | None = None
    """Whose machines it serves."""
    token: Token | None = None
    """`file` or `env`: a bearer token with the scopes `write` and `order`."""
    ca_file: Text | None = None
    """PEM of its authority, where it is a private one."""
    plain_http: bool = False
    """It is given its token over plain http, too. Beyond this machine none is sent without it."""
    generic: bool = False
    """It serves every site, after the site's own relays."""
    from_: Name | None = msgspec.field(name="from", default=None)
    """Name of the relay that it fetches packages from; without it the origin sends them. Each byte then leaves the
    origin once, however many relays there are below. A relay on the way that fails is routed around.
    """
    limit: Rate | None = None
    """How fast packages may come in: `50Mbit`, `800kbit`, `1Gbit`; a bare number is in Mbit/s."""
    prefer: Literal["bytes", "time"] = "bytes"
    """What the origin sends it, of encodings that are about as fast: fewer `bytes` where times are within 10 %, or what is
    there first (`time`).
    """


class Role(Written, frozen=True):
    variables: dict[VariableName, Value] = msgspec.field(default_factory=dict)


class Feed(Written, frozen=True):
    """A NuGet V3 feed: the URL of its index.json. `secret`: `user:password`, or a token alone."""

    url: Text
    secret: Name | None = None


class Rotation(Written, frozen=True):
    """How machines leave their load balancer and come back. The scripts run on the server."""

    before: ScriptPath
    after: ScriptPath
    """Scripts, below this file's folder."""
    probe: ScriptPath | None = None
    """A script that says whether a machine is in service."""
    secrets: tuple[Name, ...] = ()
    """Names; only these scripts see them, and no process can ask for them."""
    timeout: Duration | None = None
    """Of one attempt. Default: `10m`."""
    stall: Duration | None = None
    """It is ended as stalled where it prints nothing for so long. Without it, only its time counts."""
    retry: Retry | None = None
    """`attempts`, `delay`."""
    run_on: Literal["server", "machine"] = "server"
    """Where its scripts run; `machine` is not built yet."""


class SecretFrom(Written, frozen=True):
    """Where a secret's value is."""

    kinds: ClassVar[Mapping[str, Kind]] = {"file": Kind(), "env": Kind(), "command": Kind(), "credential": Kind()}
    file: Text | None = None
    env: _VariableOfProcess | None = None
    command: Command | None = None
    credential: Name | None = None
    """Of systemd."""


class Machine(Written, frozen=True):
    """Where a release is installed."""

    address: Annotated[str, Meta(min_length=1, max_length=255, description="an address or a host name")]
    """For checks and scripts; Waystation itself never connects to it."""
    site: Name
    """Its relays are those of this site, then the generic ones, in the file's order."""
    roles: tuple[Name, ...] = ()
    """Which steps concern it."""
    key: Annotated[
        str,
        Meta(
            pattern=r"^(sha256:[0-9a-f]{64})?$",
            description="the fingerprint that 'waystation agent init' prints: sha256: and 64 hex digits",
        ),
    ] = ""
    """The fingerprint that `waystation agent init` printed there."""
    tags: dict[Name, Value] = msgspec.field(default_factory=dict)
    """Seen as `TAG_…`."""
    variables: dict[VariableName, Value] = msgspec.field(default_factory=dict)
    """They win over those of its roles."""


class Environment(Written, frozen=True):
    """The whole of an environment file. `machines: { from: COMMAND }` names a command that lists them."""

    environment: Name
    """Its name; an order key may be pinned for some environments only."""
    requires: Requires | None = None
    freeze: tuple[Freeze, ...] = ()
    """Not built yet."""
    relays: dict[Name, Relay] = msgspec.field(default_factory=dict)
    """Name to a relay."""
    roles: dict[Name, Role] = msgspec.field(default_factory=dict)
    """Name to `variables` that its machines have."""
    feeds: dict[Name, Feed] = msgspec.field(default_factory=dict)
    """Name to `url` (a NuGet V3 `index.json`) and `secret` (`user:password`, or a token alone)."""
    rotation: dict[Name, Rotation] = msgspec.field(default_factory=dict)
    """Name to how a machine leaves and comes back."""
    secrets: dict[Name, SecretFrom] = msgspec.field(default_factory=dict)
    """Name to where the value is: `file` or `env`."""
    variables: dict[VariableName, Value] = msgspec.field(default_factory=dict)
    """They win over the process's."""
    teams: dict[Name, tuple[PersonName, ...]] = msgspec.field(default_factory=dict)
    """Name to names of people, as `waystation trust person` gave them keys; a process asks them as `team:NAME`."""
    machines: dict[MachineName, Machine | Text | Command] = msgspec.field(default_factory=dict)
    """Name to a machine."""


EnvironmentFile = LoadedFile[Environment]


def load_environment(path: str) -> EnvironmentFile:
    """Raises `PlanError` with every mistake of the file."""
    return load_as(path, Environment, START)


def read_both(process_path: str, path: str) -> tuple[ProcessFile, EnvironmentFile]:
    """A process and an environment, with their mistakes, for the plan to tell with its own: nothing else may use them.

    Raises:
        PlanError: one of them cannot be read at all; with every mistake of both.
    """
    process, mistakes = _read(process_path, Process)
    environment, others = _read(path, Environment)
    if process is None or environment is None:
        raise PlanError(sorted_mistakes([*mistakes, *others], [process_path, path]))
    return process, environment


def check_both(process: ProcessFile, environment: EnvironmentFile) -> None:
    """Raises `PlanError` with every mistake of both, where no plan will tell them."""
    mistakes = [*process.mistakes, *environment.mistakes]
    if mistakes:
        raise PlanError(sorted_mistakes(mistakes, [process.name, environment.name]))


def _read(path: str, type: type[T]) -> tuple[LoadedFile[T] | None, tuple[Mistake, ...]]:
    """None where nothing can be said of the rest."""
    try:
        found = fit_with_stand_ins(load(path, START), type)
    except PlanError as error:
        return None, error.mistakes
    return found, found.mistakes


def json_schema() -> dict[str, Any]:
    """JSON Schema of an environment file, for editors."""
    return schema_of(Environment)


def environment_path(name: str) -> str:
    """What `--environment` means: the path of a file, or the name of one in the folder `environments`."""
    if os.sep in name or name.endswith((".yaml", ".yml")):
        return name
    return os.path.join("environments", f"{name}.yaml")
