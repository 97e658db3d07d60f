"""The three stages of a deployment, from the first script on the server to the last word to a receiver.

One release is deployed again and again, each time with one thing changed. A diary holds what scripts wrote down.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from harness.farm import Farm
from harness.feed import Server, at_first, body, cut, running_feed
from harness.process import Done
from harness.receiver import verify_notification

from orchestrator.deployment.notify import CONTENT_TYPE, SIGNATURE_HEADER
from relay.errors import SignatureError
from relay.trust.keys import parse_pins

VERSIONS = ("1.0.0", "1.1.0", "1.2.0")
SCHEMA_ON_FEED = "/flat/acme.schema/2.0.0/acme.schema.2.0.0.nupkg"
TICKET = ("--variable", "change=CHG42")


@contextmanager
def feed_in_a_thread() -> Iterator[Server]:
    """The feed answers while this thread waits for commands."""
    ready: list[Server] = []
    up, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with running_feed() as server:
            ready.append(server)
            up.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(20)
    try:
        yield ready[0]
    finally:
        over.set()
        thread.join()


@dataclass
class Deed:
    """A deployment, and what was seen after it."""

    done: Done
    diary: list[str]
    told: list[tuple[dict[str, str], bytes]]
    """Headers and bodies of what the receiver got."""
    status: Any
    chunks: int
    """At the relay."""
    trees: dict[str, list[str]]
    """By machine, the labels of the trees under its root."""
    current: dict[str, str]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(message) for _, message in self.told]

    def of(self, machine: str) -> list[str]:
        return [line for line in self.diary if line.split()[0] == machine]

    @property
    def steps(self) -> dict[str, str]:
        return {step["name"]: step["state"] for step in self.status["steps"]}


@dataclass
class World:
    farm: Farm
    feed: Server
    told: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def diary(self) -> Path:
        return self.farm.folder / "diary"

    def note(self, text: str) -> list[str]:
        """A command that adds `text` to the diary."""
        return ["sh", "-c", f"echo {text} >> {self.diary}"]

    async def receive(self, request: web.Request) -> web.Response:
        self.told.append((dict(request.headers), await request.read()))
        return web.Response(status=204)

    def deploy(self, label: str, *words: object, environment: str = "production", version: str = "") -> Deed:
        """With `version`, the release is made first."""
        self.diary.write_text("")
        self.told.clear()
        packages = ("--package", f"web={version}", "--package", "db=2.0.0") if version else ()
        done = self.farm.call("release", "deploy", label, "-e", environment, *packages, *TICKET, *words)
        return Deed(
            done=done,
            diary=self.diary.read_text().splitlines(),
            told=list(self.told),
            status=self.farm.status(),
            chunks=self.chunks,
            trees={name: self.trees(name) for name in self.farm.agents},
            current={name: self.farm.current(name).partition("-")[0] for name in self.farm.agents},
        )

    @property
    def chunks(self) -> int:
        store = self.farm.folder / "relay-fra" / "relay" / "chunks"
        return sum(1 for path in store.rglob("*") if path.is_file())

    def trees(self, machine: str) -> list[str]:
        folder = self.farm.agents[machine].root / "releases"
        return sorted(path.name.rpartition("-")[0] for path in folder.iterdir()) if folder.is_dir() else []

    # --- the files

    def write_scripts(self) -> None:
        store = self.farm.folder / "relay-fra" / "relay" / "chunks"
        self.farm.write_script(
            "ops/up.sh",
            f"#!/bin/sh\necho up, $(find {store} -type f 2>/dev/null | wc -l) chunks at the relay >> {self.diary}\n",
        )
        self.farm.write_script("ops/down.sh", f"#!/bin/sh\necho down, UNDO=$UNDO >> {self.diary}\n")
        self.farm.write_script(
            "db/migrate.sh", f'#!/bin/sh\necho "migrate: $(cat "$PACKAGE_DIR/up.sql") ($VERSION)" >> {self.diary}\n'
        )
        self.farm.write_script("deploy/configure.sh", self.configure())
        for name in ("before", "after"):
            self.farm.write_script(
                f"environments/lb/{name}.sh", f"#!/bin/sh\necho $MACHINE {name} $OUTCOME >> {self.diary}\n"
            )

    def configure(self, more: str = "") -> str:
        """What the machines' script is: `more` is at its end."""
        return f"#!/bin/sh\necho $MACHINE configure >> {self.diary}\nenv | sort > {self.farm.folder}/seen-by-$MACHINE\n{more}"

    def write_process(self, *, pre: list[str] | None = None, **farm_step: object) -> None:
        """`pre` is the command of the second step before acquisition; `farm_step` is laid over the step on machines."""
        self.farm.write_process(
            variables={
                "a": "process",
                "b": "process",
                "c": "process",
                "d": "process",
                "change": {"prompt": "Change ticket", "match": "^CHG[0-9]+$"},
            },
            packages={"web": "Acme.Web", "db": {"id": "Acme.Schema", "feed": "corp"}},
            pre_acquire=[
                {"name": "open vpn", "script": "ops/up.sh", "undo": "ops/down.sh"},
                {
                    "name": "open store",
                    "commands": [pre or self.note("store is open")],
                    "undo": {"commands": [self.note("store is closed")]},
                    "until": "acquired",
                },
            ],
            steps=[
                {"name": "schema", "run_on": "server", "deploy": "db", "script": "db/migrate.sh"},
                {
                    "name": "web farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": f"{self.farm.folder}/srv/${{machine.name}}",
                    "keep": 1,
                    "strategy": "rolling",
                    "rotation": "web",
                    "apply": ["switch", {"script": "deploy/configure.sh"}],
                }
                | farm_step,
                {"name": "smoke", "run_on": "server", "commands": [self.note("smoke 1"), self.note("smoke 2")]},
                {
                    "name": "alarm",
                    "run_on": "server",
                    "when": "failure",
                    "commands": [self.note("alarm")],
                },
                {"name": "report", "run_on": "server", "when": "always", "commands": [self.note("report")]},
            ],
            notify=[{"url": f"{self.feed.base}/hook", "on": ["finished", "failed", "rotation_open"]}],
        )

    def write_environment(self, name: str = "production", **of_web1: object) -> None:
        """`of_web1` are variables that web1 has in addition."""
        self.farm.write_environment(
            name,
            variables={"b": "environment", "c": "environment", "d": "environment"},
            roles={"web": {"variables": {"c": "role", "d": "role"}}},
            machines={
                "web1": {"tags": {"rack": "r1"}, "variables": {"d": "machine", "change": "machine", **of_web1}},
            },
            feeds={"corp": {"url": self.feed.index}},
            rotation={"web": {"before": "lb/before.sh", "after": "lb/after.sh"}},
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with feed_in_a_thread() as feed, Farm(tmp_path_factory.mktemp("stages")) as farm:
        world = World(farm, feed)
        farm.add_relay("fra")
        agents = [farm.add_agent(name) for name in ("web1", "web2")]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda agent: agent.start(), agents))
        for version in VERSIONS:
            farm.add_package("Acme.Web", version, {"version.txt": f"{version}\n"})
        schema = farm.folder / "schema"
        schema.mkdir()
        (schema / "up.sql").write_text("create table orders\n")
        nupkg = farm.folder / "schema.nupkg"
        farm.do("package", "pack", schema, "--id", "Acme.Schema", "--version", "2.0.0", "--output", nupkg)
        whole = nupkg.read_bytes()
        feed.serve("/v3/index.json", at_first(body(b"busy", status=503), then=feed.answers["/v3/index.json"]))
        feed.serve(SCHEMA_ON_FEED, at_first(cut(whole, 100), then=body(whole)))
        feed.serve("/hook", world.receive)
        world.write_scripts()
        yield world


