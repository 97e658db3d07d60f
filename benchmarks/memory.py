"""The most memory that either end of a replication has resident, while a large package crosses.

Run: python -m benchmarks.memory [--megabytes N] [--rates MBIT,…] [--most MB] [--json]
     python -m benchmarks.memory --crowd 900 [--thin N] [--seconds N] [--megabytes N] [--most MB] [--json]

The package is made here: six tenths noise, the rest text that compresses, in files of several sizes. It goes to a relay
over loopback, and over shaped lines where rates are named (0: loopback), then its next version does, of which every tenth
file is another one and every other file has a few bytes changed: runs, bases and differences are all under way at once.
The most that the sender's process (`package replicate`) and the relay's had resident; each is new for each send.

A crowd is so many slow peers at one relay, and readers on thin lines that keep its encoders busy, beside one good client:
its seconds, and what the relay had resident (`benchmarks.support.crowd`).

The exit status is 1 where an end had more than `--most`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.lines.network import Line, ThreadedProxy
from benchmarks.support.crowd import Crowd, crowd
from benchmarks.support.programs import WAYSTATION, add, pack, peak_memory, relay, run
from benchmarks.support.report import add_folder, add_json, mark, numbers, parser, show
from relay.support.console import table

MOST = 400_000_000
"""Bytes that either end may have."""
ID, OLD, NEW = "Waystation.Large", "1.0.0", "1.1.0"
_SIZES = (200_000, 2_000_000, 20_000_000)
_NOISE = 6
"""Tenths of each file that do not compress."""


class Peak(msgspec.Struct, frozen=True):
    """One replication. Bytes of the most resident memory at both ends; `mbit` 0: over loopback."""

    send: str
    mbit: float
    nupkg_bytes: int
    payload_bytes: int
    seconds: float
    encodings: tuple[str, ...]
    sender: int
    relay: int


def mixed_files(folder: str, size: int, *, is_next: bool = False) -> None:
    """About `size` bytes in files. `is_next`: those of the next version."""
    number = made = 0
    while made < size:
        length = min(_SIZES[number % len(_SIZES)], size - made)
        data = bytearray(_mixed(number, length))
        if is_next and number % 10 == 0:
            data = bytearray(_mixed(-1 - number, length))
        elif is_next and number % 2:
            data[len(data) // 2 : len(data) // 2 + 16] = b"sixteen others  "
        target = os.path.join(folder, f"{number % 16:02}", f"file{number}.bin")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).write_bytes(data)
        number, made = number + 1, made + length


def _mixed(seed: int, length: int) -> bytes:
    """Stretches of noise and of text, in turns."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randint(3, 9)).hex().encode() for _ in range(300)]
    pieces, made = [], 0
    while made < length:
        if chance.randrange(10) < _NOISE:
            piece = chance.randbytes(8000)
        else:
            piece = b" ".join(chance.choices(words, k=800))[:8000]
        pieces.append(piece)
        made += len(piece)
    return b"".join(pieces)[:length]


def packed(folder: str, megabytes: int) -> list[str]:
    """The nupkgs of both versions."""
    found = []
    for version in (OLD, NEW):
        source, target = os.path.join(folder, "source"), os.path.join(folder, f"{ID}.{version}.nupkg")
        mixed_files(source, megabytes * 1_000_000, is_next=version == NEW)
        found.append(pack(source, ID, version, target))
        shutil.rmtree(source)
    return found


_WATCH = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def with_peak(*words: str, home: str) -> tuple[str, int]:
    """Run a command; what it printed, and its most resident memory in bytes.

    A small process stands between: the kernel counts what the parent had resident when it started a child, too.
    """
    *output, peak = run([sys.executable, "-I", "-S", "-c", _WATCH, *words], home=home).output.splitlines()
    return "\n".join(output), int(peak) * 1024


