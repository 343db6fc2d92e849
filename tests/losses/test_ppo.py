"""PPO's maths against loops in float64: where the reward sits, what is masked, how values are clipped.

Letters: P predictions, L tokens of a completion.
"""

from __future__ import annotations

import math

import pytest
import torch

from alignfast.kernels.linear_loss import Stats
from alignfast.losses.ppo import (
    advantages_and_returns,
    explained_variance,
    ppo_counts,
    ppo_objective,
    token_rewards,
    value_loss,
    whiten,
)


def random_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]


def test_the_score_lands_on_the_last_token_and_penalties_on_all():
    penalties = random_rows([3, 1, 0, 4])
    rewards = token_rewards([10.0, 20.0, 30.0, 40.0], penalties)
    for score, penalty_L, reward_L in zip([10.0, 20.0, 30.0, 40.0], penalties, rewards):
        expected = (-penalty_L).tolist()
        if expected:
            expected[-1] += score
        assert reward_L.tolist() == expected


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5), (1.0, 0.0)])
def test_advantages_of_ragged_completions(gamma, lam):
    """Lengths 0 and 1 beside longer ones: each row is a loop of its own, and V after its end is 0."""
    lengths = [5, 1, 0, 3]
    rewards, values = random_rows(lengths), random_rows(lengths, seed=1)
    advantages, returns = advantages_and_returns(rewards, values, gamma=gamma, lam=lam)
    for reward_L, value_L, advantage_L, return_L in zip(rewards, values, advantages, returns):
        carried, following, expected = 0.0, 0.0, []
        for reward, value in zip(reversed(reward_L.tolist()), reversed(value_L.tolist())):
            carried = reward + gamma * following - value + gamma * lam * carried
            following = value
            expected.insert(0, carried)
        assert advantage_L.tolist() == pytest.approx(expected, abs=1e-12)
        assert return_L.tolist() == pytest.approx((advantage_L + value_L).tolist(), abs=1e-12)


def test_whitening_is_over_real_tokens_alone():
    rows = random_rows([7, 1, 0, 4])
    white_P = torch.cat(whiten(rows))
    assert white_P.mean().abs() < 1e-12
    assert white_P.std() == pytest.approx(1, abs=1e-6)
    assert [len(row_L) for row_L in whiten(rows)] == [7, 1, 0, 4]
    kept_P = torch.cat(whiten(rows, shift_mean=False))
    assert kept_P.mean() == pytest.approx(torch.cat(rows).mean().item(), abs=1e-12)
    assert whiten([torch.tensor([3.0])])[0].tolist() == [3.0]
    assert torch.cat(whiten([torch.full((4,), 2.0)])).tolist() == [0.0] * 4  # no variance, no infinity


@pytest.mark.parametrize("cliprange_value", [None, 0.3])
def test_the_critics_loss_is_clipped(cliprange_value):
    values_P, old_values_P, returns_P = random_rows([64, 64, 64])
    values_P.requires_grad_()
    loss, metrics = value_loss(
        values_P, old_values_P, returns_P, num_items=100, vf_coef=0.5, cliprange_value=cliprange_value
    )
    (gradient_P,) = torch.autograd.grad(loss, values_P)
    expected, clipped, slopes = 0.0, 0, []
    for value, old, wanted in zip(values_P.tolist(), old_values_P.tolist(), returns_P.tolist()):
        plain = (value - wanted) ** 2
        near = (
            value
            if cliprange_value is None
            else min(max(value, old - cliprange_value), old + cliprange_value)
        )
        held = (near - wanted) ** 2
        expected += max(plain, held) / 2
        clipped += held > plain
        slopes.append(0.0 if held > plain else 0.5 * (value - wanted) / 100)
    assert loss.item() == pytest.approx(0.5 * expected / 100, rel=1e-12)
    assert metrics["loss/value_avg"].item() == pytest.approx(expected / 100, rel=1e-12)
    assert metrics["val/clipfrac_avg"].item() == clipped
    assert gradient_P.tolist() == pytest.approx(slopes, abs=1e-12)
    assert (clipped > 0) == (cliprange_value is not None)


def test_explained_variance():
    returns = random_rows([5, 3])
    assert explained_variance(returns, returns) == 1
    assert explained_variance([torch.zeros(5), torch.zeros(3)], returns) == pytest.approx(0, abs=1e-12)
    assert explained_variance(returns, [torch.ones(5), torch.ones(3)]) == 0


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_policys_loss_and_its_metrics(dual_clip):
    logps_P, old_P, advantages_P = (x_P - 1 for x_P in random_rows([40, 40, 40]))
    loss_fn = ppo_objective(
        (30, 10), advantages_P, old_P, num_items=50, epsilon=0.2, epsilon_high=0.3, dual_clip=dual_clip
    )
    logps_P.requires_grad_()
    entropy_P = torch.rand(40, dtype=torch.float64)
    parts = [
        loss_fn(Stats(logps=logps_P[rows], entropy=entropy_P[rows]), rows)
        for rows in (slice(0, 7), slice(7, 40))
    ]
    metrics = {name: parts[0][1][name] + parts[1][1][name] for name in parts[0][1]}
    ratios = (logps_P - old_P).exp().tolist()
    expected, clipped = 0.0, 0
    for ratio, advantage in zip(ratios, advantages_P.tolist()):
        plain, held = ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage
        worth = min(plain, held)
        clipped += held < plain
        if dual_clip is not None and advantage < 0:
            worth = max(worth, dual_clip * advantage)
        expected -= worth / 50
    assert (parts[0][0] + parts[1][0]).item() == pytest.approx(expected, rel=1e-9)
    assert metrics["loss/policy_avg"].item() == pytest.approx(expected, rel=1e-9)
    assert metrics["policy/clipfrac_avg"].item() == clipped
    assert metrics["val/ratio"].item() == pytest.approx(sum(ratios), rel=1e-9)
    assert metrics["val/ratio_var"].item() == pytest.approx(sum((r - 1) ** 2 for r in ratios), rel=1e-9)
    squares = sum(math.log(r) ** 2 / 2 for r in ratios)
    assert metrics["policy/approxkl_avg"].item() == pytest.approx(squares, rel=1e-9)
    assert metrics["policy/entropy_avg"].item() == pytest.approx(entropy_P.sum().item(), rel=1e-9)
    counts = ppo_counts(list(metrics), 40)
    assert set(metrics) - set(counts) == {"loss/policy_avg", "max_ratio"}
