"""webshop: a small web application to deploy. Python's standard library alone.

    /          the shop, after as much work as --work says
    /version   what stands in version.txt of its package, as it was when this process started
    /health    "ok"

HTTP/1.1 with connections that are kept. On SIGTERM it takes no new requests, finishes those that run, and ends with 0.
A package that holds a file `broken` answers everything with 500: for showing what a bad version does.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import TextIO

PACKAGE = Path(__file__).resolve().parents[1]
FINISH_SECONDS = 10.0


class Shop:
    """The application; `version` and `broken` as its package has them."""

    def __init__(self, name: str, work: float) -> None:
        self.version = (PACKAGE / "version.txt").read_text(encoding="utf-8").strip()
        self.broken = (PACKAGE / "broken").exists()
        self._name = name
        self._work = work
        self._stopping = False
        self._idle: set[StreamWriter] = set()
        self._visits: set[asyncio.Task[None]] = set()

    async def serve(self, host: str, port: int, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._begin, host, port, backlog=512)
        print(f"webshop {self.version} at {host}:{port}", flush=True)
        await stop.wait()
        self._stopping = True
        server.close()
        for writer in self._idle:
            writer.close()
        if self._visits:
            await asyncio.wait(self._visits, timeout=FINISH_SECONDS)
        print(f"webshop {self.version} has ended", flush=True)

    def _begin(self, reader: StreamReader, writer: StreamWriter) -> None:
        visit = asyncio.get_running_loop().create_task(self._visit(reader, writer))
        self._visits.add(visit)
        visit.add_done_callback(self._visits.discard)

    async def _visit(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while not self._stopping:
                self._idle.add(writer)
                head = await reader.readuntil(b"\r\n\r\n")
                self._idle.discard(writer)
                status, body = await self._answer(head)
                stays = (
                    not self._stopping and status != HTTPStatus.BAD_REQUEST and b"connection: close" not in head.lower()
                )
                writer.write(self._encoded(status, body, stays=stays))
                await writer.drain()
                if not stays:
                    return
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            return  # The visitor has gone, or talks nonsense.
        finally:
            self._idle.discard(writer)
            writer.close()

    async def _answer(self, head: bytes) -> tuple[HTTPStatus, str]:
        method, _, rest = head.decode("latin-1").partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method != "GET":
            return HTTPStatus.BAD_REQUEST, "only GET is spoken here\n"
        if path not in {"/", "/version", "/health"}:
            return HTTPStatus.NOT_FOUND, "there is no such page\n"
        if path == "/":
            await asyncio.sleep(self._work)
        if self.broken:
            return HTTPStatus.INTERNAL_SERVER_ERROR, f"version {self.version} is broken\n"
        pages = {"/": f"The shop, version {self.version}, on {self._name}\n", "/health": "ok\n"}
        return HTTPStatus.OK, pages.get(path, f"{self.version}\n")

    def _encoded(self, status: HTTPStatus, body: str, *, stays: bool) -> bytes:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            "Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body.encode())}\r\n"
            f"X-Version: {self.version}\r\n"
            f"Connection: {'keep-alive' if stays else 'close'}\r\n\r\n"
        )
        return (head + body).encode()


def only_one(path: Path) -> TextIO | None:
    """The pid file, locked for as long as this process lives; None where another holds it."""
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


async def main() -> int:
    parser = argparse.ArgumentParser(description="The demo's web application.")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--pid-file", required=True, type=Path)
    parser.add_argument("--name", default="", help="of this machine")
    parser.add_argument("--work", type=float, default=0.0, help="seconds that the shop takes for a page")
    parser.add_argument("--boot", type=float, default=0.0, help="seconds until it listens")
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    held = only_one(arguments.pid_file)
    if held is None:
        print(f"another one runs: {arguments.pid_file} is locked", file=sys.stderr)
        return 1
    with held:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), arguments.boot)
        await Shop(arguments.name, arguments.work).serve(host, int(port), stop)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
