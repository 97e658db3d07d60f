"""A document with positions into a msgspec Struct, with all of its mistakes at once.

msgspec's own conversion stops at the first mistake and knows no lines. The types stay msgspec's, so the JSON Schema
for editors (`schema_of`) says the same as what is refused here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, TypeVar

import msgspec
import msgspec.inspect as kinds_of

from relay.written.yaml_positions import (
    Items,
    Keys,
    LoadedFile,
    Located,
    Mistake,
    Node,
    Path,
    Scalar,
    load,
    show_path,
    shown,
)

T = TypeVar("T", bound=msgspec.Struct)

SCHEMA: Final = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, slots=True)
class Kind:
    """What else a mapping of one kind needs and may have."""

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A mapping as people write it.

    Where `kinds` is given, exactly one of its keys must be there; it says what the mapping is, and which keys go with it.
    """

    kinds: ClassVar[Mapping[str, Kind]] = {}


class _Wrong:
    """Stands where no value could be made; the mistake is noted."""


_WRONG: Final = _Wrong()


def load_as(path: str, type: type[T], hint: str = "") -> LoadedFile[T]:
    """The file at `path` as a `type`. `hint`: what helps where there is none. Raises `PlanError` with every mistake."""
    return fit(load(path, hint), type)


def fit(document: Located, type: type[T]) -> LoadedFile[T]:
    """`document` as a `type`.

    Raises:
        PlanError: it does not fit; with every mistake.
    """
    return fit_with_stand_ins(document, type).checked()


def fit_with_stand_ins(document: Located, type: type[T]) -> LoadedFile[T]:
    """`document` as a `type`; it holds its mistakes, and something harmless stands in for each of them.

    A plan of it finds what else is wrong. Nothing may be done by what it says.
    """
    fitting = _Fitting(document)
    info = kinds_of.type_info(type)
    value = fitting.fit(document.root, info, ())
    mistakes = sorted((*document.mistakes, *fitting.mistakes), key=lambda mistake: mistake.line)
    return LoadedFile(_stand_in(info) if value is _WRONG else value, document, tuple(mistakes))


