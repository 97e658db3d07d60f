"""The most memory that either end of a replication has resident, while a large package crosses.

Run: python -m benchmarks.memory [--megabytes N] [--rates MBIT,…] [--most MB] [--json]

The package is made here: six tenths noise, the rest text that compresses, in files of several sizes. It goes to a relay
over loopback, and over shaped lines where rates are named (0: loopback), then its next version does, of which every tenth
file is another one and every other file has a few bytes changed: runs, bases and differences are all under way at once.
VmHWM of the sender's process (`package replicate`) and of the relay's, each a new process for each send.

The exit status is 1 where an end had more than `--most`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import msgspec

from benchmarks.lines.network import Line, ThreadedProxy
from benchmarks.support.programs import WAYSTATION, peak_memory, relay, run, waystation
from relay.support.console import print_json, table

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
        with open(target, "wb") as file:
            file.write(data)
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


def packed(folder: str, home: str, megabytes: int) -> list[str]:
    """The nupkgs of both versions."""
    found = []
    for version in (OLD, NEW):
        source, target = os.path.join(folder, "source"), os.path.join(folder, f"{ID}.{version}.nupkg")
        mixed_files(source, megabytes * 1_000_000, is_next=version == NEW)
        words = ["package", "pack", source, "--id", ID, "--version", version, "--output", target]
        run([WAYSTATION, *words], home=home)
        shutil.rmtree(source)
        found.append(target)
    return found


def replicate(version: str, url: str, home: str) -> tuple[Any, int]:
    """Send it by the real command: its document, and its most resident memory."""
    words = [WAYSTATION, "package", "replicate", ID, version, "--relay", url, "--json"]
    environment = os.environ | {"WAYSTATION_HOME": home}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        watch = Watch(process.pid)
        assert process.stdout is not None
        told = process.stdout.read()
        peak = watch.end()
    if process.returncode:
        raise RuntimeError(f"package replicate failed ({process.returncode})")
    return json.loads(told)["relays"][0], peak


class Watch:
    """Looks at a process's peak every 20 ms until it ends: the kernel tells nothing of one that has."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> int:
        """Bytes."""
        self._over.set()
        self._thread.join()
        return self._peak

    def _look(self) -> None:
        while not self._over.wait(0.02):
            with suppress(OSError, RuntimeError):
                self._peak = max(self._peak, peak_memory(self._pid))


def measure(folder: str, megabytes: int, rates: Sequence[float]) -> list[Peak]:
    """The first send and the next version, over each line."""
    home = os.path.join(folder, "home")
    waystation("trust", "init", home=home)
    files = packed(folder, home, megabytes)
    waystation("package", "add", *files, home=home)
    peaks = []
    for mbit in rates:
        store = os.path.join(folder, f"store{mbit:g}")
        for name, version, file in (("first", OLD, files[0]), ("next", NEW, files[1])):
            with ExitStack() as stack:
                served = stack.enter_context(relay(store))
                url = served.url
                if mbit:
                    shape = Line(rate=mbit * 1e6 / 8, latency=0.025)
                    port = int(url.rpartition(":")[2])
                    proxy = stack.enter_context(ThreadedProxy("127.0.0.1", port, up=shape, down=shape))
                    url = f"http://127.0.0.1:{proxy.port}"
                told, sender = replicate(version, url, home)
                peak = peak_memory(served.pid)
            used = tuple(one["encoding"] for one in told["encodings"])
            size = os.path.getsize(file)
            peaks.append(Peak(name, mbit, size, told["payload_bytes"], told["seconds"], used, sender, peak))
        shutil.rmtree(store)
    return peaks


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
            "held" if max(one.sender, one.relay) <= most else "BROKEN",
        ]
        for one in peaks
    ]
    headers = ["send", "line", "nupkg MB", "payload MB", "as", "seconds", "sender MB", "relay MB", ""]
    return table(headers, rows, right=frozenset({2, 3, 5, 6, 7}))


def main() -> int:
    """Measure, print, and judge: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="of content")
    parser.add_argument("--rates", default="0", metavar="MBIT,…", help="lines, 0: loopback [default: 0]")
    parser.add_argument("--most", type=int, default=MOST // 1_000_000, metavar="MB")
    parser.add_argument("--folder", default=None, help="where to work [default: the system's temporary folder]")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    rates = [float(word) for word in options.rates.split(",")]
    with tempfile.TemporaryDirectory(prefix="waystation-memory-", dir=options.folder) as folder:
        peaks = measure(folder, options.megabytes, rates)
    most = options.most * 1_000_000
    if options.as_json:
        print_json({"format": 1, "most": most, "peaks": msgspec.to_builtins(peaks)})
    else:
        print(text_of(peaks, most))
    return 0 if all(max(one.sender, one.relay) <= most for one in peaks) else 1


if __name__ == "__main__":
    sys.exit(main())
