"""A small farm as its people would set it up: an origin, relays, machines with `agent serve`, and the files of a release.

Everything is a real process on loopback; nothing of it outlives the farm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from harness.machines import Agent
from harness.process import Done, Process, run
from harness.relays import RelayProcess

T = TypeVar("T")


class Farm:
    """Use as a context manager."""

    def __init__(self, folder: Path, *, cold: bool = False) -> None:
        """`cold`: every process is started as an interpreter of its own, so that /proc shows what is really its own."""
        self._how = {"cold": cold}
        self.folder = folder
        self.home = folder / "origin"
        self.project = folder / "project"
        (self.project / "environments").mkdir(parents=True)
        self.home.mkdir()
        self.agents: dict[str, Agent] = {}
        self.relays: dict[str, RelayProcess] = {}
        self.urls: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        assert run(self.home, "trust", "init").code == 0
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents.values():
            agent.stop()
        self._stack.close()

    def enter(self, context: AbstractContextManager[T]) -> T:
        """What ends with this farm."""
        return self._stack.enter_context(context)

    # --- the world

    def add_relay(self, site: str, *options: object) -> RelayProcess:
        """A relay without tokens, as loopback allows."""
        relay = self._stack.enter_context(
            RelayProcess(self.folder / f"relay-{site}", "--site", site, *options, **self._how)
        )
        self.relays[site] = relay
        self.urls[site] = relay.url
        return relay

    def add_agent(self, name: str, site: str = "fra", relays: Sequence[str] | None = None, **config: Any) -> Agent:
        """Make a machine; `config` goes into its agent.yaml. It is not started."""
        home = self.folder / "machines" / name
        urls = tuple(relays if relays is not None else [self.urls[site]])
        asked = [word for url in urls for word in ("--relay", url)]
        made = run(
            self.home,
            *("agent", "init", "--home", home, "--name", name, "--site", site, *asked),
            *("--trust", self.home / "trust" / "trust.json", "--json"),
        ).json
        path = home / "agent.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | config, sort_keys=False))
        agent = Agent(name, site, home, self.folder / "srv" / name, made["fingerprint"], urls, dict(self._how))
        self.agents[name] = agent
        return agent

    # --- the files

    def add_package(self, id: str, version: str, files: Mapping[str, str]) -> None:
        """Pack files into a nupkg, and take it into the depot."""
        folder = self.folder / "packed" / f"{id}-{version}"
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        nupkg = self.folder / f"{id}.{version}.nupkg"
        self.do("package", "pack", folder, "--id", id, "--version", version, "--output", nupkg)
        self.do("package", "add", nupkg)

    def write_process(self, **document: Any) -> None:
        """Steps that say nothing of `on_failure` stop: nobody is there who could be asked."""
        document = {"format": 1, "project": "shop"} | document
        document["steps"] = [{"on_failure": "stop"} | step if "roles" in step else step for step in document["steps"]]
        (self.project / "release.yaml").write_text(yaml.safe_dump(document, sort_keys=False))

    def write_environment(self, name: str = "production", **document: Any) -> None:
        """Every relay and agent of this farm, and what is given in addition."""
        relays = {site: {"url": url, "site": site} for site, url in self.urls.items()}
        machines = {
            agent.name: {"address": "127.0.0.1", "site": agent.site, "roles": ["web"], "key": agent.key}
            for agent in self.agents.values()
        }
        for machine, more in document.pop("machines", {}).items():
            machines[machine] |= more
        whole = {"environment": name, "relays": relays, "machines": machines} | document
        (self.project / "environments" / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))

    def write_script(self, path: str, text: str) -> Path:
        """An executable below the project's folder."""
        script = self.project / path
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
        script.chmod(0o755)
        return script

    # --- commands

    def do(self, *words: object, **more: str) -> Done:
        """A command at the origin that must end well."""
        done = self.call(*words, **more)
        assert done.code == 0, f"{' '.join(map(str, words))}: {done.code}\n{done.out}\n{done.err}"
        return done

    def call(self, *words: object, **more: Any) -> Done:
        return self.start(*words, **more).result()

    def start(self, *words: object, **more: Any) -> Process:
        """A command at the origin, in the project's folder."""
        return Process(self.home, *words, **{"cwd": self.project} | self._how | more)

    def deploy(self, label: str, *words: object, **more: Any) -> Done:
        return self.call("release", "deploy", label, "--environment", "production", *words, **more)

    def status(self) -> Any:
        return self.do("release", "status", "--json").json

    def current(self, agent: str) -> str:
        """The version that `current` names on a machine."""
        link = self.agents[agent].root / "current"
        return os.readlink(link).removeprefix("releases/") if link.is_symlink() else ""
