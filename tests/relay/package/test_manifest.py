from __future__ import annotations

import contextlib
import json
import random
import tracemalloc

import msgspec
import pytest
from harness.packages import cut_package, noise
from harness.seed import SOAK
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import ManifestError
from relay.package import manifest as manifests
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.manifest import (
    DEPTH_MAX,
    MANIFEST_MAX,
    ChunkEntry,
    Manifest,
    ManifestBody,
    PackageName,
    Part,
    encode,
    from_wire,
    parse,
    parse_named,
    to_wire,
)
from relay.support.zstd import zstd

MIB = 1 << 20
FILES = {
    "lib/net8.0/Acme.Web.dll": noise("dll", 90_000),
    "lib/net9.0/Acme.Web.dll": noise("dll9", 5 * MIB),
    "content/a.txt": b"a",
    "content/empty.txt": b"",
    "tools/run.sh": b"#!/bin/sh\n",
}
CUT = cut_package(FILES)
GOOD = CUT.manifest

names = st.text(alphabet="abcAB019_-é", min_size=1, max_size=6)
trees = st.dictionaries(
    st.lists(names, min_size=2, max_size=3).map(lambda parts: "/".join([*parts, "f.txt"]).lower()),
    st.sampled_from([0, 1, 700, 65535, 65536, 100_000]),
    max_size=20,
)
scalars = st.one_of(
    st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
metadata = st.dictionaries(st.text(max_size=8), st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=4)


def changed(**fields):
    return msgspec.structs.replace(GOOD.body, **fields)


def refused(body: ManifestBody, match: str | None = None) -> None:
    with pytest.raises(ManifestError, match=match):
        parse(encode(body))


# --- round trip


@given(trees, metadata)
@settings(max_examples=60)
def test_what_was_encoded_parses_to_the_same_manifest(sizes, extra):
    made = cut_package({path: noise(path, size) for path, size in sizes.items()}).manifest
    body = msgspec.structs.replace(made.body, metadata=extra)
    canonical = encode(body)
    again = parse(canonical)
    assert again.body == body
    assert again.canonical == canonical
    assert encode(again.body) == canonical
    assert parse_named(canonical, again.id).id == again.id


@given(st.randoms(use_true_random=False), st.integers(1, 3))
@settings(max_examples=400)
def test_every_change_of_the_bytes_is_refused_or_gives_another_manifest_that_is_canonical_too(rng, times):
    raw = bytearray(GOOD.canonical)
    for _ in range(times):
        mutate(raw, rng)
    data = bytes(raw)
    try:
        found = parse(data)
    except ManifestError:
        return
    assert encode(found.body) == data
    assert (found.id == GOOD.id) == (data == GOOD.canonical)
    if data != GOOD.canonical:
        with pytest.raises(ManifestError):
            parse_named(data, GOOD.id)


def mutate(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    match rng.randrange(5):
        case 0:
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            del raw[at]
        case 2:
            raw.insert(at, rng.choice(b'0123456789abcdef"{}[],: \\u'))
        case 3:
            end = min(len(raw), at + rng.randrange(1, 90))
            raw[at:at] = raw[at:end]
        case 4:
            other = rng.randrange(len(raw))
            raw[at], raw[other] = raw[other], raw[at]


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data):
    with pytest.raises(ManifestError):
        parse(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"format":1', '"format": 1'),
        lambda text: text + "\n",
        lambda text: text.replace('"format":1', '"format":1,"format":1'),
        lambda text: text.replace("content/a.txt", "content\\/a.txt"),
        lambda text: text.replace("content/a.txt", "content/\\u0061.txt"),
        lambda text: text.replace('"format":1', '"format":1.0'),
        lambda text: text.replace('"path":"tools/run.sh"', '"executable":false,"path":"tools/run.sh"'),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")),
        lambda text: text.replace('"metadata":{}', '"metadata":{"b":1,"a":1}'),
        lambda text: text.replace('"metadata":{}', '"metadata":{"a":"\\ud800"}'),
        lambda text: text.replace('"metadata":{}', '"metadata":{},"more":1'),
        lambda text: text.replace('"metadata":{}', '"metadata":null'),
    ],
)
def test_a_form_that_is_not_canonical_is_refused(change):
    text = GOOD.canonical.decode()
    assert change(text) != text
    with pytest.raises(ManifestError):
        parse(change(text).encode("utf-8", "surrogatepass"))


def test_a_manifest_under_another_name_is_refused():
    other = cut_package({"a.txt": b"other"}).manifest
    with pytest.raises(ManifestError, match="another digest"):
        parse_named(GOOD.canonical, other.id)


