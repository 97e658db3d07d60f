r"""What a piece of output says where a tool wrote it in a notation of its own: `\u0041`, `&#65;`, `%41`, `'\''`.

A reading is the text behind one notation, and knows of each of its bytes where it stands in what was written. Readings are
made of readings, as tools wrap each other's output: JSON in JSON, a query in a page.

Pure, and cheap to import by the runner. The tables are regular expressions, so that the processor's time goes with how
much is escaped, not with how much is printed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from html.entities import html5
from itertools import accumulate

TYPE_CHECKING = False  # `typing` costs the runner more than all the rest of this module
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_TOKENS_KEPT = 4096
"""What so many different tokens stand for is remembered: most output has few of them, and each of those often."""


class Notation(dict[bytes, bytes]):
    """One way of writing characters as something else: what each token of it stands for.

    Attributes:
        marks: a text without one of these bytes has nothing of this notation.
        token: a regular expression for one written character.
        begun: the same for what may become one (or another one) with the bytes that follow; up to the end of the text.
        longest: bytes of the longest token.
        makes: what a token may stand for; None: anything.
    """

    __slots__ = ("_plain", "begun", "longest", "makes", "marks", "token")

    def __init__(
        self,
        marks: bytes,
        token: bytes,
        begun: bytes,
        longest: int,
        plain: Callable[[bytes], bytes],
        makes: bytes | None = None,
    ) -> None:
        super().__init__()
        self.marks = [marks[i : i + 1] for i in range(len(marks))]
        self.token = re.compile(b"(" + token + b")", re.DOTALL)
        self.begun = re.compile(b"(?:" + begun + rb")\Z", re.DOTALL)
        self.longest = longest
        self.makes = makes
        self._plain = plain

    def __missing__(self, token: bytes) -> bytes:
        plain = self._plain(token)
        if len(self) < _TOKENS_KEPT:
            self[token] = plain
        return plain


class Reading:
    """`text`, made of the text of `parent` (the bytes as they were written, where there is none).

    Attributes:
        shows: something of it may be what is looked for, and stands in no text that it was made of.
        held: where, in what was written, something begins that only the next bytes tell; None where there is no such
            thing.
        notation: by which it was read.
    """

    __slots__ = ("_map", "_parent", "_plain", "_written", "held", "notation", "shows", "text")

    def __init__(
        self,
        text: bytes,
        parent: Reading | None = None,
        notation: Notation | None = None,
        written: Sequence[bytes] = (),
        plain: Sequence[bytes] = (),
        undecided: int | None = None,
        *,
        shows: bool = True,
    ) -> None:
        """`written` and `plain` are the parent's text and this one in pieces: every other one is a token."""
        self.text = text
        self.notation = notation
        self.shows = shows
        self._parent = parent
        self._written = written
        self._plain = plain
        self._map: tuple[list[int], list[int], list[int], list[int]] | None = None
        self.held = None if undecided is None or parent is None else parent.start(undecided)

    def start(self, offset: int) -> int:
        """Where, in what was written, the byte at `offset` begins."""
        if self._parent is None:
            return offset
        froms, tos, starts, ends = self._tokens()
        i = bisect_right(starts, offset) - 1
        if i >= 0:
            offset = froms[i] if offset < ends[i] else tos[i] + offset - ends[i]
        return self._parent.start(offset)

    def end(self, offset: int) -> int:
        """Where, in what was written, the byte before `offset` ends."""
        if self._parent is None:
            return offset
        _, tos, starts, ends = self._tokens()
        i = bisect_right(starts, offset - 1) - 1
        if i >= 0:
            offset = tos[i] if offset - 1 < ends[i] else tos[i] + offset - ends[i]
        return self._parent.end(offset)

    def floor(self, written: int) -> int:
        """`written`, or where the character begins in whose middle that is."""
        offset = self.offset_at(written)
        return written if offset >= len(self.text) else self.start(offset)

    def offset_at(self, written: int) -> int:
        """Where this text has what was written there: the first byte of a character in whose middle that is."""
        if self._parent is None:
            return written
        at = self._parent.offset_at(written)
        froms, tos, starts, ends = self._tokens()
        i = bisect_right(froms, at) - 1
        if i < 0:
            return at
        return starts[i] if at < tos[i] else ends[i] + at - tos[i]

    def _tokens(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """From and to where tokens stand in the parent's text, and then in this one. Seldom asked for."""
        if self._map is None:
            there, here = (list(accumulate(map(len, pieces))) for pieces in (self._written, self._plain))
            count = len(there) // 2
            self._map = there[0::2][:count], there[1::2], here[0::2][:count], here[1::2]
        return self._map


def read(parent: Reading, notation: Notation, wanted: Wanted, *, final: bool) -> Reading | None:
    """The text of `parent` by this notation; None where there is nothing of it. `final`: nothing comes after it."""
    text = parent.text
    if not any(mark in text for mark in notation.marks):
        return None
    written = notation.token.split(text)
    undecided = None
    if not final and (undecided := _undecided(text, written, notation)) is not None:
        written = notation.token.split(text[:undecided])
    tokens = written[1::2]
    if not tokens and undecided is None:
        return None
    plain = written.copy()
    plain[1::2] = map(notation.__getitem__, tokens)
    shows = wanted.has_any({notation[token] for token in set(tokens)})
    return Reading(b"".join(plain), parent, notation, written, plain, undecided, shows=shows)


class Wanted:
    """Which bytes are worth reading: those of the forms that are looked for, white space between the characters of a
    code, and what tokens of other notations are made of. Of most escapes in a log, which are quotes, nothing is.
    """

    def __init__(self, forms: Iterable[bytes]) -> None:
        signs = set(b"".join(forms))
        self.notations = (*_ANY, *(notation for some, notation in _FOR_SIGNS if signs.intersection(some)))
        marks = {mark[0] for notation in self.notations for mark in notation.marks}
        self._bytes = signs | marks | _OF_TOKENS
        if _SHELL_QUOTES in self.notations:
            self._bytes |= {0x22}

    def has_any(self, plain: set[bytes]) -> bool:
        """Whether one of `plain` is worth it. One that is empty joins what is beside it."""
        return b"" in plain or not self._bytes.isdisjoint(b"".join(plain))


def _undecided(text: bytes, written: list[bytes], notation: Notation) -> int | None:
    """Where a token begins of which more may follow; it and all after it are read with the next bytes."""
    first = max(0, len(text) - notation.longest)
    at = len(text) - len(written[-1])
    begun = notation.begun.search(text, max(first, at))
    found = None if begun is None else begun.start()
    for i in range(len(written) - 2, 0, -2):
        at -= len(written[i])
        if at < first:
            break
        if notation.begun.match(text, at):
            found = at
        at -= len(written[i - 1])
    return found


def readings_of(written: bytes, wanted: Wanted, *, final: bool) -> Iterator[Reading]:
    """All readings, from the bytes as they were written to a notation within a notation, and JSON three times over."""
    root = Reading(written)
    yield root
    for outer in _within(root, wanted.notations, wanted, final=final):
        yield outer
        for inner in _within(outer, wanted.notations, wanted, final=final):
            yield inner
            if outer.notation is inner.notation is BACKSLASH:
                yield from _within(inner, (BACKSLASH,), wanted, final=final)


def _within(parent: Reading, notations: Iterable[Notation], wanted: Wanted, *, final: bool) -> Iterator[Reading]:
    """None in a reading that shows nothing; but what it holds back may belong to another notation, too."""
    if parent.shows or parent.held is not None:
        yield from filter(None, (read(parent, notation, wanted, final=final) for notation in notations))


# --- the notations


_CONTROLS = {b"a": b"\a", b"b": b"\b", b"e": b"\x1b", b"E": b"\x1b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}  # fmt: skip
_OF_TOKENS = frozenset(b" \t\r\n:#;{}0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_BYTES = [bytes((byte,)) for byte in range(256)]


def _character(token: bytes, digits: bytes, base: int = 16) -> bytes:
    """Of this number; the token itself where there is none."""
    code = int(digits, base)
    return token if code > 0x10FFFF else chr(code).encode("utf-8", "surrogatepass")


def _of_backslash(token: bytes) -> bytes:
    """A code of two hex digits, or octal, is a byte."""
    kind, said = token[1:2], token[1:]
    if kind in b"01234567":
        return _BYTES[int(said, 8) & 255]
    if kind in {b"\r", b"\n"}:
        return b""
    if len(said) == 1:
        return _CONTROLS.get(kind, kind)
    if kind == b"x" and len(said) == 3:
        return _BYTES[int(said[1:], 16)]
    if len(said) == 11:  # of two halves, as UTF-16 has them
        high, low = int(said[1:5], 16), int(said[7:], 16)
        return chr(0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF)).encode()
    return _character(token, said[1:].strip(b"{}"))


def _of_backslash_by_characters(token: bytes) -> bytes:
    r"""As Python writes text: `\xe9` is the character of this number, not the byte."""
    return _character(token, token[2:]) if token[1:2] == b"x" and len(token) == 4 else _of_backslash(token)


def _of_percent(token: bytes) -> bytes:
    if token == b"+":
        return b" "
    return _BYTES[int(token[1:], 16)] if len(token) == 3 else _character(token, token[2:])


def _of_entity(token: bytes) -> bytes:
    if token[1:2] != b"#":
        found = html5.get(token[1:].decode("ascii"))
        return token if found is None else found.encode()
    digits = token[2:].rstrip(b";")
    return _character(token, digits[1:]) if digits[:1] in b"xX" else _character(token, digits, 10)


def _of_quoted_printable(token: bytes) -> bytes:
    return b"" if token.endswith(b"\n") else _BYTES[int(token[1:], 16)]


def _of_backtick(token: bytes) -> bytes:
    return {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"0": b"\0"}.get(token[1:], token[1:])


def _second(token: bytes) -> bytes:
    return token[1:]


_BACKSLASH_TOKEN = (
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[ux]\{[0-9a-fA-F]{1,6}\}"
    rb"|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{1,3}|\r\n|.)"
)
_BACKSLASH_BEGUN = (
    rb"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?)?"
    rb"|[ux]\{[0-9a-fA-F]{0,6}|U[0-9a-fA-F]{0,7}|x[0-9a-fA-F]?|[0-7]{1,2}|\r)?"
)
_PERCENT_TOKEN = rb"%(?:[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
_PERCENT_BEGUN = rb"%(?:[0-9a-fA-F]|u[0-9a-fA-F]{0,3})?"

BACKSLASH = Notation(b"\\", _BACKSLASH_TOKEN, _BACKSLASH_BEGUN, 12, _of_backslash)
r"""JSON, C, JavaScript, Python's bytes, bash's `$'…'` and `printf %q`."""
_BACKSLASH_CHARACTERS = Notation(b"\\", _BACKSLASH_TOKEN, _BACKSLASH_BEGUN, 12, _of_backslash_by_characters)
_BACKSLASH_BEFORE = [Notation(b"\\", rb"\\" + quote, rb"\\", 2, _second, quote) for quote in (b'"', b"'")]
"""Of tools that escape one quote, and not the backslash."""
_PERCENT = Notation(b"%", _PERCENT_TOKEN, _PERCENT_BEGUN, 6, _of_percent)
_FORM = Notation(b"+", rb"\+|" + _PERCENT_TOKEN, _PERCENT_BEGUN, 6, _of_percent)
_ENTITY = Notation(
    b"&",
    rb"&(?:#[0-9]{1,8};?|#[xX][0-9a-fA-F]{1,7};?|[A-Za-z][A-Za-z0-9]{1,31};)",
    rb"&(?:#(?:[0-9]{0,8}|[xX][0-9a-fA-F]{0,7})|[A-Za-z][A-Za-z0-9]{0,31})?",
    34,
    _of_entity,
)
_QUOTED_PRINTABLE = Notation(b"=", rb"=(?:[0-9a-fA-F]{2}|\r?\n)", rb"=(?:[0-9a-fA-F]|\r)?", 3, _of_quoted_printable)
_SHELL_QUOTES = Notation(b"'", rb"""'\\''|'"'"'""", rb"""'(?:\\'?|"(?:'"?)?)?""", 5, lambda _: b"'", b"'")
_DOUBLED = {
    sign: Notation(sign, re.escape(sign * 2), re.escape(sign), 2, _second, sign)
    for sign in (b"'", b'"', b"`", b"$", b"%")
}
"""Quotes in SQL, in CSV and in PowerShell; signs in makefiles and batch files. One by one: who doubles one leaves others."""
_BACKTICK = Notation(b"`", rb"`.", rb"`", 2, _of_backtick)
_CARET = Notation(b"^", rb"\^.", rb"\^", 2, _second)

_ANY = (BACKSLASH, _PERCENT, _ENTITY, _QUOTED_PRINTABLE)
_FOR_SIGNS = (
    *((b"\\", notation) for notation in _BACKSLASH_BEFORE),
    (b"'", _SHELL_QUOTES),
    *_DOUBLED.items(),
    (b" ", _FORM),
    (b"\"$`'\n\t#;(){}|&<>@, ", _BACKTICK),
    (b'&|<>^()"%!', _CARET),
    (bytes(range(0x80, 0x100)), _BACKSLASH_CHARACTERS),
)
