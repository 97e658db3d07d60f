"""A web farm behind a real HAProxy that hides nothing, where people are asked: at gates, and of machines on which a
version is bad. Visitors ask all the time, and each test ends with all machines in rotation.

A file says of which versions an application is ill, and where: so one machine of three is. It starts well, and answers
with 500 a moment later, as bad versions do.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from harness.farm import Farm
from harness.haproxy_reader import were_out
from harness.paths import ROOT
from harness.process import Done, wait_for
from harness.seed import SOAK

from benchmarks.support.programs import free_ports

sys.path[:0] = [str(ROOT / "deploy" / "demo"), str(ROOT / "deploy" / "demo" / "webapp")]

import folder as webapp  # noqa: E402
import haproxy_log  # noqa: E402
from balancer import Balancer, Checking, haproxy  # noqa: E402
from load import Load, Summary  # noqa: E402
from programs import end_what_is_left  # noqa: E402

pytestmark = pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed: nothing is balanced")
in_one_loop = pytest.mark.asyncio(loop_scope="module")

MACHINES = ("web1", "web2", "web3")
GATE = "canary looks good"
WELL_FOR = "0.1"
"""Seconds after its start before an ill application shows it."""


class Shop:
    """Three machines behind their balancer. Every test releases versions of its own, over what is there."""

    def __init__(self, farm: Farm, balancer: Balancer) -> None:
        self.farm, self.balancer = farm, balancer
        self.versions = 0
        self.first: Done | None = None
        """How the first version came to all machines."""

    # --- the world

    def add_version(self) -> str:
        self.versions += 1
        version = f"{self.versions}.0.0"
        made = webapp.make(self.farm.folder / f"shop-{version}", version)
        server = made / "app" / "server.py"
        text = server.read_text()
        for old, new in {
            "        self._work = work\n": "        self._work = work\n        self._began = asyncio.get_running_loop().time()\n",
            "        if self.broken:\n": "        if self.broken or self._is_ill():\n",
            "    def _encoded(": "    def _is_ill(self) -> bool:\n"
            f"        ill = Path({str(self.farm.folder)!r}, f'ill-{{self._name}}')\n"
            f"        is_late = asyncio.get_running_loop().time() - self._began > {WELL_FOR}\n"
            "        return is_late and ill.exists() and self.version in ill.read_text().split()\n\n"
            "    def _encoded(",
        }.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        server.write_text(text)
        nupkg = self.farm.folder / f"{webapp.ID}.{version}.nupkg"
        self.farm.do("package", "pack", made, "--id", webapp.ID, "--version", version, "--output", nupkg)
        self.farm.do("package", "add", nupkg)
        return version

    def let_be_ill(self, machine: str, *versions: str) -> None:
        """Of these versions alone."""
        (self.farm.folder / f"ill-{machine}").write_text(" ".join(versions))

    def write_process(self, strategy: object, *first: object, **step: object) -> None:
        """`first` are actions before the switch; `step` is laid over the step."""
        version = {"http": "http://${machine.address}:${port}/version", "expect": "${package.version}"}
        self.farm.write_process(
            packages={"web": webapp.ID},
            steps=[
                {
                    "name": "web farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": str(self.farm.folder / "srv") + "/${machine.name}",
                    "strategy": strategy,
                    "rotation": "web",
                    "apply": [*first, "switch", {"name": "restart", "script": "ops/restart.py"}],
                    "verify": [{**version, "for": "300ms", "deadline": "2s"}],
                    "on_failure": "ask",
                }
                | step
            ],
        )

    # --- what is done

    def release(self, *words: object) -> Done:
        return self.farm.call("release", *words, "-e", "production")

    def deploy(self, version: str, *words: object, label: str = "") -> Done:
        return self.release("deploy", label or version, "--package", f"web={version}", *words)

    def leaves(self, code: int, *words: object) -> Done:
        done = self.release(*words)
        assert done.code == code, f"{words}: {done.code}\n{done.out}\n{done.err}"
        return done

    # --- what is there

    @property
    def status(self) -> Any:
        return self.farm.do("release", "status", "-e", "production", "--json").json

    @property
    def outcomes(self) -> dict[str, str]:
        return {machine["name"]: machine["outcome"] for machine in self.status["machines"]}

    @property
    def out(self) -> list[tuple[str, str]]:
        """Machines and the releases that took them out."""
        brackets = self.farm.do("rotation", "list", "-e", "production", "--json").json["open"]
        return [(bracket["machine"], bracket["label"]) for bracket in brackets]

    def current(self) -> dict[str, str]:
        return {
            name: (self.farm.agents[name].root / "current" / "version.txt").read_text().strip() for name in MACHINES
        }

    @asynccontextmanager
    async def visited(self) -> AsyncIterator[Seen]:
        """Visitors come; when the block ends, none of them failed, and `Seen` has what they and HAProxy saw."""
        await self.balancer.until_quiet()
        before, began = len(self.balancer.log().requests), datetime.now(UTC)
        seen = Seen()
        async with Load(f"{self.balancer.url}/", clients=8, rate=60.0) as load:
            await load.until(20)
            yield seen
            await load.until(load.summary().requests + 20)
        await self.balancer.until_quiet()
        whole = self.balancer.log()
        seen.visits, seen.log = load.summary(), haproxy_log.since(whole, began)
        assert len(whole.requests) - before == seen.visits.requests, "HAProxy hung up on visitors and logged nothing"
        assert (seen.visits.failed, seen.visits.kinds) == (0, {})


class Seen:
    """What visitors and HAProxy saw. Empty until the visits have ended."""

    visits: Summary
    log: haproxy_log.Log

    @property
    def order(self) -> list[str]:
        """Machines in the order in which they left the rotation; one that was out all the time has none."""
        found: list[str] = []
        out: frozenset[str] = frozenset()
        for moment in haproxy_log.rotation(self.log):
            found += sorted(moment.out - out)
            out = frozenset(moment.out)
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    folder = tmp_path_factory.mktemp("asked")
    ports = dict(zip(MACHINES, free_ports(len(MACHINES)), strict=True))
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    async with Balancer(folder / "lb", addresses, checking=Checking(interval=100)) as balancer:
        with Farm(folder) as farm:
            shop = Shop(farm, balancer)
            try:
                await asyncio.to_thread(_set_up, shop, ports)
                await balancer.until_up()
                yield shop
            finally:
                for agent in farm.agents.values():
                    await asyncio.to_thread(agent.stop)
                await end_what_is_left(folder)


def _set_up(shop: Shop, ports: dict[str, int]) -> None:
    """A first version runs everywhere: brought by a parallel step, whose scripts wait for each other."""
    farm = shop.farm
    for person in ("anna", "ben"):
        farm.do("trust", "person", person)
    farm.add_relay("fra")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: farm.add_agent(name).start(), MACHINES))
    shutil.copytree(ROOT / "deploy/examples/haproxy/environments/lb", farm.project / "environments" / "lb")
    (farm.project / "ops").mkdir()
    shutil.copy(webapp.RESTART, farm.project / "ops" / "restart.py")
    meet = farm.folder / "meet"
    meet.mkdir()
    farm.write_script(
        "ops/meet.sh",
        f"#!/bin/sh\ntouch {meet}/$MACHINE\nuntil [ $(ls {meet} | wc -l) = {len(MACHINES)} ]; do sleep 0.02; done\n",
    )
    farm.write_environment(
        rotation={"web": {"before": "lb/out.py", "after": "lb/in.py", "secrets": ["lb_token"]}},
        secrets={"lb_token": {"file": str(shop.balancer.token_file)}},
        variables={"haproxy": shop.balancer.page, "backend": "web", "work_seconds": 0.02},
        machines={name: {"variables": {"port": ports[name]}} for name in MACHINES},
        teams={"shop": ["anna", "ben"]},
    )
    shop.write_process("parallel", {"name": "meet", "script": "ops/meet.sh", "timeout": "60s"})
    first = shop.deploy(shop.add_version())
    assert first.code == 0, first.out + first.err
    shop.first = first


def test_scenario_01_a_parallel_step_turns_all_machines_at_once_and_says_so(shop: Shop) -> None:
    """Each machine's script waited until those of all others had begun."""
    assert shop.first is not None
    assert "parallel, 3 machines" in shop.first.out


