"""Events as text: one line each, whatever their fields hold. What came from outside can neither forge a line nor drive a
terminal, nor fill the disk, and a token or a password in it is masked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from relay.terminal.text import printable

Value = str | int | float | bool | tuple[str, ...] | None
"""Of a field."""

TEXT_MAX: Final = 400
"""Characters of one field."""
ITEMS_MAX: Final = 20
"""Of a list."""

_READ_MAX: Final = 16 * TEXT_MAX
_TOKEN = re.compile(r"wst_([0-9A-Fa-f]{8})_[A-Za-z0-9_%-]+")
_PASSWORD = re.compile(r"(://)[^/@\s]+@")
_BARE = re.compile(r"[^\s\"'=\\]+")


class Harmless(str):
    """Text that `harmless` has seen."""

    __slots__ = ()


def harmless(text: str, most: int = TEXT_MAX) -> Harmless:
    r"""`text` in one line of what can be seen: control characters, marks of direction and what has no glyph as `\u001b`,
    `\u202e`; tokens and passwords of URLs masked; no longer than `most`.
    """
    if isinstance(text, Harmless):
        return text
    text = _PASSWORD.sub(r"\1***@", _TOKEN.sub(r"wst_\1_***", text[: max(_READ_MAX, 2 * most)]))
    shown = printable(text[:most])
    return Harmless(shown if len(text) <= most and len(shown) <= most else shown[: most - 1] + "…")


def as_pairs(name: str, fields: Mapping[str, Value]) -> str:
    """`name key=value key="with blanks"`."""
    return " ".join([name, *(f"{key}={_quoted(value)}" for key, value in fields.items())])


def as_json(fields: Mapping[str, Value]) -> str:
    """One line of JSON."""
    return json.dumps({key: _plain(value) for key, value in fields.items()}, ensure_ascii=False, separators=(",", ":"))


def clock(seconds: float) -> str:
    """A time since 1970, in UTC to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quoted(value: Value) -> str:
    plain = _plain(value)
    if isinstance(plain, bool):
        return "true" if plain else "false"
    text = ", ".join(plain) if isinstance(plain, list) else str(plain)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _plain(value: Value) -> str | float | bool | list[str] | None:
    match value:
        case str():
            return harmless(value)
        case float():
            return round(value, 3)
        case tuple():
            more = [f"… {len(value) - ITEMS_MAX} more"] * (len(value) > ITEMS_MAX)
            return [*map(harmless, value[:ITEMS_MAX]), *more]
    return value
