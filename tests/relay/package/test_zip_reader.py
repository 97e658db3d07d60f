from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
import stat
import struct
import subprocess
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from harness.crafted import NUSPEC, Member, central_record, craft, deflate, descriptor, local_record, zip64_extra
from harness.paths import DATA, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import ArchiveError, MetadataError, UsageError
from relay.package import pack as pack_module
from relay.package.identity import NuGetVersion, PackageId
from relay.package.pack import pack
from relay.package.zip_reader import Entry, WalkLimits, read_nuspec, read_part, walk
from relay.support.zstd import zstd

NUPKGS = sorted(SHARED.glob("*/*.nupkg")) or sorted(DATA.rglob("*.nupkg"))
TEXT = b"some text, " * 50
A, ONE = PackageId.parse("A"), NuGetVersion.parse("1.0")


def walked(data: bytes, **limits: int) -> tuple[Entry, ...]:
    return walk(io.BytesIO(data), WalkLimits(**limits))


def contents(data: bytes, **limits: int) -> dict[str, bytes]:
    file = io.BytesIO(data)
    return {entry.path: b"".join(read_part(file, entry, 100)) for entry in walk(file, WalkLimits(**limits))}


def rule_of(data: bytes, **limits: int) -> str:
    """The rule by which the walk refuses these bytes."""
    with pytest.raises(ArchiveError) as caught:
        walked(data, **limits)
    return caught.value.rule


def reading_rule_of(data: bytes, path: str) -> str:
    """The rule by which a part of these bytes, which pass the walk, is refused when it is read."""
    (entry,) = [entry for entry in walked(data) if entry.path == path]
    with pytest.raises(ArchiveError) as caught:
        sum(map(len, read_part(io.BytesIO(data), entry)))
    assert caught.value.member == path
    return caught.value.rule


# --- honest archives


def test_what_was_put_in_comes_out() -> None:
    data = craft(Member("lib/a.dll", TEXT), Member("b.txt", b"stored", method=0), Member("empty", b"", method=0))
    assert contents(data) == {"A.nuspec": NUSPEC, "lib/a.dll": TEXT, "b.txt": b"stored", "empty": b""}
    entry = walked(data)[1]
    assert entry == Entry(
        "lib/a.dll", len(TEXT), len(deflate(TEXT)), zlib.crc32(TEXT), 8, entry.data_offset, executable_bit=False
    )
    assert data[entry.data_offset :].startswith(deflate(TEXT))


def test_the_executable_bit_counts_where_a_unix_wrote_it() -> None:
    mode = 0o100755 << 16
    members = [
        Member("unix", made_by=0x0314, attributes=mode),
        Member("mac", made_by=0x1314, attributes=mode),
        Member("dos", made_by=0x0014, attributes=mode),
        Member("plain", made_by=0x0314, attributes=0o100644 << 16),
        Member("none", made_by=0x0314, attributes=0),
        Member("setuid", made_by=0x0314, attributes=0o106755 << 16),
    ]
    found = {entry.path: entry.executable_bit for entry in walked(craft(*members))}
    assert found == {
        "A.nuspec": False,
        "unix": True,
        "mac": True,
        "dos": False,
        "plain": False,
        "none": False,
        "setuid": True,
    }


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_data_descriptor_of_any_form_passes(*, signed: bool, wide: bool, zeros: bool) -> None:
    member = Member("a", TEXT, flags=8)
    member.after = descriptor(member, signed=signed, wide=wide)
    if zeros:
        member.local = {"crc": 0, "compressed": 0, "size": 0}
    assert contents(craft(member, Member("b", TEXT)))["a"] == TEXT
    assert contents(craft(Member("b", TEXT), member))["a"] == TEXT


