"""What holds for every test."""

from __future__ import annotations

from programs_met import programs_met


def pytest_report_header() -> list[str]:
    return programs_met()
