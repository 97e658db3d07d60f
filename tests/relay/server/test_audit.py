"""What a relay tells of those who ask: whom it refused and why, what came, and how its disk is. From outside."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import trustme
import yaml
from harness.process import run, wait_for
from harness.relays import RelayProcess, token
from harness.trail import Line, events

from relay.server.http.tokens import make_token
from relay.stores.room import Room

pytestmark = pytest.mark.processes

READS, READS_RECORD = token("read")
WRITES, _ = make_token(["write"], datetime.now(UTC), name="of nobody")


class Served:
    """A relay that asks for tokens, and lets an address have few connections."""

    def __init__(self, folder: Path, **document: Any) -> None:
        config = folder / "relay.yaml"
        tokens = [msgspec.to_builtins(READS_RECORD)]
        config.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "tokens": tokens} | document))
        self.process = RelayProcess(folder / "home", "--config", config)

    def told(self, name: str) -> list[Line]:
        assert self.process.process is not None
        return events(self.process.process.err, name)

    def wait_for(self, name: str, count: int = 1) -> list[Line]:
        wait_for(lambda: len(self.told(name)) >= count or not self.process.is_alive, 30.0)
        return self.told(name)

    async def ask(self, path: str, bearer: str = "", method: str = "GET", **how: Any) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        url = self.process.url + path
        async with aiohttp.ClientSession(headers=headers) as session, session.request(method, url, **how) as answer:
            return answer.status, await answer.text()

    async def metric(self, name: str) -> dict[str, float]:
        """Its values by their labels."""
        _, text = await self.ask("/metrics", READS)
        found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return {labels: float(value) for labels, value in found}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {"connections_per_address": 4, "header_seconds": 0.3}
    made = Served(tmp_path_factory.mktemp("served"), limits=limits)
    with made.process:
        yield made


async def test_a_refused_request_is_told_with_its_address_path_and_token(served: Served) -> None:
    assert (await served.ask("/v1/packages?secret=in-a-query"))[0] == 401
    assert (await served.ask("/v1/packages/A/1.0.0", READS, "PUT", json={}))[0] == 403
    assert (await served.ask("/v1/packages/A/1.0.0", READS))[0] == 404
    nobody, weak = served.told("relay.request_refused")[:2]
    assert (nobody["code"], nobody["path"], nobody["address"]) == ("unauthenticated", "/v1/packages", "127.0.0.1")
    assert (weak["code"], weak["token"], weak["method"]) == ("forbidden", READS_RECORD.id, "PUT")
    [absent] = served.told("relay.nothing_there")
    assert (absent["path"], absent["token"], absent["level"]) == ("/v1/packages/A/1.0.0", READS_RECORD.id, "info")


async def test_a_flood_of_refusals_is_one_line_and_all_are_counted(served: Served) -> None:
    before = await served.metric("waystation_refusals_total")
    lines = len(served.told("relay.request_refused"))
    async with aiohttp.ClientSession() as session:
        for number in range(300):
            async with session.get(f"{served.process.url}/v1/packages/a{number}") as answer:
                assert answer.status == 401
    assert len(served.told("relay.request_refused")) <= lines + 2
    after = await served.metric("waystation_refusals_total")
    label = '{reason="unauthenticated"}'
    assert after[label] - before.get(label, 0) == 300
    assert (await served.metric("waystation_events_merged_total"))['{event="relay.request_refused"}'] >= 298


async def test_a_token_in_a_path_is_in_no_event_however_it_is_written(served: Served) -> None:
    secret = WRITES[len("wst_01234567_") :].rpartition("_")[0]
    for path in (
        f"/v1/{WRITES}",
        f"/v1/x?access_token={secret}",
        f"/v1/{WRITES.replace('w', '%77')}",
        f"/%3Ft={secret}",
    ):
        await served.ask(path)
    await served.ask("/v1/packages", WRITES)
    told = [event for event in served.told("") if secret in str(event)]
    assert told == []


async def test_connections_beyond_the_limit_are_told_and_counted(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(socket.create_connection(("127.0.0.1", served.process.port)))
        [first] = served.wait_for("relay.connection_refused")[:1]
        # Those that were taken and say nothing are cut in the end, and told, too.
        assert served.wait_for("relay.connection_cut")[0]["why"] == "no_request"
    assert (first["address"], first["why"], first["limit"]) == ("127.0.0.1", "connections_per_address", 4)
    refused = await served.metric("waystation_connections_refused_total")
    assert refused['{reason="connections_per_address"}'] >= 8


async def test_what_ends_is_told_in_seconds(served: Served) -> None:
    left = await served.metric("waystation_ends_in_seconds")
    [(labels, seconds)] = left.items()
    assert READS_RECORD.id in labels
    assert abs(seconds - (READS_RECORD.expires.timestamp() - time.time())) < 60


def test_a_handshake_that_fails_is_told(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    made = Served(tmp_path, tls={"certificate": str(tmp_path / "crt"), "key": str(tmp_path / "key")})
    with made.process:
        plain = socket.create_connection(("127.0.0.1", made.process.port))
        with plain, pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(plain, server_hostname="127.0.0.1")
        [failed] = made.wait_for("relay.handshake_failed")
        assert failed["address"] == "127.0.0.1"
        assert failed["why"]


async def test_a_relay_is_low_on_space_before_it_is_read_only(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    for floor, words, event in (
        (int(free * 0.75), "low on space", "relay.low_on_space"),
        (free * 2, "read-only", "relay.no_space_left"),
    ):
        (folder := tmp_path / str(floor)).mkdir()
        made = Served(folder, free_floor=floor)
        with made.process:
            [told] = made.wait_for(event)
            assert told["floor"] == floor
            assert told["low"] == floor * 2
            words_of_health = (await made.ask("/v1/health"))[1]
            shown = run(tmp_path, "relay", "status", "--relay", made.process.url, WAYSTATION_TOKEN=READS)
            assert shown.out.startswith(f"{made.process.url}: {words} (")
            assert (await made.metric("waystation_disk_floor_bytes"))[""] == floor
            assert (await made.metric("waystation_disk_low"))[""] == 1
            assert (await made.metric("waystation_read_only"))[""] == (words == "read-only")
            assert (await made.metric("waystation_disk_free_bytes"))[""] > 0
        health = msgspec.json.decode(words_of_health)
        assert health["status"] == ("ok" if words == "low on space" else words), "older agents know no other word"
        assert health["reason"].startswith("low on space" if words == "low on space" else "no space left")


def test_a_store_is_low_before_it_is_full() -> None:
    states = [Room(free, 100).state() for free in (500, 200, 199, 101, 100, 0)]
    assert states == ["enough", "enough", "low", "low", "full", "full"]
    assert Room(299, 100).state(low=300) == "low"
    assert Room(150, 100).state(low=0) == "enough"
    assert Room(105, 100, turned_away=10).state() == "full", "a write that did not fit is none that fits"
