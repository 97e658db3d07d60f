"""Secrets leave the stream, whatever pieces it comes in, and nothing else does."""

from __future__ import annotations

import base64
import html
import json
import quopri
import re
import shlex
import textwrap
import unicodedata
import urllib.parse
from collections.abc import Callable
from itertools import pairwise
from xml.sax.saxutils import quoteattr

import pytest
from harness.seed import SOAK
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.runs import masking
from agent.runs.masking import MASK, Masker
from agent.runs.secret_forms import base64_forms, hex_forms, text_forms
from relay.errors import UsageError

ALPHABET = "ab1\n+/ é'\"\\"
SECRETS = st.lists(st.text(ALPHABET, min_size=4, max_size=9), max_size=3)
SCRAPS = ("\\", "\\u00", "\\x6", "\\12", "&", "&#9", "&#x6", "&quo", "%", "%6", "=", "'", "''", '"', "'\\", " ", "\n")
"""What tokens of notations begin with."""


def patterns_of(secret: str) -> set[bytes]:
    return text_forms(secret) | base64_forms(secret) | hex_forms(secret)


def in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


FEW = settings(max_examples=2000 if SOAK else 50)
"""Of streams of which each takes a moment."""

WRITERS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": in_json,
    "JSON in JSON": lambda text: in_json(json.dumps(text)),
    "JSON in JSON in JSON": lambda text: in_json(json.dumps(json.dumps(text))),
    "JSON with characters as they are": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "JSON as PHP writes it": lambda text: in_json(text).replace("/", "\\/"),
    "JSON as Go writes it": lambda text: re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", in_json(text)),
    "JSON in capitals": lambda text: "".join(f"\\u{unit:04X}" for unit in utf_16_units(text)),
    "JSON, each character": lambda text: "".join(f"\\u{unit:04x}" for unit in utf_16_units(text)),
    "JavaScript": lambda text: "".join(f"\\u{{{ord(char):x}}}" for char in text),
    "XML attribute": lambda text: quoteattr(text)[1:-1],
    "HTML": html.escape,
    "HTML in HTML": lambda text: html.escape(html.escape(text)),
    "HTML in decimals": lambda text: "".join(f"&#{ord(char)};" for char in text),
    "HTML in long decimals": lambda text: "".join(f"&#{ord(char):07};" for char in text),
    "HTML in hex": lambda text: "".join(f"&#x{ord(char):x};" for char in text),
    "HTML in capital hex": lambda text: "".join(f"&#X{ord(char):X};" for char in text),
    "HTML, ASCII only": lambda text: html.escape(text).encode("ascii", "xmlcharrefreplace").decode(),
    "JSON in HTML": lambda text: html.escape(json.dumps(text))[6:-6],
    "HTML in JSON": lambda text: in_json(html.escape(text)),
    "shlex": shlex.quote,
    "shlex in JSON": lambda text: in_json(shlex.quote(text)),
    "bash -x": lambda text: "'" + text.replace("'", "'\\''") + "'",
    "bash's ANSI-C quoting": lambda text: "$'" + in_c(text) + "'",
    "C": lambda text: (
        in_c(text).encode().decode("latin-1").translate({byte: f"\\{byte:03o}" for byte in range(128, 256)})
    ),
    "Python": lambda text: repr(text)[1:-1],
    "Python, ASCII only": lambda text: ascii(text)[1:-1],
    "Python's bytes": lambda text: repr(text.encode())[2:-1],
    "hex escapes": lambda text: "".join(f"\\x{byte:02X}" for byte in text.encode()),
    "octal escapes": lambda text: "".join(f"\\{byte:03o}" for byte in text.encode()),
    "a backslash before each sign": lambda text: re.sub(r"([^\w\n])", r"\\\1", text, flags=re.ASCII),
    "quotes alone": lambda text: text.replace('"', '\\"'),
    "SQL": lambda text: text.replace("'", "''"),
    "SQL of MySQL": lambda text: (
        text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"').replace("\n", "\\n")
    ),
    "SQL in JSON": lambda text: in_json(text.replace("'", "''")),
    "CSV": lambda text: text.replace('"', '""'),
    "PowerShell": lambda text: re.sub(r"([`\"$])", r"`\1", text).replace("\n", "`n"),
    "cmd": lambda text: re.sub(r"([&|<>^()])", r"^\1", text),
    "URL": urllib.parse.quote,
    "URL, all of it": lambda text: urllib.parse.quote(text, safe=""),
    "URL in small letters": lambda text: re.sub("%..", lambda code: code[0].lower(), urllib.parse.quote(text, safe="")),
    "URL, each byte": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "URL as browsers code it": lambda text: urllib.parse.quote(text, safe="!*'()"),
    "URL, a few signs": lambda text: urllib.parse.quote(text, safe="/:?#[]@!$&'()*+,;="),
    "URL, every other byte": lambda text: "".join(
        f"%{byte:02X}" if n % 2 or byte >= 128 or byte in b"%\n" else chr(byte) for n, byte in enumerate(text.encode())
    ),
    "URL in URL": lambda text: urllib.parse.quote(urllib.parse.quote(text, safe=""), safe=""),
    "URL in HTML": lambda text: html.escape(urllib.parse.quote(text, safe="&'")),
    "form": urllib.parse.quote_plus,
    "form as browsers code it": lambda text: urllib.parse.quote_plus(text, safe="*"),
    "quoted-printable": lambda text: quopri.encodestring(text.encode(), quotetabs=True).decode(),
    "hex": lambda text: text.encode().hex(),
    "capital hex": lambda text: text.encode().hex().upper(),
    "hex in pairs": lambda text: text.encode().hex(" "),
    "hex with colons": lambda text: text.encode().hex(":"),
    "hex in lines": lambda text: "\n".join(textwrap.wrap(text.encode().hex(), 12)),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 in lines": lambda text: "\n".join(textwrap.wrap(base64.b64encode(text.encode()).decode(), 8)),
    "base64 in an indented block": lambda text: "\n   ".join(
        textwrap.wrap(base64.b64encode(text.encode()).decode(), 8)
    ),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("="),
    "base64 in JSON": lambda text: base64.b64encode(text.encode()).decode().replace("/", "\\/"),
    "base64 in a URL": lambda text: urllib.parse.quote(base64.b64encode(text.encode()).decode(), safe=""),
    "base64 of UTF-16": lambda text: base64.b64encode(text.encode("utf-16-le")).decode(),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "NFC": lambda text: unicodedata.normalize("NFC", text),
}
"""By what wrote it: a secret as others write it."""


