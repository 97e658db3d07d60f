"""The one place that knows where zstd comes from (the standard library from Python 3.14, its backport before), and how
frames from outside are inflated: one as a whole, or several piece by piece.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final

if sys.version_info >= (3, 14):  # pragma: no cover - tested where that Python is
    from compression import zstd
else:
    from backports import zstd

__all__ = ["FrameFault", "inflate", "inflate_pieces", "prefix", "zstd"]

_FRAMES_MAX: Final = 4096
"""Frames one after another. Writers that make several put megabytes into each; each one costs a decoder."""


class FrameFault(ValueError):  # noqa: N818 - what is wrong with a frame, for others to tell
    """Not one whole frame within the bounds."""


def prefix(base: bytes | bytearray | None) -> Any:  # noqa: ANN401 - the library's type for it is private
    """What makes zstd refer to `base` as if it stood before the content."""
    return zstd.ZstdDict(base, is_raw=True).as_prefix if base else None


def inflate(frame: bytes | memoryview, most: int, *, window_log: int, base: bytes | None = None) -> bytes:
    """What one zstd frame holds, of which nothing beyond `most` bytes is made; `base` was its prefix.

    Raises:
        FrameFault: it is damaged, holds more, is cut off or followed by other bytes.
    """
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: window_log}
    decoder = zstd.ZstdDecompressor(zstd_dict=prefix(base), options=options)
    try:
        content = decoder.decompress(frame, max_length=most + 1)
        while not decoder.eof and not decoder.needs_input and len(content) <= most:
            content += decoder.decompress(b"", max_length=most + 1 - len(content))
    except (zstd.ZstdError, MemoryError) as error:
        raise FrameFault(f"that does not decompress: {error}") from error
    if len(content) > most:
        raise FrameFault(f"of more than {most} bytes")
    if not decoder.eof or decoder.unused_data:
        raise FrameFault("that is cut off, or followed by other bytes")
    return content


def inflate_pieces(pieces: Iterable[bytes], most: int, *, window_log: int) -> Iterator[bytes]:
    """What one or more zstd frames hold, one after another, at most `most` bytes at a time.

    Raises:
        FrameFault: damaged, of a larger window, or cut off.
    """
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: window_log}
    decoder, frames = zstd.ZstdDecompressor(options=options), 1
    for piece in pieces:
        waiting = piece
        while waiting or not (decoder.eof or decoder.needs_input):
            if decoder.eof:
                decoder, frames = zstd.ZstdDecompressor(options=options), frames + 1
            if frames > _FRAMES_MAX:
                raise FrameFault(f"of more than {_FRAMES_MAX} frames")
            try:
                content = decoder.decompress(waiting, max_length=most)
            except (zstd.ZstdError, MemoryError) as error:
                raise FrameFault(f"that does not decompress: {error}") from error
            waiting = decoder.unused_data
            if content:
                yield content
    if not decoder.eof:
        raise FrameFault("that is cut off")