def test_an_unknown_format_says_so_and_what_to_do():
    with pytest.raises(ManifestError, match="format 2") as caught:
        parse(encode(changed(format=2)))
    assert "Update" in caught.value.hint


# --- consistency


def test_stream_and_parts_must_have_the_same_length():
    refused(changed(chunks=GOOD.chunks[:-1]), "same stream")
    refused(changed(chunks=(*GOOD.chunks, ChunkEntry("ab" * 32, 1))), "same stream")


def test_parts_must_stand_in_stream_order_and_once():
    refused(changed(parts=GOOD.parts[::-1]), "stream order")
    empty = Part("content/empty.txt", 0, GOOD.part_sha256([p.path for p in GOOD.parts].index("content/empty.txt")))
    index = GOOD.parts.index(empty)
    refused(changed(parts=(*GOOD.parts[: index + 1], *GOOD.parts[index:])), "stream order")


@pytest.mark.parametrize(
    "path", ["../x.txt", "/x.txt", "a/../x.txt", "c:/x.txt", "a//x.txt", "a\\x.txt", "a/./x.txt", "a\0.txt", "", "con/"]
)
def test_scenario_37_a_path_that_leaves_the_tree_is_refused(path):
    body = cut_package({"zz.txt": b"x"}).manifest.body
    parts = tuple(msgspec.structs.replace(p, path=path) if p.path == "zz.txt" else p for p in body.parts)
    with pytest.raises(ManifestError):
        parse(encode(msgspec.structs.replace(body, parts=parts)))


def test_names_that_collide_without_case_are_refused():
    with pytest.raises(ManifestError, match=r"(?i)same file"):
        cut_package({"lib/A.txt": b"1", "lib/a.txt": b"2"})


@pytest.mark.parametrize(
    ("id", "version"),
    [("Acme.Web", "1.0"), ("Acme.Web", "1.0.0+x"), ("Acme.Web", "01.0.0"), ("Acme Web", "1.0.0"), ("", "1.0.0")],
)
def test_a_name_that_is_not_normalised_or_none_is_refused(id, version):
    refused(changed(package=PackageName(id, version)))


@pytest.mark.parametrize("size", [0, CHUNK_MAX + 1, -1])
def test_a_chunk_of_an_impossible_size_is_refused(size):
    first = GOOD.chunks[0]
    refused(changed(chunks=(ChunkEntry(first.id, size), *GOOD.chunks[1:])), "not a manifest")


def test_one_chunk_with_two_sizes_is_refused():
    a, b = GOOD.chunks[:2]
    assert a.size != b.size
    refused(changed(chunks=(ChunkEntry(b.id, a.size), *GOOD.chunks[1:])), "two sizes")


@pytest.mark.parametrize("id", ["AB" * 32, "ab" * 31, "ab" * 32 + "\n", "zz" * 32])
def test_a_chunk_name_that_is_no_digest_is_refused(id):
    refused(changed(chunks=(ChunkEntry(id, GOOD.chunks[0].size), *GOOD.chunks[1:])), "not a manifest")


def test_a_part_says_its_digest_exactly_where_it_is_not_one_chunk():
    paths = [part.path for part in GOOD.parts]
    one, gathered = paths.index("lib/net8.0/Acme.Web.dll"), paths.index("content/a.txt")
    assert GOOD.parts[one].sha256 is None
    assert GOOD.parts[gathered].sha256 is not None

    def with_part(index, sha256):
        parts = list(GOOD.parts)
        parts[index] = msgspec.structs.replace(parts[index], sha256=sha256)
        return changed(parts=tuple(parts))

    refused(with_part(one, GOOD.part_sha256(one)), "repeats its digest")
    refused(with_part(gathered, None), "has no digest")


def test_a_chunk_that_mixes_the_tree_with_the_container_is_refused():
    body = cut_package({"a.txt": b"tree"}).manifest.body
    parts = tuple(msgspec.structs.replace(part, sha256="ab" * 32) for part in body.parts)
    size = sum(part.size for part in parts)
    whole = (ChunkEntry("ab" * 32, size),)
    refused(msgspec.structs.replace(body, parts=parts, chunks=whole), "both")
    halves = (ChunkEntry("ab" * 32, 3), ChunkEntry("cd" * 32, size - 3))
    refused(msgspec.structs.replace(body, parts=parts, chunks=halves), "both")


