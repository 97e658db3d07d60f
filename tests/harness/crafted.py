"""Zips written byte by byte, so that every lie is possible. Nothing here checks anything."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

NUSPEC = b"<package><metadata><id>A</id><version>1.0</version></metadata></package>"

_CENTRAL_FIELDS = (
    ("made_by", "H"),
    ("need", "H"),
    ("flags", "H"),
    ("method", "H"),
    ("time", "H"),
    ("date", "H"),
    ("crc", "L"),
    ("compressed", "L"),
    ("size", "L"),
    ("name_size", "H"),
    ("extra_size", "H"),
    ("comment_size", "H"),
    ("disk", "H"),
    ("internal", "H"),
    ("attributes", "L"),
    ("offset", "L"),
)
_LOCAL_NAMES = ("need", "flags", "method", "time", "date", "crc", "compressed", "size", "name_size", "extra_size")
_LOCAL_FIELDS = tuple((name, kind) for name, kind in _CENTRAL_FIELDS if name in _LOCAL_NAMES)
_END_FIELDS = (
    ("disk", "H"),
    ("directory_disk", "H"),
    ("here", "H"),
    ("count", "H"),
    ("size", "L"),
    ("offset", "L"),
    ("comment_size", "H"),
)
_END64_FIELDS = (
    ("length", "Q"),
    ("made_by", "H"),
    ("need", "H"),
    ("disk", "L"),
    ("directory_disk", "L"),
    ("here", "Q"),
    ("count", "Q"),
    ("size", "Q"),
    ("offset", "Q"),
)
_LOCATOR_FIELDS = (("locator_disk", "L"), ("at", "Q"), ("disks", "L"))


def deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(6, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


@dataclass
class Member:
    """One entry. `local` and `central` replace single fields of those records, by name (see above, and `name`)."""

    name: str | bytes
    data: bytes = b""
    method: int = 8
    flags: int = 0
    made_by: int = 20
    attributes: int = 0
    raw: bytes | None = None
    """Compressed bytes, instead of those made of `data`."""
    before: bytes = b""
    """Bytes in front of the local record that belong to nobody."""
    after: bytes = b""
    """Bytes behind the data: a descriptor, or a gap."""
    local_extra: bytes = b""
    central_extra: bytes = b""
    comment: bytes = b""
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)

    @property
    def raw_name(self) -> bytes:
        return self.name.encode() if isinstance(self.name, str) else self.name

    @property
    def compressed(self) -> bytes:
        if self.raw is not None:
            return self.raw
        return deflate(self.data) if self.method == 8 else self.data

    def values(self, offset: int) -> dict[str, Any]:
        return {
            "made_by": self.made_by,
            "need": 20,
            "flags": self.flags,
            "method": self.method,
            "time": 0,
            "date": 33,
            "crc": zlib.crc32(self.data),
            "compressed": len(self.compressed),
            "size": len(self.data),
            "name": self.raw_name,
            "comment_size": len(self.comment),
            "disk": 0,
            "internal": 0,
            "attributes": self.attributes,
            "offset": offset,
        }


def craft(
    *members: Member,
    nuspec: bool = True,
    prefix: bytes = b"",
    between: bytes = b"",
    suffix: bytes = b"",
    comment: bytes = b"",
    order: list[int] | None = None,
    end: dict[str, int] | None = None,
    end64: dict[str, int] | None = None,
    shared: bytes = b"",
) -> bytes:
    """A zip of `members`, after a good nuspec unless told not to.

    Args:
        members: in the order of their local records.
        nuspec: whether a good root nuspec comes first.
        prefix: bytes before all; offsets know of them.
        between: bytes between the last local record and the central directory.
        suffix: bytes after all.
        comment: of the archive.
        order: of the central records, as indexes of the members (the nuspec is 0 if there).
        end: replaces fields of the end record.
        end64: if given, a zip64 end record and locator are written, with these fields replaced.
        shared: central records as they are, after the others; the count knows nothing of them.
    """
    everyone = ([Member("A.nuspec", NUSPEC)] if nuspec else []) + list(members)
    body = bytearray(prefix)
    central = []
    for member in everyone:
        body += member.before
        values = member.values(len(body))
        body += local_record(member, values) + member.compressed + member.after
        central.append(central_record(member, values))
    body += between
    directory = b"".join(central if order is None else [central[index] for index in order]) + shared
    ending = _ending(len(body), len(directory), len(everyone), comment, end or {}, end64)
    return bytes(body) + directory + ending + suffix


def local_record(member: Member, values: dict[str, Any]) -> bytes:
    said = values | {"extra_size": len(member.local_extra)} | member.local
    said.setdefault("name_size", len(said["name"]))
    return b"PK\3\4" + _pack(_LOCAL_FIELDS, said) + said["name"] + member.local_extra


def central_record(member: Member, values: dict[str, Any]) -> bytes:
    said = values | {"extra_size": len(member.central_extra)} | member.central
    said.setdefault("name_size", len(said["name"]))
    return b"PK\1\2" + _pack(_CENTRAL_FIELDS, said) + said["name"] + member.central_extra + member.comment


def _ending(
    offset: int, size: int, count: int, comment: bytes, end: dict[str, int], end64: dict[str, int] | None
) -> bytes:
    short = {"disk": 0, "directory_disk": 0, "here": count, "count": count, "size": size, "offset": offset}
    short |= {"comment_size": len(comment)} | end
    plain = b"PK\5\6" + _pack(_END_FIELDS, short) + comment
    if end64 is None:
        return plain
    long = {"length": 44, "made_by": 45, "need": 45, "disk": 0, "directory_disk": 0, "here": count, "count": count}
    long |= {"size": size, "offset": offset, "locator_disk": 0, "at": offset + size, "disks": 1} | end64
    return b"PK\6\6" + _pack(_END64_FIELDS, long) + b"PK\6\7" + _pack(_LOCATOR_FIELDS, long) + plain


def _pack(fields: tuple[tuple[str, str], ...], values: dict[str, Any]) -> bytes:
    return struct.pack("<" + "".join(kind for _, kind in fields), *(values[name] for name, _ in fields))


def zip64_extra(*values: int) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def descriptor(member: Member, *, signed: bool = True, wide: bool = False) -> bytes:
    form = "<L2Q" if wide else "<3L"
    mark = b"PK\7\x08" if signed else b""
    return mark + struct.pack(form, zlib.crc32(member.data), len(member.compressed), len(member.data))
