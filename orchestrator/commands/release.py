"""`waystation release …`: the files, the plan, the release; its other commands are registered here."""

from __future__ import annotations

import click

from orchestrator.commands import decisions, deployments, options, watch
from orchestrator.commands.options import (
    answer,
    check_installed,
    depot_option,
    journal_option,
    keys_option,
    open_journal,
    paths_of,
    person_option,
    tell_aside,
    trust_option,
)
from relay.support.console import json_option, print_json, progress_bars, run


@click.group()
@click.pass_context
def release(context: click.Context) -> None:
    """Releases, and their deployments into environments."""
    options.keep_events(context)


@release.command(epilog="Example: waystation release plan --environment production --package web=1.4.2")
@click.argument("label", required=False)
@options.environment_option
@options.package_option
@options.variable_option
@options.process_option
@depot_option
@person_option
@trust_option
@json_option
def plan(
    label: str | None,
    environment: str,
    versions: dict[str, str],
    prompts: dict[str, str],
    process_path: str,
    depot: str | None,
    person: str | None,
    trust_folder: str | None,
    as_json: bool,
) -> None:
    """Say what a deployment would do, or every mistake in the files. Contacts nobody."""
    from orchestrator.files.environment import environment_path, read_both
    from orchestrator.plan.forecast import describe, document
    from orchestrator.releases.create_release import plan_release

    process, where = read_both(process_path, environment_path(environment))
    label = label or next(iter(versions.values()), "0")
    paths = paths_of(depot, trust_folder, person=person)
    made = run(plan_release(paths, process, where, label, versions, prompts))
    answer(document(made), describe(made), as_json=as_json)


@release.command(epilog="Example: waystation release create 1.4.2 --package web=1.4.2")
@click.argument("label")
@options.package_option
@options.process_option
@click.option(
    "--environment",
    "-e",
    metavar="NAME|FILE",
    help="Take packages that the depot lacks from this environment's feeds now; without it, when it is deployed.",
)
@options.variable_option
@depot_option
@person_option
@keys_option
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
    person: str | None,
    keys_folder: str | None,
    trust_folder: str | None,
    journal: str | None,
    as_json: bool,
) -> None:
    """Freeze and sign the process, its scripts and package versions as LABEL."""
    check_installed()
    from orchestrator.files.environment import environment_path, read_both
    from orchestrator.files.process import load_process
    from orchestrator.releases.create_release import create_release

    paths = paths_of(depot, trust_folder, journal, person, keys_folder)
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
                tell=tell_aside,
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


for command in (
    *(deployments.deploy, deployments.stage, deployments.resume, deployments.retry, deployments.rollback),
    *(decisions.approve, decisions.reject, decisions.decide, decisions.pause, decisions.go_on, decisions.cancel),
    *(watch.status, watch.history, watch.log),
):
    release.add_command(command)