def test_sizes_that_sum_to_more_than_a_package_are_refused():
    parts = tuple(msgspec.structs.replace(part, size=3 << 30, sha256="ab" * 32) for part in GOOD.parts)
    refused(changed(parts=parts), "bytes of parts")


# --- what is asked of it


def test_every_part_has_the_digest_of_its_bytes():
    for index, part in enumerate(GOOD.parts):
        if part.path in FILES:
            assert GOOD.part_sha256(index) == Chunk.of(FILES[part.path]).id


def test_extents_put_every_byte_of_every_chunk_back_into_its_part():
    parts = [bytearray() for _ in GOOD.parts]
    for index, extents in enumerate(GOOD.extents):
        data = CUT.chunk(index).data
        for extent in extents:
            assert extent.length > 0
            assert len(parts[extent.part]) == extent.offset
            parts[extent.part] += data[: extent.length]
            data = data[extent.length :]
        assert not data
    assert {GOOD.parts[i].path: bytes(data) for i, data in enumerate(parts) if GOOD.parts[i].path in FILES} == FILES


def test_agents_ask_for_the_chunks_of_the_tree_and_no_others():
    tree = b"".join(CUT.chunk(index).data for index in GOOD.tree_chunks)
    assert len(tree) == GOOD.tree_size == sum(map(len, FILES.values()))
    assert len(GOOD.tree_chunks) < len(GOOD.chunks)
    assert set(GOOD.tree_paths) == set(FILES)


def test_a_package_without_files_has_no_tree():
    empty = cut_package({}).manifest
    assert (empty.tree_parts, empty.tree_chunks, empty.tree_size) == ([], [], 0)


def test_a_chunk_that_stands_twice_is_known_by_its_first_place():
    twice = cut_package({"a/x.dll": noise("same", 70_000), "b/x.dll": noise("same", 70_000)}).manifest
    assert twice.chunks[0] == twice.chunks[1]
    assert twice.index_of[twice.chunk_id(1)] == 0


# --- bounds


def test_each_limit_that_a_manifest_passes_is_named(monkeypatch):
    assert (MANIFEST_MAX, manifests.PACKED_MAX, manifests.PARTS_MAX) == (64 << 20, 16 << 20, 250_000)
    with pytest.raises(ManifestError, match=f"{MANIFEST_MAX + 2} bytes: expected at most {MANIFEST_MAX}"):
        parse(b'"' + b"x" * MANIFEST_MAX + b'"')
    with pytest.raises(ManifestError, match="more than 750000 objects and lists"):
        parse(b'{"parts":[' + b"{}," * 750_000 + b"{}]}")
    monkeypatch.setattr(manifests, "PARTS_MAX", len(GOOD.parts) - 1)
    with pytest.raises(ManifestError, match=f"{len(GOOD.parts)} parts: expected at most {len(GOOD.parts) - 1}"):
        parse(GOOD.canonical)


def test_a_manifest_too_large_for_the_wire_is_refused_when_it_is_made_sent_and_taken(monkeypatch):
    packed = to_wire(GOOD.canonical)
    monkeypatch.setattr(manifests, "PACKED_MAX", len(packed))
    assert from_wire(to_wire(GOOD.canonical)) == GOOD.canonical
    monkeypatch.setattr(manifests, "PACKED_MAX", len(packed) - 1)
    told = f"{len(packed)} bytes when packed: expected at most {len(packed) - 1}"
    for refused_at in (lambda: to_wire(GOOD.canonical), lambda: from_wire(packed), lambda: cut_package(FILES)):
        with pytest.raises(ManifestError, match=told):
            refused_at()


def test_a_large_manifest_costs_its_changes_against_a_base():
    """Longer than what the tables of a quick level look back."""
    lines = [f'{{"path":"content/{i:06}","sha256":"{noise(i, 32).hex()}","size":10}}' for i in range(60_000)]
    base = "".join(lines).encode()
    lines[30_000] = lines[30_000].replace("10", "11")
    new = "".join(lines).encode()
    assert len(base) > 6 << 20
    packed = to_wire(new, base)
    assert len(packed) < len(new) / 1000
    assert from_wire(packed, base) == new


def test_a_manifest_that_is_nested_too_deep_is_refused():
    deep: object = 1
    for _ in range(DEPTH_MAX):
        deep = [deep]
    refused(changed(metadata={"deep": deep}), "nested")
    with pytest.raises(ManifestError, match="nested"):
        parse(b"[" * 100_000)


