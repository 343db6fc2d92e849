"""A pytest plugin for runs that may be ended at any moment: each failure is told when it happens, not at the end."""

from __future__ import annotations

import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(
            f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-2000:]}",
            file=sys.stderr,
            flush=True,
        )
