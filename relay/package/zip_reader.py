"""The zip of a nupkg: walked defensively, and read part by part. `pack.py` makes one.

The walk refuses and never repairs. It reads the structure itself, because two readers that repair differently see two
packages: every byte of the file must belong to exactly one record, and what is said twice must be said alike.
Layouts are those of PKWARE's APPNOTE 6.3.10; what names may be stands in `part_names.py`.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple, NoReturn

from relay.errors import ArchiveError, MetadataError
from relay.package.nuspec import NUSPEC_MAX, Nuspec, parse_nuspec
from relay.package.part_names import NameLimits, check_collisions, laid_down, path_fault
from relay.package.zip_records import (
    CENTRAL,
    CENTRAL_MARK,
    DESCRIPTOR_FLAG,
    DESCRIPTOR_MARK,
    DOS_FOLDER,
    ENCRYPTED_FLAGS,
    END,
    END64,
    END64_MARK,
    END_MARK,
    EXTRA_MAX,
    KNOWN_FLAGS,
    LOCAL,
    LOCAL_MARK,
    LOCATOR,
    LOCATOR_MARK,
    MAX16,
    MAX32,
    METHOD_NAMES,
    METHODS,
    REPARSE_POINT,
    STORED,
    UNICODE_PATH_EXTRA,
    UNIX_HOSTS,
    ZIP64_EXTRA,
    ZSTD,
    Directory,
)
from relay.support.zstd import FrameFault, inflate_pieces

ZSTD_WINDOW_LOG: Final = 27
"""Window of a zstd part, as a power of two: 128 MiB, the most that encoders take unless they are told otherwise.

