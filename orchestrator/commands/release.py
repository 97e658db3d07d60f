"""`waystation init`, `waystation release …` and `waystation rotation …`"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options
from orchestrator.commands.options import depot_option, trust_option
from relay.config import home
from relay.errors import NotFoundError, UsageError
from relay.support.console import json_option, print_json, printable, progress_bars, run, table

if TYPE_CHECKING:
    from orchestrator.deployment.deployment import Result
    from orchestrator.files.environment import EnvironmentFile
    from orchestrator.files.process import ProcessFile
    from orchestrator.journal.events import Event
    from orchestrator.journal.journal import Journal
    from orchestrator.journal.views import DeploymentView, OpenBracket
    from orchestrator.paths import Places
    from orchestrator.plan.plan import Plan

DONE, FAILED, WITH_EXCLUSIONS, CANCELLED = 0, 1, 5, 130

_journal_option = click.option(
    "--journal", metavar="FILE", help="The journal of deployments. [default: journal.db in $WAYSTATION_HOME]"
)
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
    "packages",
    multiple=True,
    metavar="NAME=VERSION",
    help="A version of a package of the process; once for each.",
)
_variable_option = click.option(
    "--variable",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    help="An answer that the process asks for; may be repeated.",
)


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


@click.group()
def release() -> None:
    """Releases, and their deployments into environments."""


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
    packages: tuple[str, ...],
    variables: tuple[str, ...],
    process_path: str,
    depot: str | None,
    as_json: bool,
) -> None:
    """Say what a deployment would do, or every mistake in the files. Contacts nobody."""
    from orchestrator.deployment.packages import wanted_packages
    from orchestrator.plan.forecast import describe, document
    from orchestrator.plan.make_plan import make_plan

    process, where = _files(process_path, environment)
    versions = _pairs(packages, "--package", "web=1.4.2")
    made = make_plan(
        process,
        where,
        label=label or _label_of(versions),
        packages=_with_sizes(depot, wanted_packages(process, versions)),
        scripts=None,
        prompts=_pairs(variables, "--variable", "change=CHG123456"),
    )
    if as_json:
        print_json(document(made))
    else:
        click.echo(describe(made))


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
@_journal_option
@json_option
def create(
    label: str,
    packages: tuple[str, ...],
    process_path: str,
    environment: str | None,
    variables: tuple[str, ...],
    depot: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> None:
    """Freeze and sign the process, its scripts and package versions as LABEL."""
    _check_installed()
    from orchestrator.deployment.setup import create_release
    from orchestrator.files.environment import environment_path, load_environment
    from orchestrator.files.process import load_process

    places = _places(depot, trust_folder, journal)
    process = load_process(process_path)
    where = None if environment is None else load_environment(environment_path(environment))
    with _journal(places) as opened, progress_bars() as bar:
        made, new = run(
            create_release(
                places,
                opened,
                label,
                process,
                _pairs(packages, "--package", "web=1.4.2"),
                environment=where,
                prompts=_pairs(variables, "--variable", "change=CHG123456"),
                bar=bar,
            )
        )
    if as_json:
        print_json(
            {
                "format": 1,
                "project": made.project,
                "label": made.label,
                "new": new,
                "packages": {
                    n: {"id": p.id, "version": p.version, "manifest": p.manifest} for n, p in made.packages.items()
                },
            }
        )
        return
    click.echo(f"release {made.label} of {made.project}" + ("" if new else " was there already, the same"))
    for name, package in made.packages.items():
        there = "" if package.manifest else f"  (from feed {package.feed} when it is deployed)"
        click.echo(f"  {name}: {package.id} {package.version}{there}")


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
@depot_option
@trust_option
@_journal_option
@json_option
def deploy(
    label: str,
    environment: str,
    packages: tuple[str, ...],
    variables: tuple[str, ...],
    process_path: str,
    project: str | None,
    adopt: bool,
    depot: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> int:
    """Run release LABEL in an environment; with --package it is created first.

    Ctrl-C once: nothing new starts, machines in flight come to their end. Twice: leave now; what is open is listed.
    Exit codes: 0 done, 1 failed, 2 mistakes in files, 4 locked, 5 done but for some machines, 130 cancelled.
    """
    _check_installed()
    from orchestrator.deployment.setup import Wish, create_release
    from orchestrator.files.environment import environment_path, load_environment
    from orchestrator.files.process import load_process

    places = _places(depot, trust_folder, journal)
    where = load_environment(environment_path(environment))
    prompts = _pairs(variables, "--variable", "change=CHG123456")
    process = load_process(process_path) if packages or os.path.exists(process_path) else None
    with _journal(places) as opened, progress_bars() as bar:
        if packages and process is not None:
            versions = _pairs(packages, "--package", "web=1.4.2")
            run(create_release(places, opened, label, process, versions, environment=where, prompts=prompts, bar=bar))
        wish = Wish(label, project or (process.value.project if process else None), where, prompts, adopt)
        ulid, result = run(_deploy(places, opened, wish, bar, as_json))
        if as_json:
            print_json(_view_document(_view(opened, ulid)))
        else:
            _tell_end(opened, ulid, result)
    return _exit_code(result)


async def _deploy(places: Places, journal: Journal, wish: Any, bar: Any, as_json: bool) -> tuple[str, Result]:  # noqa: ANN401 - lazily imported types
    """Run it in the foreground; a signal is a decision like any other."""
    from orchestrator.deployment.deployment import CANCEL
    from orchestrator.deployment.setup import deploy as start
    from orchestrator.paths import operator

    began = time.monotonic()
    running: list[str] = []

    def tell(event: Event) -> None:
        from orchestrator.journal.event_text import line

        said = line(event)
        if said:
            click.echo(f"{time.monotonic() - began:7.1f} s  {printable(said)}", err=as_json)

    def begun(ulid: str, plan: Plan) -> None:
        running.append(ulid)
        what = ", ".join(f"{package.id} {package.version}" for package in plan.packages.values())
        click.echo(f"deployment {ulid}: {plan.label} of {plan.project} into {plan.environment} ({what})", err=as_json)
        for note in plan.notes:
            click.echo(f"  {printable(note)}", err=as_json)

    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine that runs has one
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals > 1 or not running:
            task.cancel()
            return
        click.echo("cancelling: machines in flight come to their end; once more leaves now", err=True)
        journal.decide(wish.environment.value.environment, running[0], CANCEL, {}, operator())

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        return await start(places, journal, wish, begun=begun, tell=tell, bar=bar)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _tell_end(journal: Journal, ulid: str, result: Result) -> None:
    from orchestrator.journal.ledger_text import brief

    view = _view(journal, ulid)
    for line in brief(view.ledger):
        click.echo(printable(line))
    for bracket in view.brackets:
        click.echo(f"still out: {_told(bracket)}", err=True)
    if result.left:
        click.echo(f"not deployed: {', '.join(result.left)}", err=True)


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
@_journal_option
@json_option
def status(
    deployment: str | None, environment: str | None, watch: bool, ledger: bool, journal: str | None, as_json: bool
) -> None:
    """Show a deployment: its state, its machines, open brackets, what agents refused, and which bytes crossed which line."""
    with _journal(_places(None, None, journal)) as opened:
        ulid = _found(opened, deployment, environment)
        view = _view(opened, ulid)
        while watch and view.summary.state == "running":
            if sys.stdout.isatty() and not as_json:
                click.clear()
            if not as_json:
                click.echo(_shown(view, with_ledger=ledger))
            time.sleep(1.0)
            view = _view(opened, ulid)
        if as_json:
            print_json(_view_document(view))
        else:
            click.echo(_shown(view, with_ledger=ledger))


@release.command(epilog="Example: waystation release history --environment production")
@click.option("--environment", "-e", metavar="NAME", help="Only of this environment.")
@click.option("--limit", default=20, show_default=True, help="Deployments to show.")
@_journal_option
@json_option
def history(environment: str | None, limit: int, journal: str | None, as_json: bool) -> None:
    """List deployments, the newest first."""
    _check_installed()
    import msgspec

    from orchestrator.journal.locks import holder
    from orchestrator.journal.views import summary

    with _journal(_places(None, None, journal)) as opened:
        records = opened.deployments(environment, limit=limit)
        holders = {name: holder(opened, name) for name in {record.environment for record in records}}
        alive = {found.deployment for found in holders.values() if found is not None}
        found = [summary(record, is_alive=record.deployment in alive) for record in records]
    if as_json:
        print_json({"format": 1, "deployments": msgspec.to_builtins(found)})
        return
    rows = [
        [s.deployment, _time(s.started), s.environment, f"{s.project} {s.label}", s.state, s.operator] for s in found
    ]
    heads = ["deployment", "started", "environment", "release", "state", "by"]
    click.echo(table(heads, rows) if rows else "nothing was deployed yet")


@release.command(epilog="Example: waystation release log web1")
@click.argument("machine", required=False)
@click.option("--deployment", metavar="ULID", help="The deployment to read from. [default: the newest]")
@click.option("--environment", "-e", metavar="NAME", help="The newest deployment there.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the deployment ends.")
@_journal_option
@json_option
def log(
    machine: str | None,
    deployment: str | None,
    environment: str | None,
    follow: bool,
    journal: str | None,
    as_json: bool,
) -> None:
    """Print what scripts printed, on the server and on machines, each line with where it is from. Secrets are masked."""
    from orchestrator.fleet.log_reader import LogReader

    places = _places(None, None, journal)
    with _journal(places) as opened:
        ulid = _found(opened, deployment, environment)
        reader = LogReader(os.path.join(places.deployment(ulid), "logs"), machine)
        while True:
            is_over = _view(opened, ulid).summary.state != "running"
            for entry in reader.news(final=is_over or not follow):
                if as_json:
                    # One document a line, so that whoever follows can read each as it comes.
                    click.echo(json.dumps({"format": 1, "operation": entry.operation, "text": entry.text}))
                else:
                    click.echo(f"{entry.where}  {printable(entry.text)}")
            if not follow or is_over:
                return
            time.sleep(0.3)


# --- rotations


@click.group()
def rotation() -> None:
    """Machines that are out of their load balancer."""


@rotation.command(name="list", epilog="Example: waystation rotation list")
@click.option("--environment", "-e", metavar="NAME", help="Only of this environment.")
@_journal_option
@json_option
def list_(environment: str | None, journal: str | None, as_json: bool) -> None:
    """List machines whose bracket is open: `before` was begun, and no `after` ended well since."""
    import msgspec

    from orchestrator.journal.views import open_brackets

    with _journal(_places(None, None, journal)) as opened:
        found = open_brackets(opened.brackets(environment))
    if as_json:
        print_json({"format": 1, "open": msgspec.to_builtins(found)})
        return
    rows = [[b.machine, b.rotation, b.environment, _time(b.since), b.label, b.owner] for b in found]
    heads = ["machine", "rotation", "environment", "out since", "opened by", "deployment"]
    click.echo(table(heads, rows) if rows else "no machine is out")


@rotation.command(epilog="Example: waystation rotation close web2 --environment production")
@click.argument("machine")
@click.option("--environment", "-e", metavar="NAME", help="Where several environments have an open one.")
@click.option("--by-hand", is_flag=True, help="Run nothing: you have put it back yourself.")
@click.option("-m", "--message", default="", help="Why, for the record.")
@_journal_option
@json_option
def close(
    machine: str, environment: str | None, by_hand: bool, message: str, journal: str | None, as_json: bool
) -> int:
    """Put MACHINE back: run its rotation's `after` with OUTCOME=put_back, and note that it is in again."""
    _check_installed()
    from orchestrator.deployment.close_bracket import close_bracket

    places = _places(None, None, journal)
    with _journal(places) as opened:
        closed = run(close_bracket(places, opened, machine, environment, by_hand=by_hand, message=message))
    if as_json:
        print_json({"format": 1, "machine": machine, "closed": closed.ok, "reason": closed.reason})
    elif closed.ok:
        click.echo(f"{machine} is back in {closed.rotation}")
    else:
        click.echo(f"{machine} could not be put back: {printable(closed.reason)}", err=True)
    return DONE if closed.ok else FAILED


