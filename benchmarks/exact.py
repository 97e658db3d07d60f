"""The identical nupkg, made again from a depot's chunks: by which encoder each byte of it, and how fast.

Run: python -m benchmarks.exact [--packages DIR]… [--engines DIR] [--json]

Each package is added to a depot of its own, its recipe is proved there, and the nupkg is rebuilt from the chunks in the store
and compared by SHA-512. Speed is content (inflated parts) for each second of processor time that the rebuild takes, in
all its processes together: so it says what one core does. The start of the encoders and their proof are left out.

The exit status is 1 where a rebuilt nupkg differs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from benchmarks.support.workload import SHARED
from orchestrator.depot.depot import Depot, open_depot
from orchestrator.trust.keyring import init_trust, load_signer
from relay.engines.encoders import Encoders
from relay.package.chunk import Chunk
from relay.package.manifest import Manifest, to_wire
from relay.package.part_reader import parts_of_chunks
from relay.package.recipe import STORED_AS_IS, VERBATIM, Recipe, encode_recipe, opaque, shares
from relay.rebuild.rebuilder import rebuild
from relay.stores.catalog import Provenance
from relay.support.console import run, table

TELLING = 4_000_000
"""Bytes of content from which on a rebuild says how fast it is."""


class Rebuilt(msgspec.Struct, frozen=True):
    """One package. Bytes; `compressed` and `content` by encoder, of the nupkg and of the inflated parts."""

    package: str
    nupkg: int
    compressed: dict[str, int]
    content: dict[str, int]
    recipe_on_the_wire: int
    is_identical: bool
    cpu_seconds: float
    wall_seconds: float

    @property
    def rate(self) -> float | None:
        """MB of encoded content for each second of a core; None where there is too little of it to tell."""
        size = sum(size for name, size in self.content.items() if name not in {VERBATIM, STORED_AS_IS})
        return None if size < TELLING else size / 1e6 / max(self.cpu_seconds, 1e-9)


async def measure(paths: Sequence[Path]) -> list[Rebuilt]:
    """Every package of `paths`, one after another."""
    results = []
    with tempfile.TemporaryDirectory(prefix="waystation-exact-") as folder:
        init_trust(os.path.join(folder, "trust"))
        signer = load_signer(os.path.join(folder, "trust"), "package")
        for number, path in enumerate(paths):
            async with AsyncExitStack() as stack:
                depot = await stack.enter_async_context(open_depot(f"disk:{folder}/depot-{number}"))
                added = await depot.add(str(path), signer, Provenance("added", path.name))
                recipe = await depot.recipe(added.manifest) or opaque(added.manifest)
                results.append(await _rebuild(depot, added.manifest, recipe, Path(folder) / "again.nupkg"))
    return results


async def _rebuild(depot: Depot, manifest: Manifest, recipe: Recipe, output: Path) -> Rebuilt:
    async def get(index: int) -> Chunk:
        return await depot.store.chunks.get(manifest.chunk_id(index))

    idle = _cpu()
    async with await Encoders.open():
        pass
    idle = _cpu() - idle
    verbatim = None if recipe.verbatim is None else depot.nupkgs.blob(recipe.verbatim.id, manifest)
    before = _cpu()
    async with await Encoders.open() as encoders:
        started = time.perf_counter()
        await rebuild(manifest, recipe, parts_of_chunks(manifest, get), verbatim, encoders, output)
        wall = time.perf_counter() - started
    found = shares(recipe, manifest)
    return Rebuilt(
        package=str(manifest.package),
        nupkg=manifest.nupkg.size,
        compressed={name: share.compressed for name, share in found.items()},
        content={name: share.content for name, share in found.items()},
        recipe_on_the_wire=len(to_wire(encode_recipe(recipe))),
        is_identical=await asyncio.to_thread(_sha512, output) == manifest.nupkg.sha512,
        cpu_seconds=_cpu() - before - idle,
        wall_seconds=wall,
    )


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def _cpu() -> float:
    """Seconds of processors that this process and those it has ended took."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def text_of(results: Sequence[Rebuilt]) -> str:
    """A line for each package, and the share of each encoder in all of them."""
    rows = [
        [
            one.package,
            f"{one.nupkg:,}",
            ", ".join(
                f"{name} {100 * size / one.nupkg:.1f} %" for name, size in sorted(one.compressed.items()) if size
            ),
            str(one.recipe_on_the_wire),
            "-" if one.rate is None else f"{one.rate:.0f}",
            f"{one.wall_seconds:.2f}",
            "identical" if one.is_identical else "DIFFERENT",
        ]
        for one in results
    ]
    headers = ["package", "nupkg", "of the nupkg, by", "recipe", "MB/s a core", "wall s", ""]
    whole: Counter[str] = Counter()
    for one in results:
        whole.update(one.compressed)
    size = sum(one.nupkg for one in results)
    told = ", ".join(f"{name} {100 * bytes_ / size:.1f} %" for name, bytes_ in whole.most_common())
    without = sum(not one.compressed.get(VERBATIM) for one in results)
    return (
        table(headers, rows, right=frozenset({1, 3, 4, 5}))
        + f"\n{len(results)} packages, {size:,} bytes: {told}; {without} without a verbatim byte"
    )


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", action="append", type=Path, metavar="DIR", help="where nupkgs lie")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="deflate engines, beside those that are installed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shared = Path(SHARED)
    engines = options.engines or shared / "engines"
    if engines.is_dir():
        os.environ["WAYSTATION_ENGINES"] = str(engines)
    folders = options.packages or [shared / "packages", shared / "graph"]
    paths = sorted((path for folder in folders for path in folder.glob("*.nupkg")), key=lambda path: path.name.lower())
    if not paths:
        print(f"no nupkg in {', '.join(map(str, folders))}", file=sys.stderr)
        return 2
    results = run(measure(paths))
    if options.json:
        print(json.dumps([msgspec.to_builtins(one) for one in results], indent=2))
    else:
        print(text_of(results))
    return 0 if all(one.is_identical for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
