"""What f8f3ed2 left on disk (tests/data/f8f3ed2), unpacked where a test may work on it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from harness.process import Done, Process, environment, wait_for
from harness.relays import RelayProcess

from relay.main import waystation

DATA = Path(__file__).resolve().parents[1] / "data" / "f8f3ed2"
MADE_IN = "/tmp/waystation-f8f3ed2/made"
"""Where it stood, as it says of itself."""
MACHINES = ("web1", "web2")


@dataclass(frozen=True)
class Agent:
    """Which machine's, and the only relay it is to know. `code` is the environment that makes it yesterday's."""

    machine: str
    relay: RelayProcess
    code: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Yesterday:
    """One copy, its paths as if it had been made in `folder`."""

    folder: Path

    @classmethod
    def unpacked(cls, folder: Path) -> Yesterday:
        for path in sorted(DATA.glob("*.tar.xz")):
            with tarfile.open(path) as archive:
                # Modes are kept, as keys and homes must be private; `data` would not keep those of folders.
                archive.extraction_filter = getattr(tarfile, "tar_filter", None)
                archive.extractall(folder)  # noqa: S202 - our own archives
        copy = cls(folder)
        for machine in MACHINES:
            copy._move_trees(machine)
        return copy

    @property
    def home(self) -> Path:
        """$WAYSTATION_HOME of the origin: depot, keys, journal."""
        return self.folder / "origin"

    @property
    def relay_store(self) -> str:
        return f"disk:{self.folder / 'relay'}"

    def agent_home(self, machine: str) -> Path:
        return self.folder / "machines" / machine

    def root(self, machine: str) -> Path:
        """What releases deploy to on a machine."""
        return self.folder / "srv" / machine

    def starts(self, machine: str) -> list[str]:
        """The version at each start that went well there."""
        return (self.root(machine) / "shared" / "starts").read_text().split()

    def _move_trees(self, machine: str) -> None:
        """Let an agent know its trees where they now are: it keeps their paths, and a name made of their root's."""
        home = self.agent_home(machine)
        for path in (home / "trees").iterdir():
            path.write_text(self._here(path.read_text()))
        for path in list((home / "settled").iterdir()):
            text = self._here(path.read_text())
            path.unlink()
            name = hashlib.sha256(json.loads(text)["root"].encode()).hexdigest()[:40]
            (home / "settled" / f"{name}.json").write_text(text)

    def _here(self, text: str) -> str:
        return text.replace(MADE_IN, str(self.folder))

    # --- commands

    def call(self, *words: object) -> Done:
        """A command of today at the origin, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, environment(self.home, HOME=str(self.folder)), clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = waystation.main([str(word) for word in words], standalone_mode=False)
        return Done(code or 0, out.getvalue(), err.getvalue())

    def json(self, *words: object) -> Any:
        return self.call(*words, "--json").json

    # --- releases

    def release(self, version: str, web1: Agent, web2: Agent) -> Any:
        """Release a version that was built, by yesterday's process; the deployment's status in the end.

        web1 stands in the site fra, web2 in iad, each with one relay: its agent's. Both are to serve already.
        """
        process = self.folder / "project" / "release.yaml"
        process.write_text(self._here(process.read_text()))
        words = ("--process", process, "--environment", self._write_environment(fra=web1, iad=web2))
        return self.json("release", "deploy", version, *words, "--package", f"web={version}", "--adopt")

    def _write_environment(self, **sites: Agent) -> Path:
        """Yesterday's environment, but for where the relays are, and that all is well on all machines."""
        path = self.folder / "project" / "environments" / "production.yaml"
        document = yaml.safe_load(self._here(path.read_text()))
        document["relays"] = {site: {"url": agent.relay.url, "site": site} for site, agent in sites.items()}
        for site, agent in sites.items():
            document["machines"][agent.machine] |= {"site": site, "variables": {"fate": "well"}}
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def build(self, version: str) -> None:
        """Take a new version of the application into the depot: the last one, but for the file that names it."""
        tree = self.folder / "build"
        tree.mkdir()
        current = self.root("web1") / "current"
        for path in sorted(each for each in current.rglob("*") if each.is_file()):
            built = tree / path.relative_to(current)
            built.parent.mkdir(exist_ok=True)
            built.write_bytes(path.read_bytes())
        (tree / "version.txt").write_text(f"{version}\n")
        nupkg = self.folder / f"Acme.Web.{version}.nupkg"
        self.json("package", "pack", tree, "--id", "Acme.Web", "--version", version, "--output", nupkg)
        self.json("package", "add", nupkg)

    # --- machines

    @contextlib.contextmanager
    def agents(self, *agents: Agent) -> Iterator[None]:
        """`agent serve` on some machines until the end of the block."""
        with contextlib.ExitStack() as stack:
            for process in [stack.enter_context(self._started(agent)) for agent in agents]:
                wait_for(lambda p=process: " ready at " in p.out or not p.is_alive)
                assert process.is_alive, process.result()
            yield

    @contextlib.contextmanager
    def _started(self, agent: Agent) -> Iterator[Process]:
        home = self.agent_home(agent.machine)
        words = ("agent", "serve", "--home", home, "--relay", agent.relay.url)
        with Process(home, *words, HOME=str(self.folder), **agent.code) as process:
            yield process
            process.stop()
