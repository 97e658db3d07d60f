"""The tables of options and keys in our pages are those of the code: `make docs` has nothing to write."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import pytest
from harness.paths import ROOT

from docs.tables import PAGES, events, keys, options, rewritten, sources

MADE = ["agent.config.AgentConfig", "relay.config.RelayConfig"]
EVENTS = ["agent.acts", "orchestrator.acts", "orchestrator.journal.trail", "relay.audit.acts"]


class Farm(msgspec.Struct):
    """A sample."""

    name: str
    """What it is called."""
    low: int = 1
    high: int = msgspec.field(name="up-to", default=2)
    """Bounds."""
    order: tuple[str, ...] = ("a", "b")
    """Who goes
    first.
    """


class Untold(msgspec.Struct):
    name: str
    """What it is called."""
    size: int = 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_tables_of_a_page_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- ") == 2 * len(sources(text)), "a comment that opens or closes no table"
    assert rewritten(text) == text, "make docs"


def test_both_files_of_settings_and_all_events_have_their_table() -> None:
    (page,) = [page for page in PAGES if page.name == "operations.md"]
    assert sorted(sources(page.read_text(encoding="utf-8"))) == sorted(MADE + EVENTS)


def test_every_event_of_every_house_is_in_a_table() -> None:
    files = [file for house in ("relay", "agent", "orchestrator") for file in (ROOT / house).rglob("acts.py")]
    assert sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files) == [
        source for source in EVENTS if source.endswith("acts")
    ]
    rows = [row for source in EVENTS for row in events(source)]
    assert len({name for name, _, _ in rows}) == len(rows) > 70
    assert all(fields.startswith("`") and when.endswith((".", ")")) for _, fields, when in rows)


def test_a_table_that_is_not_current_is_seen() -> None:
    page = "a\n<!-- key of agent.yaml: agent.config.AgentConfig -->\n| `gone` | x |\n<!-- end -->\nb\n"
    assert "| `gone` |" not in rewritten(page)
    assert "| `roots` |" in rewritten(page)
    assert rewritten(rewritten(page)) == rewritten(page)


def test_a_string_speaks_for_the_keys_above_it() -> None:
    assert list(keys(Farm)) == [
        ("`name`", "What it is called. Required."),
        ("`low`, `up-to`", "Bounds."),
        ("`order`", "Who goes first. Default: `[a, b]`."),
    ]


def test_a_key_or_an_option_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Untold\.size: no string below it"):
        list(keys(Untold))
    with pytest.raises(ValueError, match="pull --all: no help"):
        list(options(click.Command("pull", params=[click.Option(["--all"])])))


def test_an_option_is_told_with_its_names_value_and_default() -> None:
    params = [
        click.Option(["-m", "--message"], metavar="TEXT|FILE", required=True, help="See --all."),
        click.Option(["--wait"], default=1.0, show_default=True, help="Seconds."),
        click.Option(["--depot"], help="Where. [default: depot in $HOME_OF_US]"),
    ]
    assert list(options(click.Command("pull", params=list(params)))) == [
        ("`--message, -m TEXT|FILE`", "See `--all`. Required."),
        ("`--wait FLOAT`", "Seconds. Default: `1`."),
        ("`--depot TEXT`", "Where. Default: depot in `$HOME_OF_US`."),
    ]
