"""What `--explain` says is what is sent: the plan made beforehand, the transfer after it, and the bytes that the relay was given
agree run by run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from itertools import takewhile

import pytest
from harness.packages import Cut, cut_package, noise
from harness.relays import running_relay
from harness.short_runs import shorten_runs

from relay.encoding import planner
from relay.encoding.bundle import BundleDecoder, NeedsBases, Places, Sink
from relay.encoding.choose_bases import Held
from relay.encoding.codecs import PLAIN, RAW
from relay.encoding.estimates import Rates
from relay.encoding.holdings import StoreHoldings
from relay.encoding.planner import Line, class_of
from relay.errors import ChunkMissing
from relay.protocol.client import RelayClient
from relay.stores.memory import MemoryChunks, MemoryDocuments
from relay.support.rate_limit import Pacer
from relay.transfer import probe, run_queue
from relay.transfer.link_history import Lines, Meter
from relay.transfer.probe import Explained
from relay.transfer.replicate import ReplicationResult, Shipping, plan, replicate

PATIENCE = 120.0
RUN = 400_000
LINES = [240e3, 550e3, 2e6, 4e6, 15e6, 35e6, 80e6]
"""One of each class. Bytes per second."""


def code(name: str, size: int) -> bytes:
    """Bytes that shrink to about a half, as program files do."""
    random = noise(name, size // 2)
    return b"".join(random[i : i + 40] + bytes(40) for i in range(0, len(random), 40))[:size]


def edited(data: bytes, every: int = 4000) -> bytes:
    """One byte changed now and then, as rebuilt code is: nothing of it is the same chunk, all of it is like it."""
    changed = bytearray(data)
    for at in range(0, len(changed), every):
        changed[at] ^= 0x55
    return bytes(changed)


FILES = {f"lib/{i:02}.dll": code(f"dll {i}", 150_000 + i) for i in range(8)}
PICTURES = {f"img/{i}.png": noise(f"png {i}", 90_000) for i in range(2)}
TEXTS = {f"content/{i}.txt": b"the same words again, and line %d; " % i * 6000 for i in range(4)}
OLD = cut_package(FILES | PICTURES | TEXTS)
NEW = cut_package(
    {path: edited(data) for path, data in (FILES | TEXTS).items()}
    | {"img/0.png": PICTURES["img/0.png"], "new/what.dll": code("quite new", 200_000)},
    version="1.1.0",
)


@dataclass(frozen=True)
class Run:
    """One run: its chunks, how it went, and the bytes of its payload."""

    chunks: tuple[int, ...]
    encoding: str
    payload_bytes: int


class Counting(Sink):
    def __init__(self, done: Callable[[int], None]) -> None:
        self._done = done
        self._size = 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)

    def finish(self) -> None:
        self._done(self._size)

    def fail(self) -> None: ...


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs from a small package; and a processor that is always the same, as a busy one measures another speed."""
    shorten_runs(monkeypatch, RUN)
    monkeypatch.setattr(run_queue, "rates_of", lambda _size, _seconds: Rates())


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Every run of a bundle that was put to a relay, read from the bytes that went."""
    found: list[Run] = []
    put = RelayClient.put_bundle

    async def watched(self: RelayClient, lease: str, body: AsyncIterator[bytes]) -> object:
        whole = b"".join([bytes(piece) async for piece in body])

        async def again() -> AsyncIterator[bytes]:
            yield whole

        answer = await put(self, lease, again())
        found.extend(runs_of(whole))
        return answer

    monkeypatch.setattr(RelayClient, "put_bundle", watched)
    return found


def runs_of(body: bytes) -> list[Run]:
    found: list[Run] = []

    def tap(run: Places, bases: Places, encoding: str) -> Sink:
        chunks = tuple(index for _, index in run)
        return Counting(lambda size: found.append(Run(chunks, encoding, size)))

    cuts = {cut.manifest.id: cut for cut in (OLD, NEW)}
    decoder = BundleDecoder(lambda id: cuts[id].manifest if id in cuts else None, tap=tap)
    for batch in decoder.feed(body):
        for event in batch:
            if isinstance(event, NeedsBases):
                event.provide([cuts[id].chunk(index).data for id, index in event.bases])
    decoder.finish()
    return found


def planned_runs(explained: Explained) -> list[Run]:
    assert all(run.choice.chosen.exact for run in explained.runs)
    return [Run(run.run.indexes, run.coding.encoding, run.choice.chosen.payload_bytes) for run in explained.runs]


async def source_of(*cuts: Cut) -> MemoryChunks:
    store = MemoryChunks()
    for cut in cuts:
        await store.put_many(list(cut.chunks.values()))
    return store


async def known_line(url: str) -> Lines:
    """A line that was measured as faster than any limit: so the limit is how fast it is, from the first byte to the last."""
    meter = Meter(Line(1e15, 1e-4))
    meter.samples = 1
    lines = Lines(MemoryDocuments())
    await lines.remember(url, meter)
    return lines


async def explained_and_sent(
    relay: object, cut: Cut, source: MemoryChunks, rate: float
) -> tuple[Explained, ReplicationResult]:
    async with asyncio.timeout(PATIENCE), relay.client() as client:  # type: ignore[attr-defined]
        how = Shipping(lines=await known_line(client.url), known=[OLD.manifest], pacer=Pacer(rate), explains=True)
        # Encoders of its own each time, as two commands have.
        told = await plan(cut.manifest, source, client, how)
        sent = await replicate(cut.manifest, b"envelope", source, client, how)
    return told, sent


def assert_agree(told: Explained, sent: ReplicationResult, crossed: list[Run]) -> None:
    runs = planned_runs(told)
    assert runs == sorted(crossed, key=lambda run: run.chunks)
    assert sent.explained is not None
    assert sorted(planned_runs(sent.explained), key=lambda run: run.chunks) == runs
    assert {one.encoding: one.payload_bytes for one in sent.encodings} == {
        name: sum(run.payload_bytes for run in runs if run.encoding == name) for name in {run.encoding for run in runs}
    }
    assert sent.payload_bytes == sum(run.payload_bytes for run in runs)
    assert {str(row.candidate.coding) for row in told.rows if row.chosen} == {str(run.coding) for run in told.runs}


@pytest.mark.parametrize("rate", LINES, ids=lambda rate: class_of(rate).name)
async def test_a_first_send_is_what_was_explained_run_by_run(tmp_path, crossed, rate):
    source = await source_of(OLD)
    async with running_relay(tmp_path / "relay") as relay:
        told, sent = await explained_and_sent(relay, OLD, source, rate)
    assert len(told.runs) > 2
    assert_agree(told, sent, crossed)


@pytest.mark.parametrize("rate", LINES, ids=lambda rate: class_of(rate).name)
async def test_a_next_version_is_what_was_explained_run_by_run(tmp_path, crossed, rate):
    source = await source_of(OLD, NEW)
    async with running_relay(tmp_path / "relay") as relay:
        async with relay.client() as client:
            await replicate(OLD.manifest, b"envelope", source, client, Shipping(force=PLAIN))
        crossed.clear()
        told, sent = await explained_and_sent(relay, NEW, source, rate)
    assert told.base == "1.0.0"
    assert_agree(told, sent, crossed)
    if rate <= 2e6:
        assert {run.encoding for run in crossed} & {"hdiff", "zstd-prefix"}


async def test_what_is_explained_differs_from_line_to_line(tmp_path):
    """Else the tests above would compare one plan with itself."""
    source, told = await source_of(OLD), {}
    async with running_relay(tmp_path / "relay") as relay, relay.client() as client:
        for rate in (100e3, 4e6, 80e6):
            how = Shipping(lines=await known_line(client.url), pacer=Pacer(rate))
            told[rate] = {str(run.coding) for run in (await plan(OLD.manifest, source, client, how)).runs}
    assert "zstd:19" in told[100e3]
    assert "zstd:19" not in told[80e6]
    assert told[4e6] != told[80e6]


@pytest.mark.parametrize("rate", [100e3, 80e6])
async def test_a_plan_says_which_chunk_the_source_lacks(tmp_path, rate):
    source = await source_of(OLD)
    lost = OLD.manifest.chunk_id(len(OLD.manifest.chunks) - 1)
    await source.remove(lost)
    async with running_relay(tmp_path / "relay") as relay, relay.client() as client:
        with pytest.raises(ChunkMissing) as told:
            await plan(OLD.manifest, source, client, Shipping(lines=await known_line(client.url), pacer=Pacer(rate)))
    assert told.value.id == lost


async def test_what_takes_encoders_too_long_is_estimated_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "ENCODED_SECONDS", 0.0)
    source = await source_of(OLD)
    async with running_relay(tmp_path / "relay") as relay, relay.client() as client:
        told = await plan(OLD.manifest, source, client, Shipping())
        assert not any(run.choice.chosen.exact for run in told.runs if run.coding != RAW)
        sent = await replicate(OLD.manifest, b"envelope", source, client, Shipping())
    planned = sum(run.choice.chosen.payload_bytes for run in told.runs)
    assert 0.5 < sent.payload_bytes / planned < 2.0


@pytest.mark.parametrize("holds", [False, True], ids=["nothing", "the version before"])
@pytest.mark.parametrize("rate", [240e3, 2e6, 15e6], ids=lambda rate: class_of(rate).name)
async def test_a_relay_answers_an_agent_by_the_same_plan_run_by_run(tmp_path, monkeypatch, rate, holds):
    source = await source_of(OLD, NEW)
    planned: list[tuple[int, str]] = []
    plan_run = planner.plan_run

    def watched(run, *facts, **more):
        choice = plan_run(run, *facts, **more)
        # A payload that is kept, and is worse than what can be made, is weighed and passed over.
        if choice.chosen.source == ("kept" if run.made else "encoder"):
            planned.append((run.size, choice.coding.encoding))
        return choice

    runs: list[tuple[int, str, int]] = []

    def tap(run: Places, bases: Places, encoding: str) -> None:
        runs.append((NEW.manifest.size_of(index for _, index in run), encoding, len(run)))

    held = Held(OLD.manifest, ((0, len(OLD.manifest.chunks)),))
    bases = StoreHoldings(source, {OLD.manifest.id: OLD.manifest}, [held]) if holds else None
    async with running_relay(tmp_path / "relay") as relay, relay.client() as client:
        for cut in (OLD, NEW):
            await replicate(cut.manifest, b"envelope", source, client, Shipping(force=PLAIN))
        monkeypatch.setattr(planner, "plan_run", watched)
        events = client.stream(NEW.manifest, list(NEW.indexes), bases=bases, goodput=rate, tap=tap)
        async with asyncio.timeout(PATIENCE), aclosing(events):
            async for _ in events:
                pass
    assert len(planned) > 1
    left = iter(runs)
    for one in planned:
        # While encoders are waited for, chunks go as they are stored.
        passed = list(takewhile(lambda run, one=one: run[:2] != one, left))
        assert {(chunks, encoding) for _, encoding, chunks in passed} <= {(1, "zstd")}
    assert {(chunks, encoding) for _, encoding, chunks in left} <= {(1, "zstd")}
    assert sum(size for size, _, _ in runs) == NEW.manifest.stream_size