# --- what they share


def _places(depot: str | None, trust_folder: str | None, journal: str | None) -> Places:
    from orchestrator.paths import Places

    return Places(
        home=home(),
        depot=options.depot_location(depot),
        trust=options.trust_folder(trust_folder),
        journal=journal or os.path.join(home(), "journal.db"),
    )


def _journal(places: Places) -> Journal:
    _check_installed()
    from orchestrator.journal.journal import Journal

    return Journal.open(places.journal)


def _check_installed() -> None:
    """Raises `UsageError` where only what agents and relays need is installed."""
    from importlib.util import find_spec

    if find_spec("sqlalchemy") is None:
        raise UsageError(
            "releases need SQLAlchemy, which is not installed", hint="pip install 'waystation[orchestrator]'"
        )


def _files(process_path: str, environment: str) -> tuple[ProcessFile, EnvironmentFile]:
    """Both files, or the mistakes of both at once."""
    from orchestrator.files.environment import environment_path, load_environment
    from orchestrator.files.process import load_process
    from orchestrator.files.yaml_positions import PlanError

    loaded: list[Any] = []
    mistakes: list[Any] = []
    for load, path in ((load_process, process_path), (load_environment, environment_path(environment))):
        try:
            loaded.append(load(path))
        except PlanError as error:
            mistakes += error.mistakes
    if mistakes:
        raise PlanError(mistakes)
    process, where = loaded
    return process, where


