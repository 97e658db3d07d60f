"""Two projects on the same machines, and many starts of one: what is shared is guarded where it is shared (scenario 28)."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.farm import Farm
from harness.process import Done, Process, wait_for
from harness.seed import SOAK

STARTS = 100 if SOAK else 8


class World:
    """Two machines, and two projects that deploy onto both, each by its own file; shop's first step waits on the server."""

    def __init__(self, farm: Farm, ran: Path) -> None:
        self.farm = farm
        self.ran = ran
        self.diary = ran / "diary"

    def write(self) -> None:
        farm, diary = self.farm, self.diary
        farm.write_script(
            "ops/hold.sh", f"#!/bin/sh\ntouch {self.ran}/holds\nwhile [ -e {self.ran}/hold ]; do sleep 0.02; done\n"
        )
        farm.write_script("environments/lb/out.sh", f'#!/bin/sh\necho "$PROJECT $MACHINE before" >> {diary}\n')
        farm.write_script("environments/lb/in.sh", f'#!/bin/sh\necho "$PROJECT $MACHINE after $OUTCOME" >> {diary}\n')
        farm.write_script(
            "ops/start.sh",
            "#!/bin/sh\n"
            f'echo "$PROJECT $MACHINE starts" >> {diary}\n'
            f"touch {self.ran}/starts-$PROJECT-$MACHINE\n"
            f"while [ -e {self.ran}/slow-$PROJECT-$MACHINE ]; do sleep 0.02; done\n"
            f"[ ! -e {self.ran}/breaks-$PROJECT-$MACHINE ]\n",
        )
        for project in ("shop", "desk"):
            step = {
                "name": "farm",
                "roles": ["web"],
                "strategy": {"rolling": {"window": 1, "min_in_service": 1}},
                "rotation": "web",
                "deploy": "app",
                "to": f"{farm.folder}/srv-{project}/${{machine.name}}",
                "apply": ["switch", {"name": "start", "script": "ops/start.sh"}],
                "on_failure": "stop",
            }
            hold = [{"name": "hold", "run_on": "server", "script": "ops/hold.sh"}] if project == "shop" else []
            farm.write_process(project=project, packages={"app": f"Acme.{project}"}, steps=[*hold, step])
            (farm.project / "release.yaml").rename(farm.project / f"{project}.yaml")
            for version in ("1.0.0", "1.1.0", "1.2.0"):
                farm.add_package(f"Acme.{project}", version, {"version.txt": version})
        farm.write_environment(rotation={"web": {"before": "lb/out.sh", "after": "lb/in.sh"}})

    def start(self, project: str, version: str, *words: object) -> Process:
        for path in self.ran.glob(f"starts-{project}-*"):
            path.unlink()
        release = ("--package", f"app={version}", "--process", f"{project}.yaml")
        return self.farm.start("release", "deploy", version, "--environment", "production", *release, *words)

    def deploy(self, project: str, version: str, *words: object) -> Done:
        return self.start(project, version, *words).result()

    def told(self) -> list[str]:
        """What was done since this was called last."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        self.diary.unlink(missing_ok=True)
        return lines

    def touch(self, name: str) -> Path:
        path = self.ran / name
        path.touch()
        return path

    def wait_for(self, name: str, process: Process) -> None:
        wait_for(lambda: (self.ran / name).exists() or not process.is_alive)
        assert process.is_alive, process.result()
        (self.ran / name).unlink()

    def open(self) -> list[Any]:
        found: list[Any] = self.farm.do("rotation", "list", "--json").json["open"]
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("projects")
    (folder / "ran").mkdir()
    with Farm(folder / "farm") as farm:
        farm.add_relay("fra")
        for name in ("web1", "web2"):
            farm.add_agent(name).start()
        made = World(farm, folder / "ran")
        made.write()
        yield made


TURNS = ["web1 before", "web1 starts", "web1 after deployed", "web2 before", "web2 starts", "web2 after deployed"]


def test_scenario_28_of_many_starts_at_once_one_runs_and_the_others_name_it_and_exit_with_4(world: World) -> None:
    hold = world.touch("hold")
    starts = [world.start("shop", "1.0.0") for _ in range(STARTS)]
    wait_for(lambda: sum(not one.is_alive for one in starts) == STARTS - 1)
    (winner,) = [one for one in starts if one.is_alive]
    losers = [one.result() for one in starts if one is not winner]
    assert {one.code for one in losers} == {4}, [one.out + one.err for one in losers if one.code != 4]
    for loser in losers:
        assert re.search(
            rf"shop in production is locked by \S+ on \S+ \(pid {winner.pid}\) since .*: deploy 1\.0\.0", loser.err
        )

    # It waits on the server, and another project goes on meanwhile.
    world.wait_for("holds", winner)
    assert world.told() == []
    done = world.deploy("desk", "1.0.0")
    assert done.code == 0, done.out + done.err
    assert world.told() == [f"desk {what}" for what in TURNS]

    hold.unlink()
    assert winner.result().code == 0, winner.result().out + winner.result().err
    assert world.told() == [f"shop {what}" for what in TURNS]


def test_a_machine_turns_for_one_project_at_a_time_and_min_in_service_counts_over_both(world: World) -> None:
    """While desk has web1 out, shop can take out neither it nor the only other one, and says why it waits."""
    slow = world.touch("slow-desk-web1")
    desk = world.start("desk", "1.1.0")
    world.wait_for("starts-desk-web1", desk)
    shop = world.start("shop", "1.1.0")
    wait_for(lambda: "waits: " in shop.out or not shop.is_alive)
    assert "in service" in shop.out, shop.out + shop.err
    assert world.told() == ["desk web1 before", "desk web1 starts"]
    slow.unlink()
    for one in (desk.result(), shop.result()):
        assert one.code == 0, one.out + one.err
    told = world.told()
    assert sorted(told) == sorted(
        ["desk web1 after deployed", *(f"desk {what}" for what in TURNS[3:]), *(f"shop {what}" for what in TURNS)]
    )
    out = 0
    for line in ["desk web1 before", *told]:
        out += line.endswith(" before") - (" after " in line)
        assert 0 <= out <= 1, told
    assert world.open() == []


def test_a_bracket_that_one_project_left_keeps_another_from_that_machine_until_it_is_closed(world: World) -> None:
    breaks = world.touch("breaks-desk-web1")
    assert world.deploy("desk", "1.2.0").code == 1
    breaks.unlink()
    (left,) = world.open()
    assert (left["machine"], left["project"], left["label"]) == ("web1", "desk", "1.2.0")
    world.told()

    refused = world.deploy("shop", "1.2.0")
    assert refused.code == 1
    for words in ("web1 is out of web since", "by 1.2.0 of desk", "rotation close web1 --environment production"):
        assert words in refused.err, refused.err
    assert world.told() == []

    world.farm.do("rotation", "close", "web1", "--by-hand", "-m", "seen to it")
    done = world.deploy("shop", "1.2.0")
    assert done.code == 0, done.out + done.err
    assert world.told() == [f"shop {what}" for what in TURNS]


def test_a_killed_deployment_frees_its_machines_for_others(world: World) -> None:
    slow = world.touch("slow-desk-web1")
    desk = world.start("desk", "1.1.0", "--force")
    world.wait_for("starts-desk-web1", desk)
    os.kill(desk.pid, signal.SIGKILL)
    desk.result()
    slow.unlink()
    (left,) = world.open()
    assert left["machine"] == "web1"
    done = world.deploy("desk", "1.1.0", "--adopt", "--force")
    assert done.code == 0, done.out + done.err
    assert world.open() == []
