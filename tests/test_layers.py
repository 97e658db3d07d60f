"""Imports go one way: between the houses, between the folders of a house, and between files. Told by the source.

`python tests/test_layers.py` prints the map: each folder, how many files it has, and on which folders it stands.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = {
    "relay": (
        "terminal", "audit", "support", "written", "network", "package", "trust", "stores", "engines", "encoding", "protocol", "rebuild", "transfer", "mail",
        "server",
    ),
    "agent": ("orders", "relays", "trees", "runs", "checks"),
    "orchestrator": (
        "files", "depot", "plan", "trust", "journal", "locks", "people", "releases", "replication", "fleet", "rolling", "deployment", "compare",
        "commands",
    ),
    "benchmarks": ("lines", "support"),
}  # fmt: skip
"""From the ground up, houses and the folders inside each: one may import itself and what stands before it."""
GROUND = {
    "relay": ("errors", "folders", "config"),
    "agent": ("acts", "platform", "config", "disk"),
    "orchestrator": ("acts", "paths"),
    "benchmarks": (),
}
"""Files at the top of a house on which all of it stands. Every other file at the top is its roof."""
ROOF = {
    "relay": ("cli", "main"),
    "agent": ("cli", "inbox", "operations", "poller", "reporter", "scheduler", "service"),
    "orchestrator": (),
    "benchmarks": (
        "application", "cascades", "cli", "exact", "line", "matrix", "memory", "pairs", "peers", "road", "rollout",
        "transfer",
    ),
}  # fmt: skip
MOST_FILES = 12
"""In one folder. More means that a chapter wants parting."""
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


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[str, ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    """Every module that the source names in an import, at any depth, also under TYPE_CHECKING.

    `from a import b` counts as `a` and as `a.b`, as `b` may be a module.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in HOUSES}


