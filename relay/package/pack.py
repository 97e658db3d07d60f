"""Make a nupkg of a folder: the same files give the same bytes, whenever and wherever.

The skeleton is the canonical one that .NET writes (no data descriptors, extra fields or comments, one fixed time), so
that a relay can make the identical file again from its parts. Part names are escaped as NuGet does
(`Uri.EscapeDataString` per segment, in `PackageBuilder`).
"""

from __future__ import annotations

import html
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final, NamedTuple, cast
from urllib.parse import quote

from relay.errors import ArchiveError, MetadataError, UsageError
from relay.package.identity import NuGetVersion, PackageId
from relay.package.nuspec import NUSPEC_MAX, parse_nuspec
from relay.package.part_names import check_collisions, path_fault
from relay.package.recipe import CONTENT_TYPES, canonical_name
from relay.package.zip_reader import DEFAULT_LIMITS, WalkLimits, is_root_nuspec
from relay.package.zip_records import (
    CENTRAL,
    CENTRAL_MARK,
    DEFLATED,
    END,
    END64,
    END64_MARK,
    END_MARK,
    LOCAL,
    LOCAL_MARK,
    LOCATOR,
    LOCATOR_MARK,
    MAX16,
    MAX32,
    REPARSE_POINT,
    STORED,
    VERSION_NEEDED,
    Directory,
)
from relay.support.durable import take_after

_COPY: Final = 256 << 10
_DOS_DATE: Final = 1 << 5 | 1
"""1980-01-01, the first day a zip knows."""
_MADE_BY_UNIX: Final = 3 << 8 | 20
_CONTAINER: Final = re.compile(
    r"\[content_types\]\.xml|\.signature\.p7s|(_rels|package/services/metadata)(/.*)?", re.IGNORECASE | re.DOTALL
)
_INFLATES_MOST: Final = 100
"""Bytes that a deflated byte may stand for: other readers, and earlier versions of this one, refuse more as a bomb."""


class _Source(NamedTuple):
    """A part to be: bytes at hand, or a file of `size` bytes."""

    path: str
    size: int
    content: bytes | str
    executable: bool = False

    @classmethod
    def made(cls, path: str, content: bytes) -> _Source:
        return cls(path, len(content), content)


def pack(
    folder: str, output: BinaryIO, *, id: PackageId, version: NuGetVersion, authors: str, description: str
) -> None:
    """Make a nupkg of all files below `folder`: the same files and zlib give the same bytes, whatever their times.

    A nuspec at the folder's root is used as it is and must agree with `id` and `version`; else one is made. Empty
    folders are left out, as in every nupkg. A part that deflates extremely well is stored instead.

    Args:
        folder: read without following links.
        output: seekable, written from its position on. Nothing is written if the folder is refused; on an error while
            copying (a file changes, the disk is full) the caller throws away what was written.
        id: the package's id.
        version: its version.
        authors: for a made nuspec.
        description: for a made nuspec.

    Raises:
        UsageError: a link, a special file, a name that a package cannot have, too much, or a file that changed.
        MetadataError: the nuspec is invalid or says another id or version.
        OSError: a file or folder cannot be read, or `output` cannot be written.
    """
    files = sorted(_scan(folder, ""), key=lambda source: source.path)
    nuspec = _pack_nuspec(files, id, version, authors, description)
    parts = [nuspec, *(source for source in files if source.path != nuspec.path)]
    _check_names(parts, DEFAULT_LIMITS)
    skeleton = [
        _Source.made(CONTENT_TYPES, _content_types(source.path for source in parts)),
        _Source.made("_rels/.rels", _relationships(nuspec.path)),
    ]
    _check_amount(skeleton + parts, DEFAULT_LIMITS)
    _write_zip(skeleton + parts, output)


