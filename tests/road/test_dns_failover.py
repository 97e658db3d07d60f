"""The closest relay by a real name server: pulls move on when the site's relay is gone, and come back when it is well."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.dns import DOMAIN, DnsServer, Srv, dns_server
from harness.origins import depot_with
from harness.packages import make_nupkg, noise
from harness.process import Done, run
from harness.relays import Relay, running_relay, token

from agent.relays.health import FAILS_OUT
from agent.relays.memory import load_state
from agent.relays.sources import Sources
from agent.trees.installed import AgentState
from agent.trees.pull import Pulled, parse_request, pull
from relay.errors import UnreachableError
from relay.protocol.connection import ClientLimits

SITE = f"_waystation._tcp.fra._sites.{DOMAIN}"
GENERIC = f"_waystation._tcp.{DOMAIN}"
FILES = {"app.dll": noise("app", 200_000), "readme.txt": b"Read me."}
LIMITS = ClientLimits(connect_seconds=2, answer_seconds=10, window_seconds=10, window_bytes=1, attempts=1)
TOKEN, RECORD = token("read")


@dataclass
class Town:
    """One site with a relay, a generic relay elsewhere, a name server that knows both, and one machine."""

    folder: Path
    dns: DnsServer
    site_port: int
    generic: Relay
    ahead: float = 0.0
    """Seconds by which the machine's clock has moved on."""

    @property
    def site_url(self) -> str:
        return f"http://fra1.{DOMAIN}:{self.site_port}"

    @property
    def generic_url(self) -> str:
        return f"http://iad1.{DOMAIN}:{self.generic.port}"

    @property
    def home(self) -> str:
        return str(self.folder / "agent")

    @asynccontextmanager
    async def site_relay(self) -> AsyncIterator[Relay]:
        async with running_relay(
            self.folder / "origin" / "depot", site="fra", tokens=[RECORD], port=self.site_port
        ) as relay:
            yield relay

    async def pull(self) -> Pulled:
        """Onto a fresh root, so that everything must come from a relay; what is known of relays is read from disk."""
        state = AgentState(self.home)
        root = str(self.folder / f"root-{len(os.listdir(self.folder))}")
        os.mkdir(root)
        sources = Sources(
            state.config(), Path(self.home) / "relays.json", limits=LIMITS, clock=lambda: time.time() + self.ahead
        )
        async with sources:
            result = await pull(
                parse_request("Acme.Web", "1.0.0", root, None, switch=False), state, sources, state.pins()
            )
        for record in state.trees():
            os.unlink(os.path.join(self.home, "trees", f"{record.ulid}.json"))
        return result

    def waystation(self, *words: str) -> Done:
        return run(self.folder, *words, "--home", self.home)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    nupkg = make_nupkg(tmp_path, FILES)
    async with AsyncExitStack() as stack:
        async with depot_with(tmp_path / "origin", nupkg) as origin:
            pins = Path(origin.keys.pins_file).read_bytes()
            signature = await origin.signature(origin.added[0].manifest)
            # The generic relay has a store of its own: two relays cannot serve one folder.
            generic = await stack.enter_async_context(running_relay(tmp_path / "generic", tokens=[RECORD, WRITER]))
            async with generic.client(WRITE) as client:
                from relay.transfer.replicate import replicate

                await replicate(origin.added[0].manifest, signature, origin.depot.store.chunks, client)
        port = free_port()
        zone = [Srv(SITE, f"fra1.{DOMAIN}", port, 10, 1), Srv(GENERIC, f"iad1.{DOMAIN}", generic.port, 10, 1)]
        hosts = {f"fra1.{DOMAIN}": ["127.0.0.1"], f"iad1.{DOMAIN}": ["127.0.0.1"]}
        dns = stack.enter_context(dns_server(zone, hosts))
        town = Town(tmp_path, dns, port, generic)
        os.mkdir(town.home, 0o700)
        Path(town.home, "trust.json").write_bytes(pins)
        Path(town.home, "token").write_text(TOKEN)
        config = {
            "name": "m1",
            "site": "fra",
            "domain": DOMAIN,
            "resolver": dns.resolver,
            "scheme": "http",
            "token_file": str(Path(town.home, "token")),
            "plain_http": [f"fra1.{DOMAIN}", f"iad1.{DOMAIN}"],
        }
        Path(town.home, "agent.yaml").write_text(yaml.safe_dump(config))
        yield town


