"""Where the repository, the tests' own data and the shared data lie."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
"""Of the repository."""
DATA: Final = ROOT / "tests" / "data"
"""Small files that came with the repository."""
SHARED: Final = ROOT.parent / "shared" / "data"
"""Real packages and clients. Who has none of it falls back to `DATA`, or skips aloud."""