def utf_16_units(text: str) -> list[int]:
    data = text.encode("utf-16-be")
    return [int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2)]


def in_c(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[str], bytes, list[int]]:
    """Secrets, a stream that is full of them and their beginnings, as they are and as others write them, and where it is
    cut.
    """
    secrets = draw(SECRETS)
    forms = [form for secret in secrets for form in sorted(patterns_of(secret))]
    forms += [write(secret).encode() for secret in secrets for write in WRITERS.values()]
    parts = st.binary(max_size=3) | st.text(ALPHABET, max_size=5).map(str.encode)
    parts |= st.sampled_from(SCRAPS).map(str.encode)
    if forms:
        parts |= st.sampled_from(forms)
        parts |= st.builds(lambda form, size: form[:size], st.sampled_from(forms), st.integers(1, 40))
    stream = b"".join(draw(st.lists(parts, max_size=8)))
    return secrets, stream, sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))


def in_pieces(masker: Masker, stream: bytes, cuts: list[int]) -> bytes:
    edges = [0, *cuts, len(stream)]
    return b"".join(masker.feed(stream[start:end]) for start, end in pairwise(edges)) + masker.close()


def at_once(secrets: list[str], stream: bytes) -> bytes:
    """What one write gives, without a piece on which more could follow."""
    return in_pieces(Masker(secrets), stream, [])


@given(streams())
@example((["abab1"], b"ababab1abab", [4, 5, 6]))
@example((["aaaa"], b"aaaaaaaaa", [1, 4, 8]))
@example((["1/1\\"], b"\\1/1\\\\", [3]))
@FEW
def test_any_split_gives_what_one_write_gives(case: tuple[list[str], bytes, list[int]]) -> None:
    secrets, stream, cuts = case
    assert in_pieces(Masker(secrets), stream, cuts) == at_once(secrets, stream)