def _gated() -> dict[str, object]:
    gate = {"name": GATE, "ask": "Is it good?", "approvers": ["team:shop"], "not_author": True}
    return {"rolling": {"phases": [{"machines": 1, "gate": gate}, {"window": 1}]}}


@in_one_loop
async def test_scenarios_02_and_19_a_gate_waits_for_another_person_and_then_one_machine_at_a_time_follows(
    shop: Shop,
) -> None:
    was, new = shop.current(), shop.add_version()
    shop.write_process(_gated())

    def play() -> Done:
        waits = shop.deploy(new, "--as", "anna", "--no-wait")
        assert waits.code == 3, waits.out + waits.err
        assert shop.current() == was | {"web1": new}
        assert (shop.status["summary"]["state"], [one["name"] for one in shop.status["asks"]]) == ("waiting", [GATE])
        assert shop.out == [], "the canary serves while people look"
        by_author = shop.leaves(1, "approve", GATE, "-m", "mine", "--as", "anna")
        assert "another person is to agree" in by_author.err
        shop.leaves(3, "resume", "--no-wait")
        assert shop.current() == was | {"web1": new}, "nothing has changed by his own yes"
        shop.leaves(0, "approve", GATE, "-m", "error rate is flat", "--as", "ben")
        return shop.release("resume")

    async with shop.visited() as seen:
        done = await asyncio.to_thread(play)
    assert done.code == 0, done.out + done.err
    assert shop.current() == dict.fromkeys(MACHINES, new)
    assert set(seen.visits.versions) == {*was.values(), new}
    assert seen.order == list(MACHINES), "by name, and each once"
    assert haproxy_log.most_out_at_once(seen.log) == 1, "no two machines' brackets overlap"
    assert haproxy_log.fewest_in_service(seen.log) == 2