WRITE, WRITER = token("write")


async def test_the_name_server_is_asked_and_the_sites_relay_gives_everything(town: Town) -> None:
    async with town.site_relay():
        result = await town.pull()

    assert town.dns.was_asked("SRV", SITE)
    assert town.dns.was_asked("SRV", GENERIC)
    assert town.dns.was_asked("A", f"fra1.{DOMAIN}")
    assert list(result.from_relays) == [town.site_url]
    assert not result.failed


async def test_with_the_sites_relay_gone_a_pull_moves_on_and_says_so(town: Town) -> None:
    result = await town.pull()

    assert list(result.from_relays) == [town.generic_url]
    assert list(result.failed) == [town.site_url]


async def test_after_one_failure_the_very_next_pull_is_back(town: Town) -> None:
    assert list((await town.pull()).from_relays) == [town.generic_url]

    async with town.site_relay():
        result = await town.pull()

    assert list(result.from_relays) == [town.site_url]


async def _pull_until_out(town: Town) -> None:
    for _ in range(FAILS_OUT):
        assert list((await town.pull()).from_relays) == [town.generic_url]
        town.ahead += 1
    assert not load_state(Path(town.home) / "relays.json").healths[town.site_url].ok


async def test_one_that_is_out_costs_no_further_pull_anything(town: Town) -> None:
    await _pull_until_out(town)

    result = await town.pull()

    assert not result.failed, "it was asked again at once"
    assert list(result.from_relays) == [town.generic_url]


async def test_pulls_come_back_when_the_sites_relay_is_well_again(town: Town) -> None:
    await _pull_until_out(town)
    async with town.site_relay():
        town.ahead += 60

        result = await town.pull()

        assert list(result.from_relays) == [town.site_url]
        assert load_state(Path(town.home) / "relays.json").healths[town.site_url].ok
        assert list((await town.pull()).from_relays) == [town.site_url]


async def test_after_a_day_out_the_first_pull_is_back(town: Town) -> None:
    for _ in range(12):
        await town.pull()
        town.ahead += 1000
    town.ahead += 86_400

    async with town.site_relay():
        assert list((await town.pull()).from_relays) == [town.site_url]


async def test_one_that_comes_and_goes_is_left_again(town: Town) -> None:
    await _pull_until_out(town)
    town.ahead += 60
    async with town.site_relay():
        await town.pull()
    town.ahead += 600

    assert list((await town.pull()).from_relays) == [town.generic_url]


async def test_a_clock_that_was_set_back_does_not_keep_it_out(town: Town) -> None:
    await _pull_until_out(town)
    town.ahead = -86_400.0

    async with town.site_relay():
        assert list((await town.pull()).from_relays) == [town.site_url]


async def test_ill_ones_are_asked_also_where_many_look_well(town: Town) -> None:
    """Four generic relays that are due, too, must not take the turn of the site's own."""
    await _pull_until_out(town)
    async with AsyncExitStack() as stack:
        names = []
        for n in range(4):
            relay = await stack.enter_async_context(running_relay(town.folder / f"more-{n}", tokens=[RECORD]))
            names.append(relay.url)
        path = Path(town.home, "agent.yaml")
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"relays": names}))
        town.ahead += 3600

        async with town.site_relay():
            assert list((await town.pull()).from_relays) == [town.site_url]


async def test_when_the_name_server_is_gone_its_last_answer_counts(town: Town) -> None:
    async with town.site_relay():
        await town.pull()
        town.dns.stop()

        result = await town.pull()

    assert list(result.from_relays) == [town.site_url]


