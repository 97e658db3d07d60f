"""What it costs to read an installed tree and compare every byte of it with its manifest, as each deployment does.

Run: python -m benchmarks.support.whole_tree

Two trees of noise are made: 300 MB in files of 1 MB, and 99,990 files of 1 KB. Their pages are warm, so the seconds are
the processor's; a disk that is cold adds its own. Beside them: to parse the manifest, and to look at stamps alone.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agent import platform
from agent.trees.tree import damage_in
from orchestrator.depot.cut_nupkg import NupkgCutter, digests_of, open_nupkg, read_directory
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, ManifestBuilder, parse
from relay.package.pack import pack_file
from relay.support.console import table

TREES = (("300 MB in 300 files", 300, 1_000_000), ("99,990 files of 1 KB", 99_990, 1_000))
"""A package has at most 100,000 parts, and a few of them are its container's."""
_IN_A_FOLDER = 500
_ID, _VERSION = PackageId.parse("Bench.Tree"), NuGetVersion.parse("1.0.0")


def main() -> None:
    rows = []
    for name, count, size in TREES:
        with tempfile.TemporaryDirectory(prefix="whole-tree-") as folder:
            tree = os.path.join(folder, "tree")
            _make(Path(tree), count, size)
            manifest = _manifest_of(tree, os.path.join(folder, "it.nupkg"))
            assert not damage_in(tree, manifest)
            whole, parsed, stamps = (
                _seconds(partial(damage_in, tree, manifest)),
                _seconds(partial(parse, manifest.canonical)),
                _seconds(partial(_look, tree, manifest)),
            )
            rows.append([name, f"{whole:.2f}", f"{parsed:.2f}", f"{stamps:.2f}"])
    print(table(["tree", "every byte s", "parse s", "stamps s"], rows))


def _make(tree: Path, count: int, size: int) -> None:
    noise = random.Random(1)
    for number in range(count):
        path = tree / f"d{number // _IN_A_FOLDER}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # What begins as a script does is executable: no noise may.
        path.write_bytes(b"\0" + noise.randbytes(size - 1))
        platform.set_mode(str(path), executable=False)
    for folder, _, _ in os.walk(tree):
        platform.set_mode(folder, executable=True)


def _manifest_of(tree: str, nupkg: str) -> Manifest:
    pack_file(tree, nupkg, id=_ID, version=_VERSION, authors="bench", description="noise")
    with open_nupkg(nupkg) as file:
        digests = digests_of(file)
        entries, nuspec = read_directory(file)
        builder = ManifestBuilder(PackageRef(_ID, _VERSION), digests, dict(nuspec.metadata))
        cutter = NupkgCutter(file, entries, builder)
        while cutter.next_batch():
            pass
        return cutter.manifest()


def _look(tree: str, manifest: Manifest) -> None:
    for index in manifest.tree_parts:
        os.lstat(os.path.join(tree, manifest.parts[index].path))


def _seconds(work: Callable[[], object]) -> float:
    """The best of three."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    main()
