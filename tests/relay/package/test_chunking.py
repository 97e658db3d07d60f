from __future__ import annotations

import hashlib
import statistics
from itertools import accumulate, pairwise

import pytest
from harness.packages import cut_package, noise
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.chunking import (
    CDC_MAX,
    CDC_MIN,
    GATHER_MAX,
    GATHER_MIN,
    LARGE_PART,
    PartDigest,
    comes_last,
    cut,
    ends_gathering,
    is_container,
    mask,
    stream_key,
)

KIB, MIB = 1 << 10, 1 << 20

names = st.text(alphabet="abcAB019._-", min_size=1, max_size=6)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
sizes = st.one_of(
    st.integers(0, 3 * KIB),
    st.sampled_from([0, 1, LARGE_PART - 1, LARGE_PART, LARGE_PART + 1, 40 * KIB, 300 * KIB]),
)
trees = st.dictionaries(paths, sizes, max_size=40).map(
    lambda parts: {path: noise(f"{path}:{size}", size) for path, size in parts.items()}
)


def cut_files(files, split=None):
    """Chunks and digests of `files`; `split` says how the reader breaks a part into pieces."""
    ordered = sorted(files, key=stream_key)
    found = list(
        cut(ordered, lambda path: path, lambda path: len(files[path]), lambda path: (split or whole)(files[path]))
    )
    chunks = [each for each in found if isinstance(each, Chunk)]
    return ordered, chunks, [each for each in found if isinstance(each, PartDigest)]


def whole(data):
    return [data]


def by(size):
    return lambda data: [data[at : at + size] for at in range(0, len(data), size)]


def names_of(found):
    _, chunks, digests = found
    return [chunk.id for chunk in chunks], digests


def ids_of(files):
    return [chunk.id for chunk in cut_files(files)[1]]


@given(trees)
def test_chunks_are_the_tree_stream_whatever_the_parts(files):
    ordered, chunks, _ = cut_files(files)
    assert b"".join(chunk.data for chunk in chunks) == b"".join(files[path] for path in ordered)


@given(trees)
def test_every_part_gets_its_digest_once_and_in_order(files):
    ordered, _, digests = cut_files(files)
    assert [digest.index for digest in digests] == list(range(len(ordered)))
    assert [digest.sha256 for digest in digests] == [hashlib.sha256(files[path]).hexdigest() for path in ordered]


@given(trees)
def test_chunk_sizes_keep_their_bounds(files):
    """Never empty; gathered ones end at the upper bound; large parts stand alone."""
    _, chunks, _ = cut_files(files)
    large = {Chunk.of(data).id for data in files.values() if LARGE_PART <= len(data) <= CDC_MAX}
    assert large <= {chunk.id for chunk in chunks}
    for chunk in chunks:
        assert 0 < chunk.size <= CDC_MAX
        assert chunk.size <= GATHER_MAX or chunk.id in large


@given(trees)
def test_no_chunk_holds_both_files_and_container_parts(files):
    files = {**files, "a.nuspec": b"nuspec", "_rels/.rels": b"rels", "z/file.txt": b"file"}
    ordered, chunks, _ = cut_files(files)
    before = sum(len(files[path]) for path in ordered if not comes_last(path))
    assert before in set(accumulate(chunk.size for chunk in chunks))


@given(trees, trees, st.integers(LARGE_PART, 200 * KIB))
@settings(max_examples=40)
def test_a_large_part_is_the_same_chunk_in_every_package(one, other, size):
    library = noise("library", size)
    chunk = Chunk.of(library).id
    assert chunk in ids_of({**one, "lib/net8.0/library.dll": library})
    assert chunk in ids_of({**other, "tools/other/name.bin": library})


def test_a_very_large_part_is_the_same_chunks_in_every_package():
    library = noise("very large", 9 * MIB + 12345)
    alone = ids_of({"library.dll": library})
    assert len(alone) >= 3
    among = ids_of({f"x/{i}.txt": noise(i, 5000) for i in range(50)} | {"lib/library.dll": library})
    assert [id for id in among if id in set(alone)] == alone


@pytest.mark.parametrize("size", [CDC_MAX - 1, CDC_MAX])
def test_a_part_up_to_four_mebibytes_is_one_chunk(size):
    data = noise(size, size)
    assert ids_of({"a.bin": data}) == [Chunk.of(data).id]


