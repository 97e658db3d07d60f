"""How fast does a deployment act? From an order to a script's first act, and what a step costs beyond its scripts.

Run: python -m benchmarks.rollout [--agents N] [--rounds N]
One relay is a process; the agents are tasks of one other process, each with a home and sockets of its own; every script
is a process with its runner; deployments are `waystation release deploy`. Scripts print the time when they begin and
when they end, so what is called overhead is everything else: also the start of their own interpreters.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from agent import platform
from agent.orders.operation_id import OperationId
from benchmarks.support.agents import make_agent
from benchmarks.support.programs import WAYSTATION, Served, relay, run, waystation
from orchestrator.journal.events import Dispatched, Event, Note, Reported
from orchestrator.journal.recorder import Recorder

if TYPE_CHECKING:
    from orchestrator.fleet.fleet import Fleet
    from orchestrator.journal.events import JournalEntry
    from orchestrator.journal.journal import Journal
    from orchestrator.plan.plan import Plan

ENVIRONMENT = "bench"
SCRIPT = """\
#!/bin/sh
date +%s%N
[ {seconds} = 0 ] || sleep {seconds}
date +%s%N
"""
"""Its first and its last act are to print the time, nanoseconds since 1970."""
ALONE = "alone"
"""The agent that is a process of its own."""
_NO_SCRIPTS = ("switch", "verify", "settle")
"""Operations that start no process."""
LONG = 1.0
"""Seconds that the long script sleeps."""


@dataclass(frozen=True, slots=True)
class StepKind:
    """A step that is measured. `window` None: all machines at once."""

    name: str
    window: int | None
    bracket: bool = False
    deploys: bool = False
    long: bool = False


STEPS = (
    StepKind("script", 1),
    StepKind("script of 1 s", 10, long=True),
    StepKind("script", None),
    StepKind("before, script, after", 1, bracket=True),
    StepKind("before, script, after", 10, bracket=True),
    StepKind("before, switch, script, verify, settle, after", 1, bracket=True, deploys=True),
    StepKind("before, switch, script of 1 s, verify, settle, after", 10, bracket=True, deploys=True, long=True),
)


@dataclass(frozen=True, slots=True)
class Farm:
    """A relay, agents that poll it, and the files of a release. `agents` is the pid of their process."""

    folder: str
    relay: Served
    agents: int
    machines: tuple[str, ...]

    @property
    def home(self) -> str:
        return os.path.join(self.folder, "origin")

    @property
    def project(self) -> str:
        return os.path.join(self.folder, "project")

    @property
    def trust(self) -> str:
        return os.path.join(self.home, "trust")

    def logs(self, deployment: str) -> str:
        return os.path.join(self.home, "deployments", deployment, "logs")


def main() -> None:
    """Measure and print; docs say how to read it."""
    options = _options()
    print(f"{os.cpu_count()} cores; {options.agents} agents in one process, one relay, loopback; milliseconds")
    with tempfile.TemporaryDirectory(prefix="waystation-bench-", dir=options.folder) as folder:
        _use_bytecode(folder)
        tell_machine(folder)
        with farm(folder, options.agents) as made:
            print(f"\nrelay's memory with {options.agents} agents that poll: {mega(resident(made.relay.pid))}")
            deployment = deploy(made)
            tell_steps(made, deployment)
            tell_orders(made, deployment, options.rounds)
            tell_status(made)
            print(f"\nrelay's memory after all this: {mega(resident(made.relay.pid))}")
            tell_one_agent(made, options.rest)


# --- the farm


@contextmanager
def farm(folder: str, agents: int) -> Iterator[Farm]:
    """All of it, with agents that a relay has answered."""
    homes = os.path.join(folder, "agents")
    made = Farm(folder, Served("", 0), 0, tuple(f"m{number:03}" for number in range(agents)))
    run([WAYSTATION, "trust", "init"], home=made.home)
    tokens = make_tokens(made)
    with relay(os.path.join(folder, "relay"), "--config", os.path.join(folder, "relay.yaml")) as served:
        pins = os.path.join(made.trust, "trust.json")
        keys = {
            name: make_agent(os.path.join(homes, name), name, served.url, pins, tokens[name]) for name in made.machines
        }
        write_files(made, served, keys)
        words = [sys.executable, "-m", "benchmarks.support.agents", homes]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    raise RuntimeError("the agents did not start")
                yield Farm(folder, served, process.pid, made.machines)
            finally:
                process.send_signal(signal.SIGTERM)


def make_tokens(made: Farm) -> dict[str, str]:
    """A relay.yaml with a token for the origin, one for each agent and one for `ALONE`; the tokens' files, by name."""
    from relay.server.http.tokens import make_token

    scopes = {"origin": ("write", "order")} | dict.fromkeys((ALONE, *made.machines), ("agent",))
    files, records = {}, []
    for name, scope in scopes.items():
        text, record = make_token(scope, datetime.now(UTC), 1, name)
        records.append(msgspec.to_builtins(record))
        files[name] = os.path.join(made.folder, f"token-{name}")
        with open(files[name], "w", encoding="ascii", opener=_private) as file:
            file.write(text)
    # All machines have one address here: each may open as many connections as it may from one of its own.
    limits = {"connections_per_address": 64 * len(scopes)}
    with open(os.path.join(made.folder, "relay.yaml"), "w", encoding="utf-8") as file:
        yaml.safe_dump({"tokens": records, "limits": limits}, file)
    return files


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_files(made: Farm, served: Served, keys: dict[str, str]) -> None:
    """The process, the environment, their scripts, and a small package."""
    for path in ("deploy/quick.sh", "deploy/long.sh", "environments/quick.sh"):
        script = os.path.join(made.project, path)
        os.makedirs(os.path.dirname(script), exist_ok=True)
        with open(script, "w", encoding="ascii") as file:
            file.write(SCRIPT.format(seconds=LONG if "long" in path else 0))
    process = {
        "format": 1,
        "project": "bench",
        "packages": {"web": "Bench.Web"},
        "steps": [_step(number, kind, made, served) for number, kind in enumerate(STEPS, 1)],
    }
    environment = {
        "environment": ENVIRONMENT,
        "relays": {
            "here": {"url": served.url, "site": "here", "token": {"file": os.path.join(made.folder, "token-origin")}}
        },
        "rotation": {"web": {"before": "quick.sh", "after": "quick.sh"}},
        "machines": {
            name: {"address": "127.0.0.1", "site": "here", "roles": ["web"], "key": key} for name, key in keys.items()
        },
    }
    for name, document in (("release.yaml", process), (f"environments/{ENVIRONMENT}.yaml", environment)):
        with open(os.path.join(made.project, name), "w", encoding="utf-8") as file:
            yaml.safe_dump(document, file, sort_keys=False)
    tree = os.path.join(made.folder, "tree")
    os.mkdir(tree)
    with open(os.path.join(tree, "version.txt"), "w", encoding="ascii") as file:
        file.write("1.0.0\n")
    nupkg = os.path.join(made.folder, "Bench.Web.1.0.0.nupkg")
    run([WAYSTATION, "package", "pack", tree, "--id", "Bench.Web", "--version", "1.0.0", "--output", nupkg])
    waystation("package", "add", nupkg, home=made.home)