@in_one_loop
async def test_scenario_19_a_no_has_its_reason_and_ends_it_where_it_stands(shop: Shop) -> None:
    was, new = shop.current(), shop.add_version()
    shop.write_process(_gated())

    def play() -> Done:
        deploying = shop.farm.start(
            "release", "deploy", new, "-e", "production", "--package", f"web={new}", "--as", "anna"
        )
        wait_for(lambda: "waits for" in deploying.out or not deploying.is_alive)
        assert "reason" in shop.leaves(1, "reject", GATE, "--as", "ben").err
        shop.leaves(0, "reject", GATE, "-m", "errors have doubled", "--as", "ben")
        return deploying.result()

    async with shop.visited() as seen:
        done = await asyncio.to_thread(play)
    assert done.code == 1, done.out + done.err
    summary = shop.status["summary"]
    assert summary["state"] == "failed"
    assert "errors have doubled" in summary["reason"]
    assert shop.current() == was | {"web1": new}, "web1 keeps what it got"
    assert (shop.out, seen.order) == ([], ["web1"])


# --- a version that is bad on one machine of three


@in_one_loop
@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="make soak: each is a release of its own behind HAProxy")
async def test_scenario_17_where_nobody_is_asked_the_first_bad_machine_stops_it_and_the_next_release_adopts_it(
    shop: Shop,
) -> None:
    was, bad, good = shop.current(), shop.add_version(), shop.add_version()
    shop.let_be_ill("web1", bad)
    shop.write_process("rolling", on_failure="stop")

    async with shop.visited() as seen:
        done = await asyncio.to_thread(shop.deploy, bad)
    assert done.code == 1, done.out + done.err
    assert set(seen.visits.versions) == set(was.values())
    assert seen.order == ["web1"], "the first machine fails, so no other is touched"
    assert shop.out == [("web1", bad)]

    refused = await asyncio.to_thread(shop.deploy, good)
    assert (refused.code, "web1 is out of web" in refused.err) == (1, True)

    async with shop.visited() as seen:
        done = await asyncio.to_thread(shop.deploy, good, "--adopt")
    assert done.code == 0, done.out + done.err
    assert set(seen.visits.versions) == {was["web2"], was["web3"], good}, "the bad one was out from the beginning"
    assert seen.order[-2:] == ["web2", "web3"]
    assert shop.current() == dict.fromkeys(MACHINES, good)
    assert set((await shop.balancer.statuses()).values()) == {"UP"}
    assert shop.out == []


