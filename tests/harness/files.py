"""Files of a release from their text."""

from __future__ import annotations

from orchestrator.files.environment import Environment, EnvironmentFile
from orchestrator.files.process import Process, ProcessFile
from relay.written.decode import fit
from relay.written.yaml_positions import parse


def parse_process(text: bytes, name: str, folder: str) -> ProcessFile:
    """A process which mistakes call `name`; its scripts stand below `folder`."""
    return fit(parse(text, name, folder), Process)


def parse_environment(text: bytes, name: str, folder: str) -> EnvironmentFile:
    """An environment, likewise."""
    return fit(parse(text, name, folder), Environment)
