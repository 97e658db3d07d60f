"""What a person sees of a deployment on a terminal: every line that a log would have, in order, and bars that end.

The terminal is a real pseudo-terminal; what is to be seen on it says an emulator. Agents are tasks of one process.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.farm import Farm
from harness.process import Done, forked, wait_for
from harness.seed import SOAK
from harness.terminal import Terminal

from relay.terminal.bars import MOST_ROWS

soak = [pytest.mark.soak, pytest.mark.skipif(not SOAK, reason="1 and 30 machines are looked at in `make soak`")]
AGENTS = "import sys\nfrom benchmarks.support.agents import main\nmain()"
SCRIPTS = {"before.sh": "#!/bin/sh\nexit 0\n", "deploy/configure.sh": "#!/bin/sh\necho configured\n"}
VERSIONS = ("1.0.0", "1.1.0", "1.2.0")


class Fleet:
    """So many machines with one release in three versions."""

    def __init__(self, farm: Farm, machines: int) -> None:
        self.farm = farm
        self.names = [f"web{number:02}" for number in range(1, machines + 1)]
        farm.add_relay("fra")
        for name in self.names:
            farm.add_agent(name)
        for version in VERSIONS:
            farm.add_package("Shop.Web", version, {"version.txt": version, "app.txt": f"{version} " * 50_000})
        for path, text in SCRIPTS.items():
            farm.write_script(f"environments/{path}" if path == "before.sh" else path, text)
        web = {"name": "web", "roles": ["web"], "deploy": "web", "to": str(farm.folder / "srv" / "${machine.name}")}
        rolling = {"rotation": "web", "strategy": {"rolling": {"window": 3}}}
        apply = {"apply": [{"name": "configure", "script": "deploy/configure.sh"}, "switch"]}
        farm.write_process(packages={"web": "Shop.Web"}, steps=[web | rolling | apply])
        farm.write_environment(rotation={"web": {"before": "before.sh", "after": "before.sh"}})

    def plain(self) -> Done:
        return self.farm.deploy("1.0.0", "--package", "web=1.0.0")

    def on(self, terminal: Terminal, version: str) -> Done:
        words = ("release", "deploy", version, "--environment", "production", "--package", f"web={version}")
        return self.farm.start(*words, terminal=terminal.slave, TERM="xterm-256color").result()


@pytest.fixture(scope="module", params=[pytest.param(1, marks=soak), 6, pytest.param(30, marks=soak)])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Farm(tmp_path_factory.mktemp("terminal")) as farm:
        made = Fleet(farm, request.param)
        with forked(farm.home, AGENTS, farm.folder / "machines") as agents:
            wait_for(lambda: "ready" in agents.out or not agents.is_alive)
            assert agents.is_alive, agents.err
            yield made


@pytest.fixture(scope="module")
def plain(fleet: Fleet) -> list[str]:
    """The lines of a run whose output is a file."""
    done = fleet.plain()
    assert done.code == 0, done.out + done.err
    assert "\x1b" not in done.out + done.err
    return done.out.splitlines()


@pytest.mark.parametrize(("columns", "version"), [(80, "1.1.0"), pytest.param(120, "1.2.0", marks=soak)])
def test_every_line_of_a_plain_run_is_to_be_read_on_a_terminal(
    fleet: Fleet, plain: list[str], columns: int, version: str
) -> None:
    with Terminal(columns) as terminal:
        done = fleet.on(terminal, version)
        terminal.close()
        assert done.code == 0, terminal.lines
        rows = joined(terminal.lines, columns)
        assert by_machine(rows, fleet.names) == by_machine(plain, fleet.names)
        assert [row for row in rows if row.endswith(" s  succeeded")], rows
        told = terminal.raw.decode()
    # Nothing of the bars is left, and each came to its end.
    assert not [row for row in rows if "━" in row or "─" in row]
    whole = len(fleet.names) + 2  # the relay has one for each package
    drawn = [row.rpartition("\x1b[2K")[2] for row in re.split(r"\r?\n|\r", told)]
    if whole <= MOST_ROWS:
        keys = [*fleet.names, "fra Shop", "fra Waystation"]
        last = [[row for row in drawn if row.startswith(key) and " of " in row][-1] for key in keys]
    else:
        last = [[row for row in drawn if row.endswith(f", {whole} of {whole} through")][-1]]
    figures = [re.search(r"(\d[\d.]* \w+) of (\d[\d.]* \w+)(, \d+ of \d+ through)?$", row) for row in last]
    assert [row for row, found in zip(last, figures, strict=True) if not found or found[1] != found[2]] == []


START = re.compile(r" +\d+\.\d s  | {2}\S|deployment |to |fetched ")
"""How a line of these commands begins."""


def joined(rows: list[str], columns: int) -> list[str]:
    """Lines again: a row goes on in the next where it came to the edge, but for a space that stood there."""
    lines: list[str] = []
    goes_on = False
    for row in rows:
        if goes_on and not START.match(row):
            lines[-1] += row
        else:
            lines.append(row)
        goes_on = len(row) >= columns - 1
        if goes_on:
            lines[-1] += " " * (columns - len(row))
    return [line.rstrip() for line in lines]


def by_machine(lines: list[str], names: list[str]) -> dict[str, list[str]]:
    """What is said of each machine, in order and without numbers; of none: as a whole, in any order."""
    found: dict[str, list[str]] = defaultdict(list)
    for told in lines:
        name = next((name for name in names if name in told), "")
        line = re.sub(r" (already|\(.* over the line\))$", "", told)
        found[name].append(re.sub(r"01[0-9A-Z]{24}|\d+[\d.]* ?(KiB|MiB|B|s)?", "#", line).strip())
    found[""] = sorted(line for line in found[""] if not line.startswith("to "))
    return found


def test_a_dumb_terminal_and_no_color_get_lines_alone(fleet: Fleet, plain: list[str], tmp_path: Path) -> None:
    for variables, codes in (({"TERM": "dumb"}, b"\x1b"), ({"TERM": "xterm", "NO_COLOR": "1"}, b"\x1b[3")):
        with Terminal() as terminal:
            words = ("package", "fetch", "Shop.Web", "1.0.0", "--output", tmp_path / f"{variables['TERM']}.nupkg")
            assert fleet.farm.start(*words, terminal=terminal.slave, **variables).result().code == 0
            terminal.close()
            assert codes not in bytes(terminal.raw)
            assert joined(terminal.lines, 80)[-1].startswith("fetched ")
