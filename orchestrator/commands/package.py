"""`waystation package …`"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from orchestrator.commands import options
from orchestrator.commands.compare import diff, lint
from orchestrator.commands.nupkg import fetch, show
from orchestrator.commands.options import (
    answer,
    byte_count,
    depot_option,
    in_depot,
    listed_paths,
    package_ref,
    pointer_document,
    trust_option,
)
from orchestrator.commands.replicate import replicate
from relay.errors import UsageError, WaystationError
from relay.support.console import json_option, print_json, progress_bars, say, size, table

if TYPE_CHECKING:
    from orchestrator.depot.depot import Added, Depot
    from relay.package.manifest import Manifest
    from relay.support.progress import Bar


@click.group()
@click.pass_context
def package(context: click.Context) -> None:
    """Packages: into the depot, out of it, and to the relays."""
    options.keep_events(context)


@package.command(epilog="Example: waystation package pack ./publish --id Acme.Web --version 1.4.2")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--id", "id_text", required=True, help="The package's id.")
@click.option("--version", "version_text", required=True, help="The package's version.")
@click.option("--authors", default="", help="For a nuspec that is made. [default: the id]")
@click.option("--description", default="", help="For a nuspec that is made. [default: the id]")
@click.option("--output", metavar="FILE", help="Where to write it. [default: ID.VERSION.nupkg in this folder]")
@json_option
def pack(
    folder: str, id_text: str, version_text: str, authors: str, description: str, output: str | None, as_json: bool
) -> None:
    """Make a nupkg of FOLDER. The same files give the same bytes, whenever and wherever."""
    from relay.package.pack import pack_file

    ref = package_ref(id_text, version_text)
    target = os.path.abspath(output or f"{ref.id}.{ref.version.normalized}.nupkg")
    authors, description = authors or str(ref.id), description or str(ref.id)
    try:
        pack_file(folder, target, id=ref.id, version=ref.version, authors=authors, description=description)
    except OSError as error:
        raise UsageError(f"cannot pack: {error.filename or target}: {error.strerror}") from error
    count = os.path.getsize(target)
    answer({"format": 1, "file": target, "size": count}, f"{target} ({size(count)})", as_json=as_json)


@package.command(
    epilog="Examples: waystation package add Acme.Web.1.4.2.nupkg; "
    "waystation package add --feed https://feed.example/v3/index.json Acme.Web 1.4.2"
)
@click.argument("names", metavar="FILE... | ID VERSION", nargs=-1, required=True)
@click.option("--feed", metavar="URL", help="Take ID VERSION from this NuGet V3 feed (its index.json).")
@click.option("--sha512", metavar="HASH", help="With --feed: what the nupkg must hash to, hex or base64.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="With --feed: the feed may lead there too; may be repeated.",
)
@click.option("--allow-http", is_flag=True, help="With --feed: allow plain http beyond loopback.")
@click.option("--allow-private", is_flag=True, help="With --feed: its name may resolve to a private address.")
@click.option(
    "--max-inflated",
    type=byte_count,
    metavar="SIZE",
    help="Refuse a package whose parts inflate to more, such as 500MB. [default: 4GiB, the most that there is]",
)
@depot_option
@trust_option
@json_option
def add(
    names: tuple[str, ...],
    feed: str | None,
    sha512: str | None,
    hosts: tuple[str, ...],
    allow_http: bool,
    allow_private: bool,
    max_inflated: int | None,
    depot: str | None,
    trust_folder: str | None,
    as_json: bool,
) -> int:
    """Take packages into the depot: chunked, checked and signed. What is there already is left as it is.

    Parts that belong to the nupkg itself are in no tree; they are told.

    As soon as the packages are told they can be listed, replicated and deployed. Then the command finds out, and proves,
    how relays can make each nupkg again, byte for byte. Where that is cut short, adding the file again does it.
    """
    from orchestrator.trust.keyring import load_signer
    from relay.package.zip_reader import DEFAULT_LIMITS, WalkLimits
    from relay.support.malloc import share_arenas

    if feed and len(names) != 2:
        raise UsageError("with --feed, name ID and VERSION", hint="For example: --feed URL Acme.Web 1.4.2")
    if not feed and (sha512 or hosts or allow_http or allow_private):
        raise UsageError("--sha512 and the --allow options go with --feed")
    for path in () if feed else names:
        if not os.path.isfile(path):
            raise UsageError(f"{path} is not a file", hint="Expected the path of a .nupkg file; nothing was added")

    async def take(opened: Depot) -> int:
        with progress_bars() as bar:
            taken = await _taken(opened, bar)
        _print_taken(taken, as_json=as_json)
        with progress_bars() as bar:
            for manifest in taken.manifests:
                show = bar(f"proof of {manifest.package}")
                await opened.recipe(manifest, show)
                show(manifest.nupkg.size, manifest.nupkg.size)
        return 1 if taken.errors else 0

    async def _taken(opened: Depot, bar: Bar) -> _Taken:
        from orchestrator.depot.add import add_files, add_from_feed
        from orchestrator.depot.feed_policy import FeedPolicy

        if not feed:
            done, refused = await add_files(opened, signer, names, bar, limits)
            return _Taken([_added(one) for one in done], [one.manifest for one in done], refused)
        policy = FeedPolicy(allow_hosts=hosts, allow_http=allow_http, allow_private=allow_private)
        ref, progress = package_ref(*names), bar(" ".join(names))
        one, got = await add_from_feed(
            opened, signer, feed, ref, sha512=sha512, policy=policy, progress=progress, limits=limits
        )
        return _Taken([_added(one) | {"verified_by": got.verified_by}], [one.manifest], {})

    share_arenas()
    most = DEFAULT_LIMITS.inflated
    limits = WalkLimits(inflated=min(max_inflated or most, most))
    signer = load_signer(options.trust_folder(trust_folder), "package")
    return in_depot(depot, take)


class _Taken(NamedTuple):
    """What is shown of each package that was added, their manifests, and why each other file was refused."""

    documents: list[dict[str, Any]]
    manifests: list[Manifest]
    errors: dict[str, WaystationError]


def _print_taken(taken: _Taken, *, as_json: bool) -> None:
    if as_json:
        failed = [{"file": path, "error": error.message} for path, error in taken.errors.items()]
        print_json({"format": 1, "packages": taken.documents, "failed": failed})
        return
    for entry in taken.documents:
        what = "added" if entry["new"] else "was there"
        say(f"{what}  {entry['id']} {entry['version']}  {entry['manifest']}  {size(entry['size'])}")
        say(f"  not in trees: {listed_paths(entry['left_out'])}")
        for fault in entry["metadata_left_out"]:
            say(f"  left out of its metadata: {fault}")
    for path, error in taken.errors.items():
        say(f"{path}: {error}", aside=True)


def _added(result: Added) -> dict[str, Any]:
    return pointer_document(result.pointer) | {
        "new": result.new,
        "chunks": len(result.manifest.chunks),
        "chunks_stored": result.chunks_stored,
        "left_out": result.manifest.left_out,
        "metadata_left_out": result.unread,
    }


@package.command("list", epilog="Example: waystation package list --json")
@depot_option
@json_option
def list_(depot: str | None, as_json: bool) -> None:
    """Show the packages in the depot."""

    async def listed(opened: Depot) -> list[dict[str, Any]]:
        return [pointer_document(pointer) for pointer in opened.catalog.all()]

    packages = in_depot(depot, listed)
    rows = [[p["id"], p["version"], size(p["size"]), p["published"], p["provenance"]["source"]] for p in packages]
    text = "the depot is empty: add a package with 'waystation package add FILE'"
    if rows:
        text = table(["package", "version", "size", "since", "from"], rows, right=frozenset({2}))
    answer({"format": 1, "packages": packages}, text, as_json=as_json)


@package.command(epilog="Example: waystation package remove Acme.Web 1.4.2")
@click.argument("id")
@click.argument("version")
@depot_option
@json_option
def remove(id: str, version: str, depot: str | None, as_json: bool) -> None:
    """Take a package out of the depot. Relays and machines keep what they have."""
    ref = package_ref(id, version)
    removed = pointer_document(in_depot(depot, lambda opened: opened.remove(ref)))
    text = f"removed {removed['id']} {removed['version']} from the depot"
    answer({"format": 1, "removed": removed}, text, as_json=as_json)


package.add_command(diff)
package.add_command(fetch)
package.add_command(lint)
package.add_command(replicate)
package.add_command(show)
