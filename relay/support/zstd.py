"""The one place that knows where zstd comes from: the standard library from Python 3.14, its backport before."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):  # pragma: no cover - tested where that Python is
    from compression import zstd
else:
    from backports import zstd

__all__ = ["zstd"]
