"""SIGKILL in mid-transfer, of each process of the road: what was verified stays, and the rest goes on from there.

Tens of megabytes that do not compress go over a slow line. The moment of each kill falls between 20 and 80 % of
what an undisturbed run takes, and held against the proxy's count afterwards.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness.machines import Machine
from harness.origins import OriginHome
from harness.packages import make_nupkg, noise
from harness.process import Process, wait_for
from harness.relays import RelayProcess, check_store
from harness.seed import SOAK, chance

from benchmarks.lines.network import Line, ThreadedProxy
from relay.package.manifest import Manifest
from relay.protocol.client import RelayClient

ID, VERSION = "Acme.Heavy", "1.0.0"
SHARE = 1.0 if SOAK else 0.5
"""Of the package that `make soak` sends."""
RATE = 20_000_000 * SHARE
"""Bytes a second: slower than the programs also on a busy machine, so that the line is what a transfer waits for."""
TWICE_SHARE, TWICE_BYTES = 0.05, 8 << 20
"""What may cross the line twice: of an undisturbed run, and beside it."""
AWAY_SECONDS = 1.0
"""How long the receiving relay stays away."""

_once_more = [
    pytest.param(n, marks=[pytest.mark.soak, pytest.mark.skipif(not SOAK, reason="set WAYSTATION_SOAK=1")])
    for n in range(1, 11)
]
points = pytest.mark.parametrize("point", [0, *_once_more])
"""One random moment each time, and ten more on demand."""


def heavy_files() -> dict[str, bytes]:
    """105 MB of noise in the long form: parts of the largest chunk there is, small ones, and two that are cut by content."""
    files = {f"data/block{n}.bin": noise(f"block {n}", 4 << 20) for n in range(int(8 * SHARE))}
    files |= {f"data/piece{n}.bin": noise(f"piece {n}", 700_000) for n in range(int(30 * SHARE))}
    files |= {f"data/leaf{n}.txt": noise(f"leaf {n}", 20_000) for n in range(int(100 * SHARE))}
    model = int(24_000_000 * SHARE)
    return files | {"data/model1.bin": noise("model1", model), "data/model2.bin": noise("model2", model)}


@dataclass
class Lines:
    """The lines that one transfer may take, and what crosses them from now on."""

    proxies: list[ThreadedProxy]
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self._before = self._total

    @property
    def crossed(self) -> int:
        return self._total - self._before

    @property
    def _total(self) -> int:
        return sum(proxy.counts.total for proxy in self.proxies)


@dataclass(frozen=True)
class Heavy:
    """The package at the origin and at two relays, and what bringing it there and onto a machine costs undisturbed."""

    origin: OriginHome
    manifest: Manifest
    relays: list[RelayProcess]
    folder: Path
    replicate_bytes: int
    pull_bytes: int


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heavy]:
    folder = tmp_path_factory.mktemp("heavy")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        origin = OriginHome(folder / "origin")
        nupkg = make_nupkg(folder, heavy_files(), ID, VERSION)
        origin.add(nupkg)
        os.unlink(nupkg)
        relays = [stack.enter_context(RelayProcess(folder / name)) for name in ("fra", "iad")]
        with slow_line(relays[0], up=True) as one, slow_line(relays[1], up=True) as other:
            origin.replicate(ID, VERSION, url_of(one), url_of(other))
            costs = [one.counts.total, other.counts.total]
        with slow_line(relays[0]) as line:
            machine = Machine.made(folder / "undisturbed", origin.pins)
            machine.pull(ID, VERSION, url_of(line))
            pull_bytes = line.counts.total
        manifest = asyncio.run(origin.manifest(ID, VERSION))
        assert min(*costs, pull_bytes) > 100_000_000 * SHARE
        print(f"undisturbed: replicate {costs}, pull {pull_bytes}")
        yield Heavy(origin, manifest, relays, folder, min(costs), pull_bytes)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return chance(request.node.name)


def slow_line(relay: RelayProcess, *, up: bool = False) -> ThreadedProxy:
    line = Line(rate=RATE)
    return ThreadedProxy("127.0.0.1", relay.port, **({"up": line} if up else {"down": line}))


def url_of(line: ThreadedProxy) -> str:
    return f"http://127.0.0.1:{line.port}"


def kill_in_mid_transfer(
    rng: random.Random, whole: int, lines: Lines, running: Process, kill: Callable[[], None]
) -> None:
    """Call `kill` when a random share of `whole` has crossed, and prove that it fell into the transfer."""
    # Well inside of 20 to 80 %, as the line goes on while we look.
    point = int(whole * rng.uniform(0.3, 0.65))
    wait_for(lambda: lines.crossed >= point or not running.is_alive)
    was_alive, crossed = running.is_alive, lines.crossed
    kill()
    print(f"killed at {crossed} of {whole} bytes ({crossed / whole:.1%})")
    assert was_alive, "it had ended before the kill"
    assert 0.2 * whole <= crossed <= 0.8 * whole


def check_twice(whole: int, lines: Lines) -> None:
    twice = lines.crossed - whole
    print(f"{twice} bytes crossed twice")
    assert twice <= whole * TWICE_SHARE + TWICE_BYTES


@points
async def test_scenario_08_a_pull_goes_on_at_the_next_relay_when_its_relay_is_killed(
    point: int, heavy: Heavy, rng: random.Random, tmp_path: Path
) -> None:
    machine = Machine.made(tmp_path / "machine", heavy.origin.pins)
    with ExitStack() as stack:
        proxies = [stack.enter_context(slow_line(relay)) for relay in heavy.relays]
        lines = Lines(proxies)
        pulling = stack.enter_context(machine.pulling(ID, VERSION, *map(url_of, proxies)))
        asked: list[int] = []

        def kill_the_one_that_sends() -> None:
            asked.append(max(range(2), key=lambda n: proxies[n].counts.down))
            heavy.relays[asked[0]].kill()

        try:
            kill_in_mid_transfer(rng, heavy.pull_bytes, lines, pulling, kill_the_one_that_sends)
            pulled = pulling.result().json
        finally:
            heavy.relays[asked[0]].start()
        dead, living = url_of(proxies[asked[0]]), url_of(proxies[1 - asked[0]])
    assert list(pulled["failed"]) == [dead]
    assert set(pulled["from_relays"]) == {dead, living}
    assert sum(tally["bytes"] for tally in pulled["from_relays"].values()) == pulled["tree_bytes"]
    check_twice(heavy.pull_bytes, lines)
    assert machine.verified() == [f"{ID} {VERSION}"]
    await check_store(heavy.relays[asked[0]].store, heavy.manifest)
    shutil.rmtree(machine.folder)


@points
async def test_a_killed_pull_goes_on_where_it_was(point: int, heavy: Heavy, rng: random.Random, tmp_path: Path) -> None:
    machine = Machine.made(tmp_path / "machine", heavy.origin.pins)
    with slow_line(heavy.relays[0]) as proxy:
        lines = Lines([proxy])
        with machine.pulling(ID, VERSION, url_of(proxy)) as pulling:
            kill_in_mid_transfer(rng, heavy.pull_bytes, lines, pulling, pulling.kill)
        assert machine.verified() == [], "a half tree is not installed"
        again = machine.pull(ID, VERSION, url_of(proxy))
        assert again["resumed_bytes"] > 0
        assert again["resumed_bytes"] + again["from_relays"][url_of(proxy)]["bytes"] == again["tree_bytes"]
    assert heavy.relays[0].is_alive, "a reader that goes away takes no relay with it"
    check_twice(heavy.pull_bytes, lines)
    assert machine.verified() == [f"{ID} {VERSION}"]
    await check_store(heavy.relays[0].store, heavy.manifest)
    shutil.rmtree(machine.folder)


@points
async def test_a_killed_replication_goes_on_where_it_was(
    point: int, heavy: Heavy, rng: random.Random, tmp_path: Path
) -> None:
    relay = RelayProcess(tmp_path / "relay")
    with relay, slow_line(relay, up=True) as proxy:
        lines = Lines([proxy])
        with heavy.origin.replicating(ID, VERSION, url_of(proxy)) as replicating:
            kill_in_mid_transfer(rng, heavy.replicate_bytes, lines, replicating, replicating.kill)
        assert not await listed(relay), "a package that is not whole is not listed"
        again = heavy.origin.replicate(ID, VERSION, url_of(proxy))[url_of(proxy)]
        assert again["chunks_sent"] < again["chunks"]
        check_twice(heavy.replicate_bytes, lines)
        await check_arrived(relay, heavy)
    relay.wipe()


@points
async def test_a_replication_goes_on_when_the_killed_relay_comes_back(
    point: int, heavy: Heavy, rng: random.Random, tmp_path: Path
) -> None:
    relay = RelayProcess(tmp_path / "relay")
    with relay, slow_line(relay, up=True) as proxy:
        lines = Lines([proxy])
        with heavy.origin.replicating(ID, VERSION, url_of(proxy)) as replicating:
            kill_in_mid_transfer(rng, heavy.replicate_bytes, lines, replicating, relay.kill)
            time.sleep(AWAY_SECONDS)
            assert replicating.is_alive, "it waits for the relay"
            relay.start()
            [done] = replicating.result().json["relays"]
        assert done["interruptions"] >= 1
        check_twice(heavy.replicate_bytes, lines)
        assert heavy.origin.replicate(ID, VERSION, url_of(proxy))[url_of(proxy)]["chunks_sent"] == 0
        await check_arrived(relay, heavy)
    relay.wipe()


async def listed(relay: RelayProcess) -> bool:
    async with RelayClient(relay.url) as client:
        return bool(await client.packages())


async def check_arrived(relay: RelayProcess, heavy: Heavy) -> None:
    assert await listed(relay)
    await check_store(relay.store, heavy.manifest)
    machine = Machine.made(relay.home / "machine", heavy.origin.pins)
    machine.pull(ID, VERSION, relay.url)
    assert machine.verified() == [f"{ID} {VERSION}"]
