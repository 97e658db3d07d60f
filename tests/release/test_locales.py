"""The same release from processes of other locales, masks and time zones gives the same files under the same names."""

from __future__ import annotations

import os
import pty
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.farm import Farm
from harness.process import Process, run
from harness.seed import SOAK
from harness.worlds import PLAIN, latin_world, world

FILES = {"wwwroot/café.txt": "x", "wwwroot/Größe.js": "y", "应用/✓.txt": "z", "run.sh": "#!/bin/sh\n"}
NUSPEC = """<?xml version="1.0" encoding="utf-8"?><package><metadata><id>Case.Loc</id><version>1.0.0</version>
<authors>李</authors><description>应用 ✓</description></metadata></package>"""


def latin() -> tuple[str, ...]:
    found = latin_world("077")
    if not found:
        pytest.skip("localedef cannot make en_US.ISO-8859-1: an ISO-8859-1 locale is NOT tried")
    return found


WORLDS: dict[str, Callable[[], tuple[str, ...]]] = {
    "latin": latin,
    "plain": lambda: world(*PLAIN, umask="000"),
}
USUAL = list(WORLDS) if SOAK else ["latin"]


def packed(folder: Path, name: str, under: tuple[str, ...]) -> bytes:
    source = folder / "source"
    for path, text in {**FILES, "Case.Loc.nuspec": NUSPEC}.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    (source / "run.sh").chmod(0o755)
    output = folder / f"{name}.nupkg"
    words = ("package", "pack", source, "--id", "Case.Loc", "--version", "1.0.0", "--output", output)
    done = run(folder, *words, under=under)
    assert done.code == 0, done.err
    return output.read_bytes()


@pytest.mark.parametrize("name", WORLDS)
def test_a_package_is_the_same_bytes_in_every_locale(tmp_path: Path, name: str) -> None:
    assert packed(tmp_path, name, WORLDS[name]()) == packed(tmp_path, "usual", ())


@pytest.mark.parametrize("name", USUAL)
def test_a_release_gives_the_same_tree_in_every_locale(tmp_path: Path, name: str) -> None:
    under = WORLDS[name]()
    nupkg = tmp_path / "usual.nupkg"
    packed(tmp_path, "usual", ())
    seen = tmp_path / "seen-ü"
    with Farm(tmp_path / "ferme-é") as farm:
        farm.add_relay("fra")
        agent = farm.add_agent("web1")
        agent.how["under"] = under
        agent.start()
        farm.write_script("prüfen.sh", f'#!/bin/sh\necho "→ ✓"\nenv > "{seen}"\n')
        farm.write_environment()
        apply = ["switch", {"name": "look", "script": "prüfen.sh"}]
        step = {"name": "wüb", "roles": ["web"], "deploy": "app", "to": str(agent.root / "größe"), "apply": apply}
        here = {"name": "here", "run_on": "server", "deploy": "app", "script": "prüfen.sh"}
        farm.write_process(packages={"app": "Case.Loc"}, steps=[step, here])

        farm.do("package", "add", nupkg)
        done = farm.deploy("1.0.0", "--package", "app=1.0.0", under=under)
        assert done.code == 0, done.out + done.err
        log = farm.call("release", "log", "web1")
        again = farm.deploy("1.0.0")

    tree = agent.root / "größe" / "current"
    expected = {path: 0o755 if path == "run.sh" else 0o644 for path in FILES}
    found = {str(path.relative_to(tree)): path for path in tree.rglob("*") if path.is_file()}
    assert {path: stat.S_IMODE(file.stat().st_mode) for path, file in found.items()} == expected
    folders = [agent.root / "größe", *Path(tree).resolve().parents[:1], *(p for p in tree.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o755}
    assert "already current" in again.out
    assert log.code == 0, log.err
    assert "→ ✓" in log.out
    assert "PYTHONUTF8" not in seen.read_text(), "scripts see the locale as it is"
    assert "Traceback" not in done.out + done.err + again.err + agent.said


def on_a_terminal(home: Path, under: tuple[str, ...], *words: object) -> tuple[int, bytes]:
    """The exit code, and what the terminal got."""
    ours, theirs = pty.openpty()
    process = Process(home, *words, under=("sh", "-c", f'exec "$@" > /proc/{os.getpid()}/fd/{theirs}', "sh", *under))
    code = process.result().code
    os.close(theirs)
    shown = b""
    while piece := _read(ours):
        shown += piece
    os.close(ours)
    return code, shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so at the end of a terminal
        return b""


def test_a_terminal_gets_what_it_can_show_and_a_pipe_utf_8(tmp_path: Path) -> None:
    packed(tmp_path, "it", ())
    words = ("package", "diff", tmp_path / "it.nupkg", tmp_path / "it.nupkg")

    code, shown = on_a_terminal(tmp_path, latin(), *words)
    piped = run(tmp_path, *words, under=latin())

    assert (code, piped.code) == (0, 0), piped.err
    assert b")  ?  Case.Loc" in shown
    assert ")  →  Case.Loc" in piped.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"] if SOAK else ["ascii:strict"])
def test_no_output_fails_for_its_characters(tmp_path: Path, encoding: str) -> None:
    packed(tmp_path, "it", ())

    done = run(tmp_path, "package", "diff", tmp_path / "it.nupkg", tmp_path / "it.nupkg", PYTHONIOENCODING=encoding)

    assert done.code == 0, done.err


def test_a_folder_that_is_gone_is_told_and_matters_only_where_it_is_asked_for(tmp_path: Path) -> None:
    packed(tmp_path, "it", ())
    (tmp_path / "gone").mkdir()
    under = ("sh", "-c", f'cd "{tmp_path}/gone" && rmdir ../gone; exec "$@"', "sh")

    asked = run(tmp_path, "package", "diff", "it.nupkg", "it.nupkg", under=under)
    (tmp_path / "gone").mkdir()
    named = run(tmp_path, "package", "diff", tmp_path / "it.nupkg", tmp_path / "it.nupkg", under=under)

    assert named.code == 0, named.err
    assert asked.code == 2
    assert "Traceback" not in asked.err
