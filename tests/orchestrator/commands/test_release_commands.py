"""`waystation init`, `release …` and `rotation …` where no machine is needed: what they print, refuse and return."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from harness.packages import make_nupkg
from harness.process import Done, run

from orchestrator.journal.journal import Journal
from orchestrator.releases.release import author_of
from orchestrator.trust.keyring import load_pins

PROCESS = {
    "format": 1,
    "project": "shop",
    "packages": {"web": "Acme.Web"},
    "steps": [{"name": "web farm", "roles": ["web"], "deploy": "web", "to": "/srv/shop"}],
}
ENVIRONMENT = {
    "environment": "production",
    "relays": {"fra": {"url": "http://127.0.0.1:1", "site": "fra"}},
    "machines": {"web1": {"address": "10.0.0.1", "site": "fra", "roles": ["web"], "key": "sha256:" + "0" * 64}},
}


class Desk:
    """An origin, and a project's folder in which commands are called."""

    def __init__(self, folder: Path) -> None:
        self.home, self.project = folder / "home", folder / "project"
        (self.project / "environments").mkdir(parents=True)
        self.write("release.yaml", PROCESS)
        self.write("environments/production.yaml", ENVIRONMENT)

    def write(self, path: str, document: object) -> None:
        (self.project / path).write_text(yaml.safe_dump(document, sort_keys=False))

    def call(self, *words: object) -> Done:
        return run(self.home, *words, cwd=str(self.project))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def origin(desk: Desk, tmp_path: Path) -> Desk:
    """The same with keys and Acme.Web 1.0.0 in its depot."""
    assert desk.call("trust", "init").code == 0
    nupkg = make_nupkg(tmp_path, {"app.txt": b"1"}, "Acme.Web", "1.0.0")
    assert desk.call("package", "add", nupkg).code == 0
    return desk


# --- init


