"""The zip of a nupkg: walked defensively, and read part by part. `pack.py` makes one.

The walk refuses and never repairs. It reads the structure itself, because two readers that repair differently see two
packages: every byte of the file must belong to exactly one record, and what is said twice must be said alike.
Layouts are those of PKWARE's APPNOTE 6.3.10; part names are escaped and unescaped as NuGet does
(`Uri.EscapeDataString` per segment in `PackageBuilder`, `Uri.UnescapeDataString` in `PackageArchiveReader`).
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple, NoReturn
from urllib.parse import unquote

from relay.errors import ArchiveError, MetadataError
from relay.package.nuspec import NUSPEC_MAX, Nuspec, parse_nuspec
from relay.package.zip_records import (
    CENTRAL,
    CENTRAL_MARK,
    DEFLATED,
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
    REPARSE_POINT,
    STORED,
    UNICODE_PATH_EXTRA,
    UNIX_HOSTS,
    ZIP64_EXTRA,
    Directory,
)


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
class WalkLimits:
    """What a walk puts up with. Real packages stay far below each of these."""

    ratio_part: int = 200
    """Inflated bytes per compressed byte of one part."""
    ratio_total: int = 100
    """The same over all parts together."""
    ratio_floor: int = 64 << 10
    """Bytes. What inflates to less does no harm, however well it was compressed."""
    parts: int = 100_000
    package: int = 4 << 30
    """Bytes, of the file and of all parts inflated."""
    directory: int = 64 << 20
    """Bytes of the central directory, which is held in memory."""
    path_bytes: int = 1024
    component: int = 255
    """Bytes (UTF-8) of one component of a path: what Linux file systems hold."""
    depth: int = 64
    """Components of a path."""


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

    Allowed as odd but honest: data descriptors, zip64, extra fields, comments, any order of the central directory, and
    entries for folders (which are left out). What the parts hold is checked by `read_part`.

    Args:
        file: seekable; its position is moved.
        limits: see `WalkLimits`.

    Returns:
        The parts in the order of their bytes in the file.

    Raises:
        ArchiveError: `rule` is one of: size, end, disks, zip64, directory, count, truncated, gap, overlap, disagree,
            descriptor, encryption, flags, method, ratio, name, link, folder, duplicate, collision, nuspec.
    """
    file_size = file.seek(0, os.SEEK_END)
    _demand(file_size <= limits.package, "size", f"the file has {file_size} bytes, more than {limits.package}")
    directory = _find_directory(file, file_size)
    members = _read_directory(file, directory, limits)
    _check_sizes(members, limits)
    spans = _data_offsets(file, members, directory.offset)
    paths = [_path(member, limits) for member in members]
    check_collisions(paths)
    entries = tuple(
        _entry(member, path, offset)
        for member, path, offset in zip(members, paths, spans, strict=True)
        if not path.endswith("/")
    )
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

    A comment is allowed; the end record is the last signature in the file, as readers that search backwards find it,
    and its comment must fill the rest exactly. A second one further in front leaves a gap, and is refused for that.
    """
    tail_size = min(file_size, END.size + MAX16)
    tail = _read(file, file_size - tail_size, tail_size)
    at = tail.rfind(END_MARK)
    _demand(0 <= at <= len(tail) - END.size, "end", "not a zip file: no end record")
    _, disk, directory_disk, here, count, size, offset, comment = END.unpack_from(tail, at)
    _demand(
        at + END.size + comment == len(tail), "end", "bytes after the end record, or a comment that holds another one"
    )
    end = file_size - tail_size + at
    directory = Directory(offset, size, count)
    if end >= LOCATOR.size:
        locator = LOCATOR.unpack(_read(file, end - LOCATOR.size, LOCATOR.size))
        if locator[0] == LOCATOR_MARK:
            directory, end = _find_directory64(file, locator, directory, end - LOCATOR.size)
    _demand(not disk and not directory_disk and here == count, "disks", "an archive of several disks")
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
    _demand(not flags & ~KNOWN_FLAGS, "flags", f"unknown flags {flags:#06x}", name)
    _demand(method in {STORED, DEFLATED}, "method", f"compression method {method} is neither stored nor deflate", name)
    _demand(method == DEFLATED or size == compressed, "disagree", "a stored entry with two sizes", name)


def _check_sizes(members: list[_Central], limits: WalkLimits) -> None:
    """The sizes are only said here, but `read_part` holds every part to them."""
    total = sum(member.size for member in members)
    _demand(total <= limits.package, "size", f"inflates to {total} bytes, more than {limits.package}")
    for member in members:
        if _is_bomb(member.size, member.compressed_size, limits.ratio_part, limits):
            _refuse("ratio", f"inflates to more than {limits.ratio_part} times its bytes", member.name)
    is_bomb = _is_bomb(total, sum(member.compressed_size for member in members), limits.ratio_total, limits)
    _demand(not is_bomb, "ratio", f"all parts inflate to more than {limits.ratio_total} times their bytes")


def _is_bomb(size: int, compressed: int, ratio: int, limits: WalkLimits) -> bool:
    return size > limits.ratio_floor and size > ratio * compressed


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
    _demand(
        (rest[:name_size], flags, method) == (member.raw_name, member.flags, member.method),
        "disagree",
        "the local record has another name, method or flags",
        member.name,
    )
    zip64 = _read_extra(rest[name_size:], member.raw_name, member.name)
    streamed = bool(flags & DESCRIPTOR_FLAG)
    if streamed and zip64[:16] == bytes(16) and {size, compressed} <= {0, MAX32}:
        size = compressed = 0
    else:
        size, compressed = _widen(zip64, ((size, MAX32), (compressed, MAX32)), member.name)
    expected = (member.crc32, member.compressed_size, member.size)
    for said, real in zip((crc, compressed, size), expected, strict=True):
        if said != real and not (streamed and said == 0):
            _refuse("disagree", "the local record has another checksum or size", member.name)
    if streamed:
        _check_descriptor(_read(file, data_end, min(end - data_end, 25)), expected, member.name)
    elif data_end != end:
        _refuse("gap", "bytes between two records", member.name)
    return data_offset


def _check_descriptor(found: bytes, expected: tuple[int, int, int], name: str) -> None:
    """Sizes of 32 or 64 bits, with the signature or without: the four forms differ in length."""
    short = struct.pack("<3L", *expected) if max(expected) <= MAX32 else b""
    long = struct.pack("<L2Q", *expected)
    forms = {form for plain in (short, long) if plain for form in (plain, DESCRIPTOR_MARK + plain)}
    _demand(found in forms, "descriptor", "what follows the data is not its descriptor", name)


def _entry(member: _Central, path: str, data_offset: int) -> Entry:
    unix = member.made_by >> 8 in UNIX_HOSTS
    executable = unix and bool(member.attributes >> 16 & stat.S_IXUSR)
    return Entry(
        path, member.size, member.compressed_size, member.crc32, member.method, data_offset, executable_bit=executable
    )


# --- names

_DEVICE: Final = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)
_FORBIDDEN: Final = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\\]')
"""Control characters, and what Windows keeps for itself: packages install there too."""


def _path(member: _Central, limits: WalkLimits) -> str:
    """The unescaped path, checked; a folder's ends with '/'."""
    try:
        path = unquote(member.name, errors="strict")
    except UnicodeDecodeError:
        _refuse("name", "an escaped name that is not UTF-8", member.name)
    folder = path.endswith("/")
    if fault := path_fault(path.removesuffix("/"), limits):
        _refuse("name", fault, member.name)
    _check_kind(member, folder=folder)
    return path


