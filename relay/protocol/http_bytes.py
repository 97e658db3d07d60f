"""Counting what crosses a line, as the ledger needs it: bodies and the headers around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Bytes of HTTP in both directions, TLS and TCP not counted."""

    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        return self.sent + self.received


def header_bytes(first_line: str, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """What a request's or response's head takes on the wire: each line ends in CR LF, an empty one closes it."""
    return len(first_line) + 2 + sum(len(name) + len(value) + 4 for name, value in headers) + 2


def chunked_bytes(size: int) -> int:
    """What a piece of a body without a length takes on the wire (RFC 9112, 7.1); 0 bytes end the body."""
    return len(f"{size:x}") + 2 + size + 2