def _step(number: int, kind: StepKind, made: Farm, served: Served) -> dict[str, Any]:
    script = {"script": "deploy/long.sh" if kind.long else "deploy/quick.sh"}
    step: dict[str, Any] = {"name": f"{kind.name} {number}", "roles": ["web"], "apply": [script]}
    step["strategy"] = "parallel" if kind.window is None else {"rolling": {"window": kind.window}}
    if kind.bracket:
        step["rotation"] = "web"
    if kind.deploys:
        root = os.path.join(made.folder, "srv", "${machine.name}", str(number))
        step |= {"deploy": "web", "to": root, "apply": ["switch", script]}
        step["verify"] = [{"tcp": served.url.removeprefix("http://")}]
    return step


# --- a deployment


@dataclass(frozen=True, slots=True)
class Deployed:
    """A finished deployment: its ULID, the command's seconds, and the processor time that all of it took, by where."""

    ulid: str
    seconds: float
    processor: dict[str, float]


def deploy(made: Farm) -> Deployed:
    """Run the release by the command, from nothing to its end."""
    before = _processor(made)
    words = ["release", "deploy", "1.0.0", "--environment", ENVIRONMENT, "--package", "web=1.0.0", "--json"]
    timed = run([WAYSTATION, *words], home=made.home, cwd=made.project)
    used = {name: seconds - before[name] for name, seconds in _processor(made).items()}
    return Deployed(str(msgspec.json.decode(timed.output)["summary"]["deployment"]), timed.seconds, used)


