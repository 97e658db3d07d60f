"""The chain through the journal's rows: each carries a hash over that of the row before it and over its own words. Pure.

Whoever changes, removes or puts in a row must make all hashes after it anew; whoever kept one of those (`release history`
shows the newest) then sees it. Entries and decisions are a chain each, in the order of their numbers:

    hash = SHA-256(hash of the row before ‖ line feed ‖ JSON of the row)

The first row follows upon SHA-256 of the journal's id. The JSON has the row's columns by name, in the order of names, without
spaces, beyond ASCII escaped; columns that hold nothing are left out, bytes stand as the hex of their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """A row in its place: `hash` as it was written with it; None of a row that is older than the chain."""

    number: int
    content: Mapping[str, object]
    hash: str | None


@dataclass(frozen=True, slots=True)
class Base:
    """Where a chain begins to be written down: rows up to `number` are older, and `hash` was that of the last of them."""

    number: int
    hash: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first row that is not what was written: `number`, and why that is known."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What a chain turned out to be.

    Attributes:
        rows: how many there are.
        head: hash of the last row.
        wrong: None where all is as it was written.
        has_kept: whether a head that somebody kept is still the hash of a row; True where none was asked for.
    """

    rows: int
    head: str
    wrong: Wrong | None = None
    has_kept: bool = True


def start_of(journal: str) -> str:
    """What the first row of the journal with this id follows upon."""
    return hashlib.sha256(journal.encode()).hexdigest()


def link(before: str, content: Mapping[str, object]) -> str:
    """The hash of a row with these columns; `before` is that of the row before it."""
    told = {name: _told(value) for name, value in content.items() if value is not None}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _told(value: object) -> object:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value


def check(links: Iterable[Link], start: str, base: Base, highest: int, *, kept: str | None = None) -> Checked:
    """Walk the rows, in order, up to the first wrong one.

    Args:
        links: all rows.
        start: what the first one follows upon.
        base: where hashes begin to stand beside rows.
        highest: number of the newest row that there ever was.
        kept: a head that somebody kept: it must be the hash of a row.
    """
    head, last, rows, has_kept = start, 0, 0, kept in {None, start}

    def ends(wrong: Wrong | None = None) -> Checked:
        return Checked(rows, head, wrong, has_kept)

    for one in links:
        if one.number > base.number and last <= base.number and head != base.hash:
            break
        if one.number > base.number and one.number != max(last, base.number) + 1:
            return ends(Wrong(max(last, base.number) + 1, "it is gone"))
        hash = link(head, one.content)
        if one.number > base.number and hash != one.hash:
            return ends(Wrong(one.number, "its hash is not that of what stands there after the entry before it"))
        head, last, rows, has_kept = hash, one.number, rows + 1, has_kept or hash == kept
    if last <= base.number and head != base.hash:
        return ends(Wrong(base.number, "it or one before it, all older than the chain, is not what it was"))
    if max(last, base.number) < highest:
        return ends(Wrong(max(last, base.number) + 1, "it is gone, and all that came after it"))
    return ends()
