"""What the files may say and this version cannot do: refused by name, so that it is never believed to be done."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.files.environment import EnvironmentFile, Machine
from orchestrator.files.process import OneOf, ProcessFile, package_of, rolling_of
from relay.written.yaml_positions import Mistake


def not_built(process: ProcessFile, environment: EnvironmentFile) -> Iterator[Mistake]:
    """Every place where one of the two asks for what is not built yet."""
    yield from _in_process(process)
    yield from _in_environment(environment)


def _in_process(file: ProcessFile) -> Iterator[Mistake]:
    process = file.value
    for name, use in process.packages.items():
        if package_of(use).via == "direct":
            yield _say(file, "via: direct", "packages", name, "via")
    if process.busy != "fail":
        yield _say(file, "busy: wait and busy: replace", "busy")
    for index, step in enumerate(process.steps):
        if isinstance(step.run_on, OneOf):
            yield _say(file, "run_on: one_of", "steps", index, "run_on")
        rolling = rolling_of(step.strategy)
        inside = ("steps", index, "strategy", "rolling")
        if rolling and rolling.max_per is not None:
            yield _say(file, "max_per", *inside, "max_per")


def _in_environment(file: EnvironmentFile) -> Iterator[Mistake]:
    environment = file.value
    if environment.requires is not None:
        yield _say(file, "requires", "requires")
    if environment.freeze:
        yield _say(file, "freeze", "freeze")
    for name, rotation in environment.rotation.items():
        if rotation.run_on == "machine":
            yield _say(file, "run_on: machine in a rotation", "rotation", name, "run_on")
    for name, source in environment.secrets.items():
        if source.command is not None:
            yield _say(file, "a secret from a command", "secrets", name, "command", instead="file or env")
        if source.credential is not None:
            yield _say(file, "a secret from a systemd credential", "secrets", name, "credential", instead="file or env")
    if any(name == "from" and not isinstance(machine, Machine) for name, machine in environment.machines.items()):
        yield _say(file, "machines from a command", "machines", "from", instead="a mapping of machines")


def _say(file: ProcessFile | EnvironmentFile, what: str, *path: str | int, instead: str = "") -> Mistake:
    remedy = f"use {instead}" if instead else "leave it out"
    return file.at(*path).mistake(f"{what} is not built yet: {remedy}")