def _processor(made: Farm) -> dict[str, float]:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "the command and its scripts": children.ru_utime + children.ru_stime,
        # Runners are waited for by their fork server, which lives on.
        "the agents and their scripts": sum(map(cpu_seconds, (made.agents, *platform.descendants(made.agents)))),
        "the relay": cpu_seconds(made.relay.pid),
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """One step over its machines; seconds.

    Attributes:
        whole: from its start to its end, as the journal has them.
        scripts: all scripts' own time together.
        turns: of each machine, its turn without its scripts.
        parts: of each turn, what its operations cost beyond their scripts, by kind of operation.
    """

    kind: StepKind
    machines: int
    whole: float
    scripts: float
    turns: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]

    @property
    def overhead(self) -> float:
        """For each machine: what the step took longer than its scripts alone, in its window, would have."""
        return (self.whole - self.scripts / (self.kind.window or self.machines)) / self.machines


def measure_steps(made: Farm, deployment: Deployed) -> list[Measured]:
    """Every step of a deployment, by its journal and by what its scripts printed."""
    with _journal(made) as journal:
        entries = journal.entries(deployment.ulid)
    logs = made.logs(deployment.ulid)
    return [measure(kind, number, entries, lambda each: own_time(logs, each)) for number, kind in enumerate(STEPS, 1)]


def measure(
    kind: StepKind, number: int, entries: Sequence[JournalEntry], own_time_of: Callable[[str], float]
) -> Measured:
    """Step `number`, by the journal's entries and the seconds that an operation's script says it took itself."""
    from orchestrator.journal import events

    begun: dict[str, float] = {}
    took: dict[str, float] = {}
    turns: dict[str, float] = {}
    whole = [0.0, 0.0]
    for entry in entries:
        match entry.event:
            case events.StepStarted(step=step) if step == number:
                whole[0] = entry.at
            case events.StepEnded(step=step) if step == number:
                whole[1] = entry.at
            case events.TurnStarted(machine=machine, step=step) if step == number:
                turns[machine] = entry.at
            case events.TurnEnded(machine=machine, step=step, outcome="deployed") if step == number:
                turns[machine] = entry.at - turns[machine]
            case events.Dispatched(operation=operation) | events.ServerRunDispatched(operation=operation):
                begun[operation] = entry.at
            case (
                events.Reported(operation=operation, state="done")
                | events.ServerRunEnded(operation=operation, state="done")
            ) if OperationId.parse(operation).step == number:
                took[operation] = entry.at - begun[operation]
    own = {operation: own_time_of(operation) for operation in took}
    parts: dict[str, list[float]] = defaultdict(list)
    inside: dict[str, float] = defaultdict(float)
    for operation, seconds in took.items():
        id = OperationId.parse(operation)
        parts[re.sub(r"\A\d+-|\.sh\Z", "", id.action)].append(seconds - own[operation])
        inside[id.who] += own[operation]
    return Measured(
        kind,
        len(turns),
        whole[1] - whole[0],
        sum(own.values()),
        tuple(seconds - inside[machine] for machine, seconds in turns.items()),
        {name: tuple(seconds) for name, seconds in parts.items()},
    )


def own_time(logs: str, operation: str) -> float:
    """Seconds between a script's first and last act; 0 of what is no script. Raises `RuntimeError`: it did not say."""
    id = OperationId.parse(operation)
    if id.action.partition("-")[2] in _NO_SCRIPTS or id.action in _NO_SCRIPTS:
        return 0.0
    stamps = _stamps(os.path.join(logs, f"{id.file_name}.log"))
    if len(stamps) != 2:
        raise RuntimeError(f"{operation} printed {len(stamps)} times, not two")
    return stamps[1] - stamps[0]


