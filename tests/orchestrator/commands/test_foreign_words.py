"""Words of relays, agents and scripts at a person's terminal: they drive nothing, turn nothing around, and forge no line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import msgspec
import pytest
from aiohttp import web
from harness.process import run
from harness.relays import small_server
from msgspec import inspect

from orchestrator.fleet.log_reader import LogReader
from orchestrator.journal import events
from orchestrator.journal.event_text import line
from relay.protocol import messages
from relay.terminal.screen import say

EVIL = "a\x1b[2J\x1b]0;t\x07b\rc\u202ed\u2066e\u200ff\u061cg\x9b1Ah\u2028i\nforged: succeeded"
RAW = set("\x1b\x07\r\u202e\u2066\u200f\u061c\x9b\u2028")


def is_tame(text: str) -> bool:
    return not RAW & set(text) and not [row for row in text.splitlines() if row.startswith("forged")]


# --- what the journal tells


def filled(kind: inspect.Type) -> Any:
    """A value of this type, with hostile words wherever there are words."""
    match kind:
        case inspect.StrType():
            return EVIL
        case inspect.LiteralType(values=values):
            return values[-1]
        case inspect.StructType(cls=cls):
            return cls(**{field.name: filled(field.type) for field in kind.fields})
        case inspect.DictType(key_type=key, value_type=value):
            return {filled(key): filled(value)}
        case inspect.VarTupleType(item_type=item):
            return (filled(item),)
        case inspect.UnionType(types=types):
            return filled(types[0])
        case inspect.BoolType():
            return False
        case inspect.IntType():
            return 1
        case inspect.FloatType():
            return 1.0
        case _:
            return None


@pytest.mark.parametrize("kind", get_args(events.Event), ids=lambda kind: kind.__name__)
def test_every_event_is_told_in_one_line_that_drives_nothing(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(events.Event, UnionType)
    told = line(filled(inspect.type_info(kind)))
    say(told)
    out = capsys.readouterr().out
    assert is_tame(out)
    assert out.count("\n") == 1


# --- what a relay says


def evil(status: int) -> list[web.RouteDef]:
    """It is well, in hostile words; all else is refused in them."""

    async def health(_request: web.Request) -> web.Response:
        ending = messages.Ending("token", EVIL, EVIL, 1.0)
        answer = messages.HealthAnswer("ok", (1,), 1.0, site=EVIL, reason=EVIL, certificate=ending, endings=(ending,))
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def problem(_request: web.Request) -> web.Response:
        document = {"type": EVIL, "title": EVIL, "detail": EVIL, "code": EVIL, "status": status}
        return web.json_response(document, status=status, content_type="application/problem+json")

    return [web.get(messages.HEALTH, health), web.route("*", "/{rest:.*}", problem)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An origin with a package, and an agent."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "tree").mkdir()
    (folder / "tree" / "a.txt").write_text("one")
    nupkg = folder / "Acme.Web.1.0.0.nupkg"
    for words in (
        ("trust", "init"),
        ("package", "pack", folder / "tree", "--id", "Acme.Web", "--version", "1.0.0", "--output", nupkg),
        ("package", "add", nupkg),
        ("agent", "init", "--home", folder / "agent", "--name", "web1", "--trust", folder / "trust" / "trust.json"),
    ):
        assert run(folder, *words).code == 0
    return folder


@pytest.mark.parametrize("status", [400, 409])
async def test_what_a_relay_says_is_shown_by_numbers_where_it_has_no_letters(home: Path, status: int) -> None:
    async with small_server(evil(status)) as url:
        agent = ("--relay", url, "--home", home / "agent")
        for words in (
            ("relay", "status", "--relay", url),
            ("package", "replicate", "Acme.Web", "1.0.0", "--relay", url, "--patience", "0.1"),
            ("package", "fetch", "Acme.Web", "1.0.0", "--relay", url, "--output", home / "x.nupkg"),
            ("agent", "pull", "Acme.Web", "1.0.0", "--root", home / "root", *agent),
            ("agent", "relays", *agent),
            ("agent", "relays", *agent, "--json"),
        ):
            done = await asyncio.to_thread(run, home, *words)
            assert done.out + done.err
            assert is_tame(done.out + done.err), words
            assert "Traceback" not in done.err, done.err
            if words[-1] == "--json":
                json.loads(done.out)


# --- what scripts print


def test_output_of_scripts_keeps_its_tabs_and_nothing_else_that_moves_a_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1~web1~before~1.log").write_bytes(f"a\tb \x1b[31mred\x1b[0m 50 %\r100 %\n{EVIL}\n".encode())
    for entry in LogReader(str(tmp_path), None).news():
        say(str(entry))
    out = capsys.readouterr().out
    assert not RAW & set(out)
    assert out.splitlines()[0] == "web1 before  a\tb " + r"\u001b[31mred\u001b[0m 50 %\r100 %"
