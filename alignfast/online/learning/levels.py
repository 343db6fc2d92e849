"""What votes share beside rewards: the levels of each kind, every voter's own offset, and how common ties are.

    min over tau, b    sum_i w_i log(1 + exp(-s_i (r_i - tau_{k_i} - b_{v_i}))) + sum_v b_v^2 / (2 prior^2)
    nu                 sum_i w_i P(tie | d_i, nu) = sum of w_i over ties

Given the rewards these are convex, and small: they are solved and not trained. At the solution the gradient of the whole in
the rewards is that with tau, b and nu held (the envelope theorem), so the reward model may take them as constants. A voter
with few votes is taken to be like the others.

Letters: M judgements of single answers, Q comparisons, K levels, V voters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_ROUNDS = 30
_STEP = 2.0  # of one Newton step at most: far out the curvature is 0
_LEVEL_PRIOR = 10.0  # standard deviation: holds a level that all votes are above
_LOG_NU = 8.0  # ties are at most exp(8) / 2 as common as wins of alike answers


class Levels(NamedTuple):
    """tau of each level, b of each voter."""

    level_K: Floats
    offset_V: Floats


def fit_levels(
    reward_M: Floats,
    above_M: NDArray[np.bool_],
    level_M: Ints,
    voter_M: Ints,
    weight_M: Floats,
    *,
    prior: float = 1.0,
) -> Levels:
    """Levels and offsets under which votes are likeliest.

    Args:
        reward_M: of the judged answer.
        above_M: whether the vote is above the level.
        level_M: number of the level, from 0.
        voter_M: number of the voter, from 0.
        weight_M: of the vote, >= 0.
        prior: standard deviation of voters' offsets, > 0.

    >>> reward_M, above_M = np.zeros(400), np.arange(400) % 4 > 0
    >>> found = fit_levels(reward_M, above_M, np.zeros(400, int), np.zeros(400, int), np.ones(400))
    >>> round(float(-found.level_K[0] - found.offset_V[0]), 2), round(math.log(3), 2)
    (1.1, 1.1)
    """
    num_levels, num_voters = int(level_M.max(initial=-1)) + 1, int(voter_M.max(initial=-1)) + 1
    level_K, offset_V = np.zeros(num_levels), np.zeros(num_voters)
    for _ in range(_ROUNDS):
        before_K = level_K.copy()
        for number_M, values, sd in ((level_M, level_K, _LEVEL_PRIOR), (voter_M, offset_V, prior)):
            chance_M = 1 / (1 + np.exp(-(reward_M - level_K[level_M] - offset_V[voter_M]).clip(-500, 500)))
            slope = np.bincount(number_M, weight_M * (above_M - chance_M), len(values)) + values / sd**2
            curve = np.bincount(number_M, weight_M * chance_M * (1 - chance_M), len(values)) + 1 / sd**2
            values -= (slope / curve).clip(-_STEP, _STEP)
        # Levels up and offsets down by the same changes no chance: taken at once, or it takes a hundred rounds.
        mean = offset_V.mean() if num_voters else 0.0
        level_K, offset_V = level_K + mean, offset_V - mean
        if np.abs(level_K - before_K).max(initial=0) < 1e-6:
            break
    return Levels(level_K, offset_V)


def fit_ties(lead_Q: Floats, tied_Q: NDArray[np.bool_], weight_Q: Floats) -> float:
    """log nu under which as many ties are expected as there are; -inf where there are none.

    >>> round(fit_ties(np.zeros(30), np.arange(30) % 3 == 0, np.ones(30)), 6)  # as many as wins of either side
    0.0
    """
    if not tied_Q.any():
        return -math.inf
    apart_Q = np.logaddexp(lead_Q / 2, -lead_Q / 2)
    low, high = -_LOG_NU, _LOG_NU
    for _ in range(50):
        middle = (low + high) / 2
        too_many = (weight_Q * (1 / (1 + np.exp(apart_Q - middle)) - tied_Q)).sum() > 0
        low, high = (low, middle) if too_many else (middle, high)
    return (low + high) / 2
