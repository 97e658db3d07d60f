"""YAML with positions: every value knows its line, so that every mistake can name file, line, path and expectation.

Plain words are read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), not by the older one
that PyYAML follows: `on`, `no` and `2026-12-20` are text. Anchors, aliases and tags are refused: an alias is how a
small file becomes a large one, a tag is how a file chooses a class.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Self, TypeVar

import yaml

from relay.errors import UsageError

T = TypeVar("T")

Path = tuple[str | int, ...]
"""Keys and indexes from the root of a document; indexes count from 0, as in `steps[0].name`."""

FILE_MAX: Final = 1 << 20
"""Bytes of a process or environment file."""
DEPTH_MAX: Final = 32
"""Nesting of a document."""
SHOWN_MAX: Final = 100
"""Mistakes that an error's text lists; its `mistakes` hold all."""

_UNPRINTABLE: Final = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML may not hold: https://yaml.org/spec/1.2.2/#51-character-set."""
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
"""What an escape in quotes can make all the same."""
_INTEGER: Final = re.compile(r"[-+]?[0-9]{1,30}|0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]{1,30}|[0-9]{1,30}(\.[0-9]{0,30})?)([eE][-+]?[0-9]{1,3})?")
_WORDS: Final[Mapping[str, bool | None]] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong, where it stands, and what is expected there. Line 0: not in a file."""

    file: str
    line: int
    path: str
    text: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        return f"{place}{self.path}: {self.text}" if self.path else f"{place}{self.text}"


class PlanError(UsageError):
    """Files or options that no plan can be made of. The text lists the mistakes, one in each line."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes: tuple[Mistake, ...] = tuple(mistakes)
        lines = [str(mistake) for mistake in self.mistakes[:SHOWN_MAX]]
        if len(self.mistakes) > SHOWN_MAX:
            lines.append(f"and {len(self.mistakes) - SHOWN_MAX} more mistakes")
        super().__init__("\n".join(lines))

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self.message.split("\n"))


@dataclass(frozen=True, slots=True)
class Scalar:
    """`text` as it was written (without quotes), `value` as YAML 1.2 reads it."""

    line: int
    text: str
    value: bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Items:
    line: int
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class MappingEntry:
    key: str
    line: int
    node: Node


@dataclass(frozen=True, slots=True)
class Keys:
    line: int
    entries: tuple[MappingEntry, ...]


Node = Scalar | Items | Keys


@dataclass(frozen=True, slots=True)
class Located:
    """A document: `lines` tells where each path stands, from line 1. `name` is what mistakes call the file. `mistakes` are
    what the rest could be read without.
    """

    name: str
    folder: str
    text: bytes
    root: Node
    lines: Mapping[Path, int]
    mistakes: tuple[Mistake, ...] = ()

    def mistake(self, path: Path, text: str) -> Mistake:
        """A mistake at `path`, or, where the file has no such place, at the nearest one around it."""
        around = path
        while around not in self.lines:
            around = around[:-1]
        return Mistake(self.name, self.lines[around], show_path(path), text)


@dataclass(frozen=True, slots=True)
class LoadedFile(Generic[T]):
    """A file of ours as a value, with its positions. `folder` is absolute: what the file's own paths are relative to.

    Where it has `mistakes`, something harmless stands in for each of them.
    """

    value: T
    document: Located = field(repr=False)
    mistakes: tuple[Mistake, ...] = ()

    def checked(self) -> Self:
        """Itself. Raises `PlanError` where it has mistakes."""
        if self.mistakes:
            raise PlanError(self.mistakes)
        return self

    @property
    def name(self) -> str:
        return self.document.name

    @property
    def folder(self) -> str:
        return self.document.folder

    @property
    def text(self) -> bytes:
        return self.document.text

    def at(self, *path: str | int) -> Place:
        return Place(self.document, path)


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere in a file."""

    document: Located = field(repr=False)
    path: Path

    def mistake(self, text: str) -> Mistake:
        return self.document.mistake(self.path, text)

    def below(self, *path: str | int) -> Place:
        return Place(self.document, self.path + path)


def show_path(path: Path) -> str:
    """`steps[0].verify[1].http`; keys that are no plain words stand in quotes."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


def shown(value: object) -> str:
    """A value from a file in a sentence: one line, bounded, no control characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load(path: str, hint: str = "") -> Located:
    """Read the file at `path`. `hint`: what helps where there is none.

    Raises:
        PlanError: it cannot be read, is too large, or is no YAML, so that nothing can be said of the rest.
    """
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PlanError([Mistake(path, 0, "", "is no regular file: expected a YAML file")])
            text = file.read(FILE_MAX + 1)
    except OSError as error:
        why = "; ".join(filter(None, (f"cannot be read: {error.strerror}", hint)))
        raise PlanError([Mistake(path, 0, "", why)]) from error
    return parse(text, path, os.path.dirname(os.path.abspath(path)))


def load_settings(path: str, hint: str = "") -> Located:
    """`load`, of a file that must say something.

    What a full disk or a broken copy leaves is no wish for the defaults: they would open what was closed.
    """
    located = load(path, hint)
    lines = [line.strip() for line in located.text.splitlines()]
    if all(not line or line.startswith(b"#") or line == b"---" for line in lines):
        raise PlanError([Mistake(path, 0, "", "says nothing: write {} into it where every key is to have its default")])
    return located


def open_without_waiting(path: str, flags: int) -> int:
    """For `open(opener=…)`: opening a named pipe would wait for its writer, for ever if need be."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse(text: bytes, name: str, folder: str) -> Located:
    """Read `text`, which mistakes call `name`.

    Raises:
        PlanError: see `load`.
    """
    reader = _Reader(name)
    root = reader.read(text)
    return Located(name, folder, text, root, dict(_places(root)), tuple(reader.mistakes))


