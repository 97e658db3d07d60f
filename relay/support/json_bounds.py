"""Bounds on JSON from outside: how deep it nests, and that no object names a key twice. Linear in the text."""

from __future__ import annotations

import json
import re
import time
from itertools import accumulate

# Possessive, and content with the end of the text instead of the closing quote: every byte is looked at once.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+'
_ANY_STRING = re.compile(_STRING + rb'"?', re.DOTALL)
_MARK = re.compile(rb"(" + _STRING + rb'")([ \t\r\n]*+:)?|[{}]', re.DOTALL)
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""As signed bytes: one deeper, one up again."""
_NO_BRACES = bytes(set(range(256)) - set(b"[]{}"))
_SLICE = 16 << 10
"""Bytes looked at in one go: one go keeps every other thread from its turn, the event loop's too."""


class JsonTooDeepError(ValueError):
    """More nesting than agreed, more objects and lists, or brackets that are not closed."""


def check_depth(text: bytes, limit: int, most: int | None = None) -> None:
    """Refuse deep nesting, and more than `most` objects and lists, before anything parses the text.

    The first slice that is too deep is the last one looked at.

    Raises:
        JsonTooDeepError: nested deeper than `limit`, of more than `most`, or not closed.
    """
    gauge = _Gauge(limit, most)
    view = memoryview(text)
    for start in range(0, len(view), _SLICE):
        gauge.add(view[start : start + _SLICE])
        if start + _SLICE < len(view):
            # Whoever waits for the interpreter gets it now, and need not ask for it.
            time.sleep(0)
    if gauge.depth:
        raise JsonTooDeepError("its brackets are not closed")


class _Gauge:
    """Measures the nesting of JSON that comes slice by slice, and counts its objects and lists."""

    def __init__(self, limit: int, most: int | None) -> None:
        self.depth = 0
        self._limit = limit
        self._most = self._left = most
        self._begun = b""
        """What the text before ended with and the next slice goes on from: a quote in a string, a lone backslash."""

    def add(self, piece: bytes | memoryview) -> None:
        """Raises `JsonTooDeepError`."""
        text = self._begun + piece
        lone = (len(text) - len(text.rstrip(b"\\"))) % 2
        # Where the text ends in a string, the quote behind it closes that, and the x stays; else a string begins with it.
        bare = _ANY_STRING.sub(b"", text[: len(text) - lone] + b'"x')
        self._begun = (b'"' if bare.endswith(b"x") else b"") + b"\\" * lone
        brackets = bare.translate(_STEPS, _NO_BRACES)
        if self._left is not None:
            self._left -= brackets.count(b"\x01")
            if self._left < 0:
                raise JsonTooDeepError(f"more than {self._most} objects and lists")
        steps = memoryview(brackets).cast("b")
        depths = tuple(accumulate(steps, initial=self.depth))
        if max(depths) > self._limit or min(depths) < 0:
            raise JsonTooDeepError(f"nested deeper than {self._limit}, or not closed")
        self.depth = depths[-1]


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
