"""YAML with positions: all mistakes of a file, each with its line; and nothing of YAML that grows or acts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from harness.schema_check import plain
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.files.script_files import OnDisk, ScriptPathError, check_script_path, read_script
from relay.written.yaml_positions import (
    DEPTH_MAX,
    FILE_MAX,
    Located,
    Mistake,
    PlanError,
    load,
    parse,
    show_path,
    sorted_mistakes,
)


def read(text: str | bytes) -> Located:
    return parse(text if isinstance(text, bytes) else text.encode(), "x.yaml", "/")


def mistakes(text: str | bytes) -> list[str]:
    try:
        found = read(text).mistakes
    except PlanError as error:
        found = error.mistakes
    assert found
    return [str(mistake) for mistake in found]


@pytest.fixture(params=["libyaml", "python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers: which one a machine has must not matter."""
    if request.param == "python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    elif not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML was built without libyaml here")


@pytest.mark.usefixtures("parser")
def test_plain_words_are_read_as_yaml_1_2_has_them() -> None:
    text = "on: [no, yes, off, 2026-12-20, 1:30, 010, 0x1f, 0o17, 1.10, 1e3, .5, true, null, ~, '8080', 7d]"
    expected = ["no", "yes", "off", "2026-12-20", "1:30", 10, 31, 15, 1.1, 1000.0, 0.5, True, None, None, "8080", "7d"]
    assert plain(read(text).root) == {"on": expected}


@pytest.mark.usefixtures("parser")
def test_every_path_knows_its_line() -> None:
    document = read("a: 1\nsteps:\n  - name: x\n    verify: [ {http: u} ]\n  -\n    name: y\n")
    assert document.lines["steps",] == 2
    assert document.lines["steps", 0, "verify", 0, "http"] == 4
    assert document.lines["steps", 1, "name"] == 6
    assert document.mistake(("steps", 1, "to"), "t") == Mistake("x.yaml", 6, "steps[1].to", "t")


@pytest.mark.usefixtures("parser")
def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    text = "a: 1\nb: &big [x]\na: 2\nc: *big\nd: !!python/object:os.system x\n? [k]\n: v\n"
    assert mistakes(text) == [
        "x.yaml:2: b: has an anchor ('big'): leave it out",
        "x.yaml:3: a: stands twice, first in line 1: keep one of them",
        "x.yaml:4: c: is an alias ('big'): write the value itself",
        "x.yaml:5: d: has a tag ('tag:yaml.org,2002:python/object:os.system'): leave it out",
        "x.yaml:6: has a key that is a list or a mapping: expected a word",
    ]


@pytest.mark.usefixtures("parser")
def test_a_bomb_of_aliases_is_refused_where_it_begins() -> None:
    text = "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'},*a]\n" for i in range(40))
    assert mistakes(text)[0].startswith("x.yaml:1: a: has an anchor")


NESTED = [("[", "]"), ("{a: ", "}"), ("- ", "")]


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(("opening", "closing"), NESTED)
def test_a_document_that_is_nested_a_level_too_deep_is_refused(opening: str, closing: str) -> None:
    def nested(levels: int) -> str:
        return f"{opening * levels}x{closing * levels}"

    read(nested(DEPTH_MAX))
    assert mistakes(nested(DEPTH_MAX + 1)) == [f"x.yaml:1: is nested deeper than {DEPTH_MAX} levels"]


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("opening", [opening for opening, _ in NESTED])
def test_a_document_that_is_nested_without_end_is_refused(opening: str) -> None:
    """The parser reads ahead and may be the first to refuse it: its words are its own."""
    assert mistakes(opening * 100_000)[-1].startswith("x.yaml:1: is ")


@pytest.mark.usefixtures("parser")
def test_a_second_document_is_refused() -> None:
    assert mistakes("a: 1\n---\nb: 2\n") == ["x.yaml:2: is a second document: expected one document in one file"]


@pytest.mark.usefixtures("parser")
def test_broken_yaml_names_its_line() -> None:
    assert mistakes("a: 1\nb: [1, 2\nc: 3\n")[0].startswith("x.yaml:3: is not YAML: ")


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a: 1\nb: \xff\n", "x.yaml:2: is not UTF-8"),
        ("a: 1\n\nb: \x07\n", "x.yaml:3: holds the character U+0007"),
        ('a: "x\\0y"\n', "x.yaml:1: a: holds NUL"),
        ('a: "x\\ud800y"\n', "x.yaml:1: "),
        (b"#" * (FILE_MAX + 1), "x.yaml: is larger than 1048576 bytes"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(text: str | bytes, expected: str) -> None:
    assert mistakes(text)[0].startswith(expected)


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~\n"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    assert plain(read(text).root) == {}


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="ab:-[]{}#&*!|>'\"\\\n ?,01~%@`", max_size=60)))
def test_any_bytes_are_a_document_or_a_refusal(text: bytes | str) -> None:
    try:
        found: list[object] = list(read(text.encode() if isinstance(text, str) else text).lines)
    except PlanError as error:
        found = list(error.mistakes)
    assert found


