"""A web shop that never closes: six machines behind a real HAProxy, visitors who never leave, and one release after another.

The process of the shop has one of each thing that a killed process could do twice or forget: a step before acquisition with
its undo, a step on the server, a question, a gate, brackets, a switch, scripts on machines, checks. What must run once
counts its runs in a file, and switches are counted by the agents themselves.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

from benchmarks.support.programs import free_ports
from harness.farm import Farm
from harness.kill_points import Point, kill_at, passed_in
from harness.machines import Agent
from harness.paths import ROOT
from harness.process import Done, Process, wait_for

sys.path[:0] = [str(ROOT / "deploy" / "demo"), str(ROOT / "deploy" / "demo" / "webapp")]

import folder as webapp  # noqa: E402
import haproxy_log  # noqa: E402
from balancer import Balancer, Checking, haproxy  # noqa: E402
from load import Load  # noqa: E402
from programs import end_what_is_left  # noqa: E402

T = TypeVar("T")

MACHINES = tuple(f"web{n}" for n in range(1, 7))
SITES = ("fra", "iad")
VERSIONS = ("1.0.0", "2.0.0", "3.0.0")
IN_SERVICE, WINDOW = 4, 2
ENVIRONMENT = "production"
PERSON = "anna"
QUESTIONS = {"1/all agree": "all agree", "3/canary": "canary"}
"""What people are asked, as the journal names it, and as they call it."""
ONCE_ON_SERVER = ("vpn-up", "schema", "told", "vpn-down")
ONCE_ON_MACHINES = ("configure", "restart")
SECONDS = 120.0
__all__ = ["MACHINES", "SECONDS", "SITES", "Rolling", "Shop", "haproxy", "shop_in"]


class Shop:
    """It is open from `shop_in` on. `deployed` counts releases; labels and versions follow from it."""

    def __init__(self, farm: Farm, balancer: Balancer, load: Load) -> None:
        self.farm = farm
        self.balancer = balancer
        self.load = load
        self.deployed = 0

    # --- one release

    def next(self) -> tuple[str, str]:
        """The label and version that follow; no machine runs it, also where the last one was cancelled."""
        self.deployed += 1
        return f"r{self.deployed}", VERSIONS[self.deployed % len(VERSIONS)]

    def lose_a_tree(self, machine: str, version: str) -> None:
        """So that there is something to bring there."""
        for tree in (self.farm.agents[machine].root / "releases").glob("*"):
            if not tree.is_symlink() and (tree / "version.txt").read_text().strip() == version:
                shutil.rmtree(tree)

    def drawn(self, folder: Path, drawn: random.Random) -> Rolling:
        """The next release; by chance, a tree is lost before it, and people and operators do one thing or the other."""
        self.until_all_are_seen()
        release = Rolling(self, folder, while_dead=drawn.random() < 0.5, by_deploy=drawn.random() < 0.3)
        self.lose_a_tree(drawn.choice(MACHINES), release.version)
        return release

    def agent_dies(self, drawn: random.Random) -> None:
        """And comes back."""
        agent = self.farm.agents[drawn.choice(MACHINES)]
        agent.kill()
        time.sleep(drawn.uniform(0.0, 0.5))
        agent.start()

    def relay_dies(self, drawn: random.Random) -> None:
        """And comes back."""
        relay = self.farm.relays[drawn.choice(SITES)]
        relay.kill()
        time.sleep(drawn.uniform(0.0, 1.0))
        relay.start()

    def until_all_are_seen(self) -> None:
        """A relay that has just started knows nobody until they poll; a release that starts meanwhile is refused."""
        wait_for(lambda: self._seen() >= set(MACHINES))

    def _seen(self) -> set[str]:
        found: set[str] = set()
        for url in self.farm.urls.values():
            with suppress(OSError), urlopen(f"{url}/v1/agents", timeout=10) as answer:
                found |= {agent["name"] for agent in json.load(answer)["agents"]}
        return found

    def approve(self, asked: str) -> Done:
        return self.farm.call("release", "approve", QUESTIONS[asked], "-e", ENVIRONMENT, "-m", "fine", "--as", PERSON)

    # --- what came of it

    def status(self) -> Any:
        """Of the newest deployment, as the command has it."""
        return self.farm.do("release", "status", "-e", ENVIRONMENT, "--json").json

    def deployment_of(self, label: str) -> str:
        """Its ULID; empty where it did not begin."""
        done = self.farm.do("release", "history", "-e", ENVIRONMENT, "--limit", "3", "--json").json
        return next((each["deployment"] for each in done["deployments"] if each["label"] == label), "")

    def check(self, label: str, version: str, *, agents_died: bool = False) -> None:
        """All that must be so once a release is through, however it came there.

        Where agents died, their own records count in place of what they printed: one may die before it prints.
        """
        status = self.check_end(label, "succeeded")
        deployment = status["summary"]["deployment"]
        assert {one["name"]: one["outcome"] for one in status["machines"]} == dict.fromkeys(MACHINES, "deployed")
        assert self.runs_of(deployment) == self.once()
        switched = self.recorded_switches_of(deployment) if agents_died else self.switches_of(deployment)
        assert switched == Counter(MACHINES)
        for agent in self.farm.agents.values():
            assert (agent.root / "current" / "version.txt").read_text().strip() == version

    def check_end(self, label: str, state: str) -> Any:
        """That it has ended so, that nothing of it is open, and that no visitor has seen anything but an answer until now.

        Gives its status.
        """
        status = self.status()
        summary = status["summary"]
        assert (summary["label"], summary["state"]) == (label, state), summary
        assert {one["name"]: one["undo"] for one in status["pre_acquire"]} == {"vpn": "done"}
        assert status["running"] == [], "the journal knows of something that did not end"
        assert status["brackets"] == []
        assert self.farm.do("rotation", "list", "--json").json["open"] == []
        if "--verify" in self.farm.do("release", "history", "--help").out:
            self.farm.do("release", "history", "--verify", "-e", ENVIRONMENT)
        self.check_visitors()
        return status

    def check_visitors(self) -> None:
        """None of them saw anything but an answer, until now."""
        assert self.load.summary().kinds == {}

    @staticmethod
    def once() -> Counter[str]:
        there = (f"{what} {machine}" for what in ONCE_ON_MACHINES for machine in MACHINES)
        return Counter([*ONCE_ON_SERVER, *there])

    def runs_of(self, deployment: str) -> Counter[str]:
        """How often each script that counts itself has begun for this deployment."""
        lines = [line.split() for line in (self.farm.folder / "diary").read_text().splitlines()]
        return Counter(" ".join(line[1:]) for line in lines if line[0] == deployment)

    def switches_of(self, deployment: str) -> Counter[str]:
        """How often each agent has let `current` name another tree for it, by its own audit trail."""
        found: Counter[str] = Counter()
        for agent in self.farm.agents.values():
            for line in agent.said.splitlines():
                if "agent.switched" in line and deployment in line:
                    found[agent.name] += 1
        return found

    def recorded_switches_of(self, deployment: str) -> Counter[str]:
        """How many orders to switch each agent has carried out for it, by its own records."""
        found: Counter[str] = Counter()
        for agent in self.farm.agents.values():
            for one in agent.status()["operations"]:
                if one["operation"].startswith(deployment) and "switch/" in one["operation"]:
                    found[agent.name] += one["state"] == "done"
        return found

    # --- inside

    def write_files(self, ports: Mapping[str, int], boot_seconds: float) -> None:
        farm, diary = self.farm, self.farm.folder / "diary"
        diary.write_text("")
        for name in ONCE_ON_SERVER:
            farm.write_script(f"server/{name}.sh", f"#!/bin/sh\necho $DEPLOYMENT {name} >> {diary}\n")
        farm.write_script("ops/configure.sh", f"#!/bin/sh\necho $DEPLOYMENT configure $MACHINE >> {diary}\n")
        # The demo's own, and it counts itself.
        body = webapp.RESTART.read_text()
        counts = f'    with open("{diary}", "a") as diary:\n        diary.write(f"{{os.environ[\'DEPLOYMENT\']}} restart {{os.environ[\'MACHINE\']}}\\n")\n'
        farm.write_script("ops/restart.py", body.replace("def main() -> None:\n", f"def main() -> None:\n{counts}"))
        farm.write_script("ops/has_version.sh", '#!/bin/sh\ngrep -qx "$1" "$ROOT/current/version.txt"\n')
        shutil.copytree(ROOT / "deploy/examples/haproxy/environments/lb", farm.project / "environments" / "lb")
        farm.write_environment(
            ENVIRONMENT,
            rotation={
                "web": {"before": "lb/out.py", "after": "lb/in.py", "probe": "lb/state.py", "secrets": ["lb_token"]}
            },
            secrets={"lb_token": {"file": str(self.balancer.token_file)}},
            variables={
                "haproxy": self.balancer.page,
                "backend": "web",
                "work_seconds": 0.02,
                "boot_seconds": boot_seconds,
            },
            machines={name: {"variables": {"port": ports[name]}} for name in MACHINES},
        )

    def everywhere_at_once(self) -> dict[str, Any]:
        """The step by which the first version comes: HAProxy knows of no machine yet."""
        return {
            "name": "web farm",
            "roles": ["web"],
            "deploy": "web",
            "to": f"{self.farm.folder}/srv/${{machine.name}}",
            "apply": ["switch", {"name": "restart", "script": "ops/restart.py"}],
        }

    def process(self) -> dict[str, Any]:
        version = {"http": "http://${machine.address}:${port}/version", "expect": "${package.version}"}
        return {
            "packages": {"web": webapp.ID},
            "pre_acquire": [{"name": "vpn", "script": "server/vpn-up.sh", "undo": "server/vpn-down.sh"}],
            "steps": [
                {"name": "all agree", "ask": "Is ${release.label} wanted?", "approvers": [PERSON]},
                {"name": "schema", "run_on": "server", "script": "server/schema.sh", "on_rollback": "skip"},
                {
                    "name": "web farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": f"{self.farm.folder}/srv/${{machine.name}}",
                    "strategy": {
                        "rolling": {
                            "phases": [
                                {"machines": 1, "gate": {"name": "canary", "ask": "Is it good?", "approvers": [PERSON]}},
                                {"window": WINDOW},
                            ],
                            "min_in_service": IN_SERVICE,
                        }
                    },
                    "rotation": "web",
                    "apply": [
                        {"name": "configure", "script": "ops/configure.sh"},
                        "switch",
                        {"name": "restart", "script": "ops/restart.py"},
                    ],
                    "verify": [
                        {**version, "deadline": "10s"},
                        {**version, "deadline": "10s", "from": "server"},
                        {"command": ["ops/has_version.sh", "${package.version}"]},
                    ],
                },
                {"name": "told", "run_on": "server", "script": "server/told.sh", "on_rollback": "skip"},
            ],
        }  # fmt: skip


@dataclass
class Rolling:
    """One deployment, through as many deaths of its engine as it takes. People answer what they are asked.

    Attributes:
        while_dead: a question that is open when no engine runs is answered right then, not when the next one runs.
        by_deploy: whoever goes on calls `deploy` with the same label, not `resume`.
        deaths: the points at which engines died by our hand, in order; empty where one died before it came to any.
        passed: of all engines.
    """

    shop: Shop
    folder: Path
    while_dead: bool = False
    by_deploy: bool = False
    label: str = ""
    version: str = ""
    deaths: list[Point] = field(default_factory=list)
    passed: list[Point] = field(default_factory=list)
    engine: Process | None = None
    said: str = ""
    _answered: set[str] = field(default_factory=set)
    _starts: int = 0

    def __post_init__(self) -> None:
        self.label, self.version = self.shop.next()

    def start(self, *points: str, count: int = 0) -> None:
        """Deploy it, or go on with it; the engine dies at the first of `points` that it comes to, or after so many."""
        self._starts += 1
        how = kill_at(self._file, *points, count=count)
        if self._starts > 1 and not self.by_deploy and self.shop.deployment_of(self.label):
            self.engine = self.shop.farm.start("release", "resume", "-e", ENVIRONMENT, **how)
            return
        versions = ("--package", f"web={self.version}")
        self.engine = self.shop.farm.start("release", "deploy", self.label, "-e", ENVIRONMENT, *versions, **how)

    def until_it_ends(self, kill_after: float = 0.0) -> Done:
        """Wait for the engine's end, and answer meanwhile what is asked; after `kill_after` seconds, where it is not 0, it is
        killed.
        """
        assert self.engine is not None
        engine, began = self.engine, time.monotonic()
        while engine.is_alive:
            self.answer_what_is_asked()
            spent = time.monotonic() - began
            assert spent < SECONDS, f"{self.label} hangs\n{engine.out}{engine.err}"
            if kill_after and spent > kill_after:
                engine.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        done = engine.result()
        self.passed += passed_in(self._file)
        self.said += done.out + done.err
        return done

    def answer_what_is_asked(self) -> None:
        """By a person, from another process."""
        for asked in QUESTIONS:
            is_open = any(name.startswith("after append ask_opened") and asked in name for name in self._names)
            if is_open and asked not in self._answered:
                done = self.shop.approve(asked)
                assert done.code == 0, done.err
                self._answered.add(asked)

    def died_at(self, done: Done) -> Point:
        """The last point that it came to, at which it killed itself, or after which it was killed."""
        assert done.code == -signal.SIGKILL, f"{self.label}: it should have died: {done.code}\n{done.out}{done.err}"
        self.deaths.append(next(reversed(passed_in(self._file)), ()))
        if self.while_dead:
            self.answer_what_is_asked()
        return self.deaths[-1]

    def through(self, *names: str, agents_died: bool = False) -> list[str]:
        """Kill it at each of these points that it comes to, one after another, until it is through; then all must be well.

        Gives those that it did not come to: what came first has changed the way.
        """
        left = list(names)
        while True:
            self.start(*left)
            done = self.until_it_ends()
            if done.code == 0:
                break
            died_at = self.died_at(done)
            assert not set(left).isdisjoint(died_at), "it died elsewhere"
            left = [name for name in left if name not in died_at]
            if self.has_ended:
                break
        self.shop.check(self.label, self.version, agents_died=agents_died)
        return left

    def until_it_comes_to(self, name: str) -> None:
        """Answer what is asked, until the engine has come to the point of this name."""
        assert self.engine is not None
        while not any(name in point for point in passed_in(self._file)):
            assert self.engine.is_alive, self.engine.out + self.engine.err
            self.answer_what_is_asked()
            time.sleep(0.02)

    @property
    def has_ended(self) -> bool:
        """Whether an engine died after its deployment had come through: then there is nothing to go on with."""
        if not any("set_state succeeded" in name for name in self._names):
            return False
        summary = self.shop.status()["summary"]
        return (summary["label"], summary["state"]) == (self.label, "succeeded")

    @property
    def came_to(self) -> int:
        """How many points the newest engine has come to."""
        return len(passed_in(self._file))

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.label}-{self._starts}"

    @property
    def _names(self) -> Iterable[str]:
        return chain.from_iterable([*self.passed, *passed_in(self._file)])


# --- opening and closing


class _Thread:
    """An event loop in a thread of its own: HAProxy's and the visitors'."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    @contextmanager
    def inside(self, context: AbstractAsyncContextManager[Any]) -> Iterator[None]:
        self.do(context.__aenter__())
        try:
            yield
        finally:
            self.do(context.__aexit__(None, None, None))

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def shop_in(folder: Path, *, rate: float = 40.0, clients: int = 8, boot_seconds: float = 0.2) -> Iterator[Shop]:
    """Open it: version 1.0.0 runs everywhere when this returns, and visitors come, `rate` a second.

    When it closes, HAProxy's log must say that never too few machines were in service, and know of as many visitors.
    """
    ports = dict(zip(MACHINES, free_ports(len(MACHINES)), strict=True))
    balancer = Balancer(folder / "lb", _addresses(ports), checking=Checking(interval=100))
    thread = _Thread()
    try:
        with thread.inside(balancer), Farm(folder) as farm:
            load = Load(f"{balancer.url}/", clients=clients, rate=rate)
            shop = Shop(farm, balancer, load)
            try:
                _set_up(shop, ports, boot_seconds)
                thread.do(balancer.until_up())
                opened = datetime.now(UTC)
                with thread.inside(load):
                    yield shop
                thread.do(balancer.until_quiet())
                _check_log(shop, opened)
            finally:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(Agent.stop, farm.agents.values()))
                thread.do(end_what_is_left(folder))
    finally:
        thread.end()


