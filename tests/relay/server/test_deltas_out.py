"""What a relay sends to a reader that holds something, or whose line is thin; and that the stored form always remains."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from harness.packages import Cut, cut_package, encode_run, noise
from harness.process import eventually
from harness.short_runs import shorten_runs

from relay.encoding.bundle import (
    Aborted,
    BundleDecoder,
    BundleWriter,
    Event,
    NeedsBases,
    NotSent,
    Places,
    Received,
    RunRefused,
    Span,
    Whole,
    data_header,
)
from relay.encoding.choose_bases import Held
from relay.encoding.codecs import ENCODINGS
from relay.errors import FrameError, StoreError
from relay.package import manifest as manifests
from relay.package.ranges import from_indexes
from relay.protocol import messages
from relay.server import bundle_answer
from relay.server.bundle_answer import Reader
from relay.server.packages import Transfer
from relay.stores.open import open_store
from relay.transfer.encoder_pool import PayloadReader, Payloads, PayloadSpec, working_bytes

PATIENCE = 30.0
THIN = 50_000.0
LAN = 100e6
FILES = {f"lib/{i}.dll": noise(i, 200_000 + i) + b"text " * 20_000 for i in range(6)}
OLD = cut_package(FILES)
NEW = cut_package({path: data[:50_000] + b"changed" + data[50_000:] for path, data in FILES.items()}, version="1.0.1")
FOREIGN = cut_package({"x.dll": noise("x", 300_000)}, id="Other.Lib")
CHANGED = [i for i in NEW.indexes if NEW.manifest.chunk_id(i) not in OLD.chunks]
EVERYTHING = frozenset(ENCODINGS)


@pytest.fixture
async def store():
    return await open_store("memory:")


@pytest.fixture
async def transfer(store):
    made = Transfer(store, arriving_seconds=PATIENCE)
    await made.load()
    for cut in (OLD, NEW):
        await bring(made, cut)
        await made.publish(cut.manifest.package, messages.PublishRequest(manifest=cut.manifest.id))
    yield made
    await made.close()


async def pieces(*some: bytes):
    for piece in some:
        await asyncio.sleep(0)
        yield piece


async def offer(transfer: Transfer, cut: Cut) -> str:
    document = messages.Document(manifests.to_wire(cut.manifest.canonical, None))
    return (await transfer.offer(cut.manifest.id, document, None)).lease


async def bring(transfer: Transfer, cut: Cut, places: Sequence[int] | None = None) -> None:
    lease = await offer(transfer, cut)
    writer = BundleWriter()
    body = [writer.start()]
    for i in cut.indexes if places is None else places:
        encoding, payload = encode_run([cut.chunk(i).data])
        body += [writer.frame(data_header((Span.of(cut.manifest.id, [i]),), encoding, payload)), payload]
    await transfer.take_bundle(lease, pieces(*body, writer.end()))


def held(cut: Cut = OLD, places: Sequence[int] | None = None) -> Held:
    return Held(cut.manifest, from_indexes(cut.indexes if places is None else places))


def reader(goodput: float = THIN, *bases: Held, encodings: frozenset[str] = EVERYTHING) -> Reader:
    return Reader(encodings, bases, goodput)


@dataclass
class Taken:
    """What a reader made of an answer."""

    events: list[Event] = field(default_factory=list)
    encodings: list[tuple[str, int, int]] = field(default_factory=list)
    """(encoding, chunks, bases) of each run."""
    size: int = 0

    @property
    def chunks(self) -> list[int]:
        return [event.index for event in self.events if isinstance(event, Received)]

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def is_stored(self) -> bool:
        return all(run == ("zstd", 1, 0) for run in self.encodings)


async def take(transfer: Transfer, who: Reader, places: Sequence[int] = CHANGED, cut: Cut = NEW) -> Taken:
    """Read as a reader does that holds the old version."""
    taken = Taken()

    def tap(run: Places, bases: Places, encoding: str) -> None:
        taken.encodings.append((encoding, len(run), len(bases)))

    cuts = {each.manifest.id: each for each in (OLD, NEW, FOREIGN, cut)}
    decoder = BundleDecoder(lambda id: cuts[id].manifest if id in cuts else None, tap=tap)
    async with asyncio.timeout(PATIENCE), aclosing(transfer.give([(cut.manifest, tuple(places))], who)) as given:
        async for piece in given:
            taken.size += len(piece)
            for batch in decoder.feed(piece):
                for event in batch:
                    if isinstance(event, NeedsBases):
                        event.provide([cuts[id].chunk(index).data for id, index in event.bases])
                    else:
                        taken.events.append(event)
    decoder.finish()
    assert isinstance(taken.events[-1], Whole)
    assert all(event.chunk.data == cut.chunk(event.index).data for event in taken.of(Received))
    return taken


@pytest.fixture
def encoded(monkeypatch):
    """Every spec for which an encoder was begun."""
    begun: list[PayloadSpec] = []
    start = Payloads._start

    def watched(self, spec):
        begun.append(spec)
        return start(self, spec)

    monkeypatch.setattr(Payloads, "_start", watched)
    return begun


# --- what is sent to whom


async def test_who_names_nothing_gets_the_stored_form_and_no_encoder_is_begun(transfer, encoded):
    taken = await take(transfer, Reader())
    assert taken.chunks == CHANGED
    assert taken.is_stored
    assert encoded == []


async def test_a_fast_line_gets_the_stored_form_whatever_it_holds(transfer, encoded):
    taken = await take(transfer, reader(LAN, held()))
    assert taken.chunks == CHANGED
    assert taken.is_stored
    assert encoded == []


@pytest.mark.parametrize("goodput", [0.0, THIN])
async def test_a_thin_or_unknown_line_gets_differences_from_what_the_reader_holds(transfer, goodput):
    taken = await take(transfer, reader(goodput, held()))
    assert sorted(taken.chunks) == CHANGED
    assert {encoding for encoding, _, _ in taken.encodings} <= {"zstd-prefix", "hdiff"}
    assert taken.size < 20_000


async def test_a_thin_line_without_bases_gets_runs_of_several_chunks(transfer):
    taken = await take(transfer, reader(THIN))
    assert sorted(taken.chunks) == CHANGED
    assert all(bases == 0 and encoding == "zstd" for encoding, _, bases in taken.encodings)
    assert len(taken.encodings) < len(CHANGED)


async def test_no_encoding_is_used_that_the_reader_does_not_know(transfer):
    plain = frozenset({"raw", "zstd"})
    assert {name for name, _, _ in (await take(transfer, reader(THIN, held(), encodings=plain))).encodings} == {"zstd"}
    prefix = plain | {"zstd-prefix"}
    assert "hdiff" not in {n for n, _, _ in (await take(transfer, reader(THIN, held(), encodings=prefix))).encodings}


async def test_bases_that_the_relay_lacks_are_passed_over(transfer, store):
    for cut in (OLD, NEW):
        kept = {cut.manifest.chunk_id(i) for i in cut.indexes}
        assert await store.chunks.has_many(kept) == kept
    gone = held().manifest.chunk_id(0)
    await store.chunks.remove(gone)
    request = messages.BundleRequest(
        want=(messages.ChunkRanges(manifest=NEW.manifest.id, ranges=from_indexes(CHANGED)),),
        encodings=ENCODINGS,
        bases=(
            messages.ChunkRanges(manifest=FOREIGN.manifest.id, ranges=((0, 10**6),)),
            messages.ChunkRanges(manifest=OLD.manifest.id, ranges=from_indexes(OLD.indexes)),
        ),
        goodput=THIN,
    )
    who = await transfer.reader(request)
    assert [one.manifest.id for one in who.bases] == [OLD.manifest.id]
    taken = await take(transfer, who)
    assert sorted(taken.chunks) == CHANGED
    assert taken.encodings[0][0] in {"zstd-prefix", "hdiff"}


async def test_bases_outside_of_their_manifest_are_refused(transfer):
    ask = messages.ChunkRanges(manifest=NEW.manifest.id, ranges=((0, 1),))
    beyond = messages.ChunkRanges(manifest=OLD.manifest.id, ranges=((0, 10**6),))
    with pytest.raises(FrameError):
        await transfer.reader(messages.BundleRequest(want=(ask,), bases=(beyond,)))


# --- sharing


async def test_readers_who_hold_the_same_share_one_encoding(transfer, encoded):
    taken = await asyncio.gather(*(take(transfer, reader(THIN, held())) for _ in range(5)))
    assert all(sorted(each.chunks) == CHANGED for each in taken)
    assert len(encoded) == len(set(encoded)) == len(taken[0].encodings)
    again = await take(transfer, reader(THIN, held()))
    assert again.encodings == taken[0].encodings
    assert len(encoded) == len(taken[0].encodings)


async def test_while_encoders_are_busy_the_stored_form_is_sent(transfer, monkeypatch, encoded):
    monkeypatch.setattr(Payloads, "is_busy", lambda self: True)
    taken = await take(transfer, reader(THIN, held()))
    assert taken.chunks == CHANGED
    assert taken.is_stored
    assert encoded == []


async def test_where_connections_hold_much_an_encoder_that_holds_less_will_do_and_else_the_stored_form(
    transfer, encoded
):
    whole = await take(transfer, reader(THIN, held()))
    dear = max(working_bytes(spec) for spec in encoded)
    transfer.payloads.limit_to(dear - 1)
    encoded.clear()
    less = await take(transfer, reader(THIN, held()))
    assert sorted(less.chunks) == sorted(whole.chunks) == CHANGED
    assert all(working_bytes(spec) < dear for spec in encoded)
    transfer.payloads.limit_to(0)
    encoded.clear()
    least = await take(transfer, reader(THIN, held()))
    assert (least.chunks, least.is_stored, encoded) == (CHANGED, True, [])


async def test_runs_are_encoded_ahead_of_the_line(transfer, monkeypatch, encoded):
    shorten_runs(monkeypatch, 300_000)
    monkeypatch.setattr(bundle_answer, "_AHEAD", 2)
    async with aclosing(transfer.give([(NEW.manifest, tuple(CHANGED))], reader(THIN, held()))) as given:
        seen = b""
        async for piece in given:
            seen += piece
            if len(seen) > 100:
                break
        await eventually(lambda: len(encoded) == 3)
    # A reader who is gone leaves no encoder at work, and what was begun for it is forgotten.
    await eventually(lambda: not transfer.payloads._tasks)
    assert sorted((await take(transfer, reader(THIN, held()))).chunks) == CHANGED


# --- when something is in the way


async def test_what_cannot_be_encoded_is_sent_as_it_is_stored_and_damage_is_told(transfer, store):
    id = NEW.manifest.chunk_id(CHANGED[2])
    store.chunks.stored[id] = store.chunks.stored[id][:-1] + b"\0"
    taken = await take(transfer, reader(THIN, held()))
    assert sorted(taken.chunks) == [i for i in CHANGED if i != CHANGED[2]]
    assert [event.reason for event in taken.of(NotSent)] == ["absent"]


async def test_a_base_that_is_damaged_here_costs_the_difference_only(transfer, store):
    id = OLD.manifest.chunk_id(1)
    store.chunks.stored[id] = store.chunks.stored[id][:-1] + b"\0"
    taken = await take(transfer, reader(THIN, held()))
    assert sorted(taken.chunks) == CHANGED
    assert taken.of(NotSent) == []


async def test_a_medium_that_fails_is_told_in_the_bundle(transfer, store, monkeypatch):
    async def fails(id):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(store.chunks, "get", fails)
    monkeypatch.setattr(store.chunks, "open", fails)
    taken = Taken()
    decoder = BundleDecoder({NEW.manifest.id: NEW.manifest}.get)
    async for piece in transfer.give([(NEW.manifest, tuple(CHANGED))], reader(THIN, held())):
        for batch in decoder.feed(piece):
            taken.events += batch
    assert taken.of(Aborted) == [Aborted("store_failed")]
    assert decoder.ended


async def test_an_encoder_that_stands_still_is_not_waited_for(transfer, monkeypatch):
    async def never(self, least):
        await asyncio.sleep(3600)

    monkeypatch.setattr(PayloadReader, "ready", never)
    transfer._arriving_seconds = 0.05
    taken = await take(transfer, reader(THIN, held()))
    assert sorted(taken.chunks) == CHANGED
    assert taken.is_stored


async def test_a_payload_that_breaks_off_in_the_middle_ends_the_bundle_so_that_the_reader_asks_again(
    transfer, monkeypatch
):
    made = PayloadReader.stretches

    async def half(self, *how):
        payload = b"".join([stretch async for stretch, _ in made(self, *how)])
        yield payload[: len(payload) // 2], True
        raise StoreError("gone")

    monkeypatch.setattr(PayloadReader, "stretches", half)
    taken = await take(transfer, reader(THIN, held()))
    assert taken.of(Aborted) == [Aborted("busy")]
    assert len(taken.of(RunRefused)) == 1


# --- packages that still arrive


async def test_chunks_that_land_while_a_thin_reader_waits_reach_it(transfer):
    late = cut_package({f"{i}.bin": noise(f"late{i}", 400_000) for i in range(5)}, id="Late")
    await bring(transfer, late, [])
    reading = asyncio.create_task(take(transfer, reader(THIN), list(late.indexes), late))
    await asyncio.sleep(0.05)
    assert not reading.done()
    await bring(transfer, late)
    assert sorted((await reading).chunks) == list(late.indexes)


async def test_a_difference_that_arrives_is_handed_on_to_who_holds_its_bases_and_to_nobody_else(transfer, encoded):
    """The cut-through of cascades: nothing is encoded on the way."""
    newer = cut_package({path: data[:9_000] + b"again" + data[9_000:] for path, data in FILES.items()}, version="2.0.0")
    places = [i for i in newer.indexes if newer.manifest.chunk_id(i) not in OLD.chunks]
    bases = [i for i in OLD.indexes if OLD.manifest.chunk_id(i) not in newer.chunks]
    lease = await offer(transfer, newer)
    ask = messages.ChunkRanges(manifest=OLD.manifest.id, ranges=from_indexes(OLD.indexes))
    await transfer.missing(messages.MissingRequest(want=(ask,), lease=lease))
    base = b"".join(OLD.chunk(i).data for i in bases)
    _, payload = encode_run([newer.chunk(i).data for i in places], "hdiff", base)
    head = data_header(
        (Span.of(newer.manifest.id, places),), "hdiff", payload, bases=(Span.of(OLD.manifest.id, bases),)
    )
    writer = BundleWriter()
    bundle = writer.start() + writer.frame(head) + payload + writer.end()
    holder = asyncio.create_task(take(transfer, reader(LAN, held()), places, newer))
    stranger = asyncio.create_task(take(transfer, reader(LAN), places, newer))
    await asyncio.sleep(0.05)
    assert (await transfer.take_bundle(lease, pieces(bundle))).refused == ()
    assert (await holder).encodings == [("hdiff", len(places), len(bases))]
    assert (await stranger).is_stored
    assert sorted((await holder).chunks) == sorted((await stranger).chunks) == places
    assert encoded == []
