"""A plan decides everything before the first byte moves, or says everything that is in its way."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.files import parse_environment, parse_process
from harness.paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.orders import CommandCheck, HttpCheck, ServiceCheck, TcpCheck
from orchestrator.files.environment import Environment, load_environment
from orchestrator.files.process import Process, load_process
from orchestrator.files.scaffold import write_scaffold
from orchestrator.files.script_files import Files, ScriptPathError, check_script_path
from orchestrator.plan.forecast import describe, document, forecast
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import (
    MachineStep,
    Plan,
    PlannedPackage,
    PlannedPhase,
    ScriptAction,
    SecretSource,
    ServerStep,
    ServiceAction,
    SwitchAction,
)
from relay.written.decode import fit_with_stand_ins
from relay.written.yaml_positions import PlanError, parse

DATA = ROOT / "tests/orchestrator/data"
WEB = PlannedPackage("Acme.Web", "1.4.2", "ab" * 32, tree_bytes=1000, nupkg_bytes=400)
DB = PlannedPackage("Acme.Schema", "2.0.0", "cd" * 32, tree_bytes=50, nupkg_bytes=20)
SCRIPTS = PlannedPackage("Waystation.Scripts.webshop", "1.0.0-h0123456789abcdef", "ef" * 32, 5, 7)


class Scripts:
    """Script files by path: their hash, or nothing there."""

    def __init__(self, missing: tuple[str, ...] = (), tracked: tuple[str, ...] = (), edition: str = "1") -> None:
        self._missing, self._tracked, self._edition = missing, tracked, edition

    def script(self, folder: str, path: str) -> str:
        check_script_path(path)
        if path in self._missing:
            raise ScriptPathError(f"there is no script {path!r} in {folder}")
        return (path.encode().hex() + self._edition * 64)[:64]

    def is_tracked(self, path: str) -> bool:
        return path in self._tracked


def plan(
    process: str,
    environment: str = (DATA / "staging.yaml").read_text(encoding="utf-8"),
    *,
    packages: Mapping[str, PlannedPackage] | None = None,
    prompts: Mapping[str, str] | None = None,
    files: Files | None = None,
    label: str = "1.4.2",
    scripts: PlannedPackage | None = SCRIPTS,
) -> Plan:
    return make_plan(
        parse_process(process.encode(), "release.yaml", "/project"),
        parse_environment(environment.encode(), "staging.yaml", "/environments"),
        label=label,
        packages={"web": WEB} if packages is None else packages,
        scripts=scripts,
        prompts=prompts or {},
        files=files or Scripts(),
    )


def mistakes(process: str, environment: str | None = None, **options: Any) -> list[str]:
    more: dict[str, Any] = {} if environment is None else {"environment": environment}
    with pytest.raises(PlanError) as caught:
        plan(process, **more, **options)
    return [str(mistake) for mistake in caught.value.mistakes]


def process(step: str, head: str = "") -> str:
    return f"format: 1\nproject: webshop\npackages: {{ web: Acme.Web }}\n{head}steps:\n  - {{ name: farm, {step} }}\n"


def machine_step(made: Plan, number: int = 1) -> MachineStep:
    step = made.steps[number - 1]
    assert isinstance(step, MachineStep)
    return step


FARM = "roles: [web], deploy: web, to: /srv/webshop"
ROLL = "roles: [web], deploy: web, to: /srv/webshop, strategy: { rolling: "
LEAST = (DATA / "least.yaml").read_text(encoding="utf-8")
BUILT = """format: 1
project: webshop
variables: { port: 8080, change: { prompt: "Change ticket", match: "^CHG[0-9]{6}$" } }
secrets: { app_key: { available_to: [web] }, chat_hook: { available_to: server } }
packages:
  web: { id: Acme.Web }
  db:  { id: Acme.Schema, feed: corp }
pre_acquire:
  - { name: open vpn, script: ops/vpn-up.sh, timeout: 2m, stall: 30s, retry: { attempts: 3, delay: 10s }, undo: ops/vpn-down.sh }
  - { name: tell, commands: [ [logger, "deploying ${release.label}"] ], until: acquired, secrets: [chat_hook] }
acquire: { deadline: 20m, stall: 30s, per_relay: 5 }
steps:
  - { name: schema, run_on: server, deploy: db, script: migrate.sh, timeout: 15m, required: true }
  - name: web farm
    roles: [web]
    deploy: web
    to: /srv/webshop
    keep: 5
    strategy: { rolling: { phases: [ { machines: 1 }, { window: 50% } ], min_in_service: 2, max_failures: 1 } }
    rotation: web
    apply:
      - { name: configure, script: deploy/configure.sh, secrets: [app_key], timeout: 1m, stall: 20s, retry: { attempts: 2, delay: 1s } }
      - switch
      - { service: webshop, action: restart, idempotent: true }
    verify:
      - { http: "http://${machine.address}:${port}/version", expect: "${package.version}", for: 10s, deadline: 2m, from: server }
      - { tcp: "${machine.address}:${port}" }
      - { command: [check-app, "--release", "${package.version}"], timeout: 5s }
      - { service: webshop }
    on_failure: stop
  - { name: clean up, run_on: server, commands: [ [rm, -f, /tmp/x] ], when: always }
