"""docs/commands.md names every command and option, no other, and the JSON that each really prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pages import DOCS, block, blocks, rows, section

from relay.errors import LockedError, UsageError, WaystationError
from relay.main import waystation

PAGE = (DOCS / "commands.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^## waystation (\w+ \w+)(.*)$", PAGE, re.MULTILINE)


def _commands() -> dict[str, click.Command]:
    context = click.Context(waystation)
    found: dict[str, click.Command] = {}
    for name in waystation.list_commands(context):
        group = waystation.get_command(context, name)
        assert isinstance(group, click.Group)
        found |= {f"{name} {member}": command for member, command in group.commands.items()}
    return found


COMMANDS = _commands()


def _section_of(command: str) -> str:
    (rest,) = [rest for name, rest in HEADINGS if name == command]
    return section(PAGE, f"## waystation {command}{rest}")


def test_every_command_has_a_section_and_every_section_a_command() -> None:
    assert sorted(name for name, _ in HEADINGS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_on_the_page_are_those_of_the_command(name: str) -> None:
    told = {re.split(r"[ `]", row[0].strip("`"))[0] for row in rows(_section_of(name)) if row[0].startswith("`--")}
    taken = {opt for param in COMMANDS[name].params if isinstance(param, click.Option) for opt in param.opts}
    assert told == taken


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_arguments_stand_in_the_heading(name: str) -> None:
    (rest,) = [rest for command, rest in HEADINGS if command == name]
    told = rest.replace("…", "...").split()
    taken = [
        word
        for param in COMMANDS[name].params
        if isinstance(param, click.Argument)
        for word in (param.metavar or str(param.name).upper()).split()
    ]
    assert told == taken


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_that_parses(name: str) -> None:
    examples = [one.text for one in blocks(_section_of(name)) if one.info == "sh"]
    assert examples
    for line in "".join(examples).splitlines():
        words = line.split()
        assert words[:3] == ["waystation", *name.split()]
        # The example's folder need not be here; everything else must parse.
        known = ["." if word == "./publish" else word for word in words[3:]]
        COMMANDS[name].make_context(name, known)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {int(row[0]) for row in rows(section(PAGE, "## Exit codes"))[2:]}
    assert told == {0, WaystationError.exit_code, UsageError.exit_code, LockedError.exit_code, 130}


# --- the JSON, by really running each


class _Session:
    """One origin, one relay and one machine in a folder; runs commands and keeps what they print."""

    def __init__(self, folder: Path, relay: str) -> None:
        self.folder = folder
        self.relay = relay
        self.printed: dict[str, dict[str, object]] = {}

    def run(self, command: str, *words: str) -> None:
        done = CliRunner().invoke(waystation, [*command.split(), *words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        self.printed[command] = json.loads(done.stdout)

    def run_all(self) -> None:
        source = self.folder / "publish"
        source.mkdir()
        (source / "run.sh").write_text("#!/bin/sh\necho hello\n", encoding="utf-8")
        nupkg, root = str(self.folder / "acme.nupkg"), str(self.folder / "root")
        pins = str(self.folder / "home/trust/trust.json")
        self.run("package pack", str(source), "--id", "Acme.Web", "--version", "1.4.2", "--output", nupkg)
        self.run("trust init")
        self.run("package add", nupkg)
        self.run("package list")
        self.run("package show", "acme.web", "1.4.2")
        self.run("package replicate", "acme.web", "1.4.2", "--relay", self.relay)
        self.run("relay status", "--relay", self.relay)
        self.run("agent init", "--trust", pins, "--relay", self.relay)
        self.run("agent pull", "acme.web", "1.4.2", "--root", root, "--switch")
        self.run("agent relays")
        self.run("agent verify")
        self.run("package remove", "acme.web", "1.4.2")


@contextmanager
def _relay(store: str) -> Iterator[str]:
    """A relay in a process of its own, because each command under test runs a loop in this one; its URL."""
    words = [sys.executable, "-m", "relay.main", "relay", "serve", "--listen", "127.0.0.1:0", "--store", store]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("relay ready at "), ready
            yield ready.split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch, _relay(f"disk:{folder / 'relay'}") as url:
        patch.setenv("WAYSTATION_HOME", str(folder / "home"))
        patch.delenv("WAYSTATION_TOKEN", raising=False)
        session = _Session(folder, url)
        session.run_all()
        yield session.printed


_OPEN_MAPS = {"metadata", "from_relays", "failed"}
"""Members whose keys are data: what a nuspec says, and URLs."""


def _shape(value: object) -> object:
    """Keys and kinds of values, without the values. null stands for a number that was not measured."""
    if isinstance(value, dict):
        return {
            key: sorted({json.dumps(_shape(one)) for one in inner.values()})
            if key == "from_relays"
            else type(inner).__name__
            if key in _OPEN_MAPS
            else _shape(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return sorted({json.dumps(_shape(one)) for one in value})
    return (
        "number"
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        else type(value).__name__
    )


@pytest.mark.parametrize("name", sorted(n for n, c in COMMANDS.items() if any("--json" in p.opts for p in c.params)))
def test_the_json_on_the_page_is_what_the_command_prints(name: str, printed: Mapping[str, dict[str, object]]) -> None:
    told = json.loads(block(PAGE, f"json {name}"))
    assert _shape(told) == _shape(printed[name])
    assert printed[name]["format"] == told["format"]
