"""As much of JSON Schema (2020-12) as our own schemas use, for tests: does a document fit?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from relay.written.yaml_positions import Items, Keys, Node, Scalar, load

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
}  # fmt: skip
_HANDLED = {
    "$ref", "$defs", "$schema", "title", "description", "default", "type", "enum", "const", "anyOf", "oneOf", "required",
    "properties", "additionalProperties", "propertyNames", "items", "minItems", "maxItems", "minimum", "maximum",
    "minLength", "maxLength", "pattern",
}  # fmt: skip


def plain_document(path: Path) -> object:
    """A file of ours as an editor's validator sees it."""
    return plain(load(str(path)).root)


def plain(node: Node) -> object:
    """A document without the places of what stands in it."""
    match node:
        case Scalar(value=value):
            return value
        case Items(items=items):
            return [plain(item) for item in items]
        case Keys(entries=entries):
            return {entry.key: plain(entry.node) for entry in entries}


def misfits(value: object, root: dict[str, Any]) -> list[str]:
    """Why `value` does not fit the schema `root`; empty where it does."""
    return list(_misfits(value, root, root["$defs"], "$"))


def _misfits(value: Any, schema: dict[str, Any], defs: dict[str, Any], at: str) -> list[str]:
    assert set(schema) <= _HANDLED, f"this check does not know {set(schema) - _HANDLED}"
    wrong = []
    if "$ref" in schema:
        wrong += _misfits(value, defs[schema["$ref"].rpartition("/")[2]], defs, at)
    if "type" in schema and not _is(value, schema["type"]):
        return [*wrong, f"{at}: {value!r} is no {schema['type']}"]
    if "enum" in schema and not any(type(one) is type(value) and one == value for one in schema["enum"]):
        wrong.append(f"{at}: {value!r} is none of {schema['enum']}")
    if "anyOf" in schema and all(_misfits(value, one, defs, at) for one in schema["anyOf"]):
        wrong.append(f"{at}: {value!r} fits nothing of anyOf")
    if isinstance(value, dict):
        if "oneOf" in schema and sum(set(one["required"]) <= set(value) for one in schema["oneOf"]) != 1:
            wrong.append(f"{at}: not exactly one of {schema['oneOf']}")
        wrong += [f"{at}: {key} is missing" for key in schema.get("required", []) if key not in value]
        properties = schema.get("properties", {})
        for key, item in value.items():
            inner = properties.get(key, schema.get("additionalProperties", True))
            if inner is False:
                wrong.append(f"{at}: unknown key {key}")
            elif inner is not True:
                wrong += _misfits(item, inner, defs, f"{at}.{key}")
            wrong += _misfits(key, schema.get("propertyNames", {}), defs, f"{at}.{key} (the key)")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            wrong.append(f"{at}: {len(value)} items")
        for index, item in enumerate(value):
            wrong += _misfits(item, schema.get("items", {}), defs, f"{at}[{index}]")
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            wrong.append(f"{at}: {len(value)} characters")
        if not re.search(schema.get("pattern", ""), value):
            wrong.append(f"{at}: {value!r} does not match {schema['pattern']}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        wrong.append(f"{at}: {value} is out of bounds")
    return wrong


def _is(value: object, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