notify: [ { url_secret: chat_hook, on: [failed, finished] } ]
deadline: 3h
"""


def built(**options: object) -> Plan:
    return plan(BUILT, packages={"web": WEB, "db": DB}, prompts={"change": "CHG000042"}, **options)  # type: ignore[arg-type]


# --- what a plan holds


def test_the_least_that_works_rolls_one_machine_at_a_time() -> None:
    step = machine_step(plan(LEAST))
    assert (step.strategy, step.phases, step.max_failures) == ("rolling", (PlannedPhase(0, 1),), 0)
    assert [turn.machine for turn in step.turns] == ["web1", "web2", "web3", "web4"]
    assert step.turns[0].actions == (SwitchAction(), ServiceAction("restart-webshop", "webshop", "restart"))
    assert step.turns[0].verify[0].check.check == HttpCheck("http://10.1.0.11:8080/version", expect="1.4.2")


def test_all_that_is_built_is_planned_with_its_numbers() -> None:
    made = built()
    assert made.packages == {"web": WEB, "db": msgspec.structs.replace(DB, feed="corp")}
    assert (made.acquire.deadline, made.acquire.stall, made.acquire.per_relay) == (1200.0, 30.0, 5)
    assert (made.deadline, made.machine_secrets) == (10800.0, ("app_key",))
    vpn, tell = made.pre_acquire
    assert vpn.undo is not None
    assert (vpn.run.stall, vpn.undo.stall) == (30.0, 30.0)
    assert (vpn.run.timeout, vpn.run.attempts, vpn.run.delay, vpn.until) == (120.0, 3, 10.0, "finished")
    assert vpn.undo is not None
    assert vpn.undo.variables["UNDO"] == "1"
    assert (tell.run.commands, tell.undo, tell.until) == ((("logger", "deploying 1.4.2"),), None, "acquired")
    schema, farm, clean = made.steps
    assert isinstance(schema, ServerStep)
    assert isinstance(clean, ServerStep)
    assert (schema.package, schema.required, schema.run.timeout) == ("db", True, 900.0)
    assert (schema.run.variables["VERSION"], schema.run.variables["PACKAGE_ID"]) == ("2.0.0", "Acme.Schema")
    assert (clean.number, clean.when, clean.run.commands) == (3, "always", (("rm", "-f", "/tmp/x"),))
    assert isinstance(farm, MachineStep)
    assert farm.phases == (PlannedPhase(1, 1), PlannedPhase(0, 2))
    assert (farm.min_in_service, farm.max_failures, farm.keep, farm.label) == (2, 1, 5, "1.4.2")
    configure = farm.turns[0].actions[0]
    assert isinstance(configure, ScriptAction)
    assert configure.stall == 20.0
    assert (configure.path, configure.secrets, configure.attempts, configure.delay) == (
        "deploy/configure.sh", ("app_key",), 2, 1.0,
    )  # fmt: skip


def test_a_plan_survives_the_journal() -> None:
    made = built()
    assert msgspec.json.decode(msgspec.json.encode(made), type=Plan) == made


def test_a_machine_sees_its_own_values_before_those_of_role_environment_and_process() -> None:
    environment = """environment: e
