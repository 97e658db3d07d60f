"""`waystation rotation …`"""

from __future__ import annotations

import click

from orchestrator.commands.options import (
    DONE,
    FAILED,
    answer,
    check_installed,
    journal_option,
    open_journal,
    paths_of,
    time_text,
)
from relay.support.console import json_option, print_json, printable, run, table


@click.group()
def rotation() -> None:
    """Machines that are out of their load balancer."""


@rotation.command(name="list", epilog="Example: waystation rotation list")
@click.option("--environment", "-e", metavar="NAME", help="Only of this environment.")
@journal_option
@json_option
def list_(environment: str | None, journal: str | None, as_json: bool) -> None:
    """List machines whose bracket is open: `before` was begun, and no `after` ended well since."""
    from orchestrator.journal.views import open_brackets

    with open_journal(paths_of(journal=journal)) as opened:
        found = open_brackets(opened.brackets(environment))
    rows = [[b.machine, b.rotation, b.environment, time_text(b.since), b.label, b.owner] for b in found]
    heads = ["machine", "rotation", "environment", "out since", "opened by", "deployment"]
    answer({"format": 1, "open": found}, table(heads, rows) if rows else "no machine is out", as_json=as_json)


@rotation.command(epilog="Example: waystation rotation close web2 --environment production")
@click.argument("machine")
@click.option("--environment", "-e", metavar="NAME", help="Where several environments have an open one.")
@click.option("--by-hand", is_flag=True, help="Run nothing: you have put it back yourself.")
@click.option("-m", "--message", default="", help="Why, for the record.")
@journal_option
@json_option
def close(
    machine: str, environment: str | None, by_hand: bool, message: str, journal: str | None, as_json: bool
) -> int:
    """Put MACHINE back: run its rotation's `after` with OUTCOME=put_back, and note that it is in again."""
    check_installed()
    from orchestrator.deployment.recovery import close_bracket

    paths = paths_of(journal=journal)
    with open_journal(paths) as opened:
        name, failed = run(close_bracket(paths, opened, machine, environment, by_hand=by_hand, message=message))
    if as_json:
        print_json({"format": 1, "machine": machine, "closed": not failed, "reason": failed})
    elif not failed:
        click.echo(f"{machine} is back in {name}")
    else:
        click.echo(f"{machine} could not be put back: {printable(failed)}", err=True)
    return FAILED if failed else DONE
