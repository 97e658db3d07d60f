"""`waystation package …` and `waystation trust …`"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from orchestrator import options
from orchestrator.options import depot_location, depot_option, trust_option
from relay.console import (
    ca_file_option,
    json_option,
    print_json,
    printable,
    progress_bars,
    run,
    size,
    table,
    token_file_option,
)
from relay.errors import IdentityError, UsageError, WaystationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from securesystemslib.signer import CryptoSigner

    from orchestrator.depot import Added, Depot
    from orchestrator.feed import FeedPolicy
    from orchestrator.plan import PlannedRelay
    from orchestrator.sending import Parcel
    from relay.catalog import Pointer
    from relay.client import RelayClient
    from relay.content.encodings import Coding
    from relay.content.identity import PackageRef
    from relay.content.manifest import Manifest
    from relay.survey import Explained


@click.group()
def trust() -> None:
    """Keys: the package key signs what may be installed, the order key what may run."""


@trust.command(epilog="Example: waystation trust init")
@trust_option
@json_option
def init(trust_folder: str | None, as_json: bool) -> None:
    """Make the package key, the order key, and trust.json, which every agent pins. Never overwrites a key."""
    from orchestrator.keyring import PINS_FILE, init_trust

    folder = options.trust_folder(trust_folder)
    pins = init_trust(folder)
    path = os.path.join(folder, PINS_FILE)
    if as_json:
        print_json(
            {
                "format": 1,
                "trust": path,
                "package": [key.fingerprint for key in pins.package],
                "order": [key.fingerprint for key in pins.order],
            }
        )
        return
    click.echo(f"package key  {pins.package[0].fingerprint}")
    click.echo(f"order key    {pins.order[0].fingerprint}")
    click.echo(f"give {path} to every agent: waystation agent init --trust trust.json")


@click.group()
def package() -> None:
    """Packages: into the depot, out of it, and to the relays."""


@package.command(epilog="Example: waystation package pack ./publish --id Acme.Web --version 1.4.2")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--id", "id_text", required=True, help="Package id.")
@click.option("--version", "version_text", required=True)
@click.option("--authors", default="", help="For the nuspec. [default: the id]")
@click.option("--description", default="", help="For the nuspec. [default: the id]")
@click.option("--output", metavar="FILE", help="[default: ID.VERSION.nupkg in this folder]")
@json_option
def pack(
    folder: str, id_text: str, version_text: str, authors: str, description: str, output: str | None, as_json: bool
) -> None:
    """Make a nupkg of FOLDER. The same files give the same bytes, whenever and wherever."""
    from relay.content.pack import pack as pack_folder

    ref = package_ref(id_text, version_text)
    target = os.path.abspath(output or f"{ref.id}.{ref.version.normalized}.nupkg")
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(target), prefix=".pack-", delete=False) as temporary:
            try:
                pack_folder(
                    folder,
                    cast("BinaryIO", temporary),
                    id=ref.id,
                    version=ref.version,
                    authors=authors or str(ref.id),
                    description=description or str(ref.id),
                )
                os.fchmod(temporary.fileno(), 0o644)
                os.rename(temporary.name, target)
            except BaseException:
                os.unlink(temporary.name)
                raise
    except OSError as error:
        raise UsageError(f"cannot pack: {error.filename or target}: {error.strerror}") from error
    if as_json:
        print_json({"format": 1, "file": target, "size": os.path.getsize(target)})
    else:
        click.echo(f"{target} ({size(os.path.getsize(target))})")


@package.command(
    epilog="Examples: waystation package add Acme.Web.1.4.2.nupkg; "
    "waystation package add --feed https://feed.example/v3/index.json Acme.Web 1.4.2"
)
@click.argument("names", metavar="FILE... | ID VERSION", nargs=-1, required=True)
@click.option("--feed", metavar="URL", help="Take ID VERSION from this V3 feed (its index.json).")
@click.option("--sha512", metavar="HASH", help="With --feed: what the nupkg must hash to (hex or base64).")
@click.option("--allow-host", "hosts", multiple=True, metavar="HOST", help="With --feed: the feed may lead there too.")
@click.option("--allow-http", is_flag=True, help="With --feed: allow plain http beyond loopback.")
@click.option("--allow-private", is_flag=True, help="With --feed: its name may resolve to a private address.")
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
    depot: str | None,
    trust_folder: str | None,
    as_json: bool,
) -> int:
    """Take packages into the depot: chunked, checked and signed. What is there already is left as it is.

    As soon as they are told they can be listed, replicated and deployed. Then it is found out, and proved, how relays can
    make each nupkg again, byte for byte. Where that is cut short, adding the file again does it.
    """
    from relay.memory import share_arenas

    if feed and len(names) != 2:
        raise UsageError("with --feed, name ID and VERSION", hint="For example: --feed URL Acme.Web 1.4.2")
    if not feed and (sha512 or hosts or allow_http or allow_private):
        raise UsageError("--sha512 and the --allow options go with --feed")
    for path in () if feed else names:
        if not os.path.isfile(path):
            raise UsageError(f"{path} is not a file", hint="Expected the path of a .nupkg file; nothing was added")

    async def take() -> int:
        from orchestrator.depot import open_depot
        from orchestrator.feed import FeedPolicy
        from orchestrator.keyring import load_signer

        signer = load_signer(options.trust_folder(trust_folder), "package")
        async with open_depot(depot_location(depot)) as opened:
            with progress_bars() as bar:
                if feed:
                    policy = FeedPolicy(allow_hosts=hosts, allow_http=allow_http, allow_private=allow_private)
                    taken = await _add_from_feed(opened, signer, feed, names, sha512, policy, bar(" ".join(names)))
                else:
                    taken = await _add_files(opened, signer, names, bar)
            _print_taken(taken, as_json=as_json)
            with progress_bars() as bar:
                for manifest in taken.manifests:
                    await opened.recipe(manifest, bar(f"proof of {manifest.package}"))
        return 1 if taken.errors else 0

    share_arenas()
    return run(take())


def _print_taken(taken: _Taken, *, as_json: bool) -> None:
    if as_json:
        failed = [{"file": path, "error": error.message} for path, error in taken.errors.items()]
        print_json({"format": 1, "packages": taken.documents, "failed": failed})
        return
    for entry in taken.documents:
        what = "added" if entry["new"] else "was there"
        click.echo(f"{what}  {entry['id']} {entry['version']}  {entry['manifest']}  {size(entry['size'])}")
    for path, error in taken.errors.items():
        click.echo(printable(f"{path}: {error}"), err=True)


async def _add_files(
    depot: Depot, signer: CryptoSigner, paths: tuple[str, ...], bar: Callable[[str], Callable[[int, int], None]]
) -> _Taken:
    """One bad file does not keep the others out."""
    from relay.catalog import Provenance

    taken = _Taken([], [], {})
    for path in paths:
        name = os.path.basename(path)
        try:
            added = await depot.add(path, signer, Provenance("added", name), progress=bar(name))
        except WaystationError as error:
            taken.errors[path] = error
        else:
            taken.documents.append(_added(added))
            taken.manifests.append(added.manifest)
    return taken


async def _add_from_feed(
    depot: Depot,
    signer: CryptoSigner,
    feed: str,
    names: tuple[str, ...],
    sha512: str | None,
    policy: FeedPolicy,
    progress: Callable[[int, int], None],
) -> _Taken:
    from orchestrator.feed import download
    from relay.catalog import Provenance

    ref = package_ref(*names)
    with tempfile.TemporaryDirectory(prefix="waystation-feed-") as folder:
        path = os.path.join(folder, "package.nupkg")
        got = await download(feed, ref.id, ref.version, path, sha512=sha512, policy=policy)
        provenance = Provenance("added", got.source_url, got.verified_by)
        result = await depot.add(path, signer, provenance, progress=progress, expected=ref)
    return _Taken([_added(result) | {"verified_by": got.verified_by}], [result.manifest], {})


@dataclass(frozen=True)
class _Taken:
    """What is told of each package that was added, their manifests, and what each refused file was refused for."""

    documents: list[dict[str, Any]]
    manifests: list[Manifest]
    errors: dict[str, WaystationError]


@package.command("list", epilog="Example: waystation package list --json")
@depot_option
@json_option
def list_(depot: str | None, as_json: bool) -> None:
    """Show the packages in the depot."""

    async def look() -> list[dict[str, Any]]:
        from orchestrator.depot import open_depot

        async with open_depot(depot_location(depot)) as opened:
            return [pointer_document(pointer) for pointer in opened.catalog.all()]

    packages = run(look())
    if as_json:
        print_json({"format": 1, "packages": packages})
    elif packages:
        rows = [[p["id"], p["version"], size(p["size"]), p["published"], p["provenance"]["source"]] for p in packages]
        click.echo(table(["package", "version", "size", "since", "from"], rows, right=frozenset({2})))
    else:
        click.echo("the depot is empty: add a package with 'waystation package add FILE'")


@package.command(epilog="Example: waystation package remove Acme.Web 1.4.2")
@click.argument("id")
@click.argument("version")
@depot_option
@json_option
def remove(id: str, version: str, depot: str | None, as_json: bool) -> None:
    """Take a package out of the depot. Relays and machines keep what they have."""

    async def take_out() -> dict[str, Any]:
        from orchestrator.depot import open_depot

        async with open_depot(depot_location(depot)) as opened:
            return pointer_document(await opened.remove(package_ref(id, version)))

    removed = run(take_out())
    if as_json:
        print_json({"format": 1, "removed": removed})
    else:
        click.echo(f"removed {removed['id']} {removed['version']} from the depot")


@package.command(
    epilog="Example: waystation package replicate Acme.Web 1.4.2 --relay https://relay.fra.example:7443 "
    "--relay https://relay.iad.example:7443"
)
@click.argument("id")
@click.argument("version")
@click.option("--relay", "relays", multiple=True, metavar="URL", help="May be repeated.")
@click.option("--environment", "-e", metavar="NAME|FILE", help="Every relay of this environment, with its own token.")
@click.option("--patience", default=60.0, show_default=True, help="Seconds that a relay may be away in mid-transfer.")
@click.option("--encoding", metavar="NAME[:LEVEL]", help="Use this one, whatever is planned: raw, zstd:19, hdiff, …")
@click.option("--limit", type=click.FloatRange(min=0, min_open=True), metavar="MBIT", help="Mbit/s to each relay.")
@click.option("--explain", is_flag=True, help="Show what each encoding would take, and what other ways would cost.")
@click.option("--dry-run", is_flag=True, help="Ask what is missing, plan, and send nothing.")
@click.option("--exact", is_flag=True, help="Also send what a relay lacks to serve the identical nupkg by itself.")
@depot_option
@token_file_option
@ca_file_option
@json_option
def replicate(
    id: str,
    version: str,
    relays: tuple[str, ...],
    environment: str | None,
    patience: float,
    encoding: str | None,
    limit: float | None,
    explain: bool,
    dry_run: bool,
    exact: bool,
    depot: str | None,
    token_file: str | None,
    ca_file: str | None,
    as_json: bool,
) -> int:
    """Send a package to relays, each only what it lacks, all at once. Running it again sends nothing.

    What is sent is encoded so that it is there first: as the difference from what the relay holds, or compressed as hard
    as the line is slow. --explain shows the arithmetic, one table for each relay.
    """
    from relay.content.encodings import Coding

    force = None if encoding is None else Coding.parse(encoding)
    where = _relays(relays, environment, token_file, ca_file)
    how = _How(patience, force, None if limit is None else limit * 1e6 / 8, explain or dry_run, dry_run, exact)
    sent = run(_replicate_all(id, version, where, how, depot))
    if as_json:
        failed = [{"relay": url, "error": error.message} for url, error in sent.failed.items()]
        head = {"format": 1, "id": id, "version": version}
        told = {"dry_run": True} if dry_run else {"saved": _saved(sent.relays, where.machines)}
        print_json(head | told | {"relays": sent.relays, "failed": failed, "replans": sent.replans})
    else:
        _print_replicated(sent, dry_run=dry_run)
    return 1 if sent.failed else 0


def _saved(relays: list[dict[str, Any]], machines: int) -> dict[str, int | None]:
    """Bytes against the whole nupkg to each of these relays, and (where they are known) to each machine behind them."""
    crossed = sum(one["wire_bytes"] for one in relays)
    nupkg = max((one["package_bytes"] for one in relays), default=0)
    return {
        "whole_file": nupkg * len(relays) - crossed,
        "per_machine": nupkg * machines - crossed if machines else None,
    }


def _print_replicated(sent: _Sent, *, dry_run: bool) -> None:
    from orchestrator.explaining import text_of

    for one in sent.relays:
        if "explained" in one:
            click.echo(text_of(one["relay"], one["explained"], one["package_bytes"]))
        elif dry_run:
            click.echo(f"{one['relay']}: fetches from {one['source']}")
    rows = [
        [
            r["relay"],
            r["source"] or "origin",
            f"{r['chunks_sent']} of {r['chunks']}",
            ", ".join(entry["encoding"] for entry in r["encodings"]) or "nothing",
            size(r["wire_bytes"]),
            f"{100 * r['wire_bytes'] / max(r['package_bytes'], 1):.1f} %",
            f"{r['seconds']:.1f} s",
        ]
        for r in ([] if dry_run else sent.relays)
    ]
    if rows:
        headers = ["relay", "from", "chunks sent", "as", "on the wire", "of the nupkg", "took"]
        click.echo(table(headers, rows, right=frozenset({4, 5, 6})))
    for r in sent.relays:
        if r.get("fallbacks"):
            click.echo(f"{r['relay']}: {r['fallbacks']} runs were refused as deltas and went plainly", err=True)
    for replan in sent.replans:
        click.echo(printable(replan), err=True)
    for url, error in sent.failed.items():
        click.echo(f"{url}: {printable(str(error))}", err=True)


@dataclass(frozen=True)
class _Where:
    """Relays that are not contacted yet, a client for each by its name, and how many machines stand behind them."""

    relays: list[PlannedRelay]
    clients: dict[str, RelayClient]
    machines: int


@dataclass(frozen=True)
class _Sent:
    """What is told of each relay, what each failed one failed with (by URL), and who had to go another way."""

    relays: list[dict[str, Any]]
    failed: dict[str, WaystationError]
    replans: list[str]


@dataclass(frozen=True)
class _How:
    patience: float
    force: Coding | None
    limit: float | None
    explains: bool
    dry_run: bool
    exact: bool


def _relays(urls: tuple[str, ...], environment: str | None, token_file: str | None, ca_file: str | None) -> _Where:
    """The relays that were named, by URL or by their environment; contacts nobody."""
    from orchestrator.environment import environment_path, load_environment
    from orchestrator.plan import PlannedRelay
    from orchestrator.sending import open_relay, relays_of
    from relay.client import RelayClient, tls_from, token_from

    if environment is not None:
        if urls or token_file or ca_file:
            raise UsageError("give relays by --environment, or by --relay with its token and CA, not both")
        loaded = load_environment(environment_path(environment))
        relays = relays_of(loaded)
        return _Where(relays, {one.name: open_relay(one) for one in relays}, len(loaded.value.machines))
    if not urls:
        raise UsageError("no relay is named", hint="Give --relay URL, or --environment NAME")
    token, tls = token_from(token_file), tls_from(ca_file)
    clients = [RelayClient(url, token=token, tls=tls) for url in urls]
    relays = [PlannedRelay(client.url, client.url, "") for client in clients]
    return _Where(relays, {client.url: client for client in clients}, 0)


async def _replicate_all(id: str, version: str, where: _Where, how: _How, depot: str | None) -> _Sent:
    from contextlib import AsyncExitStack

    import msgspec

    from orchestrator.cascade import document_of
    from orchestrator.depot import open_depot
    from orchestrator.sending import parcel, plan_for, send, shipping_from

    clients = where.clients
    if len({client.url for client in clients.values()}) != len(where.relays):
        raise UsageError("a relay is named twice")
    relays = [msgspec.structs.replace(one, limit=how.limit) if how.limit else one for one in where.relays]
    with progress_bars() as bar:
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(open_depot(depot_location(depot)))
            for client in clients.values():
                await stack.enter_async_context(client)
            what = await parcel(opened, package_ref(id, version))
            shipping = await stack.enter_async_context(shipping_from(opened))
            shipping = replace(shipping, force=how.force, explains=how.explains)
            if how.dry_run:
                explained, failed = await plan_for(opened, what, relays, clients, shipping)
                documents = [_planned(one, clients[one.name].url, what) for one in relays if one.name not in failed]
                replans: list[str] = []
            else:
                if how.exact:
                    # Engines may be here that were not when it was added: then less has to be sent.
                    await opened.recipe(what.manifest)
                    shipping = replace(shipping, nupkgs=opened.nupkgs)
                done = await send(opened, what, relays, clients, shipping, bar=bar, patience=how.patience)
                documents = [document_of(one) for one in done.delivered]
                failed = dict(done.failed)
                explained = {one.relay: one.sent.explained for one in done.delivered if one.sent and one.sent.explained}
                replans = [str(one) for one in done.replans]
            for document in documents:
                if (arithmetic := explained.get(document["name"])) is not None:
                    document["explained"] = await _explained(opened, what, arithmetic, where.machines)
    return _Sent(documents, {clients[name].url: error for name, error in failed.items()}, replans)


def _planned(relay: PlannedRelay, url: str, what: Parcel) -> dict[str, Any]:
    return {
        "relay": url,
        "name": relay.name,
        "source": relay.upstream,
        "package_bytes": what.manifest.nupkg.size,
    }


async def _explained(depot: Depot, what: Parcel, explained: Explained, machines: int) -> dict[str, Any]:
    from orchestrator.alternatives import alternatives
    from orchestrator.explaining import document_of

    base = next((one for one in what.known if str(one.package.version) == explained.base_version), None)
    others = await alternatives(depot, what.manifest, base, machines)
    return document_of(explained, what.manifest.nupkg.size, others)


def _added(result: Added) -> dict[str, Any]:
    return pointer_document(result.pointer) | {
        "new": result.new,
        "chunks": len(result.manifest.chunks),
        "chunks_stored": result.chunks_stored,
    }


def pointer_document(pointer: Pointer) -> dict[str, Any]:
    return {
        "id": pointer.id,
        "version": pointer.version,
        "manifest": f"sha256:{pointer.manifest}",
        "nupkg_sha256": pointer.nupkg_sha256,
        "size": pointer.size,
        "published": pointer.published,
        "provenance": {
            "how": pointer.provenance.how,
            "source": pointer.provenance.source,
            "verified_by": pointer.provenance.verified_by,
        },
    }


def package_ref(id: str, version: str) -> PackageRef:
    """What was typed as ID VERSION. Raises `UsageError`."""
    from relay.content.identity import NuGetVersion, PackageId, PackageRef

    try:
        return PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
    except IdentityError as error:
        raise UsageError(error.message) from error


from orchestrator.comparing_cli import diff, lint  # noqa: E402 - they hang on the group above
from orchestrator.nupkg_cli import fetch, show  # noqa: E402

package.add_command(diff)
package.add_command(lint)
package.add_command(show)
package.add_command(fetch)
