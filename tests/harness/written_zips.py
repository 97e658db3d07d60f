"""Zips by the writers that Debian, npm and PyPI bring: see tests/data/zips."""

from __future__ import annotations

from typing import Final

from harness.paths import DATA

TREE: Final = {
    "Acme.Zip.nuspec": (
        b"<package><metadata><id>Acme.Zip</id><version>1.0.0</version><authors>a</authors>"
        b"<description>d</description></metadata></package>"
    ),
    "lib/a.dll": b"some text, " * 50,
    "lib/run me": b"#!/bin/sh\n",
    "nothing": b"",
}
"""What they were given. Some got less of it."""
ALL: Final = {path.stem: path.read_bytes() for path in sorted((DATA / "zips").glob("*.zip"))}
REFUSED: Final = {
    "refused-BZip2": "compressed by bzip2 (method 12)",
    "refused-Deflate64": "compressed by Deflate64 (method 9)",
    "refused-LZMA": "compressed by LZMA (method 14)",
    "refused-PPMd": "compressed by PPMd (method 98)",
    "refused-encrypted": "an encrypted entry",
    "refused-php-bzip2": "compressed by bzip2 (method 12)",
    "refused-python-bzip2": "compressed by bzip2 (method 12)",
    "refused-python-lzma": "compressed by LZMA (method 14)",
}
WRITTEN: Final = {name: data for name, data in ALL.items() if not name.startswith("refused-")}