@in_one_loop
async def test_scenario_17_a_bad_version_is_left_out_and_a_person_takes_the_machine_back(shop: Shop) -> None:
    was, new = shop.current(), shop.add_version()
    shop.let_be_ill("web2", new)
    shop.write_process("rolling")

    def play() -> Done:
        waits = shop.deploy(new, "--no-wait")
        assert waits.code == 3, waits.out + waits.err
        assert "web2" in waits.out
        assert shop.out == [("web2", new)]
        assert shop.current() == was | {"web1": new, "web2": new}
        shop.leaves(0, "decide", "web2", "rollback", "-m", "it answers with 500")
        return shop.release("resume")

    async with shop.visited() as seen:
        done = await asyncio.to_thread(play)
    assert done.code == 1, done.out + done.err
    assert shop.outcomes == {"web1": "deployed", "web2": "rolled_back", "web3": ""}
    assert shop.out == []
    assert shop.current() == was | {"web1": new}
    assert set((await shop.balancer.statuses()).values()) == {"UP"}
    assert haproxy_log.fewest_in_service(seen.log) == 2, "the other two served"


@in_one_loop
async def test_scenario_17_a_machine_that_a_person_excludes_stays_out_and_the_others_follow(shop: Shop) -> None:
    new = shop.add_version()
    shop.let_be_ill("web2", new)
    shop.write_process("rolling")

    def play() -> Done:
        waits = shop.deploy(new, "--no-wait")
        assert waits.code == 3, waits.out + waits.err
        assert "Those that do: web2" in shop.leaves(1, "decide", "web1", "exclude").err, "of web2 it was asked"
        shop.leaves(0, "decide", "web2", "exclude", "-m", "its disk is bad")
        excluded = shop.release("resume")
        assert shop.out == [("web2", new)]
        assert shop.outcomes == {"web1": "deployed", "web2": "excluded", "web3": "deployed"}
        # Its disk is changed, and it follows.
        shop.let_be_ill("web2")
        shop.leaves(0, "retry", "--failed")
        return excluded

    async with shop.visited():
        done = await asyncio.to_thread(play)
    assert done.code == 5, done.out + done.err
    assert "not deployed: web2" in done.err
    assert shop.current() == dict.fromkeys(MACHINES, new)
    assert shop.out == []


@in_one_loop
@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="make soak: each is a release of its own behind HAProxy")
async def test_a_bad_version_goes_back_by_itself_once_and_then_a_person_decides(shop: Shop) -> None:
    was, new = shop.current(), shop.add_version()
    shop.write_process("rolling", on_failure="rollback")

    def play() -> None:
        shop.let_be_ill("web1", new)
        back = shop.deploy(new, "--no-wait")
        assert back.code == 1, back.out + back.err
        assert shop.outcomes == {"web1": "rolled_back", "web2": "", "web3": ""}
        assert (shop.current(), shop.out) == (was, [])
        # Now the old version is to be ill as well, once it serves nobody.
        again = shop.farm.start(
            *("release", "deploy", f"{new}-again", "-e", "production", "--package", f"web={new}", "--no-wait")
        )
        wait_for(lambda: "web1: out of web" in again.out or not again.is_alive)
        shop.let_be_ill("web1", new, was["web1"])
        waits = again.result()
        assert waits.code == 3, waits.out + waits.err
        assert shop.current() == was, "it went back, and no further"
        assert shop.out == [("web1", f"{new}-again")]
        assert "rollback is none of" in shop.leaves(1, "decide", "web1", "rollback").err
        shop.let_be_ill("web1")
        shop.leaves(0, "decide", "web1", "put-back", "-m", "the disk was full")
        shop.leaves(0, "resume")

    async with shop.visited() as seen:
        await asyncio.to_thread(play)
    assert were_out(haproxy_log.rotation(seen.log)) == set(MACHINES)
    assert haproxy_log.fewest_in_service(seen.log) == 2
    assert shop.out == []
    assert shop.current() == was | {"web2": new, "web3": new}
