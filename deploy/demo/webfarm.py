"""The second half: a web farm behind a real HAProxy gets two releases, the second one under load, machine by machine, on
its worst day: the orchestrator is killed, a person is asked, and a relay is lost for good.

Nothing here is a stand-in: agents wait for signed orders at the relays, the rotation scripts are those of
deploy/examples/haproxy as users would take them, and HAProxy's own log and the visitors judge.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import haproxy_log
import yaml
from balancer import Balancer
from ledger import Promise
from load import Load, Summary
from narration import Narrator, names
from programs import Command, DemoError, in_thread
from town import Machine, Town, show

from benchmarks.support.programs import free_ports

sys.path.insert(0, str(Path(__file__).parent / "webapp"))
import folder as webapp  # type: ignore[import-not-found]

EXAMPLES = Path(__file__).parents[1] / "examples" / "haproxy"
FIRST, SECOND = "1.0.0", "2.0.0"
WINDOW = 2
IN_SERVICE = 4
"""`min_in_service` of the second release: of six."""
BEFORE, AFTER = 400, 400
"""Requests before the second release starts, and after it has ended."""
WORK_SECONDS = 0.05
"""What the shop takes for a page: so there are requests in flight when a machine leaves."""
READY_SECONDS = 30.0
PERSON, GATE = "anna", "canary"
"""Who is asked between the first machine and the others, and by which name."""
LOST = "iad"
"""The relay that is lost in the middle, and does not come back."""


@dataclass(frozen=True, slots=True)
class Survived:
    """What the second release went through.

    Attributes:
        state: its own, in the journal, after all of it.
        deployments: of its label, in the journal: 1 where it went on and was not begun again.
        killed_in: the machine that was out of rotation when the orchestrator was killed.
        said: what people decided, as `NAME: approve`.
        switches: how often each machine was switched to it, by the agents' own word.
        after_the_loss: machines that were put back after the relay was lost.
    """

    state: str
    deployments: int
    killed_in: str
    said: tuple[str, ...]
    switches: dict[str, int]
    after_the_loss: int


@dataclass(frozen=True, slots=True)
class Rolled:
    """What came of the second release: what the visitors saw, and what HAProxy wrote down meanwhile."""

    load: Summary
    log: haproxy_log.Log
    logged: int
    """Requests in HAProxy's log; where a kept connection breaks, it hangs up on the visitor and logs nothing."""
    seconds: float
    turns: dict[str, str]
    """Outcome by machine, from the product's own status."""
    survived: Survived

    @property
    def out_with_the_second(self) -> int:
        """How many machines were out when the second one left for the first time: 1 where the first was back."""
        left: set[str] = set()
        for moment in haproxy_log.rotation(self.log):
            if left and moment.out - left:
                return len(moment.out)
            left |= moment.out
        return 0


async def play(town: Town, tell: Narrator) -> Rolled:
    """The story, one step after another."""
    ports = dict(zip([machine.name for machine in town.machines], free_ports(len(town.machines)), strict=True))
    servers = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    async with Balancer(town.folder / "haproxy", servers) as balancer:
        tell.begin("An agent on each machine waits for orders; HAProxy stands in front of all six")
        await start_agents(town, tell)
        write_files(town, balancer, ports)
        tell.say(f"HAProxy with 'retries 0' at {balancer.url}: whatever fails is seen by a visitor.")

        tell.begin(f"Version {FIRST} of the web shop is released, everywhere at once")
        await take_in(FIRST, town, tell)
        write_process(town, {"strategy": "parallel"}, tell)
        await deploy(FIRST, town, tell)
        await balancer.until_up()
        tell.say(f"HAProxy says UP of all {len(servers)}.")

        tell.begin(
            f"Version {SECOND} follows under load: first one machine, then, if {PERSON} agrees, {WINDOW} at a time"
        )
        await take_in(SECOND, town, tell)
        tell.say(await show(town, tell, town.at_origin("trust", "person", PERSON)))
        gate = {"name": GATE, "ask": "Is ${machine.name} well?", "approvers": [PERSON]}
        phases = [{"machines": 1, "gate": gate}, {"window": WINDOW}]
        write_process(town, {"strategy": {"rolling": {"phases": phases, "min_in_service": IN_SERVICE}}}, tell)
        rolled = await roll_under_load(balancer, town, tell)

        tell.begin("What every machine runs now, and what the journal says")
        for arguments in (("release", "status"), ("rotation", "list")):
            tell.say(await show(town, tell, town.at_origin(*arguments), folder=town.project))
    return rolled


