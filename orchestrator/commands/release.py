"""`waystation release …`"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click
from msgspec import to_builtins

from orchestrator.commands import options
from orchestrator.commands.options import (
    CANCELLED,
    DONE,
    FAILED,
    WITH_EXCLUSIONS,
    answer,
    check_installed,
    depot_option,
    journal_option,
    open_journal,
    paths_of,
    time_text,
    trust_option,
)
from relay.errors import UsageError
from relay.support.console import json_option, print_json, printable, progress_bars, run, say, showing, table

if TYPE_CHECKING:
    from orchestrator.deployment.deployment import Result
    from orchestrator.deployment.setup import DeployRequest
    from orchestrator.journal.journal import ChainReport, Journal
    from orchestrator.journal.recorder import Tell
    from orchestrator.journal.views import DeploymentView, OpenBracket
    from orchestrator.paths import Paths
    from orchestrator.plan.plan import Plan
    from relay.support.progress import Bar


def _pairs(example: str, _context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE, as often as it was typed."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UsageError(
                f"{option.opts[0]} {text!r} is not NAME=VALUE", hint=f"For example {option.opts[0]} {example}"
            )
        if name in pairs:
            raise UsageError(f"{option.opts[0]}: {name} is given twice")
        pairs[name] = value
    return pairs


_process_option = click.option(
    "--process", "process_path", metavar="FILE", default="release.yaml", show_default=True, help="What a release does."
)
_environment_option = click.option(
    "--environment",
    "-e",
    "environment",
    metavar="NAME|FILE",
    required=True,
    help="The environment; NAME is environments/NAME.yaml here.",
)
_package_option = click.option(
    "--package",
    "versions",
    multiple=True,
    callback=functools.partial(_pairs, "web=1.4.2"),
    metavar="NAME=VERSION",
    help="A version of a package of the process; once for each.",
)
_variable_option = click.option(
    "--variable",
    "prompts",
    multiple=True,
    callback=functools.partial(_pairs, "change=CHG123456"),
    metavar="NAME=VALUE",
    help="An answer that the process asks for; may be repeated.",
)


@click.group()
@click.pass_context
def release(context: click.Context) -> None:
    """Releases, and their deployments into environments."""
    options.keep_events(context)


# --- before


@release.command(epilog="Example: waystation release plan --environment production --package web=1.4.2")
@click.argument("label", required=False)
@_environment_option
@_package_option
@_variable_option
@_process_option
@depot_option
@json_option
def plan(
    label: str | None,
    environment: str,
    versions: dict[str, str],
    prompts: dict[str, str],
    process_path: str,
    depot: str | None,
    as_json: bool,
) -> None:
    """Say what a deployment would do, or every mistake in the files. Contacts nobody."""
    from orchestrator.deployment.create_release import plan_release
    from orchestrator.files.environment import environment_path, read_both
    from orchestrator.plan.forecast import describe, document

    process, where = read_both(process_path, environment_path(environment))
    label = label or next(iter(versions.values()), "0")
    made = run(plan_release(options.depot_location(depot), process, where, label, versions, prompts))
    answer(document(made), describe(made), as_json=as_json)


@release.command(epilog="Example: waystation release create 1.4.2 --package web=1.4.2")
@click.argument("label")
@_package_option
@_process_option
@click.option(
    "--environment",
    "-e",
    metavar="NAME|FILE",
    help="Take packages that the depot lacks from this environment's feeds now; without it, when it is deployed.",
)
@_variable_option
@depot_option
@trust_option
@journal_option
@json_option
def create(
    label: str,
    versions: dict[str, str],
    process_path: str,
    environment: str | None,
    prompts: dict[str, str],
    depot: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> None:
    """Freeze and sign the process, its scripts and package versions as LABEL."""
    check_installed()
    from orchestrator.deployment.create_release import create_release
    from orchestrator.files.environment import environment_path, read_both
    from orchestrator.files.process import load_process

    paths = paths_of(depot, trust_folder, journal)
    if environment is None:
        process, where = load_process(process_path), None
    else:
        process, where = read_both(process_path, environment_path(environment))
    with open_journal(paths) as opened, progress_bars() as bar:
        made, new = run(
            create_release(
                paths,
                opened,
                label,
                process,
                versions,
                environment=where,
                prompts=prompts,
                bar=bar,
                tell=_tell_aside,
            )
        )
    packages = {n: {"id": p.id, "version": p.version, "manifest": p.manifest} for n, p in made.packages.items()}
    document = {"format": 1, "project": made.project, "label": made.label, "new": new, "packages": packages}
    lines = [f"release {made.label} of {made.project}" + ("" if new else " was there already, the same")]
    for name, package in made.packages.items():
        there = "" if package.manifest else f"  (from feed {package.feed} when it is deployed)"
        lines.append(f"  {name}: {package.id} {package.version}{there}")
    answer(document, "\n".join(lines), as_json=as_json)


@release.command(epilog="Example: waystation release schema process > release.schema.json")
@click.argument("kind", type=click.Choice(["process", "environment"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a file, for editors that complete and check YAML by one."""
    from orchestrator.files import environment, process

    print_json((process if kind == "process" else environment).json_schema())


