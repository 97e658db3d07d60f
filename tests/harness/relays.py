"""Relays in this process, and as processes of their own (`waystation relay serve`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
from aiohttp import web

from harness.process import Done, Process
from relay.config import Engine, RelayConfig, TokenRecord
from relay.package.manifest import Manifest
from relay.protocol.client import RelayClient
from relay.protocol.connection import ClientLimits, Connection
from relay.protocol.mail_client import MailClient
from relay.server.app import start
from relay.server.http.connection import Limits
from relay.server.http.tokens import make_token
from relay.stores.open import open_reader

CLIENT_LIMITS = ClientLimits(connect_seconds=2.0, answer_seconds=20.0, window_seconds=10.0, window_bytes=1)
"""For clients in tests: nobody waits a minute to learn that something hangs."""
RELAY_LIMITS = Limits(linger_seconds=0.2, drain_seconds=2.0)
"""For relays in tests: they stop soon."""


@dataclass(frozen=True)
class Relay:
    """A relay that answers in this process."""

    url: str
    port: int
    store: str
    """Its location, to look into it from outside."""

    def client(self, token: str | None = None, limits: ClientLimits = CLIENT_LIMITS) -> RelayClient:
        return RelayClient(self.url, token=token, limits=limits)

    def mail(
        self, token: str | None = None, limits: ClientLimits = CLIENT_LIMITS
    ) -> AbstractAsyncContextManager[MailClient]:
        return mail_client(self.url, token=token, limits=limits)


@asynccontextmanager
async def mail_client(
    url: str, *, token: str | None = None, limits: ClientLimits = CLIENT_LIMITS
) -> AsyncIterator[MailClient]:
    """The mail of a relay, over a connection of its own."""
    async with Connection(url, token=token, limits=limits) as connection:
        yield MailClient(connection)


@asynccontextmanager
async def running_relay(
    store: str | os.PathLike[str],
    *,
    site: str = "",
    tokens: Sequence[TokenRecord] = (),
    limits: Limits | None = None,
    port: int = 0,
) -> AsyncIterator[Relay]:
    """The whole relay, in this process, on loopback: `store` is a folder or a location. Leaving stops it (drained)."""
    name = os.fspath(store)
    location = name if ":" in name else f"disk:{os.path.abspath(name)}"
    config = RelayConfig(
        listen=f"127.0.0.1:{port}", store=location, site=site, tokens=[msgspec.to_builtins(record) for record in tokens]
    )
    async with AsyncExitStack() as stack:
        running = await start(config, limits or RELAY_LIMITS, stack)
        yield Relay(running.url, running.port, location)


def token(*scopes: str, agent: str = "") -> tuple[str, TokenRecord]:
    """A bearer token's text, and the record for `running_relay(tokens=[…])`."""
    return make_token(scopes, datetime.now(UTC), name=" ".join(scopes), agent=agent)


@asynccontextmanager
async def relay_with(store: str | os.PathLike[str], *engines: Path, **config: Any) -> AsyncIterator[Relay]:
    """A relay in this process with engine files (or folders of them), and more of its configuration."""
    location = f"disk:{os.path.abspath(store)}"
    named = [Engine(str(path)) for path in engines]
    async with AsyncExitStack() as stack:
        running = await start(
            RelayConfig(listen="127.0.0.1:0", store=location, engines=named, **config), RELAY_LIMITS, stack
        )
        yield Relay(running.url, running.port, location)


@asynccontextmanager
async def small_server(routes: Iterable[web.RouteDef], address: str = "127.0.0.1") -> AsyncIterator[str]:
    """A plain aiohttp server that may misbehave as its handlers like; its URL.

    The test is skipped where `address` is not of this machine.
    """
    app = web.Application(client_max_size=1 << 30)
    app.add_routes(routes)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, address, 0).start()
        except OSError as error:
            pytest.skip(f"{address} cannot be listened on: {error}")
        host = f"[{address}]" if ":" in address else address
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


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