def test_a_part_above_four_mebibytes_is_cut_by_content_within_bounds():
    data = noise("cdc", 20 * MIB + 1)
    _, chunks, digests = cut_files({"a.bin": data})
    assert b"".join(chunk.data for chunk in chunks) == data
    assert all(CDC_MIN <= chunk.size <= CDC_MAX for chunk in chunks[:-1])
    assert 0 < chunks[-1].size <= CDC_MAX
    assert digests == [PartDigest(0, hashlib.sha256(data).hexdigest())]


def test_bytes_put_into_a_very_large_part_move_only_the_chunks_around_them():
    data = noise("shift", 24 * MIB)
    before = ids_of({"a.bin": data})
    after = ids_of({"a.bin": data[: 5 * MIB] + b"seven b" + data[5 * MIB :]})
    assert len(set(after) - set(before)) <= 3
    assert len(before) >= 8


def test_a_part_of_one_repeated_byte_is_cut_too():
    _, chunks, _ = cut_files({"a.bin": bytes(13 * MIB)})
    assert sum(chunk.size for chunk in chunks) == 13 * MIB
    assert all(chunk.size <= CDC_MAX for chunk in chunks)


@pytest.mark.parametrize("piece", [4099, 256 * KIB, CDC_MAX, 7 * MIB + 1, 16 * MIB, 64 * MIB])
def test_cutting_does_not_depend_on_how_the_reader_splits_pieces(piece):
    files = {"a.bin": noise("pieces", 18 * MIB + 77), "b.dll": noise("b", 100 * KIB), "c.txt": b"small"}
    assert names_of(cut_files(files, by(piece))) == names_of(cut_files(files))


@given(trees, st.integers(1, 5000))
@settings(max_examples=30)
def test_small_parts_do_not_depend_on_pieces_either(files, piece):
    assert names_of(cut_files(files, by(piece))) == names_of(cut_files(files))


def many_small_parts(seed):
    return {
        f"content/{noise(f'{seed}:{i}', 4).hex()}/page-{i}.html": noise(i, 500 + i * 7919 % 9000) for i in range(900)
    }


@pytest.mark.parametrize("seed", range(6))
def test_a_new_small_part_moves_only_the_chunks_near_it(seed):
    """The boundaries that follow depend on names, so they fall into step again. Counted over many places to insert."""
    files = many_small_parts(seed)
    before = ids_of(files)
    assert len(before) >= 8
    moved = []
    for place in range(12):
        after = ids_of({**files, f"content/{noise(f'new{place}', 4).hex()}/new-{place}.html": b"new part"})
        moved.append(len(set(after) - set(before)))
    assert min(moved) == 1
    assert statistics.median(moved) <= 2
    assert max(moved) <= 5


def test_a_new_small_part_leaves_every_chunk_behind_the_next_large_part_alone():
    files = {f"lib/a{i}.txt": noise(i, 3000) for i in range(100)}
    files |= {"lib/m.dll": noise("m", 80 * KIB)} | {f"lib/z{i}.txt": noise(i, 2000) for i in range(200)}
    before, after = ids_of(files), ids_of({**files, "lib/a0000.txt": b"new"})
    behind = before[before.index(Chunk.of(files["lib/m.dll"]).id) :]
    assert len(behind) >= 2
    assert after[-len(behind) :] == behind


def gathered(files):
    """The rule in words: small neighbours until 256 KiB and a name that ends it, or until 1 MiB would be passed."""
    groups, group = [], b""
    for path, following in pairwise([*sorted(files, key=stream_key), None]):
        large = len(files[path]) >= LARGE_PART
        if large:
            groups.append(group)
            group = b""
        group += files[path]
        if (
            large
            or following is None
            or comes_last(path) != comes_last(following)
            or (len(group) >= GATHER_MIN and ends_gathering(path))
            or (len(files[following]) < LARGE_PART and len(group) + len(files[following]) > GATHER_MAX)
        ):
            groups.append(group)
            group = b""
    return [group for group in groups if group]


@given(trees)
@example({f"{word}.txt": noise(word, 50 * KIB) for word in "abcdefghijklmnopqrstuvwxyz"})
@example({f"{i}.txt": noise(i, 60 * KIB) for i in range(40)})
def test_gathering_ends_by_name_or_by_size_and_nowhere_else(files):
    assert [chunk.data for chunk in cut_files(files)[1]] == gathered(files)


# --- names


