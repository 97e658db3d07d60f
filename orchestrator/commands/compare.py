"""`waystation package diff` and `waystation package lint`: packages side by side, out of files or the depot."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import click

from orchestrator.commands.options import depot_location, depot_option
from relay.errors import ChunkInvalid, ChunkMissing, IdentityError, NotFoundError, StoreError, UsageError
from relay.package.zip_records import CENTRAL, LOCAL
from relay.support.console import json_option, print_json, printable, progress_bars, run, size, table

if TYPE_CHECKING:
    import zipfile
    from concurrent.futures import Future

    from orchestrator.compare.diff import Package, PartChange, ZipPart
    from orchestrator.compare.lint import Finding, Lint
    from relay.encoding.codecs import Coding
    from relay.package.identity import PackageRef
    from relay.package.manifest import NupkgDigests
    from relay.package.zip_reader import Entry

_CODINGS = "zstd:3,zstd:19,zstd-prefix,hdiff"
_PIECE = 1 << 20
_SHOWN = 20
"""Parts that are listed where not all are asked for."""
_ENCODERS = 2
"""At a time: one takes up to some 300 MB."""
_DIFF_HINT = "For example: waystation package diff Acme.Web 1.4.1 1.4.2, or two .nupkg files"
_LINT_HINT = "For example: waystation package lint Acme.Web.1.4.2.nupkg, or: waystation package lint Acme.Web 1.4.2"

Bars = Callable[[str], Callable[[int, int], None]]


# --- diff


@click.command(
    epilog="Examples: waystation package diff Acme.Web 1.4.1 1.4.2; "
    "waystation package diff --parts Acme.Web.1.4.1.nupkg Acme.Web.1.4.2.nupkg"
)
@click.argument("names", metavar="ID OLD NEW | FILE FILE", nargs=-1, required=True)
@click.option(
    "--parts",
    "with_parts",
    is_flag=True,
    help="Every part that changed, and what its own difference takes, the largest first.",
)
@click.option(
    "--encodings",
    "codings_text",
    default=_CODINGS,
    show_default=True,
    metavar="LIST",
    help="Which to try, with commas.",
)
@depot_option
@json_option
def diff(names: tuple[str, ...], with_parts: bool, codings_text: str, depot: str | None, as_json: bool) -> None:
    """Show what changed between two packages.

    And what it takes to send the new one to a relay that holds the old one: every way is really encoded.
    """
    from relay.encoding.codecs import Coding

    codings = [Coding.parse(word.strip()) for word in codings_text.split(",") if word.strip()]
    if not codings or len(set(codings)) != len(codings):
        raise UsageError(f"--encodings {codings_text!r}: expected each encoding once", hint=f"For example: {_CODINGS}")
    before, after = _pair_named(names)
    with progress_bars() as bar, _opened([before, after], depot, bar) as (old, new):
        document, changes = _compare(old, new, codings, with_parts, bar("comparing"))
    if as_json:
        print_json(document)
        return
    click.echo(_diff_text(document, changes))
    if not with_parts and len(changes) > _SHOWN:
        click.echo(f"and {len(changes) - _SHOWN} more parts: --parts lists all, and what each takes")


def _compare(
    old: Package, new: Package, codings: Sequence[Coding], with_parts: bool, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], list[PartChange]]:
    """The document of `package diff`, and the changes in it."""
    from orchestrator.compare import diff

    changes = diff.compare_parts(old, new)
    runs = diff.plan(old.manifest, new.manifest)
    tasks = [(run.size, partial(diff.payload_bytes, old, new, run, coding)) for coding in codings for run in runs]
    if with_parts:
        tasks += [(change.size, partial(diff.part_delta_bytes, old, new, change)) for change in changes]
    sizes = iter(_side_by_side(tasks, progress))
    payloads = {coding: sum(next(sizes) for _ in runs) for coding in codings}
    if with_parts:
        measured = [replace(change, delta_bytes=next(sizes)) for change in changes]
        changes = sorted(measured, key=lambda each: (-(each.delta_bytes or 0), -each.size, each.path))
    document = {
        "format": 1,
        "old": _side(old),
        "new": _side(new),
        "parts": _counts(new, changes),
        "only_container": bool(changes) and all(change.container for change in changes),
        "changes": [asdict(change) for change in changes],
        "chunks": asdict(diff.count_chunks(old.manifest, new.manifest)),
        "encodings": [_encoding(coding, payloads[coding], new) for coding in codings],
        "manifest_bytes": diff.manifest_bytes(old.manifest, new.manifest),
        "rsync_like_bytes": diff.rsync_like_bytes(old, new),
        "nupkg_bytes": new.manifest.nupkg.size,
    }
    return document, changes


def _pair_named(names: tuple[str, ...]) -> tuple[_Named, _Named]:
    """What ID OLD NEW, or two files, stand for."""
    if len(names) == 2:
        first, second = map(_file_named, names)
        return first, second
    if len(names) != 3:
        raise UsageError(f"{len(names)} names: expected ID OLD NEW, or two files", hint=_DIFF_HINT)
    id, old, new = names
    return _depot_named(id, old), _depot_named(id, new)


def _side(package: Package) -> dict[str, Any]:
    manifest = package.manifest
    return {
        "id": str(manifest.package.id),
        "version": manifest.package.version.normalized,
        "name": package.name,
        "nupkg_sha256": manifest.nupkg.sha256,
        "size": manifest.nupkg.size,
        "stream_bytes": manifest.stream_size,
        "parts": len(manifest.parts),
        "chunks": len(manifest.chunks),
    }


def _counts(new: Package, changes: Sequence[PartChange]) -> dict[str, int]:
    from orchestrator.compare.diff import CHANGES

    counts: dict[str, int] = dict.fromkeys(CHANGES, 0)
    for each in changes:
        counts[each.change] += 1
    return counts | {"same": len(new.manifest.parts) - len(changes) + counts["removed"]}


def _encoding(coding: Coding, payload: int, new: Package) -> dict[str, Any]:
    share = payload / max(new.manifest.nupkg.size, 1)
    return {"encoding": str(coding), "payload_bytes": payload, "of_nupkg": round(share, 6)}


def _diff_text(document: dict[str, Any], changes: Sequence[PartChange]) -> str:
    chunks = document["chunks"]
    counts = ", ".join(f"{count} {change}" for change, count in document["parts"].items() if count)
    lines = [f"{_called(document['old'])}  →  {_called(document['new'])}", f"parts: {counts}"]
    if document["only_container"]:
        lines.append("only the container changed: every file of the tree is the same")
    lines.append(
        f"chunks: {chunks['kept']} kept ({size(chunks['kept_bytes'])}), "
        f"{chunks['new']} new ({size(chunks['new_bytes'])})"
    )
    if changes:
        lines += ["", _changes_table(changes)]
    ways = [
        *((f"chunks as {e['encoding']}", e["payload_bytes"]) for e in document["encodings"]),
        ("and its manifest", document["manifest_bytes"]),
        ("zip bytes that changed (as rsync would)", document["rsync_like_bytes"]),
        ("the whole nupkg", document["nupkg_bytes"]),
    ]
    whole = max(document["nupkg_bytes"], 1)
    rows = [[way, str(count), f"{100 * count / whole:.2f} %"] for way, count in ways]
    return "\n".join([*lines, "", table(["to a holder of the old one", "bytes", "of the nupkg"], rows, right=_RIGHT)])


_RIGHT = frozenset({1, 2})


def _changes_table(changes: Sequence[PartChange]) -> str:
    measured = any(change.delta_bytes is not None for change in changes)
    shown = changes if measured else sorted(changes, key=lambda change: -change.size)[:_SHOWN]
    rows = []
    for each in shown:
        renamed = each.old_path not in {"", each.path}
        path = f"{each.path}  (was {each.old_path})" if renamed else each.path
        before = str(each.old_size) if each.old_path else ""
        after = "" if each.change == "removed" else str(each.size)
        rows.append([each.change, before, after, *([str(each.delta_bytes)] if measured else []), path])
    headers = ["change", "bytes before", "bytes", *(["difference"] if measured else []), "part"]
    return table(headers, rows, right=frozenset(range(1, len(headers) - 1)))


def _called(side: dict[str, Any]) -> str:
    return f"{side['id']} {side['version']} ({size(side['size'])})"


def _side_by_side(tasks: Sequence[tuple[int, Callable[[], int]]], progress: Callable[[int, int], None]) -> list[int]:
    """The answers of all tasks, in their order. Each is given with its weight; the encoders release the GIL."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    whole, done = max(sum(weight for weight, _ in tasks), 1), 0
    pool = ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1))
    try:
        weights: dict[Future[int], int] = {pool.submit(task): weight for weight, task in tasks}
        for future in as_completed(weights):
            future.result()
            done += weights[future]
            progress(done, whole)
        return [future.result() for future in weights]
    finally:
        pool.shutdown(cancel_futures=True)


