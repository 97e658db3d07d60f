"""A relay's host with several addresses, all but one of them dead, as an agent finds it: by SRV, from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from harness.dns import DOMAIN, Srv, dns_server
from harness.process import run
from harness.relays import small_server

from relay.protocol import messages

DEAD = "127.0.0.9"


@contextlib.asynccontextmanager
async def healthy_relay(address: str, asked: list[str]):
    """Answers for its health at this one address, and writes down under which name it was asked; its port."""

    async def health(request: web.Request) -> web.Response:
        asked.append(request.host)
        answer = messages.HealthAnswer(status="ok", versions=(1,), time=0.0)
        return web.Response(body=msgspec.json.encode(answer), content_type=messages.JSON)

    async with small_server([web.get(messages.HEALTH, health)], address) as url:
        yield int(url.rpartition(":")[2])


@pytest.mark.parametrize(
    ("living", "known"),
    [
        ("127.0.0.1", [DEAD, "127.0.0.8", "127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1", "::1"]),
        ("::1", [DEAD, "::1"]),
    ],
    ids=["dead IPv4 first", "dead IPv6", "stale IPv4"],
)
async def test_an_agent_reaches_a_relay_at_whichever_of_its_addresses_lives(
    tmp_path: Path, living: str, known: list[str]
) -> None:
    asked: list[str] = []
    home, config = tmp_path / "home", {"name": "m1", "domain": DOMAIN, "scheme": "http"}
    (home / "agent").mkdir(parents=True)
    async with healthy_relay(living, asked) as port:
        srv, hosts = [Srv(f"_waystation._tcp.{DOMAIN}", f"many.{DOMAIN}", port)], {f"many.{DOMAIN}": known}
        with dns_server(srv, hosts) as server:
            (home / "agent" / "agent.yaml").write_text(json.dumps(config | {"resolver": server.resolver}))
            done = await asyncio.to_thread(run, home, "agent", "relays", "--json")
    assert done.code == 0, done.err
    [relay] = done.json["relays"]
    assert (relay["url"], relay["usable"]) == (f"http://many.{DOMAIN}:{port}", True), relay
    assert set(asked) == {f"many.{DOMAIN}:{port}"}
