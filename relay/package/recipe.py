"""The recipe: how to make the identical nupkg of a manifest's parts again. Pure: no engine runs here.

NuGet clients compare a package's SHA-512, and signatures cover its bytes, so a zip with the same parts is not enough.
A recipe says what a manifest leaves open: the order of the parts in the file, the zip records around them, and which
encoder made each part's deflate bytes.

The records are `Canonical` where the zip has the one form that .NET writes (no flags, descriptors, extra fields,
comments or zip64; the directory in the order of the parts): then a few columns give all of them. In any other honest zip
they are kept as they are (`Literal`). Where even that does not give the file back, the whole file is kept (`Opaque`).
Bytes that no encoder makes lie one after another, in the file's order, in one blob: the recipe names it by its SHA-256.

Canonical MessagePack, found by the nupkg's SHA-256 and checked against its manifest. Checksums and most sizes are not in
it: they follow from the content. A lie in a recipe costs work, never a wrong file: see `relay/rebuild/rebuilder.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, repeat
from typing import Annotated, Final, Literal, NamedTuple
from urllib.parse import quote, unquote

import msgspec
from msgspec import Meta

from relay.errors import ManifestError, UntrustedError
from relay.package.manifest import PACKAGE_MAX, PARTS_MAX, Manifest, from_wire
from relay.package.zip_records import CENTRAL, END, LOCAL, MAX16, MAX32

FORMAT: Final = 1
RECIPE_MAX: Final = 4 << 20
"""Bytes of a recipe. Real ones have some hundred, a zip that is not canonical some 200 for each part."""
STORED_AS_IS: Final = "stored"
VERBATIM: Final = "verbatim"
_USES_MAX: Final = 64
CONTENT_TYPES: Final = "[Content_Types].xml"

Feeding = Literal["", "whole", "sync", "sync-1024", "sync-6143"]
"""How the content enters an encoder. `whole`: in one write, then the end. `sync`: a sync flush before the end.
`sync-N`: the same, in writes of N bytes. Empty for what no encoder makes.
"""
ENCODER_FEEDINGS: Final[tuple[Feeding, ...]] = ("whole", "sync", "sync-1024", "sync-6143")

_Size = Annotated[int, Meta(ge=0, le=PACKAGE_MAX)]
_Count = Annotated[int, Meta(ge=1, le=PARTS_MAX)]
_U16 = Annotated[int, Meta(ge=0, le=MAX16)]
_U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
_Difference = Annotated[int, Meta(ge=-0xFFFFFFFF, le=0xFFFFFFFF)]
_Part = Annotated[int, Meta(ge=0, lt=PARTS_MAX)]
_Name = Annotated[bytes, Meta(min_length=1, max_length=MAX16)]
_Steps = Annotated[tuple[tuple[_Difference, _Count], ...], Meta(max_length=PARTS_MAX)]
"""A column as runs: `[value, how often]`."""


class RecipeError(UntrustedError):
    """A recipe that is not canonical, not consistent, or not one for the manifest it came with."""


class _Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row: fields by place, so that names cost nothing."""


class Use(_Struct, frozen=True):
    """One way in which parts were made. `compressed` is the bytes of all parts made so."""

    encoder: Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9.-]{0,31}\Z")]
    feeding: Feeding
    compressed: _Size


class Canonical(_Struct, frozen=True, tag="canonical"):
    """The records of .NET's own form.

    Columns have one value for each part in the file's order, as runs: `times` (DOS date and time, the first run's
    value, then differences to the run before), `made_by` and `attributes` as they are. `names` are the zip's names
    where they are not the escaped path: `[place in the file, name]`.
    """

    times: _Steps
    made_by: Annotated[tuple[tuple[_U16, _Count], ...], Meta(max_length=PARTS_MAX)]
    attributes: Annotated[tuple[tuple[_U32, _Count], ...], Meta(max_length=PARTS_MAX)]
    names: Annotated[tuple[tuple[_Part, _Name], ...], Meta(max_length=PARTS_MAX)]


class LiteralRecords(_Struct, frozen=True, tag="literal"):
    """The records as they are: `lengths` bytes of `records` before each part, and the last ones after all."""

    lengths: Annotated[tuple[_Size, ...], Meta(max_length=PARTS_MAX + 1)]
    records: Annotated[bytes, Meta(max_length=RECIPE_MAX)]


class Opaque(_Struct, frozen=True, tag="opaque"):
    """Nothing is known: the blob is the whole file."""


