"""How far something is, told while it goes on."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done, and with the whole: bytes, where nothing else is said."""
Bar = Callable[[str], Progress]
"""Makes a named progress bar."""
