"""The recipe: small, canonical, and refused clearly where it is not one for its manifest."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.nupkgs import NUSPEC, Raw, as_zlib, canonical_zip, take
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.engines.encoders import EncoderMissingError, Encoders
from relay.package.manifest import to_wire
from relay.package.part_reader import parts_of_chunks
from relay.package.recipe import (
    FORMAT,
    RECIPE_MAX,
    STORED_AS_IS,
    VERBATIM,
    Blob,
    Canonical,
    LiteralRecords,
    Recipe,
    RecipeError,
    Share,
    Use,
    encode_recipe,
    opaque,
    parse_recipe,
    parse_recipe_wire,
    shares,
    steps,
)
from relay.rebuild.rebuilder import RebuildError, rebuild
from relay.rebuild.zip_layout import Layout, compose, describe

TEXT = b"some text, " * 400
PARTS = (
    Raw("_rels/.rels", b"<rels/>", as_zlib(b"<rels/>")),
    Raw("A.nuspec", NUSPEC, as_zlib(NUSPEC)),
    Raw("lib/net8.0/a%20b.dll", TEXT, as_zlib(TEXT)),
    Raw("lib/net8.0/c d.dll", TEXT + b"!", as_zlib(TEXT + b"!", 9)),
    Raw("[Content_Types].xml", b"<types/>", as_zlib(b"<types/>")),
    Raw(".signature.p7s", b"signed", None),
)
WAYS: list[tuple[str, Any]] = [("zlib", "whole")] * 3 + [(VERBATIM, ""), ("zlib", "whole"), (STORED_AS_IS, "")]
TAKEN = take(canonical_zip(*PARTS))
MANIFEST = TAKEN.manifest


def records_of(taken: Any = TAKEN) -> list[Canonical | LiteralRecords]:
    return list(describe(io.BytesIO(taken.nupkg), taken.entries, taken.manifest))


def composed(records: Canonical | LiteralRecords | None = None) -> Recipe:
    recipe = compose(records or records_of()[0], TAKEN.entries, MANIFEST, WAYS, bytes(32))
    digest = hashlib.sha256(TAKEN.verbatim_bytes(recipe)).digest()
    return compose(recipe.records, TAKEN.entries, MANIFEST, WAYS, digest)  # type: ignore[arg-type]


def changed(struct: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(struct, **fields)


CANONICAL, LITERAL = composed(), composed(records_of()[1])


# --- what it says


def test_a_canonical_zip_is_described_by_columns_and_by_its_records() -> None:
    assert [type(records) for records in records_of()] == [Canonical, LiteralRecords]
    assert len(encode_recipe(CANONICAL)) < 200


def test_only_names_that_are_not_the_escaped_path_are_written() -> None:
    assert isinstance(CANONICAL.records, Canonical)
    assert CANONICAL.records.names == ((3, b"lib/net8.0/c d.dll"),)


@pytest.mark.parametrize("recipe", [CANONICAL, LITERAL], ids=["canonical", "literal"])
def test_the_records_come_back_from_what_the_content_says(recipe: Recipe) -> None:
    layout = Layout(recipe, MANIFEST)
    made = b"".join(
        layout.before(entry.crc32, entry.compressed_size)
        + TAKEN.nupkg[entry.data_offset : entry.data_offset + entry.compressed_size]
        for entry in TAKEN.entries
    )
    assert made + layout.after() == TAKEN.nupkg


def test_its_steps_follow_the_file() -> None:
    found = [(MANIFEST.parts[step.part].path, step.encoder) for step in steps(CANONICAL, MANIFEST)]
    assert found == [(entry.path, way[0]) for entry, way in zip(TAKEN.entries, WAYS, strict=True)]


def test_shares_add_up_to_the_parts_and_their_content() -> None:
    found = shares(CANONICAL, MANIFEST)
    assert set(found) == {"zlib", VERBATIM, STORED_AS_IS}
    assert found[STORED_AS_IS] == Share(6, 6)
    assert found[VERBATIM] == Share(len(PARTS[3].deflated or b""), len(TEXT) + 1)
    assert sum(share.content for share in found.values()) == MANIFEST.stream_size
    assert sum(share.compressed for share in found.values()) == sum(entry.compressed_size for entry in TAKEN.entries)
    assert shares(opaque(MANIFEST), MANIFEST) == {VERBATIM: Share(MANIFEST.nupkg.size, MANIFEST.stream_size)}


# --- the wire


@pytest.mark.parametrize("recipe", [CANONICAL, LITERAL, opaque(MANIFEST)], ids=["canonical", "literal", "opaque"])
def test_a_recipe_survives_the_wire(recipe: Recipe) -> None:
    assert parse_recipe_wire(to_wire(encode_recipe(recipe)), None, MANIFEST) == recipe


def test_the_next_versions_recipe_costs_what_it_says_new() -> None:
    data = encode_recipe(CANONICAL)
    later = encode_recipe(changed(CANONICAL, records=changed(CANONICAL.records, times=((0x5B22_0000, 6),))))
    wire = to_wire(later, data)
    assert len(wire) < 60
    assert encode_recipe(parse_recipe_wire(wire, data, MANIFEST)) == later


def test_a_wire_form_that_is_cut_off_is_refused() -> None:
    wire = to_wire(encode_recipe(LITERAL))
    for size in range(len(wire)):
        with pytest.raises(RecipeError):
            parse_recipe_wire(wire[:size], None, MANIFEST)


def test_a_wire_form_that_grows_beyond_bounds_is_refused() -> None:
    with pytest.raises(RecipeError, match="more than"):
        parse_recipe_wire(to_wire(bytes(100 << 20)), None, MANIFEST)


# --- lies


LIES: dict[str, Recipe] = {
    "another format": changed(CANONICAL, format=FORMAT + 1),
    "a part twice": changed(CANONICAL, order=((1, 5), (0, 1))),
    "a part too many": changed(CANONICAL, order=((1, 7),)),
    "a part too few": changed(CANONICAL, order=((1, 5),)),
    "a part before the first": changed(CANONICAL, order=((-1, 6),)),
    "an encoder that is not used": changed(CANONICAL, uses=(*CANONICAL.uses, Use("zlib", "sync", 0))),
    "an encoder twice": changed(CANONICAL, uses=(*CANONICAL.uses[:2], CANONICAL.uses[0])),
    "an encoder that is not there": changed(CANONICAL, used=((9, 6),)),
    "an encoder without feeding": changed(CANONICAL, uses=(Use("zlib", "", 1), *CANONICAL.uses[1:])),
    "verbatim with feeding": changed(CANONICAL, uses=(CANONICAL.uses[0], Use(VERBATIM, "whole", 1), CANONICAL.uses[2])),
    "another size of the whole": changed(CANONICAL, uses=(Use("zlib", "whole", 9), *CANONICAL.uses[1:])),
    "stored with another size": changed(CANONICAL, uses=(*CANONICAL.uses[:2], Use(STORED_AS_IS, "", 5))),
    "no blob": changed(CANONICAL, verbatim=None),
    "a blob with another size": changed(CANONICAL, verbatim=Blob(bytes(32), (1,))),
    "a blob with a part too many": changed(CANONICAL, verbatim=Blob(bytes(32), (*CANONICAL.verbatim.sizes, 0))),  # type: ignore[union-attr]
    "times of fewer parts": changed(CANONICAL, records=changed(CANONICAL.records, times=((5, 5),))),
    "a time before time": changed(CANONICAL, records=changed(CANONICAL.records, times=((-5, 6),))),
    "makers of more parts": changed(CANONICAL, records=changed(CANONICAL.records, made_by=((20, 7),))),
    "attributes of fewer parts": changed(CANONICAL, records=changed(CANONICAL.records, attributes=())),
    "another part's name": changed(CANONICAL, records=changed(CANONICAL.records, names=((0, b"lib/x.dll"),))),
    "a name of no part": changed(CANONICAL, records=changed(CANONICAL.records, names=((3, b"lib/net8.0/c d.dll"), (6, b"x")))),
    "a name that needs no saying": changed(CANONICAL, records=changed(CANONICAL.records, names=((1, b"A.nuspec"),))),
    "records without lengths": changed(LITERAL, records=changed(LITERAL.records, lengths=())),
    "records with a byte too many": changed(LITERAL, records=changed(LITERAL.records, records=bytes(9))),
    "an opaque one of another nupkg": changed(opaque(MANIFEST), verbatim=Blob(bytes(32), (MANIFEST.nupkg.size,))),
    "an opaque one that also knows": changed(CANONICAL, records=opaque(MANIFEST).records),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_recipe_that_cannot_give_the_nupkg_is_refused(lie: str) -> None:
    data = encode_recipe(LIES[lie])
    assert data not in map(encode_recipe, (CANONICAL, LITERAL))
    with pytest.raises(RecipeError):
        parse_recipe(data, MANIFEST)


def test_a_recipe_of_another_package_is_refused() -> None:
    other = take(canonical_zip(*PARTS[:-1]))
    with pytest.raises(RecipeError):
        parse_recipe(encode_recipe(CANONICAL), other.manifest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        encode_recipe(CANONICAL) + b"\0",
        encode_recipe(CANONICAL)[:-1],
        encode_recipe(CANONICAL).replace(b"\x06", b"\xcc\x06", 1),
        bytes(RECIPE_MAX + 1),
    ],
    ids=["empty", "nil", "deep", "endless", "longer", "shorter", "not canonical", "large"],
)
def test_what_is_no_canonical_recipe_is_refused(data: bytes) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(data, MANIFEST)


def test_a_hostile_recipe_takes_little_memory() -> None:
    columns = b"".join(
        b"\xdd" + count.to_bytes(4, "big") + b"\x92\x01\x01" * count for count in (99_999, 99_999, 99_999)
    )
    hostile = b"\x96\x01\x95\xa9canonical" + columns
    tracemalloc.start()
    try:
        for data in (
            hostile,
            hostile + bytes(RECIPE_MAX - len(hostile)),
            b"\x96\x01\x95\xa9canonical" + b"\xdd\0\xff\xff\xff" * 9,
        ):
            with pytest.raises(RecipeError):
                parse_recipe(data, MANIFEST)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


async def outcome(recipe: Recipe) -> bytes | None:
    """What a rebuild by `recipe` leaves, or nothing where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "made.nupkg"
        async with await Encoders.open(search=False, workers=2) as encoders:
            try:
                await rebuild(
                    MANIFEST,
                    recipe,
                    parts_of_chunks(MANIFEST, TAKEN.chunk),
                    TAKEN.verbatim(CANONICAL),
                    encoders,
                    output,
                )
            except (RebuildError, EncoderMissingError):
                assert list(Path(folder).iterdir()) == []
                return None
        assert list(Path(folder).iterdir()) == [output]
        return output.read_bytes()


MUTATIONS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([CANONICAL, LITERAL]), MUTATIONS)
def test_changed_bytes_are_refused_or_give_the_same_nupkg(recipe: Recipe, mutations: list[tuple[int, int]]) -> None:
    data = bytearray(encode_recipe(recipe))
    for place, value in mutations:
        data[place % len(data)] = value
    try:
        parsed = parse_recipe(bytes(data), MANIFEST)
    except RecipeError:
        return
    assert asyncio.run(outcome(parsed)) in {None, TAKEN.nupkg}


@pytest.mark.parametrize("recipe", [CANONICAL, LITERAL], ids=["canonical", "literal"])
def test_the_unchanged_bytes_give_the_nupkg(recipe: Recipe) -> None:
    assert asyncio.run(outcome(parse_recipe(encode_recipe(recipe), MANIFEST))) == TAKEN.nupkg


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(data, MANIFEST)
    with pytest.raises(RecipeError):
        parse_recipe_wire(data, None, MANIFEST)


def test_a_zip_with_other_records_is_described_by_them_alone() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("A.nuspec", NUSPEC)
        archive.comment = b"a comment"
    assert [type(records) for records in records_of(take(file.getvalue()))] == [LiteralRecords]
