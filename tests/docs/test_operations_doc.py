"""docs/operations.md and docs/architecture.md name what is there: limits, metrics, houses and libraries."""

from __future__ import annotations

import dataclasses
import re
import tomllib

from harness.pages import DOCS, ROOT, rows
from prometheus_client import Counter, Gauge

from relay.config import RelayConfig
from relay.server import metrics
from relay.server.app import limits_of

OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")


def _table(page: str, head: str) -> set[str]:
    """The names in the first column of the table that begins with the cell `head`."""
    found: set[str] = set()
    inside = False
    for row in rows(page):
        if row[0] == head:
            inside = True
        elif inside and not row[0].startswith(("`", "-")):
            break
        elif inside:
            found |= set(re.findall(r"`([^`]+)`", row[0]))
    return found


def test_the_limits_on_the_page_are_those_that_relay_yaml_may_name() -> None:
    (listed,) = re.findall(r"^The limits that can be set.*?: (.*?)\.$", OPERATIONS, re.MULTILINE | re.DOTALL)
    limits = limits_of(RelayConfig())
    assert set(re.findall(r"`(\w+)`", listed)) == {field.name for field in dataclasses.fields(limits)}


def test_the_metrics_on_the_page_are_those_of_the_relay() -> None:
    kept = [each for each in vars(metrics).values() if isinstance(each, Counter | Gauge)]
    families = [family for each in kept for family in each.collect()]
    assert _table(OPERATIONS, "metric") == {
        family.name + ("_total" if family.type == "counter" else "") for family in families
    }


def test_the_libraries_on_the_page_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=; ]", one)[0] for one in project["dependencies"]}
    assert _table(ARCHITECTURE, "library") == needed


def test_every_house_on_the_page_is_there() -> None:
    named = _table(ARCHITECTURE, "house")
    assert {"relay/package/", "agent/runs/", "orchestrator/plan/"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_file_of_a_house_that_is_named_in_short_is_there() -> None:
    """`tree.py` in the row of `agent/` is agent/trees/tree.py."""
    seen = 0
    for row in rows(ARCHITECTURE):
        folder = re.fullmatch(r"`([\w/]+/)`", row[0])
        for name in re.findall(r"`(\w+\.py)`", row[1]) if folder else ():
            assert folder is not None
            assert (ROOT / folder[1] / name).is_file(), f"{folder[1]}{name}"
            seen += 1
    assert seen > 5
