"""Many agents in one process: each with a home, keys, a journal and sockets of its own, as `agent serve` has them.

Run: python -m benchmarks.support.agents FOLDER   (homes are its folders; prints `ready` when a relay has answered every agent)
"""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import yaml

from agent import platform
from agent.orders.keys import make_agent_keys
from agent.service import Service

THREADS = 4
"""For each agent: a process that serves one alone has at least five."""


def make_agent(home: str, name: str, relay: str, trust: str, token: str) -> str:
    """What `agent init` makes; the fingerprint."""
    identity = make_agent_keys(home)
    with open(os.path.join(home, "agent.yaml"), "w", encoding="utf-8") as file:
        yaml.safe_dump({"name": name, "site": "here", "relays": [relay], "token_file": token}, file)
    with open(trust, "rb") as read, open(os.path.join(home, "trust.json"), "wb") as written:
        written.write(read.read())
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
