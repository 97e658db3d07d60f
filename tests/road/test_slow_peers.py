"""Hundreds of peers that send and read as slowly as they may, from many addresses, beside one that is in a hurry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.packages import cut_package, noise
from harness.relays import RelayProcess
from harness.seed import SOAK

from relay.protocol import messages
from relay.stores.memory import MemoryChunks
from relay.transfer.replicate import replicate

pytestmark = [
    pytest.mark.soak,
    pytest.mark.processes,
    pytest.mark.skipif(not SOAK, reason="900 slow peers: make soak"),
    pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is this machine's"),
]

PEERS = 900
PEERS_PER_ADDRESS = 60
SECONDS = 10.0
"""For which the good client asks."""
RELAY_BYTES = 256 << 20
P99_SECONDS = 1.0
AT_ONCE = 1_000_000
"""Bytes that a slow sender sends before it begins to dawdle."""
PACKAGE = cut_package({f"lib/{i}.dll": noise(i, 2_000_000) for i in range(16)})
OTHER = cut_package({"lib/x.dll": noise("x", 100_000)}, version="9.0.0")
EVERY = json.dumps(
    {"want": [{"manifest": PACKAGE.manifest.id, "ranges": [[0, len(PACKAGE.manifest.chunks)]]}]}
).encode()

# In a process of its own: how long it waits is to be the relay's doing, not that of the slow peers' process.
GOOD = """
import http.client, json, sys, time
port, seconds = int(sys.argv[1]), float(sys.argv[2])
connection = http.client.HTTPConnection("127.0.0.1", port, source_address=("127.0.0.200", 0))
took, end = [], time.monotonic() + seconds
while time.monotonic() < end:
    asked = time.perf_counter()
    connection.request("GET", "/v1/packages")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    took.append(time.perf_counter() - asked)
    time.sleep(0.01)
print(json.dumps(sorted(took)))
"""


@dataclass(frozen=True)
class Slow:
    """What a slow peer asks for, the body that it begins with, and what it adds each second; then it reads nothing."""

    request: str
    type: str = messages.JSON
    length: int | None = None
    body: bytes = b""
    drip: bytes = b""

    @property
    def head(self) -> bytes:
        lines = [f"{self.request} HTTP/1.1", "Host: localhost", f"Content-Type: {self.type}"]
        lines += [] if self.length is None else [f"Content-Length: {self.length}"]
        return "\r\n".join([*lines, "", ""]).encode()


def slow_peers(lease: str) -> Iterator[Slow]:
    text, more = b'{"want": "' + b"x" * AT_ONCE, b"x" * 64_000
    for path in (messages.MISSING, messages.ORDERS, "/v1/agents/a/reports", "/v1/agents/a/logs"):
        yield Slow(f"POST {path}", length=16 << 20, body=text, drip=more)
    yield Slow("POST /v1/agents/a/poll", length=128 << 10, body=text[: 100 << 10], drip=b"x" * 1000)
    manifest = f"PUT /v1/manifests/sha256:{'0' * 64}"
    yield Slow(manifest, messages.DOCUMENT_TYPE, 18 << 20, b"x" * AT_ONCE, more)
    yield Slow(f"PUT {messages.BUNDLE_IN}?lease={lease}", messages.BUNDLE_TYPE, 64 << 20, b"WAYBNDL1")
    yield Slow(f"PUT {messages.LINE}", "application/octet-stream", 64 << 20, b"x" * AT_ONCE, more)
    yield Slow(f"GET {messages.LINE}?bytes={64 << 20}")
    yield Slow(f"POST {messages.BUNDLE_OUT}", length=len(EVERY), body=EVERY)
    yield Slow(f"GET /v1/chunks/{PACKAGE.manifest.chunk_id(1)}")
    yield Slow(f"GET {messages.PACKAGES}")


async def dawdle(port: int, address: str, slow: Slow) -> None:
    """Again and again, for as long as the relay lets it."""
    while True:
        with contextlib.suppress(OSError, RuntimeError):
            # A small buffer, so that it is the relay that holds what is not read.
            _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0), limit=1024)
            try:
                writer.write(slow.head + slow.body)
                while True:
                    await writer.drain()
                    await asyncio.sleep(1.0)
                    writer.write(slow.drip)
            finally:
                writer.close()
        await asyncio.sleep(0.1)


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[tuple[RelayProcess, str]]:
    with RelayProcess(tmp_path / "relay") as running:
        source = MemoryChunks()
        await source.put_many(list(PACKAGE.chunks.values()))
        from relay.protocol.client import RelayClient

        async with RelayClient(running.url) as client:
            await replicate(PACKAGE.manifest, b"", source, client)
            lease = (await client.offer(OTHER.manifest, b"")).lease
        yield running, lease


def memory(pid: int, what: str) -> int:
    """Bytes, as proc_pid_status(5) tells."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


async def test_900_slow_peers_cost_a_good_one_less_than_a_second_and_the_relay_less_than_256_mib(
    relay: tuple[RelayProcess, str],
) -> None:
    running, lease = relay
    kinds: list[Slow] = list(slow_peers(lease))
    address: Callable[[int], str] = lambda i: f"127.0.0.{2 + i // PEERS_PER_ADDRESS}"  # noqa: E731
    async with asyncio.TaskGroup() as group:
        peers = [group.create_task(dawdle(running.port, address(i), kinds[i % len(kinds)])) for i in range(PEERS)]
        await asyncio.sleep(1.0)
        good = await asyncio.create_subprocess_exec(
            sys.executable, "-c", GOOD, str(running.port), str(SECONDS), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await good.communicate()
        for peer in peers:
            peer.cancel()
    took = json.loads(out)
    peak = memory(running.pid, "VmHWM")
    print(f"{len(took)} requests, p99 {took[len(took) * 99 // 100]:.3f} s, peak {peak >> 20} MiB")
    assert took[len(took) * 99 // 100] < P99_SECONDS
    assert peak < RELAY_BYTES