relays: { r: { url: "https://r:1", generic: true } }
roles: { web: { variables: { a: role, b: role, c: role } } }
variables: { a: environment, b: environment, c: environment, d: environment }
machines: { m: { address: h, site: s, roles: [web], key: "sha256:%s", variables: { a: machine, p: machine } } }
""" % ("0" * 64)
    head = "variables: { a: process, b: process, c: '${d}!', d: process, e: process, p: { prompt: P } }\n"
    made = plan(process(FARM, head), environment, prompts={"p": "${e}"})
    seen = machine_step(made).turns[0].variables
    assert {name: seen[f"VAR_{name}"] for name in "ABCDEP"} == {
        "A": "machine", "B": "role", "C": "role", "D": "environment", "E": "process", "P": "${e}",
    }  # fmt: skip


def test_scripts_see_where_and_what_they_are() -> None:
    turn = machine_step(built(), 2).turns[0]
    expected = {
        "MACHINE": "web1", "ADDRESS": "10.1.0.11", "SITE": "fra", "ROLES": "web", "TAG_RACK": "r1", "PROJECT": "webshop",
        "ENVIRONMENT": "staging", "RELEASE": "1.4.2", "STEP": "web farm", "VERSION": "1.4.2", "PACKAGE_ID": "Acme.Web",
        "ROOT": "/srv/webshop", "VAR_PORT": "8081", "VAR_CHANGE": "CHG000042", "VAR_THREADS": "8", "VAR_LOG_LEVEL": "warn",
    }  # fmt: skip
    assert turn.variables == expected
    configure = turn.actions[0]
    assert isinstance(configure, ScriptAction)
    assert configure.variables == expected


def test_a_check_for_the_old_version_differs_in_the_version_only() -> None:
    http, tcp, command, service = machine_step(built(), 2).turns[0].verify
    assert http.on_server
    assert (http.check.lasting, http.check.deadline) == (10.0, 120.0)
    assert http.check.check == HttpCheck("http://10.1.0.11:8081/version", expect="1.4.2")
    assert http.for_old.check == HttpCheck("http://10.1.0.11:8081/version", expect="${old.version}")
    assert command.check.check == CommandCheck(("check-app", "--release", "1.4.2"))
    assert command.for_old.check == CommandCheck(("check-app", "--release", "${old.version}"))
    assert tcp.check == tcp.for_old
    assert tcp.check.check == TcpCheck("10.1.0.11", 8081)
    assert service.check.check == ServiceCheck("webshop")
    assert not tcp.on_server


def test_relays_of_the_site_come_first_then_the_generic_ones() -> None:
    made = plan(LEAST)
    assert {machine.name: machine.relays for machine in made.machines} == {
        "web1": ("fra", "hub"), "web2": ("fra", "hub"), "web3": ("iad", "hub"), "web4": ("hub",),
    }  # fmt: skip
    assert made.relay("fra").token == SecretSource(file="/etc/waystation/relay-fra.token")
    assert made.relay("hub").token == SecretSource(env="HUB_TOKEN")


def test_only_machines_relays_feeds_and_secrets_that_are_needed_are_in_the_plan() -> None:
    environment = (DATA / "staging.yaml").read_text(encoding="utf-8")
    environment += "  spare: { address: x, site: mars, roles: [idle] }\n"
    made = plan(LEAST, environment)
    assert [machine.name for machine in made.machines] == ["web1", "web2", "web3", "web4"]
    assert made.feeds == {}
    assert made.secrets == {"lb_token": SecretSource(file="/etc/waystation/lb.token")}
    assert set(built().secrets) == {"lb_token", "corp_feed", "app_key", "chat_hook"}


def test_a_rotation_is_frozen_from_the_environments_folder_and_may_be_repeated() -> None:
    rotation = machine_step(plan(LEAST)).rotation
    assert rotation is not None
    assert rotation.probe is not None
    for run, path in ((rotation.before, "lb/out.py"), (rotation.after, "lb/in.py"), (rotation.probe, "lb/state.py")):
        assert run.script is not None
        assert (run.script.folder, run.script.path) == ("/environments", path)
        assert run.script.sha256 == Scripts().script("", path)
        assert (run.idempotent, run.timeout, run.secrets) == (True, 180.0, ("lb_token",))


def fingerprints(text: str, **options: object) -> list[str]:
    return [turn.fingerprint for turn in machine_step(plan(text, **options)).turns]  # type: ignore[arg-type]


def test_a_fingerprint_is_the_same_for_the_same_work_under_another_label() -> None:
    text = process(FARM + ", apply: [ { script: a.sh }, switch ]")
    assert fingerprints(text) == fingerprints(text, label="another")
    assert len(set(fingerprints(text))) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"files": Scripts(edition="2")},
        {"packages": {"web": msgspec.structs.replace(WEB, version="1.4.3")}},
        {"environment": (DATA / "staging.yaml").read_text(encoding="utf-8").replace("warn", "debug")},
    ],
    ids=["script", "version", "variable"],
)
def test_a_fingerprint_changes_with_all_that_a_machine_would_notice(change: dict[str, object]) -> None:
    text = process(FARM + ", apply: [ { script: a.sh }, switch ]")
    assert not set(fingerprints(text)) & set(fingerprints(text, **change))


def test_manifests_may_be_missing_while_the_depot_lacks_the_package() -> None:
    made = plan(LEAST, packages={"web": PlannedPackage("acme.web", "1.4.2")})
    assert made.packages["web"].manifest == ""


# --- how many at a time


@pytest.mark.parametrize(
    ("strategy", "phases"),
    [
        ("{ window: 2 } }", (PlannedPhase(0, 2),)),
        ("{ window: 25% } }", (PlannedPhase(0, 1),)),
        ("{ window: 75% } }", (PlannedPhase(0, 3),)),
        ("{ window: 100 } }", (PlannedPhase(0, 4),)),
        ("{ phases: [ { machines: 1 }, { window: 50% } ] } }", (PlannedPhase(1, 1), PlannedPhase(0, 2))),
        ("{ phases: [ { machines: 50%, window: 2 }, {} ] } }", (PlannedPhase(2, 2), PlannedPhase(0, 1))),
        ("{ phases: [ { machines: 4, window: 9 }, { window: 2 } ] } }", (PlannedPhase(4, 4),)),
        ("{ phases: [ { machines: 9 } ] } }", (PlannedPhase(4, 1),)),
    ],
)
def test_windows_and_phases_become_numbers_of_machines(strategy: str, phases: tuple[PlannedPhase, ...]) -> None:
    assert machine_step(plan(process(ROLL + strategy))).phases == phases


share = st.one_of(st.integers(1, 12), st.integers(1, 100).map("{}%".format))


@given(st.lists(st.tuples(share, share), max_size=3), share)
def test_phases_take_every_machine_exactly_once(firsts: list[tuple[int | str, int | str]], last: int | str) -> None:
    listed = [f"{{ machines: {machines}, window: {window} }}" for machines, window in firsts]
    text = f"{{ phases: [ {', '.join([*listed, f'{{ window: {last} }}'])} ] }} }}"
    phases = machine_step(plan(process(ROLL + text))).phases
    taken = sum(phase.machines for phase in phases)
    assert taken == 4 or (taken < 4 and phases[-1].machines == 0)
    assert all(1 <= phase.window <= 4 for phase in phases)


def test_without_a_strategy_all_machines_go_at_once_and_the_plan_says_so() -> None:
    made = plan(process(FARM + ", rotation: web"))
    assert machine_step(made).phases == (PlannedPhase(0, 4),)
    assert "farm: all 4 machines leave rotation web together" in made.notes


def test_the_order_may_list_machines_first() -> None:
    made = machine_step(plan(process(ROLL + "{ order: [web3, web2, name] } }")))
    assert [turn.machine for turn in made.turns] == ["web3", "web2", "web1", "web4"]
    assert not made.unhealthy_first


def test_effective_numbers_are_told() -> None:
    made = plan(process(ROLL + "{ window: 4, min_in_service: 2 } }, rotation: web"))
    assert "farm: 4 machines, 4 at a time; at least 2 in service; more than 0 failures stop it" in made.notes
    assert "farm: in fact at most 2 at a time, for the minimum in service" in made.notes


def test_a_rotation_without_a_probe_is_told() -> None:
    environment = (DATA / "staging.yaml").read_text(encoding="utf-8").replace(" probe: lb/state.py,", "")
    assert any("has no probe" in note for note in plan(LEAST, environment).notes)


# --- what is refused


def test_eleven_different_mistakes_are_told_in_one_go_each_in_its_line() -> None:
    text = """format: 1
project: webshop
variables:
  a: "${b}"
  b: "${a}"
packages:
  web: { id: Acme.Web, feed: nowhere }
steps:
  - name: farm
    roles: [web, database]
    deploy: web
    to: srv/webshop
    rotation: sideways
    strategy:
      rolling:
        window: 0%
        min_in_service: 4
    apply:
      - { script: gone.sh, secrets: [app_key] }
      - switch
    verify:
      - { http: "http://${machine.adress}/" }
