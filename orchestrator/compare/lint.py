"""What makes two builds of one source differ, what that costs, and how to mend it. Pure.

Part names, times and their cures: NuGet/Home#6229, #8601, and the design of #14785 (NuGet 7.9).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from orchestrator.compare.diff import (
    RUN_BYTES,
    OpenedPackage,
    PartChange,
    compare_parts,
    delta_bytes,
    part_delta_bytes,
    plain_bytes,
)
from orchestrator.compare.portable_executable import Assembly, read_assembly, rebuilt, without_stamps
from relay.package.chunking import is_container
from relay.package.zip_reader import is_root_nuspec
from relay.support.progress import Progress

ASSEMBLY_MAX: Final = 32 << 20
"""Bytes. A larger part is not looked into."""

Rule = Literal[
    "random-part-name",
    "pack-time",
    "member-order",
    "encoder",
    "assembly-stamp",
    "build-path",
    "commit-stamp",
    "authenticode",
    "signature",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that makes two builds of the same source differ.

    Attributes:
        rule: a short stable word.
        part: its path; empty where it concerns several parts, or the package.
        what: for people.
        mend: what to set or to do.
        our_bytes: what it costs a line as we send it; None where only a second build would tell.
        zip_bytes: the same where only the zip's own bytes are compared (rsync, Octodiff, casync).
        is_note: whether it may well be so by purpose.
    """

    rule: Rule
    part: str
    what: str
    mend: str
    our_bytes: int | None
    zip_bytes: int | None
    is_note: bool = False


@dataclass(frozen=True, slots=True)
class Lint:
    """What was found, mendable things first. `other_parts` counts those that changed for no reason of these; None alone."""

    findings: tuple[Finding, ...]
    other_parts: int | None

    @property
    def can_be_mended(self) -> bool:
        return any(not finding.is_note for finding in self.findings)


MENDS: Final[Mapping[Rule, str]] = {
    "random-part-name": "pack with NuGet 7.9 or newer: <Deterministic>true</Deterministic>, or nuget pack -Deterministic",
    "pack-time": "pack with NuGet 7.9 or newer and give it the time of the commit: <DeterministicTimestamp>, or the "
    "variable SOURCE_DATE_EPOCH",
    "member-order": "pack the same list of files in the same order, on the same system",
    "encoder": "pack with the same .NET SDK on the same system: each has a deflate of its own",
    "assembly-stamp": "build with <Deterministic>true</Deterministic> and without * in AssemblyVersion; link native code "
    "with /Brepro",
    "build-path": "build with <ContinuousIntegrationBuild>true</ContinuousIntegrationBuild>, which sets "
    "<DeterministicSourcePaths>: paths then begin with /_/",
    "commit-stamp": "nothing, if versions should name their commit; else "
    "<IncludeSourceRevisionInInformationalVersion>false</IncludeSourceRevisionInInformationalVersion>",
    "authenticode": "nothing, if files must be signed: each signature carries its time",
    "signature": "nothing: a signature carries its time",
}
_RANDOM_NAME: Final = re.compile(r"[0-9a-f]{32}\.psmdcp", re.IGNORECASE)
_RELATIONSHIPS: Final = "_rels/.rels"
_SIGNATURE: Final = ".signature.p7s"
_NO_DAY: Final = (1980, 1, 1)
_NUSPEC_MAX: Final = 1 << 20
_NUSPEC_COMMIT: Final = re.compile(rb'commit="([0-9a-f]{64}|[0-9a-f]{40})"')
_OTHER_HEX: Final = bytes.maketrans(b"0123456789abcdef", b"83f1c6d09e4a7b25")
_OF_A_BUILD: Final = frozenset({"time", "checksum", "pdb id", "mvid", "strong name"})
"""Stamps that come new with each build that is not deterministic."""
_SHOWN: Final = 3


