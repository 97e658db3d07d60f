"""The tables of options and of keys in our pages, out of the code: `make docs` rewrites them where they stand.

A table stands between two comments. The first names its source, the last is `<!-- end -->`:

    <!-- options: package add -->
    <!-- key of relay.yaml: relay.config.RelayConfig -->
    <!-- events: relay.audit.acts -->

What an option means is its help, what a key means the string below its field. A string below several fields speaks for
all of them. When an event is told stands in its docstring.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from textwrap import dedent

import click
import msgspec

from orchestrator.journal import trail
from relay.audit.event import Caller, Event
from relay.main import waystation

PAGES = sorted(Path(__file__).parent.glob("*.md"))

_TABLE = re.compile(r"(?P<open><!-- (?P<head>[^:>]+): (?P<source>[^>]+?) -->\n)[^<]*(?P<close><!-- end -->)")
_ONE_WORD = re.compile(r"\[default: (?P<value>\S+)\]$")
_DEFAULT = re.compile(r"\[default: (?P<value>.+)\]$")
_WORD_OF_CODE = re.compile(r"(?<![`\w-])(\$[A-Z_]+|--[a-z][a-z0-9-]+)")


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        current = rewritten(text)
        if current != text:
            page.write_text(current, encoding="utf-8")
            click.echo(f"rewrote {page.name}")


def rewritten(page: str) -> str:
    """The page with its tables as the code has them now."""
    return _TABLE.sub(lambda found: f"{found['open']}{_table(found['head'], found['source'])}{found['close']}", page)


def sources(page: str) -> list[str]:
    """What the tables of the page are made of."""
    return [found["source"] for found in _TABLE.finditer(page)]


def commands() -> dict[str, click.Command]:
    """Every command that does something, by its words: `package add`."""
    context = click.Context(waystation)
    found: dict[str, click.Command] = {}
    for name in waystation.list_commands(context):
        command = waystation.get_command(context, name)
        assert command is not None
        members = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {member}": each for member, each in members.items()} or {name: command}
    return found


def keys(type: type[msgspec.Struct]) -> Iterator[tuple[str, str]]:
    """The keys of a mapping, as they are written, and what they mean; several where one string speaks for them.

    Raises:
        ValueError: a key has no string.
    """
    fields = {field.name: field for field in msgspec.structs.fields(type)}
    (definition,) = ast.parse(dedent(inspect.getsource(type))).body
    assert isinstance(definition, ast.ClassDef)
    told: list[msgspec.structs.FieldInfo] = []
    for node in definition.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) if name in fields:
                told.append(fields[name])
            case ast.Expr(value=ast.Constant(value=str(text))) if told:
                yield ", ".join(f"`{field.encode_name}`" for field in told), _meaning(text, told)
                told = []
    if told:
        raise ValueError(f"{type.__qualname__}.{told[0].name}: no string below it says what it means")


def options(command: click.Command) -> Iterator[tuple[str, str]]:
    """The options of a command, as they are typed, and what they mean.

    Raises:
        ValueError: an option has no help.
    """
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        names = ", ".join(sorted(option.opts, key=len, reverse=True))
        if not option.help:
            raise ValueError(f"{command.name} {names}: no help says what it means")
        value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
        yield f"`{names}{value}`", _help(option, option.help)


def events(source: str) -> Iterator[tuple[str, str, str]]:
    """The events that a module declares: name, fields, and when they are told; of the journal's, those of its entries."""
    module = importlib.import_module(source)
    if module is trail:
        for kind in trail.KINDS:
            fields = ("deployment", *trail.told_fields(kind))
            yield f"`{trail.name_of(kind)}`", _code(fields), " ".join(str(kind.__doc__).split())
        return
    for name, event in vars(module).items():
        # What some of them share (`_Space`) is no event itself, and is never told.
        if isinstance(event, type) and issubclass(event, Event) and event is not Event and not name.startswith("_"):
            grave = "" if event.level <= logging.INFO else f" ({logging.getLevelName(event.level).lower()})"
            alike = f" Merged where {_code(event.alike)} are the same." if event.alike else ""
            yield f"`{event.event_name()}`{grave}", _code(_fields(event)), " ".join(str(event.__doc__).split()) + alike


def _fields(event: type[Event]) -> tuple[str, ...]:
    """With those of the caller in its place."""
    lists = (Caller.__struct_fields__ if name == "by" else (name,) for name in event.__struct_fields__)
    return tuple(chain.from_iterable(lists))


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _help(option: click.Option, text: str) -> str:
    if option.required:
        text = f"{text} Required."
    if option.show_default:
        text = f"{text} [default: {_written(option.default)}]"
    text = _WORD_OF_CODE.sub(r"`\1`", _ONE_WORD.sub(r"Default: `\g<value>`.", text))
    return _DEFAULT.sub(r"Default: \g<value>.", text)


def _table(head: str, source: str) -> str:
    if head == "options":
        return _drawn(("option", "meaning"), options(commands()[source]))
    if head == "events":
        return _drawn(("event", "fields", "told when"), events(source))
    module, _, name = source.rpartition(".")
    return _drawn((head, "meaning"), keys(getattr(importlib.import_module(module), name)))


def _drawn(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    drawn = [f"| {' | '.join(cells)} |\n" for cells in lines]
    return "".join([drawn[0], "|---" * len(heads), "|\n", *drawn[1:]])


def _meaning(text: str, told: list[msgspec.structs.FieldInfo]) -> str:
    text = " ".join(text.split())
    if all(field.required for field in told):
        return f"{text} Required."
    default = _written(told[0].default) if len(told) == 1 else ""
    return f"{text} Default: `{default}`." if default else text


def _written(value: object) -> str:
    """A default as a file would have it; empty where it only means that nothing was written."""
    match value:
        case bool():
            return str(value).lower()
        case str() | int():
            return str(value)
        case float():
            return f"{value:g}"
        case tuple() if value:
            return f"[{', '.join(map(str, value))}]"
    return ""


if __name__ == "__main__":
    main()
