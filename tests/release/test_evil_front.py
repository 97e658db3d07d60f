"""One hostile or dying relay among two costs nothing: releases succeed, and an agent at rest stays at rest.

The long form (`make soak`) plays every way, measures times and processor time, and shows what such a relay comes to alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.evil_front import WAYS, EvilFront, Way, way
from harness.farm import Farm
from harness.packages import noise
from harness.process import Done, wait_for
from harness.seed import SOAK

from agent.relays.health import Average, Health
from agent.relays.memory import State, save_state

FILES = 4
SIZE = 100_000
"""Bytes of each file: at 1,200 bytes a second, the package takes over five minutes."""
COSTS_AT_MOST = 15.0
"""Seconds that an evil relay may cost, beyond twice the time of two honest ones."""
IDLE_SECONDS = 10.0
IDLE_SHARE = 0.02
"""Of one processor, and that of the whole process."""
LOG_MAX = 20_000
"""Bytes that an agent logs while one release runs."""
ALONE_DEADLINE = 8.0
"""Seconds, of a way that ends by it."""
PATIENT_DEADLINE = 60.0
"""The same of one that ends by itself, and sooner: a busy machine is not to be taken for it."""
TICKS = os.sysconf("SC_CLK_TCK")


class World:
    """Two relays of one site, the evil one asked first, and two machines."""

    def __init__(self, farm: Farm, *, is_alone: bool = False) -> None:
        self.farm = farm
        self.version = 0
        self.is_alone = is_alone
        behind = farm.add_relay("evil")
        self.front = farm.enter(EvilFront(behind.port))
        farm.urls["evil"] = self.front.url
        if not is_alone:
            farm.add_relay("good")
        farm.write_script("turn.sh", "#!/bin/sh\necho turned\n")
        for name in ("web1", "web2"):
            farm.add_agent(name, "fra", list(farm.urls.values()))

    def start_agents(self) -> None:
        """Anew, and sure that the evil relay is the closest by far. It is honest until all of them wait for mail there: agents
        that met it as it was before would leave it alone for longer than a release takes.
        """
        self.front.way = None
        for agent in self.farm.agents.values():
            agent.stop()
            now = time.time()
            healths = {
                url: Health(latency=Average(0.001 * 10**n, 0.01, 50, now), last_checked=now)
                for n, url in enumerate(self.farm.urls.values())
            }
            save_state(agent.home / "relays.json", State(current=self.front.url, healths=healths))
            agent.start()
        wait_for(lambda: self._polls_at_front() == len(self.farm.agents))

    def _polls_at_front(self) -> int:
        """How many agents wait for mail there."""
        return len({asked.target for asked in tuple(self.front.in_hand) if asked.kind == "poll" and asked.seconds})

    def release(self, way: Way | None, deadline: float = 60.0) -> tuple[Done, float]:
        """A new version; how it ended, and after how many seconds."""
        self.version += 1
        version = f"{self.version}.0.0"
        files = {f"file{n}": noise(f"{self.version} {n}", SIZE // 2).hex() for n in range(FILES)}
        self.farm.add_package("Acme.Web", version, files)
        self.farm.write_process(
            packages={"web": "Acme.Web"},
            acquire={"deadline": f"{deadline:.0f}s"},
            steps=[
                {
                    "name": "web",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": f"{self.farm.folder}/srv/${{machine.name}}",
                    "strategy": "rolling",
                    "apply": ["switch", {"name": "turn", "script": "turn.sh"}],
                }
            ],
        )
        self.farm.write_environment(relays={name: {"url": url, "site": "fra"} for name, url in self.farm.urls.items()})
        self.front.way, self.front.played = way, 0
        began = time.monotonic()
        done = self.farm.deploy(version, "--package", f"web={version}")
        return done, time.monotonic() - began

    def is_everywhere(self) -> bool:
        """Whether every machine has the newest version, as it was signed."""
        return all(
            self.farm.current(name).startswith(f"{self.version}.0.0-")
            and not [
                tree
                for tree in self.farm.do("agent", "verify", "--home", agent.home, "--json").json["trees"]
                if tree["differences"]
            ]
            for name, agent in self.farm.agents.items()
        )

    def logged(self) -> int:
        return sum(len(agent.said) for agent in self.farm.agents.values())

    def processor_seconds(self) -> float:
        return sum(_processor_seconds(agent.pid) for agent in self.farm.agents.values())


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Farm(tmp_path_factory.mktemp("evil")) as farm:
        yield World(farm)


def test_the_ways_have_names_of_their_own() -> None:
    assert len({way.name for way in WAYS}) == len(WAYS)


@pytest.mark.processes
@pytest.mark.long
def test_a_release_succeeds_though_the_relay_that_is_asked_first_keeps_all_reports(world: World) -> None:
    world.start_agents()
    done, _ = world.release(way("reports taken and kept"))

    assert world.front.played >= 2, "the way did not take place"
    assert done.code == 0, done.out + done.err
    assert world.is_everywhere()


@pytest.mark.processes
@pytest.mark.long
def test_alone_it_comes_to_an_end_that_names_whom_the_release_waited_for(tmp_path: Path) -> None:
    with Farm(tmp_path) as farm:
        world = World(farm, is_alone=True)
        world.start_agents()
        kept = way("reports taken and kept")
        done, _ = world.release(kept, 2.0)

    assert world.front.played
    assert done.code == 1
    assert re.search(kept.ends_alone, done.out), done.out + done.err


# --- the long form


@pytest.fixture(scope="module")
def honest_seconds(world: World) -> float:
    """A release over two honest relays: the better of two."""
    world.start_agents()
    took = []
    for _ in range(2):
        done, seconds = world.release(None)
        assert done.code == 0, done.out + done.err
        took.append(seconds)
    return min(took)


@pytest.mark.processes
@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="make soak: every way takes half a minute")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_beside_an_honest_relay_no_way_costs_more_than_a_moment(
    world: World, honest_seconds: float, way: Way, record_property: pytest.RecordProperty
) -> None:
    world.start_agents()
    before = world.logged()
    done, seconds = world.release(way)
    told = f"{way}: {seconds:.1f} s, honest {honest_seconds:.1f} s"

    assert world.front.played, "the way did not take place"
    assert done.code == 0, told + done.out + done.err
    assert world.is_everywhere()
    assert world.logged() - before < LOG_MAX, told

    spent = world.processor_seconds()
    time.sleep(IDLE_SECONDS)
    share = (world.processor_seconds() - spent) / IDLE_SECONDS / len(world.farm.agents)
    print(f"{told}, an agent at rest takes {share:.1%} of a processor")
    assert share < IDLE_SHARE, told
    assert seconds < 2 * honest_seconds + COSTS_AT_MOST, told


@pytest.mark.processes
@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="make soak: every way takes a quarter of a minute")
@pytest.mark.parametrize("way", [way for way in WAYS if way.ends_alone], ids=str)
def test_alone_every_way_comes_to_a_clear_end_within_its_deadline(tmp_path: Path, way: Way) -> None:
    with Farm(tmp_path) as farm:
        world = World(farm, is_alone=True)
        world.start_agents()
        done, seconds = world.release(way, ALONE_DEADLINE if "deadline" in way.ends_alone else PATIENT_DEADLINE)

    assert world.front.played, "the way did not take place"
    assert done.code == 1, done.out + done.err
    assert re.search(way.ends_alone, done.out + done.err), done.out + done.err
    assert "Traceback" not in done.out + done.err
    print(f"{way}, alone: {seconds:.1f} s: {re.findall('failed: .*', done.out)}")