# --- lint


@click.command(
    epilog="Examples: waystation package lint Acme.Web.1.4.2.nupkg; "
    "waystation package lint Acme.Web 1.4.2 --against 1.4.1; "
    "waystation package lint first/Acme.Web.1.4.2.nupkg --against second/Acme.Web.1.4.2.nupkg"
)
@click.argument("names", metavar="FILE... | ID VERSION", nargs=-1, required=True)
@click.option(
    "--against",
    metavar="FILE|VERSION",
    help="Another build, which shows what really differs: a file, or another version of ID in the depot. With one "
    "package only.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 where something can be mended; notes do not count.")
@depot_option
@json_option
def lint(names: tuple[str, ...], against: str | None, strict: bool, depot: str | None, as_json: bool) -> int:
    """Show what makes two builds of one source differ.

    What that costs a line, and how to mend it.
    """
    from orchestrator.compare import lint

    named = _named_for_lint(names)
    if against is not None and len(named) != 1:
        raise UsageError(f"--against with {len(named)} files: expected one", hint="Name one file, or ID VERSION")
    other = [_against(against, named[0], names)] if against is not None else []
    results: list[tuple[Package, Package | None, Lint]] = []
    with progress_bars() as bar, ExitStack() as stack:
        for each in named:
            package, *others = stack.enter_context(_opened([each, *other], depot, bar))
            watch = bar(f"looking into {each.name}")
            found = lint.lint_pair(others[0], package, watch) if others else lint.lint_alone(package, watch)
            results.append((package, others[0] if others else None, found))
    if as_json:
        print_json({"format": 1, "packages": [_lint_document(*result) for result in results]})
    else:
        click.echo("\n\n".join(_lint_text(*result) for result in results))
    return int(strict and any(found.can_be_mended for *_, found in results))