def schema_of(type: type[Written]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a file, for editors."""
    schema = msgspec.json.schema(type)
    for part in _written_in(type):
        if part.kinds:
            schema["$defs"][part.__name__]["oneOf"] = [{"required": [key]} for key in part.kinds]
    named: dict[str, Any] = _without_null(schema)
    return {"$schema": SCHEMA, **named}


def _without_null(schema: Any) -> Any:  # noqa: ANN401 - JSON
    """The schema without null: None means "not written" in our structs, and a key without a value is refused."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema if item != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _without_null(value) for key, value in schema.items() if not (key == "default" and value is None)}
    choices = kept.get("anyOf")
    if isinstance(choices, list) and len(choices) == 1:
        del kept["anyOf"]
        return choices[0] | kept
    return kept


def _written_in(type: type[Written]) -> set[type[Written]]:
    found: set[Any] = set()

    def look(info: kinds_of.Type) -> None:
        match info:
            case kinds_of.StructType(cls=cls, fields=fields) if cls not in found:
                found.add(cls)
                for field in fields:
                    look(field.type)
            case kinds_of.UnionType(types=types):
                for member in types:
                    look(member)
            case kinds_of.DictType(value_type=inner) | kinds_of.VarTupleType(item_type=inner):
                look(inner)
            case kinds_of.Metadata(type=inner):
                look(inner)

    look(kinds_of.type_info(type))
    return found


class _Fitting:
    def __init__(self, document: Located) -> None:
        self.mistakes: list[Mistake] = []
        self._document = document

    def fit(self, node: Node, info: kinds_of.Type, path: Path) -> Any:  # noqa: ANN401 - any type of a field
        if isinstance(node, Scalar):
            return self._scalar(node, info, path)
        for member in _members(info):
            match member, node:
                case kinds_of.StructType(), Keys():
                    return self._struct(node, member, path)
                case kinds_of.DictType(), Keys():
                    return self._dict(node, member, path)
                case kinds_of.VarTupleType() | kinds_of.ListType(), Items():
                    return self._list(node, member, path)
        return self._wrong(path, f"is a {'mapping' if isinstance(node, Keys) else 'list'}: expected {_expected(info)}")

    def _struct(self, node: Keys, info: kinds_of.StructType, path: Path) -> Any:  # noqa: ANN401
        fields = {field.encode_name: field for field in info.fields}
        given = {entry.key: entry.node for entry in node.entries}
        allowed, needed = self._allowed(info, given, path)
        values = {}
        for key, value in given.items():
            if key not in fields:
                self._wrong((*path, key), f"unknown key: expected one of {', '.join(allowed)}{_close(key, allowed)}")
            elif key not in allowed:
                self._wrong((*path, key), f"does not belong here: expected one of {', '.join(allowed)}")
            else:
                values[fields[key].name] = self._value(value, fields[key], (*path, key))
        for key in needed:
            if key not in given:
                self._wrong(path, f"the key '{key}' is missing: expected {_expected(fields[key].type)}")
                values[fields[key].name] = _stand_in(fields[key].type)
        return info.cls(**values)

    def _value(self, node: Node, field: kinds_of.Field, path: Path) -> Any:  # noqa: ANN401
        value = self.fit(node, field.type, path)
        if value is not _WRONG:
            return value
        has_default = not field.required and not _takes_words(field.type, node)
        return field.default if has_default and field.default is not msgspec.NODEFAULT else _stand_in(field.type, node)

    def _allowed(self, info: kinds_of.StructType, given: Mapping[str, Node], path: Path) -> tuple[list[str], list[str]]:
        """The keys that may stand here, and those that must."""
        names = [field.encode_name for field in info.fields]
        needed = [field.encode_name for field in info.fields if field.required]
        kinds = info.cls.kinds if issubclass(info.cls, Written) else {}
        if not kinds:
            return names, needed
        chosen = [key for key in kinds if key in given]
        if len(chosen) != 1:
            found = f"has {' and '.join(chosen)}" if chosen else "says nothing of what it is"
            self._wrong(path, f"{found}: expected exactly one of the keys {', '.join(kinds)}")
            return names, needed
        special = {key for kind in kinds.values() for key in (*kind.needs, *kind.may)} | set(kinds)
        mine = {chosen[0], *kinds[chosen[0]].needs, *kinds[chosen[0]].may}
        return [name for name in names if name not in special or name in mine], [*needed, *kinds[chosen[0]].needs]

    def _dict(self, node: Keys, info: kinds_of.DictType, path: Path) -> Any:  # noqa: ANN401
        result = {}
        for entry in node.entries:
            key_path = (*path, entry.key)
            key = self._scalar(Scalar(entry.line, entry.key, entry.key), info.key_type, key_path)
            value = self.fit(entry.node, info.value_type, key_path)
            # Its name is known all the same: who names it is not wrong.
            result[entry.key if key is _WRONG else key] = (
                _stand_in(info.value_type, entry.node) if value is _WRONG else value
            )
        return result

    def _list(self, node: Items, info: kinds_of.VarTupleType | kinds_of.ListType, path: Path) -> Any:  # noqa: ANN401
        if len(node.items) < (info.min_length or 0):
            return self._wrong(path, f"is an empty list: expected at least {info.min_length} of them")
        values = [self.fit(item, info.item_type, (*path, index)) for index, item in enumerate(node.items)]
        whole = [
            _stand_in(info.item_type, item) if value is _WRONG else value
            for item, value in zip(node.items, values, strict=True)
        ]
        return whole if isinstance(info, kinds_of.ListType) else tuple(whole)

    def _scalar(self, node: Scalar, info: kinds_of.Type, path: Path) -> Any:  # noqa: ANN401
        members = _members(info)
        texts = [member for member in members if isinstance(member, kinds_of.StrType)]
        if any(isinstance(member, kinds_of.DateTimeType) for member in members) and (time := _time(node.text)):
            return time
        if any(_is(member, node.value) for member in members):
            # Beside numbers, free text keeps what was written: 1.10 is not 1.1.
            return node.text if any(text.pattern is None for text in texts) else node.value
        if node.value is None:
            return self._wrong(path, f"is empty: expected {_expected(info)}, or leave the key out")
        is_number = any(isinstance(member, kinds_of.IntType) for member in members)
        hint = ", in quotes" if texts and not isinstance(node.value, str) and not is_number else ""
        return self._wrong(path, f"{shown(node.value)}: expected {_expected(info)}{hint}")

    def _wrong(self, path: Path, text: str) -> _Wrong:
        if any(mistake.path == show_path(path) for mistake in self._document.mistakes):
            return _WRONG  # what is wrong with the YAML itself is told already
        self.mistakes.append(self._document.mistake(path, text))
        return _WRONG


def _bare(info: kinds_of.Type) -> kinds_of.Type:
    return info.type if isinstance(info, kinds_of.Metadata) else info


def _members(info: kinds_of.Type) -> tuple[kinds_of.Type, ...]:
    """What may stand there. None is how a struct says "absent"; no file says it."""
    bare = _bare(info)
    types = bare.types if isinstance(bare, kinds_of.UnionType) else (bare,)
    return tuple(_bare(member) for member in types if not isinstance(member, kinds_of.NoneType))


def _is(info: kinds_of.Type, value: object) -> bool:
    """Whether a scalar's value is of the type, to the letter: `true` is no 1."""
    match info:
        case kinds_of.LiteralType(values=values):
            return any(type(value) is type(one) and value == one for one in values)
        case kinds_of.StrType(min_length=least, max_length=most, pattern=pattern) if isinstance(value, str):
            has_length = (least or 0) <= len(value) <= (most or len(value))
            return has_length and (pattern is None or re.fullmatch(pattern, value) is not None)
        case kinds_of.BoolType():
            return isinstance(value, bool)
        case kinds_of.IntType(ge=least, le=most) if type(value) is int:
            return (least is None or least <= value) and (most is None or value <= most)
        case kinds_of.FloatType():
            return type(value) in {int, float}
    return False


def _time(text: str) -> datetime | None:
    """A point in time that names its zone; None where the text is none."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else None


def _takes_words(info: kinds_of.Type, node: Node) -> bool:
    """Whether a word that stands where a list of words is wanted says enough of what was meant."""
    lists = [one for one in _members(info) if isinstance(one, kinds_of.VarTupleType | kinds_of.ListType)]
    return isinstance(node, Scalar) and any(isinstance(_bare(one.item_type), kinds_of.StrType) for one in lists)


def _stand_in(info: kinds_of.Type, node: Node | None = None) -> Any:  # noqa: ANN401 - any type of a field
    """Something of this type that does no harm; of what was written, as much as can be."""
    members = _members(info)
    if isinstance(node, Scalar):
        if _takes_words(info, node):
            return (node.text,)
        if any(isinstance(member, kinds_of.StrType) for member in members):
            return node.text
    match members[0]:
        case kinds_of.StructType(cls=cls, fields=fields):
            return cls(**{field.name: _stand_in(field.type) for field in fields if field.required})
        case kinds_of.LiteralType(values=values):
            return values[0]
        case kinds_of.DictType():
            return {}
        case kinds_of.VarTupleType():
            return ()
        case kinds_of.ListType():
            return []
        case kinds_of.IntType(ge=least):
            return least or 0
        case kinds_of.FloatType() | kinds_of.BoolType():
            return 0
        case kinds_of.DateTimeType():
            return datetime.min.replace(tzinfo=UTC)
    return ""


def _close(key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _expected(info: kinds_of.Type) -> str:
    """What should stand there, for a person."""
    match info:
        case kinds_of.Metadata(type=inner, extra_json_schema=extra):
            return str((extra or {}).get("description") or _expected(inner))
        case kinds_of.UnionType(types=types):
            members = [member for member in types if not isinstance(member, kinds_of.NoneType)]
            return " or ".join(dict.fromkeys(map(_expected, members)))
        case kinds_of.LiteralType(values=values):
            return " or ".join(str(value) for value in values)
        case kinds_of.StructType(fields=fields):
            return f"a mapping with {', '.join(field.encode_name for field in fields)}"
        case kinds_of.DictType(value_type=inner):
            return f"a mapping of names, each to {_expected(inner)}"
        case kinds_of.VarTupleType(item_type=inner) | kinds_of.ListType(item_type=inner):
            return f"a list, each item {_expected(inner)}"
        case kinds_of.StrType():
            return "text"
        case kinds_of.BoolType():
            return "true or false"
        case kinds_of.IntType(ge=ge, le=le):
            return f"a whole number{'' if ge is None else f' from {ge}'}{'' if le is None else f' to {le}'}"
        case kinds_of.FloatType():
            return "a number"
        case kinds_of.DateTimeType():
            return "a point in time with its zone, such as 2026-12-20T08:00:00Z"
    return "something else"
