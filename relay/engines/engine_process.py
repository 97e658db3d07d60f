"""A process without rights that runs one native deflate engine: .NET's `libSystem.IO.Compression.Native.so`.

Run as a script with `python -I -S`; the other side, `relay/engines/encoders.py`, takes only the frames from here. It reads them
from its standard input and answers on its standard output. The first frame is the engine itself, whose digest was
checked by who sent it: what was hashed is what is loaded. Before that the process gives up its user, network and
privileges; after it, opening anything. Then it can compute, read its input and write its output.

A request is a kind (one byte), a length (u32, little-endian) and so many bytes: `s` start a part (the payload is the
input's size per write, 0 for one write, and whether to flush, as `<IB`), `d` content, `f` the last content. `d` and `f`
are answered with a length (u32) and as many bytes of deflate.

The engine is called just as `System.IO.Compression.DeflateStream` calls it, through an output buffer of 8,192 bytes:
zlib-ng forgets a match it was about to take whenever its output is full, so another buffer gives other bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import sys

with contextlib.suppress(ImportError):  # Windows has none, and runs no engine
    import resource

REQUEST = struct.Struct("<cI")
ANSWER = struct.Struct("<I")
START = struct.Struct("<IB")
FRAME_MAX = 16 << 20
"""Bytes of one request. An engine has 1 MiB, a piece of content 256 KiB."""

_OUTPUT = 8192
_NO_FLUSH, _SYNC_FLUSH, _FINISH = 0, 2, 4
_OK, _STREAM_END = 0, 1
_LEVEL, _DEFLATE, _RAW_WINDOW, _MEMORY, _DEFAULT_STRATEGY = 6, 8, -15, 8, 0
_ADDRESS_SPACE = 512 << 20
_CPU_SECONDS = 4 * 3600
_NOBODY = 65534
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38


class _Stream(ctypes.Structure):
    """`PAL_ZStream` of .NET's `pal_zlib.h`."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("next_out", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("available_in", ctypes.c_uint32),
        ("available_out", ctypes.c_uint32),
    )


class EngineError(Exception):
    """The engine cannot be loaded, or answers with an error."""


class Deflater:
    """One part's deflate stream, fed as `DeflateStream` feeds it."""

    def __init__(self, engine: ctypes.CDLL, write_size: int, *, sync: bool) -> None:
        """Start a stream.

        Args:
            engine: .NET's native library.
            write_size: bytes of content per write of the one who packed; 0 for all in one.
            sync: whether it flushed before it ended.

        Raises:
            EngineError: the engine refuses.
        """
        self._engine = engine
        self._write_size = write_size
        self._sync = sync
        self._stream = _Stream()
        self._buffer = ctypes.create_string_buffer(_OUTPUT)
        self._made = bytearray()
        started = engine.CompressionNative_DeflateInit2_(
            ctypes.byref(self._stream), _LEVEL, _DEFLATE, _RAW_WINDOW, _MEMORY, _DEFAULT_STRATEGY
        )
        if started != _OK:
            raise EngineError(f"the engine does not start: {started}")
        self._drain()

    def write(self, data: bytes) -> bytes:
        """What comes out when `data` goes in. All but a part's last data must be whole writes, or whole 256 KiB.

        One write may come in pieces, as long as each is a multiple of the engine's window (32 KiB) and the output buffer
        keeps its fill: the engine fills its window at these multiples anyway, and cannot tell.
        """
        if not self._write_size:
            self._feed(data)
        else:
            for at in range(0, len(data), self._write_size):
                self._feed(data[at : at + self._write_size])
                self._drain()
        return self._take()

    def finish(self) -> bytes:
        """The rest."""
        self._drain()
        if self._sync:
            while self._call(_SYNC_FLUSH) == _OK:
                self._drain()
            self._drain()
        while (result := self._call(_FINISH)) == _OK:
            self._drain()
        if result != _STREAM_END:
            raise EngineError(f"the engine does not finish: {result}")
        self._drain()
        return self._take()

    def close(self) -> None:
        self._engine.CompressionNative_DeflateEnd(ctypes.byref(self._stream))

    def _feed(self, data: bytes) -> None:
        held = ctypes.create_string_buffer(data, max(1, len(data)))
        self._stream.next_in = ctypes.addressof(held)
        self._stream.available_in = len(data)
        while self._stream.available_in:
            result = self._call(_NO_FLUSH)
            if result != _OK:
                raise EngineError(f"the engine does not take its input: {result}")
            if not self._stream.available_out:
                self._drain()

    def _call(self, flush: int) -> int:
        return int(self._engine.CompressionNative_Deflate(ctypes.byref(self._stream), flush))

    def _drain(self) -> None:
        """Take the output, and give the whole buffer again."""
        if self._stream.next_out:
            self._made += memoryview(self._buffer)[: _OUTPUT - self._stream.available_out]
        self._stream.next_out = ctypes.addressof(self._buffer)
        self._stream.available_out = _OUTPUT

    def _take(self) -> bytes:
        made = bytes(self._made)
        self._made.clear()
        return made


def load(library: bytes) -> ctypes.CDLL:
    """The engine out of just these bytes, through a file in memory that nobody else can change.

    Raises:
        EngineError: it is not a library for this machine.
    """
    descriptor = os.memfd_create("engine")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(library)
        engine = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        for name in ("DeflateInit2_", "Deflate", "DeflateEnd"):
            getattr(engine, f"CompressionNative_{name}").restype = ctypes.c_int32
    except (OSError, AttributeError) as error:
        raise EngineError(f"the engine does not load: {error}") from error
    finally:
        os.close(descriptor)
    return engine


def give_up_rights() -> None:
    """Leave user, network and privileges behind; die with the parent. Raises `OSError` where that fails for root."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the process cannot give up new privileges")
    # Needs rights itself; without it the process still cannot open a socket, as it may open nothing.
    libc.unshare(_CLONE_NEWNET)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    # A change of user takes both of these away: the first ends us with the parent, the second lets us open our own file.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def close_doors() -> None:
    """From here on nothing can be opened, written to disk or started."""
    for limit, value in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_AS, _ADDRESS_SPACE),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
    ):
        resource.setrlimit(limit, (value, value))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _read(size: int) -> bytes:
    """Exactly `size` bytes of the input; ends the process where it ends."""
    data = sys.stdin.buffer.read(size)
    if len(data) != size:
        raise SystemExit(0)
    return data


def _request() -> tuple[bytes, bytes]:
    kind, size = REQUEST.unpack(_read(REQUEST.size))
    if size > FRAME_MAX:
        raise SystemExit(2)
    return kind, _read(size)


def _answer(data: bytes) -> None:
    sys.stdout.buffer.write(ANSWER.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def serve(engine: ctypes.CDLL) -> None:
    """Answer until the input ends."""
    current: Deflater | None = None
    while True:
        kind, payload = _request()
        if kind == b"s":
            if current:
                current.close()
            write_size, sync = START.unpack(payload)
            current = Deflater(engine, write_size, sync=bool(sync))
        elif current and kind in {b"d", b"f"}:
            made = current.write(payload)
            _answer(made + current.finish() if kind == b"f" else made)
        else:
            raise SystemExit(2)


def main() -> None:
    """Load, close every door, say so (an empty answer, or the reason why not), and serve."""
    try:
        give_up_rights()
        engine = load(_request()[1])
        close_doors()
    except (EngineError, OSError, ValueError) as error:
        _answer(str(error).encode(errors="replace"))
        raise SystemExit(1) from None
    _answer(b"")
    serve(engine)


if __name__ == "__main__":
    main()