def within(name: str, *allowed: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def sources_of(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no source under {folders}: this test looks at nothing"
    return found


def file_graph() -> dict[str, set[str]]:
    """For each module of ours, the modules that it imports. A folder's own name counts only where it is one's own text."""
    modules = {module_name(path): path for path in SOURCES}
    folders = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    return {name: (ours(imports(path)) & modules.keys()) - folders - {name} for name, path in modules.items()}


def place(module: str) -> tuple[int, int]:
    """How high a module stands: its house, and its floor there, the ground below and the roof above all folders."""
    house, _, rest = module.partition(".")
    first, _, inner = rest.partition(".")
    folders = HOUSES[house]
    floor = folders.index(first) if first in folders else -1 if first in GROUND[house] else len(folders)
    assert first in {"", *folders, *GROUND[house], *ROOF[house]}, f"{module} stands in no chapter: {inner or first}"
    return list(HOUSES).index(house), floor


def upward(graph: Mapping[str, set[str]]) -> set[str]:
    return {f"{one} → {other}" for one, others in graph.items() for other in others if place(other) > place(one)}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_points_up() -> None:
    assert upward(file_graph()) == set()


def test_no_imports_go_in_a_circle() -> None:
    assert circle(file_graph()) == []


def test_handlers_stand_on_http_and_not_the_other_way() -> None:
    above = {f"{one} → {other}" for one, others in file_graph().items() if within(one, "relay.server.http")
             for other in others if within(other, "relay.server") and not within(other, "relay.server.http")}  # fmt: skip
    assert above == set()


def test_no_folder_has_more_files_than_a_chapter_holds() -> None:
    files = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py")
    assert {folder: count for folder, count in files.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=module_name)
def test_every_folder_says_what_is_inside_and_where_to_start(path: Path) -> None:
    text = ast.get_docstring(tree_of(path)) or ""
    assert len(text.splitlines()) == 2, f"{module_name(path)}: two lines"
    named = {other.stem for other in path.parent.glob("*.py")} | {other.name for other in path.parent.iterdir()}
    assert any(f"{name}.py" in text or f"{name}/" in text for name in named), "it names the file to start with"


@pytest.mark.parametrize("path", sources_of("relay/package"), ids=module_name)
def test_packages_know_only_errors_support_and_themselves(path: Path) -> None:
    foreign = {
        name for name in ours(imports(path)) if not within(name, "relay.errors", "relay.support", "relay.package")
    }
    assert foreign - {"relay"} == set()


@pytest.mark.parametrize("path", sources_of("relay/trust"), ids=module_name)
def test_trust_knows_only_errors_identities_and_itself(path: Path) -> None:
    allowed = ("relay.errors", "relay.trust", "relay.package.identity", "relay.support")
    assert {name for name in ours(imports(path)) if not within(name, *allowed)} - {"relay"} == set()


@pytest.mark.parametrize("path", sources_of("relay/stores"), ids=module_name)
def test_stores_know_only_errors_packages_and_themselves(path: Path) -> None:
    allowed = ("relay.errors", "relay.folders", "relay.audit", "relay.support", "relay.package", "relay.stores")
    assert {name for name in ours(imports(path)) if not within(name, *allowed)} - {"relay"} == set()


@pytest.mark.parametrize(
    "path", sources_of("relay/trust", "orchestrator/plan", "orchestrator/rolling"), ids=module_name
)
def test_what_decides_opens_no_sockets(path: Path) -> None:
    assert {name for name in imports(path) if within(name, *ROADS)} == set()


def test_errors_stand_on_nothing_of_ours() -> None:
    assert ours(imports(ROOT / "relay/errors.py")) == set()


def test_the_protocols_text_needs_no_server_and_no_client() -> None:
    """Both sides read relay/protocol/messages.py; it opens nothing."""
    path = ROOT / "relay/protocol/messages.py"
    assert {name for name in ours(imports(path)) if within(name, "relay.protocol")} == set()
    assert {name for name in imports(path) if within(name, *ROADS)} == set()


def test_only_the_server_is_a_server() -> None:
    """What a client of relays imports brings no server with it, but for the command that serves."""
    users = [
        module_name(path)
        for path in SOURCES
        if any(within(name, "relay.server") for name in imports(path))
        and not within(module_name(path), "relay.server", "benchmarks")
    ]
    assert users == ["relay.cli"]


@pytest.mark.parametrize("name", ["candidates", "health", "ranking"])
def test_what_ranks_relays_is_pure(name: str) -> None:
    """It decides; clock, files and sockets are the caller's."""
    impure = ROADS | {"io", "logging", "os", "pathlib", "tempfile", "time"}
    assert {found for found in imports(ROOT / f"agent/relays/{name}.py") if within(found, *impure)} == set()


def test_names_point_up_only_in_the_table_of_commands() -> None:
    """Imports by name escape the tests above; there is one, and its names are those of the table."""
    by_name = [
        module_name(path)
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}
    ]
    assert by_name == ["relay.main"]
    from relay.main import _COMMANDS

    modules = {module for module, _, _ in _COMMANDS.values()}
    assert all(within(module, "orchestrator.commands") or module.endswith(".cli") for module in modules)


def test_the_scan_sees_an_import_that_points_up(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("def late():\n    from orchestrator import depot\n", encoding="utf-8")
    assert ours(imports(source)) == {"orchestrator", "orchestrator.depot"}


def test_the_scan_sees_arrows_that_point_up_and_circles() -> None:
    graph = {"relay.trust.keys": {"relay.stores.disk"}, "relay.stores.disk": {"relay.trust.keys"}}
    assert upward(graph) == {"relay.trust.keys → relay.stores.disk"}
    assert set(circle(graph)) == {"relay.trust.keys", "relay.stores.disk"}
    assert upward({"relay.errors": {"relay.support.durable"}, "relay.cli": {"relay.server.app"}}) == {
        "relay.errors → relay.support.durable"
    }


def chapter(module: str) -> str:
    house, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    return f"{house}/{first}" if first in HOUSES[house] else house


def print_map() -> None:
    graph = file_graph()
    files = Counter(chapter(module_name(path)) for path in SOURCES if path.name != "__init__.py")
    for house, folders in HOUSES.items():
        for name in [*(f"{house}/{folder}" for folder in folders), house]:
            below = {chapter(other) for one, others in graph.items() if chapter(one) == name for other in others}
            print(f"{name:26}{files[name]:3} files  stands on {', '.join(sorted(below - {name})) or 'nothing of ours'}")
    arrows = sum(map(len, graph.values()))
    print(f"{len(graph)} files, {arrows} arrows, {len(upward(graph))} of them up; circle: {circle(graph) or 'none'}")


if __name__ == "__main__":
    print_map()
