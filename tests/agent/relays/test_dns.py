from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from dataclasses import replace
from typing import Self
from urllib.parse import urlsplit

import msgspec
import pytest
from harness.dns import DOMAIN, Srv, dns_server

from agent.config import AgentConfig
from agent.relays import dns, memory
from agent.relays.candidates import Source, srv_source, static_source
from agent.relays.dns import (
    RECORDS_MAX,
    TTL_MAX,
    TTL_MIN,
    LastAnswer,
    _addresses,
    _resolver,
    check_discovery,
    find_sources,
    names_of,
)
from agent.relays.health import UNKNOWN, record_failure, record_probes, record_success
from agent.relays.memory import STATE_BYTES_MAX, State, load_state, log_changes, save_state
from agent.relays.probe import probe
from agent.relays.ranking import rank
from relay.errors import StoreError, UsageError

SITE = f"_waystation._tcp.fra._sites.{DOMAIN}"
GENERIC = f"_waystation._tcp.{DOMAIN}"
ZONE = [
    Srv(SITE, f"fra1.{DOMAIN}", 7400, 10, 60),
    Srv(SITE, f"fra2.{DOMAIN}", 7400, 10, 40),
    Srv(SITE, f"fra3.{DOMAIN}", 7401, 20, 0),
    Srv(GENERIC, f"iad1.{DOMAIN}", 7400, 5, 1),
]
HOSTS = {
    f"fra1.{DOMAIN}": ["192.0.2.1", "2001:db8::1"],
    f"fra2.{DOMAIN}": ["192.0.2.2"],
    f"fra3.{DOMAIN}": ["192.0.2.3"],
    f"iad1.{DOMAIN}": ["192.0.2.9"],
}
STATIC = "http://198.51.100.1:7400"


def config(resolver: str | None, **changes) -> AgentConfig:
    wanted = AgentConfig(site="fra", domain=DOMAIN, resolver=resolver, relays=(STATIC,))
    return msgspec.structs.replace(wanted, **changes)


async def find(wanted: AgentConfig, last=(), now=0.0, timeout=2.0, seed=1):
    return await find_sources(wanted, last, random.Random(seed), now=now, round_seconds=timeout)


def dead_resolver() -> str:
    """A port on which nothing answers."""
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def by_target(found) -> dict[str, Source]:
    return {source.target: source for source in found.sources}


# --- look-ups, against a real name server


async def test_srv_records_are_found_with_tier_weight_and_address():
    with dns_server(ZONE, HOSTS) as server:
        found = await find(config(server.resolver))
        assert server.was_asked("SRV", SITE)
        assert server.was_asked("SRV", GENERIC)
        assert server.was_asked("AAAA", f"fra1.{DOMAIN}")
    assert by_target(found)[f"fra1.{DOMAIN}"] == Source(
        url=f"https://fra1.{DOMAIN}:7400",
        origin="site",
        priority=10,
        weight=60,
        target=f"fra1.{DOMAIN}",
        addresses=("2001:db8::1", "192.0.2.1"),
    )
    assert [(source.origin, source.priority) for source in found.sources] == [
        ("site", 10),
        ("site", 10),
        ("site", 20),
        ("generic", 5),
        ("static", 0),
    ]
    assert found.notes == ()
    assert [answer.name for answer in found.last] == [SITE, GENERIC]


async def test_without_a_resolver_of_our_own_the_system_looks_the_targets_up(monkeypatch):
    with dns_server(ZONE, HOSTS) as server:
        # The system's resolver, but with the test's server in its place.
        from dns.asyncresolver import Resolver

        def system(_configured, _seconds):
            resolver = Resolver(configure=False)
            resolver.nameservers, resolver.port = ["127.0.0.1"], server.port
            return resolver

        monkeypatch.setattr(dns, "_resolver", system)
        found = await find(config(None))
        assert server.was_asked("SRV", SITE)
        assert not server.was_asked("A", f"fra1.{DOMAIN}")
    assert by_target(found)[f"fra1.{DOMAIN}"].addresses == ()


async def test_weight_draws_the_first_of_a_tier():
    with dns_server(ZONE, HOSTS) as server:
        wanted = config(server.resolver)
        firsts = {(await find(wanted, seed=seed)).sources[0].target for seed in range(12)}
    assert firsts == {f"fra1.{DOMAIN}", f"fra2.{DOMAIN}"}