def pack_file(folder: str, path: str, *, id: PackageId, version: NuGetVersion, authors: str, description: str) -> None:
    """As `pack`, into the file `path`: whole or not at all, in place of one that stands there. Raises as `pack`."""
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".pack-", delete=False) as temporary:
        try:
            output = cast("BinaryIO", temporary)
            pack(folder, output, id=id, version=version, authors=authors, description=description)
            if not take_after(temporary.fileno(), path):
                os.fchmod(temporary.fileno(), 0o644)
            os.rename(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise


def _scan(folder: str, prefix: str) -> Iterator[_Source]:
    if prefix.count("/") >= DEFAULT_LIMITS.depth:
        raise UsageError(f"cannot pack {prefix!r}: a path of more than {DEFAULT_LIMITS.depth} components")
    with os.scandir(folder) as children:
        for child in children:
            path = prefix + child.name
            status = child.stat(follow_symlinks=False)
            junction = getattr(status, "st_file_attributes", 0) & REPARSE_POINT
            if stat.S_ISDIR(status.st_mode) and not junction:
                yield from _scan(child.path, f"{path}/")
            elif stat.S_ISREG(status.st_mode) and not junction:
                yield _Source(path, status.st_size, child.path, bool(status.st_mode & stat.S_IXUSR))
            else:
                raise UsageError(f"cannot pack {path!r}: it is a link or a special file")


def _check_names(parts: list[_Source], limits: WalkLimits) -> None:
    """What a walk would refuse later, in the words of somebody who can rename a file."""
    for part in parts:
        if fault := path_fault(part.path, limits):
            raise UsageError(f"cannot pack {part.path!r}: {fault}")
        if _CONTAINER.fullmatch(part.path):
            raise UsageError(f"cannot pack {part.path!r}: the name belongs to the package format")
    try:
        check_collisions([part.path for part in parts])
    except ArchiveError as error:
        raise UsageError(
            f"cannot pack {error.member!r}: another name differs only in case or form, or is a folder"
        ) from error


def _check_amount(sources: list[_Source], limits: WalkLimits) -> None:
    """Counts what deflate and the records may add at most, so that no part and no offset can need zip64."""
    if len(sources) > limits.parts:
        raise UsageError(f"cannot pack {len(sources)} parts: a package has at most {limits.parts}")
    most = sum(source.size + (source.size >> 10) + 256 + 6 * len(source.path.encode()) for source in sources)
    if most > min(limits.package, MAX32):
        raise UsageError(f"cannot pack: the package might have {most} bytes, more than {limits.package}")


def _pack_nuspec(files: list[_Source], id: PackageId, version: NuGetVersion, authors: str, description: str) -> _Source:
    own = [source for source in files if is_root_nuspec(source.path)]
    if len(own) > 1:
        raise UsageError(f"cannot pack: {len(own)} .nuspec files at the root of the folder")
    if not own:
        made = _made_nuspec(id, version, authors, description)
        for fault in parse_nuspec(made).left_out:
            raise MetadataError(f"the nuspec that would be made: {fault}")
        return _Source.made(f"{id}.nuspec", made)
    with open(own[0].content, "rb") as file:
        data = file.read(NUSPEC_MAX + 1)
    found = parse_nuspec(data)
    if (found.id, found.version) != (id, version):
        raise MetadataError(f"{own[0].path} says {found.id} {found.version}, not {id} {version}")
    return _Source.made(own[0].path, data)


def _made_nuspec(id: PackageId, version: NuGetVersion, authors: str, description: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<package xmlns="http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd">\n'
        "  <metadata>\n"
        f"    <id>{id}</id>\n"
        f"    <version>{version.full}</version>\n"
        f"    <authors>{html.escape(authors)}</authors>\n"
        f"    <description>{html.escape(description)}</description>\n"
        "  </metadata>\n"
        "</package>\n"
    ).encode("utf-8", "surrogatepass")


def _content_types(paths: Iterable[str]) -> bytes:
    """The list that OPC asks for: every extension, and every part without one, is just bytes."""
    extensions, bare = set(), []
    for path in paths:
        _, dot, extension = path.rpartition("/")[2].rpartition(".")
        if dot and extension:
            extensions.add(quote(extension.lower(), safe=""))
        else:
            bare.append(canonical_name(path).decode())
    lines = [
        '<?xml version="1.0" encoding="utf-8"?>',
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">',
        '  <Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml" />',
        *(
            f'  <Default Extension="{extension}" ContentType="application/octet" />'
            for extension in sorted(extensions - {"rels"})
        ),
        *(f'  <Override PartName="/{name}" ContentType="application/octet" />' for name in bare),
        "</Types>",
    ]
    return "\n".join(lines).encode()


def _relationships(nuspec_path: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">\n'
        '  <Relationship Type="http://schemas.microsoft.com/packaging/2010/07/manifest" '
        f'Target="/{canonical_name(nuspec_path).decode()}" Id="R0" />\n'
        "</Relationships>"
    ).encode()


def _write_zip(sources: list[_Source], output: BinaryIO) -> None:
    """The canonical skeleton: local records in order, the same in the central directory, nothing else."""
    base = output.tell()
    directory = bytearray()
    for source in sources:
        offset = output.tell() - base
        name = canonical_name(source.path)
        form = _write_part(source, name, output)
        mode = stat.S_IFREG | (0o755 if source.executable else 0o644)
        directory += CENTRAL.pack(CENTRAL_MARK, _MADE_BY_UNIX, *form, len(name), 0, 0, 0, 0, mode << 16, offset)
        directory += name
    offset = output.tell() - base
    output.write(directory)
    _write_end(Directory(offset, len(directory), len(sources)), output)


_Form = tuple[int, int, int, int, int, int, int, int]
"""What local and central record share: version needed, flags, method, time, date, CRC-32, compressed size, size."""


def _write_part(source: _Source, name: bytes, output: BinaryIO) -> _Form:
    """Local record and data. The record is written last, into the place left for it, as the sizes are known then."""
    header = output.tell()
    data = header + LOCAL.size + len(name)
    for method in (DEFLATED, STORED) if source.size else (STORED,):
        output.seek(data)
        size, crc = _write_data(source, method, output)
        compressed = output.tell() - data
        if size <= _INFLATES_MOST * compressed:
            break
    form = (VERSION_NEEDED, 0, method, 0, _DOS_DATE, crc, compressed, size)
    end = output.tell()
    output.seek(header)
    output.write(LOCAL.pack(LOCAL_MARK, *form, len(name), 0) + name)
    output.seek(end)
    return form


def _write_data(source: _Source, method: int, output: BinaryIO) -> tuple[int, int]:
    """Size and CRC-32 of what was read.

    Raises:
        UsageError: a file has another size than when the folder was read.
    """
    engine = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 8)
    encode, finish = (engine.compress, engine.flush) if method == DEFLATED else (bytes, bytes)
    size = crc = 0
    for piece in _pieces(source):
        size += len(piece)
        crc = zlib.crc32(piece, crc)
        output.write(encode(piece))
        if size > source.size:
            break
    if size != source.size:
        raise UsageError(f"cannot pack {source.path!r}: it changed while it was read")
    output.write(finish())
    return size, crc


def _pieces(source: _Source) -> Iterator[bytes]:
    if isinstance(source.content, bytes):
        yield source.content
        return
    with open(source.content, "rb", opener=_open_plain) as file:
        while piece := file.read(_COPY):
            yield piece


def _open_plain(path: str, flags: int) -> int:
    """Without following a link that took the file's place since it was seen."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _write_end(directory: Directory, output: BinaryIO) -> None:
    """The end record, with the zip64 one before it where the count of parts needs it."""
    offset, size, count = directory
    if count >= MAX16:
        at = offset + size
        output.write(END64.pack(END64_MARK, END64.size - 12, 45, 45, 0, 0, count, count, size, offset))
        output.write(LOCATOR.pack(LOCATOR_MARK, 0, at, 1))
        count = MAX16
    output.write(END.pack(END_MARK, 0, 0, count, count, size, offset, 0))