"""
    with pytest.raises(PlanError) as caught:
        plan(text, files=Scripts(missing=("gone.sh",)))
    assert [(m.file, m.line, m.path) for m in caught.value.mistakes] == [
        ("release.yaml", 4, "variables.a"),
        ("release.yaml", 5, "variables.b"),
        ("release.yaml", 7, "packages.web.feed"),
        ("release.yaml", 10, "steps[0].roles[1]"),
        ("release.yaml", 12, "steps[0].to"),
        ("release.yaml", 13, "steps[0].rotation"),
        ("release.yaml", 16, "steps[0].strategy.rolling.window"),
        ("release.yaml", 17, "steps[0].strategy.rolling.min_in_service"),
        ("release.yaml", 19, "steps[0].apply[0].script"),
        ("release.yaml", 19, "steps[0].apply[0].secrets[0]"),
        ("release.yaml", 22, "steps[0].verify[0].http"),
    ]
    assert len(str(caught.value).splitlines()) == 11
    assert caught.value.exit_code == 2


def test_what_is_not_built_yet_is_refused_by_name() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(
            load_process(str(DATA / "whole.yaml")),
            load_environment(str(DATA / "production.yaml")),
            label="1.4.2",
            packages={"web": WEB, "db": DB},
            scripts=None,
            prompts={"change": "CHG000042"},
            files=Scripts(),
            people=("anna", "ben", "clara"),
        )
    assert {m.path for m in caught.value.mistakes} == {
        "requires", "freeze", "secrets.app_key.command",
    }  # fmt: skip
    assert all("is not built yet" in mistake.text for mistake in caught.value.mistakes)


ENVIRONMENT = (DATA / "staging.yaml").read_text(encoding="utf-8")
IAD = 'iad: { url: "https://relay.iad.example:7443", site: iad }'


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("from: fry", "staging.yaml:6: relays.iad.from: there is no relay 'fry': expected one of fra, hub"),
        ("from: iad", "staging.yaml:6: relays.iad.from: is the relay itself: leave it out, and the origin sends"),
        ("limit: 0Mbit", "staging.yaml:6: relays.iad.limit: '0Mbit': expected a rate above 0, such as 50Mbit"),
        ("limit: 0", "staging.yaml:6: relays.iad.limit: 0: expected a rate such as 50Mbit or a whole number from 1 to 1000000"),
        ("limit: quick", "staging.yaml:6: relays.iad.limit: 'quick': expected a rate such as 50Mbit"),
    ],
)  # fmt: skip
def test_a_way_that_cannot_be_is_named_with_line_path_and_expectation(keys: str, expected: str) -> None:
    told = mistakes(process(FARM), ENVIRONMENT.replace(IAD, f"{IAD[:-2]}, {keys} }}"))
    assert any(mistake.startswith(expected) for mistake in told), told


def test_relays_that_fetch_from_each_other_in_a_circle_are_refused() -> None:
    round_trip = ENVIRONMENT.replace(IAD, f"{IAD[:-2]}, from: hub }}").replace(
        "generic: true", "generic: true, from: iad"
    )
    assert mistakes(process(FARM), round_trip) == [
        "staging.yaml:5: relays.hub.from: leads in a circle, hub → iad → hub: one of them must get packages from the origin"
    ]


def test_ways_and_limits_are_planned_and_relays_on_the_way_are_part_of_the_plan() -> None:
    far = ENVIRONMENT.replace(
        IAD, f"{IAD[:-2]}, from: far, limit: 20 }}\n  far: {{ url: 'http://far:1', site: far, from: fra }}"
    )
    made = plan(process(FARM), far)
    assert {relay.name: (relay.upstream, relay.limit) for relay in made.relays} == {
        "fra": ("", 0.0), "hub": ("", 0.0), "iad": ("far", 2_500_000.0), "far": ("fra", 0.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "head", "environment", "path"),
    [
        (FARM, "busy: replace\n", ENVIRONMENT, "busy"),
        (FARM, "busy: wait 15m\n", ENVIRONMENT, "busy"),
        ("run_on: { one_of: web }, script: x.sh", "", ENVIRONMENT, "steps[0].run_on"),
        (ROLL + "{ max_per: { tag: rack } } }", "", ENVIRONMENT, "steps[0].strategy.rolling.max_per"),
        (FARM, "", ENVIRONMENT.replace("timeout: 3m", "run_on: machine"), "rotation.web.run_on"),
        (FARM, "", ENVIRONMENT.replace("{ env: APP_KEY }", "{ credential: app }"), "secrets.app_key.credential"),
        (FARM, "", ENVIRONMENT + "  from: [inventory]\n", "machines.from"),
    ],
)
def test_each_thing_that_is_not_built_yet_is_refused(step: str, head: str, environment: str, path: str) -> None:
    told = mistakes(process(step, head), environment)
    assert [mistake for mistake in told if f"{path}: " in mistake and "is not built yet" in mistake], told


def test_a_package_that_machines_should_fetch_themselves_is_not_built_yet() -> None:
    text = process(FARM).replace("{ web: Acme.Web }", "{ web: { id: Acme.Web, via: direct } }")
    assert mistakes(text) == ["release.yaml:3: packages.web.via: via: direct is not built yet: leave it out"]


@pytest.mark.parametrize(
    ("step", "head", "expected"),
    [
        (ROLL + "{ window: 0 } }", "", "rolling.window: is 0: no machine could ever start"),
        (ROLL + "{ window: 2, phases: [ {} ] } }", "", "has both window and phases"),
        (ROLL + "{ phases: [ { machines: 2 } ] } }", "", "leaves 2 of 4 machines without a phase"),
        (ROLL + "{ phases: [ {}, { machines: 1 } ] } }", "", "phases[0]: takes all machines that are left, and phases follow"),
        (ROLL + "{ phases: [ { machines: 0 }, {} ] } }", "", "phases[0].machines: is 0"),
        (ROLL + "{ min_in_service: 4 } }", "", "cannot be kept: of 4 machines, 3 are in service while one is deployed to"),
        (ROLL + "{ order: [name, unhealthy] } }", "", "expected unhealthy at the beginning and name at the end"),
        (ROLL + "{ order: [web9] } }", "", "no machine of this step is called 'web9'"),
        (ROLL + "{ order: [web1, web1] } }", "", "order[1]: 'web1' stands twice"),
        ("roles: []", "", "roles: is empty: a step needs machines"),
        ("roles: [cache], deploy: web, to: /srv/x", "", "no machine has the role 'cache': give it to one in staging.yaml"),
        ("roles: [web]", "", "steps[0]: does nothing: expected one of the keys deploy, apply, verify"),
        ("roles: [web], deploy: web", "", "steps[0]: the key 'to' is missing: expected the absolute folder"),
        ("roles: [web], deploy: app, to: /srv/x", "", "there is no package 'app' under packages: (there: web)"),
        ("roles: [web], deploy: web, to: '/srv/../etc'", "", "'/srv/../etc': expected an absolute folder without '..'"),
        ("roles: [web], deploy: web, to: /", "", "'/': expected an absolute folder"),
        (FARM + ", apply: [ { service: x, action: stop } ]", "", "has 'switch' 0 times: a deployment needs it exactly once"),
        (FARM + ", apply: [ switch, switch ]", "", "has 'switch' 2 times"),
        ("roles: [web], apply: [ switch ]", "", "has 'switch', and the step deploys nothing"),
        (FARM + ", apply: [ switch, { service: 'a b', action: stop } ]", "", "'a b': expected a service's name"),
        (FARM + ", apply: [ switch, { script: ../x.sh } ]", "", "apply[1].script: '../x.sh' is no path of a script"),
        (FARM + ", apply: [ switch, { script: x.sh, timeout: 8d } ]", "", "8d is too long: expected at most 7d"),
        (FARM + ", apply: [ switch, { script: x.sh, timeout: 0s } ]", "", "0s is over before anything began"),
        (FARM + ", verify: [ { http: '${machine.address}' } ]", "", "'10.1.0.11': expected a URL such as"),
        (FARM + ", verify: [ { tcp: '${machine.address}' } ]", "", "'10.1.0.11': expected HOST:PORT"),
        (FARM + ", verify: [ { tcp: 'x:70000' } ]", "", "'x:70000': expected HOST:PORT"),
        (FARM + ", verify: [ { service: x, from: server } ]", "", "the server cannot see a machine's services"),
        (FARM + ", verify: [ { tcp: 'x:1', for: 2m } ]", "", "60s is over before 'for' is: expected more than 2m"),
        (FARM + ", verify: [ { http: 'http://x/', expect: '$${old.version}' } ]", "", "which Waystation itself puts there"),
        (FARM + ", verify: [ { command: [sh, -c, 'test ${port}'] } ]", "variables: { port: 1 }\n", "command[2]: puts a variable into the program text of a shell"),
        (FARM + ", verify: [ { http: 'http://${outputs.x}/' } ]", "", "outputs of steps are not built yet"),
        (FARM + ", verify: [ { http: 'http://${machine.tags.row}/' } ]", "", "machine web1 has no such tag"),
        ("run_on: server", "", "steps[0]: runs nothing: expected exactly one of the keys script, commands"),
        ("run_on: server, script: x.sh, commands: [ [x] ]", "", "has both script and commands"),
        ("run_on: server, script: x.sh, secrets: [key]", "", "there is no secret 'key': declare it under secrets:"),
        ("run_on: server, commands: [ [x, '${machine.name}'] ]", "", "a machine stands only where a step has 'roles'"),
        ("run_on: server, commands: [ [bash, -ec, 'x ${release.label}'] ]", "", "program text of a shell"),
        ("run_on: server, commands: [ [pwsh, -Command, x, '${release.label}'] ]", "", "program text of a shell"),
        (FARM, "variables: { a: '${typo}' }\n", "variables.a: 'typo' is undefined"),
        (FARM, "variables: { a: '${typo' }\n", "variables.a: '${typo' is not closed"),
        (FARM, "variables: { environment: x }\n", "variables.environment: is what the environment is called"),
        (FARM, "variables: { a-b: 1, a_b: 2 }\n", "variables.a_b: scripts would see it and 'a-b' both as VAR_A_B"),
        (FARM, "variables: { LOG-level: 1 }\n", "variables.log_level: scripts would see it and 'LOG-level' both as VAR_LOG_LEVEL"),
        (FARM, "variables: { a: { prompt: Who, match: '[' } }\n", "variables.a: is asked for (Who): give it with --variable a=VALUE"),
        (FARM, "secrets: { new: { available_to: server } }\n", "secret 'new' has no source: say under secrets: in staging.yaml"),
        (FARM, "secrets: { lb_token: { available_to: [web] } }\n", "secrets.lb_token: belongs to the environment's rotation web"),
        (FARM, "secrets: { corp_feed: { available_to: server } }\n", "belongs to the environment's feed corp"),
        (FARM, "notify: [ { url_secret: hook, on: [failed] } ]\n", "there is no secret 'hook'"),
        (FARM, "notify: [ { url: 'ftp://x', on: [failed] } ]\n", "'ftp://x': expected an http or https URL"),
        (FARM, "pre_acquire: [ { name: a, script: x.sh, undo: { script: x.sh, timeout: 9d } } ]\n", "pre_acquire[0].undo.timeout: 9d is too long"),
    ],
)  # fmt: skip
def test_a_promise_that_cannot_be_kept_is_refused(step: str, head: str, expected: str) -> None:
    told = mistakes(process(step, head))
    assert any(expected in mistake for mistake in told), told
    assert all(mistake.startswith(("release.yaml:", "staging.yaml:")) for mistake in told)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('key: "sha256:9f2c000000000000000000000000000000000000000000000000000000000004"', "key: ''", "staging.yaml:16: machines.web4.key: is missing: run 'waystation agent init' there"),
        ('00004"', '00001"', "machines.web4.key: is the key of web1 too"),
        ("generic: true, ", "", "machines.web4.site: no relay serves the site 'sfo'"),
        ("web4:", "WEB1:", "machines.WEB1: differs from 'web1' in case only"),
        ("https://relay.fra.example:7443", "relay.fra:7443", "relays.fra.url: 'relay.fra:7443': expected such as https://"),
        ("site: iad }", "}", "relays.iad: serves nobody: expected the key site"),
        ("tags: { rack: r2 } }\n  web3", "tags: { rack: r2, Rack: r3 } }\n  web3", "machines.web2.tags.Rack: scripts would see it and 'rack' both as TAG_RACK"),
        ("lb_token: { file: /etc/waystation/lb.token }, ", "", "rotation.web.secrets: secret 'lb_token' has no source"),
        ("lb/out.py", "/lb/out.py", "rotation.web.before: '/lb/out.py' is no path of a script"),
        ("https://feed.example/v3/index.json", "feed", "feeds.corp.url: 'feed': expected a feed such as"),
        ("roles: { web: {", "roles: { two: { variables: { threads: 9 } }, web: {", "machines.web1.roles: two roles give 'threads' different values"),
        ("web1: { address", "note: nobody\n  web1: { address", "machines.note: expected a mapping with address"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_serve_is_refused(old: str, new: str, expected: str) -> None:
    assert ENVIRONMENT.count(old) >= 1
    environment = ENVIRONMENT.replace(old, new, 1)
    if "two:" in new:
        environment = environment.replace("roles: [web]", "roles: [web, two]")
    told = mistakes(LEAST, environment)
    assert any(expected in mistake for mistake in told), told


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"packages": {}}, "release.yaml:3: packages.web: has no version: give one with --package web=VERSION"),
        ({"packages": {"web": DB}}, "packages.web: is Acme.Web, and the release holds Acme.Schema 2.0.0"),
        ({"packages": {"web": WEB, "wbe": WEB}}, "--package wbe: is no package of release.yaml: expected one of web"),
        ({"packages": {"web": PlannedPackage("Acme.Web", "one")}}, "--package web: 'one' is not a valid version"),
        ({"label": "a/b"}, "release label: 'a/b': expected letters, digits"),
        ({"prompts": {"port": "1"}}, "--variable port: is not asked for by release.yaml: expected one of none"),
    ],
)
def test_options_that_do_not_fit_the_files_are_refused(options: dict[str, Any], expected: str) -> None:
    assert any(mistake.startswith(expected) or expected in mistake for mistake in mistakes(LEAST, **options))


@pytest.mark.parametrize("answer", ["CHG12", "CHG123456\n", "xCHG123456", "CHG1234567", "CHG12345\0"])
def test_an_answer_must_be_all_that_was_asked_for(answer: str) -> None:
    text = process(FARM, "variables: { change: { prompt: Ticket, match: '^CHG[0-9]{6}$' } }\n")
    told = mistakes(text, prompts={"change": answer})
    assert len(told) == 1
    assert told[0].startswith("--variable change: ")
    assert plan(text, prompts={"change": "CHG123456"})


def test_a_prompt_that_the_environment_answers_is_not_asked_for() -> None:
    text = process(FARM, "variables: { log_level: { prompt: How loud } }\n")
    assert machine_step(plan(text)).turns[0].variables["VAR_LOG_LEVEL"] == "warn"
    assert machine_step(plan(text, prompts={"log_level": "x"})).turns[0].variables["VAR_LOG_LEVEL"] == "x"


def test_a_prompt_whose_pattern_is_broken_is_told_at_the_pattern() -> None:
    text = process(FARM, "variables: { a: { prompt: Who, match: '[' } }\n")
    assert "variables.a.match: is no regular expression" in mistakes(text, prompts={"a": "x"})[0]


def test_scenario_05_a_secret_of_the_server_goes_to_no_machine() -> None:
    step = FARM + ", apply: [ { script: x.sh, secrets: [chat_hook] }, switch ]"
    told = mistakes(process(step, "secrets: { chat_hook: { available_to: server } }\n"))
    assert len(told) == 1
    assert told[0].startswith(
        "release.yaml:6: steps[0].apply[0].secrets[0]: 'chat_hook' is available to the server only"
    )
    assert told[0].endswith("name their roles in secrets.chat_hook.available_to")


def test_a_secret_goes_to_machines_of_its_roles_only() -> None:
    step = FARM + ", apply: [ { script: x.sh, secrets: [app_key] }, switch ]"
    told = mistakes(process(step, "secrets: { app_key: { available_to: [worker] } }\n"))
    assert len(told) == 1
    assert "'app_key' is available to worker, and machines of this step have other roles" in told[0]


def test_a_script_that_could_not_tell_two_secrets_apart_is_refused() -> None:
    step = "run_on: server, script: x.sh, secrets: [app_key, app-key]"
    environment = ENVIRONMENT.replace("app_key: { env: APP_KEY }", "app_key: { env: A }, app-key: { env: B }")
    told = mistakes(
        process(step, "secrets: { app_key: { available_to: server }, app-key: { available_to: server } }\n"),
        environment,
    )
    assert any("are both SECRET_APP_KEY there" in mistake for mistake in told)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc/waystation/lb.token", "secrets.lb_token.file: git tracks /etc/waystation/lb.token"),
        ("/etc/waystation/relay-fra.token", "relays.fra.token.file: git tracks /etc/waystation/relay-fra.token"),
    ],
)
def test_a_secret_that_git_tracks_is_refused(path: str, expected: str) -> None:
    told = mistakes(LEAST, files=Scripts(tracked=(path,)))
    assert len(told) == 1
    assert expected in told[0]


@pytest.mark.processes
def test_a_secret_in_a_real_repository_is_found(tmp_path: Path) -> None:
    (tmp_path / "lb").mkdir()
    for name in ("lb/out.py", "lb/in.py", "lb/state.py", "lb.token"):
        (tmp_path / name).write_text("#!/usr/bin/env python3\n")
    (tmp_path / "e.yaml").write_text(ENVIRONMENT.replace("/etc/waystation/lb.token", "lb.token"), encoding="utf-8")
    (tmp_path / "release.yaml").write_text(LEAST, encoding="utf-8")

    def on_disk() -> Plan:
        return make_plan(
            load_process(str(tmp_path / "release.yaml")),
            load_environment(str(tmp_path / "e.yaml")),
            label="1",
            packages={"web": WEB},
            scripts=None,
            prompts={},
        )

    assert on_disk().secrets["lb_token"] == SecretSource(file=str(tmp_path / "lb.token"))
    try:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed: nothing can be tracked here")
    subprocess.run(["git", "add", "lb.token"], cwd=tmp_path, check=True)
    with pytest.raises(PlanError, match="git tracks") as caught:
        on_disk()
    assert [mistake.path for mistake in caught.value.mistakes] == ["secrets.lb_token.file"]


def test_steps_of_one_name_and_two_packages_under_one_root_are_refused() -> None:
    text = """format: 1
