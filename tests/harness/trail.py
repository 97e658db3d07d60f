"""The audit trail as a reader of JSON lines has it."""

from __future__ import annotations

import json
from typing import Any

Line = dict[str, Any]


def events(log: str, name: str = "") -> list[Line]:
    """Every event that was told, or those of this name; a line that is none is an error."""
    found = [json.loads(line) for line in log.splitlines()]
    return [event for event in found if name in {"", event["event"]}]


def names(log: str) -> list[str]:
    return [event["event"] for event in events(log)]


def troubles(log: str) -> list[Line]:
    """What was told of that is graver than an act as any other."""
    return [event for event in events(log) if event["level"] not in {"info", "debug"}]
