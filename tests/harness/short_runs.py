"""Tables of lines on which a small package is several runs, or several requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.encoding import planner


def shorten_runs(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """No run is longer than `most` bytes, or one chunk."""
    monkeypatch.setattr(planner, "RUN_BYTES_MIN", min(most, planner.RUN_BYTES_MIN))
    kinds = [
        replace(
            kind,
            first_run=min(most, kind.first_run),
            longest_run=min(most, kind.longest_run),
            delta_run=min(most, kind.delta_run),
        )
        for kind in planner.LINES
    ]
    monkeypatch.setattr(planner, "LINES", tuple(kinds))


def shorten_segments(monkeypatch: pytest.MonkeyPatch, plain: int, with_bases: int | None = None) -> None:
    """No request without bases is for more than `plain` bytes, or one chunk; none with bases for more than `with_bases`."""
    kinds = [replace(kind, segment=plain, delta_segment=with_bases or kind.delta_segment) for kind in planner.LINES]
    monkeypatch.setattr(planner, "LINES", tuple(kinds))
