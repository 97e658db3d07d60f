"""docs/release.md says what the code does: outcomes, names that scripts see, what is not built; its examples plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

import click
import msgspec
import pytest
from harness.files import parse_environment, parse_process
from harness.pages import DOCS, ROOT, block, rows, section

from agent.orders.orders import SKEW_SECONDS
from agent.runs.runs import RunSpec
from agent.runs.scripts import _INTERPRETERS, _PASSED_ON
from docs.tables import sources
from orchestrator.deployment.notify import SIGNATURE_HEADER
from orchestrator.deployment.steps import STUCK_SECONDS
from orchestrator.files import environment, process
from orchestrator.files.values import NotificationKind
from orchestrator.fleet.presence import LOST_SECONDS
from orchestrator.plan import unsupported
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import MachineStep, Plan, PlannedPackage, ServerRun, ServerStep
from orchestrator.releases.release import SNAPSHOT_BYTES, SNAPSHOT_FILES
from orchestrator.rolling import turn
from orchestrator.trust.secrets import SECRET_MAX, SECRET_MIN
from relay.main import waystation
from relay.written.decode import Written, _written_in
from relay.written.yaml_positions import PlanError

PAGE = (DOCS / "release.md").read_text(encoding="utf-8")
PLAIN = " ".join(PAGE.split())

IN_A_ROW: Mapping[type[Written], str] = {
    process.Secret: "`available_to",
    process.Retry: "`attempts`",
    process.Undo: "mapping with `script` or `commands`",
    process.Prompt: "{ prompt: TEXT, match: REGEX }",
    process.Strategy: "a mapping `rolling:`",
    environment.Role: "Name to `variables`",
    environment.Feed: "`url` (a NuGet V3",
    environment.Token: "`file` or `env`",
    environment.SecretFrom: "where the value is: `file` or `env`",
}
"""Small ones, told where they stand."""
NOT_BUILT = {process.OneOf, process.MaxPer, environment.Requires, environment.Freeze}
IN_A_TABLE = (_written_in(process.Process) | _written_in(environment.Environment)) - NOT_BUILT - set(IN_A_ROW)


def _fields(type: type[Written]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(type)}


def test_every_mapping_of_both_files_is_told_somewhere() -> None:
    assert {f"{type.__module__}.{type.__name__}" for type in IN_A_TABLE} == set(sources(PAGE))
    for words in IN_A_ROW.values():
        assert words in PAGE


# --- the examples


class _AnyScript:
    """A file system in which every script is there and git tracks nothing."""

    def script(self, folder: str, path: str) -> str:
        return "0" * 64

    def is_tracked(self, path: str) -> bool:
        return False


def _planned(info: str) -> Plan:
    made = parse_process(block(PAGE, f"yaml {info}").encode(), "release.yaml", "/work")
    where = parse_environment(block(PAGE, "yaml environment").encode(), "production.yaml", "/srv/e")
    names = {name: process.package_of(use).id for name, use in made.value.packages.items()}
    prompts = {name: "CHG000001" for name, value in made.value.variables.items() if isinstance(value, process.Prompt)}
    packages = {name: PlannedPackage(id, "1.4.2") for name, id in names.items()}
    return make_plan(
        made,
        where,
        label="1.4.2",
        packages=packages,
        scripts=None,
        prompts=prompts,
        files=_AnyScript(),
        people=("anna", "ben", "clara", "dora"),
    )


@pytest.mark.parametrize("info", ["least", "process"])
def test_the_examples_can_be_planned_together(info: str) -> None:
    planned = _planned(info)
    assert [machine.name for machine in planned.machines] == ["web1", "web2", "web3"]
    assert any(isinstance(step, MachineStep) and step.rotation for step in planned.steps)


def test_the_example_with_everything_uses_every_key_that_is_built() -> None:
    text = block(PAGE, "yaml process") + block(PAGE, "yaml environment")
    others = {"idempotent", "contains", "status", "tcp", "command", "via", "busy", "required", "env", "url"}
    for type in IN_A_TABLE:
        refused = {"max_per", "requires", "freeze", "run_on"}
        for key in _fields(type) - refused - others:
            assert re.search(rf"\b{key}:", text), f"{type.__name__}: {key}"


# --- what scripts see


def _names_seen() -> set[str]:
    planned = _planned("process")
    seen: set[str] = set()
    for step in planned.steps:
        if isinstance(step, ServerStep):
            assert isinstance(step.on_rollback, ServerRun) == (step.name == "schema")
            seen |= set(step.run.variables)
            seen |= set(step.on_rollback.variables) if isinstance(step.on_rollback, ServerRun) else set()
        elif isinstance(step, MachineStep):
            for each in step.turns:
                seen |= set(each.variables)
            for phase in step.phases:
                seen |= set(phase.gate.check.variables) if phase.gate and phase.gate.check else set()
    for early in planned.pre_acquire:
        assert early.undo is not None
        seen |= set(early.run.variables) | set(early.undo.variables)
    return {re.sub(r"^(VAR|TAG)_.*", r"\1_<NAME>", name) for name in seen}


def test_the_names_that_scripts_see_are_told_and_no_other() -> None:
    table = section(PAGE, "## What scripts see")
    told = {name for row in rows(table) for name in re.findall(r"`([A-Z][A-Z_]*(?:<NAME>)?)`", row[0])}
    later = {"DEPLOYMENT", "ATTEMPT", "OUTCOME", "MACHINES", "PACKAGE_DIR", "WAYSTATION_OPERATION", "WAYSTATION_RUN"}
    source = "".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "orchestrator/deployment/steps.py",
            "orchestrator/deployment/turns.py",
            "orchestrator/deployment/server_runs.py",
            "agent/operations.py",
            "agent/platform.py",
        )
    )
    assert [name for name in later if f'"{name}"' not in source] == []
    assert told == _names_seen() | later | {"SECRET_<NAME>"}


def test_what_is_passed_on_and_how_scripts_start_is_told() -> None:
    text = section(PAGE, "## What scripts see")
    windows = _PASSED_ON.index("TMPDIR") + 1
    assert [name for name in _PASSED_ON[:windows] if f"`{name}`" not in text] == []
    assert [extension for extension in _INTERPRETERS if f"`{extension}`" not in text] == []


def test_the_numbers_on_the_page_are_those_of_the_code() -> None:
    spec = RunSpec(("true",), "/", 1.0)
    for words in (
        f"within {LOST_SECONDS:.0f} s",
        f"right to {SKEW_SECONDS / 60:.0f} min",
        f"looks again for {STUCK_SECONDS:.0f} s",
        f"at most {SNAPSHOT_FILES} files, {SNAPSHOT_BYTES >> 20} MiB",
        f"kept ({(spec.head_bytes + spec.tail_bytes) // 1_000_000} MB",
        f"TERM and, {spec.grace:.0f} s later, KILL",
        f"at most {SECRET_MAX >> 10} KiB",
        f"those under {SECRET_MIN} characters",
        f"`{SIGNATURE_HEADER}`",
    ):
        assert words in PLAIN, words


# --- words


def test_every_outcome_of_a_turn_is_told_and_no_other() -> None:
    told = {row[1].strip("`") for row in rows(section(PAGE, "## A machine's turn"))[2:]}
    assert told == set(get_args(turn.TurnEnding))


def test_every_word_that_after_hears_is_told() -> None:
    text = section(PAGE, "## Rotations")
    assert [word for word in (*get_args(turn.AfterOutcome), "put_back") if f"`{word}`" not in text] == []


def test_every_event_is_told() -> None:
    assert [
        event for event in get_args(NotificationKind) if f"`{event}`" not in section(PAGE, "## Notifications")
    ] == []


# --- what is not built

REFUSED = {
    "`run_on: { one_of: ROLE }`": "run_on: one_of",
    "`max_per`": "max_per",
    "`via: direct`": "via: direct",
    "`busy: wait …` and `replace`": "busy: wait and busy: replace",
    "`requires`": "requires",
    "`freeze`": "freeze",
    "`run_on: machine` of a rotation": "run_on: machine in a rotation",
    "secrets by `command` and `credential`": "a secret from a command",
    "machines `from:` a command": "machines from a command",
}
"""What the page says, and how the code refuses it."""
MORE = {"a secret from a systemd credential"}


def test_what_the_page_calls_not_built_is_what_the_code_refuses() -> None:
    text = (ROOT / unsupported.__name__.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    refused = set(re.findall(r'_say\(file, f?"([^"{]*)', text))
    assert refused == set(REFUSED.values()) | MORE
    cells = [row[1] for row in rows(section(PAGE, "## Not built yet"))[2:]]
    told = {part.strip() for cell in cells for part in cell.split(";")}
    assert told == set(REFUSED) | {"`${outputs…}`"}


def test_outputs_are_refused_by_name() -> None:
    text = block(PAGE, "yaml least").replace("${package.version}", "${outputs.schema.version}")
    made = parse_process(text.encode(), "release.yaml", "/work")
    where = parse_environment(block(PAGE, "yaml environment").encode(), "production.yaml", "/srv/e")
    with pytest.raises(PlanError, match="outputs of steps are not built yet"):
        make_plan(
            made,
            where,
            label="1",
            packages={"web": PlannedPackage("Acme.Web", "1.4.2")},
            scripts=None,
            prompts={},
            files=_AnyScript(),
        )


def test_a_command_that_the_page_calls_missing_is_missing() -> None:
    text = section(PAGE, "## Not built yet")
    (listed,) = re.findall(r"not there: (.*?)\.$", text, re.DOTALL | re.MULTILINE)
    of_release, of_orchestrator = listed.split(";")
    group = waystation.get_command(click.Context(waystation), "release")
    assert isinstance(group, click.Group)
    named = [name.removeprefix("release ") for name in re.findall(r"`([^`]+)`", of_release)]
    assert "promote" in named
    assert [name for name in named if name in group.commands] == []
    assert "`orchestrator serve`" in of_orchestrator
    assert waystation.get_command(click.Context(waystation), "orchestrator") is None
    probe = {option for param in group.commands["plan"].params for option in param.opts}
    assert "--probe" not in probe