class Blob(_Struct, frozen=True):
    """The verbatim bytes: their digest, and how many belong to each verbatim part in the file's order."""

    sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]
    sizes: Annotated[tuple[_Size, ...], Meta(max_length=PARTS_MAX)]

    @property
    def id(self) -> str:
        """The digest in hex."""
        return self.sha256.hex()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.sizes)


class Recipe(_Struct, frozen=True):
    """See the module. `order` steps through the parts sorted by path, `used` counts in `uses`; both are runs."""

    format: int
    records: Canonical | LiteralRecords | Opaque
    uses: Annotated[tuple[Use, ...], Meta(max_length=_USES_MAX)]
    order: _Steps
    used: Annotated[tuple[tuple[_Part, _Count], ...], Meta(max_length=PARTS_MAX)]
    verbatim: Blob | None

    @property
    def encoders(self) -> frozenset[str]:
        """What a rebuild needs."""
        return frozenset(use.encoder for use in self.uses) - {STORED_AS_IS, VERBATIM}


class Step(NamedTuple):
    """One part in the file's order: its index in the manifest, how it is made, and its bytes where they are verbatim."""

    part: int
    encoder: str
    feeding: Feeding
    verbatim: int = 0


class Share(NamedTuple):
    """What one encoder makes of a package: bytes of the nupkg, and of the content they inflate to."""

    compressed: int
    content: int


# --- reading


def steps(recipe: Recipe, manifest: Manifest) -> Iterator[Step]:
    """How each part is made, in the file's order. Nothing for an opaque one."""
    sizes = iter(recipe.verbatim.sizes if recipe.verbatim else ())
    for part, used in zip(_parts_in_order(recipe, manifest), values(recipe.used), strict=True):
        use = recipe.uses[used]
        yield Step(part, use.encoder, use.feeding, next(sizes) if use.encoder == VERBATIM else 0)


def shares(recipe: Recipe, manifest: Manifest) -> dict[str, Share]:
    """What each encoder makes, `stored` and `verbatim` among them; the records around the parts are left out."""
    if isinstance(recipe.records, Opaque):
        return {VERBATIM: Share(manifest.nupkg.size, manifest.stream_size)}
    compressed, content = Counter[str](), Counter[str]()
    for use in recipe.uses:
        compressed[use.encoder] += use.compressed
    for step in steps(recipe, manifest):
        content[step.encoder] += manifest.parts[step.part].size
    return {encoder: Share(compressed[encoder], content[encoder]) for encoder in compressed}


def values(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    return chain.from_iterable(repeat(value, count) for value, count in runs)


def by_path(manifest: Manifest) -> list[int]:
    """Parts are packed folder by folder: along their paths, most steps are 1."""
    return sorted(range(len(manifest.parts)), key=lambda index: manifest.parts[index].path)


def _parts_in_order(recipe: Recipe, manifest: Manifest) -> Iterator[int]:
    indexes = by_path(manifest)
    return (indexes[place - 1] for place in accumulate(values(recipe.order)))


def fits_canonical(manifest: Manifest) -> bool:
    """Whether the parts need no zip64."""
    largest = max(manifest.nupkg.size, *(part.size for part in manifest.parts), 0)
    return largest < MAX32 and len(manifest.parts) < MAX16


def canonical_name(path: str) -> bytes:
    """A part's name in the zip as NuGet escapes it: `Uri.EscapeDataString` per segment, in `PackageBuilder`."""
    return (path if path == CONTENT_TYPES else quote(path, safe="/")).encode()


def opaque(manifest: Manifest) -> Recipe:
    """The recipe that always holds: the blob is the nupkg itself."""
    blob = Blob(bytes.fromhex(manifest.nupkg.sha256), (manifest.nupkg.size,))
    return Recipe(FORMAT, Opaque(), (), (), (), blob)


# --- the wire


def encode_recipe(recipe: Recipe) -> bytes:
    """The canonical form."""
    return msgspec.msgpack.encode(recipe)


def parse_recipe(data: bytes, manifest: Manifest) -> Recipe:
    """Take a recipe from outside: within bounds, canonical, and one that could give this manifest's nupkg.

    Whether its encoders really give it shows only in a rebuild.

    Raises:
        RecipeError: it is not.
    """
    _demand(len(data) <= RECIPE_MAX, f"{len(data)} bytes, more than {RECIPE_MAX}")
    try:
        recipe = msgspec.msgpack.decode(data, type=Recipe)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"not a recipe: {error}") from error
    _demand(recipe.format == FORMAT, f"format {recipe.format}, this version understands format {FORMAT}")
    _demand(encode_recipe(recipe) == data, "not in canonical form")
    _check(recipe, manifest)
    return recipe


