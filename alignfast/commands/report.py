"""`alignfast report RUN_DIR`: one HTML page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignfast.commands.parser import parse_options


@dataclass(frozen=True)
class ReportOptions:
    """Of which run."""

    run_dir: str
    """The output_dir of a training."""


def run(command: str, argv: Sequence[str]) -> None:
    """Write report.html into the run's folder."""
    (options,) = parse_options(command, argv, ReportOptions, positional=("run_dir",))
    from alignfast.report import write_report

    print(f"report: {write_report(options.run_dir)}")