Level 22 asks for it into a stream, also for a small part. Memory is taken as the content comes, for one part at a time.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One part of a package, as the walk found and checked it.

    `path` is unescaped and relative, with '/'. Sizes are bytes. `data_offset` is where the part's (compressed) bytes
    start in the file. `executable_bit` is the owner's x bit where a Unix wrote it.
    """

    path: str
    size: int
    compressed_size: int
    crc32: int
    method: int
    data_offset: int
    executable_bit: bool


@dataclass(frozen=True, slots=True)
class WalkLimits(NameLimits):
    """What a walk puts up with. Real packages stay far below each of these."""

    parts: int = 250_000
    package: int = 4 << 30
    """Bytes of the file."""
    inflated: int = 4 << 30
    """Bytes of all parts inflated. How well they were compressed does not count: honest files can be all zeros."""
    directory: int = 64 << 20
    """Bytes of the central directory, which is held in memory."""


DEFAULT_LIMITS: Final = WalkLimits()


class _Central(NamedTuple):
    """One central record, its zip64 values in place."""

    raw_name: bytes
    name: str
    made_by: int
    flags: int
    method: int
    crc32: int
    compressed_size: int
    size: int
    attributes: int
    offset: int


def _refuse(rule: str, detail: str, member: str = "") -> NoReturn:
    raise ArchiveError(rule, detail, member=member)


def _demand(is_so: bool, rule: str, detail: str, member: str = "") -> None:  # noqa: FBT001 - it reads as a sentence
    if not is_so:
        _refuse(rule, detail, member)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        _refuse("truncated", f"the file ends inside a record at byte {offset}")
    return data


# --- the walk


def walk(file: BinaryIO, limits: WalkLimits = DEFAULT_LIMITS) -> tuple[Entry, ...]:
    """Check the whole structure of a nupkg without inflating it; memory is bounded by the central directory.

    Allowed as odd but honest, as real writers do it: data descriptors, also where one record tells of them and the other
    does not, zip64, extra fields, comments, any order of the central directory, entries for folders (which are left
    out), and zeros that fill the last block of a tape. What the parts hold is checked by `read_part`.

    Args:
        file: seekable; its position is moved.
        limits: see `WalkLimits`.

    Returns:
        The parts in the order of their bytes in the file.

    Raises:
        ArchiveError: `rule` is one of: size, end, disks, zip64, directory, count, truncated, gap, overlap, disagree,
            descriptor, encryption, flags, method, name, link, folder, duplicate, collision, nuspec.
    """
    file_size = file.seek(0, os.SEEK_END)
    _demand(file_size <= limits.package, "size", f"the file has {file_size} bytes, more than {limits.package}")
    directory = _find_directory(file, file_size)
    members = _read_directory(file, directory, limits)
    _check_sizes(members, limits)
    spans = _data_offsets(file, members, directory.offset)
    paths = [_path(member, limits) for member in members]
    check_collisions(paths)
    found = [_entry(*each) for each in zip(members, paths, spans, strict=True)]
    entries = tuple(entry for entry in found if not entry.path.endswith("/"))
    for folder in (entry for entry in found if entry.compressed_size and entry.path.endswith("/")):
        _check_folder(file, folder)
    root_nuspec(entries)
    return entries


def root_nuspec(entries: Iterable[Entry]) -> Entry:
    """The one nuspec at the root of the package, whatever its name.

    Raises:
        ArchiveError: rule nuspec, there is none or more than one.
    """
    found = [entry for entry in entries if is_root_nuspec(entry.path)]
    _demand(len(found) == 1, "nuspec", f"expected one .nuspec at the root, found {len(found)}")
    return found[0]


def read_nuspec(file: BinaryIO, entries: Iterable[Entry]) -> Nuspec:
    """Read and parse the root nuspec of a walked file.

    Raises:
        ArchiveError: none or several, or its bytes are damaged.
        MetadataError: too large, or not a nuspec.
    """
    entry = root_nuspec(entries)
    if entry.size > NUSPEC_MAX:
        raise MetadataError(f"the nuspec has {entry.size} bytes, more than {NUSPEC_MAX}")
    return parse_nuspec(b"".join(read_part(file, entry)))


def is_root_nuspec(path: str) -> bool:
    return "/" not in path and path.lower().endswith(".nuspec")


def _find_directory(file: BinaryIO, file_size: int) -> Directory:
    """The directory that the end record names, with nothing between it and the end.

    A comment is allowed; the end record is the last signature in the file, as readers that search backwards find it.
    Its comment must fill the rest, but for zeros. A second one further in front leaves a gap, and is refused for that.
    """
    tail_size = min(file_size, END.size + MAX16)
    tail = _read(file, file_size - tail_size, tail_size)
    at = tail.rfind(END_MARK)
    _demand(0 <= at <= len(tail) - END.size, "end", "not a zip file: no end record")
    _, disk, directory_disk, here, count, size, offset, comment = END.unpack_from(tail, at)
    comment_end = at + END.size + comment
    is_all = comment_end <= len(tail) and not any(tail[comment_end:])
    _demand(is_all, "end", "bytes after the end record, or a comment that holds another one")
    end = file_size - tail_size + at
    directory, disks = Directory(offset, size, count), {0}
    locator = LOCATOR.unpack(_read(file, end - LOCATOR.size, LOCATOR.size)) if end >= LOCATOR.size else (b"", 0, 0, 0)
    if locator[0] == LOCATOR_MARK:
        directory, end = _find_directory64(file, locator, directory, end - LOCATOR.size)
        disks = {0, MAX16}
    elif offset == MAX32:
        _refuse("gap", "the end record points to a zip64 one, and there is none")
    _demand({disk, directory_disk} <= disks and here == count, "disks", "an archive of several disks")
    ends_there = directory.offset + directory.size == end
    _demand(ends_there, "gap", "the central directory does not end where the end record begins")
    return directory


def _find_directory64(
    file: BinaryIO, locator: tuple[bytes, int, int, int], short: Directory, end: int
) -> tuple[Directory, int]:
    """The zip64 end record, which must lie right before its locator and say the same where the short one says it."""
    _, locator_disk, at, disks = locator
    _demand(not locator_disk and disks <= 1, "disks", "an archive of several disks")
    _demand(at + END64.size == end, "zip64", "the zip64 end record is not where its locator says")
    mark, length, _, _, disk, directory_disk, here, count, size, offset = END64.unpack(_read(file, at, END64.size))
    _demand((mark, length) == (END64_MARK, END64.size - 12), "zip64", "the zip64 end record is damaged")
    _demand(not disk and not directory_disk and here == count, "disks", "an archive of several disks")
    said = zip(short, (offset, size, count), (MAX32, MAX32, MAX16), strict=True)
    _demand(all(value in {real, sentinel} for value, real, sentinel in said), "zip64", "the two end records disagree")
    return Directory(offset, size, count), at


def _read_directory(file: BinaryIO, directory: Directory, limits: WalkLimits) -> list[_Central]:
    """All central records, sorted by where their local records lie."""
    _demand(directory.entries <= limits.parts, "count", f"{directory.entries} entries, more than {limits.parts}")
    _demand(
        directory.size <= limits.directory,
        "size",
        f"a central directory of {directory.size} bytes, more than {limits.directory}",
    )
    data = _read(file, directory.offset, directory.size)
    members: list[_Central] = []
    at = 0
    while at < len(data):
        _demand(len(members) < directory.entries, "count", "the central directory has more than the end record says")
        member, at = _read_central(data, at)
        members.append(member)
    told = f"the end record says {directory.entries} entries, the central directory has {len(members)}"
    _demand(len(members) == directory.entries, "count", told)
    return sorted(members, key=lambda member: member.offset)


def _read_central(data: bytes, at: int) -> tuple[_Central, int]:
    """The record at `at` and where the next one starts."""
    _demand(len(data) - at >= CENTRAL.size, "directory", "the central directory ends inside a record")
    fields = CENTRAL.unpack_from(data, at)
    mark, made_by, _, flags, method, _, _, crc, compressed, size, name_size, extra_size, comment_size = fields[:13]
    disk, _, attributes, offset = fields[13:]
    name_end = at + CENTRAL.size + name_size
    extra_end = name_end + extra_size
    end = extra_end + comment_size
    _demand(mark == CENTRAL_MARK and end <= len(data), "directory", "a damaged record in the central directory")
    raw_name = data[at + CENTRAL.size : name_end]
    name = _decode_name(raw_name)
    extra = _read_extra(data[name_end:extra_end], raw_name, name)
    size, compressed, offset, disk = _widen(
        extra, ((size, MAX32), (compressed, MAX32), (offset, MAX32), (disk, MAX16)), name
    )
    _demand(not disk, "disks", "an archive of several disks", name)
    _check_form(flags, method, size, compressed, name)
    return _Central(raw_name, name, made_by, flags, method, crc, compressed, size, attributes, offset), end


def _decode_name(raw: bytes) -> str:
    """As .NET's `ZipArchive` does without a given encoding: UTF-8 whatever the flag says, but strictly."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        _refuse("name", "a name that is not UTF-8", raw.decode("latin-1"))