def check_paths(paths: list[str], limits: WalkLimits = DEFAULT_LIMITS) -> None:
    """What the walk demands of the parts' paths, for a list that came another way (a manifest).

    Raises:
        ArchiveError: rules name, duplicate or collision.
    """
    for path in paths:
        if fault := path_fault(path, limits):
            _refuse("name", fault, path)
    check_collisions(paths)


def path_fault(path: str, limits: WalkLimits) -> str:
    """Why this relative path with '/' cannot be a part's, or ''."""
    if not path:
        return "an empty name"
    components = path.split("/")
    if len(path.encode("utf-8", "surrogatepass")) > limits.path_bytes:
        return f"a path of more than {limits.path_bytes} bytes"
    if len(components) > limits.depth:
        return f"a path of more than {limits.depth} components"
    return next((fault for component in components if (fault := _component_fault(component, limits))), "")


def _component_fault(component: str, limits: WalkLimits) -> str:
    if component in {"", ".", ".."}:
        return "a path that is absolute, or has '.', '..' or nothing between two '/'"
    if _FORBIDDEN.search(component):
        return 'a control character, a backslash or one of <>:"|?*'
    if component[-1] in ". ":
        return "a name that ends in a dot or a space, which Windows would drop"
    if _DEVICE.fullmatch(component):
        return "the name of a Windows device"
    try:
        size = len(component.encode())
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    return f"a name of more than {limits.component} bytes" if size > limits.component else ""


