"""Text that checks compare, as a person would read it: bytes to characters, and what nobody sees left out. Pure."""

from __future__ import annotations

import codecs
import unicodedata
from typing import Final

_MARKS: Final = (
    # That of UTF-32 begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CODECS: Final = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "iso8859-1": "cp1252", "ascii": "utf-8"}
"""Where a name leaves something open, as browsers read it (https://encoding.spec.whatwg.org/)."""


def read_text(data: bytes, declared: str | None = None) -> str:
    """The characters of `data`: by the mark at its beginning, else as `declared` (a charset's name), else as UTF-8."""
    for mark, codec in _MARKS:
        if data.startswith(mark):
            return plain(data[len(mark) :].decode(codec, "replace"))
    return plain(_decoded(data, declared or "utf-8"))


def plain(text: str) -> str:
    """Without a mark, each line's end a line feed, each letter in one form whether its accent was typed with it or not."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", lines.lstrip("\N{ZERO WIDTH NO-BREAK SPACE}"))


def trimmed(text: str) -> str:
    """A plain text without spaces around it and at the ends of its lines."""
    return _without_ends(text).strip()


def contains(text: str, part: str) -> bool:
    """Whether a plain text has this part, whatever the ends of lines inside of it. A space at the part's own end was meant."""
    part = _without_ends(part.strip("\n"))
    return part in text or part in _without_ends(text)


def _without_ends(text: str) -> str:
    """Without spaces before a line feed. (A pattern would look at each of a million spaces a million times.)"""
    *lines, last = text.split("\n")
    return "\n".join([*(line.rstrip() for line in lines), last])


def _decoded(data: bytes, declared: str) -> str:
    try:
        codec = codecs.lookup(declared.strip("\"' ")).name
        return data.decode(_CODECS.get(codec, codec), "replace")
    except (LookupError, ValueError):
        # No charset that is known, or no charset at all (Python has codecs that are none).
        return data.decode("utf-8", "replace")
