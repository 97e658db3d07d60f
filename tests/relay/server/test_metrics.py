"""What a relay counts: every payload by direction and encoding, what failed, and what it cost nothing to send."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path

import aiohttp
import pytest
from harness.origins import depot_with
from harness.packages import Cut, cut_package, encode_run, make_nupkg, noise
from prometheus_client import REGISTRY

from relay.encoding.bundle import BundleWriter, Span, data_header
from relay.encoding.choose_bases import Held
from relay.encoding.codecs import ENCODINGS
from relay.errors import StoreError
from relay.package import manifest as manifests
from relay.package.ranges import from_indexes
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.server import metrics
from relay.server.bundle_answer import ANYBODY, Reader
from relay.server.packages import Transfer
from relay.stores.open import open_store
from relay.transfer.encoder_pool import Payloads

FILES = {f"lib/{i}.dll": noise(i, 200_000 + i) + b"text " * 20_000 for i in range(4)}
OLD = cut_package(FILES)
NEW = cut_package({path: data[:50_000] + b"changed" + data[50_000:] for path, data in FILES.items()}, version="1.0.1")
CHANGED = [i for i in NEW.indexes if NEW.manifest.chunk_id(i) not in OLD.chunks]
BASES = [i for i in OLD.indexes if OLD.manifest.chunk_id(i) not in NEW.chunks]
CHANGED_BYTES = sum(NEW.manifest.chunks[i].size for i in CHANGED)
ON_A_THIN_LINE = Reader(frozenset(ENCODINGS), (Held(OLD.manifest, from_indexes(OLD.indexes)),), 50_000.0)


class Counted:
    """What was counted since; counters are the process's, whoever else counted before."""

    def __init__(self) -> None:
        self._before = self._now()

    def __getitem__(self, name: str) -> float:
        """Such as `payload_bytes received hdiff`: of the counter, with its labels' values."""
        return self._now().get(name, 0.0) - self._before.get(name, 0.0)

    @staticmethod
    def _now() -> dict[str, float]:
        found = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                name = sample.name.removeprefix("waystation_").removesuffix("_total")
                found[" ".join([name, *sample.labels.values()])] = sample.value
        return found


@pytest.fixture
async def store():
    return await open_store("memory:")


@pytest.fixture
async def transfer(store):
    made = Transfer(store, arriving_seconds=10.0)
    await made.load()
    await bring(made, OLD, [plain(OLD, [i]) for i in OLD.indexes])
    await made.publish(OLD.manifest.package, messages.PublishRequest(manifest=OLD.manifest.id))
    yield made
    await made.close()


Frame = tuple[object, bytes]


def plain(cut: Cut, places: Sequence[int]) -> Frame:
    encoding, payload = encode_run([cut.chunk(i).data for i in places])
    return data_header((Span.of(cut.manifest.id, places),), encoding, payload), payload


def delta(built_on: Sequence[int] = BASES) -> Frame:
    """Of all that changed; true only where it is built on `BASES`."""
    base = b"".join(OLD.chunk(i).data for i in built_on)
    encoding, payload = encode_run([NEW.chunk(i).data for i in CHANGED], "hdiff", base)
    assert encoding == "hdiff"
    bases = (Span.of(OLD.manifest.id, BASES),)
    return data_header((Span.of(NEW.manifest.id, CHANGED),), encoding, payload, bases=bases), payload


async def bring(transfer: Transfer, cut: Cut, runs: Sequence[Frame], base: Cut | None = None) -> messages.BundleAnswer:
    document = messages.Document(manifests.to_wire(cut.manifest.canonical, base.manifest.canonical if base else None))
    offer = await transfer.offer(cut.manifest.id, document, base.manifest.id if base else None)
    writer = BundleWriter()

    async def body() -> AsyncIterator[bytes]:
        yield writer.start()
        for head, payload in runs:
            yield writer.frame(head) + payload
        yield writer.end()

    return await transfer.take_bundle(offer.lease, body())


async def take(transfer: Transfer, reader: Reader) -> None:
    async with aclosing(transfer.give([(NEW.manifest, tuple(CHANGED))], reader)) as pieces:
        async for _ in pieces:
            await asyncio.sleep(0)


# --- in


async def test_what_comes_in_is_counted_by_encoding(transfer):
    counted = Counted()
    run = delta()
    assert not (await bring(transfer, NEW, [run], OLD)).refused
    assert counted["payload_bytes received hdiff"] == len(run[1])
    assert counted["content_bytes received hdiff"] == CHANGED_BYTES
    assert counted["fallbacks received"] == 0
    assert counted["payloads adopted"] == 1


async def test_a_plain_run_is_counted_and_is_no_fallback(transfer):
    counted = Counted()
    run = plain(NEW, CHANGED)
    await bring(transfer, NEW, [run])
    assert counted["payload_bytes received zstd"] == len(run[1])
    assert counted["content_bytes received zstd"] == CHANGED_BYTES
    assert counted["payload_bytes received hdiff"] == counted["fallbacks received"] == 0


async def test_a_difference_without_its_base_is_one_fallback_and_no_content(transfer, store):
    await store.chunks.remove(OLD.manifest.chunk_id(BASES[0]))
    counted = Counted()
    assert (await bring(transfer, NEW, [delta()], OLD)).refused
    assert counted["fallbacks received"] == 1
    assert counted["content_bytes received hdiff"] == 0


