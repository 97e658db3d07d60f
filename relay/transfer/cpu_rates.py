"""What one core of this machine does, measured once at start, so that senders can plan by it."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import Final

from relay.encoding.deltas import find_covers
from relay.protocol.messages import CpuRates
from relay.support.zstd import zstd

_SAMPLE: Final = 4 << 20
_LEVEL_9: Final = 1 << 20
_LEVEL_19: Final = 96 << 10
_HDIFF: Final = 128 << 10
_BEYOND_CACHES: Final = 0.22
"""What is left of the search for differences where bases are megabytes (measured at 8 to 32 MiB)."""


def measure_rates() -> CpuRates:
    """Bytes per second over some MiB that compress to about a half, as program files do. Takes some 100 ms of one core.

    What is slow is measured on little. The search for differences is told as it is on long runs.
    """
    # Not a secret: the same sample each time.
    noise = random.Random(0).randbytes(_SAMPLE // 2)  # noqa: S311
    sample = b"".join(noise[i : i + 64] + bytes(64) for i in range(0, len(noise), 64))
    packed = zstd.compress(sample, 3)
    old, new = noise[:_HDIFF], noise[1000:_HDIFF]
    return CpuRates(
        sha256=_rate(_SAMPLE, lambda: hashlib.sha256(sample).digest()),
        zstd_decode=_rate(_SAMPLE, lambda: zstd.decompress(packed)),
        zstd_encode=_rate(_SAMPLE, lambda: zstd.compress(sample, 3)),
        zstd_encode_9=_rate(_LEVEL_9, lambda: zstd.compress(sample[:_LEVEL_9], 9)),
        zstd_encode_19=_rate(_LEVEL_19, lambda: zstd.compress(sample[:_LEVEL_19], 19)),
        hdiff_encode=_BEYOND_CACHES * _rate(len(old) + len(new), lambda: find_covers(old, new)),
        cores=os.cpu_count() or 1,
    )


def _rate(size: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return size / max(time.perf_counter() - started, 1e-9)
