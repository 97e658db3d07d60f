"""Names of things: package ids, versions and digests. Text becomes one of these at the edge, or is refused.

The grammar of ids and versions is NuGet's (`NuGet.Versioning` and `NuGet.Packaging`), kept to ASCII, because
lower-casing differs between runtimes outside of it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import total_ordering
from typing import NewType

from relay.errors import IdentityError

Sha256 = NewType("Sha256", str)
"""64 lower-case hex digits."""

ChunkId = NewType("ChunkId", str)
"""The SHA-256 of a chunk's bytes, as 64 lower-case hex digits."""

ManifestId = NewType("ManifestId", str)
"""The SHA-256 of a manifest's canonical bytes, as 64 lower-case hex digits."""

_HEX64 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def parse_digest(text: str) -> Sha256:
    """`sha256:` + hex, or bare hex.

    Raises:
        IdentityError: not exactly 64 lower-case hex digits.
    """
    bare = text.removeprefix("sha256:")
    if not _HEX64.fullmatch(bare):
        raise IdentityError("SHA-256 digest", text, "64 lower-case hex digits, with or without 'sha256:' before them")
    return Sha256(bare)


def chunk_id(data: bytes | bytearray | memoryview) -> ChunkId:
    return ChunkId(hashlib.sha256(data).hexdigest())


def manifest_id(canonical: bytes) -> ManifestId:
    return ManifestId(hashlib.sha256(canonical).hexdigest())


ID_MAX = 100
"""Characters of a package id, as NuGet has it."""

VERSION_MAX = 256
"""Characters of a version as written. NuGet sets no bound; ours keeps paths and comparisons small."""

_ID = re.compile(r"\w+(?:[.-]\w+)*", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class PackageId:
    """A package id: `text` as it was written, compared and hashed by its lower-case `key`."""

    text: str

    def __post_init__(self) -> None:
        r"""Check the grammar, so that no invalid id can be held.

        Raises:
            IdentityError: not ASCII `\w+([.-]\w+)*`, or longer than `ID_MAX`.
        """
        if len(self.text) > ID_MAX or not _ID.fullmatch(self.text):
            expected = f"letters, digits and '_' with single '.' or '-' between them, at most {ID_MAX} characters"
            raise IdentityError("package id", self.text, expected)

    @classmethod
    def parse(cls, text: str) -> PackageId:
        """Read an id.

        Raises:
            IdentityError: see the grammar above.
        """
        return cls(text)

    @property
    def key(self) -> str:
        """The lower-case form: what paths, URLs and comparisons use."""
        return self.text.lower()

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, PackageId) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return self.text


_INT32_MAX = 2**31 - 1
_LABELS = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION = re.compile(rf"([0-9]+(?:\.[0-9]+){{0,3}})(?:-({_LABELS}))?(?:\+({_LABELS}))?")

_LabelKey = tuple[int, int, str]
_VersionKey = tuple[tuple[int, int, int, int], bool, tuple[_LabelKey, ...]]


def _label_key(label: str) -> _LabelKey:
    """Order of one label: numbers before words. A number above int32 is a word, as in NuGet's `VersionComparer`."""
    if label.isdigit() and int(label) <= _INT32_MAX:
        return 0, int(label), ""
    return 1, 0, label.lower()


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class NuGetVersion:
    """A version as `NuGet.Versioning` has it. Made by `parse`; equality and order leave out label case and metadata.

    `1`, `1.0`, `1.0.0.0` and `1.0.0+x` are one version.
    """

    numbers: tuple[int, int, int, int]
    labels: tuple[str, ...] = ()
    metadata: str = ""
    _key: _VersionKey = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stable = not self.labels
        object.__setattr__(self, "_key", (self.numbers, stable, tuple(map(_label_key, self.labels))))

    @classmethod
    def parse(cls, text: str) -> NuGetVersion:
        """Read 1 to 4 int32 parts, then `-labels`, then `+metadata`.

        Stricter than NuGet's own parser in one thing: white space is refused wherever it stands.

        Raises:
            IdentityError: anything else, a numeric label with a leading zero, or text longer than `VERSION_MAX`.
        """
        match = _VERSION.fullmatch(text) if len(text) <= VERSION_MAX else None
        if match is None:
            raise IdentityError("version", text, f"1.2.3[.4][-labels][+metadata], at most {VERSION_MAX} characters")
        first, second, third, fourth = ([int(part) for part in match[1].split(".")] + [0, 0, 0])[:4]
        if max(first, second, third, fourth) > _INT32_MAX:
            raise IdentityError("version", text, f"numeric parts of at most {_INT32_MAX}")
        labels = tuple(match[2].split(".")) if match[2] else ()
        if any(label.isdigit() and len(label) > 1 and label.startswith("0") for label in labels):
            raise IdentityError("version", text, "numeric labels without leading zeros")
        return cls((first, second, third, fourth), labels, match[3] or "")

    @property
    def normalized(self) -> str:
        """Three parts, a fourth only if it is not zero, labels in their own case, no metadata."""
        shown = self.numbers if self.numbers[3] else self.numbers[:3]
        base = ".".join(map(str, shown))
        return f"{base}-{'.'.join(self.labels)}" if self.labels else base

    @property
    def url(self) -> str:
        """`normalized` in lower case: the form of paths and URLs, one per version."""
        return self.normalized.lower()

    @property
    def full(self) -> str:
        """`normalized` with its metadata."""
        return f"{self.normalized}+{self.metadata}" if self.metadata else self.normalized

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, NuGetVersion) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._key < other._key if isinstance(other, NuGetVersion) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return self.normalized


@dataclass(frozen=True, slots=True)
class PackageRef:
    """One package: an id and a version."""

    id: PackageId
    version: NuGetVersion

    @property
    def key(self) -> tuple[str, str]:
        """Lower-case id and URL version: one per package, whatever the spelling."""
        return self.id.key, self.version.url

    def __str__(self) -> str:
        return f"{self.id} {self.version}"
