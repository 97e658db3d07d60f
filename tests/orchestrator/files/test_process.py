"""release.yaml: the examples of the documentation load as they stand, and everything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.files import parse_process
from harness.paths import ROOT

from orchestrator.files.process import (
    OneOf,
    Package,
    Process,
    Prompt,
    Undo,
    json_schema,
    load_process,
    machine_scripts,
    package_of,
    rolling_of,
    server_scripts,
    undo_of,
)
from orchestrator.files.values import part_of, seconds
from relay.written.decode import Written
from relay.written.yaml_positions import PlanError

DATA = ROOT / "tests/orchestrator/data"
LEAST = (DATA / "least.yaml").read_text(encoding="utf-8")


def mistakes(text: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        parse_process(text.encode(), "release.yaml", "/project")
    return [str(mistake) for mistake in caught.value.mistakes]


def changed(old: str, new: str) -> str:
    assert LEAST.count(old) == 1
    return LEAST.replace(old, new)


def test_the_least_that_works_loads() -> None:
    process = load_process(str(DATA / "least.yaml"))
    step = process.value.steps[0]
    assert process.folder == str(DATA)
    assert (process.value.project, step.roles, step.deploy, step.to) == ("webshop", ("web",), "web", "/srv/webshop")
    assert package_of(process.value.packages["web"]) == Package(id="Acme.Web")
    assert step.apply is not None
    assert step.apply[0] == "switch"
    assert step.verify[0].expect == "${package.version}"
    rolling = rolling_of(step.strategy)
    assert rolling is not None
    assert rolling.window is None


def test_the_whole_loads_with_every_key_in_its_place() -> None:
    process = load_process(str(DATA / "whole.yaml")).value
    assert process.variables == {"port": "8080", "change": Prompt(prompt="Change ticket", match="^CHG[0-9]{6}$")}
    assert process.secrets["chat_hook"].available_to == "server"
    assert undo_of(process.pre_acquire[0]) == Undo(
        script="ops/vpn-down.sh", timeout="2m", retry=process.pre_acquire[0].retry
    )
    schema, farm, sign_off = process.steps
    assert (schema.run_on, schema.deploy, schema.script, schema.required) == ("server", "db", "migrate.sh", True)
    rolling = rolling_of(farm.strategy)
    assert rolling is not None
    assert rolling.phases[0].gate is not None
    assert rolling.phases[0].gate.not_author
    assert (rolling.phases[1].machines, rolling.phases[1].window, rolling.min_in_service) == (None, "25%", 2)
    assert (farm.verify[0].lasting, farm.verify[0].from_) == ("10s", "server")
    assert sign_off.approvers == ("team:business",)
    assert process.notify[0].on == ("waiting", "paused", "failed", "finished", "rotation_open")
    assert (process.busy, process.deadline) == ("fail", "3h")


def test_frozen_text_gives_the_same_process_as_the_file() -> None:
    path = DATA / "whole.yaml"
    assert parse_process(path.read_bytes(), "elsewhere", "/x").value == load_process(str(path)).value


def test_scripts_are_told_apart_by_where_they_run() -> None:
    process = load_process(str(DATA / "whole.yaml"))
    assert machine_scripts(process) == ["deploy/configure.sh"]
    assert server_scripts(process) == ["ops/vpn-up.sh", "ops/vpn-down.sh", "migrate.sh", "ops/error-rate.sh"]


def test_run_on_may_name_one_machine_of_a_role() -> None:
    text = changed(
        "    roles: [web]\n    deploy: web\n    to: /srv/webshop", "    run_on: { one_of: web }\n    script: x.sh"
    )
    head = text[: text.index("    strategy")]
    step = parse_process(head.encode(), "release.yaml", "/").value.steps[0]
    assert step.run_on == OneOf(one_of="web")


def test_numbers_in_variables_keep_what_was_written() -> None:
    text = LEAST + "variables: { a: 1.10, b: 0755, c: true, d: no, e: '' }\n"
    process = parse_process(text.encode(), "release.yaml", "/").value
    assert process.variables == {"a": "1.10", "b": "0755", "c": "true", "d": "no", "e": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (changed("format: 1", "format: 2"), "release.yaml:1: format: 2: expected 1"),
        (changed("format: 1", "format: true"), "release.yaml:1: format: True: expected 1"),
        (changed("project: webshop\n", ""), "release.yaml:1: the key 'project' is missing: expected a project's name"),
        (changed("project: webshop", "project: 17"), "release.yaml:2: project: 17: expected a project's name"),
        (changed("project: webshop", "project: web shop"), "release.yaml:2: project: 'web shop': expected a project's name"),
        (changed("project: webshop", "project:"), "release.yaml:2: project: is empty: expected a project's name"),
        (changed("Acme.Web", '"Acme..Web"'), "release.yaml:3: packages.web: 'Acme..Web': expected a package id"),
        (changed("roles: [web]", "role: [web]"), "release.yaml:6: steps[0].role: unknown key: expected one of"),
        (changed("roles: [web]", "roles: web"), "release.yaml:6: steps[0].roles: 'web': expected a list"),
        (changed("    roles: [web]\n", ""), "release.yaml:5: steps[0]: says nothing of what it is: expected exactly one"),
        (changed("roles: [web]", "roles: [web]\n    run_on: server"), "has roles and run_on: expected exactly one of"),
        (changed("rotation: web", "script: x.sh"), "release.yaml:10: steps[0].script: does not belong here: expected one of"),
        (changed("strategy: rolling", "strategy: canary"), "'canary': expected parallel or rolling or a mapping with rolling"),
        (changed("action: restart", "action: bounce"), "'bounce': expected reload or restart or start or stop"),
        (changed(", action: restart", ""), "steps[0].apply[1]: the key 'action' is missing"),
        (changed("service: webshop, ", "service: webshop, script: x, "), "has script and service: expected exactly one"),
        (changed("switch,", "swich,"), "steps[0].apply[0]: 'swich': expected switch or a mapping"),
        (changed('expect: "${package.version}"', "for: 10"), "steps[0].verify[0].for: 10: expected a duration such as"),
        (changed('expect: "${package.version}"', "from: agent"), "'agent': expected machine or server"),
        (changed('expect: "${package.version}"', "status: 99"), "99: expected a whole number from 100 to 599"),
        (LEAST + "busy: wait\n", "release.yaml:13: busy: 'wait': expected fail, replace, or wait with a duration"),
        (LEAST + "variables: { 9x: 1 }\n", "variables.9x: '9x': expected a variable's name"),
        (LEAST + "variables: { x: [1] }\n", "variables.x: is a list: expected"),
        (LEAST + "secrets: { s: { available_to: 1 } }\n", "secrets.s.available_to: 1: expected server or a list"),
        (LEAST + "notify: [ { url: 'https://x', on: [done] } ]\n", "'done': expected failed or finished or paused"),
        (LEAST + "acquire: { per_relay: 0 }\n", "acquire.per_relay: 0: expected a whole number from 1 to 1000"),
        ("- 1\n", "release.yaml:1: is a list: expected a mapping with format, project"),
        (changed("steps:\n", "steps: []\nold:\n"), "release.yaml:4: steps: is an empty list"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_line_path_and_expectation(text: str, expected: str) -> None:
    assert any(expected in mistake for mistake in mistakes(text)), mistakes(text)


def test_every_mistake_of_a_file_is_told_and_none_twice() -> None:
    text = """format: 1
