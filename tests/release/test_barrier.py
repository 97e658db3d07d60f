"""The barrier, from outside: nothing of a step runs anywhere before every machine has every byte on its own disk.

Scripts write down what they see when they run; the slow machine stands behind a line that is really slow.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.farm import Farm
from harness.packages import noise
from harness.process import Done, Process, wait_for

from benchmarks.lines.network import Line, ThreadedProxy

PAYLOAD = 3 << 20
SLOW = Line(rate=PAYLOAD / 2.5)
"""Of the slow machine: its package takes seconds, that of the others a moment."""

LOOK = """#!{python}
import hashlib, json, os, sys, time
from pathlib import Path
seen = {{}}
for root in sorted(Path({srv!r}).glob("*")):
    trees = sorted((root / "releases").glob("[!.]*"))
    seen[root.name] = {{
        "current": os.path.lexists(root / "current"),
        "trees": {{
            tree.name: hashlib.sha256((tree / "payload.bin").read_bytes()).hexdigest()
            for tree in trees if (tree / "payload.bin").exists()
        }},
        "incoming": [path.name for path in (root / "releases").glob(".incoming*")],
    }}
said = {{"what": {what!r}, "machine": os.environ.get("MACHINE", ""), "at": time.time_ns(), "seen": seen}}
path = Path({events!r}) / f"{{said['at']}}-{{os.getpid()}}"
path.with_suffix(".tmp").write_text(json.dumps(said))
path.with_suffix(".tmp").rename(path.with_suffix(".json"))
"""
"""A script that writes down when it ran, and what stands under every machine's root at that moment."""


class Barrier:
    """Two machines; `far` is of a site of its own, whose relay is reached over a line that can be shaped."""

    def __init__(self, farm: Farm, line: ThreadedProxy) -> None:
        self.farm = farm
        self.line = line
        self.events = farm.folder / "events"
        self.srv = farm.folder / "srv"
        self.payloads: dict[str, str] = {}

    def prepare(self, version: str, size: int = PAYLOAD, **acquire: Any) -> None:
        """A new version, and a release of it whose every script looks around."""
        data = noise(version, size)
        self.payloads[version] = hashlib.sha256(data).hexdigest()
        folder = self.farm.folder / "packed" / f"Acme.Web-{version}"
        folder.mkdir(parents=True)
        (folder / "payload.bin").write_bytes(data)
        self.farm.add_package("Acme.Web", version, {"version.txt": version})
        shutil.rmtree(self.events, ignore_errors=True)
        self.events.mkdir()
        for path in ("ops/pre", "ops/undo", "ops/server", "ops/machine", "environments/ops/before"):
            self._write_look(path)
        self._write_look("environments/ops/after")
        self.farm.write_process(
            packages={"web": "Acme.Web"},
            pre_acquire=[{"name": "open the line", "script": "ops/pre.py", "undo": "ops/undo.py"}],
            acquire=acquire,
            steps=[
                {"name": "schema", "run_on": "server", "script": "ops/server.py"},
                {
                    "name": "farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": f"{self.srv}/${{machine.name}}",
                    "strategy": "rolling",
                    "rotation": "web",
                    "apply": [{"name": "look", "script": "ops/machine.py"}, "switch"],
                },
            ],
        )
        self.farm.write_environment(rotation={"web": {"before": "ops/before.py", "after": "ops/after.py"}})

    def _write_look(self, path: str) -> None:
        what = path.rpartition("/")[2]
        text = LOOK.format(python=sys.executable, srv=str(self.srv), events=str(self.events), what=what)
        self.farm.write_script(f"{path}.py", text)

    def begin(self, version: str) -> Process:
        words = ("release", "deploy", version, "--environment", "production", "--package", f"web={version}")
        return self.farm.start(*words)

    def deploy(self, version: str) -> Done:
        return self.begin(version).result()

    def events_seen(self) -> list[Any]:
        """What the scripts wrote, the oldest first."""
        return sorted((json.loads(path.read_text()) for path in self.events.glob("*.json")), key=lambda e: e["at"])

    def tree(self, machine: str, version: str) -> Path:
        """The finished tree of a version."""
        [tree] = (self.srv / machine / "releases").glob(f"{version}-*")
        return tree

    def chunks(self, site: str) -> set[Path]:
        """Every chunk that the relay of a site has on its disk."""
        return set((self.farm.folder / f"relay-{site}").glob("*/chunks/*/*"))

    def currents(self) -> dict[str, str]:
        return {name: self.farm.current(name) for name in self.farm.agents}

    def assert_nothing_ran(self, done: Done, current_before: dict[str, str]) -> None:
        """Exit 1, no step of any kind anywhere, `current` as it was, and what was opened is closed again."""
        assert done.code == 1, f"{done.out}\n{done.err}"
        assert [event["what"] for event in self.events_seen()] == ["pre", "undo"]
        assert self.currents() == current_before
        status = self.farm.status()
        assert status["summary"]["state"] == "failed"
        assert [step["state"] for step in status["steps"]] == ["waiting", "waiting"]
        assert status["brackets"] == []
        assert [(undone["name"], undone["undo"]) for undone in status["pre_acquire"]] == [("open the line", "done")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Barrier]:
    with Farm(tmp_path_factory.mktemp("barrier")) as farm:
        farm.add_relay("fra")
        relay = farm.add_relay("ams")
        with ThreadedProxy("127.0.0.1", relay.port) as line:
            # Everybody, the origin too, knows this relay by its line.
            farm.urls["ams"] = f"http://127.0.0.1:{line.port}"
            for name, site in (("near", "fra"), ("far", "ams")):
                farm.add_agent(name, site).start()
            yield Barrier(farm, line)


