"""`waystation init`"""

from __future__ import annotations

import os

import click

from relay.support.console import json_option, print_json


@click.command(epilog="Example: waystation init")
@click.argument("folder", default=".", type=click.Path(file_okay=False))
@json_option
def init(folder: str, as_json: bool) -> None:
    """Write commented files to start from: a process, an environment, scripts. Never overwrites one."""
    from orchestrator.files.scaffold import write_scaffold

    written = write_scaffold(folder)
    if as_json:
        print_json({"format": 1, "folder": os.path.abspath(folder), "written": written})
        return
    for path in written:
        click.echo(f"wrote {path}")
    click.echo("Edit them, then: waystation release plan --environment production --package web=1.0.0")
