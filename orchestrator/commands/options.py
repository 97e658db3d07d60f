"""What the orchestrator's commands share: options and arguments, what they mean, and how a package is shown."""

from __future__ import annotations

import functools
import os
import re
from datetime import UTC, datetime
from importlib.util import find_spec
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from relay.config import home
from relay.errors import IdentityError, UsageError
from relay.folders import check_folder
from relay.support.console import print_json, run, say

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.depot.depot import Depot
    from orchestrator.journal.journal import Journal
    from orchestrator.paths import Paths
    from relay.package.identity import PackageRef
    from relay.stores.catalog import Pointer

T = TypeVar("T")
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}")

_UNITS: Final = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_BYTES: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([kmgt](?:i?b)?|b|)", re.IGNORECASE)

DONE, FAILED, WAITS, WITH_EXCLUSIONS, CANCELLED = 0, 1, 3, 5, 130
"""Exit codes of what deploys."""

depot_option = click.option(
    "--depot", metavar="LOCATION", help="Where packages are kept. [default: depot in $WAYSTATION_HOME]"
)
trust_option = click.option(
    "--trust",
    "trust_folder",
    metavar="DIR",
    help="Folder of the keys and of trust.json. [default: trust in $WAYSTATION_HOME]",
)
journal_option = click.option(
    "--journal", metavar="FILE", help="The journal of deployments. [default: journal.db in $WAYSTATION_HOME]"
)


person_option = click.option(
    "--as",
    "person",
    metavar="NAME",
    envvar="WAYSTATION_PERSON",
    help="Whose key signs. [default: $WAYSTATION_PERSON, else the order key without a name]",
)
keys_option = click.option(
    "--keys",
    "keys_folder",
    metavar="DIR",
    envvar="WAYSTATION_KEYS",
    help="Folder of that person's key. [default: $WAYSTATION_KEYS, else people in the trust folder]",
)


def pairs(example: str, _context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
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


process_option = click.option(
    "--process", "process_path", metavar="FILE", default="release.yaml", show_default=True, help="What a release does."
)
environment_option = click.option(
    "--environment",
    "-e",
    "environment",
    metavar="NAME|FILE",
    required=True,
    help="The environment; NAME is environments/NAME.yaml here.",
)
package_option = click.option(
    "--package",
    "versions",
    multiple=True,
    callback=functools.partial(pairs, "web=1.4.2"),
    metavar="NAME=VERSION",
    help="A version of a package of the process; once for each.",
)
variable_option = click.option(
    "--variable",
    "prompts",
    multiple=True,
    callback=functools.partial(pairs, "change=CHG123456"),
    metavar="NAME=VALUE",
    help="An answer that the process asks for; may be repeated.",
)


class _Written(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """A value as YAML has it, `50Mbit` or `90s`; a bare number is in the unit that the option names."""

    def __init__(self, name: str, expected: str, read: Callable[[str], float]) -> None:
        self.name = name
        self._expected = expected
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        if isinstance(value, float):
            return value
        try:
            read = self._read(value)
        except ValueError:
            read = 0.0
        return read if 0 < read < inf else self.fail(f"{value!r}: expected {self._expected}", param, ctx)


def _rate(text: str) -> float:
    """In bytes per second."""
    from orchestrator.files.values import bytes_per_second

    return float(text) * 125_000 if _NUMBER.fullmatch(text) else bytes_per_second(text)


def _seconds(text: str) -> float:
    from orchestrator.files.values import seconds

    return float(text) if _NUMBER.fullmatch(text) else seconds(text)


RATE = _Written("rate", "a rate above 0, such as 50Mbit, 800kbit or a number in Mbit/s", _rate)
"""In bytes per second."""
SECONDS = _Written("duration", "a time above 0, such as 90s, 2m or a number of seconds", _seconds)


def byte_count(text: str) -> int:
    """Bytes as people write them: `3000000`, `500MB`, `1.5 GiB`. For `type=` of an option."""
    match = _BYTES.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size: expected a number of bytes, or one such as 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def depot_location(given: str | None) -> str:
    """Of the depot's store."""
    return given or f"disk:{os.path.join(home(), 'depot')}"


EVENTS_FILE = "events.jsonl"


def keep_events(context: click.Context) -> None:
    """Let what a command of this group does be added to the audit trail of this home."""
    from relay.audit.log import log_to_file

    context.with_resource(log_to_file(os.path.join(home(), EVENTS_FILE)))


def in_depot(given: str | None, work: Callable[[Depot], Awaitable[T]]) -> T:
    """What `work` gives, of the depot that was typed."""

    async def main() -> T:
        from orchestrator.depot.depot import open_depot

        async with open_depot(depot_location(given)) as depot:
            return await work(depot)

    return run(main())


def trust_folder(given: str | None) -> str:
    """Of the keys, absolute."""
    folder = os.path.abspath(given) if given else os.path.join(home(), "trust")
    check_folder(folder, private=True)
    return folder


def keys_folder(given: str | None) -> str:
    """Of a person's own key, absolute; empty where none was named."""
    if not given:
        return ""
    check_folder(os.path.abspath(given), private=True)
    return os.path.abspath(given)


def paths_of(
    depot: str | None = None,
    trust: str | None = None,
    journal: str | None = None,
    person: str | None = None,
    keys: str | None = None,
) -> Paths:
    """Where all of this orchestrator is, and who works with it, given what was typed."""
    from orchestrator.paths import Paths

    return Paths(
        home=home(),
        depot=depot_location(depot),
        trust=trust_folder(trust),
        journal=journal or os.path.join(home(), "journal.db"),
        person=person or "",
        keys=keys_folder(keys),
    )


def check_installed() -> None:
    """Raises `UsageError` where only what agents and relays need is installed."""
    if find_spec("sqlalchemy") is None:
        raise UsageError(
            "releases need SQLAlchemy, which is not installed", hint="pip install 'waystation[orchestrator]'"
        )


def open_journal(paths: Paths) -> Journal:
    """Raises `UsageError` where only what agents and relays need is installed, and as `Journal.open`."""
    check_installed()
    from orchestrator.journal.journal import Journal

    return Journal.open(paths.journal)


def answer(document: object, text: str, *, as_json: bool) -> None:
    """Print what a command found, as one JSON document or as text."""
    if as_json:
        print_json(document)
    else:
        say(*text.split("\n"))


def together(*given: Callable[[T], T]) -> Callable[[T], T]:
    """Several options as one decorator; they are listed in this order."""

    def decorate(command: T) -> T:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def tell_aside(line: str) -> None:
    """On standard error."""
    say(line, aside=True)


def time_text(seconds: float) -> str:
    """A time of the journal, for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def pointer_document(pointer: Pointer) -> dict[str, Any]:
    return {
        "id": pointer.id,
        "version": pointer.version,
        "manifest": f"sha256:{pointer.manifest}",
        "nupkg_sha256": pointer.nupkg_sha256,
        "size": pointer.size,
        "published": pointer.published,
        "provenance": {
            "how": pointer.provenance.how,
            "source": pointer.provenance.source,
            "verified_by": pointer.provenance.verified_by,
        },
    }


def package_ref(id: str, version: str, hint: str = "") -> PackageRef:
    """What was typed as ID VERSION. Raises `UsageError`."""
    from relay.package.identity import NuGetVersion, PackageId, PackageRef

    try:
        return PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
    except IdentityError as error:
        raise UsageError(error.message, hint=hint) from error


def listed_paths(paths: list[str], most: int = 8) -> str:
    """Paths for a line of text, the first of many."""
    shown = ", ".join(paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown
