"""Bounds on JSON from outside: how deep it nests, and that no object names a key twice. Linear in the text."""

from __future__ import annotations

import json
import re

# Possessive, and content with the end of the text instead of the closing quote: every byte is looked at once.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+'
_ANY_STRING = re.compile(_STRING + rb'"?', re.DOTALL)
_MARK = re.compile(rb"(" + _STRING + rb'")([ \t\r\n]*+:)?|[{}]', re.DOTALL)
_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_NO_BRACES = bytes(set(range(256)) - set(b"[]{}"))


class JsonTooDeepError(ValueError):
    """More nesting than agreed, or brackets that are not closed."""


def check_depth(text: bytes, limit: int) -> None:
    """Refuse deep nesting before anything parses the text.

    Strings are taken out, and all but the brackets; then each round takes out the innermost pairs, one level.

    Raises:
        JsonTooDeepError: nested deeper than `limit`, or not closed.
    """
    braces = _ANY_STRING.sub(b"", text).translate(_TO_BRACES, _NO_BRACES)
    for _ in range(limit):
        if not braces:
            return
        braces = braces.replace(b"{}", b"")
    if braces:
        raise JsonTooDeepError(f"nested deeper than {limit}, or not closed")


def repeats_a_key(raw: bytes) -> bool:
    """Whether an object of the valid JSON text `raw` has a key twice, however it is spelled."""
    outer: list[set[bytes]] = []
    keys: set[bytes] = set()
    for mark in _MARK.finditer(raw):
        if mark[0] == b"{":
            outer.append(keys)
            keys = set()
        elif mark[0] == b"}":
            keys = outer.pop()
        elif mark[2]:
            key = mark[1] if b"\\" not in mark[1] else json.dumps(json.loads(mark[1]), ensure_ascii=False).encode()
            if key in keys:
                return True
            keys.add(key)
    return False