def _pairs(given: tuple[str, ...], option: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UsageError(f"{option} {text!r} is not NAME=VALUE", hint=f"For example {option} {example}")
        if name in pairs:
            raise UsageError(f"{option}: {name} is given twice")
        pairs[name] = value
    return pairs


def _label_of(versions: dict[str, str]) -> str:
    return next(iter(versions.values()), "0")


def _with_sizes(depot: str | None, packages: Any) -> Any:  # noqa: ANN401 - lazily imported types
    """Fill in what the depot knows of these packages; one that it lacks stays as it is."""
    from orchestrator.deployment.packages import known_packages

    location = options.depot_location(depot)
    folder = location.removeprefix("disk:")
    if location.startswith("disk:") and not os.path.isdir(folder):
        return packages
    return run(known_packages(location, packages))


def _found(journal: Journal, deployment: str | None, environment: str | None) -> str:
    if deployment is not None:
        return journal.deployment(deployment.upper()).deployment
    newest = journal.deployments(environment, limit=1)
    if not newest:
        raise NotFoundError("nothing was deployed yet" + (f" in {environment}" if environment else ""))
    return newest[0].deployment


def _view(journal: Journal, ulid: str) -> DeploymentView:
    import msgspec

    from orchestrator.journal.locks import holder
    from orchestrator.journal.views import open_brackets, view
    from orchestrator.plan.plan import Plan

    record = journal.deployment(ulid)
    holding = holder(journal, record.environment)
    return view(
        record,
        journal.entries(ulid),
        is_alive=holding is not None and holding.deployment == ulid,
        plan=msgspec.json.decode(journal.plan(ulid), type=Plan),
        brackets=open_brackets(journal.brackets(record.environment)),
    )


def _view_document(view: DeploymentView) -> Any:  # noqa: ANN401 - JSON
    import msgspec

    return msgspec.to_builtins(view)


def _shown(view: DeploymentView, *, with_ledger: bool) -> str:
    from orchestrator.journal.ledger_text import brief, full

    s = view.summary
    lines = [
        f"{s.project} {s.label} in {s.environment}: {s.state}" + (f" ({printable(s.reason)})" if s.reason else ""),
        f"deployment {s.deployment}, begun {_time(s.started)} by {s.operator} on {s.host}, fence {s.fence}",
    ]
    lines += [f"step {step.number} {printable(step.name)}: {step.state}" for step in view.steps]
    rows = [[m.name, m.stage, m.version, m.outcome or m.doing, m.reason] for m in view.machines]
    if rows:
        lines.append(table(["machine", "stage", "version", "outcome", "why"], rows))
    lines += [printable(line) for line in brief(view.ledger)]
    if with_ledger and view.ledger.lines:
        lines.append(full(view.ledger))
    lines += [f"refused by {r.machine} at {_time(r.at)}: {printable(r.reason)}" for r in view.refusals]
    lines += [f"out: {_told(bracket)}" for bracket in view.brackets]
    lines += [f"note at {_time(note.at)}: {printable(note.text)}" for note in view.notes]
    return "\n".join(lines)


def _told(bracket: OpenBracket) -> str:
    return f"{bracket.machine} is out of {bracket.rotation} since {_time(bracket.since)}, opened by {bracket.label}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
