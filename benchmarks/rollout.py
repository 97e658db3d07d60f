"""How fast does a deployment act? From an order to a script's first act, and what a step costs beyond its scripts.

Run: python -m benchmarks.rollout [--agents N] [--rest SECONDS]
One relay is a process; the agents are tasks of one other process, each with a home and sockets of its own; every script
is a process with its runner; deployments are `waystation release deploy`. Scripts print the time when they begin and
when they end, so what is called overhead is everything else: also the start of their own interpreters.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from agent import platform
from agent.orders.operation_id import OperationId
from benchmarks.support.agents import make_agent
from benchmarks.support.programs import WAYSTATION, Served, make_tokens, pack, relay, run, started, waystation
from benchmarks.support.report import add_folder, mega, parser
from orchestrator.journal import events
from orchestrator.journal.events import JournalEntry
from orchestrator.journal.journal import Journal

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
    tokens: dict[str, str]

    def credentials(self, agent: str) -> tuple[str, str, str]:
        """An agent's relay, and the files of its pins and its token."""
        return self.relay.url, os.path.join(self.home, "trust", "trust.json"), self.tokens[agent]

    @property
    def home(self) -> str:
        return os.path.join(self.folder, "origin")

    @property
    def project(self) -> str:
        return os.path.join(self.folder, "project")

    def logs(self, deployment: str) -> str:
        return os.path.join(self.home, "deployments", deployment, "logs")


def main() -> None:
    """Measure and print; docs say how to read it."""
    command = parser("rollout", __doc__)
    command.add_argument("--agents", type=int, default=50)
    command.add_argument("--rest", type=float, default=20.0, help="seconds that an agent is watched at rest")
    add_folder(command)
    options = command.parse_args()
    print(f"{os.cpu_count()} cores; {options.agents} agents in one process, one relay, loopback; milliseconds")
    with tempfile.TemporaryDirectory(prefix="waystation-bench-", dir=options.folder) as folder:
        _use_bytecode(folder)
        tell_machine(folder)
        with farm(folder, options.agents) as made:
            print(f"\nrelay's memory with {options.agents} agents that poll: {mega(resident(made.relay.pid))}")
            deployment = deploy(made)
            tell_steps(made, deployment)
            tell_orders(made, deployment)
            tell_status(made)
            print(f"\nrelay's memory after all this: {mega(resident(made.relay.pid))}")
            tell_one_agent(made, options.rest)


# --- the farm


@contextmanager
def farm(folder: str, agents: int) -> Iterator[Farm]:
    """All of it, with agents that a relay has answered."""
    homes, config = os.path.join(folder, "agents"), os.path.join(folder, "relay.yaml")
    machines = tuple(f"m{number:03}" for number in range(agents))
    tokens = make_tokens(config, {"origin": ("write", "order")} | dict.fromkeys((ALONE, *machines), ("agent",)))
    with relay(os.path.join(folder, "relay"), "--config", config) as served:
        made = Farm(folder, served, 0, machines, tokens)
        waystation("trust", "init", home=made.home)
        keys = {name: make_agent(os.path.join(homes, name), name, *made.credentials(name)) for name in machines}
        write_files(made, keys)
        with started([sys.executable, "-m", "benchmarks.support.agents", homes]) as (pid, _):
            yield replace(made, agents=pid)


