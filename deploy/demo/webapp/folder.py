"""The folder that becomes a version of the webshop's package: `waystation package pack FOLDER --id … --version …`."""

from __future__ import annotations

import shutil
from pathlib import Path

ID = "Acme.Web"
RESTART = Path(__file__).parent / "ops" / "restart.py"
"""The machine script that ends the old one and starts the new one."""


def make(folder: Path, version: str, *, broken: bool = False) -> Path:
    """Write the files of `version` into `folder`, which must not exist yet; returns it.

    A `broken` one starts and listens, and answers everything with 500.
    """
    shutil.copytree(Path(__file__).parent / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "version.txt").write_text(f"{version}\n", encoding="utf-8")
    if broken:
        (folder / "broken").write_text("This version answers everything with 500.\n", encoding="utf-8")
    return folder
