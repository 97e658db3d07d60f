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
