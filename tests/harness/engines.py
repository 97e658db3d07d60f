"""Real packages and deflate engines, where they lie beside the project."""

from __future__ import annotations

import platform
import sys

import pytest

from harness.paths import SHARED

DATA = SHARED
"""Real packages and engines, where somebody put them beside the project."""
ENGINES = DATA / "engines"
PACKAGES = DATA / "packages"

needs_engines = pytest.mark.skipif(
    len(list(ENGINES.glob("*.so"))) != 2 or platform.machine() != "x86_64" or sys.platform != "linux",
    reason="no real packages or engines in ../shared/data, or not linux-x64",
)