@pytest.fixture(scope="module")
def deeds(world: World) -> dict[str, Deed]:
    """One after another, as a project's weeks go by."""
    deeds = {}
    world.write_process()
    world.write_environment()
    deeds["first"] = world.deploy("1.0.0", version="1.0.0")
    deeds["same"] = world.deploy("1.0.0")
    world.write_environment(d="changed")
    deeds["other variable"] = world.deploy("1.0.0")
    world.farm.write_script("deploy/configure.sh", world.configure("true\n"))
    deeds["other script"] = world.deploy("1.0.0-b", version="1.0.0")

    world.write_process(pre=["sh", "-c", f"echo store fails >> {world.diary}; exit 7"])
    deeds["closed store"] = world.deploy("1.1.0-a", version="1.1.0")
    (world.farm.folder / "blocked").write_text("a file stands where a folder should be made\n")
    world.write_process(to=f"{world.farm.folder}/blocked/${{machine.name}}")
    deeds["no place"] = world.deploy("1.1.0-b", version="1.1.0")

    world.write_process()
    deeds["second"] = world.deploy("1.1.0", version="1.1.0")
    deeds["third"] = world.deploy("1.2.0", version="1.2.0")

    world.farm.write_script("deploy/configure.sh", world.configure("exit 1\n"))
    world.write_process(to=f"{world.farm.folder}/broken/${{machine.name}}")
    world.write_environment("broken")
    deeds["broken"] = world.deploy("broken", version="1.2.0", environment="broken")
    return deeds


