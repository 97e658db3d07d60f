"""The zip records around a package's parts: read out of a nupkg when it is published, and made again from its recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby, pairwise, repeat
from typing import BinaryIO, Final, cast

from relay.package.manifest import Manifest
from relay.package.recipe import (
    FORMAT,
    RECIPE_MAX,
    STORED_AS_IS,
    VERBATIM,
    Blob,
    Canonical,
    Feeding,
    LiteralRecords,
    Opaque,
    Recipe,
    Use,
    by_path,
    canonical_name,
    fits_canonical,
    is_other_name,
    steps,
    values,
)
from relay.package.zip_reader import Entry
from relay.package.zip_records import (
    CENTRAL,
    CENTRAL_MARK,
    DEFLATED,
    END,
    END_MARK,
    LOCAL,
    LOCAL_MARK,
    MAX16,
    STORED,
    VERSION_NEEDED,
)

_RECORDS_MAX: Final = 32 << 20
"""Bytes of records that are looked at. More than any zip without zip64 has, whose names are not absurd."""


class Layout:
    """Gives the records around the parts, one after another. Holds the directory that grows meanwhile."""

    def __init__(self, recipe: Recipe, manifest: Manifest) -> None:
        """For a `recipe` of `manifest` that is not opaque."""
        self._steps = steps(recipe, manifest)
        self._parts = manifest.parts
        self._count = len(manifest.parts)
        self._records = recipe.records
        self._directory = bytearray()
        self._place = self._offset = 0
        self._at = 0
        if isinstance(recipe.records, Canonical):
            self._names = dict(recipe.records.names)
            self._times = accumulate(_runs_of_differences(recipe.records.times))
            self._made_by = values(recipe.records.made_by)
            self._attributes = values(recipe.records.attributes)

    def before(self, crc32: int, compressed: int) -> bytes:
        """What stands between the part before and the next one, whose content has this CRC-32."""
        step = next(self._steps)
        place = self._place
        self._place += 1
        if not isinstance(self._records, Canonical):
            return self._cut(place)
        path, size = self._parts[step.part].path, self._parts[step.part].size
        name = self._names.get(place) or canonical_name(path)
        method = STORED if step.encoder == STORED_AS_IS else DEFLATED
        time = next(self._times)
        form = (VERSION_NEEDED, 0, method, time & MAX16, time >> 16, crc32, compressed, size, len(name))
        record = LOCAL.pack(LOCAL_MARK, *form, 0) + name
        tail = (0, 0, 0, 0, next(self._attributes), self._offset)
        self._directory += CENTRAL.pack(CENTRAL_MARK, next(self._made_by), *form, *tail) + name
        self._offset += len(record) + compressed
        return record

    def after(self) -> bytes:
        """What stands behind the last part."""
        if not isinstance(self._records, Canonical):
            return self._cut(self._place)
        end = END.pack(END_MARK, 0, 0, self._count, self._count, len(self._directory), self._offset, 0)
        return bytes(self._directory) + end

    def _cut(self, place: int) -> bytes:
        records = cast("LiteralRecords", self._records)
        self._at += records.lengths[place]
        return records.records[self._at - records.lengths[place] : self._at]


def _runs_of_differences(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Each run's difference once, then nothing changes: to be summed."""
    return chain.from_iterable(chain((value,), repeat(0, count - 1)) for value, count in runs)


def describe(file: BinaryIO, entries: Sequence[Entry], manifest: Manifest) -> Iterator[Canonical | LiteralRecords]:
    """The records of a walked nupkg in every form that gives them back, the shortest first.

    Args:
        file: seekable; its position is moved.
        entries: as `walk` gave them: in the file's order.
        manifest: of this nupkg.
    """
    spare = manifest.nupkg.size - sum(entry.compressed_size for entry in entries)
    if spare > _RECORDS_MAX:
        return
    gaps = list(_gaps(file, entries, manifest.nupkg.size))
    canonical = _read_directory(gaps[-1], entries)
    if canonical is not None and _gives(canonical, gaps, entries, manifest):
        yield canonical
    if spare <= RECIPE_MAX:
        yield LiteralRecords(tuple(map(len, gaps)), b"".join(gaps))


