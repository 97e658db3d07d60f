"""Machines with an agent: those that a release is deployed to (`agent serve`), and those that a person calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from harness.process import Process, run, wait_for


@dataclass
class Agent:
    """A machine: `home` is its agent's, `root` what the release deploys to."""

    name: str
    site: str
    home: Path
    root: Path
    key: str
    relays: tuple[str, ...]
    how: dict[str, Any] = field(default_factory=dict)
    """How its processes are started, as for `Process`."""
    process: Process | None = None

    @property
    def said(self) -> str:
        """What its newest process has printed so far."""
        return self._running.out + self._running.err

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def _running(self) -> Process:
        assert self.process is not None, f"{self.name} was never started"
        return self.process

    def spawn(self) -> None:
        """Start `agent serve`, and do not wait until it is ready."""
        words = ("agent", "serve", "--home", self.home)
        self.process = Process(self.home, *words, **{"new_session": True} | self.how)

    def start(self) -> Self:
        """Start `agent serve`, and wait until a relay has answered it."""
        self.spawn()
        wait_for(lambda: " ready at " in self.said or not self._running.is_alive)
        assert self._running.is_alive, self.said
        return self

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it back."""
        self._running.kill()

    def stop(self) -> None:
        """SIGTERM where it runs."""
        if self.process is not None and self.process.is_alive:
            self.process.stop()

    def status(self) -> Any:
        return run(self.home, "agent", "status", "--home", self.home, "--json").json


@dataclass(frozen=True)
class Machine:
    """A machine onto which packages are pulled by hand: its home, and the root under which trees stand."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, pins: Path) -> Machine:
        """A new machine that believes `pins`."""
        machine = cls(folder)
        folder.mkdir(parents=True)
        assert run(machine.home, "agent", "init", "--trust", pins, "--name", folder.name).code == 0
        return machine

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def pulling(self, id: str, version: str, *relays: str, digest: str = "") -> Process:
        words = [word for url in relays for word in ("--relay", url)]
        if digest:
            words += ["--digest", digest]
        return Process(self.home, "agent", "pull", id, version, "--root", self.root, *words, "--json")

    def pull(self, id: str, version: str, *relays: str) -> dict[str, Any]:
        document: dict[str, Any] = self.pulling(id, version, *relays).result().json
        return document

    def verified(self) -> list[str]:
        """`ID VERSION` of each installed tree, after every byte of it was compared with its manifest."""
        trees = run(self.home, "agent", "verify", "--json").json["trees"]
        return [f"{tree['package']} {tree['version']}" for tree in trees if not tree["differences"]]
