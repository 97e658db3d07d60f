"""`waystation package diff` and `waystation package lint`: packages side by side, out of files or the depot."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from orchestrator.commands.options import answer, depot_location, depot_option, package_ref
from relay.errors import UsageError
from relay.support.console import json_option, printable, progress_bars, share, size, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.compare.diff import OpenedPackage, PartChange
    from orchestrator.compare.lint import Finding, Lint
    from orchestrator.compare.measure import Comparison
    from orchestrator.compare.read_package import NamedPackage
    from relay.encoding.codecs import Coding

_CODINGS: Final = "zstd:3,zstd:19,zstd-prefix,hdiff"
_SHOWN: Final = 20
"""Parts that are listed where not all are asked for."""


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
    from orchestrator.compare.measure import compare
    from orchestrator.compare.read_package import opened_packages
    from relay.encoding.codecs import Coding

    codings = [Coding.parse(word.strip()) for word in codings_text.split(",") if word.strip()]
    if not codings or len(set(codings)) != len(codings):
        raise UsageError(f"--encodings {codings_text!r}: expected each encoding once", hint=f"For example: {_CODINGS}")
    named = _pair_named(names)
    with progress_bars() as bar, opened_packages(named, depot_location(depot), bar) as (old, new):
        found = compare(old, new, codings, bar("comparing"), with_parts=with_parts)
        document = _diff_document(old, new, found)
    text = _diff_text(document, found.changes)
    if not with_parts and len(found.changes) > _SHOWN:
        text += f"\nand {len(found.changes) - _SHOWN} more parts: --parts lists all, and what each takes"
    answer(document, text, as_json=as_json)


def _diff_document(old: OpenedPackage, new: OpenedPackage, found: Comparison) -> dict[str, Any]:
    return {
        "format": 1,
        "old": _side(old),
        "new": _side(new),
        "parts": _counts(new, found.changes),
        "only_container": bool(found.changes) and all(change.container for change in found.changes),
        "changes": [asdict(change) for change in found.changes],
        "chunks": asdict(found.chunks),
        "encodings": [_encoding(coding, payload, new) for coding, payload in found.payloads.items()],
        "manifest_bytes": found.manifest_bytes,
        "rsync_like_bytes": found.rsync_like_bytes,
        "nupkg_bytes": new.manifest.nupkg.size,
    }


def _pair_named(names: tuple[str, ...]) -> list[NamedPackage]:
    """What ID OLD NEW, or two files, stand for."""
    if len(names) == 2:
        return [_file_named(name) for name in names]
    if len(names) != 3:
        hint = "For example: waystation package diff Acme.Web 1.4.1 1.4.2, or two .nupkg files"
        raise UsageError(f"{len(names)} names: expected ID OLD NEW, or two files", hint=hint)
    id, old, new = names
    return [_depot_named(id, old), _depot_named(id, new)]


def _side(package: OpenedPackage) -> dict[str, Any]:
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


def _counts(new: OpenedPackage, changes: Sequence[PartChange]) -> dict[str, int]:
    from orchestrator.compare.diff import CHANGES

    counts: dict[str, int] = dict.fromkeys(CHANGES, 0)
    for each in changes:
        counts[each.change] += 1
    return counts | {"same": len(new.manifest.parts) - len(changes) + counts["removed"]}


def _encoding(coding: Coding, payload: int, new: OpenedPackage) -> dict[str, Any]:
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
    rows = [[way, str(count), share(count, document["nupkg_bytes"], 2)] for way, count in ways]
    return "\n".join(
        [*lines, "", table(["to a holder of the old one", "bytes", "of the nupkg"], rows, right=frozenset({1, 2}))]
    )


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
    from orchestrator.compare.read_package import opened_packages

    named = _named_for_lint(names)
    if against is not None and len(named) != 1:
        raise UsageError(f"--against with {len(named)} files: expected one", hint="Name one file, or ID VERSION")
    other = [_against(against, named[0], names)] if against is not None else []
    results: list[tuple[OpenedPackage, OpenedPackage | None, Lint]] = []
    with progress_bars() as bar, ExitStack() as stack:
        for each in named:
            package, *others = stack.enter_context(opened_packages([each, *other], depot_location(depot), bar))
            watch = bar(f"looking into {each.name}")
            found = lint.lint_pair(others[0], package, watch) if others else lint.lint_alone(package, watch)
            results.append((package, others[0] if others else None, found))
    document = {"format": 1, "packages": [_lint_document(*result) for result in results]}
    answer(document, "\n\n".join(_lint_text(*result) for result in results), as_json=as_json)
    return int(strict and any(found.can_be_mended for *_, found in results))


def _named_for_lint(names: tuple[str, ...]) -> list[NamedPackage]:
    are_files = [name.lower().endswith(".nupkg") or os.path.isfile(name) for name in names]
    if len(names) == 2 and not any(are_files):
        return [_depot_named(*names)]
    if not all(are_files):
        odd = names[are_files.index(False)]
        hint = "For example: waystation package lint Acme.Web.1.4.2.nupkg, or: waystation package lint Acme.Web 1.4.2"
        raise UsageError(f"{odd!r} is no file: expected .nupkg files, or ID VERSION", hint=hint)
    return [_file_named(name) for name in names]


def _against(text: str, package: NamedPackage, names: tuple[str, ...]) -> NamedPackage:
    if package.ref is None or text.lower().endswith(".nupkg") or os.path.isfile(text):
        return _file_named(text)
    return _depot_named(names[0], text)


def _lint_document(package: OpenedPackage, other: OpenedPackage | None, found: Lint) -> dict[str, Any]:
    return {
        **{key: value for key, value in _side(package).items() if key in {"id", "version", "name", "nupkg_sha256"}},
        "against": other.name if other else "",
        "findings": [asdict(finding) for finding in found.findings],
        "other_parts": found.other_parts,
    }


def _lint_text(package: OpenedPackage, other: OpenedPackage | None, found: Lint) -> str:
    head = f"{package.manifest.package}" + (f" against {other.name}" if other else "")
    if not found.findings:
        lines = [f"{head}: nothing that differs from build to build"]
    else:
        notes = sum(finding.is_note for finding in found.findings)
        headers = ["", "rule", "ours", "zip", "what"]
        rows = [_finding_row(finding) for finding in found.findings]
        how = "measured between the two" if other else "tried, as if all of it were built again"
        lines = [
            f"{head}: {len(found.findings) - notes} to mend, {notes} to note",
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


def _finding_row(finding: Finding) -> list[str]:
    what = (
        f"{finding.part}: {finding.what}"
        if finding.part and not finding.what.startswith(finding.part)
        else finding.what
    )
    costs = [("?" if count is None else str(count)) for count in (finding.our_bytes, finding.zip_bytes)]
    return ["note" if finding.is_note else "mend", finding.rule, *costs, what]


# --- names of packages


def _file_named(path: str) -> NamedPackage:
    from orchestrator.compare.read_package import NamedPackage

    if not os.path.isfile(path):
        raise UsageError(
            f"{path} is not a file", hint="Expected the path of a .nupkg file, or ID and versions in the depot"
        )
    return NamedPackage(path, path)


def _depot_named(id: str, version: str) -> NamedPackage:
    from orchestrator.compare.read_package import NamedPackage

    ref = package_ref(id, version, hint="Expected files that end in .nupkg, or ID and versions")
    return NamedPackage(str(ref), ref=ref)
