"""What one core of this machine does, measured once at start, so that senders can plan by it."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable

from relay.content.zstd import zstd
from relay.wire import CpuRates

_SAMPLE = 4 << 20


def measure_rates() -> CpuRates:
    """Bytes per second over 4 MiB that compress to about a half, as program files do. Takes some 30 ms of one core."""
    # Not a secret: the same sample each time.
    noise = random.Random(0).randbytes(_SAMPLE // 2)  # noqa: S311
    sample = b"".join(noise[i : i + 64] + bytes(64) for i in range(0, len(noise), 64))
    packed = zstd.compress(sample, 3)
    return CpuRates(
        sha256=_rate(lambda: hashlib.sha256(sample).digest()),
        zstd_decode=_rate(lambda: zstd.decompress(packed)),
        zstd_encode=_rate(lambda: zstd.compress(sample, 3)),
    )


def _rate(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return _SAMPLE / max(time.perf_counter() - started, 1e-9)