def _places(node: Node, path: Path = (), line: int = 0) -> Iterator[tuple[Path, int]]:
    """Every path with its line: for a value of a mapping the line of its key, where one looks for it."""
    yield path, line or node.line
    match node:
        case Items(items=items):
            for index, item in enumerate(items):
                yield from _places(item, (*path, index))
        case Keys(entries=entries):
            for entry in entries:
                yield from _places(entry.node, (*path, entry.key), entry.line)


class _Reader:
    """Builds nodes from the parser's events, so that depth is bounded and nothing of YAML is followed unseen."""

    def __init__(self, name: str) -> None:
        self.mistakes: list[Mistake] = []
        self._name = name

    def read(self, data: bytes) -> Node:
        text = self._decode(data)
        try:
            events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            return self._document(events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark is not None else 1
            why = ", ".join(part for part in (error.context, error.problem) if part)
            raise self._fatal(line, f"is not YAML: {why}") from error
        except yaml.YAMLError as error:
            raise self._fatal(1, f"is not YAML: {' '.join(str(error).split())[:200]}") from error

    def _decode(self, data: bytes) -> str:
        if len(data) > FILE_MAX:
            raise self._fatal(0, f"is larger than {FILE_MAX} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._fatal(data.count(b"\n", 0, error.start) + 1, "is not UTF-8: save the file as UTF-8") from error
        strange = _UNPRINTABLE.search(text)
        if strange:
            line = text.count("\n", 0, strange.start()) + 1
            raise self._fatal(line, f"holds the character U+{ord(strange[0]):04X}: expected printable text")
        return text

    def _document(self, events: Iterator[yaml.Event]) -> Node:
        """The only document of the stream. An empty one is an empty mapping: then its keys are what is missed."""
        root: Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                raise self._fatal(_line(event), "is a second document: expected one document in one file")
            if isinstance(event, yaml.NodeEvent):
                root = self._node(event, events, ())
        if root is None or (isinstance(root, Scalar) and root.value is None):
            return Keys(1, ())
        return root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], path: Path) -> Node:
        line = _line(event)
        if len(path) > DEPTH_MAX:
            raise self._fatal(line, f"is nested deeper than {DEPTH_MAX} levels")
        self._refuse_magic(event, path)
        if isinstance(event, yaml.ScalarEvent):
            if _NO_TEXT.search(event.value):
                self._wrong(line, path, "holds NUL or half of a character: no file name and no variable can")
            plain = not event.style  # None or "", by parser
            return Scalar(line, event.value, _resolve(event.value) if plain else event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            return Items(line, tuple(self._items(events, path)))
        if isinstance(event, yaml.MappingStartEvent):
            return Keys(line, tuple(self._entries(events, path)))
        return Scalar(line, "", None)  # an alias, which was refused just now

    def _items(self, events: Iterator[yaml.Event], path: Path) -> Iterator[Node]:
        for index, event in enumerate(events):
            if isinstance(event, yaml.SequenceEndEvent):
                return
            yield self._node(event, events, (*path, index))

    def _entries(self, events: Iterator[yaml.Event], path: Path) -> Iterator[MappingEntry]:
        seen: dict[str, int] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                return
            key, line = self._node(event, events, (*path, "?")), _line(event)
            name = key.text if isinstance(key, Scalar) else ""
            value = self._node(next(events), events, (*path, name))
            if not isinstance(key, Scalar):
                self._wrong(line, path, "has a key that is a list or a mapping: expected a word")
            elif name in seen:
                self._wrong(line, (*path, name), f"stands twice, first in line {seen[name]}: keep one of them")
            else:
                seen[name] = line
                yield MappingEntry(name, line, value)

    def _refuse_magic(self, event: yaml.Event, path: Path) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._wrong(_line(event), path, f"is an alias ({shown(event.anchor)}): write the value itself")
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            self._wrong(_line(event), path, f"has an anchor ({shown(event.anchor)}): leave it out")
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            self._wrong(_line(event), path, f"has a tag ({shown(event.tag)}): leave it out")

    def _wrong(self, line: int, path: Path, text: str) -> None:
        self.mistakes.append(Mistake(self._name, line, show_path(path), text))

    def _fatal(self, line: int, text: str) -> PlanError:
        return PlanError([*self.mistakes, Mistake(self._name, line, "", text)])


def _line(event: yaml.Event) -> int:
    mark = event.start_mark
    return mark.line + 1 if mark is not None else 1


def _resolve(text: str) -> bool | int | float | str | None:
    """A plain word by the core schema, but for infinities, which no key here can mean."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text) if _FLOAT.fullmatch(text) else text


def sorted_mistakes(mistakes: Iterable[Mistake], files: Sequence[str]) -> list[Mistake]:
    """Each once: those outside of files first, then file by file in the order of `files`, by line."""
    order = {name: number for number, name in enumerate(("", *files))}
    return sorted(dict.fromkeys(mistakes), key=lambda mistake: (order.get(mistake.file, len(order)), mistake.line))
