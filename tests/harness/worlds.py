"""Worlds in which a process of ours may be started: locales, time zones and masks that are not those of the tests."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache

LATIN = ("LANG=en_US", "LC_ALL=", "LC_CTYPE=", "PYTHONUTF8=0", "TZ=Pacific/Kiritimati")
"""As on a Debian with `LANG=en_US`, which is ISO-8859-1 there. A Python without a locale leaves LC_CTYPE to its children."""
PLAIN = ("LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")
"""ASCII alone, and a Python that may not help itself."""


def world(*variables: str, umask: str = "022") -> tuple[str, ...]:
    """What to start a process `under`, as `harness.process.Process` has it."""
    return ("env", *variables, "sh", "-c", f'umask {umask}; exec "$@"', "sh")


def latin_world(umask: str = "022") -> tuple[str, ...]:
    """A process in an ISO-8859-1 locale; empty where this machine cannot make one."""
    made = _latin_locale()
    return world(*LATIN, f"LOCPATH={made.name}", umask=umask) if made else ()


@cache
def _latin_locale() -> tempfile.TemporaryDirectory[str] | None:
    """A folder that goes with this process."""
    if shutil.which("localedef") is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="locales-")
    made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", f"{folder.name}/en_US"], capture_output=True)
    return folder if made.returncode == 0 else None
