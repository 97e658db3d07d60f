"""The tables of options and of keys in our pages, out of the code: `make docs` rewrites them where they stand.

A table stands between two comments. The first names its source, the last is `<!-- end -->`:

    <!-- options: package add -->
    <!-- key of relay.yaml: relay.config.RelayConfig -->

What an option means is its help, what a key means the string below its field. A string below several fields speaks for
all of them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent

import click
import msgspec

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


def _help(option: click.Option, text: str) -> str:
    if option.required:
        text = f"{text} Required."
    if option.show_default:
        text = f"{text} [default: {_written(option.default)}]"
    text = _WORD_OF_CODE.sub(r"`\1`", _ONE_WORD.sub(r"Default: `\g<value>`.", text))
    return _DEFAULT.sub(r"Default: \g<value>.", text)


def _table(head: str, source: str) -> str:
    if head == "options":
        return _drawn("option", options(commands()[source]))
    module, _, name = source.rpartition(".")
    return _drawn(head, keys(getattr(importlib.import_module(module), name)))


def _drawn(head: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = ["| {} | {} |\n".format(*(cell.replace("|", r"\|") for cell in row)) for row in rows]
    return "".join([f"| {head} | meaning |\n", "|---|---|\n", *lines])


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