words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\x7f", exclude_categories=["Cc", "Cs"]))
trees = st.recursive(
    st.one_of(st.integers(-(10**9), 10**9), st.booleans(), st.none(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)


@pytest.mark.long
@given(st.dictionaries(words, trees, max_size=4))
def test_what_yaml_writes_is_read_as_it_was(tree: dict[str, object]) -> None:
    # In quotes, all that is no text would carry a tag.
    texts = _texts(tree)
    assert plain(read(yaml.safe_dump(texts, default_style='"', sort_keys=False)).root) == texts


def _texts(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: _texts(value) for key, value in tree.items()}
    return [_texts(item) for item in tree] if isinstance(tree, list) else str(tree)


def test_a_path_shows_odd_keys_in_quotes() -> None:
    assert show_path(("machines", "web 1", "tags", 0, "a-b")) == "machines['web 1'].tags[0].a-b"


def test_a_mistake_drives_no_terminal() -> None:
    text = 'a: 1\n"x\\e[31m\\nERR": 1\n"x\\e[31m\\nERR": 2\n'
    told = mistakes(text)
    assert len(told) == 1
    assert told[0].isprintable()


def test_the_text_of_an_error_is_bounded_and_its_mistakes_are_not() -> None:
    error = PlanError(Mistake("f", n, "p", "t") for n in range(500))
    assert len(error.mistakes) == 500
    assert str(error).splitlines()[-1] == "and 400 more mistakes"
    assert error.exit_code == 2


def test_mistakes_come_once_and_in_the_order_of_files_and_lines() -> None:
    one, two, three = Mistake("a", 3, "", "t"), Mistake("b", 1, "", "t"), Mistake("", 0, "--label", "t")
    assert sorted_mistakes([two, one, three, one, two], ["a", "b"]) == [three, one, two]


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"release.yaml: cannot be read: No such file or directory; look elsewhere$"):
        load(str(tmp_path / "release.yaml"), "look elsewhere")


def test_a_folder_or_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match="no regular file"):
        load(str(tmp_path / "pipe"))
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        load(str(tmp_path))


# --- scripts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "ops").mkdir(parents=True)
    (folder / "ops/run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "outside.sh").write_text("#!/bin/sh\n")
    return folder


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../outside.sh", "ops/../../outside.sh", "./ops/run.sh", "ops//run.sh", "a\\b", "C:x", "", "a\n"],
)
def test_a_script_path_that_could_leave_the_folder_is_refused(path: str) -> None:
    with pytest.raises(ScriptPathError, match="expected one below this file's folder"):
        check_script_path(path)


def test_a_script_is_read_below_its_folder_also_through_a_link_that_stays(folder: Path) -> None:
    (folder / "link.sh").symlink_to("ops/run.sh")
    assert read_script(str(folder), "ops/run.sh") == read_script(str(folder), "link.sh") == b"#!/bin/sh\n"


def test_a_link_out_of_the_folder_is_no_script(folder: Path) -> None:
    (folder / "file.sh").symlink_to("../outside.sh")
    (folder / "up").symlink_to("..")
    for path in ("file.sh", "up/outside.sh"):
        with pytest.raises(ScriptPathError, match="leads out of"):
            read_script(str(folder), path)


def test_a_script_that_is_missing_or_no_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.sh")
    for path, why in (("gone.sh", "there is no script"), ("ops", "cannot be read"), ("pipe.sh", "no regular file")):
        with pytest.raises(ScriptPathError, match=why):
            read_script(str(folder), path)


def test_a_script_is_hashed_once_for_one_plan(folder: Path) -> None:
    files = OnDisk()
    first = files.script(str(folder), "ops/run.sh")
    (folder / "ops/run.sh").write_text("changed")
    assert files.script(str(folder), "ops/run.sh") == first != OnDisk().script(str(folder), "ops/run.sh")


@pytest.mark.processes
def test_a_file_that_git_tracks_is_found_also_behind_a_link(folder: Path, tmp_path: Path) -> None:
    try:
        subprocess.run(["git", "init", "-q", str(folder)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed: nothing can be tracked here")
    subprocess.run(["git", "add", "ops/run.sh"], cwd=folder, check=True)
    (folder / "free.token").write_text("x")
    (tmp_path / "link").symlink_to("project/ops/run.sh")
    files = OnDisk()
    assert files.is_tracked(str(folder / "ops/run.sh"))
    assert files.is_tracked(str(tmp_path / "link"))
    assert not files.is_tracked(str(folder / "free.token"))
    assert not files.is_tracked(str(tmp_path / "outside.sh"))
    assert not files.is_tracked(str(tmp_path / "nowhere/at/all"))