class Pipe(io.RawIOBase):
    """A stream that cannot seek, as a writer sees a socket."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.data += data
        return len(data)


@pytest.mark.parametrize("force_zip64", [True, False])
def test_a_zip_written_to_a_pipe_passes(*, force_zip64: bool) -> None:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, content in (("A.nuspec", NUSPEC), ("lib/a", TEXT), ("empty", b"")):
            with archive.open(name, "w", force_zip64=force_zip64) as part:
                part.write(content)
    assert pipe.data[6] & 8
    assert contents(bytes(pipe.data)) == {"A.nuspec": NUSPEC, "lib/a": TEXT, "empty": b""}


def test_a_zip_with_zip64_fields_where_none_are_needed_passes() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("A.nuspec", NUSPEC), ("lib/a", TEXT)):
            with archive.open(name, "w", force_zip64=True) as part:
                part.write(content)
    assert contents(file.getvalue()) == {"A.nuspec": NUSPEC, "lib/a": TEXT}


def zip64_member(**central: Any) -> Member:
    """Sizes of 32 bits replaced by the sentinel, the real ones in zip64 fields."""
    real = (len(TEXT), len(deflate(TEXT)))
    sentinels = {"size": 0xFFFFFFFF, "compressed": 0xFFFFFFFF}
    return Member(
        "a",
        TEXT,
        local=sentinels,
        local_extra=zip64_extra(*real),
        central=sentinels | central,
        central_extra=zip64_extra(*real),
    )


def test_zip64_sizes_and_end_record_pass() -> None:
    assert contents(craft(zip64_member(), end64={}))["a"] == TEXT
    sentinels = {"here": 0xFFFF, "count": 0xFFFF, "size": 0xFFFFFFFF, "offset": 0xFFFFFFFF}
    assert contents(craft(zip64_member(), end64={}, end=sentinels))["a"] == TEXT


@pytest.mark.long
def test_more_parts_than_16_bits_can_count_pass() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("A.nuspec", NUSPEC)
        for number in range(0xFFFF):
            archive.writestr(f"{number:x}", b"")
    assert len(walk(file)) == 0x10000


def test_extra_fields_and_comments_pass() -> None:
    times = struct.pack("<2HBL", 0x5455, 5, 1, 0)
    own_name = struct.pack("<2HBL", 0x7075, 6, 1, zlib.crc32(b"a")) + b"a"
    member = Member("a", TEXT, local_extra=times + bytes(3), central_extra=times + own_name, comment=b"hello")
    assert contents(craft(member, comment=b"of the archive"))["a"] == TEXT


def test_zeros_that_fill_the_last_block_pass() -> None:
    good = Member("a", TEXT)
    assert contents(craft(good, suffix=bytes(10_239)))["a"] == TEXT
    assert contents(craft(good, comment=b"hello", suffix=b"\0"))["a"] == TEXT
    assert rule_of(craft(good, suffix=bytes(0x10000))) == "end"
    assert rule_of(craft(good, prefix=b"\0")) == "gap"


def test_disks_that_are_left_to_the_zip64_end_record_pass() -> None:
    sentinels = {"disk": 0xFFFF, "directory_disk": 0xFFFF}
    assert contents(craft(Member("a", TEXT), end64={}, end=sentinels))["a"] == TEXT
    assert rule_of(craft(Member("a", TEXT), end=sentinels)) == "disks"
    assert rule_of(craft(Member("a", TEXT), end64={}, end={"disk": 1})) == "disks"


def test_an_empty_part_needs_no_compressed_byte() -> None:
    assert contents(craft(Member("a", b"", raw=b""), Member("b", b"", method=93, raw=b"")))["a"] == b""
    assert reading_rule_of(craft(Member("a", TEXT, raw=b"")), "a") == "size"


def test_any_order_of_the_central_directory_passes() -> None:
    data = craft(Member("a", TEXT), Member("b", b"b"), order=[2, 0, 1])
    assert contents(data) == {"A.nuspec": NUSPEC, "a": TEXT, "b": b"b"}
    assert [entry.path for entry in walked(data)] == ["A.nuspec", "a", "b"]


def test_entries_for_folders_are_left_out() -> None:
    unix = Member("lib/", method=0, made_by=0x0314, attributes=0o040755 << 16 | 0x10)
    java = Member("tools/", flags=8, local={"compressed": 0})
    java.after = descriptor(java)
    data = craft(unix, java, Member("lib/x/", method=0, attributes=0x10), Member("lib/x/a", TEXT))
    assert [entry.path for entry in walked(data)] == ["A.nuspec", "lib/x/a"]


GOOD_NAMES = {
    "lib/portable-net45%2Bwin8/_._": "lib/portable-net45+win8/_._",
    "lib/portable-net45+win8/_._": "lib/portable-net45+win8/_._",
    "a%20b": "a b",
    "100%.txt": "100%.txt",
    "a%zz": "a%zz",
    "a%252e%252e": "a%2e%2e",
    "caf%e9%C3%A9": "caf%e9é",
    "%C3%A9": "é",
    "é.txt": "é.txt",
    "a%2Fb": "a/b",
    "..a": "..a",
    "a...b": "a...b",
    "console.txt": "console.txt",
    "nulls": "nulls",
    "com10.dll": "com10.dll",
    "[Content_Types].xml": "[Content_Types].xml",
    ".signature.p7s": ".signature.p7s",
    "_rels/.rels": "_rels/.rels",
    " a": " a",
    "c" * 255: "c" * 255,
    "/".join("d" * 64): "/".join("d" * 64),
    # As the SDK packs `PackagePath="…\\"` on Linux, and other writers pack the folder they stand in.
    "tools/net10.0/any//run.sh": "tools/net10.0/any/run.sh",
    "a///b": "a/b",
    "./lib/a.dll": "lib/a.dll",
    "././lib/./a.dll": "lib/a.dll",
    "lib/%2E/a.dll": "lib/a.dll",
    "/lib/a.dll": "lib/a.dll",
    # Odd, and nothing worse.
    "PROGRA~1": "PROGRA~1",
    "README.md~": "README.md~",
    "a\u202etxt.exe": "a\u202etxt.exe",
    "a\u200db": "a\u200db",
    "\ufeffa": "\ufeffa",
    "cafe\u0301": "cafe\u0301",
}


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_an_honest_name_is_unescaped_once(name: str) -> None:
    assert [entry.path for entry in walked(craft(Member(name, TEXT)))] == ["A.nuspec", GOOD_NAMES[name]]


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("zip") is None, reason="Info-ZIP's zip is not installed")
@pytest.mark.parametrize("options", [[], ["-X"], ["-0"], ["-D"], ["-fz"], ["-fd"]], ids="".join)
def test_a_zip_by_info_zip_passes(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "in" / "lib" / "empty").mkdir(parents=True)
    files = {"A.nuspec": NUSPEC, "lib/a.dll": TEXT, "lib/run me": b"#!/bin/sh\n", "nothing": b""}
    for path, content in files.items():
        (tmp_path / "in" / path).write_bytes(content)
    (tmp_path / "in" / "lib" / "run me").chmod(0o755)
    subprocess.run(["zip", "-q", "-r", *options, "../out.zip", "."], cwd=tmp_path / "in", check=True)
    data = (tmp_path / "out.zip").read_bytes()
    assert contents(data) == files
    assert [entry.path for entry in walked(data) if entry.executable_bit] == ["lib/run me"]


@pytest.mark.skipif(not NUPKGS, reason="no real packages in ../shared/data or tests/data")
@pytest.mark.parametrize("path", NUPKGS, ids=lambda path: path.stem)
def test_a_real_package_passes_whole(path: Path) -> None:
    with path.open("rb") as file, zipfile.ZipFile(path) as archive:
        entries = walk(file)
        assert path.name.lower().startswith(read_nuspec(file, entries).id.key + ".")
        assert [entry.size for entry in entries] == [info.file_size for info in archive.infolist()]
        for entry in entries:
            assert sum(map(len, read_part(file, entry))) == entry.size


# --- spans


def test_a_full_overlap_bomb_is_refused() -> None:
    kernel = Member("0", bytes(200_000))
    offset = craft().index(b"PK\1\2")
    values = kernel.values(offset)
    others = b"".join(central_record(kernel, values | {"name": b"%d" % n}) for n in range(1, 50))
    bomb = craft(kernel, shared=others, end={"here": 51, "count": 51})
    assert rule_of(bomb) == "overlap"


def test_a_quoted_overlap_bomb_is_refused() -> None:
    """Each entry's deflate data quotes the next one's local record and then shares its data (Fifield 2019)."""
    kernel = Member("b", bytes(100_000))
    header = local_record(kernel, kernel.values(0))
    quote = b"\x00" + struct.pack("<2H", len(header), len(header) ^ 0xFFFF)
    inflated = header + kernel.data
    raw = quote + header + kernel.compressed
    assert zlib.decompressobj(-15).decompress(raw) == inflated
    outer = Member("a", raw=quote)
    outer.local = outer.central = {"crc": zlib.crc32(inflated), "size": len(inflated), "compressed": len(raw)}
    assert (
        rule_of(
            craft(outer, kernel),
        )
        == "overlap"
    )


def test_two_central_records_for_one_local_are_refused() -> None:
    data = craft(Member("a", TEXT), Member("b", TEXT, central={"offset": craft().index(b"PK\1\2")}))
    assert rule_of(data) in {"overlap", "gap", "disagree"}


@pytest.mark.parametrize("gap", [b"\0x", b"MZ" + bytes(100), b"PK\3\4" + bytes(26)])
def test_bytes_that_belong_to_no_record_are_refused(gap: bytes) -> None:
    good = Member("a", TEXT)
    assert rule_of(craft(good, prefix=gap)) == "gap"
    assert rule_of(gap + craft(good)) == "gap"
    assert rule_of(craft(Member("a", TEXT, before=gap))) == "gap"
    assert rule_of(craft(good, between=gap)) == "gap"
    assert rule_of(craft(good, suffix=gap)) == "end"
    assert rule_of(craft(nuspec=False, prefix=gap)) == "gap"


def test_an_entry_behind_the_central_directory_is_refused() -> None:
    for offset in (10_000, 0xFFFFFFFE):
        assert rule_of(craft(Member("a", TEXT, central={"offset": offset}))) in {"gap", "overlap"}


def test_a_comment_that_hides_another_end_record_is_refused() -> None:
    good = craft(Member("a", TEXT))
    ending = good[good.rindex(b"PK\5\6") :]
    assert rule_of(craft(Member("a", TEXT), comment=ending)) == "gap"
    assert rule_of(craft(Member("a", TEXT), comment=ending + b"x")) == "end"
    assert rule_of(craft(Member("a", TEXT), comment=b"PK\5\6")) == "end"
    assert rule_of(craft(Member("a", TEXT), comment=good)) == "gap"


def test_two_archives_one_after_the_other_are_refused() -> None:
    assert rule_of(craft(Member("a", TEXT)) + craft(Member("b", TEXT))) == "gap"


@pytest.mark.parametrize("size", [0, 1, 4, 21, 22, 100])
def test_what_is_no_zip_is_refused(size: int) -> None:
    assert rule_of(bytes(size)) == "end"
    assert rule_of(b"PK\5\6"[:size]) == "end"


def test_every_cut_of_a_package_is_refused() -> None:
    good = craft(Member("a", TEXT))
    for size in range(len(good)):
        rule_of(good[:size])
        rule_of(good[size + 1 :])


# --- records that lie


@pytest.mark.parametrize("where", ["local", "central"])
@pytest.mark.parametrize(
    "lie",
    [{"name": b"b"}, {"method": 0}, {"crc": 1}, {"size": 549}, {"size": 551}, {"flags": 2}, {"compressed": 20}],
    ids=str,
)
def test_local_and_central_records_that_disagree_are_refused(where: str, lie: dict[str, Any]) -> None:
    lying: dict[str, Any] = {where: lie}
    assert rule_of(craft(Member("a", TEXT, **lying), Member("z"))) in {"disagree", "gap", "overlap"}
    if "compressed" not in lie:
        assert rule_of(craft(Member("a", TEXT, **lying), Member("z"))) == "disagree"


def test_only_what_is_streamed_may_have_no_sizes_in_front() -> None:
    assert rule_of(craft(Member("a", TEXT, local={"crc": 0, "size": 0, "compressed": 0}))) == "disagree"
    streamed = Member("a", TEXT, flags=8, local={"size": 7})
    streamed.after = descriptor(streamed)
    assert rule_of(craft(streamed)) == "disagree"


def test_a_descriptor_that_lies_or_is_too_long_is_refused() -> None:
    member = Member("a", TEXT, flags=8)
    good = descriptor(member)
    bad = [good[:-1], good + b"\0", bytes(16), good[:4] + bytes(4) + good[8:], good * 2, bytes(12), bytes(24)]
    for after in bad:
        member.after = after
        assert rule_of(craft(member)) == "descriptor"
        assert rule_of(craft(Member("a", TEXT, after=after))) == "gap"


@pytest.mark.parametrize("flags", [0, 8])
def test_a_descriptor_that_only_one_record_tells_of_passes(flags: int) -> None:
    member = Member("a", TEXT, flags=flags)
    member.local, member.central = {"flags": 8, "crc": 0, "size": 0, "compressed": 0}, {"flags": 8 - flags}
    member.after = descriptor(member)
    assert contents(craft(member, Member("b", TEXT)))["a"] == TEXT


def test_a_descriptor_that_is_not_told_of_or_turned_round_passes() -> None:
    member = Member("a", TEXT)
    for after in (descriptor(member), b"\x08\x07KP" + descriptor(member, signed=False)):
        member.after = after
        assert contents(craft(member, Member("b", TEXT)))["a"] == TEXT


def test_a_descriptor_may_lack_only_where_the_local_record_says_all() -> None:
    assert contents(craft(Member("a", TEXT, flags=8), Member("b", TEXT)))["a"] == TEXT
    for name in ("crc", "size", "compressed"):
        assert rule_of(craft(Member("a", TEXT, flags=8, local={name: 0}))) == "descriptor"


@pytest.mark.parametrize("flags", [0x0001, 0x0041, 0x2000, 0x2001])
def test_encryption_is_refused(flags: int) -> None:
    assert rule_of(craft(Member("a", TEXT, flags=flags))) == "encryption"


@pytest.mark.parametrize("flags", [0x0010, 0x0020, 0x0080, 0x1000, 0x4000, 0x8000])
def test_unknown_flags_are_refused(flags: int) -> None:
    assert rule_of(craft(Member("a", TEXT, flags=flags))) == "flags"


@pytest.mark.parametrize(
    ("method", "name"),
    [(1, "Shrink"), (9, "Deflate64"), (12, "bzip2"), (14, "LZMA"), (95, "XZ"), (98, "PPMd"), (77, "an unknown method")],
)
def test_a_method_that_is_not_read_is_refused_by_its_name(method: int, name: str) -> None:
    with pytest.raises(ArchiveError, match=rf"compressed by {name} \(method {method}\)") as caught:
        walked(craft(Member("a", TEXT, method=method)))
    assert (caught.value.rule, caught.value.member) == ("method", "a")


def test_a_stored_entry_with_two_sizes_is_refused() -> None:
    lie = {"size": 1000}
    assert rule_of(craft(Member("a", TEXT, method=0, local=lie, central=lie))) == "disagree"


def test_zip64_fields_that_lie_are_refused() -> None:
    huge = zip64_member()
    huge.local_extra = huge.central_extra = zip64_extra(2**63, 2**63)
    assert rule_of(craft(huge)) == "size"
    other = zip64_member()
    other.local_extra = zip64_extra(len(TEXT) + 1, len(deflate(TEXT)))
    assert rule_of(craft(other)) == "disagree"
    missing = zip64_member()
    missing.central_extra = b""
    assert rule_of(craft(missing)) == "zip64"
    short = zip64_member()
    short.central_extra = zip64_extra(len(TEXT))
    assert rule_of(craft(short)) == "zip64"
    needless = Member("a", TEXT, central_extra=zip64_extra(5, 5))
    assert rule_of(craft(needless)) == "zip64"
    twice = Member("a", TEXT, central_extra=zip64_extra(len(TEXT)) * 2)
    assert rule_of(craft(twice)) == "directory"
    odd = Member("a", TEXT, central_extra=struct.pack("<2H3s", 1, 3, b"abc"))
    assert rule_of(craft(odd)) == "zip64"


def test_a_zip64_size_or_offset_beyond_any_file_is_refused() -> None:
    far = Member("a", TEXT, central={"offset": 0xFFFFFFFF}, central_extra=zip64_extra(2**64 - 1))
    assert rule_of(craft(far)) in {"overlap", "gap"}
    sentinel = {"compressed": 0xFFFFFFFF}
    long = Member("a", TEXT, flags=8, local=sentinel, central=sentinel)
    long.local_extra = long.central_extra = zip64_extra(2**64 - 1)
    assert rule_of(craft(long)) == "overlap"


@pytest.mark.parametrize(
    ("lie", "rule"),
    [
        ({"at": 0}, "zip64"),
        ({"at": 2**64 - 1}, "zip64"),
        ({"length": 45}, "zip64"),
        ({"offset": 0}, "zip64"),
        ({"size": 2**63}, "zip64"),
        ({"count": 2**63, "here": 2**63}, "zip64"),
        ({"here": 7}, "disks"),
        ({"disks": 2}, "disks"),
        ({"locator_disk": 1}, "disks"),
        ({"disk": 1}, "disks"),
        ({"directory_disk": 1}, "disks"),
    ],
    ids=str,
)
def test_a_zip64_end_record_that_lies_is_refused(lie: dict[str, int], rule: str) -> None:
    assert rule_of(craft(Member("a", TEXT), end64=lie)) == rule


def test_a_zip64_count_beyond_reason_is_refused_before_it_is_used() -> None:
    data = craft(Member("a"), end64={"here": 2**63, "count": 2**63}, end={"here": 0xFFFF, "count": 0xFFFF})
    assert rule_of(data) == "count"


@pytest.mark.parametrize("lie", [{"disk": 1}, {"directory_disk": 1}, {"here": 1}], ids=str)
def test_an_archive_of_several_disks_is_refused(lie: dict[str, int]) -> None:
    assert rule_of(craft(Member("a", TEXT), end=lie)) == "disks"
    assert rule_of(craft(Member("a", TEXT, central={"disk": 1}))) == "disks"


@pytest.mark.parametrize("count", [0, 1, 3, 0xFFFF])
def test_a_count_that_lies_is_refused(count: int) -> None:
    assert rule_of(craft(Member("a", TEXT), end={"here": count, "count": count})) == "count"


@pytest.mark.parametrize("lie", [{"offset": 0}, {"offset": 0xFFFFFFFF}, {"size": 0}, {"size": 0xFFFFFFFF}], ids=str)
def test_a_central_directory_elsewhere_is_refused(lie: dict[str, int]) -> None:
    assert rule_of(craft(Member("a", TEXT), end=lie)) == "gap"


def test_a_damaged_central_directory_is_refused() -> None:
    for lie in ({"name_size": 2000}, {"extra_size": 2000}, {"comment_size": 2000}):
        assert rule_of(craft(Member("a", TEXT, central=lie))) == "directory"
    assert rule_of(craft(Member("a", TEXT), shared=b"PK\1\2")) in {"directory", "count"}
    assert rule_of(craft(Member("a", TEXT), shared=bytes(46), end={"here": 3, "count": 3})) == "directory"
    assert rule_of(craft(Member("a", TEXT, central_extra=b"\1\2\3\4\5"))) == "directory"
    assert rule_of(craft(Member("a", TEXT, central_extra=b"\1\2\3"))) == "directory"
    assert rule_of(craft(Member("a", TEXT, central_extra=bytes(1028)))) == "directory"


# --- names and kinds

BAD_NAMES: list[str | bytes] = [
    *(
        "../x",
        "a/../x",
        "a/..",
        "..",
        "//srv/x",
        "C:\\x",
        "C:x",
        "..\\x",
        "\\\\srv\\x",
        "a\\b",
        "a\0b",
        "",
        ".",
    ),
    *(
        "a/.",
        "//",
        "//a",
        "%2fa",
        "/%2fa",
        "/..",
        "/../a",
        "./../a",
        "%2e%2e/x",
        "..%2fx",
        "%2E%2E%2Fx",
        "%2fabs",
        "a%00b",
        "a%5cb",
        "a%0ab",
    ),
    *("CON", "nul.txt", "a/COM1.dll", "lpt9.tar.gz", "COM%C2%B9", "con .txt", "Aux", "prn/x", "conin$"),
    *(
        "a<b",
        'a"b',
        "a|b",
        "a?b",
        "a*b",
        "a:b",
        "x.",
        "x ",
        "x%20",
        "x%2e",
        "a./b",
        "a /b",
        "\x1b[31m",
        "a\x7f",
        "a\x85b",
    ),
    *("c" * 256, "c" * 300, "é" * 128, "a/" * 600 + "a", "d" * 250 + "/" + "/".join("d" * 64), "p/" * 2500 + "p"),
    *("/", "./", b"\xff", b"\xc3", b"a\x82.txt"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:40])
def test_scenario_37_a_bad_name_is_refused_and_never_mended(name: str | bytes) -> None:
    assert rule_of(craft(Member(name, TEXT))) == "name"


def test_an_extra_field_with_another_name_is_refused() -> None:
    alias = struct.pack("<2HBL", 0x7075, 9, 1, zlib.crc32(b"a")) + b"../x"
    assert rule_of(craft(Member("a", TEXT, local_extra=alias))) == "name"
    assert rule_of(craft(Member("a", TEXT, central_extra=alias))) == "name"


@pytest.mark.parametrize(
    ("one", "other", "rule"),
    [
        ("a", "a", "duplicate"),
        ("a b", "a%20b", "duplicate"),
        ("lib/x.dll", "lib/x.dll", "duplicate"),
        ("lib/x.dll", "Lib/X.DLL", "collision"),
        ("é", "É", "collision"),
        ("straße", "STRAßE", "collision"),
        ("straße", "stra\u1e9ee", "collision"),
        ("\u03c3", "\u03c2", "collision"),
        ("k", "\u212a", "collision"),
        ("I\u0307", "i\u0307", "collision"),
        ("\u0130", "i\u0307", "collision"),
        ("\u1f88", "\u1f80", "collision"),
        ("caf\u00e9", "cafe\u0301", "collision"),
        ("\uac00/a", "\u1100\u1161/a", "collision"),
        ("a.txt", "a\u202e.txt", "collision"),
        ("a.txt", "\ufeffa.txt", "collision"),
        ("a", "A\u200d/b", "collision"),
        ("a/b", "a//b", "duplicate"),
        ("a/b", "./a/b", "duplicate"),
        ("a/b", "/a/B", "collision"),
        ("PROGRA~1", "Program Files", "collision"),
        ("progra~1/a", "Program Files/b", "collision"),
        ("x/README~1.TXT", "x/readme first.txt", "collision"),
        ("LONGEX~1.HTM", "longextension.html", "collision"),
        ("GIT~1/config", ".git/config", "collision"),
        ("a", "a/b", "collision"),
        ("a/b", "A", "collision"),
        ("a", "A/b/c/d", "collision"),
        ("a", "a%2fb", "collision"),
    ],
)
def test_two_names_for_one_file_are_refused(one: str, other: str, rule: str) -> None:
    assert rule_of(craft(Member(one, TEXT), Member(other, TEXT))) == rule


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("straße", "strasse"),
        ("\ufb01", "fi"),
        ("\u0131", "i"),
        ("\u01c6", "dz\u030c"),
        ("\uff41", "a"),
        ("PROGRA~1", "program"),
        ("a/PROGRA~1", "b/Program Files"),
        ("chapter~1.txt", "chapter one.txt"),
        ("file.txt", "file.txt~"),
        ("file~1.txt", "other name.txt"),
        ("file~1.txt", "file name.html"),
    ],
)
def test_two_names_that_every_file_system_tells_apart_pass(one: str, other: str) -> None:
    assert {entry.path for entry in walked(craft(Member(one, TEXT), Member(other, TEXT)))} >= {one, other}


def test_folder_entries_take_part_in_collisions() -> None:
    folder = Member("a/", method=0)
    assert rule_of(craft(folder, Member("a", TEXT))) == "collision"
    assert rule_of(craft(folder, Member("a/", method=0))) == "duplicate"
    assert rule_of(craft(folder, Member("A/", method=0))) == "collision"


def test_folders_that_differ_in_case_are_no_collision() -> None:
    assert len(walked(craft(Member("lib/NET45/a", TEXT), Member("lib/net45/b", TEXT)))) == 3


@pytest.mark.parametrize("kind", [0o120777, 0o060660, 0o020660, 0o010660, 0o140777])
@pytest.mark.parametrize("made_by", [0x0314, 0x0014])
def test_scenario_37_a_link_or_device_is_refused(kind: int, made_by: int) -> None:
    assert rule_of(craft(Member("a", b"/etc/passwd", made_by=made_by, attributes=kind << 16))) == "link"
    assert rule_of(craft(Member("a/", method=0, made_by=made_by, attributes=kind << 16))) == "link"


def test_a_windows_link_is_refused() -> None:
    assert rule_of(craft(Member("a", TEXT, attributes=0x400))) == "link"


def test_a_folder_that_carries_data_or_a_file_that_claims_to_be_one_is_refused() -> None:
    assert rule_of(craft(Member("a/", TEXT))) == "folder"
    assert rule_of(craft(Member("a/", TEXT, method=0))) == "folder"
    assert rule_of(craft(Member("a/", raw=bytes(65)))) == "folder"
    assert rule_of(craft(Member("a/", raw=b"\3"))) == "inflate"
    assert rule_of(craft(Member("a/", raw=deflate(b"hidden")))) == "size"
    assert rule_of(craft(Member("a/", raw=b"\3\0hidden"))) == "trailing"
    assert rule_of(craft(Member("a/", method=0, made_by=0x0314, attributes=stat.S_IFREG << 16))) == "folder"
    assert rule_of(craft(Member("a", TEXT, made_by=0x0314, attributes=stat.S_IFDIR << 16))) == "folder"
    assert rule_of(craft(Member("a", TEXT, attributes=0x10))) == "folder"


@pytest.mark.parametrize(
    "members",
    [
        [],
        [Member("lib/A.nuspec", NUSPEC)],
        [Member("A.nuspec", NUSPEC), Member("B.nuspec", NUSPEC)],
        [Member("A.nuspec", NUSPEC), Member("B.NUSPEC", NUSPEC)],
        [Member("A.nuspec", NUSPEC), Member("B%2Enuspec", NUSPEC)],
        [Member("A.nuspec/", method=0)],
    ],
    ids=["empty", "below", "two", "two-cases", "escaped", "folder"],
)
def test_anything_but_one_root_nuspec_is_refused(members: list[Member]) -> None:
    assert rule_of(craft(*members, nuspec=False)) == "nuspec"


def test_the_nuspec_is_found_whatever_its_name_and_place() -> None:
    file = io.BytesIO(craft(Member("x/B.nuspec", b""), Member("Other.NuSpec", NUSPEC), nuspec=False))
    assert str(read_nuspec(file, walk(file)).id) == "A"


def test_a_large_nuspec_is_refused_unread() -> None:
    file = io.BytesIO(craft(Member("A.nuspec", random.Random(1).randbytes(2 << 20)), nuspec=False))
    with pytest.raises(MetadataError, match="more than"):
        read_nuspec(file, walk(file))


# --- bombs and limits


def test_no_ratio_refuses_honest_content() -> None:
    zeros, equal_lines = bytes(3 << 20), b"0,0,0,0\r\n" * 20_000
    read = contents(craft(Member("template.mdf", zeros), Member("sample.csv", equal_lines)))
    assert (read["template.mdf"], read["sample.csv"]) == (zeros, equal_lines)


def test_scenario_37_what_parts_inflate_to_together_is_bounded() -> None:
    many = [Member(str(number), bytes(60_000)) for number in range(10)]
    assert len(walked(craft(*many), inflated=600_000 + len(NUSPEC))) == 11
    assert rule_of(craft(*many), inflated=600_000) == "size"


def test_limits_hold_where_they_are_set() -> None:
    data = craft(Member("dir/name", TEXT), Member("b", TEXT))
    assert walked(data, parts=3, package=len(data), inflated=2000, depth=2, component=8, path_bytes=8)
    assert rule_of(data, parts=2) == "count"
    assert rule_of(data, package=len(data) - 1) == "size"
    assert rule_of(data, inflated=1000) == "size"
    assert rule_of(data, directory=100) == "size"
    assert rule_of(data, depth=1) == "name"
    assert rule_of(data, component=7) == "name"
    assert rule_of(data, path_bytes=7) == "name"


# --- reading


def test_a_part_that_holds_more_or_less_than_it_says_is_refused() -> None:
    for size in (0, 1, len(TEXT) - 1, len(TEXT) + 1, 10_000):
        lie = {"size": size}
        assert reading_rule_of(craft(Member("a", TEXT, local=lie, central=lie)), "a") == "size"


def test_scenario_37_a_part_that_says_little_and_inflates_without_end_stops_at_once() -> None:
    lie = {"size": 100}
    data = craft(Member("a", bytes(50 << 20), local=lie, central=lie))
    (entry,) = [entry for entry in walked(data) if entry.path == "a"]
    found: list[int] = []
    with pytest.raises(ArchiveError, match="more than"):
        found.extend(map(len, read_part(io.BytesIO(data), entry)))
    assert sum(found) <= 100


def test_a_wrong_checksum_is_refused() -> None:
    lie = {"crc": 1}
    for method in (0, 8):
        assert reading_rule_of(craft(Member("a", TEXT, method=method, local=lie, central=lie)), "a") == "crc"


@pytest.mark.parametrize("more", [b"\0", b"hidden" * 1000, deflate(b"second stream")])
def test_bytes_behind_the_deflate_data_are_refused(more: bytes) -> None:
    assert reading_rule_of(craft(Member("a", TEXT, raw=deflate(TEXT) + more)), "a") == "trailing"
    big = random.Random(1).randbytes(1 << 20)
    assert reading_rule_of(craft(Member("a", big, raw=deflate(big) + more)), "a") == "trailing"


@pytest.mark.parametrize("raw", [deflate(TEXT)[:-1], b"\xff" * 20, b"\x00\x01\x00\x00\x00x"])
def test_damaged_deflate_data_is_refused(raw: bytes) -> None:
    assert reading_rule_of(craft(Member("a", TEXT, raw=raw)), "a") == "inflate"


# --- zstd

FRAME = zstd.compress(TEXT)
TWENTY_SEVEN, TWENTY_EIGHT = (b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + b"\x01\x00\x00" for log in (27, 28))
"""An empty frame that asks for a window of 128 and 256 MiB."""


@pytest.mark.parametrize("method", [93, 20])
@pytest.mark.parametrize("raw", [FRAME, zstd.compress(TEXT[:11]) + zstd.compress(TEXT[11:])])
def test_a_part_in_zstd_is_inflated(method: int, raw: bytes) -> None:
    data = craft(Member("a", TEXT, method=method, raw=raw), Member("b", b"", method=method, raw=TWENTY_SEVEN))
    assert contents(data) == {"A.nuspec": NUSPEC, "a": TEXT, "b": b""}
    assert [entry.method for entry in walked(data)] == [8, method, method]


@pytest.mark.parametrize(
    "raw", [FRAME[:-1], b"x" * 50, FRAME + b"hidden", FRAME + FRAME[:9], TWENTY_EIGHT, deflate(TEXT)]
)
def test_damaged_zstd_data_or_too_large_a_window_is_refused(raw: bytes) -> None:
    assert reading_rule_of(craft(Member("a", TEXT, method=93, raw=raw)), "a") == "inflate"


def test_a_part_in_zstd_that_lies_about_its_size_or_checksum_is_refused() -> None:
    for lie, rule in (({"size": 549}, "size"), ({"size": 551}, "size"), ({"crc": 1}, "crc")):
        member = Member("a", TEXT, method=93, raw=FRAME, local=lie, central=lie)
        assert reading_rule_of(craft(member), "a") == rule


def test_a_zstd_bomb_is_stopped_at_the_size_it_says() -> None:
    bomb = zstd.compress(bytes(1 << 28))
    tracemalloc.start()
    try:
        assert reading_rule_of(craft(Member("a", TEXT, method=93, raw=bomb)), "a") == "size"
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_shrank_since_the_walk_is_refused() -> None:
    data = craft(Member("a", TEXT, method=0))
    entry = walked(data)[1]
    with pytest.raises(ArchiveError) as caught:
        b"".join(read_part(io.BytesIO(data[: entry.data_offset + 5]), entry))
    assert caught.value.rule == "truncated"


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1000, 1 << 20])
def test_pieces_of_any_size_give_the_same_bytes_and_are_no_larger(piece: int) -> None:
    content = random.Random(1).randbytes(500) + bytes(5000) + TEXT
    data = craft(Member("a", content), Member("b", content, method=0))
    for entry in walked(data)[1:]:
        pieces = list(read_part(io.BytesIO(data), entry, piece))
        assert b"".join(pieces) == content
        assert max(map(len, pieces)) <= piece


def test_two_parts_can_be_read_in_turns_from_one_file() -> None:
    data = craft(Member("a", TEXT), Member("b", TEXT[::-1], method=0))
    file = io.BytesIO(data)
    _, a, b = walk(file)
    pairs = list(itertools.zip_longest(read_part(file, a, 10), read_part(file, b, 10), fillvalue=b""))
    assert len(pairs) > 50
    assert b"".join(one for one, _ in pairs) == TEXT
    assert b"".join(other for _, other in pairs) == TEXT[::-1]


def peak_of(work: Any) -> int:
    """Most bytes of Python memory held at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_holds_only_pieces_in_memory() -> None:
    data = craft(Member("a", bytes(32 << 20)))
    entry = walked(data)[1]
    assert peak_of(lambda: sum(map(len, read_part(io.BytesIO(data), entry)))) < (2 << 20) + len(data)


