"""Stage and go, machines left out, trying again and going back, as people do it from the command line.

Each scenario has a project, an environment and roots of its own on the same farm, so that none depends on another. Its
diary is what scripts wrote down.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.farm import Farm
from harness.packages import noise
from harness.process import Done

from benchmarks.lines.network import Line, ThreadedProxy

WEB = ("web1", "web2", "web3")
SLOW_BYTES = 1 << 20
"""Of a package that one machine gets slowly."""
VERSIONS = ("1.0.0", "1.1.0", "1.2.0")


@dataclass
class Scene:
    """One project in one environment."""

    farm: Farm
    name: str

    def __post_init__(self) -> None:
        self.folder = self.farm.folder / self.name
        self.srv = self.folder / "srv"
        self.diary = self.folder / "diary"
        self.folder.mkdir()
        self.diary.write_text("")
        self.script("deploy/start.sh", f"[ ! -e {self.folder}/ill-$MACHINE ] || exit 1\n")
        self.script("environments/lb/out.sh", "")
        self.script("environments/lb/in.sh", "")

    def script(self, path: str, more: str) -> None:
        """One that notes its name, its machine and its outcome."""
        name = Path(path).stem
        text = f"#!/bin/sh\necho {name} $MACHINE$OUTCOME >> {self.diary}\n{more}"
        script = self.folder / path
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
        script.chmod(0o755)

    def write(self, *, roles: tuple[str, ...] = ("web",), steps: Any = (), rolling: Any = None, **more: Any) -> None:
        process = {
            "format": 1,
            "project": self.name,
            "packages": {"web": "Acme.Web"},
            "steps": [
                *steps,
                {
                    "name": "farm",
                    "roles": list(roles),
                    "deploy": "web",
                    "to": f"{self.srv}/${{machine.name}}",
                    "strategy": {"rolling": rolling or {"window": 1}},
                    "rotation": "web",
                    "on_failure": "stop",
                    "apply": ["switch", {"script": "deploy/start.sh"}],
                },
            ],
        } | more
        (self.folder / "release.yaml").write_text(yaml.safe_dump(process, sort_keys=False))

    def machines(self, *names: str, **variables: Any) -> None:
        environment = {
            "environment": self.name,
            "relays": {site: {"url": url, "site": site} for site, url in self.farm.urls.items()},
            "rotation": {"web": {"before": "lb/out.sh", "after": "lb/in.sh"}},
            "variables": variables,
            "machines": {
                name: {
                    "address": "127.0.0.1",
                    "site": self.farm.agents[name].site,
                    "roles": ["job" if name.startswith("job") else "web"],
                    "tags": {"rack": f"r{name[-1]}"},
                    "key": self.farm.agents[name].key,
                }
                for name in names
            },
        }
        path = self.folder / "environments" / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(environment, sort_keys=False))

    def do(self, command: str, *words: object, code: int = 0) -> Done:
        self.diary.write_text("")
        named = () if command == "retry" else ("-e", self.name)
        done = self.farm.call("release", command, *words, *named, cwd=self.folder)
        assert done.code == code, f"{command}: {done.code}\n{done.out}\n{done.err}"
        return done

    def deploy(self, label: str, *words: object, code: int = 0) -> Done:
        return self.do("deploy", label, "--package", f"web={label}", *words, code=code)

    @property
    def told(self) -> list[str]:
        return self.diary.read_text().splitlines()

    def turned(self) -> list[str]:
        """Machines that had a bracket, in this order."""
        return [line.removeprefix("out ") for line in self.told if line.startswith("out ")]

    @property
    def status(self) -> Any:
        return self.farm.do("release", "status", "-e", self.name, "--json").json

    def current(self) -> dict[str, str]:
        return {root.name: (root / "current" / "version.txt").read_text().strip() for root in sorted(self.srv.glob("*"))
                if (root / "current").exists()}  # fmt: skip

    def tree(self, machine: str, label: str) -> Path:
        [tree] = (self.srv / machine / "releases").glob(f"{label}-*")
        return tree


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("going")) as farm:
        farm.add_relay("fra")
        agents = [farm.add_agent(name) for name in WEB]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda agent: agent.start(), agents))
        for version in VERSIONS:
            farm.add_package("Acme.Web", version, {"version.txt": f"{version}\n", "payload.txt": version * 20_000})
        yield farm


# --- stage and go


def test_scenario_12_a_deploy_after_a_stage_moves_no_bytes_and_what_was_lost_meanwhile_is_fetched_first(
    farm: Farm,
) -> None:
    scene = Scene(farm, "overnight")
    scene.script("ops/up.sh", "")
    scene.script("ops/down.sh", "")
    opened = [{"name": "vpn", "script": "ops/up.sh", "undo": "ops/down.sh"}]
    scene.write(pre_acquire=opened)
    scene.machines(*WEB)
    scene.do("stage", "1.1.0", "--package", "web=1.1.0")
    assert scene.told == ["up", "down"], "nothing but pre-acquisition runs, and it is undone"
    assert scene.current() == {}
    staged = scene.status
    assert (staged["summary"]["goal"], staged["summary"]["state"]) == ("stage", "succeeded")
    assert [machine["stage"] for machine in staged["machines"]] == ["acquired"] * 3
    assert [step["state"] for step in staged["steps"]] == ["waiting"]
    assert f"stage of overnight 1.1.0 in {scene.name}" in farm.do("release", "status", "-e", scene.name).out

    done = scene.do("deploy", "1.1.0")
    assert scene.told == ["up", *(f"{what} {web}{how}" for web in WEB for what, how in (("out", ""), ("start", ""), ("in", "deployed"))), "down"]  # fmt: skip
    assert "nothing moves to them" in done.out
    ledger = scene.status["ledger"]
    assert (ledger["from_relays"], sum(one["wire_bytes"] for one in ledger["replicated"])) == ({}, 0)
    assert scene.current() == dict.fromkeys(WEB, "1.1.0")

    scene.do("stage", "1.2.0", "--package", "web=1.2.0")
    shutil.rmtree(scene.tree("web1", "1.2.0"))
    damaged = scene.tree("web2", "1.2.0") / "payload.txt"
    damaged.write_text("edited by hand\n")
    done = scene.do("deploy", "1.2.0")
    [to_bring] = [line for line in done.out.splitlines() if "to be brought to 2 of 3 machines" in line]
    assert all(f"{web} (" in to_bring for web in ("web1", "web2"))
    entries = done.out.splitlines()
    barrier = next(at for at, line in enumerate(entries) if "everything is everywhere" in line)
    fetched = [at for at, line in enumerate(entries) if "has everything, verified" in line]
    assert len(fetched) == 3
    assert max(fetched) < barrier
    assert scene.current() == dict.fromkeys(WEB, "1.2.0")
    assert (scene.srv / "web2" / "current" / "payload.txt").read_text() == "1.2.0" * 20_000


# --- left out by rule


def test_scenario_31_an_offline_machine_is_left_out_by_rule_and_brought_up_to_date_later(farm: Farm) -> None:
    scene = Scene(farm, "offline")
    for name in ("job1", "job2"):
        farm.add_agent(name)
    rule = {"acquire": {"offline": {"action": "skip", "at_most": 1, "roles": ["job"]}}}
    scene.write(roles=("web", "job"), **rule)
    scene.machines("web1", "web2", "job1")
    done = scene.deploy("1.0.0", code=5)
    assert sorted(scene.turned()) == ["web1", "web2"]
    assert "job1 is left out: offline: no relay has seen it" in done.out
    assert "left out: job1 (offline: no relay has seen it" in done.err
    status = scene.status
    assert status["summary"]["state"] == "done with exclusions"
    assert [(one["machine"], one["by"]) for one in status["left"]] == [("job1", "")]
    assert {m["name"]: m["stage"] for m in status["machines"]}["job1"] == "excluded"
    listed = farm.do("release", "history", "-e", scene.name).out
    assert "done with exclusions" in listed
    assert "left out: job1" in listed
    ulid = status["summary"]["deployment"]

    scene.machines("web1", "web2", "job1", "job2")
    done = scene.deploy("1.1.0", code=1)
    assert "1 of at most 1 are left out already (acquire: offline)" in done.out
    assert scene.told == []

    try:
        farm.agents["job1"].start()
        scene.do("retry", ulid, "--machine", "job1")
    finally:
        farm.agents.pop("job2")
    assert scene.told == ["out job1", "start job1", "in job1deployed"]
    assert scene.current() == dict.fromkeys(("job1", "web1", "web2"), "1.0.0")
    assert scene.status["summary"]["state"] == "succeeded"


def test_scenario_31_a_machine_that_is_lost_while_it_pulls_is_left_out_by_rule(farm: Farm) -> None:
    scene = Scene(farm, "lost")
    farm.add_package("Acme.Web", "9.0.0", {"version.txt": "9.0.0\n", "noise.txt": noise("9", SLOW_BYTES).hex()})
    relay = farm.add_relay("iad")
    # Only the last line is slow: nobody waits for what is still on its way to a relay.
    urls = [word for url in farm.urls.values() for word in ("--relay", url)]
    farm.do("package", "replicate", "Acme.Web", "9.0.0", *urls)
    scene.write(acquire={"stall": "3s", "offline": {"action": "skip", "at_most": 1}})
    with ThreadedProxy("127.0.0.1", relay.port) as line:
        farm.urls["iad"] = f"http://127.0.0.1:{line.port}"
        agent = farm.add_agent("web8", "iad")
        agent.start()
        scene.machines("web1", "web2", "web8")
        line.shape(down=Line(rate=SLOW_BYTES / 10))
        words = ("release", "deploy", "9.0.0", "-e", scene.name, "--package", "web=9.0.0")
        deploying = farm.start(*words, cwd=scene.folder)
        line.wait_for(line.counts.down + SLOW_BYTES // 20, direction="down")
        assert scene.told == [], "it still pulls"
        relay.kill()
        done = deploying.result()
        farm.agents.pop("web8").stop()
        farm.urls.pop("iad")
    assert done.code == 5, f"{done.out}\n{done.err}"
    assert "web8 is left out: offline: " in done.out
    assert scene.turned() == ["web1", "web2"]
    assert [one["machine"] for one in scene.status["left"]] == ["web8"]


# --- left out on purpose


def test_a_machine_that_is_left_out_on_purpose_is_named_everywhere_and_can_follow_later(farm: Farm) -> None:
    scene = Scene(farm, "purpose")
    scene.write(rolling={"window": "50%", "min_in_service": 1})
    scene.machines(*WEB)
    planned = farm.start("release", "create", "1.0.0", "--package", "web=1.0.0", cwd=scene.folder).result()
    assert planned.code == 0, planned.err
    done = scene.do("deploy", "1.0.0", "--exclude", "web3", "-m", "new kernel", code=5)
    assert scene.turned() == ["web1", "web2"]
    assert "farm: without web3; 2 machines left" in done.out
    assert "2 machines, 1 at a time" in done.out, "half of those that are left"
    assert "web3 is left out by " in done.out
    [left] = scene.status["left"]
    assert (left["machine"], left["reason"]) == ("web3", "new kernel")
    assert left["by"]
    assert "left out: web3 (new kernel)" in farm.do("release", "history", "-e", scene.name).out
    assert "web3" not in scene.current()

    refused = scene.do("deploy", "1.0.0", "--exclude", "site:iad", "-m", "why", code=2)
    assert "there: site:fra" in refused.err
    assert "Give it with -m" in scene.do("deploy", "1.0.0", "--exclude", "web1", code=2).err

    # What was left out once is not left out for ever.
    scene.do("retry", scene.status["summary"]["deployment"], "--failed")
    assert scene.turned() == ["web3"]
    assert scene.status["left"] == []


# --- again


def test_scenario_32_retry_touches_only_what_is_not_through_with_the_original_scope(farm: Farm) -> None:
    scene = Scene(farm, "again")
    scene.script("ops/migrate.sh", "")
    scene.script("deploy/start.sh", f"echo $VAR_COLOUR > {scene.folder}/colour-$MACHINE\n[ ! -e {scene.folder}/ill-$MACHINE ] || exit 1\n")  # fmt: skip
    schema = {"name": "schema", "run_on": "server", "script": "ops/migrate.sh"}
    # Of three, two must be in service: machines that have no turn this time count where they are.
    scene.write(steps=[schema], rolling={"window": 1, "min_in_service": 2}, variables={"colour": "red"})
    scene.machines(*WEB, colour="green")
    (scene.folder / "ill-web2").touch()
    scene.deploy("1.0.0", code=1)
    assert scene.turned() == ["web1", "web2"]
    assert scene.told[0] == "migrate"
    first = scene.status["summary"]["deployment"]

    (scene.folder / "ill-web2").unlink()
    scene.machines(*WEB, colour="blue")
    scene.script("environments/lb/in.sh", "exit 7\n")
    done = scene.do("retry", "--failed", first)
    assert scene.told == ["out web2", "start web2", "in web2deployed", "out web3", "start web3", "in web3deployed"]
    assert "its bracket in web, opened by 1.0.0, is adopted" in done.out
    assert (scene.folder / "colour-web3").read_text() == "green\n", "as it was planned, not as the file is now"
    assert scene.current() == dict.fromkeys(WEB, "1.0.0")
    assert scene.status["summary"]["state"] == "succeeded"
    assert farm.do("rotation", "list", "-e", scene.name, "--json").json["open"] == []

    refused = scene.do("retry", "--failed", first, code=1)
    assert "every machine is through" in refused.err
    scene.do("retry", first, "--machine", "WEB1")
    assert scene.told == []
    assert {m["name"]: m["outcome"] for m in scene.status["machines"]} == {"web1": "already_current"}
    assert "has no part" in scene.do("retry", first, "--machine", "web7", code=1).err
    assert "--failed" in scene.do("retry", first, code=2).err


# --- back


def test_scenario_35_a_rollback_goes_to_the_last_good_release_with_brackets_and_without_bytes(farm: Farm) -> None:
    scene = Scene(farm, "back")
    scene.write()
    scene.machines(*WEB)
    scene.deploy("1.1.0")
    (scene.folder / "ill-web2").touch()
    scene.deploy("1.2.0", code=1)
    assert scene.current() == {"web1": "1.2.0", "web2": "1.2.0", "web3": "1.1.0"}
    (scene.folder / "ill-web2").rename(scene.folder / "ill-web1")

    done = scene.do("rollback", code=1)
    assert "going back from 1.2.0 to 1.1.0" in done.out
    assert "nothing moves to them" in done.out
    assert scene.turned() == ["web2", "web1"], "the one that is out goes first; web3 never left 1.1.0"
    summary = scene.status["summary"]
    assert (summary["goal"], summary["label"], summary["state"]) == ("rollback", "1.1.0", "failed")
    ledger = scene.status["ledger"]
    assert (ledger["from_relays"], sum(one["wire_bytes"] for one in ledger["replicated"])) == ({}, 0)

    # It stopped for a person, and leads to the same release again.
    (scene.folder / "ill-web1").unlink()
    scene.do("rollback")
    assert scene.turned() == ["web1"]
    assert scene.current() == dict.fromkeys(WEB, "1.1.0")
    assert farm.do("rotation", "list", "-e", scene.name, "--json").json["open"] == []

    assert "rollback to back 1.1.0" in farm.do("release", "history", "-e", scene.name).out
    assert "no release before 1.1.0 was good there" in scene.do("rollback", code=1).err


def test_scenario_35_a_step_on_the_server_that_does_not_say_what_going_back_means_refuses_before_anything_starts(
    farm: Farm,
) -> None:
    scene = Scene(farm, "refusing")
    scene.script("ops/migrate.sh", "")
    scene.write()
    scene.machines("web1")
    scene.deploy("1.0.0")
    scene.write(steps=[{"name": "schema", "run_on": "server", "script": "ops/migrate.sh"}])
    scene.deploy("1.1.0")
    refused = scene.do("rollback", code=1)
    assert "step 1 (schema) of 1.1.0 ran, and on_rollback is refuse" in refused.err
    assert "release deploy 1.0.0" in refused.err
    assert scene.told == []
    assert scene.status["summary"]["label"] == "1.1.0"


def test_scenario_35_the_release_that_one_goes_away_from_undoes_its_own_step_and_the_other_repeats_none(
    farm: Farm,
) -> None:
    scene = Scene(farm, "undoing")
    for name in ("migrate", "undo10", "undo11", "smoke"):
        scene.script(f"ops/{name}.sh", "")
    schema = {"name": "schema", "run_on": "server", "script": "ops/migrate.sh"}
    smoke = {"name": "smoke", "run_on": "server", "script": "ops/smoke.sh", "on_rollback": "skip"}
    scene.write(steps=[schema | {"on_rollback": "ops/undo10.sh"}, smoke])
    scene.machines("web1")
    scene.deploy("1.0.0")
    scene.write(steps=[schema | {"on_rollback": "ops/undo11.sh"}, smoke])
    scene.deploy("1.1.0")
    done = scene.do("rollback")
    assert scene.told == ["out web1", "start web1", "in web1deployed", "undo11"]
    assert "step 1 (schema) of 1.1.0 is undone: ops/undo11.sh" in done.out
    assert "step 2 (smoke) of 1.1.0 stays as it is" in done.out
