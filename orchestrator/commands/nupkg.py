"""`waystation package show` and `waystation package fetch`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options
from orchestrator.commands.options import (
    answer,
    depot_location,
    depot_option,
    in_depot,
    listed_paths,
    package_ref,
    pointer_document,
    trust_option,
)
from relay.errors import UsageError
from relay.support.console import (
    ca_file_option,
    json_option,
    printable,
    progress_bars,
    run,
    size,
    table,
    token_file_option,
)

if TYPE_CHECKING:
    from orchestrator.depot.depot import PackageDetails
    from relay.package.manifest import Manifest
    from relay.package.recipe import Recipe


@click.command(epilog="Example: waystation package show Acme.Web 1.4.2")
@click.argument("id")
@click.argument("version")
@depot_option
@json_option
def show(id: str, version: str, depot: str | None, as_json: bool) -> None:
    """Show one package: digests, parts, chunks, what its nuspec says, and how its nupkg is made again.

    Where deflate engines were installed since it was added, that is found out again.
    """
    ref = package_ref(id, version)
    document = _document(in_depot(depot, lambda opened: opened.details(ref)))
    answer({"format": 1} | document, _text(document), as_json=as_json)


def _text(document: dict[str, Any]) -> str:
    provenance = document["provenance"]
    rows = [
        ["manifest", document["manifest"]],
        ["signed", "yes" if document["signed"] else "no"],
        ["nupkg", f"{size(document['size'])}  sha256:{document['nupkg_sha256']}"],
        ["tree", f"{size(document['tree_bytes'])} in {document['parts']} parts, {document['chunks']} chunks"],
        ["not in it", listed_paths(document["left_out"])],
        ["since", document["published"]],
        ["from", f"{provenance['how']} {provenance['source']}".strip()],
        ["vouched by", provenance["verified_by"] or "the person who added it"],
        ["description", str(document["metadata"].get("description", ""))[:200]],
        ["made again", _summary(document["exact"])],
    ]
    rows += [["left out", fault] for fault in document["metadata_left_out"]]
    lines = [f"{document['id']} {document['version']}", *(f"  {name:12} {printable(value)}" for name, value in rows)]
    return "\n".join([*lines, _shares(document["exact"])] if document["exact"] else lines)


def _document(details: PackageDetails) -> dict[str, Any]:
    manifest, recipe = details.manifest, details.recipe
    return pointer_document(details.pointer) | {
        "signed": details.signed,
        "nupkg_sha512": manifest.nupkg.sha512,
        "stream_bytes": manifest.stream_size,
        "tree_bytes": manifest.tree_size,
        "parts": len(manifest.parts),
        "left_out": manifest.left_out,
        "chunks": len(manifest.chunks),
        "manifest_bytes": len(manifest.canonical),
        "exact": None if recipe is None else _exact(recipe, manifest),
        "executable": [part.path for part in manifest.parts if part.executable],
        "metadata": manifest.body.metadata,
        "metadata_left_out": details.unread,
    }


def _exact(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    from relay.package.manifest import to_wire
    from relay.package.recipe import VERBATIM, Opaque, encode_recipe, shares

    canonical = encode_recipe(recipe)
    found = shares(recipe, manifest)
    verbatim = recipe.verbatim
    return {
        "records": recipe.records.__struct_config__.tag,
        "whole_file": isinstance(recipe.records, Opaque),
        "shares": {
            name: {"nupkg_bytes": share.compressed, "content_bytes": share.content}
            for name, share in sorted(found.items(), key=lambda item: (item[0] == VERBATIM, -item[1].compressed))
        },
        "verbatim": None if verbatim is None else {"sha256": verbatim.id, "bytes": verbatim.size},
        "recipe_bytes": len(canonical),
        "recipe_wire_bytes": len(to_wire(canonical)),
    }


def _summary(exact: dict[str, Any] | None) -> str:
    if exact is None:
        return "not proved yet: adding its nupkg again does it"
    recipe = f"recipe of {size(exact['recipe_bytes'])} ({size(exact['recipe_wire_bytes'])} on the wire)"
    if exact["whole_file"]:
        return "no: relays take the whole file"
    if exact["verbatim"]:
        return f"with {size(exact['verbatim']['bytes'])} that relays must be given, {recipe}"
    return f"of its parts alone, {recipe}"


def _shares(exact: dict[str, Any]) -> str:
    whole = max(1, sum(share["nupkg_bytes"] for share in exact["shares"].values()))
    rows = [
        [
            f"    {name}",
            size(share["nupkg_bytes"]),
            f"{100 * share['nupkg_bytes'] / whole:.1f} %",
            size(share["content_bytes"]),
        ]
        for name, share in exact["shares"].items()
    ]
    return table(["    encoder", "of the nupkg", "share", "content"], rows, right=frozenset({1, 2, 3}))


@click.command(
    epilog="Examples: waystation package fetch Acme.Web 1.4.2 --output web.nupkg; "
    "waystation package fetch Acme.Web 1.4.2 --relay https://relay.fra.example:7443"
)
@click.argument("id")
@click.argument("version")
@click.option("--relay", "url", metavar="URL", help="Take it from this relay. [default: out of the depot]")
@click.option("--output", metavar="FILE", help="Where to write it. [default: ID.VERSION.nupkg in this folder]")
@depot_option
@trust_option
@token_file_option
@ca_file_option
@json_option
def fetch(
    id: str,
    version: str,
    url: str | None,
    output: str | None,
    depot: str | None,
    trust_folder: str | None,
    token_file: str | None,
    ca_file: str | None,
    as_json: bool,
) -> None:
    """Write the identical nupkg to a file, out of the depot or from a relay, which makes it again if need be.

    The file gets its name when its SHA-512 is that of the signed manifest. Another file is never overwritten.
    """
    if url is None and (token_file or ca_file):
        raise UsageError("--token-file and --ca-file go with --relay")
    if url is not None and depot is not None:
        raise UsageError("give --depot or --relay, not both")

    from orchestrator.replication.export import fetch_from_depot, fetch_from_relay
    from orchestrator.trust.keyring import load_pins
    from relay.protocol.client import RelayClient
    from relay.protocol.credentials import tls_from, token_from

    ref = package_ref(id, version)
    path = os.path.abspath(output or f"{ref.id}.{ref.version.normalized}.nupkg")
    pins = load_pins(options.trust_folder(trust_folder))
    with progress_bars() as bar:
        if url is None:
            fetched = run(fetch_from_depot(depot_location(depot), ref, pins, path, bar(str(ref))))
        else:
            relay = RelayClient(url, token=token_from(token_file), tls=tls_from(ca_file))
            fetched = run(fetch_from_relay(relay, ref, pins, path, bar(str(ref))))
    nupkg = fetched.manifest.nupkg
    digests = {"size": nupkg.size, "sha256": nupkg.sha256, "sha512": nupkg.sha512}
    what = "fetched" if fetched.new else "was there"
    text = printable(f"{what}  {fetched.path}  {size(nupkg.size)}  sha256:{nupkg.sha256}")
    answer({"format": 1, "file": fetched.path, "new": fetched.new} | digests, text, as_json=as_json)
