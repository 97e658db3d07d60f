"""A forward proxy on loopback, as companies have them: it passes requests on and opens tunnels, or answers by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

_HEAD_MAX = 64 << 10


def without_proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """No variable of the environment is about proxies any more; what sets one."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch.setenv


@dataclass
class ForwardProxy:
    """`asked` lists the first line of each connection, `credentials` what came as Proxy-Authorization."""

    port: int = 0
    answer: bytes = b""
    """A whole HTTP answer that everything gets; without one, requests are passed on."""
    asked: list[str] = field(default_factory=list)
    credentials: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            self.asked.append(first)
            self.credentials += [line.partition(": ")[2] for line in lines if line.startswith("Proxy-Authorization")]
            if self.answer:
                writer.write(self.answer)
                await writer.drain()
            else:
                await self._pass_on(first, lines, reader, writer)
        writer.close()

    async def _pass_on(
        self, first: str, lines: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        method, target, version = first.split(" ")
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        there, back = await asyncio.open_connection(url.hostname, url.port)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = target.partition("//")[2].partition("/")[2]
            kept = [line for line in lines if not line.lower().startswith(("proxy-", "connection"))]
            head = "\r\n".join([f"{method} /{path} {version}", "Connection: close", *kept, "", ""])
            back.write(head.encode("latin-1"))
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await source.read(_HEAD_MAX):
            sink.write(piece)
            await sink.drain()
    with suppress(OSError):
        sink.close()


def plain_answer(status: int, body: bytes = b"<html>proxy</html>", **headers: str) -> bytes:
    """As a proxy's own page."""
    told = {"Content-Type": "text/html", "Content-Length": str(len(body)), "Connection": "close"}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} Proxy", *(f"{name}: {value}" for name, value in told.items()), "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def forward_proxy(answer: bytes = b"") -> AsyncIterator[ForwardProxy]:
    made = ForwardProxy(answer=answer)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
