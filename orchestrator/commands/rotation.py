"""`waystation rotation …`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from orchestrator.commands.options import (
    DONE,
    FAILED,
    answer,
    check_installed,
    journal_option,
    keep_events,
    open_journal,
    paths_of,
    time_text,
    trust_option,
)
from relay.errors import UsageError
from relay.support.console import json_option, print_json, run, say, table

if TYPE_CHECKING:
    from orchestrator.deployment.recovery import Closing


@click.group()
@click.pass_context
def rotation(context: click.Context) -> None:
    """Machines that are out of their load balancer."""
    keep_events(context)


@rotation.command(name="list", epilog="Example: waystation rotation list")
@click.option("--environment", "-e", metavar="NAME", help="Only of this environment.")
@journal_option
@json_option
def list_(environment: str | None, journal: str | None, as_json: bool) -> None:
    """List machines whose bracket is open: `before` was begun, and no `after` ended well since."""
    from orchestrator.locks.status import check_environment

    with open_journal(paths_of(journal=journal)) as opened:
        check_environment(opened, environment)
        found = opened.open_brackets(environment)
    rows = [
        [b.machine, b.rotation, b.environment, time_text(b.since), f"{b.project} {b.label}", b.owner] for b in found
    ]
    heads = ["machine", "rotation", "environment", "out since", "opened by", "deployment"]
    answer({"format": 1, "open": found}, table(heads, rows) if rows else "no machine is out", as_json=as_json)


@rotation.command(epilog="Example: waystation rotation close web2 --environment production")
@click.argument("machine")
@click.option("--environment", "-e", metavar="NAME", help="Where several environments have an open one.")
@click.option("--by-hand", is_flag=True, help="Run and check nothing: you have put it back yourself.")
@click.option(
    "--force",
    is_flag=True,
    help="Put it back whatever its checks say; they are made, briefly. With -m, for the record.",
)
@click.option("-m", "--message", default="", help="Why, for the record.")
@trust_option
@journal_option
@json_option
def close(
    machine: str,
    environment: str | None,
    by_hand: bool,
    force: bool,
    message: str,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Put MACHINE back: make its step's checks, then run its rotation's `after` with OUTCOME=put_back.

    The checks are those of the version that is current there. Where one fails, MACHINE stays out.
    """
    check_installed()
    from orchestrator.deployment.recovery import Word, close_bracket

    if force and not message.strip():
        raise UsageError("--force needs a reason for the record", hint="Give it with -m")
    if force and by_hand:
        raise UsageError("--by-hand checks nothing, so there is nothing to force")
    paths = paths_of(trust=trust_folder, journal=journal)
    with open_journal(paths) as opened:
        word = Word(by_hand=by_hand, force=force, why=message.strip())
        tell = partial(say, aside=True)
        closing = run(close_bracket(paths, opened, machine, environment, word, tell=tell))
    if as_json:
        document = {"format": 1, "machine": machine, "closed": not closing.failed}
        print_json(document | {"reason": closing.failed, "checks": closing.ill})
    else:
        _tell(machine, closing)
    return FAILED if closing.failed else DONE


def _tell(machine: str, closing: Closing) -> None:
    if closing.failed:
        say(f"{machine} could not be put back: {closing.failed}", aside=True)
        if closing.ill:
            say(f"  mend it, deploy again with --adopt, or: rotation close {machine} --force -m WHY", aside=True)
    else:
        although = f", although it is not well: {closing.ill}" if closing.ill else ""
        say(f"{machine} is back in {closing.rotation}{although}")
