"""What the format's bounds and the senders' run length cost in bytes: exact counts, no clocks.

Run: python -m benchmarks.support.bounds [NUPKG NUPKG]   (an old and a new version; by default the pairs of the shared data)

For each pair: the new package sent first, chunk by chunk and in runs, and then what a holder of the old one lacks.
"""

from __future__ import annotations

import os
import sys
from unittest.mock import patch

from benchmarks.support.workload import real_package
from relay.encoding.bundle import plan_runs
from relay.encoding.codecs import PLAIN, encode
from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.zip_reader import read_part, walk
from relay.support.console import table

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
    print("first send, zstd level 3, per cent of the nupkg")
    headers = ["", "chunks", *(f"{run >> 20} MiB" for run in RUNS)]
    _print(headers, [_row(new, _of_runs(cut(new))) for _, new in pairs])
    print("\nnext version, whole chunks that the old one lacks, each zstd level 3, per cent of the nupkg")
    headers = ["", *(f"{low >> 10}-{high >> 10}K" for low, high in GATHERS)]
    _print(headers, [_row(new, [_lacking(old, new, *bounds) for bounds in GATHERS]) for old, new in pairs])


def _of_runs(chunks: list[Chunk]) -> list[int]:
    """What the chunks take one by one, and in runs of each length."""
    sized = [(index, chunk.size) for index, chunk in enumerate(chunks)]
    return [
        _encoded(chunks, [[index] for index, _ in sized]),
        *(_encoded(chunks, plan_runs(sized, run)) for run in RUNS),
    ]


def _lacking(old: str, new: str, low: int, high: int) -> int:
    """What the chunks of `new` take that `old` has not, both cut with these bounds."""
    with patch.multiple(chunking, GATHER_MIN=low, GATHER_MAX=high):
        held = {chunk.id for chunk in cut(old)}
        lacking = [chunk for chunk in cut(new) if chunk.id not in held]
    return _encoded(lacking, [[index] for index in range(len(lacking))])


def cut(path: str) -> list[Chunk]:
    """All chunks of a nupkg, in stream order."""
    with open(path, "rb") as file:
        entries = sorted(walk(file), key=lambda entry: chunking.stream_key(entry.path))
        found = chunking.cut(entries, lambda e: e.path, lambda e: e.size, lambda e: read_part(file, e))
        return [chunk for chunk in found if isinstance(chunk, Chunk)]


def _encoded(chunks: list[Chunk], runs: list[list[int]]) -> int:
    """What the runs of `chunks` take on the line: a run that does not compress travels raw."""
    total = 0
    for run in runs:
        data = b"".join(chunks[i].data for i in run)
        total += min(len(data), sum(map(len, encode(PLAIN, data))))
    return total


def _row(path: str, sizes: list[int]) -> list[str]:
    name = os.path.basename(path).removesuffix(".nupkg")[-44:]
    return [name, *(f"{100 * size / os.path.getsize(path):.1f}" for size in sizes)]


def _print(headers: list[str], rows: list[list[str]]) -> None:
    print(table(headers, rows, right=frozenset(range(1, len(headers)))))


def _shared_pairs() -> list[tuple[str, str]]:
    pairs = ((real_package(old), real_package(new)) for old, new in PAIRS)
    found = [(old, new) for old, new in pairs if old and new]
    if not found:
        sys.exit("no packages lie beside the project: name two nupkgs")
    return found


if __name__ == "__main__":
    main()
