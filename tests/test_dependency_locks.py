"""The locks hold all that pyproject.toml asks for, by hash, and tell nothing of the machine that wrote them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "deploy/locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = PROJECT["dependency-groups"]
INSTALLED = [
    *PROJECT["project"]["dependencies"],
    *(each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra),
    *GROUPS["dev"],
    *GROUPS["build"],
]

Pins = dict[str, tuple[str, list[str]]]
"""Name → release, and the hashes of its files."""


def pins(name: str) -> Pins:
    found: Pins = {}
    for line in (LOCKS / name).read_text(encoding="utf-8").splitlines():
        if pinned := re.match(r"([a-z0-9-]+)==([^ ;]+)", line):
            found[pinned[1]] = (pinned[2], [])
            hashes = found[pinned[1]][1]
        elif held := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})( \\)?", line):
            hashes.append(held[1])
        else:
            assert line.lstrip().startswith("#"), f"{name}: {line}"
    return found


def missed(wanted: list[str], held: Pins) -> list[str]:
    """Those that the lock does not answer: no such name, or a release out of the range."""
    requirements = [Requirement(each) for each in wanted]
    return [
        str(each)
        for each in requirements
        if (pin := held.get(canonicalize_name(each.name))) is None or not each.specifier.contains(pin[0])
    ]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("current/libraries.txt", INSTALLED),
        ("oldest/libraries.txt", INSTALLED),
        ("current/build.txt", GROUPS["build"]),
        ("oldest/build.txt", GROUPS["build"]),
        ("uv.txt", GROUPS["lock"]),
    ],
)
def test_a_lock_answers_every_requirement_and_holds_each_release_to_hashes(name: str, wanted: list[str]) -> None:
    held = pins(name)
    assert not missed(wanted, held), "`make lock` writes it anew"
    assert [each for each, (_, hashes) in held.items() if not hashes] == []


def test_a_requirement_that_no_lock_answers_is_seen() -> None:
    held = {"click": ("8.1.7", ["00"]), "pyyaml": ("6.0.2", ["00"])}
    assert missed(["click>=8.1", "PyYAML>=6,<7"], held) == []
    assert missed(["click>=8.2", "rich"], held) == ["click>=8.2", "rich"]


@pytest.mark.parametrize("name", ["current", "oldest"])
def test_what_builds_is_of_the_same_releases_as_the_whole(name: str) -> None:
    assert pins(f"{name}/build.txt").items() <= pins(f"{name}/libraries.txt").items()


def test_what_our_own_build_requires_is_locked() -> None:
    assert set(PROJECT["build-system"]["requires"]) <= set(GROUPS["build"])


def test_every_lower_bound_is_a_release_that_the_oldest_lock_tries() -> None:
    tried = pins("oldest/libraries.txt")
    for each in map(Requirement, INSTALLED):
        (bound,) = [one.version for one in each.specifier if one.operator == ">="]
        release = tried[canonicalize_name(each.name)][0]
        assert release == bound or release.startswith(f"{bound}."), f"{each}: {release} is tried"


def test_the_locks_are_written_for_the_lowest_python_that_we_name() -> None:
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"--python-version {lowest} " in (ROOT / "deploy/lock.sh").read_text(encoding="utf-8")


def test_no_lock_names_an_index_or_a_place_on_a_machine() -> None:
    for path in LOCKS.rglob("*.txt"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"://|^-|--index|--find-links| @ |(?<!\w)/\w", text, re.MULTILINE) == [], path
