"""Both ends of a replication stay small, however large the package.

1 GB of content crosses: an end that held it would have more than it may have. What bounds an end is held by quick tests:
the budget of encodings in tests/relay/transfer/test_encoder_pool.py, the bytes in flight in tests/relay/server/http.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.seed import SOAK

from benchmarks.memory import MOST, measure

MEGABYTES = 1000


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="both ends are measured in `make soak CHAPTER=road`")
def test_neither_end_has_a_large_package_in_memory(tmp_path: Path) -> None:
    first, following = measure(str(tmp_path), MEGABYTES, (0.0,))
    assert first.payload_bytes > 0.5 * MEGABYTES * 1_000_000, "the package was not large"
    assert 0 < following.payload_bytes < first.payload_bytes
    for peak in (first, following):
        assert 10_000_000 < peak.sender < MOST
        assert 10_000_000 < peak.relay < MOST
