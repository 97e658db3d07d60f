"""The code of commit f8f3ed2, taken out of the project's own history, for processes of that day beside those of today."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

COMMIT = "f8f3ed2"
REPOSITORY = Path(__file__).resolve().parents[2]


class NotInHistoryError(Exception):
    """The commit cannot be had here: a shallow clone, an unpacked archive of the source, no git."""


def take_out(folder: Path) -> dict[str, str]:
    """Write that commit's code below `folder`, and give the environment in which `waystation` runs it.

    The command in `.venv` imports `relay.main`, and PYTHONPATH goes before what is installed; the libraries are today's.

    Raises:
        NotInHistoryError: with git's reason.
    """
    with tarfile.open(fileobj=io.BytesIO(_archive())) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)  # noqa: S202 - our own, and filtered where this Python can
    return {"PYTHONPATH": str(folder)}


def _archive() -> bytes:
    command = ["git", "-C", str(REPOSITORY), "archive", COMMIT, "relay", "agent", "orchestrator"]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError as error:
        raise NotInHistoryError(str(error)) from error
    if done.returncode:
        raise NotInHistoryError(done.stderr.decode(errors="replace").strip())
    return done.stdout
