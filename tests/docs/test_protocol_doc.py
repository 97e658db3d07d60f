"""docs/protocol.md says what the code does: its routes, limits and problems, and examples that decode."""

from __future__ import annotations

import ast
import base64
import dataclasses
import functools
import importlib
import json
import math
import re
from datetime import UTC, datetime
from types import ModuleType
from typing import get_args

import msgspec
import pytest
import yaml
from harness.pages import DOCS, ROOT, block, rows, section

from agent.orders import acceptance, orders
from agent.orders.envelopes import secret_context
from agent.orders.keys import AgentIdentity
from orchestrator.journal import events, tables
from orchestrator.releases import release as releases
from relay.config import RelayConfig
from relay.encoding import bundle
from relay.encoding.bundle import BundleDecoder, NotSent, Received, Whole
from relay.encoding.planner import LINES
from relay.engines.engine_pool import Engines
from relay.errors import ChunkInvalid, FrameError
from relay.mail.mailbox import Mail
from relay.package import manifest
from relay.package.chunk import Chunk
from relay.package.zip_reader import WalkLimits
from relay.protocol import messages
from relay.protocol.connection import ClientLimits
from relay.rebuild.nupkgs import Nupkgs
from relay.server.app import RelayApp
from relay.server.http.access import iter_routes
from relay.server.http.connection import Limits
from relay.server.http.problems import _BY_ERROR, TITLES, verdict_of
from relay.server.http.tokens import ForbiddenError, MisplacedTokenError, UnauthenticatedError, parse_tokens
from relay.server.packages import Transfer, _reason
from relay.server.peers import Peers
from relay.server.replications import Replications
from relay.stores.open import open_store
from relay.stores.stored_form import decode_stored
from relay.trust.envelopes import check_manifest_signature
from relay.trust.keys import parse_pins

PAGE = (DOCS / "protocol.md").read_text(encoding="utf-8")
EXAMPLE = manifest.parse(block(PAGE, "json manifest").strip().encode())
UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "KiB/s": 1 << 10,
    "Mbit/s": 125_000,
    "s": 1,
    "days": 1,
}


def _bare(cell: str) -> str:
    return cell.strip("`")