project: webshop
packages: { web: Acme.Web, db: Acme.Schema }
steps:
  - { name: a, roles: [web], deploy: web, to: /srv/x }
  - { name: a, roles: [web], deploy: db, to: /srv/x }
"""
    assert mistakes(text, packages={"web": WEB, "db": DB}) == [
        "release.yaml:6: steps[1].name: 'a' is the name of step 1 too: choose another",
        "release.yaml:6: steps[1].to: /srv/x holds package 'web' of step 1 already",
    ]


def two_roots(first: str, second: str) -> str:
    return f"""format: 1
project: webshop
packages: {{ web: Acme.Web, db: Acme.Schema }}
steps:
  - {{ name: a, roles: [web], deploy: web, to: '{first}' }}
  - {{ name: b, roles: [web], deploy: db, to: '{second}' }}
"""


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ("/srv/app", "/srv/app/current", "/srv/app/current lies inside /srv/app"),
        ("/srv/app", "/srv/app/releases/x", "/srv/app/releases/x lies inside /srv/app"),
        ("/srv/app", "/srv/app//shared/./plugins/", "/srv/app/shared/plugins lies inside /srv/app"),
        ("/srv/app/", "/srv/app/extra", "/srv/app/extra lies inside /srv/app"),
        ("/srv/app/current/db", "/srv/app", "/srv/app is around /srv/app/current/db"),
        ("/srv/${machine.name}", "/srv/web1/x", "/srv/web1/x lies inside /srv/web1"),
        ("C:\\App", "c:/app/current", "c:/app/current lies inside C:\\App"),
        ("/srv/x/", "/srv//x", "/srv/x holds package 'web' of step 1 already"),
    ],
)
def test_roots_of_one_machine_never_overlap(first: str, second: str, how: str) -> None:
    (told,) = mistakes(two_roots(first, second), packages={"web": WEB, "db": DB})
    assert told.startswith(f"release.yaml:6: steps[1].to: {how}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("/srv/app", "/srv/app2"),
        ("/srv/app", "/srv/App"),
        ("C:\\app", "D:\\app"),
        ("/srv/${machine.name}/a", "/srv/${machine.name}/b"),
    ],
)
def test_roots_beside_each_other_are_taken_as_plain_folders(first: str, second: str) -> None:
    made = plan(two_roots(f"{first}/", second), packages={"web": WEB, "db": DB})
    assert machine_step(made).turns[0].root == first.replace("${machine.name}", "web1")


@pytest.mark.parametrize(
    ("least", "most", "counts"),
    [("50%", "25%", (2, 1)), ("51%", "20%", (3, 0)), ("1%", "0%", (1, 0)), ("75%", "100%", (3, 4))],
)
def test_a_minimum_in_percent_is_rounded_up_and_a_maximum_down(least: str, most: str, counts: tuple[int, int]) -> None:
    step = machine_step(plan(process(ROLL + f"{{ min_in_service: {least}, max_failures: {most} }} }}")))
    assert (step.min_in_service, step.max_failures) == counts


def test_a_minimum_in_percent_that_cannot_be_kept_is_refused() -> None:
    assert "cannot be kept: of 4 machines" in mistakes(process(ROLL + "{ min_in_service: 76% } }"))[0]


def read_all(process: str, environment: str) -> list[str]:
    """Every mistake of a process and an environment, of whatever kind."""
    files = (process, "release.yaml", Process), (environment, "staging.yaml", Environment)
    first, second = (fit_with_stand_ins(parse(text.encode(), name, "/"), type) for text, name, type in files)
    with pytest.raises(PlanError) as caught:
        make_plan(
            first,
            second,
            label="1",
            packages={"web": WEB},
            scripts=None,
            prompts={},
            files=Scripts(missing=("gone.sh",)),
        )
    return [str(mistake).partition(": expected")[0] for mistake in caught.value.mistakes]


def test_mistakes_of_every_kind_in_both_files_are_told_in_one_pass() -> None:
    text = """format: 1
