"""`alignfast data check FILE`: what is wrong with a file of data, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignfast.commands.parser import UsageError, parse_options


@dataclass(frozen=True)
class CheckOptions:
    """What to check."""

    action: str
    """`check`."""
    file: str
    """A .jsonl, .json or .parquet file, or a dataset's name on the hub."""


def run(command: str, argv: Sequence[str]) -> None:
    """Print the report; bad rows are an error."""
    (options,) = parse_options(
        command,
        argv,
        CheckOptions,
        positional=("action", "file"),
        description="Check a file of data: `check FILE`.",
    )
    if options.action != "check":
        raise UsageError(f"there is `alignfast data check FILE`, got {options.action!r}")
    from alignfast.data import check_file

    report = check_file(options.file)
    print(report.render())
    if report.bad_rows:
        raise ValueError(f"{report.name} has rows that can't be used: {len(report.bad_rows)}")