def write_files(made: Farm, keys: dict[str, str]) -> None:
    """The process, the environment, their scripts, and a small package."""
    project = Path(made.project)
    for name in ("deploy", "environments"):
        (project / name).mkdir(parents=True)
    for path in ("deploy/quick.sh", "deploy/long.sh", "environments/quick.sh"):
        (project / path).write_text(SCRIPT.format(seconds=LONG if "long" in path else 0), encoding="ascii")
    process = {
        "format": 1,
        "project": "bench",
        "packages": {"web": "Bench.Web"},
        "steps": [_step(number, kind, made) for number, kind in enumerate(STEPS, 1)],
    }
    environment = {
        "environment": ENVIRONMENT,
        "relays": {"here": {"url": made.relay.url, "site": "here", "token": {"file": made.tokens["origin"]}}},
        "rotation": {"web": {"before": "quick.sh", "after": "quick.sh"}},
        "machines": {
            name: {"address": "127.0.0.1", "site": "here", "roles": ["web"], "key": key} for name, key in keys.items()
        },
    }
    for name, document in (("release.yaml", process), (f"environments/{ENVIRONMENT}.yaml", environment)):
        (project / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    tree = Path(made.folder, "tree")
    tree.mkdir()
    (tree / "version.txt").write_text("1.0.0\n", encoding="ascii")
    nupkg = pack(str(tree), "Bench.Web", "1.0.0", os.path.join(made.folder, "Bench.Web.1.0.0.nupkg"))
    waystation("package", "add", nupkg, home=made.home)


def _step(number: int, kind: StepKind, made: Farm) -> dict[str, Any]:
    script = {"script": "deploy/long.sh" if kind.long else "deploy/quick.sh"}
    step: dict[str, Any] = {"name": f"{kind.name} {number}", "roles": ["web"], "apply": [script], "on_failure": "stop"}
    step["strategy"] = "parallel" if kind.window is None else {"rolling": {"window": kind.window}}
    if kind.bracket:
        step["rotation"] = "web"
    if kind.deploys:
        root = os.path.join(made.folder, "srv", "${machine.name}", str(number))
        step |= {"deploy": "web", "to": root, "apply": ["switch", script]}
        step["verify"] = [{"tcp": made.relay.url.removeprefix("http://")}]
    return step


# --- a deployment


@dataclass(frozen=True, slots=True)
class Deployed:
    """A finished deployment: its ULID, the command's seconds, the processor time of it all by where, its journal."""

    ulid: str
    seconds: float
    processor: dict[str, float]
    entries: Sequence[JournalEntry]


def deploy(made: Farm) -> Deployed:
    """Run the release by the command, from nothing to its end."""
    before = _processor(made)
    words = ["release", "deploy", "1.0.0", "--environment", ENVIRONMENT, "--package", "web=1.0.0", "--json"]
    timed = run([WAYSTATION, *words], home=made.home, cwd=made.project)
    used = {name: seconds - before[name] for name, seconds in _processor(made).items()}
    ulid = str(msgspec.json.decode(timed.output)["summary"]["deployment"])
    with Journal.open(os.path.join(made.home, "journal.db")) as journal:
        return Deployed(ulid, timed.seconds, used, journal.entries(ulid))


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
    logs = made.logs(deployment.ulid)
    return [
        measure(kind, number, deployment.entries, lambda each: own_time(logs, each))
        for number, kind in enumerate(STEPS, 1)
    ]


def measure(
    kind: StepKind, number: int, entries: Sequence[JournalEntry], own_time_of: Callable[[str], float]
) -> Measured:
    """Step `number`, by the journal's entries and the seconds that an operation's script says it took itself."""
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
    stamps = _stamps(logs, operation)
    if len(stamps) != 2:
        raise RuntimeError(f"{operation} printed {len(stamps)} times, not two")
    return stamps[1] - stamps[0]


def _stamps(logs: str, operation: str) -> list[float]:
    """Seconds since 1970 that a script printed."""
    log = Path(logs, f"{OperationId.parse(operation).file_name}.log")
    # A line ends in what was printed; before it stand time and stream.
    lines = log.read_text(encoding="ascii").splitlines() if log.exists() else []
    return [int(line.rpartition(" ")[2]) / 1e9 for line in lines]


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


def trips(entries: Sequence[JournalEntry], number: int, acted: Callable[[str], float]) -> list[Trip]:
    """The orders of step `number`, which runs one script: each is asked for when its machine's turn begins.

    `acted` says when an operation's script printed first, in seconds since 1970.
    """
    asked: dict[str, float] = {}
    posted: dict[str, float] = {}
    found = []
    for entry in entries:
        match entry.event:
            case events.TurnStarted(machine=machine, step=step) if step == number:
                asked[machine] = entry.at
            case events.Dispatched(operation=operation) if OperationId.parse(operation).step == number:
                posted[operation] = entry.at
            case events.Reported(operation=operation, machine=machine, state="done") if operation in posted:
                moments = (posted[operation], acted(operation), entry.at)
                found.append(Trip(*(moment - asked[machine] for moment in moments)))
    return found


def tell_orders(made: Farm, deployment: Deployed) -> None:
    """Three lines for each way of sending: the steps that run one short script tell both."""
    logs = made.logs(deployment.ulid)
    print(f"\n{'order to run a script':44}{'median':>8}{'p95':>8}{'max':>8}")
    for number, way in ((1, "one at a time"), (3, "at once")):
        found = trips(deployment.entries, number, lambda operation: _stamps(logs, operation)[0])
        for what, values in (
            ("signed, kept, about to leave", [trip.posted for trip in found]),
            ("the script's first act", [trip.acted for trip in found]),
            ("its result is here", [trip.done for trip in found]),
        ):
            print(f"{f'{len(found)} {way}: {what}':44}{middle(values):>8}{p95(values):>8}{milli(max(values)):>8}")


# --- what it costs to be there


def tell_status(made: Farm) -> None:
    """`release status`, as a person calls it."""
    seconds = [run([WAYSTATION, "release", "status"], home=made.home).seconds for _ in range(5)]
    print(f"\n`release status` of {len(made.machines)} machines: {middle(seconds)} ms (median of 5, a whole process)")


def tell_one_agent(made: Farm, rest: float) -> None:
    """A real `agent serve` that has nothing to do."""
    home = os.path.join(made.folder, "alone")
    make_agent(home, ALONE, *made.credentials(ALONE))
    with started([WAYSTATION, "agent", "serve", "--home", home]) as (pid, _):
        time.sleep(1.0)
        before = cpu_seconds(pid)
        time.sleep(rest)
        used, memory = cpu_seconds(pid) - before, resident(pid)
    print(f"one `agent serve` at rest: {mega(memory)} resident, {milli(used)} ms of CPU in {rest:.0f} s")


def tell_machine(folder: str) -> None:
    """What this machine needs for things that no design saves: the unit of everything below."""
    sync = [_timed_sync(os.path.join(folder, "sync")) for _ in range(50)]
    shell = [run(["sh", "-c", SCRIPT.format(seconds=0)]).seconds for _ in range(20)]
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
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Seconds of processor that the process and its children that were waited for have used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
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
    return milli(sorted(seconds)[int(0.95 * len(seconds))])


def _use_bytecode(folder: str) -> None:
    """As where it is installed: otherwise each command would compile its own sources first."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(folder, "bytecode")


if __name__ == "__main__":
    main()
