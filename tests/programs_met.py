"""Which versions of the programs a test run met. Debian brings them, and nothing pins them: a run says what it saw."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sqlite3
import ssl
import subprocess
import zlib

VERSION_OPTIONS = {
    "7z": "i",
    "casync": "--version",
    "curl": "--version",
    "dnsmasq": "--version",
    "haproxy": "-v",
    "ip": "-V",
    "nginx": "-v",
    "rdiff": "--version",
    "rsync": "--version",
    "strace": "--version",
    "unzip": "-v",
    "xdelta3": "-V",
    "zip": "-v",
    "zstd": "--version",
    "zsync": "-V",
}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PATIENCE = 10.0
"""Seconds for one program to answer."""


def programs_met() -> list[str]:
    """Lines for the head of a test run."""
    asked = {name: _ask(name, option) for name, option in VERSION_OPTIONS.items() if shutil.which(name, path=PATH)}
    met = [f"{name} {_answer(process)}" for name, process in asked.items()]
    python = f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, SQLite {sqlite3.sqlite_version}"
    return [
        f"interpreter: {python}, zlib {zlib.ZLIB_RUNTIME_VERSION}",
        f"programs: {', '.join(met) or 'none'}",
        f"missing programs: {', '.join(sorted(VERSION_OPTIONS.keys() - asked.keys())) or 'none'}",
    ]


def version_in(text: str) -> str:
    """The first number with a dot, and what Debian hung on it; else the first number; else `?`."""
    found = re.search(r"\d+\.\d[\w.+~-]*", text) or re.search(r"\d+", text)
    return found[0] if found else "?"


def _ask(name: str, option: str) -> subprocess.Popen[str] | None:
    """All are started before the first is waited for."""
    command = [shutil.which(name, path=PATH) or name, option]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        )
    except OSError:
        return None


def _answer(process: subprocess.Popen[str] | None) -> str:
    if process is None:
        return "?"
    with process:
        try:
            return version_in(process.communicate(timeout=PATIENCE)[0])
        except subprocess.TimeoutExpired:
            process.kill()
            return "?"