def _named_for_lint(names: tuple[str, ...]) -> list[_Named]:
    are_files = [name.lower().endswith(".nupkg") or os.path.isfile(name) for name in names]
    if len(names) == 2 and not any(are_files):
        return [_depot_named(*names)]
    if not all(are_files):
        odd = names[are_files.index(False)]
        raise UsageError(f"{odd!r} is no file: expected .nupkg files, or ID VERSION", hint=_LINT_HINT)
    return [_file_named(name) for name in names]


def _against(text: str, package: _Named, names: tuple[str, ...]) -> _Named:
    if package.ref is None or text.lower().endswith(".nupkg") or os.path.isfile(text):
        return _file_named(text)
    return _depot_named(names[0], text)


def _lint_document(package: Package, other: Package | None, found: Lint) -> dict[str, Any]:
    return {
        **{key: value for key, value in _side(package).items() if key in {"id", "version", "name", "nupkg_sha256"}},
        "against": other.name if other else "",
        "findings": [asdict(finding) for finding in found.findings],
        "other_parts": found.other_parts,
    }


def _lint_text(package: Package, other: Package | None, found: Lint) -> str:
    head = f"{package.manifest.package}" + (f" against {other.name}" if other else "")
    if not found.findings:
        lines = [f"{head}: nothing that differs from build to build"]
    else:
        headers = ["", "rule", "ours", "zip", "what"]
        rows = [_finding_row(finding) for finding in found.findings]
        how = "measured between the two" if other else "tried, as if all of it were built again"
        lines = [
            f"{head}: {_number(found)}",
            table(headers, rows, right=frozenset({2, 3})),
            f"ours: bytes for each site as we send it ({how}); zip: where the zip's own bytes are compared (rsync, Octodiff)",
        ]
        if any(finding.our_bytes is None for finding in found.findings):
            why = "the code around it changed as well" if other else "only another build tells, see --against"
            lines[-1] += f"; ?: {why}"
        mends = {finding.rule: finding.mend for finding in found.findings}
        width = max(map(len, mends))
        lines += ["what to do:", *(f"  {rule.ljust(width)}  {printable(mend)}" for rule, mend in mends.items())]
    if found.other_parts:
        lines.append(f"{found.other_parts} parts differ in more than that: see 'waystation package diff --parts'")
    return "\n".join(lines)


def _number(found: Lint) -> str:
    notes = sum(finding.is_note for finding in found.findings)
    return f"{len(found.findings) - notes} to mend, {notes} to note"


def _finding_row(finding: Finding) -> list[str]:
    what = (
        f"{finding.part}: {finding.what}"
        if finding.part and not finding.what.startswith(finding.part)
        else finding.what
    )
    costs = [("?" if count is None else str(count)) for count in (finding.our_bytes, finding.zip_bytes)]
    return ["note" if finding.is_note else "mend", finding.rule, *costs, what]


# --- packages, opened


class _Named(NamedTuple):
    """A package as it was named: a file, or one of the depot."""

    name: str
    path: str = ""
    ref: PackageRef | None = None


def _file_named(path: str) -> _Named:
    if not os.path.isfile(path):
        raise UsageError(
            f"{path} is not a file", hint="Expected the path of a .nupkg file, or ID and versions in the depot"
        )
    return _Named(path, path)


