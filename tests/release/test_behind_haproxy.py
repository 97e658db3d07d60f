"""A web farm behind a real HAProxy that hides nothing: what its visitors see, and what its own log says, of a release.

Who is in rotation is read from HAProxy's log alone, never from our journal.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from harness.dns import DOMAIN, Srv, dns_server
from harness.farm import Farm
from harness.haproxy_reader import were_out
from harness.packages import noise
from harness.process import Done, Process, wait_for
from harness.seed import SEED, SOAK

from benchmarks.support.programs import free_ports

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "deploy" / "demo"), str(REPOSITORY / "deploy" / "demo" / "webapp")]

import folder as webapp  # noqa: E402
import haproxy_log  # noqa: E402
from balancer import Balancer, haproxy  # noqa: E402
from load import Load, Summary  # noqa: E402
from programs import end_what_is_left  # noqa: E402

MACHINES = ("web1", "web2", "web3", "web4", "web5")
BOOT_SECONDS = {"web1": 0.9, "web2": 0.1, "web3": 0.1, "web4": 0.5, "web5": 0.0}
"""Uneven on purpose: a window that waits for its slowest would show."""

pytestmark = pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed: nothing is balanced")


@dataclass
class Shop:
    """The farm behind its balancer."""

    farm: Farm
    balancer: Balancer

    def add(self, version: str, *, ballast: int = 0) -> None:
        """`ballast`: bytes that do not compress, so that the package is some time on its way."""
        made = webapp.make(self.farm.folder / f"shop-{version}", version)
        if ballast:
            (made / "ballast.bin").write_bytes(noise(version, ballast))
        nupkg = self.farm.folder / f"{webapp.ID}.{version}.nupkg"
        self.farm.do("package", "pack", made, "--id", webapp.ID, "--version", version, "--output", nupkg)
        self.farm.do("package", "add", nupkg)

    def write_process(self, strategy: object) -> None:
        check = {"http": "http://${machine.address}:${port}/version", "expect": "${package.version}", "deadline": "5s"}
        self.farm.write_process(
            packages={"web": webapp.ID},
            steps=[
                {
                    "name": "web farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": str(self.farm.folder / "srv") + "/${machine.name}",
                    "strategy": strategy,
                    "rotation": "web",
                    "apply": ["switch", {"name": "restart", "script": "ops/restart.py"}],
                    "verify": [check],
                }
            ],
        )

    def begin(self, version: str, *words: str) -> Process:
        where = ("--environment", "production", "--package", f"web={version}")
        return self.farm.start("release", "deploy", version, *where, *words)

    async def deploy(self, version: str, *words: str) -> Done:
        return await asyncio.to_thread(lambda: self.begin(version, *words).result())

    async def deploy_under_load(
        self, version: str, *words: str, lose: Callable[[Process], object] = lambda _: None
    ) -> tuple[Done, Summary, haproxy_log.Log]:
        """The deployment, what visitors saw from well before to well after it, and HAProxy's log of that time.

        `lose` does something to it while it runs, in a thread.
        """
        await self.balancer.until_quiet()
        before = len(self.balancer.log().requests)
        began = datetime.now(UTC)
        async with Load(f"{self.balancer.url}/", rate=80.0) as load:
            await load.until(60)
            deploying = await asyncio.to_thread(self.begin, version, *words)
            await asyncio.to_thread(lose, deploying)
            done = await asyncio.to_thread(deploying.result)
            await load.until(load.summary().requests + 60)
        await self.balancer.until_quiet()
        whole = self.balancer.log()
        assert len(whole.requests) - before == load.summary().requests, "HAProxy hung up on visitors and logged nothing"
        return done, load.summary(), haproxy_log.since(whole, began)


@contextmanager
def _found_by_dns(farm: Farm, more_relays: Sequence[str]) -> Iterator[dict[str, str]]:
    """What stands in agent.yaml. Relays are named `localhost`, as those without tokens answer for no other name."""
    generic = f"_waystation._tcp.{DOMAIN}"
    places = [(f"_waystation._tcp.fra._sites.{DOMAIN}", "fra"), *((generic, site) for site in more_relays)]
    records = [Srv(name, "localhost", farm.relays[site].port) for name, site in places]
    with dns_server(records, {"localhost": ["127.0.0.1"]}) as server:
        yield {"domain": DOMAIN, "resolver": server.resolver, "scheme": "http"}
        assert server.was_asked("SRV", generic), "nobody asked DNS"


@asynccontextmanager
async def shop_in(folder: Path, *more_relays: str) -> AsyncIterator[Shop]:
    """With one relay; or with those beside it that serve every site, and agents that find them by DNS."""
    ports = dict(zip(MACHINES, free_ports(len(MACHINES)), strict=True))
    async with Balancer(folder / "lb", {name: f"127.0.0.1:{port}" for name, port in ports.items()}) as balancer:
        with Farm(folder) as farm:
            try:
                await asyncio.to_thread(_set_up, farm, balancer, ports, more_relays)
                yield Shop(farm, balancer)
            finally:
                for agent in farm.agents.values():
                    await asyncio.to_thread(agent.stop)
                await end_what_is_left(folder)


def _set_up(farm: Farm, balancer: Balancer, ports: dict[str, int], more_relays: Sequence[str]) -> None:
    for site in ("fra", *more_relays):
        farm.add_relay(site)
    found = farm.enter(_found_by_dns(farm, more_relays)) if more_relays else {}
    for name in MACHINES:
        farm.add_agent(name, relays=[] if found else None, **found).start()
    example = REPOSITORY / "deploy" / "examples" / "haproxy" / "environments" / "lb"
    shutil.copytree(example, farm.project / "environments" / "lb")
    (farm.project / "ops").mkdir()
    shutil.copy(webapp.RESTART, farm.project / "ops" / "restart.py")
    relays = {site: {"url": url, "site": site, "generic": site in more_relays} for site, url in farm.urls.items()}
    farm.write_environment(
        relays=relays,
        rotation={"web": {"before": "lb/out.py", "after": "lb/in.py", "probe": "lb/state.py", "secrets": ["lb_token"]}},
        secrets={"lb_token": {"file": str(balancer.token_file)}},
        variables={"haproxy": balancer.page, "backend": "web", "work_seconds": 0.05},
        machines={name: {"variables": {"port": ports[name], "boot_seconds": BOOT_SECONDS[name]}} for name in MACHINES},
    )


async def test_scenario_03_a_rolling_release_keeps_its_window_and_its_minimum_and_fails_no_request(
    tmp_path: Path,
) -> None:
    async with shop_in(tmp_path) as shop:
        shop.add("1.0.0")
        shop.add("2.0.0")
        shop.write_process("parallel")
        first = await shop.deploy("1.0.0")
        assert first.code == 0, first.out + first.err
        await shop.balancer.until_up()

        shop.write_process({"rolling": {"window": "40%", "min_in_service": 3}})
        done, seen, log = await shop.deploy_under_load("2.0.0")

        assert done.code == 0, done.out + done.err
        assert (seen.failed, seen.kinds) == (0, {})
        assert set(seen.versions) == {"1.0.0", "2.0.0"}
        assert haproxy_log.most_out_at_once(log) == 2, "40 % of five are two, and both places were used"
        assert haproxy_log.fewest_in_service(log) >= 3
        assert were_out(haproxy_log.rotation(log)) == set(MACHINES)


BALLAST = 24 << 20
STAGES: dict[str, tuple[Callable[[Shop, Process], bool], str]] = {
    "offer": (lambda _shop, _deploying: True, "fra1"),
    "survey": (lambda _shop, deploying: deploying.out.startswith("deployment "), " has "),
    "mid-transfer": (lambda shop, _: _bytes_below(shop.farm.folder / "relay-fra") > BALLAST // 4, "relay fra has Shop"),
    "mid-pull": (lambda shop, _: any(shop.farm.folder.glob("srv/*/releases/.incoming-*")), "everything is everywhere"),
    "roll": (lambda _shop, deploying: "its turn begins" in deploying.out, "succeeded"),
    "report": (lambda _shop, deploying: ": deployed" in deploying.out, "succeeded"),
}
"""When the relay of the site is lost, and what the deployment had not said by then."""


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/chunks/*/*"))


@pytest.mark.parametrize("stage", STAGES if SOAK else [list(STAGES)[SEED % len(STAGES)]])
async def test_a_site_that_loses_its_relay_at_any_stage_is_released_without_a_failed_request(
    tmp_path: Path, stage: str
) -> None:
    when, not_yet = STAGES[stage]
    async with shop_in(tmp_path, "ams") as shop:
        shop.add("1.0.0")
        shop.add("2.0.0", ballast=BALLAST)
        shop.write_process("parallel")
        first = await shop.deploy("1.0.0")
        assert first.code == 0, first.out + first.err
        await shop.balancer.until_up()
        before: list[str] = []

        def lose(deploying: Process) -> None:
            wait_for(lambda: when(shop, deploying))
            before.append(deploying.out)
            shop.farm.relays["fra"].kill()

        shop.write_process({"rolling": {"window": "40%", "min_in_service": 3}})
        if stage == "offer":
            shop.farm.relays["fra"].kill()
        done, seen, log = await shop.deploy_under_load("2.0.0", lose=lose)

        assert not_yet not in before[0], "the relay was lost too late"
        assert done.code == 0, done.out + done.err
        assert (seen.failed, seen.kinds) == (0, {})
        assert set(seen.versions) == {"1.0.0", "2.0.0"}
        assert haproxy_log.fewest_in_service(log) >= 3
        assert were_out(haproxy_log.rotation(log)) == set(MACHINES)
