"""What each peer sends to bring a new version of a nupkg to a site that holds an old one: counted, by really doing it.

Peers that speak over a network do so through a proxy that counts both directions, requests and headers included;
the others make files, whose bytes are counted: signatures and indexes, too. Each result is compared with the new nupkg
byte by byte before its figure counts; Velopack's way knows no nupkg, so what it makes is compared file by file. The last row is no peer but
the bound: bsdiff over the sorted inflated tree, packed by zstd -19; for a first send the tree itself, packed so.
`benchmarks.pairs` runs them, and the demo.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import msgspec

from benchmarks.lines.network import ThreadedProxy
from benchmarks.support.programs import nginx, run
from relay.package.chunking import stream_key
from relay.package.zip_reader import read_part, walk
from relay.support.console import table
from relay.support.zstd import zstd


class Sent(msgspec.Struct, frozen=True):
    """One peer's figure.

    Attributes:
        peer: its name.
        how: the command that was run, shortened.
        bytes: of payload, both directions; None where it could not be run.
        seconds: of making and applying, all on this machine.
        why_not: why it could not be run.
    """

    peer: str
    how: str
    bytes: int | None = None
    seconds: float = 0.0
    why_not: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """All peers for one pair.

    Attributes:
        old: file name of what the site holds, empty at a first send.
        new: file name of what it is to have.
        nupkg: bytes of the new one.
        tree: bytes of all its parts, inflated.
        rows: one for each peer.
    """

    old: str
    new: str
    nupkg: int
    tree: int
    rows: tuple[Sent, ...]

    def of(self, peer: str) -> Sent:
        """The figure of one. Raises `KeyError`."""
        return {row.peer: row for row in self.rows}[peer]

    @property
    def bound(self) -> int | None:
        """Bytes of the bound, where it is known."""
        return next((row.bytes for row in self.rows if row.peer == BOUND.name), None)

    @property
    def best(self) -> Sent:
        """The peer that sends least; the bound is none."""
        known = [row for row in self.rows if row.bytes is not None and row.peer != BOUND.name]
        return min(known, key=lambda row: row.bytes or 0)


class Work(msgspec.Struct, frozen=True):
    """Where a peer works: `old` (None at a first send) and `new` lie in `folder` and are not to be changed."""

    folder: str
    old: str | None
    new: str

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def base(self) -> str:
        assert self.old is not None
        return self.old


class Peer(msgspec.Struct, frozen=True):
    """A way of sending.

    Attributes:
        name: for tables.
        how: its command.
        needs: programs.
        first: whether it says something else than the whole at a first send.
        send: returns the bytes sent, and where the result lies (empty: it was checked).
    """

    name: str
    how: str
    needs: tuple[str, ...]
    first: bool
    send: Callable[[Work], tuple[int, str]]


def compare(old: str | None, new: str, only: Sequence[str] = ()) -> Comparison:
    """Run every peer, or those named in `only`, for one pair of files; `old` None is a first send.

    Raises:
        RuntimeError: a peer failed, or what it made is not the new nupkg.
    """
    peers = [peer for peer in PEERS if (old or peer.first) and (not only or peer.name in only)]
    names = ("" if old is None else os.path.basename(old), os.path.basename(new))
    return Comparison(*names, os.path.getsize(new), len(tree_of(new)), tuple(_row(peer, old, new) for peer in peers))


def _row(peer: Peer, old: str | None, new: str) -> Sent:
    if reason := _why_not(peer):
        return Sent(peer.name, peer.how, why_not=reason)
    with tempfile.TemporaryDirectory(prefix="waystation-peers-") as folder:
        # Copies under plain names: no peer learns anything from a name or a time, and the originals may be read-only.
        work = Work(folder, None if old is None else os.path.join(folder, "old"), os.path.join(folder, "new"))
        for source, target in ((old, work.old), (new, work.new)):
            if source is not None and target is not None:
                shutil.copyfile(source, target)
        began = time.perf_counter()
        count, made = peer.send(work)
        seconds = time.perf_counter() - began
        if made and not filecmp.cmp(made, new, shallow=False):
            raise RuntimeError(f"{peer.name} did not make {new}")
    how = _FIRST_BOUND if peer is BOUND and old is None else peer.how
    return Sent(peer.name, how, count, seconds)


def _why_not(peer: Peer) -> str:
    missing = [name for name in peer.needs if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{' and '.join(missing)} missing"
    if peer is BOUND and find_spec("bsdiff4") is None:
        return "bsdiff4 missing (from the package index)"
    return ""


# --- the tree


def tree_of(path: str) -> bytes:
    """All parts of a nupkg inflated, container parts last, in the order of the tree stream."""
    parts = parts_of(path)
    return b"".join(parts[name] for name in sorted(parts, key=stream_key))


def parts_of(path: str) -> dict[str, bytes]:
    """Each part of a nupkg inflated, by its path."""
    with open(path, "rb") as file:
        return {entry.path: b"".join(read_part(file, entry)) for entry in walk(file)}


def zstd19(data: bytes) -> int:
    """Bytes of `data` after zstd -19 --long, with a window over all of it (of at most 128 MiB)."""
    parameter = zstd.CompressionParameter
    window = max(17, min(27, len(data).bit_length()))
    options: dict[int, int] = {
        parameter.compression_level: 19,
        parameter.enable_long_distance_matching: 1,
        parameter.window_log: window,
    }
    return len(zstd.compress(data, options=options))


def _bound(work: Work) -> tuple[int, str]:
    """Colin Percival's bsdiff (http://www.daemonology.net/bsdiff/): its three parts, uncompressed, then one zstd."""
    if work.old is None:
        return zstd19(tree_of(work.new)), ""
    from bsdiff4 import core

    held, wanted = tree_of(work.old), tree_of(work.new)
    # Bytes as in the file format: three numbers of 8 bytes a step.
    control, difference, extra = core.diff(held, wanted)
    if core.patch(held, len(wanted), control, difference, extra) != wanted:
        raise RuntimeError("bsdiff's patch does not make the new tree")
    return zstd19(control + difference + extra), ""