def _depot_named(id: str, version: str) -> _Named:
    from relay.package.identity import NuGetVersion, PackageId, PackageRef

    try:
        ref = PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
    except IdentityError as error:
        raise UsageError(error.message, hint="Expected files that end in .nupkg, or ID and versions") from error
    return _Named(str(ref), ref=ref)


@contextmanager
def _opened(named: Sequence[_Named], depot: str | None, bar: Bars) -> Iterator[list[Package]]:
    """The packages, their tree streams in temporary files that go when this is left.

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
                folder = stack.enter_context(_temporary_folder())
                path = run(_copy_out(depot_location(depot), each.ref, os.path.join(folder, "package.nupkg")))
            spool = stack.enter_context(_spool())
            packages.append(_read_package(path, each.name, spool, bar(f"reading {each.name}")))
        yield packages


@contextmanager
def _temporary_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="waystation-compare-") as folder:
        yield folder


@contextmanager
def _spool() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile(prefix="waystation-compare-") as file:
        yield file


async def _copy_out(location: str, ref: PackageRef, path: str) -> str:
    from orchestrator.depot.depot import open_depot

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
    return path


def _read_package(path: str, name: str, spool: BinaryIO, progress: Callable[[int, int], None]) -> Package:
    """Walk a nupkg, cut it as the depot would, and put its tree stream into `spool`."""
    from orchestrator.compare.diff import Package
    from relay.package import chunking
    from relay.package.chunk import Chunk
    from relay.package.identity import PackageRef
    from relay.package.manifest import ManifestBuilder
    from relay.package.zip_reader import read_nuspec, read_part, walk

    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only this error is about the name
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="Expected the path of a .nupkg file") from error
    with file:
        entries = walk(file)
        nuspec = read_nuspec(file, entries)
        builder = ManifestBuilder(PackageRef(nuspec.id, nuspec.version), _digests(file), dict(nuspec.metadata))
        parts = sorted(entries, key=lambda entry: chunking.stream_key(entry.path))
        done, whole = 0, sum(entry.size for entry in entries)
        for found in chunking.cut(parts, lambda e: e.path, lambda e: e.size, lambda e: read_part(file, e)):
            if isinstance(found, Chunk):
                builder.saw_chunk(found)
                _write(spool, found.data)
                done += found.size
                progress(done, whole)
            else:
                builder.saw_part(found)
        read = _reader(spool)
        manifest = builder.build(parts, _executable(parts, read))
        return Package(name, manifest, tuple(_zip_parts(file, entries)), read)


def _write(spool: BinaryIO, data: bytes) -> None:
    try:
        spool.write(data)
    except OSError as error:
        raise StoreError(f"cannot write to {tempfile.gettempdir()}: {error.strerror}", hint="Set TMPDIR") from error


def _reader(spool: BinaryIO) -> Callable[[int, int], bytes]:
    """Reads from any thread."""
    lock = threading.Lock()

    def read(offset: int, count: int) -> bytes:
        with lock:
            spool.seek(offset)
            return spool.read(count)

    return read


def _executable(parts: Sequence[Entry], read: Callable[[int, int], bytes]) -> Iterator[bool]:
    """As the depot tells it: by the zip's bit, or by how the file starts."""
    start = 0
    for part in parts:
        yield part.executable_bit or read(start, min(part.size, 4)).startswith((b"\x7fELF", b"#!"))
        start += part.size


def _digests(file: BinaryIO) -> NupkgDigests:
    from relay.package.manifest import NupkgDigests

    digests = hashlib.sha256(), hashlib.sha512()
    count = 0
    file.seek(0)
    while piece := file.read(_PIECE):
        count += len(piece)
        for digest in digests:
            digest.update(piece)
    return NupkgDigests(count, digests[0].hexdigest(), b64encode(digests[1].digest()).decode())


def _zip_parts(file: BinaryIO, entries: Sequence[Entry]) -> Iterator[ZipPart]:
    """What the records say of each part, in the file's order."""
    from orchestrator.compare.diff import ZipPart

    records = _records(file)
    for entry in entries:
        record = records.get(entry.data_offset)
        yield ZipPart(
            entry.path,
            entry.size,
            entry.compressed_size,
            _sha256(file, entry.data_offset, entry.compressed_size),
            record.date_time if record else (),
            _record_bytes(entry, record) if record else 0,
        )


def _records(file: BinaryIO) -> dict[int, zipfile.ZipInfo]:
    """The central records, by where the part's data begins. The walk has checked the file: that they are read again by
    another reader is only for their times, and none are told where that reader is more particular.
    """
    import zipfile

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


def _sha256(file: BinaryIO, offset: int, count: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while count and (piece := file.read(min(count, _PIECE))):
        digest.update(piece)
        count -= len(piece)
    return digest.hexdigest()