# --- damage


def good_nupkg() -> bytes:
    streamed = Member("streamed.txt", TEXT, flags=8, local={"crc": 0, "size": 0, "compressed": 0})
    streamed.after = descriptor(streamed)
    return craft(
        Member("lib/", method=0),
        Member("lib/a%20b.dll", TEXT, made_by=0x0314, attributes=0o100755 << 16),
        Member("stored", b"stored bytes", method=0),
        streamed,
        zip64_member(),
        end64={},
    )


GOOD = good_nupkg()
GOOD_CONTENTS = contents(GOOD)


@pytest.mark.long
@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_damaged_package_is_the_same_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["set", "set", "set", "cut", "insert"]))
        if kind == "set":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 50))]
        else:
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        if not damaged:
            break
    # Only a refusal may come out of the walk and the reading: anything else fails the test.
    with contextlib.suppress(ArchiveError):
        assert contents(bytes(damaged), package=1 << 20) == GOOD_CONTENTS


def test_every_changed_byte_gives_the_same_contents_or_is_refused() -> None:
    refused = 0
    for at in range(len(GOOD)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(GOOD)
            damaged[at] ^= change
            try:
                assert contents(bytes(damaged), package=1 << 20) == GOOD_CONTENTS
            except ArchiveError:
                refused += 1
    assert refused > len(GOOD)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    rule_of(noise)
    rule_of(noise + craft(nuspec=False, between=noise))


# --- packing

Tree = dict[str, tuple[bytes, bool]]


def make_tree(folder: Path, tree: Tree, *, reverse: bool = False, mtime: int = 1_000_000_000) -> Path:
    for path, (content, executable) in sorted(tree.items(), reverse=reverse):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o755 if executable else 0o644)
        os.utime(file, (mtime, mtime))
    return folder


