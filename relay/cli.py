"""`waystation relay …`"""

from __future__ import annotations

import os
from typing import Any

import click

from relay.config import Peer, RelayConfig, home, load_yaml
from relay.errors import UsageError
from relay.support.console import ca_file_option, json_option, print_json, printable, run, size, token_file_option


@click.group()
def relay() -> None:
    """The cache in one datacenter or office: it stores, serves, and is never trusted."""


@relay.command(epilog="Example: waystation relay serve --config /etc/waystation/relay.yaml")
@click.option("--config", "config_file", metavar="FILE", help="relay.yaml; options given here win over it.")
@click.option(
    "--listen", metavar="HOST:PORT", help="Where to listen; port 0 takes a free one. [default: 127.0.0.1:7400]"
)
@click.option(
    "--store",
    metavar="LOCATION",
    help="Where packages are kept: disk:/absolute/path, a path, or memory:. [default: relay in $WAYSTATION_HOME]",
)
@click.option("--site", metavar="NAME", help="What DNS calls this place.")
@click.option(
    "--parent",
    metavar="URL",
    help="The relay to take from what an identical nupkg needs and is not here; with the token and authority of the same "
    "URL in relay.yaml.",
)
@click.option("--log-level", default="warning", show_default=True, help="debug, info, warning or error.")
def serve(config_file: str | None, log_level: str, parent: str | None, **options: str | None) -> None:
    """Serve until SIGTERM, then let running requests end. SIGHUP: read the configuration again.

    Prints one line with its URL when it is ready. Without tokens in its configuration it listens on loopback only.
    """
    import logging
    import signal

    # One that comes before there is anything to reload must not end the relay: the file is read below.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from relay.server.app import serve as serve_relay

    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise UsageError(f"--log-level {log_level!r}: expected debug, info, warning or error")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    given = {key: value for key, value in options.items() if value is not None}

    def again() -> RelayConfig:
        if config_file and not os.path.getsize(config_file):
            # An editor's or a tool's first step: without tokens, all callers would be locked out.
            raise UsageError(f"{config_file} is empty")
        return _relay_config(config_file, given, parent)

    first = _relay_config(config_file, given, parent)
    run(serve_relay(first, lambda url: click.echo(f"relay ready at {url}"), again=again))


def _relay_config(config_file: str | None, given: dict[str, Any], parent: str | None) -> RelayConfig:
    """What the file says now, with the options that win over it. Raises `UsageError`."""
    import msgspec

    config: RelayConfig = load_yaml(config_file, RelayConfig) if config_file else RelayConfig()
    values: dict[str, Any] = {"store": config.store or f"disk:{os.path.join(home(), 'relay')}"} | given
    if parent is not None:
        # With the token and CA of the same relay, where the file names it.
        named = [peer for peer in (config.parent, *config.peers) if peer is not None and peer.url == parent]
        values["parent"] = named[0] if named else Peer(parent)
    return msgspec.structs.replace(config, **values)


@relay.command(
    epilog="Example: waystation relay token read agent --config /etc/waystation/relay.yaml --name fra-agents"
)
@click.argument("scopes", metavar="SCOPE...", nargs=-1, required=True)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Add the token's hash to this relay.yaml; without it, the entry is printed on standard error.",
)
@click.option("--days", default=90, show_default=True, help="Life of the token, 1 to 90.")
@click.option("--name", default="", help="For people: whose it is.")
def token(scopes: tuple[str, ...], config_file: str | None, days: int, name: str) -> None:
    """Make a bearer token. It is printed once, on standard output; only its hash is kept.

    SCOPE is one or more of: read (packages), write (packages, implies read), agent (poll and report, implies read),
    order (post orders, read reports).
    """
    from datetime import UTC, datetime

    import msgspec
    import yaml

    from relay.server.http.tokens import append_token, make_token

    text, record = make_token(scopes, datetime.now(UTC), days, name)
    if config_file:
        append_token(config_file, record)
        click.echo(f"added to {config_file}; a running relay reads it at SIGHUP (systemctl reload)", err=True)
    else:
        click.echo("put this into relay.yaml:", err=True)
        click.echo(yaml.safe_dump({"tokens": [msgspec.to_builtins(record)]}, sort_keys=False), err=True)
    click.echo(text)


@relay.command(epilog="Example: waystation relay status --relay https://relay.fra.example:7443")
@click.option("--relay", "url", required=True, metavar="URL", help="The relay to ask.")
@token_file_option
@ca_file_option
@json_option
def status(url: str, token_file: str | None, ca_file: str | None, as_json: bool) -> None:
    """Ask a relay how it is, and what it holds."""
    document = run(_status(url, token_file, ca_file))
    if as_json:
        print_json(document)
        return
    site = f", site {document['site']}" if document["site"] else ""
    reason = f" ({document['reason']})" if document["reason"] else ""
    click.echo(printable(f"{document['relay']}: {document['status']}{reason}{site}"))
    for words in document["warnings"]:
        click.echo(printable(f"  warning: {words}"))
    for entry in document["packages"]:
        click.echo(f"  {entry['id']} {entry['version']}  {size(entry['size'])}")


async def _status(url: str, token_file: str | None, ca_file: str | None) -> dict[str, Any]:
    from datetime import UTC, datetime

    import msgspec

    from relay.protocol.client import RelayClient
    from relay.protocol.credentials import tls_from, token_from, words_of

    async with RelayClient(url, token=token_from(token_file), tls=tls_from(ca_file)) as client:
        health = await client.health()
        packages = await client.packages()
    return {
        "format": 1,
        "relay": client.url,
        "status": health.status,
        "reason": health.reason,
        "site": health.site,
        "warnings": [words for one in health.endings if (words := words_of(one, datetime.now(UTC)))],
        "endings": [msgspec.to_builtins(one) for one in health.endings],
        "packages": [
            {
                "id": str(p.package.id),
                "version": str(p.package.version),
                "manifest": f"sha256:{p.manifest}",
                "size": p.size,
            }
            for p in packages
        ],
    }
