"""Files of a release from their text."""

from __future__ import annotations

from orchestrator.files.decode import fit
from orchestrator.files.environment import Environment, EnvironmentFile
from orchestrator.files.process import Process, ProcessFile
from orchestrator.files.yaml_positions import parse


def parse_process(text: bytes, name: str, folder: str) -> ProcessFile:
    """A process which mistakes call `name`; its scripts stand below `folder`."""
    return fit(parse(text, name, folder), Process)


def parse_environment(text: bytes, name: str, folder: str) -> EnvironmentFile:
    """An environment, likewise."""
    return fit(parse(text, name, folder), Environment)
