"""The names by which scripts see values: VAR_PORT, TAG_RACK, SECRET_LB_TOKEN. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OTHER = re.compile(r"[^A-Z0-9_]")


def environment_name(prefix: str, name: str) -> str:
    """`prefix` + name in upper case; other characters than A-Z, 0-9 and _ become _.

    ASCII only: names are ASCII by their grammar, and upper-casing differs between systems beyond it.
    """
    return prefix + _OTHER.sub("_", name.upper())


def clashes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that a script would see as one: the first that had it, and the one that came later."""
    seen: dict[str, str] = {}
    found = []
    for name in dict.fromkeys(names):
        first = seen.setdefault(environment_name("", name), name)
        if first != name:
            found.append((first, name))
    return found


def slug(text: str) -> str:
    """`text` as a part of an operation id: letters, digits, `.`, `_` and `-`, at most 63 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:63] or "step"
