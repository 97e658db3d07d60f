"""One zstd frame from whoever sent it, inflated as it comes and within bounds that the receiver knows beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from relay.errors import FrameError
from relay.support.zstd import prefix, zstd

WINDOW_LOG_MIN: Final = 17
"""The least zstd window that every receiver grants, as a power of two."""
WINDOW_LOG_MAX: Final = 27
"""The largest zstd window, as a power of two. A frame that asks for more is refused."""
_SLICE: Final = 1 << 20
_PREFIX_MIN: Final = 8
"""zstd passes over a prefix that is shorter than what it hashes, and its bindings refuse one."""


def window_log(size: int) -> int:
    """The zstd window over `size` bytes, as a power of two: what an encoder asks for and a decoder grants."""
    return max(WINDOW_LOG_MIN, min(WINDOW_LOG_MAX, max(size - 1, 1).bit_length()))


def prefix_of(base: bytes | bytearray) -> Any:  # noqa: ANN401 - the library's type for it is private
    """As `prefix`; None where `base` is too short to be of use."""
    return prefix(base) if len(base) >= _PREFIX_MIN else None


class Inflater:
    """Takes one zstd frame piece by piece and gives what it holds, in slices of at most 1 MiB."""

    def __init__(self, size: int, *, window: int, base: bytes | bytearray = b"", what: str = "a payload") -> None:
        """Prepare for one frame.

        Args:
            size: bytes of content that are expected at most.
            window: the largest window granted, as a power of two. That much memory is taken as content fills it.
            base: what the frame takes as its prefix.
            what: names the frame in errors.
        """
        self._zstd = zstd.ZstdDecompressor(
            zstd_dict=prefix_of(base),
            options={zstd.DecompressionParameter.window_log_max: window},
        )
        self._left = size
        self._what = what

    @property
    def is_whole(self) -> bool:
        """Whether the frame came to its end."""
        return self._zstd.eof

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """What `data` adds.

        Raises:
            FrameError: it is no zstd within the window, holds more than expected, or goes on after the frame's end.
        """
        while not self._zstd.eof:
            try:
                # One byte more than is left: a frame that holds more shows it at once.
                found = self._zstd.decompress(data, max_length=min(_SLICE, self._left + 1))
            except (zstd.ZstdError, MemoryError) as error:
                raise FrameError(f"{self._what} is not zstd within bounds: {error}") from error
            data = memoryview(self._zstd.unused_data)
            self._left -= len(found)
            if self._left < 0:
                raise FrameError(f"{self._what} holds more than its run needs")
            if found:
                yield found
            if self._zstd.needs_input:
                break
        if self._zstd.eof and data:
            raise FrameError(f"bytes after the zstd frame of {self._what}")
