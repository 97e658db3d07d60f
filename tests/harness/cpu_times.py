"""A plugin of pytest that tells where processor time goes: `pytest -p harness.cpu_times [-n 2]`.

Wall time depends on what else the machine does; the user and system time of a test, and of the processes that it
waited for, hardly does.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator

import pytest

from harness import process

_NAME = "cpu_seconds"
_LONGEST = 60


def _spent() -> float:
    ours = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in ours) + process.forked_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """One entry a test, with what its fixtures cost."""
    before = _spent()
    item.user_properties.append((_NAME, before))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    if call.when == "teardown":
        item.user_properties[:] = [
            (name, _spent() - value if name == _NAME else value) for name, value in item.user_properties
        ]
    return (yield)


def pytest_terminal_summary(terminalreporter) -> None:
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                tests[report.nodeid] = dict(report.user_properties).get(_NAME, 0.0)
    files: Counter[str] = Counter()
    for test, seconds in tests.items():
        files[test.partition("::")[0]] += seconds
    for title, found in (("file", files), ("test", tests)):
        terminalreporter.section(f"processor seconds a {title}, of {tests.total():.0f}")
        for name, seconds in found.most_common(_LONGEST):
            terminalreporter.write_line(f"{seconds:8.2f} {name}")
