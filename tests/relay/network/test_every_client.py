"""No client goes out by a way of its own: sessions, connections and proxies are made in relay/network."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOUSES = ("relay", "agent", "orchestrator")
HOME = ROOT / "relay/network"
SOURCES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py") if HOME not in path.parents)
OWN_WAYS = re.compile(
    r"aiohttp\.TCPConnector|asyncio\.open_connection|socket\.create_connection|\.create_connection\("
    r"|trust_env|urllib\.request|http\.client|smtplib"
)


def own_ways(source: str) -> set[str]:
    """What the code calls or names, text and comments apart."""
    if not OWN_WAYS.search(source):
        return set()
    found = {
        ast.unparse(node) if isinstance(node, ast.Attribute) else f".{node.arg}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.keyword) and node.arg)
    }
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    return {one for one in found | imported if OWN_WAYS.search(one)}


def bare_sessions(source: str) -> int:
    """Sessions without a connector of ours."""
    if "ClientSession" not in source:
        return 0
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    sessions = [call for call in calls if ast.unparse(call.func).endswith("ClientSession")]
    return sum("connector" not in {keyword.arg for keyword in call.keywords} for call in sessions)


def test_no_client_of_ours_connects_by_itself() -> None:
    assert len(SOURCES) > 100, "the scan finds nothing: it is broken"
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}
    assert {name: ways for name, text in texts.items() if (ways := own_ways(text))} == {}
    assert [name for name, text in texts.items() if bare_sessions(text)] == []


@pytest.mark.parametrize(
    "source",
    ["import urllib.request", "aiohttp.TCPConnector()", "asyncio.open_connection('a', 1)", "f(trust_env=True)"],
)
def test_the_scan_sees_a_way_of_ones_own(source: str) -> None:
    assert own_ways(source)


def test_the_scan_sees_a_session_without_our_connector() -> None:
    assert bare_sessions("aiohttp.ClientSession(timeout=3)") == 1
    assert bare_sessions("aiohttp.ClientSession(connector=connector())") == 0
