"""A relay, agents that poll it, and a release that `waystation release deploy` brings to them: what rollouts are measured on.

The relay is a process; the agents are tasks of one other process, each with a home and sockets of its own; every script
is a process with its runner.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from agent import platform
from benchmarks.support.agents import make_agent
from benchmarks.support.programs import WAYSTATION, Served, make_tokens, pack, relay, run, started, waystation
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


@dataclass(frozen=True, slots=True)
class StepKind:
    """A step that is measured. `window` None: all machines at once; `sleeps`: seconds of the script on the machine."""

    name: str
    window: int | None
    bracket: bool = False
    deploys: bool = False
    sleeps: int = 0

    @property
    def script(self) -> str:
        return f"long-{self.sleeps}.sh" if self.sleeps else "quick.sh"


STEPS = (
    StepKind("script", 1),
    StepKind("script of 1 s", 10, sleeps=1),
    StepKind("script", None),
    StepKind("before, script, after", 1, bracket=True),
    StepKind("before, script, after", 10, bracket=True),
    StepKind("before, switch, script, verify, settle, after", 1, bracket=True, deploys=True),
    StepKind("before, switch, script of 1 s, verify, settle, after", 10, bracket=True, deploys=True, sleeps=1),
    StepKind("before, switch, script of 2 s, verify, settle, after", 20, bracket=True, deploys=True, sleeps=2),
)
"""All but the last are measured where none are chosen."""


@dataclass(frozen=True, slots=True)
class Farm:
    """A relay, agents that poll it, and the files of a release. `agents` is the pid of their process."""

    folder: str
    relay: Served
    agents: int
    machines: tuple[str, ...]
    tokens: dict[str, str]
    kinds: tuple[StepKind, ...]

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


def chosen(text: str) -> tuple[StepKind, ...]:
    """Those with these numbers, from 1. Raises `ValueError`, `IndexError`."""
    return tuple(STEPS[int(number) - 1] for number in text.split(","))


@contextmanager
def farm(folder: str, agents: int, kinds: tuple[StepKind, ...]) -> Iterator[Farm]:
    """All of it, with agents that a relay has answered."""
    homes, config = os.path.join(folder, "agents"), os.path.join(folder, "relay.yaml")
    machines = tuple(f"m{number:03}" for number in range(agents))
    tokens = make_tokens(config, {"origin": ("write", "order")} | dict.fromkeys((ALONE, *machines), ("agent",)))
    with relay(os.path.join(folder, "relay"), "--config", config) as served:
        made = Farm(folder, served, 0, machines, tokens, kinds)
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
    (project / "environments/quick.sh").write_text(SCRIPT.format(seconds=0), encoding="ascii")
    for kind in made.kinds:
        (project / "deploy" / kind.script).write_text(SCRIPT.format(seconds=kind.sleeps), encoding="ascii")
    process = {
        "format": 1,
        "project": "bench",
        "packages": {"web": "Bench.Web"},
        "steps": [_step(number, kind, made) for number, kind in enumerate(made.kinds, 1)],
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
    script = {"script": f"deploy/{kind.script}"}
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


def deploy(made: Farm, behind: Sequence[str] = ()) -> Deployed:
    """Run the release by the command, behind these words, from nothing to its end."""
    before = _processor(made)
    words = ["release", "deploy", "1.0.0", "--environment", ENVIRONMENT, "--package", "web=1.0.0", "--json"]
    timed = run([*behind, WAYSTATION, *words], home=made.home, cwd=made.project)
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


def cpu_seconds(pid: int) -> float:
    """Seconds of processor that the process and its children that were waited for have used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
