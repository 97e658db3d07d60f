"""`waystation package replicate`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands.options import RATE, SECONDS, depot_location, depot_option, package_ref
from relay.errors import UsageError
from relay.support.console import (
    ca_file_option,
    json_option,
    print_json,
    progress_bars,
    run,
    say,
    share,
    size,
    table,
    token_file_option,
)

if TYPE_CHECKING:
    from orchestrator.replication.replicate_package import Replication, Targets
    from relay.encoding.planner import Prefer


@click.command(
    epilog="Example: waystation package replicate Acme.Web 1.4.2 --relay https://relay.fra.example:7443 "
    "--relay https://relay.iad.example:7443"
)
@click.argument("id")
@click.argument("version")
@click.option(
    "--relay",
    "relays",
    multiple=True,
    metavar="URL",
    help="A relay to send to; may be repeated. One is needed, or an environment.",
)
@click.option(
    "--environment",
    "-e",
    metavar="NAME|FILE",
    help="To every relay of this environment, with the token and authority that stand there.",
)
@click.option(
    "--patience",
    type=SECONDS,
    default=60.0,
    show_default=True,
    metavar="TIME",
    help="How long a relay may be away in mid-transfer: seconds, or such as 2m. One that is silent for less than 5 s may be busy.",
)
@click.option(
    "--encoding",
    metavar="NAME[:LEVEL]",
    help="Use this one, whatever is planned: raw, zstd, zstd-prefix or hdiff, with zstd's level from 1 to 19 (without it "
    "3, of hdiff 19). A difference where there is nothing to build on goes as zstd.",
)
@click.option(
    "--limit",
    type=RATE,
    metavar="RATE",
    help="At most so much to each relay, such as 50Mbit, or a number in Mbit/s, in place of the environment's limit.",
)
@click.option(
    "--prefer",
    type=click.Choice(["bytes", "time"]),
    metavar="bytes|time",
    help="Of encodings that are about as fast: the fewest bytes where times are within 10 %, or what is there first, in "
    "place of what the environment prefers. [default: bytes]",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Send, and show what was reckoned for relays that are sent to from here, and what other ways would have cost.",
)
@click.option("--dry-run", is_flag=True, help="Ask what is missing, show what would be sent and why, and send nothing.")
@click.option(
    "--exact",
    is_flag=True,
    help="Also send what a relay lacks to serve the identical nupkg without a parent: the bytes that no encoder makes, or "
    "the whole file where it lacks an encoder. Not to relays that fetch from others: name a parent there.",
)
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
    prefer: Prefer | None,
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
    from orchestrator.replication.replicate_package import plan_replication, replicate_package
    from relay.encoding.codecs import Coding

    coding = None if encoding is None else Coding.parse(encoding)
    targets = _targets(relays, environment, token_file, ca_file).told(limit, prefer)
    location, ref = depot_location(depot), package_ref(id, version)
    with progress_bars() as bar:
        if dry_run:
            work = plan_replication(location, ref, targets, coding)
        else:
            work = replicate_package(
                location, ref, targets, bar, patience=patience, encoding=coding, explains=explain, exact=exact
            )
        done = run(work)
    documents = _documents(done, targets, dry_run=dry_run)
    if as_json:
        failed = [{"relay": url, "error": error.message} for url, error in done.failed.items()]
        head = {"format": 1, "id": id, "version": version}
        more = {"dry_run": True} if dry_run else {"saved": _saved(documents, targets.machines)}
        print_json(head | more | {"relays": documents, "failed": failed, "replans": done.replans})
    else:
        _print_replication(done, documents, dry_run=dry_run)
    return 1 if done.failed else 0


def _targets(urls: tuple[str, ...], environment: str | None, token_file: str | None, ca_file: str | None) -> Targets:
    """The relays that were named, by URL or by their environment."""
    from orchestrator.files.environment import environment_path, load_environment
    from orchestrator.replication.replicate_package import Targets
    from relay.protocol.credentials import tls_from, token_from

    if environment is not None:
        if urls or token_file or ca_file:
            raise UsageError("give relays by --environment, or by --relay with its token and CA, not both")
        return Targets.of_environment(load_environment(environment_path(environment)))
    if not urls:
        raise UsageError("no relay is named", hint="Give --relay URL, or --environment NAME")
    return Targets.of_urls(urls, token_from(token_file), tls_from(ca_file))


def _documents(done: Replication, targets: Targets, *, dry_run: bool) -> list[dict[str, Any]]:
    """One for each relay that did not fail."""
    from orchestrator.replication import explain_text
    from orchestrator.replication.cascade import document_of

    if dry_run:
        urls = [(relay, targets.clients[relay.name].url) for relay in targets.relays]
        documents: list[dict[str, Any]] = [
            {"relay": url, "name": relay.name, "source": relay.upstream, "package_bytes": done.nupkg_bytes}
            for relay, url in urls
            if url not in done.failed
        ]
    else:
        documents = [document_of(one) for one in done.delivered]
    for document in documents:
        if document["name"] in done.arithmetic:
            explained, others = done.arithmetic[document["name"]]
            document["explained"] = explain_text.document_of(explained, done.nupkg_bytes, others)
    return documents


def _saved(relays: list[dict[str, Any]], machines: int) -> dict[str, int | None]:
    """Bytes against the whole nupkg to each of these relays, and (where they are known) to each machine behind them."""
    crossed = sum(one["wire_bytes"] for one in relays)
    nupkg = max((one["package_bytes"] for one in relays), default=0)
    return {
        "whole_file": nupkg * len(relays) - crossed,
        "per_machine": nupkg * machines - crossed if machines else None,
    }


def _print_replication(done: Replication, documents: list[dict[str, Any]], *, dry_run: bool) -> None:
    from orchestrator.replication.explain_text import text_of

    for one in documents:
        if "explained" in one:
            say(*text_of(one["relay"], one["explained"], one["package_bytes"]).split("\n"))
        elif dry_run:
            say(f"{one['relay']}: fetches from {one['source']}")
    rows = [
        [
            r["relay"],
            r["source"] or "origin",
            f"{r['chunks_sent']} of {r['chunks']}",
            ", ".join(entry["encoding"] for entry in r["encodings"]) or "nothing",
            size(r["wire_bytes"]),
            share(r["wire_bytes"], r["package_bytes"]),
            f"{r['seconds']:.1f} s",
        ]
        for r in ([] if dry_run else documents)
    ]
    if rows:
        headers = ["relay", "from", "chunks sent", "as", "on the wire", "of the nupkg", "took"]
        say(*table(headers, rows, right=frozenset({4, 5, 6})).split("\n"))
    for r in documents:
        if r.get("fallbacks"):
            say(f"{r['relay']}: {r['fallbacks']} runs were refused as deltas and went plainly", aside=True)
    for replan in done.replans:
        say(replan, aside=True)
    for url, error in done.failed.items():
        say(f"{url}: {error}", aside=True)
