"""Reading our own documents: tables and fenced blocks, as the tests of the documents need them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\|(?P<cells>.+)\|$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string (`sh`, `json manifest`), its text, and the line it begins on."""

    info: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    return [
        Block(found["info"].strip(), found["text"], page.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(page)
    ]


def block(page: str, info: str) -> str:
    """The text of the one block with this info string."""
    (found,) = [one.text for one in blocks(page) if one.info == info]
    return found


def rows(page: str) -> list[list[str]]:
    """The cells of every table row, stripped."""
    return [[cell.strip() for cell in found["cells"].split("|")] for found in _ROW.finditer(page)]


def section(page: str, heading: str) -> str:
    """What stands under `heading` (written with its #), down to the next heading of the same or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    begin = page.index(f"\n{heading}\n") + len(heading) + 2
    end = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE).search(page, begin)
    return page[begin : end.start() if end else len(page)]