def _read_extra(extra: bytes, raw_name: bytes, name: str) -> bytes:
    """The zip64 field's bytes, or none. Other fields are passed over, unless one gives the entry another name."""
    _demand(len(extra) <= EXTRA_MAX, "directory", f"extra fields of more than {EXTRA_MAX} bytes", name)
    found: dict[int, bytes] = {}
    at = 0
    while len(extra) - at >= 4:
        kind, size = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + size]
        at += 4 + size
        if len(field) != size or (kind in {ZIP64_EXTRA, UNICODE_PATH_EXTRA} and kind in found):
            _refuse("directory", "a damaged extra field, or one that stands twice", name)
        found[kind] = field
    # Some writers pad with fewer than four zero bytes.
    _demand(not any(extra[at:]), "directory", "a damaged extra field", name)
    other_name = found.get(UNICODE_PATH_EXTRA, bytes(5) + raw_name)[5:]
    _demand(other_name == raw_name, "name", "an extra field gives another name", name)
    return found.get(ZIP64_EXTRA, b"")


def _widen(zip64: bytes, fields: tuple[tuple[int, int], ...], name: str) -> list[int]:
    """Replace each value that is its sentinel by the one in the zip64 field.

    The field holds the values that need it, in this order. Some writers put all of them there: then those that were
    not needed must say the same.
    """
    widths = [8 if sentinel == MAX32 else 4 for _, sentinel in fields]
    values = [value for value, _ in fields]
    needed = [index for index, (value, sentinel) in enumerate(fields) if value == sentinel]
    present = needed
    if len(zip64) != sum(widths[index] for index in needed):
        present = next((list(range(n)) for n in range(len(fields) + 1) if sum(widths[:n]) == len(zip64)), [])
    if not set(needed) <= set(present) or (zip64 and not present):
        _refuse("zip64", "a zip64 field that does not hold what is needed", name)
    at = 0
    for index in present:
        value = int.from_bytes(zip64[at : at + widths[index]], "little")
        at += widths[index]
        if index not in needed and value != values[index]:
            _refuse("zip64", "a zip64 field that contradicts its record", name)
        values[index] = value
    return values