async def test_a_site_without_a_name_falls_to_the_generic_one():
    with dns_server(ZONE, HOSTS) as server:
        found = await find(config(server.resolver, site="nowhere"))
        assert server.was_asked("SRV", f"_waystation._tcp.nowhere._sites.{DOMAIN}")
    assert [source.origin for source in found.sources] == ["generic", "static"]
    assert any("nowhere" in note for note in found.notes)


async def test_no_such_name_is_an_answer_that_outdates_the_last_good_one():
    with dns_server(ZONE[3:], HOSTS) as server:
        old = LastAnswer(SITE, (srv_source("site", "https", "old.example.test", 1, 0, 0),), 0.0)
        found = await find(config(server.resolver), [old])
    assert "old.example.test" not in by_target(found)
    assert found.last[0].sources == ()


async def test_a_site_that_says_decidedly_none_falls_to_the_generic_one():
    with dns_server([Srv(SITE), *ZONE[3:]], HOSTS) as server:
        found = await find(config(server.resolver))
    assert [source.origin for source in found.sources] == ["generic", "static"]
    assert any("says that there is no relay here" in note for note in found.notes)


async def test_no_site_configured_asks_the_generic_name_only():
    with dns_server(ZONE, HOSTS) as server:
        found = await find(config(server.resolver, site=None))
        assert not server.was_asked("SRV", SITE)
    assert [source.origin for source in found.sources] == ["generic", "static"]


async def test_the_name_is_a_template():
    consul = f"_waystation._tcp.service.fra.{DOMAIN}"
    with dns_server([replace(ZONE[0], name=consul)], HOSTS) as server:
        found = await find(config(server.resolver, srv_site="_waystation._tcp.service.{site}.{domain}", scheme="http"))
    assert found.sources[0].url == f"http://fra1.{DOMAIN}:7400"


async def test_a_target_without_an_address_is_left_out_and_told():
    with dns_server(ZONE, {name: some for name, some in HOSTS.items() if "fra2" not in name}) as server:
        found = await find(config(server.resolver))
    assert f"fra2.{DOMAIN}" not in by_target(found)
    assert any(f"fra2.{DOMAIN}" in note for note in found.notes)


async def test_at_most_64_records_are_taken_and_by_tcp_where_udp_is_too_small():
    many = [Srv(SITE, f"n{number}.{DOMAIN}", 7400, number, 0) for number in range(RECORDS_MAX + 6)]
    with dns_server(many, {one.target: ["192.0.2.1"] for one in many}) as server:
        found = await find(config(server.resolver))
    taken = {source.priority for source in found.sources if source.origin == "site"}
    assert taken == set(range(RECORDS_MAX))
    assert any("70 records" in note for note in found.notes)


async def test_a_record_that_nobody_can_use_is_left_out_and_the_others_stay():
    with dns_server([Srv(SITE, f"fra1.{DOMAIN}", 0, 1, 1), *ZONE], HOSTS) as server:
        found = await find(config(server.resolver))
    assert {source.url for source in found.sources if source.priority == 1} == set()
    assert f"fra1.{DOMAIN}" in by_target(found)
    assert any("port" in note for note in found.notes)


async def test_when_dns_is_down_the_last_good_answer_serves_and_says_so():
    with dns_server(ZONE, HOSTS) as server:
        wanted = config(server.resolver)
        before = await find(wanted, now=1000.0)
        server.stop()
        assert not server.answers()
        after = await find(wanted, before.last, now=1600.0, timeout=0.5)
    assert [source.tier for source in after.sources] == [source.tier for source in before.sources]
    assert by_target(after)[f"fra1.{DOMAIN}"].addresses == ("2001:db8::1", "192.0.2.1")
    assert any("10 min old" in note for note in after.notes)
    assert after.last == before.last, "a failure must not overwrite what is remembered"
    ranking = rank(after.sources, {}, None, 0, "me")
    assert ["last good answer" in ranked.why for ranked in ranking] == [True, True, True, True, False]


