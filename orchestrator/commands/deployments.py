"""`waystation release deploy`, `stage`, `retry` and `rollback`: what runs a release in an environment."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options
from orchestrator.commands.options import (
    CANCELLED,
    DONE,
    FAILED,
    WAITS,
    WITH_EXCLUSIONS,
    check_installed,
    depot_option,
    journal_option,
    keys_option,
    open_journal,
    paths_of,
    person_option,
    trust_option,
)
from orchestrator.commands.watch import behind_lines, bracket_line, left_lines
from relay.errors import UsageError
from relay.support.console import json_option, print_json, progress_bars, run, say

if TYPE_CHECKING:
    from orchestrator.deployment.deployment import Result
    from orchestrator.deployment.setup import DeployRequest, RetryRequest
    from orchestrator.files.environment import EnvironmentFile
    from orchestrator.files.process import ProcessFile
    from orchestrator.journal.journal import Journal
    from orchestrator.journal.recorder import Tell
    from orchestrator.journal.views import DeploymentView
    from orchestrator.paths import Paths
    from orchestrator.plan.leave_out import Selection
    from orchestrator.plan.plan import Plan
    from relay.support.progress import Bar


_leave_out_options = options.together(
    click.option(
        "--exclude",
        multiple=True,
        metavar="SELECTOR",
        help="Leave out machines: NAME, site:NAME, role:NAME or tag:KEY=VALUE; may be repeated. With -m.",
    ),
    click.option(
        "--only",
        multiple=True,
        metavar="SELECTOR",
        help="Leave out all machines but these; the same words. With -m.",
    ),
    click.option("-m", "--message", default="", help="Why machines are left out, for the record."),
)
_adopt_option = click.option(
    "--adopt",
    is_flag=True,
    help="Answer for machines that an earlier deployment left out of rotation, and take over from another "
    "orchestrator's deployment that has not ended.",
)
_take_over_option = click.option(
    "--adopt", is_flag=True, help="Take over from another orchestrator's deployment that has not ended."
)
_project_option = click.option("--project", help="Where several projects have this label. [default: the process's]")
_what_runs = options.together(
    options.environment_option,
    options.package_option,
    options.variable_option,
    options.process_option,
    _project_option,
    _leave_out_options,
)
_places = options.together(
    click.option(
        "--wait/--no-wait",
        "waits",
        default=True,
        help="Wait for people as long as they take; or leave with exit code 3 once nothing else is to be done. "
        "[default: wait]",
    ),
    depot_option,
    person_option,
    keys_option,
    trust_option,
    journal_option,
    json_option,
)


@click.command(
    epilog="Examples: waystation release deploy 1.4.2 --environment production; "
    "waystation release deploy 1.4.2 -e production --exclude web7 --exclude site:iad -m 'new kernel'"
)
@click.argument("label")
@_what_runs
@_adopt_option
@click.option("--force", is_flag=True, help="Give every machine its turn, also where all of it was done before.")
@_places
def deploy(
    label: str,
    environment: str,
    versions: dict[str, str],
    prompts: dict[str, str],
    process_path: str,
    project: str | None,
    exclude: tuple[str, ...],
    only: tuple[str, ...],
    message: str,
    adopt: bool,
    force: bool,
    waits: bool,
    depot: str | None,
    person: str | None,
    keys_folder: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Run release LABEL in an environment; with --package it is created first.

    Where a deployment of LABEL did not end there, it goes on. Ctrl-C once: nothing new starts, machines in flight come to
    their end. Twice, or a terminal that closes: leave now; `release resume` goes on.
    Exit codes: 0 done, 1 failed, 2 mistakes in files, 3 waits for people, 4 locked, 5 done but for some machines,
    130 cancelled.
    """
    paths = _paths(depot, trust_folder, journal, person, keys_folder)
    from orchestrator.deployment.setup import DeployRequest
    from orchestrator.releases.what_differs import Files

    selection = _selection(exclude, only, message)
    process, where = _files(process_path, environment, has_versions=bool(versions))
    project = project or (process.value.project if process else None)
    request = DeployRequest(
        label, project, where, prompts, adopt, force, "deploy", selection, waits, Files(process_path, where.name)
    )
    return _create_and_run(paths, process, versions, request, as_json=as_json)


