"""The whole road as real processes: an origin, relays and machines, each the command `waystation` and nothing else.

What is asked of a command is read from its `--json`. A process is ended through its own handle, never by a name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from orchestrator.depot.depot import open_depot
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest
from relay.stores.open import open_reader

WAYSTATION = Path(sys.executable).with_name("waystation")
"""The command as it is installed beside this interpreter."""

START_SECONDS = 30.0
RUN_SECONDS = 180.0
"""No command of a test takes longer, unless it hangs."""


class CommandFailedError(AssertionError):
    """A command ended otherwise than it should have."""

    def __init__(self, words: Sequence[str], code: int, errors: str) -> None:
        super().__init__(f"waystation {' '.join(words)}: exit status {code}\n{errors[-4000:]}")
        self.code = code
        self.errors = errors


class Command:
    """One `waystation …  --json` under way."""

    def __init__(self, home: Path, *words: str) -> None:
        self.words = words
        self._process = subprocess.Popen(
            [WAYSTATION, *words, "--json"],
            env={**os.environ, "WAYSTATION_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken everything back.

        Raises:
            CommandFailedError: there was nothing left to kill.
        """
        self._process.kill()
        _, errors = self._process.communicate(timeout=RUN_SECONDS)
        if self._process.returncode != -signal.SIGKILL:
            raise CommandFailedError(self.words, self._process.returncode, errors)

    def result(self) -> Any:
        """Wait for its end; the document that it printed.

        Raises:
            CommandFailedError: the exit status is not 0.
        """
        try:
            output, errors = self._process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        if self._process.returncode:
            raise CommandFailedError(self.words, self._process.returncode, errors)
        return json.loads(output)

    def end(self) -> None:
        """Make sure that it is gone, however it went."""
        if self.is_alive:
            self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class RelayProcess:
    """`waystation relay serve` over `folder`/store. It keeps its port from one start to the next."""

    def __init__(self, folder: Path, site: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.store = f"disk:{folder / 'store'}"
        self.port = 0
        self._site = site
        self._log = folder / "relay.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the relay does not run"
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start it, and wait until it says that it is ready."""
        words = ["relay", "serve", "--listen", f"127.0.0.1:{self.port}", "--store", self.store]
        if self._site:
            words += ["--site", self._site]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [WAYSTATION, *words],
                env={**os.environ, "WAYSTATION_HOME": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: not self.is_alive or b"ready at" in self._log.read_bytes(), START_SECONDS)
        said = self._log.read_text()
        if not self.is_alive:
            raise CommandFailedError(words, self._process.returncode, said)
        self.port = int(said.split("ready at ")[1].split()[0].rpartition(":")[2])
        return self

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken everything back."""
        assert self._process is not None
        self._process.kill()
        assert self._process.wait(RUN_SECONDS) == -signal.SIGKILL, "there was nothing left to kill"

    def stop(self) -> None:
        """SIGTERM where it still runs, as an operator would."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(RUN_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def wipe(self) -> None:
        """Stop it and forget what it stored: as many bytes as a whole package each time."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class OriginHome:
    """A Waystation home with keys and a depot: where packages enter."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run("trust", "init")

    @property
    def pins(self) -> Path:
        """What every machine is given: trust.json."""
        return self.home / "trust" / "trust.json"

    def run(self, *words: str) -> Any:
        return Command(self.home, *words).result()

    def add(self, *nupkgs: str | os.PathLike[str]) -> list[dict[str, Any]]:
        added: list[dict[str, Any]] = self.run("package", "add", *map(str, nupkgs))["packages"]
        return added

    def replicating(self, id: str, version: str, *relays: str) -> Command:
        urls = [word for url in relays for word in ("--relay", url)]
        return Command(self.home, "package", "replicate", id, version, *urls)

    def replicate(self, id: str, version: str, *relays: str) -> dict[str, dict[str, Any]]:
        """The ledger of each relay, by URL."""
        document = self.replicating(id, version, *relays).result()
        return {entry["relay"]: entry for entry in document["relays"]}

    async def manifest(self, id: str, version: str) -> Manifest:
        """As the depot keeps it, read past all commands."""
        ref = PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
        async with open_depot(f"disk:{self.home / 'depot'}") as depot:
            return await depot.manifest(depot.catalog.get(ref))


@dataclass(frozen=True)
class Machine:
    """A machine with an agent: its home, and the root under which trees stand."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, pins: Path) -> Machine:
        """A new machine that believes `pins`."""
        machine = cls(folder)
        folder.mkdir(parents=True)
        Command(machine.home, "agent", "init", "--trust", str(pins), "--name", folder.name).result()
        return machine

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def pulling(self, id: str, version: str, *relays: str, digest: str = "") -> Command:
        words = [word for url in relays for word in ("--relay", url)]
        if digest:
            words += ["--digest", digest]
        return Command(self.home, "agent", "pull", id, version, "--root", str(self.root), *words)

    def pull(self, id: str, version: str, *relays: str) -> dict[str, Any]:
        document: dict[str, Any] = self.pulling(id, version, *relays).result()
        return document

    def verified(self) -> list[str]:
        """`ID VERSION` of each installed tree, after every byte of it was compared with its manifest."""
        trees = Command(self.home, "agent", "verify").result()["trees"]
        return [f"{tree['package']} {tree['version']}" for tree in trees if not tree["differences"]]


async def check_store(location: str, manifest: Manifest) -> None:
    """Read every chunk of `manifest` out of a store, from outside of the relay that serves it.

    Raises:
        ChunkMissing, ChunkInvalid: one is not there, or not whole.
    """
    reader = await open_reader(location)
    try:
        for id in manifest.chunk_ids():
            await reader.get(id)
    finally:
        await reader.close()


def wait_until(holds: Callable[[], bool], seconds: float, pause: float = 0.002) -> None:
    """Look again and again until `holds`.

    Raises:
        TimeoutError: it still does not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(pause)
