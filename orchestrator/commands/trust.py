"""`waystation trust …`"""

from __future__ import annotations

import os

import click

from orchestrator.commands import options
from orchestrator.commands.options import answer, trust_option
from relay.support.console import json_option


@click.group()
@click.pass_context
def trust(context: click.Context) -> None:
    """Keys: the package key signs what may be installed, the order key what may run."""
    options.keep_events(context)


@trust.command(epilog="Example: waystation trust init")
@trust_option
@json_option
def init(trust_folder: str | None, as_json: bool) -> None:
    """Make the package key, the order key, and trust.json, which every agent pins. Never overwrites a key."""
    from orchestrator.trust.keyring import PINS_FILE, init_trust

    folder = options.trust_folder(trust_folder)
    pins = init_trust(folder)
    path = os.path.join(folder, PINS_FILE)
    document = {
        "format": 1,
        "trust": path,
        "package": [key.fingerprint for key in pins.package],
        "order": [key.fingerprint for key in pins.order],
    }
    text = (
        f"package key  {pins.package[0].fingerprint}\n"
        f"order key    {pins.order[0].fingerprint}\n"
        f"give {path} to every agent: waystation agent init --trust trust.json"
    )
    answer(document, text, as_json=as_json)


@trust.command(epilog="Example: waystation trust person anna")
@click.argument("name")
@click.option("--keys", "keys_folder", metavar="DIR", help="Put the key here. [default: people in the trust folder]")
@click.option(
    "--environment",
    "-e",
    "environments",
    multiple=True,
    metavar="NAME",
    help="Where this person may order and decide; may be repeated. [default: everywhere]",
)
@trust_option
@json_option
def person(
    name: str, keys_folder: str | None, environments: tuple[str, ...], trust_folder: str | None, as_json: bool
) -> None:
    """Make an order key for a person, and name it in trust.json. Never overwrites a key.

    Releases and decisions are signed by it with --as NAME. Agents need the new trust.json only for orders by it.
    """
    from orchestrator.trust.keyring import PINS_FILE, make_person

    folder = options.trust_folder(trust_folder)
    key, path = make_person(folder, name, options.keys_folder(keys_folder), tuple(dict.fromkeys(environments)))
    pins = os.path.join(folder, PINS_FILE)
    document = {
        "format": 1,
        "trust": pins,
        "name": key.name,
        "order": key.fingerprint,
        "environments": list(key.environments or ()),
        "key": path,
    }
    scope = f"in {', '.join(key.environments)}" if key.environments else "in every environment"
    text = f"order key of {key.name}  {key.fingerprint}, {scope}\nprivate key in {path}; {pins} names it"
    answer(document, text, as_json=as_json)
