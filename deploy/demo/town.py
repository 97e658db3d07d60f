"""The demo's world: an origin, sites with a relay and machines each, counted lines between them, and DNS over it all.

Every line is a counting proxy. To a machine of fra, relay fra is a port of the site's own network and relay iad a port
of the WAN, as its SRV records say; so what the proxies count is what each line really carried.
"""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from balancer import haproxy
from ledger import Encoded, Pull, Sent, Taken
from narration import Narrator
from packages import Nupkg
from programs import Command, DemoError, Processes, end_what_is_left, program

from benchmarks.lines.network import CountingProxy, Line
from benchmarks.support.programs import free_ports
from relay.support.together import together

DOMAIN = "demo.test"
SITES = ("fra", "iad")
MACHINES_PER_SITE = 3
WAN = Line(rate=12.5e6)
"""100 Mbit/s in each direction of each line between sites."""

_ORIGIN = "origin"
_WAYSTATION = Path(sys.executable).parent / "waystation"


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    site: str

    @property
    def home(self) -> str:
        """Its own `$WAYSTATION_HOME`, below the demo's folder."""
        return f"machines/{self.name}"

    def root(self, package: Nupkg) -> str:
        """Where the trees of `package` stand on it."""
        return f"{self.home}/srv/{package.role}"


def missing() -> list[str]:
    """What the demo needs and this system has not, in words."""
    wanted = {
        f"the command waystation beside {sys.executable}: run 'make demo', or deploy/setup.sh": _WAYSTATION.exists(),
        "dnsmasq (Debian: apt-get install dnsmasq-base)": program("dnsmasq"),
        "haproxy (Debian: apt-get install haproxy)": haproxy(),
    }
    return [what for what, found in wanted.items() if not found]