project: webshop
project: webshop
packages: { web: Acme.Web }
steps:
  - name: farm
    roles: [web]
    deploy: web
    too: /srv/webshop
    rotation: sideways
    strategy: { rolling: { window: 0% } }
    apply: [ { script: gone.sh }, { service: x, action: dance }, switch ]
    verify:
      - { http: "http://${machine.adress}/", deadline: soon }
      - { tcp: "${machine.address}:1", expect: x }
"""
    environment = ENVIRONMENT.replace("roles: [web]", "roles: web", 1).replace(
        "relays:", "relays:\n  far: { url: nonsense, limit: quick }", 1
    )
    told = read_all(text, environment)
    places = [each.split(": ")[1] for each in told]
    assert places == [
        "project",
        "steps[0].too",
        "steps[0].rotation",
        "steps[0].strategy.rolling.window",
        "steps[0].apply[1].action",
        "steps[0].apply[0].script",
        "steps[0].verify[0].deadline",
        "steps[0].verify[0].http",
        "steps[0].verify[1].expect",
        "relays.far.limit",
        "relays.far.url",
        "machines.web1.roles",
    ], told


@given(st.data())
def test_whatever_is_wrong_it_is_told_and_nothing_else_happens(data: st.DataObject) -> None:
    lines = [LEAST.splitlines(), ENVIRONMENT.splitlines()]
    for text in lines:
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(1, len(text) - 1))
            old = data.draw(st.sampled_from(["web", ": ", "fra", "[", "{", "http", "10", "1", "sha256"]))
            text[at] = text[at].replace(old, data.draw(st.sampled_from(["", "x", "5", "[]", "~", "{}", "a: b"])))
    try:
        files = ("\n".join(lines[0]), "release.yaml", Process), ("\n".join(lines[1]), "staging.yaml", Environment)
        first, second = (fit_with_stand_ins(parse(text.encode(), name, "/"), type) for text, name, type in files)
    except PlanError:
        return  # not YAML any more
    own = {str(mistake) for mistake in (*first.mistakes, *second.mistakes)}
    try:
        make_plan(first, second, label="1", packages={"web": WEB}, scripts=None, prompts={}, files=Scripts())
        told = set()
    except PlanError as error:
        told = {str(mistake) for mistake in error.mistakes}
    assert own <= told


def test_program_text_of_a_shell_may_hold_its_own_variables_and_take_arguments() -> None:
    made = plan(process("run_on: server, commands: [ [sh, -c, 'echo $${HOME} $1', x, '${release.label}'] ]"))
    step = made.steps[0]
    assert isinstance(step, ServerStep)
    assert step.run.commands == (("sh", "-c", "echo ${HOME} $1", "x", "1.4.2"),)


def test_a_large_environment_is_planned_whole() -> None:
    machines = "".join(
        f'  m{n:03}: {{ address: 10.0.{n // 250}.{n % 250}, site: fra, roles: [web], key: "sha256:{n:064x}" }}\n'
        for n in range(500)
    )
    environment = ENVIRONMENT[: ENVIRONMENT.index("machines:")] + "machines:\n" + machines
    step = machine_step(plan(LEAST, environment))
    assert len({turn.fingerprint for turn in step.turns}) == 500


# --- for people and for --json


def test_a_forecast_counts_whole_packages_once_for_each_relay() -> None:
    made = plan(LEAST.replace("apply: [ switch,", "apply: [ { script: a.sh }, switch,"))
    seen = forecast(made)
    both = WEB.nupkg_bytes + SCRIPTS.nupkg_bytes
    assert {relay.relay: relay.at_most for relay in seen.relays} == {"fra": both, "hub": both, "iad": both}
    assert {site.site: (site.machines, site.at_most) for site in seen.sites} == {
        "fra": (2, both), "hub": (0, both), "iad": (1, both), "sfo": (1, 0),
    }  # fmt: skip
    assert [(room.machine, room.root, room.at_most) for room in seen.room][:1] == [("web1", "/srv/webshop", 1000)]


def test_a_size_that_nobody_knows_is_said_and_not_counted_as_nothing() -> None:
    made = plan(LEAST, packages={"web": PlannedPackage("Acme.Web", "1.4.2")})
    assert forecast(made).sites[0].unknown == ("Acme.Web 1.4.2",)
    assert "and Acme.Web 1.4.2, whose size is not known yet" in describe(made)
    assert "not in the depot yet" in describe(made)


def test_the_description_names_all_that_will_happen_and_no_secret_value() -> None:
    text = describe(built())
    for words in (
        "webshop 1.4.2 → staging", "before acquisition: open vpn: ops/vpn-up.sh (at most 2 m, 3 attempts), undone when finished",
        "step 1 schema: on the server: schema: migrate.sh (at most 15 m), with the files of package db, required",
        "step 2 web farm: deploys web on 4 machines", "rolling: 1 machine, 1 at a time; 3 machines, 2 at a time",
        "at least 2 in service; more than 1 failures stop it", "rotation web: before web: lb/out.py",
        "script deploy/configure.sh (at most 1 m, with secrets app_key)", "switch /srv/webshop/current",
        "restart service webshop", "http://10.1.0.11:8081/version says 1.4.2 for 10 s, within 2 m, asked by the server",
        "step 3 clean up: on the server: clean up: 1 command (at most 10 m), whatever was before",
        "tells the address in secret chat_hook of failed, finished", "deadline: 3 h",
    ):  # fmt: skip
        assert words in text


def test_what_is_done_on_a_machine_stands_under_it_and_what_is_the_same_is_not_told_twice() -> None:
    turns = {"web1": "/srv/one", "web2": "/srv/two", "web3": "/srv/one"}
    [step] = [step for step in built().steps if isinstance(step, MachineStep)]
    machines = [step.turns[0].machine, step.turns[1].machine, step.turns[2].machine]
    made = tuple(
        msgspec.structs.replace(turn, root=root, verify=())
        for turn, root in zip(step.turns[:3], turns.values(), strict=True)
    )
    plan_ = msgspec.structs.replace(built(), steps=(msgspec.structs.replace(step, turns=made),))
    lines = describe(plan_).splitlines()
    first, second, third = (
        next(at for at, line in enumerate(lines) if line.startswith(f"  {name} (")) for name in machines
    )
    assert "    switch /srv/one/current" in lines[first:second]
    assert "    switch /srv/two/current" in lines[second:third]
    assert lines[third].endswith(f": as {machines[0]}")


def test_the_json_document_has_a_version_and_holds_the_plan() -> None:
    whole = msgspec.json.decode(msgspec.json.encode(document(built())))
    assert (whole["format"], set(whole)) == (1, {"format", "plan", "forecast"})
    assert msgspec.convert(whole["plan"], Plan) == built()


# --- files to start from


def test_the_scaffold_loads_and_its_plan_says_what_to_fill_in(tmp_path: Path) -> None:
    written = write_scaffold(str(tmp_path / "Web Shop"))
    folder = tmp_path / "Web Shop"
    assert {"release.yaml", "environments/production.yaml", "environments/lb/out.py"} <= set(written)
    loaded = load_process(str(folder / "release.yaml"))
    assert loaded.value.project == "web-shop"
    environment = load_environment(str(folder / "environments/production.yaml"))
    with pytest.raises(PlanError) as caught:
        make_plan(loaded, environment, label="1.0", packages={}, scripts=None, prompts={})
    assert [mistake.path for mistake in caught.value.mistakes] == [
        "packages.web", "machines.web1.key", "machines.web2.key",
    ]  # fmt: skip


def test_the_scaffold_with_its_comments_taken_off_loads_too(tmp_path: Path) -> None:
    write_scaffold(str(tmp_path))
    for path, load in (("release.yaml", load_process), ("environments/production.yaml", load_environment)):
        lines = (tmp_path / path).read_text(encoding="utf-8").splitlines()
        uncovered = [_uncovered(line) for line in lines]
        assert uncovered != lines
        (tmp_path / path).write_text("\n".join(_later_wins(uncovered)) + "\n", encoding="utf-8")
        load(str(tmp_path / path))


def _uncovered(line: str) -> str:
    """A commented line without its mark, where what stands behind it is an entry and no sentence."""
    import re

    match = re.fullmatch(r"( *)# ( *)((- \{|[a-z_]+:( |$)).*)", line)
    return f"{match[1]}{match[2]}{match[3]}" if match else line


def _later_wins(lines: list[str]) -> list[str]:
    """Without the entry that an uncommented alternative replaces."""
    return [line for line in lines if line.split("#")[0].strip() != "strategy: rolling"]


def test_the_scaffold_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "release.yaml").write_text("mine")
    (tmp_path / "WAYSTATION.md").symlink_to("nowhere")
    written = write_scaffold(str(tmp_path))
    assert "release.yaml" not in written
    assert "WAYSTATION.md" not in written
    assert (tmp_path / "release.yaml").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert write_scaffold(str(tmp_path)) == []


@pytest.mark.processes
def test_scripts_of_the_scaffold_fail_until_they_are_edited(tmp_path: Path) -> None:
    scripts = [path for path in write_scaffold(str(tmp_path)) if path.endswith((".py", ".sh"))]
    assert len(scripts) == 6
    for path in scripts:
        done = subprocess.run(
            [str(tmp_path / path)], env={"PATH": "/usr/bin:/bin", "MACHINE": "web1"}, capture_output=True, text=True
        )
        assert done.returncode == (2 if path.endswith("state.py") else 1), path
        assert "is not written yet" in done.stderr


def test_a_place_where_the_scaffold_cannot_stand_is_refused(tmp_path: Path) -> None:
    from relay.errors import UsageError

    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"no folder|cannot write"):
        write_scaffold(str(tmp_path / "file"))
