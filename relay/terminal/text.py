"""Text for people: what came from elsewhere made safe to show, sizes, shares. Pure."""

from __future__ import annotations

from typing import Final

_SHORT: Final = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str, keep: str = "") -> str:
    """`text` as one line that drives no terminal: what has no glyph of its own is shown by its number.

    That is every control character, line separator, direction mark and format character (Unicode Cc, Cf, Cn, Co, Cs,
    Zl, Zp, and Zs but for the space). The escapes are those of JSON, so a JSON document stays one. Characters of `keep`
    stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(rf"\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def size(count: float) -> str:
    """Bytes for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError  # pragma: no cover - the loop returns


def share(part: int, whole: int, digits: int = 1) -> str:
    """`part` in percent of `whole`. More than all of it is no percentage that says anything: then by how much."""
    if not whole:
        return ""
    if part > whole:
        return f"all and {size(part - whole)}"
    return f"{100 * part / whole:.{digits}f} %"
