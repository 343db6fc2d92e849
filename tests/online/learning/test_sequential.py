"""An interval that holds at all times: seldom wrong however often one looks, and narrow enough to be of use."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignfast.online.learning.sequential import _SHARE_B, log_capital, mean_interval


def capitals(value_RN: np.ndarray, mean: float) -> np.ndarray:
    """log K+ of each run after each of its values."""
    won_RNB = np.log1p(_SHARE_B * (value_RN[:, :, None] / mean - 1)).cumsum(1)
    found: np.ndarray = np.logaddexp.reduce(won_RNB, -1) - math.log(len(_SHARE_B))
    return found


def test_capital_after_each_value_is_that_of_a_list_that_ends_there() -> None:
    value_N = np.random.default_rng(0).random(60)
    found_N = capitals(value_N[None], 0.4)[0]
    assert [log_capital(value_N[:n], 0.4) for n in (1, 20, 60)] == pytest.approx(
        found_N[[0, 19, 59]].tolist()
    )


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.8])
def test_it_is_seldom_wrong_at_any_time(mean: float) -> None:
    draw, enough = np.random.default_rng(1), math.log(2 / 0.05)
    value_RN = (draw.random((400, 800)) < mean).astype(float)
    above_R = (capitals(value_RN, mean) >= enough).any(1)
    below_R = (capitals(1 - value_RN, 1 - mean) >= enough).any(1)
    assert (above_R | below_R).mean() <= 0.05
    value_RN = draw.beta(2 * mean, 2 * (1 - mean), (200, 800))  # anything in [0, 1]
    assert (capitals(value_RN, mean) >= enough).any(1).mean() <= 0.05


def test_ends_are_the_means_against_which_the_gambler_has_won_enough() -> None:
    value_N = np.random.default_rng(2).random(300) ** 2
    found = mean_interval(value_N, alpha=0.1)
    assert found.low < 1 / 3 < found.high
    assert found.estimate == pytest.approx(value_N.mean())
    assert log_capital(value_N, found.low) == pytest.approx(math.log(20), abs=1e-6)
    assert log_capital(1 - value_N, 1 - found.high) == pytest.approx(math.log(20), abs=1e-6)
    assert mean_interval(value_N, alpha=0.01).low < found.low


def test_width_falls_with_the_number_of_values() -> None:
    widths = [mean_interval([0, 1] * n) for n in (50, 500, 5000)]
    assert [round(of.high - of.low, 2) for of in widths] == [0.33, 0.11, 0.03]
    still = mean_interval([0.5] * 1000)  # values without variance are known sooner
    assert still.high - still.low < 0.02


@pytest.mark.parametrize("ends", [[0.0] * 30, [1.0] * 30])
def test_values_at_an_end(ends: list[float]) -> None:
    found = mean_interval(ends)
    assert (found.low == 0, found.high == 1) == (ends[0] == 0, ends[0] == 1)
    assert found.low <= found.estimate <= found.high
    assert found.high - found.low < 0.25


def test_what_it_refuses() -> None:
    assert mean_interval([]) == (0.5, 0.0, 1.0)
    for wrong in ([0.5, 1.5], [float("nan")], [[0.5]]):
        with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
            mean_interval(wrong)
    with pytest.raises(ValueError, match="alpha must lie in"):
        mean_interval([0.5], alpha=0.0)
