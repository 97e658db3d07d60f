"""environments/NAME.yaml: machines, relays, rotations, secrets and rules, as operations write them. Strict.

What is not built yet stands here all the same and is loaded; `orchestrator/plan/unsupported.py` refuses it by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from orchestrator.files.decode import Kind, Written, fit, schema_of
from orchestrator.files.process import ProcessFile, Retry, Value, load_process
from orchestrator.files.values import Command, Duration, MachineName, Name, Rate, ScriptPath, Text, VariableName
from orchestrator.files.yaml_positions import LoadedFile, Mistake, PlanError, load

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
    """A relay. `generic`: it serves every site, after the site's own. `from`: the relay that it fetches packages from;
    without it they come from the origin. `limit`: how fast packages may come in.
    """

    url: Text
    site: Name | None = None
    token: Token | None = None
    ca_file: Text | None = None
    generic: bool = False
    from_: Name | None = msgspec.field(name="from", default=None)
    limit: Rate | None = None


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
    probe: ScriptPath | None = None
    secrets: tuple[Name, ...] = ()
    timeout: Duration | None = None
    retry: Retry | None = None
    run_on: Literal["server", "machine"] = "server"


class SecretFrom(Written, frozen=True):
    """Where a secret's value is."""

    kinds: ClassVar[Mapping[str, Kind]] = {"file": Kind(), "env": Kind(), "command": Kind(), "credential": Kind()}
    file: Text | None = None
    env: _VariableOfProcess | None = None
    command: Command | None = None
    credential: Name | None = None
    """Of systemd."""


class Machine(Written, frozen=True):
    """A machine. `key` is the fingerprint that `waystation agent init` printed there."""

    address: Annotated[str, Meta(min_length=1, max_length=255, description="an address or a host name")]
    site: Name
    roles: tuple[Name, ...] = ()
    key: Annotated[
        str,
        Meta(
            pattern=r"^(sha256:[0-9a-f]{64})?$",
            description="the fingerprint that 'waystation agent init' prints: sha256: and 64 hex digits",
        ),
    ] = ""
    tags: dict[Name, Value] = msgspec.field(default_factory=dict)
    variables: dict[VariableName, Value] = msgspec.field(default_factory=dict)


class Environment(Written, frozen=True):
    """The whole of an environment file. `machines: { from: COMMAND }` names a command that lists them."""

    environment: Name
    requires: Requires | None = None
    freeze: tuple[Freeze, ...] = ()
    relays: dict[Name, Relay] = msgspec.field(default_factory=dict)
    roles: dict[Name, Role] = msgspec.field(default_factory=dict)
    feeds: dict[Name, Feed] = msgspec.field(default_factory=dict)
    rotation: dict[Name, Rotation] = msgspec.field(default_factory=dict)
    secrets: dict[Name, SecretFrom] = msgspec.field(default_factory=dict)
    variables: dict[VariableName, Value] = msgspec.field(default_factory=dict)
    machines: dict[MachineName, Machine | Text | Command] = msgspec.field(default_factory=dict)


EnvironmentFile = LoadedFile[Environment]


def load_environment(path: str) -> EnvironmentFile:
    """Raises `PlanError` with every mistake of the file."""
    return fit(load(path), Environment)


def load_both(process_path: str, path: str) -> tuple[ProcessFile, EnvironmentFile]:
    """A process and an environment. Raises `PlanError` with every mistake of both."""
    mistakes: list[Mistake] = []
    try:
        process = load_process(process_path)
    except PlanError as error:
        mistakes += error.mistakes
    try:
        environment = load_environment(path)
    except PlanError as error:
        raise PlanError([*mistakes, *error.mistakes]) from error
    if mistakes:
        raise PlanError(mistakes)
    return process, environment


def json_schema() -> dict[str, Any]:
    """JSON Schema of an environment file, for editors."""
    return schema_of(Environment)


def environment_path(name: str) -> str:
    """What `--environment` means: the path of a file, or the name of one in the folder `environments`."""
    if os.sep in name or name.endswith((".yaml", ".yml")):
        return name
    return os.path.join("environments", f"{name}.yaml")