class _Group:
    """Parts to which one note applies, and what they cost together: differences of many parts share much."""

    def __init__(self, rule: Rule, what: str) -> None:
        self._rule = rule
        self._what = what
        self._paths: list[str] = []
        self._ours: int | None = 0
        self._zips: int | None = None
        self._base = bytearray()
        self._data = bytearray()

    def add(self, path: str, zip_bytes: int | None = None, *, base: bytes = b"", data: bytes = b"") -> None:
        """One more part. `base` and `data` are what the note changed, from and to; nothing where that is not known."""
        self._paths.append(path)
        if zip_bytes is not None:
            self._zips = zip_bytes + (self._zips or 0)
        if not base:
            self._ours = None
        self._base += base
        self._data += data
        if len(self._data) >= RUN_BYTES:
            self._measure()

    def note(self) -> Iterator[Finding]:
        """The one finding of all parts, if there are any."""
        if self._base:
            self._measure()
        if self._paths:
            what = f"{_several(self._paths)}: {self._what}"
            part = self._paths[0] if len(self._paths) == 1 else ""
            yield Finding(self._rule, part, what, MENDS[self._rule], self._ours, self._zips, is_note=True)

    def _measure(self) -> None:
        if self._ours is not None:
            self._ours += delta_bytes(bytes(self._base), bytes(self._data))
        self._base.clear()
        self._data.clear()


def _several(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:_SHOWN])
    return shown if len(paths) <= _SHOWN else f"{shown} and {len(paths) - _SHOWN} more"


def _groups() -> tuple[_Group, _Group, _Group]:
    return (
        _Group("build-path", "a path of the build machine in the debug directory"),
        _Group("commit-stamp", "the hash of a commit in the version"),
        _Group("authenticode", "signed file by file"),
    )


def lint_alone(package: OpenedPackage, progress: Progress | None = None) -> Lint:
    """What will make the next build of the same source differ.

    What it costs is tried: the same part with other stamps. Blocking.
    """
    found = [*_random_name_alone(package), *_time_alone(package)]
    placed, committed, signed = groups = _groups()
    done, whole = 0, package.manifest.stream_size
    for part in package.manifest.parts:
        done += part.size
        data = _worth_reading(package, part.path)
        zipped = package.zip_part[part.path].compressed_size
        if (assembly := read_assembly(data)) is not None:
            if not assembly.deterministic:
                cost = delta_bytes(data, rebuilt(data, assembly, _OF_A_BUILD))
                found.append(_not_deterministic(part.path, assembly, cost, zipped))
            if assembly.builds_path_in:
                placed.add(part.path)
            if assembly.commit:
                committed.add(part.path, zipped, base=data, data=rebuilt(data, assembly, _OF_A_BUILD | {"commit"}))
            if assembly.signature_bytes:
                signed.add(part.path, zipped)
        elif _NUSPEC_COMMIT.search(data):
            other = _NUSPEC_COMMIT.sub(lambda match: b'commit="' + match[1].translate(_OTHER_HEX) + b'"', data)
            committed.add(part.path, zipped, base=data, data=other)
        if progress:
            progress(done, whole)
    found += [note for group in groups for note in group.note()]
    if _SIGNATURE in package.index_of:
        size = package.zip_part[_SIGNATURE].size
        found.append(_signature(plain_bytes(package.part(_SIGNATURE)), size))
    return Lint(_in_order(found), None)


