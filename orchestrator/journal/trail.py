"""Entries of a deployment's journal as events of the audit trail: `deployment.<kind>`, told once they are on the disk.

Of what checks saw, machines found and people typed, the journal alone knows: it may hold the value of a variable. So
events say that something failed, and `release status` why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final, get_args

import msgspec

from orchestrator.journal.events import (
    AskClosed,
    AskOpened,
    Ended,
    Event,
    Left,
    MachineAsked,
    Paused,
    Refused,
    RelayBehind,
    Reported,
    StepEnded,
    TurnDid,
    TurnEnded,
)
from relay.audit.event import Told, said, tell_fact
from relay.audit.shown import Value

KINDS: Final[tuple[type[Event], ...]] = get_args(Event)

_PRIVATE: Final = frozenset({"facts", "data", "lines", "why"})
_WITHOUT_REASON: Final = (Reported, TurnDid, TurnEnded, StepEnded, Ended, MachineAsked, AskClosed, Paused, Left)
"""Whose reason may be a check's, or what a person typed."""
_GRAVE: Final = (Refused, RelayBehind)


def tell_facts(deployment: str, facts: Iterable[Event], **more: Value) -> None:
    """Tell what the journal has now of this deployment; `more` are fields beside its own."""
    for fact in facts:
        shown = {name: _shown(getattr(fact, name)) for name in told_fields(type(fact))}
        fields = said({"deployment": deployment, **more, **shown})
        tell_fact(Told(name_of(type(fact)), fields, logging.WARNING if isinstance(fact, _GRAVE) else logging.INFO))


def name_of(kind: type[Event]) -> str:
    """Of the event that is told of such an entry."""
    return f"deployment.{kind.kind()}"


def told_fields(kind: type[Event]) -> tuple[str, ...]:
    """What the event has of such an entry, beside `deployment`."""
    private = _PRIVATE | ({"reason"} if kind in _WITHOUT_REASON else set()) | ({"text"} if kind is AskOpened else set())
    return tuple(name for name in kind.__struct_fields__ if name not in private)


def _shown(value: object) -> Value:
    match value:
        case str() | int() | float() | None:
            return value
        case dict():
            return tuple(f"{key}: {item}" for key, item in value.items())
        case tuple():
            return tuple(map(str, value))
    return msgspec.json.encode(value).decode()