@given(streams())
@FEW
def test_no_form_of_a_secret_is_shown(case: tuple[list[str], bytes, list[int]]) -> None:
    secrets, stream, cuts = case
    shown = in_pieces(Masker(secrets), stream, cuts)
    between = shown.split(MASK)
    assert not any(form in part for secret in secrets for form in patterns_of(secret) for part in between)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5).map(sorted))
def test_nothing_else_is_changed(stream: bytes, cuts: list[int]) -> None:
    secret = "Zq#7!Zq#7!Zq#7!Zq#7!"
    if not any(form in stream for form in patterns_of(secret)):
        assert in_pieces(Masker([secret]), stream, cuts) == stream
    assert in_pieces(Masker([]), stream, cuts) == stream


@given(streams(), st.data())
@FEW
def test_a_flush_at_any_time_never_shows_a_secret_whole_nor_loses_a_byte_that_is_none(
    case: tuple[list[str], bytes, list[int]], data: st.DataObject
) -> None:
    secrets, stream, cuts = case
    masker = Masker(secrets)
    shown = b""
    for start, end in pairwise([0, *cuts, len(stream)]):
        shown += masker.feed(stream[start:end])
        if data.draw(st.booleans()):
            shown += masker.flush()
            assert masker.held == 0
    shown += masker.close()
    between = shown.split(MASK)
    assert not any(form in part for secret in secrets for form in patterns_of(secret) for part in between)
    # What no flush can take for a secret is all there, in its order.
    theirs = set(MASK).union(*(form for secret in secrets for form in patterns_of(secret)))
    theirs = theirs.union(*(write(secret).encode() for secret in secrets for write in WRITERS.values()))
    theirs |= set(("0123456789abcdefABCDEFuUxX" + "".join(SCRAPS)).encode())  # what an escape that breaks off may hold
    assert [byte for byte in shown if byte not in theirs] == [byte for byte in stream if byte not in theirs]


@given(streams())
@FEW
def test_what_is_held_back_may_still_become_a_secret(case: tuple[list[str], bytes, list[int]]) -> None:
    """It is no longer than the longest way to write the longest form: of six bytes to one, within six to one, and so on."""
    secrets, stream, cuts = case
    masker = Masker(secrets)
    longest = max((len(form) for secret in secrets for form in patterns_of(secret)), default=0)
    for start, end in pairwise([0, *cuts, len(stream)]):
        masker.feed(stream[start:end])
        assert masker.held <= 36 * longest


