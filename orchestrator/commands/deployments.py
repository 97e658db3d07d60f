"""`waystation release deploy …`: what runs a release in an environment."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import click

from orchestrator.commands import options
from orchestrator.commands.options import (
    CANCELLED,
    DONE,
    FAILED,
    WITH_EXCLUSIONS,
    check_installed,
    depot_option,
    journal_option,
    open_journal,
    paths_of,
    trust_option,
)
from orchestrator.commands.watch import behind_lines, bracket_line
from relay.support.console import json_option, print_json, progress_bars, run, say

if TYPE_CHECKING:
    from orchestrator.deployment.deployment import Result
    from orchestrator.deployment.setup import DeployRequest
    from orchestrator.journal.journal import Journal
    from orchestrator.journal.recorder import Tell
    from orchestrator.journal.views import DeploymentView
    from orchestrator.paths import Paths
    from orchestrator.plan.plan import Plan
    from relay.support.progress import Bar


@click.command(epilog="Example: waystation release deploy 1.4.2 --environment production")
@click.argument("label")
@options.environment_option
@options.package_option
@options.variable_option
@options.process_option
@click.option("--project", help="Where several projects have this label. [default: the process's]")
@click.option(
    "--adopt",
    is_flag=True,
    help="Answer for machines that an earlier deployment left out of rotation, and take over from another "
    "orchestrator's deployment that has not ended.",
)
@click.option("--force", is_flag=True, help="Give every machine its turn, also where all of it was done before.")
@depot_option
@trust_option
@journal_option
@json_option
def deploy(
    label: str,
    environment: str,
    versions: dict[str, str],
    prompts: dict[str, str],
    process_path: str,
    project: str | None,
    adopt: bool,
    force: bool,
    depot: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Run release LABEL in an environment; with --package it is created first.

    Ctrl-C once: nothing new starts, machines in flight come to their end. Twice: leave now; what is open is listed.
    Exit codes: 0 done, 1 failed, 2 mistakes in files, 4 locked, 5 done but for some machines, 130 cancelled.
    """
    check_installed()
    from orchestrator.deployment.create_release import create_release
    from orchestrator.deployment.setup import DeployRequest
    from orchestrator.files.environment import check_both, environment_path, load_environment, read_both
    from orchestrator.journal.status import deployment_view

    paths = paths_of(depot, trust_folder, journal)
    where_path, process = environment_path(environment), None
    if versions or os.path.exists(process_path):
        process, where = read_both(process_path, where_path)
        if not versions:
            # The release has a process of its own: this one only says of which project it is.
            check_both(process, where)
    else:
        where = load_environment(where_path)
    tell = _timed(aside=as_json)
    with open_journal(paths) as opened, progress_bars() as bar:
        if versions and process is not None:
            run(
                create_release(
                    paths,
                    opened,
                    label,
                    process,
                    versions,
                    environment=where,
                    prompts=prompts,
                    bar=bar,
                    tell=_timed(aside=True),
                )
            )
        project = project or (process.value.project if process else None)
        request = DeployRequest(label, project, where, prompts, adopt, force)
        ulid, result = run(_deploy(paths, opened, request, tell, bar, aside=as_json))
        if as_json:
            print_json(deployment_view(opened, ulid))
        else:
            _tell_end(deployment_view(opened, ulid), result)
    return _exit_code(result)


def _timed(*, aside: bool) -> Tell:
    """Prints lines, each with the seconds since now."""
    began = time.monotonic()
    return lambda line: say(f"{time.monotonic() - began:7.1f} s  {line}", aside=aside)


async def _deploy(
    paths: Paths, journal: Journal, request: DeployRequest, tell: Tell, bar: Bar, *, aside: bool
) -> tuple[str, Result]:
    """Run it in the foreground; a signal is a decision like any other."""
    from orchestrator.deployment.decisions import CANCEL
    from orchestrator.deployment.deployment import deploy as start
    from orchestrator.paths import operator

    running: list[str] = []

    def begun(ulid: str, plan: Plan) -> None:
        running.append(ulid)
        what = ", ".join(f"{package.id} {package.version}" for package in plan.packages.values())
        say(f"deployment {ulid}: {plan.label} of {plan.project} into {plan.environment} ({what})", aside=aside)
        for note in plan.notes:
            say(f"  {note}", aside=aside)

    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine that runs has one
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals > 1 or not running:
            task.cancel()
            return
        journal.decide(request.environment.value.environment, running[0], CANCEL, {}, operator())
        say("cancelling: machines in flight come to their end; once more leaves now", aside=True)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        return await start(paths, journal, request, begun=begun, tell=tell, bar=bar)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _tell_end(view: DeploymentView, result: Result) -> None:
    from orchestrator.journal.ledger_text import brief

    for line in brief(view.ledger):
        say(line)
    for bracket in view.brackets:
        say(f"still out: {bracket_line(bracket)}", aside=True)
    for line in behind_lines(view):
        say(line, aside=True)
    if result.left:
        say(f"not deployed: {', '.join(result.left)}", aside=True)


def _exit_code(result: Result) -> int:
    if result.state == "cancelled":
        return CANCELLED
    if result.state == "failed":
        return FAILED
    return WITH_EXCLUSIONS if result.left else DONE
