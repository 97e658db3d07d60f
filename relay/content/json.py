"""Bounds on JSON from outside, checked before anything parses it."""

from __future__ import annotations

import re

# A string that never ends matches to the end of the text, or each quote in it would start another long search.
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


class JsonTooDeepError(ValueError):
    """More nesting than agreed."""


def check_depth(text: bytes, limit: int) -> None:
    """Walk brackets outside of strings, in one linear pass.

    Raises:
        JsonTooDeepError: nested deeper than `limit`.
    """
    depth = 0
    for token in _STRUCTURE.finditer(text):
        first = token.group()[:1]
        if first in b"[{":
            depth += 1
            if depth > limit:
                raise JsonTooDeepError(f"nested deeper than {limit}")
        elif first in b"]}":
            depth -= 1