def packed(folder: Path, **more: Any) -> bytes:
    output = io.BytesIO()
    given = {"id": A, "version": ONE, "authors": "Ann", "description": "A thing"} | more
    pack(str(folder), output, **given)
    return output.getvalue()


def refusal_of(folder: Path, error: type[Exception] = UsageError, **more: Any) -> str:
    """The message; also proves that nothing was written."""
    output = io.BytesIO()
    given = {"id": A, "version": ONE, "authors": "Ann", "description": "A thing"} | more
    with pytest.raises(error) as caught:
        pack(str(folder), output, **given)
    assert output.getvalue() == b""
    return str(caught.value)


TREE: Tree = {
    "run.sh": (b"#!/bin/sh\n", True),
    "app.dll": (random.Random(1).randbytes(5000), False),
    "with space/é+%20.txt": (TEXT, False),
    "empty": (b"", False),
    "zeros": (bytes(300_000), False),
    "LICENSE": (TEXT, False),
    "b/c/d/e": (b"deep", False),
}


def test_the_same_tree_gives_the_same_bytes_whatever_times_and_order(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", TREE)
    other = make_tree(tmp_path / "other", TREE, reverse=True, mtime=1_500_000_000)
    assert packed(one) == packed(other)


def test_a_packed_tree_comes_out_as_it_went_in(tmp_path: Path) -> None:
    data = packed(make_tree(tmp_path, TREE), id=PackageId("Shop.Web"), version=NuGetVersion.parse("1.2.0-RC+5"))
    file = io.BytesIO(data)
    entries = walk(file)
    assert [entry.path for entry in entries[:3]] == ["[Content_Types].xml", "_rels/.rels", "Shop.Web.nuspec"]
    assert [entry.path for entry in entries[3:]] == sorted(TREE)
    assert {entry.path: (b"".join(read_part(file, entry)), entry.executable_bit) for entry in entries[3:]} == TREE
    nuspec = read_nuspec(file, entries)
    assert (str(nuspec.id), nuspec.version.full) == ("Shop.Web", "1.2.0-RC+5")
    assert nuspec.metadata == {"authors": "Ann", "description": "A thing"}
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def test_the_skeleton_is_the_canonical_one(tmp_path: Path) -> None:
    data = packed(make_tree(tmp_path, TREE))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        assert archive.comment == b""
    for info in infos:
        assert (info.flag_bits, info.extract_version, info.create_version, info.create_system) == (0, 20, 20, 3)
        assert (info.date_time, info.extra, info.comment) == ((1980, 1, 1, 0, 0, 0), b"", b"")
        assert info.external_attr in {0x81A40000, 0x81ED0000}
    spans = [(info.header_offset, 30 + len(info.filename.encode()) + info.compress_size) for info in infos]
    assert all(start + size == after for (start, size), (after, _) in itertools.pairwise(spans))
    names = {info.filename for info in infos}
    assert {"with%20space/%C3%A9%2B%2520.txt", "[Content_Types].xml", "_rels/.rels"} <= names
    assert all(name.isascii() for name in names)


def test_parts_are_deflated_by_zlib_at_level_6_unless_empty_or_too_well(tmp_path: Path) -> None:
    data = packed(make_tree(tmp_path, TREE))
    for entry in walked(data):
        raw = data[entry.data_offset :][: entry.compressed_size]
        content = b"".join(read_part(io.BytesIO(data), entry))
        assert entry.method == (0 if entry.path in {"empty", "zeros"} else 8)
        assert raw == (content if entry.method == 0 else deflate(content))


def test_a_nuspec_in_the_folder_is_kept_byte_for_byte(tmp_path: Path) -> None:
    make_tree(tmp_path, {"odd-name.nuspec": (NUSPEC, False), "x/other.nuspec": (b"", False)})
    found = contents(packed(tmp_path))
    assert list(found) == ["[Content_Types].xml", "_rels/.rels", "odd-name.nuspec", "x/other.nuspec"]
    assert found["odd-name.nuspec"] == NUSPEC
    assert b'"/odd-name.nuspec"' in found["_rels/.rels"]


def test_a_nuspec_that_says_something_else_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"A.nuspec": (NUSPEC, False)})
    assert "A 1.0.0, not B 1.0.0" in refusal_of(tmp_path, MetadataError, id=PackageId("B"))
    assert "not A 2.0.0" in refusal_of(tmp_path, MetadataError, version=NuGetVersion.parse("2.0"))
    assert packed(tmp_path, id=PackageId("a"), version=NuGetVersion.parse("1.0.0.0"))
    make_tree(tmp_path, {"A.nuspec": (b"<package/>", False)})
    refusal_of(tmp_path, MetadataError)
    make_tree(tmp_path, {"A.nuspec": (bytes(2 << 20), False)})
    refusal_of(tmp_path, MetadataError)


