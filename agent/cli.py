"""`waystation agent …`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relay.audit.log import Form, log_options, log_to_stderr
from relay.config import home
from relay.errors import NotFoundError, UsageError
from relay.folders import check_folder
from relay.support.console import json_option, print_json, progress_bars, run, say, size, table, token_file_option

if TYPE_CHECKING:
    from agent.orders.journal import OperationRecord
    from agent.relays.sources import Sources
    from agent.service import Service
    from agent.trees.installed import AgentState
    from agent.trees.pull import Pulled

_home_option = click.option(
    "--home", "home_folder", metavar="DIR", help="The agent's own folder. [default: agent in $WAYSTATION_HOME]"
)
_relay_option = click.option(
    "--relay",
    "relays",
    multiple=True,
    metavar="URL",
    help="Only this relay, in place of DNS and the configuration; may be repeated.",
)
# Kept in agent.yaml, so it must not depend on where `init` was called.
_A_FILE = click.Path(exists=True, dir_okay=False, resolve_path=True)


def _tokens_of(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`RELAY=FILE`, as agent.yaml has it."""
    from agent.relays.tokens import relay_key

    found = {}
    for text in given:
        relay, _, file = text.rpartition("=")
        if not os.path.isfile(file):
            raise click.BadParameter(f"{text!r}: expected RELAY=FILE of a file that is there")
        relay_key(relay)
        found[relay] = os.path.realpath(file)
    return found


@click.group()
def agent() -> None:
    """A machine: its keys, the relays it finds, the trees it installs."""


@agent.command(epilog="Example: waystation agent init --trust trust.json --site fra --domain example.net")
@_home_option
@click.option("--trust", "trust_file", metavar="FILE", help="The origin's trust.json; this agent believes its keys.")
@click.option("--name", help="Of this machine. [default: the host name]")
@click.option("--site", help="Where this machine stands, as DNS calls it.")
@click.option("--domain", help="Where the relays' SRV records are.")
@click.option("--resolver", metavar="HOST:PORT", help="DNS server to ask in place of the system's.")
@click.option(
    "--scheme",
    type=click.Choice(["https", "http"]),
    metavar="https|http",
    help="How relays found by SRV are spoken to. [default: https]",
)
@click.option(
    "--relay", "relays", multiple=True, metavar="URL", help="A relay for where there is no DNS; may be repeated."
)
@click.option(
    "--token-file", type=_A_FILE, metavar="FILE", help="File with the relays' bearer token; agent.yaml names it."
)
@click.option(
    "--relay-token",
    "tokens",
    multiple=True,
    metavar="RELAY=FILE",
    callback=_tokens_of,
    help="File with the token of one relay (HOST, HOST:PORT or URL) that has others than the rest; may be repeated.",
)
@click.option(
    "--plain-http",
    multiple=True,
    metavar="RELAY",
    help="A relay that is given its token over plain http, too; may be repeated.",
)
@click.option(
    "--ca-file",
    type=_A_FILE,
    metavar="FILE",
    help="The authority that signs the relays' certificates (PEM), where it is a private one.",
)
@json_option
def init(
    home_folder: str | None,
    trust_file: str | None,
    as_json: bool,
    **settings: str | tuple[str, ...] | dict[str, str] | None,
) -> None:
    """Make this agent's keys and its configuration; prints the fingerprint that the environment file names."""
    import socket

    import msgspec
    import yaml

    from agent.config import AgentConfig
    from agent.orders.keys import make_agent_keys
    from agent.trees.installed import check_config
    from relay.support.durable import write_durably

    folder = _home(home_folder)
    pins = _read_pins(trust_file) if trust_file else None
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items() if value}
    values.setdefault("name", socket.gethostname())
    check_config(msgspec.convert(values, AgentConfig))
    identity = make_agent_keys(folder)
    write_durably(os.path.join(folder, "agent.yaml"), yaml.safe_dump(values, sort_keys=False).encode())
    if pins is not None:
        write_durably(os.path.join(folder, "trust.json"), pins)
    if as_json:
        print_json({"format": 1, "name": values["name"], "fingerprint": identity.fingerprint, "home": folder})
        return
    say(f"agent {values['name']} in {folder}")
    say(f"fingerprint {identity.fingerprint}")
    if pins is None:
        say("it believes no key yet: put the origin's trust.json beside agent.yaml", aside=True)


@agent.command(epilog="Example: waystation agent serve --home /var/lib/waystation/agent")
@_relay_option
@_home_option
@token_file_option
@log_options
def serve(
    relays: tuple[str, ...], home_folder: str | None, token_file: str | None, log_level: str, log_format: Form | None
) -> None:
    """Accept signed orders from the closest relays and report what became of them, until SIGTERM.

    Prints one line when the first relay has answered. Stopped or killed, it loses nothing: scripts run on, and the next
    start collects their results.
    """
    from agent.service import Service
    from relay.support.malloc import tame_malloc

    tame_malloc()
    service = Service(
        _home(home_folder),
        relays=relays,
        token_file=token_file,
        on_ready=lambda name, url: say(f"agent {name} ready at {url}"),
    )
    with log_to_stderr(log_level, log_format):
        run(_serve(service))


