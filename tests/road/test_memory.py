"""Both ends of a replication stay small, however large the package.

`WAYSTATION_SOAK=1` sends 1 GB of content, by default 450 MB: whoever held either would have more than an end may have.
"""

from __future__ import annotations

from pathlib import Path

from harness.seed import SOAK

from benchmarks.memory import MOST, measure

MEGABYTES = 1000 if SOAK else 450


def test_neither_end_has_a_large_package_in_memory(tmp_path: Path) -> None:
    first, following = measure(str(tmp_path), MEGABYTES, (0.0,))
    assert first.payload_bytes > 0.5 * MEGABYTES * 1_000_000, "the package was not large"
    assert 0 < following.payload_bytes < first.payload_bytes
    for peak in (first, following):
        assert 10_000_000 < peak.sender < MOST
        assert 10_000_000 < peak.relay < MOST