# --- peers that make files


def _whole(work: Work) -> tuple[int, str]:
    return os.path.getsize(work.new), ""


def _rdiff(work: Work) -> tuple[int, str]:
    signature, delta, made = work.path("signature"), work.path("delta"), work.path("made")
    run(["rdiff", "-b", "2048", "signature", work.base, signature])
    run(["rdiff", "delta", signature, work.new, delta])
    run(["rdiff", "patch", work.base, delta, made])
    return os.path.getsize(signature) + os.path.getsize(delta), made


def _xdelta3(work: Work) -> tuple[int, str]:
    delta, made = work.path("delta"), work.path("made")
    window = str(max(1 << 19, os.path.getsize(work.base)))
    run(["xdelta3", "-e", "-9", "-B", window, "-s", work.base, work.new, delta])
    run(["xdelta3", "-d", "-B", window, "-s", work.base, delta, made])
    return os.path.getsize(delta), made


def _zstd_patch(work: Work) -> tuple[int, str]:
    delta, made = work.path("delta"), work.path("made")
    run(["zstd", "-q", "-19", "--long=27", f"--patch-from={work.base}", work.new, "-o", delta])
    run(["zstd", "-q", "-d", "--long=27", f"--patch-from={work.base}", delta, "-o", made])
    return os.path.getsize(delta), made


def _velopack(work: Work) -> tuple[int, str]:
    """A delta package as Velopack 1.2.0 makes it at its best size (`vpk delta generate --mode BestSize`).

    https://github.com/velopack/velopack, src/vpk/Velopack.Packaging: Compression/DeltaPackageBuilder.cs and Zstd.cs.
    Velopack looks for old files below lib/ only, where its own packages have everything; here every file has its turn.
    """
    held, wanted = parts_of(work.base), parts_of(work.new)
    delta = work.path("delta")
    with zipfile.ZipFile(delta, "w") as archive:
        for path, data in wanted.items():
            for name, content in _velopack_entries(work, path, held.get(path), data):
                # .NET's zip is deflated at level 6, and what is empty is stored.
                method = zipfile.ZIP_DEFLATED if content else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(name), content, method, compresslevel=6)
    if _velopack_applied(work, held, delta) != wanted:
        raise RuntimeError(f"velopack did not make the files of {work.new}")
    return os.path.getsize(delta), ""


def _velopack_entries(work: Work, path: str, old: bytes | None, new: bytes) -> Iterator[tuple[str, bytes]]:
    if old == new:
        yield f"{path}.diff", b""
        yield f"{path}.shasum", b""
    elif old is None or not new:
        # zstd makes no patch to an empty file.
        yield path, new
    else:
        yield f"{path}.zsdiff", _velopack_patch(work, old, new)
        digest = hashlib.sha1(new, usedforsecurity=False).hexdigest().upper()
        yield f"{path}.shasum", f"\ufeff{digest} {path.rpartition('/')[2]}.shasum {len(new)}".encode()


def _velopack_patch(work: Work, old: bytes, new: bytes) -> bytes:
    return _zstd_from(work, old, new, ["--single-thread", "-19", "--zstd=targetLength=4096", "--zstd=chainLog=30"])


def _velopack_applied(work: Work, held: Mapping[str, bytes], delta: str) -> dict[str, bytes]:
    """The files that the delta package makes of those that are held."""
    made = {}
    with zipfile.ZipFile(delta) as archive:
        for name in archive.namelist():
            path, _, kind = name.rpartition(".")
            if kind == "diff":
                made[path] = held[path]
            elif kind == "zsdiff":
                made[path] = _zstd_from(work, held[path], archive.read(name), ["--decompress"])
            elif kind != "shasum":
                made[name] = archive.read(name)
    return made


