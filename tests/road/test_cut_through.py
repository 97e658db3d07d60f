"""Cut-through: machines that know a manifest's digest pull the package while it still arrives at their relay.

The two tests at the end hold the relay to it in the two moments between "offered", "arriving" and "published".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.machines import Machine
from harness.origins import OriginHome
from harness.packages import Cut, cut_package, make_nupkg, noise
from harness.process import Process, wait_for
from harness.relays import RelayProcess

from benchmarks.lines.network import Line, ThreadedProxy
from relay.encoding.bundle import BundleDecoder, Received
from relay.errors import ChunkMissing
from relay.package.chunk import CHUNK_MAX
from relay.package.manifest import to_wire
from relay.protocol import messages
from relay.server.packages import Transfer
from relay.stores.open import Store, open_store

ID, VERSION = "Acme.Arriving", "1.0.0"
WAN_RATE = 4_000_000
"""Bytes a second from the origin to the relay: some six seconds for the package."""
LAN_RATE = 2 * WAN_RATE
"""From the relay to each machine. Who pulled only after the arrival would need half of its time once more."""
LATER = 0.15
"""Share of the replication's time that the last machine may end after it, beside one chunk's time on that line."""


@dataclass(frozen=True)
class Arriving:
    """A package that goes to a relay over a slow line."""

    origin: OriginHome
    relay: RelayProcess
    line: ThreadedProxy
    digest: str
    size: int
    """Bytes of the nupkg, which does not compress: about what crosses."""

    def replicating(self) -> Process:
        return self.origin.replicating(ID, VERSION, f"http://127.0.0.1:{self.line.port}")

    def wait_for(self, share: float, replicating: Process) -> None:
        """Until so much has crossed; the package is still on its way then."""
        wait_for(lambda: self.line.counts.up >= share * self.size or not replicating.is_alive)
        assert replicating.is_alive, "the replication ended too early"
        assert self.line.counts.up < 0.9 * self.size


@contextmanager
def arriving(folder: Path, rate: float) -> Iterator[Arriving]:
    origin = OriginHome(folder / "origin")
    files = {f"lib/part{n}.dll": noise(n, 900_000) for n in range(12)} | {"data/model.bin": noise("model", 13_000_000)}
    [added] = origin.add(make_nupkg(folder, files, ID, VERSION))
    with ExitStack() as stack:
        relay = stack.enter_context(RelayProcess(folder / "relay"))
        line = stack.enter_context(ThreadedProxy("127.0.0.1", relay.port, up=Line(rate=rate)))
        yield Arriving(origin, relay, line, added["manifest"], added["size"])


def test_machines_that_pull_while_a_package_arrives_end_with_its_replication(tmp_path: Path) -> None:
    with arriving(tmp_path, WAN_RATE) as package, ExitStack() as stack:
        machines = [Machine.made(tmp_path / f"machine{n}", package.origin.pins) for n in range(3)]
        lines = [
            stack.enter_context(ThreadedProxy("127.0.0.1", package.relay.port, down=Line(rate=LAN_RATE)))
            for _ in machines
        ]
        replicating = stack.enter_context(package.replicating())
        pulling = []
        for machine, line, share in zip(machines, lines, (0.05, 0.25, 0.45), strict=True):
            package.wait_for(share, replicating)
            url = f"http://127.0.0.1:{line.port}"
            pulling.append(stack.enter_context(machine.pulling(ID, VERSION, url, digest=package.digest)))
        # Starting a process costs these machines nothing in the end, as they start in mid-arrival; ending one costs
        # them what it costs the replication. So no allowance is made for either.
        [done] = replicating.result().json["relays"]
        arrived = time.monotonic()
        pulled = [command.result().json for command in pulling]
        late = time.monotonic() - arrived

        allowed = LATER * done["seconds"] + CHUNK_MAX / WAN_RATE
        print(f"replicated in {done['seconds']:.2f} s, the last machine {late:.2f} s later, allowed {allowed:.2f} s")
        assert package.size / LAN_RATE > allowed, "this would not tell cut-through from waiting"
        assert late <= allowed
        for machine, one in zip(machines, pulled, strict=True):
            assert not one["failed"]
            assert machine.verified() == [f"{ID} {VERSION}"]
        assert package.line.counts.up < 1.01 * package.size, "waiting machines cost the origin nothing"


def test_a_waiting_machine_outlasts_a_sender_that_is_killed_and_started_again(tmp_path: Path) -> None:
    with arriving(tmp_path, 4 * WAN_RATE) as package, ExitStack() as stack:
        machine = Machine.made(tmp_path / "machine", package.origin.pins)
        first = stack.enter_context(package.replicating())
        package.wait_for(0.1, first)
        pulling = stack.enter_context(machine.pulling(ID, VERSION, package.relay.url, digest=package.digest))
        package.wait_for(0.5, first)
        first.kill()
        time.sleep(1.0)
        assert pulling.is_alive
        assert package.replicating().result().code == 0
        assert not pulling.result().json["failed"]
    assert machine.verified() == [f"{ID} {VERSION}"]


def test_who_asks_too_early_or_without_the_digest_is_told_that_the_package_is_not_there(tmp_path: Path) -> None:
    with arriving(tmp_path, 4 * WAN_RATE) as package, ExitStack() as stack:
        machine = Machine.made(tmp_path / "machine", package.origin.pins)
        refused = machine.pulling(ID, VERSION, package.relay.url, digest=package.digest).result()
        assert (refused.code, "Replicate it first" in refused.err) == (1, True), refused
        replicating = stack.enter_context(package.replicating())
        package.wait_for(0.1, replicating)
        refused = machine.pulling(ID, VERSION, package.relay.url).result()
        assert (refused.code, "Replicate it first" in refused.err) == (1, True), refused
        assert replicating.is_alive
        assert machine.verified() == []
        assert machine.pulling(ID, VERSION, package.relay.url, digest=package.digest).result().code == 0
    assert machine.verified() == [f"{ID} {VERSION}"]


# --- the moments in between


@pytest.fixture
def cut() -> Cut:
    return cut_package({f"lib/part{n}.dll": noise(n, 70_000) for n in range(4)})


async def offer(transfer: Transfer, cut: Cut) -> messages.OfferAnswer:
    return await transfer.offer(cut.manifest.id, messages.Document(to_wire(cut.manifest.canonical)), None)


async def received(transfer: Transfer, cut: Cut) -> list[int]:
    want = messages.ChunkRanges(manifest=cut.manifest.id, ranges=((0, len(cut.manifest.chunks)),))
    decoder = BundleDecoder({cut.manifest.id: cut.manifest}.get)
    found: list[int] = []
    async for piece in transfer.give(await transfer.wanted(messages.BundleRequest(want=(want,)))):
        for events in decoder.feed(bytes(piece)):
            found += [event.index for event in events if isinstance(event, Received)]
    return found


async def test_a_chunk_is_given_also_when_it_lands_and_is_published_while_it_is_looked_for(
    cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = await open_store("memory:")
    transfer = Transfer(store)
    await offer(transfer, cut)
    look = store.chunks.open
    came_late = []

    async def look_just_before_the_end(id):
        try:
            return await look(id)
        except ChunkMissing:
            await store.chunks.put_many(list(cut.chunks.values()))
            await transfer.publish(cut.manifest.package, messages.PublishRequest(manifest=cut.manifest.id))
            came_late.append(id)
            raise

    monkeypatch.setattr(store.chunks, "open", look_just_before_the_end)
    assert await received(transfer, cut) == list(cut.indexes)
    assert came_late == [cut.manifest.chunk_id(0)]


async def test_a_manifest_can_be_read_only_once_its_chunks_count_as_arriving(
    cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = Transfer(await open_store("memory:"))
    keep = transfer.catalog.keep_manifest
    arriving_before = []

    async def keep_and_look(*arguments):
        arriving_before.append(cut.manifest.id in transfer.leases.offered())
        await keep(*arguments)

    monkeypatch.setattr(transfer.catalog, "keep_manifest", keep_and_look)
    await offer(transfer, cut)
    assert arriving_before == [True]
