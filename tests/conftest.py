"""What holds for every test: the head of a run, which tests start processes, and that none outlives the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from harness import process
from programs_met import programs_met

_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", process.AUDIT_EVENT})
_started: list[str] = []


def _audit(event: str, _arguments: tuple[object, ...]) -> None:
    if event in _STARTS:
        _started.append(event)


sys.addaudithook(_audit)


def pytest_report_header() -> list[str]:
    return programs_met()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _started.clear()
    result = yield
    if _started and (file := os.environ.get("H_STARTED")):
        with open(file, "a") as f:
            f.write(item.nodeid + "\n")
    return result
