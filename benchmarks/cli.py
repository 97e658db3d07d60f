"""`waystation bench …`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from orchestrator.commands.options import SECONDS
from relay.errors import UsageError, WaystationError
from relay.support.console import ca_file_option, json_option, print_json, run, say, token_file_option

if TYPE_CHECKING:
    from benchmarks.line import LineReport, Plan
    from benchmarks.transfer import Shape
    from relay.encoding.planner import Prefer


@click.group()
def bench() -> None:
    """What a line and the machines at its ends can do, measured."""


@bench.command(epilog="Example: waystation bench line --relay https://relay.fra.example:7443 --seconds 30")
@click.option("--relay", "url", required=True, metavar="URL", help="The relay at the other end.")
@click.option(
    "--seconds",
    type=SECONDS,
    default=20.0,
    show_default=True,
    metavar="TIME",
    help="About how long to measure in all: seconds, or such as 2m.",
)
@click.option(
    "--connections", default="1,2,4,8", show_default=True, metavar="N,N…", help="How many at once, one after another."
)
@token_file_option
@ca_file_option
@json_option
def line(
    url: str, seconds: float, connections: str, token_file: str | None, ca_file: str | None, as_json: bool
) -> None:
    """Measure the line to a relay: round trip, goodput both ways by connections and sizes, CPU rates of both ends.

    It sends and fetches bytes that mean nothing, as many as the time allows. Its token needs the scope `write`.
    """
    import msgspec

    from benchmarks.line import Plan, conclusion_of, parse_connections, text_of

    report = run(_line(url, seconds, Plan(parse_connections(connections)), token_file, ca_file))
    if as_json:
        conclusion = msgspec.to_builtins(conclusion_of(report))
        print_json({"format": 1} | msgspec.to_builtins(report) | {"conclusion": conclusion})
    else:
        say(*text_of(report).split("\n"))


async def _line(url: str, seconds: float, plan: Plan, token_file: str | None, ca_file: str | None) -> LineReport:
    from benchmarks.line import measure_line
    from relay.protocol.client import RelayClient
    from relay.protocol.credentials import tls_from, token_from

    async with RelayClient(url, token=token_from(token_file), tls=tls_from(ca_file)) as client:
        return await measure_line(client, seconds, plan, _tell)


@bench.command(
    epilog="Examples: waystation bench transfer Acme.Web.1.4.2.nupkg --base Acme.Web.1.4.1.nupkg --line 10,50; "
    "waystation bench transfer Acme.Web 1.4.2 --relay https://relay.fra.example:7443"
)
@click.argument("names", metavar="FILE | ID VERSION", nargs=-1, required=True)
@click.option(
    "--base",
    metavar="FILE|VERSION",
    help="What the far end holds: a file, or with ID VERSION another version of the depot; without it, nothing.",
)
@click.option(
    "--line", "shape", metavar="MBIT,MS", help="The line: Mbit/s of IP packets, and milliseconds of round trip."
)
@click.option("--relay", "url", metavar="URL", help="In its place: a line like the one to this relay, measured now.")
@click.option(
    "--encodings",
    default="all",
    show_default=True,
    metavar="NAME,…",
    help="Those that are forced, as for package replicate --encoding; all is raw, zstd:3, zstd:9, zstd:19, zstd-prefix and "
    "hdiff.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    metavar="N",
    help="Transfers of each, from 1 to 100.",
)
@click.option(
    "--prefer",
    type=click.Choice(["bytes", "time"]),
    default="bytes",
    show_default=True,
    metavar="bytes|time",
    help="What is planned, as for package replicate.",
)
@click.option("--depot", metavar="LOCATION", help="Where ID VERSION is. [default: depot in $WAYSTATION_HOME]")
@token_file_option
@ca_file_option
@json_option
def transfer(
    names: tuple[str, ...],
    base: str | None,
    shape: str | None,
    url: str | None,
    encodings: str,
    repeat: int,
    prefer: Prefer,
    depot: str | None,
    token_file: str | None,
    ca_file: str | None,
    as_json: bool,
) -> None:
    """Send a package over a line in every encoding, and as it is planned: how long each takes.

    Each transfer goes to a relay of its own, started here for it and thrown away: a relay keeps what it gets, so a second
    one would send nothing. The line between is built here too: in network namespaces by root on Linux, else a proxy of
    the same rate and latency. With --relay the line to that relay is measured first, as 'bench line' does, and built
    alike; the relay is sent nothing but that, and no package. Its token needs the scope `write`.
    """
    import msgspec

    from benchmarks import transfer as story

    if (shape is None) == (url is None):
        raise UsageError("give a line by --line MBIT,MS, or a relay to measure it by --relay URL")
    wanted = story.Wanted(names, base, depot, story.parse_encodings(encodings), repeat, prefer)
    line = story.parse_shape(shape) if shape is not None else run(_shape(str(url), token_file, ca_file))
    try:
        case = story.bench_transfer(wanted, line, _tell)
    except RuntimeError as error:
        raise WaystationError(str(error)) from error
    conclusion = story.conclusion_of(case, url) if url else story.conclusion_of(case)
    if as_json:
        told = {"conclusion": msgspec.to_builtins(conclusion)}
        print_json({"format": 1, "made_of": story.how()} | story.document_of(case) | told)
    else:
        made = f"{repeat} transfers each, median; the line: {story.how()}"
        say(*story.text_of(case).split("\n"), made, "", *conclusion.text.split("\n"))


async def _shape(url: str, token_file: str | None, ca_file: str | None) -> Shape:
    """A line like the one to the relay."""
    from benchmarks.line import Plan
    from benchmarks.transfer import LINE_SECONDS, Shape

    return Shape.like(await _line(url, LINE_SECONDS, Plan((1, 4)), token_file, ca_file))


def _tell(text: str) -> None:
    say(text, aside=True)