def _check_form(flags: int, method: int, size: int, compressed: int, name: str) -> None:
    _demand(not flags & ENCRYPTED_FLAGS, "encryption", "an encrypted entry", name)
    if method not in METHODS:
        said = METHOD_NAMES.get(method, "an unknown method")
        _refuse("method", f"compressed by {said} (method {method}): only stored, deflate and zstd are read", name)
    _demand(not flags & ~KNOWN_FLAGS, "flags", f"unknown flags {flags:#06x}", name)
    _demand(method != STORED or size == compressed, "disagree", "a stored entry with two sizes", name)


def _check_sizes(members: list[_Central], limits: WalkLimits) -> None:
    """The sizes are only said here, but `read_part` holds every part to them."""
    total = sum(member.size for member in members)
    _demand(total <= limits.inflated, "size", f"inflates to {total} bytes, more than {limits.inflated}")


def _data_offsets(file: BinaryIO, members: list[_Central], directory_offset: int) -> list[int]:
    """Where each member's bytes start, after checking that local records follow one another from 0 without a gap."""
    starts = [member.offset for member in members] + [directory_offset]
    _demand(starts[0] == 0, "gap", "bytes before the first record")
    if starts != sorted(starts):
        _refuse("overlap", "an entry behind the central directory", members[-1].name)
    return [_check_local(file, member, end) for member, end in zip(members, starts[1:], strict=True)]


def _check_local(file: BinaryIO, member: _Central, end: int) -> int:
    """Compare the local record with the central one, and its span with `end`; answer where the data starts."""
    _demand(member.offset + LOCAL.size <= end, "overlap", "two entries share bytes", member.name)
    fields = LOCAL.unpack(_read(file, member.offset, LOCAL.size))
    mark, _, flags, method, _, _, crc, compressed, size, name_size, extra_size = fields
    _demand(mark == LOCAL_MARK, "disagree", "no local record where the central directory says", member.name)
    data_offset: int = member.offset + LOCAL.size + name_size + extra_size
    data_end = data_offset + member.compressed_size
    _demand(data_end <= end, "overlap", "two entries share bytes", member.name)
    rest = _read(file, member.offset + LOCAL.size, name_size + extra_size)
    is_same = (rest[:name_size], method) == (member.raw_name, member.method)
    is_same = is_same and not (flags ^ member.flags) & ~DESCRIPTOR_FLAG
    _demand(is_same, "disagree", "the local record has another name, method or flags", member.name)
    zip64 = _read_extra(rest[name_size:], member.raw_name, member.name)
    streamed = bool(flags & DESCRIPTOR_FLAG)
    if streamed and zip64[:16] == bytes(16) and {size, compressed} <= {0, MAX32}:
        size = compressed = 0
    else:
        size, compressed = _widen(zip64, ((size, MAX32), (compressed, MAX32)), member.name)
    said, expected = (crc, compressed, size), (member.crc32, member.compressed_size, member.size)
    if any(one != real and not (streamed and one == 0) for one, real in zip(said, expected, strict=True)):
        _refuse("disagree", "the local record has another checksum or size", member.name)
    # Some writers tell of a descriptor and write none where the record says all, or write one and do not tell.
    if data_end != end or said != expected:
        found = _read(file, data_end, min(end - data_end, 25))
        _check_descriptor(found, expected, "descriptor" if streamed else "gap", member.name)
    return data_offset


def _check_descriptor(found: bytes, expected: tuple[int, int, int], rule: str, name: str) -> None:
    """Sizes of 32 or 64 bits, with the signature or without: the forms differ in length. Some writers turn it round."""
    short = struct.pack("<3L", *expected) if max(expected) <= MAX32 else b""
    long = struct.pack("<L2Q", *expected)
    marks = (b"", DESCRIPTOR_MARK, DESCRIPTOR_MARK[::-1])
    forms = {mark + plain for plain in (short, long) if plain for mark in marks}
    _demand(found in forms, rule, "what follows the data is not its descriptor", name)


def _entry(member: _Central, path: str, data_offset: int) -> Entry:
    unix = member.made_by >> 8 in UNIX_HOSTS
    executable = unix and bool(member.attributes >> 16 & stat.S_IXUSR)
    return Entry(
        path, member.size, member.compressed_size, member.crc32, member.method, data_offset, executable_bit=executable
    )


