"""Relays as processes of their own: `waystation relay serve`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

from harness.process import Done, Process
from relay.package.manifest import Manifest
from relay.stores.open import open_reader

_READY = "relay ready at "


class RelayProcess:
    """A relay on loopback. It keeps its folder and its port from one start to the next."""

    def __init__(self, home: Path, *options: object, **how: Any) -> None:
        """Say how it is started.

        Args:
            home: its $WAYSTATION_HOME; its store is below it, unless `options` say otherwise.
            options: of the command; without `--listen` or `--config` it takes a free port.
            how: as for `Process`.
        """
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.store = f"disk:{home / 'relay'}"
        """Its location, to look into it from outside."""
        self.port = 0
        self.said = ""
        """The line by which it told that it is ready."""
        self.process: Process | None = None
        self._options = options
        self._how = how

    @property
    def url(self) -> str:
        """As it told it."""
        return self.said.rpartition(" ")[2]

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive

    @property
    def _running(self) -> Process:
        assert self.process is not None, "the relay was never started"
        return self.process

    def start(self) -> Self:
        """Start it, and wait until it says that it is ready."""
        given = {"--listen", "--config"} & set(self._options)
        listen = () if given else ("--listen", f"127.0.0.1:{self.port}")
        self.process = Process(self.home, "relay", "serve", *listen, *self._options, **self._how)
        try:
            self.said = self.process.wait_for_line(_READY)
        except BaseException:
            self.process.end()
            raise
        self.port = int(self.said.rpartition(":")[2])
        return self

    def terminate(self) -> None:
        """Ask it to stop, and do not wait."""
        self._running.terminate()

    def end(self) -> Done:
        """Wait for its end."""
        return self._running.result()

    def stop(self) -> Done:
        """SIGTERM, as an operator would."""
        return self._running.stop()

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken everything back."""
        self._running.kill()

    def wipe(self) -> None:
        """End it and forget what it stored: as many bytes as a whole package each time."""
        self._running.end()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.end()


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
