"""How fast is the road? Adding, replicating, and pulling to a verified, synced tree, beside what people do today.

Run: python -m benchmarks.road [--runs N] [--megabytes N]
Both ways of bringing a package onto a machine end alike: every byte checked, every file on disk, synced.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.programs import Served, nginx, peak_memory, relay, run, until_told, waystation
from benchmarks.support.workload import installed_files, real_package

AGENTS = 50


@dataclass(frozen=True, slots=True)
class Package:
    """A package under measurement. Sizes in bytes."""

    id: str
    version: str
    file: str
    size: int
    content: int


def main() -> None:
    """Measure and print; docs say how to read it."""
    options = _options()
    print(f"{os.cpu_count()} cores; {options.runs} runs, median (min to max); MB are 10^6 bytes")
    with tempfile.TemporaryDirectory(prefix="waystation-bench-", dir=options.folder) as folder:
        home = os.path.join(folder, "home")
        waystation("trust", "init", home=home)
        for file in _packages(folder, home, options.megabytes):
            measure(Package(*_described(file, home, folder)), home, folder, options.runs)
        measure_agents(_large(folder), home, folder)


def measure(package: Package, home: str, folder: str, runs: int) -> None:
    """Every figure of one package."""
    print(f"\n{package.id} {package.version}: nupkg {mega(package.size)}, tree {mega(package.content)}")
    added = [_add(package, home, folder) for _ in range(runs)]
    tell("package add, until it is usable", [usable for usable, _ in added], package.content)
    tell("  and its nupkg proved", [proved for _, proved in added], package.content)
    replicated = [_replicate(package, home, folder) for _ in range(runs)]
    tell("package replicate (one relay, loopback)", replicated, package.content)
    with relay(os.path.join(folder, "relay")) as served, nginx(folder, folder) as peer:
        waystation("package", "add", package.file, home=home)
        waystation("package", "replicate", package.id, package.version, "--relay", served.url, home=home)
        inside: list[float] = []
        ours, theirs = in_turn(
            lambda n: _pull(package, served, home, folder, n, inside),
            lambda n: _classic(package, peer, folder, n),
            runs,
        )
    tell("agent pull to a verified, synced tree", ours, package.content)
    tell("  of that, inside the started process", inside[1:], package.content)
    tell("curl, sha512sum -c, unzip, sync", theirs, package.content)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(f"  curl's way takes {spread(ratios, '.2f')} times as long, pair by pair")
    shutil.rmtree(os.path.join(folder, "relay"))


def measure_agents(file: str, home: str, folder: str) -> None:
    """Peak memory of a relay that 50 agents pull from at once, with tokens."""
    config = os.path.join(folder, "relay.yaml")
    origin = _token("write", config, home, folder)
    agents = [_token("agent", config, home, folder) for _ in range(AGENTS)]
    package = Package(*_described(file, home, folder))
    waystation("package", "add", file, home=home)
    with relay(os.path.join(folder, "relay50"), "--config", config) as served:
        words = ("--relay", served.url, "--token-file", origin)
        waystation("package", "replicate", package.id, package.version, *words, home=home)
        before = peak_memory(served.pid)
        seconds = asyncio.run(_pull_many(package, served, agents, home, folder))
        peak = peak_memory(served.pid)
    print(f"\n{AGENTS} agents at once, {mega(package.content)} each: {seconds:.1f} s,", end=" ")
    print(f"{AGENTS * package.content / seconds / 1e6:.0f} MB/s in all")
    print(f"  relay's peak memory: {peak / 1e6:.0f} MB (after replication alone: {before / 1e6:.0f} MB)")


def in_turn(
    first: Callable[[int], float], second: Callable[[int], float], runs: int
) -> tuple[list[float], list[float]]:
    """A B A B …, after one of each that does not count: a machine whose speed drifts is fair to both."""
    pairs = [(first(n), second(n)) for n in range(runs + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _add(package: Package, home: str, folder: str) -> tuple[float, float]:
    """Seconds until the command tells that it was added, and until it ends."""
    depot = os.path.join(folder, "depot-add")
    os.sync()
    seconds = until_told([*_command(), "package", "add", package.file, "--depot", f"disk:{depot}"], home=home)
    shutil.rmtree(depot)
    return seconds


def _replicate(package: Package, home: str, folder: str) -> float:
    waystation("package", "add", package.file, home=home)
    store = os.path.join(folder, "relay-replicate")
    os.sync()
    with relay(store) as served:
        words = ("package", "replicate", package.id, package.version, "--relay", served.url)
        _, document = waystation(*words, home=home)
    shutil.rmtree(store)
    return float(document["relays"][0]["seconds"])


def _pull(package: Package, served: Served, home: str, folder: str, number: int, inside: list[float]) -> float:
    root, agent_home = os.path.join(folder, "ours"), os.path.join(folder, f"agent-{package.id}-{number}")
    trust = os.path.join(home, "trust", "trust.json")
    words = ("--home", agent_home, "--relay", served.url)
    waystation("agent", "init", *words, "--trust", trust, home=home)
    os.sync()
    seconds, document = waystation("agent", "pull", package.id, package.version, "--root", root, *words, home=home)
    shutil.rmtree(root)
    shutil.rmtree(agent_home)
    inside.append(float(document["seconds"]))
    return seconds


def _classic(package: Package, peer: Served, folder: str, number: int) -> float:
    target = os.path.join(folder, f"classic-{number}")
    os.mkdir(target)
    name = os.path.basename(package.file)
    digest = run(["sha512sum", package.file]).output.split()[0]
    with open(os.path.join(target, "sums"), "w", encoding="ascii") as file:
        file.write(f"{digest}  {name}\n")
    quoted = shlex.quote(name)
    steps = (
        f"curl -sSf -o {quoted} {peer.url}/{quoted} && sha512sum --quiet -c sums && unzip -q -d tree {quoted} && sync"
    )
    os.sync()
    seconds = run(["sh", "-c", steps], cwd=target).seconds
    shutil.rmtree(target)
    return seconds


async def _pull_many(package: Package, served: Served, tokens: Sequence[str], home: str, folder: str) -> float:
    """50 agents in one process, each with a home and a root of its own; their CPU is not the relay's."""
    import time

    from agent.relays.sources import Sources
    from agent.trees.installed import AgentState
    from agent.trees.pull import parse_request, pull
    from relay.trust.keys import parse_pins

    pins = parse_pins(Path(home, "trust", "trust.json").read_bytes())

    async def one(number: int) -> None:
        agent_home = os.path.join(folder, f"a{number}")
        os.mkdir(agent_home)
        state = AgentState(agent_home)
        request = parse_request(package.id, package.version, os.path.join(agent_home, "root"), None, switch=False)
        known = Path(agent_home, "relays.json")
        async with Sources(state.config(), known, relays=[served.url], token_file=tokens[number]) as sources:
            await pull(request, state, sources, pins)

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(AGENTS)))
    return time.perf_counter() - started


