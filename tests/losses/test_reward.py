"""Reward losses against Bradley-Terry's and Plackett-Luce's own formulas, in float64.

Letters: N rows, S answers, H heads.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.losses import bootstrap_counts, reward_counts, reward_loss

GENERATOR = torch.Generator().manual_seed(0)
NUM_ANSWERS = (2, 4, 2, 3)  # pairs and rankings, not sorted by length
REWARDS_SH = 2 * torch.randn(sum(NUM_ANSWERS), 3, generator=GENERATOR, dtype=torch.float64)


def likelihood(rewards: list[float]) -> float:
    """Plackett and Luce: each place is drawn among those left, by exp of the reward."""
    product = 1.0
    for place in range(len(rewards)):
        product *= math.exp(rewards[place]) / sum(math.exp(reward) for reward in rewards[place:])
    return product


def test_is_the_rankings_negative_log_likelihood() -> None:
    """A mean over rows and heads; all orders of a ranking have a probability of 1 together."""
    rows = [part.T.tolist() for part in REWARDS_SH.split(NUM_ANSWERS)]  # by row, head, answer
    expected = -sum(math.log(likelihood(head)) for row in rows for head in row) / len(rows) / 3
    loss, _ = reward_loss(REWARDS_SH, NUM_ANSWERS, num_rows=4)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    orders = [torch.tensor(order, dtype=torch.float64)[:, None] for order in permutations(rows[1][0])]
    total = sum(math.exp(-reward_loss(order_SH, [4], num_rows=1)[0].item()) for order_SH in orders)
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("margins", [None, (0.5, -0.2, 0.0)])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_pairs_are_trls_loss(margins: Any, coefficient: float | None) -> None:
    """Bradley-Terry with margins and centring, as TRL 1.16 writes it, value and gradient."""
    rewards_SH = REWARDS_SH[:6, :1].clone().requires_grad_()
    chosen_N, rejected_N = rewards_SH[::2, 0], rewards_SH[1::2, 0]
    lead_N = chosen_N - rejected_N - (0 if margins is None else torch.tensor(margins))
    expected = -torch.nn.functional.logsigmoid(lead_N).mean()
    if coefficient is not None:
        expected = expected + coefficient * torch.mean((chosen_N + rejected_N) ** 2)
    loss, metrics = reward_loss(
        rewards_SH, (2, 2, 2), margins, num_rows=3, center_rewards_coefficient=coefficient
    )
    gradients = [torch.autograd.grad(x, rewards_SH)[0] for x in (loss, expected)]
    # margins are float32 numbers in `expected`
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(*gradients, rtol=1e-7)
    found = {name: value / reward_counts(3, 6).get(name, 1) for name, value in metrics.items()}
    assert found["accuracy"] == (chosen_N > rejected_N).double().mean()
    assert found["margin"].item() == pytest.approx((chosen_N - rejected_N).mean().item())
    flat = rewards_SH.detach()
    assert [found[f"{kind}_reward"].item() for kind in ("min", "mean", "max")] == pytest.approx(
        [flat.min().item(), flat.mean().item(), flat.max().item()]
    )


def test_micro_batches_add_up() -> None:
    whole = reward_loss(REWARDS_SH, NUM_ANSWERS, num_rows=4, center_rewards_coefficient=0.1)
    parts = [
        reward_loss(REWARDS_SH[:6], NUM_ANSWERS[:2], num_rows=4, center_rewards_coefficient=0.1),
        reward_loss(REWARDS_SH[6:], NUM_ANSWERS[2:], num_rows=4, center_rewards_coefficient=0.1),
    ]
    assert sum(part[0].item() for part in parts) == pytest.approx(whole[0].item(), rel=1e-12)
    for name in ("accuracy", "margin", "mean_reward", "disagreement"):
        assert sum(part[1][name].item() for part in parts) == pytest.approx(whole[1][name].item())


def test_accuracy_is_over_all_pairs_of_a_ranking() -> None:
    """One swap of neighbours among four spoils one of six pairs; a tie counts half."""
    rewards_SH = torch.tensor([[4.0], [2.0], [3.0], [1.0], [1.0], [1.0]])
    _, metrics = reward_loss(rewards_SH, (4, 2), num_rows=2)
    assert metrics["accuracy"].item() == 5 + 0.5
    assert metrics["margin"].item() == pytest.approx(
        (4 - 2) + (4 - 3) + (4 - 1) + (2 - 3) + (2 - 1) + (3 - 1)
    )


def test_weights_count_rows_for_heads() -> None:
    """A row that a head drew twice counts twice, one that it did not draw not at all."""
    weight_NH = torch.tensor([[2, 0, 1], [0, 1, 1], [1, 0, 3], [0, 2, 0]])
    rewards_SH = REWARDS_SH.clone().requires_grad_()
    loss, _ = reward_loss(rewards_SH, NUM_ANSWERS, num_rows=4, weight_NH=weight_NH)
    starts = (0, 2, 6, 8)
    expected = 0.0
    for head in range(3):
        for row, start in enumerate(starts):
            part = REWARDS_SH[start : start + NUM_ANSWERS[row], head : head + 1]
            alone = reward_loss(part, (NUM_ANSWERS[row],), num_rows=1)[0].item()
            expected += weight_NH[row, head].item() * alone / 4 / 3
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert torch.equal(rewards_SH.grad[2:6, 0], torch.zeros(4, dtype=torch.float64))


def test_bootstrap_draws_differ_and_follow_from_the_seed() -> None:
    counts_NH = bootstrap_counts(1000, 3, seed=1)
    assert counts_NH.sum(0).tolist() == [1000] * 3
    assert torch.equal(counts_NH, bootstrap_counts(1000, 3, seed=1))
    assert not torch.equal(counts_NH[:, 0], counts_NH[:, 1])
    left_out = (counts_NH == 0).double().mean(0)
    assert ((left_out - math.exp(-1)).abs() < 0.05).all()  # (1 - 1/n)^n; 3 standard deviations are 0.03


def test_what_is_won_already_keeps_its_digits() -> None:
    """At a lead of 30 nats the loss is e^-30, not the 0 that log-sum-exp less the reward rounds to."""
    rewards_SH: Tensor = torch.tensor([[100.0], [70.0]], requires_grad=True)
    loss, _ = reward_loss(rewards_SH, (2,), num_rows=1)
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)
    assert rewards_SH.grad[1].item() == pytest.approx(math.exp(-30), rel=1e-5)


@pytest.mark.parametrize(
    ("num_answers", "margins", "message"),
    [
        ((2, 1), None, "2 or more answers, got 1"),
        ((3,), (0.5,), "a margin is for two answers"),
        ((2, 2), None, "a reward for each of 4 answers"),
        ((3,), (0.0, 0.0), "a margin for each of 1 rows, got 3 and 2"),
    ],
)
def test_refusals(num_answers: Any, margins: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_loss(REWARDS_SH[:3], num_answers, margins, num_rows=1)
