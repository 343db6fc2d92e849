"""Two runs side by side: what became slower, beyond what is allowed."""

from __future__ import annotations

import re
from typing import NamedTuple

from alignfast.bench.results import Row, Run
from alignfast.bench.tables import bytes_text, seconds_text, table


class Change(NamedTuple):
    """One row in both runs."""

    before: Row
    after: Row
    ratio: float
    """Seconds after by seconds before."""


class Comparison(NamedTuple):
    """What two runs have in common, and what they have not."""

    changes: list[Change]
    lost: list[Row]
    """Of the first run, in groups that the second ran too."""
    new: list[Row]
    broken: list[str]
    """What of ours was wrong or broke in the second run."""


def share(text: str) -> float:
    """A share as people write it: `5%`, `5 %` or `0.05`.

    >>> share("5%"), share("0.05")
    (0.05, 0.05)

    Raises:
        ValueError: it is none, or below 0.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", text)
    try:
        value = float(match.group(1)) if match else -1.0
    except ValueError:
        value = -1.0
    if match is None or value < 0:
        raise ValueError(f"{text!r} is not a share: write 5% or 0.05")
    return value / 100 if match.group(2) else value


def compare(before: Run, after: Run, by: str = "median") -> Comparison:
    """Rows of two runs by group, provider and shape.

    Args:
        before: the run that is the measure.
        after: the run that is judged.
        by: `median` or `min` of the rounds.

    Raises:
        ValueError: the runs share no row, or `by` is neither.
    """
    if by not in ("median", "min"):
        raise ValueError(f"by={by!r} is not one of median, min")
    first, second = ({row.key: row for row in run.rows} for run in (before, after))

    def seconds(row: Row) -> float:
        return row.median if by == "median" else row.least

    changes = [
        Change(row, second[key], seconds(second[key]) / seconds(row))
        for key, row in first.items()
        if key in second
    ]
    if not changes:
        raise ValueError("the two runs have no row in common: no group, provider and shape is in both")
    ran = {row.group for row in after.rows}
    lost = [row for key, row in first.items() if key not in second and row.group in ran]
    return Comparison(
        changes, lost, [row for key, row in second.items() if key not in first], after.failed[0]
    )


def failures(found: Comparison, allowed: float) -> list[str]:
    """Why a comparison fails: rows slower by more than is allowed, rows that are gone, and what was wrong."""
    slower = [change for change in found.changes if change.ratio > 1 + allowed]
    said = [f"{_name(change.after)}: {change.ratio - 1:+.1%}" for change in slower]
    return said + [f"{_name(row)}: no time in the second run" for row in found.lost] + found.broken


def markdown(found: Comparison, by: str = "median") -> str:
    """Every row in both, the one that lost most first."""
    rows = sorted(found.changes, key=lambda change: -change.ratio)
    text = table(
        ["what", "shape", "provider", "before", "after", "time", "memory before", "after"],
        (
            [
                change.before.group,
                change.before.shape,
                change.before.provider,
                *(
                    seconds_text(r.median if by == "median" else r.least)
                    for r in (change.before, change.after)
                ),
                f"{change.ratio - 1:+.1%}",
                *(bytes_text(r.peak_bytes) for r in (change.before, change.after)),
            ]
            for change in rows
        ),
        texts=3,
    )
    if found.lost:
        text += "\n\nWithout a time in the second run: " + "; ".join(_name(row) for row in found.lost)
    if found.broken:
        text += "\n\nWrong or broken in the second run: " + "; ".join(found.broken)
    if found.new:
        text += "\n\nIn the second run alone: " + "; ".join(_name(row) for row in found.new)
    return text


def machines_differ(before: Run, after: Run) -> str | None:
    """What a reader must know before comparing."""
    named = ("cpu", "gpu", "threads")
    differing = [
        f"{name} {before.machine.get(name)} and {after.machine.get(name)}"
        for name in named
        if before.machine.get(name) != after.machine.get(name)
    ]
    return f"the runs are of different machines: {'; '.join(differing)}" if differing else None


def _name(row: Row) -> str:
    return f"{row.group}, {row.shape}, {row.provider}"