async def test_a_difference_from_other_bytes_is_one_fallback(transfer):
    counted = Counted()
    assert (await bring(transfer, NEW, [delta(BASES[::-1])], OLD)).refused
    assert counted["fallbacks received"] == 1


async def test_a_plain_run_of_wrong_bytes_is_no_fallback(transfer):
    encoding, payload = encode_run([b"x" * NEW.manifest.chunks[CHANGED[0]].size])
    lie = data_header((Span.of(NEW.manifest.id, CHANGED[:1]),), encoding, payload), payload
    counted = Counted()
    assert (await bring(transfer, NEW, [lie])).refused
    assert counted["fallbacks received"] == 0


# --- out


async def whole(transfer: Transfer) -> None:
    """The relay holds the new version, too, and no payload of it."""
    await bring(transfer, NEW, [plain(NEW, [i]) for i in CHANGED])
    await transfer.publish(NEW.manifest.package, messages.PublishRequest(manifest=NEW.manifest.id))


async def test_a_chunk_as_it_is_stored_goes_out_as_such(transfer):
    await whole(transfer)
    counted = Counted()
    await take(transfer, ANYBODY)
    assert counted["content_bytes sent stored"] == CHANGED_BYTES
    assert 0 < counted["payload_bytes sent stored"] < CHANGED_BYTES
    assert counted["payloads encoded"] == counted["payloads kept"] == 0


async def test_what_is_encoded_for_one_costs_nothing_for_the_next(transfer):
    await whole(transfer)
    counted = Counted()
    await take(transfer, ON_A_THIN_LINE)
    encoded = counted["payloads encoded"]
    assert (encoded > 0, counted["payloads kept"]) == (True, 0)
    sent = {name: counted[f"content_bytes sent {name}"] for name in ENCODINGS}
    assert sum(sent.values()) == CHANGED_BYTES
    assert sent["hdiff"] + sent["zstd-prefix"] > 0
    await take(transfer, ON_A_THIN_LINE)
    assert (counted["payloads encoded"], counted["payloads kept"]) == (encoded, encoded)
    assert sum(counted[f"content_bytes sent {name}"] for name in ENCODINGS) == 2 * CHANGED_BYTES


async def test_an_encoder_that_fails_is_a_fallback_and_the_stored_form_follows(transfer, monkeypatch):
    async def fail(self, payload):
        raise StoreError("no encoder today")

    await whole(transfer)
    monkeypatch.setattr(Payloads, "_encode", fail)
    counted = Counted()
    await take(transfer, ON_A_THIN_LINE)
    assert counted["fallbacks sent"] > 0
    assert counted["content_bytes sent stored"] == CHANGED_BYTES


# --- where they are read


@pytest.mark.processes
async def test_a_replication_and_its_bytes_are_told_at_both_ends(tmp_path: Path):
    """Two processes: their counters are their own."""
    files = {f"lib/{i}.dll": noise(i, 300_000) for i in range(3)}
    async with depot_with(tmp_path, make_nupkg(tmp_path, files)) as origin:
        manifest = origin.added[0].manifest
    with serving(tmp_path / "depot") as above, serving(tmp_path / "below") as below:
        request = messages.ReplicationRequest(
            id=str(manifest.package.id),
            version=str(manifest.package.version),
            manifest=manifest.id,
            source=above,
        )
        async with RelayClient(below) as client, aclosing(client.replication(request)) as lines:
            states = [progress.state async for progress in lines]
        assert states[-1] == "done"
        of_above, of_below = [await read(url) for url in (above, below)]
    assert of_below['waystation_replications_total{outcome="done"}'] == 1
    assert sum_of(of_below, "content_bytes", "received") == manifest.stream_size
    assert sum_of(of_above, "content_bytes", "sent") == manifest.stream_size
    assert sum_of(of_above, "payload_bytes", "sent") == sum_of(of_below, "payload_bytes", "received") > 900_000


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a relay over this store."""
    words = ["relay", "serve", "--listen", "127.0.0.1:0", "--store", f"disk:{folder}"]
    with subprocess.Popen([sys.executable, "-m", "relay.main", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert " ready at " in ready, ready
            yield ready.split()[-1]
        finally:
            process.terminate()


async def read(url: str) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(url + messages.METRICS) as answer:
        text = await answer.text()
    return {name: float(value) for name, value in re.findall(r"^(waystation_\S+) (\S+)$", text, re.MULTILINE)}


def sum_of(told: dict[str, float], name: str, direction: str) -> float:
    head = f'waystation_{name}_total{{direction="{direction}",'
    return sum(value for sample, value in told.items() if sample.startswith(head))


def test_labels_have_few_values():
    """A relay that is read by thousands has as many samples as one that is read by one."""
    allowed = {"received", "sent", "stored", *ENCODINGS, "done", "failed", "encoded", "kept", "adopted"}
    for counter in (metrics.PAYLOAD, metrics.CONTENT, metrics.FALLBACKS, metrics.REPLICATIONS, metrics.PAYLOADS):
        for family in counter.collect():
            for sample in family.samples:
                assert set(sample.labels.values()) <= allowed
