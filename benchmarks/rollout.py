"""How fast does a deployment act? From an order to a script's first act, and what a step costs beyond its scripts.

Run: python -m benchmarks.rollout [--agents N] [--steps 1,6] [--rest SECONDS]
One relay is a process; the agents are tasks of one other process, each with a home and sockets of its own; every script
is a process with its runner; deployments are `waystation release deploy`. Scripts print the time when they begin and
when they end, so what is called overhead is everything else: also the start of their own interpreters.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.orders.operation_id import OperationId
from benchmarks.support.agents import make_agent
from benchmarks.support.farm import ALONE, SCRIPT, STEPS, Deployed, Farm, StepKind, chosen, cpu_seconds, deploy, farm
from benchmarks.support.programs import WAYSTATION, run, started
from benchmarks.support.report import add_folder, mega, parser
from orchestrator.journal import events
from orchestrator.journal.events import JournalEntry

_NO_SCRIPTS = ("switch", "verify", "settle")
"""Operations that start no process."""


def main() -> None:
    """Measure and print; docs say how to read it."""
    command = parser("rollout", __doc__)
    command.add_argument("--agents", type=int, default=50)
    command.add_argument("--steps", type=chosen, default=STEPS[:-1], help="by number, such as 1,6; 8 is of 2 s by 20")
    command.add_argument("--rest", type=float, default=20.0, help="seconds that an agent is watched at rest")
    add_folder(command)
    options = command.parse_args()
    print(f"{os.cpu_count()} cores; {options.agents} agents in one process, one relay, loopback; milliseconds")
    with tempfile.TemporaryDirectory(prefix="waystation-bench-", dir=options.folder) as folder:
        _use_bytecode(folder)
        tell_machine(folder)
        with farm(folder, options.agents, options.steps) as made:
            print(f"\nrelay's memory with {options.agents} agents that poll: {mega(resident(made.relay.pid))}")
            deployment = deploy(made)
            tell_steps(made, deployment)
            tell_orders(made, deployment)
            tell_status(made)
            print(f"\nrelay's memory after all this: {mega(resident(made.relay.pid))}")
            tell_one_agent(made, options.rest)


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
    def ideal(self) -> float:
        """What its scripts alone, in its window, would have taken."""
        return self.scripts / (self.kind.window or self.machines)

    @property
    def overhead(self) -> float:
        """For each machine: what the step took longer than that."""
        return (self.whole - self.ideal) / self.machines


def measure_steps(made: Farm, deployment: Deployed) -> list[Measured]:
    """Every step of a deployment, by its journal and by what its scripts printed."""
    logs = made.logs(deployment.ulid)
    return [
        measure(kind, number, deployment.entries, lambda each: own_time(logs, each))
        for number, kind in enumerate(made.kinds, 1)
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
        if step.kind.sleeps:
            print(
                f"    {step.whole:.1f} s; its scripts alone, in this window, {step.ideal:.1f} s: {step.whole / step.ideal:.3f}"
            )


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
    ways = {STEPS[0]: "one at a time", STEPS[2]: "at once"}
    for number, way in ((made.kinds.index(kind) + 1, way) for kind, way in ways.items() if kind in made.kinds):
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
