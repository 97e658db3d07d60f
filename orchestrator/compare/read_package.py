"""Packages that are compared, out of files or the depot. Their tree streams lie in temporary files while they are open."""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from orchestrator.compare.diff import OpenedPackage, ZipPart
from orchestrator.depot.cut_nupkg import NupkgCutter, compressed_digest, digests_of, open_nupkg, read_directory
from orchestrator.depot.depot import open_depot
from relay.errors import ChunkInvalid, ChunkMissing, NotFoundError, StoreError
from relay.package.identity import PackageRef
from relay.package.manifest import ManifestBuilder
from relay.package.zip_reader import Entry
from relay.package.zip_records import CENTRAL, LOCAL
from relay.support.console import run

if TYPE_CHECKING:
    from relay.support.progress import Bar, Progress


class NamedPackage(NamedTuple):
    """A package as a person named it: a file, or one of the depot."""

    name: str
    path: str = ""
    ref: PackageRef | None = None


@contextmanager
def opened_packages(named: Sequence[NamedPackage], depot_location: str, bar: Bar) -> Iterator[list[OpenedPackage]]:
    """Open all of them. Blocking.

    Raises:
        NotFoundError: the depot does not list it, or lost its nupkg.
        ArchiveError, MetadataError: it is no package.
        UsageError, StoreError: a file cannot be read, or there is no room for temporary ones.
    """
    with ExitStack() as stack:
        packages = []
        for each in named:
            path = each.path
            if each.ref is not None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="waystation-compare-"))
                path = os.path.join(folder, "package.nupkg")
                run(_copy_out(depot_location, each.ref, path))
            spool = cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile(prefix="waystation-compare-")))
            packages.append(_read_package(path, each.name, spool, bar(f"reading {each.name}")))
        yield packages


async def _copy_out(location: str, ref: PackageRef, path: str) -> None:
    async with open_depot(location) as depot:
        pointer = depot.catalog.get(ref)
        try:
            with open(path, "xb") as file:  # noqa: ASYNC230 - nothing else runs in this loop
                async for piece in depot.store.blobs.read(pointer.nupkg_sha256):
                    file.write(piece)
        except (ChunkMissing, ChunkInvalid) as error:
            raise NotFoundError(
                f"the nupkg of {ref} is damaged or gone from the depot", hint="Add it again, or name the file itself"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error


def _read_package(path: str, name: str, spool: BinaryIO, progress: Progress) -> OpenedPackage:
    """Cut a nupkg as the depot would, and put its tree stream into `spool`."""
    with open_nupkg(path) as file:
        entries, nuspec = read_directory(file)
        ref = PackageRef(nuspec.id, nuspec.version)
        cutter = NupkgCutter(file, entries, ManifestBuilder(ref, digests_of(file), dict(nuspec.metadata)))
        done, whole = 0, sum(entry.size for entry in entries)
        while batch := cutter.next_batch():
            data = b"".join(chunk.data for chunk in batch)
            _write(spool, data)
            done += len(data)
            progress(done, whole)
        spool.flush()
        number, parts = spool.fileno(), tuple(_zip_parts(file, entries))
        # By its own offset each time: many threads read at once.
        return OpenedPackage(name, cutter.manifest(), parts, lambda offset, count: os.pread(number, count, offset))


def _write(spool: BinaryIO, data: bytes) -> None:
    try:
        spool.write(data)
    except OSError as error:
        raise StoreError(f"cannot write to {tempfile.gettempdir()}: {error.strerror}", hint="Set TMPDIR") from error


# --- what the zip says of each part


def _zip_parts(file: BinaryIO, entries: Sequence[Entry]) -> Iterator[ZipPart]:
    """In the file's order."""
    records = zip_records(file)
    for entry in entries:
        record = records.get(entry.data_offset)
        yield ZipPart(
            entry.path,
            entry.size,
            entry.compressed_size,
            compressed_digest(file, entry),
            record.date_time if record else (),
            _record_bytes(entry, record) if record else 0,
        )


def zip_records(file: BinaryIO) -> dict[int, zipfile.ZipInfo]:
    """The central records, by where the part's data begins. The walk has checked the file: they are read again by
    another reader for their times only, and there are none where that reader is more particular.
    """
    found = {}
    try:
        for record in zipfile.ZipFile(file).infolist():
            file.seek(record.header_offset + LOCAL.size - 4)
            name, extra = struct.unpack("<2H", file.read(4))
            found[record.header_offset + LOCAL.size + name + extra] = record
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return {}
    return found


def _record_bytes(entry: Entry, record: zipfile.ZipInfo) -> int:
    """Of the local and the central record."""
    central = CENTRAL.size + len(record.orig_filename.encode()) + len(record.extra) + len(record.comment)
    return entry.data_offset - record.header_offset + central
