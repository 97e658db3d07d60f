"""docs/commands.md names every command, no other, and the JSON that each really prints. Its options: test_tables.py."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args
from zipfile import ZipFile, ZipInfo

import click
import msgspec
import pytest
from click.testing import CliRunner
from harness.pages import DOCS, block, blocks, rows, section
from harness.people_kit import DEPLOYMENT, planned

from docs import tables
from orchestrator.commands import options
from orchestrator.journal import ledger, views
from orchestrator.journal.events import AskOpened, MachineAsked
from orchestrator.journal.journal import Journal
from relay.errors import LockedError, UsageError, WaystationError
from relay.main import waystation
from relay.protocol.messages import EncodedBytes

PAGE = (DOCS / "commands.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^## waystation ([a-z]+(?: [a-z-]+)?)(.*)$", PAGE, re.MULTILINE)
COMMANDS = tables.commands()


def _section_of(command: str) -> str:
    (rest,) = [rest for name, rest in HEADINGS if name == command]
    return section(PAGE, f"## waystation {command}{rest}")


def test_every_command_has_a_section_and_every_section_a_command() -> None:
    assert sorted(name for name, _ in HEADINGS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_table_of_a_section_is_that_of_its_command(name: str) -> None:
    has_options = any(isinstance(param, click.Option) for param in COMMANDS[name].params)
    assert tables.sources(_section_of(name)) == [name] * has_options


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_arguments_stand_in_the_heading(name: str) -> None:
    (rest,) = [rest for command, rest in HEADINGS if command == name]
    told = rest.replace("…", "...").split()
    taken = [
        word if param.required else f"[{word}]"
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
        words = shlex.split(line)
        depth = 1 + len(name.split())
        assert words[:depth] == ["waystation", *name.split()]
        # The example's folder need not be here; everything else must parse.
        known = ["." if word == "./publish" else word for word in words[depth:]]
        COMMANDS[name].make_context(name, known)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {int(row[0]) for row in rows(section(PAGE, "## Exit codes"))[2:]}
    of_errors = {WaystationError.exit_code, UsageError.exit_code, LockedError.exit_code}
    of_deployments = {options.DONE, options.FAILED, options.WAITS, options.WITH_EXCLUSIONS, options.CANCELLED}
    assert told == of_errors | of_deployments


# --- the JSON, by really running each


_PROCESS = """\
format: 1
project: webshop
packages: { web: Acme.Web }
pre_acquire: [ { name: open vpn, commands: [[echo, open]] } ]
steps:
  - name: web farm
    roles: [web]
    deploy: web
    to: "${root}"
    strategy: rolling
    rotation: web
    on_failure: stop
    verify: [ { command: ["${check}"], deadline: 500ms, from: server } ]
