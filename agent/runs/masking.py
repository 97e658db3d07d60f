"""Secrets are taken out of a stream of output, also where a piece ends in the middle of one.

Pure, and cheap to import by the runner: nothing but built-in modules at the top.

A byte is masked when it belongs to any occurrence of any pattern, so that of two secrets that overlap neither shows its
end; occurrences that overlap make one mask. What may still become an occurrence (the stream ends with the beginning of a
pattern) is held back, and `flush` gives it out when it was held for too long.
"""

from __future__ import annotations

import binascii

TYPE_CHECKING = False  # `typing` costs the runner more than all the rest of this module
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MASK = b"********"
SHORTEST = 4
"""Characters. A shorter secret would mask half of every output, and is no secret."""


class Masker:
    """A stream on its way: bytes go in by `feed`, masked bytes come out, fewer than the longest pattern behind."""

    def __init__(self, values: Iterable[str]) -> None:
        """Mask `values` in every form of `patterns_of`.

        Raises:
            UsageError: one of them is shorter than 4 characters.
        """
        self._patterns = sorted({pattern for value in values for pattern in patterns_of(value)})
        self._heads: dict[bytes, list[bytes]] = {}
        for pattern in self._patterns:
            self._heads.setdefault(pattern[:SHORTEST], []).append(pattern)
        self._short_beginnings = {head[:size] for head in self._heads for size in range(1, SHORTEST)}
        self._longest = max(map(len, self._patterns), default=0)
        # What came in and may belong to an occurrence. Its first `_told` bytes were given out already: the end of them
        # as a mask (`_masked`), or as it is.
        self._kept = b""
        self._told = 0
        self._masked = False

    @property
    def held(self) -> int:
        """Bytes that came in, and of which nothing was shown yet."""
        return len(self._kept) - self._told

    def feed(self, data: bytes) -> bytes:
        """What may be shown now."""
        if not self._patterns:
            return data
        self._kept += data
        limit = min(self._beginnings(), default=len(self._kept))
        shown, told = self._show(self._occurrences(), limit)
        self._kept, self._told = self._kept[limit:], told - limit
        return shown

    def flush(self) -> bytes:
        """Give out what is held, because it was held for long enough.

        The beginning of a secret is taken for a secret when it has 4 bytes or more. A shorter one is shown, and if the
        secret does go on, its rest is masked: it is never shown whole, however slowly it is written.
        """
        end = len(self._kept)
        presumed = [(start, end) for start in self._beginnings() if end - start >= SHORTEST]
        shown, self._told = self._show([*self._occurrences(), *presumed], end)
        return shown

    def close(self) -> bytes:
        """The last bytes: nothing comes after them."""
        shown, _ = self._show(self._occurrences(), len(self._kept))
        self._kept, self._told = b"", 0
        return shown

    def _show(self, spans: Iterable[tuple[int, int]], limit: int) -> tuple[bytes, int]:
        """All that lies before `limit` and was not told, with the spans that begin there masked; and how far it told."""
        out = []
        told = self._told
        for start, end in _merged(span for span in spans if span[0] < limit):
            if end <= told:
                continue
            if start >= told:
                out += [self._kept[told:start], MASK]
            elif not self._masked:
                out.append(MASK)
            told, self._masked = end, True
        if told < limit:
            out.append(self._kept[told:limit])
            told, self._masked = limit, False
        return b"".join(out), told

    def _occurrences(self) -> Iterator[tuple[int, int]]:
        for pattern in self._patterns:
            start = self._kept.find(pattern)
            while start >= 0:
                yield start, start + len(pattern)
                start = self._kept.find(pattern, start + 1)

    def _beginnings(self) -> set[int]:
        """Where the rest of what is kept is the beginning of a pattern, and not the whole of it."""
        kept, size = self._kept, len(self._kept)
        found = {size - n for n in range(1, min(SHORTEST, size + 1)) if kept[-n:] in self._short_beginnings}
        for head, patterns in self._heads.items():
            start = kept.find(head, max(0, size - self._longest + 1))
            while start >= 0:
                rest = kept[start:]
                if any(len(pattern) > len(rest) and pattern.startswith(rest) for pattern in patterns):
                    found.add(start)
                start = kept.find(head, start + 1)
        return found


def _merged(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans that overlap as one, in order. Those that only touch stay two."""
    last: tuple[int, int] | None = None
    for start, end in sorted(spans):
        if last and start < last[1]:
            last = last[0], max(last[1], end)
            continue
        if last:
            yield last
        last = start, end
    if last:
        yield last


# --- the forms of a secret


def patterns_of(value: str) -> set[bytes]:
    """What must not be shown: the value, each of its lines, and both in base64 and URL coding.

    Lines, and pieces of base64, that are shorter than 4 bytes are left out: they would mask what is no secret.

    Raises:
        UsageError: the value is shorter than 4 characters.
    """
    if len(value) < SHORTEST:
        from relay.errors import UsageError

        raise UsageError("a secret must have at least 4 characters: a shorter one cannot be masked in output")
    whole = value.encode("utf-8", "surrogateescape")
    lines = {line.strip() for line in whole.splitlines()}
    return {form for form in {whole, *lines, *_base64(whole), *_url_coded(whole)} if len(form) >= SHORTEST}


def _base64(data: bytes) -> Iterator[bytes]:
    """Every text that shows `data` in base64, also as a part of something longer.

    Three bytes make four characters (RFC 4648), so there are three ways to lie; the characters at either end that
    depend on the neighbours are left out. Both alphabets, with and without padding, and broken into lines.
    """
    for before in range(3):
        coded = binascii.b2a_base64(bytes(before) + data, newline=False)
        first = -(-before * 8 // 6)
        inner = coded[first : (before + len(data)) * 8 // 6]
        for text in (inner, coded[first:], coded[first:].rstrip(b"=")):
            yield from (text, text.translate(_TO_URL_ALPHABET))
    coded = binascii.b2a_base64(data, newline=False)
    for width in (64, 76):  # as `openssl` breaks lines, and as MIME and `base64` do
        for start in range(0, len(coded), width):
            yield coded[start : start + width]


_TO_URL_ALPHABET = bytes.maketrans(b"+/", b"-_")


def _url_coded(data: bytes) -> Iterator[bytes]:
    """Percent-coded (RFC 3986) as the usual writers do it: they differ in what they leave as it is."""
    for left in (b"-._~", b"-._~/", b"-._~!*'()", b"-._*"):
        for code in ("%%%02X", "%%%02x"):
            text = b"".join(
                bytes((byte,)) if byte in left or bytes((byte,)).isalnum() else (code % byte).encode() for byte in data
            )
            yield text
            yield text.replace(b"%20", b"+")
