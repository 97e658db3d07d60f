"""Nupkgs whose parts come from known encoders, and relays with engines: what tests of the identical nupkg share."""

from __future__ import annotations

import os
import platform
import sys
import zipfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from harness.paths import SHARED
from harness.support import RELAY_LIMITS, Relay, nuspec
from relay.config import Engine, RelayConfig
from relay.server.app import start

DATA = SHARED
"""Real packages and engines, where somebody put them beside the project."""
ENGINES = DATA / "engines"
PACKAGES = DATA / "packages"

needs_engines = pytest.mark.skipif(
    len(list(ENGINES.glob("*.so"))) != 2 or platform.machine() != "x86_64" or sys.platform != "linux",
    reason="no real packages or engines in ../shared/data, or not linux-x64",
)


def deflated(
    folder: str | os.PathLike[str],
    files: Mapping[str, bytes],
    id: str = "Acme.Web",
    version: str = "1.0.0",
    level: int = 6,
) -> str:
    """A nupkg of `files` by Python's zipfile: at level 6 classic zlib made it, at 1 no encoder of ours did. Its path."""
    path = os.path.join(folder, f"{id}.{version}.nupkg")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{id}.nuspec"), nuspec(id, version))
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, level)
    return path


def words(seed: int, size: int) -> bytes:
    """Words that deflate to about the half, and otherwise at each level."""
    random = Random(seed)
    known = [random.randbytes(random.randrange(2, 9)).hex().encode() for _ in range(3000)]
    return b" ".join(random.choices(known, k=size // 4))[:size]


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