def test_depth_up_to_the_bound_is_taken():
    deep: object = 1
    for _ in range(DEPTH_MAX - 2):
        deep = [deep]
    assert parse(encode(changed(metadata={"deep": deep}))).body.metadata == {"deep": deep}


# --- on the wire


def next_version() -> Manifest:
    files = {**many_files(), "content/17.txt": b"changed"}
    return cut_package(files, version="1.0.1").manifest


def many_files() -> dict[str, bytes]:
    return {f"content/{i}.txt": noise(i, 300) for i in range(400)} | {
        f"lib/{i}.dll": noise(i, 66_000) for i in range(30)
    }


@given(trees)
@settings(max_examples=20)
def test_a_manifest_crosses_the_wire_unchanged_with_and_without_a_base(sizes):
    made = cut_package({path: noise(path, size) for path, size in sizes.items()}).manifest.canonical
    assert from_wire(to_wire(made)) == made
    assert from_wire(to_wire(made, GOOD.canonical), GOOD.canonical) == made


def test_against_a_base_a_manifest_costs_little_more_than_its_changed_chunks():
    base, new = cut_package(many_files()).manifest, next_version()
    changed_chunks = len(set(new.chunk_ids()) - set(base.chunk_ids()))
    alone, against = to_wire(new.canonical), to_wire(new.canonical, base.canonical)
    assert len(against) < len(alone) / 20
    # The chunks, the part, and the nupkg's three digests.
    assert len(against) < 60 * changed_chunks + 450


def test_another_base_than_it_was_made_with_is_refused():
    base, new = cut_package(many_files()).manifest, next_version()
    packed = to_wire(new.canonical, base.canonical)
    for wrong in (None, GOOD.canonical, base.canonical[:-1], base.canonical[::-1]):
        with pytest.raises(ManifestError):
            parse_named(from_wire(packed, wrong), new.id)


def test_every_cut_and_every_tail_is_refused():
    packed = to_wire(GOOD.canonical)
    for end in range(len(packed)):
        with pytest.raises(ManifestError):
            from_wire(packed[:end])
    with pytest.raises(ManifestError):
        from_wire(packed + b"\0")
    with pytest.raises(ManifestError):
        from_wire(packed + packed)


def test_a_bomb_is_refused_within_bounded_memory():
    for size in (MANIFEST_MAX + 1, 1 << 30):
        bomb = zstd.compress(bytes(size))
        tracemalloc.start()
        try:
            with pytest.raises(ManifestError, match="more than"):
                from_wire(bomb)
            assert tracemalloc.get_traced_memory()[1] < 4 * MANIFEST_MAX
        finally:
            tracemalloc.stop()


def test_a_manifest_of_exactly_the_bound_is_unpacked():
    assert len(from_wire(zstd.compress(bytes(MANIFEST_MAX)))) == MANIFEST_MAX


def test_a_window_beyond_what_a_manifest_needs_is_refused():
    # Fed in two pieces, so that the size is not known and the window stands in the header.
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.compression_level: 3}
    engine = zstd.ZstdCompressor(options=options)
    packed = engine.compress(GOOD.canonical[:100]) + engine.compress(GOOD.canonical[100:]) + engine.flush()
    with pytest.raises(ManifestError, match="does not decompress"):
        from_wire(packed)


@given(st.binary(max_size=300))
def test_any_bytes_from_the_wire_are_refused_or_bounded(data):
    with contextlib.suppress(ManifestError):
        assert len(from_wire(data, GOOD.canonical)) <= MANIFEST_MAX


soak = [pytest.mark.soak, pytest.mark.skipif(not SOAK, reason="the largest manifest is made in `make soak`")]


@pytest.mark.long
@pytest.mark.parametrize("count", [60_000, pytest.param(manifests.PARTS_MAX, marks=soak)])
def test_the_largest_manifest_fits_each_limit(count: int):
    """Paths of 150 characters, and digests that do not compress."""
    parts = tuple(
        Part(f"{f'content/{i % 999}/'.ljust(140, 'x')}{i:06}.txt", 10, noise(i, 32).hex()) for i in range(count)
    )
    parts = tuple(sorted(parts, key=lambda part: manifests.chunking.stream_key(part.path)))
    body = changed(
        parts=parts,
        chunks=(ChunkEntry("cd" * 32, 4_000_000),) * (count // 400_000)
        + (ChunkEntry("ef" * 32, 10 * count % 4_000_000),),
    )
    made = parse(encode(body))
    assert len(made.parts) == count
    packed = to_wire(made.canonical)
    assert from_wire(packed) == made.canonical
