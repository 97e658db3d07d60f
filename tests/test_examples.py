"""What deploy/ gives to copy is loaded, served and asked here, so that it cannot grow old."""

from __future__ import annotations

import configparser
import random
import re
import shutil
import subprocess
from pathlib import Path

import dns.zone
import msgspec
import pytest
from harness.dns import dns_server

from agent import platform
from agent.config import AgentConfig
from agent.relays.candidates import Source
from agent.relays.dns import find_sources
from agent.runs.scripts import command_for
from orchestrator.files.environment import load_environment
from orchestrator.files.process import load_process, package_of
from orchestrator.files.scaffold import write_scaffold
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import MachineStep, PlannedPackage
from relay.config import RelayConfig
from relay.errors import LockedError, UsageError
from relay.server.app import limits_of
from relay.server.http.tokens import parse_tokens
from relay.written.decode import load_as

DEPLOY = Path(__file__).parents[1] / "deploy"
EXAMPLES = DEPLOY / "examples"
UNIT = DEPLOY / "systemd" / "waystation-relay.service"
AGENT_UNIT = DEPLOY / "systemd" / "waystation-agent.service"
OWN_USER = DEPLOY / "systemd" / "own-user.conf"


def relay_config() -> RelayConfig:
    return load_as(str(EXAMPLES / "relay.yaml"), RelayConfig).value


def agent_config() -> AgentConfig:
    return load_as(str(EXAMPLES / "agent.yaml"), AgentConfig).value


def test_the_example_relay_yaml_is_one_that_a_relay_takes():
    config = relay_config()
    assert config.site == "fra"
    assert config.tls is not None
    assert limits_of(config).drain_seconds == 30
    parse_tokens(config.tokens)
    assert [record.scopes for record in config.tokens] == [("order", "write"), ("agent",)]


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


def test_the_example_agent_yaml_takes_orders_below_srv_only():
    assert agent_config().roots == ("/srv",)


def test_what_the_example_agent_yaml_shows_of_interpreters_and_services_is_of_their_form(tmp_path: Path):
    """They stand there as comments; without their marks they load."""
    text = re.sub(
        r"^# (interpreters:|service_command:|  \.)", r"\1", (EXAMPLES / "agent.yaml").read_text(), flags=re.MULTILINE
    )
    path = tmp_path / "agent.yaml"
    path.write_text(text)
    config = load_as(str(path), AgentConfig).value
    assert command_for(str(script_without_first_line(tmp_path)), config.interpreters)[0] == "/usr/bin/python3"
    assert platform.service_command("restart", "webshop", config.service_command) == ["sv", "restart", "webshop"]


def script_without_first_line(folder: Path) -> Path:
    script = folder / "configure.py"
    script.write_text("print()\n")
    return script


async def test_the_example_agent_finds_the_example_relays_at_a_real_dnsmasq_closest_first():
    lines = (EXAMPLES / "dnsmasq.conf").read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith("#")]
    with dns_server(options=[f"--{setting}" for setting in settings]) as server:
        config = msgspec.structs.replace(agent_config(), resolver=server.resolver)
        found = await find_sources(config, (), random.Random(1), now=0.0)
        assert server.was_asked("SRV", "_waystation._tcp.fra._sites.example.net")
    assert [tier(source) for source in found.sources] == sorted(tier(source) for source in found.sources)
    assert {source.url: source.addresses for source in found.sources} == {
        "https://relay.fra.example.net:7443": ("10.1.0.10",),
        "https://relay2.fra.example.net:7443": ("10.1.0.11",),
        "https://relay.iad.example.net:7443": ("10.2.0.10",),
        "https://relay.hq.example.net:7443": (),
        "disk:/mnt/dfs/waystation": (),
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


def unit(path: Path = UNIT) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def test_the_unit_of_an_agent_leaves_scripts_alone_and_serves_the_home_that_it_may_write():
    service = unit(AGENT_UNIT)["Service"]
    # Its control group holds the runners too: whatever else would be killed with the agent is a release's script.
    assert service["KillMode"] == "process"
    home = f"/var/lib/{service['StateDirectory']}"
    assert service["ExecStart"].endswith(f" agent serve --home {home}")
    assert f"--home {home}" in AGENT_UNIT.read_text().partition("[Unit]")[0], "the set-up makes another home"


@pytest.mark.parametrize("path", [UNIT, AGENT_UNIT], ids=lambda path: path.stem)
def test_a_unit_does_not_start_again_what_cannot_work(path: Path):
    wrong = {str(UsageError.exit_code), str(LockedError.exit_code)}
    assert set(unit(path)["Service"]["RestartPreventExitStatus"].split()) == wrong


def test_the_example_of_haproxy_can_be_planned_as_it_stands():
    folder = EXAMPLES / "haproxy"
    process = load_process(str(folder / "release.yaml"))
    where = load_environment(str(folder / "environments/production.yaml"))
    packages = {"web": PlannedPackage("Acme.Web", "1.4.2")}
    plan = make_plan(process, where, label="1.4.2", packages=packages, scripts=None, prompts={})
    (step,) = plan.steps
    assert isinstance(step, MachineStep)
    assert step.rotation is not None
    assert step.rotation.before.secrets == ("lb_token",)
    assert [turn.machine for turn in step.turns] == ["web1", "web2", "web3"]


def test_what_init_writes_can_be_planned_once_the_keys_are_there(tmp_path: Path):
    write_scaffold(str(tmp_path / "webshop"))
    environment = tmp_path / "webshop/environments/production.yaml"
    text = environment.read_text()
    for number in (1, 2):
        text = text.replace('key: ""', f'key: "sha256:{number:064}"', 1)
    environment.write_text(text)
    process = load_process(str(tmp_path / "webshop/release.yaml"))
    id = package_of(process.value.packages["web"]).id
    packages = {"web": PlannedPackage(id, "1.4.2")}
    make_plan(process, load_environment(str(environment)), label="1.4.2", packages=packages, scripts=None, prompts={})


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


@pytest.mark.parametrize(
    ("threshold", "files"),
    [(15, [UNIT]), (60, [AGENT_UNIT]), (15, [AGENT_UNIT, OWN_USER])],
    ids=["relay", "agent", "agent with a user of its own"],
)
def test_a_unit_stays_as_hardened_as_it_was_measured(tmp_path: Path, threshold: int, files: list[Path]):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: the hardening of the units is NOT measured")
    # A drop-in is read as if it stood at the unit's end.
    whole = tmp_path / files[0].name
    whole.write_text("".join(path.read_text() for path in files))
    done = subprocess.run(
        [analyze, "security", "--offline=true", f"--threshold={threshold}", str(whole)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


def test_every_unit_is_measured():
    assert {path.name for path in UNIT.parent.iterdir()} == {UNIT.name, AGENT_UNIT.name, OWN_USER.name}


@pytest.mark.parametrize("path", [UNIT, AGENT_UNIT], ids=lambda path: path.stem)
def test_a_unit_tries_for_as_long_as_it_takes(path: Path):
    """By default systemd gives up after five starts in ten seconds."""
    assert unit(path)["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit(path)["Service"]["Restart"] in {"on-failure", "always"}