project: -x-
packages: { web: Acme.Web, web: Acme.Web }
"""
    assert [each.split(": ")[0] for each in mistakes(text)] == [f"release.yaml:{line}" for line in (1, 2, 3)]
    told = mistakes(
        """format: 3
project: -x-
bogus: 1
pre_acquire: [ { name: vpn, script: 1, until: later } ]
steps:
  - { name: a, roles: [web], keep: many, deploy: 1 }
  - { name: b, run_on: client, timeout: soon }
"""
    )
    places = [mistake.split(": ")[0] + " " + mistake.split(": ")[1] for mistake in told]
    assert places == [
        "release.yaml:1 format",
        "release.yaml:2 project",
        "release.yaml:3 bogus",
        "release.yaml:4 pre_acquire[0].script",
        "release.yaml:4 pre_acquire[0].until",
        "release.yaml:6 steps[0].keep",
        "release.yaml:6 steps[0].deploy",
        "release.yaml:7 steps[1].run_on",
        "release.yaml:7 steps[1].timeout",
    ]


def test_a_typing_error_in_a_key_is_answered_with_the_right_word() -> None:
    assert "did you mean 'verify'?" in mistakes(changed("    verify:", "    verfy:"))[0]


# --- the schema for editors


def test_the_schema_describes_the_process_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    assert schema["$ref"] == "#/$defs/Process"
    process = schema["$defs"]["Process"]
    assert process["required"] == ["format", "project", "steps"]
    assert process["additionalProperties"] is False
    assert set(process["properties"]) == {field.encode_name for field in _fields(Process)}
    assert {"required": ["http"]} in schema["$defs"]["Check"]["oneOf"]
    assert {"for", "from"} <= set(schema["$defs"]["Check"]["properties"])


def _fields(type: type[Written]) -> Any:
    import msgspec.structs

    return msgspec.structs.fields(type)


@pytest.mark.parametrize("name", ["least.yaml", "whole.yaml"])
def test_the_examples_fit_the_schema(name: str) -> None:
    from harness.schema_check import misfits, plain_document

    assert misfits(plain_document(DATA / name), json_schema()) == []


@pytest.mark.parametrize("text", ["format: 2", "steps: [ { name: x } ]", "bogus: 1", "project: 1"])
def test_the_schema_refuses_what_the_loader_refuses(text: str, tmp_path: Path) -> None:
    from harness.schema_check import misfits, plain_document

    key = text.split(":", 1)[0]
    lines = [line for line in LEAST.splitlines() if not line.startswith(f"{key}:")]
    if key == "steps":
        lines = [line for line in lines if not line.startswith(" ")]
    path = tmp_path / "release.yaml"
    path.write_text("\n".join([*lines, text, ""]), encoding="utf-8")
    with pytest.raises(PlanError):
        load_process(str(path))
    assert misfits(plain_document(path), json_schema()) != []


# --- small values


@pytest.mark.parametrize(
    ("text", "expected"), [("500ms", 0.5), ("90s", 90.0), ("2m", 120.0), ("1h", 3600.0), ("7d", 604800.0)]
)
def test_durations_are_seconds(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "10", "s", "1.5h", "-1s", "1 m", "1w", "1s\n"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        seconds(text)


@pytest.mark.parametrize(
    ("share", "whole", "expected"), [(3, 10, 3), ("25%", 10, 2), ("25%", 3, 1), ("100%", 7, 7), ("0%", 7, 0), (0, 7, 0), ("34%", 3, 1)]
)  # fmt: skip
def test_a_percentage_is_rounded_down_and_at_least_one(share: int | str, whole: int, expected: int) -> None:
    assert part_of(share, whole) == expected
