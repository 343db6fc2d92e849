"""Shares with their 95 % intervals, where rows that share a prompt count for less than as many independent ones.

Of a share, Wilson's, https://doi.org/10.1080/01621459.1927.10502953, with the effective count of rows
n' = p (1 - p) / var(p),   var(p) = C / (C - 1) * sum_c (sum_{i in c} (x_i - p))^2 / n^2      over C clusters

Of the difference of two shares on the same rows, the 2.5th and the 97.5th percentile of the bootstrap that draws
clusters: mean(x*) - mean(y*), each cluster as often as it is drawn among C draws with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Z = 1.959964  # two-sided 95 %


class Interval(NamedTuple):
    """An estimated share and its 95 % interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} (95 % {self.low:.3f} to {self.high:.3f})"


def proportion(hit_N: ArrayLike, cluster_N: Sequence[Hashable] | None = None) -> Interval:
    """Share of true values with its Wilson interval.

    Args:
        hit_N: truth values, at least one; a tie counts 0.5.
        cluster_N: which rows belong together, e.g. those of one prompt; None takes all as independent.

    Raises:
        ValueError: there are no values, or not one cluster for each.

    >>> print(proportion([True] * 60 + [False] * 40))
    0.600 (95 % 0.502 to 0.691)
    >>> print(proportion([True] * 60 + [False] * 40, cluster_N=[i // 10 for i in range(100)]))
    0.600 (95 % 0.300 to 0.840)
    """
    hit_N = np.asarray(hit_N, np.float64)
    if not len(hit_N) or (cluster_N is not None and len(cluster_N) != len(hit_N)):
        raise ValueError("a share needs at least one value, and a cluster for each value or none")
    n, p = float(len(hit_N)), float(hit_N.mean())
    if cluster_N is not None:
        n = min(n, _effective_count(hit_N, cluster_N, p))
    center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # At the ends a bound is the end itself; rounding would leave 1e-18 between them.
    return Interval(p, center - half if p > 0 else 0.0, center + half if p < 1 else 1.0)


def paired_difference(
    hit_N: ArrayLike,
    other_N: ArrayLike,
    cluster_N: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    num_draws: int = 10_000,
) -> Interval:
    """How much larger one share is than another on the same rows, with its bootstrap interval.

    Args:
        hit_N: truth values of the one, at least one; a tie counts 0.5.
        other_N: those of the other, row by row.
        cluster_N: which rows belong together, e.g. those of one prompt; None takes all as independent.
        seed: of the draws.
        num_draws: resamples, >= 1.

    Raises:
        ValueError: the numbers of values differ or are zero, there is not one cluster for each, or num_draws is below 1.

    >>> print(paired_difference([1, 1, 1, 0] * 25, [1, 0, 1, 0] * 25))
    0.250 (95 % 0.170 to 0.340)
    """
    hit_N, other_N = np.asarray(hit_N, np.float64), np.asarray(other_N, np.float64)
    if hit_N.ndim != 1 or hit_N.shape != other_N.shape or not len(hit_N):
        raise ValueError(f"expected two equally long lists of values, got {hit_N.shape} and {other_N.shape}")
    if (cluster_N is not None and len(cluster_N) != len(hit_N)) or num_draws < 1:
        raise ValueError("a difference needs a cluster for each value or none, and at least one draw")
    cluster_N = range(len(hit_N)) if cluster_N is None else numbered(cluster_N).tolist()
    excess_C = np.bincount(cluster_N, hit_N - other_N)
    rows_C = np.bincount(cluster_N)
    C, draw = len(rows_C), np.random.default_rng(seed)
    drawn = [
        excess_C[chosen_C].sum() / rows_C[chosen_C].sum()
        for chosen_C in (draw.integers(0, C, C) for _ in range(num_draws))
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float((hit_N - other_N).mean()), float(low), float(high))


def numbered(items: Iterable[Hashable]) -> NDArray[np.int64]:
    """The number of each item, from 0 in the order in which they first appear; equal items share one.

    >>> numbered(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    # numpy's unique would pad all texts to the longest: 1 GB for 20,000 prompts
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], np.int64)


def _effective_count(hit_N: NDArray[np.float64], cluster_N: Sequence[Hashable], p: float) -> float:
    excess_C = np.bincount(numbered(cluster_N), hit_N - p)
    C = len(excess_C)
    if C == 1 or p in (0, 1):  # no variance to estimate: each cluster counts as one row
        return float(C)
    variance = C / (C - 1) * float(np.square(excess_C).sum()) / len(hit_N) ** 2
    return p * (1 - p) / variance if variance > 0 else math.inf