"""
_ENVIRONMENT = """\
environment: production
relays: { fra: { url: "%(relay)s", site: fra } }
rotation: { web: { before: out.sh, after: in.sh } }
variables: { root: "%(root)s", check: "%(check)s" }
machines: { web1: { address: 127.0.0.1, site: fra, roles: [web], key: "%(key)s" } }
"""


class _Session:
    """One origin, one relay and one machine in a folder; runs commands and keeps what they print."""

    def __init__(self, folder: Path, relay: str) -> None:
        self.folder = folder
        self.relay = relay
        self.printed: dict[str, dict[str, object]] = {}

    def run(self, command: str, *words: str, code: int = 0) -> None:
        done = CliRunner().invoke(
            waystation, [*command.split(), *words, "--json"], catch_exceptions=False, standalone_mode=False
        )
        assert (done.return_value or 0) == code, done.output
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
        self.run("package fetch", "acme.web", "1.4.2", "--output", str(self.folder / "fetched.nupkg"))
        again = self._pack_again(nupkg)
        self.run("package diff", nupkg, again)
        self.run("package lint", again, "--against", nupkg)
        self.run("package replicate", "acme.web", "1.4.2", "--relay", self.relay)
        self.run("relay status", "--relay", self.relay)
        self.run("bench line", "--relay", self.relay, "--seconds", "3", "--connections", "1")
        self.run("bench transfer", nupkg, "--line", "50,4", "--encodings", "zstd:3", "--repeat", "1")
        self.run("agent init", "--trust", pins, "--relay", self.relay, "--name", "web1")
        self.run("agent pull", "acme.web", "1.4.2", "--root", root, "--switch")
        self.run("agent relays")
        self.run("agent verify")
        self.run("init", str(self.folder / "scaffold"))
        with _serving("agent", "serve"):
            self._release()
        self.run("agent status")
        self.run("package remove", "acme.web", "1.4.2")

    def _pack_again(self, nupkg: str) -> str:
        """Another build: later, and with one more line."""
        again = str(self.folder / "again.nupkg")
        with ZipFile(nupkg) as old, ZipFile(again, "w") as new:
            for name in old.namelist():
                more = b"echo again\n" if name == "run.sh" else b""
                new.writestr(ZipInfo(name, (2026, 1, 2, 3, 4, 6)), old.read(name) + more)
        return again

    def _release(self) -> None:
        """One that succeeds, and one whose machine stays out and is put back."""
        process = self.folder / "release.yaml"
        process.write_text(_PROCESS, encoding="utf-8")
        for script in ("out.sh", "in.sh"):
            (self.folder / script).write_text("echo done\n", encoding="utf-8")
        good, bad = (self._write_environment(check) for check in ("true", "false"))
        files = ("--process", str(process), "--package", "web=1.4.2", "--environment")
        self.run("release plan", *files, good)
        self.run("release create", "1.4.2", *files, good)
        self.run("release stage", "1.4.2", "--process", str(process), "--environment", good)
        self.run("release deploy", "1.4.2", "--process", str(process), "--environment", good)
        self.run("release retry", "--machine", "web1")
        self.run("release log", "server")
        self.run("release deploy", "1.4.2-again", *files, bad, code=options.FAILED)
        self.run("release status")
        self.run("release history", "--limit", "1")
        self.run("rotation list")
        self.run("rotation close", "web1", "--force", "--message", "back")
        self.run("release rollback", "--process", str(process), "--environment", good)
        process.write_text(_PROCESS.replace("on_failure: stop", "on_failure: ask"), encoding="utf-8")
        self.run("release deploy", "1.4.2-asks", *files, bad, "--no-wait", code=options.WAITS)
        self.run("release decide", "web1", "fail")
        self.run("release resume", code=options.FAILED)
        self.run("rotation close", "web1", "--force", "--message", "back")
        self._decide()

    def _decide(self) -> None:
        """What people say of a deployment that no process runs."""
        self.run("trust person", "ben")
        self.run("trust person", "anna", "--environment", "staging")
        with Journal.open(str(self.folder / "home/journal.db")) as journal:
            journal.begin(DEPLOYMENT, msgspec.json.encode(planned()), 1, "clara@host")
            for name in ("canary looks good", "sign off"):
                step = 2 if name.startswith("canary") else 3
                journal.append(DEPLOYMENT, AskOpened(f"{step}/{name}", step, name, "Is it good?"))
            journal.append(DEPLOYMENT, MachineAsked("web2", 2, "verify failed", ("retry", "fail")))
        anna = ("--as", "anna")
        self.run("release approve", "canary looks good", *anna)
        self.run("release reject", "canary looks good", "--message", "errors", "--as", "ben")
        self.run("release decide", "web2", "retry", *anna)
        self.run("release pause", *anna)
        self.run("release go-on", *anna)
        self.run("release cancel", *anna)

    def _write_environment(self, check: str) -> str:
        path = self.folder / f"{check}.yaml"
        values = {"relay": self.relay, "root": str(self.folder / "srv"), "check": check}
        path.write_text(_ENVIRONMENT % (values | {"key": self.printed["agent init"]["fingerprint"]}), encoding="utf-8")
        return str(path)


@contextmanager
def _serving(*words: str) -> Iterator[str]:
    """A process of its own, because each command under test runs a loop in this one; the last word that it prints."""
    with subprocess.Popen([sys.executable, "-m", "relay.main", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert " ready at " in ready, ready
            yield ready.split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Session]:
    folder = tmp_path_factory.mktemp("commands")
    store = ("--listen", "127.0.0.1:0", "--store", f"disk:{folder / 'relay'}")
    with pytest.MonkeyPatch.context() as patch, _serving("relay", "serve", *store) as url:
        patch.setenv("WAYSTATION_HOME", str(folder / "home"))
        patch.delenv("WAYSTATION_TOKEN", raising=False)
        session = _Session(folder, url)
        session.run_all()
        yield session


@pytest.fixture
def printed(session: _Session) -> Mapping[str, dict[str, object]]:
    return session.printed


_OPEN_MAPS = {"metadata", "shares", "from_relays", "to_relays", "failed", "variables"}
"""Members whose keys are data: what a nuspec says, encoders, URLs, names of relays and variables."""
_AS = {f"release {name}": "release status" for name in ("deploy", "resume", "stage", "retry", "rollback")}
"""Commands that print what another prints."""


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
        return sorted({json.dumps(_shape(_filled(one, value))) for one in value})
    return (
        "number"
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        else type(value).__name__
    )


def _filled(one: object, beside: list[object]) -> object:
    """With what others of the list have where it has null: on a busy machine, less is measured."""
    if not isinstance(one, dict):
        return one
    others = [other for other in beside if isinstance(other, dict)]
    return {
        key: next((other[key] for other in others if other.get(key) is not None), None) if inner is None else inner
        for key, inner in one.items()
    }


@pytest.mark.processes
@pytest.mark.parametrize("name", sorted(n for n, c in COMMANDS.items() if any("--json" in p.opts for p in c.params)))
def test_the_json_on_the_page_is_what_the_command_prints(name: str, printed: Mapping[str, dict[str, object]]) -> None:
    told = json.loads(block(PAGE, f"json {_AS.get(name, name)}"))
    if name in _AS:
        assert set(told) == set(printed[name])
    else:
        assert _shape(told) == _shape(printed[name])
    assert printed[name].get("format") == told.get("format")


def _told_fields(member: str) -> set[str]:
    """The fields that the table under `release status` names for a member of its JSON."""
    text = _section_of("release status")
    (cell,) = [row[1] for row in rows(text) if row[0] == f"`{member}`"]
    return set(re.findall(r"`(\w+)(?:\[\])?`", re.sub(r"\([^)]*\)", "", cell)))


@pytest.mark.parametrize(
    ("member", "type"),
    [
        ("summary", views.DeploymentSummary),
        ("pre_acquire[]", views.PreAcquireView),
        ("ledger", ledger.LedgerView),
        ("ledger.replicated[]", ledger.ReplicatedView),
        ("ledger.lines[]", ledger.LineView),
        ("ledger.sent`, `ledger.pulled", ledger.CrossedView),
        ("…encodings[]", EncodedBytes),
        ("ledger.alternatives", ledger.AlternativesView),
        ("ledger.saved", ledger.SavedView),
        ("steps[]", views.StepView),
        ("steps[].turns[]", views.TurnView),
        ("machines[]", views.MachineView),
        ("running[]", views.OperationView),
        ("behind[]", views.BehindView),
        ("left[]", views.LeftView),
        ("refusals[]", views.RefusalView),
        ("decisions[]", views.DecisionView),
        ("notes[]", views.NoteView),
    ],
)
def test_the_fields_of_a_deployment_on_the_page_are_those_of_the_code(member: str, type: type[msgspec.Struct]) -> None:
    assert _told_fields(member) == set(type.__struct_fields__)


def test_every_member_of_a_deployment_is_in_the_table() -> None:
    told = {row[0].strip("`").removesuffix("[]") for row in rows(_section_of("release status"))}
    assert set(views.DeploymentView.__struct_fields__) - {"format"} <= told


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("summary", views.DeploymentState),
        ("stage", views.Stage),
        ("pre_acquire[]", views.StepState),
        ("pre_acquire[]", views.UndoState),
        ("machines[]", views.MachineStage),
    ],
)
def test_every_state_is_told(member: str, words: object) -> None:
    (cell,) = [row[1] for row in rows(_section_of("release status")) if row[0] == f"`{member}`"]
    assert [word for word in _words_of(words) if f"`{word}`" not in cell] == []


def _words_of(type: object) -> list[object]:
    """Of a literal, or of a union of such."""
    return [type] if isinstance(type, str) else [word for inner in get_args(type) for word in _words_of(inner)]


# --- what all of that left on disk, beside docs/protocol.md


def _told_names(heading: str, below: str = "") -> set[str]:
    """First components of the paths in the table under a heading, of those below `below`."""
    page = (DOCS / "protocol.md").read_text(encoding="utf-8")
    paths = [path for row in rows(section(page, heading)) for path in re.findall(r"`([^`]+)`", row[0])]
    return {path.removeprefix(below).split("/")[0] for path in paths if path.startswith(below)}


def _names_in(folder: Path) -> set[str]:
    found = {path.name for path in folder.iterdir()}
    assert found, folder
    return found


@pytest.mark.processes
def test_everything_in_an_agents_home_is_told(session: _Session) -> None:
    home = session.folder / "home/agent"
    assert _names_in(home) <= _told_names("### An agent's home")
    operations = [_names_in(each) for each in (home / "operations").iterdir()]
    assert set().union(*operations) <= _told_names("### An agent's home", "operations/…/")


@pytest.mark.processes
def test_everything_in_the_orchestrators_home_is_told(session: _Session) -> None:
    home = session.folder / "home"
    assert _names_in(home) - {"agent", "depot"} <= _told_names("### The orchestrator's home") | {
        "journal.db-wal",
        "journal.db-shm",
    }
    deployments = [_names_in(each) for each in (home / "deployments").iterdir()]
    assert set().union(*deployments) <= _told_names("### The orchestrator's home", "deployments/<ulid>/")


@pytest.mark.processes
def test_everything_of_a_run_is_told(session: _Session) -> None:
    runs = [each.parent for each in (session.folder / "home/deployments").rglob("spec.json")]
    assert len(runs) > 3
    assert set().union(*map(_names_in, runs)) <= _told_names("### A run")
