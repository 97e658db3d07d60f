"""What deploy/ gives to copy is loaded, served and asked here, so that it cannot grow old."""

from __future__ import annotations

import configparser
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import dns.zone
import pytest
from dns_server import dns_server

from agent.discovery import find_sources
from agent.nearest import Source
from agent.state import AgentConfig
from relay.config import RelayConfig, load_yaml
from relay.server.app import limits_of
from relay.server.tokens import parse_tokens

DEPLOY = Path(__file__).parents[1] / "deploy"
EXAMPLES = DEPLOY / "examples"
UNIT = DEPLOY / "systemd" / "waystation-relay.service"


def relay_config() -> RelayConfig:
    return load_yaml(str(EXAMPLES / "relay.yaml"), RelayConfig)


def agent_config() -> AgentConfig:
    return load_yaml(str(EXAMPLES / "agent.yaml"), AgentConfig)


def test_the_example_relay_yaml_is_one_that_a_relay_takes():
    config = relay_config()
    assert config.site == "fra"
    assert config.tls is not None
    assert limits_of(config).drain_seconds == 30
    parse_tokens(config.tokens)
    assert [record["scopes"] for record in config.tokens] == [["write"], ["read"]]


def test_the_example_relay_yaml_names_every_setting():
    text = (EXAMPLES / "relay.yaml").read_text()
    assert [
        name for name in RelayConfig.__struct_fields__ if not re.search(rf"^(# )?{name}:", text, re.MULTILINE)
    ] == []


def test_the_example_agent_yaml_names_every_setting():
    text = (EXAMPLES / "agent.yaml").read_text()
    assert [
        name for name in AgentConfig.__struct_fields__ if not re.search(rf"^(# )?{name}:", text, re.MULTILINE)
    ] == []


def test_what_the_example_agent_yaml_leaves_as_it_is_are_the_defaults():
    config, default = agent_config(), AgentConfig()
    assert (config.srv_site, config.srv_generic, config.scheme) == (
        default.srv_site,
        default.srv_generic,
        default.scheme,
    )


async def test_the_example_agent_finds_the_example_relays_at_a_real_dnsmasq_closest_first():
    lines = (EXAMPLES / "dnsmasq.conf").read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith("#")]
    with dns_server(options=[f"--{setting}" for setting in settings]) as server:
        config = replace(agent_config().discovery(), resolver=server.resolver)
        found = await find_sources(config, (), random.Random(1))
        assert server.was_asked("SRV", "_waystation._tcp.fra._sites.example.net")
    assert [tier(source) for source in found.sources] == sorted(tier(source) for source in found.sources)
    assert {source.url: source.address for source in found.sources} == {
        "https://relay.fra.example.net:7443": "10.1.0.10",
        "https://relay2.fra.example.net:7443": "10.1.0.11",
        "https://relay.iad.example.net:7443": "10.2.0.10",
        "https://relay.hq.example.net:7443": None,
        "disk:/mnt/dfs/waystation": None,
    }
    assert found.notes == ()


def tier(source: Source) -> tuple[int, int]:
    return source.tier


def test_the_zone_file_holds_the_same_records_as_the_dnsmasq_configuration():
    text = (EXAMPLES / "dnsmasq.conf").read_text()
    srv = {tuple(line.split(",")) for line in re.findall(r"^srv-host=(.*)$", text, re.MULTILINE)}
    hosts = {tuple(line.split(",")) for line in re.findall(r"^host-record=(.*)$", text, re.MULTILINE)}
    zone = dns.zone.from_file(str(EXAMPLES / "example.net.zone"), relativize=False)
    assert srv == {
        (absolute(name), absolute(r.target), str(r.port), str(r.priority), str(r.weight))
        for name, _, r in zone.iterate_rdatas("SRV")
    }
    addresses = {(absolute(name), r.address) for name, _, r in zone.iterate_rdatas("A")}
    assert hosts == {pair for pair in addresses if not pair[0].startswith("ns1.")}


def absolute(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_the_unit_gives_a_relay_more_than_twice_its_drain_time_to_stop():
    service = unit()["Service"]
    for config in (RelayConfig(), relay_config()):
        assert float(service["TimeoutStopSec"]) > 2 * limits_of(config).drain_seconds


def test_the_unit_serves_the_store_that_it_may_write():
    service = unit()["Service"]
    home = f"/var/lib/{service['StateDirectory']}"
    assert service["Environment"] == f"WAYSTATION_HOME={home}"
    assert relay_config().store.startswith(f"disk:{home}/")
    assert service["ExecStart"].endswith(" relay serve --config /etc/waystation/relay.yaml")


def test_the_unit_stays_as_hardened_as_it_was_measured():
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: the hardening of the unit is NOT measured")
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=15", str(UNIT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