def test_two_nuspecs_are_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"A.nuspec": (NUSPEC, False), "B.NUSPEC": (NUSPEC, False)})
    assert "2 .nuspec files" in refusal_of(tmp_path)


@pytest.mark.parametrize("text", ["<&>\"']]>", "é\u2028.", "a\nb"])
def test_authors_and_description_may_hold_any_text(tmp_path: Path, text: str) -> None:
    file = io.BytesIO(packed(tmp_path, authors=text, description=text))
    assert read_nuspec(file, walk(file)).metadata == {"authors": text, "description": text}


@pytest.mark.parametrize("text", ["\0", "\x1b[31m", "\ud800", "x" * 70_000])
def test_a_description_that_no_nuspec_can_hold_is_refused(tmp_path: Path, text: str) -> None:
    refusal_of(tmp_path, MetadataError, description=text)


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    for name, make in {
        "link": lambda path: path.symlink_to("/etc/passwd"),
        "folder-link": lambda path: path.symlink_to(tmp_path),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "fifo": os.mkfifo,
    }.items():
        path = tmp_path / name / "x" / name
        path.parent.mkdir(parents=True)
        make(path)
        assert f"'x/{name}'" in refusal_of(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["CON", "nul.txt", "a:b", "a?", "a\\b", "x.", "x ", "new\nline", "a/aux.c", "\x1b[0m", "a" * 250 + "/CON"]
)
def test_a_name_that_no_package_can_have_is_refused(tmp_path: Path, name: str) -> None:
    make_tree(tmp_path, {name: (b"", False)})
    assert repr(name) in refusal_of(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no names that are not text")
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff")).touch()
    assert "not UTF-8" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    "name", ["[Content_Types].xml", "_rels/.rels", "_RELS/x", ".signature.p7s", "package/services/metadata/x", "_rels"]
)
def test_a_name_that_belongs_to_the_format_is_refused(tmp_path: Path, name: str) -> None:
    make_tree(tmp_path, {name: (b"", False)})
    assert "belongs to the package format" in refusal_of(tmp_path)


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a/x": (b"", False), "a/X": (b"", False)})
    if len(list((tmp_path / "a").iterdir())) == 1:
        pytest.skip("this file system has no such names")
    assert "differs only in case" in refusal_of(tmp_path)