@click.command(epilog="Example: waystation release stage 1.4.2 --environment production --package web=1.4.2")
@click.argument("label")
@_what_runs
@_take_over_option
@_places
def stage(
    label: str,
    environment: str,
    versions: dict[str, str],
    prompts: dict[str, str],
    process_path: str,
    project: str | None,
    exclude: tuple[str, ...],
    only: tuple[str, ...],
    message: str,
    adopt: bool,
    waits: bool,
    depot: str | None,
    person: str | None,
    keys_folder: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Bring release LABEL onto every machine, and stop before its first step; a later deploy moves no bytes.

    What pre_acquire opens is undone at the end, and opened again by the deploy. Exit codes as those of deploy.
    """
    paths = _paths(depot, trust_folder, journal, person, keys_folder)
    from orchestrator.deployment.setup import DeployRequest
    from orchestrator.releases.what_differs import Files

    selection = _selection(exclude, only, message)
    process, where = _files(process_path, environment, has_versions=bool(versions))
    project = project or (process.value.project if process else None)
    request = DeployRequest(
        label, project, where, prompts, adopt, False, "stage", selection, waits, Files(process_path, where.name)
    )
    return _create_and_run(paths, process, versions, request, as_json=as_json)


@click.command(
    epilog="Examples: waystation release rollback --environment production; "
    "waystation release rollback -e production --to 1.4.0"
)
@options.environment_option
@click.option("--to", "label", metavar="LABEL", default="", help="[default: the last that was good before this one]")
@options.variable_option
@options.process_option
@_project_option
@_leave_out_options
@_take_over_option
@_places
def rollback(
    environment: str,
    label: str,
    prompts: dict[str, str],
    process_path: str,
    project: str | None,
    exclude: tuple[str, ...],
    only: tuple[str, ...],
    message: str,
    adopt: bool,
    waits: bool,
    depot: str | None,
    person: str | None,
    keys_folder: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Go back to the release that was good before: with its strategy and rotations, on trees that are still there.

    Says first what the steps on the server do on the way back (on_rollback), and refuses where one says refuse. Machines
    that are out of rotation are answered for. Exit codes as those of deploy.
    """
    paths = _paths(depot, trust_folder, journal, person, keys_folder)
    from orchestrator.deployment.setup import DeployRequest
    from orchestrator.releases.what_differs import Files

    selection = _selection(exclude, only, message)
    process, where = _files(process_path, environment, has_versions=False)
    project = project or (process.value.project if process else None)
    request = DeployRequest(
        label, project, where, prompts, adopt, False, "rollback", selection, waits, Files(process_path, where.name)
    )
    return _create_and_run(paths, None, {}, request, as_json=as_json)


@click.command(
    epilog="Examples: waystation release retry --failed; waystation release retry --machine job1 --environment production"
)
@click.argument("deployment", required=False)
@click.option("--failed", is_flag=True, help="All machines that failed, were left out, or never started.")
@click.option("--machine", "machines", metavar="NAME", multiple=True, help="Just this one; may be repeated.")
@click.option("--environment", "-e", metavar="NAME", help="The newest deployment there. [default: the newest of all]")
@_take_over_option
@_places
def retry(
    deployment: str | None,
    failed: bool,
    machines: tuple[str, ...],
    environment: str | None,
    adopt: bool,
    waits: bool,
    depot: str | None,
    person: str | None,
    keys_folder: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Go on with DEPLOYMENT on machines that are not through, by a new deployment of its plan as it was frozen.

    Steps on the server that were done are not repeated. Brackets that are open on these machines are answered for. Exit
    codes as those of deploy: 5 where machines are still left.
    """
    paths = _paths(depot, trust_folder, journal, person, keys_folder)
    from orchestrator.deployment.setup import RetryRequest

    if failed == bool(machines):
        raise UsageError("say which machines: --failed, or --machine NAME", hint="One of the two")
    with open_journal(paths) as opened, progress_bars() as bar:
        return _run(paths, opened, RetryRequest(deployment, environment, machines, adopt, waits), bar, as_json=as_json)


@click.command(epilog="Example: waystation release resume --environment production")
@click.argument("deployment", required=False)
@click.option("--environment", "-e", metavar="NAME", help="The one there that did not end.")
@options.process_option
@_take_over_option
@_places
def resume(
    deployment: str | None,
    environment: str | None,
    process_path: str,
    adopt: bool,
    waits: bool,
    depot: str | None,
    person: str | None,
    keys_folder: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Go on with a deployment whose process died, or was left.

    DEPLOYMENT is its ULID; without it, the only one that did not end. It goes on by what was frozen when it began: files
    that were edited since are named and do not count, and nothing that was done is done twice. Exit codes as those of
    deploy.
    """
    paths = _paths(depot, trust_folder, journal, person, keys_folder)
    from orchestrator.deployment.deployment import resume as start
    from orchestrator.locks.status import the_unfinished
    from orchestrator.releases.what_differs import Files

    tell, files = _timed(aside=as_json), Files(process_path)
    with open_journal(paths) as opened, progress_bars() as bar:
        ulid = the_unfinished(opened, deployment, environment)
        return _in_foreground(
            paths,
            opened,
            lambda begun: start(
                paths, opened, ulid, begun=begun, tell=tell, bar=bar, waits=waits, adopt=adopt, files=files
            ),
            as_json=as_json,
        )


# --- what they share


def _paths(
    depot: str | None, trust_folder: str | None, journal: str | None, person: str | None, keys_folder: str | None
) -> Paths:
    check_installed()
    return paths_of(depot, trust_folder, journal, person, keys_folder)


def _selection(exclude: tuple[str, ...], only: tuple[str, ...], message: str) -> Selection:
    from orchestrator.plan.leave_out import Selection

    if (exclude or only) and not message.strip():
        raise UsageError("machines are left out for a reason", hint="Give it with -m, for the record")
    if message.strip() and not (exclude or only):
        raise UsageError("-m says why machines are left out, and none is", hint="Name them with --exclude or --only")
    return Selection(exclude, only, message.strip())


def _files(process_path: str, environment: str, *, has_versions: bool) -> tuple[ProcessFile | None, EnvironmentFile]:
    """The process (where it is read at all) and the environment. Raises `PlanError`."""
    from orchestrator.files.environment import check_both, environment_path, load_environment, read_both

    where_path = environment_path(environment)
    if not has_versions and not os.path.exists(process_path):
        return None, load_environment(where_path)
    process, where = read_both(process_path, where_path)
    if not has_versions:
        # The release has a process of its own: this one only says of which project it is.
        check_both(process, where)
    return process, where


def _create_and_run(
    paths: Paths, process: ProcessFile | None, versions: dict[str, str], request: DeployRequest, *, as_json: bool
) -> int:
    from orchestrator.deployment.setup import goes_on
    from orchestrator.releases.create_release import create_release

    with open_journal(paths) as opened, progress_bars() as bar:
        if versions and process is not None and not goes_on(opened, request, versions):
            run(
                create_release(
                    paths,
                    opened,
                    request.label,
                    process,
                    versions,
                    environment=request.environment,
                    prompts=request.prompts,
                    bar=bar,
                    tell=_timed(aside=True),
                )
            )
        return _run(paths, opened, request, bar, as_json=as_json)


def _run(paths: Paths, journal: Journal, request: DeployRequest | RetryRequest, bar: Bar, *, as_json: bool) -> int:
    from orchestrator.deployment.deployment import deploy as start

    tell = _timed(aside=as_json)
    return _in_foreground(
        paths, journal, lambda begun: start(paths, journal, request, begun=begun, tell=tell, bar=bar), as_json=as_json
    )


def _timed(*, aside: bool) -> Tell:
    """Prints lines, each with the seconds since now."""
    began = time.monotonic()
    return lambda line: say(f"{time.monotonic() - began:7.1f} s  {line}", aside=aside)


Start = Callable[[Callable[[str, "Plan"], None]], Coroutine[Any, Any, tuple[str, "Result"]]]
"""Begins or takes up a deployment; what it is given is called once it stands in the journal."""


def _in_foreground(paths: Paths, journal: Journal, start: Start, *, as_json: bool) -> int:
    """Run it here, and say how it ended."""
    from orchestrator.locks.status import deployment_view

    ulid, result = run(_under_signals(paths, journal, start, aside=as_json))
    view = deployment_view(journal, ulid)
    if as_json:
        print_json(view)
    else:
        _tell_end(view, result)
    return _exit_code(result)


async def _under_signals(paths: Paths, journal: Journal, start: Start, *, aside: bool) -> tuple[str, Result]:
    """A signal is a decision like any other; the second one, and a terminal that closes, leave as things are."""
    from orchestrator.people.sign import decide
    from orchestrator.people.statement import Cancel

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
        decide(journal, paths, running[0], Cancel())
        say("cancelling: machines in flight come to their end; once more leaves now", aside=True)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, task.cancel)
    try:
        return await start(begun)
    except asyncio.CancelledError:
        if running:
            say(f"left as it is: 'waystation release resume {running[0]}' goes on with it", aside=True)
        raise KeyboardInterrupt from None


def _tell_end(view: DeploymentView, result: Result) -> None:
    from orchestrator.replication.ledger_text import brief

    for line in brief(view.ledger):
        say(line)
    for bracket in view.brackets:
        say(f"still out: {bracket_line(bracket)}", aside=True)
    for line in behind_lines(view):
        say(line, aside=True)
    if result.state == "waiting":
        say(f"it waits for people; then 'waystation release resume {view.summary.deployment}' goes on", aside=True)
    if result.left:
        say(f"not deployed: {', '.join(result.left)}", aside=True)
    for line in left_lines(view):
        say(line, aside=True)


def _exit_code(result: Result) -> int:
    if result.state == "waiting":
        return WAITS
    if result.state == "cancelled":
        return CANCELLED
    if result.state == "failed":
        return FAILED
    return WITH_EXCLUSIONS if result.left or result.excluded else DONE
