"""webshop: a small web application to deploy. It needs aiohttp, which is there where an agent is.

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
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from aiohttp import web

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

    async def serve(self, host: str, port: int, stop: asyncio.Event) -> None:
        app = web.Application()
        app.add_routes([web.get("/{page:|version|health}", self._answer)])
        runner = web.AppRunner(app, shutdown_timeout=FINISH_SECONDS, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, host, port, backlog=512).start()
        print(f"webshop {self.version} at {host}:{port}", flush=True)
        await stop.wait()
        self._stopping = True
        await runner.cleanup()
        print(f"webshop {self.version} has ended", flush=True)

    async def _answer(self, request: web.Request) -> web.Response:
        page = request.match_info["page"]
        if not page:
            await asyncio.sleep(self._work)
        pages = {"": f"The shop, version {self.version}, on {self._name}\n", "health": "ok\n"}
        status, text = 200, pages.get(page, f"{self.version}\n")
        if self.broken:
            status, text = 500, f"version {self.version} is broken\n"
        response = web.Response(status=status, text=text, headers={"X-Version": self.version})
        if self._stopping:
            response.force_close()
        return response


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
