"""`waystation release status`, `history` and `log`: looking at deployments."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click
from msgspec import to_builtins

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
from relay.errors import UsageError
from relay.support.console import json_option, printable, say, showing, table

if TYPE_CHECKING:
    from orchestrator.journal.journal import ChainReport, Journal
    from orchestrator.journal.views import DeploymentSummary, DeploymentView, OpenBracket


@click.command(epilog="Example: waystation release status --environment production")
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
    from orchestrator.locks.status import deployment_view, find_deployment

    with open_journal(paths_of(journal=journal)) as opened:
        ulid = find_deployment(opened, deployment, environment)
        view = deployment_view(opened, ulid)
        if watch:
            view = _watched(opened, view, with_ledger=ledger, quiet=as_json)
        answer(view, _shown(view, with_ledger=ledger), as_json=as_json)


def _watched(journal: Journal, view: DeploymentView, *, with_ledger: bool, quiet: bool) -> DeploymentView:
    """Show it until it has ended: below the lines of a terminal, elsewhere as lines, each time that it changed."""
    from orchestrator.locks.status import deployment_view

    board, told = _StatusBoard(), 0
    with showing(board) as is_drawn:
        while view.is_alive:
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


@click.command(epilog="Example: waystation release history --environment production")
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
    from orchestrator.locks.status import check_environment, summaries

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
        [
            *(
                s.deployment,
                time_text(s.started),
                s.environment,
                f"{_goal(s)}{s.project} {s.label}",
                s.state,
                s.operator,
            ),
            printable(s.reason),
        ]
        for s in found
    ]
    titles = ["deployment", "started", "environment", "release", "state", "by", "why"]
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


@click.command(epilog="Example: waystation release log web1")
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
    from orchestrator.locks.status import check_machine, deployment_view, find_deployment

    paths = paths_of(journal=journal)
    with open_journal(paths) as opened, ExitStack() as stack:
        ulid = find_deployment(opened, deployment, environment)
        check_machine(deployment_view(opened, ulid), machine)
        told = stack.enter_context(ToldLines(target)) if target is not None else None
        said = False
        reader = LogReader(os.path.join(paths.deployment(ulid), "logs"), machine, told.counts if told else None)
        warned = False
        while True:
            view = deployment_view(opened, ulid)
            # Its process may be gone, and another take it up.
            is_over = view.summary.ended is not None
            for entry in reader.news(final=is_over or not follow):
                said = True
                if told:
                    told.add(entry)
                else:
                    say(entry.as_json() if as_json else str(entry))
            if not follow or is_over:
                break
            if not view.is_alive and not warned:
                say("nobody runs this deployment now; this goes on when somebody does", aside=True)
            warned = not view.is_alive
            time.sleep(0.3)
    if not said and not as_json and target is None:
        say("nothing was printed" + ("" if is_over else " yet"), aside=True)


# --- what is shown


def _shown(view: DeploymentView, *, with_ledger: bool) -> str:
    from orchestrator.replication.ledger_text import brief, full

    s = view.summary
    lines = [
        f"{_goal(s)}{s.project} {s.label} in {s.environment}: {s.state}"
        + (f" ({printable(s.reason)})" if s.reason else ""),
        f"deployment {s.deployment}, begun {time_text(s.started)} by {s.operator} on {s.host}, fence {s.fence}",
    ]
    lines += [f"step {step.number} {printable(step.name)}: {step.state}" for step in view.steps]
    rows = [[m.name, m.stage, m.version, m.outcome or m.doing, m.reason] for m in view.machines]
    if rows:
        lines.append(table(["machine", "stage", "version", "outcome", "why"], rows))
    lines += [printable(line) for line in brief(view.ledger)]
    if with_ledger and view.ledger.lines:
        lines.append(full(view.ledger))
    lines += left_lines(view)
    if view.paused is not None:
        by = f" by {printable(view.paused.by)}" if view.paused.by else ""
        lines.append(
            f"paused{by} since {time_text(view.paused.since)}: {printable(view.paused.reason)}; waystation release go-on"
        )
    lines += [f"asks: {printable(one.name)}: {printable(one.text)} (since {time_text(one.since)})" for one in view.asks]
    lines += [
        f"waits for a person: {one.machine}, since {time_text(one.since)}: {printable(one.reason)}; "
        f"waystation release decide {one.machine} {' | '.join(one.choices)}"
        for one in view.waiting
    ]
    lines += [f"refused by {r.machine} at {time_text(r.at)}: {printable(r.reason)}" for r in view.refusals]
    lines += [f"out: {bracket_line(bracket)}" for bracket in view.brackets]
    lines += behind_lines(view)
    lines += [f"note at {time_text(note.at)}: {printable(note.text)}" for note in view.notes]
    return "\n".join(lines)


def _goal(summary: DeploymentSummary) -> str:
    """What it was for, where that is not to deploy."""
    return {"deploy": "", "stage": "stage of ", "rollback": "rollback to "}[summary.goal]


def left_lines(view: DeploymentView) -> list[str]:
    """Each machine that was left out, why, and the command that brings it up to date."""
    return [
        f"left out: {one.machine} ({printable(one.reason)}){f', by {one.by}' if one.by else ''}; to bring it up to date: "
        f"waystation release retry {view.summary.deployment} --machine {one.machine}"
        for one in view.left
    ]


def behind_lines(view: DeploymentView) -> list[str]:
    """Each relay that lacks a package, and the command that brings it there."""
    environment = view.summary.environment
    return [
        f"behind: relay {one.relay} has not got {one.package} {one.version} ({printable(one.reason)}); once it is back: "
        f"waystation package replicate {one.package} {one.version} --environment {environment}"
        for one in view.behind
    ]


def bracket_line(bracket: OpenBracket) -> str:
    return f"{bracket.machine} is out of {bracket.rotation} since {time_text(bracket.since)}, opened by {bracket.label}"