def _packages(folder: str, home: str, megabytes: int) -> list[str]:
    """Real ones first, then a large one of installed files; all lie in `folder`, where nginx serves them."""
    found = []
    for name in ("Shop.Web.1.0.0.nupkg", "microsoft.aspnetcore.app.runtime.linux-x64.10.0.14.nupkg"):
        path = real_package(name)
        if path is None:
            print(f"({name} is not beside the project: left out)")
            continue
        found.append(shutil.copy(path, folder))
    source = os.path.join(folder, "installed")
    installed_files(source, megabytes * 1_000_000)
    large = _large(folder)
    words = ["package", "pack", source, "--id", "Installed.Files", "--version", "1.0.0", "--output", large]
    run([*_command(), *words], home=home)
    shutil.rmtree(source)
    return [*found, large]


def _large(folder: str) -> str:
    return os.path.join(folder, "Installed.Files.1.0.0.nupkg")


def _described(file: str, home: str, folder: str) -> tuple[str, str, str, int, int]:
    depot = f"disk:{os.path.join(folder, 'described')}"
    _, document = waystation("package", "add", file, "--depot", depot, home=home)
    entry = document["packages"][0]
    _, shown = waystation("package", "show", entry["id"], entry["version"], "--depot", depot, home=home)
    return entry["id"], entry["version"], file, entry["size"], shown["tree_bytes"]


def _token(scope: str, config: str, home: str, folder: str) -> str:
    """The path of a file with a new token: each agent has one of its own, as in earnest."""
    descriptor, path = tempfile.mkstemp(prefix="token-", dir=folder)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(run([*_command(), "relay", "token", scope, "--config", config], home=home).output)
    return path


def _command() -> list[str]:
    from benchmarks.support.programs import WAYSTATION

    return [WAYSTATION]


def tell(what: str, seconds: Sequence[float], content: int) -> None:
    """One line: seconds, and content per second."""
    rate = content / statistics.median(seconds) / 1e6
    print(f"  {what:42} {spread(seconds, '.3f')} s   {rate:6.0f} MB/s of content")


def spread(values: Sequence[float], form: str) -> str:
    """Median, and how far the runs lay apart."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def mega(count: int) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:.1f} MB"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.road", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the large package's tree")
    parser.add_argument("--folder", default=None, help="where to work [default: the system's temporary folder]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