def _hex(text: str) -> bytes:
    """The bytes of a hex block; a note begins with #."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))


# --- routes


async def test_every_route_of_the_relay_is_in_the_table_with_its_scope_and_no_other_is() -> None:
    store = await open_store("memory:")
    transfer, config, limits = Transfer(store), RelayConfig(), Limits()
    replications = Replications(transfer, store, Peers(config), limits)
    nupkgs = Nupkgs(store, Engines())
    app = RelayApp(transfer, config, limits, None, Mail(None), replications, nupkgs).build()
    registered = {(route.method, route.path, route.scope) for route in iter_routes(app)}
    methods = {method for method, _, _ in registered}
    told = {tuple(map(_bare, row[:3])) for row in rows(section(PAGE, "## The wire")) if _bare(row[0]) in methods}
    assert told == registered


def test_media_types_are_told() -> None:
    for name in (
        messages.JSON,
        messages.BUNDLE_TYPE,
        messages.DOCUMENT_TYPE,
        messages.CHUNK_TYPE,
        messages.PROGRESS_TYPE,
        messages.RECIPE_TYPE,
        messages.NUPKG_TYPE,
    ):
        assert f"`{name}`" in PAGE, name


@pytest.mark.parametrize(
    ("heading", "types"),
    [
        ("### Health", (messages.HealthAnswer, messages.CpuRates)),
        ("### Measuring the line", (messages.LineAnswer,)),
        ("### The manifest document", (messages.Document,)),
        ("### Offering", (messages.OfferAnswer,)),
        ("### Asking what is missing", (messages.MissingRequest, messages.ChunkRanges, messages.MissingAnswer)),
        ("### Sending chunks", (messages.BundleAnswer, messages.RefusedRun)),
        ("### Publishing", (messages.PublishRequest,)),
        ("### What is there", (messages.PackageAnswer, messages.PackagesAnswer)),
        ("### Asking for chunks", (messages.BundleRequest,)),
        (
            "### Replicating from another relay",
            (messages.ReplicationRequest, messages.ReplicationProgress, messages.EncodedBytes),
        ),
        ("### The identical nupkg", (messages.ExactLacks, messages.RecipeAnswer, messages.BlobAnswer)),
        ("### Orders", (messages.OrdersRequest, messages.OrderLetter, messages.TakenAnswer)),
        (
            "### Polls and presence",
            (messages.PollRequest, messages.Cursor, messages.PollAnswer, messages.NumberedOrder),
        ),
        ("### Polls and presence", (messages.AgentsAnswer, messages.AgentSeen)),
        (
            "### Reports and logs",
            (messages.ReportsRequest, messages.ReportLetter, messages.LogsRequest, messages.LogPiece),
        ),
        ("### Reports and logs", (messages.ReadQuery, messages.ReportsAnswer, messages.NumberedReport)),
        ("### Reports and logs", (messages.LogsAnswer, messages.NumberedPiece)),
    ],
)
def test_every_field_of_a_body_is_told_where_the_body_is(heading: str, types: tuple[type[msgspec.Struct], ...]) -> None:
    text = section(PAGE, heading)
    for type in types:
        for field in type.__struct_fields__:
            assert re.search(rf'["`]{field}["`]', text), f"{type.__name__}.{field} is not under {heading!r}"


def test_every_reason_to_refuse_a_run_is_told_and_no_other() -> None:
    told = {_bare(row[0]) for row in rows(section(PAGE, "### Sending chunks"))} - {"reason", "---"}
    errors = (bundle.BaseMissingError("gone"), FrameError("torn"), ChunkInvalid("a" * 64, "b" * 64))
    assert told == {_reason(error) for error in errors}


# --- orders and what answers them


def _tags(union: object) -> dict[str, type[msgspec.Struct]]:
    return {str(type.__struct_config__.tag): type for type in get_args(union)}


def _field_table(heading: str) -> set[str]:
    """The names in the first column of the first table under a heading."""
    found: set[str] = set()
    for row in rows(section(PAGE, heading)):
        if row[0] == "type":
            break
        found |= set(re.findall(r"`(\w+)`", row[0]))
    return found


@pytest.mark.parametrize(("heading", "type"), [("### An order", orders.Order), ("### A report", orders.Report)])
def test_the_fields_of_orders_and_reports_are_those_of_the_code(heading: str, type: type[msgspec.Struct]) -> None:
    assert _field_table(heading) == set(type.__struct_fields__)


def test_every_action_is_told_with_its_fields_and_no_other() -> None:
    table = {_bare(row[0]): row[1] for row in rows(section(PAGE, "### An order")) if len(row) == 3}
    told = {tag: set(re.findall(r"`(\w+)`", cell)) for tag, cell in table.items() if tag not in {"type", "---"}}
    assert told == {tag: set(type.__struct_fields__) for tag, type in _tags(orders.Action).items()}


@pytest.mark.parametrize(
    ("heading", "types"),
    [
        ("### An order", (orders.PackageTree, orders.TimedCheck, *get_args(orders.Check))),
        ("### A report", (orders.TreeFacts, orders.TreePulled, *get_args(orders.Facts))),
        ("### A presence", (orders.Presence, orders.FenceSeen)),
        ("### A signed release", (releases.Release, releases.ReleaseFile)),
    ],
)
def test_every_field_of_what_is_signed_is_told(heading: str, types: tuple[type[msgspec.Struct], ...]) -> None:
    text = section(PAGE, heading)
    for type in types:
        for field in type.__struct_fields__:
            assert re.search(rf'["`]{field}["`]', text), f"{type.__name__}.{field} is not under {heading!r}"


def test_every_state_of_an_operation_is_told() -> None:
    text = section(PAGE, "### A report")
    assert [state for state in get_args(orders.State) if f"`{state}`" not in text] == []


def test_every_reason_to_refuse_is_told_and_no_other() -> None:
    told = {code for row in rows(section(PAGE, "### Acceptance")) for code in re.findall(r"`(\w+)`", row[0])}
    assert told == set(get_args(acceptance.Code))


@pytest.mark.parametrize(
    ("info", "type"), [("order", orders.Order), ("report", orders.Report), ("presence", orders.Presence)]
)
def test_the_examples_of_signed_letters_are_ones_that_the_code_takes(info: str, type: type[msgspec.Struct]) -> None:
    text = block(PAGE, f"json {info}")
    value = msgspec.json.decode(text, type=type)
    # Nothing in the example is passed over: the same comes out again.
    assert json.loads(msgspec.json.encode(value)) == json.loads(text)


def test_the_fingerprint_on_the_page_is_that_of_the_example() -> None:
    presence = msgspec.json.decode(block(PAGE, "json presence"), type=orders.Presence)
    assert f"`{AgentIdentity(presence.signing, presence.sealing).fingerprint}`" in section(PAGE, "### A presence")


def test_the_payload_types_and_the_context_of_secrets_are_told() -> None:
    for name in (orders.ORDER_TYPE, orders.REPORT_TYPE, messages.PRESENCE_TYPE, releases.RELEASE_TYPE):
        assert f"`{name}`" in PAGE, name
    assert f"`{secret_context('<operation>', '<NAME>')}`" in PAGE


def test_the_tables_and_entries_of_the_journal_are_those_of_the_code() -> None:
    text = section(PAGE, "### The journal")
    assert {_bare(row[0]) for row in rows(text)[2:]} == set(tables.meta.metadata.tables)
    (listed,) = re.findall(r"Kinds of entries: (.*?)\. What", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == set(_tags(events.Event))


def test_every_type_of_frame_is_told() -> None:
    for type in (bundle.Data, bundle.More, bundle.Missing, bundle.Failed, bundle.End):
        assert f"| `{type.__struct_config__.tag}` |" in PAGE


def test_every_field_of_the_manifest_is_told() -> None:
    text = section(PAGE, "## The manifest")
    fields = {_bare(row[0]) for row in rows(text)}
    whole: set[str] = set()
    for field, type in (
        ("package", manifest.PackageName),
        ("nupkg", manifest.NupkgDigests),
        ("parts[]", manifest.Part),
    ):
        whole |= {f"{field}.{name}" for name in type.__struct_fields__}
    whole |= set(manifest.ManifestBody.__struct_fields__) - {"package", "nupkg"}
    assert fields - {"field", "---"} == whole


# --- limits


def _limit_rows() -> dict[str, str]:
    return {_bare(row[0]): row[1] for row in rows(section(PAGE, "## Limits")) if "." in row[0]}


def _value(text: str) -> float:
    number, _, unit = text.partition(" ")
    return float(number.replace(",", "")) * UNITS[unit]


def _default(type: type, name: str) -> object:
    fields = dataclasses.fields(type) if dataclasses.is_dataclass(type) else msgspec.structs.fields(type)
    return next(field.default for field in fields if field.name == name)


def _in_code(path: str) -> object:
    module_name, _, name = path.rpartition(".")
    try:
        module: ModuleType = importlib.import_module(module_name)
    except ModuleNotFoundError:
        module_name, _, type_name = module_name.rpartition(".")
        found = getattr(importlib.import_module(module_name), type_name)
        return _default(found, name) if isinstance(found, type) else getattr(found, name)
    return getattr(module, name)


@pytest.mark.parametrize(("path", "told"), sorted(_limit_rows().items()))
def test_every_limit_on_the_page_is_the_one_in_the_code(path: str, told: str) -> None:
    assert _value(told) == pytest.approx(_in_code(path))


@pytest.mark.parametrize(
    ("prefix", "type"),
    [
        ("relay.server.http.connection.Limits", Limits),
        ("relay.protocol.connection.ClientLimits", ClientLimits),
        ("relay.package.zip_reader.WalkLimits", WalkLimits),
    ],
)
def test_no_limit_of_these_is_left_out(prefix: str, type: type) -> None:
    assert {f"{prefix}.{field.name}" for field in dataclasses.fields(type)} <= set(_limit_rows())


@pytest.mark.parametrize(
    "name",
    [
        "agent.checks.run_checks",
        "agent.orders.journal",
        "agent.runs.masking",
        "agent.runs.secret_forms",
        "agent.orders.orders",
        "agent.orders.outbox",
        "agent.operations",
        "agent.poller",
        "agent.reporter",
        "agent.service",
        "orchestrator.replication.cascade",
        "relay.written.yaml_positions",
        "orchestrator.fleet.presence",
        "orchestrator.deployment.notify",
        "orchestrator.releases.release",
        "orchestrator.trust.secrets",
        "orchestrator.files.values",
        "orchestrator.files.variables",
        "relay.protocol.messages",
        "relay.encoding.choose_bases",
        "relay.package.chunk",
        "relay.package.chunking",
        "relay.encoding.deltas",
        "relay.encoding.codecs",
        "relay.encoding.bundle",
        "relay.package.identity",
        "relay.encoding.zstd_stream",
        "relay.package.manifest",
        "relay.package.nuspec",
        "relay.encoding.planner",
        "relay.package.ranges",
        "relay.transfer.download",
        "relay.server.relay_download",
        "relay.transfer.link_history",
        "relay.mail.letter_database",
        "relay.mail.letters",
        "relay.mail.mailbox",
        "relay.support.rate_limit",
        "relay.transfer.encoder_pool",
        "relay.transfer.replicate",
        "relay.transfer.sender",
        "relay.server.arrivals",
        "relay.mail.presences",
        "relay.server.http.misuse",
        "relay.server.replications",
        "relay.stores.volume",
        "relay.trust.envelopes",
        "relay.trust.keys",
    ],
)
def test_no_named_number_of_these_modules_is_left_out(name: str) -> None:
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    named = set()
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            named |= {one.id for one in names if isinstance(one, ast.Name)}
    module = importlib.import_module(name)
    numbers = {one for one in named if one.isupper() and not one.startswith("_")}
    numbers = {one for one in numbers if type(getattr(module, one)) in {int, float}}
    assert numbers, "the scan finds nothing: it is broken"
    assert {f"{name}.{one}" for one in numbers} <= set(_limit_rows())


def test_the_table_of_lines_is_the_one_that_is_planned_by() -> None:
    def speed(rate: float) -> str:
        return "any" if rate == math.inf else f"{rate * 8 / 1e6:g} Mbit/s"

    def mib(size: int) -> str:
        return f"{size / (1 << 20):g} MiB"

    told = rows(section(PAGE, "### Lines"))[2:]
    assert told == [
        [
            kind.name,
            speed(kind.up_to),
            f"{kind.first_run >> 20} to {mib(kind.longest_run)}",
            mib(kind.delta_run),
            mib(kind.segment),
            mib(kind.delta_segment),
            str(kind.connections),
            kind.spares,
        ]
        for kind in LINES
    ]
    assert {kind.base_share for kind in LINES if kind.spares == "bytes"} == {3}
    assert {kind.base_share for kind in LINES if kind.spares != "bytes"} == {2}


# --- problems


@functools.cache
def _answered() -> set[tuple[int, str]]:
    """Every (status, code) that the relay's source can answer with."""
    found = set()
    for path in (ROOT / "relay/server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            status, code = (getattr(arg, "value", None) for arg in node.args[:2])
            if isinstance(status, int) and code in TITLES:
                found.add((status, str(code)))
    by_error = {(status, code) for _, status, code in _BY_ERROR}
    tokens = {(type.status, type.code) for type in (ForbiddenError, MisplacedTokenError, UnauthenticatedError)}
    return found | by_error | tokens


def test_every_problem_code_is_told_with_its_title_and_no_other_is() -> None:
    told = {_bare(row[1]): row[2] for row in rows(section(PAGE, "## Problems"))[2:]}
    assert told == dict(TITLES)


def test_problems_are_told_with_a_status_that_the_relay_answers() -> None:
    told = {(int(row[0]), _bare(row[1])) for row in rows(section(PAGE, "## Problems"))[2:]}
    assert {pair for pair in _answered() if pair not in told} == set()
    # These come from aiohttp's own refusals, by their status alone.
    from aiohttp import web

    own = {web.HTTPMethodNotAllowed("GET", []), web.HTTPBadRequest()}
    by_status = {(verdict.status, verdict.code) for verdict in map(verdict_of, own)}
    assert told - _answered() == by_status - _answered()


# --- examples


def test_the_manifest_example_is_canonical_and_has_the_digest_that_the_page_says() -> None:
    assert f"`sha256:{EXAMPLE.id}`" in PAGE
    assert manifest.encode(EXAMPLE.body) == EXAMPLE.canonical
    assert EXAMPLE.tree_parts == [0, 1]
    assert EXAMPLE.tree_chunks == [0]


def test_the_stored_chunk_example_decodes_to_the_first_chunk_of_the_example() -> None:
    chunk = decode_stored(EXAMPLE.chunk_id(0), _hex(block(PAGE, "hex stored")))
    assert chunk.data == b"Hello, site!\n#!/bin/sh\necho hello\n"
    assert chunk.size == EXAMPLE.chunks[0].size


def test_the_bundle_example_decodes_to_what_its_notes_say() -> None:
    decoder = BundleDecoder(lambda id: EXAMPLE if id == EXAMPLE.id else None)
    received, not_sent, whole = (event for batch in decoder.feed(_hex(block(PAGE, "hex bundle"))) for event in batch)
    decoder.finish()
    assert isinstance(received, Received)
    assert isinstance(received.chunk, Chunk)
    assert received.chunk.id == EXAMPLE.chunk_id(0)
    assert not_sent == NotSent(((EXAMPLE.id, 1),), "arriving")
    assert whole == Whole(2)


def test_a_flipped_byte_of_the_bundle_example_is_seen() -> None:
    good = _hex(block(PAGE, "hex bundle"))
    at = good.index(b"Hello")
    decoder = BundleDecoder(lambda id: EXAMPLE if id == EXAMPLE.id else None)
    found = [event for batch in decoder.feed(good[:at] + b"J" + good[at + 1 :]) for event in batch]
    assert not any(isinstance(event, Received) for event in found)


def test_the_envelope_example_is_signed_by_the_key_of_the_trust_example() -> None:
    envelope = block(PAGE, "json envelope").strip().encode()
    said = check_manifest_signature(
        envelope,
        parse_pins(block(PAGE, "json trust").encode()),
        id_key="demo.tiny",
        version="1.0.0",
        manifest_id=EXAMPLE.id,
        nupkg_sha256=EXAMPLE.nupkg.sha256,
    )
    assert said.name == "Demo.Tiny 1.0.0"
    payload = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    assert json.loads(block(PAGE, "json statement")) == payload


def test_the_token_example_is_the_one_of_the_record_example() -> None:
    (text,) = re.findall(r"`(wst_[0-9a-f]{8}_[\w-]{43}_[0-9a-f]{8})`", PAGE)
    tokens = parse_tokens(yaml.safe_load(block(PAGE, "yaml tokens"))["tokens"])
    identity = tokens.check(text, datetime(2026, 2, 1, tzinfo=UTC))
    assert identity.name == "fra agents"
    assert identity.scopes == {"read"}
    with pytest.raises(UnauthenticatedError):
        tokens.check(text, datetime(2026, 4, 1, tzinfo=UTC))
