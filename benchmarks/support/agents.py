"""Many agents in one process: each with a home, keys, a journal and sockets of its own, as `agent serve` has them.

Run: python -m benchmarks.support.agents FOLDER   (homes are its folders; prints `ready` when a relay has answered every agent)
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from agent import platform
from agent.orders.keys import make_agent_keys
from agent.service import Service

THREADS = 4
"""For each agent: a process that serves one alone has at least five."""


def make_agent(home: str, name: str, relay: str, trust: str, token: str) -> str:
    """What `agent init` makes; the fingerprint."""
    identity = make_agent_keys(home)
    settings = {"name": name, "site": "here", "relays": [relay], "token_file": token}
    Path(home, "agent.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.copyfile(trust, os.path.join(home, "trust.json"))
    return identity.fingerprint


async def serve(homes: list[str]) -> None:
    """Serve all of them until SIGTERM."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    platform.on_termination(loop, stop.set)
    loop.set_default_executor(ThreadPoolExecutor(THREADS * len(homes)))
    waiting = {os.path.basename(home) for home in homes}

    def ready(name: str, _relay: str) -> None:
        waiting.discard(name)
        if not waiting:
            print("ready", flush=True)

    services = [Service(home, on_ready=ready) for home in homes]
    async with asyncio.TaskGroup() as group:
        for service in services:
            group.create_task(service.serve(stop))


def main() -> None:
    """Serve every agent whose home lies in the given folder."""
    folder = sys.argv[1]
    asyncio.run(serve([os.path.join(folder, name) for name in sorted(os.listdir(folder))]))


if __name__ == "__main__":
    main()
