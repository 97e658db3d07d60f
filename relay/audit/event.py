"""An event: something that happened, by name and with fields. `tell` hands it to Python's logging, and that is all.

Each house declares its events as structs in a file `acts.py`: the docstring says when one is told, and the table in
docs/operations.md is made of it. A field is a fact: who, what, how much. It never holds a secret, a token or the value of
a variable; `shown.py` makes the rest harmless, whatever it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import msgspec

from relay.audit.shown import Value, as_pairs

LOGGER: Final = "waystation"
_log = logging.getLogger(LOGGER)


class Caller(msgspec.Struct, frozen=True):
    """Who asked: an event shows it as two fields of its own.

    Attributes:
        address: of the connection; behind a proxy that is the proxy's.
        token: the id of the token that was shown and is valid; empty where there was none.
    """

    address: str = ""
    token: str = ""


NOBODY: Final = Caller()


class Event(msgspec.Struct, frozen=True, tag_field="event"):
    """The base of every event. The tag is its name: `relay.ready`."""

    level: ClassVar[int] = logging.INFO
    alike: ClassVar[tuple[str, ...] | None] = None
    """Events that agree in these fields are alike: of those that repeat, one is told, then how many more there were.
    None: each one is told."""

    @classmethod
    def event_name(cls) -> str:
        return str(cls.__struct_config__.tag)


@dataclass(frozen=True, slots=True)
class Told:
    """What goes through logging as a record's message: its text is the event in one line, `name key=value …`.

    Attributes:
        alike: names of fields, as `Event` has them.
    """

    name: str
    fields: Mapping[str, Value]
    level: int = logging.INFO
    alike: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return as_pairs(self.name, self.fields)


def tell(event: Event, error: BaseException | None = None) -> None:
    """Tell what happened; with the traceback of `error`, where it is a mistake of ours."""
    if _log.isEnabledFor(event.level):
        tell_fact(Told(event.event_name(), fields_of(event), event.level, event.alike), error)


def tell_fact(told: Told, error: BaseException | None = None) -> None:
    """Tell what is declared elsewhere, as the entries of a journal are."""
    _log.log(told.level, told, exc_info=error)


def fields_of(event: msgspec.Struct) -> dict[str, Value]:
    """The fields by name."""
    found: dict[str, Value] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        found |= fields_of(value) if isinstance(value, Caller) else {name: value}
    return said(found)


def said(fields: Mapping[str, Value]) -> dict[str, Value]:
    """What is empty says nothing, and is left out."""
    return {name: value for name, value in fields.items() if value is not None and value not in ("", ())}
