"""`waystation init`"""

from __future__ import annotations

import os

import click

from orchestrator.commands.options import answer
from relay.support.console import json_option


@click.command(epilog="Example: waystation init")
@click.argument("folder", default=".", type=click.Path(file_okay=False))
@json_option
def init(folder: str, as_json: bool) -> None:
    """Write commented files to start from: a process, an environment, scripts. Never overwrites one."""
    from orchestrator.files.scaffold import write_scaffold

    written = write_scaffold(folder)
    lines = [f"wrote {path}" for path in written]
    lines.append("Edit them, then: waystation release plan --environment production --package web=1.0.0")
    document = {"format": 1, "folder": os.path.abspath(folder), "written": written}
    answer(document, "\n".join(lines), as_json=as_json)