@pytest.fixture
def barrier(world: Barrier) -> Iterator[Barrier]:
    """With a line that is fast, and everybody there."""
    world.line.shape(down=Line())
    yield world
    world.line.shape(down=Line())


def test_scenario_06_no_step_begins_anywhere_before_the_slowest_machine_has_verified_its_package(
    barrier: Barrier,
) -> None:
    barrier.prepare("1.0.0")
    barrier.line.shape(down=SLOW)
    done = barrier.deploy("1.0.0")
    assert done.code == 0, f"{done.out}\n{done.err}"

    pre, *steps, undo = barrier.events_seen()
    assert (pre["what"], undo["what"]) == ("pre", "undo")
    whats = [(event["what"], event["machine"]) for event in steps]
    assert whats[0] == ("server", "")
    assert sorted(whats[1:]) == sorted((w, m) for m in ("near", "far") for w in ("before", "machine", "after"))

    # The line made a difference, or nothing was proved: the near machine had all long before the far one.
    arrived = {name: barrier.tree(name, "1.0.0").stat().st_ctime_ns for name in ("near", "far")}
    assert arrived["near"] - pre["at"] < (arrived["far"] - pre["at"]) / 2
    assert arrived["near"] < arrived["far"] < steps[0]["at"]
    assert pre["seen"] == {}, "something came before the pre-acquisition"
    for event in steps:
        trees = {name: list(seen["trees"].values()) for name, seen in event["seen"].items()}
        assert trees == {key: [barrier.payloads["1.0.0"]] for key in ("near", "far")}, event["what"]
        assert not any(seen["incoming"] for seen in event["seen"].values())
    # Nor is anything switched before its own turn.
    first_before = next(event for event in steps if event["what"] == "before")
    assert not any(seen["current"] for seen in first_before["seen"].values())


def test_scenario_10_what_lies_behind_a_vpn_is_reached_once_its_step_has_opened_it(barrier: Barrier) -> None:
    """The line to ams passes nothing on but between the step and its undo."""
    barrier.prepare("1.1.0")
    opens, is_open, closes = (barrier.farm.folder / name for name in ("opens", "is-open", "closes"))
    for script, more in (
        ("ops/pre.py", f"until [ -e {is_open} ]; do sleep 0.02; done"),
        ("ops/undo.py", ""),
    ):
        looks = (barrier.farm.project / script).rename(barrier.farm.project / script.replace(".py", "-looks.py"))
        touched = opens if more else closes
        barrier.farm.write_script(script, f'#!/bin/sh\n"$(dirname "$0")/{looks.name}"\ntouch {touched}\n{more}\n')
    barrier.line.pause()
    try:
        already = barrier.line.counts.total
        deploying = barrier.begin("1.1.0")
        wait_for(lambda: opens.exists() or not deploying.is_alive)
        crossed = barrier.line.counts.total - already
        barrier.line.resume()
        is_open.touch()
        wait_for(lambda: closes.exists() or not deploying.is_alive)
        barrier.line.pause()
        done = deploying.result()
    finally:
        barrier.line.resume()
    assert done.code == 0, f"{done.out}\n{done.err}"
    assert "keeps its results" not in done.out, "the last words came before the line was closed"
    assert crossed == 0, "something crossed before the line was open"
    assert barrier.farm.current("far").startswith("1.1.0-")
    whats = [event["what"] for event in barrier.events_seen()]
    assert (whats[0], whats[-1]) == ("pre", "undo")