def lint_pair(old: OpenedPackage, new: OpenedPackage, progress: Progress | None = None) -> Lint:
    """What made two builds differ, as far as it is not their source; costs are measured. Blocking."""
    found = [*_random_name_pair(old, new), *_time_pair(old, new), *_order_pair(old, new), *_encoder_pair(old, new)]
    placed, committed, signed = groups = _groups()
    changes = compare_parts(old, new)
    done, whole, explained = 0, max(sum(change.size for change in changes), 1), 0
    for change in changes:
        if change.change == "changed":
            explained += _is_of_names(change, found)
            data, base = _worth_reading(new, change.path), _worth_reading(old, change.old_path)
            after, before = read_assembly(data), read_assembly(base)
            if after and before:
                zipped, both = change.compressed_size, {"base": base, "data": data}
                same_code = without_stamps(data, after) == without_stamps(base, before)
                explained += same_code
                # Where the code changed too, what the stamps alone would have cost cannot be told.
                known = both if same_code else {}
                if not (after.deterministic and before.deterministic):
                    cost = delta_bytes(base, data) if same_code else None
                    found.append(_not_deterministic(change.path, after, cost, zipped))
                if after.pdb_path != before.pdb_path and (after.builds_path_in or before.builds_path_in):
                    placed.add(change.path, zipped, **known)
                if after.commit != before.commit:
                    committed.add(change.path, zipped, **known)
                if after.signature_bytes and before.signature_bytes:
                    signatures = _certificate(base, before), _certificate(data, after)
                    signed.add(change.path, zipped, base=signatures[0], data=signatures[1])
            elif _NUSPEC_COMMIT.findall(data) != _NUSPEC_COMMIT.findall(base):
                committed.add(change.path, change.compressed_size, base=base, data=data)
                explained += _NUSPEC_COMMIT.sub(b"", data) == _NUSPEC_COMMIT.sub(b"", base)
            elif change.path == _SIGNATURE:
                explained += 1
                found.append(_signature(part_delta_bytes(old, new, change), change.size))
        done += change.size
        if progress:
            progress(done, whole)
    found += [note for group in groups for note in group.note()]
    moved = sum(change.change in {"moved", "copied"} for change in changes)
    return Lint(_in_order(found), len(changes) - explained - moved)


