"""Is the planner right? What it chooses against every encoding that can be forced, on lines from thin to fast.

Run: python -m benchmarks.matrix [--rates 1,10,100,1000] [--round-trip MS] [--repeat N] [--only ID]… [--unknown] [--json]

For each package of the table, first and with its predecessor held, over each line of the network laboratory: the seconds
of `package replicate` until the relay, which has verified every chunk, lists the package, the median of N. How each
transfer is set up, and what the sender remembers of the line, is told in `benchmarks.transfer`: for each package and line
the predecessor was sent over it once before, by the planner, to a relay that had nothing. With
`--unknown` it remembers nothing: each transfer is the first one over a new line.

A machine's own way to a verified, durable tree begins at its relay, which stores the same chunks whatever they crossed the
line as: those seconds are measured apart, once for each package, and come on top of every row alike. Without them the
rows differ by more, so the verdict is the stricter one: where the slowest of the forced ones takes more than 1.2 times
the fastest, the planned one takes at most 1.1 times the fastest. An encoding whose bytes alone would take more than three
times the best on the line is not tried; what it would take at least is told. Where a transfer takes more than half a
minute, its repeats run beside each other, each over a line and with relays of its own.

The exit status is 1 where the planner was beyond that.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence

import msgspec

from benchmarks.support.programs import add
from benchmarks.support.report import add_folder, add_json, numbers, parser, show, tell
from benchmarks.support.workload import real_package
from benchmarks.transfer import (
    ENCODINGS,
    Case,
    Lane,
    Shape,
    at_once,
    document_of,
    how,
    measure,
    parse_encodings,
    places,
    text_of,
)
from relay.package.identity import PackageRef
from relay.support.console import table

PAIRS = (
    ("Shop.Web.1.0.1.nupkg", "Shop.Web.1.1.0.nupkg"),
    (
        "microsoft.aspnetcore.app.runtime.linux-x64.10.0.13.nupkg",
        "microsoft.aspnetcore.app.runtime.linux-x64.10.0.14.nupkg",
    ),
    ("microsoft.entityframeworkcore.10.0.14.nupkg", "microsoft.entityframeworkcore.10.0.15.nupkg"),
)
RATES = (1.0, 10.0, 100.0, 1000.0)
"""Mbit/s."""


class Pair(msgspec.Struct, frozen=True):
    """Two versions in the depot."""

    old: PackageRef
    new: PackageRef
    nupkg_bytes: int


class Tree(msgspec.Struct, frozen=True):
    """Seconds of a machine from its relay to a verified, durable tree, the median."""

    package: str
    seconds: float


def cases(origin: str, folder: str, pair: Pair, shape: Shape, options: argparse.Namespace) -> tuple[list[Case], Tree]:
    """One package over one line: first, then with its predecessor held; at last its tree."""
    # More than one line is only used where it is so thin that its repeats leave the processors idle.
    lines = options.repeat if shape.rate <= _THIN else 1
    os.mkdir(folder)
    with places(shape, lines) as ends:
        lanes = [
            Lane(os.path.join(folder, f"lane{number}"), end, origin, is_known=not options.unknown)
            for number, end in enumerate(ends)
        ]
        sent = at_once(lanes, lambda lane: lane.warm(pair.old))
        tell(f"{pair.old} sent first: {', '.join(f'{one.seconds:.2f} s' for one in sent)}")
        found = []
        for base in (None, pair.old):
            tell(f"{pair.new}, {f'{base.version} held' if base else 'nothing held'}, {shape}")
            case = measure(
                *(lanes, pair.new, shape),
                base=base,
                encodings=options.encodings,
                repeat=options.repeat,
                nupkg_bytes=pair.nupkg_bytes,
                tell=tell,
            )
            found.append(case)
            print(f"{text_of(case)}\n", file=sys.stderr if options.as_json else sys.stdout, flush=True)
        return found, Tree(str(pair.new), statistics.median(lanes[0].tree_seconds(pair.new, options.repeat)))


_THIN = 250_000.0


def summary(found: Sequence[Case], trees: Sequence[Tree]) -> str:
    """One row for each case."""
    headers = ["package", "held", "Mbit/s", "planned", "seconds", "best forced", "seconds", "times", "slowest", ""]
    rows = [
        [
            f"{_short(case.id)} {case.version}",
            case.base or "-",
            f"{case.shape.rate * 8 / 1e6:g}",
            case.planned.used,
            f"{case.planned.median:.2f}",
            case.best.encoding,
            f"{case.best.median:.2f}",
            f"{case.share:.2f}",
            f"{case.slowest / case.best.median:.1f} x",
            case.verdict,
        ]
        for case in found
    ]
    lines = [table(headers, rows, right=frozenset({2, 4, 6, 7, 8}))]
    lines += [f"{tree.package}: a machine's tree from its relay, {tree.seconds:.2f} s" for tree in trees]
    return "\n".join(lines)


def _short(id: str) -> str:
    return id if len(id) <= 30 else f"…{id[-29:]}"


def run(options: argparse.Namespace, home: str, folder: str, pairs: Sequence[Pair]) -> list[Case]:
    """Every package over every line, printed."""
    found: list[Case] = []
    trees: dict[str, Tree] = {}
    for pair, rate in itertools.product(pairs, options.rates):
        shape = Shape(rate * 1e6 / 8, options.round_trip / 1000)
        both, tree = cases(home, os.path.join(folder, f"{pair.new.id}-{rate}"), pair, shape, options)
        found += both
        trees[tree.package] = tree
    told = list(trees.values())
    document = {"format": 1, "line": how(), "cases": [document_of(one) for one in found], "trees": told}
    show(summary(found, told), document, as_json=options.as_json)
    return found


def main() -> int:
    """Measure, print, and judge: the exit status."""
    command = parser("matrix", __doc__)
    command.add_argument("--rates", type=numbers, default=RATES, metavar="MBIT,…")
    command.add_argument("--round-trip", type=float, default=50.0, metavar="MS")
    command.add_argument("--repeat", type=int, default=5, metavar="N")
    command.add_argument("--unknown", action="store_true", help="the sender remembers nothing of the lines")
    command.add_argument("--encodings", type=parse_encodings, default=ENCODINGS, metavar="NAME,…")
    command.add_argument(
        "--only", action="append", default=[], metavar="ID", help="packages whose file has this in its name"
    )
    add_folder(command)
    add_json(command)
    options = command.parse_args()
    wanted = [
        pair for pair in PAIRS if not options.only or any(word.lower() in pair[1].lower() for word in options.only)
    ]
    files = [[path for name in pair if (path := real_package(name))] for pair in wanted]
    if not wanted or any(len(pair) != 2 for pair in files):
        sys.exit("the packages of the shared data do not lie beside the project")
    print(f"{os.cpu_count()} cores; {how()}; {options.repeat} runs", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="waystation-matrix-", dir=options.folder) as folder:
        home = os.path.join(folder, "origin")
        added = add(home, *(path for pair in files for path in pair))
        pairs = [Pair(old, new, size) for (old, _), (new, size) in zip(added[::2], added[1::2], strict=True)]
        found = run(options, home, folder, pairs)
    return 1 if any(case.verdict == "BEYOND" for case in found) else 0


if __name__ == "__main__":
    sys.exit(main())
