"""SIGKILL of agents in the middle of real deployments: a script runs at most once, and what became of it is told.

Counters are files to which each run of a script adds a line before it does anything else.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness.farm import Agent, Farm
from harness.process import Done, Process, wait_for
from harness.seed import SEED, SOAK, chance

LINES = 2000
"""Of output before the kill, and again after it."""

SLOW = """#!/bin/sh
echo ran >> {count}/slow-$MACHINE-$DEPLOYMENT
i=0; while [ $i -lt {lines} ]; do echo "before the kill $i"; i=$((i+1)); done
touch {count}/is-running
until [ -e {count}/may-end ]; do sleep 0.02; done
i=0; while [ $i -lt {lines} ]; do echo "after the kill $i"; i=$((i+1)); done
touch {count}/has-ended
exit {status}
"""
QUICK = """#!/bin/sh
echo ran >> {count}/{name}-$MACHINE-$DEPLOYMENT
echo "{name} of $MACHINE begins"
sleep {seconds}
echo "{name} of $MACHINE ends"
"""
ROUNDS = 20 if SOAK else 2
"""Deployments under random kills."""
QUICK_ONES = {"first": 0.0, "second": 0.3, "third": 0.1}


class World:
    """Two machines and one relay."""

    def __init__(self, farm: Farm, count: Path) -> None:
        self.farm = farm
        self.count = count
        self._labels = 0

    def begin(self, roles: str, actions: list[Any]) -> Process:
        """Deploy to the machines that have the role `roles`, anew each time."""
        self._labels += 1
        label, version = f"r{self._labels}", f"1.0.{self._labels}"
        self.farm.add_package("Acme.Web", version, {"version.txt": version})
        self.farm.write_process(
            packages={"web": "Acme.Web"},
            steps=[
                {
                    "name": "farm",
                    "roles": [roles],
                    "deploy": "web",
                    "to": f"{self.farm.folder}/srv/${{machine.name}}",
                    "apply": actions,
                }
            ],
        )
        self.farm.write_environment(machines={"web1": {"roles": ["one", "all"]}, "web2": {"roles": ["all"]}})
        words = ("release", "deploy", label, "--environment", "production", "--package", f"web={version}")
        return self.farm.start(*words)

    def begin_slow(self, status: int) -> Process:
        """A deployment to web1 that now waits in the middle of its script."""
        for name in ("is-running", "may-end", "has-ended"):
            (self.count / name).unlink(missing_ok=True)
        self.farm.write_script("ops/slow.sh", SLOW.format(count=self.count, lines=LINES, status=status))
        deploying = self.begin("one", [{"name": "slow", "script": "ops/slow.sh"}, "switch"])
        self.wait(deploying, self.count / "is-running")
        return deploying

    @staticmethod
    def wait(deploying: Process, path: Path) -> None:
        wait_for(lambda: path.exists() or not deploying.is_alive, 60.0)
        assert deploying.is_alive, deploying.result()

    def counted(self, deployment: str) -> dict[str, int]:
        """How often each script ran on each machine."""
        found = self.count.glob(f"*-{deployment}")
        return {path.name.removesuffix(f"-{deployment}"): len(path.read_text().splitlines()) for path in found}

    def output(self) -> list[str]:
        """Of the newest deployment, each line once, without where it is from."""
        log = self.farm.do("release", "log").out.splitlines()
        return [line.partition("  ")[2] for line in log]

    def last(self) -> tuple[str, Any]:
        """The newest deployment and its view."""
        status = self.farm.status()
        return status["summary"]["deployment"], status


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "count").mkdir()
    with Farm(folder / "farm") as farm:
        farm.add_relay("fra")
        for name in ("web1", "web2"):
            farm.add_agent(name).start()
        yield World(farm, folder / "count")


def operation(agent: Agent, name: str, deployment: str) -> Any:
    """What the agent itself says of an operation."""
    [found] = [
        each
        for each in agent.status()["operations"]
        if each["operation"].startswith(deployment) and f"/1-{name}/" in each["operation"]
    ]
    return found


def why(status: Any, machine: str) -> str:
    """What `release status` says of a machine."""
    [found] = [each["reason"] for each in status["machines"] if each["name"] == machine]
    return str(found)


def test_a_script_that_ended_while_its_agent_was_dead_ran_once_and_is_reported_by_the_next_agent(world: World) -> None:
    deploying = world.begin_slow(status=0)
    agent = world.farm.agents["web1"]
    agent.kill()
    (world.count / "may-end").touch()
    World.wait(deploying, world.count / "has-ended")
    agent.start()
    done = deploying.result()

    assert done.code == 0, done.out + done.err
    deployment, status = world.last()
    assert world.counted(deployment) == {"slow-web1": 1}
    assert world.output() == [f"{when} the kill {i}" for when in ("before", "after") for i in range(LINES)]
    assert status["summary"]["state"] == "succeeded"
    assert operation(agent, "slow", deployment)["exit_status"] == 0
    assert world.farm.current("web1").startswith("r1-")


def test_a_script_that_ran_on_is_followed_by_the_next_agent_and_its_exit_status_is_told(world: World) -> None:
    current = world.farm.current("web1")
    deploying = world.begin_slow(status=7)
    agent = world.farm.agents["web1"]
    for _ in range(2):
        agent.kill()
        agent.start()
    assert not (world.count / "has-ended").exists()
    (world.count / "may-end").touch()
    done = deploying.result()

    assert done.code == 1, done.out + done.err
    deployment, status = world.last()
    assert world.counted(deployment) == {"slow-web1": 1}
    assert world.output() == [f"{when} the kill {i}" for when in ("before", "after") for i in range(LINES)]
    assert "exit status 7" in why(status, "web1")
    assert "exit status 7" in done.out
    assert operation(agent, "slow", deployment)["exit_status"] == 7
    assert world.farm.current("web1") == current


def test_a_runner_that_was_killed_too_leaves_an_unknown_outcome_and_no_second_run(world: World) -> None:
    deploying = world.begin_slow(status=0)
    agent = world.farm.agents["web1"]
    runners = runners_of(agent)
    agent.kill()
    for pid in runners:
        os.kill(pid, signal.SIGKILL)
    assert runners, "there was no runner to kill"
    agent.start()
    done = deploying.result()

    assert done.code == 1, done.out + done.err
    deployment, status = world.last()
    assert world.counted(deployment) == {"slow-web1": 1}
    found = operation(agent, "slow", deployment)
    assert found["state"] == "unknown"
    assert found["reason"] in why(status, "web1")
    (world.count / "may-end").touch()


def test_agents_that_die_at_random_moments_never_run_a_script_twice(world: World) -> None:
    drawn = chance("agents that die")
    for name, seconds in QUICK_ONES.items():
        world.farm.write_script(f"ops/{name}.sh", QUICK.format(count=world.count, name=name, seconds=seconds))
    actions = [{"name": name, "script": f"ops/{name}.sh"} for name in QUICK_ONES]
    for _ in range(ROUNDS):
        deploying = world.begin("all", [actions[0], "switch", *actions[1:]])
        try:
            kills = kill_until(deploying, list(world.farm.agents.values()), drawn)
        finally:
            for agent in world.farm.agents.values():
                agent.stop()
                agent.start()
        done = deploying.result()
        deployment, status = world.last()
        assert_all_ran_once(world, done, deployment, status, f"WAYSTATION_SEED={SEED}, {kills} kills")
        assert kills > 0
        print(f"{kills} kills, exit code {done.code}, {world.counted(deployment)}")


def kill_until(deploying: Process, agents: list[Agent], drawn: random.Random) -> int:
    """Kill and start agents, in their starting too, as long as the deployment goes on, up to a limit."""
    kills = 0
    ends = time.monotonic() + 6.0
    while deploying.is_alive and time.monotonic() < ends:
        time.sleep(drawn.uniform(0.0, 1.0))
        agent = drawn.choice(agents)
        agent.kill()
        kills += 1
        agent.spawn()
    return kills


def assert_all_ran_once(world: World, done: Done, deployment: str, status: Any, what: str) -> None:
    counted = world.counted(deployment)
    assert max(counted.values(), default=0) <= 1, (what, counted)
    told = f"{what}\n{done.out}\n{done.err}"
    # Runners outlive their agents, so that nothing is ever unknown.
    assert done.code == 0, told
    assert counted == {f"{name}-{machine}": 1 for name in QUICK_ONES for machine in ("web1", "web2")}, told
    words = [f"{name} of {machine}" for name in QUICK_ONES for machine in ("web1", "web2")]
    assert sorted(world.output()) == sorted(f"{each} {when}" for each in words for when in ("begins", "ends")), told
    assert status["summary"]["state"] == "succeeded"


def runners_of(agent: Agent) -> list[int]:
    """The processes that run and watch the scripts of this agent's operations."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            command = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            if any(b"agent.runs.runner" in word for word in command) and any(
                word.startswith(os.fsencode(agent.home)) for word in command
            ):
                found.append(int(name))
    return found
