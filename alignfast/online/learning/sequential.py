"""An interval of a mean that holds at all times at once, so that one may look after every value and stop where one likes.

    K+_t(m) = prod_{i <= t} (1 + min(l_i, c / m) (x_i - m))         K-_t(m) = prod_{i <= t} (1 - min(l_i, c / (1 - m)) (x_i - m))
    l_t = sqrt(2 log(2 / alpha) / (v_{t-1} t log(1 + t)))           v_t = (1/4 + sum_{i <= t} (x_i - mu_i)^2) / (1 + t)
    interval = {m : max(K+_t(m), K-_t(m)) / 2 < 1 / alpha}          mu_t = (1/2 + sum_{i <= t} x_i) / (1 + t)

The hedged capital of arXiv 2010.09686 (section 4.4, c = 1/2): a gambler who bets against every m; where m is the mean of
values that come one after the other, the capital grows beyond 1 / alpha in one of 1 / alpha runs at most (Ville), however
long these are. Values lie in [0, 1] and share a mean given what came before; they need not be alike.

Letters: N values, M means that are bet against.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from alignfast.data.intervals import Interval

_C = 0.5  # of the whole capital at most, a bet
_GRID = 1000


def mean_interval(value_N: ArrayLike, alpha: float = 0.05) -> Interval:
    """The mean of values so far, and the means that they leave possible.

    Args:
        value_N: in [0, 1], in the order in which they came; none leaves all possible.
        alpha: chance that the true mean is ever outside, in (0, 1).

    Raises:
        ValueError: a value lies outside [0, 1], or alpha outside (0, 1).

    >>> print(mean_interval([]))
    0.500 (95 % 0.000 to 1.000)
    >>> print(mean_interval([1, 1, 0, 1] * 40))
    0.750 (95 % 0.637 to 0.856)
    """
    value_N = np.asarray(value_N, np.float64)
    if value_N.ndim != 1 or not ((value_N >= 0) & (value_N <= 1)).all():
        raise ValueError("values must be a list of numbers in [0, 1]")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if not len(value_N):
        return Interval(0.5, 0.0, 1.0)
    mean_M = (np.arange(_GRID) + 0.5) / _GRID
    bet_N1 = _bets(value_N, alpha)[:, None]
    gap_NM = value_N[:, None] - mean_M
    up_M = np.log1p(np.minimum(bet_N1, _C / mean_M) * gap_NM).sum(0)
    down_M = np.log1p(-np.minimum(bet_N1, _C / (1 - mean_M)) * gap_NM).sum(0)
    left_M = np.flatnonzero(np.maximum(up_M, down_M) < math.log(2 / alpha))
    mean = float(value_N.mean())
    if not len(left_M):  # narrower than the grid
        return Interval(mean, mean, mean)
    # half a step outwards: a mean between two of the grid is left possible
    return Interval(mean, float(left_M[0] / _GRID), float((left_M[-1] + 1) / _GRID))


def _bets(value_N: np.ndarray, alpha: float) -> np.ndarray:
    """How much is bet on each value, from those before it."""
    t_N = np.arange(1, len(value_N) + 1)
    mu_N = (0.5 + np.cumsum(value_N)) / (1 + t_N)
    v_N = (0.25 + np.cumsum((value_N - mu_N) ** 2)) / (1 + t_N)
    before_N = np.concatenate([[0.25], v_N[:-1]])
    bet_N: np.ndarray = np.sqrt(2 * math.log(2 / alpha) / (before_N * t_N * np.log1p(t_N)))
    return bet_N