async def test_a_remembered_answer_is_forgotten_as_such_when_dns_is_back():
    with dns_server(ZONE, HOSTS) as server:
        before = await find(config(server.resolver))
        gone = await find(config(dead_resolver()), before.last, timeout=0.3)
        assert any(source.remembered for source in gone.sources)
        back = await find(config(server.resolver), gone.last)
    assert not any(source.remembered for source in back.sources)


async def test_when_dns_is_down_and_nothing_is_remembered_the_static_list_serves():
    found = await find(config(dead_resolver()), timeout=0.3)
    assert [source.url for source in found.sources] == [STATIC]
    assert any("DNS failed" in note for note in found.notes)


async def test_another_sites_answer_is_not_remembered_for_this_one():
    with dns_server(ZONE, HOSTS) as server:
        before = await find(config(server.resolver))
    moved = await find(config(dead_resolver(), site="iad"), before.last, timeout=0.3)
    assert [source.origin for source in moved.sources] == ["generic", "static"]


async def test_targets_that_cannot_be_looked_up_at_all_count_as_dns_down():
    # dnsmasq refuses what lies outside its domain, as a server does whose upstream is gone.
    with dns_server([Srv(SITE, "fra1.elsewhere.test", 7400, 10, 1)], {}) as server:
        old = srv_source("site", "https", "old.example.test", 7400, 10, 1)
        found = await find(config(server.resolver), [LastAnswer(SITE, (old,), 0.0)], timeout=0.5)
        assert server.was_asked("A", "fra1.elsewhere.test")
    assert found.sources[0] == replace(old, remembered=True)


async def test_no_dns_at_all_gives_the_static_list_with_stores_in_it():
    stores = ("disk:/mnt/dfs/waystation", "s3://bucket/prefix", STATIC)
    found = await find(AgentConfig(relays=stores))
    assert {source.url for source in found.sources} == set(stores)
    assert {source.url for source in found.sources if source.is_store} == set(stores[:2])


async def test_nothing_known_is_told():
    found = await find(AgentConfig())
    assert found.sources == ()
    assert found.notes


async def test_a_silent_name_server_does_not_hold_the_agent_up():
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        async with asyncio.timeout(30):
            found = await find(config(f"127.0.0.1:{silent.getsockname()[1]}"), timeout=0.3)
        assert silent.recv(512), "it was really asked"
    assert [source.origin for source in found.sources] == ["static"]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "a b"},
        {"site": ""},
        {"domain": "example..test"},
        {"srv_site": "_waystation._tcp.{region}.example.test"},
        {"resolver": "ns.example.test:53"},
        {"resolver": "127.0.0.1:0"},
        {"resolver": "127.0.0.1:x"},
        {"relays": ("http://user:x@relay.test",)},
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(changes):
    with pytest.raises(UsageError):
        check_discovery(config(**{"resolver": "127.0.0.1:53"} | changes))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("127.0.0.1:5353", ("127.0.0.1", 5353)),
        ("127.0.0.1", ("127.0.0.1", 53)),
        ("[::1]:5353", ("::1", 5353)),
        ("::1", ("::1", 53)),
    ],
)
def test_a_resolver_is_an_address_with_or_without_port(text, parsed):
    assert dns._parse_resolver(text) == parsed


# --- measuring


def host_and_port(source: Source) -> tuple[str, int]:
    return (*source.addresses, source.target)[0], urlsplit(source.url).port or 0