@pytest.mark.parametrize(
    ("path", "container"),
    [
        ("[Content_Types].xml", True),
        ("[content_types].XML", False),
        ("_rels/.rels", True),
        ("_RELS/.rels", True),
        ("_rels/readme.txt", False),
        ("_rels/.rels/x", False),
        ("package/services/metadata/core-properties/1.psmdcp", True),
        ("Package/Services/Metadata/1.psmdcp", True),
        ("package/services/metadata/readme.txt", False),
        ("package/start.js", False),
        ("package/1.psmdcp", False),
        ("Package/help.txt", False),
        (".signature.p7s", True),
        ("Acme.Web.nuspec", True),
        ("acme.NUSPEC", True),
        ("lib/Acme.Web.nuspec", False),
        ("content/[Content_Types].xml", False),
        ("lib/_rels/.rels", False),
        ("packages/a.txt", False),
        ("package", False),
        ("lib/net8.0/a.dll", False),
    ],
)
def test_container_parts_are_those_that_opc_adds_and_nuget_leaves_out(path, container):
    assert is_container(path) is container


def test_the_stream_brings_the_same_library_of_all_frameworks_together():
    paths = [
        "lib/net8.0/a.dll",
        "lib/net8.0/b.dll",
        "lib/net10.0/b.dll",
        "lib/net10.0/a.dll",
        "a.nuspec",
        "_rels/.rels",
    ]
    assert sorted(paths, key=stream_key) == [
        "lib/net10.0/a.dll",
        "lib/net8.0/a.dll",
        "lib/net10.0/b.dll",
        "lib/net8.0/b.dll",
        "_rels/.rels",
        "a.nuspec",
    ]


@given(paths, st.text(alphabet="0123456789.", min_size=1), st.text(alphabet="0123456789.", min_size=1))
def test_a_version_in_a_name_does_not_move_it(path, one, other):
    assert mask(f"{path}x{one}x") == mask(f"{path}x{other}x")
    assert ends_gathering(f"{path}x{one}x") == ends_gathering(f"{path}x{other}x")


# --- format 1 does not drift


def test_format_one_keeps_its_order_whatever_belongs_to_the_tree():
    last = [
        "[content_types].XML",
        "_rels/readme.txt",
        "Package/help.txt",
        "package/start.js",
        ".Signature.p7s",
        "a.nuspec",
    ]
    assert all(comes_last(path) for path in last)
    assert not any(comes_last(path) for path in ("package", "packages/a", "lib/_rels/.rels", "sub/package/x", "z.txt"))
    assert sorted(["package/a.js", "z.txt"], key=stream_key) == ["z.txt", "package/a.js"]


def test_format_one_masks_and_hashes_names_as_ever():
    assert chunking.FORMAT == 1
    assert mask("runtimes/10.0.13/lib.v2/x86_64.dll") == "runtimes/#/lib#v#/x#_#dll"
    words = [first + second for first in "abcdefgh" for second in "abcdefgh"]
    assert [word for word in words if ends_gathering(f"lib/net8.0/{word}.dll")] == PINNED_ENDS


def test_format_one_cuts_by_content_as_ever():
    """Made with fastcdc 1.7.0. Another result would give the same nupkg another manifest: that is format 2."""
    _, chunks, _ = cut_files({"a.bin": vector(12 * MIB)})
    assert [chunk.size for chunk in chunks] == PINNED_SIZES


def test_format_one_gives_this_package_these_chunks():
    cut = cut_package(
        {
            f"lib/net{i}.0/Acme.{name}.dll": vector(30_000 * i + len(name))
            for i in range(1, 5)
            for name in ("Core", "Web")
        }
        | {f"content/{i}.txt": vector(9000 + i) for i in range(60)}
        | {"big.bin": vector(6 * MIB)}
    )
    told = [(entry.id, entry.size) for entry in cut.manifest.chunks], [part.path for part in cut.manifest.parts]
    assert hashlib.sha256(repr(told).encode()).hexdigest() == PINNED_CHUNKS


def vector(size):
    """Bytes that no library can change: a chain of SHA-256."""
    link, chain = b"waystation", bytearray()
    while len(chain) < size:
        link = hashlib.sha256(link).digest()
        chain += link
    return bytes(chain[:size])


PINNED_ENDS = ["aa", "bf", "cb", "da", "hd", "hf"]
PINNED_SIZES = [1405910, 1186112, 2165701, 2299383, 2627567, 2175246, 722993]
PINNED_CHUNKS = "91e44c2d1072c63e357c37abeaa130b14b971e4f00c9cf8f9790f5265bb3d604"