def test_what_could_be_a_secret_for_ever_is_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, whatever a script prints."""
    monkeypatch.setattr(masking, "KEPT_MAX", 2000)
    masker = Masker(["a" * 60_000])
    shown = b""
    for _ in range(20):
        shown += masker.feed(b"\\u0061" * 100)
        assert masker.held <= 2600
    assert set(shown + masker.close()) <= set(MASK + b"\\u0061")
    assert (shown + masker.close()).count(b"a") == 0


def test_a_line_is_shown_with_its_end() -> None:
    """Though white space counts for nothing within a code, whose first letter a line may end with."""
    masker = Masker([chr(letter) * 5 for letter in range(0x21, 0x7F)])
    assert masker.feed(b"all is well\n") == b"all is well\n"


def test_what_cannot_become_a_secret_is_shown_at_once() -> None:
    masker = Masker(["hunter2!"])
    assert masker.feed(b"Password: ") == b"Password: "
    assert masker.held == 0


def test_the_beginning_of_a_secret_waits_and_is_then_taken_for_one() -> None:
    masker = Masker(["hunter2!"])
    assert masker.feed(b"it is hunte") == b"it is "
    assert masker.flush() == MASK
    assert masker.feed(b"r2! and") == b" and"


def test_two_letters_of_a_secret_are_shown_after_a_while_but_never_the_rest() -> None:
    masker = Masker(["hunter2!"])
    assert masker.feed(b"oh") == b"o"
    assert masker.flush() == b"h"
    assert masker.feed(b"unter2! and") == MASK + b" and"


def test_of_two_secrets_that_overlap_neither_shows_its_end() -> None:
    assert in_pieces(Masker(["abcdef", "defghi"]), b"<abcdefghi>", [5]) == b"<" + MASK + b">"


@given(st.text(min_size=4, max_size=40), st.binary(max_size=5), st.binary(max_size=5))
@FEW
def test_base64_is_masked_at_every_alignment_and_in_both_alphabets(secret: str, before: bytes, after: bytes) -> None:
    inner = before + secret.encode("utf-8", "surrogateescape") + after if secret.isprintable() else secret.encode()
    for coded in (base64.b64encode(inner), base64.urlsafe_b64encode(inner), base64.b64encode(inner).rstrip(b"=")):
        shown = in_pieces(Masker([secret]), coded, [len(coded) // 2])
        assert MASK in shown
        # Of the secret, at most the characters that it shares with its neighbours are left.
        left = len(shown) - len(MASK)
        assert left <= -(-len(before) * 4 // 3) + -(-len(after) * 4 // 3) + 4


def test_base64_in_lines_is_masked() -> None:
    secret = "".join(f"{number:04}" for number in range(60))
    assert base64.encodebytes(secret.encode()).count(b"\n") > 3
    shown = in_pieces(Masker([secret]), base64.encodebytes(secret.encode()), [10, 100])
    assert set(shown) <= set(MASK + b"\n")


AWKWARD = "p'a\"s\\s/w&o<r>d+ 1%é\n$`=;😀#2"
"""A secret that everybody has to escape."""
AWKWARD_ONES = st.text(AWKWARD, min_size=4, max_size=12).filter(lambda text: text == text.strip())


@pytest.mark.parametrize("writer", WRITERS)
def test_scenario_33_a_secret_is_masked_whatever_wrote_it_and_wherever_it_is_cut(writer: str) -> None:
    for secret, step in (("hunter2!", 3), (AWKWARD, 17)):
        stream = _written(writer, secret)
        masker = Masker([secret])
        for cut in range(0, len(stream) + 1, 1 if SOAK else step):
            _is_masked(in_pieces(masker, stream, [cut]))


@given(st.sampled_from(sorted(WRITERS)), AWKWARD_ONES, st.data())
@settings(max_examples=20_000 if SOAK else 200)
def test_an_awkward_secret_is_masked_whatever_wrote_it_in_any_pieces(
    writer: str, secret: str, data: st.DataObject
) -> None:
    stream = _written(writer, secret)
    _is_masked(
        in_pieces(Masker([secret]), stream, sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4))))
    )


def _written(writer: str, secret: str) -> bytes:
    return f"token: {WRITERS[writer](secret)}, and more".encode()


def _is_masked(shown: bytes) -> None:
    """Quotes around a secret are not its own, and of base64 a last character may be left that says less than a byte."""
    assert re.fullmatch(rb"token: [$'\"\\]{0,6}(\*{8})+[A-Za-z0-9_'\"\\=-]{0,6}, and more", shown), shown


def test_scenario_33_each_line_of_a_secret_is_masked_also_inside_other_text() -> None:
    secret = "-----BEGIN KEY-----\nMIIBVgIBADANBg\nab\nkqhkiG9w0BAQ\n-----END KEY-----\n"
    shown = in_pieces(Masker([secret]), json.dumps({"key": secret}).encode(), [30])
    assert shown == b'{"key": "********"}'
    indented = textwrap.indent(secret, "    ").encode()
    assert in_pieces(Masker([secret]), indented, [30]).split() == [MASK, MASK, b"ab", MASK, MASK]
    assert in_pieces(Masker([secret]), f"<{secret}>".encode(), [20, 21]) == b"<" + MASK + b">"


@pytest.mark.parametrize("secret", ["", "a", "abc", "äöü"])
def test_a_secret_under_four_characters_is_refused(secret: str) -> None:
    with pytest.raises(UsageError, match="at least 4 characters"):
        Masker(["long enough", secret])