def measure(folder: str, megabytes: int, rates: Sequence[float]) -> list[Peak]:
    """The first send and the next version, over each line."""
    home = os.path.join(folder, "home")
    files = packed(folder, megabytes)
    add(home, *files)
    peaks = []
    for mbit in rates:
        store = os.path.join(folder, f"store{mbit:g}")
        shape = Line(mbit * 1e6 / 8, 0.025) if mbit else Line()
        for name, version, file in (("first", OLD, files[0]), ("next", NEW, files[1])):
            with relay(store) as served, ThreadedProxy("127.0.0.1", served.port, up=shape, down=shape) as proxy:
                url = f"http://127.0.0.1:{proxy.port}" if mbit else served.url
                words = ("package", "replicate", ID, version, "--relay", url, "--json")
                output, sender = with_peak(WAYSTATION, *words, home=home)
                peak = peak_memory(served.pid)
            told = json.loads(output)["relays"][0]
            used = tuple(one["encoding"] for one in told["encodings"])
            size = os.path.getsize(file)
            peaks.append(Peak(name, mbit, size, told["payload_bytes"], told["seconds"], used, sender, peak))
        shutil.rmtree(store)
    return peaks


class CrowdPeak(msgspec.Struct, frozen=True):
    """A relay in a crowd. Bytes that were resident: at rest, and at most."""

    crowd: Crowd
    at_rest: int
    most: int


def in_a_crowd(folder: str, megabytes: int, slow: int, thin: int, seconds: float) -> CrowdPeak:
    """One package at one relay, and everybody at once."""
    home = os.path.join(folder, "home")
    [(package, _)] = add(home, packed(folder, megabytes)[0])
    with relay(os.path.join(folder, "store")) as served:
        run([WAYSTATION, "package", "replicate", ID, OLD, "--relay", served.url], home=home)
    with relay(os.path.join(folder, "store")) as served:
        at_rest = peak_memory(served.pid)
        came = asyncio.run(crowd(served.url, package, slow=slow, thin=thin, seconds=seconds))
        return CrowdPeak(came, at_rest, peak_memory(served.pid))


def text_of_crowd(peak: CrowdPeak) -> str:
    """For people."""
    came = peak.crowd
    return (
        f"{came.slow} slow peers ({came.slow_connections} connections), {came.thin} readers on thin lines"
        f" ({came.thin_bytes / 1e6:.1f} MB), one good client: {came.requests} requests,"
        f" median {came.median * 1000:.0f} ms, p99 {came.p99 * 1000:.0f} ms; the relay had {peak.at_rest / 1e6:.0f} MB"
        f" resident at rest, {peak.most / 1e6:.0f} MB at most"
    )


def text_of(peaks: Sequence[Peak], most: int) -> str:
    """For people."""
    rows = [
        [
            one.send,
            f"{one.mbit:g} Mbit/s" if one.mbit else "loopback",
            f"{one.nupkg_bytes / 1e6:,.0f}",
            f"{one.payload_bytes / 1e6:,.0f}",
            " + ".join(one.encodings),
            f"{one.seconds:.1f}",
            f"{one.sender / 1e6:.0f}",
            f"{one.relay / 1e6:.0f}",
            mark(held=max(one.sender, one.relay) <= most),
        ]
        for one in peaks
    ]
    headers = ["send", "line", "nupkg MB", "payload MB", "as", "seconds", "sender MB", "relay MB", ""]
    return table(headers, rows, right=frozenset({2, 3, 5, 6, 7}))


def main() -> int:
    """Measure, print, and judge: the exit status."""
    command = parser("memory", __doc__)
    command.add_argument("--megabytes", type=int, default=1000, help="of content")
    command.add_argument("--rates", type=numbers, default=(0.0,), metavar="MBIT,…", help="0: loopback [default: 0]")
    command.add_argument("--crowd", type=int, default=0, metavar="N", help="so many slow peers at one relay instead")
    command.add_argument("--thin", type=int, default=4, metavar="N", help="readers on thin lines beside them")
    command.add_argument("--seconds", type=float, default=60.0, help="of a crowd")
    command.add_argument("--most", type=int, default=MOST // 1_000_000, metavar="MB")
    add_folder(command)
    add_json(command)
    options = command.parse_args()
    most = options.most * 1_000_000
    with tempfile.TemporaryDirectory(prefix="waystation-memory-", dir=options.folder) as folder:
        if options.crowd:
            peak = in_a_crowd(folder, options.megabytes, options.crowd, options.thin, options.seconds)
            show(text_of_crowd(peak), {"format": 1, "most": most, "peak": peak}, as_json=options.as_json)
            return 0 if peak.most <= most else 1
        peaks = measure(folder, options.megabytes, options.rates)
    show(text_of(peaks, most), {"format": 1, "most": most, "peaks": peaks}, as_json=options.as_json)
    return 0 if all(max(one.sender, one.relay) <= most for one in peaks) else 1


if __name__ == "__main__":
    sys.exit(main())
