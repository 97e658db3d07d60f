"""What the format's bounds and the senders' run length cost in bytes: exact counts, no clocks.

Run: python -m benchmarks.support.bounds [NUPKG NUPKG]   (an old and a new version; by default the pairs of the shared data)

For each pair: the new package sent first, chunk by chunk and in runs, and then what a holder of the old one lacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.support.workload import SHARED
from relay.encoding.bundle import plan_runs
from relay.encoding.codecs import PLAIN, encode
from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.zip_reader import read_part, walk

RUNS = (1 << 20, 4 << 20, 8 << 20, 16 << 20, 64 << 20)
"""Run lengths compared, bytes of tree stream."""
GATHERS = ((64 << 10, 256 << 10), (128 << 10, 512 << 10), (256 << 10, 1 << 20), (512 << 10, 2 << 20))
"""Bounds of gatherings of small parts compared, bytes."""
PAIRS = (
    ("Shop.Web.1.0.0.nupkg", "Shop.Web.1.0.1.nupkg"),
    ("Shop.Web.1.0.1.nupkg", "Shop.Web.1.1.0.nupkg"),
    (
        "microsoft.aspnetcore.app.runtime.linux-x64.10.0.13.nupkg",
        "microsoft.aspnetcore.app.runtime.linux-x64.10.0.14.nupkg",
    ),
    ("microsoft.entityframeworkcore.10.0.14.nupkg", "microsoft.entityframeworkcore.10.0.15.nupkg"),
    ("awssdk.core.4.0.102.18.nupkg", "awssdk.core.4.0.102.19.nupkg"),
    ("newtonsoft.json.13.0.3.nupkg", "newtonsoft.json.13.0.4.nupkg"),
    ("serilog.4.3.0.nupkg", "serilog.4.4.0.nupkg"),
    ("dapper.2.1.66.nupkg", "dapper.2.1.86.nupkg"),
)


def main() -> None:
    """Print one table for run lengths, one for gatherings."""
    pairs = [tuple(sys.argv[1:3])] if len(sys.argv) == 3 else _shared_pairs()
    print(f"first send, zstd level 3, per cent of the nupkg\n{'':46}{'chunks':>8}", end="")
    print("".join(f"{f'{run >> 20} MiB':>8}" for run in RUNS))
    for _, new in pairs:
        chunks = cut(new)
        sizes = [_encoded(chunks, [[i] for i in range(len(chunks))])]
        sizes += [_encoded(chunks, plan_runs([(i, c.size) for i, c in enumerate(chunks)], run)) for run in RUNS]
        _tell(new, sizes)
    print(
        f"\nnext version, whole chunks that the old one lacks, each zstd level 3, per cent of the nupkg\n{'':46}",
        end="",
    )
    print("".join(f"{f'{low >> 10}-{high >> 10}K':>11}" for low, high in GATHERS))
    for old, new in pairs:
        sizes = []
        for low, high in GATHERS:
            with gathering(low, high):
                held = {chunk.id for chunk in cut(old)}
                lacking = [chunk for chunk in cut(new) if chunk.id not in held]
                sizes.append(_encoded(lacking, [[i] for i in range(len(lacking))]))
        _tell(new, sizes, width=11)


def cut(path: str) -> list[Chunk]:
    """All chunks of a nupkg, in stream order."""
    with open(path, "rb") as file:
        entries = sorted(walk(file), key=lambda entry: chunking.stream_key(entry.path))
        found = chunking.cut(entries, lambda e: e.path, lambda e: e.size, lambda e: read_part(file, e))
        return [chunk for chunk in found if isinstance(chunk, Chunk)]


@contextmanager
def gathering(low: int, high: int) -> Iterator[None]:
    """Cut with other bounds for small parts than the format's."""
    kept = chunking.GATHER_MIN, chunking.GATHER_MAX
    chunking.GATHER_MIN, chunking.GATHER_MAX = low, high
    try:
        yield
    finally:
        chunking.GATHER_MIN, chunking.GATHER_MAX = kept


def _encoded(chunks: list[Chunk], runs: list[list[int]]) -> int:
    """What the runs of `chunks` take on the line: a run that does not compress travels raw."""
    total = 0
    for run in runs:
        data = b"".join(chunks[i].data for i in run)
        total += min(len(data), sum(map(len, encode(PLAIN, data))))
    return total


def _tell(path: str, sizes: list[int], width: int = 8) -> None:
    whole = os.path.getsize(path)
    name = os.path.basename(path).removesuffix(".nupkg")[-44:]
    print(f"{name:46}" + "".join(f"{100 * size / whole:>{width}.1f}" for size in sizes))


def _shared_pairs() -> list[tuple[str, str]]:
    folder = os.path.join(SHARED, "packages")
    pairs = [(os.path.join(folder, old), os.path.join(folder, new)) for old, new in PAIRS]
    found = [pair for pair in pairs if all(map(os.path.exists, pair))]
    if not found:
        sys.exit("no packages lie beside the project: name two nupkgs")
    return found


if __name__ == "__main__":
    main()