def _addresses(ports: Mapping[str, int]) -> dict[str, str]:
    return {name: f"127.0.0.1:{port}" for name, port in ports.items()}


def _set_up(shop: Shop, ports: Mapping[str, int], boot_seconds: float) -> None:
    farm = shop.farm
    farm.do("trust", "person", PERSON)
    for site in SITES:
        farm.add_relay(site)

    def add(number: int) -> None:
        # Each machine knows both relays, its own first.
        own, other = SITES[number % 2], SITES[1 - number % 2]
        farm.add_agent(MACHINES[number], own, [farm.urls[own], farm.urls[other]]).start()

    with ThreadPoolExecutor() as pool:
        list(pool.map(add, range(len(MACHINES))))
        list(pool.map(lambda version: _pack(farm, version), VERSIONS))
    shop.write_files(ports, boot_seconds)
    farm.write_process(packages={"web": webapp.ID}, steps=[shop.everywhere_at_once()])
    first = farm.deploy("r0", "--package", f"web={VERSIONS[0]}")
    assert first.code == 0, first.out + first.err
    farm.write_process(**shop.process())


def _pack(farm: Farm, version: str) -> None:
    made = webapp.make(farm.folder / f"shop-{version}", version)
    nupkg = farm.folder / f"{webapp.ID}.{version}.nupkg"
    farm.do("package", "pack", made, "--id", webapp.ID, "--version", version, "--output", nupkg)
    farm.do("package", "add", nupkg)


def _check_log(shop: Shop, opened: datetime) -> None:
    log = haproxy_log.since(shop.balancer.log(), opened)
    assert haproxy_log.fewest_in_service(log) >= IN_SERVICE
    assert haproxy_log.most_out_at_once(log) <= WINDOW
    visits = shop.load.summary()
    assert (visits.failed, len(log.requests)) == (0, visits.requests)
    print(f"{visits.requests} requests, {visits.failed} failed, over {shop.deployed} releases")
