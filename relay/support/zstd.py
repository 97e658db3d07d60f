"""The one place that knows where zstd comes from (the standard library from Python 3.14, its backport before), and how a
whole frame from outside is inflated.
"""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 14):  # pragma: no cover - tested where that Python is
    from compression import zstd
else:
    from backports import zstd

__all__ = ["FrameFault", "inflate", "prefix", "zstd"]


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
