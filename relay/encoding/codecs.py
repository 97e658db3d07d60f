"""What a run looks like on the wire: plain, compressed, or as the difference from bases. Encoders and their decoders.

| encoding      | payload                                                          | bases |
|---------------|------------------------------------------------------------------|-------|
| `raw`         | the run as it is                                                 | none  |
| `zstd`        | one zstd frame over the run                                      | none  |
| `zstd-prefix` | one zstd frame over the run, with the bases as prefix            | some  |
| `hdiff`       | covers and differences against the bases (`relay.encoding.deltas`) | some  |

Both ways go piece by piece: an encoder's first bytes can be on the line while it works on the last, and a decoder gives
each byte as soon as it can be known. All of it blocks and uses one core; the libraries release the GIL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol, cast, get_args

from relay.encoding import deltas
from relay.encoding.zstd_stream import Inflater, prefix_of, window_log
from relay.errors import FrameError, UsageError
from relay.support.zstd import zstd

Encoding = Literal["raw", "zstd", "zstd-prefix", "hdiff"]
ENCODINGS: Final[tuple[Encoding, ...]] = get_args(Encoding)
DELTAS: Final[frozenset[Encoding]] = frozenset({"zstd-prefix", "hdiff"})
"""Encodings that build on bases."""

LEVEL = 3
"""zstd level where nothing else is planned."""
LEVEL_MAX = 19
_SLICE = 1 << 20
AT_ONCE = 12
"""Up to this level a run is compressed in one go: 2 % smaller than piece by piece, and no line waits for it long."""


@dataclass(frozen=True, slots=True, order=True)
class Coding:
    """An encoding and how hard the encoder tries. The receiver needs the encoding only.

    `level` is zstd's, 1 to 19: of the run, or of the difference; 0 with `raw`, and where it is not known.
    """

    encoding: Encoding
    level: int

    @property
    def needs_bases(self) -> bool:
        return self.encoding in DELTAS

    def __str__(self) -> str:
        return self.encoding if self.encoding == "raw" else f"{self.encoding}:{self.level}"

    @classmethod
    def parse(cls, text: str) -> Coding:
        """`raw`, `zstd`, `zstd:19`, `zstd-prefix:3`, `hdiff`: without a level, the one that the encoding is planned with.

        Raises:
            UsageError: no such encoding or level.
        """
        name, colon, level = text.partition(":")
        plain = name in ENCODINGS and (not colon or (level.isascii() and level.isdigit() and name != "raw"))
        if not plain or (colon and not 1 <= int(level) <= LEVEL_MAX):
            raise UsageError(
                f"{text[:40]!r} is no encoding",
                hint=f"Expected one of {', '.join(ENCODINGS)}, with a zstd level from 1 to {LEVEL_MAX} if you like: zstd:9",
            )
        encoding = cast("Encoding", name)
        return cls(encoding, int(level) if colon else _DEFAULT_LEVELS[encoding])

    @property
    def at_a_level(self) -> Coding:
        """What came from elsewhere has level 0, as its level is not known: where it has to be made again, this one."""
        return self if self.level else Coding(self.encoding, _DEFAULT_LEVELS[self.encoding])


_DEFAULT_LEVELS: Final[dict[Encoding, int]] = {"raw": 0, "zstd": LEVEL, "zstd-prefix": 3, "hdiff": 19}
RAW: Final = Coding("raw", 0)
PLAIN: Final = Coding("zstd", LEVEL)
"""What everybody can decode without bases: what follows a delta that failed."""


def can_encode(encoding: Encoding) -> bool:
    """Whether payloads of this encoding can be made here: not `hdiff` where HDiffPatch is missing or has changed."""
    return encoding != "hdiff" or deltas.can_encode()


def encode(coding: Coding, run: bytes, base: bytes = b"") -> Iterator[bytes]:
    """The payload of `run`, in pieces as they are made; `base` is all bases, one after another. Blocking.

    Raises:
        deltas.DeltaUnavailableError: `hdiff` cannot be made here; told before the first piece. `can_encode` tells it earlier.
    """
    match coding.encoding:
        case "raw":
            yield run
        case "zstd":
            yield from _compress(run, b"", coding.level)
        case "zstd-prefix":
            yield from _compress(run, base, coding.level)
        case "hdiff":
            yield from deltas.encode_patch(base, run, level=coding.level)


def _compress(run: bytes, base: bytes, level: int) -> Iterator[bytes]:
    prefix = prefix_of(base)
    compressor = zstd.ZstdCompressor(
        options={
            zstd.CompressionParameter.compression_level: level,
            zstd.CompressionParameter.enable_long_distance_matching: 1,
            zstd.CompressionParameter.window_log: window_log(len(run) + len(base)),
        },
        zstd_dict=prefix,
    )
    if level <= AT_ONCE and prefix is None:
        yield compressor.compress(run, zstd.ZstdCompressor.FLUSH_FRAME)
        return
    # It sizes its tables by what it is told: a small run at level 19 then takes 19 MiB in place of 83.
    compressor.set_pledged_input_size(len(run))
    view = memoryview(run)
    for start in range(0, len(view), _SLICE):
        piece = compressor.compress(view[start : start + _SLICE])
        if piece:
            yield piece
    yield compressor.flush()


class Decoder(Protocol):
    """Turns a payload, fed as it comes, into the bytes of its run."""

    def feed(self, data: memoryview) -> Iterator[bytes | memoryview]:
        """Raises `FrameError`: the payload breaks its format, or holds more than the run."""

    @property
    def is_whole(self) -> bool:
        """Whether the payload may end here."""


def decoder_for(encoding: Encoding, size: int, base: bytes | bytearray = b"") -> Decoder:
    """A decoder of a run of `size` bytes; `base` is all bases, one after another.

    Memory beyond the base and what is handed out: a zstd window of at most the next power of two above run and base, of
    which no more is used than the run is long; for `zstd-prefix` a second base; for `hdiff` the list of covers.
    """
    match encoding:
        case "raw":
            return _RawDecoder(size)
        case "zstd":
            return Inflater(size, window=window_log(size))
        case "zstd-prefix":
            return Inflater(size, window=window_log(size + len(base)), base=base)
        case "hdiff":
            return deltas.PatchDecoder(base, size)


class _RawDecoder:
    is_whole = True

    def __init__(self, size: int) -> None:
        self._left = size

    def feed(self, data: memoryview) -> Iterator[memoryview]:
        self._left -= len(data)
        if self._left < 0:
            raise FrameError("a payload holds more than its run needs")
        yield data
