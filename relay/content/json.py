"""Bounds on JSON from outside, checked before anything parses it."""

from __future__ import annotations

import re

# Possessive, and content with the end of the text instead of the closing quote: every byte is looked at once.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_NO_BRACES = bytes(set(range(256)) - set(b"[]{}"))


class JsonTooDeepError(ValueError):
    """More nesting than agreed, or brackets that do not pair."""


def check_depth(text: bytes, limit: int) -> None:
    """Refuse text that a parser might recurse into too deep; what passes need not be JSON.

    Strings are taken out, and all but the brackets; then each round takes out the innermost pairs, one level.

    Raises:
        JsonTooDeepError: nested deeper than `limit`, or brackets that do not pair.
    """
    braces = _STRING.sub(b"", text).translate(_TO_BRACES, _NO_BRACES)
    for _ in range(limit):
        if not braces:
            return
        braces = braces.replace(b"{}", b"")
    if braces:
        raise JsonTooDeepError(f"nested deeper than {limit}, or brackets that do not pair")