def _in_order(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """What can be mended first, the dearest first."""
    return tuple(sorted(found, key=lambda each: (each.is_note, -(each.zip_bytes or 0), each.rule, each.part)))


def _worth_reading(package: OpenedPackage, path: str) -> bytes:
    """The part, where it may say something of its own making; else nothing."""
    size = package.manifest.parts[package.index_of[path]].size
    if is_root_nuspec(path):
        return package.part(path) if size <= _NUSPEC_MAX else b""
    is_executable = size <= ASSEMBLY_MAX and package.part(path, 0, 2) == b"MZ"
    return package.part(path) if is_executable else b""


def _certificate(data: bytes, assembly: Assembly) -> bytes:
    place = next(stamp for stamp in assembly.stamps if stamp.kind == "authenticode")
    return data[place.start : place.start + place.size]


def _not_deterministic(path: str, assembly: Assembly, our_bytes: int | None, zip_bytes: int) -> Finding:
    built = datetime.fromtimestamp(assembly.time, UTC).date().isoformat()
    kind = "assembly" if assembly.managed else "native file"
    what = f"the {kind} is not built deterministically: it is stamped {built}, and anew with each build"
    return Finding("assembly-stamp", path, what, MENDS["assembly-stamp"], our_bytes, zip_bytes)


def _signature(our_bytes: int, zip_bytes: int) -> Finding:
    what = "the package is signed"
    return Finding("signature", _SIGNATURE, what, MENDS["signature"], our_bytes, zip_bytes, is_note=True)


def _random_name(package: OpenedPackage) -> str:
    """The part that NuGet named by a GUID, or nothing."""
    paths = (path for path in package.index_of if is_container(path))
    return next((path for path in paths if _RANDOM_NAME.fullmatch(path.rpartition("/")[2])), "")


def _random_name_alone(package: OpenedPackage) -> Iterator[Finding]:
    if path := _random_name(package):
        name = path.rpartition("/")[2]
        other = name[:32].lower().encode().translate(_OTHER_HEX) + name[32:].encode()
        relationships = package.part(_RELATIONSHIPS) if _RELATIONSHIPS in package.index_of else b""
        cost = delta_bytes(relationships, relationships.replace(name.encode(), other))
        yield _named_at_random(package, path, "a name that is new with each pack", cost)


def _random_name_pair(old: OpenedPackage, new: OpenedPackage) -> Iterator[Finding]:
    before, after = _random_name(old), _random_name(new)
    if before != after and (path := after or before):
        both = _RELATIONSHIPS in old.index_of and _RELATIONSHIPS in new.index_of
        cost = delta_bytes(old.part(_RELATIONSHIPS), new.part(_RELATIONSHIPS)) if both else 0
        yield _named_at_random(new if after else old, path, "one of the two names is random, or both", cost)


def _named_at_random(package: OpenedPackage, path: str, what: str, our_bytes: int) -> Finding:
    parts = [package.zip_part[p] for p in (path, _RELATIONSHIPS) if p in package.zip_part]
    zip_bytes = sum(part.compressed_size + part.records for part in parts)
    what = f"{what}; the relationship to it in {_RELATIONSHIPS} follows"
    return Finding("random-part-name", path, what, MENDS["random-part-name"], our_bytes, zip_bytes)


def _is_of_names(change: PartChange, found: Iterable[Finding]) -> bool:
    """Whether the part changed because another has a random name."""
    names = any(finding.rule == "random-part-name" for finding in found)
    return names and change.path == _RELATIONSHIPS


def _time_alone(package: OpenedPackage) -> Iterator[Finding]:
    times = {part.stamped for part in package.zip_parts if part.stamped and part.stamped[:3] != _NO_DAY}
    if times:
        what = f"the parts carry {_times(times)}: if that is when it was packed, it is new with each pack"
        # NuGet from 7.9 on may have been given this time on purpose: the file cannot tell.
        may_be_given = len(times) == 1 and not _random_name(package)
        yield _stamped(what, _records(package), is_note=may_be_given)


def _time_pair(old: OpenedPackage, new: OpenedPackage) -> Iterator[Finding]:
    pairs = [(old.zip_part[path], part) for path, part in new.zip_part.items() if path in old.zip_part]
    differing = [(before, after) for before, after in pairs if before.stamped != after.stamped]
    if differing:
        before, after = (_times({pair[i].stamped for pair in differing}) for i in (0, 1))
        what = f"{len(differing)} of {len(pairs)} parts carry other times: {after}, before {before}"
        yield _stamped(what, sum(part.records for _, part in differing))


def _stamped(what: str, records: int, *, is_note: bool = False) -> Finding:
    return Finding("pack-time", "", what, MENDS["pack-time"], 0, records, is_note)


def _times(times: Iterable[tuple[int, ...]]) -> str:
    known = sorted(time for time in times if time)
    if not known:
        return "no time"
    first = "{:04}-{:02}-{:02} {:02}:{:02}:{:02}".format(*known[0])
    return f"the time {first}" if len(known) == 1 else f"{len(known)} times from {first} on"


def _records(package: OpenedPackage) -> int:
    return sum(part.records for part in package.zip_parts)


def _order_pair(old: OpenedPackage, new: OpenedPackage) -> Iterator[Finding]:
    before = [path for path in old.zip_part if path in new.zip_part]
    after = [path for path in new.zip_part if path in old.zip_part]
    if before != after:
        first = next(path for path, other in zip(after, before, strict=True) if path != other)
        what = f"the parts lie in another order, from {first} on"
        yield Finding("member-order", "", what, MENDS["member-order"], 0, _records(new))


def _encoder_pair(old: OpenedPackage, new: OpenedPackage) -> Iterator[Finding]:
    """Parts with the same bytes that another deflate packed."""
    differing = [
        part
        for path, part in new.zip_part.items()
        if path in old.zip_part
        and part.compressed_sha256 != old.zip_part[path].compressed_sha256
        and new.manifest.part_sha256(new.index_of[path]) == old.manifest.part_sha256(old.index_of[path])
    ]
    if differing:
        what = f"the same bytes, compressed otherwise: {_several([part.path for part in differing])}"
        zip_bytes = sum(part.compressed_size for part in differing)
        yield Finding("encoder", "", what, MENDS["encoder"], 0, zip_bytes)
