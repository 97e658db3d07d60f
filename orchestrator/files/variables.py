"""`${name}`: what stands for it, in which order, and what is refused. Pure.

Only what was written in a process or environment file is a template. What comes from elsewhere (an answer to a prompt, a
machine's address, a tag) goes in as it is, and nothing that went in is looked at again: a value that holds `${x}` stays so.
`$${` stands for `${` itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from relay.written.yaml_positions import Place, shown

FILLED_MAX: Final = 32 << 10
"""Characters of a text once its variables are in: what one environment variable may well hold."""
NESTED_MAX: Final = 32
"""Variables whose values name variables whose values name variables."""

_MARK: Final = re.compile(r"\$\$\{|\$\{([^{}]*)(\})?")
_ELSEWHERE: Final[Mapping[str, str]] = {
    "machine": "a machine stands only where a step has 'roles'",
    "package": "a package stands only in a step that deploys one",
}
"""First words that are known, but not in every place, and why not here."""
_NOWHERE: Final[Mapping[str, str]] = {
    "old": "the version of before is put in by Waystation itself: write ${package.version}",
    "outputs": "outputs of steps are not built yet: leave it out",
}


class VariableError(ValueError):
    """A text that cannot be filled in. `place` is where the mistake stands; None: in the text itself."""

    def __init__(self, text: str, place: Place | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.place = place


class ElsewhereError(VariableError):
    """It names something that there is, but not here: `${machine.name}` on the server."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What a variable is: a template from a file, or a literal text. `place` is where it stands."""

    text: str
    literal: bool = False
    place: Place | None = field(default=None, compare=False)


def layered(*layers: Mapping[str, Definition]) -> dict[str, Definition]:
    """One set of definitions: of each name, the last layer that has it (process, environment, role, machine, prompt)."""
    return {name: definition for layer in layers for name, definition in layer.items()}


class Scope:
    """The variables of one place, and its facts (`machine.name`, `package.version`, …), which are literal."""

    def __init__(self, definitions: Mapping[str, Definition], facts: Mapping[str, str]) -> None:
        self._definitions = definitions
        self._facts = facts
        self._values: dict[str, str] = {}

    def fill(self, text: str) -> str:
        """`text` with every `${name}` replaced.

        Raises:
            ElsewhereError: it needs what is known in other places only.
            VariableError: a name is undefined, defined by itself, not closed, or the result is too long.
        """
        return self._fill(text, None, ())

    def value(self, name: str) -> str:
        """The value of a variable. Raises as `fill` does."""
        return self._value(name, None, ())

    def values(self, problem: Callable[[VariableError], None]) -> dict[str, str]:
        """Every variable that has a value here. What needs another place is left out; all else goes to `problem`."""
        found = {}
        for name in self._definitions:
            try:
                found[name] = self.value(name)
            except ElsewhereError:
                continue
            except VariableError as error:
                problem(error)
        return found

    def with_facts(self, facts: Mapping[str, str]) -> Scope:
        """The same variables where these facts are others."""
        return Scope(self._definitions, {**self._facts, **facts})

    def _fill(self, text: str, place: Place | None, open_names: tuple[str, ...]) -> str:
        pieces, length = [], 0
        for piece in self._pieces(text, place, open_names):
            length += len(piece)
            if length > FILLED_MAX:
                raise VariableError(f"is longer than {FILLED_MAX} characters once its variables are in", place)
            pieces.append(piece)
        return "".join(pieces)

    def _pieces(self, text: str, place: Place | None, open_names: tuple[str, ...]) -> Iterator[str]:
        end = 0
        for mark in _MARK.finditer(text):
            yield text[end : mark.start()]
            end = mark.end()
            if mark[0] == "$${":
                yield "${"
            elif mark[2] is None:
                raise VariableError(f"{shown(mark[0])} is not closed: expected '}}'; '$${{' stands for '${{'", place)
            else:
                yield self._value(mark[1], place, open_names)
        yield text[end:]

    def _value(self, name: str, place: Place | None, open_names: tuple[str, ...]) -> str:
        if name in self._facts:
            return self._facts[name]
        if name in self._values:
            return self._values[name]
        definition = self._definitions.get(name)
        if definition is None:
            raise self._unknown(name, place)
        if name in open_names:
            circle = " → ".join((*open_names[open_names.index(name) :], name))
            raise VariableError(f"is defined by itself: {circle}", definition.place)
        if len(open_names) >= NESTED_MAX:
            raise VariableError(f"is nested more than {NESTED_MAX} variables deep", place)
        text = definition.text
        self._values[name] = text if definition.literal else self._fill(text, definition.place, (*open_names, name))
        return self._values[name]

    def _unknown(self, name: str, place: Place | None) -> VariableError:
        head, dot, _ = name.partition(".")
        same = [fact for fact in self._facts if fact.startswith(f"{head}.")]
        if dot and head in _ELSEWHERE and not same:
            return ElsewhereError(f"${{{name}}}: {_ELSEWHERE[head]}", place)
        if dot and head in _NOWHERE:
            return VariableError(f"${{{name}}}: {_NOWHERE[head]}", place)
        if name.startswith("machine.tags."):
            machine = self._facts.get("machine.name", "")
            return VariableError(f"${{{name}}}: machine {machine} has no such tag: give it one under tags:", place)
        return VariableError(f"{shown(name)} is undefined{_known(name, [*self._definitions, *self._facts])}", place)


def _known(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f": did you mean '{close[0]}'?" if close else ": define it under variables:, or write '$${' for '${'"


def names_in(text: str) -> list[str]:
    """The names that `text` asks for, in their order; what stands behind `$$` asks for none."""
    return [mark[1] for mark in _MARK.finditer(text) if mark[1] is not None]
