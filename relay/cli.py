"""`waystation relay …`"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import click

from relay.audit.log import Form, log_options, log_to_stderr
from relay.config import Peer, RelayConfig, home
from relay.errors import UsageError
from relay.support.console import ca_file_option, json_option, print_json, run, say, size, token_file_option


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
    help="Where packages are kept: disk:/absolute/path, a path, s3://bucket/prefix, or memory:. [default: relay in $WAYSTATION_HOME]",
)
@click.option("--site", metavar="NAME", help="What DNS calls this place.")
@click.option(
    "--parent",
    metavar="URL",
    help="The relay to take from what an identical nupkg needs and is not here; with the token and authority of the same "
    "URL in relay.yaml.",
)
@log_options
def serve(
    config_file: str | None, log_level: str, log_format: Form | None, parent: str | None, **options: str | None
) -> None:
    """Serve until SIGTERM, then let running requests end. SIGHUP: read the configuration again.

    Prints one line with its URL when it is ready. Without tokens in its configuration it listens on loopback only.
    """
    import signal

    # One that comes before there is anything to reload must not end the relay: the file is read below.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from relay.server.app import serve as serve_relay
    from relay.server.metrics import merged

    given = {key: value for key, value in options.items() if value is not None}

    def again() -> RelayConfig:
        return _relay_config(config_file, given, parent)

    first = _relay_config(config_file, given, parent)
    with log_to_stderr(log_level, log_format, merged):
        run(serve_relay(first, lambda url: say(f"relay ready at {url}"), again=again))


def _relay_config(config_file: str | None, given: dict[str, Any], parent: str | None) -> RelayConfig:
    """What the file says now, with the options that win over it. Raises `UsageError`."""
    import msgspec

    config = _read_config(config_file) if config_file else RelayConfig()
    values: dict[str, Any] = {"store": config.store or f"disk:{os.path.join(home(), 'relay')}"} | given
    if parent is not None:
        # With the token and CA of the same relay, where the file names it.
        named = [peer for peer in (config.parent, *config.peers) if peer is not None and peer.url == parent]
        values["parent"] = named[0] if named else Peer(parent)
    return msgspec.structs.replace(config, **values)


def _read_config(path: str) -> RelayConfig:
    """relay.yaml, with every mistake of it that can be told without serving. Raises `PlanError`."""
    from relay.server.app import wrong_settings
    from relay.written.decode import fit_with_stand_ins
    from relay.written.yaml_positions import load_settings

    found = fit_with_stand_ins(load_settings(path), RelayConfig)
    told = {mistake.path.partition(".")[0].partition("[")[0] for mistake in found.mistakes}
    wrong = [found.at(*key).mistake(text) for key, text in wrong_settings(found.value) if key[0] not in told]
    return replace(found, mistakes=tuple(sorted((*found.mistakes, *wrong), key=lambda one: one.line))).checked().value


@relay.command(
    epilog="Example: waystation relay token agent --agent web7 --config /etc/waystation/relay.yaml --output web7.token"
)
@click.argument("scopes", metavar="SCOPE...", nargs=-1, required=True)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Add the token's hash to this relay.yaml; without it, the entry is printed on standard error.",
)
@click.option(
    "--output",
    metavar="FILE",
    help="Write the token there in place of printing it: for its owner alone, or with the mode of the file that it replaces.",
)
@click.option("--days", default=90, show_default=True, help="Life of the token, 1 to 90.")
@click.option("--name", default="", help="For people: whose it is.")
@click.option("--agent", default="", metavar="NAME", help="The only agent that may poll and report with it.")
def token(
    scopes: tuple[str, ...], config_file: str | None, output: str | None, days: int, name: str, agent: str
) -> None:
    """Make a bearer token. It is printed once, on standard output; only its hash is kept.

    SCOPE is one or more of: read (packages), write (packages, implies read), agent (poll and report, implies read),
    order (post orders, read reports).
    """
    from datetime import UTC, datetime

    import msgspec
    import yaml

    from relay.server.http.tokens import append_token, make_token
    from relay.support.private_files import close_to_others, write_private_text

    if output and not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise UsageError(f"--output {output}: there is no such folder")
    text, record = make_token(scopes, datetime.now(UTC), days, name, agent)
    if config_file:
        append_token(config_file, record)
        say(f"added to {config_file}; a running relay reads it at SIGHUP (systemctl reload)", aside=True)
    else:
        say("put this into relay.yaml:", aside=True)
        say(*yaml.safe_dump({"tokens": [msgspec.to_builtins(record)]}, sort_keys=False).split("\n"), aside=True)
    if output:
        write_private_text(output, text)
        say(f"the token is in {output}", aside=True)
    else:
        close_to_others(sys.stdout.fileno())
        say(text)


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
    told = document["reason"].removeprefix(f"{document['status']}: ")
    reason = f" ({told})" if told else ""
    say(f"{document['relay']}: {document['status']}{reason}{site}")
    for words in document["warnings"]:
        say(f"  warning: {words}")
    for entry in document["packages"]:
        say(f"  {entry['id']} {entry['version']}  {size(entry['size'])}")


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
        "status": "low on space" if health.status == "ok" and health.space == "low" else health.status,
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
