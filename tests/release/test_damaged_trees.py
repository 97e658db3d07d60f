"""What lies in a machine's trees is not believed: one process deploys the same package to a root for each kind of damage."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.farm import Farm
from harness.seed import SOAK

FILES = {
    "run.sh": "#!/bin/sh\necho one\n",
    "version.txt": "v1",
    "wwwroot/index.html": "<p>one</p>",
    "wwwroot/js/app.js": "let one = 1;",
}


def edit(tree: Path) -> None:
    """As long as before, and with the times of before."""
    file = tree / "version.txt"
    before = file.stat()
    file.write_text("XX")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(tree: Path) -> None:
    file = tree / "wwwroot" / "js" / "app.js"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


def link_away(path: Path) -> None:
    """What was there works on as before, from elsewhere."""
    moved = Path(tempfile.mkdtemp(dir=path.parents[3]), path.name)
    path.rename(moved)
    path.symlink_to(moved)


def exchange(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


ALL: dict[str, Callable[[Path], object]] = {
    "edited": edit,
    "flipped": flip,
    "truncated": lambda tree: os.truncate(tree / "wwwroot/index.html", 3),
    "removed": lambda tree: (tree / "run.sh").unlink(),
    "folder-removed": lambda tree: shutil.rmtree(tree / "wwwroot"),
    "not-executable": lambda tree: (tree / "run.sh").chmod(0o644),
    "executable": lambda tree: (tree / "version.txt").chmod(0o755),
    "unreadable": lambda tree: (tree / "version.txt").chmod(0o600),
    "open-to-all": lambda tree: (tree / "version.txt").chmod(0o666),
    "closed-folder": lambda tree: (tree / "wwwroot/js").chmod(0o700),
    "linked": lambda tree: link_away(tree / "version.txt"),
    "linked-folder": lambda tree: link_away(tree / "wwwroot"),
    "now-a-folder": lambda tree: exchange(tree / "version.txt", Path.mkdir),
    "now-a-fifo": lambda tree: exchange(tree / "version.txt", os.mkfifo),
    "tree-linked": link_away,
}
KINDS = {kind: ALL[kind] for kind in (ALL if SOAK else ("edited", "removed", "not-executable", "linked-folder"))}
BESIDE: dict[str, Callable[[Path], object]] = {
    "untouched": lambda _: None,
    "file-added": lambda tree: (tree / "app.log").write_text("a line"),
    "touched": lambda tree: os.utime(tree / "version.txt", (1, 1)),
    "owned": lambda tree: os.chown(tree / "version.txt", 65534, 65534) if os.geteuid() == 0 else None,
}
"""What changes nothing of the package."""
if not SOAK:
    del BESIDE["touched"], BESIDE["owned"]


class Roots:
    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.diary = farm.folder / "diary"

    def root(self, kind: str) -> Path:
        return self.farm.agents["web1"].root / kind

    def current(self, kind: str) -> Path:
        return self.root(kind) / os.readlink(self.root(kind) / "current")

    def deploy(self, version: str, *words: str) -> list[str]:
        """The kinds whose root had a turn."""
        self.diary.write_text("")
        done = self.farm.deploy(version, *words)
        assert done.code == 0, done.out + done.err
        return sorted(os.path.basename(line) for line in self.diary.read_text().splitlines())


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roots]:
    folder = tmp_path_factory.mktemp("damaged")
    with Farm(folder) as farm:
        farm.add_relay("fra")
        farm.add_agent("web1").start()
        found = Roots(farm)
        farm.write_script("told.sh", f'#!/bin/sh\necho "$ROOT" >> {found.diary}\n')
        farm.write_environment()
        farm.write_process(
            packages={"app": "Acme.App"},
            steps=[
                {"name": kind, "roles": ["web"], "deploy": "app", "to": str(found.root(kind)), "keep": 1,
                 "apply": ["switch", {"name": "told", "script": "told.sh"}]}
                for kind in (*KINDS, *BESIDE)
            ],
        )  # fmt: skip
        for version, text in (("1.0.0", "v1"), ("1.1.0", "v2")):
            farm.add_package("Acme.App", version, FILES | {"version.txt": text})
        found.deploy("1.0.0", "--package", "app=1.0.0")
        yield found


def test_only_a_whole_tree_is_already_current_and_a_damaged_one_is_built_anew_beside_it(roots: Roots) -> None:
    before = {kind: roots.current(kind) for kind in (*KINDS, *BESIDE)}
    for kind, damage in (KINDS | BESIDE).items():
        damage(before[kind])

    assert roots.deploy("1.0.0") == sorted(KINDS)

    for kind in KINDS:
        assert roots.current(kind) != before[kind], kind
        assert _content(roots.current(kind)) == _expected("v1"), kind
        assert os.listdir(roots.root(kind) / "releases") == [roots.current(kind).name], "the damaged one is pruned"
    assert all(roots.current(kind) == before[kind] for kind in BESIDE)


def test_going_back_to_a_tree_that_was_damaged_meanwhile_gives_a_whole_one(roots: Roots) -> None:
    kept = {kind: roots.current(kind) for kind in KINDS}
    roots.deploy("1.1.0", "--package", "app=1.1.0")
    for kind, damage in KINDS.items():
        damage(kept[kind])

    assert roots.deploy("1.0.0") == sorted((*KINDS, *BESIDE))

    for kind in KINDS:
        assert _content(roots.current(kind)) == _expected("v1"), kind
        assert roots.current(kind) != kept[kind], kind


def test_force_gives_every_machine_its_turn(roots: Roots) -> None:
    assert roots.deploy("1.0.0") == []

    assert roots.deploy("1.0.0", "--force") == sorted((*KINDS, *BESIDE))


def _expected(version: str) -> dict[str, tuple[int, str]]:
    whole = FILES | {"version.txt": version}
    return {name: (0o755 if text.startswith("#!") else 0o644, text) for name, text in whole.items()}


def _content(tree: Path) -> dict[str, tuple[int, str]]:
    assert not tree.is_symlink()
    found = {}
    for folder, _, names in os.walk(tree):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o755, folder
        for name in names:
            path = Path(folder, name)
            assert not path.is_symlink(), path
            found[str(path.relative_to(tree))] = (stat.S_IMODE(path.stat().st_mode), path.read_text())
    return found
