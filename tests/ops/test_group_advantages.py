"""group_advantages: by a plain loop, as TRL has it; what equals what; refusals.

Letters: N samples.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignfast.kernels import group_advantages
from alignfast.kernels.group_advantages import SCALES

every_scale = pytest.mark.parametrize("scale", SCALES)
NAN = math.nan


def by_hand(rewards: list[float], groups: list[int], scale: str) -> list[float]:
    """One sample after the other, with Python's own statistics."""
    out, kept = [], [r for r in rewards if not math.isnan(r)]
    for reward, group in zip(rewards, groups):
        beside = [r for r, g in zip(rewards, groups) if g == group and not math.isnan(r)]
        over = {"group": beside, "batch": kept, "none": []}[scale]
        deviation = statistics.stdev(over) if len(over) > 1 else 0.0
        centred = 0.0 if math.isnan(reward) else reward - statistics.fmean(beside)
        out.append(centred if scale == "none" else centred / (deviation + 1e-4))
    return out


@every_scale
def test_against_a_plain_loop(scale: str) -> None:
    """Groups of 1 to 4, mixed; one sample without a reward, and one group of them alone."""
    rewards = [0.5, 1.0, NAN, 0.25, -2.0, 0.0, 3.0, 1.0, NAN, 0.7]
    groups = [7, -3, 7, 7, -3, 2**40, -3, -3, 0, 7]
    advantages_N = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), scale=scale
    )
    assert advantages_N.tolist() == pytest.approx(by_hand(rewards, groups, scale), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("group", [0.99980003, -0.99980003, 0.0, 0.70670700, -0.70670700, 0.0]),
        ("batch", [1.19494307, -1.19494307, 0.0, 0.29873577, -0.29873577, 0.0]),
        ("none", [0.5, -0.5, 0.0, 0.125, -0.125, 0.0]),
    ],
)
def test_numbers_of_trl(scale: str, expected: list[float]) -> None:
    """Recorded: what lines 2756 to 2806 of TRL 1.16's grpo_trainer.py give for two groups of three."""
    rewards_N = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.0, NAN])
    actual_N = group_advantages(rewards_N, torch.tensor([0, 0, 0, 1, 1, 1]), scale=scale)
    assert actual_N.tolist() == pytest.approx(expected, abs=2e-7)


@every_scale
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_variance_is_exactly_zero(scale: str, reward: float, dtype: torch.dtype) -> None:
    """Ten times 0.1, divided by 10, is not 0.1; nor may a group of one, or of one with a reward, move anything."""
    rewards_N = torch.tensor([reward] * 10 + [5.0, 2.0, NAN], dtype=dtype)
    advantages_N = group_advantages(rewards_N, torch.tensor([0] * 10 + [1, 2, 2]), scale=scale)
    assert advantages_N.tolist() == [0.0] * 13


@every_scale
def test_order_and_names_of_groups_do_not_matter(scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_N, group_N = torch.rand(40, generator=generator), torch.arange(40) // 8
    expected_N = group_advantages(rewards_N, group_N, scale=scale)
    order_N = torch.randperm(40, generator=generator)
    renamed_N = torch.tensor([3, -1, 100, 7, 0])[group_N]
    shuffled_N = group_advantages(rewards_N[order_N], renamed_N[order_N], scale=scale)
    assert torch.allclose(shuffled_N, expected_N[order_N], rtol=1e-6, atol=1e-7)


@every_scale
def test_shift_and_scale_of_the_rewards(scale: str) -> None:
    """A constant added to a group changes nothing; a factor changes what is not divided by a deviation."""
    rewards_N = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group_N = torch.arange(12) % 3
    expected_N = group_advantages(rewards_N, group_N, scale=scale)
    shift_N = torch.zeros(12, dtype=torch.float64) + 5 if scale == "batch" else 5.0 * group_N
    assert torch.allclose(group_advantages(rewards_N + shift_N, group_N, scale=scale), expected_N, rtol=1e-12)
    scaled_N = group_advantages(1e6 * rewards_N, group_N, scale=scale)
    factor = 1e6 if scale == "none" else 1.0
    assert torch.allclose(scaled_N, factor * expected_N, rtol=1e-3)  # the 1e-4 of the denominator


def test_types() -> None:
    group_N = torch.tensor([0, 0, 1], dtype=torch.int32)
    for rewards_N in (torch.tensor([1, 0, 5]), torch.tensor([1.0, 0.0, 5.0]).bfloat16()):
        advantages_N = group_advantages(rewards_N, group_N, scale="none")
        assert (advantages_N.dtype, advantages_N.tolist()) == (torch.float32, [0.5, -0.5, 0.0])
    rewards_N = torch.rand(3, requires_grad=True)
    assert not group_advantages(rewards_N, group_N).requires_grad


@every_scale
@pytest.mark.parametrize("rewards", [[], [NAN], [NAN, NAN]])
def test_nothing_to_compare(scale: str, rewards: list[float]) -> None:
    group_N = torch.zeros(len(rewards), dtype=torch.int64)
    assert group_advantages(torch.tensor(rewards), group_N, scale=scale).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "std"}, "scale='std' is not one of group, batch, none"),
        ({"group_N": torch.zeros(2, dtype=torch.int64)}, r"got \(3,\) rewards and \(2,\) groups"),
        ({"rewards_N": torch.zeros(3, 1)}, r"got \(3, 1\) rewards"),
        ({"group_N": torch.zeros(3)}, "numbered by integers, got torch.float32"),
        ({"rewards_N": torch.tensor([0.0, -math.inf, 1.0])}, "reward 1 is -inf; mark a sample without"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Tensor] = {
        "rewards_N": torch.zeros(3),
        "group_N": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments | change)


@given(
    samples=st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0, -5.5, NAN])), max_size=30
    ),
    scale=st.sampled_from(SCALES),
)
def test_any_samples(samples: list[tuple[int, float]], scale: str) -> None:
    groups, rewards = [group for group, _ in samples], [reward for _, reward in samples]
    rewards_N = torch.tensor(rewards, dtype=torch.float64)
    actual_N = group_advantages(rewards_N, torch.tensor(groups, dtype=torch.int64), scale=scale)
    # where by hand a group's variance is not 0 but rounding, the loop divides noise by 1e-4
    assert actual_N.tolist() == pytest.approx(by_hand(rewards, groups, scale), rel=1e-9, abs=1e-11)