def _check_kind(member: _Central, *, folder: bool) -> None:
    """Files and empty folder entries only. The Unix type is looked at whoever wrote it: some readers trust it so."""
    kind = stat.S_IFMT(member.attributes >> 16)
    is_plain = kind in {0, stat.S_IFREG, stat.S_IFDIR} and not member.attributes & REPARSE_POINT
    _demand(is_plain, "link", "a link, a device or another special file", member.name)
    marked = kind == stat.S_IFDIR or bool(member.attributes & DOS_FOLDER)
    if folder and (member.size or member.compressed_size or kind == stat.S_IFREG):
        _refuse("folder", "a folder that carries data or is marked as a file", member.name)
    _demand(folder or not marked, "folder", "a file that is marked as a folder", member.name)


def check_collisions(paths: list[str]) -> None:
    """No two entries may be one file where case does not count, and no file may be a folder of another's path."""
    files: dict[str, str] = {}
    for path in paths:
        key = path.casefold()
        if key in files:
            rule = "duplicate" if files[key] == path else "collision"
            _refuse(rule, f"stands for the same file as {files[key][:100]!r}", path)
        files[key] = path
    for path in paths:
        if fault := _folder_collision(path.casefold(), files):
            _refuse("collision", f"needs a folder where there is the file {fault[:100]!r}", path)


def _folder_collision(key: str, files: dict[str, str]) -> str:
    folder = key.removesuffix("/") if key.endswith("/") else key.rpartition("/")[0]
    while folder:
        if folder in files:
            return files[folder]
        folder = folder.rpartition("/")[0]
    return ""


# --- reading


def read_part(file: BinaryIO, entry: Entry, piece: int = 256 << 10) -> Iterator[bytes]:
    """Inflate one part of a walked file, holding at most some `piece` bytes of it in memory.

    Bytes are handed out before the last check is made: on an error the caller forgets what it got. Several parts may
    be read in turn from one file handle, but not from several threads.

    Raises:
        ArchiveError: `rule` is truncated, inflate (damaged deflate data), size (more or fewer bytes than said),
            trailing (more compressed bytes than the data needs), or crc.
    """
    inflated = _raw(file, entry, piece) if entry.method == STORED else _inflate(file, entry, piece)
    size = crc = 0
    for data in inflated:
        size += len(data)
        _demand(size <= entry.size, "size", f"holds more than the {entry.size} bytes it says", entry.path)
        crc = zlib.crc32(data, crc)
        yield data
    _demand(size == entry.size, "size", f"holds {size} bytes and says {entry.size}", entry.path)
    _demand(crc == entry.crc32, "crc", "the bytes do not have the checksum they say", entry.path)


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