def test_scenario_30_a_cancel_during_acquisition_ends_it_at_once_and_keeps_what_came(barrier: Barrier) -> None:
    barrier.prepare("1.2.0")
    before, already = barrier.currents(), barrier.line.counts.down
    barrier.line.shape(down=Line(rate=PAYLOAD / 600))
    deploying = barrier.begin("1.2.0")
    barrier.line.wait_for(already + PAYLOAD // 600, direction="down")
    barrier.farm.do("release", "cancel", "-m", "wrong version")
    done = deploying.result()  # at that rate it would be ten minutes
    assert done.code == 130, f"{done.out}\n{done.err}"
    assert [event["what"] for event in barrier.events_seen()] == ["pre", "undo"]
    assert barrier.currents() == before
    status = barrier.farm.status()
    assert (status["summary"]["state"], status["brackets"]) == ("cancelled", [])
    assert [step["state"] for step in status["steps"]] == ["waiting", "waiting"]
    barrier.line.shape(down=Line())
    again = barrier.farm.deploy("1.2.0")
    assert again.code == 0, f"{again.out}\n{again.err}"


def test_chunks_that_a_relay_lost_stop_everything_before_the_first_step(barrier: Barrier) -> None:
    size = 80 << 20  # more than one request of a machine whose line is not known: a relay has all of that in memory
    barrier.prepare("2.0.0", size, stall="3s", deadline="40s")
    barrier.farm.do("package", "replicate", "Acme.Web", "2.0.0", "--relay", barrier.farm.urls["ams"])
    before, already = barrier.currents(), barrier.line.counts.down
    barrier.line.shape(down=Line(rate=size / 20))
    deploying = barrier.begin("2.0.0")
    barrier.line.wait_for(already + size // 20, direction="down")
    lost = barrier.chunks("ams")
    for chunk in lost:
        chunk.unlink()
    barrier.line.shape(down=Line())
    done = deploying.result()

    assert lost, "there was nothing to lose"
    barrier.assert_nothing_ran(done, before)
    assert "far: " in done.out
    assert "could not be fetched" in done.out
    assert "Acme.Web 2.0.0" in done.out
    assert "near: " not in barrier.farm.status()["summary"]["reason"]
    assert barrier.tree("near", "2.0.0").is_dir(), "the others were not to be held up"


def test_no_room_on_one_machine_stops_everything_before_a_byte_moves(barrier: Barrier) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    barrier.prepare("3.0.0")
    root = barrier.srv / "far"
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", root], check=True)
    try:
        before, chunks = barrier.currents(), {site: barrier.chunks(site) for site in ("fra", "ams")}
        bytes_before = barrier.line.counts.up
        done = barrier.deploy("3.0.0")
        barrier.assert_nothing_ran(done, before)
        assert not list(root.iterdir())
    finally:
        subprocess.run(["umount", root], check=True)
    assert "far has " in done.out
    assert f"{root} and needs " in done.out
    assert "not enough room" in done.out
    assert {site: barrier.chunks(site) for site in ("fra", "ams")} == chunks, "something was replicated"
    assert barrier.line.counts.up - bytes_before < PAYLOAD / 4
    assert not list((barrier.srv / "near" / "releases").glob("3.0.0-*"))


def test_an_agent_that_is_not_there_stops_everything_before_a_byte_moves(barrier: Barrier) -> None:
    barrier.prepare("4.0.0")
    absent = barrier.farm.add_agent("absent", "ams")
    barrier.farm.write_environment(rotation={"web": {"before": "ops/before.py", "after": "ops/after.py"}})
    try:
        before, chunks = barrier.currents(), barrier.chunks("ams")
        done = barrier.deploy("4.0.0")
        barrier.assert_nothing_ran(done, before)
    finally:
        del barrier.farm.agents[absent.name]
    assert "absent: no relay has seen it" in done.out
    assert barrier.chunks("ams") == chunks


def test_scenario_11_an_agent_that_dies_while_it_pulls_stops_everything_and_is_named_at_the_deadline(
    barrier: Barrier,
) -> None:
    barrier.prepare("5.0.0", deadline="5s")
    before, already = barrier.currents(), barrier.line.counts.down
    barrier.line.shape(down=Line(rate=PAYLOAD / 30))
    deploying = barrier.begin("5.0.0")
    barrier.line.wait_for(already + PAYLOAD // 20, direction="down")
    barrier.farm.agents["far"].kill()
    try:
        done = deploying.result()
        barrier.assert_nothing_ran(done, before)
        assert "acquire: deadline" in done.out
        reason = barrier.farm.status()["summary"]["reason"]
        assert "far: " in reason
        assert "near" not in reason
    finally:
        barrier.line.shape(down=Line())
        barrier.farm.agents["far"].start()
    again = barrier.deploy("5.0.0")
    assert again.code == 0, f"{again.out}\n{again.err}"
    assert "to be brought to 1 of 2 machines: far" in again.out, "only what is missing moves"