def _zstd_from(work: Work, old: bytes, data: bytes, options: Sequence[str]) -> bytes:
    """What the zstd program makes of `data` with `old` to refer to."""
    base, source, target = (Path(work.path(name)) for name in ("part-old", "part", "part-made"))
    base.write_bytes(old)
    source.write_bytes(data)
    window = len(old).bit_length()
    wide = [f"--long={window}"] if window >= _ZSTD_LONG_FROM else []
    run(["zstd", "-q", "--force", f"--patch-from={base}", *options, *wide, str(source), "-o", str(target)])
    return target.read_bytes()


# --- peers that speak


def _rsync(work: Work) -> tuple[int, str]:
    made = work.path("made")
    shutil.copyfile(work.base, made)
    with _rsync_daemon(work) as port, ThreadedProxy("127.0.0.1", port) as proxy:
        run(["rsync", "--no-whole-file", "-I", "--stats", f"rsync://127.0.0.1:{proxy.port}/files/new", made])
        return proxy.counts.total, made


@contextmanager
def _rsync_daemon(work: Work) -> Iterator[int]:
    """An rsync daemon for one connection, started as inetd would: the port is ours, so it is free. Its port."""
    config = work.path("rsyncd.conf")
    text = f"use chroot = no\nuid = {os.geteuid()}\ngid = {os.getegid()}\n[files]\npath = {work.folder}\n"
    Path(config).write_text(text, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = [sys.executable, "-c", _ACCEPT_ONE, str(listener.fileno()), "rsync", "--daemon", f"--config={config}"]
        with subprocess.Popen(words, pass_fds=[listener.fileno()]) as process:
            try:
                yield int(listener.getsockname()[1])
            finally:
                process.terminate()


_ACCEPT_ONE = """
import os, socket, sys
connection, _ = socket.socket(fileno=int(sys.argv[1])).accept()
os.dup2(connection.fileno(), 0)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def _zsync(work: Work) -> tuple[int, str]:
    made = work.path("made")
    run(["zsyncmake", "-u", "new", "-o", work.path("new.zsync"), work.new], cwd=work.folder)
    with _counted_nginx(work) as proxy:
        run(["zsync", "-q", "-i", work.base, "-o", made, f"http://127.0.0.1:{proxy.port}/new.zsync"], cwd=work.folder)
        return proxy.counts.total, made


def _casync(work: Work) -> tuple[int, str]:
    made = work.path("made")
    run(["casync", "make", f"--store={work.path('store.castr')}", work.path("new.caibx"), work.new])
    with _counted_nginx(work) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        words = ["casync", "extract", f"--store={url}/store.castr", f"--seed={work.base}", f"{url}/new.caibx", made]
        run(words)
        return proxy.counts.total, made


@contextmanager
def _counted_nginx(work: Work) -> Iterator[ThreadedProxy]:
    own = work.path("nginx")
    os.mkdir(own)
    with nginx(own, work.folder) as served, ThreadedProxy("127.0.0.1", served.port) as proxy:
        yield proxy


_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
_FIRST_BOUND = "zstd -19 --long over the sorted tree"
_ZSTD_LONG_FROM = 27
"""The window (log2 of its bytes) from which on zstd must be told of it."""
BOUND = Peer("bound", "bsdiff over the sorted tree, zstd -19 --long", (), first=True, send=_bound)
PEERS = (
    Peer("nupkg", "the whole file", (), first=True, send=_whole),
    Peer("rdiff", "rdiff -b 2048 (Octodiff's algorithm)", ("rdiff",), first=False, send=_rdiff),
    Peer("rsync", "rsync --no-whole-file -I, from a daemon", ("rsync",), first=False, send=_rsync),
    Peer("casync", "casync extract --seed, over nginx", ("casync", "nginx"), first=False, send=_casync),
    Peer("zsync", "zsync -i, over nginx", ("zsync", "zsyncmake", "nginx"), first=False, send=_zsync),
    Peer("xdelta3", "xdelta3 -9 -B (whole source)", ("xdelta3",), first=False, send=_xdelta3),
    Peer("zstd", "zstd -19 --long=27 --patch-from", ("zstd",), first=False, send=_zstd_patch),
    Peer("velopack", "zstd -19 --patch-from for each file, in a zip", ("zstd",), first=False, send=_velopack),
    BOUND,
)


def text_of(found: Comparison) -> str:
    """A table for people: bytes, and per cent of the nupkg."""
    head = f"{found.old} to {found.new}" if found.old else f"{found.new}, first send"
    rows = []
    for row in found.rows:
        if row.bytes is None:
            rows.append([row.peer, "-", "-", "-", row.why_not])
        else:
            share = f"{100 * row.bytes / found.nupkg:.3f}"
            rows.append([row.peer, f"{row.bytes:,}", share, f"{row.seconds:.1f}", row.how])
    headers = ["peer", "bytes", "% of nupkg", "seconds", "how"]
    shown = table(headers, rows, right=frozenset({1, 2, 3}))
    return f"{head} (nupkg {found.nupkg:,} bytes, tree {found.tree:,})\n{shown}"