# --- the set-up


async def start_agents(town: Town, tell: Narrator) -> None:
    first, *others = (machine.name for machine in town.machines)
    tell.command(f"{serve(town.machines[0], town)} &", f"the same on {names(others)}")
    for machine in town.machines:
        await town.processes.start(f"agent-{machine.name}", serve(machine, town))
    for name in (first, *others):
        await town.processes.until_said(f"agent-{name}", b" ready at ", READY_SECONDS)
    tell.say(town.processes.log(f"agent-{first}").read_text().splitlines()[0])


def serve(machine: Machine, town: Town) -> Command:
    return town.on(machine, "agent", "serve", "--token-file", str(town.folder / "tokens" / "agent"))


def write_files(town: Town, balancer: Balancer, ports: dict[str, int]) -> None:
    """What operations owns: the environment with its rotation, and the scripts of the example beside it."""
    project = town.project
    shutil.copytree(EXAMPLES / "environments" / "lb", project / "environments" / "lb")
    (project / "ops").mkdir()
    shutil.copy(webapp.RESTART, project / "ops" / "restart.py")
    environment = {
        "environment": "demo",
        "relays": {
            # Each serves the other's site, too, after that one's own.
            relay: {
                "url": f"http://127.0.0.1:{line.port}",
                "site": relay,
                "generic": True,
                "token": {"file": "../../tokens/write"},
            }
            for relay, line in town.origin_lines.items()
        },
        "rotation": {
            "web": {"before": "lb/out.py", "after": "lb/in.py", "probe": "lb/state.py", "secrets": ["lb_token"]}
        },
        "secrets": {"lb_token": {"file": str(balancer.token_file)}},
        "variables": {"haproxy": balancer.page, "backend": "web", "work_seconds": WORK_SECONDS},
        "machines": {
            machine.name: {
                "address": "127.0.0.1",
                "site": machine.site,
                "roles": ["web"],
                "key": town.fingerprints[machine.name],
                "variables": {"port": ports[machine.name], "srv": str(town.folder / machine.home / "srv" / "shop")},
            }
            for machine in town.machines
        },
    }
    (project / "environments" / "demo.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))


def write_process(town: Town, strategy: dict[str, Any], tell: Narrator) -> None:
    """What developers own: it names the rotation, and says nothing of how it is done."""
    step = {
        "name": "web farm",
        "roles": ["web"],
        "deploy": "web",
        "to": "${srv}",
        **strategy,
        "rotation": "web",
        "on_failure": "stop",
        "apply": ["switch", {"name": "restart", "script": "ops/restart.py"}],
        "verify": [{"http": "http://${machine.address}:${port}/version", "expect": "${package.version}"}],
    }
    process = {"format": 1, "project": "shop", "packages": {"web": webapp.ID}, "steps": [step]}
    (town.project / "release.yaml").write_text(yaml.safe_dump(process, sort_keys=False))
    tell.say("in release.yaml: " + yaml.safe_dump(strategy, default_flow_style=True, width=1000).strip()[1:-1])


# --- releases


async def take_in(version: str, town: Town, tell: Narrator) -> None:
    folder = await in_thread(webapp.make, town.folder / f"webshop-{version}", version)
    await show(town, tell, town.at_origin("package", "pack", folder.name, "--id", webapp.ID, "--version", version))
    await show(town, tell, town.at_origin("package", "add", f"{webapp.ID}.{version}.nupkg"))


def deploying(version: str, town: Town) -> Command:
    return town.at_origin("release", "deploy", version, "--environment", "demo", "--package", f"web={version}")


async def deploy(version: str, town: Town, tell: Narrator) -> None:
    command = deploying(version, town)
    tell.command(str(command))
    await town.processes.run(command, town.project, tell.say)


@dataclass
class WorstDay:
    """The second release, and what happens to it on its way."""

    town: Town
    tell: Narrator
    killed_in: str = ""
    after_the_loss: int = 0
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _others_are_out: asyncio.Event = field(default_factory=asyncio.Event)
    _is_lost: bool = False

    async def go_through_it(self) -> None:
        command = deploying(SECOND, self.town)
        self.tell.command(str(command))
        pid = await self.town.processes.run_and_kill(command, ": out of web", self.town.project, self._before)
        self.tell.command(f"kill -KILL {pid}", f"the orchestrator, while {self.killed_in} is out of rotation")
        resuming = self.town.at_origin("release", "resume", "--environment", "demo")
        self.tell.command(str(resuming))
        ending = [asyncio.create_task(each) for each in (self._answer(), self._lose_a_relay())]
        try:
            await self.town.processes.run(resuming, self.town.project, self._after)
            async with asyncio.timeout(READY_SECONDS):
                await asyncio.gather(*ending)
        except TimeoutError:
            raise DemoError(f"{PERSON} was never asked, or relay {LOST} was never lost") from None
        finally:
            for task in ending:
                task.cancel()

    def _before(self, line: str) -> None:
        self.tell.say(line)
        if ": out of web" in line:
            self.killed_in = line.partition(": out of web")[0].split()[-1]

    def _after(self, line: str) -> None:
        self.tell.say(line)
        if f"{GATE!r} waits for" in line:
            self._asked.set()
        if ": out of web" in line and self._asked.is_set():
            self._others_are_out.set()
        if self._is_lost and line.rstrip().endswith(": deployed"):
            self.after_the_loss += 1

    async def _answer(self) -> None:
        await self._asked.wait()
        answer = self.town.at_origin("release", "approve", GATE, "-m", "it looks good", "--as", PERSON)
        self.tell.command(str(answer))
        self.tell.say(await self.town.processes.run(answer, self.town.project))

    async def _lose_a_relay(self) -> None:
        await self._others_are_out.wait()
        id = await self.town.processes.kill(f"relay-{LOST}")
        await self.town.pull_plug(LOST)
        self._is_lost = True
        self.tell.command(f"kill -KILL {id}", f"relay {LOST}, for good; its lines are cut too")

    async def survived(self) -> Survived:
        """What came of it, by status, history and the agents."""
        status = await self.town.json(self.town.at_origin("release", "status", "--json"))
        history = await self.town.json(self.town.at_origin("release", "history", "--json"))
        logs = {m.name: self.town.processes.log(f"agent-{m.name}").read_text().splitlines() for m in self.town.machines}
        deployment = status["summary"]["deployment"]
        said = (f"{each['data'].get('by', each['operator'])}: {each['what']}" for each in status["decisions"])
        return Survived(
            state=status["summary"]["state"],
            deployments=sum(each["label"] == SECOND for each in history["deployments"]),
            killed_in=self.killed_in,
            said=tuple(said),
            switches={
                name: sum("agent.switched" in line and deployment in line for line in log) for name, log in logs.items()
            },
            after_the_loss=self.after_the_loss,
        )


async def roll_under_load(balancer: Balancer, town: Town, tell: Narrator) -> Rolled:
    async with Load(f"{balancer.url}/") as load:
        await load.until(BEFORE)
        began = datetime.now(UTC)
        started = time.monotonic()
        worst_day = WorstDay(town, tell)
        await worst_day.go_through_it()
        seconds = time.monotonic() - started
        await load.until(load.summary().requests + AFTER)
    summary = load.summary()
    for second, seen in enumerate(summary.seconds):
        shares = "  ".join(f"{version}: {count:4}" for version, count in sorted(seen.versions.items()))
        tell.say(f"second {second:2}  {seen.requests:4} requests  {seen.failed} failed  {shares}")
    await balancer.until_quiet()
    whole = balancer.log()
    log = haproxy_log.since(whole, began)
    status = await town.json(town.at_origin("release", "status", "--json"))
    turns = {machine["name"]: machine["outcome"] for machine in status["machines"]}
    return Rolled(summary, log, len(whole.requests), seconds, turns, await worst_day.survived())


# --- the end


def promises(rolled: Rolled, machines: Sequence[Machine]) -> list[Promise]:
    load, log = rolled.load, rolled.log
    most, fewest = haproxy_log.most_out_at_once(log), haproxy_log.fewest_in_service(log)
    out = {change.server for change in log.changes if change.admin in {"drain", "maint"}}
    kinds = ", ".join(f"{count} {kind}" for kind, count in load.kinds.items())
    versions = ", ".join(f"{version}: {count}" for version, count in sorted(load.versions.items()))
    names = {machine.name for machine in machines}
    alone, single = rolled.out_with_the_second, load.requests - load.kept
    went = rolled.survived
    judged = [
        ("no request failed", f"{load.failed} of {load.requests}{kinds and f': {kinds}'}", load.failed == 0),
        ("HAProxy counted as many as the visitors", f"{rolled.logged} in its log", rolled.logged == load.requests),
        ("half of them over kept connections", f"{load.kept} kept, {single} not", load.kept > 0 < single),
        ("both versions were seen on the way", versions, set(load.versions) == {FIRST, SECOND}),
        ("first one machine alone", f"{alone} out with the second", alone == 1),
        (f"never more than {WINDOW} machines out, by HAProxy's log", f"at most {most}", most <= WINDOW),
        (f"never fewer than {IN_SERVICE} in service, by HAProxy's log", f"at least {fewest}", fewest >= IN_SERVICE),
        (
            "every machine left its rotation, and is deployed",
            f"{len(out)} of {len(machines)}",
            out == names and set(rolled.turns.values()) == {"deployed"},
        ),
        (
            "the orchestrator was killed in mid-roll, and the same deployment went on",
            f"{went.deployments}, {went.state}; it was at {went.killed_in or 'no machine'}",
            (went.deployments, went.state) == (1, "succeeded") and went.killed_in in names,
        ),
        (
            "every machine was switched once",
            f"{sum(went.switches.values())} switches",
            went.switches == dict.fromkeys(names, 1),
        ),
        (f"{PERSON} was asked, and answered once", "; ".join(went.said), went.said == (f"{PERSON}: approve",)),
        (
            f"relay {LOST} was lost for good, and no machine with it",
            f"{went.after_the_loss} came back in after it",
            went.after_the_loss > WINDOW,
        ),
    ]
    return [Promise(*each) for each in judged]


def close(rolled: Rolled, machines: Sequence[Machine], tell: Narrator) -> bool:
    """Print the promises; whether all of them held."""
    tell.begin("The release, judged by the visitors and by HAProxy")
    held = tell.judge(promises(rolled, machines))
    load = rolled.load
    tell.verdict(
        held=held,
        text=f"\n{'Released without a failed request' if held else 'THE RELEASE BROKE A PROMISE'}: "
        f"{load.failed} failed requests of {load.requests}, versions {names(sorted(load.versions))} seen, "
        f"{len(machines)} machines in {rolled.seconds:.1f} s.",
    )
    return held


def report(rolled: Rolled, judged: Sequence[Promise]) -> dict[str, Any]:
    """For `--report`."""
    return {
        "requests": rolled.load.requests,
        "failed": rolled.load.failed,
        "versions": rolled.load.versions,
        "seconds": rolled.seconds,
        "survived": asdict(rolled.survived),
        "promises": [asdict(promise) for promise in judged],
    }
