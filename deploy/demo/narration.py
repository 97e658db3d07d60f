"""What the demo says: numbered steps, the commands it really ran, what came of them. Colours only on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from ledger import Promise

_DIM, _BOLD, _RED, _GREEN = "2", "1", "31", "32"


@dataclass(slots=True)
class Narrator:
    """Writes to `out`. `step` is the last one begun, for where it failed."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    folder: str = ""
    """Left out where it leads a path: commands run in it."""
    step: str = "the set-up"
    _number: int = 0
    _started: float = field(default_factory=time.monotonic)

    def begin(self, title: str) -> None:
        """Start the next numbered step."""
        self._number += 1
        self.step = f"step {self._number}, {title[:1].lower()}{title[1:]}"
        self._line(f"\n{self._paint(_BOLD, f'{self._number}. {title}')}")

    def command(self, text: str, also: str = "") -> None:
        """A command as it ran; `also` is a remark on it, such as where else the same ran at once."""
        self._line(self._paint(_DIM, f"   $ {text}"))
        if also:
            self._line(self._paint(_DIM, f"     # {also}"))

    def say(self, text: str) -> None:
        """What came of it. Several lines stay several."""
        for line in text.splitlines():
            self._line(f"   {line}".rstrip())

    def verdict(self, *, held: bool, text: str) -> None:
        self._line(self._paint(f"{_BOLD};{_GREEN if held else _RED}", text))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def judge(self, promises: Sequence[Promise]) -> bool:
        """Each promise with what was seen; whether all of them held."""
        width = max(len(promise.text) for promise in promises)
        for promise in promises:
            word = self._paint(_GREEN, "held  ") if promise.held else self._paint(_RED, "BROKEN")
            self.say(f"{word}  {promise.text:{width}}  {promise.seen}")
        return all(promise.held for promise in promises)

    def _paint(self, code: str, text: str) -> str:
        plain = bool(os.environ.get("NO_COLOR")) or not self.out.isatty()
        return text if plain else f"\x1b[{code}m{text}\x1b[0m"

    def _line(self, text: str) -> None:
        print(text.replace(f"{self.folder}/", "") if self.folder else text, file=self.out, flush=True)


def names(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