# --- before a byte moves


def test_scenario_10_pre_acquisition_runs_before_any_byte_reaches_a_relay(deeds: dict[str, Deed]) -> None:
    deed = deeds["first"]
    assert deed.done.code == 0, deed.done.out + deed.done.err
    assert deed.diary[0] == "up, 0 chunks at the relay"
    assert deed.chunks > 0


def test_what_is_open_until_acquired_is_closed_before_the_first_step_and_the_rest_at_the_end(
    deeds: dict[str, Deed],
) -> None:
    first, *middle, last = [line for line in deeds["first"].diary if line.split()[0] not in {"web1", "web2"}]
    assert first.startswith("up, ")
    assert middle[:3] == ["store is open", "store is closed", "migrate: create table orders (2.0.0)"]
    assert last == "down, UNDO=1"


def test_scenario_10_where_pre_acquisition_fails_no_byte_moves_and_what_it_opened_is_undone(
    deeds: dict[str, Deed],
) -> None:
    deed = deeds["closed store"]
    assert deed.done.code == 1
    chunks = deeds["other script"].chunks
    assert deed.diary == [
        f"up, {chunks} chunks at the relay",
        "store fails",
        "store is closed",
        "down, UNDO=1",
    ]
    assert deed.chunks == chunks
    assert deed.trees == deeds["other script"].trees
    ledger = deed.status["ledger"]
    assert (ledger["to_relays"], ledger["from_relays"], ledger["wire_bytes"]) == ({}, {}, 0)
    assert set(deed.steps.values()) == {"waiting"}
    assert "open store" in deed.status["summary"]["reason"]
    assert "exit status 7" in deed.status["summary"]["reason"]


def test_scenarios_10_and_11_where_acquisition_fails_no_step_begins_and_everything_is_undone(
    deeds: dict[str, Deed],
) -> None:
    deed = deeds["no place"]
    assert deed.done.code == 1
    assert deed.diary[1:] == ["store is open", "store is closed", "down, UNDO=1"]
    assert set(deed.steps.values()) == {"waiting"}
    reason = deed.status["summary"]["reason"]
    assert "no step began" in reason
    assert "web1" in reason
    assert "web2" in reason


def test_a_package_that_the_depot_lacks_is_taken_once_though_its_feed_is_busy_and_cuts_the_first_try(
    world: World, deeds: dict[str, Deed]
) -> None:
    assert deeds["third"].done.code == 0
    assert world.feed.paths.count("/v3/index.json") == 2
    assert world.feed.paths.count(SCHEMA_ON_FEED) == 2
    listed = world.farm.do("package", "list").out
    assert "Acme.Schema" in listed


# --- steps


def test_steps_run_in_the_files_order(deeds: dict[str, Deed]) -> None:
    of_steps = deeds["first"].diary[3:-1]
    assert of_steps == [
        "migrate: create table orders (2.0.0)",
        "web1 before",
        "web1 configure",
        "web1 after deployed",
        "web2 before",
        "web2 configure",
        "web2 after deployed",
        "smoke 1",
        "smoke 2",
        "report",
    ]
    assert deeds["first"].steps == {
        "schema": "done",
        "web farm": "done",
        "smoke": "done",
        "alarm": "skipped",
        "report": "done",
    }


def test_after_a_failure_only_steps_for_failure_or_always_run_and_everything_is_undone(deeds: dict[str, Deed]) -> None:
    deed = deeds["broken"]
    assert deed.done.code == 1
    assert deed.diary[3:] == [
        "migrate: create table orders (2.0.0)",
        "web1 before",
        "web1 configure",
        "alarm",
        "report",
        "down, UNDO=1",
    ]
    assert deed.steps == {"schema": "done", "web farm": "failed", "smoke": "skipped", "alarm": "done", "report": "done"}


