"""A small farm as its people would set it up: an origin, relays, machines with `agent serve`, and the files of a release.

Everything is a real process on loopback; nothing of it outlives the farm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from harness.commands import WAYSTATION, Done, Serving, begin, environment, finish, run, serving

SECONDS = 120.0
READY_SECONDS = 30.0


@dataclass
class Agent:
    """A machine: `home` is its agent's, `root` what the release deploys to."""

    name: str
    site: str
    home: Path
    root: Path
    key: str
    relays: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    """A program and its arguments that start `agent serve` in its turn."""
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def log(self) -> Path:
        return self.home / f"serve-{self.starts}.log"

    def start(self, **more: str) -> Self:
        """Start `agent serve`, and wait until a relay has answered it."""
        self.starts += 1
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.under, WAYSTATION, "agent", "serve", "--home", str(self.home)],
                env=environment(self.home, **(self.variables | more)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        while b" ready at " not in self.log.read_bytes():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{self.name} is not ready: {self.log.read_text()}"
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it back."""
        assert self.process is not None
        self.process.kill()
        assert self.process.wait(SECONDS) == -signal.SIGKILL, "there was nothing left to kill"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(READY_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def status(self) -> Any:
        return run(self.home, "agent", "status", "--home", self.home, "--json").json


class Farm:
    """Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "origin"
        self.project = folder / "project"
        (self.project / "environments").mkdir(parents=True)
        self.home.mkdir()
        self.agents: dict[str, Agent] = {}
        self.relays: dict[str, Serving] = {}
        self.urls: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        assert run(self.home, "trust", "init").code == 0
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents.values():
            agent.stop()
        self._stack.close()

    # --- the world

    def add_relay(self, site: str, *options: object) -> Serving:
        """A relay without tokens, as loopback allows."""
        relay = self._stack.enter_context(serving(self.folder / f"relay-{site}", "--site", site, *options))
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
        agent = Agent(name, site, home, self.folder / "srv" / name, made["fingerprint"], urls)
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
        document = {"format": 1, "project": "shop"} | document
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

    def call(self, *words: object, **more: str) -> Done:
        return finish(self.start(*words, **more), SECONDS)

    def start(self, *words: object, **more: str) -> subprocess.Popen[str]:
        """A command at the origin, in the project's folder."""
        return begin(self.home, *words, cwd=str(self.project), **more)

    def deploy(self, label: str, *words: object, **more: str) -> Done:
        return self.call("release", "deploy", label, "--environment", "production", *words, **more)

    def status(self) -> Any:
        return self.do("release", "status", "--json").json

    def current(self, agent: str) -> str:
        """The version that `current` names on a machine."""
        link = self.agents[agent].root / "current"
        return os.readlink(link).removeprefix("releases/") if link.is_symlink() else ""