def test_a_folder_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "deep", {"/".join("d" * 65): (b"", False)})
    assert "components" in refusal_of(tmp_path / "deep")
    assert packed(make_tree(tmp_path / "less", {"/".join("d" * 64): (b"", False)}))


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(4 << 30)  # no blocks are taken
    assert "more than" in refusal_of(tmp_path)


def test_a_file_that_grows_while_it_is_packed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, TREE)
    write = pack_module._write_zip
    grown = []

    def grow_and_write(sources: Any, output: BinaryIO) -> None:
        with (tmp_path / "app.dll").open("ab") as file:
            grown.append(file.write(b"more"))
        write(sources, output)

    monkeypatch.setattr(pack_module, "_write_zip", grow_and_write)
    with pytest.raises(UsageError, match="changed"):
        packed(tmp_path)
    assert grown == [4]


def test_a_link_that_takes_a_files_place_while_packing_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path / "in", TREE)
    secret = tmp_path / "secret"
    secret.write_bytes(TREE["app.dll"][0])
    write = pack_module._write_zip

    def swap_and_write(sources: Any, output: BinaryIO) -> None:
        (tmp_path / "in" / "app.dll").unlink()
        (tmp_path / "in" / "app.dll").symlink_to(secret)
        write(sources, output)

    monkeypatch.setattr(pack_module, "_write_zip", swap_and_write)
    with pytest.raises(OSError, match="symbolic links"):
        packed(tmp_path / "in")
    assert (tmp_path / "in" / "app.dll").is_symlink()