# --- the deployment


@release.command(epilog="Example: waystation release deploy 1.4.2 --environment production")
@click.argument("label")
@_environment_option
@_package_option
@_variable_option
@_process_option
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


def _tell_aside(line: str) -> None:
    say(line, aside=True)


def _tell_end(view: DeploymentView, result: Result) -> None:
    from orchestrator.commands.ledger_text import brief

    for line in brief(view.ledger):
        say(line)
    for bracket in view.brackets:
        say(f"still out: {_told(bracket)}", aside=True)
    for line in _behind(view):
        say(line, aside=True)
    if result.left:
        say(f"not deployed: {', '.join(result.left)}", aside=True)


def _exit_code(result: Result) -> int:
    if result.state == "cancelled":
        return CANCELLED
    if result.state == "failed":
        return FAILED
    return WITH_EXCLUSIONS if result.left else DONE


# --- looking


@release.command(epilog="Example: waystation release status --environment production")
@click.argument("deployment", required=False)
@click.option("--environment", "-e", metavar="NAME", help="The newest deployment there. [default: the newest of all]")
@click.option("--watch", is_flag=True, help="Go on until it ends.")
@click.option("--ledger", is_flag=True, help="Show the bytes of each line by encoding.")
@journal_option
@json_option
def status(
    deployment: str | None, environment: str | None, watch: bool, ledger: bool, journal: str | None, as_json: bool
) -> None:
    """Show a deployment: its state, its machines, open brackets, what agents refused, and which bytes crossed which line."""
    check_installed()
    from orchestrator.journal.status import deployment_view, find_deployment

    with open_journal(paths_of(journal=journal)) as opened:
        ulid = find_deployment(opened, deployment, environment)
        view = deployment_view(opened, ulid)
        if watch:
            view = _watched(opened, view, with_ledger=ledger, quiet=as_json)
        answer(view, _shown(view, with_ledger=ledger), as_json=as_json)


def _watched(journal: Journal, view: DeploymentView, *, with_ledger: bool, quiet: bool) -> DeploymentView:
    """Show it until it has ended: below the lines of a terminal, elsewhere as lines, each time that it changed."""
    from orchestrator.journal.status import deployment_view

    board, told = _StatusBoard(), 0
    with showing(board) as is_drawn:
        while view.summary.state == "running":
            board.lines = _shown(view, with_ledger=with_ledger).split("\n")
            if view.last != told and not quiet and not is_drawn:
                say(*board.lines)
            told = view.last
            time.sleep(1.0)
            view = deployment_view(journal, view.summary.deployment)
    return view