async def connect(source: Source) -> float:
    """A real connection, and one byte of answer."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(*host_and_port(source))
    try:
        assert await reader.readexactly(1)
        return time.perf_counter() - started
    finally:
        writer.close()


class Relay:
    """Accepts, and says one byte after `delay` seconds; None is never."""

    def __init__(self, delay: float | None) -> None:
        self.delay = delay
        self.asked = 0

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.source = static_source(f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}")
        return self

    async def __aexit__(self, *_) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def _serve(self, reader, writer) -> None:
        self.asked += 1
        try:
            if self.delay is None:
                await reader.read()
            else:
                await asyncio.sleep(self.delay)
                writer.write(b"!")
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def test_a_probe_measures_every_source_that_it_is_given():
    async with Relay(0) as one, Relay(0) as two:
        results = await probe([one.source, two.source], connect, 5.0)
    assert set(results) == {one.source.url, two.source.url}
    assert all(result.ok for result in results.values())


async def test_a_refused_connection_and_a_silent_relay_are_failures_with_a_reason():
    async with Relay(None) as silent, Relay(0) as good:
        refused = static_source("http://127.0.0.1:1")
        results = await probe([refused, silent.source, good.source], connect, 0.3, stagger=0.01)
        assert silent.asked == 1
    assert not results[refused.url].ok
    assert results[refused.url].reason
    assert "0.3 s" in results[silent.source.url].reason
    assert results[good.source.url].ok


async def test_the_next_is_probed_at_once_when_one_has_come_to_its_end():
    refused = static_source("http://127.0.0.1:1")
    async with Relay(0) as second, asyncio.timeout(30):
        results = await probe([refused, second.source], connect, 5.0, stagger=3600.0)
    assert not results[refused.url].ok
    assert results[second.source.url].ok


async def test_a_cancelled_probe_leaves_no_connection_behind():
    async with Relay(None) as silent:
        task = asyncio.create_task(probe([silent.source], connect, 3600.0))
        while not silent.asked:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=20)
        assert task.cancelled()
    assert [one for one in asyncio.all_tasks() if "_checked" in repr(one)] == []


async def test_three_failed_probes_turn_the_ranking_and_two_good_ones_turn_it_back():
    generic = static_source("http://127.0.0.1:1")
    async with Relay(0) as best:
        address = host_and_port(best.source)
        upper = replace(best.source, origin="site")
        healths = {}
    for now in range(3):
        assert rank([upper, generic], healths, upper.url, now, "me")[0].source == upper
        healths = record_probes(healths, await probe([upper], connect, 1.0), now)
    assert rank([upper, generic], healths, upper.url, 3, "me")[0].source == generic
    server = await asyncio.start_server(Relay(0)._serve, *address)
    async with server:
        for now in range(3, 5):
            assert rank([upper, generic], healths, generic.url, now, "me")[0].source == generic
            healths = record_probes(healths, await probe([upper], connect, 1.0), now)
    assert rank([upper, generic], healths, generic.url, 5, "me")[0].source == upper


def test_only_changes_of_state_are_logged(caplog):
    caplog.set_level(logging.INFO)
    healths = [{}]
    for now, good in enumerate([True, False, False, False, False, True, True, True]):
        before = healths[-1].get("http://r.test:1", UNKNOWN)
        after = record_success(before, now, 0.01, None) if good else record_failure(before, now, "refused")
        healths.append({"http://r.test:1": after})
        log_changes(healths[-2], healths[-1])
    assert [record.message.split()[0] for record in caplog.records] == ["agent.relay_ill", "agent.relay_well"]


# --- memory


def some_state() -> State:
    good = record_success(record_success(UNKNOWN, 5.0, 0.01, 1e6), 6.0, 0.02, 2e6)
    bad = record_failure(record_failure(record_failure(UNKNOWN, 1, "x"), 2, "x"), 3, "refused")
    found = replace(srv_source("site", "https", "a.example.test", 7400, 10, 5), addresses=("192.0.2.1",))
    return State(
        current="https://a.example.test:7400",
        healths={"https://a.example.test:7400": good, "https://b.example.test:7400": bad},
        last_answers=(LastAnswer(SITE, (found,), 12.5), LastAnswer(GENERIC, (), 13.5)),
    )


def one_remembered(**fields: str) -> bytes:
    source = {"priority": 0, "weight": 0, **fields}
    return json.dumps({"last_answers": [{"name": "n", "at": 0, "sources": [source]}]}).encode()


def test_a_state_file_in_order_is_read():
    """The refusals below are for what is wrong in them, not for their shape."""
    data = one_remembered(url="http://a:1", origin="site", target="a")
    assert msgspec.json.decode(data, type=State).last_answers[0].sources[0].target == "a"


def test_state_is_kept_over_a_restart(tmp_path):
    path = tmp_path / "deep" / "relays.json"
    save_state(path, some_state())
    assert load_state(path) == some_state()
    save_state(path, State(current="x"))
    assert load_state(path).current == "x"
    assert [one.name for one in path.parent.iterdir()] == ["relays.json"]


def test_no_state_yet_is_no_reason_to_complain(tmp_path, caplog):
    assert load_state(tmp_path / "none") == State()
    assert caplog.records == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b"{",
        b'{"format": 2}',
        b'{"format": "1"}',
        b'{"healths": {"x": {"latency": {"mean": -1, "variance": 0, "count": 1, "at": 0}}}}',
        b'{"healths": {"x": {"latency": {"mean": 1, "variance": 1e999, "count": 1, "at": 0}}}}',
        b'{"healths": {"x": {"latency": {"mean": 1, "variance": 0, "count": 0, "at": 0}}}}',
        one_remembered(url="http://evil:99999", origin="site", target="evil"),
        one_remembered(url="http://a:1", origin="moon", target="a"),
        b"[" * 100_000,
    ],
)
def test_a_damaged_state_file_starts_fresh_and_says_so(tmp_path, caplog, data):
    path = tmp_path / "relays.json"
    path.write_bytes(data)
    assert load_state(path) == State()
    assert [record.message.split()[0] for record in caplog.records] == ["agent.relays_forgotten"]
    save_state(path, some_state())
    assert load_state(path) == some_state()


def test_an_oversized_state_file_starts_fresh_and_says_so(tmp_path, caplog):
    path = tmp_path / "relays.json"
    save_state(path, some_state())
    with path.open("ab") as file:
        file.write(b" " * STATE_BYTES_MAX)
    assert load_state(path) == State()
    assert "larger than" in caplog.records[0].message


def test_a_state_file_that_is_a_folder_starts_fresh_and_says_so(tmp_path, caplog):
    assert load_state(tmp_path) == State()
    assert caplog.records


def test_every_truncation_of_the_state_file_is_survived(tmp_path):
    path = tmp_path / "relays.json"
    save_state(path, some_state())
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        assert load_state(path) == State()


def test_a_failed_write_leaves_the_old_state_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "relays.json"
    save_state(path, some_state())
    failed = []

    def no_sync(handle: int) -> None:
        failed.append(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory.os, "fsync", no_sync)
    with pytest.raises(StoreError) as caught:
        save_state(path, State(current="new"))
    assert failed
    assert caught.value.full
    assert load_state(path) == some_state()
    assert [one.name for one in tmp_path.iterdir()] == ["relays.json"]


# --- for how long


@pytest.mark.parametrize(("ttl", "kept"), [(0, TTL_MIN), (1, TTL_MIN), (60, 30.0), (86400, 30.0)])
async def test_answers_are_kept_for_their_time_and_what_is_missing_for_half_a_minute(ttl: int, kept: float):
    """The generic name is not there: that is asked again soon, whatever the zone says of it."""
    with dns_server(ZONE[:3], HOSTS, [f"--local-ttl={ttl}"]) as dns:
        found = await find(config(dns.resolver))
    assert found.ttl == kept


@pytest.mark.parametrize(("ttl", "kept"), [(60, 60.0), (86400, TTL_MAX)])
async def test_where_everything_is_there_the_zone_says_when_to_ask_again(ttl: int, kept: float):
    with dns_server(ZONE, HOSTS, [f"--local-ttl={ttl}"]) as dns:
        assert (await find(config(dns.resolver))).ttl == kept


async def test_an_address_is_asked_for_again_when_its_time_is_over_and_not_before():
    wanted, (name, other) = f"fra3.{DOMAIN}", (("192.0.2.3",), ("192.0.2.33",))
    with dns_server(ZONE, HOSTS, ["--local-ttl=1"]) as dns:
        names = names_of(config(dns.resolver))
        assert names is not None
        assert await names.addresses(wanted) == name
        assert await names.addresses(wanted) == name
        assert dns.times_asked("A", wanted) == 1
        assert dns.serve(ZONE, HOSTS | {wanted: list(other)}, ["--local-ttl=1"])
        while await names.addresses(wanted) == name:
            await asyncio.sleep(0.05)
        assert await names.addresses(wanted) == other


async def test_an_alias_counts_for_as_long_as_its_shortest_part():
    chain = ["--cname=alias.example.test,fra2.example.test,7"]
    with dns_server(ZONE, HOSTS, ["--local-ttl=300", *chain]) as dns:
        found, ttl = await _addresses(_resolver(dns.resolver, 2.0), f"alias.{DOMAIN}")
    assert (list(found), ttl) == (["192.0.2.2"], 7.0)
