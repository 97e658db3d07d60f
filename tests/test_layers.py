"""Imports go one way: benchmarks → orchestrator → agent → relay. Told by the source, not by what happens to be loaded.

The one place where names point up is the table of commands in relay/main.py, and it imports by name, when it is asked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("relay", "agent", "orchestrator", "benchmarks")
"""From the ground up: each may import itself and those before it."""
SOURCES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))

ROADS = {
    "aiofiles",
    "aiohttp",
    "asyncio",
    "dns",
    "ftplib",
    "http",
    "requests",
    "select",
    "selectors",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "urllib.request",
    "urllib3",
    "uvloop",
}
"""What opens sockets or runs loops."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that the source names in an import, at any depth, also under TYPE_CHECKING.

    `from a import b` counts as `a` and as `a.b`, as `b` may be a module.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in HOUSES}


def within(name: str, *allowed: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def sources_of(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no source under {folders}: this test looks at nothing"
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    house = module_name(path).partition(".")[0]
    below = HOUSES[: HOUSES.index(house) + 1]
    assert {name for name in ours(imports(path)) if not within(name, *below)} == set()


@pytest.mark.parametrize("path", sources_of("relay/content"), ids=module_name)
def test_content_knows_only_errors_and_itself(path: Path) -> None:
    foreign = {name for name in ours(imports(path)) if not within(name, "relay.errors", "relay.content")}
    assert foreign - {"relay"} == set()


@pytest.mark.parametrize("path", sources_of("relay/trust"), ids=module_name)
def test_trust_knows_only_errors_values_of_content_and_itself(path: Path) -> None:
    foreign = {
        name
        for name in ours(imports(path))
        if not within(name, "relay.errors", "relay.trust", "relay.content.identity", "relay.content.json")
    }
    assert foreign - {"relay"} == set()


@pytest.mark.parametrize("path", sources_of("relay/stores"), ids=module_name)
def test_stores_know_only_errors_content_and_themselves(path: Path) -> None:
    foreign = {
        name for name in ours(imports(path)) if not within(name, "relay.errors", "relay.content", "relay.stores")
    }
    assert foreign - {"relay"} == set()


@pytest.mark.parametrize("path", sources_of("relay/content", "relay/trust"), ids=module_name)
def test_the_ground_opens_no_sockets(path: Path) -> None:
    assert {name for name in imports(path) if within(name, *ROADS)} == set()


def test_errors_stand_on_nothing_of_ours() -> None:
    assert ours(imports(ROOT / "relay/errors.py")) == set()


def test_the_protocols_text_needs_no_server_and_no_client() -> None:
    """Both sides read relay/wire.py; it may stand on the ground and on nothing that speaks."""
    foreign = {
        name for name in ours(imports(ROOT / "relay/wire.py")) if not within(name, "relay.content", "relay.trust")
    }
    assert foreign == set()
    assert {name for name in imports(ROOT / "relay/wire.py") if within(name, *ROADS)} == set()


def test_only_the_server_is_a_server() -> None:
    """What a client of relays imports brings no server with it, but for the command that serves."""
    users = [
        module_name(path)
        for path in SOURCES
        if any(within(name, "relay.server") for name in imports(path))
        and not within(module_name(path), "relay.server", "benchmarks")
    ]
    assert users == ["relay.cli"]


def test_ranking_is_pure() -> None:
    """agent/nearest.py decides; clock, files and sockets are the caller's."""
    impure = ROADS | {"io", "logging", "os", "pathlib", "tempfile", "time"}
    assert {name for name in imports(ROOT / "agent/nearest.py") if within(name, *impure)} == set()


def test_names_point_up_only_in_the_table_of_commands() -> None:
    """Imports by name escape the tests above; there is one, and its names are those of the table."""
    by_name = [
        module_name(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}
    ]
    assert by_name == ["relay.main"]
    from relay.main import _COMMANDS

    allowed = {f"{house}.cli" for house in HOUSES} | {"orchestrator.release_cli"}
    assert {module for module, _, _ in _COMMANDS.values()} <= allowed


def test_the_scan_sees_an_import_that_points_up(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("def late():\n    from orchestrator import depot\n", encoding="utf-8")
    assert ours(imports(source)) == {"orchestrator", "orchestrator.depot"}
