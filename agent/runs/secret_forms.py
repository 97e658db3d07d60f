"""The bytes that show a secret: as it is, in other encodings of the same characters, and in base64 and hex."""

from __future__ import annotations

import binascii

TYPE_CHECKING = False  # `typing` costs the runner more than all the rest of this module
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHORTEST = 4
"""Characters of a secret. A shorter one would mask half of every output, and is no secret. Of a form, bytes."""


def check_secret(value: str) -> None:
    """Whether it can be masked.

    Raises:
        UsageError: it is shorter than 4 characters.
    """
    if len(value) < SHORTEST:
        from relay.errors import UsageError

        raise UsageError("a secret must have at least 4 characters: a shorter one cannot be masked in output")


def text_forms(value: str) -> set[bytes]:
    """The secret and each of its lines, as a program may print characters."""
    return _long_enough(form for text in _texts(value) for form in _encoded(text))


def base64_forms(value: str) -> set[bytes]:
    """Every text that shows the secret, or one of its lines, in base64, also as a part of something longer.

    Of UTF-16, too: that is how PowerShell takes commands.
    """
    plain = (form for text in _texts(value) for form in (_bytes_of(text), _utf_16(text)))
    return _long_enough(form for data in plain for form in _base64(data))


def hex_forms(value: str) -> set[bytes]:
    """Two digits for each byte, in either case."""
    digits = [binascii.hexlify(_bytes_of(text)) for text in _texts(value)]
    return _long_enough(form for each in digits for form in (each, each.upper()))


def _long_enough(forms: Iterable[bytes]) -> set[bytes]:
    return {form for form in forms if len(form) >= SHORTEST}


def _texts(value: str) -> Iterator[str]:
    """Lines of fewer bytes than the shortest secret are left out: they would mask what is no secret."""
    yield value
    for line in _bytes_of(value).splitlines():
        text = line.strip()
        if len(text) >= SHORTEST:
            yield text.decode("utf-8", "surrogateescape")


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _utf_16(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")


def _encoded(text: str) -> Iterator[bytes]:
    yield _bytes_of(text)
    yield _utf_16(text)
    yield text.encode("utf-16-be", "surrogatepass")
    if text.isascii():
        return
    from unicodedata import normalize

    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        yield _bytes_of(normalize(form, text))
    for encoding in ("latin-1", "cp1252", "cp850", "cp437"):
        try:
            yield normalize("NFC", text).encode(encoding)
        except UnicodeEncodeError:
            continue


def _base64(data: bytes) -> Iterator[bytes]:
    """Three bytes make four characters (RFC 4648), so there are three ways to lie; the characters at either end that
    depend on the neighbours are left out. Both alphabets, with and without padding.
    """
    for before in range(3):
        coded = binascii.b2a_base64(bytes(before) + data, newline=False)
        first = -(-before * 8 // 6)
        inner = coded[first : (before + len(data)) * 8 // 6]
        for text in (inner, coded[first:], coded[first:].rstrip(b"=")):
            yield from (text, text.translate(_TO_URL_ALPHABET))


_TO_URL_ALPHABET = bytes.maketrans(b"+/", b"-_")