def parse_recipe_wire(data: bytes, base: bytes | None, manifest: Manifest) -> Recipe:
    """A recipe that travelled as a manifest does: `to_wire`, with `base` (the recipe of another version) as prefix.

    Raises:
        RecipeError: as `parse_recipe`; not one whole zstd frame within the bounds, or another base than it was made with.
    """
    try:
        canonical = from_wire(data, base)
    except ManifestError as error:
        raise RecipeError(f"a recipe that does not decompress: {error}") from error
    return parse_recipe(canonical, manifest)


def _demand(is_so: bool, fault: str) -> None:  # noqa: FBT001 - it reads as a sentence
    if not is_so:
        raise RecipeError(f"refused recipe: {fault}")


def _check(recipe: Recipe, manifest: Manifest) -> None:
    if isinstance(recipe.records, Opaque):
        _demand(recipe == opaque(manifest), "an opaque one that does not name just the nupkg")
        return
    _check_order(recipe, len(manifest.parts))
    _check_uses(recipe, manifest)
    if isinstance(recipe.records, Canonical):
        spare = _check_canonical(recipe.records, recipe, manifest)
    else:
        lengths = recipe.records.lengths
        spare = len(recipe.records.records)
        _demand(
            len(lengths) == len(manifest.parts) + 1 and sum(lengths) == spare, "the records' lengths do not cover them"
        )
    total = spare + sum(use.compressed for use in recipe.uses)
    _demand(total == manifest.nupkg.size, f"it makes {total} bytes, the nupkg has {manifest.nupkg.size}")


def _covers(runs: Iterable[tuple[int, int]], count: int) -> bool:
    return sum(length for _, length in runs) == count


def _check_order(recipe: Recipe, count: int) -> None:
    _demand(_covers(recipe.order, count) and _covers(recipe.used, count), f"columns that do not have {count} values")
    _demand(
        sorted(accumulate(values(recipe.order))) == list(range(1, count + 1)),
        "an order that does not name each part once",
    )


def _check_uses(recipe: Recipe, manifest: Manifest) -> None:
    for use in recipe.uses:
        _demand(
            (use.feeding == "") == (use.encoder in {STORED_AS_IS, VERBATIM}),
            f"{use.encoder!r} with the feeding {use.feeding!r}",
        )
    ways = [(use.encoder, use.feeding) for use in recipe.uses]
    _demand(
        len(set(ways)) == len(ways) and {used for used, _ in recipe.used} == set(range(len(ways))),
        "ways that are named twice, not used, or not there",
    )
    totals = {use.encoder: use.compressed for use in recipe.uses}
    verbatim = sum(count for used, count in recipe.used if recipe.uses[used].encoder == VERBATIM)
    blob = recipe.verbatim or Blob(bytes(32), ())
    _demand(
        (recipe.verbatim is None) == (VERBATIM not in totals) and len(blob.sizes) == verbatim,
        "the blob does not hold the verbatim parts",
    )
    _demand(blob.size == totals.get(VERBATIM, 0), "the blob has another size than the verbatim parts")
    held = sum(manifest.parts[step.part].size for step in steps(recipe, manifest) if step.encoder == STORED_AS_IS)
    _demand(held == totals.get(STORED_AS_IS, 0), "stored parts with another size than the manifest's")


def _check_canonical(records: Canonical, recipe: Recipe, manifest: Manifest) -> int:
    """How many bytes the records have."""
    count = len(manifest.parts)
    _demand(
        all(_covers(runs, count) for runs in (records.times, records.made_by, records.attributes)),
        f"records that do not have {count} values",
    )
    _demand(fits_canonical(manifest), "more than records without zip64 can say")
    _demand(all(0 <= time <= MAX32 for time in accumulate(value for value, _ in records.times)), "a time that is none")
    places = [place for place, _ in records.names]
    _demand(
        places == sorted(set(places)) and (not places or places[-1] < count),
        "names that are not one for each of some parts, in order",
    )
    size, names = END.size, dict(records.names)
    for place, part in enumerate(_parts_in_order(recipe, manifest)):
        path = manifest.parts[part].path
        name = names.get(place)
        if name is not None and not is_other_name(name, path):
            raise RecipeError(f"refused recipe: a name that is not that of {path[:100]!r}")
        size += LOCAL.size + CENTRAL.size + 2 * len(name or canonical_name(path))
    return size


def is_other_name(name: bytes, path: str) -> bool:
    """Whether the name is an escaped form of the path, but not NuGet's. Names that are only laid down there are neither."""
    try:
        return name != canonical_name(path) and unquote(name.decode(), errors="strict") == path
    except UnicodeDecodeError:
        return False
