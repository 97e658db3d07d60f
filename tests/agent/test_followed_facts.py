"""An agent that runs for months follows what it was told at its start: its tokens, and where names lead."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import yaml
from harness.dns import DOMAIN, DnsServer, Srv, dns_server
from harness.machines import Agent
from harness.process import run, wait_for
from harness.relays import RelayProcess, mail_client
from harness.seed import SOAK

from relay.server.http.tokens import make_token

pytestmark = pytest.mark.processes

HOST, SRV = f"relay.{DOMAIN}", f"_waystation._tcp.fra._sites.{DOMAIN}"
TTL = ("--local-ttl=1",)
AGENT, RECORD = make_token(["agent"], datetime.now(UTC), name="agents")
ORDER, OTHER = make_token(["order"], datetime.now(UTC), name="releases")


def free_port() -> int:
    """On two addresses of this machine."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        two.bind(("127.0.0.2", port))
        return port


class World:
    """A zone, relays on two addresses under one name, and a machine that finds them by DNS."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self.port = free_port()
        self.dns: DnsServer = stack.enter_context(dns_server(*self.zone(HOST, "127.0.0.1"), TTL))
        self.token = folder / "agent.token"
        self.token.write_text(AGENT)
        self.agent = self._make_agent()
        stack.callback(self.agent.stop)

    def zone(self, target: str, address: str) -> tuple[list[Srv], dict[str, list[str]]]:
        return [Srv(SRV, target, self.port, 10, 1)], {target: [address]}

    def _make_agent(self) -> Agent:
        home, origin = self.folder / "machine", self.folder / "origin"
        assert run(origin, "trust", "init").code == 0
        made = run(
            origin,
            *("agent", "init", "--home", home, "--name", "web1", "--site", "fra", "--domain", DOMAIN),
            *("--resolver", self.dns.resolver, "--scheme", "http", "--token-file", self.token),
            *("--trust", origin / "trust" / "trust.json", "--json"),
        ).json
        with (home / "agent.yaml").open("a") as file:
            file.write(yaml.safe_dump({"plain_http": [HOST, f"other.{DOMAIN}"]}))
        return Agent("web1", "fra", home, self.folder / "srv", made["fingerprint"], ())

    def relay(self, address: str) -> RelayProcess:
        config = self.folder / f"{address}.yaml"
        tokens = [msgspec.to_builtins(each) for each in (RECORD, OTHER)]
        # As JSON, which is YAML: what it quotes stays a text, also where an id looks like a number.
        config.write_text(json.dumps({"listen": f"{address}:{self.port}", "tokens": tokens}))
        return self._stack.enter_context(RelayProcess(self.folder / address, "--config", config))

    async def until_seen(self, relay: RelayProcess) -> None:
        """Until the relay tells the agent's presence."""
        async with asyncio.timeout(120.0), mail_client(relay.url, token=ORDER) as mail:
            while [agent.name for agent in await mail.agents()] != ["web1"]:
                await asyncio.sleep(0.02)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


async def test_a_running_agent_takes_the_new_token_and_goes_where_the_relays_name_leads_now(world: World) -> None:
    one, two = world.relay("127.0.0.1"), world.relay("127.0.0.2")
    world.token.write_text("wst_revoked\n")
    world.agent.spawn()
    wait_for(lambda: "refuses this token: it is unknown, revoked or has ended" in world.agent.said, 30.0)
    assert "ready" not in world.agent.said

    other = world.token.with_name("new")
    other.write_text(f"{AGENT}\n")
    other.rename(world.token)
    wait_for(lambda: f"agent web1 ready at http://{HOST}:{world.port}" in world.agent.said, 30.0)
    assert "file.read_again" in world.agent.said
    assert AGENT not in world.agent.said

    world.token.write_text("")  # for a moment, as some tools write files
    assert world.dns.serve(*world.zone(HOST, "127.0.0.2"), TTL)
    if not SOAK:
        one.kill()  # in the soak it lives: its poll ends by itself after 25 s, and so does the test of that
    await world.until_seen(two)
    assert "is empty" in world.agent.said


@pytest.mark.skipif(not SOAK, reason="it waits for answers of DNS to come to their end: make soak")
async def test_a_running_agent_follows_records_that_change_vanish_and_return(world: World) -> None:
    world.relay("127.0.0.1")
    two = world.relay("127.0.0.2")
    world.agent.start()
    assert world.dns.serve((), {}, TTL)
    wait_for(lambda: world.dns.times_asked("SRV", SRV) >= 3, 120.0)
    assert world.dns.serve(*world.zone(f"other.{DOMAIN}", "127.0.0.2"), TTL)
    await world.until_seen(two)