def _stamps(log: str) -> list[float]:
    """Seconds since 1970 that a script printed."""
    try:
        with open(log, encoding="ascii") as file:
            return [int(line) / 1e9 for line in file]
    except FileNotFoundError:
        return []


def tell_steps(made: Farm, deployment: Deployed) -> None:
    """One line for each step, and one for what it is made of."""
    steps = measure_steps(made, deployment)
    print(f"\n`release deploy`: {deployment.seconds:.1f} s; of that {sum(s.whole for s in steps):.1f} s in its steps")
    turns = len(steps) * len(made.machines)
    spent = ", ".join(f"{name} {milli(seconds / turns)}" for name, seconds in deployment.processor.items())
    print(f"processor time of a turn, mean of {turns}: {spent}")
    print(
        f"{'step over ' + str(len(made.machines)) + ' machines':54}{'window':>8}{'overhead':>10}{'turn':>10}   turn's"
    )
    print(f"{'':54}{'':>8}{'/machine':>10}{'overhead':>10}   p95")
    for step in steps:
        window = "all" if step.kind.window is None else str(step.kind.window)
        print(f"{step.kind.name:54}{window:>8}{milli(step.overhead):>10}{middle(step.turns):>10}{p95(step.turns):>8}")
        parts = ", ".join(f"{name} {middle(values)}" for name, values in step.parts.items())
        rest = statistics.median(step.turns) - sum(statistics.median(values) for values in step.parts.values())
        print(f"    of a turn: {parts}, between them {milli(rest)}")


# --- orders


@dataclass(frozen=True, slots=True)
class Trip:
    """One order; seconds since it was asked for."""

    posted: float
    acted: float
    done: float