def test_values_reach_a_machines_script_the_nearer_one_wins(world: World, deeds: dict[str, Deed]) -> None:
    def seen_by(machine: str) -> dict[str, str]:
        lines = (world.farm.folder / f"seen-by-{machine}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    deed = deeds["broken"]  # the last that wrote it down
    seen = seen_by("web1")
    assert [seen[f"VAR_{name}"] for name in "ABCD"] == ["process", "environment", "role", "machine"]
    assert seen["VAR_CHANGE"] == "CHG42"
    assert seen_by("web2")["VAR_D"] == "role"
    assert {name: seen[name] for name in ("MACHINE", "ADDRESS", "SITE", "ROLES", "TAG_RACK")} == {
        "MACHINE": "web1",
        "ADDRESS": "127.0.0.1",
        "SITE": "fra",
        "ROLES": "web",
        "TAG_RACK": "r1",
    }
    assert {name: seen[name] for name in ("PROJECT", "RELEASE", "ENVIRONMENT", "STEP", "VERSION", "PACKAGE_ID")} == {
        "PROJECT": "shop",
        "RELEASE": "broken",
        "ENVIRONMENT": "broken",
        "STEP": "web farm",
        "VERSION": "1.2.0",
        "PACKAGE_ID": "Acme.Web",
    }
    assert seen["DEPLOYMENT"] == deed.status["summary"]["deployment"]
    assert seen["ATTEMPT"] == "1"
    assert seen["ROOT"] == f"{world.farm.folder}/broken/web1"


def test_an_answer_that_does_not_match_is_refused_before_anything_runs(world: World, deeds: dict[str, Deed]) -> None:
    world.diary.write_text("")
    done = world.farm.call("release", "deploy", "1.2.0", "-e", "production", "--variable", "change=soon")
    assert done.code == 2
    assert "Change ticket" in done.err
    assert world.diary.read_text() == ""


# --- again


def test_scenario_32_the_same_again_is_already_current_with_no_bracket_and_no_script(deeds: dict[str, Deed]) -> None:
    deed = deeds["same"]
    assert deed.done.code == 0, deed.done.err
    assert deed.of("web1") == deed.of("web2") == []
    assert {machine["name"]: machine["outcome"] for machine in deed.status["machines"]} == {
        "web1": "already_current",
        "web2": "already_current",
    }
    ledger = deed.status["ledger"]
    assert (ledger["from_relays"], ledger["wire_bytes"], sum(ledger["to_relays"].values())) == ({}, 0, 0)


def test_a_changed_variable_is_deployed_where_it_changed(deeds: dict[str, Deed]) -> None:
    deed = deeds["other variable"]
    assert deed.done.code == 0, deed.done.err
    assert deed.of("web1") == ["web1 before", "web1 configure", "web1 after deployed"]
    assert deed.of("web2") == []


def test_a_changed_script_is_run_though_the_package_is_the_same(deeds: dict[str, Deed]) -> None:
    deed = deeds["other script"]
    assert deed.done.code == 0, deed.done.err
    assert deed.of("web1") == ["web1 before", "web1 configure", "web1 after deployed"]
    assert deed.of("web2") == ["web2 before", "web2 configure", "web2 after deployed"]


def test_old_trees_are_pruned_the_current_one_and_the_last_good_one_stay(deeds: dict[str, Deed]) -> None:
    assert deeds["second"].done.code == 0, deeds["second"].done.err
    for machine in ("web1", "web2"):
        assert deeds["second"].trees[machine] == ["1.0.0", "1.1.0"]
        assert deeds["third"].trees[machine] == ["1.1.0", "1.2.0"]
        assert deeds["third"].current[machine] == "1.2.0"


# --- who hears of it


def test_receivers_are_told_how_it_ended(deeds: dict[str, Deed]) -> None:
    [finished] = deeds["first"].events
    assert finished["type"] == "dev.waystation.deployment.finished"
    assert finished["subject"] == deeds["first"].status["summary"]["deployment"]
    assert finished["data"]["label"] == "1.0.0"
    [failed] = deeds["closed store"].events
    assert failed["type"] == "dev.waystation.deployment.failed"
    assert "open store" in failed["data"]["reason"]


def test_receivers_are_told_which_machines_are_left_out(deeds: dict[str, Deed]) -> None:
    is_open, failed = deeds["broken"].events
    assert is_open["type"] == "dev.waystation.deployment.rotation_open"
    assert is_open["data"]["out"] == ["web1"]
    assert failed["type"] == "dev.waystation.deployment.failed"


def test_what_receivers_are_told_is_signed_with_the_order_key(world: World, deeds: dict[str, Deed]) -> None:
    keys = parse_pins((world.farm.home / "trust" / "trust.json").read_bytes()).order_keys("production")
    for deed in deeds.values():
        assert deed.told
        for headers, message in deed.told:
            assert headers["Content-Type"] == CONTENT_TYPE
            verify_notification(message, headers[SIGNATURE_HEADER], keys)
    headers, message = deeds["first"].told[0]
    with pytest.raises(SignatureError):
        verify_notification(message.replace(b"finished", b"finishes"), headers[SIGNATURE_HEADER], keys)