async def test_a_relay_named_by_hand_makes_an_agent_forget_nothing(town: Town) -> None:
    async with town.site_relay():
        await town.pull()
        before = load_state(Path(town.home) / "relays.json")
        other = town.waystation("agent", "relays", "--relay", town.generic.url)
        assert other.code == 0, other.err
    after = load_state(Path(town.home) / "relays.json")

    assert after.last_answers == before.last_answers
    assert after.healths[town.site_url] == before.healths[town.site_url]


async def test_with_every_relay_gone_each_is_named(town: Town) -> None:
    Path(town.home, "agent.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load(Path(town.home, "agent.yaml").read_text()) | {"srv_generic": f"_other._tcp.{DOMAIN}"}
        )
    )

    with pytest.raises(UnreachableError, match=f"fra1.{DOMAIN}"):
        await town.pull()


# --- the commands


async def _run(town: Town, *words: str) -> Done:
    """Beside the relays of this process."""
    import asyncio

    return await asyncio.to_thread(town.waystation, *words)


async def test_pulls_of_separate_processes_move_on_and_come_back(town: Town) -> None:
    def words(root: str) -> list[str]:
        return ["agent", "pull", "Acme.Web", "1.0.0", "--root", str(town.folder / root), "--json"]

    gone = await _run(town, *words("r1"))
    assert gone.code == 0, gone.err
    assert json.loads(gone.out)["from_relays"].keys() == {town.generic_url}
    assert json.loads(gone.out)["failed"].keys() == {town.site_url}

    for record in AgentState(town.home).trees():
        os.unlink(os.path.join(town.home, "trees", f"{record.ulid}.json"))
    async with town.site_relay():
        back = await _run(town, *words("r2"))

    assert json.loads(back.out)["from_relays"].keys() == {town.site_url}


async def test_agent_relays_shows_the_order_and_why(town: Town) -> None:
    async with town.site_relay():
        text = await _run(town, "agent", "relays")
        listed = await _run(town, "agent", "relays", "--json")
    first, second = json.loads(listed.out)["relays"]

    assert text.code == listed.code == 0
    assert text.out.index(town.site_url) < text.out.index(town.generic_url)
    assert "the site's relay, priority 10" in text.out
    assert (first["url"], first["found_by"], first["priority"], first["usable"]) == (town.site_url, "site", 10, True)
    assert (second["url"], second["found_by"], second["error"]) == (town.generic_url, "generic", "")
    assert 0 < first["first_byte_seconds"] < 60
    assert first["why"]


async def test_agent_relays_says_what_is_wrong_with_one_that_is_gone(town: Town) -> None:
    for _ in range(FAILS_OUT):
        listed = await _run(town, "agent", "relays", "--json")
    text = await _run(town, "agent", "relays")
    first, second = json.loads(listed.out)["relays"]

    assert first["url"] == town.generic_url
    assert second["url"] == town.site_url
    assert second["usable"] is False
    assert "cannot be reached" in second["error"]
    assert "looks ill" in second["why"]
    assert "cannot be reached" in text.out


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A zone without relays, and an agent that asks it."""
    with dns_server() as dns:
        home = tmp_path / "agent"
        home.mkdir(0o700)
        config = {"site": "fra", "domain": DOMAIN, "resolver": dns.resolver}
        (home / "agent.yaml").write_text(yaml.safe_dump(config))
        yield {"home": str(home), "dns": dns}


def test_with_no_relay_at_all_the_error_says_what_to_do(nowhere: dict[str, Any], tmp_path: Path) -> None:
    digest = f"sha256:{'0' * 64}"
    words = ["Acme.Web", "1.0.0", "--root", str(tmp_path / "r"), "--digest", digest, "--home", nowhere["home"]]

    done = run(tmp_path, "agent", "pull", *words)

    assert done.code == 1
    assert nowhere["dns"].was_asked("SRV", SITE)
    assert "no relay is known" in done.err
    assert SITE in done.err
    assert "--relay" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "r").exists()


def test_agent_relays_says_so_where_there_is_none(nowhere: dict[str, Any], tmp_path: Path) -> None:
    done = run(tmp_path, "agent", "relays", "--home", nowhere["home"])

    assert done.code == 0
    assert "no relay is known" in done.out + done.err