async def _serve(service: Service) -> None:
    import asyncio

    from agent import platform

    stop = asyncio.Event()
    platform.on_termination(asyncio.get_running_loop(), stop.set)
    await service.serve(stop)


@agent.command(epilog="Example: waystation agent status")
@click.option("--limit", default=20, show_default=True, help="Operations and refusals to show.")
@_home_option
@json_option
def status(limit: int, home_folder: str | None, as_json: bool) -> None:
    """Show what this agent was ordered, what became of it, what it refused, and which deployment leads. Contacts nothing."""
    from agent import platform
    from agent.orders.journal import OperationJournal
    from agent.service import lock_path, name_of
    from agent.trees.installed import AgentState

    folder = _home(home_folder)
    journal, state = OperationJournal(folder), AgentState(folder)
    document = {
        "format": 1,
        "name": name_of(state.config().name),
        "damaged": state.damages(),
        "serving": platform.is_locked(lock_path(folder)),
        "fences": {name: _builtins(fence) for name, fence in sorted(journal.highest_fences().items())},
        "project_fences": _builtins(journal.project_fences()),
        "operations": [_operation(record) for record in journal.newest(limit)],
        "refusals": [_builtins(refusal) for refusal in reversed(journal.refusals()[-limit:])],
    }
    if as_json:
        print_json(document)
        return
    _print_status(document)


def _operation(record: OperationRecord) -> dict[str, Any]:
    report = record.report
    return {
        "operation": record.operation,
        "action": record.action,
        "environment": record.environment,
        "state": "running" if report is None else report.state,
        "reason": "" if report is None else report.reason,
        "exit_status": None if report is None else report.exit_status,
        "ordered": record.not_before,
        "ended": None if report is None else report.ended,
        "acknowledged": record.acknowledged,
    }


def _print_status(document: dict[str, Any]) -> None:
    say(f"agent {document['name']} " + ("is serving" if document["serving"] else "is not serving"))
    for environment, projects in document["project_fences"].items():
        for project, fence in projects.items():
            who, open_or_not = project or "all projects", "open" if fence["open"] else "ended"
            say(f"{who} in {environment}: fence {fence['fence']}, deployment {fence['deployment']}, {open_or_not}")
    rows = [[_clock(o["ordered"]), o["operation"], o["state"], o["reason"]] for o in document["operations"]]
    if rows:
        say("", *table(["ordered", "operation", "state", "reason"], rows).split("\n"))
    rows = [[_clock(r["at"]), r["code"], r["operation"], r["text"]] for r in document["refusals"]]
    if rows:
        say("", *table(["refused", "why", "operation", ""], rows).split("\n"))
    _print_damages(document["damaged"])