def test_init_writes_files_that_can_be_planned_with_once_they_are_filled_in(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    done = run(tmp_path / "home", "init", folder)

    assert (done.code, done.err) == (0, "")
    assert (folder / "release.yaml").is_file()
    assert "waystation release plan" in done.out


def test_init_never_overwrites(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "release.yaml").write_text("mine\n")
    run(tmp_path / "home", "init", folder)

    assert (folder / "release.yaml").read_text() == "mine\n"


# --- plan


def test_a_plan_needs_neither_keys_nor_depot_nor_any_machine(desk: Desk) -> None:
    done = desk.call("release", "plan", "--environment", "production", "--package", "web=1.0.0")

    assert (done.code, done.err) == (0, "")
    assert "web1" in done.out
    assert "not in the depot yet" in done.out
    assert not desk.home.exists()


def test_a_plan_knows_sizes_from_the_depot(origin: Desk) -> None:
    document = origin.call("release", "plan", "-e", "production", "--package", "web=1.0.0", "--json").json

    assert document["format"] == 1
    assert document["plan"]["packages"]["web"]["nupkg_bytes"] > 0
    assert document["forecast"]["sites"][0]["at_most"] > 0


def test_scenario_40_every_mistake_of_both_files_is_told_at_once_each_in_its_line(desk: Desk) -> None:
    desk.write("release.yaml", PROCESS | {"stepz": [], "project": ""})
    desk.write("environments/production.yaml", ENVIRONMENT | {"machinez": {}})
    done = desk.call("release", "plan", "--environment", "production", "--package", "web=1.0.0")

    assert (done.code, done.out) == (2, "")
    assert re.search(r"release\.yaml:\d+: stepz: ", done.err)
    assert re.search(r"release\.yaml:\d+: project: ", done.err)
    assert re.search(r"production\.yaml:\d+: machinez: ", done.err)
    assert len(done.err.strip().splitlines()) >= 3


def test_scenario_40_a_plan_tells_what_no_deployment_could_begin_with_and_contacts_nobody(desk: Desk) -> None:
    """The relay's address has nobody behind it, and no error is about that."""
    (desk.project / "release.yaml").write_text(
        "format: 1\nproject: shop\npackages: { web: Acme.Web }\n"
        "variables: { a: '${b}', b: '${a}', change: { prompt: Change ticket } }\n"
        "steps:\n"
        "  - { name: one, roles: [web], deploy: web, to: /srv/one, strategy: { rolling: { window: 0 } } }\n"
        "  - { name: two, deploy: web, to: /srv/two }\n"
        "  - { name: three, run_on: server, commands: [ [echo, '${change}', '${a}'] ] }\n"
    )
    done = desk.call("release", "plan", "--environment", "production", "--package", "web=1.0.0")
    assert (done.code, done.out) == (2, "")
    for line, what in ((4, "a → b → a"), (4, "Change ticket"), (6, "window: is 0"), (7, "steps[1]")):
        assert re.search(rf"release\.yaml:{line}: .*{re.escape(what)}", done.err), (what, done.err)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--package", "web"), "--package 'web' is not NAME=VALUE"),
        (("--package", "web=1", "--package", "web=2"), "web is given twice"),
        (("--package", "web=1.0.0", "--variable", "=x"), "is not NAME=VALUE"),
        ((), "--package web=VERSION"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(desk: Desk, words: tuple[str, ...], told: str) -> None:
    done = desk.call("release", "plan", "--environment", "production", *words)

    assert done.code == 2
    assert told in done.err


def test_an_environment_may_be_named_by_its_file(desk: Desk) -> None:
    (desk.project / "environments" / "production.yaml").rename(desk.project / "other.yaml")

    assert desk.call("release", "plan", "--environment", "other.yaml", "--package", "web=1.0.0").code == 0
    missing = desk.call("release", "plan", "--environment", "production", "--package", "web=1.0.0")
    assert (missing.code, "environments/production.yaml" in missing.err) == (2, True)


@pytest.mark.parametrize("kind", ["process", "environment"])
def test_the_schema_of_a_file_is_json_schema(desk: Desk, kind: str) -> None:
    schema = desk.call("release", "schema", kind).json

    assert schema["$schema"].startswith("https://json-schema.org/")


# --- create


def test_a_release_is_created_once_and_the_same_again_is_no_error(origin: Desk) -> None:
    first = origin.call("release", "create", "1.0.0", "--package", "web=1.0.0", "--json").json
    again = origin.call("release", "create", "1.0.0", "--package", "web=1.0.0", "--json").json

    assert (first["new"], again["new"]) == (True, False)
    assert first["packages"] == again["packages"]
    assert len(first["packages"]["web"]["manifest"]) == 64


def test_a_label_never_stands_for_something_else(origin: Desk) -> None:
    assert origin.call("release", "create", "1.0.0", "--package", "web=1.0.0").code == 0
    origin.write("release.yaml", PROCESS | {"variables": {"port": 8080}})
    done = origin.call("release", "create", "1.0.0", "--package", "web=1.0.0")

    assert done.code == 1
    assert "1.0.0" in done.err
    assert "choose another" in done.err


def test_a_package_that_is_nowhere_is_told_with_the_ways_to_add_it(origin: Desk) -> None:
    done = origin.call("release", "create", "2.0.0", "--package", "web=2.0.0")

    assert done.code == 1
    assert "Acme.Web 2.0.0 is not in the depot" in done.err
    assert "waystation package add" in done.err


def test_a_release_names_a_version_of_each_of_its_packages(origin: Desk) -> None:
    done = origin.call("release", "create", "1.0.0")

    assert done.code == 2
    assert "--package web=VERSION" in done.err


# --- looking where nothing is


def test_there_is_nothing_to_show_before_the_first_deployment(origin: Desk) -> None:
    assert origin.call("release", "history").out == "nothing was deployed yet\n"
    assert origin.call("rotation", "list").out == "no machine is out\n"
    assert origin.call("rotation", "list", "--json").json == {"format": 1, "open": []}
    status = origin.call("release", "status")
    assert (status.code, "nothing was deployed yet" in status.err) == (1, True)
    close = origin.call("rotation", "close", "web1")
    assert (close.code, "rotation list" in close.err) == (1, True)


def test_a_deployment_without_its_release_is_refused(origin: Desk) -> None:
    done = origin.call("release", "deploy", "9.9.9", "--environment", "production")

    assert done.code == 1
    assert "there is no release 9.9.9" in done.err
    assert not list((origin.home / "deployments").glob("*")) if (origin.home / "deployments").exists() else True


def test_a_deployment_that_cannot_be_planned_leaves_nothing_behind(origin: Desk) -> None:
    assert origin.call("release", "create", "1.0.0", "--package", "web=1.0.0").code == 0
    machine = ENVIRONMENT["machines"]["web1"] | {"key": ""}  # type: ignore[index]
    origin.write("environments/production.yaml", ENVIRONMENT | {"machines": {"web1": machine}})
    done = origin.call("release", "deploy", "1.0.0", "--environment", "production")

    assert done.code == 2
    assert "web1" in done.err
    assert list((origin.home / "deployments").glob("*")) == []
    assert json.loads(origin.call("release", "history", "--json").out)["deployments"] == []


def test_a_relay_that_is_not_there_ends_a_deployment_before_any_step(origin: Desk) -> None:
    done = origin.call("release", "deploy", "1.0.0", "--environment", "production", "--package", "web=1.0.0")

    assert done.code == 1
    assert "not every machine can be given orders" in done.out
    assert "web1" in done.out
    status = origin.call("release", "status", "--json").json
    assert status["summary"]["state"] == "failed"
    assert all(step["state"] == "waiting" for step in status["steps"])


def test_without_sqlalchemy_a_release_says_what_to_install_and_help_works(desk: Desk, tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "sitecustomize.py").write_text(
        "import sys\nclass Gone:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sqlalchemy': raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Gone())\n"
        "import importlib.util\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'sqlalchemy' else real(name, *a)\n"
    )

    def call(*words: str) -> Done:
        return run(desk.home, *words, cwd=str(desk.project), PYTHONPATH=str(shadow))

    for words in (
        ("release", "deploy", "1.0.0", "-e", "production"),
        ("release", "status"),
        ("release", "history"),
        ("rotation", "close", "web1"),
    ):
        done = call(*words)
        assert (done.code, "waystation[orchestrator]" in done.err) == (2, True), done.err
    assert call("release", "deploy", "--help").code == 0
    assert call("release", "plan", "-e", "production", "--package", "web=1.0.0").code == 0
    assert call("agent", "--help").code == 0


# --- people


def test_a_release_is_signed_by_whoever_made_it_and_stays_theirs(origin: Desk) -> None:
    made = origin.call("trust", "person", "anna", "--json").json
    assert (made["name"], made["environments"]) == ("anna", [])
    assert origin.call("trust", "person", "ben").code == 0
    for person in ("anna", "ben"):
        done = origin.call("release", "create", "1.0", "--package", "web=1.0.0", "--as", person)
        assert done.code == 0, done.err
    with Journal.open(str(origin.home / "journal.db")) as journal:
        envelope = journal.release("shop", "1.0").envelope
    pins = load_pins(str(origin.home / "trust"))
    assert author_of(envelope, pins.order_keys("production")) == "anna"


def test_approvers_are_looked_for_in_trust_json(origin: Desk) -> None:
    step = {"name": "sign off", "ask": "Ready?", "approvers": ["anna"]}
    origin.write("release.yaml", PROCESS | {"steps": [*PROCESS["steps"], step]})  # type: ignore[misc]
    words = ("release", "plan", "-e", "production", "--package", "web=1.0.0")
    refused = origin.call(*words)
    assert refused.code == 2
    assert re.search(r"release\.yaml:\d+: steps\[1\]\.approvers\[0\]: trust\.json names no 'anna'", refused.err)
    assert origin.call("trust", "person", "anna").code == 0
    assert "step 2 sign off: asks anna: Ready?" in origin.call(*words).out
