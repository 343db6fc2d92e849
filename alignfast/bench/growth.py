"""How a cost grows: y = a x^e, fitted to a sweep by least squares of the logarithms.

An exponent of 1 is a cost in proportion, 0 one that stays, 2 the square. Small sizes are left out of a fit where a fixed
cost hides the growth: the fit takes the upper half of the points, at least three of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from alignfast.bench.results import Row


class Sweep(NamedTuple):
    """One provider's rows over what grows, the smallest first."""

    group: str
    axis: str
    provider: str
    rows: list[Row]


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x; None of fewer than two points or of a y that is 0.

    >>> exponent([(1, 3), (2, 12), (4, 48), (8, 192)])
    2.0
    """
    if len(points) < 2 or any(y <= 0 for _, y in points):
        return None
    kept = sorted(points)[min(len(points) // 2, max(len(points) - 3, 0)) :]
    xs, ys = ([math.log(point[i]) for point in kept] for i in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    if not spread:
        return None
    return round(sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys)) / spread, 6)


def fit(sweep: Sweep, what: str) -> float | None:
    """The exponent of a sweep's `time` or `memory`; None of a share, which nothing grows with."""
    return None if sweep.axis.endswith("share") else exponent(points(sweep, what))


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """Rows that belong to a sweep, by group, axis and provider."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.axis is not None:
            found.setdefault((row.group, row.axis[0], row.provider), []).append(row)
    return [Sweep(*key, sorted(rows, key=_at)) for key, rows in found.items()]


def points(sweep: Sweep, what: str) -> list[tuple[float, float]]:
    """(x, y) of a sweep: `time` in seconds or `memory` in bytes, as far as known."""
    found = [(_at(row), row.median if what == "time" else row.peak_bytes) for row in sweep.rows]
    return [(x, y) for x, y in found if y is not None]


def _at(row: Row) -> float:
    assert row.axis is not None
    return row.axis[1]