def _clock(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _builtins(value: object) -> Any:  # noqa: ANN401 - as many types as structures hold
    import msgspec

    return msgspec.to_builtins(value)


@agent.command(epilog="Example: waystation agent pull Acme.Web 1.4.2 --root /srv/webshop --switch")
@click.argument("id")
@click.argument("version")
@click.option("--root", required=True, metavar="DIR", help="Where to install: DIR/releases/VERSION-ULID is built.")
@click.option(
    "--digest",
    metavar="sha256:HEX",
    help="The manifest's digest: then no signature is needed, and the package may still be arriving at the relay.",
)
@click.option("--switch", is_flag=True, help="Let DIR/current name the new tree in the end.")
@_relay_option
@_home_option
@token_file_option
@json_option
def pull(
    id: str,
    version: str,
    root: str,
    digest: str | None,
    switch: bool,
    relays: tuple[str, ...],
    home_folder: str | None,
    token_file: str | None,
    as_json: bool,
) -> None:
    """Bring a package from the closest relay, verified and durable, beside what runs. Again: goes on, or is done."""
    from agent.trees import pull as story
    from agent.trees.installed import AgentState

    request = story.parse_request(id, version, root, digest, switch=switch)
    state = AgentState(_home(home_folder))
    _print_damages(state.damages())

    async def bring() -> story.Pulled:
        with progress_bars() as bar:
            async with _sources(state, relays, token_file) as sources:
                show = bar(f"{id} {version}")
                pulled = await story.pull(request, state, sources, state.pins(), progress=show)
                show(pulled.tree_bytes, pulled.tree_bytes)
                return pulled

    result = run(bring())
    if as_json:
        print_json({"format": 1} | _builtins(result))
        return
    if result.already:
        say(f"{result.package} {result.version} is already at {result.tree}")
    else:
        say(f"{result.package} {result.version} is at {result.tree} ({result.seconds:.1f} s)")
        say(_origin_of(result))
    for name, why in result.failed.items():
        say(f"left {name}: {why}", aside=True)
    if switch:
        say("current names it now" if result.switched else "current named it already")


@agent.command(epilog="Example: waystation agent relays")
@_relay_option
@_home_option
@token_file_option
@json_option
def relays(relays: tuple[str, ...], home_folder: str | None, token_file: str | None, as_json: bool) -> None:
    """Show the relays in the order in which this agent asks them, and why in that order."""
    from datetime import UTC, datetime

    from agent.relays.health import UNKNOWN
    from agent.trees.installed import AgentState
    from relay.protocol.credentials import words_of

    state = AgentState(_home(home_folder))

    async def look() -> dict[str, Any]:
        async with _sources(state, relays, token_file) as sources:
            failed = await sources.measure(everything=True)
            healths = sources.healths
            return {
                "format": 1,
                "notes": list(sources.notes),
                "warnings": [words for one in sources.endings() if (words := words_of(one, datetime.now(UTC)))],
                "relays": [
                    {
                        "url": ranked.source.url,
                        "found_by": ranked.source.origin,
                        "priority": ranked.source.priority,
                        "weight": ranked.source.weight,
                        "usable": ranked.usable,
                        "first_byte_seconds": healths.get(ranked.source.url, UNKNOWN).first_byte,
                        "goodput_bytes_per_second": healths.get(ranked.source.url, UNKNOWN).goodput,
                        "why": ranked.why,
                        "error": failed.get(ranked.source.url, ""),
                    }
                    for ranked in sources.ranking()
                ],
            }

    document = run(look())
    if as_json:
        print_json(document)
        return
    rows = [[str(n), r["url"], r["error"] or r["why"]] for n, r in enumerate(document["relays"], 1)]
    say(*table(["", "relay", "why"], rows).split("\n") if rows else ["no relay is known"])
    for note in (*document["notes"], *(f"warning: {words}" for words in document["warnings"])):
        say(note, aside=True)


@agent.command(epilog="Example: waystation agent verify --root /srv/webshop")
@click.option("--root", metavar="DIR", help="Only the trees below DIR.")
@_home_option
@json_option
def verify(root: str | None, home_folder: str | None, as_json: bool) -> int:
    """Compare every installed tree with its manifest, every byte. Exit code 1 where one differs, or its record is damaged."""
    from agent.trees.installed import AgentState
    from agent.trees.tree import check_tree

    state = AgentState(_home(home_folder))
    damages = state.damages()
    records = [one for one in state.trees() if root is None or one.root == os.path.abspath(root)]
    if root is not None and not records:
        raise NotFoundError(f"no tree is installed under {root}")
    trees: list[dict[str, Any]] = []
    for record in records:
        manifest = state.manifest(record)
        if manifest is None:
            differences = [{"path": "", "problem": "its manifest is lost: pull it again"}]
        else:
            differences = [{"path": path, "problem": what} for path, what in check_tree(record.path, manifest)]
        trees.append(
            {"package": record.package, "version": record.version, "tree": record.path, "differences": differences}
        )
    if as_json:
        print_json({"format": 1, "trees": trees, "damaged": damages})
    else:
        _print_trees(trees)
        _print_damages(damages)
    return 1 if damages or any(tree["differences"] for tree in trees) else 0


def _print_damages(damages: list[str]) -> None:
    for damage in damages:
        say(damage, aside=True)


def _print_trees(trees: list[dict[str, Any]]) -> None:
    for tree in trees:
        state = "differs" if tree["differences"] else "whole"
        say(f"{state}  {tree['package']} {tree['version']}  {tree['tree']}")
        for difference in tree["differences"]:
            say(f"    {difference['path']}: {difference['problem']}")
    if any(tree["differences"] for tree in trees):
        say("Pull it again: a whole tree is then built beside the one that differs", aside=True)
    if not trees:
        say("no tree is installed")


def _sources(state: AgentState, relays: tuple[str, ...], token_file: str | None) -> Sources:
    from agent.relays.sources import Sources

    return Sources(state.config(), Path(state.home) / "relays.json", relays=relays, token_file=token_file)


def _origin_of(result: Pulled) -> str:
    told = [f"{size(result.from_disk_bytes)} from trees already here"] if result.from_disk_bytes else []
    if result.resumed_bytes:
        told.append(f"{size(result.resumed_bytes)} from the interrupted pull")
    told += [f"{size(tally['bytes'])} from {name}" for name, tally in result.from_relays.items()]
    return f"  {size(result.tree_bytes)}: " + ", ".join(told or ["nothing was needed"])


def _home(given: str | None) -> str:
    folder = os.path.abspath(given) if given else os.path.join(home(), "agent")
    check_folder(folder, private=True)
    return folder


def _read_pins(path: str) -> bytes:
    """A trust.json that holds what it should. Raises `UsageError`."""
    from relay.errors import WaystationError
    from relay.trust.keys import parse_pins

    expected = "Expected the trust.json that 'waystation trust init' made"
    try:
        with open(path, "rb") as file:
            pins = file.read(1 << 20)
        parse_pins(pins)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint=expected) from error
    except WaystationError as error:
        raise UsageError(f"{path}: {error.message}", hint=expected) from error
    return pins