class _StatusBoard:
    """A status that stands still on a terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rows(self, width: int, height: int) -> list[str]:  # noqa: ARG002 - the screen cuts what is too much
        return self.lines


@release.command(epilog="Example: waystation release history --environment production")
@click.option("--environment", "-e", metavar="NAME", help="Only of this environment.")
@click.option("--limit", default=20, show_default=True, help="Deployments to show.")
@click.option("--verify", is_flag=True, help="Check that no entry of the journal was changed or removed, instead.")
@click.option(
    "--head", metavar="HASH", help="With --verify: the newest hash of an earlier time; the journal must have it."
)
@journal_option
@json_option
def history(
    environment: str | None, limit: int, verify: bool, head: str | None, journal: str | None, as_json: bool
) -> int:
    """List deployments, the newest first.

    Exit code of --verify: 1 where something is not what was written.
    """
    check_installed()
    from orchestrator.journal.status import check_environment, summaries

    if head is not None and not verify:
        raise UsageError("--head is for --verify")
    with open_journal(paths_of(journal=journal)) as opened:
        if verify:
            report = opened.verify(head)
            answer(_chain_document(report), _chain_text(report, head), as_json=as_json)
            return DONE if report.is_whole else FAILED
        check_environment(opened, environment)
        found = summaries(opened, environment, limit)
        heads = opened.heads(s.deployment for s in found)
    rows = [
        [s.deployment, time_text(s.started), s.environment, f"{s.project} {s.label}", s.state, s.operator]
        for s in found
    ]
    titles = ["deployment", "started", "environment", "release", "state", "by"]
    shown = table(titles, rows) if rows else "nothing was deployed yet"
    listed = [to_builtins(s) | {"last": heads.of_deployments[s.deployment]} for s in found]
    chain = {"entries": heads.entries, "decisions": heads.decisions}
    answer({"format": 1, "deployments": listed, "chain": chain}, shown, as_json=as_json)
    return DONE


def _chain_document(report: ChainReport) -> object:
    return {"format": 1, "whole": report.is_whole, "entries": report.entries, "decisions": report.decisions}


def _chain_text(report: ChainReport, kept: str | None) -> str:
    lines = []
    for name, found in (("entry", report.entries), ("decision", report.decisions)):
        if found.wrong is not None:
            lines.append(f"{name} {found.wrong.number} is the first that is wrong: {found.wrong.reason}")
    if not report.entries.has_kept:
        lines.append(f"no entry has the hash {kept}: what was there when it was kept is there no more")
    entries, decisions = report.entries, report.decisions
    whole = (
        f"{entries.rows} entries and {decisions.rows} decisions are as they were written; newest hash {entries.head}"
    )
    return "\n".join(lines) or whole


@release.command(epilog="Example: waystation release log web1")
@click.argument("machine", required=False)
@click.option("--deployment", metavar="ULID", help="The deployment to read from. [default: the newest]")
@click.option("--environment", "-e", metavar="NAME", help="The newest deployment there.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the deployment ends, whoever runs it.")
@click.option(
    "--to",
    "target",
    metavar="FILE",
    help="Append the lines to FILE, as JSON, in place of printing them, and go on where it ends: each line is in it once, "
    "however often this command was killed.",
)
@journal_option
@json_option
def log(
    machine: str | None,
    deployment: str | None,
    environment: str | None,
    follow: bool,
    target: str | None,
    journal: str | None,
    as_json: bool,
) -> None:
    """Print what scripts printed, on the server and on machines, each line with where it is from. Secrets are masked."""
    check_installed()
    from orchestrator.fleet.log_reader import LogReader
    from orchestrator.fleet.told_lines import ToldLines
    from orchestrator.journal.status import check_machine, deployment_view, find_deployment

    paths = paths_of(journal=journal)
    with open_journal(paths) as opened, ExitStack() as stack:
        ulid = find_deployment(opened, deployment, environment)
        check_machine(deployment_view(opened, ulid), machine)
        told = stack.enter_context(ToldLines(target)) if target is not None else None
        said = False
        reader = LogReader(os.path.join(paths.deployment(ulid), "logs"), machine, told.counts if told else None)
        warned = False
        while True:
            state = deployment_view(opened, ulid).summary.state
            # Its engine may be gone, and another take it up.
            is_over = state not in {"running", "interrupted"}
            for entry in reader.news(final=is_over or not follow):
                said = True
                if told:
                    told.add(entry)
                else:
                    say(entry.as_json() if as_json else str(entry))
            if not follow or is_over:
                break
            if state == "interrupted" and not warned:
                say("nobody runs this deployment now; this goes on when somebody does", aside=True)
            warned = state == "interrupted"
            time.sleep(0.3)
    if not said and not as_json and target is None:
        say("nothing was printed" + ("" if is_over else " yet"), aside=True)


# --- what is shown


def _shown(view: DeploymentView, *, with_ledger: bool) -> str:
    from orchestrator.commands.ledger_text import brief, full

    s = view.summary
    lines = [
        f"{s.project} {s.label} in {s.environment}: {s.state}" + (f" ({printable(s.reason)})" if s.reason else ""),
        f"deployment {s.deployment}, begun {time_text(s.started)} by {s.operator} on {s.host}, fence {s.fence}",
    ]
    lines += [f"step {step.number} {printable(step.name)}: {step.state}" for step in view.steps]
    rows = [[m.name, m.stage, m.version, m.outcome or m.doing, m.reason] for m in view.machines]
    if rows:
        lines.append(table(["machine", "stage", "version", "outcome", "why"], rows))
    lines += [printable(line) for line in brief(view.ledger)]
    if with_ledger and view.ledger.lines:
        lines.append(full(view.ledger))
    lines += [f"refused by {r.machine} at {time_text(r.at)}: {printable(r.reason)}" for r in view.refusals]
    lines += [f"out: {_told(bracket)}" for bracket in view.brackets]
    lines += _behind(view)
    lines += [f"note at {time_text(note.at)}: {printable(note.text)}" for note in view.notes]
    return "\n".join(lines)


def _behind(view: DeploymentView) -> list[str]:
    """Each relay that lacks a package, and the command that brings it there."""
    environment = view.summary.environment
    return [
        f"behind: relay {one.relay} has not got {one.package} {one.version} ({printable(one.reason)}); once it is back: "
        f"waystation package replicate {one.package} {one.version} --environment {environment}"
        for one in view.behind
    ]


def _told(bracket: OpenBracket) -> str:
    return f"{bracket.machine} is out of {bracket.rotation} since {time_text(bracket.since)}, opened by {bracket.label}"