# --- kinds

_FOLDER_MAX: Final = 64
"""Bytes to which nothing may be compressed; writers need 2."""


def _path(member: _Central, limits: WalkLimits) -> str:
    """Where the part is laid down, checked; a folder's ends with '/'."""
    path = laid_down(member.name)
    if fault := path_fault(path.removesuffix("/"), limits):
        _refuse("name", fault, member.name)
    _check_kind(member, folder=path.endswith("/"))
    return path


def _check_kind(member: _Central, *, folder: bool) -> None:
    """Files and empty folder entries only. The Unix type is looked at whoever wrote it: some readers trust it so."""
    kind = stat.S_IFMT(member.attributes >> 16)
    is_plain = kind in {0, stat.S_IFREG, stat.S_IFDIR} and not member.attributes & REPARSE_POINT
    _demand(is_plain, "link", "a link, a device or another special file", member.name)
    marked = kind == stat.S_IFDIR or bool(member.attributes & DOS_FOLDER)
    if folder and (member.size or member.compressed_size > _FOLDER_MAX or kind == stat.S_IFREG):
        _refuse("folder", "a folder that carries data or is marked as a file", member.name)
    _demand(folder or not marked, "folder", "a file that is marked as a folder", member.name)


def _check_folder(file: BinaryIO, entry: Entry) -> None:
    """Some writers deflate a folder, too: its bytes must be the end of nothing."""
    for _ in read_part(file, entry):
        pass


# --- reading


def read_part(file: BinaryIO, entry: Entry, piece: int = 256 << 10) -> Iterator[bytes]:
    """Inflate one part of a walked file, holding at most some `piece` bytes of it in memory.

    Bytes are handed out before the last check is made: on an error the caller forgets what it got. Several parts may
    be read in turn from one file handle, but not from several threads.

    Raises:
        ArchiveError: `rule` is truncated, inflate (damaged deflate or zstd data), size (more or fewer bytes than said),
            trailing (more compressed bytes than the data needs), or crc.
    """
    size = crc = 0
    inflated = _inflater(entry)(file, entry, piece)
    for data in inflated:
        size += len(data)
        _demand(size <= entry.size, "size", f"holds more than the {entry.size} bytes it says", entry.path)
        crc = zlib.crc32(data, crc)
        yield data
    _demand(size == entry.size, "size", f"holds {size} bytes and says {entry.size}", entry.path)
    _demand(crc == entry.crc32, "crc", "the bytes do not have the checksum they say", entry.path)


def _inflater(entry: Entry) -> Callable[[BinaryIO, Entry, int], Iterator[bytes]]:
    """Some writers name a method for an empty part, and give it no bytes."""
    if entry.method == STORED or not entry.compressed_size:
        return _raw
    return _inflate_zstd if entry.method in ZSTD else _inflate


def _raw(file: BinaryIO, entry: Entry, piece: int) -> Iterator[bytes]:
    at, end = entry.data_offset, entry.data_offset + entry.compressed_size
    while at < end:
        data = _read(file, at, min(piece, end - at))
        at += len(data)
        yield data


def _inflate(file: BinaryIO, entry: Entry, piece: int) -> Iterator[bytes]:
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    for data in _raw(file, entry, piece):
        _demand(not engine.eof, "trailing", "bytes after the end of the deflate data", entry.path)
        waiting, output = data, b"more"
        # A full piece of output may leave more inside of zlib, also when it has taken all of its input.
        while not engine.eof and (waiting or len(output) == piece):
            try:
                output = engine.decompress(waiting, piece)
            except zlib.error:
                _refuse("inflate", "damaged deflate data", entry.path)
            waiting = engine.unconsumed_tail
            if output:
                yield output
        _demand(not engine.unused_data, "trailing", "bytes after the end of the deflate data", entry.path)
    _demand(engine.eof, "inflate", "the deflate data has no end", entry.path)


def _inflate_zstd(file: BinaryIO, entry: Entry, piece: int) -> Iterator[bytes]:
    try:
        yield from inflate_pieces(_raw(file, entry, piece), piece, window_log=ZSTD_WINDOW_LOG)
    except FrameFault as fault:
        _refuse("inflate", f"zstd data {fault}", entry.path)