def test_packing_starts_where_the_output_stands(tmp_path: Path) -> None:
    output = io.BytesIO()
    output.write(b"before")
    pack(str(make_tree(tmp_path, TREE)), output, id=A, version=ONE, authors="Ann", description="A thing")
    assert output.getvalue() == b"before" + packed(tmp_path)


def test_packing_holds_only_pieces_in_memory(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"big": (random.Random(1).randbytes(24 << 20), False)})
    with (tmp_path / "out").open("w+b") as output:
        peak = peak_of(
            lambda: pack(str(tmp_path / "in"), output, id=A, version=ONE, authors="Ann", description="A thing")
        )
        assert {entry.path for entry in walk(output)} >= {"big"}
    assert peak < 4 << 20


@pytest.mark.long
def test_more_parts_than_16_bits_can_count_are_packed_as_zip64() -> None:
    sources = [pack_module._Source.made("A.nuspec", NUSPEC)]
    sources += [pack_module._Source.made(f"{number:x}", b"") for number in range(0xFFFF)]
    output = io.BytesIO()
    pack_module._write_zip(sources, output)
    assert len(walk(output)) == 0x10000
    with zipfile.ZipFile(output) as archive:
        assert len(archive.namelist()) == 0x10000


def test_the_content_types_name_every_extension_and_every_bare_part(tmp_path: Path) -> None:
    tree = dict.fromkeys(["a.DLL", "b.dll", "c.x y", "bare", "dir.d/bare&<", ".hidden", "é.é"], (b"x", False))
    tree.pop("dir.d/bare&<")
    tree["dir.d/bare&"] = (b"x", False)
    text = contents(packed(make_tree(tmp_path, tree)))["[Content_Types].xml"].decode()
    for extension in ("rels", "dll", "nuspec", "x%20y", "hidden", "%C3%A9"):
        assert text.count(f'Extension="{extension}"') == 1
    assert 'PartName="/bare"' in text
    assert 'PartName="/dir.d/bare%26"' in text


names = st.text("ab %+é#&'[]().~_-=;,@!^{}$`", min_size=1, max_size=6).filter(lambda name: name[-1] not in ". ")
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(paths, st.tuples(st.binary(max_size=300), st.booleans()), max_size=8))
def test_any_tree_survives_packing(tree: Tree) -> None:
    folders = {path[:at] for path in tree for at, mark in enumerate(path) if mark == "/"}
    tree = {path: value for path, value in tree.items() if path not in folders}
    with temporary() as one, temporary() as other:
        data = packed(make_tree(one, tree))
        assert data == packed(make_tree(other, tree, reverse=True, mtime=0))
    file = io.BytesIO(data)
    entries = walk(file)[3:]
    assert {e.path: (b"".join(read_part(file, e)), e.executable_bit) for e in entries} == tree
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