class Town:
    """Use as an async context manager; leaving it ends every process and closes every line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines = tuple(Machine(f"{site}-{n + 1}", site) for site in SITES for n in range(MACHINES_PER_SITE))
        self.relay_ports = dict(zip(SITES, free_ports(len(SITES)), strict=True))
        self.processes = Processes(folder)
        self.origin_lines: dict[str, CountingProxy] = {}
        self.lines: dict[tuple[str, str], CountingProxy] = {}
        """By (site of the machines, relay)."""
        self.resolver = ""
        self.fingerprints: dict[str, str] = {}
        """Of the machines' agents, by name."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for name in ("logs", "tokens", "relays", "machines"):
            (self.folder / name).mkdir()
        (self.project / "environments").mkdir(parents=True)
        self._stack.push_async_callback(end_what_is_left, self.folder)
        self._stack.push_async_callback(self.processes.close)
        for relay, port in self.relay_ports.items():
            line = CountingProxy("127.0.0.1", port, up=WAN, down=WAN)
            self.origin_lines[relay] = await self._stack.enter_async_context(line)
            for site in SITES:
                shape = Line() if site == relay else WAN
                line = CountingProxy("127.0.0.1", port, up=shape, down=shape)
                self.lines[site, relay] = await self._stack.enter_async_context(line)
        return self

    async def __aexit__(self, *_: object) -> None:
        # Clients are ended before their lines are.
        await self.processes.close()
        await self._stack.aclose()

    @property
    def project(self) -> Path:
        """Where the files of a release are."""
        return self.folder / "project"

    # --- commands

    def at_origin(self, *arguments: str) -> Command:
        """`waystation …` where packages enter and releases begin, in whatever folder."""
        return Command(_WAYSTATION, arguments, (("WAYSTATION_HOME", str(self.folder / _ORIGIN)),))

    def on(self, machine: Machine, *arguments: str) -> Command:
        """`waystation …` on a machine."""
        return Command(_WAYSTATION, arguments, (("WAYSTATION_HOME", machine.home),))

    def init(self, machine: Machine) -> Command:
        return self.on(
            machine,
            *("agent", "init", "--name", machine.name, "--site", machine.site, "--domain", DOMAIN),
            *("--resolver", self.resolver, "--scheme", "http", "--trust", f"{_ORIGIN}/trust/trust.json", "--json"),
            # The names lead to this machine, which no rule can know: elsewhere a token goes over TLS.
            *(word for relay in self.relay_ports for word in ("--plain-http", f"relay.{relay}.{DOMAIN}")),
        )

    def pull(self, machine: Machine, package: Nupkg) -> Command:
        return self.on(
            machine,
            *("agent", "pull", package.id, package.version, "--root", machine.root(package), "--switch"),
            *("--token-file", "tokens/agent", "--json"),
        )

    def replicate(self, package: Nupkg) -> Command:
        urls = [f"--relay=http://127.0.0.1:{line.port}" for line in self.origin_lines.values()]
        return self.at_origin(
            "package", "replicate", package.id, package.version, *urls, "--token-file", "tokens/write", "--json"
        )

    def serve(self, relay: str) -> Command:
        return self.at_relay(
            *("serve", "--config", "relays/relay.yaml", "--site", relay, "--store", f"relays/{relay}"),
            *("--listen", f"127.0.0.1:{self.relay_ports[relay]}"),
        )

    def at_relay(self, *arguments: str) -> Command:
        return Command(_WAYSTATION, ("relay", *arguments))

    # --- services

    async def start_dns(self) -> Command:
        """Start a name server on a port of its own. Returns the command once it answers."""
        dnsmasq, [port] = program("dnsmasq"), free_ports(1)
        if dnsmasq is None:
            raise DemoError("dnsmasq is gone")
        self.resolver = f"127.0.0.1:{port}"
        (self.folder / "dnsmasq.conf").write_text(self.zone())
        # In front it stays without root, and in the foreground it can be ended by us.
        command = Command(dnsmasq, ("--no-daemon", "--conf-file=dnsmasq.conf", f"--port={port}", "--pid-file="))
        await self.processes.start("dns", command)
        await self.processes.until_said("dns", b": started, ")
        return command

    def zone(self) -> str:
        """The configuration of dnsmasq: two answers for each site, its own relay first, and the generic name."""
        own = ["no-resolv", "no-hosts", "bind-interfaces", "listen-address=127.0.0.1", f"local=/{DOMAIN}/"]
        hosts = [f"host-record=relay.{relay}.{DOMAIN},127.0.0.1" for relay in SITES]
        sites = [
            f"srv-host=_waystation._tcp.{site}._sites.{DOMAIN},relay.{relay}.{DOMAIN},{line.port},"
            f"{10 if site == relay else 20},100"
            for (site, relay), line in self.lines.items()
        ]
        generic = [
            f"srv-host=_waystation._tcp.{DOMAIN},relay.{relay}.{DOMAIN},{line.port},10,100"
            for (site, relay), line in self.lines.items()
            if site != relay
        ]
        return "\n".join([*own, *hosts, *sites, *generic, ""])

    async def start_relay(self, relay: str) -> None:
        """Start it on its port, over its store. Returns once it is ready."""
        await self.processes.start(f"relay-{relay}", self.serve(relay))
        await self.processes.until_said(f"relay-{relay}", b"relay ready at")

    async def pull_plug(self, relay: str) -> None:
        """Reset every connection to the relay and refuse new ones, until `plug_in`."""
        for line in self._lines_to(relay):
            await line.cut()

    def plug_in(self, relay: str) -> None:
        for line in self._lines_to(relay):
            line.restore()

    def _lines_to(self, relay: str) -> list[CountingProxy]:
        return [self.origin_lines[relay], *(line for (_, end), line in self.lines.items() if end == relay)]

    # --- what came of it

    def kept_bytes(self, what: str) -> int:
        """What the depot's `chunks` or `manifests` take on its disk."""
        return sum(
            path.stat().st_size for path in (self.folder / _ORIGIN / "depot" / what).rglob("*") if path.is_file()
        )

    async def json(self, command: Command) -> dict[str, Any]:
        """Run a command that prints one JSON document."""
        return dict(json.loads(await self.processes.run(command)))

    async def send(self, package: Nupkg) -> tuple[Sent, ...]:
        """Replicate to every relay at once, by the lines from the origin."""
        before = {relay: line.counts.total for relay, line in self.origin_lines.items()}
        told = (await self.json(self.replicate(package)))["relays"]
        relay_at = {f"http://127.0.0.1:{line.port}": relay for relay, line in self.origin_lines.items()}
        return tuple(
            Sent(
                relay,
                entry["chunks_sent"],
                self.origin_lines[relay].counts.total - before[relay],
                entry["wire_bytes"],
                _encodings(entry),
            )
            for entry in told
            for relay in [relay_at[entry["relay"]]]
        )

    async def pull_everywhere(self, package: Nupkg) -> tuple[Pull, ...]:
        """Pull onto every machine at once."""
        documents = await together([self.json(self.pull(machine, package)) for machine in self.machines])
        return tuple(_pull(machine, document) for machine, document in zip(self.machines, documents, strict=True))

    def received(self) -> dict[tuple[str, str], int]:
        """Bytes that each line between relays and machines has carried so far, in both directions."""
        return {ends: line.counts.total for ends, line in self.lines.items()}


def _pull(machine: Machine, document: dict[str, Any]) -> Pull:
    taken = {
        # http://relay.fra.demo.test:PORT
        name.split(".")[1]: Taken(tally["chunks"], tally["bytes"], tally["payload_bytes"])
        for name, tally in document["from_relays"].items()
    }
    told = (document["tree_bytes"], document["from_disk_bytes"], taken, _encodings(document))
    return Pull(machine.name, machine.site, *told)


def _encodings(document: dict[str, Any]) -> tuple[Encoded, ...]:
    return tuple(
        Encoded(entry["encoding"], entry["chunks"], entry["stream_bytes"], entry["payload_bytes"])
        for entry in document["encodings"]
    )


async def show(town: Town, tell: Narrator, *commands: Command, also: str = "", folder: Path | None = None) -> str:
    """Run commands at once, of which the first is told, `also` is a remark on the others; the output of the first."""
    tell.command(str(commands[0]), also)
    return (await together([town.processes.run(command, folder) for command in commands]))[0]