def compose(
    records: Canonical | LiteralRecords,
    entries: Sequence[Entry],
    manifest: Manifest,
    made: Sequence[tuple[str, Feeding]],
    blob: bytes | None,
) -> Recipe:
    """The recipe of what was found out.

    Args:
        records: one of `describe`.
        entries: in the file's order.
        manifest: of this nupkg.
        made: encoder and feeding of each entry.
        blob: SHA-256 of the verbatim bytes, where there are any.
    """
    totals: dict[tuple[str, Feeding], int] = {}
    for entry, way in zip(entries, made, strict=True):
        totals[way] = totals.get(way, 0) + entry.compressed_size
    number = {way: index for index, way in enumerate(totals)}
    sizes = tuple(entry.compressed_size for entry, way in zip(entries, made, strict=True) if way[0] == VERBATIM)
    return Recipe(
        FORMAT,
        records,
        tuple(Use(*way, total) for way, total in totals.items()),
        _order(entries, manifest),
        tuple(_runs(number[way] for way in made)),
        None if blob is None else Blob(blob, sizes),
    )


def verbatim_bytes(
    file: BinaryIO, entries: Sequence[Entry], recipe: Recipe, manifest: Manifest, piece: int = 256 << 10
) -> Iterator[bytes]:
    """The recipe's blob, read out of the original nupkg. `entries` in the file's order; may be empty for an opaque one."""
    spans = [(0, manifest.nupkg.size)]
    if not isinstance(recipe.records, Opaque):
        made = zip(entries, steps(recipe, manifest), strict=True)
        spans = [(entry.data_offset, entry.compressed_size) for entry, step in made if step.encoder == VERBATIM]
    for offset, size in spans:
        yield from pieces_of(file, offset, size, piece)


def pieces_of(file: BinaryIO, offset: int, size: int, piece: int = 256 << 10) -> Iterator[bytes]:
    """`size` bytes of `file` from `offset` on."""
    for at in range(offset, offset + size, piece):
        file.seek(at)
        yield file.read(min(piece, offset + size - at))


def _gaps(file: BinaryIO, entries: Sequence[Entry], size: int) -> Iterator[bytes]:
    at = 0
    for start, length in [*((entry.data_offset, entry.compressed_size) for entry in entries), (size, 0)]:
        file.seek(at)
        yield file.read(start - at)
        at = start + length


def _read_directory(tail: bytes, entries: Sequence[Entry]) -> Canonical | None:
    """The columns, if `tail` looks like the directory of a canonical zip. Whether it is one, `_gives` says."""
    times, made_by, attributes, names = [], [], [], []
    at = 0
    for place, entry in enumerate(entries):
        if len(tail) - at < CENTRAL.size:
            return None
        fields = CENTRAL.unpack_from(tail, at)
        name = tail[at + CENTRAL.size : at + CENTRAL.size + fields[10]]
        at += CENTRAL.size + fields[10]
        made_by.append(fields[1])
        times.append(fields[6] << 16 | fields[5])
        attributes.append(fields[15])
        if name != canonical_name(entry.path):
            names.append((place, name))
    if not all(is_other_name(name, entries[place].path) for place, name in names):
        return None
    runs = list(_runs(times))
    steps_of_times = zip(_steps(time for time, _ in runs), (count for _, count in runs), strict=True)
    return Canonical(tuple(steps_of_times), tuple(_runs(made_by)), tuple(_runs(attributes)), tuple(names))


def _gives(canonical: Canonical, gaps: list[bytes], entries: Sequence[Entry], manifest: Manifest) -> bool:
    if not fits_canonical(manifest):
        return False
    made: list[tuple[str, Feeding]] = [
        (STORED_AS_IS, "") if entry.method == STORED else ("any", "whole") for entry in entries
    ]
    layout = Layout(compose(canonical, entries, manifest, made, None), manifest)
    same = (layout.before(entry.crc32, entry.compressed_size) == gap for entry, gap in zip(entries, gaps, strict=False))
    return all(same) and layout.after() == gaps[-1]


def _runs(values: Iterable[int]) -> Iterator[tuple[int, int]]:
    return ((value, len(list(group))) for value, group in groupby(values))


def _steps(values: Iterable[int]) -> list[int]:
    """From 0 to the first value, and from each to the next."""
    return [after - before for before, after in pairwise([0, *values])]


def _order(entries: Sequence[Entry], manifest: Manifest) -> tuple[tuple[int, int], ...]:
    place = {manifest.parts[index].path: at for at, index in enumerate(by_path(manifest), start=1)}
    return tuple(_runs(_steps(place[entry.path] for entry in entries)))