class _Marks(Recorder):
    """Marks when an order leaves. Nothing is kept in the journal."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self.posted: dict[str, float] = {}

    async def record(self, *events: Event) -> None:
        for event in events:
            match event:
                case Dispatched(operation=operation):
                    self.posted[operation] = time.time()
                case Reported(machine=machine, state=state, reason=reason) if state != "done":
                    raise RuntimeError(f"{machine}: {state}: {reason}")
                case Note(text=text, machine=machine):
                    print(f"note: {machine}: {text}", file=sys.stderr)
                case _:
                    pass


async def send_orders(made: Farm, deployment: Deployed, rounds: int) -> tuple[list[Trip], list[Trip]]:
    """Order a script of `rounds` machines one after another, then of all at once; by a fleet of our own."""
    from ulid import ULID

    from agent.orders.orders import RunScript
    from orchestrator.fleet.fleet import Fleet
    from orchestrator.replication.send import open_relay
    from orchestrator.trust.keyring import load_signer

    with _journal(made) as journal:
        plan = msgspec.json.decode(journal.plan(deployment.ulid), type=_plan_type())
        fence, journal_id, ulid = journal.claim(plan.environment), journal.id, str(ULID())
    folder = os.path.join(made.home, "deployments", ulid)
    os.makedirs(folder, mode=0o700)
    assert plan.scripts is not None
    script = RunScript(plan.scripts.manifest, "deploy/quick.sh", {})
    signer, marks = load_signer(made.trust, "order"), _Marks(ulid)

    async def one(fleet: Fleet, machine: str, number: int) -> tuple[OperationId, float, float]:
        asked, operation = time.time(), OperationId.of(ulid, number, machine, "quick")
        await fleet.perform(operation, script)
        return operation, asked, time.time()

    async with open_relay(plan.relays[0]) as client:
        clients = {plan.relays[0].name: client}
        async with Fleet(
            plan, clients, signer=signer, journal=journal_id, folder=folder, recorder=marks, fence=fence
        ) as fleet:
            await asyncio.gather(*(one(fleet, machine, 1) for machine in made.machines))
            single = [
                await one(fleet, made.machines[n % len(made.machines)], 2 + n // len(made.machines))
                for n in range(rounds)
            ]
            whole = await asyncio.gather(*(one(fleet, machine, 900) for machine in made.machines))
            if not await fleet.logs_arrived():
                raise RuntimeError("output is missing")
            await asyncio.gather(*(fleet.acknowledge(machine, ends=True) for machine in made.machines))
            return [_trip(fleet, marks, *each) for each in single], [_trip(fleet, marks, *each) for each in whole]


def _trip(fleet: Fleet, marks: _Marks, operation: OperationId, asked: float, done: float) -> Trip:
    acted = _stamps(fleet.log_path(operation))[0]
    return Trip(marks.posted[str(operation)] - asked, acted - asked, done - asked)


def tell_orders(made: Farm, deployment: Deployed, rounds: int) -> None:
    """Two lines for each way of sending."""
    single, whole = asyncio.run(send_orders(made, deployment, rounds))
    print(f"\n{'order to run a script':44}{'median':>8}{'p95':>8}{'max':>8}")
    for name, trips in ((f"one at a time ({len(single)})", single), (f"{len(whole)} at once", whole)):
        for what, values in (
            ("signed, kept, about to leave", [trip.posted for trip in trips]),
            ("the script's first act", [trip.acted for trip in trips]),
            ("its result is here", [trip.done for trip in trips]),
        ):
            print(f"{name + ': ' + what:44}{middle(values):>8}{p95(values):>8}{milli(max(values)):>8}")


# --- what it costs to be there


def tell_status(made: Farm) -> None:
    """`release status`, as a person calls it."""
    seconds = [run([WAYSTATION, "release", "status"], home=made.home).seconds for _ in range(5)]
    print(f"\n`release status` of {len(made.machines)} machines: {middle(seconds)} ms (median of 5, a whole process)")


def tell_one_agent(made: Farm, rest: float) -> None:
    """A real `agent serve` that has nothing to do."""
    home = os.path.join(made.folder, "alone")
    token = os.path.join(made.folder, f"token-{ALONE}")
    make_agent(home, ALONE, made.relay.url, os.path.join(made.trust, "trust.json"), token)
    words = [WAYSTATION, "agent", "serve", "--home", home]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(1.0)
            before = cpu_seconds(process.pid)
            time.sleep(rest)
            used = cpu_seconds(process.pid) - before
            memory = resident(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
    print(f"one `agent serve` at rest: {mega(memory)} resident, {milli(used)} ms of CPU in {rest:.0f} s")


def tell_machine(folder: str) -> None:
    """What this machine needs for things that no design saves: the unit of everything below."""
    sync = [_timed_sync(os.path.join(folder, "sync")) for _ in range(50)]
    script = os.path.join(folder, "nothing.sh")
    with open(script, "w", encoding="ascii") as file:
        file.write(SCRIPT.format(seconds=0))
    shell = [run(["sh", script]).seconds for _ in range(20)]
    python = [run([sys.executable, "-I", "-S", "-c", ""]).seconds for _ in range(20)]
    print(f"here an fsync takes {middle(sync)}, the script {middle(shell)}, to start Python {middle(python)} (medians)")


def _timed_sync(path: str) -> float:
    with open(path, "ab", buffering=0) as file:
        file.write(bytes(4096))
        began = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def resident(pid: int) -> int:
    """Bytes of memory that the process has now (Linux)."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Seconds of processor that the process and its children that were waited for have used so far (Linux)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# --- words


def milli(seconds: float) -> str:
    """As milliseconds."""
    return f"{seconds * 1000:.1f}" if abs(seconds) < 0.1 else f"{seconds * 1000:.0f}"


def middle(seconds: Sequence[float]) -> str:
    """The median, as milliseconds."""
    return milli(statistics.median(seconds))


def p95(seconds: Sequence[float]) -> str:
    """The value that 95 of 100 do not exceed, as milliseconds."""
    ordered = sorted(seconds)
    return milli(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))])


def mega(count: int) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:.1f} MB"


def _journal(made: Farm) -> Journal:
    from orchestrator.journal.journal import Journal

    return Journal.open(os.path.join(made.home, "journal.db"))


def _use_bytecode(folder: str) -> None:
    """As where it is installed: otherwise each command would compile its own sources first."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(folder, "bytecode")


def _plan_type() -> type[Plan]:
    from orchestrator.plan.plan import Plan

    return Plan


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=50, help="orders that are sent one after another")
    parser.add_argument("--rest", type=float, default=20.0, help="seconds that an agent is watched at rest")
    parser.add_argument("--folder", default=None, help="where to work [default: the system's temporary folder]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
